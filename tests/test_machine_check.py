"""The pieces of benchmarks/accelerator.py and of what it stands on; slowly, its short form."""

import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from warm_jax.accelerators import topology

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import accelerator_parts as parts  # noqa: E402
import curves  # noqa: E402
import gradients  # noqa: E402
import sampling  # noqa: E402


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_fails_and_what_does_not_fit_are_rows_and_the_rest_goes_on(tmp_path):
    answer = parts.Answer(tmp_path / "rows", 100)

    def too_large():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 GiB")

    answer.attempt({"program": "step", "images_per_device": 8}, 0, too_large)
    assert answer.attempt({"program": "step", "images_per_device": 16}, 1000, too_large) == 1000
    assert answer.attempt({"program": "step", "images_per_device": 4}, 0, lambda: {"mfu": 0.5}) < 1
    failed, skipped, done = rows_of(tmp_path / "rows")
    assert failed["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert re.fullmatch(r"(99|100) s left, about 1000 needed", skipped["skipped"])
    assert done == {"program": "step", "images_per_device": 4, "mfu": 0.5}
    assert accelerator.speed(failed).startswith("| step | 8 | failed: RuntimeError: RESOURCE_EXHAUSTED")
    assert accelerator.speed(failed).count("|") == accelerator.speed(skipped).count("|") == 12


def test_the_table(tmp_path):
    about = {"kind": "NVIDIA H100 80GB HBM3", "count": 1, "jax": "0.10", "known": "h100", "platform": "cuda"}
    row = {"program": "train step, cifar10", "images_per_device": 64, "compile_seconds": 31.4, "milliseconds": 12.0}
    row |= {"images_per_second": 64 / 0.012, "mfu": 0.5, "bound": 9.0, "of_bound": 0.75, "limit": "memory traffic"}
    row |= {"seen": 3 * 2**30, "foretold": 2**31}
    checks = [
        {"check": "doctor", "measured": "all right", "expected": "no problem", "good": True},
        {"check": "tests", "measured": "1 failed", "expected": "none", "good": False},
        {"check": "sample", "skipped": "3 s left"},
    ]
    said = accelerator.markdown(about, [*checks, row], 2.0)
    assert "1 × NVIDIA H100 80GB HBM3, JAX 0.10, 2.0 minutes." in said
    wanted = "31 | 12.00 | 5,333.3 | 50.0% | 9.00 (memory traffic) | 75% | 3.00 | 2.00 |"
    assert f"| train step, cifar10 | 64 | {wanted}" in said
    assert "| doctor | all right | no problem | yes |" in said and "| tests | 1 failed | none | NO |" in said
    assert "| sample | skipped: 3 s left | | – |" in said and "roofline" not in said
    strange = accelerator.markdown(about | {"kind": "NVIDIA B900", "known": ""}, [], 1.0)
    assert "Not known to the roofline: NVIDIA B900" in strange and "TPU v5e" in strange and "H100 SXM 80 GB" in strange


def test_a_process_that_fails_or_takes_too_long():
    status, said = accelerator.run([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], 3)
    assert (status, said) == (None, "here\n")
    assert accelerator.ended("x", status, said)["failed"] == "cut off: its time was over"
    status, said = accelerator.run([sys.executable, "-c", "raise ValueError('of this')"], 60)
    assert accelerator.ended("x", status, said) == {"check": "x", "failed": "status 1: ValueError: of this"}


@pytest.mark.parametrize("wrong", ["--only=nothing", "--minutes=0", "--minutes=nan"])
def test_wrong_usage(wrong, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["accelerator.py", wrong, f"--out={tmp_path / 'out'}"])
    assert accelerator.main() == 2
    assert capsys.readouterr().err.startswith("error: --only=")
    assert not (tmp_path / "out").exists()


def test_work_is_queued_two_ahead():
    """And all of it is waited for before the clock is read."""
    begun, waiting, most = [], [], 0

    def run():
        nonlocal most
        begun.append(len(begun))
        waiting.append(begun[-1])
        most = max(most, len(waiting))
        return begun[-1]

    assert parts.timed(run, waiting.remove, 0.0, least=5) > 0
    assert (len(begun), waiting, most) == (parts._WARM + 5, [], parts._AHEAD + 1)


def test_chips_that_are_here():
    target = topology.here("NVIDIA H100 80GB HBM3", 2)
    assert (target.chip.name, target.devices, target.link) == ("H100 SXM 80 GB", 2, 450e9)
    assert topology.here("cpu", 2) is None and topology.kind_of("NVIDIA H100 PCIe") == ""
    assert topology.kind_of("TPU v5 lite") == "v5e"


def test_gradients_are_compared_by_layer():
    """Two layers at right angles to one another, one turned by 60°, and one too small to tell."""
    exact = {"params": {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0]), "c": jnp.array([1e-6, 0.0])}}
    found = {"params": {"a": jnp.array([1.5, 1.5 * 3**0.5]), "b": jnp.array([0.0, 4.0]), "c": jnp.array([0.0, 1.0])}}
    cosine, error, least, name, worst, left_out = gradients.compare(exact, found)
    assert cosine == pytest.approx((4.5 + 16) / 5 / 26**0.5)
    assert error == pytest.approx(10**0.5 / 5, rel=1e-5)
    assert (least, worst) == (pytest.approx(0.5), pytest.approx(1.0)) and name.endswith("a") and left_out == 1
    assert "| 5.0e-01 |" in gradients.row("net", "bfloat16", (cosine, error, least, name, worst, left_out))


def test_curves_are_told_by_precision_and_seed():
    rows = [
        {"precision": name, "seed": seed, "scores": {"10": base + seed / 10}}
        for name, base in (("float32", 1.0), ("bfloat16 of GPUs", 1.1))
        for seed in (0, 1)
    ]
    said = curves.table(rows)
    assert "| float32 | 1.05000 ± 0.07071 |" in said
    assert "| bfloat16 of GPUs less float32, each seed | +10.00%, +9.09% |" in said


def test_ratios_are_of_pairs():
    assert sampling.summary([(10.0, 9.0), (20.0, 10.0), (30.0, 29.0)]) == (20.0, 10.0, 0.9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_of_it_on_a_cpu(tmp_path):
    line = [sys.executable, "benchmarks/accelerator.py", "--smoke", "--minutes=12", f"--out={tmp_path}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "accelerator.json").read_text())
    named = {row.get("program") or row["check"] for row in found["rows"]}
    assert named >= {"doctor", "tests marked accelerator", "train step, cifar10", "train step, ffhq64"}
    assert all(np.isfinite(row["images_per_second"]) for row in found["rows"] if "program" in row)
    assert list((tmp_path / "trace_cifar10").rglob("*.xplane.pb"))
    assert (tmp_path / "accelerator.md").read_text() in done.stdout
