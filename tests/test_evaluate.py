"""The evaluation program: identical sets score as theory says, interruptions change nothing, mismatches are refused."""

import collections
import dataclasses
import itertools
import json
import random
import zipfile

import numpy as np
import pytest

from configs import smoke
from warm_jax.data import sources
from warm_jax.evaluation import evaluate, protocols, reference, shards
from warm_jax.metrics import extract, fashion, frechet
from warm_jax.runtime import preemption
from warm_jax.training import train

COUNT = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 of the bundled images, and 200 others, as npz sources."""
    folder = tmp_path_factory.mktemp("data")
    for name, first in (("seen", 0), ("held_out", 200)):
        images, labels = sources.open_source("bundled").read(np.arange(first, first + 200))
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, module_compiles_quickly):
    """A workdir with checkpoints of steps 2 and 4."""
    workdir, config = tmp_path_factory.mktemp("run"), settings(data)
    assert train.train(train.prepare(config, workdir)) == 0
    return workdir


def settings(data, **changes):
    config = smoke.get_config()
    config.data.source = f"npz:{data / 'seen.npz'}"
    config.train.steps, config.train.checkpoint_every, config.train.sample_every = 4, 2, 0
    config.eval.count, config.eval.batch_size = COUNT, 32
    config.eval.metrics = ("fd", "swd", "lsd")
    config.sample.steps, config.sample.batch_size = 2, 32
    for key, value in changes.items():
        config.eval[key] = value
    return config


def run(config, workdir, images="", protocol="once", watch=False):
    status = evaluate.evaluate(evaluate.prepare(config, workdir, images, -1, protocol, watch))
    path = workdir / "results.jsonl"
    return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scores(row):
    return {name: value for name, value in row.items() if name.startswith(("fd_", "kid_", "swd_", "lsd_"))}


def test_a_set_against_itself_and_against_others(data, tmp_path):
    config = settings(data, count=200, metrics=("fd", "kid", "pr", "swd", "lsd"))
    status, (same,) = run(config, tmp_path, f"npz:{data / 'seen.npz'}")
    assert status == 0 and same["count"] == 200 and same["reference_count"] == 200
    assert same["fd_fashion_cnn_200"] == pytest.approx(0, abs=1e-6)
    assert same["swd_pixels_200"] == pytest.approx(0, abs=1e-9)
    assert same["lsd_db_pixels_200"] == pytest.approx(0, abs=1e-9)
    assert same["precision_fashion_cnn_200"] == same["recall_fashion_cnn_200"] == 1
    rng = np.random.RandomState(0)
    np.savez(tmp_path / "noise.npz", images=rng.randint(0, 256, (200, 28, 28, 1)).astype(np.uint8))
    _, (_, other) = run(config, tmp_path, f"npz:{data / 'held_out.npz'}")
    _, (_, _, noise) = run(config, tmp_path, f"npz:{tmp_path / 'noise.npz'}")
    for name in ("fd_fashion_cnn_200", "kid_fashion_cnn_200", "swd_pixels_200", "lsd_db_pixels_200"):
        assert same[name] < other[name] < noise[name]
    assert noise["images"].startswith("npz:") and "nfe" not in noise


def test_a_row_says_what_the_score_depends_on(data, trained):
    _, rows = run(settings(data), trained)
    row = rows[-1]
    assert row["nfe"] == 3 and row["solver"] == "heun" and row["steps"] == 2 and row["bnr"] == 0.5
    assert row["checkpoint_step"] == 4 and row["numbers"] == "0-59" and row["extractor"] == "fashion_cnn"
    assert row["extractor_hash"] == fashion.load().hash and row["uint8_rule"] == "trunc(clip(127.5 x + 128, 0, 255))"


def test_an_interrupted_evaluation_ends_with_the_same_numbers(data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 20)
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(trained / name)
    config = settings(data, first=7)

    def after_two_shards():
        return "SIGTERM" if len(list(tmp_path.glob("evaluations/*/*.npz"))) >= 2 else ""

    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", after_two_shards)
        status, rows = run(config, tmp_path)
    assert status == preemption.EXIT_AGAIN and rows == []
    files = sorted(tmp_path.glob("evaluations/*/*.npz"))
    assert [path.name for path in files] == ["00000007-20.npz", "00000027-20.npz"]
    made = [path.stat().st_mtime_ns for path in files]
    status, (resumed,) = run(config, tmp_path)
    assert status == 0 and [path.stat().st_mtime_ns for path in files] == made
    files[1].write_bytes(files[1].read_bytes()[:1000])
    _, (_, repaired) = run(config, tmp_path)
    _, rows = run(config, trained)
    assert scores(resumed) == scores(repaired) == scores(rows[-1])


def test_a_flip_in_any_region_of_a_kept_shard_is_found_and_made_again(data, tmp_path, capsys):
    """Each member's header, bytes and entry in the directory, and the end of the file: the same bytes as before."""
    judging = evaluate.prepare(settings(data, count=20), tmp_path, f"npz:{data / 'seen.npz'}", -1, "once", False)
    images, rng = shards.Images(judging), random.Random(0)
    whole = shards.judge(judging, images, 0, 20)
    [path] = tmp_path.glob("evaluations/*/*.npz")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        directory = archive.start_dir
    assert {"sha256.npy", "pool.npy", "pixels.npy", "nfe.npy"} <= members.keys()
    regions, entry_at = {"end": (len(content) - 22, len(content))}, directory
    for name, entry in members.items():
        at = entry.header_offset
        first = at + 30 + sum(content[at + 26 + i] << 8 * (i % 2) for i in range(4))
        regions[f"header of {name}"] = (at, first)
        regions[f"bytes of {name}"] = (first, first + entry.compress_size)
        end = entry_at + 46 + len(name) + len(entry.extra) + len(entry.comment)
        regions[f"entry of {name}"] = (entry_at, end)
        entry_at = end
    assert sorted(regions.values())[0][0] == 0 and entry_at == len(content) - 22
    covered = sorted(regions.values())
    assert all(one[1] == other[0] for one, other in itertools.pairwise(covered))
    capsys.readouterr()
    made_again = collections.Counter()
    calls = []
    kept = [np.concatenate(list(images.chunks(0, 20)))]
    images.chunks = lambda first, count: calls.append(first) or iter(kept)
    for name, (first, end) in regions.items():
        for _ in range(3):
            changed = bytearray(content)
            changed[rng.randrange(first, end)] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            calls.clear()
            judged = shards.judge(judging, images, 0, 20)
            for field in ("pool", "pixels"):
                np.testing.assert_array_equal(getattr(judged, field), getattr(whole, field), err_msg=name)
            said = capsys.readouterr().out
            assert bool(calls) == (f"{path} is damaged (" in said) and len(calls) <= 1
            made_again[name] += len(calls)
            assert not calls or path.read_bytes() == content
    assert all(made_again[name] == 3 for name in regions if name.startswith("bytes of"))


def test_a_statistics_file_is_the_source_it_was_made_of(data, tmp_path):
    config, held_out = settings(data), f"npz:{data / 'held_out.npz'}"
    assert reference.statistics(config, config.data.source, str(tmp_path / "stats.npz")) == 0
    _, (direct,) = run(config, tmp_path, held_out)
    config.eval.reference = str(tmp_path / "stats.npz")
    _, (_, by_file) = run(config, tmp_path, held_out)
    assert scores(direct) == scores(by_file)
    with np.load(tmp_path / "stats.npz") as stored:
        np.testing.assert_array_equal(stored["mu"], stored["mean"])
        np.testing.assert_array_equal(stored["sigma"], stored["covariance"])
        np.savez(tmp_path / "foreign.npz", mu=stored["mu"], sigma=stored["sigma"])
    config.eval.reference = str(tmp_path / "foreign.npz")
    _, (_, _, foreign) = run(config, tmp_path, held_out)
    assert foreign["fd_fashion_cnn_60"] == pytest.approx(direct["fd_fashion_cnn_60"], rel=1e-12)
    assert "swd_pixels_60" not in foreign and any("swd needs the reference's images" in c for c in foreign["cautions"])


def test_the_papers_protocol_is_three_disjoint_rounds(data, trained, monkeypatch):
    monkeypatch.setattr(protocols, "PAPER_COUNT", 40)
    _, rows = run(settings(data, metrics=("fd",)), trained, protocol="paper")
    *rounds, summary = rows[-4:]
    assert [row["numbers"] for row in rounds] == ["0-39", "40-79", "80-119"]
    values = [row["fd_fashion_cnn_40"] for row in rounds]
    assert len(set(values)) == 3 and summary["fd_fashion_cnn_40_min"] == min(values)
    assert summary["fd_fashion_cnn_40_mean"] == pytest.approx(np.mean(values))
    assert summary["fd_fashion_cnn_40_std_of_rounds"] == pytest.approx(np.std(values, ddof=1))


def test_the_summary_says_what_its_rows_say(data, trained):
    row, summary = (json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()[-2:])
    assert summary["protocol"] == "paper" and summary["numbers"] == "0-119"
    for name in ("reference", "reference_count", "extractor", "extractor_hash", "uint8_rule", "nfe", "checkpoint_step"):
        assert summary[name] == row[name]


def test_every_row_says_its_protocol_and_the_extractors_of_edm2_score_the_same_images(data, trained, monkeypatch):
    """A second extractor stands in for DINOv2: the first one's features, halved, so its distance is a quarter."""
    fashion_cnn = fashion.load()

    def halved(params, images):
        found = fashion_cnn.apply(params, images)
        return extract.Features(found.pool / 2, found.logits)

    other = dataclasses.replace(fashion_cnn, name="halved", hash="0", apply=halved)
    found = {"inception": fashion_cnn, "dinov2": other, "fashion_cnn": fashion_cnn}
    monkeypatch.setattr(reference, "load_extractor", lambda config: found[config.eval.extractor])
    monkeypatch.setattr(protocols, "EDM2_COUNT", 30)
    monkeypatch.setattr(protocols, "QUICK_COUNT", 20)
    monkeypatch.setattr(shards, "SHARD", 20)
    drawn, draw = [], shards.Images.chunks

    def counted(self, first, count):
        drawn.append((first, count))
        yield from draw(self, first, count)

    monkeypatch.setattr(shards.Images, "chunks", counted)
    _, rows = run(settings(data, first=500), trained, protocol="edm2")
    assert drawn == [(500, 20), (520, 10)]
    one, two = rows[-2:]
    assert one["protocol"] == two["protocol"] == "edm2" and one["numbers"] == two["numbers"] == "500-529"
    assert one["scores"] == ["fd_fashion_cnn_30"] and two["extractor"] == "halved"
    assert two["fd_halved_30"] == pytest.approx(one["fd_fashion_cnn_30"] / 4, rel=1e-4)
    _, rows = run(settings(data, first=500, metrics=("fd", "is", "dc")), trained, protocol="quick")
    assert rows[-1]["protocol"] == "quick" and rows[-1]["count"] == 20 and "fd_fashion_cnn_20" in rows[-1]
    assert 0 <= rows[-1]["coverage_fashion_cnn_20"] <= 1
    with pytest.raises(ValueError, match="--protocol=edm3: choose one of once, paper, edm2, quick"):
        run(settings(data), trained, protocol="edm3")


def test_the_scores_that_notice_copying_and_missing_modes(data, tmp_path):
    """Training images are copies, held-out ones are not; of half of the classes about half are covered."""
    images, labels = sources.open_source("bundled").read(np.arange(200))
    np.savez(tmp_path / "some.npz", images=images[labels < 5])
    config = settings(data, metrics=("dc", "authenticity"))
    for name, source in (("seen", data), ("held_out", data), ("some", tmp_path)):
        _, rows = run(config, tmp_path, f"npz:{source / f'{name}.npz'}")
        row = rows[-1]
        copied, covered = 1 - row["authenticity_fashion_cnn_60"], row["coverage_fashion_cnn_60"]
        assert copied == (0 if name == "held_out" else 1) or (name == "held_out" and 0.3 < copied < 0.7)
        assert covered < 0.6 if name == "some" else covered > 0.7


def test_a_reference_batch_serves_every_score(data, trained, tmp_path):
    """Of guided-diffusion: the moments and the images in one file; its pixels score as a source of the same images."""
    with np.load(data / "held_out.npz") as stored:
        images = stored["images"]
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=2048), np.eye(2048)
    for name, shown in (("batch", images), ("other", np.zeros((9, 32, 32, 3), np.uint8))):
        np.savez(tmp_path / f"{name}.npz", arr_0=shown, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    metrics = ("fd", "kid", "dc", "swd", "lsd")
    _, rows = run(settings(data, metrics=metrics, reference=f"npz:{data / 'held_out.npz'}"), trained)
    _, also = run(settings(data, metrics=metrics, reference=str(tmp_path / "batch.npz")), trained)
    assert scores(also[-1]) == scores(rows[-1]) and len(scores(also[-1])) == 5
    assert any("sFID is not among the scores" in caution for caution in also[-1]["cautions"])
    assert any("all scores are of its 200 images" in caution for caution in also[-1]["cautions"])
    with pytest.raises(
        ValueError, match=r"other.npz has statistics of 2048 features, and eval.extractor fashion_cnn has"
    ):
        run(settings(data, reference=str(tmp_path / "other.npz")), trained)
    np.savez(tmp_path / "images.npz", arr_0=images)
    with pytest.raises(ValueError, match=r"it has images: npz:.*images.npz compares with them"):
        run(settings(data, reference=str(tmp_path / "images.npz")), trained)


def test_the_moments_of_a_reference_batch_are_inceptions(data, tmp_path):
    """With the extractor that they are of, the Fréchet distance takes them, and the rest the images."""
    images = np.load(data / "held_out.npz")["images"]
    features = fashion.load()
    mean, covariance = np.zeros(128), np.eye(128)
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=mean, sigma=covariance)
    named = dataclasses.replace(features, name=frechet.INCEPTION)
    config = settings(data, metrics=("fd", "kid"))
    found = reference.with_images(config, tmp_path / "batch.npz", named, tmp_path / "kept")
    np.testing.assert_array_equal(found.moments.covariance, covariance)
    assert found.moments.count is None and len(found.features) == 200 and len(list((tmp_path / "kept").iterdir())) == 1
    config.eval.metrics = ("fd",)  # then no image is read
    alone = reference.with_images(config, tmp_path / "batch.npz", named, tmp_path / "none")
    assert alone.features is None and not (tmp_path / "none").exists()


def test_extrapolation_takes_the_bias_of_few_images_away(data, tmp_path):
    """The Fréchet distance falls as 1/n towards its limit: at every n it lies above (Chong and Forsyth 2020)."""
    config = settings(data, count=200, metrics=("fd", "fd_infinity"))
    _, (row,) = run(config, tmp_path, f"npz:{data / 'held_out.npz'}")
    assert row["fd_infinity_fashion_cnn_200"] < row["fd_fashion_cnn_200"]


def test_a_source_of_arrays_may_be_the_reference(data, tmp_path):
    config = settings(data, reference=f"npz:{data / 'held_out.npz'}", metrics=("fd",))
    _, (row,) = run(config, tmp_path, f"npz:{data / 'held_out.npz'}")
    assert row["reference"].startswith("npz:") and row["reference_count"] == 200
    assert any("60 of 200 images, in their order" in caution for caution in row["cautions"])


def test_a_sorted_reference_is_seen_from_end_to_end(data, tmp_path, monkeypatch):
    """Pixels and features kept of a set sorted by class are those of even positions, as numpy picks them."""
    monkeypatch.setattr(reference, "PIXEL_IMAGES", 5)
    monkeypatch.setattr(reference, "FEATURE_IMAGES", 5)
    assert reference.statistics(settings(data), f"npz:{data / 'seen.npz'}", str(tmp_path / "some.npz")) == 0
    monkeypatch.undo()
    assert reference.statistics(settings(data), f"npz:{data / 'seen.npz'}", str(tmp_path / "all.npz")) == 0
    with np.load(tmp_path / "some.npz") as some, np.load(tmp_path / "all.npz") as every:
        np.testing.assert_array_equal(some["pixels"], every["pixels"][[0, 49, 99, 149, 199]])
        np.testing.assert_array_equal(some["features"], every["features"][[0, 49, 99, 149, 199]])
        np.testing.assert_array_equal(some["mean"], every["mean"])


def test_other_images_than_the_runs_are_no_default_reference(data, trained):
    config = settings(data, metrics=("fd",))
    config.data.source = f"npz:{data / 'held_out.npz'}"
    with pytest.raises(ValueError, match="data hash differs"):
        run(config, trained)


def test_watching_passes_over_a_deleted_checkpoint(data, trained, monkeypatch):
    monkeypatch.setattr(evaluate.runs, "checkpoint_steps", lambda workdir: [4, 3, 2])  # 3 was never saved
    status, rows = run(settings(data, metrics=("fd",)), trained, watch=True)
    assert status == 0 and [row["checkpoint_step"] for row in rows[-2:]] == [2, 4]


def test_watching_scores_every_checkpoint(data, trained):
    status, rows = run(settings(data, metrics=("fd",)), trained, watch=True)
    assert status == 0 and [row["checkpoint_step"] for row in rows[-2:]] == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("fid",)}, "eval.metrics is .*'fid'.*choose some of fd"),
        ({"metrics": ("is",)}, "Inception Score needs eval.extractor=inception"),
        (
            {"extractor": "vgg"},
            "'vgg'; choose one of inception, fashion_cnn, efficientnet, dinov2, dinov2_b14, dinov2_s14",
        ),
        ({"count": 1}, "eval.count is 1; it must be at least 2"),
        ({"count": 3, "metrics": ("fd", "pr")}, "eval.count is 3; it must be at least 4"),
        ({"batch_size": 0}, "eval.batch_size is 0; it must be from 1 to 65,536"),
        ({"reference": "nowhere.npz"}, "nowhere.npz is not there; make it with --mode=stats"),
        (
            {"reference": "few", "metrics": ("dc",)},
            "few.npz has 5 images, and dc needs 6; leave it out of eval.metrics",
        ),
        ({"reference": "one", "metrics": ("authenticity",)}, "one.npz has 1 images, and authenticity needs 2"),
        ({"count": 201}, "has 200 images, this evaluation needs 201"),
        ({"extractor": "inception"}, "http"),
        ({"extractor": "dinov2"}, "(?s)dinov2_vitl14_pretrain.pth .*--config.eval.dinov2=FILE"),
    ],
)
def test_bad_requests_are_named(data, tmp_path, changes, message):
    sizes = {"few": 5, "one": 1}
    if changes.get("reference") in sizes:
        path = tmp_path / f"{changes['reference']}.npz"
        np.savez(path, images=np.zeros((sizes[changes["reference"]], 28, 28, 1), np.uint8))
        changes = changes | {"reference": f"npz:{path}"}
    with pytest.raises((ValueError, OSError), match=message):
        run(settings(data, **changes), tmp_path, f"npz:{data / 'seen.npz'}")


def test_a_reference_of_other_images_is_refused(data, tmp_path):
    np.savez(tmp_path / "large.npz", images=np.zeros((9, 32, 32, 1), np.uint8))
    config = settings(data)
    config.data.image_size = 32
    assert reference.statistics(config, f"npz:{tmp_path / 'large.npz'}", str(tmp_path / "stats.npz")) == 0
    config = settings(data, reference=str(tmp_path / "stats.npz"))
    with pytest.raises(ValueError, match=r"resolution differs.*28.*32"):
        run(config, tmp_path, f"npz:{data / 'seen.npz'}")
    config = settings(data)
    config.data.channels = 3
    with pytest.raises(ValueError, match="fashion_cnn knows grey images"):
        evaluate.prepare(config, tmp_path, "", -1, "once", False)


def test_statistics_of_other_images_than_the_runs_are_refused(data, trained, tmp_path):
    config = settings(data, metrics=("fd",))
    assert reference.statistics(config, f"npz:{data / 'held_out.npz'}", str(tmp_path / "stats.npz")) == 0
    config.eval.reference = str(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match="data hash differs"):
        run(config, trained)
    config.eval.allow_other_data = True
    assert run(config, trained)[0] == 0


def test_identical_images_are_called_so(data, tmp_path):
    np.savez(tmp_path / "same.npz", images=np.zeros((COUNT, 28, 28, 1), np.uint8))
    _, (row,) = run(settings(data), tmp_path, f"npz:{tmp_path / 'same.npz'}")
    assert any("identical" in caution for caution in row["cautions"])
