"""Settings of JAX that the environment, or a script, may bring, and what becomes of them.

The same seeds give the same images and a run that is resumed gives the same bits: that holds only under the settings
that the program was written for. On the command line the variables of `PINNED` and `OF_THE_COMPILER` are therefore not
used, and a note says so. In a script the settings of `PINNED` are put right for the time of each call of
`warm_jax.load`, `sample`, `fit` and `score`. Other variables of JAX, of platforms, devices, caches, logs and checks,
change no number and are left as they are; those of XLA (`XLA_FLAGS`) and of NVIDIA's libraries are not known here.
"""

import contextlib
import sys
from collections.abc import Iterator, MutableMapping

# Setting, the value that the program needs, and what another one would do. Names are those of jax.config; the variable
# of the environment is the same in capitals.
PINNED: dict[str, tuple[object, str]] = {
    "jax_enable_x64": (False, "some things would become float64"),
    "jax_explicit_x64_dtypes": ("warn", "it would end where a float64 is asked for"),
    "jax_numpy_dtype_promotion": ("standard", "it would end where two dtypes meet"),
    "jax_numpy_rank_promotion": ("allow", "it would end where two ranks meet"),
    "jax_default_prng_impl": ("threefry2x32", "seeds would give other images"),
    "jax_threefry_partitionable": (True, "seeds would give other images, by the number of devices"),
    "jax_enable_custom_prng": (False, "keys would be others"),
    "jax_legacy_prng_key": ("allow", "libraries that use such keys would end"),
    "jax_random_seed_offset": (0, "seeds would give other images"),
    "jax_high_dynamic_range_gumbel": (False, "seeds would give other classes"),
    "jax_default_matmul_precision": (None, "the network would be of another precision than model.dtype says"),
    "jax_disable_jit": (False, "nothing would be compiled, to other bits, and very slow"),
    "jax_debug_nans": (False, "each step would wait for the host; training itself says where a loss is not finite"),
    "jax_debug_infs": (False, "it would end at an infinity that is meant"),
    "jax_transfer_guard": (None, "it would end where arrays come from the host"),
    "jax_transfer_guard_device_to_host": (None, "it would end where arrays go to the host"),
    "jax_transfer_guard_host_to_device": (None, "it would end where arrays come from the host"),
    "jax_transfer_guard_device_to_device": (None, "it would end where arrays change devices"),
    "jax_disable_most_optimizations": (False, "other bits, and very slow"),
}
# How JAX and its compiler go about it: with other values the last bits differ. What is best is for the version to say,
# so that nothing is set; only the environment does not change it.
OF_THE_COMPILER = (
    *("jax_optimization_level", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort"),
    *("jax_memory_fitting_level", "jax_compiler_enable_remat_pass", "jax_allow_f16_reductions"),
    *("jax_softmax_custom_jvp", "jax_use_direct_linearize", "jax_custom_vjp3", "jax_remat3", "jax_scan3"),
    *(
        "jax_use_shardy_partitioner",
        "jax_use_simplified_jaxpr_constants",
        "jax_use_magma",
        "jax_error_checking_behavior_nan",
    ),
    *("jax_error_checking_behavior_divide", "jax_error_checking_behavior_oob", "jax_no_tracing", "jax_no_execution"),
    *("jax_threefry_gpu_kernel_lowering", "eager_constant_folding"),
)


def meaning(variable: str) -> str:
    """What a variable of the environment would do; empty for one that is not known, or does nothing."""
    name = variable.lower()
    if name in PINNED:
        return PINNED[name][1]
    return "the compiler would work otherwise, to other bits" if name in OF_THE_COMPILER else ""


def take_out(environment: MutableMapping[str, str]) -> None:
    """Removes from `environment` what would change what the program does, and says so on stderr.

    To be called before JAX is imported, which reads it then; processes that this one starts do not see it either.
    """
    for variable in sorted(environment):
        if said := meaning(variable):
            value = environment.pop(variable)
            print(f"note: {variable}={value} is not used: with it {said}", file=sys.stderr)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within, the settings of `PINNED` have the values that the program needs; also a decorator.

    ValueError, naming it, where one cannot be set, as within `jax.enable_x64(True)`.
    """
    import jax

    before = {}
    try:
        for name, (needed, said) in PINNED.items():
            now = jax.config.values.get(name, needed)  # not every version has all
            if _same(now, needed):
                continue
            jax.config.update(name, needed)
            if not _same(jax.config.values[name], needed):  # a context manager of this thread is stronger
                raise ValueError(f"{name} is {now} here, and with it {said}; leave it as JAX has it")
            before[name] = now
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _same(value: object, needed: object) -> bool:
    """Whether a setting has the value; JAX has some as an enumeration."""
    return needed in (value, getattr(value, "value", value), getattr(value, "name", str(value)).lower())
