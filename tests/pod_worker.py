"""`warm_jax.main` with the stand-in network of tiny.py, which compiles in a second; for many processes at once."""

from warm_jax.runtime import preemption

if __name__ == "__main__":
    preemption.listen()

import os

import jaxtyping

jaxtyping.install_import_hook("warm_jax", "beartype.beartype")  # as in conftest.py

import tiny  # noqa: E402

from warm_jax import main  # noqa: E402
from warm_jax.experiments import experiment  # noqa: E402
from warm_jax.runtime import peers  # noqa: E402

peers.HUNG_SECONDS = float(os.environ.get("HUNG_SECONDS", peers.HUNG_SECONDS))

experiment._network = lambda config, shape, around, two: tiny.Linear(heads=around.heads)

if __name__ == "__main__":
    main.run()
