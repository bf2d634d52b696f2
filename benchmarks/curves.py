"""Training curves on the bundled images by precision: the same seeds, batches and noise in each.

    python benchmarks/curves.py                              # 3 precisions × 3 seeds × 2,000 steps, minutes
    python benchmarks/curves.py --seeds=0 --out=seed0.json   # a part of it
    python benchmarks/curves.py --table seed*.json           # the table of parts

The precisions are `layers.policy` of GPUs and of TPUs, computed here on CPUs, where XLA may keep no more digits than
the program says. The score is the loss of the averaged weights on images that were held out, with the same noise each
time and in float32 whatever the training was; per pixel, both heads together.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from configs import fashion_mnist
from warm_jax.data import sources
from warm_jax.diffusion import loss
from warm_jax.experiments import experiment
from warm_jax.runtime import host, mesh, pictures
from warm_jax.training import step

REFERENCE = ("float32", "tpu")  # autodiff's norms, which read twice
PRECISIONS = {"float32": REFERENCE, "bfloat16 of GPUs": ("bfloat16", "gpu"), "bfloat16 of TPUs": ("bfloat16", "tpu")}
HELD_OUT = 1000  # of the bundled 10,000


def config(channels=8, steps=2000, **changes):
    """`configs/fashion_mnist.py` with another width and length."""
    made = fashion_mnist.get_config()
    made.update_from_flattened_dict({"model.channels": channels, "train.steps": steps, **changes})
    return made


def computed(exp, precision):
    """The experiment with its network computed as `layers.policy(*precision)` says."""
    dtype, platform = precision
    made, network = exp.config.copy_and_resolve_references(), exp.model.network
    made.model.dtype = dtype
    network = network.clone(dtype=jnp.dtype(dtype), platform=platform)
    return dataclasses.replace(exp, config=made, model=dataclasses.replace(exp.model, network=network))


def objective(exp, params, images, labels, key, train):
    """The training loss of bytes `images`, as the train step has it; with `train` augmented and with dropout."""
    data_key, draw_key, dropout_key = jax.random.split(key, 3)
    if train:
        x0, given = step.clean_batch(exp.config, data_key, images, labels)
    else:
        x0 = pictures.from_uint8(images)
        given = step.Given(jax.nn.one_hot(labels, exp.config.data.num_classes), None)
    example, around = loss.draw(exp.process, draw_key, x0), exp.model.preconditioning

    def predict(x, t):
        return exp.model.predict(params, x, t, *given, dropout_key=dropout_key if train else None)

    return loss.two_head(predict, example, around.weight, exp.config.train.residual_weight, around.errors)[0]


def scorer(exp, images, labels):
    """A function of weights: the float32 loss a pixel of held-out images, with noise that is always the same."""
    exact = computed(exp, REFERENCE)
    pixels = int(np.prod(exp.process.image_shape))

    @jax.jit
    def score(params):
        parts = [
            objective(exact, params, images[i : i + 250], labels[i : i + 250], jax.random.key(i), train=False)
            for i in range(0, len(images), 250)
        ]
        return sum(parts) / len(parts) / pixels

    return score


def curve(exp, seed, steps, every):
    """{steps done: score} of a training from `seed`."""
    made = exp.config.copy_and_resolve_references()
    made.seed = seed
    exp = dataclasses.replace(exp, config=made)
    source = sources.open_source("bundled")
    images, labels = source.read(np.arange(len(source)))
    labels = labels.astype(np.int32)
    score = scorer(exp, images[-HELD_OUT:], labels[-HELD_OUT:])
    rng, size = np.random.default_rng(seed), exp.config.train.batch_size
    compiled, state = step.compile_step(exp), step.init_state(exp)
    totals, where = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh)), mesh.split(exp.mesh)
    scores = {}
    for number in range(1, steps + 1):
        rows = rng.choice(len(source) - HELD_OUT, size, replace=False)
        state, totals, value = compiled(state, totals, *jax.device_put((images[rows], labels[rows]), where))
        if number % every == 0:
            scores[number] = float(score(state.ema))
            print(f"  seed {seed}, step {number}: {scores[number]:.5f} (training {float(value):.1f})", flush=True)
    return scores


def table(rows):
    """Markdown: of each precision the mean score over the seeds; and what it differs from float32's, seed by seed."""
    steps = sorted({int(number) for row in rows for number in row["scores"]})
    names = [name for name in PRECISIONS if any(row["precision"] == name for row in rows)]
    by = {(row["precision"], row["seed"]): {int(n): v for n, v in row["scores"].items()} for row in rows}
    seeds = sorted({seed for _, seed in by})
    lines = ["| | " + " | ".join(f"step {n:,}" for n in steps) + " |", "|---|" + "---:|" * len(steps)]
    for name in names:
        columns = [[by[name, seed][n] for seed in seeds if (name, seed) in by] for n in steps]
        cells = [f"{np.mean(c):.5f} ± {np.std(c, ddof=1) if len(c) > 1 else 0:.5f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names[1:]:
        pairs = [seed for seed in seeds if (name, seed) in by and (names[0], seed) in by]
        cells = [", ".join(f"{by[name, s][n] / by[names[0], s][n] - 1:+.2%}" for s in pairs) for n in steps]
        lines.append(f"| {name} less {names[0]}, each seed | {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen(parser, text, known):
    """The names in `text`, separated by commas; ends with status 2 where one is not known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is not known; choose some of {','.join(known)}")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--out", default="curves.json")
    parser.add_argument("--table", nargs="*", help="only the table of these files")
    asked = parser.parse_args()
    if asked.table:
        print(table([row for path in asked.table for row in json.loads(pathlib.Path(path).read_text("utf-8"))]))
        return
    precisions = chosen(parser, asked.precisions, PRECISIONS)
    made = config(asked.channels, asked.steps)
    host.share_cores(made.train.batch_size)
    host.keep_programs()
    exp, rows = experiment.for_training(experiment.build(made)), []
    print(f"on {mesh.describe(exp.mesh)}; {asked.channels} channels, batch {made.train.batch_size}")
    for name in precisions:
        for seed in map(int, asked.seeds.split(",")):
            started = time.perf_counter()
            print(f"{name}:", flush=True)
            scores = curve(computed(exp, PRECISIONS[name]), seed, asked.steps, max(1, asked.steps // 4))
            print(f"  {time.perf_counter() - started:.0f} s", flush=True)
            rows.append({"precision": name, "seed": seed, "scores": scores})
            pathlib.Path(asked.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
