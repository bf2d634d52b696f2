"""Databases of images: LSUN's LMDB, ArrayRecord, and prepared TensorFlow Datasets, all read without TensorFlow.

Handles are opened once a process, on the first read: an object here holds paths only, so that workers can be sent a
copy.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import threading
import types

import numpy as np

from warm_jax.data import arrays, manifest


def import_package(name: str, spec: str, extra: str) -> types.ModuleType:
    """An optional package; ValueError that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{spec} needs the package {error.name}: pip install 'warm_jax[{extra}]'") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Lmdb:
    """LSUN's layout: each value is an encoded image (WebP), each key its name; there are no classes."""

    spec: str
    path: pathlib.Path
    stamp: tuple[int, int]
    keys: np.ndarray
    fingerprint: str
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Its key; images are numbered in the order of their keys."""
        return self.keys[index : index + 1].tolist()[0].decode("utf-8", "backslashreplace")

    def get(self, index: int) -> tuple[bytes, int]:
        """The encoded image, and -1."""
        with _OPENING:
            environment = _environment(self.path, self.stamp, os.getpid())
        with environment.begin() as transaction:
            value = transaction.get(self.keys[index : index + 1].tolist()[0])
        if value is None:
            raise ValueError(f"{self.path}: {self.keys[index]!r} is gone; the database changed while it was read")
        return value, arrays.NO_LABEL


_OPENING = (
    threading.Lock()
)  # LMDB must not open a file twice in a process, and the threads of a worker all begin at once


@functools.lru_cache(maxsize=16)
def _environment(path: pathlib.Path, stamp: tuple[int, int], process: int):
    """One a process; `stamp` is the file's state, for the cache."""
    lmdb = import_package("lmdb", f"lmdb:{path}", "lmdb")
    options = {"readonly": True, "lock": False, "readahead": False, "meminit": False, "subdir": path.is_dir()}
    try:
        try:
            return lmdb.open(str(path), **options)
        except lmdb.Error:
            _environment.cache_clear()  # it may be open as it was before it was written again
            return lmdb.open(str(path), **options)
    except lmdb.Error as error:
        raise ValueError(
            f"{path}: not a readable LMDB ({arrays.reason(error)}); name the folder that holds data.mdb"
        ) from error


def open_lmdb(path: pathlib.Path) -> Lmdb:
    """An LMDB folder (or data file). Its fingerprint is of the keys and of the values' sizes."""
    import_package("lmdb", f"lmdb:{path}", "lmdb")
    stamp = _check_lmdb_size(path)
    keys, digest, environment = [], hashlib.sha256(), _environment(path, stamp, os.getpid())
    try:
        with environment.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                keys.append(bytes(key))
                digest.update(b"%d %b %d\n" % (len(key), keys[-1], len(value)))
    except Exception as error:  # lmdb.Error and its kin; lmdb is imported only when it is there
        raise ValueError(f"{path}: broken LMDB ({arrays.reason(error)}); get it again") from error
    if not keys:
        raise ValueError(f"{path}: no images; the path may name the wrong database")
    # numpy drops zero bytes at the end of a string
    packed = np.array(keys, object if any(k.endswith(b"\0") for k in keys) else None)
    return Lmdb(f"lmdb:{path}", path, stamp, packed, digest.hexdigest())


def _check_lmdb_size(path: pathlib.Path) -> tuple[int, int]:
    """The file's state. All its pages must be there: LMDB maps it, and one beyond its end would kill the process."""
    file = path / "data.mdb" if path.is_dir() else path
    if path.stat() and not file.is_file():
        raise ValueError(f"{path}: not a readable LMDB (there is no data.mdb); name the folder that holds it")
    stat = file.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    environment = _environment(path, stamp, os.getpid())
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if stat.st_size < needed:
        raise ValueError(f"{path}: broken LMDB ({stat.st_size} bytes of {needed}); get it again")
    return stamp


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecord:
    """A file of encoded images, one a record; names and classes stand in the manifest beside it."""

    spec: str
    path: pathlib.Path
    names: list[str]
    labels: np.ndarray
    num_classes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What its manifest calls it."""
        return self.names[index]

    def get(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class."""
        reader = _records(self.path, os.getpid())
        try:
            return reader[index], int(self.labels[index])
        except Exception as error:  # the C++ reader's own kinds
            raise ValueError(
                f"{self.path}: record {index} cannot be read ({arrays.reason(error)}); get the file again"
            ) from error


@functools.lru_cache(maxsize=16)
def _records(path: pathlib.Path, process: int):
    module = import_package("array_record.python.array_record_data_source", f"arrayrecord:{path}", "arrayrecord")
    try:
        return module.ArrayRecordDataSource([str(path)])
    except Exception as error:  # ValueError, RuntimeError, …, from C++
        raise ValueError(f"{path}: not a readable ArrayRecord ({arrays.reason(error)}); get it again") from error


def open_arrayrecord(path: pathlib.Path) -> ArrayRecord:
    """A file of encoded images. Its fingerprint is of the file, and of the classes."""
    _records.cache_clear()
    path.stat()
    count = len(_records(path, os.getpid()))
    if not count:
        raise ValueError(f"{path}: no images; the path may name the wrong file")
    names, labels = [f"record {i}" for i in range(count)], None
    if (described := manifest.read(path)) is not None:
        names = [name for name, _, _ in described.files]
        if len(names) != count:
            raise ValueError(f"{path}: {count} records, its manifest names {len(names)}; prepare it again")
        given = [label for _, label, _ in described.files]
        labels = None if arrays.NO_LABEL in given else np.array(given)
    labels, num_classes = arrays.check_labels(str(path), labels, count)
    return ArrayRecord(f"arrayrecord:{path}", path, names, labels, num_classes, hash_arrayrecord(path, labels))


def hash_arrayrecord(path: pathlib.Path, labels: np.ndarray) -> str:
    """The fingerprint of a file of records and their classes."""
    digest = hashlib.sha256(labels.astype("<i4"))
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds:
    """A TensorFlow Dataset that was prepared as ArrayRecord; `dataset` is its name, or the folder of one (also on gs://)."""

    spec: str
    dataset: str
    split: str
    count: int
    image: str
    label: str | None
    num_classes: int
    fingerprint: str

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Its place in the split."""
        return f"{self.split}[{index}]"

    def get(self, index: int) -> tuple[np.ndarray, int]:
        """The pixels and the class."""
        try:
            example = _data_source(self.dataset, self.split, os.getpid())[index]
        except Exception as error:  # the C++ reader's and the decoder's own kinds
            raise ValueError(
                f"{self.spec}: image {index} cannot be read ({arrays.reason(error)}); prepare it again"
            ) from error
        return np.asarray(example[self.image]), int(example[self.label]) if self.label else arrays.NO_LABEL


@functools.lru_cache(maxsize=16)
def _data_source(name: str, split: str, process: int):
    tfds = import_package("tensorflow_datasets", f"tfds:{name}", "tfds")
    if "://" in name or name.startswith(("/", ".", "~")):
        return tfds.builder_from_directory(os.path.expanduser(name)).as_data_source(split=split)
    return tfds.data_source(name, split=split, download=False, builder_kwargs={"file_format": "array_record"})


def has_split(name: str, split: str) -> bool:
    """Whether a prepared TensorFlow Dataset has a split of that name."""
    try:
        return len(_data_source(name, split, os.getpid())) > 0
    except Exception:  # the library's own kinds, as in `open_tfds`, which says what is wrong
        return False


def open_tfds(name: str) -> Tfds:
    """`NAME[@SPLIT]`, by default @train. Its fingerprint is of name, version, split, count and the shards' lengths."""
    spec, (name, _, split) = f"tfds:{name}", name.partition("@")
    split = split or "train"
    import_package("importlib_resources", spec, "tfds")  # tensorflow-datasets 4.9.10 needs it and does not say so
    import_package("tensorflow_datasets", spec, "tfds")
    _data_source.cache_clear()
    try:
        source = _data_source(name, split, os.getpid())
        features = source.dataset_info.features
        count = len(source)
    except Exception as error:  # DatasetNotFoundError, AssertionError, ImportError of TensorFlow, …
        raise ValueError(
            f"{spec}: not there as ArrayRecord ({arrays.reason(error)}); "
            f"make it once, where TensorFlow is: tfds build {name} --file_format=array_record"
        ) from error
    images = [k for k, f in features.items() if type(f).__name__ == "Image"]
    labels = [k for k, f in features.items() if type(f).__name__ == "ClassLabel"]
    if not images or not count:
        raise ValueError(f"{spec}: {count} examples with {', '.join(features)}; it needs a feature that is an image")
    info = source.dataset_info
    shards = [list(s.shard_lengths) for s in info.splits.values()]
    digest = hashlib.sha256(f"{info.full_name} {split} {count} {shards}".encode()).hexdigest()
    classes = features[labels[0]].num_classes if labels else 0
    return Tfds(spec, name, split, count, images[0], labels[0] if labels else None, classes, digest)
