"""What images are compared with: moments, features and pixels of a source, measured once and kept in a file."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import npz, sources
from warm_jax.experiments import experiment
from warm_jax.metrics import dinov2, efficientnet, extract, fashion, frechet, inception, moments, published, scores
from warm_jax.runtime import log, mesh, preemption, workdirs
from warm_jax.weights import archives, tensors

PIXEL_IMAGES = 5000  # at most so many images are compared pixel by pixel (swd, lsd)
FEATURE_IMAGES = 10_000  # at most so many reference features are kept for scores of pairs; fd takes all images
BATCH = "arr_0"  # the images in a reference batch of guided-diffusion
OF_MOMENTS = frozenset({"fd", "fd_infinity", "is"})  # scores that need no more of the reference


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with; `features`, `pixels` and `power` are None where a file has only moments."""

    name: str
    moments: moments.Moments
    provenance: moments.Provenance
    features: np.ndarray | None
    pixels: np.ndarray | None
    power: np.ndarray | None
    notes: tuple[str, ...] = ()  # that stand beside every score
    batch: bool = False  # whether its file has images beside its moments


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
    """One pass over all images of the source: see `_measured`."""
    provenance = extractor.provenance(source.image_shape, source.fingerprint)
    return _measured(config, source.spec, chunks(source, 0, len(source)), len(source), extractor, provenance)


def _measured(
    config: ConfigDict,
    name: str,
    images: Iterator[np.ndarray],
    count: int,
    extractor: extract.Extractor,
    provenance: moments.Provenance,
) -> Reference:
    """One pass over `count` images: moments streamed, features and pixels of an even part of them kept.

    InterruptedError where a signal comes first.
    """
    statistics, kept, pixels, seen = moments.Statistics.empty(extractor.dim), [], [], 0
    wanted, shown = spread(count, FEATURE_IMAGES), spread(count, PIXEL_IMAGES)

    def part(numbers: np.ndarray, first: int, size: int) -> np.ndarray:
        return numbers[(numbers >= first) & (numbers < first + size)] - first

    def watched() -> Iterator[np.ndarray]:
        first = 0
        for chunk in images:
            pixels.append(chunk[part(shown, first, len(chunk))])
            first += len(chunk)
            yield chunk

    bar = log.progress(count, unit="image", doing="reference")
    for features in features_of(extractor, watched(), config.eval.batch_size):
        if preemption.requested():
            raise InterruptedError(f"{preemption.requested()} while measuring {name}; nothing of it is kept")
        statistics = statistics.update(features.pool)
        kept.append(features.pool[part(wanted, seen, len(features.pool))])
        seen += len(features.pool)
        bar.update(len(features.pool))
    bar.close()
    power = scores.radial_power(np.concatenate(pixels))
    return Reference(name, statistics.finalize(), provenance, np.concatenate(kept), np.concatenate(pixels), power)


def save(path: pathlib.Path, reference: Reference) -> None:
    """Writes a statistics file that also holds what the kernel and pixel scores need."""
    archives.write_npz(
        path,
        **moments.moment_arrays(reference.moments),
        name=np.asarray(reference.name),
        features=reference.features,
        pixels=reference.pixels,
        power=reference.power,
        **moments.provenance_arrays(reference.provenance),
    )


def load(path: pathlib.Path) -> Reference:
    """A statistics file of `stats`, or a foreign one with `mu` and `sigma`. ValueError where it is damaged.

    The images of a guided-diffusion reference batch, `arr_0`, are left unread; see `with_images`.
    """
    arrays = archives.read_npz(path, without=(BATCH,))
    found, provenance = moments.parse(path, arrays)
    kept = (arrays.get(name) for name in ("features", "pixels", "power"))
    notes = ("mu_s and sigma_s are not used: sFID is not among the scores",) if "mu_s" in arrays else ()
    return Reference(str(arrays.get("name", path)), found, provenance, *kept, notes, BATCH in arrays)


def with_images(config: ConfigDict, path: pathlib.Path, extractor: extract.Extractor, keep: pathlib.Path) -> Reference:
    """A statistics file, and of guided-diffusion's reference batches also what the images in it tell.

    Their `mu` and `sigma` are of Inception, and stay the reference of the Fréchet distance where that is the extractor;
    the rest, and everything with another extractor, is measured from `arr_0`, streamed once and kept in the folder
    `keep`. ValueError where neither fits.
    """
    found, own = _fitting(config, path, extractor)
    if found.batch and (not own or set(config.eval.metrics) - OF_MOMENTS):
        return _batch(config, path, found, extractor, keep, own)
    return found


def _fitting(config: ConfigDict, path: pathlib.Path, extractor: extract.Extractor) -> tuple[Reference, bool]:
    """A statistics file, `batch` where its images are of the config's shape; and whether its moments are used.

    ValueError where they neither fit the extractor nor can be measured.
    """
    found = load(path)
    own = found.moments.mean.size == extractor.dim
    if found.batch:
        own = own and extractor.name == frechet.INCEPTION
        shape, _ = npz.stream(path, BATCH)
        height, width = experiment.image_side(config)
        if shape[1:] != (height, width, config.data.channels):
            said = "×".join(map(str, shape[1:]))
            note = f"the images in {path} are {said}, not {height}×{width}×{config.data.channels}, and are not used"
            found, own = dataclasses.replace(found, notes=(*found.notes, note), batch=False), True
    if not found.batch and found.moments.mean.size != extractor.dim:
        raise ValueError(
            f"{path} has statistics of {found.moments.mean.size} features, and eval.extractor {extractor.name} has "
            f"{extractor.dim}; make them with --mode=stats"
        )
    return found, own


def images_of_file(config: ConfigDict, path: pathlib.Path, extractor: extract.Extractor) -> int | None:
    """How many images a statistics file has the features of, or can have; None: moments alone.

    ValueError where it does not fit the extractor.
    """
    found, _ = _fitting(config, path, extractor)
    if found.batch:
        return npz.stream(path, BATCH)[0][0]
    return None if found.features is None else len(found.features)


def _batch(
    config: ConfigDict,
    path: pathlib.Path,
    found: Reference,
    extractor: extract.Extractor,
    keep: pathlib.Path,
    own: bool,
) -> Reference:
    """What `with_images` measures of a file's images, or measured before; with the file's moments where `own`."""
    (count, *shape), images = npz.stream(path, BATCH)
    fingerprint = tensors.sha256(path)
    file = keep / f"reference-{hashlib.sha256(f'batch {fingerprint} {extractor.hash}'.encode()).hexdigest()[:12]}.npz"
    measured = kept(file)
    if measured is None:
        provenance = extractor.provenance(tuple(shape), fingerprint)
        save(file, _measured(config, str(path), images, count, extractor, provenance))
        measured = load(file)
    which = "mu and sigma are the file's; the other scores are of" if own else "all scores are of"
    notes = (*found.notes, f"{path}: {which} its {count:,} images")
    moments_of = found.moments if own else measured.moments
    return dataclasses.replace(measured, moments=moments_of, notes=notes, batch=True)


def kept(path: pathlib.Path) -> Reference | None:
    """What was measured before; None where it was not, or the file is damaged."""
    try:
        return load(path) if path.exists() else None
    except ValueError as error:
        log.say(f"{error}; measured again")
        return None


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
