"""Files that PyTorch wrote (fixtures/make_torch_files.py), and files that would run code if anything unpickled them."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy._core import multiarray

from warm_jax.weights.pth import read_torch

FIXTURES = Path(__file__).parent / "fixtures"
LEGACY_HEAD = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_tensors_of_both_containers(name):
    read = read_torch(FIXTURES / name)
    base = np.arange(24, dtype=np.float32)
    expected = {
        "matrix": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).T,
        "tail": base[20:],
        "parameter": np.full((2, 2), 0.5, np.float32),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.array([1.5, -2], np.float16),
        "double": np.array([1e300]),
        "flags": np.array([True, False]),
        "bytes": np.array([255, 0], np.uint8),
    }
    assert read.keys() == {f"state_dict.{key}" for key in [*expected, "brain"]}  # numbers and strings are left out
    for key, value in expected.items():
        np.testing.assert_array_equal(read[f"state_dict.{key}"], value)
        assert read[f"state_dict.{key}"].dtype == value.dtype
    np.testing.assert_array_equal(read["state_dict.brain"].astype(np.float32), [1.5, -2])
    assert not read["state_dict.matrix"].flags.writeable


def in_zip(pickled, storages=None, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def in_legacy(pickled):
    return b"".join(pickle.dumps(part, 2) for part in LEGACY_HEAD) + pickled + pickle.dumps([], 2)


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def evil(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    text = str(marker).encode()
    yield "posix.system", pickle.dumps(Calls(os.system, command), 2)
    yield "posix.system", pickle.dumps({"state_dict": {"weight": Calls(os.system, command)}}, 2)
    yield "posix.system", pickle.dumps({"a": [(1, (2, Calls(os.system, command)))]}, 4)  # STACK_GLOBAL, framed
    yield "posix.system", pickle.dumps(Calls(os.system, command), 0)
    yield "__builtin__.eval", pickle.dumps(Calls(eval, touch), 2)
    yield "__builtin__.exec", pickle.dumps(Calls(exec, touch), 2)
    yield "builtins.eval", pickle.dumps(Calls(eval, touch), 4)
    yield "__builtin__.getattr", pickle.dumps(Calls(getattr, "", "join"), 2)
    yield "_reconstruct", pickle.dumps(np.arange(3), 2)
    yield "_reconstruct", pickle.dumps(Calls(multiarray._reconstruct, np.ndarray, (0,), b"b"), 2)
    yield "_codecs.encode", pickle.dumps({"weight": b"\xff\xfe"}, 2)
    yield "os.system", b"\x80\x02(X" + struct.pack("<I", len(text)) + text + b"ios\nsystem\n."  # INST
    yield "os.system", b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(text)) + text + b"o."  # OBJ
    yield "os.system", b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81."  # NEWOBJ
    yield "torch.load", b"\x80\x02ctorch\nload\nX" + struct.pack("<I", len(text)) + text + b"\x85R."
    yield "torch.hub.load", b"\x80\x02ctorch.hub\nload\n)R."
    yield "torch.FloatStorage.from_file", b"\x80\x04\x8c\x05torch\x8c\x16FloatStorage.from_file\x93)R."
    yield "OrderedDict.__init__", b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "where a dict belongs", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b."  # BUILD on a function
    yield "unexpected arguments", b"\x80\x02ccollections\nOrderedDict\nX\x01\x00\x00\x00a\x85R."
    yield "unexpected arguments", b"\x80\x02ctorch\nFloatStorage\n)R."
    yield "not a global", b"\x80\x02X\x09\x00\x00\x00os.system)R."


@pytest.mark.parametrize("wrap", [in_zip, in_legacy, bytes], ids=["zip", "legacy", "bare"])
def test_no_pickle_runs_code(tmp_path, wrap):
    marker = tmp_path / "executed"
    for i, (named, pickled) in enumerate(evil(marker)):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(wrap(pickled))
        with pytest.raises(ValueError) as caught:
            read_torch(path)
        assert named in str(caught.value) or wrap is bytes, (named, str(caught.value))
        assert str(path) in str(caught.value)
        assert not marker.exists()


def test_the_traps_are_live(tmp_path):
    # The same files, unpickled: what the reader is there for.
    marker = tmp_path / "executed"
    pickle.loads(next(evil(marker))[1])
    assert marker.exists()


def tensor_pickle(numel=4, offset=0, shape=(2, 2), strides=(2, 1), key="0", kind="FloatStorage"):
    """A dict of one tensor, its opcodes by hand: pickle would insist on importing torch."""

    def plain(value):
        return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")

    reference = (
        b"(" + plain("storage") + f"ctorch\n{kind}\n".encode() + plain(key) + plain("cpu") + plain(numel) + b"tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + plain(offset) + plain(shape) + plain(strides)
    return b"\x80\x02}" + plain("w") + call + b"\x89}tRs."


DATA = np.arange(4, dtype=np.float32).tobytes()


def test_the_hand_made_pickle_is_sound(tmp_path):
    (tmp_path / "a.pth").write_bytes(in_zip(tensor_pickle(), {"0": DATA}))
    np.testing.assert_array_equal(read_torch(tmp_path / "a.pth")["w"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (in_zip(tensor_pickle(shape=(3, 2)), {"0": DATA}), "beyond its storage"),
        (in_zip(tensor_pickle(offset=1), {"0": DATA}), "beyond its storage"),
        (in_zip(tensor_pickle(strides=(10**6, 1)), {"0": DATA}), "beyond its storage"),
        (in_zip(tensor_pickle(shape=(10**9, 10**9), strides=(0, 0)), {"0": DATA}), "beyond its storage"),
        (in_zip(tensor_pickle(shape=(2, 1), strides=(1, 10**30)), {"0": DATA}), "a.pth"),
        (in_zip(tensor_pickle(offset=-1), {"0": DATA}), "unexpected arguments"),
        (in_zip(tensor_pickle(shape=(2,), strides=(2, 1)), {"0": DATA}), "beyond its storage"),
        (in_zip(tensor_pickle(numel=10**12), {"0": DATA}), "shorter than 1000000000000"),
        (in_zip(tensor_pickle(), {"0": DATA[:-1]}), "shorter than 4"),
        (in_zip(tensor_pickle(kind="DoubleStorage"), {"0": DATA}), "shorter than 4"),
        (in_zip(tensor_pickle(kind="QInt8Storage"), {"0": DATA}), r"torch\.QInt8Storage"),
        (in_zip(tensor_pickle(key="../../secret"), {"0": DATA}), "missing"),
        (in_zip(tensor_pickle(), {"0": DATA}, zipfile.ZIP_DEFLATED), "compressed"),
        (in_zip(tensor_pickle(), {"0": DATA})[:-30], "damaged zip"),
        (in_zip(tensor_pickle(), {"0": DATA}).replace(DATA, DATA[::-1]), "damaged zip"),
        (in_zip(tensor_pickle()[:-8]), "not enough data"),
        (in_zip(b"\x80\x02X\xff\xff\xff\xff."), "a.pth"),
        (in_zip(b"\x80\x02}(K\x01K\x02u."), "keys are not strings"),
        (in_zip(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."), "nested too deeply"),  # contains itself
        (in_zip(b"\x80\x02]."), "no dict"),
        (in_legacy(pickle.dumps({}, 2))[:40], "a.pth"),
        (b"", "a.pth"),
        (b"<html>404</html>", "a.pth"),
    ],
)
def test_damaged_and_lying_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_torch(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_every_truncation_is_refused(tmp_path, name):
    whole = (FIXTURES / name).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "a.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.pth"):
            read_torch(tmp_path / "a.pth")


def test_long_names_and_entries_that_multiply_are_refused(tmp_path):
    """A name before each of thousands would fill a memory; a thousand empty dicts three deep would take minutes."""
    inner = dict.fromkeys(map(str, range(1000)))
    outer = {str(i): {str(j): inner for j in range(1000)} for i in range(2)}
    for content, message in (({"n" * 10**6: inner}, "at most 1000 letters"), (outer, "tensors and other entries")):
        (tmp_path / "a.pth").write_bytes(in_legacy(pickle.dumps(content, 2)))
        with pytest.raises(ValueError, match=message):
            read_torch(tmp_path / "a.pth")


def test_a_dict_that_multiplies_is_refused(tmp_path):
    # 1000 entries that are the same dict of 1000 tensors: a megabyte of names otherwise becomes a billion.
    one = tensor_pickle()[2:-1]
    names = [b"X\x04\x00\x00\x00" + f"{i:04d}".encode() for i in range(1000)]
    tensor = one[1 + len(b"X\x01\x00\x00\x00w") : -1]
    inner = b"}(" + names[0] + tensor + b"q\x07" + b"".join(n + b"h\x07" for n in names[1:]) + b"u"
    outer = b"}(" + names[0] + inner + b"q\x08" + b"".join(n + b"h\x08" for n in names[1:]) + b"u"
    content = b"\x80\x02" + outer + b"."
    (tmp_path / "a.pth").write_bytes(in_zip(content, {"0": DATA}))
    with pytest.raises(ValueError, match="more than 100000"):
        read_torch(tmp_path / "a.pth")
