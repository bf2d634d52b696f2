"""The notebooks: small enough to be shown, and run from start to end by the slow tests, on small settings."""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {  # the cell tagged "parameters"
    "quickstart": "STEPS, WORKDIR = 20, {folder!r}",
    "bnr": "IMAGES, ORACLE_IMAGES, STATES, SEEDS, STEPS = 300, 40, 4, 2, (4, 6)\nWORKDIR = {folder!r}",
}
PICTURES = {"quickstart": 3, "bnr": 5}


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def tagged(path, tag):
    return [cell for cell in cells(path, "code") if tag in cell["metadata"].get("tags", [])]


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS} == SMALL.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_can_be_shown(path):
    """Committed with its outputs, none of them an error, small, and without the paths of whoever ran it."""
    text = path.read_text()
    assert len(text) < 1_500_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        magic = re.compile(r"^\s*[%!].*$", re.MULTILINE)
        ast.parse(magic.sub(lambda match: re.match(r"\s*", match[0])[0] + "pass", source))
        assert len(source.splitlines()) <= 30, "logic belongs in the package"
        assert not [out for out in cell["outputs"] if out["output_type"] == "error"]
    assert len(tagged(path, "install")) == len(tagged(path, "parameters")) == 1
    shown = [out for cell in cells(path, "code") for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(shown) >= PICTURES[path.stem]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "install" in tags:
            cell.source = f"import os\nos.chdir({str(ROOT)!r})"
        if "parameters" in tags:
            cell.source = SMALL[path.stem].format(folder=str(tmp_path / "run"))
    nbclient.NotebookClient(notebook, timeout=1000, kernel_name="python3").execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(shown) >= PICTURES[path.stem]
