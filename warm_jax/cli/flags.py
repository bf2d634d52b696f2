"""The flags: which there are, what they mean together, and what is said of wrong ones."""

import pathlib
import runpy
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from warm_jax.cli import letters
from warm_jax.data import buckets

MODES = {
    "train": "train, resuming by itself from the workdir's last checkpoint, and draw a grid of samples",
    "sample": "draw --seeds with the EMA weights of a checkpoint",
    "restore": "restore photographs, --images, of known --blur and --noise or of estimated ones",
    "evaluate": "score a checkpoint, or --images, against a reference",
    "stats": "write the statistics file --out of --images, to evaluate against",
    "preflight": "compile the config's programs for --topology, which need not be here: memory, FLOPs, bounds on speed",
    "prepare": "make --out (a zip or arrayrecord) of --images: cropped, resized, with a manifest",
    "compare": "train, sample and score all systems of compare.systems, each with its own form of the config",
    "analyze": "make the figures of --analysis from the data, from exact predictors and from trained models",
    "inspect": "look at --images: counts, sizes, broken files, a contact sheet, the spectrum",
    "convert": "convert published Inception weights, --from_inception=FILE.pth, to --out=FILE.safetensors; or EDM's, "
    "--from_edm=FILE.pkl, to --workdir; or an export, --from_export=FOLDER, to --workdir",
    "doctor": "what this machine has, what is wrong with it, and a self-test of seconds; with a config also its images",
    "export": "write a checkpoint's EMA weights as safetensors, JSON, StableHLO and a model card to --out",
}
# These save what they have, and leave, at a signal.
SAVING = ("train", "sample", "restore", "evaluate", "compare", "analyze")
TOGETHER = ("train", "sample", "evaluate")  # these run on many processes
OF_WEIGHTS = ("sample", "restore", "evaluate", "analyze", "export")  # these take --ema
WITHOUT_CONFIG = ("prepare", "inspect", "convert", "doctor")
EXIT_FAILED, EXIT_USAGE = 1, 2

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional system: configs/cifar10.py:hot. Override with --config.KEY=VALUE.",
    lock_config=True,
)
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{k}: {v}" for k, v in MODES.items()))
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where the run lives, also gs://BUCKET/… (default: runs/CONFIG, or runs/CONFIG_SYSTEM)."
)
SEEDS = flags.DEFINE_string("seeds", "0-63", "sample: which images, one seed an image, as in 0-63,100.")
TRAJECTORY = flags.DEFINE_bool(
    "trajectory", False, "sample: also draw the way there, trajectory.png and .gif (64 seeds at most; default 0-5)."
)
OUT = flags.DEFINE_string(
    "out",
    "",
    "Where results go. sample: a folder, FILE.npz or FILE.png (default: WORKDIR/samples); restore: a folder "
    "(default: WORKDIR/restored); others: a folder.",
)
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", -1, "Step of the checkpoint to sample, restore with, score, analyze or export; -1: the latest."
)
EMA = flags.DEFINE_list(
    "ema",
    [],
    "sample, restore, evaluate, analyze, export: instead of the plain EMA one of this relative length σ_rel, as 0.08, "
    "of a run with train.posthoc_ema; evaluate scores several, as 0.02,0.05,0.1.",
)
IMAGES = flags.DEFINE_string("images", "", "A source of images, as data.source: bundled, zip:FILE, folder:PATH, …")
BLUR = flags.DEFINE_string("blur", "auto", "restore: the blur's standard deviation in pixels; auto: estimated.")
NOISE = flags.DEFINE_string(
    "noise", "auto", "restore: the noise's standard deviation, of pixels in [-1, 1], or as 25/255; auto: estimated."
)
ESTIMATE = flags.DEFINE_enum(
    "estimate", "mean", ["mean", "sample"], "restore: the posterior mean, or --count draws from the posterior."
)
COUNT = flags.DEFINE_integer("count", 4, "restore: how many draws of each image, with --estimate=sample.")
ADD_NOISE = flags.DEFINE_bool(
    "add_noise", False, "restore: add noise, where the model knows such a blur only with more of it."
)
PROTOCOL = flags.DEFINE_enum(
    "protocol", "once", ["once", "paper"], "evaluate: one round of eval.count images, or three disjoint ones of 50,000."
)
WATCH = flags.DEFINE_bool("watch", False, "evaluate: score each new checkpoint of the workdir, until the last one.")
ANALYSIS = flags.DEFINE_string(
    "analysis",
    "all",
    "analyze: spectra, corruption, learning, manifold, sweep, solvers, report (a page of the workdir) or all.",
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "prepare: side to resize to (default: the config's, or as it is)."
)
CHANNELS = flags.DEFINE_integer("channels", None, "prepare: 1 grey or 3 RGB (default: the config's, or as it is).")
CROP = flags.DEFINE_enum("crop", "center", ["center", "none"], "prepare: how to make images square.")
ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "prepare: what to do with broken images.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:4x4",
    "preflight: what to compile for: v5e:4x4 (or v4, v5p, v6e), v5e:smallest (the first that fits), gpu:h100x8 (or "
    "a100, h200), cpu:8. The exit status is 0 also where it does not fit; the JSON file in the workdir says so.",
)
PROFILE = flags.DEFINE_bool("profile", False, "train: trace ten steps into WORKDIR/profile, for TensorBoard and XProf.")
FROM_INCEPTION = flags.DEFINE_string("from_inception", "", "convert: the published pt_inception-2015-12-05 file.")
FROM_EDM = flags.DEFINE_string("from_edm", "", "convert: one of NVIDIA's network pickles (nothing in it is run).")
FROM_EXPORT = flags.DEFINE_string("from_export", "", "convert: a folder that --mode=export wrote.")
INIT_FROM = flags.DEFINE_string("init_from", "", "train: begin from the EMA weights of another workdir, as hot ones.")
PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "export: what the StableHLO program runs on.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where Slurm or TPU metadata do not say it; or WARM_JAX_COORDINATOR."
)
PROCESSES = flags.DEFINE_integer(
    "processes", 0, "How many processes there are, or WARM_JAX_PROCESSES; 1: only this one, whatever Slurm says."
)
PROCESS = flags.DEFINE_integer("process", -1, "Which of the processes this is, from 0; or WARM_JAX_PROCESS.")
START_SECONDS = flags.DEFINE_float("start_seconds", 300, "How long to wait for the other processes.", lower_bound=1)
TRAJECTORY_SEEDS = "0-5"  # where --seeds does not say others
# What the processes of one job must have in common; folders may have other names elsewhere.
SAME_FLAGS = ("mode", "seeds", "trajectory", "checkpoint", "ema", "images", "protocol", "watch")


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
    letters.escape_unknown_letters()  # before --help prints any
    try:
        _check_config_file(argv)
        rest = flags.FLAGS(argv)
        if CONFIG.value is None and MODE.value not in WITHOUT_CONFIG and not _help_wanted():
            raise flags.Error("--config=FILE is missing, for example --config=configs/fashion_mnist.py")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        sys.exit(fail(error, EXIT_USAGE))
    if len(rest) > 1:
        sys.exit(fail(f"unexpected {' '.join(rest[1:])!r}; values are given as --flag=VALUE", EXIT_USAGE))
    return rest


def _help_wanted() -> bool:
    return any(flags.FLAGS[name].value for name in ("help", "helpshort", "helpfull", "helpxml") if name in flags.FLAGS)


def config_name() -> str:
    """What --config says, as configs/cifar10.py:hot; empty where it says nothing."""
    return flags.FLAGS["config"].config_filename if CONFIG.value is not None else ""


def default_workdir(config_flag: str) -> pathlib.Path:
    """`configs/cifar10.py` -> runs/cifar10, `configs/cifar10.py:hot` -> runs/cifar10_hot."""
    path, _, system = config_flag.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}_{system}" if system not in ("", "warm") else stem)


def config_of(system: str) -> ConfigDict:
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


def config_file(name: str) -> ConfigDict:
    """The config that a name with an optional system says, without overrides; OSError where there is no such file."""
    path, _, system = name.partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; name a config with --config=FILE.py:hot")
    config = runpy.run_path(path)["get_config"](*([system] if system else []))
    config.lock()
    return config


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


def check_flags(mode: str) -> None:
    """Raises ValueError for a flag that `mode` would ignore, where that would mislead."""
    if TRAJECTORY.value and mode != "sample":
        raise ValueError(
            f"--trajectory shows how samples come about; it does not go with --mode={mode}, only with sample"
        )
    if EMA.value and mode not in OF_WEIGHTS:
        raise ValueError(
            f"--ema={','.join(EMA.value)} chooses the weights of a trained model; it does not go with --mode={mode}, "
            f"only with {', '.join(OF_WEIGHTS)}"
        )
