"""This machine's cores and memory, and JAX's cache of compiled programs."""

import ctypes
import importlib.metadata
import os
import re

CPU_BATCH = 32  # of a config that leaves it to the machine: 1, 2, 4 and 8 devices divide it
_MALLOC = ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20))  # glibc's M_ARENA_MAX, M_MMAP_MAX, M_TRIM_, M_TOP_PAD
_PLUGINS = re.compile(r"jax-(cuda\d+|rocm\d+)-(plugin|pjrt)|libtpu|jax-metal")
CACHE = "~/.cache/warm_jax/xla"  # of compiled programs, where JAX is not told of another


def keep_programs() -> None:
    """Compiled programs are kept for the next process, in JAX_COMPILATION_CACHE_DIR or in `CACHE`."""
    import jax  # here, for a doctor looks also where JAX cannot be imported

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE))


def share_cores(batch: int | None, accumulation: int | None = 1, fsdp: int = 1, processes: int = 1) -> None:
    """On a CPU, as many devices as cores (at most 8) that divide a batch; accelerators are not touched.

    XLA runs most operations of a small network on one core. Devices that share the batch keep the others busy: 1.4
    times the speed on two cores. `XLA_FLAGS=--xla_force_host_platform_device_count=N` overrides it. RuntimeError where
    JAX has looked at its devices already.

    Args:
      batch: `train.batch_size`; None: what is chosen for a CPU.
      accumulation: `train.accumulation`; None as 1.
      fsdp: `mesh.fsdp`, which all devices of all processes should be a multiple of.
      processes: How many share the batch.
    """
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parts = max(1, accumulation or 1) * processes
    fitting = [n for n in range(1, cores + 1) if (batch or CPU_BATCH) % (n * parts) == 0]
    whole = [n for n in fitting if n * processes % max(1, fsdp) == 0]
    jax.config.update("jax_num_cpu_devices", max(whole or fitting, default=1))


def plugins() -> dict[str, str]:
    """Versions of the installed packages that bring an accelerator to JAX, by name."""
    names = {str(one.metadata["Name"]): one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(names.items()) if _PLUGINS.fullmatch(name.replace("_", "-"))}


def keep_memory() -> bool:
    """Where JAX has only the CPU, memory that is freed stays with the process; whether that was done.

    Else glibc gives XLA's temporaries back to the system and asks for them again at each step: 22,000 page faults in
    one of configs/fashion_mnist.py, a tenth of its time. To be called before JAX looks at its devices, whose threads
    would have arenas of their own. Of the whole process, so it is the command line's to call, not the library's;
    nothing is done where the C library is not glibc.
    """
    import jax

    if jax.config.jax_platforms != "cpu" and plugins():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(option, value) for option, value in _MALLOC])
