"""The software and the devices of a process, for a run to remember and a report to show."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax

from warm_jax.runtime import workdirs

FILE = "environment.json"
_PACKAGES = ("warm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy")
_PACKAGES += ("scipy", "pillow", "matplotlib")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")  # which change what is computed, or how


def of_this_process() -> dict[str, str]:
    """Python, the machine's kind, the devices, the versions of packages and XLA's settings, all as text."""
    kinds = [device.device_kind for device in jax.devices()]
    found = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": ", ".join(
            f"{kinds.count(kind)} × {kind} ({jax.default_backend()})" for kind in dict.fromkeys(kinds)
        ),
    }
    if jax.process_count() > 1:
        found["processes"] = str(jax.process_count())
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def save(workdir: pathlib.Path, step: int) -> None:
    """Writes `environment.json`: what trains from `step` on."""
    began = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = {"trained from step": str(step), "begun": began} | of_this_process()
    workdirs.write_atomically(workdir / FILE, json.dumps(about, indent=2).encode() + b"\n")
