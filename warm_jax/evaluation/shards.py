"""Images to judge, drawn or read, in shards whose features stay on disk: what was cut off goes on where it stopped."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.evaluation import bits, reference
from warm_jax.experiments import experiment, family
from warm_jax.metrics import extract, moments
from warm_jax.runtime import log, pod, preemption
from warm_jax.sampling import batches, runs
from warm_jax.weights import archives

SHARD = 1000  # images whose features are kept in one file


@dataclasses.dataclass(frozen=True)
class Run:
    """What `evaluate.prepare` checked and an evaluation needs.

    `sampling` is None where images are read from `images`. `emas` are the σ_rel of the EMAs to score one after the
    other; none: the plain one. `others` score the same images by other extractors. `extractor` is None where samples
    are not scored, `measuring` where bits of held-out images are not measured.
    """

    config: ConfigDict
    workdir: pathlib.Path
    extractor: extract.Extractor | None
    images: sources.Source | None
    sampling: runs.Run | None
    rounds: int
    watch: bool
    emas: tuple[float, ...] = ()
    protocol: str = "once"
    others: tuple["Run", ...] = ()
    measuring: bits.Request | None = None

    @property
    def scorers(self) -> tuple["Run", ...]:
        """This one, and those that score the same images by other extractors."""
        return (self, *self.others)


class Images:
    """The images to judge, by number: samples by seed, or those of a source; with what to say of them in a result."""

    def __init__(self, run: Run, step: int = -1, ema: float | None = None, sampler: batches.Sampler | None = None):
        self.facts: dict[str, object]
        if run.sampling is None:
            self._source, self.facts = run.images, {"images": run.images.spec, "data_hash": run.images.fingerprint}
            self.key = {"images": run.images.fingerprint}
            return
        self._source, opened = None, dataclasses.replace(run.sampling, step=step, ema=ema)
        step, self._weights = runs.load_weights(opened)
        self._sampler = sampler or opened.sampler()
        settings = run.config.sample
        self.key = runs.made_with(opened, step, self._weights)
        self.facts = {
            "images": "samples",
            "checkpoint_step": step,
            "solver": settings.solver,
            "steps": settings.steps,
            "system": run.config.process.system,
            "bnr": family.sampled_bnr(run.config),
            "guidance": settings.guidance,
            "preconditioning": run.config.model.preconditioning,
            "sample": json.loads(json.dumps(settings.to_dict(), default=list)),
        }
        if interval := experiment.guidance_interval(run.config):
            self.facts["guidance_interval"] = interval
        if ema is not None:
            self.facts |= {"ema": ema, "ema_made_of": self.key["ema"]}
        self._label = -1 if settings.class_label is None else settings.class_label

    def chunks(self, first: int, count: int) -> Iterator[np.ndarray]:
        """The images from number `first`, in parts of any size, uint8 `[_, h, w, c]`."""
        if self._source is not None:
            yield from reference.chunks(self._source, first, count)
            return
        size, spent = self._sampler.batch_size, []
        self._sampler.compile(self._weights)
        for start in range(first, first + count, size):
            seeds, began = np.arange(start, min(start + size, first + count)), time.perf_counter()
            samples = self._sampler(self._weights, seeds, np.full(len(seeds), self._label))
            self.facts["nfe"] = samples.nfe
            spent.append(time.perf_counter() - began)
            self.facts["seconds_per_image"] = float(np.mean(spent)) / size  # a batch is padded to its size
            yield samples.images


def _folder(run: Run, images: Images) -> pathlib.Path:
    key = json.dumps({**images.key, "extractor": run.extractor.hash}, sort_keys=True)
    return run.workdir / "evaluations" / hashlib.sha256(key.encode()).hexdigest()[:12]


def _shard(
    run: Run, path: pathlib.Path, drawn: Callable[[], Iterable[np.ndarray]], count: int, keep: int, facts: dict
) -> dict[str, np.ndarray]:
    """Features, the first `keep` images and the NFE of a shard: from its file if that is whole, else made and kept.

    `drawn` gives its images; `facts` then has their NFE.
    """
    provenance = run.extractor.provenance((*experiment.image_side(run.config), run.config.data.channels))
    if path.exists():
        try:
            arrays = archives.read_npz(path)
            provenance.require_same(moments.read_provenance(arrays), ("this evaluation", str(path)))
            if len(arrays["pool"]) == count and len(arrays["pixels"]) >= keep:
                return arrays
        except (ValueError, KeyError) as error:
            log.say(f"{path} is damaged ({error}); made again")
    pixels: list[np.ndarray] = []

    def watched() -> Iterator[np.ndarray]:
        for chunk in drawn():
            pixels.append(chunk[: max(0, keep - sum(map(len, pixels)))])
            yield chunk

    features = extract.collect(reference.features_of(run.extractor, watched(), run.config.eval.batch_size))
    logits = {} if features.logits is None else {"logits": features.logits}
    arrays = {"pool": features.pool, "pixels": np.concatenate(pixels), **logits}
    arrays["nfe"] = np.asarray(facts.get("nfe", 0))
    archives.write_npz(path, **arrays, **moments.provenance_arrays(provenance))
    return arrays


@dataclasses.dataclass(frozen=True)
class Judged:
    """All that the scores need of the images."""

    statistics: moments.Statistics
    pool: np.ndarray
    logits: np.ndarray | None
    pixels: np.ndarray


def judge(run: Run, images: Images, first: int, count: int) -> Judged | None:
    """All shards of a range, in order; None where a signal came first, or in a process that is not the first.

    Of several processes each makes every n-th shard; the first one gathers them all.
    """
    folder = _folder(run, images)
    if pod.count() > 1 and not _make_own(run, images, folder, first, count):
        return None
    statistics, pools, logits, pixels = moments.Statistics.empty(run.extractor.dim), [], [], []
    bar = log.progress(count, unit="image", doing="evaluating")
    for start in range(first, first + count, SHARD):
        if preemption.requested():
            bar.close()
            return None
        size, keep = _sizes(first, count, start)
        path = folder / f"{start:08d}-{size}.npz"
        while not path.exists() and pod.count() > 1:  # another process makes it
            if preemption.requested():
                bar.close()
                return None
            wait(0.5)
        arrays = _shard(run, path, functools.partial(images.chunks, start, size), size, keep, images.facts)
        if int(arrays["nfe"]):
            images.facts["nfe"] = int(arrays["nfe"])
        statistics = statistics.update(arrays["pool"])
        if sum(map(len, pools)) < reference.FEATURE_IMAGES:
            pools.append(arrays["pool"])
        if "is" in run.config.eval.metrics:
            logits.append(arrays["logits"])
        pixels.append(arrays["pixels"][:keep])
        bar.update(size)
    bar.close()
    return Judged(statistics, np.concatenate(pools), np.concatenate(logits) if logits else None, np.concatenate(pixels))


def _sizes(first: int, count: int, start: int) -> tuple[int, int]:
    """How many images the shard at `start` has, and of how many of them the pixels are kept."""
    size = min(SHARD, first + count - start)
    return size, min(size, max(0, reference.PIXEL_IMAGES - (start - first)))


def _make_own(run: Run, images: Images, folder: pathlib.Path, first: int, count: int) -> bool:
    """Makes this process's shards; whether it is the first process, and no signal came."""
    for start in range(first + pod.index() * SHARD, first + count, pod.count() * SHARD):
        if preemption.requested():
            return False
        size, keep = _sizes(first, count, start)
        path = folder / f"{start:08d}-{size}.npz"
        _shard(run, path, functools.partial(images.chunks, start, size), size, keep, images.facts)
    return pod.index() == 0


def draw_for_all(run: Run, images: Images, first: int, count: int) -> None:
    """Makes the shards of this process for all of `run.scorers`, each image drawn once; up to a signal."""
    for start in range(first + pod.index() * SHARD, first + count, pod.count() * SHARD):
        if preemption.requested():
            return
        size, keep = _sizes(first, count, start)
        drawn: list[np.ndarray] = []

        def once(start: int = start, size: int = size, drawn: list[np.ndarray] = drawn) -> list[np.ndarray]:
            drawn.extend(() if drawn else images.chunks(start, size))
            return drawn

        for one in run.scorers:
            _shard(one, _folder(one, images) / f"{start:08d}-{size}.npz", once, size, keep, images.facts)


def first_images(run: Run, count: int) -> np.ndarray:
    """Up to `count` of the first images that `evaluate` judged, from the shard that it kept."""
    settings = run.config.eval
    size = min(SHARD, settings.count)
    folder = _folder(run, Images(run, run.sampling.step if run.sampling else -1))
    return archives.read_npz(folder / f"{settings.first:08d}-{size}.npz")["pixels"][:count]


def wait(seconds: float) -> None:
    """Sleeps, but wakes for a signal."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not preemption.requested():
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
