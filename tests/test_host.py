"""What is set of this machine before a program runs."""

import subprocess
import sys

import jax
import pytest

from warm_jax.runtime import host

FAULTS = """
import resource
import jax, jax.numpy as jnp
from warm_jax.runtime import host
jax.config.update("jax_platforms", "cpu")
kept = host.keep_memory()
step = jax.jit(lambda x: jnp.sort(jnp.sin(x) @ jnp.cos(x)).sum())
x = jnp.ones((1024, 1024))
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_freed_memory_stays():
    """The temporaries of one step are 12 MB: 3,000 pages of 4 KB, each a fault where they are mapped anew."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "True" and int(said[1]) < 500


def test_accelerators_are_left_alone(monkeypatch):
    """Their hosts decode in many threads, for which one arena would be too few."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert host.keep_memory() is False
