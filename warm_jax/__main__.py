"""`python -m warm_jax`: the same as `python -m warm_jax.main`."""

from absl import app

from warm_jax import main
from warm_jax.cli import flags

app.run(main.main, flags_parser=flags.parse)
