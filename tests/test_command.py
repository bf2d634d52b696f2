"""The command: what it takes, in which order, from where; what it says of itself, and of what it does not take."""

import collections
import copy
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny
from absl import flags as absl_flags
from absl.testing import flagsaver

from configs import fashion_mnist, smoke, systems
from warm_jax import main
from warm_jax.cli import flag_table, flags, modes, usage
from warm_jax.experiments import config_files, experiment
from warm_jax.runtime import mesh as meshes
from warm_jax.runtime import workdirs

ROOT = pathlib.Path(__file__).parent.parent
MODES = tuple(flag_table.MODES)
PARTS = ("systems", "analysis", "likelihood", "sampling")  # of configs, which are none themselves
SHIPPED = [path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in PARTS]


@pytest.fixture
def typed(capsys):
    """Parses a command line: arguments -> (exit status or None, stdout, stderr)."""

    def parse(*arguments, then=lambda: None):
        capsys.readouterr()
        with flagsaver.flagsaver():
            absl_flags.FLAGS.unparse_flags()
            try:
                flags.parse(["warm_jax", *arguments])
                status = then()
            except SystemExit as error:
                status = error.code
        return status, *capsys.readouterr()

    return parse


def config_of(typed, *arguments):
    """The config that a command line means."""
    config, _, err = typed(*arguments, then=flags.config)
    assert not isinstance(config, int), err
    return config


# ── What it says of itself ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("mode", MODES)
def test_the_help_of_a_mode_is_of_its_flags_alone(typed, monkeypatch, mode, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["--help", f"--mode={mode}"], [f"--mode={mode}", "--config=nowhere.py", "--helpshort"]):
        status, out, err = typed(*arguments)
        assert (status, err) == (0, "")
        explained = re.findall(r"^  --(\w+)", out.partition("\nConfig\n")[0], re.MULTILINE)
        assert len(explained) == len(set(explained))
        assert {*explained, "mode"} == {name for name, read in flag_table.READ_BY.items() if mode in read}
        assert out.startswith(f"--mode={mode}: ") and "Config\n  " in out
        assert max(map(len, out.splitlines())) <= min(int(columns), 100)
        assert f"\n  {usage.COMMAND} " in out


def test_the_help_of_all_modes(typed):
    status, out, err = typed("-h")
    assert (status, err) == (0, "")
    blocks = dict(re.findall(r"^(\w+)\n((?:  .*\n)+)", out, re.MULTILINE))
    assert [name for name in blocks if name in MODES] == list(MODES)
    for mode in MODES:
        named = re.search(r"^  flags: ((?:.|\n {9})*)", blocks[mode], re.MULTILINE)
        expected = {name for name, read in flag_table.READ_BY.items() if mode in read and len(read) < 12}
        assert set(re.findall(r"--(\w+)", named[1] if named else "")) == expected
        assert usage.COMMAND in blocks[mode]
    assert max(map(len, out.splitlines())) <= 100
    assert "--alsologtostderr" not in out and all(name in out for name in SHIPPED)


def test_the_help_of_the_libraries_too(typed):
    status, out, _ = typed("--helpfull")
    assert status == 0 and "--alsologtostderr" in out and "--topology" in out


def test_every_flag_is_in_the_table():
    declared = absl_flags.FLAGS.flags_by_module_dict()["warm_jax.cli.flags"]
    assert {flag.name for flag in declared} == flag_table.READ_BY.keys()
    for table in (flag_table.EXAMPLES, flag_table.SECTIONS):
        assert table.keys() == flag_table.MODES.keys()
    sections = {name for name, value in fashion_mnist.get_config().items() if hasattr(value, "keys")}
    assert {name for read in flag_table.SECTIONS.values() for name in read} <= sections


PROGRAMS = {  # of a mode: its module, whose `prepare` checks, and the function that does it
    "train": "training.train.train",
    "sample": "sampling.generate.sample",
    "restore": "restoration.restore.restore",
    "compare": "evaluation.compare.compare",
    "analyze": "analysis.analyze.analyze",
    "export": "convert.export.export",
    "preflight": "preflight.preflight.preflight",
    "evaluate": "evaluation.evaluate.evaluate",
}
STARTS = {  # what must be given to a mode for it to come as far as its program
    "prepare": [{"images": "folder:x", "out": "x.zip"}],
    "inspect": [{"images": "folder:x"}],
    "convert": [{"from_inception": "x"}, {"from_dinov2": "x"}, {"from_edm": "x"}, {"from_export": "x"}],
}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "doctor"])
def test_the_table_says_what_is_read(monkeypatch, tmp_path, mode):
    """The values that are asked for on the way to the program, which is a stand-in; main reads those of all modes."""
    read = set()
    absl_flags.FLAGS.mark_as_parsed()

    class Watched(absl_flags.FlagHolder):
        def __init__(self, holder):
            self.holder = holder

        @property
        def value(self):
            read.add(self.holder.name)
            return self.holder.value

        name = property(lambda self: self.holder.name)
        present = property(lambda self: self.holder.present)

    for name, holder in list(vars(flags).items()):
        if isinstance(holder, absl_flags.FlagHolder):
            monkeypatch.setattr(flags, name, Watched(holder))
    if mode in PROGRAMS:
        monkeypatch.setattr(f"warm_jax.{PROGRAMS[mode].rpartition('.')[0]}.prepare", lambda *args, **settings: None)
        monkeypatch.setattr(f"warm_jax.{PROGRAMS[mode]}", lambda *args, **settings: 0)
    monkeypatch.setattr("warm_jax.evaluation.while_training.prepare", lambda run: None)
    monkeypatch.setattr("warm_jax.cli.outputs.lock", lambda *args: None)
    for name in ("data.prepare.run", "analysis.inspection.run", "convert.from_edm.prepare", "convert.from_edm.convert"):
        monkeypatch.setattr(f"warm_jax.{name}", lambda *args, **settings: 0)
    for name in ("evaluation.reference.statistics", "evaluation.reference.convert_weights"):
        monkeypatch.setattr(f"warm_jax.{name}", lambda *args: 0)
    monkeypatch.setattr("warm_jax.convert.export.prepare_import", lambda *args: None)
    monkeypatch.setattr("warm_jax.convert.export.import_export", lambda *args: 0)
    for given in STARTS.get(mode, [{}]):
        with flagsaver.flagsaver(mode=mode, **given):
            assert modes.prepare(mode, tiny.config(), tmp_path)() == 0
    everywhere = {"config", "workdir", "mode", "version", "coordinator", "processes", "process", "start_seconds"}
    assert read - everywhere == {n for n, read_by in flag_table.READ_BY.items() if mode in read_by} - everywhere


def test_every_example_is_taken_as_it_is(typed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("fashion_mnist", "restoration"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        workdirs.save_config(config_files.load(name), tmp_path / "runs" / name)
    for mode, example in flag_table.EXAMPLES.items():
        status, _, err = typed(*shlex.split(example), then=lambda: flags.MODE.value)
        assert (status, err) == (mode, "")


# ── In any order, from anywhere ──────────────────────────────────────────────────────────────────────────────────────


def test_flags_stand_in_any_order(typed):
    arguments = (["--config=smoke:hot"], ["--config.train.steps", "5"], ["--mode=sample"], ["--noconfig.sample.clip"])
    for order in itertools.permutations(arguments):
        config = config_of(typed, *itertools.chain(*order))
        assert (config.process.system, config.train.steps, config.sample.clip) == ("hot", 5, False)
    assert config_of(typed, "--config", "smoke", "--config.train.steps=3", "--config.train.steps=4").train.steps == 4


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_by_name(typed, monkeypatch, tmp_path, name):
    """The same as its file gives in a checkout, in a folder where others' files have its helpers' names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for other in ("__init__", "systems", "analysis", "cifar10", "fashion_mnist", "ffhq64"):
        (tmp_path / "configs" / f"{other}.py").write_text("raise ImportError('not this one')\n")
    monkeypatch.syspath_prepend(tmp_path)
    expected = config_files.load(str(ROOT / "configs" / f"{name}.py"))
    assert config_of(typed, f"--config={name}").to_dict() == expected.to_dict()
    assert "configs" in sys.modules and sys.modules["configs.smoke"] is smoke  # as it was


def test_the_names_are_the_files_that_make_configs():
    assert config_files.names() == SHIPPED


OWN = """from configs import {}
def get_config(system="hot"):
    c = smoke.get_config(system)
    c.seed = 7
    return c
"""


@pytest.mark.parametrize("package", ["configs", "mine"])
@pytest.mark.parametrize("regular", [True, False])
def test_a_config_of_ones_own(typed, monkeypatch, tmp_path, package, regular):
    """By its path, from its project's folder and from another; with what is shipped, and with its neighbours."""
    folder = tmp_path / "project" / package
    folder.mkdir(parents=True)
    (folder / "systems.py").write_text("raise ImportError('not this one')\n")
    (folder / "base.py").write_text("")
    if regular:
        (folder / "__init__.py").write_text("")
    (folder / "own.py").write_text(OWN.format("base, smoke" if package == "configs" else "smoke"))
    for place, path in ((tmp_path / "project", f"{package}/own.py"), (tmp_path, str(folder / "own.py"))):
        monkeypatch.chdir(place)
        config = config_of(typed, f"--config={path}:ddpm")
        assert (config.process.system, config.seed, config.model.channels) == ("ddpm", 7, 8)
        assert config_of(typed, f"--config={path}", "--config.seed=8").seed == 8


def test_as_in_a_checkout_where_there_is_none(typed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = typed("--config=configs/cifar10.py:hot", then=lambda: (flags.config_name(), flags.config_of("ddpm")))
    assert asked[0][0] == "configs/cifar10.py:hot" and asked[0][1].process.system == "ddpm"
    assert config_of(typed, "--config=configs/cifar10.py:hot").process.system == "hot"


# ── A wheel ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree."""
    to = tmp_path_factory.mktemp("wheel")
    steps = ["build", "-b", to / "build", "egg_info", "-e", to, "bdist_wheel", "-b", to / "made", "-d", to]
    done = subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = to.glob("*.whl")
    return found


def test_a_wheel_has_the_configs_where_they_are_in_nobodys_way(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path)
    shipped = {f"warm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if "configs/" in name} == shipped
    assert {name.split("/")[0] for name in names} == {"warm_jax", wheel.name.rpartition("-py3")[0] + ".dist-info"}
    (entry,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert entry.read_text().split() == ["[console_scripts]", "warm_jax", "=", "warm_jax.main:run"]
    # As its console script begins, in a folder of somebody's, with nothing of this checkout in reach.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "own.py").write_text(OWN.format("smoke"))
    code = f"import sys; sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if p not in ('', {str(ROOT)!r}))]\n"
    code += """
from warm_jax.main import flags, run
from warm_jax.experiments import config_files
for name in ("smoke:pfgmpp", "own.py"):
    flags.parse(["warm_jax", f"--config={name}"])
    print(flags.config().process.system, flags.config().seed, config_files.SHIPPED)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "pfgmpp",
        "0",
        f"{tmp_path}/warm_jax/configs",
        "hot",
        "7",
        f"{tmp_path}/warm_jax/configs",
    ]


@pytest.mark.slow
def test_an_installed_wheel(wheel, tmp_path):
    """In an environment of its own, outside of the repository: trained, and sampled from its workdir."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv" / "bin" / "pip", "install", "-q", wheel], check=True)
    command = tmp_path / "venv" / "bin" / "warm_jax"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    for arguments, said in (
        (["--version"], "warm_jax 0.1.0"),
        (["--help"], "fashion_mnist"),
        (["--config=smoke", "--config.train.steps=5"], "--workdir=runs/smoke --mode=sample"),
        (["--workdir=runs/smoke", "--mode=sample", "--seeds=0-3"], "4 PNG files"),
    ):
        done = subprocess.run([command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_a_real_process(tmp_path):
    for module, argument, said in (("warm_jax", "--version", "warm_jax "), ("warm_jax.main", "--help", "sample\n")):
        command = [sys.executable, "-m", module, argument]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert said in done.stdout and not done.stderr


# ── Values as people write them ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.sample.class_label=None", "sample.class_label", None),
        ("--config.sample.class_label=3", "sample.class_label", 3),
        ("--config.sample.bnr=2", "sample.bnr", 2.0),
        ("--config.sample.rho=none", "sample.rho", None),
        ("--config.sample.schedule=None", "sample.schedule", None),
        ("--config.sample.guide=None", "sample.guide", "None"),  # a folder may be called so
        ("--config.eval.metrics=fd,lsd", "eval.metrics", ("fd", "lsd")),
        ("--config.eval.metrics=fd", "eval.metrics", ("fd",)),
        ("--config.eval.metrics=(fd, lsd)", "eval.metrics", ("fd", "lsd")),
        ("--config.eval.metrics=('fd','lsd')", "eval.metrics", ("fd", "lsd")),
        ("--config.analysis.models=runs/a,gs://b/c-1", "analysis.models", ("runs/a", "gs://b/c-1")),
        ("--config.model.attention=16,8", "model.attention", (16, 8)),
        ("--config.model.attention=(16,)", "model.attention", (16,)),
        ("--config.model.attention=[16, 8]", "model.attention", (16, 8)),
        ("--config.model.attention=16", "model.attention", (16,)),
        ("--config.model.channel_mult=()", "model.channel_mult", ()),
        ("--config.model.channel_mult=", "model.channel_mult", ()),
        ("--config.analysis.bnrs=0,0.5,2", "analysis.bnrs", (0, 0.5, 2)),
        ("--config.train.steps=1e6", "train.steps", 1_000_000),
        ("--config.train.steps=390_625", "train.steps", 390_625),
        ("--config.train.learning_rate=1", "train.learning_rate", 1.0),
        ("--config.sample.clip=true", "sample.clip", True),
        ("--config.sample.clip", "sample.clip", True),
        ("--config.sample={'steps': 3}", "sample.steps", 3),
    ],
)
def test_values_are_understood(typed, argument, key, value):
    found = config_of(typed, "--config=smoke", argument)
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_repeated_values_of_a_tuple(typed):
    arguments = ("--config=smoke", "--config.eval.metrics=fd", "--config.eval.metrics=lsd,kid")
    assert config_of(typed, *arguments).eval.metrics == ("fd", "lsd", "kid")


MISTAKES = {  # arguments, and what the answer names
    "a mode's flag in training": ("--config=smoke --images=zip:x.zip", "--images=zip:x.zip", "--mode=train",
        "restore, evaluate, stats, prepare, inspect", "--config.data.source=SOURCE"),
    "a flag of restore": ("--config=smoke --mode=sample --blur=1", "--blur=1", "--mode=sample", "only with restore"),
    "results of figures": ("--config=smoke --mode=analyze --out=x", "--out=x", "--mode=analyze", "--workdir"),
    "a topology to train on": ("--config=smoke --topology=v5e:2x2", "--topology=v5e:2x2", "only with preflight"),
    "a switch": ("--config=smoke --mode=sample --watch", "--watch ", "--mode=sample", "only with evaluate"),
    "a default value that is given": ("--config=smoke --seeds=0-63", "--seeds=0-63", "only with sample"),
    "a name that is not there": ("--config=cifar_10", "cifar_10", "no such config", "did you mean cifar10?", "smoke"),
    "a helper": ("--config=configs/systems.py", "configs/systems.py", "no get_config()", "smoke"),
    "a system that is not there": ("--config=cifar10:warmer", "'warmer'", "choose one of warm"),
    "no system to choose": ("--config=OWN.py:hot", "OWN.py:hot", "no systems", "leave :hot out"),
    "no config": ("--mode=sample", "neither --config nor --workdir", "--config=fashion_mnist", "--workdir=RUN"),
    "no config to compare": ("--mode=compare --workdir=RUN", "--mode=compare needs --config=NAME"),
    "a file for a workdir": ("--workdir=FILE --mode=sample", "--workdir=FILE is a file", "a folder"),
    "a file for a new workdir": ("--workdir=FILE --config=smoke", "--workdir=FILE is a file", "a folder"),
    "no workdir": ("--workdir=none --mode=sample", "--workdir=none is not there", "--config=NAME"),
    "no workdir of a run": ("--workdir=. --mode=sample", "--workdir=. has no config.json", "another --workdir"),
    "a broken config.json": ("--workdir=BROKEN --mode=sample", "BROKEN/config.json", "restore it"),
    "config.json of something else": ("--workdir=OTHER", "OTHER/config.json", "restore it"),
    "a change of no config": ("--mode=prepare --config.data.channels=3", "--config.data.channels=3", "there is none"),
    "an unset number": ("--config=smoke --config.train.steps=None", "train.steps", "None", "cannot be unset"),
    "half a step": ("--config=smoke --config.train.steps=0.5", "train.steps=0.5", "whole number"),
    "no number": ("--config=smoke --config.process.bnr=0,5", "process.bnr=0,5", "must be a number", "0.5"),
    "no truth": ("--config=smoke --config.sample.clip=maybe", "sample.clip=maybe", "True or False"),
    "an open bracket": ("--config=smoke --config.eval.metrics=('fd", "('fd", "fd,lsd"),
    "a section": ("--config=smoke --config.train=5", "train is a section", "train.accumulation"),
    "a misspelt key": ("--config.train.step=5 --config=smoke", "step", "did you mean --config.train.steps=5?"),
    "a key without its section": ("--config.bnr=1 --config=smoke", "no key bnr", "did you mean --config.process.bnr=1"),
    "a key of no section": ("--config.mesh.zzz=1 --config=smoke", "no key mesh.zzz", "mesh has fsdp"),
    "a key for a flag": ("--steps=100 --config=smoke", "--steps=100: no such flag", "--config.train.steps=100 or"),
    "a section for a flag": ("--train.steps=9", "no such flag", "did you mean --config.train.steps=9?"),
    "a misspelt flag": ("--workdri=x", "workdri", "did you mean --workdir?"),
    "a flag like no other": ("--xyzzy", "--xyzzy", "--help lists the flags"),
    "a size in words": ("--mode=prepare --image_size=small", "--image_size=small", "as 64, or HEIGHTxWIDTH"),
    "a size too many": ("--config=smoke --image_size=48x64", "--image_size=48x64", "only with prepare"),
    "a word for a step": ("--config=smoke --mode=sample --checkpoint=latest", "checkpoint=latest", "whole number"),
    "a word": ("--config=smoke sample", "'sample'", "--flag=VALUE"),
    "an empty config": ("--config=EMPTY.py", "EMPTY.py", "no get_config()"),
    "a syntax error": ("--config=SYNTAX.py", "SYNTAX.py: line 2: ", "(' was never closed"),
    "a config that raises": ("--config=RAISES.py", "RAISES.py: line 3", "ZeroDivisionError: division by zero"),
    "a config that imports": ("--config=IMPORTS.py", "IMPORTS.py: line 1", "No module named 'nowhere'"),
    "a config that returns nothing": ("--config=NONE.py", "NONE.py", "NoneType", "ConfigDict"),
    "a key that is not there": ("--config=KEY.py", "KEY.py: line 3", 'Did you mean "steps"'),
    "bytes": ("--config=BYTES.py", "BYTES.py"),
}  # fmt: skip
FILES = {
    "FILE": b"",
    "BROKEN/config.json": b'{"model":',
    "OTHER/config.json": b"[1, 2]",
    "EMPTY.py": b"",
    "SYNTAX.py": b"import math\ndef get_config(\n",
    "RAISES.py": b"def get_config():\n    a = 0\n    return 1 / a\n",
    "IMPORTS.py": b"import nowhere\n",
    "NONE.py": b"def get_config():\n    pass\n",
    "KEY.py": b"from configs import smoke\ndef get_config():\n    print(smoke.get_config().train.stops)\n",
    "BYTES.py": bytes(range(256)),
    "OWN.py": b"from configs import smoke\ndef get_config():\n    return smoke.get_config()\n",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_answered_in_one_line(typed, monkeypatch, tmp_path, case):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    arguments, *named = MISTAKES[case]
    status, out, err = typed(*arguments.split())
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    for text in named:
        assert text in err, err


# ── A workdir knows itself ───────────────────────────────────────────────────────────────────────────────────────────


def types_of(tree):
    """The tree with types in place of values."""
    return {key: types_of(value) if isinstance(value, dict) else type(value) for key, value in tree.items()}


@pytest.mark.parametrize("system", systems.NAMES)
def test_the_config_of_a_workdir_is_the_one_that_was_written(typed, tmp_path, system):
    """With its types, so that it can be overridden as before, also where it was unset."""
    written = smoke.get_config(system)
    workdirs.save_config(written, tmp_path)
    found = config_of(typed, f"--workdir={tmp_path}")
    assert found.to_dict() == written.to_dict() and types_of(found.to_dict()) == types_of(written.to_dict())
    changes = ("--config.sample.bnr=2", "--config.sample.class_label=3", "--config.train.posthoc_ema=0.05,0.1")
    changed = config_of(typed, *changes, f"--workdir={tmp_path}")
    assert (changed.sample.bnr, changed.sample.class_label) == (2.0, 3) and type(changed.sample.bnr) is float
    assert changed.train.posthoc_ema == (0.05, 0.1)


def test_what_was_set_can_be_unset(typed, tmp_path):
    workdirs.save_config(tiny.config(sample__class_label=3), tmp_path)
    assert config_of(typed, f"--workdir={tmp_path}").sample.class_label == 3
    assert config_of(typed, f"--workdir={tmp_path}", "--config.sample.class_label=None").sample.class_label is None


def test_the_config_of_an_older_workdir_is_completed_but_for_what_its_weights_are(typed, tmp_path):
    written = smoke.get_config().to_dict()
    for section, key in (("sample", "guide"), ("sample", "beta_min"), ("model", "remat"), ("train", "posthoc_ema")):
        del written[section][key]
    del written["analysis"], written["mesh"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = config_of(typed, f"--workdir={tmp_path}", "--config.sample.beta_min=0.1")
    assert (found.sample.guide, found.sample.beta_min, found.mesh.fsdp) == ("", 0.1, 1)
    assert found.analysis.to_dict() == fashion_mnist.get_config().analysis.to_dict()
    assert "remat" not in found.model and found.train.posthoc_ema == ()


def test_a_config_that_has_changed_on_disk(typed, tmp_path, capsys):
    """Each value of one: what says what the weights are is refused by name, of the rest the section is told."""
    workdirs.save_config(smoke.get_config(), tmp_path)
    path, told = tmp_path / "config.json", collections.Counter()
    written = json.loads(path.read_text())
    assert config_of(typed, f"--workdir={tmp_path}").to_dict() == smoke.get_config().to_dict()
    for section, values in written.items():
        for key, value in values.items() if isinstance(values, dict) and section != workdirs.DIGESTS else ():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            changed = copy.deepcopy(written)
            changed[section][key] = value + 1
            path.write_text(json.dumps(changed))
            workdirs._say_changed.cache_clear()
            fixed = {section, f"{section}.{key}"} & {*workdirs.MODEL_KEYS, *workdirs.RUN_KEYS}
            if fixed:
                with pytest.raises(ValueError, match=r"config.json is not a config \(one of .*: damage, or an edit"):
                    workdirs.load_config(tmp_path)
                del changed[workdirs.DIGESTS]
                path.write_text(json.dumps(changed))
            assert workdirs.load_config(tmp_path)[section][key] == value + 1
            said = capsys.readouterr().err
            assert (f"config.json was changed since it was written, in {section};" in said) == (not fixed)
            told[bool(fixed)] += 1
    assert told[True] > 5 and told[False] > 10
    path.write_text(json.dumps(written).replace("},", "} ,"))  # what means the same is the same
    workdirs.load_config(tmp_path)
    assert not capsys.readouterr().err


@pytest.fixture(scope="module")
def stand_in():
    """The stand-in network in place of every other, one device, and half of the time to compile."""
    patch = pytest.MonkeyPatch()
    make_mesh = meshes.make_mesh
    patch.setattr(meshes, "make_mesh", lambda count=1, **settings: make_mesh(count, **settings))
    quick = functools.partialmethod(jax.stages.Lowered.compile, {"xla_backend_optimization_level": 0})
    patch.setattr(jax.stages.Lowered, "compile", quick)
    patch.setattr(experiment, "_network", lambda config, shape, around, two: tiny.Linear(heads=around.heads))
    yield
    patch.undo()


def command(*arguments):
    """The exit status of a command line in this process."""
    with flagsaver.flagsaver():
        absl_flags.FLAGS.unparse_flags()
        return main.main(flags.parse(["warm_jax", *arguments]))


@pytest.fixture(scope="module")
def trained(stand_in, tmp_path_factory):
    """The workdir of an amortised run of four steps, which may restore, too."""
    workdir = tmp_path_factory.mktemp("runs") / "own run"
    settings = (
        "train.steps=4",
        "train.checkpoint_every=4",
        "train.sample_every=0",
        "eval.count=20",
        "seed=5",
        "eval.allow_other_data=True",
    )
    changes = [f"--config.{setting}" for setting in settings]
    assert command("--config=smoke:amortised", f"--workdir={workdir}", *changes) == 0
    return workdir


def test_training_says_how_to_go_on(trained, capsys):
    assert command(f"--workdir={trained}", "--config.train.steps=6") == 0
    said = capsys.readouterr().out
    assert "resuming from the checkpoint of step 4" in said and "trained to step 6" in said
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 6
    printed = shlex.split(said.splitlines()[-1].partition(": ")[2])
    assert printed[:3] == ["python", "-m", "warm_jax"]
    assert command(*printed[3:], f"--out={trained / 'drawn.npz'}", "--seeds=0-1") == 0
    with np.load(trained / "drawn.npz") as drawn:
        assert drawn["seeds"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("--mode=sample --seeds=0-3 --config.sample.steps=3", "samples/000003.png"),
        ("--mode=analyze --analysis=report", "report.html"),
        ("--mode=export --platforms=cpu", "export/model.json"),
        ("--mode=restore --images=WORKDIR/samples/000000.png --blur=1 --noise=0.5", "restored/000000.png"),
        ("--mode=stats --images=zip:WORKDIR/few.zip --out=WORKDIR/few.npz", "few.npz"),
        ("--mode=evaluate --config.eval.metrics=fd --config.eval.reference=WORKDIR/few.npz", "results.jsonl"),
    ],
)
def test_every_mode_with_the_workdir_alone(trained, arguments, written):
    with zipfile.ZipFile(trained / "few.zip", "w") as few:
        for path in sorted((trained / "samples").glob("0*.png")):
            few.write(path, path.name)
    assert command(f"--workdir={trained}", *(part.replace("WORKDIR", str(trained)) for part in arguments.split())) == 0
    assert (trained / written).exists()


def test_preflight_with_the_workdir_alone(trained, monkeypatch):
    asked = []
    monkeypatch.setattr("warm_jax.preflight.preflight.preflight", lambda run: asked.append(run) or 0)
    monkeypatch.setattr("jax.config.update", lambda *args: None)  # of the platform, in this process
    assert command(f"--workdir={trained}", "--mode=preflight", "--topology=cpu:2") == 0
    assert (asked[0].config.seed, asked[0].config.process.system) == (5, "amortised")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--config.model.channels=16", ["model.channels was 8 and is now 16", "--workdir alone"]),
        ("--mode=sample --config.process.bnr_max=5", ["process.bnr_max was 10.0 and is now 5.0", "--workdir alone"]),
        ("--config.seed=6", ["seed was 5 and is now 6"]),
    ],
)
def test_changes_that_contradict_the_weights_are_refused(trained, capsys, arguments, named):
    assert command(f"--workdir={trained}", *arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(text in err for text in named)


def test_an_import_says_how_to_sample_it(trained, tmp_path, capsys):
    assert command(f"--workdir={trained}", "--mode=export", "--platforms=cpu", f"--out={tmp_path / 'made'}") == 0
    assert command("--mode=convert", f"--from_export={tmp_path / 'made'}", f"--workdir={tmp_path / 'back'}") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    python")]
    assert [shlex.split(line)[-1] for line in lines[-2:]] == ["--mode=sample", "--mode=evaluate"]
    assert command(*shlex.split(lines[-2])[3:], "--seeds=0-1") == 0
    assert (tmp_path / "back" / "samples" / "000001.png").exists()
