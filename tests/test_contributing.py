"""CONTRIBUTING.md, followed as it is written: its four examples are added to a copy of the code, and seen to work.

Its sentences are instructions that are carried out here:

    Write `FILE`:                              and the block that follows
    At the end of `FILE`:                      the block
    In `FILE`, before `LINE`:                  the block, before the line that begins so
    In `FILE`, import `NAME` from `MODULE`.
    In `FILE`, add `ITEM` to `NAME`.           to the tuple or dict that is assigned to NAME
    In `FILE`, replace `TEXT` by `TEXT`
"""

import ast
import re
import shutil
import subprocess
import sys

import documents
import pages
import pytest

ROOT = pages.ROOT
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = ("system", "solver", "data source", "metric")
INSTRUCTION = re.compile(
    r"write `(?P<new>[^`]+)`:$|at the end of `(?P<end>[^`]+)`:$|"
    r"in `(?P<file>[^`]+)`, (?:before `(?P<before>[^`]+)`:$|import `(?P<name>\w+)` from `(?P<module>[\w.]+)`|"
    r"add `(?P<item>[^`]+)` to `(?P<table>\w+)`|replace `(?P<old>[^`]+)` by `(?P<by>[^`]+)`)",
    re.IGNORECASE | re.MULTILINE,
)


def sections():
    """The examples by name: what stands between their headings."""
    parts = re.split(r"^## Adding a (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def followed(section, folder):
    """Carries out the instructions of a section in a copy of the code; the blocks that are left are to be run."""
    blocks, left, taking = iter(pages.blocks(section)), [], None
    for part in re.split(r"(^```\w*\n.*?^```\n)", section, flags=re.DOTALL | re.MULTILINE):
        if part.startswith("```"):
            block = next(blocks)
            if taking:
                edit(folder, taking, block.text)
            else:
                left.append(block)
            continue
        sentences = re.sub(r"(?<!\n)\n(?!\n)", " ", part.strip())
        taking = None
        for instruction in INSTRUCTION.finditer(sentences):
            if instruction["new"] or instruction["end"] or instruction["before"]:
                taking = instruction  # the block after it
            else:
                edit(folder, instruction, "")
    return left


def edit(folder, instruction, block):
    path = folder / (instruction["new"] or instruction["end"] or instruction["file"])
    if instruction["new"]:
        assert not path.exists()
        path.write_text(block)
        return
    text = path.read_text()
    if instruction["end"]:
        text = f"{text}\n\n{block}"
    elif instruction["before"]:
        (line,) = [line for line in text.splitlines(keepends=True) if line.strip().startswith(instruction["before"])]
        apart = "\n\n" if block.startswith("def ") else ""
        text = text.replace(line, f"{block}{apart}{line}")
    elif instruction["name"]:
        imported = re.search(rf"^from {re.escape(instruction['module'])} import \(?", text, re.MULTILINE)
        text = f"{text[: imported.end()]}{instruction['name']}, {text[imported.end() :]}"
    elif instruction["item"]:
        text = added(text, instruction["table"], instruction["item"])
    else:
        assert text.count(instruction["old"]) == 1, f"{path} has not once {instruction['old']!r}"
        text = text.replace(instruction["old"], instruction["by"])
    path.write_text(text)


def added(text, table, item):
    """The source with an item more in the tuple or dict that is assigned to `table`."""
    (value,) = [
        node.value for node in ast.parse(text).body if isinstance(node, ast.Assign) and node.targets[0].id == table
    ]
    lines = text.splitlines(keepends=True)
    end = len("".join(lines[: value.end_lineno - 1]).encode()) + value.end_col_offset - 1  # before its last bracket
    raw = text.encode()
    before = raw[:end].decode().rstrip().rstrip(",")
    return f"{before}, {item}{raw[end:].decode()}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The folder of a copy with all four examples in it, and the blocks of each that are to be run."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("warm_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    left = {name: followed(section, folder) for name, section in sections().items()}
    ruff = [sys.executable, "-m", "ruff"]
    fixed = subprocess.run([*ruff, "check", "--quiet", "--select=I", "--fix", "."], cwd=folder, check=False)
    laid_out = subprocess.run([*ruff, "format", "--quiet", "."], cwd=folder, check=False)
    assert (fixed.returncode, laid_out.returncode) == (0, 0)
    return folder, left


def test_the_code_passes_the_linter(copy):
    folder, _ = copy
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_example_is_seen_to_work(copy):
    """In a process of its own, which imports the copy."""
    folder, left = copy
    assert tuple(left) == EXAMPLES and all(len(blocks) == 1 for blocks in left.values())
    assert documents.run_snippets(left, folder, package=folder) == [*EXAMPLES]


def test_the_examples_do_not_work_by_themselves(copy, tmp_path, monkeypatch):
    """Here, where nothing was added, each fails for want of it."""
    monkeypatch.chdir(tmp_path)
    for blocks, word in zip(copy[1].values(), ("rows", "midpoint", "npy", "colour"), strict=True):
        with pytest.raises(ValueError, match=word):
            exec(compile(blocks[0].text, word, "exec"), {"__name__": word})


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_instruction_that_does_not_fit_is_noticed(name, tmp_path):
    """Where a file or a table that is named is not there, following fails."""
    for folder in ("warm_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors", "bundled"))
    wrong = re.sub(r"(, add `[^`]+`\sto `\w+)`", r"\1_GONE`", sections()[name])
    with pytest.raises((ValueError, AssertionError)):
        followed(wrong, tmp_path)
