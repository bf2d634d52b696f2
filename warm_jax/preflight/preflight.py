"""Will it fit, and how fast can it be: compiles a config's programs for accelerators that are not here.

The compiler of an accelerator is a plug-in of JAX that wants a process and variables of its own: `prepare` checks,
`preflight` starts `python -m warm_jax.preflight.preflight` for the work and prints what it found.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from warm_jax.accelerators import flops, hlo, roofline, topology
from warm_jax.experiments import experiment
from warm_jax.preflight import table
from warm_jax.runtime import log, mesh, workdirs
from warm_jax.sampling import batches
from warm_jax.training import step


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked: the first of `targets` that fits is wanted; `text` is how they were asked for."""

    config: ConfigDict
    targets: list[topology.Target]
    text: str
    workdir: pathlib.Path


def _check_installed(target: topology.Target) -> None:
    """OSError, with the command that brings it, where the compiler for `target` is missing."""

    def there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package that it would be in
            return False

    if target.chip.platform == "tpu" and not there("libtpu"):
        raise OSError(f"compiling for {target.chip.name} needs the wheel libtpu: pip install 'warm_jax[preflight]'")
    if target.chip.platform == "gpu":
        missing = [] if there("jax_plugins.xla_cuda13") else ["jax-cuda13-plugin and jax-cuda13-pjrt"]
        if not (there("nvidia") and there("nvidia.cu13")) and not shutil.which("ptxas"):
            missing.append("nvidia-cuda-nvcc (for ptxas)")
        if missing:
            raise OSError(
                f"compiling for {target.chip.name} needs {' and '.join(missing)}: pip install 'warm_jax[preflight-gpu]'"
            )


def prepare(config: ConfigDict, workdir: pathlib.Path, text: str) -> Run:
    """Checks config, topology and plug-in, compiles nothing. ValueError or OSError for bad input."""
    targets = topology.parse(text)
    experiment.build(config)
    fitting, refused = [], None
    for target in targets:
        try:
            experiment.check_batch(config, target.devices)
            mesh.check_divides(experiment.lookup(config, "mesh.fsdp"), target.devices)
            fitting.append(target)
        except ValueError as error:
            refused = refused or error
    if refused and not fitting:
        raise ValueError(f"--topology={text}: {refused}") from refused
    _check_installed(targets[0])
    workdirs.check_writable(workdir)
    return Run(config, fitting, text, workdir)


def preflight(run: Run) -> int:
    """Compiles, prints the table, writes it to `preflight-TOPOLOGY.json`. Returns 0, be it that it fits or not."""
    found, tried = None, []
    for target in run.targets:
        if found and not table.may_fit(found, target):
            tried.append({"topology": target.text, "fits": False, "compiled": False})
            log.say(f"{target.text}: left out, by what {found['topology']} needs")
            continue
        found = _ask(run.config, target)
        tried.append({"topology": target.text, "fits": found["fits"], "compiled": True})
        if found["fits"] is not False:
            break
        if target is not run.targets[-1]:
            log.say(f"{target.text}: does not fit{table.needs(found)}")
    found["tried"] = tried
    path = run.workdir / f"preflight-{run.text.replace(':', '-')}.json"
    workdirs.write_atomically(path, json.dumps(found, indent=2).encode() + b"\n")
    log.say(table.text(found))
    log.say(f"\nwritten to {path}")
    return 0


def _ask(config: ConfigDict, target: topology.Target) -> dict:
    """What a process of its own finds out of `config` on `target`."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = pathlib.Path(folder) / "asked.json", pathlib.Path(folder) / "answer.json"
        request = {"config": config.to_dict(), "topology": target.text}
        asked.write_text(json.dumps(request, default=list), encoding="utf-8")
        with (pathlib.Path(folder) / "stderr").open("w+", encoding="utf-8", errors="replace") as complaints:
            # The compilers complain of missing hardware at length; that is shown only where nothing came of it.
            done = subprocess.run(
                [sys.executable, "-m", "warm_jax.preflight.preflight", asked, answer],
                env={**os.environ, **topology.environment(target, os.environ.get("XLA_FLAGS", ""))},
                stderr=complaints,
                check=False,
            )
            complaints.seek(0)
            said = [line.strip() for line in complaints if line.strip()]
        if done.returncode or not answer.exists():
            reason = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)] or said
            killed = "; it was killed, as where a machine has too little memory" if done.returncode == -9 else ""
            why = f"the compiler for {target.text} failed (status {done.returncode}{killed}): {' '.join(reason[-1:])}"
            if not answer.exists():
                raise OSError(why)
            return json.loads(answer.read_text(encoding="utf-8")) | {"unfinished": why}
        return json.loads(answer.read_text(encoding="utf-8"))


# ── In the process of its own ────────────────────────────────────────────────────────────────────────────────────────


def examine(config: ConfigDict, target: topology.Target) -> Iterator[dict]:
    """Compiles the train step and the sampling loop of `config` for `target`; what `table.text` shows, for JSON.

    It comes after each program: what took long to compile is not lost where the next one fails.
    """
    built, devices = experiment.build(config), topology.devices(target)
    exp = experiment.for_training(built, devices)
    weights = jax.eval_shape(exp.model.init, jax.random.key(0))
    # Each process samples on its own devices, where nothing is divided.
    host = [device for device in devices if device.process_index == devices[0].process_index]
    apart = target.chip.platform == "tpu" and len(host) < len(devices)
    draw = batches.Sampler(experiment.on(built, mesh.over(host)), apart=apart)
    found = {
        "topology": target.text,
        "chip": target.chip._asdict(),
        "devices": target.devices,
        "link": target.link,
        "batch_size": config.train.batch_size,
        "accumulation": config.train.accumulation,
        "remat": list(config.model.remat),
        "dtype": config.model.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "state_bytes": _state_bytes(exp),
        "images_in_all": config.train.steps * config.train.batch_size,
        "sides": [max(experiment.image_side(config)) >> i for i in range(len(config.model.channel_mult))],
        "patch_size": config.model.patch_size,
        "assumed": list(roofline.ASSUMED),
    }
    programs, found["fits"] = {}, None
    found["programs"] = programs
    programs["train step"] = _examine(
        "train step", step.trace_step(exp), target, config.train.batch_size, len(devices), found["state_bytes"]
    )
    if config.model.remat:
        programs["train step"]["recomputed"] = _recomputed(exp, programs["train step"]["flops"], target)
    yield found
    if programs["train step"]["fits"] is not False:
        count = 1 if apart else len(host)
        batch = draw.batch_size * count // len(host)
        handed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
        programs["sampling loop"] = _examine("sampling loop", draw.trace(weights), target, batch, count, handed)
    verdicts = [one["fits"] for one in programs.values()]
    found["fits"] = None if None in verdicts else all(verdicts)
    yield found


def _state_bytes(exp: experiment.Experiment) -> int:
    """Bytes a chip of what a step hands to the next: parameters, their average, Adam's moments."""
    leaves = jax.tree.leaves(step.abstract_state(exp))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _recomputed(exp: experiment.Experiment, total: dict, target: topology.Target) -> float:
    """FLOPs a chip that a train step without remat would not do."""
    config = exp.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.remat = ()
    plain = experiment.on(experiment.build(config), exp.mesh)
    return sum(total.values()) - flops.count(step.trace_step(plain).jaxpr).total / target.devices


def _examine(name: str, traced, target: topology.Target, batch: int, devices: int, handed: int) -> dict:
    """One program on `devices` of the target: its FLOPs, memory and traffic a chip, and the roofline of them.

    `handed`: the bytes a chip of its arguments, but for what is little.
    """
    print(f"compiling the {name} for {devices} × {target.chip.name} …", end=" ", flush=True)
    started, busy = time.perf_counter(), time.process_time()
    work = flops.count(traced.jaxpr).times(1 / devices)
    row = {"batch": batch, "devices": devices, "flops": work._asdict()}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = table.out_of_memory(str(error), handed)
        if needed is None:
            raise
        compiled = None
    row["seconds_to_compile"], row["cpu_seconds"] = time.perf_counter() - started, time.process_time() - busy
    print(f"{row['seconds_to_compile']:.0f} s{'' if compiled else ': refused, too large'}", flush=True)
    if compiled is None:
        return row | {"fits": False, "memory": needed}
    moved, chip = hlo.traffic(compiled.as_text(), devices), target.chip
    row["memory"] = table.memory(compiled.memory_analysis())
    row["fits"] = None if chip.memory is None else row["memory"]["total"] <= chip.memory * chip.usable
    cost = compiled.cost_analysis() or {}
    row["compiler"] = {"flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}
    row["moved"], row["unknown_loops"] = moved.memory, moved.unknown_loops
    row["collectives"] = [one._asdict() for one in moved.collectives]
    if chip.bf16:
        bound = roofline.roofline(target, work, moved.memory, sum(one.sent for one in moved.collectives))
        row["roofline"] = bound._asdict() | {"seconds": bound.seconds, "limit": bound.limit}
    return row


def _leave_with(parent: int) -> None:
    """Ends this process once its parent is gone: a compiler hears no signal for minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(asked: str, answer: str) -> None:
    """Reads the request of `_ask`, writes what `examine` finds."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    request = json.loads(pathlib.Path(asked).read_text(encoding="utf-8"))
    for found in examine(ConfigDict(request["config"]), topology.parse(request["topology"])[0]):
        workdirs.write_atomically(pathlib.Path(answer), json.dumps(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
