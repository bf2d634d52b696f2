"""What the facts mean, and what to do about it: pure functions from facts, or measurements, to findings.

Remedies are commands and settings that do what they say; what JAX needs of drivers and versions is from its own
installation page (docs.jax.dev/en/latest/installation.html) and from the checks in `jaxlib/plugin_support.py`.
"""

import re
from typing import NamedTuple

from warm_jax.doctor.facts import Facts, Folder
from warm_jax.runtime import door, jax_settings

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
GIB = 2**30
_LEAST_DISK, _LARGE_CACHE = GIB, 20 * GIB
_CUDA = {13: 580, 12: 525}  # the least driver for each


class Finding(NamedTuple):
    """One line of the table; `remedy` is what to do, empty where nothing is to be done."""

    status: str
    subject: str
    said: str
    remedy: str = ""


class Check(NamedTuple):
    """A measurement of the self-test: right where `least` ≤ value ≤ `most`; `error` where it could not be made."""

    subject: str
    said: str
    value: float
    least: float
    most: float
    seconds: float
    error: str = ""


def number(version: str) -> tuple[int, ...]:
    """A version as numbers to compare: 0.10.2.dev1 is (0, 10, 2)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"


def _cuda_for(facts: Facts) -> tuple[int, str]:
    """The CUDA that this driver and these GPUs take, 0 for none; and the command that brings JAX for it."""
    driver = min((number(gpu.driver)[:1] or (0,))[0] for gpu in facts.gpus)
    old = any(gpu.capability and number(gpu.capability) < (7, 5) for gpu in facts.gpus)  # CUDA 13 knows none before
    for cuda, least in _CUDA.items():
        if driver >= least and not (cuda == 13 and old):
            return cuda, f'pip install -U "jax[cuda{cuda}]"'
    return 0, f"update NVIDIA's driver {driver} to at least {_CUDA[12]}, better {_CUDA[13]}"


def _reinstall(facts: Facts) -> str:
    if facts.gpus:
        return _cuda_for(facts)[1]
    return 'pip install -U "jax[tpu]"' if facts.tpus else "pip install -U jax jaxlib"


def _software(facts: Facts) -> list[Finding]:
    found = []
    if number(facts.python) < (3, 11):
        found.append(Finding(PROBLEM, "python", f"{facts.python} is too old", "use Python 3.11 or newer"))
    else:
        found.append(Finding(OK, "python", f"{facts.python}, {facts.system}"))
    jax, jaxlib = (facts.versions.get(name, "") for name in ("jax", "jaxlib"))
    if not jax or not jaxlib:
        missing = " and ".join(name for name, version in (("jax", jax), ("jaxlib", jaxlib)) if not version)
        found.append(Finding(PROBLEM, "jax", f"{missing} is not installed", _reinstall(facts)))
    elif number(jaxlib) > number(jax):
        said = f"jaxlib {jaxlib} is newer than jax {jax}, which refuses it"
        found.append(Finding(PROBLEM, "jax", said, _reinstall(facts)))
    elif number(jaxlib) != number(jax):
        said = f"jax {jax} with the older jaxlib {jaxlib}"
        found.append(Finding(PROBLEM if facts.jax.error else NOTE, "jax", said, _reinstall(facts)))
    else:
        found.append(Finding(OK, "jax", f"{jax}, jaxlib {jaxlib}"))
    others = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if name not in ("jax", "jaxlib"))
    old = {n: least for n, least in facts.needs.items() if number(facts.versions.get(n, "0")) < number(least)}
    if old:
        said = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in old)
        wanted = " ".join(f"'{name}>={least}'" for name, least in old.items())
        found.append(Finding(PROBLEM, "packages", f"too old, or not there: {said}", f"pip install -U {wanted}"))
    else:
        found.append(Finding(OK, "packages", others))
    return found


def _plugins(facts: Facts) -> list[Finding]:
    """CUDA plug-ins are used only with the jaxlib of their own version; otherwise JAX passes them over."""
    jaxlib, found = facts.versions.get("jaxlib", ""), []
    cuda = {name: version for name, version in facts.plugins.items() if "cuda" in name}
    for name, version in facts.plugins.items():
        if name in cuda and number(version) != number(jaxlib):
            said = f"{name} {version} is of another version than jaxlib {jaxlib}, and JAX leaves it out"
            kind = re.search(r"cuda\d+", name)[0]
            found.append(Finding(PROBLEM, "plug-in", said, f'pip install -U "jax[{kind}]"'))
        else:
            found.append(Finding(OK, "plug-in", f"{name} {version}"))
    kinds = sorted({re.search(r"cuda\d+", name)[0] for name in cuda})
    if len(kinds) > 1:
        names = " ".join(name for name in cuda if kinds[0] in name)
        found.append(
            Finding(NOTE, "plug-in", f"there are plug-ins for {' and '.join(kinds)}", f"pip uninstall {names}")
        )
    return found


def _gpu_unseen(facts: Facts) -> Finding:
    """Why JAX does not see a GPU that NVIDIA's driver sees: the first of the reasons that are known to be."""
    names = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
    said = f"{len(facts.gpus)} × {names} (driver {facts.gpus[0].driver}), and JAX sees only the CPU"
    asked = facts.environment.get("JAX_PLATFORMS", "")
    if asked and not set(asked.split(",")) & {"cuda", "gpu"}:
        return Finding(NOTE, "accelerator", f"{said}: JAX_PLATFORMS is {asked}", "unset JAX_PLATFORMS")
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        said = f"{said}: CUDA_VISIBLE_DEVICES is {visible!r}"
        return Finding(PROBLEM, "accelerator", said, "unset CUDA_VISIBLE_DEVICES")
    cuda, install = _cuda_for(facts)
    own = [name for name in facts.plugins if "cuda" in name]
    if not own or not cuda:
        return Finding(PROBLEM, "accelerator", f"{said}: it has no CUDA plug-in" if not own else said, install)
    if all("cuda13" in name for name in own) and cuda == 12:
        said = f"{said}: CUDA 13 needs driver {_CUDA[13]} and GPUs of capability 7.5"
        return Finding(PROBLEM, "accelerator", said, f"pip uninstall {' '.join(own)}; {install}")
    if "LD_LIBRARY_PATH" in facts.environment:
        said = f"{said}: LD_LIBRARY_PATH may lead it to other CUDA libraries than its own"
        return Finding(PROBLEM, "accelerator", said, "unset LD_LIBRARY_PATH")
    return Finding(
        PROBLEM, "accelerator", said, f"{install}; and see what `python -c 'import jax; jax.devices()'` says"
    )


def _devices(facts: Facts) -> list[Finding]:
    if facts.jax.error:
        asked, remedy = facts.environment.get("JAX_PLATFORMS"), _reinstall(facts)
        if asked:
            remedy = f"unset JAX_PLATFORMS, which is {asked}; or {remedy}"
        return [Finding(PROBLEM, "devices", f"JAX does not start: {facts.jax.error}", remedy)]
    each = [f"{d.count} × {d.kind}" + (f", {_gib(d.memory)} each" if d.memory else "") for d in facts.jax.devices]
    found = [Finding(OK, "devices", f"{'; '.join(each)} ({facts.jax.platform})")]
    if facts.jax.platform != "cpu":
        return found
    if facts.gpus:
        return [*found, _gpu_unseen(facts)]
    if facts.tpus and facts.place:
        said = f"{facts.tpus} TPU chips of a slice of several hosts, which start together: not asked here"
        return [*found, Finding(NOTE, "accelerator", said)]
    asked = facts.environment.get("JAX_PLATFORMS", "")
    if facts.tpus and asked and "tpu" not in asked.split(","):
        said = f"{facts.tpus} TPU chips, and JAX_PLATFORMS is {asked}"
        return [*found, Finding(NOTE, "accelerator", said, "unset JAX_PLATFORMS")]
    if facts.tpus and "libtpu" not in facts.plugins:
        said = f"{facts.tpus} TPU chips, and JAX sees only the CPU: it has no libtpu"
        return [*found, Finding(PROBLEM, "accelerator", said, 'pip install -U "jax[tpu]"')]
    if facts.tpus:
        said = f"{facts.tpus} TPU chips, and JAX sees only the CPU; one process at a time can have them"
        return [*found, Finding(PROBLEM, "accelerator", said, "end the other process; JAX_PLATFORMS=tpu says more")]
    said = "none: small configs train here in minutes; what a large one needs of another machine, --mode=preflight says"
    return [*found, Finding(NOTE, "accelerator", said)]


def shown(facts: Facts) -> dict[str, str]:
    """The variables that may be shown to others: those that name no hosts of a cluster."""
    return {name: value for name, value in facts.environment.items() if not name.startswith(("SLURM_", "TPU_"))}


def _settings(facts: Facts) -> list[Finding]:
    found = []
    precision = facts.jax.precision or "default"
    said = f"{precision}: the DCT and the preconditioning ask for float32 themselves, whatever this is"
    found.append(Finding(OK if precision == "default" else NOTE, "matmul precision", said))
    for name, value in facts.environment.items():
        if what := jax_settings.meaning(name):
            said = f"{name}={value} is not used, here or in other modes: with it {what}"
            found.append(Finding(NOTE, "setting", said, f"unset {name}"))
    said = ", ".join(f"{name}={value}" for name, value in shown(facts).items())
    if said:
        found.append(Finding(OK, "environment", said))
    if facts.place_error:
        found.append(Finding(PROBLEM, "processes", facts.place_error, "give all three, or none for one process"))
    else:
        found.append(Finding(OK, "processes", facts.place or "one: no coordinator in the environment"))
    if facts.place and door.TOKEN not in facts.environment:
        said = f"{door.TOKEN} is not set: whoever reaches the coordinator's port can take part in the job"
        found.append(Finding(NOTE, "token", said, "give all processes the same, as from: openssl rand -hex 32"))
    return found


def _room(folder: Folder, subject: str, elsewhere: str) -> Finding:
    said = f"{folder.path}: {_gib(folder.free)} free of {_gib(folder.total)}"
    if not folder.writable:
        return Finding(PROBLEM, subject, f"{folder.path} cannot be written", elsewhere)
    if folder.total and folder.free < _LEAST_DISK:
        return Finding(PROBLEM, subject, said, f"make room, or {elsewhere}")
    return Finding(OK, subject, said)


def _host(facts: Facts) -> list[Finding]:
    memory = f"{_gib(facts.memory)} of memory, {_gib(facts.memory_free)} free" if facts.memory else "memory not known"
    found = [Finding(OK, "host", f"{facts.cores} core{'s' if facts.cores > 1 else ''}, {memory}")]
    if facts.memory and facts.memory_free < GIB:
        found.append(
            Finding(NOTE, "memory", f"{_gib(facts.memory_free)} free: compiling takes that much", "end others")
        )
    found.append(_room(facts.here, "disk here", "give a --workdir elsewhere"))
    cache = _room(facts.cache, "compiled programs", "JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere")
    if cache.status == OK:
        cache = cache._replace(said=f"{facts.cache.path}: {_gib(facts.cache.size)}")
        if facts.cache.size > _LARGE_CACHE:
            cache = cache._replace(status=NOTE, remedy=f"rm -r {facts.cache.path} makes room; they are compiled again")
    return [*found, cache]


def _extras(facts: Facts) -> list[Finding]:
    there = f"TensorFlow {facts.tensorflow}" if facts.tensorflow else "no TensorFlow"
    found = [Finding(OK, "tensorflow", f"{there}: only preparing TFDS data sets needs it")]
    if facts.missing:
        said = f"not installed: {', '.join(facts.missing)}; as pip install '.[{facts.missing[0]}]' in the repository"
        return [*found, Finding(OK, "extras", said)]
    return [*found, Finding(OK, "extras", "all installed")]


def judge(facts: Facts) -> list[Finding]:
    """What is right and wrong with a machine, in the order of the table."""
    parts = (_software, _plugins, _devices, _host, _settings, _extras)
    return [finding for part in parts for finding in part(facts)]


def of_checkpoints(size: int, count: int, here: Folder, snapshot: int = 0, snapshots: int = 0) -> Finding:
    """Whether there is room for `count` checkpoints of so many bytes, as they are at most on disk at one time.

    And beside them for `snapshots` of `snapshot` bytes, all kept.
    """
    more = f", and {snapshots} snapshots of {_gib(snapshot)}" if snapshots else ""
    said = f"{_gib(size)} each, {count} at one time{more}; {_gib(here.free)} free in {here.path}"
    if here.total and here.free < size * count + snapshot * snapshots:
        return Finding(PROBLEM, "checkpoints", said, "make room, or give a --workdir elsewhere")
    return Finding(OK, "checkpoints", said)


def of_check(check: Check, facts: Facts) -> Finding:
    """What a measurement of the self-test means on this machine."""
    remedy = _reinstall(facts)
    suspect = [name for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if facts.environment.get(name)]
    if facts.environment.get("NVIDIA_TF32_OVERRIDE", "0") != "0":  # it lowers what asks for float32
        suspect.append("NVIDIA_TF32_OVERRIDE")
    if suspect:
        remedy = f"unset {' '.join(suspect)}; or {remedy}"
    if check.error:
        return Finding(PROBLEM, check.subject, f"failed: {check.error}", remedy)
    right = check.least <= check.value <= check.most  # also refuses nan
    said = f"{check.said} ({check.seconds:.1f} s)"
    return Finding(OK, check.subject, said) if right else Finding(PROBLEM, check.subject, said, remedy)
