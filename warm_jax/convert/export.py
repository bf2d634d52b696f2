"""The program of `--mode=export`: a checkpoint as files that outlive this package; and back into a workdir.

    weights.safetensors  model.json   the model, for `bundle.load`, without Orbax
    sampler.stablehlo                 the whole sampler as one program, by `jax.export`: seeds in, images out
    sample.py                         draws PNGs or npz with jax, flatbuffers, numpy and safetensors alone
    README.md                         a model card

The program takes the weights as arguments, in the order of their names, so it is small and the numbers are stored once.
Its batch is a symbol: any number of seeds. An image is the same function of its seed as in `--mode=sample`.
"""

import dataclasses
import json
import pathlib
import shlex

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax.convert import bundle, model_card, sample_script
from warm_jax.convert.from_edm import save_workdir
from warm_jax.experiments import experiment, family, posthoc_ema
from warm_jax.runtime import log, workdirs
from warm_jax.sampling import batches, runs
from warm_jax.weights import tensors

SCRIPT, CARD = "sample.py", "README.md"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `export` needs."""

    source: runs.Run
    out: pathlib.Path
    platforms: tuple[str, ...]


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    out: str,
    step: int,
    platforms: tuple[str, ...],
    ema: float | None = None,
) -> Run:
    """Checks everything that can be checked. ValueError or OSError for bad input. `out`: empty, WORKDIR/export.

    `ema` is the σ_rel of an EMA that `experiments/posthoc_ema.py` makes; None: the plain one.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise ValueError(f"--platforms={','.join(platforms)}: choose some of {', '.join(PLATFORMS)}")
    bundle.check_flatbuffers()
    bundle.check_system(config)
    if config.sample.guide:
        raise ValueError(
            "sample.guide is set: an export has one model's weights; unset it, or sample with --mode=sample"
        )
    target = pathlib.Path(out) if out else workdir / "export"
    if target.is_file():
        raise ValueError(f"--out={out} is a file; an export is a folder")
    source = runs.open_run(config, workdir, step, ema)
    _check_free(target)
    workdirs.check_writable(target)
    return Run(source, target, platforms)


def _check_free(out: pathlib.Path) -> None:
    """Raises ValueError where a file would be replaced that no export wrote.

    The card comes last and `model.json` just before it, so what an export that was cut off left has neither.
    """
    if (out / bundle.MODEL).exists():
        return
    script, weights = out / SCRIPT, out / bundle.WEIGHTS
    foreign = [out / CARD] if (out / CARD).exists() else []
    if script.exists() and not script.read_bytes().startswith(b'"""Draws images '):
        foreign.append(script)
    if weights.exists() and not tensors.read_metadata(weights).get("format", "").startswith("warm_jax "):
        foreign.append(weights)
    if foreign:
        raise ValueError(f"{foreign[0]} is there and was not made by --mode=export; name another --out")


def program(exp: experiment.Experiment, platforms: tuple[str, ...]) -> jax_export.Exported:
    """The sampler (weights as a list in the order of their names, seeds[, labels]) -> uint8 images, batch a symbol.

    Seeds are uint32 `[b]`; labels, of a model with classes, int32 `[b]`, -1: the seed draws its class.
    """
    drawing = batches.Sampler(exp, batch_size=exp.mesh.size)
    shapes = bundle.flatten_shapes(exp)
    (count,) = jax_export.symbolic_shape("b")
    seeds, labels = (jax.ShapeDtypeStruct((count,), dtype) for dtype in (jnp.uint32, jnp.int32))

    def draw(weights: list[jax.Array], seeds: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        tree = bundle.unflatten(dict(zip(shapes, weights, strict=True)))
        labels = jnp.full(seeds.shape, -1, jnp.int32) if labels is None else labels
        return drawing.draw(tree, seeds, labels, jnp.asarray(drawing.levels))[0]

    given = (list(shapes.values()), seeds, *([labels] if exp.config.data.num_classes else []))
    return jax_export.export(jax.jit(draw), platforms=platforms)(*given)


def write(
    out: pathlib.Path,
    exp: experiment.Experiment,
    params: PyTree[np.ndarray | jax.Array],
    measured: family.Measured | None,
    facts: dict[str, object],
    platforms: tuple[str, ...],
) -> dict:
    """Writes all files but the card, and returns what `model.json` says; `facts` of the weights go in as they are."""
    classes = exp.config.data.num_classes
    sampler = out / bundle.SAMPLER
    workdirs.write_atomically(sampler, bytes(program(exp, platforms).serialize()))
    workdirs.write_atomically(out / SCRIPT, sample_script.TEXT.encode())
    arguments = ["weights", "seeds uint32 [b]", *(["labels int32 [b]"] if classes else [])]
    about = {"file": bundle.SAMPLER, "sha256": tensors.sha256(sampler), "platforms": list(platforms)}
    return bundle.save(out, exp, params, measured, facts | {"sampler": about | {"arguments": arguments}})


def export(run: Run) -> int:
    """Writes all files. Returns the exit status."""
    source, out = run.source, run.out
    step, params = runs.load_ema(source)
    log.say(f"checkpoint of step {step}; writing the sampler for {', '.join(run.platforms)}")
    origin, begun = (workdirs.load_note(source.workdir, name) for name in (workdirs.ORIGIN, workdirs.BEGUN))
    licence = next((note["licence"] for note in (origin, begun) if note and "licence" in note), None)
    facts = {"checkpoint_step": step, "origin": origin, "begun_from": begun, "licence": licence}
    if source.ema is not None:
        facts["ema"] = posthoc_ema.plan(source.workdir, step, source.ema).note()
    stored = workdirs.load_measured(source.workdir)
    measured = None if stored is None else family.Measured(**stored)
    about = write(out, source.experiment, jax.device_get(params), measured, facts, run.platforms)
    workdirs.write_atomically(out / CARD, model_card.text(about, source.workdir).encode())
    log.say(f"{out}: {about['weights']['parameters']:,} parameters; README.md says what and how. To draw images there:")
    log.say(f"    python {shlex.quote(str(out / SCRIPT))} --seeds=0-15 --out={shlex.quote(str(out / 'samples.png'))}")
    return 0


# ── Back ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Import:
    """What `prepare_import` checked and `import_export` writes."""

    model: bundle.Bundle
    workdir: pathlib.Path


def prepare_import(folder: str, workdir: str) -> Import:
    """Reads and checks an export. ValueError or OSError for bad input. `workdir`: empty, `runs/` and its name."""
    model = bundle.load(folder)
    target = pathlib.Path(workdir or pathlib.Path("runs") / pathlib.Path(folder).absolute().name)
    workdirs.check_new(target)
    return Import(model, target)


def import_export(run: Import) -> int:
    """Makes a workdir of an export, to sample, score and begin from. Returns the exit status."""
    model, workdir = run.model, run.workdir
    about = model.about
    origin = {"source": "an export", "sha256": about["weights"]["sha256"], "begun_from": about["begun_from"]}
    origin |= about["origin"] or {}
    if about["licence"]:
        origin["licence"] = about["licence"]
    workdirs.write_atomically(workdir / workdirs.ORIGIN, json.dumps(origin, indent=2).encode() + b"\n")
    if model.measured is not None:
        arrays = {name: array for name, array in model.measured._asdict().items() if array is not None}
        workdirs.save_measured({name: np.asarray(array) for name, array in arrays.items()}, workdir)
    save_workdir(model.experiment, model.params, workdir)
    log.say(f"{workdir}: the model of {about['process']['system']}; sample, or score it:")
    for mode in ("sample", "evaluate"):
        log.say(f"    {workdirs.command(workdir, f'--mode={mode}')}")
    return 0
