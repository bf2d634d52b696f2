"""README, docs/ and the other pages: no dead link, no command that would be refused, no snippet that does not run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import documents
import pages
import pytest
import yaml

ROOT = pages.ROOT
PAGES = [page for page in pages.PAGES if page.name != "CONTRIBUTING.md"]  # whose snippets are test_contributing's
README = ROOT / "README.md"


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_no_link_is_dead(page):
    assert not pages.dead_links(page, page.read_text())


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_every_command_would_be_accepted(page):
    faults = [(words, documents.command_faults(words)) for words in documents.commands(page.read_text())]
    assert not [f"{' '.join(words)}: {fault}" for words, found in faults for fault in found]


def snippets(page):
    return [block for block in pages.blocks(page.read_text()) if block.language == "python"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_snippet_can_be_read(page):
    """Also those that need something, and so are not run."""
    assert not [(block.line, fault) for block in snippets(page) for fault in documents.snippet_faults(block)]


def test_every_snippet_runs(tmp_path):
    """In order, a page's snippets in one namespace."""
    found = {named(page): [b for b in snippets(page) if documents.needed(b) is None] for page in PAGES}
    found = {page: blocks for page, blocks in found.items() if blocks}
    assert "README.md" in found
    assert documents.run_snippets(found, tmp_path) == [*found]


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_blocks_say_what_they_are(page):
    """Commands and Python are marked, so that they are checked; every comment on a block is one that is known."""
    text = page.read_text()
    assert not re.search(r"^(?: +```|~~~)", text, re.MULTILINE)  # which are not seen
    for block in pages.blocks(text):
        assert block.language in ("", "bash", "python", "bibtex", "json", "text", "yaml"), f"line {block.line}"
        assert not block.note or re.match(r"(not run here|needs|edit): \S", block.note), f"line {block.line}"
        started = re.search(r"^(?:\$ )?(?:\.venv/bin/)?(?:python3? |pip |warm_jax )", block.text, re.MULTILINE)
        assert block.language == "bash" or not started, (
            f"line {block.line}: commands outside of ```bash are not checked"
        )


def test_the_readme_is_read_in_one_sitting():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert max(map(len, text.splitlines())) <= 400


def test_every_page_is_on_the_site_and_found_from_the_readme():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = [page for part in site["nav"] for value in part.values() for page in _pages(value)]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    reached = {target.partition("#")[0] for page in (README, ROOT / "docs" / "index.md") for target in _links(page)}
    assert {f"docs/{page}" for page in listed} - {"docs/index.md"} <= reached


def _pages(value):
    return [value] if isinstance(value, str) else [page for part in value for page in part.values()]


def _links(page):
    """The links of a page, as seen from the repository's root."""
    return [os.path.normpath(page.relative_to(ROOT).parent / target) for target in pages.links(page.read_text())]


def test_pictures_are_used():
    used = {target for page in pages.PAGES for target in _links(page)}
    pictures = {named(path) for path in (ROOT / "docs").glob("*.png")}
    assert pictures and not pictures - used


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "data" / "index.html").read_text()
    assert 'href="../../launch' not in page and "how to mount it" in page  # a link out of docs/ is plain words
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", page)
    assert not [address for address in loaded if "warm_jax" not in address]  # read without a network


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="pip install '.[docs]'")
def test_the_site_notices_what_is_dead(tmp_path):
    """With the real settings, but for the plugins: the hook for links out of docs/ is no blindfold."""
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "outside_links.py", tmp_path / "docs")
    kept = settings[: settings.index("plugins:")] + settings[settings.index("markdown_extensions:") :]
    (tmp_path / "mkdocs.yml").write_text(kept[: kept.index("nav:")])
    right = "[code](../warm_jax/main.py) [here](#with-a-flag)\n\n## With a `flag`"
    wrong = "[page](nowhere.md) [heading](#nothing-so-called) ![picture](nowhere.png)"
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{wrong} {right}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert all(word in done.stderr for word in ("nowhere.md", "nowhere.png", "#nothing-so-called"))
    assert "main.py" not in done.stderr and "with-a-flag" not in done.stderr


def build(folder, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={out}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_changelog_names_modules_that_are_there():
    rows = re.findall(r"^\| (`.*`) \| `(warm_jax\.[\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    rooms = [(room, re.findall(r"`(?:\w+\.)?(\w+)`", names)) for names, room in rows if "`warm_jax." not in names]
    renamed = [new for old, new in rows if old.startswith("`warm_jax.")]
    assert len(rooms) == 12 and len(renamed) == 20
    for module in renamed + [f"{room}.{name}" for room, names in rooms for name in names]:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_the_version_is_the_same_everywhere():
    version = re.search(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    # What the format 1.2.0 requires of a file, of a reference, and of an author.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert {"type", "title", "authors"} <= citation["preferred-citation"].keys()
    assert citation["preferred-citation"]["title"] in README.read_text()


def test_the_hooks_before_a_commit_are_what_ci_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    script = (ROOT / ".ci" / "run").read_text()
    assert [hook["entry"] for hook in local["hooks"]] == re.findall(r"^\.venv/bin/(ruff .*)$", script, re.MULTILINE)


# ── The checks find what is wrong ────────────────────────────────────────────────────────────────────────────────────

PAGE = """# A page

## Data, and a `flag`

[here](#data-and-a-flag) [there](launch/README.md#slurm) [code](warm_jax/diffusion/dct.py) [web](https://example.org/x)
![picture](docs/process.png)
"""


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[x](docs/nothing.md)", "docs/nothing.md"),
        ("![x](docs/nothing.png)", "docs/nothing.png"),
        ("[x](#no-such-heading)", "no-such-heading"),
        ("[x](launch/README.md#no-such-heading)", "README.md has no such heading"),
        ("[![x](docs/process.png)](docs/gone.png)", "docs/gone.png"),
        ('<img src="docs/gone.png" width="300">', "docs/gone.png"),
        ("[x](../somewhere)", "../somewhere"),
    ],
)
def test_a_dead_link_is_found(line, word):
    page = ROOT / "PAGE.md"
    assert pages.dead_links(page, PAGE) == []
    (fault,) = pages.dead_links(page, PAGE + line)
    assert word in fault
    assert pages.dead_links(page, f"{PAGE}```\n{line}\n```\n`{line}`") == []


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("python -m warm_jax.main --config=configs/cifar10.py --worksdir=x", "worksdir"),
        ("python -m warm_jax --config=configs/cifar10.py --trajectorie", "trajectorie"),
        ("python -m warm_jax.main --config=configs/cifar100.py", "cifar100"),
        ("python -m warm_jax.main --config=configs/cifar10.py:warmer", "warmer"),
        ("python -m warm_jax.main --config=configs/cifar10.py --config.process.bmr=1", "bmr"),
        ("python -m warm_jax.main --config=configs/cifar10.py:hot --config.process.schedule=constant", "schedule"),
        ("python -m warm_jax.main --config=configs/cifar10.py --config.train.steps=many", "many"),
        ("python -m warm_jax.main --config=configs/cifar10.py --config.sample.solver=hein", "hein"),
        ("python -m warm_jax.main --config=configs/cifar10.py:ihdm --config.sample.solver=heun", "perturb"),
        ("python -m warm_jax.main --config=configs/cifar10.py --config.model.channel_mult=wide", "channel_mult"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=draw", "draw"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=analyze --analysis=spectrum", "spectrum"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=preflight --topology=v5e:3x5", "3x5"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=sample --seeds=1-", "1-"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=sample --ema=long", "long"),
        ("python -m warm_jax.main --config=configs/cifar10.py --mode=train --ema=0.1", "ema"),
        ("python -m warm_jax.main --mode=inspect --images=tarball:x.tar", "tarball"),
        ("python -m warm_jax.main --config=configs/cifar10.py hot", "hot"),
        ("python3 -m venv x && .venv/bin/python -m warm_jax.main --config=configs/gone.py", "gone"),
        ("XLA_FLAGS=--x python -m warm_jax.main --config=configs/cifar10.py --seed=1  # a comment", "seed"),
        ("python -m warm_jax.main \\\n    --config=configs/cifar10.py \\\n    --config.mesh.fdsp=4", "fdsp"),
        ("python launch/local_pod.py --hosts=4 -- --config=configs/cifar10.py --config.mesh.fdsp=4", "fdsp"),
        ("python launch/local_pod.py --houses=4 -- --config=configs/cifar10.py", "--houses"),
        ("bash launch/tpu_vms.sh all", "launch/tpu_vms.sh"),
        ("launch/gke.sh --config=configs/cifar.py", "configs/cifar.py"),
        ("sbatch --nodes=4 launch/slurm.sbatch --config=configs/cifar10.py -- --config.seeds=1", "seeds"),
        ("python benchmarks/date.py", "benchmarks/date.py"),
        ("python benchmarks/data.py --minutes=3", "--minutes"),
        ("pip install -q -e '.[cude]'", "cude"),
        ("pip install '.[plot,lmdp]'", "lmdp"),
        ("pyhton -m warm_jax.main --help", "pyhton"),
    ],
)
def test_a_wrong_command_is_found(command, word):
    found = documents.commands(f"# Page\n\n```bash\n{command}\n```\n")
    (fault,) = [fault for words in found for fault in documents.command_faults(words)]
    assert word in fault
    marked = documents.commands(f"<!-- not run here: it is wrong -->\n```bash\n{command}\n```\n")
    assert marked == found


def test_right_commands_pass():
    lines = [
        ".venv/bin/python -m warm_jax.main --config=configs/cifar10.py --config.data.source='zip:/a b' | tee log.txt",
        "python -m warm_jax.main --config=FILE --mode=prepare --images=SOURCE --out=FILE.zip      # or .arrayrecord",
        "python -m warm_jax.main --config=configs/smoke.py --mode=compare --config.compare.systems=\"('hot','warm')\"",
        "python -m warm_jax.main --config=configs/cifar10.py --mode=sample … > out && python -m warm_jax.main --help",
        "JAX_PLATFORMS=cpu python -m warm_jax --config=configs/smoke.py; git clone URL",
    ]
    text = "```bash\n" + "\n".join(lines) + "\n```\nSay `python -m warm_jax.main\n--config=configs/smoke.py`.\n\n"
    text += "`python -m warm_jax` is the same.\n\n"
    text += "    python -m warm_jax.main --mode=doctor\n"
    found = documents.commands(text)
    assert len(found) == 10
    assert not [fault for words in found for fault in documents.command_faults(words)]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("x = (1", "was never closed"),
        ("print(imges)", "imges"),
        ("import jax\nx = 1", "jax"),
        ("from warm_jax.diffusion import predictors\nprint(predictors)", "predictors"),
        ("import warm_jax.family\nprint(warm_jax.family)", "family"),
        ("from warm_jax.diffusion import bnr\nbnr.constnt(0.5)", "constnt"),
    ],
)
def test_a_wrong_snippet_is_found(code, word):
    (block,) = pages.blocks(f"Text.\n\n```python\n{code}\n```\n")
    (fault,) = documents.snippet_faults(block)
    assert word in fault


def test_a_snippet_says_what_it_needs():
    (block,) = pages.blocks("<!-- needs: key, images (uint8, and a run) -->\n```python\nprint(key, images)\n```\n")
    assert documents.needed(block) == ["key", "images"] and documents.snippet_faults(block) == []
    (block,) = pages.blocks("<!-- needs: key -->\n```python\nprint(key, images)\n```\n")
    (fault,) = documents.snippet_faults(block)
    assert "images" in fault
