"""How fast a program can be at best: the longest of computing, moving memory, and sending (Williams et al. 2009)."""

from typing import NamedTuple

from warm_jax.accelerators.flops import Flops
from warm_jax.accelerators.topology import Target

ASSUMED = (
    "the makers' peak rates, dense bfloat16 with float32 sums; kernels reach a part of them",
    "each kernel reads its operands from main memory and writes its results there, once, and hides nothing else",
    "collectives use all links of a chip at their full rate, one way, and overlap nothing",
    "input, host and everything outside of the program cost nothing",
)


class Roofline(NamedTuple):
    """Seconds that one run takes at the least, by what; `ridge` and `intensity` in FLOP/byte.

    `seconds` is the longer of computing and memory traffic, as these overlap, and the collectives after them.
    """

    compute: float
    memory: float
    network: float
    intensity: float
    ridge: float

    @property
    def seconds(self) -> float:
        """A bound from below, not a promise."""
        return max(self.compute, self.memory) + self.network

    @property
    def limit(self) -> str:
        """What takes longest."""
        times = {"computing": self.compute, "memory traffic": self.memory, "collectives": self.network}
        return max(times, key=times.get)


def roofline(target: Target, flops: Flops, moved: float | int, sent: float | int) -> Roofline:
    """From what one chip has to do: `flops`, bytes `moved` in its memory and `sent` to others.

    Products at full float32 precision have a peak of their own: six bfloat16 passes on a TPU, no tensor cores on a GPU.
    ValueError where the chip's rates are not known.
    """
    chip = target.chip
    if not chip.bf16:
        raise ValueError(f"{chip.name} has no rates to reckon with")
    return Roofline(
        compute=flops.bfloat16 / chip.bf16 + flops.float32 / chip.f32,
        memory=moved / chip.bandwidth,
        network=sent / target.link if sent else 0.0,
        intensity=flops.total / moved if moved else 0.0,
        ridge=chip.bf16 / chip.bandwidth,
    )
