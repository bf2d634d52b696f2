"""A second DDPM++ / NCSN++, in numpy float64, channels first, one flat list of steps: `test_unet.py` compares with it.

Written from the description (recipes §1), and without `warm_jax` or Flax: only the names of the parameters are common.
Resampling is the literal 2-d filter, and attention reads q, k, v in NVIDIA's interleaved order.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def group_norm(p, x, epsilon=1e-6):
    b, c = x.shape[:2]
    groups = x.reshape(b, min(32, c // 4), -1)
    groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + epsilon)
    return groups.reshape(x.shape) * p["scale"][:, None, None] + p["bias"][:, None, None]


def conv(kernel, x, pad):
    """`kernel` is [height, width, in, out]; a cross-correlation, as networks have it."""
    size = kernel.shape[0]
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    h, w = x.shape[2] - size + 1, x.shape[3] - size + 1
    y = np.zeros((x.shape[0], kernel.shape[3], h, w))
    for i in range(size):
        for j in range(size):
            y += np.einsum("bchw,cd->bdhw", x[:, :, i : i + h, j : j + w], kernel[i, j])
    return y


def biased(p, x):
    return conv(p["kernel"], x, p["kernel"].shape[0] // 2) + p["bias"][:, None, None]


def shrink(f, x, pad):
    """Every second output of the 2-d filter `f`, pixel by pixel."""
    x, n = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)]), len(f)
    rows, columns = range(0, x.shape[2] - n + 1, 2), range(0, x.shape[3] - n + 1, 2)
    y = [np.stack([(x[:, :, i : i + n, j : j + n] * f).sum((2, 3)) for j in columns], -1) for i in rows]
    return np.stack(y, -2)


def enlarge(f, x):
    """Every pixel paints 4 `f`, two pixels from its neighbour's; the border of (n - 1) // 2 is cut off."""
    (b, c, h, w), n = x.shape, len(f)
    canvas, cut = np.zeros((b, c, 2 * h + n - 2, 2 * w + n - 2)), (n - 1) // 2
    for i in range(h):
        for j in range(w):
            canvas[:, :, 2 * i : 2 * i + n, 2 * j : 2 * j + n] += 4 * f * x[:, :, i, j, None, None]
    return canvas[:, :, cut : cut + 2 * h, cut : cut + 2 * w]


def interleaved(p):
    """A block's qkv in NVIDIA's order of rows, which a file of theirs already has (`qkv_rows`)."""
    if "qkv_rows" in p:
        return p["qkv_rows"]
    c = p["qkv"]["bias"].size // 3
    rows = [i * c + j for j in range(c) for i in range(3)]  # our column of NVIDIA's row 3j + i
    return {name: value[..., rows] for name, value in p["qkv"].items()}


def attend(p, x):
    b, c, h, w = x.shape
    qkv = biased(interleaved(p), group_norm(p["norm2"], x))
    q, k, v = np.moveaxis(qkv.reshape(b, c, 3, h * w), 2, 0)
    weights = np.einsum("bcq,bck->bqk", q, k) / np.sqrt(c)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
    return (x + biased(p["proj"], y)) / np.sqrt(2)


def block(p, x, embedding, f, change):
    cases = {"": lambda y: y, "down": lambda y: shrink(f, y, (len(f) - 1) // 2), "up": lambda y: enlarge(f, y)}
    resample = cases[change]
    y = biased(p["conv0"], resample(silu(group_norm(p["norm0"], x)))) + linear(p["affine"], embedding)[:, :, None, None]
    y = biased(p["conv1"], silu(group_norm(p["norm1"], y)))
    shortcut = resample(x)
    x = ((biased(p["skip"], shortcut) if "skip" in p else shortcut) + y) / np.sqrt(2)
    return attend(p, x) if "proj" in p else x


def fold(x, p):
    """[B, H, W, C] to [B, p²C, H/p, W/p]; within a patch: row, column, channel."""
    return np.concatenate([x[:, i::p, j::p] for i in range(p) for j in range(p)], -1).transpose(0, 3, 1, 2)


def unfold(x, p):
    """Back from `fold`."""
    b, c, h, w = x.shape
    c //= p**2
    y = np.zeros((b, h * p, w * p, c))
    for k in range(p * p):
        y[:, k // p :: p, k % p :: p] = x[:, k * c : (k + 1) * c].transpose(0, 2, 3, 1)
    return y


def waves(x, n):
    angle = np.outer(x, (1 / 10000) ** (np.arange(n // 2) / (n // 2 - 1)))
    return np.hstack([np.sin(angle), np.cos(angle)])


def steps(height, width, levels, num_blocks, pyramid):
    """(kind, name) in order of execution; kinds: first, push (a block whose output is a skip), aux, plain, join."""
    name = [f"{height >> i}x{width >> i}" for i in range(levels)]
    yield "first", f"enc_{name[0]}_conv"
    for i in range(levels):
        if i > 0:
            yield "push", f"enc_{name[i]}_down"
            if pyramid:
                yield "aux", f"enc_{name[i]}_aux_residual"
        for j in range(num_blocks):
            yield "push", f"enc_{name[i]}_block{j}"
    yield from (("plain", f"dec_{name[-1]}_in0"), ("plain", f"dec_{name[-1]}_in1"))
    for i in range(levels - 1, -1, -1):
        if i < levels - 1:
            yield "plain", f"dec_{name[i]}_up"
        for j in range(num_blocks + 1):
            yield "join", f"dec_{name[i]}_block{j}"


def unet(params, x, condition, second, class_labels, augment_labels, *, architecture, levels, num_blocks, patch_size=1):
    """`x` and the result are [B, H, W, C]. Which blocks attend, which shortcuts have a layer, is read from `params`."""
    taps = np.array({"ddpmpp": [1, 1], "ncsnpp": [1, 3, 3, 1]}[architecture], np.float64)
    f = np.outer(taps, taps) / taps.sum() ** 2
    n = params["map_layer0"]["kernel"].shape[0]
    if architecture == "ddpmpp":
        embedding = waves(condition, n)
    else:
        angle = np.outer(condition, 2 * np.pi * params["map_noise"]["freqs"])
        embedding = np.hstack([np.sin(angle), np.cos(angle)])
    embedding = embedding + linear(params["map_second"], waves(second, n))
    embedding = embedding + linear(params["map_label"], class_labels * np.sqrt(class_labels.shape[1]))
    embedding = embedding + linear(params["map_augment"], augment_labels)
    embedding = silu(linear(params["map_layer1"], silu(linear(params["map_layer0"], embedding))))

    x = aux = fold(x, patch_size)
    skips = []
    for kind, name in steps(*x.shape[2:], levels, num_blocks, architecture == "ncsnpp"):
        q = params[name]
        if kind == "first":
            x = biased(q, x)
            skips.append(x)
        elif kind == "aux":
            aux = shrink(f, conv(q["kernel"], aux, 2), 0) + q["bias"][:, None, None]
            x = skips[-1] = aux = (x + aux) / np.sqrt(2)
        else:
            change = name.rsplit("_", 1)[1]
            x = np.concatenate([x, skips.pop()], 1) if kind == "join" else x
            x = block(q, x, embedding, f, change if change in ("down", "up") else "")
            if kind == "push":
                skips.append(x)
    assert not skips
    return unfold(biased(params["out_conv"], silu(group_norm(params["out_norm"], x))), patch_size)
