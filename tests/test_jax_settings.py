"""Settings of JAX that change numbers: images, runs and scores are the same bytes under all of them."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from warm_jax.runtime import jax_settings
from warm_jax.sampling import generate
from warm_jax.training import train

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = pathlib.Path(__file__).parent.parent
# Another value of each: JAX's documentation of its options.
OTHER = {
    "jax_enable_x64": True,
    "jax_explicit_x64_dtypes": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_enable_custom_prng": True,
    "jax_legacy_prng_key": "error",
    "jax_random_seed_offset": 3,
    "jax_high_dynamic_range_gumbel": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_disable_jit": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_transfer_guard": "disallow",
    "jax_transfer_guard_device_to_host": "disallow",
    "jax_transfer_guard_host_to_device": "disallow",
    "jax_transfer_guard_device_to_device": "disallow",
    "jax_disable_most_optimizations": True,
}
OF_THE_COMPILER = {
    "jax_optimization_level": "O0",
    "jax_exec_time_optimization_effort": "-1",
    "jax_memory_fitting_level": "O0",
    "jax_allow_f16_reductions": "0",
    "jax_use_direct_linearize": "0",
    "jax_use_shardy_partitioner": "0",
}


@pytest.fixture
def others():
    """All settings at once as somebody's notebook may have them."""
    before = {name: jax.config.values[name] for name in OTHER if name in jax.config.values}
    try:
        for name in before:
            jax.config.update(name, OTHER[name])
        yield before
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


OF_SOME_VERSIONS = {  # of JAX: the first came after the oldest that is supported, the others went with 0.12
    "jax_explicit_x64_dtypes",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
}


def test_the_table_is_whole():
    """Each with a value that is not the one needed; and there are such settings."""
    assert OTHER.keys() == jax_settings.PINNED.keys() and OF_THE_COMPILER.keys() <= set(jax_settings.OF_THE_COMPILER)
    assert {*OTHER, *jax_settings.OF_THE_COMPILER} - OF_SOME_VERSIONS <= jax.config.values.keys()


@pytest.mark.parametrize("name", [name for name in OTHER if name in jax.config.values])
def test_each_is_put_right_and_back(name):
    untouched = dict(jax.config.values)
    try:
        jax.config.update(name, OTHER[name])
        theirs = dict(jax.config.values)
        with jax_settings.pinned():
            assert jax.config.values[name] == untouched[name] != theirs[name]
        assert jax.config.values == theirs
    finally:
        jax.config.update(name, untouched[name])
    assert jax.config.values == untouched


def test_what_cannot_be_set_is_refused_by_name():
    """A context manager of JAX is stronger than its settings."""
    untouched = dict(jax.config.values)
    refused = pytest.raises(ValueError, match="jax_enable_x64 is True here, and with it")
    with jax.enable_x64(True), refused, jax_settings.pinned():
        raise AssertionError("it was not refused")
    assert jax.config.values == untouched


def train_on(folder, steps):
    """Trains the stand-in network in `folder` to so many steps."""
    config = tiny.config(train__steps=steps, train__decay="none", train__sample_every=0)
    run = tiny.on_devices(tiny.with_network(train.prepare(config, folder), tiny.Linear()), 2)
    assert train.train(run, final_grid=False) == 0


def drawn(folder):
    """The bytes of images and labels, and the last loss."""
    drawing = generate.prepare(tiny.config(train__decay="none"), folder, "0-9", str(folder / "made.npz"), -1)
    assert generate.sample(tiny.on_devices(tiny.with_network(drawing, tiny.Linear()), 2)) == 0
    with np.load(folder / "made.npz") as made:
        images, labels = made["images"].tobytes(), made["labels"].tobytes()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return images, labels, [row["loss/residual"] for row in rows if row["step"] == 6]


def test_a_run_and_its_images_are_the_same_bytes(tmp_path, others, capsys):
    """Begun under all other settings, resumed under JAX's own, and drawn from under the others; and under its own."""
    found = []
    for folder, settings in (("mixed", (OTHER, others, OTHER)), ("plain", (others, others, others))):
        steps = (lambda f: train_on(f, 3), lambda f: train_on(f, 6), lambda f: found.append(drawn(f)))
        for work, values in zip(steps, settings, strict=True):
            for name in others:
                jax.config.update(name, values[name])
            with jax_settings.pinned():
                work(tmp_path / folder)
    assert found[0] == found[1] and len(found[0][2]) == 1
    assert capsys.readouterr().out.count("resuming from the checkpoint of step 3") == 2


def test_without_it_the_images_would_be_others():
    """So that the test above says something: the generator and its settings do change what is drawn."""
    drawn = set()
    for name, value in (("jax_default_prng_impl", "rbg"), ("jax_random_seed_offset", 3), ("jax_enable_x64", False)):
        before = jax.config.values[name]
        try:
            jax.config.update(name, value)
            drawn.add(np.asarray(jax.random.normal(jax.random.key(0), (4,))).tobytes())
        finally:
            jax.config.update(name, before)
    assert len(drawn) == 3


def test_the_environment_loses_what_would_change_numbers_and_nothing_else(capsys):
    given = {name.upper(): str(value) for name, value in (OTHER | OF_THE_COMPILER).items()}
    kept = {
        "JAX_PLATFORMS": "cpu",
        "JAX_LOG_COMPILES": "1",
        "JAX_COMPILATION_CACHE_DIR": "/c",
        "HOME": "/",
        "JAX_FOO": "",
    }
    environment = given | kept
    jax_settings.take_out(environment)
    assert environment == kept
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(given)
    assert "note: JAX_ENABLE_X64=True is not used: with it some things would become float64" in lines


PROGRAM = """
import os
from warm_jax.runtime import jax_settings
jax_settings.take_out(os.environ)
import jax
print(jax.config.jax_enable_x64, jax.config.jax_default_prng_impl, jax.config.jax_threefry_partitionable)
"""


def test_they_are_taken_out_before_jax_reads_them():
    """Also values that JAX would not start with."""
    environment = {name.upper(): str(value) for name, value in OTHER.items()} | {"JAX_ENABLE_X64": "perhaps"}
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False threefry2x32 True\n"


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["", *(name.upper() for name in OTHER | OF_THE_COMPILER)])
def test_the_command_line_under_each(variable, tmp_path_factory, request):
    """Training, resuming, sampling in another grouping, a score, an export: the bytes without any."""
    folder = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    environment |= {variable: str((OTHER | OF_THE_COMPILER)[variable.lower()])} if variable else {}

    def command(*flags):
        line = [sys.executable, "tests/pod_worker.py", "--config=configs/smoke.py", f"--workdir={folder}", *flags]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    command("--config.train.steps=3", "--config.train.sample_every=0")
    command("--config.train.steps=6", "--config.train.sample_every=0")
    command("--mode=sample", "--config.train.steps=6", "--config.sample.batch_size=3", f"--out={folder / 'made.npz'}")
    command("--mode=evaluate", "--config.train.steps=6", "--config.eval.count=64")
    command("--mode=export", "--config.train.steps=6", f"--out={folder / 'export'}", "--platforms=cpu")
    with np.load(folder / "made.npz") as made:
        found = [made["images"].tobytes(), made["labels"].tobytes()]
    row = json.loads((folder / "results.jsonl").read_text())
    found += [str({name: row[name] for name in row["scores"]})]
    found += [path.read_bytes() for path in sorted((folder / "export").glob("*.safetensors"))]
    expected = request.config.stash.setdefault(_EXPECTED, found)
    assert found == expected and (variable == "" or len(found) == 4)


_EXPECTED = pytest.StashKey[list]()
