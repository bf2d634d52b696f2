"""Writes pickles of EDM's format, for tests: stand-in classes under the names that such files have, and random weights.

The layout of tensors is theirs (O×I×k×k, out×in, q/k/v interleaved); nothing here knows `warm_jax`. `reference_params`
gives the same numbers to the numpy networks of `reference_unet.py` and `reference_adm.py`.
"""

import contextlib
import io
import pickle
import re
import struct
import sys
import types
from collections import OrderedDict
from unittest import mock

import numpy as np

_MAGIC = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}})


def _module(name, **contents):
    made = types.ModuleType(name)
    for key, value in contents.items():
        value.__module__, value.__qualname__, value.__name__ = name, key, key
        setattr(made, key, value)
    return made


def _function():
    def called(*arguments):
        raise AssertionError("a file of weights was unpickled")

    return called


class FloatStorage:
    pass


class DoubleStorage:
    pass


class ModuleDict:
    def __init__(self, children):
        self.__dict__.update(state_of({}, {}, children))


_MODULES = {
    "torch": _module("torch", FloatStorage=FloatStorage, DoubleStorage=DoubleStorage),
    "torch._utils": _module("torch._utils", _rebuild_tensor_v2=_function(), _rebuild_parameter=_function()),
    "torch.storage": _module("torch.storage", _load_from_bytes=_function()),
    "torch.nn": _module("torch.nn"),
    "torch.nn.modules": _module("torch.nn.modules"),
    "torch.nn.modules.container": _module("torch.nn.modules.container", ModuleDict=ModuleDict),
    "torch_utils": _module("torch_utils"),
    "torch_utils.persistence": _module("torch_utils.persistence", _reconstruct_persistent_obj=_function()),
}


def saved_storage(array):
    """A legacy `torch.save` stream of one storage."""

    class Handle:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            kind = {"f": FloatStorage, "d": DoubleStorage}[array.dtype.char]
            return ("storage", kind, "94805138193584", "cpu", array.size, None) if isinstance(value, Handle) else None

    file = io.BytesIO()
    for value in _MAGIC:
        pickle.dump(value, file, 2)
    with mock.patch.dict(sys.modules, _MODULES):
        Pickler(file, 2).dump(Handle())
    pickle.dump(["94805138193584"], file, 2)
    return file.getvalue() + struct.pack("<q", array.size) + array.tobytes()


class Reduced:
    """Pickles to a call."""

    def __init__(self, module, name, *arguments):
        self.reduced = (getattr(_MODULES[module], name), arguments)

    def __reduce__(self):
        return self.reduced


def tensor(array):
    """A tensor as torch pickles it; one with an axis more than a vector lies transposed in its storage."""
    order = tuple(range(array.ndim))[::-1]
    flat = np.ascontiguousarray(array.transpose(order)).ravel()
    strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array.transpose(order)).transpose(order).strides)
    storage = Reduced("torch.storage", "_load_from_bytes", saved_storage(np.concatenate([flat[:1], flat])))
    return Reduced("torch._utils", "_rebuild_tensor_v2", storage, 1, array.shape, strides, False, OrderedDict())


def state_of(parameters, buffers, children, **settings):
    """What torch keeps in a module's `__dict__`."""
    hooks = {name: OrderedDict() for name in ("_backward_hooks", "_forward_hooks", "_state_dict_hooks")}
    rebuilt = {
        key: None
        if value is None
        else Reduced("torch._utils", "_rebuild_parameter", tensor(value), True, OrderedDict())
        for key, value in parameters.items()
    }
    return {
        "training": False,
        "_parameters": OrderedDict(rebuilt),
        "_buffers": OrderedDict((key, None if value is None else tensor(value)) for key, value in buffers.items()),
        "_non_persistent_buffers_set": set(),
        **hooks,
        "_modules": OrderedDict(children),
        "_init_args": (),
        **settings,
    }


class Part:
    """A module that carries its source code."""

    def __init__(self, kind, parameters=None, buffers=None, children=None, source="", **settings):
        self.kind, self.parameters, self.children = kind, parameters or {}, children or {}
        self.buffers, self.settings, self.source = buffers or {}, settings, source

    def __reduce__(self):
        state = state_of(self.parameters, self.buffers, self.children, **self.settings)
        meta = {"type": "class", "version": 6, "module_src": self.source or "raise RuntimeError('run!')\n" * 300}
        meta |= {"class_name": self.kind, "state": state}
        return (_MODULES["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None)


def dumps(value, protocol=4):
    """The pickle, made where the stand-ins are found under their names."""
    with mock.patch.dict(sys.modules, _MODULES):
        return pickle.dumps(value, protocol)


@contextlib.contextmanager
def importable():
    """Where a pickle of these could be unpickled: to show that it would call."""
    with mock.patch.dict(sys.modules, _MODULES):
        yield


# ── Networks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Draw:
    """Layers with random weights, in EDM's layout."""

    def __init__(self, seed, eps, taps):
        self.rng, self.eps = np.random.default_rng(seed), eps
        self.filter = (np.outer(taps, taps) / np.sum(taps) ** 2)[None, None].astype(np.float32)

    def _normal(self, *shape, fan_in):
        return (self.rng.normal(size=shape) * fan_in**-0.5).astype(np.float32)

    def linear(self, inputs, outputs, bias=True):
        bias = {"bias": self._normal(outputs, fan_in=10)} if bias else {"bias": None}
        return Part("Linear", {"weight": self._normal(outputs, inputs, fan_in=inputs)} | bias, in_features=inputs)

    def conv(self, inputs, outputs, kernel, resampled=False, fused=False):
        weights = {}
        if kernel:  # 0: it resamples only
            weights["weight"] = self._normal(outputs, inputs, kernel, kernel, fan_in=inputs * kernel**2)
            weights["bias"] = self._normal(outputs, fan_in=10)
        buffers = {"resample_filter": self.filter if resampled else None}
        return Part("Conv2d", weights, buffers, up=False, fused_resample=fused)

    def norm(self, channels):
        weights = {"weight": 1 + self._normal(channels, fan_in=10), "bias": self._normal(channels, fan_in=10)}
        return Part("GroupNorm", weights, num_groups=min(32, channels // 4), eps=self.eps)

    def block(self, inputs, outputs, embedding, attention=False, change="", adm=False):
        children = {
            "norm0": self.norm(inputs),
            "conv0": self.conv(inputs, outputs, 3, bool(change)),
            "affine": self.linear(embedding, outputs * (2 if adm else 1)),
            "norm1": self.norm(outputs),
            "conv1": self.conv(outputs, outputs, 3),
        }
        if inputs != outputs or change:
            children["skip"] = self.conv(inputs, outputs, 0 if adm and inputs == outputs else 1, bool(change))
        heads = (outputs // 64 if adm else 1) if attention else 0
        if heads:
            children["norm2"] = self.norm(outputs)
            children["qkv"] = self.conv(outputs, 3 * outputs, 1)
            children["proj"] = self.conv(outputs, outputs, 1)
        scale = 1 if adm else np.sqrt(0.5)  # a number of numpy's, as EDM has it
        return Part("UNetBlock", children=children, num_heads=heads, skip_scale=scale, adaptive_scale=adm, dropout=0.1)


def network(
    kind="ddpmpp", side=8, channels=8, mult=(1, 2), blocks=1, attention=(4,), classes=0, augment=9,
    wrapper="EDMPrecond", decoder="standard", **precond,
):  # fmt: skip
    """A network with preconditioning around it, which also has the settings `precond`; `kind` is ddpmpp, ncsnpp or adm.

    With `decoder` "skip" each level of the decoder has an image of its own, as score_sde's networks may.
    """
    adm, fourier = kind == "adm", kind == "ncsnpp"
    draw = Draw(0, 1e-5 if adm else 1e-6, [1, 3, 3, 1] if fourier else [1, 1])
    wide, width = 4 * channels, channels * (2 if fourier else 1)
    enc, dec, skips, out = {}, {}, [channels], channels
    enc[f"{side}x{side}_conv"] = draw.conv(3, channels, 3)
    pyramid = 3
    for level, m in enumerate(mult):
        r = side >> level
        if level:
            enc[f"{r}x{r}_down"] = draw.block(out, out, wide, change="down", adm=adm)
            if fourier:
                enc[f"{r}x{r}_aux_residual"] = draw.conv(pyramid, out, 3, True, fused=True)
                pyramid = out
            skips.append(out)
        for i in range(blocks):
            enc[f"{r}x{r}_block{i}"] = draw.block(out, channels * m, wide, r in attention, adm=adm)
            out = channels * m
            skips.append(out)
    for level, m in reversed(list(enumerate(mult))):
        r = side >> level
        if level == len(mult) - 1:
            dec[f"{r}x{r}_in0"] = draw.block(out, out, wide, True, adm=adm)
            dec[f"{r}x{r}_in1"] = draw.block(out, out, wide, adm=adm)
        else:
            dec[f"{r}x{r}_up"] = draw.block(out, out, wide, change="up", adm=adm)
        for i in range(blocks + 1):
            attends = r in attention and (adm or i == blocks)
            dec[f"{r}x{r}_block{i}"] = draw.block(out + skips.pop(), channels * m, wide, attends, adm=adm)
            out = channels * m
        if decoder == "skip" and level:
            dec |= {f"{r}x{r}_aux_norm": draw.norm(out), f"{r}x{r}_aux_conv": draw.conv(out, 3, 3)}
    embedding = {} if fourier else {"max_positions": 10000, "endpoint": not adm}
    name = "FourierEmbedding" if fourier else "PositionalEmbedding"
    children = {"map_noise": Part(name, num_channels=width, **embedding)}
    if fourier:
        children["map_noise"].buffers["freqs"] = draw.rng.normal(size=channels).astype(np.float32)
    if classes:
        children["map_label"] = draw.linear(classes, wide if adm else width, bias=not adm)
    if augment:
        children["map_augment"] = draw.linear(augment, width, bias=False)
    children |= {"map_layer0": draw.linear(width, wide), "map_layer1": draw.linear(wide, wide)}
    last = {"norm": draw.norm(out), "conv": draw.conv(out, 3, 3)}
    if not adm:
        dec |= {f"{side}x{side}_aux_{name}": part for name, part in last.items()}
    children |= {"enc": ModuleDict(enc), "dec": ModuleDict(dec)}
    if adm:
        children |= {f"out_{name}": part for name, part in last.items()}
    asked = {"img_resolution": side, "model_channels": channels, "channel_mult": list(mult), "dropout": 0.1}
    if not adm:
        asked |= {"embedding_type": "fourier" if fourier else "positional", "decoder_type": decoder}
        asked |= {"encoder_type": "residual" if fourier else "standard"}
    model = Part("DhariwalUNet" if adm else "SongUNet", children=children, label_dropout=0, _init_kwargs=asked)
    settings = {"img_resolution": side, "img_channels": 3, "label_dim": classes, "use_fp16": False}
    settings |= {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5} | precond
    return Part(wrapper, children={"model": model}, **settings)


def contents(net):
    """The whole dict of a published file."""
    pipe = Part("AugmentPipe", p=0.12, xflip=1e8, scale=1)
    return {"ema": net, "loss_fn": None, "augment_pipe": pipe, "dataset_kwargs": {"path": "data.zip", "xflip": False}}


def reference_params(net):
    """The weights for the numpy networks, float64, kernels [k, k, in, out]; qkv stays as it is in the file."""
    model, params = net.children["model"], {}

    def layer(part):
        made = {}
        for key, value in part.parameters.items():
            if value is not None:
                value = value.astype(np.float64)
                value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
                made[{"weight": "scale" if value.ndim == 1 else "kernel"}.get(key, key)] = value
        return made

    for name, part in model.children.items():
        if name in ("enc", "dec"):
            for inner, block in part.__dict__["_modules"].items():
                ours = re.sub(r"^.*_aux_(norm|conv)$", r"out_\1", inner)
                ours = ours if ours.startswith("out_") else f"{name}_{inner}"
                layers = {"qkv_rows" if key == "qkv" else key: layer(child) for key, child in block.children.items()}
                params[ours] = {key: value for key, value in layers.items() if value} or layer(block)
        else:
            frequencies = {k: v.astype(np.float64) for k, v in part.buffers.items() if k == "freqs"}
            params[name] = layer(part) | frequencies
    n, labels = params["map_layer0"]["kernel"].shape[0], params["map_layer1"]["kernel"].shape[0]
    params["map_second"] = {"kernel": np.zeros((n, n))}
    params.setdefault("map_label", {"kernel": np.zeros((1, labels if model.kind == "DhariwalUNet" else n))})
    params.setdefault("map_augment", {"kernel": np.zeros((1, n))})
    return params
