"""Letters, names and files where the locale is not UTF-8: nothing ends of them, in processes as people start them."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from warm_jax.cli import flags

ROOT = pathlib.Path(__file__).parent.parent
LOCALES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def start(name, *arguments):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    command = [sys.executable, "-m", "warm_jax.main", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=clean | LOCALES[name], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_output_and_files(tmp_path):
    """Inspecting images with names of no encoding and of UTF-8, in a folder of such a name; and --help."""
    folder, out = tmp_path / os.fsdecode(b"b\xc3\xa9\xe9"), tmp_path / "out"
    folder.mkdir()
    for i, name in enumerate((b"br\xe9.png", "σ.png".encode(), b"plain.png")):
        Image.fromarray(np.full((8, 8 + i), i, np.uint8)).save(folder / "x.png")
        os.rename(folder / "x.png", os.fsencode(folder) + b"/" + name)
    asking = start("latin-1", "--help")
    looking = start("C", f"--images={folder}", "--mode=inspect", f"--out={out}")
    said, err = looking.communicate(timeout=270)
    assert looking.returncode == 0, err
    assert rb"br\xe9.png" in said and rb"8\xd78" in said
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert sorted(text.split(":")[0] for text in report["to_prepare"]) == ["br\\xe9.png", "plain.png", "σ.png"]
    said, err = asking.communicate(timeout=270)
    assert asking.returncode == 0 and rb"\u2026" in said, err


def test_a_name_cannot_command_the_terminal(capsys):
    assert flags.fail(ValueError("a\x1b[2J\x1b]0;title\x07\u202eb é\udce9.png: not an image"), 2) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2J\\x1b]0;title\\x07\\u202eb é\\udce9.png: not an image\n"
