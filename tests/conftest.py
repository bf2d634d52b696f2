"""Shapes in signatures are checked here, and dtype promotion is strict: silent widening is a bug on an accelerator."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("warm_jax", "beartype.beartype")


@pytest.fixture
def key():
    """A PRNG key that is the same in every run."""
    return jax.random.key(0)
