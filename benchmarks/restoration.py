"""Restoring photographs that the model never saw, beside scikit-image's methods: PSNR and SSIM, and a picture.

    pip install scikit-image
    python benchmarks/restoration.py --workdir=runs/restoration [--out=restoration.png] [--levels=0:25,1:10]

The photographs are the four in colour that ship with scikit-image: astronaut, chelsea, coffee and rocket, whole. Blur
is scipy's Gaussian filter, of α pixels; noise is Gaussian, σ of 255; nothing is clipped or rounded. All methods know
α and σ. Each classical one that has a knob gets the best of a range for each level, chosen on these same photographs by
their mean PSNR: more than anybody restoring an unknown photograph could do, and in their favour. "denoised, then" is
total variation first. The model's knobs are none; "estimated" is the model told neither α nor σ.
"""

import argparse
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data, metrics, restoration

from warm_jax.restoration import estimation as estimated
from warm_jax.restoration import posterior

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
LEVELS = "0:15,0:25,0:50,1:10,1:25,2:10,2:25"
# At some levels: a photograph and the corner of a cut of it. Around a cut so much more is restored.
SHOWN = {(0, 50): ("chelsea", 80, 130), (1, 10): ("astronaut", 64, 170), (2, 10): ("coffee", 130, 220)}
CUT, AROUND = 128, 32


def degraded(image: np.ndarray, alpha: float, sigma: float, seed: int) -> np.ndarray:
    """`image` `[h, w, 3]` in [0, 1], blurred and noisy."""
    blurred = ndimage.gaussian_filter(image, (alpha, alpha, 0), mode="reflect") if alpha else image
    return blurred + sigma / 255 * np.random.default_rng(seed).normal(size=image.shape)


def kernel(alpha: float) -> np.ndarray:
    """The blur as scikit-image wants it."""
    radius = max(int(4 * alpha + 0.5), 1)
    point = np.zeros((2 * radius + 1, 2 * radius + 1))
    point[radius, radius] = 1
    return ndimage.gaussian_filter(point, alpha) if alpha else point


def by_channel(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.stack([function(x[..., c]) for c in range(x.shape[-1])], axis=-1)


def total_variation(x: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    return restoration.denoise_tv_chambolle(x, weight=strength * sigma / 255, channel_axis=-1)


def baselines(x: np.ndarray, alpha: float, sigma: float) -> Iterator[tuple[str, float, np.ndarray]]:
    """(method, its knob, restored) for every method and every setting of its knob."""
    point, noise = kernel(alpha), sigma / 255
    for strength in (0.5, 0.8, 1.2, 1.8, 2.5):
        yield "total variation", strength, total_variation(x, sigma, strength)
    for strength in (0.4, 0.6, 0.8, 1.0):
        yield (
            "non-local means",
            strength,
            restoration.denoise_nl_means(
                x, patch_size=5, patch_distance=6, h=strength * noise, sigma=noise, fast_mode=True, channel_axis=-1
            ),
        )
    for balance in np.geomspace(1e-3, 10, 9):
        filtered = functools.partial(restoration.wiener, psf=point, balance=balance, clip=False)
        yield "Wiener", balance, by_channel(filtered, x)
    yield (
        "unsupervised Wiener",
        0,
        by_channel(lambda c: restoration.unsupervised_wiener(c, point, clip=False, rng=0)[0], x),
    )
    if not alpha:
        return
    smooth = [(s, total_variation(x, sigma, s)) for s in (0.3, 0.6, 1.0)]
    for count in (2, 4, 8, 16, 32):
        lucy = functools.partial(restoration.richardson_lucy, psf=point, num_iter=count, clip=False)
        yield "Richardson–Lucy", count, by_channel(lambda c, lucy=lucy: lucy(np.maximum(c, 1e-6)), x)
        for strength, first in smooth:
            restored = by_channel(lambda c, lucy=lucy: lucy(np.maximum(c, 1e-6)), first)
            yield "denoised, then Richardson–Lucy", (strength, count), restored
    for (strength, first), balance in itertools.product(smooth, np.geomspace(1e-4, 0.1, 7)):
        filtered = functools.partial(restoration.wiener, psf=point, balance=balance, clip=False)
        yield "denoised, then Wiener", (strength, balance), by_channel(filtered, first)


def scores(clean: np.ndarray, restored: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM, of [0, 1]."""
    restored = np.clip(restored, 0, 1)
    similarity = metrics.structural_similarity(clean, restored, channel_axis=-1, data_range=1)
    return metrics.peak_signal_noise_ratio(clean, restored, data_range=1), similarity


def of_model(restore: posterior.Restorer, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """The posterior mean, [0, 1] in and out."""
    return (restore((2 * x - 1).astype(np.float32), alpha, sigma / 127.5) + 1) / 2


def at_level(
    restore: posterior.Restorer, images: dict[str, np.ndarray], alpha: float, sigma: float
) -> tuple[dict[str, tuple[float, float]], dict[str, np.ndarray], str, float]:
    """Mean scores by method, the model's and the best classical images, the latter's name, seconds a megapixel."""
    found, kept, shown, seconds = {}, {}, {}, 0.0
    for seed, (name, clean) in enumerate(images.items()):
        x = degraded(clean, alpha, sigma, seed)
        found.setdefault(("as it is", 0), []).append(scores(clean, x))
        for method, knob, restored in baselines(x, alpha, sigma):
            found.setdefault((method, knob), []).append(scores(clean, restored))
            kept[name, method, knob] = restored
        started = time.perf_counter()
        restored = of_model(restore, x, alpha, sigma)
        seconds += time.perf_counter() - started
        found.setdefault(("warm_jax", 0), []).append(scores(clean, restored))
        guess = estimated.estimate((2 * x - 1).astype(np.float32))
        told = max(guess.beta, 0.005)
        by_guess = of_model(restore, x, min(guess.alpha, 40 * told), 127.5 * told)
        found.setdefault(("warm_jax, estimated", 0), []).append(scores(clean, by_guess))
        shown[name] = {"given": x, "warm_jax": restored}
    best = {}
    for (method, knob), rows in found.items():
        mean = tuple(np.mean(rows, axis=0))
        if method not in best or mean > best[method][0]:
            best[method] = mean, knob
    classical = max((m for m in best if not m.startswith(("warm_jax", "as it is"))), key=lambda m: best[m])
    for name in images:
        shown[name]["classical"] = kept[name, classical, best[classical][1]]
    pixels = sum(image.shape[0] * image.shape[1] for image in images.values())
    return {method: mean for method, (mean, _) in best.items()}, shown, classical, seconds / pixels * 1e6


def picture(rows: list[list[tuple[str, np.ndarray]]]) -> Image.Image:
    """Rows of named images in [0, 1], side by side, twice their size."""
    side, head = 2 * CUT, 16
    page = Image.new("RGB", ((side + 4) * len(rows[0]), (side + head) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        for j, (name, image) in enumerate(row):
            part = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)).resize((side, side), 0)
            page.paste(part, (j * (side + 4), i * (side + head) + head))
            draw.text((j * (side + 4) + 2, i * (side + head) + 2), name, fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/restoration")
    parser.add_argument("--levels", default=LEVELS, help="α:σ, in pixels and of 255, separated by commas")
    parser.add_argument("--out", default="restoration.png", help="the picture")
    flags = parser.parse_args()
    restore = posterior.load(pathlib.Path(flags.workdir), steps=100)
    images = {name: np.asarray(getattr(data, name)())[..., :3] / 255.0 for name in NAMES}
    of_model(restore, images[NAMES[0]], 1, 25)  # which compiles it
    columns, rows = [], []
    for alpha, sigma in (map(float, level.split(":")) for level in flags.levels.split(",")):
        found, shown, classical, seconds = at_level(restore, images, alpha, sigma)
        columns.append((f"{alpha:g} px, {sigma:g}", found))
        print(f"α {alpha:g} px, σ {sigma:g} of 255; the model took {seconds:.1f} s a megapixel", flush=True)
        for method, (psnr, ssim) in sorted(found.items(), key=lambda item: -item[1][0]):
            print(f"    {psnr:6.2f} dB  {ssim:.3f}  {method}", flush=True)
        if (alpha, sigma) in SHOWN:
            name, top, left = SHOWN[alpha, sigma]
            cut = slice(top, top + CUT), slice(left, left + CUT)
            x = shown[name]["given"]
            window = tuple(slice(first - AROUND, first + CUT + AROUND) for first in (top, left))
            draw = restore.samples((2 * x[window] - 1).astype(np.float32), alpha, sigma / 127.5, 1)[0]
            row = [(f"{name}: blur {alpha:g} px, noise {sigma:g}/255", x[cut])]
            row += [(f"best classical: {classical}", shown[name]["classical"][cut])]
            row += [("warm_jax, posterior mean", shown[name]["warm_jax"][cut])]
            row += [("warm_jax, a posterior sample", (draw[AROUND:-AROUND, AROUND:-AROUND] + 1) / 2)]
            rows.append([*row, ("the photograph", images[name][cut])])
    methods = list(dict.fromkeys(method for _, found in columns for method in found))
    print("\n| PSNR in dB (SSIM) | " + " | ".join(title for title, _ in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for method in methods:
        cells = [f"{found[method][0]:.2f} ({found[method][1]:.3f})" if method in found else "–" for _, found in columns]
        print(f"| {method} | " + " | ".join(cells) + " |")
    if rows:
        picture(rows).quantize(256).save(flags.out, optimize=True)
        print(f"\nwritten to {flags.out}")


if __name__ == "__main__":
    main()
