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
step = jax.jit(lambda x: 2 * x)
x = jnp.ones((4096, 4096))
for _ in range(5):
    step(x).block_until_ready()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_freed_memory_stays():
    """An array of 64 MB is made and freed: 16,384 pages of 4 KB, each a fault where they are mapped anew."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "True" and int(said[1]) < 1000


def test_accelerators_are_left_alone(monkeypatch):
    """Their hosts decode in many threads, for which one arena would be too few."""
    monkeypatch.setattr(host, "plugins", lambda: {"libtpu": "0.0.40"})
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        assert host.keep_memory() is False
    finally:
        jax.config.update("jax_platforms", before)
