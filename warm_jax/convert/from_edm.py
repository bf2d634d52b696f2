"""From NVIDIA's EDM network pickles (DDPM++, NCSN++, ADM), and PFGM++'s, to a workdir that samples as they do.

What the network looks like is read from its tensors, and every setting that no shape would betray (heads, scales,
epsilons, filters) is compared with what is built here (`edm_settings`): a file is converted exactly, or refused.
"""

import dataclasses
import json
import pathlib
import re
import shlex
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from warm_jax.convert import edm_settings
from warm_jax.experiments import experiment
from warm_jax.models import geometry
from warm_jax.runtime import checkpoint, log, workdirs
from warm_jax.weights import edm_pickle, tensors
from warm_jax.weights.pickles import shown

LICENCE = (
    "NVIDIA publishes EDM's weights under CC BY-NC-SA 4.0: no commercial use, and what is converted or trained from "
    "them stays under it"
)
PUBLISHED = "weights of PFGM++ stand under the licence of those who publish them: look it up before they are used"

# ── Its parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


def _path(name: str, side: int) -> tuple[str, ...]:
    """Where a part stands here: `enc.32x32_block0.conv0` is enc_32x32_block0, conv0; the whole image's aux is out."""
    ends = re.sub(rf"^dec\.{side}x{side}_aux_(norm|conv)$", r"out_\1", name)
    return tuple(re.sub(r"^(enc|dec)\.", r"\1_", ends).split("."))


def _layer(key: str, array: np.ndarray) -> str:
    """Our name of a tensor of a layer."""
    return key if key != "weight" else "scale" if array.ndim == 1 else "kernel" if array.ndim in (2, 4) else key


def _ours(name: str, array: np.ndarray) -> Float[np.ndarray, "..."]:
    """A tensor in our layout: matrices [in, out], kernels [height, width, in, out], q, k, v apart."""
    array = array.astype(np.float32, copy=False)
    if name.endswith(".qkv"):
        # Our output i·c + j is their row 3j + i.
        array = array.reshape(-1, 3, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def parameters(network: edm_pickle.Module, shapes: PyTree) -> dict[str, PyTree]:
    """The network's tensors as a parameter tree of `shapes`; ValueError that lists all that does not fit."""
    model, side = network.children["model"], network.settings["img_resolution"]
    expected = {tuple(e.key for e in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    found: dict[tuple[str, ...], np.ndarray] = {}
    for name, part in model.walk():
        owned = part.parameters | {key: part.buffers[key] for key in ("freqs",) if key in part.buffers}
        for key, array in owned.items():
            path = (*_path(name, side), _layer(key, array))
            if path in found:
                raise ValueError(f"two of its tensors would be {'.'.join(path)[:200]}, {name[:200]}.{key[:100]} is one")
            # What is not known is named, not converted: one tensor may stand for thousands.
            found[path] = _ours(name, array) if path in expected else array
    architecture = edm_settings.architecture_of(model)
    try:
        wrong = list(edm_settings.misfits(model, geometry.STYLES[architecture]))
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"a network without what EDM's have ({shown(error)[:200]})") from None
    for path in sorted(found.keys() | expected.keys()):
        here, there = expected.get(path), found[path].shape if path in found else None
        if here != there:
            wrong.append(f"{'.'.join(path)[:200]} is {there or 'missing'}, not {here or 'there'}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the network is not {architecture} as it is built here: {'; '.join(wrong[:8])}{more}")
    tree: dict[str, PyTree] = {}
    for path, value in found.items():
        inner = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = np.ascontiguousarray(value)
    return tree


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `prepare` checked and `convert` writes."""

    experiment: experiment.Experiment
    params: PyTree
    workdir: pathlib.Path
    origin: dict[str, str]
    commands: tuple[str, ...]
    chosen: str  # which config was taken, and how it samples, for people


def nearest_config(found: dict[str, object]) -> str:
    """The config of the set that a network of such `settings` was published for, or the nearest by size."""
    side = found["data.image_size"]
    if side < 46:  # nearer to 32 than to 64, as a ratio
        name = "cifar10_conditional" if found["data.num_classes"] else "cifar10"
    elif found["model.architecture"] == "adm":
        name = "imagenet64"
    else:
        name = "ffhq64" if side < 91 else "lsun_church128"
    return f"{name}:{'pfgmpp' if 'process.augmented_dims' in found else 'hot'}"


def _chosen(name: str, given: bool, pristine: ConfigDict, config: ConfigDict) -> str:
    """Which config was taken and why, and how it samples."""
    sides = [
        c.data.image_size if isinstance(c.data.image_size, int) else "×".join(map(str, c.data.image_size))
        for c in (pristine, config)
    ]
    kind = name.partition(":")[2]
    why = "as --config says" if given else f"the nearest by size and classes; name another with --config=NAME:{kind}"
    other = "" if sides[0] == sides[1] else f", which is for {sides[0]} pixels and not for this network's {sides[1]}"
    sample, process = config.sample, config.process
    least = process.beta_min if sample.beta_min is None else sample.beta_min
    rho = process.rho if sample.rho is None else sample.rho
    return (
        f"config: {name}{other} ({why})\n"
        f"sampling is by its settings: {sample.solver}, {sample.steps} steps, noise from {process.beta_max:g} down to "
        f"{least:g}, rho {rho:g}; change them with --config.sample.steps=…, .solver=…, .beta_min=…, .rho=…"
    )


def _commands(name: str, pristine: ConfigDict, config: ConfigDict, workdir: pathlib.Path) -> tuple[str, ...]:
    """How to sample, and how to start a warm training, with all values that differ from the config file's."""
    changed = [
        f"--config.{key}={value}"
        for key, value in workdirs.differing(pristine, config, workdirs.MODEL_KEYS)
        if key != "model.dtype"  # of the conversion; a training may have its own
    ]
    system = f":{config.process.system}" if config.process.system == "pfgmpp" else ""
    config_flag = f"--config={name.partition(':')[0]}{system}"
    start = ["python", "-m", "warm_jax", config_flag, *changed, f"--init_from={workdir}"]
    return workdirs.command(workdir, "--mode=sample"), shlex.join(start)


def prepare(
    file: str, workdir: str, name: str, config: ConfigDict | None, load: Callable[[str], ConfigDict]
) -> Conversion:
    """Reads and checks everything. ValueError or OSError for bad input.

    Args:
      file: The pickle.
      workdir: Where to; empty: `runs/` and the file's name.
      name: What --config says, as cifar10:hot; empty: the file's nearest.
      config: The config of that name, with what was overridden; None: as it is.
      load: From a config's name to the config as its file has it.
    """
    digest = tensors.require_file(file, "", "--from_edm=FILE.pkl is one of NVIDIA's network pickles.")
    network = edm_pickle.read_network(file)
    try:
        found, given = edm_settings.settings(network), bool(name)
        name = name or nearest_config(found)
        config = load(name) if config is None else config
        dims = found.get("process.augmented_dims")
        if dims is not None and config.process.system != "pfgmpp":
            raise ValueError(f"a network of PFGM++ (D = {dims:g}), and --config={name} is not; add :pfgmpp to its name")
        if dims is None and (config.process.system not in ("hot", "warm") or config.process.bnr != 0):
            raise ValueError(f"EDM is hot diffusion, and --config={name} is not; add :hot to the config's name")
        with config.unlocked():
            config.update_from_flattened_dict(found | edm_settings.noise_levels(network, config))
        exp = experiment.build(config)
        params = parameters(network, jax.eval_shape(exp.model.init, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    target = pathlib.Path(workdir or pathlib.Path("runs") / pathlib.Path(file).stem)
    workdirs.check_new(target)
    origin = {"source": pathlib.Path(file).name, "sha256": digest, "format": "EDM network pickle", "licence": LICENCE}
    if dims is not None:
        origin |= {"format": "PFGM++ network pickle", "licence": PUBLISHED}
    pristine = load(name)
    commands, chosen = _commands(name, pristine, config, target), _chosen(name, given, pristine, config)
    return Conversion(exp, params, target, origin, commands, chosen)


def save_workdir(exp: experiment.Experiment, params: PyTree[Array | np.ndarray], workdir: pathlib.Path) -> None:
    """Writes config.json, and the weights as a checkpoint of step 0 that can be sampled and begun from."""
    workdirs.save_config(exp.config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    # On one device: of weights on many, Orbax would compile how to share the work of writing.
    checkpoints.save(0, None, jax.device_put(params, jax.devices()[0]), wait=True)
    checkpoints.close()


def convert(conversion: Conversion) -> int:
    """Writes the workdir. Returns the exit status."""
    workdir, origin = conversion.workdir, conversion.origin
    workdirs.write_atomically(workdir / workdirs.ORIGIN, json.dumps(origin, indent=2).encode() + b"\n")
    save_workdir(conversion.experiment, conversion.params, workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(conversion.params))
    architecture = conversion.experiment.config.model.architecture
    log.say(f"{workdir}: {architecture}, {count:,} parameters, from a file of sha256 {origin['sha256']}")
    log.say(f"licence: {origin['licence']}")
    log.say(conversion.chosen)
    how = "sample, or train on from it:" if "PFGM" in origin["format"] else "sample, or train warm from it:"
    log.say("\n".join([how, *(f"    {command}" for command in conversion.commands)]))
    return 0
