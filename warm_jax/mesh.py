"""Devices: the mesh, and how arrays lie on it. Nothing else in the project names a device."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXIS = "data"


def make_mesh(count: int | None = None, *, local: bool = False) -> Mesh:
    """A mesh with one axis, over which batches are split, of all devices of all processes, or the first `count`.

    With `local` those of this process only.
    """
    return over((jax.local_devices() if local else jax.devices())[:count])


def over(devices: list) -> Mesh:
    """The mesh of these devices, which need not be here: those of a topology can be compiled for."""
    # Auto on purpose: shardings are given at the borders of a step, and the compiler finds the rest.
    return jax.make_mesh((len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on each device: parameters."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices: batches."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def describe(mesh: Mesh) -> str:
    """For people: "8 × TPU v5e (2 processes)"."""
    kind = mesh.devices.flat[0].device_kind
    processes = f" ({jax.process_count()} processes)" if jax.process_count() > 1 else ""
    return f"{mesh.size} × {kind}{processes}"
