"""The command line: flags to a program, and nothing else."""

import contextlib
import os
import pathlib
import runpy
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warm_jax import preemption
from warm_jax.data import buckets

MODES = {
    "train": "train, resuming by itself from the workdir's last checkpoint, and draw a grid of samples",
    "sample": "draw --seeds with the EMA weights of a checkpoint",
    "evaluate": "score a checkpoint, or --images, against a reference",
    "stats": "write the statistics file --out of --images, to evaluate against",
    "prepare": "make --out (a zip or arrayrecord) of --images: cropped, resized, with a manifest",
    "compare": "train, sample and score all systems of compare.systems, each with its own form of the config",
    "analyze": "make the figures of --analysis from the data, from exact predictors and from trained models",
    "inspect": "look at --images: counts, sizes, broken files, a contact sheet, the spectrum",
    "convert": "convert published Inception weights, --from_inception=FILE.pth, to --out=FILE.safetensors",
}
SAVING = (
    "train",
    "sample",
    "evaluate",
    "compare",
    "analyze",
)  # these save what they have, and leave, when a signal comes
WITHOUT_CONFIG = ("prepare", "inspect", "convert")
EXIT_FAILED, EXIT_USAGE = 1, 2

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional system: configs/cifar10.py:hot. Override with --config.KEY=VALUE.",
    lock_config=True,
)
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{k}: {v}" for k, v in MODES.items()))
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where the run lives, also gs://BUCKET/… (default: runs/CONFIG, or runs/CONFIG_SYSTEM)."
)
_SEEDS = flags.DEFINE_string("seeds", "0-63", "sample: which images, one seed an image, as in 0-63,100.")
_OUT = flags.DEFINE_string(
    "out", "", "Where results go. sample: a folder, FILE.npz or FILE.png (default: WORKDIR/samples); inspect: a folder."
)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", -1, "sample, evaluate, analyze: step of the checkpoint; -1: the latest."
)
_IMAGES = flags.DEFINE_string("images", "", "A source of images, as data.source: bundled, zip:FILE, folder:PATH, …")
_PROTOCOL = flags.DEFINE_enum(
    "protocol", "once", ["once", "paper"], "evaluate: one round of eval.count images, or three disjoint ones of 50,000."
)
_WATCH = flags.DEFINE_bool("watch", False, "evaluate: score each new checkpoint of the workdir, until the last one.")
_ANALYSIS = flags.DEFINE_string(
    "analysis", "all", "analyze: spectra, corruption, learning, manifold, sweep, report (a page of the workdir) or all."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "prepare: side to resize to (default: the config's, or as it is)."
)
_CHANNELS = flags.DEFINE_integer("channels", None, "prepare: 1 grey or 3 RGB (default: the config's, or as it is).")
_CROP = flags.DEFINE_enum("crop", "center", ["center", "none"], "prepare: how to make images square.")
_ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "prepare: what to do with broken images.")
_FROM_INCEPTION = flags.DEFINE_string("from_inception", "", "convert: the published pt_inception-2015-12-05 file.")


def _fail(error: Exception | str, status: int) -> int:
    # Of an unknown key: a KeyError's text is the repr of its message, which hides "did you mean"; it may be wrapped.
    text = error
    while isinstance(text, KeyError | AttributeError) and text.args:
        text = text.args[0]
    if text is not error:
        text = f"the config has no key {text}"
    lines = str(text).strip().splitlines() or [type(error).__name__]
    if "Traceback (most recent call last)" in str(text):  # of a config file that raised: its last line says why
        lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
    print(f"error: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return status


def _check_config_file(argv: list[str]) -> None:
    """Raises flags.Error where --config names no file, which ml_collections would say late and at length."""
    for argument in argv[1:]:
        name, _, value = argument.partition("=")
        if name in ("--config", "-config") and "=" in argument and not pathlib.Path(value.partition(":")[0]).is_file():
            known = ", ".join(sorted(map(str, pathlib.Path("configs").glob("*.py"))))
            raise flags.Error(f"--config={value}: no such file; {f'there are {known}' if known else 'name another'}")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one line on stderr and exit status 2."""
    try:
        _check_config_file(argv)
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None and _MODE.value not in WITHOUT_CONFIG and not _help_wanted():
            raise flags.Error("--config=FILE is missing, for example --config=configs/fashion_mnist.py")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        sys.exit(_fail(error, EXIT_USAGE))
    if len(rest) > 1:
        sys.exit(_fail(f"unexpected {' '.join(rest[1:])!r}; values are given as --flag=VALUE", EXIT_USAGE))
    return rest


def _help_wanted() -> bool:
    return any(flags.FLAGS[name].value for name in ("help", "helpshort", "helpfull", "helpxml") if name in flags.FLAGS)


def default_workdir(config_flag: str) -> pathlib.Path:
    """`configs/cifar10.py` -> runs/cifar10, `configs/cifar10.py:hot` -> runs/cifar10_hot."""
    path, _, system = config_flag.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}_{system}" if system not in ("", "warm") else stem)


def _config_of(system: str) -> ConfigDict:
    """What --config would be with `system` after its colon: the same file, the same overrides."""
    flag = flags.FLAGS["config"]
    config = runpy.run_path(flag.config_filename.partition(":")[0])["get_config"](system)
    config.lock()
    for key, value in config_flags.get_override_values(flag).items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{system} has no {key}, so it cannot be given for all that are compared") from error
    return config


def _path(flag: flags.FlagHolder[str]) -> str:
    return flag.value and str(buckets.local(flag.value))


def _prepare_images(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax import prepare

    size, channels = _IMAGE_SIZE.value, _CHANNELS.value
    if config is not None:
        size = config.data.image_size if size is None else size
        channels = config.data.channels if channels is None else channels
    if not _IMAGES.value or not _OUT.value:
        raise ValueError("--mode=prepare needs --images=SOURCE and --out=FILE.zip")
    settings = {"image_size": size, "channels": channels, "crop": _CROP.value, "on_error": _ON_ERROR.value}
    return lambda: prepare.run(_IMAGES.value, _path(_OUT), **settings)


def _inspect(config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    from warm_jax import inspect

    images = _IMAGES.value or (config.data.source if config is not None else "")
    if not images:
        raise ValueError("--mode=inspect needs --images=SOURCE, or a --config whose data.source to look at")
    return lambda: inspect.run(images, _path(_OUT) or str(workdir / "inspect"))


def prepare(mode: str, config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    """Checks everything for `mode` and returns the program, ready to run. ValueError or OSError for bad input."""
    if mode == "prepare":
        return _prepare_images(config)
    if mode == "inspect":
        return _inspect(config, workdir)
    if mode == "train":
        from warm_jax import train

        run = train.prepare(config, workdir)
        return lambda: train.train(run)
    if mode == "sample":
        from warm_jax import generate

        drawing = generate.prepare(config, workdir, _SEEDS.value, _path(_OUT), _CHECKPOINT.value)
        return lambda: generate.sample(drawing)
    if mode == "compare":
        from warm_jax import compare

        comparison = compare.prepare(_config_of, workdir)
        return lambda: compare.compare(comparison)
    if mode == "analyze":
        from warm_jax import analyze

        figures = analyze.prepare(config, workdir, _ANALYSIS.value, _CHECKPOINT.value)
        return lambda: analyze.analyze(figures)
    from warm_jax import evaluate, reference

    if mode == "convert":
        return lambda: reference.convert_inception(_path(_FROM_INCEPTION), _path(_OUT))
    if mode == "stats":
        return lambda: reference.statistics(config, _IMAGES.value, _path(_OUT))
    judging = evaluate.prepare(config, workdir, _IMAGES.value, _CHECKPOINT.value, _PROTOCOL.value, _WATCH.value)
    return lambda: evaluate.evaluate(judging)


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage or input, 75 saved after a signal and worth running again."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/warm_jax/xla"))
    share_cores(_CONFIG.value)
    given = flags.FLAGS["config"].config_filename if _CONFIG.value is not None else ""
    workdir = _WORKDIR.value or str(default_workdir(given or "images"))
    with preemption.noted() if _MODE.value in SAVING else contextlib.nullcontext():
        return _run(_MODE.value, _CONFIG.value, workdir)


def share_cores(config: ConfigDict | None) -> None:
    """On a CPU, as many devices as cores (at most 8) that divide the batch; accelerators are not touched.

    XLA runs most operations of a small network on one core. Devices that share the batch keep the others busy: 1.4
    times the speed on two cores. `XLA_FLAGS=--xla_force_host_platform_device_count=N` overrides it.
    """
    import jax

    if config is None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parts = max(1, config.train.accumulation)
    fitting = [n for n in range(1, cores + 1) if config.train.batch_size % (n * parts) == 0]
    jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def _run(mode: str, config: ConfigDict | None, workdir: str) -> int:
    import jax

    try:
        program = prepare(mode, config, buckets.local(workdir))
    except (ValueError, TypeError, OSError) as error:
        logging.debug("while checking the input", exc_info=True)
        return _fail(error, EXIT_USAGE)
    try:
        return program()
    except (ValueError, TypeError, OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        logging.info("traceback", exc_info=True)  # --verbosity=0 shows it
        return _fail(error, EXIT_USAGE if mode in (*WITHOUT_CONFIG, "stats") else EXIT_FAILED)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
