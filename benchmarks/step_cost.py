"""What blur, the second head, the sampler, logs and checkpoints cost, as ratios in one run.

    python benchmarks/step_cost.py            # some minutes on two CPU cores
    python benchmarks/step_cost.py --quick    # without what must be timed

FLOPs are XLA's own count of the program it is given (`Lowered.cost_analysis`, before XLA's optimisation, so that
nothing has to be compiled: at CIFAR-10 size that takes many minutes on a CPU). Times are medians of interleaved runs.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar10, fashion_mnist
from warm_jax.diffusion import sampler
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, log, mesh
from warm_jax.training import progress, step


def rows_of(exp):
    """Shapes of a training batch: images, labels."""
    batch = exp.config.train.batch_size
    images = jax.ShapeDtypeStruct((batch, *exp.process.image_shape), jnp.uint8)
    return images, jax.ShapeDtypeStruct((batch,), jnp.int32)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def step_flops(exp):
    return flops(step.make_step(exp), step.abstract_state(exp), step.zero_totals(), *rows_of(exp))


def forward_flops(exp):
    """One prediction of a training batch, with dropout as in training."""
    images, _ = rows_of(exp)
    x = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    params = jax.eval_shape(exp.model.init, jax.random.key(0))

    def forward(params, x, t):
        return exp.model.predict(params, x, t, dropout_key=jax.random.key(0))

    return flops(forward, params, x, jax.ShapeDtypeStruct(images.shape[:1], jnp.float32))


def cifar(system, **changes):
    config = cifar10.get_config(system)
    config.update_from_flattened_dict(changes)
    return experiment.build(config)


def interleaved(*functions, repeats):
    """Seconds that each takes, the median of `repeats` turns of all in a row."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]


def sampler_over_network():
    """Time of one evaluation inside the sampler's loop over that of the bare network, on a network of real width."""
    changes = {"model.channels": 64, "model.num_blocks": 2, "model.dtype": "float32", "data.augment": "none"}
    exp = cifar("warm", **changes)
    params = jax.jit(exp.model.init)(jax.random.key(0))
    x = 80 * jax.random.normal(jax.random.key(1), (8, *exp.process.image_shape))
    t, levels = jnp.full(8, 2.0), jnp.asarray(exp.process.levels(4), jnp.float32)

    def network(params, x, t):
        model = exp.model
        return model.network.apply({"params": params}, x, jnp.log(t) / 4, jnp.log1p(t) / 4)

    def sample(params, x, levels):
        predict = lambda x, t: exp.model.predict(params, x, t)  # noqa: E731
        return sampler.sample(predict, exp.process, x, levels, solver="heun")

    bare, whole = jax.jit(network), jax.jit(sample)
    nfe = int(whole(params, x, levels)[1].nfe)

    def calls():
        for _ in range(nfe):
            bare(params, x, t).block_until_ready()

    alone, inside = interleaved(calls, lambda: jax.block_until_ready(whole(params, x, levels)), repeats=9)
    return inside / alone, f"{nfe} evaluations: {inside:.2f} s in the loop, {alone:.2f} s bare; batch 8, 64 channels"


def logging_and_saving(exp, repeats=3):
    """Seconds that one report and one save hold the training loop up, with a state of the real size."""
    same = mesh.replicated(exp.mesh)
    state = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), same), step.abstract_state(exp))
    totals = step.zero_totals()
    with tempfile.TemporaryDirectory() as folder:
        metrics = log.Log(pathlib.Path(folder), 0)
        checkpoints = checkpoint.Checkpoints(pathlib.Path(folder) / "checkpoints", keep_last=2)
        reports, saves, waits = [], [], []
        for number in range(1, repeats + 1):
            started = time.perf_counter()
            row = progress.scalars(totals._replace(images=totals.images + 8)) | {"images_per_second": 1.0, "rate": 1.0}
            metrics.write(number, row)
            reports.append(time.perf_counter() - started)
            started = time.perf_counter()
            checkpoints.save(number, **step.to_store(state))
            saves.append(time.perf_counter() - started)
            checkpoints.wait()
            waits.append(time.perf_counter() - started)
        metrics.close()
        checkpoints.close()
    return statistics.median(reports), statistics.median(saves), statistics.median(waits)


def fashion_step_seconds(repeats=30):
    """Seconds of a training step of configs/fashion_mnist.py on this machine."""
    exp = experiment.build(fashion_mnist.get_config())
    compiled, state = step.compile_step(exp), step.init_state(exp)
    totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
    images, labels = (np.zeros(shape.shape, shape.dtype) for shape in rows_of(exp))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        state, totals, value = compiled(state, totals, images, labels)
        value.block_until_ready()
        times.append(time.perf_counter() - started)
    return exp, statistics.median(times)


def share(exp, seconds):
    """Share of the training time that reports and saves take, and how it came about.

    In full: as if nothing of a save could go on while the next steps run, which is so where there is no idle core.
    """
    report, save, wait = logging_and_saving(exp)
    settings = exp.config.train
    per_step = report / settings.log_every + wait / settings.checkpoint_every
    ratio = per_step / (seconds + per_step)
    return ratio, (
        f"step {seconds * 1e3:.0f} ms, report {report * 1e3:.1f} ms every {settings.log_every}, "
        f"save {wait * 1e3:.0f} ms every {settings.checkpoint_every} ({save * 1e3:.0f} ms before the loop goes on)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="FLOPs only")
    quick = parser.parse_args().quick
    table = []

    def add(name, ratio, limit, how):
        table.append((name, ratio, limit))
        print(f"{name:<44} {ratio:8.4f}  ≤ {limit:<5} {'yes' if ratio <= limit else 'NO ':<4} {how}", flush=True)

    print(f"on {mesh.describe(mesh.make_mesh())}")
    warm, hot = step_flops(cifar("warm")), step_flops(cifar("hot"))
    add("train step, warm / hot, FLOPs", warm / hot, 1.02, f"{warm / 1e12:.2f} / {hot / 1e12:.2f} TFLOP, batch 512")
    forward = forward_flops(cifar("warm"))
    add("train step / forward, FLOPs", warm / forward, 3.2, f"forward {forward / 1e12:.2f} TFLOP, no remat")
    if not quick:
        ratio, how = sampler_over_network()
        add("sampler evaluation / network call, time", ratio, 1.05, how)
        exp, seconds = fashion_step_seconds()
        ratio, how = share(exp, seconds)
        add("logs and checkpoints, fashion_mnist, time", ratio, 0.02, how)
        # A step of CIFAR-10 takes minutes here. On the 8 V100 of EDM's authors it takes 2 days / 390,625 = 0.44 s; an
        # accelerator ten times as fast as those eight still takes 44 ms. The costs of a report and a save are measured.
        ratio, how = share(cifar("warm"), 0.044)
        add("logs and checkpoints, cifar10, time", ratio, 0.02, f"estimate: {how}")
    return any(ratio > limit for _, ratio, limit in table)


if __name__ == "__main__":
    sys.exit(main())
