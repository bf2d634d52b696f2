"""All systems beside each other on the bundled images, in less than an hour on two CPU cores.

    python -m warm_jax --config=compare --mode=compare

Fashion-MNIST at 28×28, class-conditional, a network of 267,000 parameters that sees 14×14 patches of 2×2 pixels, 1,000
steps of 32 images for each system, 1,000 samples a score. The systems with many steps of their own are sampled in
50, IHDM in its 100.
Hot and warm are trained from three seeds each, the others from one. It is an experiment to see the code of all systems
work side by side, far too small to rank them. Other data: any config with a `compare` section, as configs/cifar10.py.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    config = fashion_mnist.get_config(system)
    config.model.channels = 16
    config.model.channel_mult = (2, 2)
    config.train.steps = 1_000
    config.train.sample_every = 0  # no pictures on the way
    config.sample.batch_size = 100
    if system != "ihdm":
        config.sample.steps = min(config.sample.steps, 50)
    config.eval.metrics = ("fd", "kid", "lsd")
    config.eval.count = 1_000
    return config
