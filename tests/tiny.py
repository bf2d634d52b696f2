"""A stand-in network that compiles in a second, and experiments and runs made with it.

It is linear in its parameters, none of which is zero, and hears everything that a U-Net is told.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from configs import smoke
from warm_jax.experiments import experiment
from warm_jax.runtime import mesh


class Linear(nn.Module):
    """F = gain · x + level · c + blur · c' + class, with a gain a pixel and head."""

    heads: int = 2
    classes: int = 10
    platform: str = "cpu"  # as the networks have

    @nn.compact
    def __call__(self, x, condition, second=None, class_labels=None, augment_labels=None, train=False):
        normal = nn.initializers.normal(0.3)
        gain = self.param("gain", normal, (*x.shape[1:3], self.heads))
        raw = gain * x + self.param("level", normal, (self.heads,)) * condition[:, None, None, None]
        if second is not None:
            raw = raw + self.param("blur", normal, (self.heads,)) * second[:, None, None, None]
        kernel = self.param("class", normal, (self.classes, self.heads))
        return raw if class_labels is None else raw + (class_labels @ kernel)[:, None, None]


def config(system="warm", **changes):
    """`configs/smoke.py` with changes, as train__steps=5."""
    made = smoke.get_config(system)
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return made


def with_network(made, network):
    """The experiment, or what has one or a run, with another network."""
    if hasattr(made, "run"):
        return dataclasses.replace(made, run=with_network(made.run, network))
    if hasattr(made, "experiment"):
        return dataclasses.replace(made, experiment=with_network(made.experiment, network))
    return dataclasses.replace(made, model=dataclasses.replace(made.model, network=network))


def build(network=None, devices=None, **changes):
    """An experiment with a stand-in network, on the first `devices` devices."""
    exp = experiment.build(config(**changes))
    exp = with_network(exp, network or Linear(heads=exp.model.preconditioning.heads))
    return on_devices(exp, devices)


def on_devices(made, devices):
    """The experiment, or what has one or a run, on the first `devices` devices."""
    if hasattr(made, "run"):
        return dataclasses.replace(made, run=on_devices(made.run, devices))
    if hasattr(made, "experiment"):
        return dataclasses.replace(made, experiment=on_devices(made.experiment, devices))
    return made if devices is None else dataclasses.replace(made, mesh=mesh.make_mesh(devices))


def born(model, key=None):
    """The parameters of a Denoiser, by a program that is compiled in a fifth of the time: its numbers are the same."""
    import jax

    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    return init(jax.random.key(0) if key is None else key)


def randomised(params, rng, size=0.2):
    """`params` with every leaf drawn anew, so that no layer is silent: a U-Net's output starts at zero."""
    import jax

    return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * size, p.dtype), params)
