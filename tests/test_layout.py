"""What stands on what, read from the imports; and what a run must not load."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "warm_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Each room stands on those before it; what a file at the package's root may stand on follows from where it is here.
ROOMS = (
    "diffusion",
    "weights",
    "accelerators",
    "models",
    "metrics",
    "data",
    "runtime",
    "experiments",
    "sampling",
    "convert",
    "training",
    "evaluation",
    "preflight",
    "api",
    "doctor",
    "analysis",
    "restoration",
    "cli",
    "main",
    "__main__",
)
PLOTS = (
    *("analysis.plots", "analysis.process_plots", "analysis.sampling_plots"),
    *("analysis.score_plots", "analysis.solver_plots"),
    "analysis.likelihood_plots",
    "analysis.inspection",
)
# Of the rooms that hold a mode's program beside its parts: the parts, which know neither programs nor configs.
PARTS = {
    "analysis": [
        "blocks", "charts", "colours", "contents", "corruption", "distances", "guided", "learning", "likelihood_plots",
        "likelihoods", "manifold", "markup", "memorisation", "plots", "process_plots", "processes", "report",
        "sampling_plots", "score_plots", "sections", "solver_plots", "solvers", "spectra", "sweep",
    ],
    "restoration": ["before_after", "estimation", "ledger", "limits", "photographs", "tiles"],
    "doctor": ["facts", "judge"],
}  # fmt: skip


def imports(path):
    """Every module that a file imports, anywhere in it, as dotted names; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(name):
    """The modules of this package that a module imports, without the packages they are in."""
    return {other for other in imports(MODULES[name]) if other in MODULES and MODULES[other].name != "__init__.py"}


def within(*parts):
    """The modules in these subpackages, or of these names."""
    prefixes = [f"warm_jax.{part}" for part in parts]
    return {name for name in MODULES if any(name == p or name.startswith(f"{p}.") for p in prefixes)}


def room(name):
    """The room that a module is in; of a file at the root its own name."""
    return name.split(".")[1] if "." in name else "warm_jax"


def test_the_modules_are_found():
    assert within("diffusion.dct", "models.unet", "training.train", "main", "runtime.checkpoint") <= MODULES.keys()
    assert "warm_jax.diffusion.dct" in own("warm_jax.diffusion.process")
    assert "warm_jax.training.train" in own("warm_jax.cli.modes")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"warm_jax"}))
def test_each_room_stands_on_those_before_it(name):
    at = ROOMS.index(room(name))
    above = {other for other in own(name) if ROOMS.index(room(other)) > at}
    assert not above, f"{name} imports {', '.join(sorted(above))}, of a room above its own"


def test_every_room_is_in_the_order():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files == set(ROOMS)


def test_no_name_twice_and_none_of_pythons():
    """A stranger who knows a file's name knows the file; `python warm_jax/main.py` finds Python's own modules."""
    stems = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert not {stem for stem in stems if stems.count(stem) > 1}
    assert not {stem for stem in stems if stem in sys.stdlib_module_names} - {"__main__"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("diffusion.dct", []),
        ("diffusion.bnr", ["dct"]),
        ("diffusion.radial", []),
        ("diffusion.noise", []),
        ("diffusion.process", ["dct", "bnr", "noise"]),
        ("diffusion.systems", ["dct", "process"]),
        ("diffusion.guidance", ["process"]),
        ("diffusion.ema", []),
        ("diffusion.loss", ["dct", "bnr", "process"]),
        ("diffusion.sampler", ["dct", "bnr", "process"]),
        ("diffusion.oracle", ["dct", "bnr", "process"]),
        ("diffusion.likelihood", ["dct", "noise", "process", "radial"]),
        ("diffusion.density", ["dct", "process"]),
    ],
)
def test_diffusion_stands_on_itself(module, allowed):
    assert own(f"warm_jax.{module}") <= {f"warm_jax.diffusion.{name}" for name in allowed}


@pytest.mark.parametrize("name", sorted(within("diffusion")))
def test_diffusion_is_jax_and_numpy_only(name):
    outside = {other.split(".")[0] for other in imports(MODULES[name])} - set(sys.stdlib_module_names)
    assert outside <= {"jax", "jaxtyping", "numpy", "warm_jax"}


def test_the_denoiser_stands_on_diffusion_and_the_networks_on_nothing():
    assert own("warm_jax.models.denoiser") <= within("diffusion")
    for name in within("models") - {"warm_jax.models.denoiser"}:
        assert not own(name) - within("models"), name
    assert "warm_jax.models.denoiser" not in own("warm_jax.models.unet")


@pytest.mark.parametrize("one", ["weights", "accelerators", "data", "diffusion", "models", "metrics"])
def test_the_ground_floor_knows_little_of_itself(one):
    """Mathematics and weights serve others; networks, metrics, data and accelerators know nothing of one another."""
    serving = {"models": within("diffusion"), "metrics": within("diffusion", "weights")}.get(one, set())
    for name in within(one):
        assert not own(name) - within(one) - serving, name


def test_networks_know_nothing_of_each_other():
    for one, other in (("unet", "adm"), ("adm", "unet")):
        assert f"warm_jax.models.{other}" not in own(f"warm_jax.models.{one}")


@pytest.mark.parametrize("name", sorted(within(*(f"{r}.{part}" for r, parts in PARTS.items() for part in parts))))
def test_parts_know_no_program(name):
    """The mathematics and the pictures of a room: arrays in, arrays out; no config, no checkpoint, no network."""
    parts = within(*(f"{room(name)}.{part}" for part in PARTS[room(name)]))
    for_people = within(*(f"runtime.{name}" for name in ("environment", "pictures", "rounding", "workdirs")))
    files = within("data.folders") if name == "warm_jax.restoration.photographs" else set()  # which of them are images
    settings = within("runtime.door", "runtime.host", "runtime.jax_settings") if room(name) == "doctor" else set()
    assert own(name) <= parts | files | settings | within("diffusion", "metrics") | for_people


@pytest.mark.parametrize("name", sorted(within(*(f"analysis.{part}" for part in PARTS["analysis"]))))
def test_analysis_is_arrays_in_and_arrays_out(name):
    page = name in within("analysis.report", "analysis.contents")  # which reads a workdir
    assert page or not own(name) & within("runtime.workdirs")
    outside = {other.split(".")[0] for other in imports(MODULES[name])} - set(sys.stdlib_module_names)
    drawing = {"matplotlib"} if name in within(*PLOTS) else set()
    assert outside <= {"jax", "jaxtyping", "numpy", "scipy", "warm_jax"} | drawing | ({"PIL"} if page else set())
    assert not within(*PLOTS) & own(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_who_may_import_what(name):
    found = imports(MODULES[name])
    roots = {other.split(".")[0] for other in found}
    assert "orbax" not in roots or name == "warm_jax.runtime.checkpoint"
    assert "flax" not in roots or name in within("models") | {"warm_jax.metrics.inception", "warm_jax.metrics.dinov2"}
    assert not roots & {"tensorflow_datasets", "grain"} or name in within("data")
    assert "diffrax" not in roots  # which is imported where it is asked for
    assert "safetensors" not in roots or name == "warm_jax.weights.tensors"
    assert "pickletools" not in roots or name == "warm_jax.weights.pickles"
    assert not roots & {"pickle", "cloudpickle", "dill", "shelve"}
    assert not roots & {"tensorflow", "tensorboard", "torch", "pandas", "sklearn"}
    assert not any(other.startswith(("clu.metric_writers", "clu.periodic_actions")) for other in found)
    assert not roots & {"configs", "tests"}
    assert not any(other.startswith(("matplotlib.pyplot", "pylab")) for other in found)  # its state is the process's
    assert not [o for o in found if o.startswith("jax._src")] or name in within(
        "runtime.coordinator", "runtime.rollcall"
    )
    assert "socket" not in roots or name in within("runtime.door", "runtime.rollcall")
    configured = within(*ROOMS[ROOMS.index("experiments") :], "runtime.workdirs")
    assert "ml_collections" not in roots or name in configured
    assert "matplotlib" not in roots or name in within(*PLOTS)


def _texts(path):
    """Calls that open a text file without saying how it is encoded."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name not in ("open", "read_text", "write_text") or owner in (
            "Image",
            "KvStore",
            "lmdb",
            "tarfile",
            "zipfile",
            "os",
        ):
            continue
        place = {"read_text": 0, "write_text": 1, "open": 1 if isinstance(node.func, ast.Name) else 0}[name]
        inside = [part for arg in node.args for part in ast.walk(arg)]  # of a mode that is chosen too
        modes = [part.value for part in inside if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        binary = name == "open" and any("b" in mode for mode in modes[:2] if len(mode) <= 3)
        said = any(keyword.arg == "encoding" for keyword in node.keywords) or (
            name != "open" and len(node.args) > place
        )
        member = name == "open" and owner == "archive"  # of a zip: bytes
        if not (binary or said or member):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_text_file_is_opened_as_utf8():
    """Whatever the locale: a workdir moves between machines."""
    folders = ("warm_jax", "launch", "benchmarks", "configs")
    assert not [found for name in folders for path in (ROOT / name).rglob("*.py") for found in _texts(path)]


def test_the_report_needs_no_plotting_library():
    """A page of a run on a machine without matplotlib, and of what other analyses left there, whatever made it."""
    for name in ("markup", "charts", "contents", "blocks", "sections", "report"):
        module = f"warm_jax.analysis.{name}"
        outside = {other.split(".")[0] for other in imports(MODULES[module])} - set(sys.stdlib_module_names)
        assert outside <= {"jax", "PIL", "warm_jax"}, name
        page = (f"analysis.{part}" for part in ("markup", "charts", "contents", "blocks", "sections"))
        assert own(module) <= within("runtime.environment", "runtime.rounding", "runtime.workdirs", *page), name


def test_what_an_export_is_read_with_knows_no_orbax():
    reached, todo = set(), {"warm_jax.convert.bundle"}
    while todo:
        reached |= todo
        todo = set().union(*(own(name) for name in todo)) - reached
    assert "warm_jax.experiments.experiment" in reached and "warm_jax.runtime.checkpoint" not in reached


def test_sampling_stands_on_no_program():
    """Weights come as a tree: the loop knows neither checkpoints nor folders."""
    below = within("experiments.experiment", "runtime.mesh", "runtime.pictures", "sampling.store")
    assert own("warm_jax.sampling.batches") <= below | within("sampling.trajectories", "diffusion")
    assert own("warm_jax.sampling.trajectories") <= within("runtime.pictures", "diffusion.process")


def test_processes_meet_before_anything_else_is_loaded():
    """What starts a pod stands on nothing that could look at a device."""
    assert own("warm_jax.runtime.door") == own("warm_jax.runtime.preemption") == set()
    assert own("warm_jax.runtime.rollcall") == within("runtime.door")
    assert own("warm_jax.runtime.coordinator") == within("runtime.door", "runtime.rollcall")
    assert own("warm_jax.runtime.peers") == within("runtime.door", "runtime.rollcall", "runtime.preemption")
    below = within("runtime.coordinator", "runtime.peers", "runtime.rollcall", "runtime.preemption")
    assert own("warm_jax.runtime.pod") == below


def test_signals_are_answered_before_anything_is_loaded_that_takes_long():
    """What answers them, and bounds the end, needs Python alone; it comes first in both ways to start."""
    for name in ("preemption", "ending"):
        assert {other.split(".")[0] for other in imports(MODULES[f"warm_jax.runtime.{name}"])} <= {
            *sys.stdlib_module_names,
            "warm_jax",
        }
    for name in ("main", "__main__"):
        lines = (PACKAGE / f"{name}.py").read_text().splitlines()
        before = lines[: lines.index(next(line for line in lines if "preemption.listen()" in line))]
        loaded = [line.split()[1] for line in before if line.startswith(("import ", "from "))]
        assert set(loaded) - {"warm_jax.runtime"} <= {"os", "sys"}, name


def test_no_circles():
    done, doing = set(), []

    def visit(name):
        assert name not in doing, f"a circle: {' → '.join([*doing[doing.index(name) :], name])}"
        if name not in done:
            doing.append(name)
            for other in sorted(own(name)):
                visit(other)
            done.add(doing.pop())

    for name in MODULES:
        visit(name)


def test_configs_stand_alone():
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}, path


def test_no_attics():
    assert not [path for path in ROOT.glob("**/util*.py") if ".venv" not in path.parts]
    for path in PACKAGE.rglob("__init__.py"):
        assert path.parent == PACKAGE or not path.read_text().strip(), f"{path} is not empty"


def test_ci_runs_the_readmes_test_command():
    """One command, in one place: .ci/run takes it from the README."""
    script, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "-m pytest" in line]
    assert commands and commands[0].startswith("python3 -m venv .venv && ") and '".[test]"' in commands[0]
    pattern = re.search(r"\$\((grep .* README\.md)\)", script)
    found = subprocess.run(["bash", "-c", pattern[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == commands[0].strip()
    assert "ruff check ." in script and "rm -rf .venv" in script and "set -euo pipefail" in script


def test_no_tensorflow_to_train():
    """In a process of its own, after one step of training and a sample: tensorflow is not even looked at."""
    code = """
import sys
sys.path.insert(0, "tests")
import jax, tiny
from warm_jax import main
from warm_jax.runtime import mesh
from warm_jax.sampling import batches
from warm_jax.training import step, train
exp = tiny.build()
state = step.init_state(exp)
totals = jax.device_put(step.zero_totals(), mesh.replicated(exp.mesh))
import numpy as np
images, labels = np.zeros((16, 28, 28, 1), np.uint8), np.zeros(16, np.int32)
state, *_ = step.compile_step(exp)(state, totals, images, labels)
batches.Sampler(exp, batch_size=2)(state.ema, np.arange(2))
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "tensorboard", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
