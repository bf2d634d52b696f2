"""The command line: flags to a program, and nothing else."""

import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

MODES = {
    "train": "train, resuming by itself from the workdir's last checkpoint, and draw a grid of samples",
    "sample": "draw --seeds with the EMA weights of a checkpoint",
}
EXIT_FAILED, EXIT_USAGE = 1, 2

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional system: configs/cifar10.py:hot. Override with --config.KEY=VALUE.",
    lock_config=True,
)
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{k}: {v}" for k, v in MODES.items()))
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives (default: runs/CONFIG, or runs/CONFIG_SYSTEM).")
_SEEDS = flags.DEFINE_string("seeds", "0-63", "Which images to sample: one seed an image, as in 0-63,100.")
_OUT = flags.DEFINE_string("out", "", "Where samples go: a folder, FILE.npz or FILE.png (default: WORKDIR/samples).")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", -1, "Step of the checkpoint to sample from; -1: the latest.")


def _fail(error: Exception | str, status: int) -> int:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"error: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return status


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one line on stderr and exit status 2."""
    known = {"--help", "-h", "--helpshort", "--helpfull"}
    if not known.intersection(argv) and not any(
        a.startswith(("--config=", "-config=")) or a == "--config" for a in argv
    ):
        sys.exit(_fail("--config=FILE is missing, for example --config=configs/fashion_mnist.py", EXIT_USAGE))
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise flags.Error("--config=FILE is missing, for example --config=configs/fashion_mnist.py")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        sys.exit(_fail(error, EXIT_USAGE))
    if len(rest) > 1:
        sys.exit(_fail(f"unexpected {' '.join(rest[1:])!r}; values are given as --flag=VALUE", EXIT_USAGE))
    return rest


def default_workdir(config_flag: str) -> pathlib.Path:
    """`configs/cifar10.py` -> runs/cifar10, `configs/cifar10.py:hot` -> runs/cifar10_hot."""
    path, _, system = config_flag.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}_{system}" if system not in ("", "warm") else stem)


def prepare(mode: str, config: ConfigDict, workdir: pathlib.Path) -> Callable[[], int]:
    """Checks everything for `mode` and returns the program, ready to run. ValueError or OSError for bad input."""
    if mode == "train":
        from warm_jax import train

        run = train.prepare(config, workdir)
        return lambda: train.train(run)
    from warm_jax import generate

    run = generate.prepare(config, workdir, _SEEDS.value, _OUT.value, _CHECKPOINT.value)
    return lambda: generate.sample(run)


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage or input, 75 saved after a signal and worth running again."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/warm_jax/xla"))
    config_flag = flags.FLAGS["config"].config_filename if hasattr(flags.FLAGS["config"], "config_filename") else ""
    workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(config_flag)
    try:
        program = prepare(_MODE.value, _CONFIG.value, workdir)
    except (ValueError, TypeError, OSError) as error:
        logging.debug("while checking the input", exc_info=True)
        return _fail(error, EXIT_USAGE)
    try:
        return program()
    except (ValueError, OSError, FloatingPointError) as error:
        logging.info("traceback", exc_info=True)
        return _fail(error, EXIT_FAILED)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
