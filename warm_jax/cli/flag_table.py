"""Which modes there are, and which flags each reads: for --help, for the check of what is given, and for docs."""

MODES = {
    "train": "train, resuming by itself from the workdir's last checkpoint, and draw a grid of samples",
    "sample": "draw --seeds with the EMA weights of a checkpoint",
    "restore": "restore photographs, --images, of known --blur and --noise or of estimated ones",
    "evaluate": "score a checkpoint, or --images, against a reference",
    "stats": "write the statistics file --out of --images, to evaluate against",
    "preflight": "compile the config's programs for --topology, which need not be here: memory, FLOPs, bounds on speed",
    "prepare": "make --out (a zip or arrayrecord) of --images: cropped, resized, with a manifest",
    "compare": "train, sample and score all systems of compare.systems, each with its own form of the config",
    "analyze": "make the figures of --analysis from the data, from exact predictors and from trained models",
    "inspect": "look at --images: counts, sizes, broken files, a contact sheet, the spectrum",
    "convert": "convert published Inception or DINOv2 weights, --from_inception=FILE.pth or --from_dinov2=FILE.pth, to "
    "--out=FILE.safetensors; or EDM's, "
    "--from_edm=FILE.pkl, to --workdir; or an export, --from_export=FOLDER, to --workdir",
    "doctor": "what this machine has, what is wrong with it, and a self-test of seconds; with a config also its images",
    "export": "write a checkpoint's EMA weights as safetensors, JSON, StableHLO and a model card to --out",
}
EXAMPLES = {
    "train": "--config=fashion_mnist",
    "sample": "--workdir=runs/fashion_mnist --mode=sample --seeds=0-99",
    "restore": "--workdir=runs/restoration --mode=restore --images=FOLDER --blur=1 --noise=25/255",
    "evaluate": "--workdir=runs/fashion_mnist --mode=evaluate --config.eval.count=5000",
    "stats": "--config=cifar10 --mode=stats --out=data/cifar10-stats.npz",
    "preflight": "--config=cifar10 --mode=preflight --topology=v5e:smallest",
    "prepare": "--mode=prepare --images=folder:photos --image_size=64 --out=data/photos.zip",
    "compare": "--config=compare --mode=compare",
    "analyze": "--workdir=runs/fashion_mnist --mode=analyze --analysis=report",
    "inspect": "--mode=inspect --images=zip:data/photos.zip",
    "convert": "--mode=convert --from_edm=edm-cifar10-32x32-uncond-vp.pkl --workdir=runs/edm",
    "doctor": "--mode=doctor",
    "export": "--workdir=runs/fashion_mnist --mode=export --out=exported",
}
OF_WEIGHTS = ("sample", "restore", "evaluate", "analyze", "export")  # these read a checkpoint
WITHOUT_CONFIG = ("prepare", "inspect", "convert", "doctor")  # these need none
# Where --workdir is of a run and --config is not given, these take the run's own config.json.
OF_A_RUN = ("train", *OF_WEIGHTS, "stats", "preflight")

_ALL = tuple(MODES)
_PLACES = tuple(mode for mode in MODES if mode != "doctor")  # which looks at this process alone
READ_BY = {
    "config": _ALL,
    "workdir": tuple(mode for mode in MODES if mode != "prepare"),
    "mode": _ALL,
    "seeds": ("sample",),
    "trajectory": ("sample",),
    "npz_names": ("sample",),
    "out": ("sample", "restore", "stats", "prepare", "inspect", "convert", "doctor", "export"),
    "checkpoint": OF_WEIGHTS,
    "ema": OF_WEIGHTS,
    "images": ("restore", "evaluate", "stats", "prepare", "inspect"),
    "blur": ("restore",),
    "noise": ("restore",),
    "estimate": ("restore",),
    "count": ("restore",),
    "add_noise": ("restore",),
    "protocol": ("evaluate",),
    "watch": ("evaluate",),
    "against": ("evaluate",),
    "analysis": ("analyze",),
    "image_size": ("prepare",),
    "channels": ("prepare",),
    "crop": ("prepare",),
    "on_error": ("prepare",),
    "topology": ("preflight",),
    "profile": ("train",),
    "init_from": ("train",),
    "from_inception": ("convert",),
    "from_dinov2": ("convert",),
    "unverified": ("convert",),
    "from_edm": ("convert",),
    "from_export": ("convert",),
    "platforms": ("export",),
    "coordinator": _PLACES,
    "processes": _PLACES,
    "process": _PLACES,
    "start_seconds": _PLACES,
    "version": _ALL,
}
# What a flag means in one mode, where that is more than the flag's own text.
MEANS = {
    ("out", "sample"): "A folder, FILE.npz or FILE.png; default: WORKDIR/samples.",
    ("out", "restore"): "A folder; default: WORKDIR/restored.",
    ("out", "stats"): "FILE.npz.",
    ("out", "prepare"): "FILE.zip or FILE.arrayrecord.",
    ("out", "inspect"): "A folder; default: WORKDIR/inspect.",
    ("out", "convert"): "FILE.safetensors, of --from_inception and --from_dinov2.",
    ("out", "doctor"): "FILE.json, besides the table on the console.",
    ("out", "export"): "A folder; default: WORKDIR/export.",
    ("images", "restore"): "A folder of photographs, or one file.",
    ("images", "evaluate"): "A source of images to score in place of samples, as zip:FILE or folder:PATH.",
    ("images", "stats"): "The source of images to measure; default: the config's data.source.",
    ("images", "prepare"): "The source to prepare: folder:PATH, lmdb:PATH, zip:FILE, …",
    ("images", "inspect"): "The source to look at; default: the config's data.source.",
    ("config", "prepare"): "A config, whose image size and channels are the defaults; none is needed.",
    ("config", "inspect"): "A config, whose data.source is looked at; none is needed with --images.",
    ("config", "convert"): "With --from_edm: the config to convert to; default: the nearest of the shipped ones.",
    ("config", "doctor"): "A config, whose values, batch and images are looked at too; none is needed.",
    ("workdir", "convert"): "Where the new run goes, of --from_edm and --from_export; default: runs/ and the name.",
    ("workdir", "compare"): "Where the trainings and the table go; default: runs/CONFIG.",
    ("workdir", "inspect"): "Where the folder inspect goes, without --out; default: runs/CONFIG, or runs/images.",
    ("workdir", "doctor"): "Where runs are to live, whose disk is looked at; default: runs/CONFIG, or here.",
}
# Sections of the config that a mode reads, those that it may change of a trained run first.
SECTIONS = {
    "train": ("train", "data", "model", "process", "mesh", "sample"),
    "sample": ("sample",),
    "restore": ("sample",),
    "evaluate": ("eval", "likelihood", "sample", "data"),
    "stats": ("eval", "data"),
    "preflight": ("train", "model", "data", "mesh", "sample"),
    "prepare": ("data",),
    "compare": ("compare", "train", "data", "model", "process", "sample", "eval", "likelihood"),
    "analyze": ("analysis", "likelihood", "eval", "sample", "data"),
    "inspect": ("data",),
    "convert": (),
    "doctor": ("train", "data", "model"),
    "export": ("sample",),
}
_INSTEAD = {  # what is meant, where a flag is given to a mode that does not read it
    "images": "the images of a config are --config.data.source=SOURCE",
    "out": "this mode writes to --workdir",
}


def refusal(flag: str, given: str, mode: str) -> str:
    """What is said of a flag, `given` as typed, that `mode` does not read."""
    instead = f"; {_INSTEAD[flag]}" if flag in _INSTEAD else ""
    return f"{given} does not go with --mode={mode}, only with {', '.join(READ_BY[flag])}{instead}"
