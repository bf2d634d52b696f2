"""All systems beside each other, each with its own config of the same images: one table and one picture.

With configs/compare.py network and budget are the same too. Every system is trained in a workdir of its own, sampled by
its native solver and, where its mathematics allows, by Heun's, and scored. What is done is a line of `compare.jsonl`,
so a comparison that was cut off goes on; the table and the picture are written anew with each line.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from warm_jax.diffusion import sampler
from warm_jax.evaluation import bits, evaluate, reference, shards
from warm_jax.experiments import experiment
from warm_jax.metrics import extract
from warm_jax.runtime import jsonl, locks, log, pictures, preemption, rounding, workdirs
from warm_jax.sampling import runs
from warm_jax.training import train

_NEEDED = ("key", "system", "seed", "solver", "steps", "nfe", "scores")  # in each row, for the table
_ADDED = (  # keys that older versions did not have; unset, they say nothing
    *("sample.beta_min", "sample.rho", "train.posthoc_ema", "data.download"),
    *("sample.guidance_interval", "eval.shuffle_splits", "sample.levels", "train.levels"),
)
_OWN_REFERENCE = "reference-"  # of the config's own images, measured here


@dataclasses.dataclass(frozen=True)
class Job:
    """One training of one system, and the ways in which it is sampled."""

    system: str
    seed: int
    config: ConfigDict
    samplings: tuple[tuple[str, int], ...]  # solver, steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `compare` needs."""

    jobs: tuple[Job, ...]
    workdir: pathlib.Path
    refusals: dict[str, str]


def _samplings(config: ConfigDict) -> tuple[tuple[tuple[str, int], ...], str]:
    """The native sampling and, where it is another and can be, Heun's on `compare.steps`; or why it cannot be."""
    native, common = (config.sample.solver, config.sample.steps), ("heun", config.compare.steps)
    try:
        sampled = experiment.build(config).sampled
        sampler.check_solver("heun", sampled)
        sampled.levels(config.compare.steps)
    except ValueError as error:
        return (native,), str(error)
    return (native,) if native == common else (native, common), ""


def prepare(make: Callable[[str], ConfigDict], workdir: pathlib.Path) -> Run:
    """Checks every config before the first is trained. ValueError or OSError for bad input.

    `make` gives the config of a system, with whatever was overridden on the command line.
    """
    settings = make("warm").compare
    if not settings.systems or len(set(settings.systems)) < len(settings.systems):
        raise ValueError(
            f"compare.systems is {tuple(settings.systems)}; name each system once, as --config takes it after its colon"
        )
    for key, least in (("repeats", 1), ("steps", 1), ("shown", 1)):
        if settings[key] < least:
            raise ValueError(f"compare.{key} is {settings[key]}; it must be at least {least}")
    configs = {system: make(system) for system in settings.systems}
    extractor = evaluate.load_extractor(next(iter(configs.values())))
    first, again, refusals = [], [], {}
    for system, config in configs.items():
        samplings, refusals[system] = _checked(system, config, extractor)
        for number in range(settings.repeats if system in settings.repeated else 1):
            seeded = config.copy_and_resolve_references()
            seeded.seed += number
            (again if number else first).append(Job(system, number, seeded, samplings))
    jobs = (*first, *sorted(again, key=lambda job: job.seed))
    for job in jobs:
        if (_workdir(workdir, job) / "config.json").exists():
            workdirs.check_same(job.config, _workdir(workdir, job), ("seed", "data", "process", "model", "train"))
    workdirs.check_writable(workdir)
    source = train.prepare(jobs[0].config, _workdir(workdir, jobs[0])).source  # the images are there
    if extractor is None:
        return Run(jobs, workdir, refusals)
    digest = hashlib.sha256(f"{source.fingerprint} {extractor.hash}".encode()).hexdigest()[:12]
    for job in jobs:
        with job.config.unlocked():
            job.config.eval.reference = job.config.eval.reference or str(workdir / f"{_OWN_REFERENCE}{digest}.npz")
    return Run(jobs, workdir, refusals)


def _checked(
    system: str, config: ConfigDict, extractor: extract.Extractor | None
) -> tuple[tuple[tuple[str, int], ...], str]:
    """`_samplings`, after everything in the config of a system was checked; ValueError begins with its name."""
    try:
        samplings, refusal = _samplings(config)
        evaluate.check(config, extractor)
        if bits.wanted(config):
            bits.check(config)
            bits.open_heldout(config)
        if extractor is None:  # nothing is sampled
            samplings, refusal = samplings[:1], ""
        for solver, steps in samplings:
            runs.check_request(_with_sampling(config, solver, steps))
    except ValueError as error:
        raise ValueError(f"{system}: {error}") from error
    return samplings, refusal


def _workdir(workdir: pathlib.Path, job: Job) -> pathlib.Path:
    return workdir / f"{job.system}-{job.seed}"


def _key(config: ConfigDict) -> str:
    """A hash of all that a row depends on; rows of other settings are not counted."""
    parts = config.to_dict()
    parts.pop("compare")
    parts.pop("mesh")
    parts.pop("analysis", None)
    if not set(parts["eval"]["metrics"]) & set(bits.METRICS):  # and so as before there was such a section
        parts.pop("likelihood", None)
    for section, key in (name.split(".") for name in _ADDED):
        if not parts[section].get(key):
            parts[section].pop(key, None)
    parts["train"] = {key: value for key, value in parts["train"].items() if not key.startswith("evaluate_")}
    if "posthoc_ema" not in parts["train"]:
        parts["train"].pop("posthoc_every", None)
    if pathlib.Path(parts["eval"]["reference"]).name.startswith(_OWN_REFERENCE):
        parts["eval"].pop("reference")
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _record(job: Job) -> pathlib.Path | None:
    """Where `compare.record` keeps the rows of a system, with their configs; None where it does not."""
    folder = job.config.compare.get("record")
    return workdirs.local(folder) / f"{job.system}.jsonl" if folder else None


def _with_sampling(config: ConfigDict, solver: str, steps: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.sample.solver, config.sample.steps = solver, steps
    return config


def _rows(run: Run) -> list[dict]:
    """The finished rows of this comparison, in the order of its jobs."""
    paths = [run.workdir / "compare.jsonl", *dict.fromkeys(filter(None, map(_record, run.jobs)))]
    found = {str(row["key"]): row for path in paths for row in jsonl.read(path, _NEEDED)}  # what is lost is made again
    keys = [_key(_with_sampling(job.config, *sampling)) for job in run.jobs for sampling in job.samplings]
    return [found[key] for key in keys if key in found]


# ── One job ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _train(run: Run, job: Job) -> float | None:
    """Trains to the end; all seconds that it took, compilation included, or None where a signal came first."""
    workdir, spent = _workdir(run.workdir, job), _workdir(run.workdir, job) / "seconds.jsonl"
    steps = runs.checkpoint_steps(workdir)
    if not steps or steps[0] < job.config.train.steps:
        started = time.perf_counter()
        status = train.train(train.prepare(job.config, workdir), final_grid=False)
        jsonl.append(spent, {"seconds": time.perf_counter() - started})
        if status:
            return None
    return float(sum(row["seconds"] for row in jsonl.read(spent, ("seconds",))))


def _score(run: Run, job: Job, solver: str, steps: int, seconds: float) -> dict | None:
    """Samples and scores one way; its row, or None where a signal came first."""
    config, workdir = _with_sampling(job.config, solver, steps), _workdir(run.workdir, job)
    judging = evaluate.prepare(config, workdir, "", -1, "once", watch=False)
    if evaluate.evaluate(judging):
        return None
    made = (judging.extractor is not None) + (judging.measuring is not None)  # rows: of samples, and of bits
    result = {"solver": solver, "steps": steps, "nfe": 0}
    for part in jsonl.read(workdir / "results.jsonl")[-made:]:
        result |= part | {"scores": [*result.get("scores", ()), *part["scores"]]}
    row = {"key": _key(config), "training_seconds": seconds, **result, "system": job.system, "seed": job.seed}
    if judging.extractor is not None:
        folder = run.workdir / "shown"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{row['key']}.npy", shards.first_images(judging, config.compare.shown))
    return row


def _keep(run: Run, job: Job, row: dict) -> None:
    """Adds a finished row to the comparison, and to the record that others go on from."""
    jsonl.append(run.workdir / "compare.jsonl", row)
    record = _record(job)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        jsonl.append(record, row | {"config": json.loads(json.dumps(job.config.to_dict(), default=list))})


def _remaining(run: Run) -> Iterator[tuple[Job, list[tuple[str, int]]]]:
    done = {row["key"] for row in _rows(run)}
    for job in run.jobs:
        todo = [sampling for sampling in job.samplings if _key(_with_sampling(job.config, *sampling)) not in done]
        if todo:
            yield job, todo


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
    """Within, nobody else trains or scores in the workdir of a job."""
    with contextlib.ExitStack() as held:
        for name in ("checkpoints", "evaluations"):
            held.enter_context(locks.writing(locks.file(workdir / name), "compare"))
        yield


def _finish(run: Run, job: Job, todo: list[tuple[str, int]]) -> None:
    """Trains a job and scores what is left of its samplings, a row each, until a signal comes."""
    seconds = _train(run, job)
    for sampling in todo if seconds is not None else ():
        row = _score(run, job, *sampling, seconds)
        if row is not None:
            _keep(run, job, row)
            _report(run)


@preemption.noted()
def compare(run: Run) -> int:
    """Trains, samples and scores what is not done yet. Returns the exit status."""
    started, failed = time.perf_counter(), []
    log.say(f"{len(run.jobs)} trainings, {sum(len(job.samplings) for job in run.jobs)} rows; {run.workdir}")
    try:
        _measure_reference(run)
    except InterruptedError as error:
        log.say(str(error))
        return preemption.EXIT_AGAIN
    for job, todo in _remaining(run):
        log.say(f"── {job.system}, seed {job.seed} ──")
        try:
            with _alone(_workdir(run.workdir, job)):
                _finish(run, job, todo)
        except FloatingPointError as error:  # one that diverged must not take the others with it
            failed.append(f"{job.system}, seed {job.seed}: {error}")
            log.say(f"failed: {failed[-1]}")
        if preemption.requested():
            log.say(f"{preemption.requested()}: what is done is kept; the same command goes on from there")
            return preemption.EXIT_AGAIN
    log.say(_report(run))
    made = [name for name in ("compare.md", "compare.png", "compare.jsonl") if (run.workdir / name).exists()]
    log.say(f"{', '.join(made)} in {run.workdir}; {time.perf_counter() - started:.0f} s")
    for line in failed:
        log.say(f"failed: {line}")
    return 1 if failed else 0


def _measure_reference(run: Run) -> None:
    """The statistics that all are compared with, once."""
    config = run.jobs[0].config
    path = workdirs.local(config.eval.reference or "none")
    if path.name.startswith(_OWN_REFERENCE) and not path.exists():
        source = reference.open_images(config, config.data.source, "name another with data.source")
        reference.save(path, reference.measure(config, source, reference.load_extractor(config)))


# ── Table and picture ────────────────────────────────────────────────────────────────────────────────────────────────


def _groups(run: Run) -> list[list[dict]]:
    """Rows that differ only in their seed, together."""
    groups: dict[tuple, list[dict]] = {}
    for row in _rows(run):
        groups.setdefault((row["system"], row["solver"], row["steps"]), []).append(row)
    order = list(dict.fromkeys(job.system for job in run.jobs))
    return sorted(groups.values(), key=lambda rows: (order.index(rows[0]["system"]), rows[0]["solver"] == "heun"))


def _mean(values: list[float]) -> str:
    return rounding.with_error(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None)


def table(run: Run) -> str:
    """The comparison as a Markdown table; of several seeds mean ± standard deviation."""
    groups = _groups(run)
    if not groups:
        return "nothing is finished yet"
    scores = [name for name in groups[0][0]["scores"] if not name.endswith("_std")]
    head = ["system", "solver", "NFE", "seeds", *scores, "training, s", "sampling, ms an image"]
    lines = [head, ["---"] * len(head)]
    for rows in groups:
        columns = [[row.get(name, np.nan) for row in rows] for name in (*scores, "training_seconds")]
        speed = [1000 * row["seconds_per_image"] for row in rows if "seconds_per_image" in row]
        lines.append(
            [rows[0]["system"], rows[0]["solver"], str(rows[0]["nfe"] or "–"), str(len(rows))]
            + [_mean(values) for values in columns[:-1]]
            + [f"{np.mean(columns[-1]):.0f}", f"{np.mean(speed):.1f}" if speed else "–"]
        )
    notes = [f"\n{system}, Heun: {why}" for system, why in run.refusals.items() if why]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])


def _report(run: Run) -> str:
    """Writes the table and the picture of what is finished, and returns the table."""
    text = table(run)
    workdirs.write_atomically(run.workdir / "compare.md", f"{text}\n".encode())
    rows = []
    for group in _groups(run):
        path = run.workdir / "shown" / f"{group[0]['key']}.npy"
        if path.exists():
            rows.append((f"{group[0]['system']}, {group[0]['solver']}, NFE {group[0]['nfe']}", np.load(path)))
    if rows:
        first, shown = run.jobs[0].config.eval.first, max(len(images) for _, images in rows)
        heads = ["system, solver, evaluations", *(f"seed {first + i}" for i in range(shown))]
        pictures.save_png(run.workdir / "compare.png", pictures.labelled_rows(rows, heads=heads))
    return text
