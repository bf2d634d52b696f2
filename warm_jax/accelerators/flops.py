"""The FLOPs of a traced program that are convolutions and matrix products: the model's FLOPs.

Two a multiply-add, products with the zeros of a border included, everything else left out. Counted of the whole
program, before it is divided over devices and before a compiler changed anything.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Flops(NamedTuple):
    """By the precision of the products: at full float32, and in bfloat16 (or whatever the backend thinks fast)."""

    bfloat16: float = 0.0
    float32: float = 0.0

    @property
    def total(self) -> float:
        """Of both precisions."""
        return self.bfloat16 + self.float32

    def times(self, factor: float | int) -> "Flops":
        """Both multiplied."""
        return Flops(self.bfloat16 * factor, self.float32 * factor)

    def plus(self, other: "Flops") -> "Flops":
        """The sums."""
        return Flops(self.bfloat16 + other.bfloat16, self.float32 + other.float32)


def _is_full(eqn: JaxprEqn) -> bool:
    wanted = eqn.params["precision"]
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    wide = any(v.aval.dtype in (jnp.float32, jnp.float64) for v in eqn.invars)
    return wide and all(one == jax.lax.Precision.HIGHEST for one in wanted)


def _dot(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)


def _conv(eqn: JaxprEqn) -> float:
    """Each output is a sum over the kernel's window and its input channels; zeros between inputs are no work."""
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    window = math.prod(kernel[i] for i in spec[1:])
    return 2 * math.prod(eqn.outvars[0].aval.shape) * window / math.prod(eqn.params["lhs_dilation"])


def _inner(value: object) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [jaxpr for one in value for jaxpr in _inner(one)] if isinstance(value, tuple | list) else []


def count(jaxpr: Jaxpr | ClosedJaxpr) -> Flops:
    """FLOPs of one run. A scan's body counts as often as it runs, a `while`'s once, of branches the dearest."""
    total = Flops()
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            own = float(_dot(eqn) if name == "dot_general" else _conv(eqn))
            total = total.plus(Flops(float32=own) if _is_full(eqn) else Flops(bfloat16=own))
            continue
        inside = [count(one) for value in eqn.params.values() for one in _inner(value)]
        if name == "cond" and inside:
            inside = [max(inside, key=lambda f: f.total)]
        times = eqn.params["length"] if name == "scan" else 1
        for one in inside:
            total = total.plus(one.times(times))
    return total
