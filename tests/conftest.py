"""Shapes in signatures are checked here, and dtype promotion is strict: silent widening is a bug on an accelerator."""

import functools
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jaxtyping
import pytest

# What several tests compile is compiled once. The folder goes when the process ends.
_CACHE = tempfile.TemporaryDirectory(prefix="warm_jax_tests_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

jaxtyping.install_import_hook("warm_jax", "beartype.beartype")


@pytest.fixture
def key():
    """A PRNG key that is the same in every run."""
    return jax.random.key(0)


def _compile_quickly(patch):
    quick = functools.partialmethod(jax.stages.Lowered.compile, {"xla_backend_optimization_level": 0})
    patch.setattr(jax.stages.Lowered, "compile", quick)


@pytest.fixture
def quick_compile(monkeypatch):
    """Programs that compile ahead of time do so in half of the time, to slower code."""
    _compile_quickly(monkeypatch)


@pytest.fixture(scope="module")
def module_compiles_quickly():
    """The same for what is made once for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        _compile_quickly(patch)
        yield
