"""The parts of accelerator.py, each in a process of its own: rows for its tables, as they are found.

    python benchmarks/accelerator_parts.py PART FILE.jsonl SECONDS [--smoke]

A row is a dict for one of two tables: `check` (measured, expected, good), or `program` (what `rates` gives). What fails
within a part is a row with `failed`, and what there is no time for one with `skipped`; then the next thing is tried.
"""

import collections
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import curves
import gradients
import jax
import numpy as np
import sampling

from configs import cifar10, fashion_mnist, ffhq64
from warm_jax.accelerators import flops, hlo, roofline, topology
from warm_jax.experiments import experiment
from warm_jax.preflight import table
from warm_jax.runtime import host, mesh
from warm_jax.sampling import batches
from warm_jax.training import step, throughput

# Images a device. From few to many: memory seen is the most since the process began.
TRAINED = {"cifar10": (64, 128, 256, 512), "ffhq64": (32, 64, 128)}
SAMPLED = {"cifar10": (64, 256, 1024)}
_CONFIGS = {"cifar10": cifar10, "ffhq64": ffhq64}
_WARM, _TIMED, _AHEAD = 3, 3.0, 2  # steps before the clock starts; seconds of steps that are timed; steps queued


class Answer:
    """Where rows go, and the time that is left."""

    def __init__(self, path, seconds):
        self._path, self._until = pathlib.Path(path), time.monotonic() + seconds

    def add(self, **row):
        """Keeps a row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def left(self):
        """Seconds."""
        return self._until - time.monotonic()

    def attempt(self, names, needs, measure):
        """Adds `names` and what `measure` returns; where it fails the reason, and "skipped" without `needs` seconds.

        Returns the seconds that it took.
        """
        started = time.monotonic()
        if self.left() < needs:
            self.add(**names, skipped=f"{max(0, self.left()):.0f} s left, about {needs:.0f} needed")
            return needs
        try:
            self.add(**names, **measure())
        except Exception as error:  # whatever a backend raises: of memory, of a kernel, of its compiler
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.add(**names, failed=f"{type(error).__name__}: {' '.join(lines[:1])[:200]}")
        return time.monotonic() - started


def small(config):
    """The same recipe with a network that a CPU runs."""
    config.model.update({"channels": 8, "channel_mult": (1,), "num_blocks": 1, "patch_size": 4})
    config.sample.steps = 4
    return config


def load(name, smoke):
    made = _CONFIGS[name].get_config()
    return small(made) if smoke else made


def seen():
    """The most bytes of a device that were in use so far; None where the backend does not say."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((one["peak_bytes_in_use"] for one in told if "peak_bytes_in_use" in one), default=None)


def bound(compiled, traced, devices):
    """{bound: milliseconds at least, limit, foretold: bytes}, reckoned as `--mode=preflight` does."""
    found = {"foretold": table.memory(compiled.memory_analysis())["total"]}
    target = topology.here(devices[0].device_kind, len(devices))
    if target is not None:
        moved = hlo.traffic(compiled.as_text(), len(devices))
        sent = sum(one.sent for one in moved.collectives)
        line = roofline.roofline(target, flops.count(traced.jaxpr).times(1 / len(devices)), moved.memory, sent)
        found |= {"bound": 1e3 * line.seconds, "limit": line.limit}
    return found


def timed(run, wait, seconds, least=3):
    """Seconds a call of `run`, which queues work, at most `_AHEAD` calls of it; `wait` waits for what a call gave."""
    queued = collections.deque()

    def call():
        queued.append(run())
        if len(queued) > _AHEAD:
            wait(queued.popleft())

    def drain():
        while queued:
            wait(queued.popleft())

    for _ in range(_WARM):
        call()
    drain()
    calls, started = 0, time.perf_counter()
    while calls < least or time.perf_counter() - started < seconds:
        call()
        calls += 1
    drain()
    return (time.perf_counter() - started) / calls


# ── The parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def devices(answer, smoke, out):
    """What is here; a dict that accelerator.py reads."""
    found = jax.local_devices()
    platform, kind = found[0].platform, found[0].device_kind
    if platform == "gpu":
        platform = "rocm" if "rocm" in found[0].client.platform_version.lower() else "cuda"
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    answer.add(
        platform=platform, kind=kind, count=len(found), memory=memory, known=topology.kind_of(kind), jax=jax.__version__
    )


def exactness(answer, smoke, out):
    """Gradients and samples of a small network on one device against the CPU's, in one process."""
    here, cpu = jax.local_devices()[0], jax.devices("cpu")[-1]
    config = curves.config(channels=8 if smoke else 32)
    if smoke:
        config.model.update({"channel_mult": (1,), "patch_size": 4})
    config.sample.update({"steps": 4 if smoke else 18, "batch_size": 16})
    exp = experiment.build(config)
    params = gradients.redrawn(exp)
    images, labels = gradients.batch(exp, 16)

    def gradient(device, precision):
        placed = jax.device_put((params, images, labels), device)
        return jax.device_get(gradients.gradients(exp, precision, *placed))

    exact = gradient(cpu, curves.REFERENCE)
    own = "gpu" if here.platform == "gpu" else here.platform
    for dtype, most in (("float32", 1e-4), ("bfloat16", 0.1)):

        def compared(dtype=dtype, most=most):
            cosine, error, least, name, *_ = gradients.compare(exact, gradient(here, (dtype, own)))
            said = (
                f"relative error {error:.1e}, 1 - cosine {1 - cosine:.1e}, of the worst layer {1 - least:.1e} ({name})"
            )
            return {"measured": said, "expected": f"error ≤ {most:g}", "good": bool(error <= most)}

        answer.attempt({"check": f"gradients, {dtype}, against the CPU's float32"}, 5, compared)

    def samples():
        drawn = []
        for device in (here, cpu):
            draw = batches.Sampler(experiment.on(exp, mesh.over([device])))
            weights = jax.device_put(params, mesh.replicated(draw.mesh))
            drawn.append(draw(weights, np.arange(16)))
        one, other = drawn
        difference = np.abs(one.images.astype(int) - other.images)
        said = f"largest difference {difference.max()} of 255, {np.mean(difference > 0):.2%} of the values differ"
        good = difference.max() <= 2 and np.mean(difference > 0) <= 0.01 and (one.labels == other.labels).all()
        return {"measured": said, "expected": "≤ 2, ≤ 1 %, the same classes", "good": bool(good)}

    answer.attempt({"check": f"16 samples, {config.sample.steps} steps, float32, against the CPU's"}, 10, samples)


def train(answer, smoke, out, name):
    """Steps of a config at several batches: images/s, MFU, the bound, memory; of the first a trace."""
    found, spent = jax.local_devices(), 0.0
    for number, each in enumerate((2, 4) if smoke else TRAINED[name]):

        def measure(each=each, number=number):
            config = load(name, smoke)
            config.train.batch_size = each * len(found)
            exp = experiment.for_training(experiment.build(config))
            started = time.perf_counter()
            traced = step.trace_step(exp)
            compiled = traced.lower().compile()
            compile_seconds = time.perf_counter() - started
            state = step.init_state(exp)
            totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
            rng = np.random.default_rng(0)
            images = rng.integers(0, 256, (each * len(found), *exp.process.image_shape), np.uint8)
            placed = jax.device_put((images, np.zeros(len(images), np.int32)), mesh.split(exp.mesh))

            def one():
                nonlocal state, totals
                state, totals, value = compiled(state, totals, *placed)
                return value

            seconds = timed(one, jax.block_until_ready, 0.5 if smoke else _TIMED)
            if number == 0:
                jax.profiler.start_trace(str(out / f"trace_{name}"))
                timed(one, jax.block_until_ready, 0.0)
                jax.profiler.stop_trace()
            return rates(throughput.of_step(exp, traced), seconds, compile_seconds, bound(compiled, traced, found))

        spent = answer.attempt({"program": f"train step, {name}", "images_per_device": each}, 1.3 * spent, measure)


def rates(measure, seconds, compile_seconds, reckoned):
    """The row of a program that takes `seconds`."""
    told = measure.row(1, seconds)
    row = {
        "compile_seconds": compile_seconds,
        "milliseconds": 1e3 * seconds,
        "images_per_second": told["images_per_second"],
        "mfu": told.get("mfu"),
        "seen": seen(),
        **reckoned,
    }
    return row | ({"of_bound": reckoned["bound"] / row["milliseconds"]} if "bound" in reckoned else {})


def sample(answer, smoke, out):
    """The sampling loop of a config at several batches, and what the whole `--mode=sample` reaches of it."""
    spent = 0.0
    for each in (2, 4) if smoke else SAMPLED["cifar10"]:

        def measure(each=each):
            exp = experiment.build(load("cifar10", smoke))
            draw = batches.Sampler(exp, each * exp.mesh.size)
            weights = jax.device_put(gradients.redrawn(exp), mesh.replicated(exp.mesh))
            draw.compile(weights)
            traced = draw.trace(weights)
            compiled = traced.lower().compile()  # from the cache: for its text
            seeds = np.arange(draw.batch_size)
            seconds = timed(lambda: draw.begin(weights, seeds).drawn, jax.block_until_ready, 0.5 if smoke else _TIMED)
            kind = exp.mesh.devices.flat[0].device_kind
            work = throughput.Speed(
                draw.batch_size, exp.mesh.size, flops.count(traced.jaxpr).total, topology.peak(kind)
            )
            reckoned = bound(compiled, traced, list(exp.mesh.devices.flat))
            return rates(work, seconds, draw.compile_seconds, reckoned)

        spent = answer.attempt({"program": "sampling loop, cifar10", "images_per_device": each}, 1.3 * spent, measure)

    for name, config, images in (
        ("cifar10", load("cifar10", smoke), 32 if smoke else 2048),
        ("fashion_mnist", fashion_mnist.get_config(), 32 if smoke else 8192),
    ):

        def command(config=config, images=images):
            if smoke:
                config.sample.update({"steps": 4, "batch_size": 16})
            loop, whole, ratio = sampling.summary(sampling.measure(config, images, 1 if smoke else 3))
            said = f"{whole:,.1f} of the loop's {loop:,.1f} images/s: {ratio:.3f}"
            return {"measured": said, "expected": "≥ 0.95", "good": None if smoke else bool(ratio >= 0.95)}

        answer.attempt({"check": f"--mode=sample, {name}, {images} images"}, 2 * spent, command)


PARTS = {
    "devices": devices,
    "exactness": exactness,
    "train cifar10": lambda *given: train(*given, "cifar10"),
    "train ffhq64": lambda *given: train(*given, "ffhq64"),
    "sample": sample,
}


def main():
    part, path, seconds, *rest = sys.argv[1:]
    host.keep_programs()
    answer = Answer(path, float(seconds))
    PARTS[part](answer, "--smoke" in rest, pathlib.Path(path).parent)
    answer.add(ended=part)


if __name__ == "__main__":
    main()
