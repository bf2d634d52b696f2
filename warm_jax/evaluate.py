"""Evaluation: scores of images, drawn or read, against a reference, and the statistics files that go with them.

Images are drawn, or read, in shards; the features of a finished shard stay on disk, so an evaluation that was cut
off goes on where it stopped and ends with the same numbers. A score's name carries its count (`fid50k`), and its
row in `results.jsonl` says everything that it depends on.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from warm_jax import experiment, family, generate, log, pod, preemption, reference, workdirs
from warm_jax.data import sources
from warm_jax.metrics import extract, frechet, moments, scores

_LEAST = {"pr": 4, "is": 10, "fd_infinity": 20}  # images that a metric cannot do without
METRICS = ("fd", "fd_infinity", "kid", "is", "pr", "swd", "lsd")
SHARD = 1000  # images whose features are kept in one file
PAPER_COUNT, PAPER_ROUNDS = 50_000, 3
_WATCH_SECONDS = 15.0
_SHOWN = ("system", "checkpoint_step", "ema", "nfe", "solver", "steps", "bnr", "guidance")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `evaluate` needs. `sampling` is None where images are read from `images`.

    `emas` are the σ_rel of the EMAs to score one after the other; none: the plain one.
    """

    config: ConfigDict
    workdir: pathlib.Path
    extractor: extract.Extractor
    images: sources.Source | None
    sampling: generate.Run | None
    rounds: int
    watch: bool
    emas: tuple[float, ...] = ()


def _is_file(spec: str) -> bool:
    """Whether a reference is a statistics file, and not a source such as `npz:FILE.npz`."""
    return spec.endswith(".npz") and not spec.startswith(("npz:", "folder:", "zip:"))


def find_reference(run: Run) -> reference.Reference:
    """The reference that the config names, measured once in a workdir."""
    settings = run.config.eval
    expected = run.extractor.provenance((*experiment.image_side(run.config), run.config.data.channels))
    # Another source may be named on purpose, as held-out images; statistics and the default must be the run's images.
    if run.sampling and not settings.allow_other_data and (not settings.reference or _is_file(settings.reference)):
        expected = dataclasses.replace(expected, data_hash=workdirs.seen_data(run.workdir))
    if _is_file(settings.reference):
        found = reference.load(workdirs.local(settings.reference))
    else:
        source = reference.open_images(
            run.config, settings.reference or run.config.data.source, "name one with eval.reference"
        )
        digest = hashlib.sha256(f"spread {source.fingerprint} {run.extractor.hash}".encode()).hexdigest()[:12]
        path = run.workdir / "evaluations" / f"reference-{digest}.npz"
        if not path.exists():
            reference.save(path, reference.measure(run.config, source, run.extractor))
        found = reference.load(path)
    expected.require_same(found.provenance)
    return found


# ── Shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Images:
    """The images to judge, by number: samples by seed, or those of a source; with what to say of them in a result."""

    def __init__(self, run: Run, step: int = -1, ema: float | None = None, sampler: generate.Sampler | None = None):
        self.facts: dict[str, object]
        if run.sampling is None:
            self._source, self.facts = run.images, {"images": run.images.spec, "data_hash": run.images.fingerprint}
            self.key = {"images": run.images.fingerprint}
            return
        self._source, sampling = None, dataclasses.replace(run.sampling, step=step, ema=ema)
        step, self._weights = generate.load_weights(sampling)
        self._sampler = sampler or sampling.sampler()
        settings = run.config.sample
        self.key = generate.made_with(sampling, step, self._weights)
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
        if ema is not None:
            self.facts |= {"ema": ema, "ema_made_of": self.key["ema"]}
        self._label = -1 if settings.class_label is None else settings.class_label

    def chunks(self, first: int, count: int) -> Iterator[np.ndarray]:
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


def _folder(run: Run, images: _Images) -> pathlib.Path:
    key = json.dumps({**images.key, "extractor": run.extractor.hash}, sort_keys=True)
    return run.workdir / "evaluations" / hashlib.sha256(key.encode()).hexdigest()[:12]


def _shard(run: Run, images: _Images, path: pathlib.Path, first: int, count: int, keep: int) -> dict[str, np.ndarray]:
    """Features, the first `keep` images and the NFE of a shard: from its file if that is whole, else made and kept."""
    provenance = run.extractor.provenance((*experiment.image_side(run.config), run.config.data.channels))
    if path.exists():
        try:
            arrays = moments.read_npz(path)
            provenance.require_same(moments.read_provenance(arrays), ("this evaluation", str(path)))
            if len(arrays["pool"]) == count and len(arrays["pixels"]) >= keep:
                return arrays
        except (ValueError, KeyError) as error:
            log.say(f"{path} is damaged ({error}); made again")
    pixels: list[np.ndarray] = []

    def watched() -> Iterator[np.ndarray]:
        for chunk in images.chunks(first, count):
            pixels.append(chunk[: max(0, keep - sum(map(len, pixels)))])
            yield chunk

    features = extract.collect(reference.features_of(run.extractor, watched(), run.config.eval.batch_size))
    logits = {} if features.logits is None else {"logits": features.logits}
    arrays = {"pool": features.pool, "pixels": np.concatenate(pixels), **logits}
    arrays["nfe"] = np.asarray(images.facts.get("nfe", 0))
    moments.write_npz(path, **arrays, **moments.provenance_arrays(provenance))
    return arrays


@dataclasses.dataclass(frozen=True)
class Judged:
    """All that the scores need of the images."""

    statistics: moments.Statistics
    pool: np.ndarray
    logits: np.ndarray | None
    pixels: np.ndarray


def _judge(run: Run, images: _Images, first: int, count: int) -> Judged | None:
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
            _wait(0.5)
        arrays = _shard(run, images, path, start, size, keep)
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


def _make_own(run: Run, images: _Images, folder: pathlib.Path, first: int, count: int) -> bool:
    """Makes this process's shards; whether it is the first process, and no signal came."""
    for start in range(first + pod.index() * SHARD, first + count, pod.count() * SHARD):
        if preemption.requested():
            return False
        size, keep = _sizes(first, count, start)
        _shard(run, images, folder / f"{start:08d}-{size}.npz", start, size, keep)
    return pod.index() == 0


def first_images(run: Run, count: int) -> np.ndarray:
    """Up to `count` of the first images that `evaluate` judged, from the shard that it kept."""
    settings = run.config.eval
    size = min(SHARD, settings.count)
    folder = _folder(run, _Images(run, run.sampling.step if run.sampling else -1))
    return moments.read_npz(folder / f"{settings.first:08d}-{size}.npz")["pixels"][:count]


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _scores(run: Run, against: reference.Reference, judged: Judged) -> tuple[dict[str, float], list[str]]:
    """The named scores that the config asks for, and sentences to stand beside them."""
    name, found = run.extractor.name, judged.statistics.finalize()
    count, result = found.count, {}
    said = frechet.cautions(found, against.moments)
    for metric in run.config.eval.metrics:
        if (metric in ("kid", "pr") and against.features is None) or (
            metric in ("swd", "lsd") and against.pixels is None
        ):
            said.append(f"{metric} needs the reference's images: make it with --mode=stats, or name a source")
        elif metric == "fd":
            result[frechet.score_name("fid", name, count)] = frechet.frechet_distance(found, against.moments)
        elif metric == "fd_infinity":
            key = "fid_infinity" if name == frechet.INCEPTION else "fd_infinity"
            extrapolated = frechet.frechet_infinity(judged.pool, against.moments)
            result[frechet.score_name(key, name, len(judged.pool))] = extrapolated.value
        elif metric == "kid":
            size = min(1000, len(judged.pool), len(against.features))
            estimate = scores.kid(judged.pool, against.features, subset_size=size)
            key = frechet.score_name("kid", name, len(judged.pool))
            result |= {key: estimate.value, f"{key}_std": estimate.std}
        elif metric == "is":
            estimate = scores.inception_score(judged.logits)
            key = frechet.score_name("is", name, count)
            result |= {key: estimate.value, f"{key}_std": estimate.std}
        elif metric == "pr":
            pair = scores.precision_recall(judged.pool, against.features)
            for key, value in zip(("precision", "recall"), pair, strict=True):
                result[frechet.score_name(key, name, len(judged.pool))] = value
        elif metric == "swd":
            pair = (x.astype(np.float32) for x in (judged.pixels, against.pixels))
            result[frechet.score_name("swd", "pixels", len(judged.pixels))] = scores.sliced_wasserstein(*pair)
        elif metric == "lsd":
            power = scores.radial_power(judged.pixels)
            key = frechet.score_name("lsd_db", "pixels", len(judged.pixels))
            result[key] = scores.log_spectral_distance(power, against.power)
    return result, said


def score_images(
    run: Run, against: reference.Reference, chunks: Iterator[UInt8[np.ndarray, "_ h w c"]]
) -> dict[str, float]:
    """The scores, by name, of images that come in `chunks`; nothing of them is kept or written."""
    pixels: list[np.ndarray] = []

    def watched() -> Iterator[np.ndarray]:
        for chunk in chunks:
            pixels.append(chunk[: max(0, reference.PIXEL_IMAGES - sum(map(len, pixels)))])
            yield chunk

    features = extract.collect(reference.features_of(run.extractor, watched(), run.config.eval.batch_size))
    statistics = moments.Statistics.empty(run.extractor.dim).update(features.pool)
    return _scores(run, against, Judged(statistics, features.pool, features.logits, np.concatenate(pixels)))[0]


def _line(row: dict[str, object], names: list[str]) -> str:
    values = "  ".join(f"{name} {row[name]:.4g}" for name in names if not name.endswith("_std"))
    how = "  ".join(f"{k} {row[k]}" for k in _SHOWN if row.get(k) is not None)
    return f"{values}  | {row['images']} {row['numbers']}  {how}  | against {row['reference']}, {row['extractor']}"


def _append(run: Run, row: dict[str, object]) -> None:
    if jax.process_index() == 0:
        with (run.workdir / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _facts(run: Run, against: reference.Reference, images: _Images) -> dict[str, object]:
    """What a score depends on besides its images' numbers."""
    return {
        **images.facts,
        "reference": against.name,
        "reference_count": against.moments.count,
        "extractor": run.extractor.name,
        "extractor_hash": run.extractor.hash,
        "uint8_rule": moments.UINT8_RULE,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _one_round(
    run: Run, against: reference.Reference | None, images: _Images, first: int, count: int
) -> dict[str, float] | None:
    """Scores of one range of images, written as a row; None where a signal came first. Only process 0 scores."""
    judged = _judge(run, images, first, count)
    if judged is None or against is None:
        return None if preemption.requested() else {}
    result, said = _scores(run, against, judged)
    if run.images is not None and count < len(run.images):
        said.append(f"{count} of {len(run.images)} images, in their order: of a sorted set that is not a fair part")
    row = {
        **result,
        "scores": list(result),
        "count": count,
        "numbers": f"{first}-{first + count - 1}",
        **_facts(run, against, images),
        "cautions": said,
    }
    _append(run, row)
    log.say("\n".join([_line(row, list(result)), *(f"    note: {sentence}" for sentence in said)]))
    return result


def _all_rounds(run: Run, against: reference.Reference | None, images: _Images) -> bool:
    """Every round, and their summary where there are several; False where a signal came first."""
    settings, found = run.config.eval, []
    for number in range(run.rounds):
        result = _one_round(run, against, images, settings.first + number * settings.count, settings.count)
        if result is None:
            return False
        found.append(result)
    if run.rounds > 1 and against is not None:
        names = [name for name in found[0] if not name.endswith("_std")]
        last = settings.first + run.rounds * settings.count - 1
        summary = {"protocol": "paper", "rounds": run.rounds, "count": settings.count}
        summary |= {"numbers": f"{settings.first}-{last}", **_facts(run, against, images)}
        for name in names:
            values = [result[name] for result in found]
            summary |= {f"{name}_min": min(values), f"{name}_max": max(values), f"{name}_mean": float(np.mean(values))}
            summary[f"{name}_std_of_rounds"] = float(np.std(values, ddof=1))
        _append(run, summary)
        log.say(
            "\n".join(
                f"{n}: minimum of {run.rounds} rounds {summary[f'{n}_min']:.4g}, "
                f"mean {summary[f'{n}_mean']:.4g} ± {summary[f'{n}_std_of_rounds']:.2g}"
                for n in names
            )
        )
    return True


# ── The programs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check(config: ConfigDict, extractor: extract.Extractor) -> None:
    """Raises ValueError or OSError where the `eval` section asks for what cannot be."""
    settings = config.eval
    least = max([2, *(_LEAST[metric] for metric in settings.metrics if metric in _LEAST)])
    if settings.count < least:
        raise ValueError(f"eval.count is {settings.count}; it must be at least {least} for these eval.metrics")
    if settings.first < 0:
        raise ValueError(f"eval.first is {settings.first}; it must be at least 0")
    unknown = [metric for metric in settings.metrics if metric not in METRICS]
    if unknown or not settings.metrics:
        raise ValueError(f"eval.metrics is {tuple(settings.metrics)}; choose some of {', '.join(METRICS)}")
    if "is" in settings.metrics and extractor.name != frechet.INCEPTION:
        raise ValueError(f"the Inception Score needs eval.extractor=inception, not {extractor.name}")
    reference.check_images(config, extractor)
    if _is_file(settings.reference) and not workdirs.local(settings.reference).is_file():
        raise FileNotFoundError(f"eval.reference {settings.reference} is not there; make it with --mode=stats")


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    images: str,
    step: int,
    protocol: str,
    watch: bool,
    emas: tuple[float, ...] = (),
) -> Run:
    """Checks everything that can be checked. ValueError or OSError for bad input.

    `images` is a source to judge in place of samples; `step` a checkpoint's, -1 the latest's; `emas` the σ_rel of the
    EMAs to score, none: the plain one. With `watch` this waits for the first checkpoint.
    """
    experiment.build(config)
    if images and emas:
        raise ValueError("--ema is of a checkpoint's weights; it does not go with --images")
    for ema in () if watch else emas:  # with `watch` a checkpoint that is too early for it is passed over
        generate.require_checkpoint(workdir, step)
        generate.check_ema(workdir, step, ema)
    if watch and images:
        raise ValueError("--watch evaluates each new checkpoint; it does not go with --images")
    rounds = PAPER_ROUNDS if protocol == "paper" else 1
    if protocol == "paper":
        with config.unlocked():
            config.eval.count = PAPER_COUNT
    extractor = reference.load_extractor(config)
    check(config, extractor)
    source = sampling = None
    if images:
        source = reference.open_images(config, images, "name another with --images")
        wanted = config.eval.first + rounds * config.eval.count
        if len(source) < wanted:
            raise ValueError(
                f"{images} has {len(source)} images, this evaluation needs {wanted} (eval.first + eval.count × "
                f"{rounds} round(s)); lower --config.eval.count, and the score's name will say so"
            )
    else:
        last = config.eval.first + rounds * config.eval.count
        if last > 2**32:
            raise ValueError(f"eval.first + eval.count × rounds is {last:,}; seeds end at {2**32:,}")
        if watch and step != -1:
            raise ValueError(f"--watch evaluates every checkpoint; it does not go with --checkpoint={step}")
        if watch and not generate.checkpoint_steps(workdir):
            log.say(f"waiting for the first checkpoint in {workdir}")
        while watch and not generate.checkpoint_steps(workdir) and not preemption.requested():
            _wait(1.0)
        sampling = generate.prepare(config, workdir, "0", str(workdir / "evaluations"), step)
    workdirs.check_writable(workdir / "evaluations")
    return Run(config, workdir, extractor, source, sampling, rounds, watch, emas)


@preemption.noted()
def evaluate(run: Run) -> int:
    """Scores a checkpoint, or a source, or with `watch` each checkpoint as it comes. Returns the exit status."""
    measured: list[reference.Reference] = []
    try:
        pod.first_then_all("reference", lambda: measured.append(find_reference(run)))
    except InterruptedError as error:
        log.say(str(error))
        return preemption.EXIT_AGAIN
    against = measured[0] if measured else None  # only process 0 needs it
    if against is not None:
        log.say(f"reference: {against.name}, {against.moments.count or 'unknown count of'} images")
    finished = _watch(run, against) if run.watch else _once(run, against)
    if all(pod.gather("evaluated", "finished" if finished else "")):
        return 0
    log.say(f"{preemption.requested()}: finished shards are kept; the same command goes on from there")
    return preemption.EXIT_AGAIN


def _once(run: Run, against: reference.Reference | None) -> bool:
    """Scores the checkpoint, or the source, that was asked for; False where a signal came first."""
    step, sampler = -1, None
    if run.sampling:  # one program for all EMAs
        step, sampler = run.sampling.step, run.sampling.sampler()
    for ema in run.emas or (None,):
        images = _Images(run, step, ema, sampler)
        if not _all_rounds(run, against, images):
            return False
        step = images.facts.get("checkpoint_step", -1)  # of the latest one there may soon be another
    return True


def _watch(run: Run, against: reference.Reference | None) -> bool:
    """Scores each checkpoint as it comes, until the last one; False where a signal came first."""
    done: set[int] = set()

    def next_step() -> str:
        """Waits for it in process 0; empty after the last, or a signal."""
        while not preemption.requested():
            todo = [step for step in generate.checkpoint_steps(run.workdir) if step not in done]
            if todo:
                return str(min(todo))
            if done and max(done) >= run.config.train.steps:
                return ""
            _wait(_WATCH_SECONDS)
        return ""

    while step := pod.from_first("watched", next_step):
        done.add(int(step))
        _watched(run, against, int(step))
    return not preemption.requested()


def _watched(run: Run, against: reference.Reference | None, step: int) -> None:
    """Scores one checkpoint, unless training has deleted it meanwhile."""
    for ema in run.emas or (None,):
        images, reason = None, ""
        try:
            images = _Images(run, step, ema)
        except ValueError as error:
            reason = str(error)
        reason = "; ".join(filter(None, pod.gather("loaded", reason)))
        if images is None or reason:
            log.say(f"passed over: {reason}")
        elif not _all_rounds(run, against, images):
            return


def _wait(seconds: float) -> None:
    """Sleeps, but wakes for a signal."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not preemption.requested():
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
