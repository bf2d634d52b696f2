"""CIFAR-10 from its authors' page: begun again where it was cut off, and taken only if its published hash fits.

What has come is in `FILE.part`; the file appears when it is whole and right.
"""

import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable

from tqdm import tqdm

from warm_jax.data import buckets

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as that page publishes it
_CHUNK = 1 << 18
_SECONDS = 30  # without a byte


def fetch(source: str, stop: Callable[[], object] = lambda: False) -> None:
    """Has the archive that `source`, cifar10:FILE.tar.gz[@test], names; nothing is done where it is there and right.

    `stop` is asked while it comes; then, and where the connection breaks, what has come stays in `FILE.part`, and the
    next call goes on from there. ValueError for another source or a file of another hash, OSError where the download
    failed, InterruptedError where `stop` said so.
    """
    kind, _, rest = source.partition(":")
    name = rest.removesuffix("@test").removesuffix("@train")
    if kind != "cifar10" or not name:
        raise ValueError(
            f"data.download fetches CIFAR-10 alone, and data.source is {source}; set data.download=False, or name a "
            "file for it: cifar10:data/cifar-10-binary.tar.gz"
        )
    path = buckets.local(name).expanduser()
    if path.is_dir():  # unpacked; its files are checked when they are read
        return
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        _download(URL, part, stop)
        _check(part, f"delete it and fetch it again, or get the archive from {URL} by hand")
        os.replace(part, path)
    else:
        _check(path, "name another file for data.source, or set data.download=False to use it as it is")


def _check(path: pathlib.Path, remedy: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != MD5:
        raise ValueError(f"{path} has md5 {found}, and CIFAR-10's is {MD5}; {remedy}")


def _download(url: str, part: pathlib.Path, stop: Callable[[], object]) -> None:
    """Appends to `part` what it lacks of `url`; where the server knows no ranges it begins anew."""
    have = part.stat().st_size if part.exists() else 0
    asked = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(asked, timeout=_SECONDS) as answer:
            have = have if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            length = answer.headers.get("Content-Length")
            whole = have + int(length) if length else None
            _copy(answer, part, have, whole, stop)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:  # it is whole
            return
        raise OSError(f"{url} answers {error.code} {error.reason}; get it by hand, for data.source to name") from error
    except InterruptedError:
        raise
    except (OSError, http.client.HTTPException) as error:
        kept = ""
        if part.exists():
            kept = f"; {part} keeps {part.stat().st_size:,} bytes, and the same command goes on from there"
        raise OSError(f"{url} cannot be fetched ({getattr(error, 'reason', None) or error}){kept}") from error


def _copy(answer: http.client.HTTPResponse, part: pathlib.Path, have: int, whole: int | None, stop: Callable) -> None:
    bar = tqdm(total=whole, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=f"fetching {part.stem}")
    with part.open("ab" if have else "wb") as file, bar:
        while content := answer.read(_CHUNK):
            file.write(content)
            bar.update(len(content))
            if stop():
                raise InterruptedError(f"stopped; {part} keeps what has come, and the same command goes on from there")
        have = file.tell()
    if whole is not None and have < whole:
        raise ConnectionError(f"cut off after {have:,} of {whole:,} bytes")
