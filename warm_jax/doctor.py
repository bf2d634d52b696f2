"""The program of `--mode=doctor`: what this machine has, what is wrong with it, and a self-test of some seconds.

`health/` has the parts: what is there (facts), what that means (judge), what is measured (selftest). Nothing here
imports JAX before it is asked for: that it cannot be imported is one of the things to find.
"""

import json
import pathlib
import textwrap
import time
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from warm_jax import rollcall, workdirs
from warm_jax.health import facts, judge

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
    except (ValueError, KeyError) as error:
        return "", str(error)
    if found is None:
        return "", ""
    return f"number {found.process} of {found.processes}, met at {found.coordinator}; here it is looked at alone", ""


def of_config(config: ConfigDict, here: facts.Folder) -> Iterator[judge.Finding]:
    """What is right and wrong with a config on this machine: its values, its batch, its images, its checkpoints."""
    import jax

    from warm_jax import experiment, reference, step

    try:
        exp = experiment.for_training(experiment.build(config))
        experiment.check_batch(config, jax.local_device_count())
        yield judge.Finding(judge.OK, "config", f"batch {config.train.batch_size} on {exp.mesh.size} device(s)")
    except (ValueError, TypeError) as error:
        yield judge.Finding(judge.PROBLEM, "config", str(error), "give other values: --config.KEY=VALUE")
        return
    try:
        source = reference.open_images(config, config.data.source, "name another with --config.data.source")
        yield judge.Finding(judge.OK, "images", f"{source.spec}: {len(source)}")
    except FileNotFoundError as error:
        said, found, how = str(error).partition("; to get it: ")
        yield judge.Finding(judge.PROBLEM, "images", said, how if found else "")
    except (ValueError, OSError) as error:
        yield judge.Finding(judge.PROBLEM, "images", str(error))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.abstract_state(exp)))
    yield judge.of_checkpoints(size, config.train.keep_last + 1, here)


def _write(path: str, found: facts.Facts, findings: list[judge.Finding]) -> None:
    content = {"facts": found._asdict(), "findings": [finding._asdict() for finding in findings]}
    for name in ("gpus", "here", "cache"):
        value = content["facts"][name]
        content["facts"][name] = [one._asdict() for one in value] if name == "gpus" else value._asdict()
    devices = [one._asdict() for one in found.jax.devices]
    content["facts"]["jax"] = found.jax._asdict() | {"devices": devices}
    workdirs.write_atomically(pathlib.Path(path), json.dumps(content, indent=2).encode() + b"\n")


def doctor(
    config: ConfigDict | None,
    smoke: ConfigDict | None,
    cache: pathlib.Path,
    out: str,
    environment: Mapping[str, str],
) -> int:
    """Prints the table, and writes it to `out` (FILE.json) if that is given. Returns 0, or 1 where there is a problem.

    `config` is looked at too; `smoke` is trained for some steps, None: not; `cache` is where compiled programs lie.
    """
    started, findings = time.perf_counter(), []

    def tell(finding: judge.Finding) -> None:
        findings.append(finding)
        print(text_of(finding), flush=True)

    found = facts.gather(environment, cache, *place(environment))
    for finding in judge.judge(found):
        tell(finding)
    if found.jax.error:
        tell(judge.Finding(judge.NOTE, "self-test", "left out, since JAX does not start"))
    else:
        for finding in of_config(config, found.here) if config is not None else ():
            tell(finding)
        from warm_jax.health import selftest

        if smoke is None:
            tell(
                judge.Finding(
                    judge.NOTE, "train step", "left out: configs/smoke.py is not here", "run in the repository"
                )
            )
        for check in selftest.run(smoke):
            tell(judge.of_check(check, found))
    problems = sum(finding.status == judge.PROBLEM for finding in findings)
    verdict = f"{problems} problem{'s' if problems > 1 else ''}: see →" if problems else "all right"
    print(f"\n{verdict} ({time.perf_counter() - started:.0f} s)")
    if out:
        _write(out, found, findings)
        print(f"written to {out}; it says what this table says, and nothing else of the machine")
    return 1 if problems else 0
