"""Evaluation: scores of images, drawn or read, against a reference, and the statistics files that go with them.

Images are drawn, or read, in shards; the features of a finished shard stay on disk, so an evaluation that was cut
off goes on where it stopped and ends with the same numbers. A score's name carries its count (`fid50k`), and its
row in `results.jsonl` says everything that it depends on.
"""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_jax.evaluation import bits, bits_rows, named_scores, protocols, reference, shards
from warm_jax.experiments import experiment, posthoc_ema
from warm_jax.metrics import extract, frechet, moments, published
from warm_jax.runtime import jsonl, log, pod, preemption, rounding, workdirs
from warm_jax.sampling import runs

_WATCH_SECONDS = 15.0
_SHOWN = (
    *("protocol", "system", "checkpoint_step", "ema", "nfe", "solver", "steps", "bnr"),
    *("guidance", "guidance_interval"),
)
_Against = Sequence[reference.Reference | None]  # of each scorer; only process 0 has them


def is_file(spec: str) -> bool:
    """Whether a reference is a statistics file, and not a source such as `npz:FILE.npz`."""
    return spec.endswith(".npz") and not spec.startswith(("npz:", "folder:", "zip:"))


def find_reference(run: shards.Run) -> reference.Reference:
    """The reference that the config names, measured once in a workdir."""
    settings = run.config.eval
    expected = run.extractor.provenance((*experiment.image_side(run.config), run.config.data.channels))
    # Another source may be named on purpose, as held-out images; statistics and the default must be the run's images.
    if run.sampling and not settings.allow_other_data and (not settings.reference or is_file(settings.reference)):
        expected = dataclasses.replace(expected, data_hash=workdirs.seen_data(run.workdir))
    if is_file(settings.reference):
        found = reference.with_images(
            run.config, workdirs.local(settings.reference), run.extractor, run.workdir / "evaluations"
        )
    else:
        source = reference.open_images(
            run.config, settings.reference or run.config.data.source, "name one with eval.reference"
        )
        named_scores.check_reference(run.config, len(source), source.spec)
        digest = hashlib.sha256(f"spread {source.fingerprint} {run.extractor.hash}".encode()).hexdigest()[:12]
        path = run.workdir / "evaluations" / f"reference-{digest}.npz"
        found = reference.kept(path)
        if found is None:
            reference.save(path, reference.measure(run.config, source, run.extractor))
            found = reference.load(path)
    if not found.batch:
        expected.require_same(found.provenance)
    return found


def check_reference(config: ConfigDict, extractor: extract.Extractor) -> None:
    """Raises ValueError or OSError where the reference that the config names cannot serve its metrics."""
    spec, count = config.eval.reference, None
    if is_file(spec):
        count = reference.images_of_file(config, workdirs.local(spec), extractor)
    elif config.data.on_error != "skip":  # which decodes every image to count them
        count = len(reference.open_images(config, spec or config.data.source, "name one with eval.reference"))
    if count is not None:
        named_scores.check_reference(config, count, spec or config.data.source)


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line(row: dict[str, object], names: list[str]) -> str:
    values = "  ".join(f"{name} {row[name]:.4g}" for name in names if not name.endswith("_std"))
    how = "  ".join(f"{k} {row[k]}" for k in _SHOWN if row.get(k) is not None)
    return f"{values}  | {row['images']} {row['numbers']}  {how}  | against {row['reference']}, {row['extractor']}"


def _append(run: shards.Run, row: dict[str, object]) -> None:
    if jax.process_index() == 0:
        jsonl.append(run.workdir / "results.jsonl", row)


def _facts(run: shards.Run, against: reference.Reference, images: shards.Images) -> dict[str, object]:
    """What a score depends on besides its images' numbers."""
    return {
        "protocol": run.protocol,
        **images.facts,
        "reference": against.name,
        "reference_count": against.moments.count,
        "extractor": run.extractor.name,
        "extractor_hash": run.extractor.hash,
        "uint8_rule": moments.UINT8_RULE,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _one_round(
    run: shards.Run, against: reference.Reference | None, images: shards.Images, first: int, count: int
) -> dict[str, float] | None:
    """Scores of one range of images, written as a row; None where a signal came first. Only process 0 scores."""
    judged = shards.judge(run, images, first, count)
    if judged is None or against is None:
        return None if preemption.requested() else {}
    result, said = named_scores.of(run, against, judged)
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


def _all_rounds(run: shards.Run, against: _Against, images: shards.Images) -> bool:
    """Every round, and their summary where there are several; False where a signal came first."""
    settings, found = run.config.eval, []
    for number in range(run.rounds):
        first = settings.first + number * settings.count
        if run.others:
            shards.draw_for_all(run, images, first, settings.count)
        results = []
        for one, its in zip(run.scorers, against, strict=True):
            results.append(_one_round(one, its, images, first, settings.count))
            if results[-1] is None:
                return False
        found.append(results[0])
    if run.rounds > 1 and against[0] is not None:
        _summarise(run, against[0], images, found)
    return True


def _summarise(
    run: shards.Run, against: reference.Reference, images: shards.Images, found: list[dict[str, float]]
) -> None:
    """Writes and says minimum, maximum, mean and standard deviation of the scores of several rounds."""
    settings = run.config.eval
    names = [name for name in found[0] if not name.endswith("_std")]
    last = settings.first + run.rounds * settings.count - 1
    summary = {"rounds": run.rounds, "count": settings.count}
    summary |= {"numbers": f"{settings.first}-{last}", **_facts(run, against, images)}
    for name in names:
        values = [result[name] for result in found]
        summary |= {f"{name}_min": min(values), f"{name}_max": max(values), f"{name}_mean": float(np.mean(values))}
        summary[f"{name}_std_of_rounds"] = float(np.std(values, ddof=1))
    _append(run, summary)
    log.say(
        "\n".join(
            f"{n}: minimum of {run.rounds} rounds {summary[f'{n}_min']:.4g}, "
            f"mean {rounding.with_error(summary[f'{n}_mean'], summary[f'{n}_std_of_rounds'])}"
            for n in names
        )
    )


# ── The programs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def load_extractor(config: ConfigDict) -> extract.Extractor | None:
    """The network that `eval.extractor` names; None where no metric needs it. OSError or ValueError as its loader's."""
    only_bits = config.eval.metrics and set(config.eval.metrics) <= set(bits.METRICS)
    return None if only_bits else reference.load_extractor(config)


def check(config: ConfigDict, extractor: extract.Extractor | None) -> None:
    """Raises ValueError or OSError where the `eval` section asks for what cannot be.

    `extractor` is None where none of its metrics needs samples.
    """
    settings = config.eval
    least = max([2, *(named_scores.LEAST[metric] for metric in settings.metrics if metric in named_scores.LEAST)])
    if settings.count < least:
        raise ValueError(f"eval.count is {settings.count}; it must be at least {least} for these eval.metrics")
    if settings.first < 0:
        raise ValueError(f"eval.first is {settings.first}; it must be at least 0")
    known = (*named_scores.METRICS, *bits.METRICS)
    if not settings.metrics or not set(settings.metrics) <= set(known):
        raise ValueError(f"eval.metrics is {tuple(settings.metrics)}; choose some of {', '.join(known)}")
    if extractor is None:  # nothing is sampled
        return
    if "is" in settings.metrics and not published.is_of(extractor.name, frechet.INCEPTION):
        raise ValueError(f"the Inception Score needs eval.extractor=inception, not {extractor.name}")
    reference.check_images(config, extractor)
    if is_file(settings.reference) and not workdirs.local(settings.reference).is_file():
        raise FileNotFoundError(f"eval.reference {settings.reference} is not there; make it with --mode=stats")


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    images: str,
    step: int,
    protocol: str,
    watch: bool,
    emas: tuple[float, ...] = (),
    against: str = "",
) -> shards.Run:
    """Checks everything that can be checked. ValueError or OSError for bad input.

    `images` is a source to judge in place of samples; `step` a checkpoint's, -1 the latest's; `emas` the σ_rel of the
    EMAs to score, none: the plain one; `against` a workdir to compare bits a dimension with. With `watch` this waits
    for the first checkpoint.
    """
    experiment.build(config)
    rounds, scored = protocols.rounds(protocol), protocols.configs(config, protocol)
    measuring = bits.wanted(config)
    if measuring:
        bits.check(config)
    if against and not measuring:
        raise ValueError(
            f"--against={against} compares bits a dimension; ask for them: --config.eval.metrics={bits.METRICS[0]}"
        )
    if images and measuring:
        raise ValueError(
            f"eval.metrics has {measuring[0]}, which is of a model; of --images there are only the others. The "
            "held-out images that a model is measured on are likelihood.images"
        )
    if images and emas:
        raise ValueError("--ema is of a checkpoint's weights; it does not go with --images")
    for ema in emas:
        if watch:  # a checkpoint that is too early for it is passed over
            posthoc_ema.check(workdir, ema, config)
        else:
            runs.require_checkpoint(workdir, step)
            runs.check_ema(workdir, step, ema)
    if watch and images:
        raise ValueError("--watch evaluates each new checkpoint; it does not go with --images")
    extractors = [load_extractor(one) for one in scored]
    for one, extractor in zip(scored, extractors, strict=True):
        check(one, extractor)
        if extractor is not None:
            check_reference(one, extractor)
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
        if watch and not runs.checkpoint_steps(workdir):
            log.say(f"waiting for the first checkpoint in {workdir}")
        while watch and not runs.checkpoint_steps(workdir) and not preemption.requested():
            shards.wait(1.0)
        sampling = runs.open_run(config, workdir, step)
    request = bits.prepare(config, workdir, against) if measuring else None
    workdirs.check_writable(workdir / "evaluations")
    pod.check_shared(workdir / "evaluations")
    runs_of = [
        shards.Run(one, workdir, extractor, source, sampling, rounds, watch, emas, protocol, measuring=request)
        for one, extractor in zip(scored, extractors, strict=True)
    ]
    return dataclasses.replace(runs_of[0], others=tuple(runs_of[1:]))


@preemption.noted()
def evaluate(run: shards.Run) -> int:
    """Scores a checkpoint, or a source, or with `watch` each checkpoint as it comes. Returns the exit status."""
    measured: list[reference.Reference] = []
    try:
        if run.extractor is not None:
            pod.first_then_all("reference", lambda: measured.extend(map(find_reference, run.scorers)))
    except InterruptedError as error:
        log.say(str(error))
        return preemption.EXIT_AGAIN
    against = measured or [None] * len(run.scorers)  # only process 0 needs them
    for its in measured:
        log.say(f"reference: {its.name}, {its.moments.count or 'unknown count of'} images")
    finished = _watch(run, against) if run.watch else _once(run, against)
    if all(pod.gather("evaluated", "finished" if finished else "")):
        return 0
    log.say(f"{preemption.requested()}: finished shards are kept; the same command goes on from there")
    return preemption.EXIT_AGAIN


def _once(run: shards.Run, against: _Against) -> bool:
    """Scores the checkpoint, or the source, that was asked for; False where a signal came first."""
    step, sampler = -1, None
    if run.sampling:  # one program for all EMAs
        step, sampler = run.sampling.step, run.sampling.sampler()
    for ema in run.emas or (None,):
        if run.extractor is not None:
            images = shards.Images(run, step, ema, sampler)
            if not _all_rounds(run, against, images):
                return False
            step = images.facts.get("checkpoint_step", -1)  # of the latest one there may soon be another
        if not _bits(run, step, ema):
            return False
    return True


def _bits(run: shards.Run, step: int, ema: float | None) -> bool:
    """The row of bits a dimension that is asked for, if any; False where a signal came first."""
    if run.measuring is None:
        return True
    row = bits_rows.score(run.measuring, dataclasses.replace(run.sampling, step=step, ema=ema))
    if row is None:
        return False
    _append(run, row)
    log.say(bits_rows.line(row))
    return True


def _watch(run: shards.Run, against: _Against) -> bool:
    """Scores each checkpoint as it comes, until the last one; False where a signal came first."""
    done: set[int] = set()

    def next_step() -> str:
        """Waits for it in process 0; empty after the last, or a signal."""
        while not preemption.requested():
            todo = [step for step in runs.checkpoint_steps(run.workdir) if step not in done]
            if todo:
                return str(min(todo))
            if done and max(done) >= run.config.train.steps:
                return ""
            shards.wait(_WATCH_SECONDS)
        return ""

    while step := pod.from_first("watched", next_step):
        done.add(int(step))
        _watched(run, against, int(step))
    return not preemption.requested()


def _watched(run: shards.Run, against: _Against, step: int) -> None:
    """Scores one checkpoint, unless training has deleted it meanwhile."""
    for ema in run.emas or (None,):
        if run.extractor is None:
            if not _watched_bits(run, step, ema):
                return
            continue
        images, reason = None, ""
        try:
            images = shards.Images(run, step, ema)
        except ValueError as error:
            reason = str(error)
        reason = "; ".join(filter(None, pod.gather("loaded", reason)))
        if images is None or reason:
            log.say(f"passed over: {reason}")
        elif not _all_rounds(run, against, images) or not _watched_bits(run, step, ema):
            return


def _watched_bits(run: shards.Run, step: int, ema: float | None) -> bool:
    """`_bits` of a checkpoint that training may delete meanwhile."""
    try:
        return _bits(run, step, ema)
    except ValueError as error:
        log.say(f"passed over: {error}")
        return True
