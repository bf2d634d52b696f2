"""What a command made, as a table of digests, read without warm_jax; and how it is compared with what it should be."""

import hashlib
import json
import pathlib
import zipfile

import numpy as np
from tensorstore import KvStore
from torture_processes import Process, TrialError, Verdict

Products = dict[str, str]  # path in the folder, of a file with parts also the part -> a digest, or a value

_ITEMS = ("train", "ema", "averages")  # of a checkpoint
_LEFT_OUT = ("tb", "profile")  # folders of event files, which hold times
_TWICE = " twice"
_ASIDE = ("damaged-", "removed-", ".")  # what is no result: set aside, being removed, locks and parts


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _of_json(value: object, name: str) -> Products:
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in _of_json(child, f"{name}/{key}").items()}
    if isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        return {k: v for i, child in enumerate(value) for k, v in _of_json(child, f"{name}/{i}").items()}
    return {name: json.dumps(value)}


def _of_rows(rows: list[dict], name: str) -> Products:
    """Rows by step, or number; a second row of one step has another name.

    Losses are means since the row before, of whatever steps this process has made: that they are there is enough.
    """
    found: Products = {}
    for number, row in enumerate(rows):
        losses = "step" in row and any(key.startswith("loss") for key in row)
        at = f"{name}/step {row['step']}{' losses' * losses}" if "step" in row else f"{name}/{number}"
        at += _TWICE * any(key.startswith(f"{at}/") for key in found)
        found |= {f"{at}/there": "yes"} if losses else _of_json(row, at)
    return found


def _of_item(path: pathlib.Path, name: str) -> Products:
    """The chunks of the arrays of a checkpoint's item, as they are stored: by TensorStore alone."""
    store = KvStore.open({"driver": "ocdbt", "base": f"file://{path.resolve()}/"}).result()
    keys = sorted(key.decode() for key in store.list().result())
    return {f"{name}/{key}": _digest(store.read(key).result().value) for key in keys}


def _of_the_moment(file: str, key: str) -> bool:
    """Speeds, free memory, times, and from which step a training went on."""
    return file == "environment.json" or (file == "doctor.json" and ("/facts/" in key or key.endswith("/said")))


def _of_file(path: pathlib.Path, name: str) -> Products:
    content = path.read_bytes()
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {f"{name}/{key}": _digest(np.ascontiguousarray(arrays[key]).tobytes()) for key in arrays.files}
        if path.suffix == ".json":
            found = _of_json(json.loads(content), name)
            return {key: value for key, value in found.items() if not _of_the_moment(path.name, key)}
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            return _of_rows(rows, name)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        return {name: f"{type(error).__name__}: {_digest(content)}"}
    return {name: _digest(content)}


def _is_checkpoint(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists()


def products(path: pathlib.Path, name: str = "") -> Products:
    """What there is in a folder, or what a file holds."""
    name = name or path.name
    if path.is_file():
        return _of_file(path, name)
    found: Products = {}
    if _is_checkpoint(path):
        for item in _ITEMS:
            if (path / item).exists():
                found |= _of_item(path / item, f"{name}/{item}")
        return found
    for child in sorted(path.iterdir()) if path.is_dir() else ():
        if (
            child.name not in _LEFT_OUT
            and not child.name.startswith(_ASIDE)
            and ".orbax-checkpoint-tmp" not in child.name
        ):
            found |= products(child, f"{name}/{child.name}")
    return found


def made(folder: pathlib.Path, results: tuple[str, ...]) -> Products:
    """Of some files and folders in `folder`, those that are there; where it says its own path, that is left out."""
    found = {k: v for result in results for k, v in products(folder / result, result).items()}
    return {key: value.replace(str(folder), "") for key, value in found.items()}


def common(one: Products, other: Products) -> Products:
    """What is the same in two undisturbed runs: all that a third one must make, too. Times and dates are not."""
    return {key: value for key, value in one.items() if other.get(key) == value}


def differing(found: Products, expected: Products) -> str:
    """How `found` differs from `expected`; empty where everything expected is there, with the same bytes."""
    missing = [key for key in expected if key not in found]
    twice = [key for key in found if _TWICE in key and key not in expected]
    other = [key for key in expected if key in found and found[key] != expected[key]]
    said = [
        f"{len(keys)} {what}, as {keys[0]}"
        for keys, what in ((missing, "missing"), (other, "differ"), (twice, "more"))
        if keys
    ]
    return "; ".join(said)


def refused(process: Process, names: tuple[str, ...], statuses: tuple[int, ...] = (1, 2)) -> Verdict | None:
    """A verdict for a command that ended with an error; None where it ended with 0.

    Right is one line that begins with error:, one of the `names` in it, one of the statuses, and no traceback.
    """
    if process.status == 0:
        return None
    errors, said = process.errors(), process.said()
    wrong = (
        f"status {process.status}" * (process.status not in statuses)
        or "a traceback" * ("Traceback (most recent call last)" in said)
        or f"{len(errors)} lines of error:" * (len(errors) != 1)
        or f"{' or '.join(names)} is not named" * (bool(names) and not any(name in errors[0] for name in names))
    )
    last = errors[0] if errors else (said.strip().splitlines() or ["nothing was said"])[-1]
    return Verdict("failed", f"{wrong}: {last[:300]}") if wrong else Verdict("refused", last[:300])


def judge(
    process: Process,
    found: Products,
    expected: Products,
    names: tuple[str, ...],
    second_best: Products | None = None,
) -> Verdict:
    """Of a command that met damaged data: the expected result, or an error that names what is damaged.

    `second_best` is what is right too where the damage was passed over, and named, as of the checkpoint before.
    """
    verdict = refused(process, names)
    if verdict is not None:
        return verdict
    wrong = differing(found, expected)
    if not wrong:
        return Verdict("survived")
    said = process.said() + process.said("out")
    if second_best is not None and not differing(found, second_best) and any(name in said for name in names):
        return Verdict("survived", "passed over and named")
    return Verdict("silent", wrong)


def must_be(process: Process, found: Products, expected: Products, what: str) -> None:
    """Of a command that met nothing wrong, as after a kill. `TrialError` where it failed or has lost something."""
    if process.status != 0:
        said = (process.said().strip().splitlines() or ["nothing was said"])[-1]
        raise TrialError("lost", f"{what} ended with {process.status}: {said[:300]}")
    if wrong := differing(found, expected):
        raise TrialError("lost", f"{what}: {wrong}")
