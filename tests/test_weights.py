"""The safetensors layout as its specification has it, written here by hand; and the hash that a file must have."""

import hashlib
import json

import numpy as np
import pytest

from warm_jax.weights.tensors import read_safetensors, require_file, write_safetensors


def by_hand(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


VALUES = np.arange(6, dtype="<f4").reshape(2, 3)
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_a_file_of_the_specification_is_read(tmp_path):
    byte = {"dtype": "U8", "shape": [], "data_offsets": [24, 25]}
    header = {"__metadata__": {"licence": "MIT"}, "w": ENTRY, "b": byte}
    (tmp_path / "a.safetensors").write_bytes(by_hand(header, VALUES.tobytes() + b"\x07"))
    arrays, metadata = read_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["w"], VALUES)
    assert arrays["b"] == 7 and arrays["b"].shape == () and metadata == {"licence": "MIT"}


def test_what_is_written_follows_the_specification(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": VALUES.T, "a": np.float64(2).reshape(())}, {"k": "v"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert length % 8 == 0
    assert header["__metadata__"] == {"k": "v"}
    assert header["a"] == {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}
    assert header["w"] == {"dtype": "F32", "shape": [3, 2], "data_offsets": [8, 32]}
    np.testing.assert_array_equal(np.frombuffer(body[8:], "<f4").reshape(3, 2), VALUES.T)  # whatever its strides


def test_equal_content_gives_equal_bytes(tmp_path):
    write_safetensors(tmp_path / "a", {"x": VALUES, "y": VALUES}, {"k": "v"})
    write_safetensors(tmp_path / "b", {"y": VALUES, "x": VALUES}, {"k": "v"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (10**15).to_bytes(8, "little") + b"{}",
        by_hand(b"{not json", b""),
        by_hand(b"[" * 100_000, b""),
        by_hand([1], b""),
        by_hand({"w": ENTRY}, VALUES.tobytes()[:-1]),
        by_hand({"w": ENTRY | {"shape": [2, 4]}}, VALUES.tobytes()),
        by_hand({"w": ENTRY | {"shape": [10**30, 10**30]}}, VALUES.tobytes()),
        by_hand({"w": ENTRY | {"shape": [-2, -3]}}, VALUES.tobytes()),
        by_hand({"w": ENTRY | {"dtype": "F9"}}, VALUES.tobytes()),
        by_hand({"w": ENTRY | {"data_offsets": [24, 0]}}, VALUES.tobytes()),
        by_hand({"__metadata__": [1]}, b""),
        by_hand({"w": {"dtype": "F32"}}, VALUES.tobytes()),
        b"PK\x03\x04 another format",
    ],
)
def test_damaged_and_lying_files_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file \(.+\): cut short"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_file_must_be_there_and_be_the_one_expected(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights at .*weights\.pth\. Fetch it\."):
        require_file(path, "", "Fetch it.")
    path.write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert require_file(path, digest[:8], "Fetch it.") == digest
    with pytest.raises(ValueError, match=f"has sha256 {digest}, expected 00000000….* Fetch it"):
        require_file(path, "00000000", "Fetch it.")
