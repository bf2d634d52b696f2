"""The model card that goes with an export: what a workdir knows, as Markdown. What it does not know is said too."""

import pathlib
import shlex

from warm_jax.runtime import jsonl, workdirs

_HOW = ("checkpoint_step", "ema", "solver", "steps", "nfe", "bnr", "guidance", "guidance_interval", "numbers")
_KINDS = {
    "hot": "noise alone (EDM, Karras et al. 2022)",
    "warm": "blur and noise at one blur-to-noise ratio (Warm Diffusion, Hsueh et al. 2025)",
    "amortised": "blur and noise, at any blur-to-noise ratio (Warm Diffusion, amortised)",
    "pfgmpp": "heavy-tailed noise (PFGM++, Xu et al. 2023)",
    "ddpm": "denoising diffusion (Ho et al. 2020)",
    "blurring": "blurring diffusion (Hoogeboom and Salimans 2022)",
    "ihdm": "inverse heat dissipation (Rissanen et al. 2022)",
    "coloured": "denoising diffusion with a level of noise for each frequency",
    "coloured_warm": "blur, and noise with a level for each frequency",
    "heat_flow": "heat-dissipation flow matching (arXiv 2605.19371)",
    "own": "a process of the author's own",
    "cold": "blur alone (cold diffusion, Bansal et al. 2022)",
}


def _data(about: dict, workdir: pathlib.Path) -> list[str]:
    data, seen = about["config"]["data"], workdirs.load_note(workdir, workdirs.SEEN)
    shape = "×".join(map(str, about["process"]["image_shape"]))
    lines = [f"Images of {shape} (height, width, channels), {data['num_classes'] or 'no'} classes."]
    if seen is None:
        return [*lines, "Which images it was trained on is not known to the folder that it was exported from."]
    lines.append(f"Trained on `{seen['source']}`: {seen['images']:,} images, fingerprint `{seen['fingerprint']}`.")
    if seen.get("skipped"):
        lines.append(f"{len(seen['skipped'])} broken images were left out.")
    return lines


def _training(about: dict) -> list[str]:
    train, step = about["config"]["train"], about["checkpoint_step"]
    if about["origin"] is not None:
        origin = about["origin"]
        return [
            f"Converted from `{origin['source']}` (sha256 `{origin.get('sha256', 'unknown')}`); how it was trained is "
            "said by whoever published it."
        ]
    images, length = step * train["batch_size"], f"half-life {train['ema_halflife_images']:,.0f} images"
    if "ema" in about:
        length = f"of relative length {about['ema']['sigma_rel']:g}, made of stored averages (Karras et al. 2024)"
    lines = [
        f"{step:,} steps of {train['batch_size']} images, {images:,} in all; learning rate {train['learning_rate']:g}; "
        f"EMA {length}; seed {about['config']['seed']}; augmentation "
        f"{about['config']['data']['augment']}. These are the EMA weights."
    ]
    begun = about["begun_from"]
    if begun is not None:
        lines.append(f"Begun from the weights of step {begun['checkpoint_step']:,} in `{begun['workdir']}`.")
    return lines


def _scores(workdir: pathlib.Path) -> list[str]:
    """Every line of `results.jsonl` that scores samples, as a list item; damaged lines are left out."""
    path = workdir / "results.jsonl"
    lines = []
    for row in jsonl.read(path):
        if row.get("images") != "samples":
            continue
        if "rounds" in row:
            names = [name for name in row if name.endswith("_min")]
            values = [f"{n.removesuffix('_min')} {row[n]:.4g} (minimum of {row['rounds']} rounds)" for n in names]
        else:
            values = [f"{name} {row[name]:.4g}" for name in row.get("scores", []) if name in row]
        how = ", ".join(f"{name} {row[name]}" for name in _HOW if row.get(name) is not None)
        against = f"against {row.get('reference')} ({row.get('reference_count')} images), {row.get('extractor')}"
        lines.append(f"* {'; '.join(values)}: {row.get('count')} samples, {how}; {against}")
    return lines or ["None in `results.jsonl`: it was not scored there."]


def text(about: dict, workdir: pathlib.Path) -> str:
    """The card of an export that `model.json` describes as `about`, made from `workdir`."""
    config, process = about["config"], about["process"]
    model, sample, weights = config["model"], config["sample"], about["weights"]
    ratio = f" Samples follow BNR {process['bnr']}." if process["bnr"] is not None else ""
    labels = ", labels" if config["data"]["num_classes"] else ""
    licence = about["licence"] or (
        "Not known to the folder that it was exported from. The code, warm_jax, is Apache-2.0; weights may be bound by "
        "the licence of the images."
    )
    parts = {
        "Model": [
            f"System `{process['system']}`: {_KINDS.get(process['system'], process['system'])}.{ratio}",
            f"Network `{model['architecture']}`, {weights['parameters']:,} parameters: channels {model['channels']} × "
            f"{model['channel_mult']}, {model['num_blocks']} blocks a resolution, attention at {model['attention']}; "
            f"trained in {model['dtype']}; predicts by `{model['preconditioning']}`, σ_data {model['sigma_data']:g}.",
        ],
        "Data": _data(about, workdir),
        "Training": _training(about),
        "Scores": _scores(workdir),
        "Use": [
            "For research on generative models of small images. It reproduces what its training images hold, biases "
            "and mistakes too; it is no source of facts about the world, and samples may resemble training images. It "
            "draws one size of image, from a seed"
            + (", a class" if labels else "")
            + " and nothing else: no text. Scores are of the protocol beside them and do not compare with others.",
        ],
        "Licence": [licence.rstrip(".") + "."],
        "How to load": [
            f"`python sample.py --seeds=0-15{' --classes=0' if labels else ''} --out=samples.png`, in this folder, "
            "draws images with jax, flatbuffers, numpy and safetensors alone, on "
            f"{', '.join(about['sampler']['platforms'])} ({sample['solver']}, {sample['steps']} steps); `--help` says "
            "more. The program in `sampler.stablehlo` takes "
            f"the weights in the order of their names, seeds{labels}, of any number.",
            "With warm_jax, which is needed for everything else, in this folder:",
            "```python\nimport jax\nimport jax.numpy as jnp\n\nfrom warm_jax.convert import bundle\n\n"
            'experiment, params, measured, about = bundle.load(".")\n'
            "process = experiment.sampled\n"
            f"x = process.prior(jax.random.key(0), (1, {', '.join(map(str, process['image_shape']))}))\n"
            "t = jnp.full(1, process.highest)\n"
            "prediction = experiment.to_sample.predict(params, x, t)  # D and R for states x at levels t\n```",
            "To make it a run again, to be sampled, scored and begun from: `python -m warm_jax --mode=convert "
            f"--from_export=. --workdir={shlex.quote(str(pathlib.Path('runs') / workdir.resolve().name))}`.",
        ],
    }
    name = f"{process['system']} diffusion at {process['image_shape'][0]}×{process['image_shape'][1]}"
    body = "\n\n".join(f"## {title}\n\n" + "\n\n".join(lines) for title, lines in parts.items())
    return f"# {name}\n\n{body}\n"
