"""From a mode and its flags to a program, ready to run."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from warm_jax.cli import cli


def _prepare_images(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax.data import prepare

    size, channels = cli.IMAGE_SIZE.value, cli.CHANNELS.value
    if config is not None:
        size = config.data.image_size if size is None else size
        channels = config.data.channels if channels is None else channels
    if not cli.IMAGES.value or not cli.OUT.value:
        raise ValueError("--mode=prepare needs --images=SOURCE and --out=FILE.zip")
    settings = {"image_size": size, "channels": channels, "crop": cli.CROP.value, "on_error": cli.ON_ERROR.value}
    return lambda: prepare.run(cli.IMAGES.value, cli.path(cli.OUT), **settings)


def _inspect(config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    from warm_jax.data import inspect

    images = cli.IMAGES.value or (config.data.source if config is not None else "")
    if not images:
        raise ValueError("--mode=inspect needs --images=SOURCE, or a --config whose data.source to look at")
    return lambda: inspect.run(images, cli.path(cli.OUT) or str(workdir / "inspect"))


def _convert(config: ConfigDict | None) -> Callable[[], int]:
    from warm_jax.convert import edm, export
    from warm_jax.evaluation import reference

    given = [flag.name for flag in (cli.FROM_INCEPTION, cli.FROM_EDM, cli.FROM_EXPORT) if flag.value]
    if len(given) != 1:
        raise ValueError("--mode=convert needs one of --from_inception=FILE, --from_edm=FILE and --from_export=FOLDER")
    if cli.FROM_EDM.value:
        name = cli.config_name()
        conversion = edm.prepare(cli.path(cli.FROM_EDM), cli.path(cli.WORKDIR), name, config, cli.config_file)
        return lambda: edm.convert(conversion)
    if cli.FROM_EXPORT.value:
        importing = export.prepare_import(cli.path(cli.FROM_EXPORT), cli.path(cli.WORKDIR))
        return lambda: export.import_export(importing)
    return lambda: reference.convert_inception(cli.path(cli.FROM_INCEPTION), cli.path(cli.OUT))


def prepare(mode: str, config: ConfigDict | None, workdir: pathlib.Path) -> Callable[[], int]:
    """Checks everything for `mode` and returns the program, ready to run. ValueError or OSError for bad input."""
    cli.check_flags(mode)
    if mode == "prepare":
        return _prepare_images(config)
    if mode == "inspect":
        return _inspect(config, workdir)
    if mode == "train":
        from warm_jax.training import train

        run = train.prepare(config, workdir, cli.path(cli.INIT_FROM), cli.PROFILE.value)
        return lambda: train.train(run)
    if mode == "sample":
        from warm_jax.sampling import generate

        follow = cli.TRAJECTORY.value
        seeds = cli.TRAJECTORY_SEEDS if follow and not cli.SEEDS.present else cli.SEEDS.value
        drawing = generate.prepare(
            config, workdir, seeds, cli.path(cli.OUT), cli.CHECKPOINT.value, trajectory=follow, ema=cli.ema()
        )
        return lambda: generate.sample(drawing, follow)
    if mode == "restore":
        from warm_jax.restoration import restore

        asked = restore.Asked(
            cli.IMAGES.value,
            cli.BLUR.value,
            cli.NOISE.value,
            cli.ESTIMATE.value,
            cli.COUNT.value,
            cli.ADD_NOISE.value,
            cli.ema(),
        )
        restoring = restore.prepare(config, workdir, asked, cli.path(cli.OUT), cli.CHECKPOINT.value)
        return lambda: restore.restore(restoring)
    if mode == "compare":
        from warm_jax.evaluation import compare

        comparison = compare.prepare(cli.config_of, workdir)
        return lambda: compare.compare(comparison)
    if mode == "analyze":
        from warm_jax.analysis import analyze

        figures = analyze.prepare(config, workdir, cli.ANALYSIS.value, cli.CHECKPOINT.value, cli.ema())
        return lambda: analyze.analyze(figures)
    if mode == "export":
        from warm_jax.convert import export

        exporting = export.prepare(
            config, workdir, cli.path(cli.OUT), cli.CHECKPOINT.value, tuple(cli.PLATFORMS.value), cli.ema()
        )
        return lambda: export.export(exporting)
    if mode == "convert":
        return _convert(config)
    if mode == "preflight":
        from warm_jax.preflight import preflight

        asked = preflight.prepare(config, workdir, cli.TOPOLOGY.value)
        return lambda: preflight.preflight(asked)
    from warm_jax.evaluation import evaluate, reference

    if mode == "stats":
        return lambda: reference.statistics(config, cli.IMAGES.value, cli.path(cli.OUT))
    protocol, watch = cli.PROTOCOL.value, cli.WATCH.value
    judging = evaluate.prepare(config, workdir, cli.IMAGES.value, cli.CHECKPOINT.value, protocol, watch, cli.emas())
    return lambda: evaluate.evaluate(judging)
