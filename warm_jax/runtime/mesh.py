"""Devices: the mesh, and how arrays lie on it. Nothing else in the project names a device."""

import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

BATCH_AXIS, PARAMETER_AXIS = "data", "fsdp"
LEAST_TO_DIVIDE = 1024  # numbers; of what is smaller each device has a copy, which costs less than fetching it


def make_mesh(count: int | None = None, *, local: bool = False, fsdp: int = 1) -> Mesh:
    """The mesh of all devices of all processes, or the first `count`; with `local` of this process's devices only."""
    devices = jax.local_devices() if local else jax.devices()
    # By process: so the rows of a batch are, in order, those that the processes read, on any number of them.
    return over(sorted(devices, key=lambda device: (device.process_index, device.id))[:count], fsdp)


def check_divides(fsdp: int, devices: int) -> None:
    """Raises ValueError, with the choices, where groups of `fsdp` do not make up the devices."""
    if fsdp < 1 or devices % fsdp:
        fitting = [n for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(
            f"mesh.fsdp is {fsdp}, which does not divide {devices} device(s); use one of {', '.join(map(str, fitting))}"
        )


def over(devices: list, fsdp: int = 1) -> Mesh:
    """A mesh of two axes, of devices that need not be here; batches are split over both.

    Parameters are divided over groups of `fsdp` devices that lie next to each other. ValueError where `fsdp` does not
    divide the devices.
    """
    check_divides(fsdp, len(devices))
    # Auto on purpose: shardings are given at the borders of a step, and the compiler finds the rest.
    grid = np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, (BATCH_AXIS, PARAMETER_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on each device: sums, and parameters unless they are divided."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices: batches."""
    return NamedSharding(mesh, PartitionSpec((BATCH_AXIS, PARAMETER_AXIS)))


def divided(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter of `shape`, or what the optimiser keeps of it: its longest axis that `fsdp` divides, divided.

    Replicated where there is none, or less than LEAST_TO_DIVIDE numbers.
    """
    parts = mesh.shape[PARAMETER_AXIS]
    fitting = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or not fitting or math.prod(shape) < LEAST_TO_DIVIDE:
        return replicated(mesh)
    longest = max(fitting, key=lambda axis: (shape[axis], axis))  # of equals the last: channels out
    return NamedSharding(
        mesh, PartitionSpec(*(PARAMETER_AXIS if axis == longest else None for axis in range(len(shape))))
    )


def place(mesh: Mesh, shapes: PyTree) -> PyTree:
    """The shardings of a tree of parameters, or of a whole state: `divided` for each."""
    return jax.tree.map(lambda x: divided(mesh, x.shape), shapes)


def whole(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of divided arrays as replicated ones; as it is where nothing is divided. All processes must ask."""
    if mesh.shape[PARAMETER_AXIS] == 1:
        return tree
    return _gathered(replicated(mesh))(tree)


def part(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of replicated arrays as it is on the devices of `mesh`, some of those that it is on. Nothing is copied."""
    here = set(mesh.devices.flat)

    def of(x: jax.Array) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards if shard.device in here]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), shards)

    return jax.tree.map(of, tree)


@functools.cache
def _gathered(where: NamedSharding):
    return jax.jit(lambda tree: tree, out_shardings=where)


def describe(mesh: Mesh) -> str:
    """For people: "8 × TPU v5e (2 processes)"."""
    kind = mesh.devices.flat[0].device_kind
    processes = f" ({jax.process_count()} processes)" if jax.process_count() > 1 else ""
    fsdp = mesh.shape[PARAMETER_AXIS]
    return f"{mesh.size} × {kind}{processes}" + (f", parameters divided over {fsdp}" if fsdp > 1 else "")
