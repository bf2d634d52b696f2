"""The flags: which there are, how they are read, and what is said of wrong ones."""

import dataclasses
import difflib
import importlib.metadata
import pathlib
import platform
import re
import sys

from absl import app, flags
from ml_collections import ConfigDict

from warm_jax.cli import flag_table, overrides, usage
from warm_jax.cli.flag_table import MODES, OF_A_RUN, WITHOUT_CONFIG
from warm_jax.data import buckets
from warm_jax.experiments import config_files
from warm_jax.runtime import letters

# These save what they have, and leave, at a signal.
SAVING = ("train", "sample", "restore", "evaluate", "compare", "analyze")
TOGETHER = ("train", "sample", "evaluate")  # these run on many processes
EXIT_FAILED, EXIT_USAGE = 1, 2


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A config, and what the command line makes of it.

    Attributes:
      name: What --config says, as cifar10:hot; empty where the config is a workdir's own.
      config: The config with the changes; None until `parse` has read it.
      changes: What --config.KEY=VALUE changes of it, by dotted key.
    """

    name: str
    config: ConfigDict | None = None
    changes: dict[str, object] = dataclasses.field(default_factory=dict)


class _Named(flags.ArgumentParser):
    def parse(self, argument: str) -> Chosen:
        """A config that is not read yet."""
        return Chosen(argument)


class _Size(overrides.Whole):
    """64, or HEIGHTxWIDTH: 48x64."""

    def convert(self, argument: int | str) -> int | tuple[int, int]:
        """A side, or height and width where they differ; ValueError for what is neither."""
        both = re.fullmatch(r"(\d+)[x×](\d+)", argument) if isinstance(argument, str) else None
        if both:
            height, width = int(both[1]), int(both[2])
            return height if height == width else (height, width)
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("give a side in pixels, as 64, or HEIGHTxWIDTH, as 48x64") from None


class _Sizes(flags.ArgumentSerializer):
    def serialize(self, value: int | tuple[int, int]) -> str:
        """As `_Size` reads it."""
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _whole(name: str, default: int | None, text: str) -> flags.FlagHolder[int]:
    return flags.DEFINE(overrides.Whole(), name, default, text, serializer=flags.ArgumentSerializer())


CONFIG = flags.DEFINE(
    _Named(),
    "config",
    None,
    "A config: the name of a shipped one, as cifar10, or FILE.py; with an optional system, as cifar10:hot. "
    "--config.KEY=VALUE changes it.",
)
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "Where the run lives, also gs://BUCKET/…; default: runs/CONFIG, or runs/CONFIG_SYSTEM. Of a run that is there, "
    "--config may be left out.",
)
SEEDS = flags.DEFINE_string("seeds", "0-63", "Which images, one seed an image, as in 0-63,100.")
TRAJECTORY = flags.DEFINE_bool(
    "trajectory", False, "Also draw the way there, trajectory.png and .gif (64 seeds at most; default 0-5)."
)
OUT = flags.DEFINE_string("out", "", "Where results go: a file or a folder, by mode.")
NPZ_NAMES = flags.DEFINE_enum(
    "npz_names",
    "images",
    ["images", "arr"],
    "How the arrays of --out=FILE.npz are called: images, labels; or arr_0, arr_1, as guided-diffusion's tools read "
    "them (arr).",
)
CHECKPOINT = _whole("checkpoint", -1, "Step of the checkpoint to take; -1: the latest.")
EMA = flags.DEFINE_list(
    "ema",
    [],
    "Instead of the plain EMA one of this relative length σ_rel, as 0.08, of a run with train.posthoc_ema; "
    "--mode=evaluate scores several, as 0.02,0.05,0.1.",
)
IMAGES = flags.DEFINE_string("images", "", "A source of images, as data.source: bundled, zip:FILE, folder:PATH, …")
BLUR = flags.DEFINE_string("blur", "auto", "The blur's standard deviation in pixels; auto: estimated.")
NOISE = flags.DEFINE_string(
    "noise", "auto", "The noise's standard deviation, of pixels in [-1, 1], or as 25/255; auto: estimated."
)
ESTIMATE = flags.DEFINE_enum(
    "estimate", "mean", ["mean", "sample"], "The posterior mean, or --count draws from the posterior (sample)."
)
COUNT = _whole("count", 4, "How many draws of each image, with --estimate=sample.")
ADD_NOISE = flags.DEFINE_bool("add_noise", False, "Add noise, where the model knows such a blur only with more of it.")
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "once",
    ["once", "paper", "edm2", "quick"],
    "once: one round of eval.count images; paper: three disjoint ones of 50,000; edm2: one of 50,000, FID and "
    "FD-DINOv2; quick: one of 5,000 with features that need no download.",
)
WATCH = flags.DEFINE_bool("watch", False, "Score each new checkpoint of the workdir, until the last one.")
AGAINST = flags.DEFINE_string(
    "against", "", "Another run's workdir: the difference of bits a dimension (eval.metrics bpd), image by image."
)
ANALYSIS = flags.DEFINE_string(
    "analysis",
    "all",
    "spectra, corruption, process, learning, manifold, sweep, solvers, likelihood, "
    "report (a page of the workdir) or all; or memorisation or guidance, of a checkpoint's samples.",
)
IMAGE_SIZE = flags.DEFINE(
    _Size(),
    "image_size",
    None,
    "Side to resize to, or HEIGHTxWIDTH; default: the config's, or as it is.",
    serializer=_Sizes(),
)
CHANNELS = _whole("channels", None, "1 grey or 3 RGB; default: the config's; or grey, if all images are, else RGB.")
CROP = flags.DEFINE_enum("crop", "center", ["center", "none"], "How to make images square: center, or none.")
ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "What to do with broken images: raise or skip.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:4x4",
    "What to compile for: v5e:4x4 (or v4, v5p, v6e), v5e:smallest (the first that fits), gpu:h100x8 (or a100, h200), "
    "cpu:8. The exit status is 0 also where it does not fit; the JSON file in the workdir says so.",
)
PROFILE = flags.DEFINE_bool("profile", False, "Trace ten steps into WORKDIR/profile, for TensorBoard and XProf.")
FROM_INCEPTION = flags.DEFINE_string("from_inception", "", "The published pt_inception-2015-12-05 file.")
FROM_DINOV2 = flags.DEFINE_string("from_dinov2", "", "A published dinov2_vit{s,b,l}14_pretrain.pth.")
UNVERIFIED = flags.DEFINE_bool(
    "unverified", False, "Convert feature networks with weights other than the published; their scores' names say so."
)
FROM_EDM = flags.DEFINE_string("from_edm", "", "One of NVIDIA's network pickles (nothing in it is run).")
FROM_EXPORT = flags.DEFINE_string("from_export", "", "A folder that --mode=export wrote.")
INIT_FROM = flags.DEFINE_string("init_from", "", "Begin from the EMA weights of another workdir, as hot ones.")
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "What the StableHLO program runs on: some of cpu, cuda, rocm, tpu."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where Slurm or TPU metadata do not say it; or WARM_JAX_COORDINATOR."
)
PROCESSES = _whole(
    "processes", 0, "How many processes there are, or WARM_JAX_PROCESSES; 1: only this one, whatever Slurm says."
)
PROCESS = _whole("process", -1, "Which of the processes this is, from 0; or WARM_JAX_PROCESS.")
START_SECONDS = flags.DEFINE_float("start_seconds", 300, "How long to wait for the other processes.", lower_bound=1)
VERSION = flags.DEFINE_bool("version", False, "Say the versions of warm_jax, JAX, Flax and Python, and end.")
TRAJECTORY_SEEDS = "0-5"  # where --seeds does not say others
# What the processes of one job must have in common; folders may have other names elsewhere.
SAME_FLAGS = ("mode", "seeds", "npz_names", "trajectory", "checkpoint", "ema", "images", "protocol", "watch", "against")


def fail(error: Exception | str, status: int) -> int:
    """Says what is wrong in one line on stderr; returns `status`."""
    # Of an unknown key: a KeyError's text is the repr of its message, which hides "did you mean"; it may be wrapped.
    text = error
    while isinstance(text, KeyError | AttributeError) and text.args:
        text = text.args[0]
    if text is not error:
        text = f"the config has no key {text}"
    lines = str(text).strip().splitlines() or [type(error).__name__]
    if "Traceback (most recent call last)" in str(text):  # of a config file that raised: its last line says why
        lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
    print(f"error: {letters.printable(' '.join(line.strip() for line in lines))}", file=sys.stderr)
    return status


# ── Reading them ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, in any order; what is wrong with them is one line on stderr and exit status 2.

    --help and --version are answered here, with exit status 0.
    """
    letters.escape_unknown_letters()  # before --help prints any
    try:
        return _parse(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(fail(error, EXIT_USAGE))


def _parse(argv: list[str]) -> list[str]:
    flags.FLAGS.set_gnu_getopt(True)  # a value of --config.KEY VALUE ends nothing
    argv, asked = usage.without_help(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
    rest = flags.FLAGS(argv, known_only=True)  # without the changes of a config, whose keys are not known yet
    if asked == usage.FULL:
        app.usage(shorthelp=False, writeto_stdout=True)
        sys.exit(0)
    if asked:
        print(usage.of_mode(MODE.value) if flags.FLAGS["mode"].present else usage.overview())
        sys.exit(0)
    if VERSION.value:
        print(_versions())
        sys.exit(0)
    unknown = [argument for argument in rest[1:] if re.match(r"--?[A-Za-z_]", argument)]
    unknown = [argument for argument in unknown if not overrides.PATTERN.match(argument)]
    if unknown:
        raise flags.Error(_no_flag(unknown[0]))
    check_flags(MODE.value)
    if pathlib.Path(WORKDIR.value).is_file():
        raise flags.Error(f"--workdir={WORKDIR.value} is a file; a workdir is a folder")
    name, config, unset = _choose(MODE.value, [argument for argument in rest if overrides.PATTERN.match(argument)])
    if config is not None:
        config, changes, rest = overrides.apply(config, rest, unset)
        flags.FLAGS["config"].value = Chosen(name, config, changes)
    if len(rest) > 1:
        raise flags.Error(f"unexpected {' '.join(rest[1:])!r}; values are given as --flag=VALUE")
    return rest


def _choose(mode: str, changes: list[str]) -> tuple[str, ConfigDict | None, set[str]]:
    """What --config says, the config without changes, and its keys that may be unset."""
    if CONFIG.value is not None:
        try:
            config = config_files.load(CONFIG.value.name)
        except (ValueError, OSError) as error:
            raise type(error)(f"--config={error}") from error
        return CONFIG.value.name, config, overrides.unset_keys(config)
    workdir = buckets.local(WORKDIR.value) if WORKDIR.value and mode in OF_A_RUN else None
    if workdir is not None and (workdir / "config.json").exists():
        config = config_files.of_workdir(workdir)
        like = config_files.template(config)
        return "", config, overrides.unset_keys(config) | overrides.unset_keys(like)
    if mode not in WITHOUT_CONFIG or changes:
        raise flags.Error(_no_config(mode, workdir, changes))
    return "", None, set()


def _no_config(mode: str, workdir: pathlib.Path | None, changes: list[str]) -> str:
    """What is said where there is no config, and one is needed."""
    by_name = "--config=NAME, as --config=fashion_mnist (--help lists them)"
    if mode in WITHOUT_CONFIG:
        return f"{changes[0]} changes a config, and there is none; give {by_name}"
    if workdir is not None:
        what = "has no config.json, so it is no workdir of a run" if workdir.is_dir() else "is not there"
        return f"--workdir={WORKDIR.value} {what}; begin a run with {by_name}, or name another --workdir"
    if mode not in OF_A_RUN:
        return f"--mode={mode} needs {by_name}"
    runs = sorted(str(path.parent) for path in pathlib.Path("runs").glob("*/config.json"))
    found = f", here {', '.join(runs[:8])}{', …' if len(runs) > 8 else ''}" if runs else ""
    return f"neither --config nor --workdir is given: give {by_name}, or --workdir=RUN of a run that is there{found}"


def _no_flag(argument: str) -> str:
    """What is said of a flag that there is not: which one, or which key of a config, may be meant."""
    name, _, value = argument.lstrip("-").partition("=")
    near = [f"--{one}" for one in difflib.get_close_matches(name, flag_table.READ_BY, n=1, cutoff=0.7)]
    try:
        like = config_files.load(CONFIG.value.name if CONFIG.value else config_files.TEMPLATE)
    except (ValueError, OSError):
        like = config_files.load(config_files.TEMPLATE)
    keys = overrides.changing(name, like, value)
    meant = " or ".join([*near, keys] if keys else near)
    return f"{argument}: no such flag; {f'did you mean {meant}?' if meant else '--help lists the flags'}"


def _versions() -> str:
    """One line; nothing is imported, so no device is looked at."""

    def of(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "(not installed)"

    return (
        f"warm_jax {of('warm_jax')}, jax {of('jax')}, jaxlib {of('jaxlib')}, flax {of('flax')}, "
        f"Python {platform.python_version()}"
    )


def check_flags(mode: str) -> None:
    """Raises flags.Error for a flag on the command line that `mode` does not read."""
    for name, modes in flag_table.READ_BY.items():
        flag = flags.FLAGS[name]
        if flag.present and mode not in modes:
            given = f"--{name}" if flag.boolean else f"--{name}={flag.serialize().partition('=')[2]}"
            raise flags.Error(flag_table.refusal(name, given, mode))


# ── What they say ────────────────────────────────────────────────────────────────────────────────────────────────────


def config() -> ConfigDict | None:
    """The config that was chosen, with the changes of the command line; None where none is given, and none needed."""
    return CONFIG.value and CONFIG.value.config


def config_name() -> str:
    """What --config says, as cifar10:hot; empty where it says nothing."""
    return CONFIG.value.name if CONFIG.value else ""


def default_workdir(config_flag: str) -> pathlib.Path:
    """`configs/cifar10.py` -> runs/cifar10, `configs/cifar10.py:hot` -> runs/cifar10_hot."""
    path, _, system = config_flag.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}_{system}" if system not in ("", "warm") else stem)


def config_of(system: str) -> ConfigDict:
    """What --config would be with `system` after its colon: the same file, the same changes."""
    made = config_files.load(f"{config_name().partition(':')[0]}:{system}")
    for key, value in CONFIG.value.changes.items():
        try:
            made.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{system} has no {key}, so it cannot be given for all that are compared") from error
    return made


def path(flag: flags.FlagHolder[str]) -> str:
    """The path that a flag names, on a disk of this machine or in a bucket; empty where it names none."""
    return flag.value and str(buckets.local(flag.value))


def emas() -> tuple[float, ...]:
    """The relative lengths that --ema names, any number of them. ValueError for what is no number."""
    try:
        return tuple(float(text) for text in EMA.value)
    except ValueError as error:
        raise ValueError(f"--ema={','.join(EMA.value)}: give relative lengths as 0.08 or 0.02,0.05,0.1") from error


def ema() -> float | None:
    """The one that --ema names, of a mode that takes one; None: the plain EMA. ValueError for several."""
    given = emas()
    if len(given) > 1:
        raise ValueError(f"--ema={','.join(EMA.value)}: --mode={MODE.value} takes one; --mode=evaluate takes several")
    return given[0] if given else None
