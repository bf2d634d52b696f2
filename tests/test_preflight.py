"""The preflight as people run it: a table and a JSON file, on pretended devices and for TPUs that are not here."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import tiny

from configs import fashion_mnist, smoke
from warm_jax.accelerators import topology
from warm_jax.experiments import experiment
from warm_jax.preflight import preflight

ROOT = pathlib.Path(__file__).parent.parent


def launch(workdir, text, *arguments, config="configs/smoke.py"):
    command = [sys.executable, "-m", "warm_jax.main", f"--config={config}", "--mode=preflight", f"--topology={text}"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [*command, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def parameters(config):
    """The number of parameters of a config's network."""
    params = jax.eval_shape(experiment.build(config).model.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def check(made, count, devices):
    """What is known beforehand of the programs of `configs/smoke.py`, with a network of `count` parameters."""
    step, draw = made["programs"]["train step"], made["programs"]["sampling loop"]
    assert (made["parameters"], made["devices"], step["batch"], draw["batch"]) == (count, devices, 16, 16)
    (reduced,) = step["collectives"]
    # One gradient's worth; less where two parameters have the same gradient (a block's biases that are added up).
    assert 0.98 * 4 * count <= reduced["bytes"] <= 4 * count + 4 * 64
    # Parameters, their average and Adam's moments come in, and a share of 16 images of 784 bytes and their labels.
    assert step["memory"]["arguments"] == pytest.approx(16 * count + 16 * (784 + 4) / devices, rel=0.01)
    assert made["state_bytes"] == 16 * count + 4 * 4  # and four counters
    assert made["fits"] is None and "roofline" not in step


def test_on_pretended_devices(tmp_path, monkeypatch, capsys, quick_compile):
    """In this process, whose devices are pretended too, and with a network that compiles quickly."""
    real = experiment.build
    monkeypatch.setattr(experiment, "build", lambda config: tiny.with_network(real(config), tiny.Linear()))
    run = preflight.prepare(smoke.get_config(), tmp_path, "cpu:8")
    count = parameters(run.config)
    monkeypatch.setattr(preflight, "_ask", lambda *args: json.loads(json.dumps([*preflight.examine(*args)][-1])))
    assert preflight.preflight(run) == 0
    made = json.loads((tmp_path / "preflight-cpu-8.json").read_text())
    check(made, count, devices=8)
    said = capsys.readouterr().out
    assert f"cpu:8: 8 × pretended CPU device; {count:,} parameters, float32, batch 16" in said
    assert "no limit known" in said and "no roofline" in said
    row = next(line for line in said.splitlines() if line.startswith("all-reduce"))
    assert "1 ×, " in row and f"{4 * count / 1e3:.1f}"[:3] in row  # in kB, the sums beside it being small


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    done = launch(tmp_path, "cpu:2")
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr
    made = json.loads((tmp_path / "preflight-cpu-2.json").read_text())
    check(made, parameters(smoke.get_config()), devices=2)
    assert "compiling the sampling loop for 2 × pretended CPU device" in done.stdout


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("v5e:3x3", {}, "there are v4"),
        (
            "cpu:3",
            {},
            "train.batch_size 16 does not divide over 3 device(s) × 1 accumulation step(s) = 3; use 15 or 18",
        ),
        ("v5e:smallest", {"train.accumulation": 32}, "accumulation"),
        ("cpu:2", {"model.channels": -1}, "channels"),
    ],
)
def test_bad_input(text, changes, said, tmp_path):
    config = smoke.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        preflight.prepare(config, tmp_path, text)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"libtpu: pip install 'warm_jax\[preflight\]'"):
        preflight.prepare(smoke.get_config(), tmp_path, "v5e:2x2")
    with pytest.raises(OSError, match=r"jax-cuda13-plugin .* nvidia-cuda-nvcc .*pip install 'warm_jax\[preflight-gpu"):
        preflight.prepare(smoke.get_config(), tmp_path, "gpu:h100x8")


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    run = preflight.prepare(smoke.get_config(), tmp_path, "cpu:2")
    (target,) = topology.parse("cpu:4")  # not the devices that the process will have
    monkeypatch.setattr(topology, "environment", lambda target, flags: {"JAX_PLATFORMS": "nonsense"})
    with pytest.raises(OSError, match=r"the compiler for cpu:4 failed \(status 1\): .*nonsense"):
        preflight.preflight(preflight.Run(run.config, [target], "cpu:4", tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a TPU's compiler takes minutes
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the wheel libtpu")
def test_the_bundled_config_on_the_smallest_slice(tmp_path):
    """753,000 parameters on one v5e chip: everything fits, and nothing is sent."""
    done = launch(tmp_path, "v5e:smallest", config="configs/fashion_mnist.py")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "preflight-v5e-smallest.json").read_text())
    assert made["tried"] == [{"topology": "v5e:1x1", "fits": True, "compiled": True}]
    assert made["programs"]["train step"]["collectives"] == []
    assert made["programs"]["train step"]["compiler"]["flops"] > 0
    assert made["programs"]["sampling loop"]["roofline"]["seconds"] > 0
    assert made["images_in_all"] == fashion_mnist.get_config().train.steps * 32


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the wheel libtpu")
def test_what_is_far_too_large_is_refused_with_numbers(tmp_path):
    """A million images on one chip: the compiler's words are its own, and may change with it."""
    done = launch(tmp_path, "v5e:1x1", "--config.train.batch_size=1048576")
    assert done.returncode == 0, done.stderr
    assert "DOES NOT FIT: train step" in done.stdout and "--config.train.accumulation=" in done.stdout
    made = json.loads((tmp_path / "preflight-v5e-1x1.json").read_text())
    assert made["fits"] is False and made["programs"]["train step"]["memory"]["total"] > made["chip"]["memory"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a TPU's compiler takes minutes
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the wheel libtpu")
def test_the_gradients_are_sent_once_over_four_chips(tmp_path):
    done = launch(tmp_path, "v5e:2x2", config="configs/fashion_mnist.py")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "preflight-v5e-2x2.json").read_text())
    sent = sum(one["bytes"] for one in made["programs"]["train step"]["collectives"])
    assert 0.95 * 4 * made["parameters"] <= sent <= 1.01 * 4 * made["parameters"]
