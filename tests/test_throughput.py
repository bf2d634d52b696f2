"""How fast training is: shares of a chip's peak by hand, and a trace that can be opened."""

import pytest
import tiny

from warm_jax.accelerators import topology
from warm_jax.training import step, throughput, train


def test_shares_of_the_peak():
    """Ten steps of 512 images and 40 TFLOP in two seconds, on 8 chips of 100 TFLOP/s: a quarter of what they can do."""
    row = throughput.Speed(images=512, devices=8, flops=40e12, peak=100e12).row(10, 2.0)
    assert row == pytest.approx({"images_per_second": 2560, "images_per_second_per_device": 320, "mfu": 0.25})
    assert "mfu" not in throughput.Speed(512, 8, 40e12, 0.0).row(10, 2.0)


@pytest.mark.parametrize(
    ("kind", "tera"),  # the makers' data sheets
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 0),
        ("NVIDIA H100 PCIe", 0),  # slower than SXM's
        ("cpu", 0),
    ],
)
def test_peaks_by_the_names_that_jax_gives(kind, tera):
    assert topology.peak(kind) == tera * 1e12


def test_a_step_counts_what_its_network_multiplies():
    """Blurring 16 images is a transform and back, two products of 28³ each; the stand-in multiplies classes alone."""
    exp = tiny.build(devices=2)
    found = throughput.of_step(exp, step.trace_step(exp))
    blur, classes = 4 * 2 * 16 * 28**3, 2 * 2 * 16 * 10 * 2  # the second forward and for its gradient, for two heads
    assert found.flops == blur + classes
    assert (found.images, found.devices, found.peak) == (16, 2, 0.0)


def test_a_trace_of_some_steps(tmp_path, quick_compile):
    config = tiny.config(train__steps=20, train__sample_every=0, train__log_every=20)
    run = tiny.with_network(train.prepare(config, tmp_path, profile=True), tiny.Linear())
    assert train.train(run, final_grid=False) == 0
    traces = list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
