"""CIFAR-10 is fetched from a server on the loopback interface: whole, cut off, gone on with, and wrong."""

import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest

from configs import cifar10
from warm_jax.data import download, sources
from warm_jax.experiments import automatic
from warm_jax.training import train


def archive():
    """CIFAR-10's layout with ten images a file."""
    rng, content = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
            records = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
            records[:, 0] %= 10
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = records.size
            tar.addfile(entry, io.BytesIO(records.tobytes()))
    return content.getvalue()


CONTENT = archive()
PUBLISHED = download.MD5
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; hangs up after `cut` bytes of an answer; knows ranges if `ranges`. `asked`: their headers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.cut, self.ranges, self.status, self.asked = CONTENT, None, True, 200, []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if server.status != 200 or first >= len(server.content):
            self.send_error(server.status if server.status != 200 else 416)
            return
        rest = server.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if server.cut is None else rest[: server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as made:
        monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{made.server_port}/cifar-10-binary.tar.gz")
        monkeypatch.setattr(download, "MD5", MD5)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def fetch(path, **more):
    download.fetch(f"cifar10:{path}", **more)


def test_the_published_hash():
    assert download.MD5 == "c32a1d4ab5d03f1284b67883e8d87530" and download.URL.startswith("https://www.cs.toronto.edu/")


def test_whole_and_then_not_again(server, tmp_path):
    path = tmp_path / "data" / "cifar.tar.gz"
    fetch(path)
    fetch(path)
    assert path.read_bytes() == CONTENT and server.asked == [None]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(sources.open_source(f"cifar10:{path}")) == 50
    fetch(tmp_path / "test.tar.gz@test")
    assert len(sources.open_source(f"cifar10:{tmp_path / 'test.tar.gz'}@test")) == 10


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_off_in_the_middle(server, tmp_path, ranges):
    path, part = tmp_path / "cifar.tar.gz", tmp_path / "cifar.tar.gz.part"
    server.cut, server.ranges = len(CONTENT) // 2, ranges
    with pytest.raises(OSError, match=rf"cut off after {server.cut:,} of {len(CONTENT):,} bytes.*\.part keeps"):
        fetch(path)
    assert part.read_bytes() == CONTENT[: server.cut] and not path.exists()
    half, server.cut = server.cut, None
    fetch(path)
    assert path.read_bytes() == CONTENT and not part.exists()
    assert server.asked == [None, f"bytes={half}-"]


def test_whole_but_not_yet_renamed(server, tmp_path):
    (tmp_path / "c.tar.gz.part").write_bytes(CONTENT)
    fetch(tmp_path / "c.tar.gz")
    assert (tmp_path / "c.tar.gz").read_bytes() == CONTENT


def test_wrong_bytes_are_kept_apart_and_their_hash_is_named(server, tmp_path):
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    found = hashlib.md5(server.content).hexdigest()
    with pytest.raises(ValueError, match=rf"c\.tar\.gz\.part has md5 {found}, and CIFAR-10's is {MD5}; delete it"):
        fetch(tmp_path / "c.tar.gz")
    assert not (tmp_path / "c.tar.gz").exists() and (tmp_path / "c.tar.gz.part").exists()


def test_another_file_that_is_there_is_not_taken_for_it(server, tmp_path):
    (tmp_path / "c.tar.gz").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"has md5 .*set data.download=False to use it as it is"):
        fetch(tmp_path / "c.tar.gz")
    assert (tmp_path / "c.tar.gz").read_bytes() == b"another" and not server.asked


def test_a_signal_keeps_the_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_CHUNK", 1000)
    calls = iter([False, True])
    with pytest.raises(InterruptedError, match="keeps what has come"):
        fetch(tmp_path / "c.tar.gz", stop=lambda: next(calls))
    assert (tmp_path / "c.tar.gz.part").read_bytes() == CONTENT[:2000]


def test_a_server_that_says_no(server, tmp_path):
    server.status = 404
    with pytest.raises(OSError, match="answers 404 Not Found"):
        fetch(tmp_path / "c.tar.gz")


def test_nobody_there(tmp_path, monkeypatch):
    with Server() as gone:
        monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{gone.server_port}/c")
    with pytest.raises(OSError, match=r"cannot be fetched \(.*refused"):
        fetch(tmp_path / "c.tar.gz")


@pytest.mark.parametrize("source", ["bundled", "zip:mine.zip", "cifar10:", "cifar10:@test", ""])
def test_only_cifar10(source):
    with pytest.raises(ValueError, match=r"fetches CIFAR-10 alone, and data.source is"):
        download.fetch(source)


def test_a_training_begins_with_it(server, tmp_path, monkeypatch):
    """As the command line prepares it; of a wrong hash nothing is trained on."""
    config = cifar10.get_config("hot")
    config.data.source, config.data.download = f"cifar10:{tmp_path / 'c.tar.gz'}", True
    automatic.fetch(config)
    assert len(train.prepare(config, tmp_path / "run").source) == 50 and config.data.download is False
    monkeypatch.setattr(download, "MD5", PUBLISHED)
    config.data.download = True
    with pytest.raises(ValueError, match="md5"):
        automatic.fetch(config)
