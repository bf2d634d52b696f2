"""From a mode and its flags to a program, ready to run."""

import contextlib
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from warm_jax.cli import flags, outputs
from warm_jax.experiments import config_files


def _prepare_images(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax.data import prepare

    size, channels = flags.IMAGE_SIZE.value, flags.CHANNELS.value
    if config is not None:
        size = config.data.image_size if size is None else size
        channels = config.data.channels if channels is None else channels
    if not flags.IMAGES.value or not flags.OUT.value:
        raise ValueError("--mode=prepare needs --images=SOURCE and --out=FILE.zip")
    settings = {"image_size": size, "channels": channels, "crop": flags.CROP.value, "on_error": flags.ON_ERROR.value}
    return lambda: prepare.run(flags.IMAGES.value, flags.path(flags.OUT), **settings)


def _inspect(config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    from warm_jax.analysis import inspection

    images = flags.IMAGES.value or (config.data.source if config is not None else "")
    if not images:
        raise ValueError("--mode=inspect needs --images=SOURCE, or a --config whose data.source to look at")
    return lambda: inspection.run(images, flags.path(flags.OUT) or str(workdir / "inspect"))


def _settle(mode: str, config: ConfigDict, workdir: pathlib.Path, quiet: bool = False) -> None:
    """Fetches what `data.download` asks for, and fills in what the config leaves to the images and the machine."""
    from warm_jax.accelerators import topology
    from warm_jax.experiments import automatic, recipes

    machine = None  # this one
    if mode != "preflight":
        automatic.fetch(config)
    else:
        target = topology.parse(flags.TOPOLOGY.value)[0]
        machine = recipes.Machine(
            target.chip.platform, target.devices, int(target.chip.usable * (target.chip.memory or 0))
        )
    automatic.settle(config, workdir, machine, quiet)


def _convert(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax.convert import export, from_edm
    from warm_jax.evaluation import reference

    features = {"inception": flags.FROM_INCEPTION, "dinov2": flags.FROM_DINOV2}
    given = [flag.name for flag in (*features.values(), flags.FROM_EDM, flags.FROM_EXPORT) if flag.value]
    if len(given) != 1:
        raise ValueError(
            "--mode=convert needs one of --from_inception=FILE, --from_dinov2=FILE, --from_edm=FILE and "
            "--from_export=FOLDER"
        )
    if flags.UNVERIFIED.value and given[0] in ("from_edm", "from_export"):
        raise ValueError(f"--unverified goes with --from_inception and --from_dinov2, not with --{given[0]}")
    if flags.FROM_EDM.value:
        name = flags.config_name()
        conversion = from_edm.prepare(
            flags.path(flags.FROM_EDM), flags.path(flags.WORKDIR), name, config, config_files.load
        )
        return lambda: from_edm.convert(conversion)
    if flags.FROM_EXPORT.value:
        importing = export.prepare_import(flags.path(flags.FROM_EXPORT), flags.path(flags.WORKDIR))
        return lambda: export.import_export(importing)
    [kind] = [kind for kind, flag in features.items() if flag.value]
    unverified = flags.UNVERIFIED.value
    return lambda: reference.convert_weights(kind, flags.path(features[kind]), flags.path(flags.OUT), unverified)


def prepare(mode: str, config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    """Checks everything for `mode` and returns the program, ready to run. ValueError or OSError for bad input.

    What it writes is locked from here to the end of the program: OSError, naming the other, where another writes there.
    """
    held = contextlib.ExitStack()
    with held:
        wrong = outputs.lock(held, mode, workdir)
        program = _prepare(mode, config, workdir)
        if wrong is not None:  # nothing can be written there, and no other check has found why
            raise wrong
        held = held.pop_all()

    def run() -> int:
        with held:
            return program()

    return run


def _prepare(mode: str, config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    if mode == "prepare":
        return _prepare_images(config)
    if mode == "inspect":
        return _inspect(config, workdir)
    if mode not in ("convert", "compare"):  # compare has many configs
        _settle(mode, config, workdir)
    if mode == "train":
        from warm_jax.analysis import report
        from warm_jax.evaluation import while_training
        from warm_jax.training import train

        run = train.prepare(config, workdir, flags.path(flags.INIT_FROM), flags.PROFILE.value)
        score = while_training.prepare(run)
        return lambda: train.train(run, score=score, at_end=report.write)
    if mode == "sample":
        from warm_jax.sampling import generate

        follow = flags.TRAJECTORY.value
        seeds = flags.TRAJECTORY_SEEDS if follow and not flags.SEEDS.present else flags.SEEDS.value
        drawing = generate.prepare(
            config,
            workdir,
            seeds,
            flags.path(flags.OUT),
            flags.CHECKPOINT.value,
            trajectory=follow,
            ema=flags.ema(),
            names=flags.NPZ_NAMES.value,
        )
        return lambda: generate.sample(drawing, follow)
    if mode == "restore":
        from warm_jax.restoration import restore

        asked = restore.Asked(
            flags.IMAGES.value,
            flags.BLUR.value,
            flags.NOISE.value,
            flags.ESTIMATE.value,
            flags.COUNT.value,
            flags.ADD_NOISE.value,
            flags.ema(),
        )
        restoring = restore.prepare(config, workdir, asked, flags.path(flags.OUT), flags.CHECKPOINT.value)
        return lambda: restore.restore(restoring)
    if mode == "compare":
        from warm_jax.evaluation import compare

        def made(system: str) -> ConfigDict:
            found = flags.config_of(system)
            _settle(mode, found, workdir, quiet=system != "warm")
            return found

        comparison = compare.prepare(made, workdir)
        return lambda: compare.compare(comparison)
    if mode == "analyze":
        from warm_jax.analysis import analyze

        figures = analyze.prepare(config, workdir, flags.ANALYSIS.value, flags.CHECKPOINT.value, flags.ema())
        return lambda: analyze.analyze(figures)
    if mode == "export":
        from warm_jax.convert import export

        exporting = export.prepare(
            config, workdir, flags.path(flags.OUT), flags.CHECKPOINT.value, tuple(flags.PLATFORMS.value), flags.ema()
        )
        return lambda: export.export(exporting)
    if mode == "convert":
        return _convert(config)
    if mode == "preflight":
        from warm_jax.preflight import preflight

        asked = preflight.prepare(config, workdir, flags.TOPOLOGY.value)
        return lambda: preflight.preflight(asked)
    from warm_jax.evaluation import evaluate, reference

    if mode == "stats":
        return lambda: reference.statistics(config, flags.IMAGES.value, flags.path(flags.OUT))
    protocol, watch = flags.PROTOCOL.value, flags.WATCH.value
    judging = evaluate.prepare(
        config,
        workdir,
        flags.IMAGES.value,
        flags.CHECKPOINT.value,
        protocol,
        watch,
        flags.emas(),
        flags.path(flags.AGAINST),
    )
    return lambda: evaluate.evaluate(judging)
