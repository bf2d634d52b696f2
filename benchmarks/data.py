"""Images a second from disk and memory into batches on the device, and what augmentation costs. Prints Markdown tables.

    python benchmarks/data.py [--seconds=3]

The images are made here: smooth colour with noise, which compresses about as photographs do. "In memory" is from
150 MB, the size of CIFAR-10, whatever the size of an image.
"""

import argparse
import contextlib
import io
import os
import pathlib
import tempfile
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from warm_jax.data import arrays, augment, decoding, pipeline, prepare, sources


def cifar10_step_flops() -> float:
    """Of one image in a training step of EDM's DDPM++: 256 channels at 32², 16², 8², convolutions only.

    Forward, and twice as much backward, at two operations a multiply-add.
    """

    def block(inputs: int, side: int) -> int:
        return side**2 * 256 * (9 * inputs + 9 * 256 + (inputs != 256) * inputs)

    down = block(128, 32) + 3 * block(256, 32) + 5 * block(256, 16) + 5 * block(256, 8)
    up = 2 * block(256, 8) + 5 * block(512, 8) + sum(block(256, side) + 5 * block(512, side) for side in (16, 32))
    return 3 * 2 * float(down + up)


def make_zip(path: pathlib.Path, count: int, side: int, kind: str) -> str:
    random = np.random.RandomState(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            smooth = Image.fromarray(random.randint(0, 256, (4, 4, 3)).astype(np.uint8))
            pixels = np.asarray(smooth.resize((side, side), Image.Resampling.BICUBIC), np.int16)
            pixels = np.clip(pixels + random.randint(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            if kind == "JPEG":
                Image.fromarray(pixels).save(stream, "JPEG", quality=90)
            content = stream.getvalue() if kind == "JPEG" else decoding.encode_png(pixels)
            archive.writestr(f"{i:06d}.{kind.lower()}", content)
    return f"zip:{path}"


def containers(path: str) -> dict[str, str]:
    """The same images in a zip, a folder and an ArrayRecord, as sources."""
    file = pathlib.Path(path.removeprefix("zip:"))
    with zipfile.ZipFile(file) as archive:
        archive.extractall(file.with_suffix(""))  # our own, just made
    records = file.with_suffix(".arrayrecord")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.run(path, str(records))
    return {"zip": path, "folder": f"folder:{file.with_suffix('')}", "ArrayRecord": f"arrayrecord:{records}"}


def rate(source, batch_size: int, seconds: float, **options) -> float:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    iterator = pipeline.to_device(pipeline.batches(source, seed=0, batch_size=batch_size, **options), sharding)
    for _ in range(4):
        jax.block_until_ready(next(iterator))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        jax.block_until_ready(next(iterator))
        count += batch_size
    return count / (time.perf_counter() - start)


def decoded_alone(source, seconds: float) -> float:
    """One thread, no pipeline."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        source.read(np.arange(count, count + 64) % len(source))
        count += 64
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {jax.devices()[0].platform}; images a second\n")
    print("| images | batch | in memory | decoded by one thread | Grain, threads | Grain, 2 workers |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for side, batch_size, count in [(32, 512, 4096), (64, 256, 2048), (128, 32, 1024)]:
            pixels = np.random.RandomState(0).bytes(150_000_000 // (side * side * 3) * side * side * 3)
            memory = arrays.from_arrays("memory", np.frombuffer(pixels, np.uint8).reshape(-1, side, side, 3))
            in_memory = rate(memory, batch_size, seconds)
            for kind in ("PNG", "JPEG"):
                made = containers(make_zip(pathlib.Path(folder, f"{side}{kind}.zip"), count, side, kind))
                for container, spec in made.items():
                    if container == "ArrayRecord" and kind == "JPEG":
                        continue  # `prepare` writes PNG
                    source = sources.open_source(spec)
                    numbers = [
                        in_memory,
                        decoded_alone(source, seconds),
                        rate(source, batch_size, seconds, memory_limit=0),
                        rate(source, batch_size, seconds, memory_limit=0, num_workers=2),
                    ]
                    cells = " | ".join(f"{number:,.0f}" for number in numbers)
                    print(f"| {side}² {kind}, {container} | {batch_size} | {cells} |", flush=True)
    print("\n| augmentation | Mflop an image | of a CIFAR-10 DDPM++ step | images a second here |\n|---|---|---|---|")
    for side in (32, 64, 128):
        batch = jnp.zeros((16, side, side, 3))
        compiled = jax.jit(augment.augment, static_argnums=2).lower(jax.random.key(0), batch, 0.12).compile()
        flops = compiled.cost_analysis()["flops"] / len(batch)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            jax.block_until_ready(compiled(jax.random.key(count), batch))
            count += len(batch)
        share = f"{flops / cifar10_step_flops():.3%}" if side == 32 else "–"
        print(f"| {side}² | {flops / 1e6:.1f} | {share} | {count / (time.perf_counter() - start):,.0f} |")


if __name__ == "__main__":
    main()
