"""What images are compared with: moments, features and pixels of a source, measured once and kept in a file."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.experiments import experiment
from warm_jax.metrics import dinov2, efficientnet, extract, fashion, inception, moments, published, scores
from warm_jax.runtime import log, mesh, preemption, workdirs
from warm_jax.weights import archives

PIXEL_IMAGES = 5000  # at most so many images are compared pixel by pixel (swd, lsd)
FEATURE_IMAGES = 10_000  # at most so many reference features are kept for kid and pr; fd takes all images


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with; `features`, `pixels` and `power` are None where a file has only moments."""

    name: str
    moments: moments.Moments
    provenance: moments.Provenance
    features: np.ndarray | None
    pixels: np.ndarray | None
    power: np.ndarray | None


def load_extractor(config: ConfigDict) -> extract.Extractor:
    """The network that `eval.extractor` names. OSError or ValueError where its weights are missing or wrong."""
    loaders = {
        "inception": lambda: inception.load(config.eval.inception and workdirs.local(config.eval.inception)),
        "fashion_cnn": fashion.load,
        "efficientnet": efficientnet.load,
        **{name: functools.partial(_dinov2, config, name) for name in dinov2.NAMES},
    }
    if config.eval.extractor not in loaders:
        raise ValueError(f"eval.extractor is {config.eval.extractor!r}; choose one of {', '.join(loaders)}")
    return loaders[config.eval.extractor]()


def _dinov2(config: ConfigDict, name: str) -> extract.Extractor:
    return dinov2.load(config.eval.dinov2 and workdirs.local(config.eval.dinov2), name)


def open_images(config: ConfigDict, spec: str, remedy: str) -> sources.Source:
    """The images of `spec`, of the config's size; FileNotFoundError, with `remedy`, where they are not there."""
    try:
        return sources.open_source(
            spec, image_size=experiment.image_side(config), channels=config.data.channels, on_error=config.data.on_error
        )
    except FileNotFoundError as error:
        if spec == config.data.source and config.data.instructions:
            remedy = f"to get it: {config.data.instructions}"
        raise FileNotFoundError(f"{spec} is not there ({error}); {remedy}") from error


def check_images(config: ConfigDict, extractor: extract.Extractor) -> None:
    """Raises ValueError where the batch size is out of range, or the extractor takes no such images."""
    if not 1 <= config.eval.batch_size <= 2**16:
        raise ValueError(f"eval.batch_size is {config.eval.batch_size}; it must be from 1 to 65,536")
    shape = (1, *experiment.image_side(config), config.data.channels)
    jax.eval_shape(extractor.apply, extractor.params, jax.ShapeDtypeStruct(shape, np.uint8))  # or it says what it takes


def chunks(source: sources.Source, first: int, count: int, size: int = 256) -> Iterator[np.ndarray]:
    """The images `first` … `first + count - 1`, `size` at a time."""
    for start in range(first, first + count, size):
        yield source.read(np.arange(start, min(start + size, first + count)))[0]


def features_of(
    extractor: extract.Extractor, chunks: Iterator[np.ndarray], batch_size: int
) -> Iterator[extract.Features]:
    """Features of all images, in order, over this process's devices; `batch_size` is rounded up to a multiple."""
    devices = mesh.make_mesh(local=True)
    return extract.extract(extractor, chunks, -(-batch_size // devices.size) * devices.size, mesh.split(devices))


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 … `count - 1`, spread evenly: a set may be sorted by class."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def measure(config: ConfigDict, source: sources.Source, extractor: extract.Extractor) -> Reference:
    """One pass over all images of the source: moments streamed, features and pixels of an even part of it kept.

    InterruptedError where a signal comes first.
    """
    statistics, kept, seen = moments.Statistics.empty(extractor.dim), [], 0
    wanted = spread(len(source), FEATURE_IMAGES)
    bar = log.progress(len(source), unit="image", doing="reference")
    for features in features_of(extractor, chunks(source, 0, len(source)), config.eval.batch_size):
        if preemption.requested():
            raise InterruptedError(f"{preemption.requested()} while measuring {source.spec}; nothing of it is kept")
        statistics = statistics.update(features.pool)
        here = wanted[(wanted >= seen) & (wanted < seen + len(features.pool))] - seen
        kept.append(features.pool[here])
        seen += len(features.pool)
        bar.update(len(features.pool))
    bar.close()
    chosen = spread(len(source), PIXEL_IMAGES)
    pixels = np.concatenate([source.read(part)[0] for part in np.array_split(chosen, -(-len(chosen) // 256))])
    provenance = extractor.provenance(source.image_shape, source.fingerprint)
    return Reference(
        source.spec, statistics.finalize(), provenance, np.concatenate(kept), pixels, scores.radial_power(pixels)
    )


def save(path: pathlib.Path, reference: Reference) -> None:
    """Writes a statistics file that also holds what the kernel and pixel scores need."""
    archives.write_npz(
        path,
        version=np.asarray(moments.FILE_VERSION),
        mean=reference.moments.mean,
        covariance=reference.moments.covariance,
        count=np.asarray(reference.moments.count),
        name=np.asarray(reference.name),
        features=reference.features,
        pixels=reference.pixels,
        power=reference.power,
        **moments.provenance_arrays(reference.provenance),
    )


def load(path: pathlib.Path) -> Reference:
    """A statistics file of `stats`, or a foreign one with `mu` and `sigma`. ValueError where it is damaged."""
    found, provenance = moments.load(path)
    arrays = archives.read_npz(path)
    kept = (arrays.get(name) for name in ("features", "pixels", "power"))
    return Reference(str(arrays.get("name", path)), found, provenance, *kept)


def statistics(config: ConfigDict, images: str, out: str) -> int:
    """Writes the statistics file `out` (.npz) of the source `images`. Returns the exit status."""
    if not out.endswith(".npz"):
        raise ValueError(f"--out={out or '(missing)'}: a statistics file is an .npz")
    path = pathlib.Path(out)
    if path.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file.npz")
    extractor = load_extractor(config)
    check_images(config, extractor)
    source = open_images(config, images or config.data.source, "name another with --images")
    workdirs.check_writable(path.parent)
    save(path, measure(config, source, extractor))
    log.say(f"{out}: {len(source)} images of {source.spec}, {extractor.name} {extractor.hash[:12]}")
    return 0


def convert_weights(kind: str, source: str, out: str, unverified: bool) -> int:
    """Converts published weights (.pth) of `inception` or `dinov2` to a .safetensors of ours. Returns the exit status.

    `unverified` takes weights that are not the published ones too, and the extractor's name says so.
    """
    path = published.check_target(out)
    workdirs.check_writable(path.parent)
    name, digest, params = {"inception": inception, "dinov2": dinov2}[kind].read(source, unverified)
    published.save(path, name, params, digest)
    log.say(f"{out}: {name}, from a file of sha256 {digest}")
    if name.endswith(published.UNVERIFIED):
        log.say(f"these are not the published weights: scores are named after {name}")
    return 0
