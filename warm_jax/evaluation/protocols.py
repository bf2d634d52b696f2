"""What `--protocol` names: which scores of how many images make a number that others report too.

once    eval.count images, one round, everything as `eval` says
paper   three disjoint rounds of 50,000: minimum, and mean ± standard deviation (Hsueh et al. 2025; EDM's)
edm2    one round of 50,000: FID and FD-DINOv2 (Karras et al. 2024), guidance as `sample` says
quick   one round of 5,000 with features that need no download: to see a trend, comparable with nothing published
"""

from ml_collections import ConfigDict

NAMES = ("once", "paper", "edm2", "quick")
PAPER_COUNT, PAPER_ROUNDS = 50_000, 3
EDM2_COUNT, EDM2_EXTRACTORS = 50_000, ("inception", "dinov2")
QUICK_COUNT, OFFLINE = 5_000, ("fashion_cnn", "efficientnet")


def rounds(protocol: str) -> int:
    """How many disjoint rounds it has."""
    return PAPER_ROUNDS if protocol == "paper" else 1


def configs(config: ConfigDict, protocol: str) -> list[ConfigDict]:
    """The config as the protocol changes its `eval` section, one for each extractor; the first is `config` itself.

    ValueError where there is no such protocol.
    """
    if protocol not in NAMES:
        raise ValueError(f"--protocol={protocol}: choose one of {', '.join(NAMES)}")
    settings = config.eval
    with config.unlocked():
        if protocol == "paper":
            settings.count = PAPER_COUNT
        if protocol == "quick":
            settings.count = QUICK_COUNT
            if settings.extractor not in OFFLINE:
                settings.extractor = OFFLINE[-1]
            settings.metrics = tuple(metric for metric in settings.metrics if metric != "is")
        if protocol == "edm2":
            settings.count, settings.metrics, settings.extractor = EDM2_COUNT, ("fd",), EDM2_EXTRACTORS[0]
    found = [config]
    for extractor in EDM2_EXTRACTORS[1:] if protocol == "edm2" else ():
        found.append(config.copy_and_resolve_references())
        found[-1].eval.extractor = extractor
    return found
