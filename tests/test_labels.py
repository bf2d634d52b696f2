"""Classes of images wherever `dataset.json` lies and however it spells their names: right, or refused by name."""

import io
import json
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_jax.data import prepare
from warm_jax.data.sources import open_source

NAMES = [f"{i // 3:05d}/b\u00e9{i}.png" for i in range(5)]
CLASSES = dict(zip(NAMES, [3, 0, 1, 1, 2], strict=True))
PLACES = {
    "root": "dataset.json",
    "dot": "./dataset.json",
    "capital": "Dataset.json",
    "folder": "top/dataset.json",
    "nested": "a/b/dataset.json",
}
SPELLINGS = {
    "exact": lambda name: name,
    "dot": lambda name: f"./{name}",
    "backslashes": lambda name: name.replace("/", "\\"),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "top folder": lambda name: f"top/{name}",
    "capitals": lambda name: name.replace(".png", ".PNG"),
    "numbers": lambda name: NAMES.index(name),
}


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def contents(labels, place="dataset.json", top=""):
    """A file's name and content, of the images and of dataset.json; the grey level of an image is its number."""
    images = {top + name: png(i) for i, name in enumerate(NAMES)}
    return images | {place: labels if isinstance(labels, bytes) else json.dumps({"labels": labels}).encode()}


def write(path, files, kind):
    """As a zip or as a folder."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return f"zip:{path}"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return f"folder:{path}"


def found(spec):
    """Class by grey level, which says which image it is."""
    source = open_source(spec)
    pixels, labels = source.read(np.arange(len(source)))
    return dict(zip(pixels[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


RIGHT = dict(enumerate(CLASSES.values()))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_spelling(tmp_path, place, spelling):
    """As a zip, a folder, a zip with a folder around all, and what `prepare` makes of it."""
    labels = [[SPELLINGS[spelling](name), label] for name, label in CLASSES.items()]
    for kind, top in (("zip", ""), ("folder", ""), ("zip", "top/"), ("folder", "top/")):
        spec = write(tmp_path / f"{kind}{len(top)}", contents(labels, PLACES[place], top), kind)
        if spelling == "numbers":
            with pytest.raises(ValueError, match="it calls an image 0, which is no path"):
                open_source(spec)
            continue
        assert found(spec) == RIGHT
        if kind == "zip":
            out = tmp_path / f"prepared{len(top)}.zip"
            assert prepare.run(spec, str(out), progress=False) == 0
            assert found(str(out)) == RIGHT


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*CLASSES.items(), (f"./{NAMES[2]}", 4)], r"gives './00000/b\\xe92.png' two classes, 1 and 4"),
        ([*CLASSES.items(), (NAMES[2], 4)], "two classes, 1 and 4"),
        (
            [(f"val/{n}", c) for n, c in CLASSES.items()],
            r"5 of 5 images, 'train/.*'val/00000/b\\xe90.png.*'train/00000",
        ),
        (
            [(n[6:], c) for n, c in CLASSES.items()],
            r"no class for 5 of 5 images.*it names 'b\\xe90.png', .*'train/0000",
        ),
        ([(n.replace("é", "e"), c) for n, c in CLASSES.items()], r"names '00000/be0.png', .*the images are 'train/0"),
        ([(n, float(c)) for n, c in CLASSES.items()], "the class 3.0; it must be an integer"),
        ([(n, -1 - c) for n, c in CLASSES.items()], "labels run from -4 to -1"),
        ([[n, c, 0] for n, c in CLASSES.items()], "in place of .name, class."),
        ([], "no class for 5 of 5 images.*it names none"),
        (b'{"labels": null, "labels": [["a", 1]]}', "a key twice"),
        (b'{"labels": {"a.png": 1, "a.png": 2}}', "a key twice"),
        (b'{"labels": [["\\ud800.png", 1]]}', r"it names '\\ud800.png'"),
    ],
)
def test_labels_that_fit_no_image(tmp_path, kind, labels, message):
    files = contents(labels, top="train/")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(write(tmp_path / "set", files, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_two_files_of_labels_are_refused(tmp_path, kind):
    files = contents(list(CLASSES.items())) | {"other/Dataset.JSON": b'{"labels": null}'}
    with pytest.raises(ValueError, match=r"holds 2 dataset.json \('dataset.json', 'other/Dataset.JSON'\); keep one"):
        open_source(write(tmp_path / "set", files, kind))


def test_two_images_that_only_spelling_tells_apart(tmp_path):
    """Exact names still tell; others do not, and are refused."""
    names = [unicodedata.normalize(form, "b\u00e9.png") for form in ("NFC", "NFD")]
    files = {name: png(i) for i, name in enumerate(names)}
    exact = files | {"dataset.json": json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}).encode()}
    assert found(write(tmp_path / "exact.zip", exact, "zip")) == {0: 0, 1: 1}
    other = files | {"dataset.json": json.dumps({"labels": [[name.upper(), 0] for name in names]}).encode()}
    with pytest.raises(ValueError, match="no class for 2 of 2"):
        open_source(write(tmp_path / "other.zip", other, "zip"))
    with pytest.raises(ValueError, match="holds one name twice"):
        open_source(write(tmp_path / "twice.zip", {"a.png": png(0), "./a.png": png(1)}, "zip"))


def test_classes_stay_as_they_are(tmp_path):
    """Gaps, one class alone and a dict are as EDM has them; null is no classes."""
    for labels, count in (([7] * 5, 8), ([0] * 5, 1), ([0, 5, 5, 9, 0], 10)):
        given = dict(zip(NAMES, labels, strict=True))
        spec = write(tmp_path / "set.zip", contents(given), "zip")
        assert found(spec) == dict(enumerate(labels)) and open_source(spec).num_classes == count
    spec = write(tmp_path / "set.zip", contents(None), "zip")
    assert set(found(spec).values()) == {-1} and open_source(spec).num_classes == 0


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_what_systems_leave_behind_is_no_image(tmp_path, kind):
    """Of macOS, of Windows, and of tools that write one's slashes on the other."""
    left = ("__MACOSX/._a.png", "__MACOSX\\00000\\._a.png", "00000/._b\u00e90.png", ".DS_Store", "Thumbs.db")
    left += ("00000/.DS_Store", "__macosx/a.png", ".hidden/a.png", "__MACOSX/dataset.json", "00000\\.a.png")
    spec = write(tmp_path / "set", contents(list(CLASSES.items())) | dict.fromkeys(left, b"\0\5\x16\7"), kind)
    assert found(spec) == RIGHT


def test_entries_with_a_dot_in_front_are_images(tmp_path):
    files = {f"./{name}": content for name, content in contents(list(CLASSES.items())).items()}
    assert found(write(tmp_path / "set.zip", files, "zip")) == RIGHT
