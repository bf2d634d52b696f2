"""A second ADM, in numpy float64, channels first, one flat list of steps: `test_adm.py` compares with it.

Written from the description of what differs from DDPM++, and without `warm_jax` or Flax, as `reference_unet.py`, which
has the operations that both networks are made of. Attention reads q, k, v in NVIDIA's interleaved order.
"""

import numpy as np
from reference_unet import biased, enlarge, fold, group_norm, interleaved, linear, shrink, silu, steps, unfold

BOX = np.full((2, 2), 0.25)


def activated(p, x):
    return silu(group_norm(p, x, 1e-5))


def attend(p, x):
    b, c, h, w = x.shape
    heads = c // 64 if c > 64 else 1
    rows = biased(interleaved(p), group_norm(p["norm2"], x, 1e-5)).reshape(b, heads, c // heads, 3, h * w)
    y = np.zeros((b, heads, c // heads, h * w))
    for image in range(b):
        for head in range(heads):
            q, k, v = rows[image, head].transpose(1, 0, 2)
            likeness = np.exp(q.T @ k / np.sqrt(c // heads))
            y[image, head] = v @ (likeness / likeness.sum(1, keepdims=True)).T
    return x + biased(p["proj"], y.reshape(x.shape))


def block(p, x, embedding, change):
    resample = {"down": lambda y: shrink(BOX, y, 0), "up": lambda y: enlarge(BOX, y)}.get(change, lambda y: y)
    y = biased(p["conv0"], resample(activated(p["norm0"], x)))
    gain, offset = np.split(linear(p["affine"], embedding)[:, :, None, None], 2, axis=1)
    y = silu(offset + group_norm(p["norm1"], y, 1e-5) * (1 + gain))
    x = resample(x)
    x = biased(p["conv1"], y) + (biased(p["skip"], x) if "skip" in p else x)
    return attend(p, x) if "proj" in p else x


def waves(x, n):
    frequencies = 10000.0 ** -(np.arange(n // 2) / (n // 2))
    return np.array([[trig(f * number) for trig in (np.cos, np.sin) for f in frequencies] for number in x])


def adm(params, x, condition, second, class_labels, augment_labels, *, levels, num_blocks, patch_size=1):
    """`x` and the result are [B, H, W, C]. Which blocks attend, which shortcuts have a layer, is read from `params`."""
    n = params["map_layer0"]["kernel"].shape[0]
    embedding = waves(condition, n) + linear(params["map_second"], waves(second, n))
    embedding = silu(linear(params["map_layer0"], embedding + linear(params["map_augment"], augment_labels)))
    embedding = silu(linear(params["map_layer1"], embedding) + linear(params["map_label"], class_labels))
    x, skips = fold(x, patch_size), []
    for kind, name in steps(*x.shape[2:], levels, num_blocks, pyramid=False):
        if kind == "first":
            x = biased(params[name], x)
        else:
            x = np.concatenate([x, skips.pop()], 1) if kind == "join" else x
            x = block(params[name], x, embedding, name.rsplit("_", 1)[1])
        if kind in ("first", "push"):
            skips.append(x)
    assert not skips
    return unfold(biased(params["out_conv"], activated(params["out_norm"], x)), patch_size)
