"""Training that begins from another run's weights: `--init_from=WORKDIR`.

A warm network is a hot one with a second head and an embedding of the blur. Where it begins from hot weights, the
second head is zero and so is the embedding's layer: it predicts what the hot network predicted, and no detail.
"""

import json
import pathlib

import jax
import numpy as np
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from warm_jax.experiments import experiment
from warm_jax.runtime import log, mesh, pod, workdirs
from warm_jax.sampling import runs

# With another value, the same numbers are another predictor. All else shows in names and shapes.
_SAME = ("model.architecture", "model.patch_size", "model.preconditioning", "model.sigma_data")
_HEAD, _BLUR = "out_conv", "map_second"


def _flat(tree: PyTree) -> dict[str, object]:
    return {"/".join(e.key for e in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_head(name: str, own: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """Whether a layer is the last one, of two heads where one is given."""
    return name.startswith(f"{_HEAD}/") and own == (*given[:-1], 2 * given[-1])


def check_fits(own: PyTree, given: PyTree) -> None:
    """Raises ValueError, listing what does not fit, where weights shaped as `given` cannot begin a model of `own`."""
    own, given = ({name: leaf.shape for name, leaf in _flat(tree).items()} for tree in (own, given))
    wrong = []
    for name in sorted(own.keys() | given.keys()):
        here, there = own.get(name), given.get(name)
        added = there is None and name.startswith(f"{_BLUR}/")
        if here != there and not added and not (here and there and _is_head(name, here, there)):
            wrong.append(f"{name} is {there or 'missing'} there and {here or 'not wanted'} here")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"--init_from: its weights do not fit this network: {'; '.join(wrong[:8])}{more}")


def _with_second_head(given: Float[np.ndarray, "..."], patch_size: int) -> Float[np.ndarray, "..."]:
    """One head's last layer as the first of two, the second zero; a patch's pixels each have both."""
    pixels = given.reshape(*given.shape[:-1], patch_size**2, -1)
    return np.concatenate([pixels, np.zeros_like(pixels)], axis=-1).reshape(*given.shape[:-1], -1)


def widen(own: PyTree, given: PyTree, patch_size: int) -> PyTree:
    """`given` in the tree of a new model's own initial weights `own`, where `check_fits`. See the module's head."""
    flat = _flat(jax.device_get(given))

    def choose(path: tuple, leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(entry.key for entry in path)
        if name not in flat:
            return np.zeros(leaf.shape, leaf.dtype)  # of the blur's embedding, as the model's own init makes it
        return flat[name] if flat[name].shape == leaf.shape else _with_second_head(flat[name], patch_size)

    return jax.tree_util.tree_map_with_path(choose, own)


def prepare(config: ConfigDict, workdir: pathlib.Path, init_from: str, begun: bool) -> runs.Run | None:
    """The run whose weights this one begins from; None where it does not, or has begun.

    ValueError where what the workdir remembers of its beginning is not what is asked for.
    """
    noted = workdirs.load_note(workdir, workdirs.BEGUN)
    asked = str(pathlib.Path(init_from).absolute()) if init_from else None
    if begun or noted is not None:
        was = noted and noted["workdir"]
        if asked != was and (asked is not None or not begun):
            began = f"the weights in {was}" if was else "random weights"
            remedy = "leave --init_from out" if begun else f"give --init_from={was}"
            raise ValueError(f"{workdir} began from {began}; {remedy}, or choose another --workdir")
    if begun:
        if asked is not None:
            log.say(f"--init_from={init_from} is where this run began from; it goes on from its own checkpoint")
        return None
    if asked is None:
        return None
    other = workdirs.load_config(pathlib.Path(init_from), config)
    for key in _SAME:
        here, there = experiment.lookup(config, key), experiment.lookup(other, key)
        if here != there:
            raise ValueError(
                f"--init_from: {key} is {there!r} there and {here!r} here; give --config.{key}={there}, or others"
            )
    run = runs.other_run(other, pathlib.Path(init_from), noted["checkpoint_step"] if noted else -1, "--init_from")
    key = jax.random.key(0)
    check_fits(*(jax.eval_shape(exp.model.init, key) for exp in (experiment.build(config), run.experiment)))
    return run


def weights(exp: experiment.Experiment, source: runs.Run, workdir: pathlib.Path, own: PyTree) -> PyTree:
    """The weights that training begins from, on the devices, and a note of them in the workdir.

    ValueError where a run that was cut off before its first checkpoint began from other ones.
    """
    step, given = runs.load_ema(source)
    origin = workdirs.load_note(source.workdir, workdirs.ORIGIN) or workdirs.load_note(source.workdir, workdirs.BEGUN)
    note = {"workdir": str(source.workdir.absolute()), "checkpoint_step": step, "weights": runs.weights_hash(given)}
    note |= {"licence": origin["licence"]} if origin and "licence" in origin else {}
    noted = workdirs.load_note(workdir, workdirs.BEGUN)
    if noted is not None and noted["weights"] != note["weights"]:
        raise ValueError(f"{source.workdir} has other weights than {workdir} began from; choose another --workdir")
    content = json.dumps(note, indent=2).encode() + b"\n"
    pod.first_then_all("begun", lambda: workdirs.write_atomically(workdir / workdirs.BEGUN, content))
    log.say(f"beginning from the weights of step {step} in {source.workdir}")
    if "licence" in note:
        log.say(f"licence: {note['licence']}")
    widened = widen(own, given, exp.config.model.patch_size)
    return jax.device_put(widened, mesh.place(exp.mesh, widened))
