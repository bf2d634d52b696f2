"""Scores of the EMA weights while they are trained: a few images, drawn by all devices, scored by process 0.

Training is the same bits with and without: weights are only read, and the images' noise comes from their own seeds.
The sampling loop and the features' network are compiled once. What goes wrong with a score ends no run.
"""

import numpy as np
from jaxtyping import PyTree

from warm_jax.evaluation import bits, evaluate, named_scores, reference, shards
from warm_jax.runtime import log, mesh, pod, workdirs
from warm_jax.sampling import batches, runs
from warm_jax.training import train


class Scorer:
    """Called with a step and EMA weights, as `train.train` does; the scores are named by their count, as in `fid1k`.

    Args:
      run: The training, whose config says what is scored: the `eval` section, of `train.evaluate_count` images.

    ValueError or OSError where that section, or its reference, does not fit.
    """

    def __init__(self, run: train.Run):
        exp = run.experiment
        config = exp.config.copy_and_resolve_references()
        config.eval.count = config.train.evaluate_count
        extractor = reference.load_extractor(config)
        evaluate.check(config, extractor)
        sampling = runs.Run(exp, run.workdir, -1)
        self._run = shards.Run(config, run.workdir, extractor, None, sampling, rounds=1, watch=False)
        if evaluate.is_file(config.eval.reference) and not config.eval.allow_other_data:
            found = reference.load(workdirs.local(config.eval.reference))
            expected = extractor.provenance(run.source.image_shape, run.source.fingerprint)
            expected.require_same(found.provenance)
        count, batch = config.eval.count, config.sample.batch_size
        self._seeds = np.arange(config.eval.first, config.eval.first + count)
        self._draw = batches.Sampler(exp, min(count, batch))
        self._against: reference.Reference | None = None

    def __call__(self, step: int, ema: PyTree) -> dict[str, float]:
        """The scores by name; empty in the processes that are not the first, and where scoring failed."""
        ema = mesh.whole(self._draw.mesh, ema)
        self._draw.compile(ema)
        pod.gather("scoring is compiled", "")
        found, label = {}, self._run.config.sample.class_label
        labels = np.full(len(self._seeds), -1 if label is None else label)
        try:
            images = [samples.images for _, samples in self._draw.stream(ema, self._seeds, labels)]
            if pod.index() == 0:
                found = self._scores(images)
        except (FloatingPointError, ValueError, OSError) as error:
            log.warn(f"step {step}: not scored ({error}); training goes on")
        pod.gather("scored", "")
        return found

    def _scores(self, images: list[np.ndarray]) -> dict[str, float]:
        if self._against is None:
            self._against = evaluate.find_reference(self._run)
        return named_scores.score_images(self._run, self._against, iter(images))


def prepare(run: train.Run) -> Scorer | None:
    """The scorer that `train.evaluate_every` asks for; None where that is 0. ValueError or OSError for bad input."""
    settings = run.experiment.config.train
    if not settings.evaluate_every:
        return None
    if run.experiment.config.sample.guide:
        raise ValueError("train.evaluate_every scores the model alone; unset sample.guide, or use --mode=evaluate")
    if bits.wanted(run.experiment.config):
        raise ValueError(
            f"train.evaluate_every scores samples; take {bits.wanted(run.experiment.config)[0]} out of eval.metrics, "
            "which --mode=evaluate --watch measures of each checkpoint"
        )
    try:
        return Scorer(run)
    except ValueError as error:
        asked = f"train.evaluate_every is {settings.evaluate_every}, of {settings.evaluate_count} images"
        raise ValueError(f"{asked}: {error}") from error
