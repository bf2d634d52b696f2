"""`warm_jax.main` with the stand-in network of tiny.py, which compiles in a second; for many processes at once."""

import tiny
from absl import app

from warm_jax import experiment, main

experiment._network = lambda config, shape, around, two: tiny.Linear(heads=around.heads)

if __name__ == "__main__":
    app.run(main.main, flags_parser=main.parse)
