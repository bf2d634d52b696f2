"""Everything that `fashion_mnist.py` does, in seconds: for tests, and to see whether an installation works.

    python -m warm_jax --config=smoke

Its samples look like nothing: the network is tiny and hardly trained.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config(system: str = "warm") -> ConfigDict:
    """`system` as in `fashion_mnist.py`."""
    config = fashion_mnist.get_config(system)
    config.model.channels = 8
    config.model.num_blocks = 1
    config.model.channel_mult = (1, 1)
    config.model.patch_size = 7
    config.model.attention = ()
    config.train.batch_size = 16
    config.train.steps = 20
    config.train.warmup_images = 64
    config.train.ema_halflife_images = 64.0
    config.train.posthoc_every = 2
    config.train.log_every = 5
    config.train.sample_every = 10
    config.train.checkpoint_every = 5
    config.sample.steps = 4
    if system == "ihdm":
        config.process.steps = 4
    config.sample.batch_size = 16
    config.eval.count = 100
    config.eval.metrics = ("fd", "lsd")
    config.compare.steps = 4
    config.compare.repeats = 2
    config.analysis.bnrs = (0.0, 0.5)
    config.analysis.images = 200
    config.analysis.oracle_images = 50
    config.analysis.steps = (4,)
    config.analysis.sweep_steps = (3, 4)
    config.analysis.solver_bnrs = (0.5,)
    config.analysis.solver_nfe = (4,)
    config.analysis.guidance_weights = (1.0, 2.0)
    config.analysis.samples = 20
    config.analysis.count = 8
    config.analysis.repeats = 2
    return config
