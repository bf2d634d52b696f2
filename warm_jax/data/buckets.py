"""`gs://` paths: files of a bucket that Cloud Storage FUSE has mounted, by Vertex AI's convention at /gcs/BUCKET."""

import os
import pathlib
import re

# implicit-dirs: folders that other tools uploaded are seen. rename-dir-limit: a checkpoint is whole once its folder is
# renamed, which gcsfuse refuses otherwise. metadata-cache-ttl-secs: hosts see one another's files at once, while on TPU
# and large GPU machines gcsfuse by itself would never look again.
MOUNT_FLAGS = "--implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0"
_BUCKET = re.compile(r"gs://([A-Za-z0-9][\w.-]*[A-Za-z0-9])(?:/(.*))?", re.DOTALL | re.ASCII)


def local(path: str) -> pathlib.Path:
    """The path to use on this machine: `gs://BUCKET/a/b` is `/gcs/BUCKET/a/b`, all else stays as it is.

    Another root than /gcs is given by the environment variable WARM_JAX_GCS, and then taken at its word.

    OSError, which says how to mount it, where nothing is mounted there: an empty folder of that name would lose all
    that is written with the machine. ValueError for s3://, http:// and so on, and for what names no bucket.
    """
    scheme, found, _ = path.partition("://")
    if not found:
        return pathlib.Path(path)
    if scheme != "gs":
        raise ValueError(f"{path}: there is no reading or writing over {scheme}://; give a path, or gs://BUCKET/PATH")
    named = _BUCKET.fullmatch(path)
    if named is None or ".." in path.split("/"):
        raise ValueError(f"{path}: names nothing in a bucket; it is written as gs://BUCKET/PATH, without ..")
    bucket, rest = named[1], named[2] or ""
    root = os.environ.get("WARM_JAX_GCS", "")
    folder = pathlib.Path(root or "/gcs", bucket)
    if not (folder.is_dir() if root else _is_mounted(folder)):
        raise OSError(
            f"{path}: the bucket is not mounted at {folder} on this host; mount it: "
            f'sudo install -d -o "$(id -u)" {folder} && gcsfuse {MOUNT_FLAGS} {bucket} {folder} '
            "(launch/tpu_vm.sh install and launch/gke.sh do so)"
        )
    return folder / rest.lstrip("/")


def _is_mounted(folder: pathlib.Path) -> bool:
    # All buckets at once, as gcsfuse does it when it is given none, are one mount at /gcs.
    return os.path.isdir(folder) and any(os.path.ismount(os.path.realpath(p)) for p in (folder, folder.parent))
