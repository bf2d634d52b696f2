"""EDM's network pickles: written by `edm_files.py`, converted, and compared with numpy networks in float64."""

import hashlib
import json
import os
import pathlib
import pickle
import re
import shlex
import sys

import edm_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_adm
import reference_unet
from absl import flags as absl_flags
from absl.testing import flagsaver
from networks import jit
from test_pth import Calls, evil

from configs import cifar10
from warm_jax.cli import flags, modes
from warm_jax.convert import edm_settings, from_edm, warm_start
from warm_jax.models.geometry import STYLES
from warm_jax.runtime import checkpoint
from warm_jax.sampling import generate, runs
from warm_jax.weights import pth
from warm_jax.weights.edm_pickle import read_network

KINDS = {
    "ddpmpp": {"attention": (8,)},
    "ncsnpp": {"kind": "ncsnpp", "augment": 0, "classes": 3},
    "adm": {"kind": "adm", "channels": 64, "attention": (8,), "classes": 3, "augment": 0},
}


def load(name):
    return cifar10.get_config("hot")


def write(path, net):
    path.write_bytes(edm_files.dumps(edm_files.contents(net)))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    nets = {name: edm_files.network(**options) for name, options in KINDS.items()}
    return {name: (net, write(folder / f"{name}.pkl", net)) for name, net in nets.items()}


def denoised(net, architecture, x, sigma, labels):
    """EDM's D(x; σ) in numpy float64: Karras et al. 2022, table 1."""
    s = sigma[:, None, None, None]
    total = s**2 + 0.25
    kind = {"architecture": architecture} if architecture != "adm" else {}
    raw = (reference_adm.adm if architecture == "adm" else reference_unet.unet)(
        edm_files.reference_params(net),
        x / np.sqrt(total),
        np.log(sigma) / 4,
        np.zeros(len(x)),
        labels,
        np.zeros((len(x), net.children["model"].children["map_augment"].parameters["weight"].shape[1]))
        if "map_augment" in net.children["model"].children
        else np.zeros((len(x), 1)),
        levels=2,
        num_blocks=1,
        **kind,
    )
    return 0.25 / total * x + s * 0.5 / np.sqrt(total) * raw


@pytest.mark.parametrize("name", KINDS)
def test_the_converted_denoiser_is_the_source_networks(files, tmp_path, name):
    net, file = files[name]
    conversion = from_edm.prepare(file, str(tmp_path / "run"), "", None, load)
    exp, classes = conversion.experiment, net.settings["label_dim"]
    assert exp.config.model.architecture == name and exp.config.data.num_classes == classes
    rng, sigma = np.random.default_rng(1), np.array([0.05, 1.0, 20.0])
    x = rng.normal(size=(3, 8, 8, 3)) * (0.5 + sigma[:, None, None, None])
    one_hot = np.eye(3)[[2, 0, 1]] if classes else np.zeros((3, 1))
    expected = denoised(net, name, x, sigma, one_hot)
    given = [jnp.asarray(a, jnp.float32) for a in (x, sigma, one_hot)]
    ours = jit(exp.model.predict)(conversion.params, *given[:2], given[2] if classes else None)
    error = np.abs(ours.blurred - expected).max(axis=(1, 2, 3)) / np.abs(expected).max(axis=(1, 2, 3))
    assert error.max() < 2e-5 and not np.asarray(ours.residual).any()
    # And not for want of a network: its part in the sum is seen.
    skip = 0.25 / (sigma**2 + 0.25)
    assert np.abs(expected - skip[:, None, None, None] * x).max() > 0.1


def test_settings_come_from_the_file(files):
    found = edm_settings.settings(read_network(files["adm"][1]))
    assert found == {
        "data.image_size": 8,
        "data.channels": 3,
        "data.num_classes": 3,
        "data.label_dropout": 0.0,
        "data.augment": "none",
        "model.architecture": "adm",
        "model.channels": 64,
        "model.channel_mult": (1, 2),
        "model.num_blocks": 1,
        "model.attention": (8,),
        "model.dropout": 0.1,
        "model.patch_size": 1,
        "model.dtype": "float32",
        "model.preconditioning": "edm",
        "model.sigma_data": 0.5,
    }


def test_the_published_files_need_no_config():
    """By side, classes and architecture: the config of the set that each was published for."""
    known = {(32, 0, "ncsnpp"): "cifar10", (32, 10, "ddpmpp"): "cifar10_conditional"}
    known |= {(64, 0, "ddpmpp"): "ffhq64", (64, 1000, "adm"): "imagenet64"}
    for (side, classes, architecture), name in known.items():
        found = {"data.image_size": side, "data.num_classes": classes, "model.architecture": architecture}
        assert from_edm.nearest_config(found) == f"{name}:hot"


@pytest.fixture
def typed(monkeypatch):
    """What the command line makes of a printed command: its mode, its config, its flags."""
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)

    def parse(command, then=lambda: None):
        argv = shlex.split(command)[2:]
        with flagsaver.flagsaver():
            absl_flags.FLAGS.unparse_flags()
            monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
            flags.parse(argv)
            then()
            return flags.MODE.value, flags.config(), pathlib.Path(flags.WORKDIR.value), flags.INIT_FROM.value

    return parse


def test_the_workdir(files, tmp_path, capsys, typed):
    """Weights bitwise as converted; origin and licence kept and said; both printed commands are taken as they are."""
    file, workdir = files["ncsnpp"][1], tmp_path / "run"
    command = f"python -m warm_jax.main --mode=convert --from_edm={file} --workdir={workdir}"
    typed(command, then=lambda: modes.prepare("convert", None, workdir)())
    said = capsys.readouterr().out
    origin = json.loads((workdir / "origin.json").read_text())
    assert (
        origin["source"] == "ncsnpp.pkl"
        and origin["sha256"] == hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    )
    assert "CC BY-NC-SA 4.0: no commercial use" in origin["licence"] and origin["licence"] in said
    sampling, training = (line.strip() for line in said.splitlines() if line.startswith("    python"))

    mode, config, where, _ = typed(sampling)
    run = generate.prepare(config, where, "0-3", "", -1).run
    assert mode == "sample" and config.model.dtype == "float32" and where == workdir
    step, ema = runs.load_ema(run)
    converted = from_edm.prepare(file, str(tmp_path / "other"), "", None, load).params
    jax.tree.map(np.testing.assert_array_equal, ema, converted)
    assert step == 0

    mode, config, _, start = typed(training)
    assert mode == "train" and config.process.bnr == 0.5 and config.model.dtype == "bfloat16"
    assert warm_start.prepare(config, tmp_path / "warm", start, begun=False).workdir == workdir
    with pytest.raises(ValueError, match="holds a run already"):
        from_edm.prepare(file, str(workdir), "", None, load)


def test_pfgmpp_is_not_hot(tmp_path):
    """Its noise has heavy tails, of as many dimensions as its file says; its config's name says so."""
    file = write(tmp_path / "a.pkl", small(pfgmpp=True, D=128))
    pfgmpp = cifar10.get_config("pfgmpp")
    made = from_edm.prepare(file, str(tmp_path / "run"), "", None, lambda name: {"cifar10:pfgmpp": pfgmpp}[name])
    assert made.experiment.config.process.system == "pfgmpp"
    assert made.experiment.config.process.augmented_dims == 128.0 and made.origin["format"].startswith("PFGM++")
    assert "--config=cifar10:pfgmpp " in made.commands[1]
    with pytest.raises(ValueError, match=r"PFGM\+\+ \(D = 128\).*add :pfgmpp"):
        from_edm.prepare(file, str(tmp_path / "other"), "configs/cifar10.py:hot", cifar10.get_config("hot"), load)
    with pytest.raises(ValueError, match="EDM is hot diffusion"):
        from_edm.prepare(write(tmp_path / "b.pkl", small()), "", "cifar10.py:pfgmpp", pfgmpp, load)


@pytest.mark.parametrize(
    ("bounds", "levels"),
    [((0, float("inf")), (0.002, 80)), ((0.01, 50.5), (0.01, 50.5)), ((0.001, 100), (0.002, 80))],
)
def test_the_networks_noise_levels_bound_the_samplers(tmp_path, bounds, levels):
    """As edm_sampler does: max(sigma_min, net.sigma_min) and min(sigma_max, net.sigma_max)."""
    file = write(tmp_path / "a.pkl", small(sigma_min=bounds[0], sigma_max=bounds[1]))
    made = from_edm.prepare(file, str(tmp_path / "run"), "", None, load)
    grid = made.experiment.sampled.levels(5)
    assert (grid[-2], grid[0]) == pytest.approx(levels)
    assert ("--config.process.beta_max=50.5" in made.commands[1]) == (levels[1] == 50.5)


def test_which_config_and_how_it_samples_is_said(tmp_path):
    file = write(tmp_path / "a.pkl", small(side=16))
    made = from_edm.prepare(file, str(tmp_path / "run"), "", None, load)
    assert "config: cifar10:hot, which is for 32 pixels and not for this network's 16" in made.chosen
    assert (
        "heun, 18 steps, noise from 80 down to 0.002, rho 7" in made.chosen and "--config.sample.steps" in made.chosen
    )
    named = from_edm.prepare(file, str(tmp_path / "run"), "configs/cifar10.py:hot", load(""), load)
    assert "(as --config says)" in named.chosen


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def small(**changes):
    return edm_files.network(**{"channels": 4, "mult": (1,), "attention": (), "augment": 0} | changes)


def within(value):
    """Where an attacker may put it: the whole, the dict, the network's state, its modules, inside a storage."""
    net = small()
    yield value
    yield {"ema": net, "other": [value]}
    net.settings["note"] = value
    yield {"ema": net}
    net = small()
    net.children["model"].children["map_extra"] = value
    yield {"ema": net}
    storage = edm_files.saved_storage(np.zeros(2, np.float32))
    inner = edm_files.dumps(value, 2)
    stream = storage[: storage.index(b"\x80\x02", 60)] + inner
    yield {"ema": edm_files.Reduced("torch.storage", "_load_from_bytes", stream)}


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, pickle.loads, print])
def test_no_pickle_runs_code(tmp_path, function):
    marker = tmp_path / "executed"
    code = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w').close()"
    code = code.encode() if function is pickle.loads else code
    for protocol in (2, 4):
        for i, value in enumerate(within(Calls(function, code))):
            path = tmp_path / f"{i}.pkl"
            path.write_bytes(edm_files.dumps(value, protocol))
            with pytest.raises(ValueError, match=r"\d\.pkl: not a file of tensors: ") as caught:
                read_network(path)
            assert "refused" in str(caught.value)
            assert not marker.exists()


def test_no_hand_made_pickle_runs_code(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "a.pkl"
    for named, content in evil(marker):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pkl: not a file of tensors"):
            read_network(path)
        assert not marker.exists(), named


def test_source_code_in_the_file_is_not_run(tmp_path):
    """Every part says `raise RuntimeError`, this one would leave a file; the reader hands over its numbers."""
    marker = tmp_path / "executed"
    net = small()
    net.source = net.children["model"].source = f"open({str(marker)!r}, 'w').close()"
    read = read_network(write(tmp_path / "a.pkl", net))
    assert not marker.exists() and read.kind == "EDMPrecond"
    weights = net.children["model"].children["map_layer0"].parameters["weight"]
    np.testing.assert_array_equal(read.children["model"].children["map_layer0"].parameters["weight"], weights)


def test_the_traps_are_live(tmp_path):
    with edm_files.importable(), pytest.raises(AssertionError, match="was unpickled"):
        pickle.loads(edm_files.dumps(edm_files.contents(small())))


def test_every_truncation_is_refused(tmp_path):
    whole, path = edm_files.dumps(edm_files.contents(small())), tmp_path / "a.pkl"
    for length in [*range(0, 4000, 797), *range(4000, len(whole), len(whole) // 12), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.pkl: "):
            read_network(path)


def test_sizes_beyond_the_file_are_refused(tmp_path):
    path = tmp_path / "a.pkl"
    storage = edm_files.saved_storage(np.zeros(4, np.float32))
    claimed = storage.replace(b"K\x04N", b"J\xff\xff\xff\x7fN")[:-24] + (2**31 - 1).to_bytes(8, "little") + bytes(16)
    for content in (
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # BINBYTES8
        b"\x80\x04B\xff\xff\xff\xffx.",
        edm_files.dumps({"ema": edm_files.Reduced("torch.storage", "_load_from_bytes", claimed)}),
        edm_files.dumps({"ema": edm_files.Reduced("torch.storage", "_load_from_bytes", b"")}),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pkl: "):
            read_network(path)


def doubled(levels=60):
    """2^60 elements by 60 lists: to print them, or to compare them, would take for ever."""
    made = 0
    for _ in range(levels):
        made = [made, made]
    return made


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A network as its file has it, whose settings a test may change."""
    return read_network(write(tmp_path_factory.mktemp("read") / "a.pkl", small(pfgmpp=True, D=64)))


def checked(network):
    """What is done before anything is built, as one text where it complains."""
    try:
        edm_settings.noise_levels(network, load(""))
        edm_settings.settings(network)
        return "; ".join(edm_settings.misfits(network.children["model"], STYLES["ddpmpp"]))
    except ValueError as error:
        return str(error)


_ODD = (doubled(), 8.0, 2**200, -1, -(2**200), "8", None, [8], {}, True, float("nan"))
_FITTING = {"sigma_data": [8.0], "sigma_min": [8.0], "sigma_max": [8.0, 2**200], "D": [8.0], "pfgmpp": [True]}


@pytest.mark.parametrize("value", _ODD, ids=lambda value: f"{type(value).__name__}")
def test_settings_of_another_type_or_range(read, monkeypatch, value):
    """Of the wrapper, of how the network was made, of its parts: one short line that names it, and soon."""
    model, parts = read.children["model"], dict(read.walk())
    places = [(name, read.settings) for name in ("img_resolution", "img_channels", "label_dim", "sigma_data", "D")]
    places += [(name, read.settings) for name in ("sigma_min", "sigma_max", "pfgmpp")]
    places += [(name, model.settings["_init_kwargs"]) for name in ("dropout", "label_dropout", "decoder_type")]
    places += [("_init_kwargs", model.settings), ("eps", parts["model.dec.8x8_in0.norm0"].settings)]
    places += [(name, parts["model.dec.8x8_in0"].settings) for name in ("num_heads", "skip_scale")]
    assert checked(read) == ""
    for name, settings in places:
        same = [good for good in _FITTING.get(name, ()) if type(good) is type(value) and good == value]
        if same or (name == "num_heads" and value is True) or (name == "_init_kwargs" and value == {}):
            continue  # which they may be
        with monkeypatch.context() as patch:
            patch.setitem(settings, name, value)
            said = checked(read)
        assert re.search(f"{name} (is|are) |for noise from 1.6", said) and len(said) < 400, (name, said)


def test_a_small_file_of_much_text(tmp_path):
    (tmp_path / "a.pkl").write_bytes(edm_files.dumps({"ema": small(img_resolution=doubled())}))
    with pytest.raises(ValueError, match=r"its img_resolution is \[\[") as caught:
        from_edm.prepare(str(tmp_path / "a.pkl"), str(tmp_path / "run"), "", None, load)
    assert len(str(caught.value)) < 400


def test_blocks_that_are_no_unet(tmp_path):
    """Of a number that would be built one by one, and of sides that are no halves."""
    for name in ("8x8_block999", "5x5_block0", "4096x4096_block0", "8x8_block1"):
        net = small()
        blocks = net.children["model"].children["enc"].__dict__["_modules"]
        blocks[name] = blocks["8x8_block0"]
        if name == "8x8_block1":
            del blocks["8x8_block0"]
        with pytest.raises(ValueError, match="are not those of a U-Net on 8 pixels"):
            from_edm.prepare(write(tmp_path / "a.pkl", net), str(tmp_path / "run"), "", None, load)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(50), "is a zip, as torch.save writes it"),
        (edm_files.saved_storage(np.zeros(3, np.float32)), "PyTorch's older format"),
        (b"<!DOCTYPE html><html>", "is a web page in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"(lp0\nI1\nV\x80\n.", "no pickle, or a damaged one|refused"),
    ],
)
def test_other_files_are_told_by_their_beginning(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        from_edm.prepare(str(tmp_path / "a.pkl"), str(tmp_path / "run"), "", None, load)
    assert "codec can't" not in str(caught.value)
    assert "network-snapshot-*.pkl" in str(caught.value) or content[:1] == b"("


def test_a_network_that_contains_itself_is_refused(tmp_path):
    """By one object a hundred times in each of five levels, and by a cycle."""
    leaf = edm_files.ModuleDict({})
    for _ in range(5):
        leaf = edm_files.ModuleDict({str(i): leaf for i in range(100)})
    (tmp_path / "wide.pkl").write_bytes(edm_files.dumps({"ema": leaf}))
    ring = edm_files.ModuleDict({})
    ring.__dict__["_modules"]["again"] = ring
    (tmp_path / "ring.pkl").write_bytes(edm_files.dumps({"ema": ring}))
    for name in ("wide", "ring"):
        with pytest.raises(ValueError, match="nested deeper than 8, or of more than 10000"):
            read_network(tmp_path / f"{name}.pkl")


def _change(net, name, **settings):
    part = net.children["model"]
    for step in name.split("."):
        part = part.children[step] if hasattr(part, "children") else part.__dict__["_modules"][step]
    part.settings |= settings
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: small(wrapper="VPPrecond"), "'VPPrecond'; only EDMPrecond"),
        (lambda: small(wrapper="iDDPMPrecond"), "older preconditionings"),
        (lambda: small(augment=4), "4 augmentation labels"),
        (lambda: _change(small(), "enc.8x8_block0", skip_scale=1), "enc.8x8_block0.skip_scale is 1, not 0.707"),
        (lambda: _change(small(), "enc.8x8_block0.norm1", eps=1e-5), "norm1.eps is 1e-05, not 1e-06"),
        (lambda: _change(small(), "dec.8x8_in0", num_heads=4), "dec.8x8_in0.num_heads is 4, not 1"),
        (lambda: _without(small(), "map_layer1"), "map_layer1.kernel is missing"),
        (lambda: small(mult=(1, 1), decoder="skip"), "decoder_type is 'skip', not 'standard'"),
        (lambda: _asked(small(mult=(1, 1), decoder="skip"), decoder_type="standard"), "dec_4x4_aux_conv.bias is"),
        (lambda: _asked(small(), encoder_type="skip"), "encoder_type is 'skip', not 'standard'"),
        (lambda: _asked(small(), embedding_type=["fourier"]), r"embedding_type is \['fourier'\], not 'positional'"),
        (lambda: _asked(small(), spectral_norm=True), r"spectral_norm \(True\) is a setting that is not known here"),
        (lambda: _change(small(), "map_noise", endpoint=False), "map_noise.endpoint is False, not True"),
        (lambda: _change(small(), "enc.8x8_conv", fused_resample=True), "enc.8x8_conv.fused_resample is True"),
        (lambda: _with(small(), "out_conv"), "two of its tensors would be out_conv.kernel"),
        (lambda: small(pfgm=True), "PFGM "),
        (lambda: small(pfgmpp=True), "does not say its D"),
        (lambda: small(sigma_min=90), "for noise from 90 to inf, and the config's levels are 0.002 to 80"),
        (lambda: edm_files.Part("EDMPrecond", children={"model": edm_files.Part("Net")}), "without what EDM's have"),
        (lambda: edm_files.Part("EDMPrecond"), "without what EDM's have"),
    ],
)
def test_what_is_not_edms_network_is_named(tmp_path, net, message):
    file = write(tmp_path / "a.pkl", net())
    with pytest.raises(ValueError, match=message) as caught:
        from_edm.prepare(file, str(tmp_path / "run"), "", None, load)
    assert file in str(caught.value) and not (tmp_path / "run").exists()


def _asked(net, **settings):
    net.children["model"].settings["_init_kwargs"] |= settings
    return net


def _with(net, name):
    children = net.children["model"].children
    children[name] = children["dec"].__dict__["_modules"]["8x8_aux_conv"]
    return net


def _without(net, name):
    del net.children["model"].children[name]
    return net


def test_other_input_is_refused(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pkl.*NVIDIA's network pickles"):
        from_edm.prepare(str(tmp_path / "no.pkl"), "", "", None, load)
    warm = cifar10.get_config("warm")
    with pytest.raises(ValueError, match=r"EDM is hot diffusion.*add :hot"):
        from_edm.prepare(files["ddpmpp"][1], str(tmp_path / "run"), "configs/cifar10.py", warm, load)


def test_a_checkpoint_without_training_state(tmp_path):
    """It can be sampled; training on it says that it cannot be read."""
    kept = checkpoint.Checkpoints(pathlib.Path(tmp_path) / "checkpoints")
    kept.save(0, None, {"w": jnp.arange(3.0)}, wait=True)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=device)}
    np.testing.assert_array_equal(kept.restore(0, ema=abstract)["ema"]["w"], [0, 1, 2])
    with pytest.raises(ValueError, match="none of the checkpoints"):
        kept.restore_latest(train=abstract, ema=abstract)


def test_small_files_that_would_multiply(tmp_path):
    """One object that is named a thousand times is read once, or the file is refused: never a thousand times."""
    path, empty = tmp_path / "a.pkl", edm_files.ModuleDict({})
    empty.__dict__["_parameters"] = dict.fromkeys(map(str, range(2000)))
    path.write_bytes(edm_files.dumps({"ema": edm_files.ModuleDict({str(i): empty for i in range(600)})}))
    with pytest.raises(ValueError, match="a network of more than 1,000,000 entries"):
        read_network(path)
    storage = edm_files.Reduced("torch.storage", "_load_from_bytes", edm_files.saved_storage(np.zeros(2, np.float32)))
    for shape in ((1,) * 10**5, [1], (1,) * 33):
        tensor = edm_files.Reduced("torch._utils", "_rebuild_tensor_v2", storage, 0, shape, shape, False, {})
        path.write_bytes(edm_files.dumps({"ema": tensor}))
        with pytest.raises(ValueError, match="at most 32 numbers"):
            read_network(path)


def test_the_same_bytes_are_one_storage(tmp_path, monkeypatch):
    """With and without memory of where they were read, numbers are those of the file."""
    net, reads = small(), []
    raw = edm_files.saved_storage(np.arange(4, dtype=np.float32))
    storage = edm_files.Reduced("torch.storage", "_load_from_bytes", raw)
    tensors = [
        edm_files.Reduced("torch._utils", "_rebuild_tensor_v2", storage, i, (2,), (1,), False, edm_files.OrderedDict())
        for i in range(3)
    ]
    net.children["model"].children["extra"] = made = edm_files.ModuleDict({})
    made.__dict__["_parameters"] = edm_files.OrderedDict((str(i), tensor) for i, tensor in enumerate(tensors))
    whole = pth.read_storage
    monkeypatch.setattr(pth, "read_storage", lambda data: reads.append(data == raw) or whole(data))
    found = read_network(write(tmp_path / "a.pkl", net)).children["model"].children["extra"].parameters
    assert [found[str(i)].tolist() for i in range(3)] == [[0, 1], [1, 2], [2, 3]]
    assert reads.count(True) == 1
