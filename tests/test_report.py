"""The report: read back with Python's own HTML parser; curves against coordinates worked out by hand or by numpy."""

import base64
import html.parser
import importlib.metadata
import io
import json
import math
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from warm_jax.analysis import charts, markup, report
from warm_jax.analysis.charts import Line
from warm_jax.runtime import log, pictures, workdirs

VOID = ("img", "meta", "link")
CELLS = ("td", "th", "dt", "dd", "li", "figcaption")
HOSTILE = "<script>alert('x')</script>\"&<!--</style></pre>"


class Page(html.parser.HTMLParser):
    """Elements, text and attributes of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.cells, self.within = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag in CELLS:
            self.within.append(len(self.cells))
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in CELLS:
            self.within.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        for cell in self.within:
            self.cells[cell] += data

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, name):
        return [value for _, key, value in self.attributes if key == name]

    def after(self, cell):
        return self.cells[self.cells.index(cell) + 1]


def png(path, width=8, height=8, seed=0):
    """Noise, so that a file's size grows with its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8)
    pictures.save_png(path, noise)
    return path.read_bytes()


ROW = {
    "fd_cnn_1k": 3.25,
    "kid_cnn_1k": 0.5,
    "kid_cnn_1k_std": 0.125,
    "scores": ["fd_cnn_1k", "kid_cnn_1k", "kid_cnn_1k_std"],
}
ROW |= {"count": 1000, "numbers": "0-999", "images": "samples", "checkpoint_step": 100, "solver": "heun", "nfe": 35}
TABLE = (
    "| system | fd |\n| --- | --- |\n| warm | 8.571 ± 0.31 |\n| hot | 8.707 ± 0.55 |\n\nihdm, Heun: it predicts neither"
)


@pytest.fixture
def workdir(tmp_path):
    """A workdir with everything, by the writers of the programs where they are cheap."""
    folder = tmp_path / "full"
    folder.mkdir()
    workdirs.save_config(smoke.get_config(), folder)
    (folder / "data.json").write_text(json.dumps({"source": "bundled", "images": 10000, "skipped": []}))
    written = log.Log(folder, 0)
    for step in (50, 100, 150):
        row = {"loss/blurred": 1 / step, "loss/residual": math.nan if step == 100 else 2 / step, "gradient_norm": 3.0}
        row |= {"loss_blurred/noise_0.5-1": 0.25, "loss_residual/noise_0.5-1": 0.125, "loss_blurred/noise_2-inf": 0.75}
        written.write(step, {**row, "images_per_second": 250.0, "learning_rate": 1e-3, "nonfinite_steps": 0.0})
    written.close()
    (folder / "parameters.txt").write_text("| a | (3,) |\nTotal: 30,202 -- 120,808 bytes")
    (folder / "results.jsonl").write_text(json.dumps({**ROW, "cautions": ["too few images"]}) + "\n")
    for number in range(5):
        png(folder / "grids" / f"{number:08d}.png", seed=number)
    for name in ("samples/grid.png", "figures/spectra.png", "figures/own.png", "inspect/contact_sheet.png"):
        png(folder / name, seed=len(name))
    (folder / "samples" / "samples.json").write_text(
        json.dumps({"checkpoint_step": 100, "sample": {"solver": "heun", "steps": 4}})
    )
    (folder / "inspect" / "report.json").write_text(json.dumps({"source": "bundled", "sizes": {"28×28": 10000}}))
    (folder / "compare.md").write_text(TABLE)
    (folder / "warm-0").mkdir()
    (folder / "warm-0" / "config.json").write_text("{}")
    return folder


def test_the_page_holds_what_the_workdir_holds(workdir):
    path = report.write(workdir)
    assert path == workdir / "report.html" and not list(workdir.glob(".*"))
    page = Page(path.read_text(encoding="utf-8"))
    assert (page.after("System"), page.after("Parameters"), page.after("Trained")) == (
        "warm, BNR 0.5",
        "30,202",
        "150 of 20 steps",
    )
    assert page.after("Images seen") == "2,400"  # 150 steps of 16
    assert page.after("fd_cnn_1k") == "3.25"
    assert (page.after("≥ 2"), page.after("0.5 – 1")) == ("", "")  # a curve, then its last value
    assert page.cells[page.cells.index("0.5 – 1") + 2 :][:3:2] == ["0.25", "0.125"]
    assert "0.50 ± 0.12" in page.cells and "too few images" in page.cells
    assert page.after("warm") == "8.571 ± 0.31" and page.after("hot") == "8.707 ± 0.55" and "---" not in page.cells
    assert "ihdm, Heun: it predicts neither" in page.words
    assert "Its runs are workdirs of their own: warm-0." in page.words
    assert "Checkpoint of step 100; heun, 4 steps." in page.text
    assert page.after("sizes") == "28×28: 10000" and page.after("batch_size") == "16"
    for package in ("jax", "flax", "numpy"):
        assert page.after(package) == importlib.metadata.version(package)
    assert re.fullmatch(r"8 × \w+ \(cpu\)", page.after("devices"))


def test_pictures_are_within_the_page_byte_for_byte(workdir):
    page = Page(report.render(report.gather(workdir)))
    shown = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.all("src")]
    names = ["samples/grid", "grids/00000000", "grids/00000002", "grids/00000004", "figures/spectra", "figures/own"]
    assert shown == [(workdir / f"{name}.png").read_bytes() for name in [*names, "inspect/contact_sheet"]]
    assert all(alt for alt in page.all("alt")) and len(page.all("alt")) == 7
    assert "Step 0." in page.text and "Step 2." in page.text and "Step 4." in page.text
    assert "recommended BNR" in page.text and "Own." in page.text


def test_nothing_can_be_requested(workdir):
    text = report.render(report.gather(workdir))
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not set(page.tags) & {
        "script",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "image",
        "use",
    }
    assert all(source.startswith("data:image/png;base64,") for source in page.all("src"))
    assert all(target.startswith("#") or target == "data:," for target in page.all("href"))
    assert {t[1:] for t in page.all("href") if t.startswith("#")} <= set(page.all("id"))
    assert not [
        name for _, name, _ in page.attributes if name.startswith("on") or name in ("srcset", "style", "action")
    ]
    policy = next(value for value in page.all("content") if "default-src" in value)
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:") and "script-src" not in rules
    assert "width=device-width, initial-scale=1" in page.all("content")


def test_same_contents_same_page(workdir):
    first, second = (report.gather(workdir)._replace(written="now") for _ in range(2))
    assert report.render(first) == report.render(second)


def test_what_comes_from_files_stays_text(workdir):
    """Markup, URLs, control characters and halves of surrogate pairs, in keys, values and names of files."""
    bad = HOSTILE + " https://example.org/\x00\x1b\ud800"
    (workdir / "config.json").write_text(
        json.dumps({"data": {"source": bad, bad: bad}, bad: bad, "process": {"system": bad}})
    )
    (workdir / "data.json").write_text(json.dumps({"source": bad, "skipped": [bad] * 500}))
    (workdir / "results.jsonl").write_text(
        json.dumps({bad: 1.0, "scores": [bad], "solver": bad, "cautions": [bad]}) + "\n"
    )
    (workdir / "compare.md").write_text(f"| {HOSTILE} |\n| --- |\n| {HOSTILE} |\n\n{HOSTILE}")
    (workdir / "parameters.txt").write_text(HOSTILE)
    (workdir / "samples" / "samples.json").write_text(json.dumps({"checkpoint_step": bad, "sample": {"solver": bad}}))
    (workdir / "inspect" / "report.json").write_text(json.dumps({bad: bad}))
    with (workdir / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 200, "loss/blurred": 1.0, f"loss_blurred/noise_{bad}": 1.0}) + "\n")
    png(workdir / "figures" / "<img src=x onerror=alert(1)>.png")
    renamed = workdir.with_name("<b>run")
    workdir.rename(renamed)
    page = Page(report.write(renamed).read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.tags.count("style") == 1
    assert not [name for _, name, _ in page.attributes if name == "onerror"]
    assert page.text.count(HOSTILE) >= 10 and "<b>run" in page.words
    assert "<img src=x onerror=alert(1)>." in page.words
    assert all(source.startswith("data:") for source in page.all("src"))
    assert not [
        value
        for _, name, value in page.attributes
        if value and "https://" in value and name not in ("aria-label", "alt")
    ]


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        (["figures"], ["figures", "environment"]),
        (["metrics.jsonl"], ["training", "environment"]),
        (["config.json", "metrics.jsonl"], ["training", "config", "environment"]),
        (["results.jsonl"], ["scores", "environment"]),
        (["grids"], ["samples", "environment"]),
        (["samples"], ["samples", "environment"]),
        (["compare.md", "warm-0"], ["comparison", "environment"]),
        (["inspect", "parameters.txt"], ["data", "network", "environment"]),
    ],
)
def test_any_part_alone(workdir, tmp_path, kept, sections):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in kept:
        (workdir / name).rename(alone / name)
    page = Page(report.write(alone).read_text(encoding="utf-8"))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == sections
    assert [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")] == [
        f"#{s}" for s in sections
    ]


def test_nothing_to_report_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there.*--workdir"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty has nothing to report.*--workdir"):
        report.write(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is not there"):
        report.write(tmp_path / "file")


def test_what_is_damaged_is_named_and_the_rest_is_shown(workdir):
    lines = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(lines + '{"step": NaN}\n[1]\n{"step": 200, "loss/blu')
    with (workdir / "results.jsonl").open("a") as file:
        file.write('{"fd_cnn_1k": 3')
    (workdir / "config.json").write_text('{"seed": 0')
    (workdir / "data.json").write_text("")
    grid = workdir / "samples" / "grid.png"
    grid.write_bytes(grid.read_bytes()[:-20])
    (workdir / "figures" / "spectra.png").write_text("<svg onload='alert(1)'/>")
    page = Page(report.write(workdir).read_text(encoding="utf-8"))
    assert "metrics.jsonl: 2 lines, the first 5 is cut off or damaged and left out." in page.cells
    assert "results.jsonl: line 2 is cut off or damaged and left out." in page.cells
    assert {"config.json is damaged and left out.", "data.json is damaged and left out."} <= set(page.cells)
    assert {
        "samples/grid.png is no whole PNG and left out.",
        "figures/spectra.png is no whole PNG and left out.",
    } <= set(page.cells)
    assert page.after("Trained") == "150 steps" and page.after("fd_cnn_1k") == "3.25"


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, "text", [1], {"a": 1}, True, 10**400, -1.0, 0, 1e-320, 1e308]
)
def test_odd_values_spoil_no_page(workdir, value):
    row = {
        key: value for key in ("loss/blurred", "loss/residual", "gradient_norm", "learning_rate", "images_per_second")
    }
    rows = [{"step": 10, **row}, {"step": 10, **row}, {"step": 20, "loss/blurred": 0.5, "nonfinite_steps": value}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    odd = dict.fromkeys((*ROW, "rounds", "cautions", "reference"), value)
    steps = [{**ROW, "checkpoint_step": step, "fd_cnn_1k": value} for step in (1, 2, 3)]
    (workdir / "results.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (*steps, odd, {**ROW, "checkpoint_step": value}))
    )
    for name in ("data.json", "inspect/report.json", "samples/samples.json"):
        keys = ("images", "source", "sizes", "sample", "checkpoint_step", "duplicates", "spectrum")
        (workdir / name).write_text(json.dumps(dict.fromkeys(keys, value)))
    page = Page(report.render(report.gather(workdir)))
    drawn = " ".join(value for _, name, value in page.attributes if name in ("d", "x", "y", "x1", "y1", "width"))
    assert "nan" not in drawn and "inf" not in drawn
    assert "metrics.jsonl" not in page.text


def test_pictures_beyond_the_limit_are_left_out_with_a_note(workdir):
    sizes = {path.relative_to(workdir).as_posix(): path.stat().st_size for path in workdir.glob("*/*.png")}
    png(workdir / "figures" / "large.png", 64, 64)
    large = (workdir / "figures" / "large.png").stat().st_size
    kept = {name for name in sizes if not name.startswith("grids")}
    shown = {f"grids/0000000{i}.png" for i in (0, 2, 4)}
    everything = sum(sizes[name] for name in kept | shown) + large

    def paths(limit):
        found = report.gather(workdir, limit)
        return {picture.path for picture in found.pictures}, found.notes

    assert paths(everything) == (kept | shown | {"figures/large.png"}, [])
    few, notes = paths(everything - 1)
    assert len(few & shown) == 2 and few - shown == kept | {"figures/large.png"} and "left out: grids/" in notes[0]
    assert paths(sum(sizes[name] for name in kept))[0] == kept  # the previews go first, then the largest
    few, notes = paths(0)
    assert few == set() and "figures/large.png" in notes[0]
    page = Page(report.render(report.gather(workdir, 0)))
    assert notes[0] in page.cells and "img" not in page.tags


# ── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_curve_by_hand():
    """Three points at 0, 50 and 100, 1, 0.1 and 0.01 on a log axis; both axes have 4 % of room at either end."""
    drawing = charts.chart([Line("loss", [0.0, 50.0, 100.0], [1.0, 0.1, 0.01])], title="Loss", y_label="l", log=True)
    found = re.search(r'<path d="M([^"]*)"', drawing)[1]
    points = np.array([pair.split(",") for pair in found.split(" L")], float)
    # 400 × 244 units, margins 46 left, 12 right, 22 above and 44 below: a plot of 342 × 178.
    x = 46 + 342 * (np.array([0, 50, 100]) + 4) / 108
    y = 22 + 178 * (0.08 - np.array([0, -1, -2])) / 2.16
    np.testing.assert_allclose(points, np.stack([x, y], 1), atol=0.006)
    # The ticks stand where their numbers say.
    for value, text in ((1.0, "1"), (0.1, "0.1"), (0.01, "0.01")):
        place = re.search(rf'<text x="40" y="([\d.]+)"[^>]*>{re.escape(text)}</text>', drawing)[1]
        assert float(place) == pytest.approx(22 + 178 * (0.08 - math.log10(value)) / 2.16, abs=0.006)
    assert (
        "loss 0.1" in drawing and "step 50: loss 0.1<" in drawing and 'aria-label="Loss by step, logarithmic' in drawing
    )


def test_gaps_and_single_points_are_drawn_as_such():
    line = Line("a", [0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, None, 3.0, None])
    drawn = charts.path(line, charts.Axis(0.0, 4.0), charts.Axis(0.0, 4.0), (0, 0, 4, 4))
    assert drawn == "M0.00,3.00 L1.00,2.00 M3.00,1.00h0"
    assert charts.chart([Line("a", [1.0, 2.0], [None, None])], title="t", y_label="y") == ""
    assert charts.chart([Line("a", [1.0, 2.0], [-1.0, 0.0])], title="t", y_label="y", log=True) == ""


def test_many_points_are_means_of_neighbours():
    x, y = np.arange(1200.0), np.random.default_rng(0).lognormal(size=1200)
    thinned = charts.thin(Line("a", x.tolist(), y.tolist()))
    np.testing.assert_allclose(thinned.x, x.reshape(400, 3).mean(1))
    np.testing.assert_allclose(thinned.y, y.reshape(400, 3).mean(1))
    assert charts.thin(Line("a", x[:500].tolist(), y[:500].tolist())) == Line("a", x[:500].tolist(), y[:500].tolist())
    assert charts.thin(Line("a", [0.0, 1.0, 2.0, 3.0], [None, None, 1.0, None]), 2).y == [None, 1.0]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.1, 1e6), (3e-5, 4e-5), (0.9, 1.1), (1e-9, 1e9), (5.0, 5.0)])
def test_ticks_are_few_round_and_within(low, high, log):
    axis = charts.axis([low, high], log=log)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 8 and all(axis.low <= t <= axis.high for t in ticks) and ticks == sorted(ticks)
    assert 0 < axis.place(low) <= axis.place(high) < 1
    texts = [charts.label(t) for t in ticks]
    assert len(set(texts)) == len(texts)
    letters = {"k": 1e3, "M": 1e6}
    for tick, text in zip(ticks, texts, strict=True):
        read = float(text[:-1]) * letters[text[-1]] if text[-1] in letters else float(text)
        assert read == pytest.approx(tick, rel=1e-3)


def test_text_is_escaped_and_markup_is_not():
    made = markup.tag(
        "p", "a < b & 'c'", markup.tag("b", 1), title='"x"', hidden=True, lang=None, class_="k", aria_label="<"
    )
    assert made == (
        '<p title="&quot;x&quot;" hidden class="k" aria-label="&lt;">a &lt; b &amp; &#x27;c&#x27;<b>1</b></p>'
    )
    assert markup.text("a\x00b\r\n\ud800é") == "a\ufffdb\r\n\ufffdé"


def test_rounds_are_told_as_least_and_mean(tmp_path):
    parts = {"min": 1.85, "max": 1.95, "mean": 1.9, "std_of_rounds": 0.05}
    row = {"protocol": "paper", "rounds": 3, **{f"fid50k_{part}": value for part, value in parts.items()}}
    (tmp_path / "results.jsonl").write_text(json.dumps({**row, "checkpoint_step": 7}) + "\n")
    page = Page(report.render(report.gather(tmp_path)))
    assert page.after("fid50k") == "1.85 (least of 3; 1.900 ± 0.050)"


@pytest.mark.parametrize(
    ("spectrum", "shown"),
    [
        (
            {"slope": -2.26, "slope_error": 0.004, "told": "slope -2.2600 ± 0.0040, fitted to k = 1 to 16"},
            "slope -2.2600 ± 0.0040",
        ),
        ({"slopes": {"1-8": -1.97, "all": -2.7}}, "1-8: -1.97, all: -2.7"),  # as written before there was one
    ],
)
def test_the_slope_of_an_inspection_new_or_old(tmp_path, spectrum, shown):
    (tmp_path / "inspect").mkdir()
    (tmp_path / "inspect" / "report.json").write_text(json.dumps({"source": "bundled", "spectrum": spectrum}))
    page = Page(report.render(report.gather(tmp_path)))
    assert page.after("spectral slope").startswith(shown)


def test_scores_of_many_checkpoints_are_rows_and_a_curve(tmp_path):
    rows = [
        {**ROW, "checkpoint_step": step, "fd_cnn_1k": 400 / step, "bnr": bnr}
        for step in (100, 200, 400, 800)
        for bnr in (1, 2)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report.render(report.gather(tmp_path)))
    first = page.cells.index("checkpoint")
    assert page.cells[first : first + 8] == [
        "checkpoint",
        "BNR",
        "fd_cnn_1k",
        "kid_cnn_1k",
        "100",
        "1",
        "4",
        "0.50 ± 0.12",
    ]
    assert "checkpoint 200: fd_cnn_1k 2" in page.words and "checkpoint 800: fd_cnn_1k 0.5" in page.words


def test_a_png_in_the_page_opens(workdir):
    source = Page(report.render(report.gather(workdir))).all("src")[0]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (8, 8)
    assert pathlib.Path(report.__file__).with_name("report.css").is_file()
