"""The commands and the snippets of Python in the documents, and what is wrong with each of them.

Commands stand in ```bash blocks, in indented lines and in `code`; nothing is run or compiled. A word in CAPITALS
stands for a path of the reader's. Two comments may stand on the line before a block:

    <!-- not run here: REASON -->     commands that need what is not here; they are checked all the same
    <!-- needs: NAME, NAME (…) -->    Python that stands on these names, and so is checked but not run
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

import pages
import setuptools.config.setupcfg
from absl import app
from absl import flags as absl_flags
from absl.testing import flagsaver
from pages import ROOT, Block

from configs import smoke
from warm_jax.accelerators import topology
from warm_jax.analysis import analyze
from warm_jax.cli import flags
from warm_jax.data import sources
from warm_jax.experiments import experiment
from warm_jax.runtime import workdirs
from warm_jax.sampling import generate

PYTHON = re.compile(r"(?:\.venv(?:-[\d.]+)?/bin/)?python3?")
# Programs of other people that may stand in a command; anything else is taken for a misspelling.
OTHERS = {
    "apt-get", "cd", "curl", "docker", "export", "gcloud", "gcsfuse", "git", "jupyter", "kubectl", "mkdocs",
    "pre-commit", "pytest", "ruff", "scp", "source", "ssh-add", "sudo", "tar", "tee", "tensorboard",
    "unzip", "uv",
}  # fmt: skip


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def commands(text: str) -> list[list[str]]:
    """Every command of a page, as words; those that && or a pipe joins are apart."""
    prose = pages.prose(text)
    lines = [*pages.bash_lines(text)]
    lines += [line.strip() for line in prose.splitlines() if re.match(r" {4,}python -m warm_jax", line)]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`(python -m warm_jax[^`]*\s-[^`]*)`(?!`)", prose)]
    return [words for line in lines for words in _split(line)]


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, into_file = [], False
    for word in lexer:
        if set(word) <= set("&|;"):
            yield from [words] if words else []
            words = []
        elif set(word) <= set("<>"):
            into_file = True
        elif into_file:
            into_file = False
        else:
            words.append(word)
    if words:
        yield words


def command_faults(words: list[str]) -> list[str]:
    """What is wrong with a command."""
    while words and re.match(r"\w+=", words[0]):  # variables of its environment
        words = words[1:]
    if not words:
        return []
    program, *rest = words
    if program == "bash":
        program, *rest = rest
    if program == "sbatch":
        program, *rest = rest[next((i for i, word in enumerate(rest) if word.startswith("launch/")), 0) :]
    if PYTHON.fullmatch(program) and rest[:1] == ["-m"]:
        program, *rest = rest[1:]
        if program in ("venv", "pytest", "mkdocs"):
            return []
    elif PYTHON.fullmatch(program) and rest:
        program, *rest = rest
    if program in ("warm_jax", "warm_jax.main"):
        faults = [] if words[0] != "warm_jax" or _setup().get("entry_points") else ["setup.cfg has no script warm_jax"]
        return faults + flag_faults(rest)
    if program.removeprefix(".venv/bin/") == "pip":
        return _pip_faults(rest)
    if program.startswith(("benchmarks/", "launch/", "docs/")):
        return _script_faults(program, rest)
    known = program.removeprefix(".venv/bin/") in OTHERS
    return [] if known else [f"{program}: no program that documents may name without adding it to tests/documents.py"]


@functools.cache
def _setup() -> dict:
    return setuptools.config.setupcfg.read_configuration(ROOT / "setup.cfg")["options"]


def _pip_faults(words: list[str]) -> list[str]:
    extras = _setup()["extras_require"]
    asked = [
        name for word in words for group in re.findall(r"^(?:\.|warm_jax)\[(.*)\]$", word) for name in group.split(",")
    ]
    return [f"setup.cfg has no extra {name!r}; there are {', '.join(extras)}" for name in asked if name not in extras]


def _script_faults(program: str, words: list[str]) -> list[str]:
    path = ROOT / program
    if not path.is_file():
        return [f"{program}: there is no such file"]
    at = words.index("--") if "--" in words else len(words)
    own, passed_on = words[:at], words[at + 1 :]
    source = path.read_text()
    unknown = [word for word in own if word.startswith("--") and word.partition("=")[0] not in source]
    faults = [f"{program} has no flag {word}" for word in unknown]
    if program.startswith("launch/"):
        passed_on = [*(word for word in own if word.startswith("--config=")), *passed_on]
    return faults + (flag_faults(passed_on) if passed_on else [])


def _placeholder(value: str) -> bool:
    """Whether letters of `value` are CAPITALS, but for an ending."""
    return bool(re.fullmatch(r"[A-Z][A-Z_]*", value.partition(".")[0]))


def flag_faults(arguments: list[str]) -> list[str]:
    """What the command line of warm_jax says of these flags, before it would look for images or compile anything."""
    arguments = [word for word in arguments if word not in ("…", "...")]
    names = {word.partition("=")[0] for word in arguments}
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for word in arguments:
            name, _, value = word.partition("=")
            if name == "--config" and _placeholder(value):
                word = "--config=configs/smoke.py"
            if name == "--workdir" and "--config" not in names:  # a run's own config
                _some_run(value, pathlib.Path(folder))
                word = f"--workdir={folder}"
            made.append(word)
        return _parsed(made)


def _some_run(name: str, folder: pathlib.Path) -> None:
    """A config.json as `runs/cifar10_hot` would have it."""
    config, stem = smoke.get_config(), pathlib.Path(name).name
    for path in sorted((ROOT / "configs").glob("*.py"), key=lambda path: -len(path.stem)):
        if stem == path.stem or stem.startswith(f"{path.stem}_"):
            module = importlib.import_module(f"configs.{path.stem}")
            config = module.get_config(*filter(None, [stem[len(path.stem) + 1 :]]))
            break
    workdirs.save_config(config, folder)


def _parsed(arguments: list[str]) -> list[str]:
    """In this process, whose flags are put back. ml_collections reads overrides from sys.argv."""
    argv, said, parsed = ["warm_jax", *arguments], io.StringIO(), absl_flags.FLAGS.is_parsed()
    if "help" not in absl_flags.FLAGS:
        app.define_help_flags()
    with (
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", argv),
        contextlib.chdir(ROOT),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            flags.parse(argv)
            _check_values()
        except SystemExit as end:
            return [said.getvalue().strip()] if end.code and not {"--help", "--version"} & {*arguments} else []
        except ValueError as error:
            return [str(error)]
        finally:
            if not parsed:
                absl_flags.FLAGS.unparse_flags()
    return []


def _check_values() -> None:
    """Raises ValueError for values that a mode would refuse before it does anything."""
    given = {name: absl_flags.FLAGS[name].value for name in ("mode", "seeds", "analysis", "topology", "images")}
    mode, images = given["mode"], given["images"]
    # Where --config is the name of a config, the command line keeps the config itself.
    config = flags.config() if hasattr(flags, "config") else flags.CONFIG.value
    flags.check_flags(mode)
    flags.emas()
    if config is not None:
        _build(config.to_json_best_effort(), config)
    if mode == "sample":
        generate.parse_seeds(given["seeds"])
    if mode == "analyze" and given["analysis"] not in analyze.NAMES:
        raise ValueError(f"--analysis={given['analysis']}: choose one of {', '.join(analyze.NAMES)}")
    if mode == "preflight":
        topology.parse(given["topology"])
    if mode in ("prepare", "inspect", "stats", "evaluate") and images and not _placeholder(images):
        with contextlib.suppress(OSError):  # it is not here
            sources.open_items(images)


_BUILT: set[str] = set()


def _build(text: str, config) -> None:
    """The values of a config, each config once; not of one that leaves some to the images, which are not looked at."""
    if text not in _BUILT:
        try:
            experiment.build(config)
        except ValueError as error:
            if "is unset" not in str(error):
                raise
        _BUILT.add(text)


# ── Snippets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def needed(block: Block) -> list[str] | None:
    """The names that a snippet stands on; None where it stands on nothing, and can be run."""
    if not block.note.startswith("needs:"):
        return None
    return [name.strip() for name in block.note.removeprefix("needs:").partition("(")[0].split(",") if name.strip()]


def snippet_faults(block: Block) -> list[str]:
    """Mistakes of syntax, names that are not defined or not used, modules and their names that are not there."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        return [f"line {block.line}: {error}"]
    faults = [f"{name}: not a name" for name in needed(block) or [] if not name.isidentifier()]
    return faults or _undefined(block.text, tuple(needed(block) or [])) + _not_there(tree)


@functools.cache
def _undefined(code: str, names: tuple[str, ...]) -> list[str]:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--quiet", "--select=F401,F821"]
    command += [f"--config=builtins={json.dumps(names)}", "--output-format=json", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    return [found["message"] for found in json.loads(done.stdout)]


def _not_there(tree: ast.Module) -> list[str]:
    """Imports that fail, and attributes that an imported module has not."""
    names, faults = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "snippet", "exec"), names)
            except ImportError as error:
                faults.append(str(error))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, type(ast)) and not hasattr(module, node.attr):
                faults.append(f"{module.__name__} has no {node.attr}")
    return faults


_RUN = """
import json, sys
package, pages = json.load(sys.stdin)
sys.path.insert(0, package)
import warm_jax
assert warm_jax.__file__.startswith(package), warm_jax.__file__
for page, snippets in pages.items():
    names = {"__name__": "snippet"}
    for line, code in snippets:
        exec(compile("\\n" * (line - 1) + code, page, "exec"), names)
    print("done:", page)
"""


def run_snippets(found: dict[str, list[Block]], folder: pathlib.Path, package: pathlib.Path = ROOT) -> list[str]:
    """Runs snippets in `folder` with the package that stands in `package`; the names of the pages that were done.

    One process, and one namespace a page. AssertionError with the traceback, of the page's own lines, where one fails.
    """
    code = json.dumps([str(package), {page: [(b.line, b.text) for b in blocks] for page, blocks in found.items()}])
    # Quick compilation: none of them runs for long.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(command, input=code, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^done: (.*)$", done.stdout, re.MULTILINE)
