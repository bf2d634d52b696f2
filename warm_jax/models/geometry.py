"""Which U-Nets can be built, on which images: every limit is checked here, before anything is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """What tells the architectures apart.

    network        the module that builds it: `unet.UNet` or `adm.ADM`
    taps           the resampling filter in 1-d, of sum 1
    fourier        whether the noise embedding is random Fourier features, not sinusoids
    pyramid        whether the input, made smaller, is added at each lower level
    head_channels  of an attention head; fewer channels make one head. 0: one head, whatever its size
    """

    network: str
    taps: tuple[float, ...]
    fourier: bool = False
    pyramid: bool = False
    head_channels: int = 0


STYLES = {
    "ddpmpp": Style("unet.UNet", (0.5, 0.5)),
    "ncsnpp": Style("unet.UNet", (0.125, 0.375, 0.375, 0.125), fourier=True, pyramid=True),
    "adm": Style("adm.ADM", (0.5, 0.5), head_channels=64),
}
LIMITED = (  # the fields of a network that check_geometry takes
    *("channels", "channel_mult", "num_blocks", "attention", "dropout", "architecture"),
    *("num_classes", "augment_labels", "patch_size", "remat"),
)


def check_network(network: str, architecture: str) -> None:
    """Raise ValueError where a module, as "unet.UNet", is asked for an architecture that another one builds."""
    if STYLES[architecture].network != network:
        own = " or ".join(name for name, style in STYLES.items() if style.network == network)
        raise ValueError(
            f"architecture {architecture!r} is built by models.{STYLES[architecture].network}, not by {network}: "
            f"use that, or {own}"
        )


def groups(channels: int) -> int:
    """How many groups GroupNorm makes of so many channels: 32, or fewer so that each has 4 at least."""
    return min(32, channels // 4)


def _misfit(channels: int, channel_mult: tuple[int, ...], num_blocks: int) -> int | None:
    """A width that GroupNorm's groups, or the pairs of sine and cosine, do not divide; None when all fit."""
    width, widths, skips = channels, [channels], [channels]
    for level, mult in enumerate(channel_mult):
        skips += [width] * (level > 0) + [channels * mult] * num_blocks
        width = channels * mult
        widths.append(width)
    for mult in reversed(channel_mult):
        for _ in range(num_blocks + 1):
            widths.append(width + skips.pop())
            width = channels * mult
    if channels % 2:
        return channels
    return next((w for w in widths if groups(w) == 0 or w % groups(w)), None)


def _headless(channels: int, channel_mult: tuple[int, ...], attending: list[bool], head: int) -> int | None:
    """A width with attention, above `head`, that `head` does not divide; None when all can be split."""
    widths = [channels * mult for mult, attends in zip(channel_mult, attending, strict=True) if attends]
    return next((w for w in widths if head and w > head and w % head), None)


def _check_channels(
    channels: int, channel_mult: tuple[int, ...], num_blocks: int, attending: list[bool], head: int
) -> None:
    """Whether GroupNorm and attention can split each layer's channels; `attending` says which levels have attention."""

    def fits(c: int) -> bool:
        return _misfit(c, channel_mult, num_blocks) is None and _headless(c, channel_mult, attending, head) is None

    if fits(channels):
        return
    bad = _misfit(channels, channel_mult, num_blocks)
    if channels % 2:
        reason = "sines and cosines need an even number"
    elif bad is not None:
        reason = f"a layer of {bad} cannot be split into {max(1, groups(bad))} groups of at least 4 (GroupNorm)"
    else:
        bad = _headless(channels, channel_mult, attending, head)
        reason = f"attention over {bad} channels takes heads of {head}, so a multiple of {head}, or fewer than {head}"
    # Multiples of 32, and of the head, always fit, so the search ends.
    ways = (range(channels, 3, -1), range(channels, channels + max(32, head) + 1))
    nearest = [next((c for c in way if fits(c)), None) for way in ways]
    raise ValueError(f"channels is {channels}: {reason}; use {' or '.join(str(c) for c in nearest if c)}")


def _check_sides(height: int, width: int, levels: int, patch_size: int) -> None:
    unit = patch_size * 2 ** (levels - 1)
    for name, side in (("height", height), ("width", width)):
        if side > 0 and side % unit == 0:
            continue
        below, above = side // unit * unit, (side // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        most = sum(side % (patch_size * 2**level) == 0 for level in range(levels))
        fewer = f"at most {most} levels in channel_mult" if most else f"a patch_size that divides {side}"
        raise ValueError(
            f"{name} {side} cannot be cut into patches of {patch_size} and halved {levels - 1} times, which takes a "
            f"multiple of {unit}: use a {name} of {nearest}, or {fewer}"
        )


def check_geometry(
    height: int,
    width: int,
    *,
    channels: int = 128,
    channel_mult: tuple[int, ...] = (2, 2, 2),
    num_blocks: int = 4,
    attention: tuple[int, ...] = (16,),
    dropout: float = 0.13,
    architecture: str = "ddpmpp",
    num_classes: int = 0,
    augment_labels: int = 0,
    patch_size: int = 1,
    remat: tuple[int, ...] = (),
) -> None:
    """Raise ValueError, with value, limit and remedy, for a network that cannot be built on `height` × `width` images.

    A resolution in `attention` or `remat` that never occurs is an error too, or the layer would be missing in silence.
    One exception: `attention=(16,)`, the default, may miss. What stays is the attention that is always at the bottom.
    """
    if architecture not in STYLES:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(STYLES)}")
    if not channel_mult or min(channel_mult) < 1:
        raise ValueError(f"channel_mult is {tuple(channel_mult)}: give each level a factor of at least 1, as (2, 2, 2)")
    limits = {"channels": (channels, 1), "num_blocks": (num_blocks, 1), "patch_size": (patch_size, 1)}
    limits |= {"num_classes": (num_classes, 0), "augment_labels": (augment_labels, 0)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must lie in [0, 1); 0 turns it off")
    occurring = [max(height, width) // patch_size >> level for level in range(len(channel_mult))]
    attending = [side in attention for side in occurring[:-1]] + [True]  # the bottom always does
    _check_channels(channels, channel_mult, num_blocks, attending, STYLES[architecture].head_channels)
    _check_sides(height, width, len(channel_mult), patch_size)
    for name, asked in (("attention", () if tuple(attention) == (16,) else attention), ("remat", remat)):
        for resolution in asked:
            if resolution not in occurring:
                raise ValueError(
                    f"{name} at resolution {resolution}, which never occurs: the larger side is "
                    f"{', '.join(map(str, occurring))} from level to level; use some of these, or () for none"
                )
