"""A model as two files that need no Orbax: `weights.safetensors` and `model.json`. What `--mode=export` writes.

`weights.safetensors` has the EMA weights in float32, a tensor a parameter, named by its path, `enc_32x32_conv/kernel`.
`model.json` has

    schema_version   1; a reader refuses a newer one
    config           the run's whole config, as in config.json
    process          system, BNR, image shape, and the levels that sampling goes through
    spectrum         the data's mean DCT power [h][w]; null where the run measured none
    sha256           of all the rest, as JSON with sorted keys and no spaces
    start            file and sha256 of the low DCT coefficients that sampling starts from; null where that is noise
    weights          file, sha256, number of tensors and of parameters
    checkpoint_step, origin, begun_from, licence   where the weights are from, as far as known
    sampler          file, sha256, platforms and arguments of the StableHLO program; null where there is none

Files without the digests of `model.json` and the program are of older versions, and are read as they are.
"""

import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import PyTree, Shaped
from ml_collections import ConfigDict

from warm_jax.experiments import experiment, family
from warm_jax.runtime import workdirs
from warm_jax.weights import archives, tensors

SCHEMA = 1
MODEL, WEIGHTS, START, SAMPLER = "model.json", "weights.safetensors", "start.safetensors", "sampler.stablehlo"


class Bundle(NamedTuple):
    """What `load` gives: the model made real, its weights, what was measured of its data, and `model.json`."""

    experiment: experiment.Experiment
    params: PyTree
    measured: family.Measured | None
    about: dict


def flatten(params: PyTree) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Name → array, in the order of the names: the tensors of the file, and the arguments of the program."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return dict(sorted(("/".join(e.key for e in path), np.asarray(leaf)) for path, leaf in leaves))


def unflatten(flat: dict[str, PyTree]) -> dict[str, PyTree]:
    """The parameter tree of named arrays."""
    tree: dict[str, PyTree] = {}
    for name, value in flat.items():
        inner, (*parts, last) = tree, name.split("/")
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def save(
    folder: pathlib.Path,
    exp: experiment.Experiment,
    params: PyTree,
    measured: family.Measured | None,
    facts: dict[str, object],
) -> dict:
    """Writes the two files, `model.json` last, and returns what it says. `facts` go in as they are."""
    flat, config = flatten(params), exp.config
    tensors.write_safetensors(folder / WEIGHTS, flat, {"format": f"warm_jax {SCHEMA}"})
    start = None if measured is None else measured.start
    if start is not None:
        tensors.write_safetensors(folder / START, {"start": start})
    about = {
        "schema_version": SCHEMA,
        "config": json.loads(json.dumps(config.to_dict(), default=list)),
        "process": {
            "system": config.process.system,
            "bnr": family.sampled_bnr(config),
            "image_shape": list(exp.process.image_shape),
            "levels": [float(t) for t in exp.sampled.levels(config.sample.steps)],
        },
        "spectrum": None if measured is None else np.asarray(measured.power).tolist(),
        "start": None if start is None else {"file": START, "sha256": tensors.sha256(folder / START)},
        "weights": {
            "file": WEIGHTS,
            "sha256": tensors.sha256(folder / WEIGHTS),
            "tensors": len(flat),
            "parameters": sum(array.size for array in flat.values()),
        },
        **facts,
    }
    about["sha256"] = _digest(about)
    workdirs.write_atomically(folder / MODEL, json.dumps(about, indent=1).encode() + b"\n")
    return about


def check_system(config: ConfigDict) -> None:
    """Raises ValueError for a process of a file of its own: an export holds no code, and running none is its point."""
    if config.process.system == "own":
        raise ValueError(
            f"the process of this model is code, {config.process.file}, and an export holds none: share "
            "the workdir and that file"
        )


def _digest(about: dict) -> str:
    """Of what `model.json` says, whatever its layout."""
    rest = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_about(folder: pathlib.Path) -> dict:
    """What `model.json` says. OSError or ValueError where it is not there, no model's, or newer than this reader."""
    path = folder / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {folder} is no folder of --mode=export")
    try:
        about = json.loads(path.read_bytes().decode())
        version = about["schema_version"]
    except archives.DAMAGED as error:
        raise ValueError(f"{path} does not describe a model ({error!r}); export it again") from None
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise ValueError(
            f"{path} has schema_version {version!r}; this version reads up to {SCHEMA}: update warm_jax, or export the "
            "model with this version"
        )
    if about.get("sha256", digest := _digest(about)) != digest:
        raise ValueError(f"{path} is damaged: it is not as it was written; export it again")
    return about


def load(folder: str | pathlib.Path) -> Bundle:
    """The exported model. OSError or ValueError where a file is missing, cut short, another's, or of a newer schema."""
    folder = pathlib.Path(folder)
    about = read_about(folder)
    try:
        config, spectrum, start = workdirs.completed(ConfigDict(about["config"])), about["spectrum"], about["start"]
        digests = {WEIGHTS: about["weights"]["sha256"]} | ({} if start is None else {START: start["sha256"]})
    except archives.DAMAGED as error:
        raise ValueError(f"{folder / MODEL} lacks what schema {SCHEMA} has ({error!r}); export it again") from None
    check_system(config)
    for name, digest in digests.items():
        tensors.require_file(folder / name, digest, f"{folder / MODEL} was written with another; export both again.")
    flat = tensors.read_safetensors(folder / WEIGHTS)[0]
    measured = None
    if spectrum is not None:
        known = None if start is None else tensors.read_safetensors(folder / START)[0]["start"]
        measured = family.Measured(np.asarray(spectrum, np.float64), known)
    elif experiment.needs_measuring(config):
        raise ValueError(f"{folder / MODEL} has no spectrum, and this model needs it; export it again")
    exp = experiment.build(config, measured)
    expected = {name: leaf.shape for name, leaf in flatten_shapes(exp).items()}
    if {name: array.shape for name, array in flat.items()} != expected:
        raise ValueError(f"{folder / WEIGHTS} holds other tensors than the model of {folder / MODEL} needs")
    return Bundle(exp, jax.tree.map(jnp.asarray, unflatten(flat)), measured, about)


def flatten_shapes(exp: experiment.Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Name → shape and dtype of the model's parameters, in the order of `flatten`."""
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return dict(sorted((("/".join(e.key for e in path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]))


def check_flatbuffers() -> None:
    """Raises ValueError where the package is missing that `jax.export` writes and reads with."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ValueError("jax.export keeps its programs by flatbuffers: pip install flatbuffers") from None


def load_program(folder: str | pathlib.Path) -> export.Exported:
    """The exported sampler; its `call` takes what `export.program` says. ValueError where it cannot run here."""
    folder = pathlib.Path(folder)
    said = read_about(folder).get("sampler") or {}
    path = folder / SAMPLER
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; export the model again")
    if "sha256" in said:
        tensors.require_file(path, said["sha256"], "Export the model again.")
    check_flatbuffers()
    try:
        found = export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # whatever a damaged file makes of flatbuffers
        raise ValueError(f"{path} is damaged, or newer than this JAX {jax.__version__} ({error!r})") from None
    device = jax.devices()[0]
    here = device.platform
    if here == "gpu":
        here = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if here not in found.platforms:
        raise ValueError(
            f"{path} was exported for {', '.join(found.platforms)}, and this JAX runs on {here}; export it again with "
            f"--platforms={','.join([*found.platforms, here])}"
        )
    return found
