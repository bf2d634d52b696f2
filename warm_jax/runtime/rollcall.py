"""Which process this is, of how many; and that all are there, with the same program, before JAX is started.

JAX's own start-up ends the process, with a stack trace, where another process is missing, and does not say which. So
the processes meet here first, at the port where JAX's coordinator will be: process 0 waits for the others, compares
what they are about to run, and tells all of them what is wrong. Nothing here needs JAX, but to ask what a TPU VM is of.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from warm_jax.runtime import door

PREFIX = "WARM_JAX_"
_MOST_TEXT = 20_000  # characters of what is wrong
_MOST_DIFFERENCES = 50
_RETRY_SECONDS = 0.3
_LATE_SECONDS = 10.0
_TPU_PORT = 8482


class Place(NamedTuple):
    """Process `process` of `processes`; process 0 is met at `coordinator`, HOST:PORT.

    `hosts` names the host of each process, where that is known; `local_device` the one device that this process uses,
    where several processes share a host.
    """

    coordinator: str
    processes: int
    process: int
    hosts: tuple[str, ...] = ()
    local_device: int | None = None


def find(environment: Mapping[str, str], coordinator: str = "", processes: int = 0, process: int = -1) -> Place | None:
    """The place that flags, WARM_JAX_COORDINATOR/_PROCESSES/_PROCESS, Slurm or TPU metadata give; None: one process.

    `processes` 1 is one process, whatever the environment says. ValueError where what is given is not whole.
    """
    coordinator = coordinator or environment.get(f"{PREFIX}COORDINATOR", "")
    processes = processes or _number(environment, f"{PREFIX}PROCESSES", 0)
    process = process if process >= 0 else _number(environment, f"{PREFIX}PROCESS", -1)
    if processes == 1:
        return None
    if coordinator or processes or process >= 0:
        return _checked(Place(coordinator, processes, process))
    return _slurm(environment) or _tpu(environment)


def _number(environment: Mapping[str, str], name: str, missing: int) -> int:
    text = environment.get(name, "")
    if text and not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name} is {text!r}; it must be a whole number")
    return int(text) if text else missing


def _checked(place: Place) -> Place:
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator is {place.coordinator!r}; give HOST:PORT of process 0, a port below 65536 (or {PREFIX}"
            "COORDINATOR), and with it --processes and --process"
        )
    if not 0 <= place.process < place.processes:
        raise ValueError(
            f"--process is {place.process} of --processes {place.processes}; give the number of all processes, and to "
            f"each its own from 0 (or {PREFIX}PROCESSES and {PREFIX}PROCESS)"
        )
    return place


def expand_hosts(text: str) -> tuple[str, ...]:
    """Slurm's short form as names: node[01-03,7],login -> node01, node02, node03, node7, login."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if not match:
            names.append(item)
            continue
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names += expand_hosts(f"{match[1]}{number:0{len(first)}d}{match[3]}")
    return tuple(names)


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of an srun step; a batch script or a shell in an allocation is none."""
    processes = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    nodes, job = environment.get("SLURM_STEP_NODELIST", ""), _number(environment, "SLURM_JOB_ID", 0)
    if processes == 1 or not nodes or "SLURM_PROCID" not in environment:
        return None
    names = expand_hosts(nodes)
    shared = processes > len(names)
    return Place(
        f"{names[0]}:{61440 + job % 4096}",  # jobs that share a host need ports of their own
        processes,
        _number(environment, "SLURM_PROCID", 0),
        () if shared else names,
        _number(environment, "SLURM_LOCALID", 0) if shared else None,
    )


def _tpu(environment: Mapping[str, str]) -> Place | None:
    """GKE names the hosts of a slice in the environment; of a TPU VM, and of several slices, JAX asks the metadata."""
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
    if slices == 1 and names:
        me = _number(environment, "TPU_WORKER_ID", 0)
        return Place(f"{names[0]}:{_TPU_PORT}", len(names), me, tuple(names)) if len(names) > 1 else None
    if (environment.get("JAX_PLATFORMS") or "tpu").split(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return None
    try:
        from jax._src import clusters  # no public way to ask without starting

        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    except Exception as error:  # no metadata server: a TPU that is not of a pod; or JAX cannot be imported
        print(f"warning: no TPU metadata ({error}); going on as one process", file=sys.stderr)
        return None
    coordinator, processes, process, _ = found
    return Place(coordinator, processes, process) if coordinator and (processes or 1) > 1 else None


# ── The meeting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def meet(place: Place, facts: Mapping[str, object], seconds: float) -> None:
    """Returns when all processes have come and have the same `facts`.

    TimeoutError, naming who is missing and what to run there, where that is not so within `seconds`; ValueError, in
    every process alike, where one has other facts.
    """
    facts = json.loads(json.dumps({"--processes": place.processes, **facts}, default=str))
    missing, wrong = (_call if place.process == 0 else _answer)(place, facts, seconds)
    if missing:
        raise TimeoutError(missing)
    if wrong:
        raise ValueError(wrong)


def address(place: Place) -> tuple[str, int]:
    """Host and port of process 0."""
    host, _, port = place.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _call(place: Place, mine: dict, seconds: float) -> tuple[str, str]:
    """Process 0: waits for the others, and tells each what is missing or wrong."""
    (host, port), until, secret = address(place), time.monotonic() + seconds, door.token(os.environ)
    if not secret and host not in door.LOOPBACK:
        print(
            f"note: {door.TOKEN} is not set: whoever reaches port {port} of this machine can take part in this job. "
            "Give all its processes the same secret, as from: openssl rand -hex 32",
            file=sys.stderr,
        )
    try:
        entrance = door.Door(host, port, secret)
    except OSError as error:
        why = error.strerror
        raise ValueError(f"process 0 cannot open port {port} ({why}); choose another with --coordinator") from error
    came: dict[int, dict] = {}
    visitors: dict[int, list[door.Visitor]] = {}
    wrong = ""
    with contextlib.closing(entrance):
        while len(came) < place.processes - 1 and (heard := entrance.heard(until)):
            visitor, said = heard
            number = said.get("process")
            if not _is_of_this_job(said, place):
                entrance.refuse(visitor)
                continue
            earlier = [other for other in visitors.get(number, []) if not other.gone()]  # the rest was started again
            visitors[number] = [*earlier, visitor]
            if earlier:
                hosts = f"on {door.shown(came[number]['host'])} and on {door.shown(said['host'])}"
                wrong = f"two processes say that they are process {number}: {hosts}; give each its own --process"
            came[number] = said
            wrong = wrong or _difference(mine, said)
            if wrong:  # the others should hear of it too, if they come soon
                until = min(until, time.monotonic() + _LATE_SECONDS)
        missing = "" if wrong else _who_is_missing(place, came, seconds)
        if missing and entrance.refused:
            missing += f". Who came last from {entrance.refused} was refused: is {door.TOKEN} the same there?"
        entrance.answer([one for several in visitors.values() for one in several], {"missing": missing, "wrong": wrong})
    return missing, wrong


def _is_of_this_job(said: dict, place: Place) -> bool:
    """Whether it says what a process of this job would say."""
    number, host, facts = (said.get(name) for name in ("process", "host", "facts"))
    return type(number) is int and 0 < number < place.processes and isinstance(host, str) and isinstance(facts, dict)


def _answer(place: Place, mine: dict, seconds: float) -> tuple[str, str]:
    """The others: go to process 0, say what they run, and hear what it says."""
    until, secret = time.monotonic() + seconds, door.token(os.environ)
    said = {"process": place.process, "host": socket.gethostname(), "facts": mine}
    reason = ""
    while time.monotonic() < until:
        try:
            # It may have begun to wait later than this one.
            answer = door.ask(address(place), secret, said, until, seconds + _LATE_SECONDS)
            return door.shown(answer["missing"], _MOST_TEXT), door.shown(answer["wrong"], _MOST_TEXT)
        except PermissionError:
            wrong = f"{door.TOKEN} {'is another one' if secret else 'is not set'} in process {place.process}"
            return "", f"{wrong}; give it the one of process 0 at {place.coordinator}"
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            time.sleep(_RETRY_SECONDS)
    host = f" ({place.hosts[0]})" if place.hosts else ""
    return (
        f"process {place.process} of {place.processes} found no process 0{host} at {place.coordinator} in "
        f"{seconds:g} s ({reason}); start it there with: {command_for(0)}",
        "",
    )


def _difference(mine: dict, said: dict) -> str:
    """What process `said` has other than process 0, for people."""
    theirs, nothing = said["facts"], "(not there)"
    differ = [
        f"{door.shown(key)} is {door.shown(repr(theirs.get(key, nothing)))} there and "
        f"{mine.get(key, nothing)!r} on process 0"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key, nothing) != theirs.get(key, nothing)
    ]
    if not differ:
        return ""
    differ = differ[:_MOST_DIFFERENCES] + (["…"] if len(differ) > _MOST_DIFFERENCES else [])
    return f"process {said['process']} on {door.shown(said['host'])} runs something else: {'; '.join(differ)}"


def _who_is_missing(place: Place, came: dict[int, dict], seconds: float) -> str:
    absent = [number for number in range(1, place.processes) if number not in came]
    if not absent:
        return ""
    names = [f"{number} ({place.hosts[number]})" if place.hosts else str(number) for number in absent]
    here = ", ".join(f"{number} on {door.shown(said['host'])}" for number, said in sorted(came.items())) or "none"
    commands = [command_for(number) for number in absent[:8]] + (["…"] if len(absent) > 8 else [])
    return (
        f"of {place.processes} processes {', '.join(names)} did not come to {place.coordinator} within {seconds:g} s "
        f"(came: 0 on {socket.gethostname()}, {here}). Run there: " + "  or  ".join(commands)
    )


def command_for(process: int) -> str:
    """The command line of this process, as process `process` would have it."""
    argv, named = [], False
    for argument in sys.argv[1:]:
        argv.append(str(process) if named else re.sub(r"^(--?process=).*", rf"\g<1>{process}", argument))
        named = argument in ("--process", "-process")
    before = f"{PREFIX}PROCESS={process} " if f"{PREFIX}PROCESS" in os.environ else ""
    return f"{before}python -m warm_jax {shlex.join(argv)}"
