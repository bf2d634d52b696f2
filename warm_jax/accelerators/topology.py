"""Accelerators that need not be here: what a chip can do, and which arrangements of chips there are.

The numbers are the makers' peaks: TPUs from the tables of Cloud TPU's documentation (cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e), GPUs from NVIDIA's data sheets of A100, H100 and H200 (SXM). A program reaches a part of them.
"""

import dataclasses
import math
import re
from typing import NamedTuple

GIB = 2**30
PRETENDED_CPU, SMALLEST, MOST = "cpu", "smallest", 256


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      name: For people.
      platform: What JAX calls it.
      memory: Bytes of its main memory that a program can have; None where there is no such limit.
      usable: Share of `memory` that JAX takes by itself.
      bf16: Peak FLOP/s of dense bfloat16 products, summed in float32.
      f32: Peak FLOP/s of products at full float32 precision: on a TPU six bfloat16 passes, on a GPU no TF32.
      bandwidth: Bytes/s of its main memory.
      link: Bytes/s out of a chip to the others, over all its links, one way.
      network: The same between hosts, where that is another wire; 0 where it is not.
    """

    name: str
    platform: str
    memory: int | None = None
    usable: float = 1.0
    bf16: float = 0.0
    f32: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0


def _tpu(name: str, gib: int, tera: int, bandwidth: int, gigabits: int) -> Chip:
    return Chip(name, "tpu", gib * GIB, 1.0, tera * 1e12, tera * 1e12 / 6, bandwidth * 1e9, gigabits * 1e9 / 8)


def _gpu(name: str, memory: int, tera: int, f32: float, bandwidth: int, link: int, network: int) -> Chip:
    # JAX sets 75 % of a GPU's memory aside by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
    return Chip(name, "gpu", memory, 0.75, tera * 1e12, f32 * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9)


_TPUS = {  # HBM in GiB, bfloat16 TFLOP/s, HBM GB/s, interconnect Gbit/s
    "v4": _tpu("TPU v4", 32, 275, 1200, 2400),
    "v5e": _tpu("TPU v5e", 16, 197, 819, 1600),
    "v5p": _tpu("TPU v5p", 95, 459, 2765, 4800),
    "v6e": _tpu("TPU v6e", 32, 918, 1600, 3200),
}
_GPUS = {  # bytes, bfloat16 and float32 TFLOP/s, memory GB/s, NVLink GB/s one way, network GB/s a GPU (one NIC each)
    "a100": _gpu("A100 SXM 80 GB", 84_987_740_160, 312, 19.5, 2039, 300, 25),
    "a100-40gb": _gpu("A100 SXM 40 GB", 42_297_786_368, 312, 19.5, 1555, 300, 25),
    "h100": _gpu("H100 SXM 80 GB", 84_978_434_048, 989, 67.0, 3352, 450, 50),
    "h200": _gpu("H200 SXM 141 GB", 150_754_820_096, 989, 67.0, 4800, 450, 50),
}
_KINDS = {  # how JAX names them
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "A100": "a100", "H100": "h100", "H200": "h200",
}  # fmt: skip
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES[:-1], "4x4x12", "4x8x8"), "v6e": _FLAT}  # up to 256 chips
_HOST = 8  # GPUs


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for; `text` is how the command line names them, `shape` how they are arranged."""

    text: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def link(self) -> float:
        """Bytes/s out of a chip, by the slowest wire that a collective over all chips must cross."""
        crosses = self.chip.platform == "gpu" and self.devices > _HOST
        return self.chip.network if crosses else self.chip.link

    @property
    def file_name(self) -> str:
        """`text`, fit for a file's name."""
        return self.text.replace(":", "-")


def kind_of(device_kind: str) -> str:
    """The name here (v5e, h100) of the device that JAX calls `device_kind`; empty where it is not known."""
    words = [] if re.search(r"PCIe|NVL|MIG", device_kind, re.IGNORECASE) else re.split(r"[ -]", device_kind)
    return _KINDS.get(device_kind) or next((_KINDS[word] for word in words if word in _KINDS), "")


def peak(device_kind: str) -> float:
    """FLOP/s of bfloat16 products of the device that JAX calls `device_kind`, by its maker; 0 where it is not known."""
    name = kind_of(device_kind)
    return {**_TPUS, **_GPUS}[name].bf16 if name else 0.0


def names() -> list[str]:
    """The chips whose rates are known."""
    return [chip.name for chip in (*_TPUS.values(), *_GPUS.values())]


def here(device_kind: str, count: int) -> Target | None:
    """`count` devices of one host that JAX calls `device_kind`, all linked; None where that kind is not known."""
    name = kind_of(device_kind)
    return Target(f"{name} x {count}", name, {**_TPUS, **_GPUS}[name], (count,)) if name else None


def _there_is() -> str:
    tpus = "; ".join(f"{kind}: {', '.join(sizes)} or {SMALLEST}" for kind, sizes in SLICES.items())
    return f"there are {tpus}; gpu:KINDxN, KIND one of {', '.join(_GPUS)}, N from 1 to 8 or a multiple of 8; cpu:N"


def _gpu_target(text: str, size: str) -> Target:
    match = re.fullmatch(r"(.+)x(\d+)", size)
    if not match or match[1] not in _GPUS:
        raise ValueError(f"--topology={text} is not known; {_there_is()}")
    kind, count = match[1], int(match[2])
    if not 1 <= count <= MOST or (count > _HOST and count % _HOST):
        raise ValueError(f"--topology={text}: {count} GPUs; give 1 to {_HOST}, or a multiple of {_HOST} up to {MOST}")
    return Target(text, kind, _GPUS[kind], (count,) if count <= _HOST else (count // _HOST, _HOST))


def parse(text: str) -> list[Target]:
    """Text such as v5e:4x4, gpu:h100x8 or cpu:8 as a target; of v5e:smallest, all slices from the smallest up.

    ValueError, with the list of what there is, for anything else.
    """
    kind, _, size = text.partition(":")
    if kind == PRETENDED_CPU and size.isdecimal() and 1 <= int(size) <= MOST:
        return [Target(text, kind, Chip("pretended CPU device", "cpu"), (int(size),))]
    if kind == "gpu":
        return [_gpu_target(text, size)]
    if kind not in SLICES or size not in (SMALLEST, *SLICES[kind]):
        raise ValueError(f"--topology={text} is not known; {_there_is()}")
    wanted = SLICES[kind] if size == SMALLEST else (size,)
    return [Target(f"{kind}:{one}", kind, _TPUS[kind], tuple(map(int, one.split("x")))) for one in wanted]


# ── How to compile for them ──────────────────────────────────────────────────────────────────────────────────────────

# XLA asks for a description of the GPU (GpuTargetConfigProto, in text form), as a real one would give of itself.
_GPU_DESCRIPTION = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""
_AMPERE = {"shared": 167936, "optin": 166912, "cores": 108, "fpus": 64, "l2": 41943040, "clock": 1.41, "major": 8}
_HOPPER = {"shared": 233472, "optin": 232448, "cores": 132, "fpus": 128, "l2": 52428800, "clock": 1.98, "major": 9}


def environment(target: Target, xla_flags: str) -> dict[str, str]:
    """Variables for a process that compiles for `target`: its default device is the CPU, and no plug-in looks about.

    `xla_flags` are those of this process; a number of pretended devices among them is not for that one.
    """
    xla_flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", xla_flags)
    if target.chip.platform == "gpu":
        # Without a device to try kernels on, Triton's are tiled blindly, and XLA refuses some; cuBLAS has no tiles.
        xla_flags = f"--xla_gpu_enable_triton_gemm=false {xla_flags}"
    return {
        "XLA_FLAGS": xla_flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two of these at once; a chip that is here is not touched
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_NUM_CPU_DEVICES": str(target.devices if target.kind == PRETENDED_CPU else 1),
    }


def devices(target: Target) -> list:
    """JAX's devices of `target`: they can be compiled for, and run nothing. In a process with `environment`."""
    import jax
    from jax.experimental import topologies

    if target.kind == PRETENDED_CPU:
        return jax.devices()
    if target.chip.platform == "gpu":
        hosts, each = (1, *target.shape)[-2:]
        described = _GPU_DESCRIPTION.format(
            **(_AMPERE if target.kind.startswith("a100") else _HOPPER),
            name=f"NVIDIA {target.chip.name}",
            memory=int(target.chip.memory),
            bandwidth=int(target.chip.bandwidth),
        )
        found = topologies.get_topology_desc(
            platform="cuda", target_config=described, topology=f"1x{hosts}x{each}"
        ).devices
    else:
        options = {}
        if target.shape == (1, 1):
            options["chips_per_host_bounds"] = [1, 1, 1]
        if target.kind in ("v4", "v5p"):
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as JAX has it there
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.text, **options).devices
    return list(found)
