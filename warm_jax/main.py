"""The command line: flags to a program, and nothing else."""

import contextlib
import hashlib
import os
import pathlib
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warm_jax import pod, preemption, rollcall
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
CACHE = "~/.cache/warm_jax/xla"  # of compiled programs, where JAX is not told of another

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
_TRAJECTORY = flags.DEFINE_bool(
    "trajectory", False, "sample: also draw the way there, trajectory.png and .gif (64 seeds at most; default 0-5)."
)
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Where results go. sample: a folder, FILE.npz or FILE.png (default: WORKDIR/samples); restore: a folder "
    "(default: WORKDIR/restored); others: a folder.",
)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", -1, "Step of the checkpoint to sample, restore with, score, analyze or export; -1: the latest."
)
_EMA = flags.DEFINE_list(
    "ema",
    [],
    "sample, restore, evaluate, analyze, export: instead of the plain EMA one of this relative length σ_rel, as 0.08, "
    "of a run with train.posthoc_ema; evaluate scores several, as 0.02,0.05,0.1.",
)
_IMAGES = flags.DEFINE_string("images", "", "A source of images, as data.source: bundled, zip:FILE, folder:PATH, …")
_BLUR = flags.DEFINE_string("blur", "auto", "restore: the blur's standard deviation in pixels; auto: estimated.")
_NOISE = flags.DEFINE_string(
    "noise", "auto", "restore: the noise's standard deviation, of pixels in [-1, 1], or as 25/255; auto: estimated."
)
_ESTIMATE = flags.DEFINE_enum(
    "estimate", "mean", ["mean", "sample"], "restore: the posterior mean, or --count draws from the posterior."
)
_COUNT = flags.DEFINE_integer("count", 4, "restore: how many draws of each image, with --estimate=sample.")
_ADD_NOISE = flags.DEFINE_bool(
    "add_noise", False, "restore: add noise, where the model knows such a blur only with more of it."
)
_PROTOCOL = flags.DEFINE_enum(
    "protocol", "once", ["once", "paper"], "evaluate: one round of eval.count images, or three disjoint ones of 50,000."
)
_WATCH = flags.DEFINE_bool("watch", False, "evaluate: score each new checkpoint of the workdir, until the last one.")
_ANALYSIS = flags.DEFINE_string(
    "analysis",
    "all",
    "analyze: spectra, corruption, learning, manifold, sweep, solvers, report (a page of the workdir) or all.",
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "prepare: side to resize to (default: the config's, or as it is)."
)
_CHANNELS = flags.DEFINE_integer("channels", None, "prepare: 1 grey or 3 RGB (default: the config's, or as it is).")
_CROP = flags.DEFINE_enum("crop", "center", ["center", "none"], "prepare: how to make images square.")
_ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "prepare: what to do with broken images.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:4x4",
    "preflight: what to compile for: v5e:4x4 (or v4, v5p, v6e), v5e:smallest (the first that fits), gpu:h100x8 (or "
    "a100, h200), cpu:8. The exit status is 0 also where it does not fit; the JSON file in the workdir says so.",
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "train: trace ten steps into WORKDIR/profile, for TensorBoard and XProf."
)
_FROM_INCEPTION = flags.DEFINE_string("from_inception", "", "convert: the published pt_inception-2015-12-05 file.")
_FROM_EDM = flags.DEFINE_string("from_edm", "", "convert: one of NVIDIA's network pickles (nothing in it is run).")
_FROM_EXPORT = flags.DEFINE_string("from_export", "", "convert: a folder that --mode=export wrote.")
_INIT_FROM = flags.DEFINE_string("init_from", "", "train: begin from the EMA weights of another workdir, as hot ones.")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "export: what the StableHLO program runs on.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where Slurm or TPU metadata do not say it; or WARM_JAX_COORDINATOR."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 0, "How many processes there are, or WARM_JAX_PROCESSES; 1: only this one, whatever Slurm says."
)
_PROCESS = flags.DEFINE_integer("process", -1, "Which of the processes this is, from 0; or WARM_JAX_PROCESS.")
_START_SECONDS = flags.DEFINE_float("start_seconds", 300, "How long to wait for the other processes.", lower_bound=1)
_TRAJECTORY_SEEDS = "0-5"  # where --seeds does not say others
# What the processes of one job must have in common; folders may have other names elsewhere.
_SAME_FLAGS = ("mode", "seeds", "trajectory", "checkpoint", "ema", "images", "protocol", "watch")


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


def _emas() -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in _EMA.value)
    except ValueError as error:
        raise ValueError(f"--ema={','.join(_EMA.value)}: give relative lengths as 0.08 or 0.02,0.05,0.1") from error


def _ema() -> float | None:
    given = _emas()
    if len(given) > 1:
        raise ValueError(f"--ema={','.join(_EMA.value)}: --mode={_MODE.value} takes one; --mode=evaluate takes several")
    return given[0] if given else None


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


def _config_file(name: str) -> ConfigDict:
    """The config that a name with an optional system says, without overrides; OSError where there is no such file."""
    path, _, system = name.partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; name a config with --config=FILE.py:hot")
    config = runpy.run_path(path)["get_config"](*([system] if system else []))
    config.lock()
    return config


def _convert(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax import reference
    from warm_jax.convert import edm, export

    given = [flag.name for flag in (_FROM_INCEPTION, _FROM_EDM, _FROM_EXPORT) if flag.value]
    if len(given) != 1:
        raise ValueError("--mode=convert needs one of --from_inception=FILE, --from_edm=FILE and --from_export=FOLDER")
    if _FROM_EDM.value:
        name = flags.FLAGS["config"].config_filename if config is not None else ""
        conversion = edm.prepare(_path(_FROM_EDM), _path(_WORKDIR), name, config, _config_file)
        return lambda: edm.convert(conversion)
    if _FROM_EXPORT.value:
        importing = export.prepare_import(_path(_FROM_EXPORT), _path(_WORKDIR))
        return lambda: export.import_export(importing)
    return lambda: reference.convert_inception(_path(_FROM_INCEPTION), _path(_OUT))


def _check_flags(mode: str) -> None:
    """Raises ValueError for a flag that `mode` would ignore, where that would mislead."""
    if _TRAJECTORY.value and mode != "sample":
        raise ValueError(
            f"--trajectory shows how samples come about; it does not go with --mode={mode}, only with sample"
        )
    if _EMA.value and mode not in OF_WEIGHTS:
        raise ValueError(
            f"--ema={','.join(_EMA.value)} chooses the weights of a trained model; it does not go with --mode={mode}, "
            f"only with {', '.join(OF_WEIGHTS)}"
        )


def prepare(mode: str, config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    """Checks everything for `mode` and returns the program, ready to run. ValueError or OSError for bad input."""
    _check_flags(mode)
    if mode == "prepare":
        return _prepare_images(config)
    if mode == "inspect":
        return _inspect(config, workdir)
    if mode == "train":
        from warm_jax import train

        run = train.prepare(config, workdir, _path(_INIT_FROM), _PROFILE.value)
        return lambda: train.train(run)
    if mode == "sample":
        from warm_jax import generate

        follow = _TRAJECTORY.value
        seeds = _TRAJECTORY_SEEDS if follow and not flags.FLAGS["seeds"].present else _SEEDS.value
        drawing = generate.prepare(
            config, workdir, seeds, _path(_OUT), _CHECKPOINT.value, trajectory=follow, ema=_ema()
        )
        return lambda: generate.sample(drawing, follow)
    if mode == "restore":
        from warm_jax import restore

        asked = restore.Asked(
            _IMAGES.value, _BLUR.value, _NOISE.value, _ESTIMATE.value, _COUNT.value, _ADD_NOISE.value, _ema()
        )
        restoring = restore.prepare(config, workdir, asked, _path(_OUT), _CHECKPOINT.value)
        return lambda: restore.restore(restoring)
    if mode == "compare":
        from warm_jax import compare

        comparison = compare.prepare(_config_of, workdir)
        return lambda: compare.compare(comparison)
    if mode == "analyze":
        from warm_jax import analyze

        figures = analyze.prepare(config, workdir, _ANALYSIS.value, _CHECKPOINT.value, _ema())
        return lambda: analyze.analyze(figures)
    if mode == "export":
        from warm_jax.convert import export

        exporting = export.prepare(config, workdir, _path(_OUT), _CHECKPOINT.value, tuple(_PLATFORMS.value), _ema())
        return lambda: export.export(exporting)
    if mode == "convert":
        return _convert(config)
    if mode == "preflight":
        from warm_jax import preflight

        asked = preflight.prepare(config, workdir, _TOPOLOGY.value)
        return lambda: preflight.preflight(asked)
    from warm_jax import evaluate, reference

    if mode == "stats":
        return lambda: reference.statistics(config, _IMAGES.value, _path(_OUT))
    protocol, watch = _PROTOCOL.value, _WATCH.value
    judging = evaluate.prepare(config, workdir, _IMAGES.value, _CHECKPOINT.value, protocol, watch, _emas())
    return lambda: evaluate.evaluate(judging)


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage or input, 75 saved after a signal and worth running again."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
    if _MODE.value == "doctor":  # which must not fail where JAX does
        return _doctor()
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE))
    if _MODE.value == "preflight":  # its compilers are in processes of their own: an accelerator here is left alone
        jax.config.update("jax_platforms", "cpu")
    try:
        place = rollcall.find(os.environ, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if place and _MODE.value not in TOGETHER:
            raise ValueError(
                f"--mode={_MODE.value} runs in one process, and this is one of {place.processes}; give --processes=1, "
                "and run it once"
            )
        share_cores(_CONFIG.value, place.processes if place else 1)
        pod.start(place, _facts(_CONFIG.value), _START_SECONDS.value)
    except TimeoutError as error:
        return _fail(error, EXIT_FAILED)
    except (ValueError, OSError) as error:
        return _fail(error, EXIT_USAGE)
    given = flags.FLAGS["config"].config_filename if _CONFIG.value is not None else ""
    workdir = _WORKDIR.value or str(default_workdir(given or "images"))
    with preemption.noted() if _MODE.value in SAVING else contextlib.nullcontext():
        return _run(_MODE.value, _CONFIG.value, workdir)


def _doctor() -> int:
    from warm_jax import doctor

    given = dict(os.environ)  # as people set it
    cache = given.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser(CACHE)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    config = _CONFIG.value
    try:
        _check_flags("doctor")
        out = _path(_OUT)
        if out:
            _check_report(out)
        workdir = buckets.local(_WORKDIR.value) if _WORKDIR.value else pathlib.Path()
        if config is not None and not _WORKDIR.value:
            workdir = default_workdir(flags.FLAGS["config"].config_filename)
    except (ValueError, OSError) as error:
        return _fail(error, EXIT_USAGE)
    with contextlib.suppress(Exception):  # where JAX is broken, which the table says
        share_cores(config)
    try:
        smoke = _config_file("configs/smoke.py")
    except OSError:
        smoke = None
    try:
        return doctor.doctor(config, smoke, pathlib.Path(cache), out, given, pathlib.Path(workdir))
    except OSError as error:
        return _fail(error, EXIT_USAGE)


def _check_report(out: str) -> None:
    """Raises ValueError or OSError where `out` is no FILE.json that can be written."""
    folder = os.path.dirname(os.path.abspath(out))
    if not out.endswith(".json") or os.path.isdir(out) or not os.path.isdir(folder):
        raise ValueError(f"--out={out}: --mode=doctor writes FILE.json, in a folder that is there")
    try:
        with open(out, "a") if os.path.exists(out) else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out={out} cannot be written ({error.strerror}); name another FILE.json") from error


def _facts(config: ConfigDict | None) -> dict[str, object]:
    """What must be the same in all processes of a job: the code, its versions, the config, what is asked for."""
    import jax

    from warm_jax import workdirs

    code = hashlib.sha256()
    package = pathlib.Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)} {path.stat().st_size} ".encode() + path.read_bytes())
    facts = {"code of warm_jax": code.hexdigest()[:12], "jax": jax.__version__, "python": sys.version.split()[0]}
    facts |= {f"--{name}": flags.FLAGS[name].value for name in _SAME_FLAGS}
    facts["--init_from is given"] = bool(_INIT_FROM.value)
    return facts | (workdirs.flat(config) if config is not None else {})


def share_cores(config: ConfigDict | None, processes: int = 1) -> None:
    """On a CPU, as many devices as cores (at most 8) that divide the batch; accelerators are not touched.

    XLA runs most operations of a small network on one core. Devices that share the batch keep the others busy: 1.4
    times the speed on two cores. `XLA_FLAGS=--xla_force_host_platform_device_count=N` overrides it.
    """
    import jax

    if config is None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parts = max(1, config.train.accumulation) * processes
    fitting = [n for n in range(1, cores + 1) if config.train.batch_size % (n * parts) == 0]
    whole = [n for n in fitting if n * processes % max(1, config.mesh.fsdp) == 0] if "mesh" in config else []
    jax.config.update("jax_num_cpu_devices", max(whole or fitting, default=1))


def _run(mode: str, config: ConfigDict | None, workdir: str) -> int:
    import jax

    program = wrong = None
    try:
        program = prepare(mode, config, buckets.local(workdir))
    except (ValueError, TypeError, OSError) as error:
        logging.debug("while checking the input", exc_info=True)
        wrong = error
        if mode in SAVING and preemption.requested():  # it waited for something that did not come
            return _leave(preemption.EXIT_AGAIN)
    except Exception as error:
        _end_the_pod(error)
        raise
    try:
        pod.all_or_none("prepared", wrong)
    except (ValueError, TypeError, OSError) as error:
        return _leave(_fail(error, EXIT_USAGE), str(error))
    try:
        return _leave(program())
    except (ValueError, TypeError, OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        logging.info("traceback", exc_info=True)  # --verbosity=0 shows it
        status = _fail(error, EXIT_USAGE if mode in (*WITHOUT_CONFIG, "stats") else EXIT_FAILED)
        return _leave(status, str(error))
    except Exception as error:
        _end_the_pod(error)
        raise


def _end_the_pod(error: Exception) -> None:
    """Of an error that nobody thought of: the others would wait for this process."""
    if pod.count() > 1:
        traceback.print_exc()
        pod.end(EXIT_FAILED, str(error))


def _leave(status: int, why: str = "") -> int:
    pod.end(status, why)
    return status


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
