"""The program of `--mode=doctor`: what this machine has, what is wrong with it, and a self-test of some seconds.

This room has the parts: what is there (facts), what that means (judge), what is measured (selftest). Nothing here
imports JAX before it is asked for: that it cannot be imported is one of the things to find.
"""

import json
import pathlib
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping

from ml_collections import ConfigDict

from warm_jax.doctor import facts, judge
from warm_jax.runtime import rollcall

_WIDTH, _INDENT = 118, " " * 28


def text_of(finding: judge.Finding) -> str:
    """A finding as rows of the table, its remedy below."""
    said = textwrap.fill(finding.said, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    rows = f"{finding.status:<9}{finding.subject:<19}{said[len(_INDENT) :]}"
    if finding.remedy:
        rows += f"\n{_INDENT}→ {finding.remedy}"  # in one row: it is to be copied
    return rows


def place(environment: Mapping[str, str]) -> tuple[str, str]:
    """Which process this is of how many, in words, empty for one alone; and what is wrong with what says so."""
    try:
        found = rollcall.find(environment)
    except Exception as error:  # whatever a broken JAX, or a scheduler's odd variable, makes of it
        return "", str(error) or type(error).__name__
    if found is None:
        return "", ""
    return f"number {found.process} of {found.processes}, met at {found.coordinator}; here it is looked at alone", ""


def of_config(config: ConfigDict, here: facts.Folder) -> Iterator[judge.Finding]:
    """What is right and wrong with a config on this machine: its values, its batch, its images, its checkpoints."""
    import jax

    from warm_jax.evaluation import reference
    from warm_jax.experiments import automatic, experiment
    from warm_jax.training import step

    try:
        automatic.settle(config, pathlib.Path(here.path), quiet=True)
        exp = experiment.for_training(experiment.build(config))
        experiment.check_batch(config, jax.local_device_count())
        yield judge.Finding(judge.OK, "config", f"batch {config.train.batch_size} on {exp.mesh.size} device(s)")
    except (ValueError, TypeError) as error:
        yield judge.Finding(judge.PROBLEM, "config", str(error), "give other values: --config.KEY=VALUE")
        return
    try:
        source = reference.open_images(config, config.data.source, "name another with --config.data.source")
        classes = config.data.num_classes
        if classes not in (0, source.num_classes):
            said = f"{source.spec} has {source.num_classes} classes, and data.num_classes is {classes}"
            remedy = f"--config.data.num_classes={source.num_classes}, or =0 to ignore classes"
            yield judge.Finding(judge.PROBLEM, "images", said, remedy)
        else:
            yield judge.Finding(judge.OK, "images", f"{source.spec}: {len(source)}")
    except FileNotFoundError as error:
        said, found, how = str(error).partition("; to get it: ")
        yield judge.Finding(judge.PROBLEM, "images", said, how if found else "")
    except (ValueError, OSError) as error:
        yield judge.Finding(judge.PROBLEM, "images", str(error))
    state, settings = step.abstract_state(exp), config.train
    size, snapshot = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (state, state.averages))
    kept = settings.steps // settings.keep_every if settings.keep_every else 0
    snapshots = settings.steps // settings.posthoc_every if state.averages else 0
    yield judge.of_checkpoints(size, settings.keep_last + 1 + kept, here, snapshot, snapshots)


def _write(path: str, found: facts.Facts, findings: list[judge.Finding]) -> None:
    content = {"facts": found._asdict(), "findings": [finding._asdict() for finding in findings]}
    for name in ("gpus", "here", "cache"):
        value = content["facts"][name]
        content["facts"][name] = [one._asdict() for one in value] if name == "gpus" else value._asdict()
    devices = [one._asdict() for one in found.jax.devices]
    content["facts"]["jax"] = found.jax._asdict() | {"devices": devices}
    content["facts"]["environment"] = judge.shown(found)
    pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _test(
    config: ConfigDict | None, smoke: ConfigDict | None, found: facts.Facts, tell: Callable[[judge.Finding], None]
) -> None:
    """Looks at the config, and tests the machine. ImportError where a package of this program is broken."""
    from warm_jax.doctor import selftest

    for finding in of_config(config, found.here) if config is not None else ():
        tell(finding)
    if smoke is None:
        said = "left out: configs/smoke.py is not here"
        tell(judge.Finding(judge.NOTE, "train step", said, "run in the repository"))
    for check in selftest.run(smoke):
        tell(judge.of_check(check, found))


def doctor(
    config: ConfigDict | None,
    smoke: ConfigDict | None,
    cache: pathlib.Path,
    out: str,
    environment: Mapping[str, str],
    workdir: pathlib.Path = pathlib.Path(),
) -> int:
    """Prints the table, and writes it to `out` (FILE.json) if that is given. Returns 0, or 1 where there is a problem.

    `config` is looked at too; `smoke` is trained for some steps, None: not; `cache` is where compiled programs lie, and
    `workdir` is where runs are to live. OSError where `out` cannot be written.
    """
    started, findings = time.perf_counter(), []

    def tell(finding: judge.Finding) -> None:
        findings.append(finding)
        print(text_of(finding), flush=True)

    found = facts.gather(environment, cache, *place(environment), workdir)
    for finding in judge.judge(found):
        tell(finding)
    if found.jax.error:
        tell(judge.Finding(judge.NOTE, "self-test", "left out, since JAX does not start"))
    else:
        try:
            _test(config, smoke, found, tell)
        except ImportError as error:
            how = "install that package anew; python -c 'import warm_jax' says where it is needed"
            tell(judge.Finding(judge.PROBLEM, "self-test", f"this program cannot be imported: {error}", how))
    problems = sum(finding.status == judge.PROBLEM for finding in findings)
    verdict = f"{problems} problem{'s' if problems > 1 else ''}: see →" if problems else "all right"
    print(f"\n{verdict} ({time.perf_counter() - started:.0f} s)")
    if out:
        _write(out, found, findings)
        print(f"written to {out}; it says what this table says, and nothing else of the machine")
    return 1 if problems else 0
