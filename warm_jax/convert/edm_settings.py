"""What one of EDM's, or PFGM++'s, network pickles says of its network, checked, and as the settings of a config.

Type and range of each setting are checked before anything is made of it. Those that no tensor's shape would betray
(heads, scales, epsilons, filters, the kinds of encoder and decoder) are compared with what is built here.
"""

import re
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import augment
from warm_jax.models import geometry
from warm_jax.weights import edm_pickle
from warm_jax.weights.pickles import shown

_BLOCK = re.compile(r"enc\.(\d{1,5})x\1_block(\d{1,3})")
_MOST_BLOCKS = 16  # of a level; EDM's have 4 at most
_SETTINGS = {  # of a block and of a norm, by the network's class
    "SongUNet": {"skip_scale": 0.5**0.5, "adaptive_scale": False, "eps": 1e-6},
    "DhariwalUNet": {"skip_scale": 1, "adaptive_scale": True, "eps": 1e-5},
}
_ASKED = {  # how a network may have been made: what shows in its tensors, and the choices that are built here
    **dict.fromkeys(("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels")),
    **dict.fromkeys(("channel_mult", "channel_mult_emb", "channel_mult_noise", "num_blocks", "attn_resolutions")),
    **dict.fromkeys(("resample_filter", "dropout", "label_dropout")),
    "embedding_type": {"ddpmpp": "positional", "ncsnpp": "fourier"},
    "encoder_type": {"ddpmpp": "standard", "ncsnpp": "residual"},
    "decoder_type": {"ddpmpp": "standard", "ncsnpp": "standard"},
}


def architecture_of(model: edm_pickle.Module) -> str:
    """The name that `models.geometry` has for it; ValueError for a network of another class."""
    if model.kind == "DhariwalUNet":
        return "adm"
    if model.kind == "SongUNet":
        return "ncsnpp" if "map_noise.freqs" in _buffers(model) else "ddpmpp"
    raise ValueError(f"a network of class {model.kind[:100]!r}; SongUNet and DhariwalUNet can be converted")


def _buffers(model: edm_pickle.Module) -> dict[str, np.ndarray]:
    return {f"{name}.{key}": array for name, part in model.walk() for key, array in part.buffers.items()}


def _whole(settings: dict[str, object], name: str, least: int, most: int) -> int:
    value = settings[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"its {name} is {shown(value)}; it must be a whole number from {least} to {most:,}")
    return value


def _number(
    settings: dict[str, object], name: str, default: float | int, least: float | int, most: float | int
) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"its {name} is {shown(value)}; it must be a number from {least:g} to {most:g}")
    return float(value)


def _levels(network: edm_pickle.Module) -> tuple[list[int], int]:
    """(the sides from level to level, the blocks of each). ValueError where the network is no stack of such levels."""
    names = (_BLOCK.fullmatch(name) for name, _ in network.children["model"].walk())
    blocks = sorted({(-int(match[1]), int(match[2])) for match in names if match})
    sides = [-side for side in dict.fromkeys(side for side, _ in blocks)]
    count = sum(side == -sides[0] for side, _ in blocks) if sides else 0
    given = _whole(network.settings, "img_resolution", 4, 4096)
    if blocks != [(-(given >> i), j) for i in range(len(sides)) for j in range(count)] or count > _MOST_BLOCKS:
        found = ", ".join(f"{-side}x{-side}_block{number}" for side, number in blocks[:4])
        raise ValueError(f"its blocks, {found or 'none'} …, are not those of a U-Net on {given} pixels")
    return sides, count


def settings(network: edm_pickle.Module) -> dict[str, object]:
    """What a config must say of the network, by dotted key. ValueError where it is none that can be built here."""
    if network.kind != "EDMPrecond":
        raise ValueError(
            f"a network around which stands {network.kind[:100]!r}; only EDMPrecond can be converted, not the older "
            "preconditionings (VPPrecond, VEPrecond, iDDPMPrecond)"
        )
    try:
        model = network.children["model"]
        parts, (sides, blocks) = dict(model.walk()), _levels(network)
        channels = parts[f"enc.{sides[0]}x{sides[0]}_conv"].parameters["weight"].shape[0]
        if channels < 1:
            raise ValueError("a network without channels")
        first = {s: parts[f"enc.{s}x{s}_block0"] for s in sides}
        asked = model.settings["_init_kwargs"]
        if type(asked) is not dict:
            raise ValueError(f"its _init_kwargs are {shown(asked)}, not settings by name")
        labels = parts["map_augment"].parameters["weight"].shape[1] if "map_augment" in parts else 0
        if labels not in (0, augment.LABELS):
            raise ValueError(f"a network with {labels} augmentation labels; 0 or {augment.LABELS} can be converted")
        image_channels = _whole(network.settings, "img_channels", 1, 3)
        return {
            "data.image_size": sides[0],
            "data.channels": image_channels,
            "data.num_classes": _whole(network.settings, "label_dim", 0, 2**20),
            "data.label_dropout": _number(asked, "label_dropout", 0, 0, 1),
            "data.augment": "edm" if labels else "none",
            "model.architecture": architecture_of(model),
            "model.channels": channels,
            "model.channel_mult": tuple(
                first[s].children["conv0"].parameters["weight"].shape[0] // channels for s in sides
            ),
            "model.num_blocks": blocks,
            "model.attention": tuple(s for s in sides if "qkv" in first[s].children),
            "model.dropout": _number(asked, "dropout", 0.1, 0, 1),  # what EDM's networks have where nothing is asked
            "model.patch_size": 1,
            "model.dtype": "float32",
            "model.preconditioning": "edm",
            "model.sigma_data": _number(network.settings, "sigma_data", 0.5, 1e-3, 1000),
            **_augmented(network),
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a network without what EDM's have ({shown(error)[:200]})") from None


def _augmented(network: edm_pickle.Module) -> dict[str, float]:
    """PFGM++'s D by its key in a config; {} for EDM. ValueError for PFGM, which is another system."""
    flags = {name: network.settings.get(name, False) for name in ("pfgm", "pfgmpp")}
    for name, value in flags.items():
        if type(value) is not bool:
            raise ValueError(f"its {name} is {shown(value)}; it must be True or False")
    if flags["pfgm"] and not flags["pfgmpp"]:
        raise ValueError("a network of PFGM (pfgm is True); EDM's and PFGM++'s can be converted")
    if not flags["pfgmpp"]:
        return {}
    if "D" not in network.settings:
        raise ValueError("a network of PFGM++ (pfgmpp is True) that does not say its D")
    return {"process.augmented_dims": _number(network.settings, "D", 0, 1, 1e9)}


def noise_levels(network: edm_pickle.Module, config: ConfigDict) -> dict[str, float]:
    """The config's levels within the network's sigma_min and sigma_max, as EDM's samplers bound them, by key."""
    least = _number(network.settings, "sigma_min", 0, 0, float("inf"))
    most = _number(network.settings, "sigma_max", float("inf"), 0, float("inf"))
    low, high = max(config.process.beta_min, least), min(config.process.beta_max, most)
    if not low < high:
        own = f"{config.process.beta_min:g} to {config.process.beta_max:g}"
        raise ValueError(f"a network for noise from {least:g} to {most:g}, and the config's levels are {own}")
    levels = {"process.beta_min": low, "process.beta_max": high}
    if config.sample.beta_min is not None:
        levels["sample.beta_min"] = max(config.sample.beta_min, least)
    return levels


def misfits(model: edm_pickle.Module, style: geometry.Style) -> Iterator[str]:
    """Settings of parts that no shape betrays, and that differ from what is built here."""
    taps, architecture = np.outer(style.taps, style.taps), architecture_of(model)
    for key, value in model.settings["_init_kwargs"].items():
        built = (_ASKED.get(key) or {}).get(architecture)
        if key not in _ASKED and value is not None and value is not False:
            yield f"{key[:100]} ({shown(value)}) is a setting that is not known here"
        elif built is not None and (type(value) is not str or value != built):
            yield f"{key} is {shown(value)}, not {built!r}"
    for name, part in model.walk():
        expected = dict(_SETTINGS[model.kind])
        if "qkv" in part.children:
            width = part.children["proj"].parameters["weight"].shape[0]
            expected["num_heads"] = max(1, width // style.head_channels) if style.head_channels else 1
        if part.kind == "GroupNorm":
            expected["num_groups"] = geometry.groups(len(part.parameters["weight"]))
        if part.kind == "PositionalEmbedding":
            expected |= {"max_positions": 10000, "endpoint": model.kind == "SongUNet"}
        if part.kind == "Conv2d":
            expected["fused_resample"] = name.endswith("_aux_residual")
        for key, value in expected.items():
            found = part.settings.get(key, value)
            if type(found) not in (bool, int, float) or not abs(found - value) <= 1e-6 * abs(value):
                yield f"{name}.{key} is {shown(found)}, not {value!r}"
        kernel = part.buffers.get("resample_filter")
        if kernel is not None and (kernel.ndim != 4 or kernel.shape[2:] != taps.shape or not _is(kernel, taps)):
            yield f"{name}.resample_filter is not {style.taps}"


def _is(kernel: np.ndarray, taps: np.ndarray) -> bool:
    return kernel.shape[:2] == (1, 1) and np.allclose(kernel[0, 0], taps)
