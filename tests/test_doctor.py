"""The doctor: what made-up machines have is judged as JAX's installation page says; a real one is looked at."""

import json
import math
import pathlib
import shutil
import subprocess
import sys
from unittest.mock import ANY

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import cifar10, smoke
from warm_jax import main
from warm_jax.doctor import doctor, facts, judge, selftest
from warm_jax.doctor.judge import GIB, NOTE, OK, PROBLEM

ROOT = pathlib.Path(__file__).parent.parent
CACHE_NAME = ("JAX_COMPILATION_CACHE_DIR",)
FOLDER = facts.Folder("/here", 90 * GIB, 100 * GIB, True)
CPU = facts.Jax("", "cpu", (facts.Devices("cpu", 1, 0),))
H100 = facts.Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 81559, "9.0")
V100 = facts.Gpu("Tesla V100-SXM2-16GB", "580.65.06", 16384, "7.0")
CUDA13 = {"jax-cuda13-pjrt": "0.10.2", "jax-cuda13-plugin": "0.10.2"}
GPU = facts.Jax("", "gpu", (facts.Devices("NVIDIA H100 80GB HBM3", 8, 60 * GIB),))


def machine(**changes):
    """A sound one without an accelerator, changed."""
    sound = facts.Facts(
        python="3.12.3",
        system="Linux x86_64",
        versions={"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6"},
        needs={"jax": "0.9.2", "flax": "0.12"},
        plugins={},
        gpus=(),
        tpus=0,
        jax=CPU,
        cores=8,
        memory=32 * GIB,
        memory_free=20 * GIB,
        here=FOLDER,
        cache=FOLDER._replace(path="/cache", size=GIB),
        tensorflow="",
        missing=(),
        environment={},
    )
    return sound._replace(**changes)


def problems(found, status=PROBLEM):
    return [
        (finding.subject, finding.said, finding.remedy) for finding in judge.judge(found) if finding.status == status
    ]


@pytest.mark.parametrize(
    "found",
    [
        machine(),
        machine(gpus=(H100,) * 8, plugins=CUDA13, jax=GPU),
        machine(
            tpus=4, plugins={"libtpu": "0.0.30"}, jax=facts.Jax("", "tpu", (facts.Devices("TPU v5e", 4, 16 * GIB),))
        ),
        machine(needs={}, tensorflow="2.20.0", missing=("plot", "lmdb"), memory=0, memory_free=0),
    ],
)
def test_a_sound_machine_has_no_problem(found):
    assert problems(found) == []


CASES = {  # facts; the subject, what is said, the remedy
    "jaxlib newer than jax": (
        {"versions": {"jax": "0.9.2", "jaxlib": "0.10.2"}},
        *("jax", "jaxlib 0.10.2 is newer than jax 0.9.2", "pip install -U jax jaxlib"),
    ),
    "jaxlib too old": (
        {"versions": {"jax": "0.10.2", "jaxlib": "0.8.0"}, "jax": facts.Jax("jaxlib is version 0.8.0, but …")},
        *("jax", "jax 0.10.2 with the older jaxlib 0.8.0", "pip install -U jax jaxlib"),
    ),
    "no jaxlib": ({"versions": {"jax": "0.10.2"}}, "jax", "jaxlib is not installed", "pip install -U jax jaxlib"),
    "too old for this": (
        {"needs": {"flax": "0.13"}},
        "packages",
        "too old, or not there: flax 0.12.8",
        "pip install -U 'flax>=0.13'",
    ),
    "an old python": ({"python": "3.10.12"}, "python", "3.10.12 is too old", "3.11"),
    "a GPU without a plug-in": (
        {"gpus": (H100,) * 8},
        *("accelerator", "8 × NVIDIA H100 80GB HBM3 (driver 580.65.06)", 'pip install -U "jax[cuda13]"'),
    ),
    "a driver for CUDA 12": (
        {"gpus": (H100._replace(driver="535.183.01"),)},
        *("accelerator", "no CUDA plug-in", 'pip install -U "jax[cuda12]"'),
    ),
    "a driver for CUDA 12, a plug-in for 13": (
        {"gpus": (H100._replace(driver="535.183.01"),), "plugins": CUDA13},
        *("accelerator", "CUDA 13 needs driver 580", "pip uninstall jax-cuda13-pjrt jax-cuda13-plugin; pip install"),
    ),
    "a GPU too old for CUDA 13": ({"gpus": (V100,)}, "accelerator", "V100", 'pip install -U "jax[cuda12]"'),
    "a driver too old for any": (
        {"gpus": (H100._replace(driver="470.57.02"),)},
        *("accelerator", "no CUDA plug-in", "update NVIDIA's driver 470 to at least 525"),
    ),
    "a plug-in of another version": (
        {"gpus": (H100,), "plugins": CUDA13 | {"jax-cuda13-plugin": "0.9.2"}},
        *(
            "plug-in",
            "jax-cuda13-plugin 0.9.2 is of another version than jaxlib 0.10.2",
            'pip install -U "jax[cuda13]"',
        ),
    ),
    "hidden GPUs": (
        {"gpus": (H100,), "plugins": CUDA13, "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        *("accelerator", "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "other CUDA libraries": (
        {"gpus": (H100,), "plugins": CUDA13, "environment": {"LD_LIBRARY_PATH": "/usr/local/cuda-11/lib64"}},
        *("accelerator", "LD_LIBRARY_PATH", "unset LD_LIBRARY_PATH"),
    ),
    "a TPU without libtpu": ({"tpus": 4}, "accelerator", "4 TPU chips", 'pip install -U "jax[tpu]"'),
    "a TPU in use": ({"tpus": 4, "plugins": {"libtpu": "1"}}, "accelerator", "one process at a time", "end the other"),
    "JAX does not start": (
        {"jax": facts.Jax("Unable to initialize backend 'cuda'"), "gpus": (H100,)},
        *("devices", "JAX does not start: Unable to initialize", 'pip install -U "jax[cuda13]"'),
    ),
    "JAX is told of another platform": (
        {"jax": facts.Jax("Unable to initialize backend 'cuda'"), "environment": {"JAX_PLATFORMS": "cuda"}},
        *("devices", "JAX does not start: Unable", "unset JAX_PLATFORMS, which is cuda; or pip install -U jax jaxlib"),
    ),
    "a package that is not there": (
        {"needs": {"pillow": "11.0"}},
        *("packages", "not there: pillow missing", "pip install -U 'pillow>=11.0'"),
    ),
    "a full disk": (
        {"here": FOLDER._replace(free=GIB // 2)},
        *("disk here", "0.5 GiB free of 100.0 GiB", "make room, or give a --workdir elsewhere"),
    ),
    "a cache that cannot be written": (
        {"cache": facts.Folder("/cache/x", 9 * GIB, 9 * GIB, False)},
        *("compiled programs", "/cache/x cannot be written", "JAX_COMPILATION_CACHE_DIR="),
    ),
    "half a coordinator": (
        {"place_error": "--coordinator is ''; give HOST:PORT"},
        *("processes", "--coordinator is ''", "give all three"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_with_its_remedy(case):
    changes, subject, said, remedy = CASES[case]
    found = problems(machine(**changes))
    assert any(s == subject and said in t and remedy in r for s, t, r in found), found


@pytest.mark.parametrize(
    ("changes", "subject", "remedy"),
    [
        (
            {"gpus": (H100,), "plugins": CUDA13, "environment": {"JAX_PLATFORMS": "cpu"}},
            "accelerator",
            "unset JAX_PLAT",
        ),
        ({"tpus": 4, "environment": {"JAX_PLATFORMS": "cpu"}}, "accelerator", "unset JAX_PLATFORMS"),
        ({"tpus": 4, "plugins": {"libtpu": "1"}, "place": "number 0 of 4"}, "accelerator", ""),
        ({"environment": {"JAX_ENABLE_X64": "1"}}, "setting", "unset JAX_ENABLE_X64"),
        ({"environment": {"JAX_REMAT3": "1"}}, "setting", "unset JAX_REMAT3"),
        ({"place": "process 0 of 2"}, "token", "give all processes the same, as from: openssl rand -hex 32"),
        ({"memory_free": GIB // 2}, "memory", ""),
        ({"cache": FOLDER._replace(path="/c", size=30 * GIB)}, "compiled programs", "rm -r /c"),
        ({"versions": {"jax": "0.10.2", "jaxlib": "0.10.1"}, "needs": {}}, "jax", "pip install"),
        ({"plugins": CUDA13 | {"jax-cuda12-plugin": "0.10.2"}}, "plug-in", "pip uninstall jax-cuda12-plugin"),
    ],
)
def test_what_is_worth_a_note_is_no_problem(changes, subject, remedy):
    found = machine(**changes)
    assert problems(found) == []
    assert any(s == subject and remedy in r for s, _, r in problems(found, NOTE))


def test_versions_are_compared_as_numbers():
    assert judge.number("0.10.2.dev20260101+cuda") == (0, 10, 2) and judge.number("0.9.2") < judge.number("0.10.0")
    assert judge.number("unknown") == ()


# ── The self-test ────────────────────────────────────────────────────────────────────────────────────────────────────


def rounded(x, bits):
    """Numbers with so many bits after the first: TF32 keeps 10, bfloat16 7."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)


@pytest.mark.parametrize(("bits", "right"), [(23, True), (10, False), (7, False)])
def test_a_round_trip_that_loses_precision_is_caught(bits, right):
    """A DCT whose products round their operands as TF32 and bfloat16 do, in numpy."""
    n, x = 64, np.random.RandomState(0).normal(size=(64, 64))
    k, j = np.arange(n)[:, None], np.arange(n)
    q = np.sqrt((2 - (k == 0)) / n) * np.cos(np.pi * (j + 0.5) * k / n)

    def times(a, b):
        return rounded(a, bits) @ rounded(b, bits)

    z = times(times(q, x), q.T)
    error = np.abs(times(times(q.T, z), q) - x).max()
    finding = judge.of_check(judge.Check("DCT", "", error, 0, selftest.MOST_ERROR, 0.1), machine())
    assert (finding.status == OK) == right
    assert right or finding.remedy == "pip install -U jax jaxlib"


@pytest.mark.parametrize("value", [0.2610, 0.26, math.nan])
def test_measurements_out_of_range_are_problems(value):
    low, high = selftest.GAUSSIAN_W2 - 2e-4, selftest.GAUSSIAN_W2 + 2e-4
    found = machine(gpus=(H100,), environment={"XLA_FLAGS": "--xla_x"})
    finding = judge.of_check(judge.Check("sampler", "W2", value, low, high, 1.0), found)
    assert finding.status == PROBLEM and finding.remedy == 'unset XLA_FLAGS; or pip install -U "jax[cuda13]"'
    forced = machine(environment={"NVIDIA_TF32_OVERRIDE": "1"})
    finding = judge.of_check(judge.Check("DCT", "", 1e-3, 0, 2e-5, 1.0), forced)
    assert finding.remedy == "unset NVIDIA_TF32_OVERRIDE; or pip install -U jax jaxlib"
    broken = judge.of_check(judge.Check("blur", "", math.nan, 0, 1, 1.0, "no kernel image"), found)
    assert broken.status == PROBLEM and broken.said == "failed: no kernel image"


def test_the_fast_part_of_the_self_test_is_right_here():
    """The table's 0.2607 is a second implementation's; scipy has the blur."""
    checks = {check.subject: check for check in selftest.run(None)}
    assert list(checks) == ["DCT", "blur", "sampler", "speed"]
    for check in checks.values():
        assert judge.of_check(check, machine()).status == OK, check
    assert checks["sampler"].value == pytest.approx(0.2607, abs=1e-4)
    assert checks["DCT"].value < 5e-6 and checks["speed"].value > 0


def test_a_check_that_raises_does_not_end_the_others(monkeypatch):
    def broken():
        raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED\nmore")

    monkeypatch.setattr(selftest, "blur", broken)
    found = {check.subject: check.error for check in selftest.run(None)}
    assert found == {"DCT": "", "blur": "CUDNN_STATUS_NOT_INITIALIZED", "sampler": "", "speed": ""}


# ── The machine here ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_nvidia_smi_says():
    said = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0\nNVIDIA A100, 535.1, [N/A], 8.0\nFailed to initialize NVML\n"
    assert facts.parse_gpus(said) == (H100,)


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 1000)
    found = facts.folder(tmp_path, count=True)
    assert found.size == 1000 and found.writable and 0 < found.free <= found.total
    missing = facts.folder(tmp_path / "not" / "there", count=True)
    assert missing.writable and missing.size == 0 and not (tmp_path / "not").exists()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # as where HOME cannot be searched
        patch.setattr(pathlib.Path, "exists", refused)
        assert facts.folder(tmp_path / "not" / "there") == missing._replace(free=ANY)
        patch.setattr(facts.shutil, "disk_usage", refused)
        assert facts.folder(tmp_path) == facts.Folder(str(tmp_path), 0, 0, True)
    monkeypatch.chdir(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")  # the working folder itself
    assert facts.folder(pathlib.Path()) == facts.Folder(".", 0, 0, False)


def test_only_named_variables_are_read(tmp_path):
    secret = {"AWS_SECRET_ACCESS_KEY": "s3cr3t", "XLA_FLAGS": "--xla_a", "WARM_JAX_TOKEN": "s3cr3t"}
    found = facts.gather(secret, tmp_path)
    known = {"XLA_FLAGS": "--xla_a", "WARM_JAX_TOKEN": "(a secret)"}  # that there is one, and not which
    assert found.environment == known and "s3cr3t" not in repr(found)
    assert found.jax.platform == "cpu" and found.jax.devices[0].count == 8  # as conftest.py has it
    assert found.versions["numpy"] == np.__version__ and problems(found._replace(needs={})) == []


def test_a_config_is_looked_at_too():
    found = list(doctor.of_config(smoke.get_config(), FOLDER))
    assert [finding.status for finding in found] == [OK, OK, OK] and "bundled: 10000" in found[1].said
    missing = list(doctor.of_config(cifar10.get_config(), FOLDER._replace(free=GIB)))
    assert [finding.status for finding in missing] == [OK, PROBLEM, PROBLEM]
    assert (
        missing[1].remedy.startswith("add --config.data.download=True, or curl ")
        and "cifar-10-binary" in missing[1].remedy
    )
    # 55,757,190 parameters in four copies of 4 bytes, and three checkpoints at a time; seven are kept for good.
    assert missing[2].said.startswith("0.8 GiB each, 10 at one time; 1.0 GiB free in /here")
    config = smoke.get_config()  # 20 steps, a snapshot every 2; 10 classes
    config.train.posthoc_ema, config.train.keep_every, config.data.num_classes = (0.05, 0.1), 4, 3
    _, images, room = doctor.of_config(config, FOLDER)
    assert images.status == PROBLEM and "10 classes, and data.num_classes is 3" in images.said
    assert "8 at one time, and 10 snapshots of 0.0 GiB" in room.said
    assert judge.of_checkpoints(GIB, 3, FOLDER, 9 * GIB, 9).status == OK  # 84 of 90
    assert judge.of_checkpoints(GIB, 3, FOLDER, 9 * GIB, 10).status == PROBLEM
    config = smoke.get_config()
    config.train.batch_size = 13
    (wrong,) = doctor.of_config(config, FOLDER)
    assert wrong.status == PROBLEM and "does not divide" in wrong.said


def test_a_place_that_cannot_be_asked_for(monkeypatch):
    """libtpu is there, and JAX cannot be imported: a line, and no traceback."""
    monkeypatch.setattr(doctor.rollcall.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "jax._src", None)
    assert doctor.place({"JAX_PLATFORMS": "tpu"}) == ("", "")
    text, wrong = doctor.place({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[a-b]", "SLURM_PROCID": "0"})
    assert text == "" and "invalid literal" in wrong


def test_a_package_that_cannot_be_imported(tmp_path, capsys, monkeypatch):
    def broken(smoke):
        raise ImportError("cannot import name '_imaging' from 'PIL'")

    monkeypatch.setattr(selftest, "run", broken)
    monkeypatch.setattr(doctor.facts, "gather", lambda *_: machine(environment={"SLURM_STEP_NODELIST": "secret[1-2]"}))
    assert doctor.doctor(None, None, tmp_path, str(tmp_path / "d.json"), {}) == 1
    assert "this program cannot be imported: cannot import name '_imaging'" in capsys.readouterr().out
    written = (tmp_path / "d.json").read_text()
    assert "_imaging" in written and "secret" not in written


@pytest.fixture(autouse=True)
def parsed():
    """Flags can be read."""
    flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
    "out", ["gs://no-bucket/d.json", "a.txt", "folder.json", "none/d.json", "kept.json", "new.json"]
)
def test_a_report_that_cannot_be_written_is_refused_before_the_self_test(tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "kept.json").touch()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)  # whoever runs the tests may be root
    monkeypatch.setattr(main.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(doctor, "doctor", lambda *_: pytest.fail("it began"))
    with flagsaver.flagsaver(mode="doctor", out=out):
        assert main._doctor() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and out in said and said.count("\n") == 1


def test_what_the_doctor_is_told(tmp_path, monkeypatch):
    """A person's own cache is in the environment that is judged, the default's is not; and runs live in --workdir."""
    told, shared = [], []

    def share_cores(config):
        shared.append(config)
        raise RuntimeError("jaxlib is too new")  # which is for the table to say

    monkeypatch.setattr(main, "share_cores", share_cores)
    monkeypatch.setattr(doctor, "doctor", lambda *given: told.append(given) or 0)
    for own in ({"JAX_COMPILATION_CACHE_DIR": "/own"}, {}):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with flagsaver.flagsaver(mode="doctor", workdir=str(tmp_path), out=""):
            assert main._doctor() == 0
        _, _, cache, _, environment, workdir = told[-1]
        assert shared == [None] * len(told)
        assert {name: value for name, value in environment.items() if name in CACHE_NAME} == own
        assert (
            cache == pathlib.Path(own.get(CACHE_NAME[0], main.os.path.expanduser(main.CACHE))) and workdir == tmp_path
        )


def test_the_table_and_the_file(tmp_path, capsys, monkeypatch):
    """A problem is the exit status, in the table, and in the file."""
    bad = [judge.Check("DCT", "largest error 3e-03", 3e-3, 0, 2e-5, 0.1)]
    monkeypatch.setattr(selftest, "run", lambda smoke: iter(bad))
    monkeypatch.setattr(doctor.facts, "gather", lambda *_: machine(gpus=(H100,)))
    out = tmp_path / "doctor.json"
    assert doctor.doctor(None, None, tmp_path, str(out), {}) == 1
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("PROBLEM")]
    assert len(rows) == 2 and "accelerator" in rows[0] and "DCT" in rows[1]
    assert '→ pip install -U "jax[cuda13]"' in said and "2 problems" in said
    written = json.loads(out.read_text())
    assert written["facts"]["gpus"][0]["name"] == H100.name and written["facts"]["jax"]["platform"] == "cpu"
    assert [f["status"] for f in written["findings"]].count("PROBLEM") == 2
    monkeypatch.setattr(doctor.facts, "gather", lambda *_: machine(jax=facts.Jax("no backend")))
    assert doctor.doctor(None, None, tmp_path, "", {}) == 1
    assert "left out, since JAX does not start" in capsys.readouterr().out


def test_it_says_what_is_wrong_where_jax_cannot_be_imported(tmp_path):
    """A jax that refuses its jaxlib, as a version of another year does: a table, and no traceback."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "raise RuntimeError('jaxlib version 9 is newer than and incompatible')"
    )
    command = [sys.executable, "-m", "warm_jax.main", "--mode=doctor"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "JAX does not start: jaxlib version 9 is newer" in done.stdout


@pytest.mark.slow
def test_the_command(tmp_path):
    """All of it as people run it; most of its time is the compilation of a train step."""
    command = [sys.executable, "-m", "warm_jax.main", "--mode=doctor", f"--out={tmp_path / 'doctor.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr
    subjects = [finding["subject"] for finding in json.loads((tmp_path / "doctor.json").read_text())["findings"]]
    assert subjects[-5:] == ["DCT", "blur", "sampler", "train step", "speed"]
