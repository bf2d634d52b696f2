"""How fast training is, also as a share of what its chips can do (MFU), and a trace of some of its steps."""

import dataclasses
import pathlib

import jax

from warm_jax.accelerators import flops, topology
from warm_jax.experiments import experiment
from warm_jax.runtime import log
from warm_jax.training import step

TRACED_STEPS, _FIRST = 10, 5  # after the first steps, which wait for input and allocate


@dataclasses.dataclass(frozen=True)
class Speed:
    """What steps are measured by.

    Attributes:
      images: In a step.
      devices: That share it.
      flops: Of the convolutions and products of a step, all devices together, as traced (`accelerators.flops`).
      peak: FLOP/s of a device, by its maker; 0 where it is not known, as of a CPU.
    """

    images: int
    devices: int
    flops: float
    peak: float

    def row(self, steps: int, seconds: float) -> dict[str, float]:
        """Images a second, of all devices and of each, and the model FLOPs utilisation, of `steps` in `seconds`."""
        rate = steps / seconds
        found = {
            "images_per_second": rate * self.images,
            "images_per_second_per_device": rate * self.images / self.devices,
        }
        return found | ({"mfu": rate * self.flops / (self.devices * self.peak)} if self.peak else {})


def of_step(exp: experiment.Experiment, traced: jax.stages.Traced) -> Speed:
    """The speed of a traced train step. What `model.remat` computes again is no model's FLOPs, and not counted."""
    if exp.config.model.remat:
        network = exp.model.network.clone(remat=())
        traced = step.trace_step(dataclasses.replace(exp, model=dataclasses.replace(exp.model, network=network)))
    total, kind = flops.count(traced.jaxpr).total, exp.mesh.devices.flat[0].device_kind
    return Speed(exp.config.train.batch_size, exp.mesh.size, total, topology.peak(kind))


class Profile:
    """A trace of `TRACED_STEPS` steps of process 0, for TensorBoard and XProf; of none where `folder` is None."""

    def __init__(self, folder: pathlib.Path | None, start: int):
        self._folder = folder if jax.process_index() == 0 else None
        self._first, self._on = start + _FIRST, False

    def after(self, number: int) -> None:
        """Begins or ends the trace, where step `number` is the one for it."""
        if self._folder is None:
            return
        if number == self._first and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif number == self._first + TRACED_STEPS:
            self.close()

    def close(self) -> None:
        """Ends the trace, should one be running."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            log.say(
                f"a trace is in {self._folder}: tensorboard --logdir={self._folder}, with tensorboard-plugin-profile"
            )
