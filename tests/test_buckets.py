"""gs:// paths: which folder they are, and what is refused.

Where buckets are mounted: "Cloud Storage as a mounted file system" of Vertex AI's documentation. A folder stands for
the mount; nothing here was tried on a real bucket.
"""

import json
import pathlib
import re
import zipfile

import numpy as np
import pytest
from PIL import Image
from pretended import LAUNCH

from warm_jax.data import buckets
from warm_jax.data.sources import open_source
from warm_jax.runtime import log, workdirs


@pytest.fixture
def gcs(tmp_path, monkeypatch):
    """Where the bucket called "bucket" is mounted, and nothing else."""
    monkeypatch.setenv("WARM_JAX_GCS", str(tmp_path))
    (tmp_path / "bucket").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gs://bucket/a/b", "bucket/a/b"),
        ("gs://bucket/a b/", "bucket/a b"),
        ("gs://bucket", "bucket"),
        ("gs://bucket/", "bucket"),
        ("gs://bucket//etc", "bucket/etc"),  # never out of the bucket
        ("gs://bucket/zip:x://y", "bucket/zip:x:/y"),
    ],
)
def test_in_a_bucket(gcs, path, expected):
    assert workdirs.local(path) == gcs / expected


@pytest.mark.parametrize("path", ["runs/x", "/abs/x", "~/x", "../x", "", "gs/bucket/x", "gs:", "a:b/c"])
def test_all_else_is_as_it_was(gcs, path):
    assert workdirs.local(path) == pathlib.Path(path)


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("gs://other/x", OSError, ["gs://other/x", "not mounted at {}/other", "launch/tpu_vm.sh", "launch/gke.sh"]),
        ("gs://", ValueError, ["gs://", "gs://BUCKET/PATH"]),
        ("gs:///x", ValueError, ["gs:///x", "gs://BUCKET/PATH"]),
        ("gs://../x", ValueError, ["gs://../x", "gs://BUCKET/PATH"]),
        ("gs://bucket/../x", ValueError, ["gs://bucket/../x", "without .."]),
        ("s3://bucket/x", ValueError, ["s3://bucket/x", "gs://BUCKET/PATH"]),
        ("http://bucket/x", ValueError, ["http://bucket/x", "gs://BUCKET/PATH"]),
        ("file:///x", ValueError, ["file:///x", "give a path"]),
    ],
)
def test_refused_in_one_line(gcs, path, kind, words):
    with pytest.raises(kind) as caught:
        workdirs.local(path)
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word.format(gcs) not in str(caught.value)], caught.value
    assert [entry.name for entry in gcs.iterdir()] == ["bucket"]


def test_an_empty_folder_is_no_mount(tmp_path, monkeypatch):
    """At /gcs, where nobody has said that a folder will do, it must be a mount: the bucket's, or one of all buckets."""
    monkeypatch.delenv("WARM_JAX_GCS", raising=False)
    folders, mounts = {"/gcs/bucket"}, set()
    monkeypatch.setattr("os.path.isdir", lambda path: str(path) in folders)
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) in mounts)
    with pytest.raises(OSError, match="not mounted at /gcs/bucket"):
        buckets.local("gs://bucket/x")
    for mounted in ("/gcs/bucket", "/gcs"):
        mounts = {mounted}
        assert buckets.local("gs://bucket/x") == pathlib.Path("/gcs/bucket/x")
    with pytest.raises(OSError, match="not mounted at /gcs/other"):
        buckets.local("gs://other/x")


def test_the_remedy_is_what_the_scripts_do(monkeypatch):
    monkeypatch.delenv("WARM_JAX_GCS", raising=False)
    with pytest.raises(OSError, match="mount it: ") as caught:
        buckets.local("gs://no-bucket/x")
    make, mount = re.search("mount it: (.*) && (.*) \\(", str(caught.value)).groups()
    script = (LAUNCH / "tpu_vm.sh").read_text()
    for line in (make, mount):
        assert line.replace("/gcs/no-bucket", '"$m"').replace("no-bucket", '"$b"') in script


def test_images_are_read_through_the_mount(gcs):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with zipfile.ZipFile(gcs / "bucket" / "set.zip", "w") as file, file.open("0.png", "w") as entry:
        Image.fromarray(pixels).save(entry, "png")
    images, _ = open_source("zip:gs://bucket/set.zip").read(np.array([0]))
    np.testing.assert_array_equal(images[0, :, :, 0], pixels)


def test_a_row_of_numbers_is_in_a_closed_file(tmp_path, monkeypatch):
    """gcsfuse uploads a file when it is closed: what is in one that stays open is lost with the machine."""
    opened = []
    real = pathlib.Path.open

    def noting(self, *arguments, **options):
        opened.append(real(self, *arguments, **options))
        return opened[-1]

    monkeypatch.setattr(pathlib.Path, "open", noting)
    written = log.Log(tmp_path, 0)
    for step in (1, 2):
        written.write(step, {"loss": 0.5})
        assert opened and all(file.closed for file in opened)
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row) for row in rows] == [{"step": s, "loss": 0.5} for s in range(1, step + 1)]
    written.close()
