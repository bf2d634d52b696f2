"""The folder that a run lives in: what it must not forget, and what must fit when somebody comes back to it."""

import functools
import hashlib
import json
import pathlib
import shlex
import shutil
import tempfile

import numpy as np
from ml_collections import ConfigDict

from warm_jax.data.buckets import local as local  # gs://… as a folder of this machine
from warm_jax.data.sources import Source
from warm_jax.weights import archives
from warm_jax.weights.archives import write_atomically as write_atomically

# What a config says of the weights and of the run that made them: with another value, a checkpoint means something
# else.
MODEL_KEYS = ("data.image_size", "data.channels", "data.num_classes", "data.augment", "model", "process")
RUN_KEYS = (
    *("seed", "data.augment_probability", "data.label_dropout"),
    *("train.batch_size", "train.accumulation", "train.ema_halflife_images", "train.clip_norm"),
    *("train.posthoc_ema", "train.levels"),
)
# Keys that older configs lack, and the values that say what was done then.
LATER = {"train.posthoc_ema": [], "data.download": False, "train.evaluate_every": 0, "train.evaluate_count": 1000}
LATER |= {"sample.guidance_interval": [], "eval.shuffle_splits": False}
LATER |= {"train.levels": None}

UNSEEN = "not looked at: "  # before the name of a file of code that only a workdir names, which may be a stranger's
DIGESTS, FIXED = "digests", "model and run"  # a key of config.json; one of that, besides the names of sections
ORIGIN, BEGUN, SEEN = "origin.json", "init.json", "data.json"
NOTES = {  # what they hold at least: of converted weights; of a training that began from others'; of the images
    ORIGIN: ("source",),
    BEGUN: ("workdir", "checkpoint_step", "weights"),
    SEEN: ("source", "images", "fingerprint"),
}


def command(workdir: pathlib.Path | str, *flags: str) -> str:
    """The command line for a run that is in `workdir`, which knows its own config."""
    return shlex.join(["python", "-m", "warm_jax", f"--workdir={workdir}", *flags])


def check_writable(folder: pathlib.Path) -> None:
    """Makes `folder` and raises OSError, naming it, where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write in {folder} ({error.strerror}); choose another with --workdir or --out") from error


def check_new(workdir: pathlib.Path) -> None:
    """Makes `workdir`; ValueError where a run lives there already, OSError where nothing can be written.

    What a conversion left that was ended before it had written its checkpoint is removed.
    """
    checkpoints = workdir / "checkpoints"
    if (workdir / ORIGIN).exists() and not any(path.name.isdigit() for path in checkpoints.glob("*")):
        shutil.rmtree(checkpoints, ignore_errors=True)
        for name in ("config.json", "measured.npz"):
            (workdir / name).unlink(missing_ok=True)
    if (workdir / "config.json").exists() or checkpoints.exists():
        raise ValueError(f"{workdir} holds a run already; name another --workdir, or remove it")
    check_writable(workdir)


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes `config.json`: the config, and digests of its values."""
    values = json.loads(json.dumps(config.to_dict(), default=list))
    values.pop(DIGESTS, None)  # of a config file that reads another run's config.json as it is
    text = json.dumps(values | {DIGESTS: _digests(values)}, indent=2)
    write_atomically(workdir / "config.json", text.encode() + b"\n")


def _digests(values: dict[str, object]) -> dict[str, str]:
    """Of what says what the weights are, and of the rest of each section; the first 16 digits of a sha256."""
    parts: dict[str, list[tuple[str, object]]] = {FIXED: []}
    for key, value in sorted(_flatten(values).items()):
        part = FIXED if _is_under(key, MODEL_KEYS + RUN_KEYS) else key.partition(".")[0]
        parts.setdefault(part, []).append((key, value))
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def _is_under(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _read_config(workdir: pathlib.Path) -> dict:
    """The values in `config.json`. ValueError where those that say what the weights are, are not what was written.

    Another value may have been changed by hand, as the length of a training: that is said. A file without digests, as
    older versions wrote it, is taken as it is.
    """
    path = workdir / "config.json"
    values = _read_json(path)
    stored = values.pop(DIGESTS, None)
    if stored is None:
        return values
    found, stored = _digests(values), stored if isinstance(stored, dict) else {}
    changed = sorted(name for name in found.keys() | stored.keys() if found.get(name) != stored.get(name))
    if FIXED in changed:
        raise ValueError(
            f"one of {', '.join(MODEL_KEYS + RUN_KEYS)} has another value than was written: damage, or an edit, which "
            f"counts once the key {DIGESTS} is removed"
        )
    if changed:
        _say_changed(path, ", ".join(changed))
    return values


@functools.cache
def _say_changed(path: pathlib.Path, sections: str) -> None:
    """Once, however often it is read."""
    from warm_jax.runtime import log  # here, for it needs JAX, and a doctor looks also where that cannot be imported

    log.warn(f"{path} was changed since it was written, in {sections}; if not by you, restore it")


def flat(config: ConfigDict) -> dict[str, object]:
    """The values of a config by dotted key, as JSON has them."""
    return _flatten(json.loads(json.dumps(config.to_dict(), default=list)))


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differing(one: ConfigDict, other: ConfigDict, keys: tuple[str, ...]) -> list[tuple[str, object]]:
    """(dotted key, value in `other`) wherever the two differ under `keys`."""
    flat, ours = (_flatten(config.to_dict()) for config in (one, other))
    under = [key for key in ours if _is_under(key, keys)]
    return [(key, ours[key]) for key in under if key not in flat or flat[key] != ours[key]]


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. ValueError where it is damaged, FileNotFoundError where there is none."""
    try:
        found = json.loads(path.read_bytes().decode())
    except RecursionError as error:  # of brackets in brackets
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def load_note(workdir: pathlib.Path, name: str) -> dict | None:
    """What a file of `NOTES` in a workdir says; None where there is none. ValueError where it is damaged."""
    path = workdir / name
    try:
        note = _read_json(path)
        if not set(NOTES[name]) <= note.keys():
            raise ValueError(f"no JSON object with {', '.join(NOTES[name])}")
        return note
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or remove it") from error


def load_config(workdir: pathlib.Path, like: ConfigDict | None = None) -> ConfigDict:
    """The config of a run, from its `config.json`; sections that it lacks are as in `like`, newer keys unset.

    A file of code that it names is marked by `UNSEEN`, and so not run, unless `like` names the same one.
    """
    path = workdir / "config.json"
    try:
        saved = _read_config(workdir)
        made = ConfigDict(saved)
        code = saved.get("process", {}).get("file")
        if code and not (like is not None and like.process.get("file") == code):
            made.process.file = f"{UNSEEN}{code}"
        for section in like or ():
            if section not in made:
                made[section] = like[section]
        return completed(made)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {workdir} is no workdir of a run") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a config ({error}); restore it") from error


def completed(config: ConfigDict) -> ConfigDict:
    """`config`, in which the keys that older versions did not write are unset, or say what was done then."""
    for name in ("beta_min", "rho", "levels"):
        if "sample" in config and name not in config.sample:
            config.sample[name] = None
    for key, value in LATER.items():
        section, name = key.split(".")
        if section in config and name not in config[section]:
            config[section][name] = tuple(value) if isinstance(value, list) else value
    return config


def check_same(config: ConfigDict, workdir: pathlib.Path, keys: tuple[str, ...]) -> None:
    """Raises ValueError, with both values, where `config` differs under `keys` from the workdir's `config.json`."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(
            f"{path} is missing, so nothing says what the checkpoints beside it are; "
            "restore it, or give another --workdir"
        )
    try:
        saved = LATER | _flatten(_read_config(workdir))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a config ({error}); restore it, or move the workdir away") from error
    here = LATER | flat(config)
    missing = "(not there)"
    differ = [
        f"{key} was {saved.get(key, missing)!r} and is now {here.get(key, missing)!r}"
        for key in sorted(saved.keys() | here.keys())
        if _is_under(key, keys) and saved.get(key, missing) != here.get(key, missing)
    ]
    if differ:
        raise ValueError(
            f"the config does not fit the checkpoints in {workdir}: {'; '.join(differ)}. "
            "Leave the changes out (--workdir alone has the old values), or name another --workdir"
        )


def check_same_data(source: Source, workdir: pathlib.Path, allow_changed: bool) -> None:
    """Raises ValueError, with both fingerprints, where the images are not those that the workdir's run began with."""
    began = None if allow_changed else load_note(workdir, SEEN)
    if began is not None and began["fingerprint"] != source.fingerprint:
        raise ValueError(
            f"the images have changed since {workdir} was begun: {began['source']} ({began['images']} images) had "
            f"fingerprint {began['fingerprint']}, {source.spec} ({len(source)}) has {source.fingerprint}. "
            "Give the old images, another --workdir, or --config.data.allow_changed=True"
        )


def save_data(source: Source, workdir: pathlib.Path) -> None:
    """Writes `data.json`: which images a run saw."""
    seen = {"source": source.spec, "images": len(source), "fingerprint": source.fingerprint}
    seen |= {"skipped": list(source.skipped)}
    write_atomically(workdir / SEEN, json.dumps(seen, indent=2).encode() + b"\n")


def seen_data(workdir: pathlib.Path) -> str | None:
    """The fingerprint of the images that the workdir's run saw; None where it does not say."""
    seen = load_note(workdir, SEEN)
    return None if seen is None else seen["fingerprint"]


def save_measured(arrays: dict[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Writes `measured.npz`."""
    archives.write_npz(workdir / "measured.npz", **arrays)


def load_measured(workdir: pathlib.Path) -> dict[str, np.ndarray] | None:
    """What training measured of the data and stored as `measured.npz`; None where there is none."""
    path = workdir / "measured.npz"
    if not path.exists():
        return None
    try:
        stored = archives.read_npz(path)
        return {"power": stored["power"], **stored}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it: the weights mean nothing without it") from error
