"""What --help prints: all modes with the flags that each reads, or one mode with what its flags mean."""

import re
import shutil
import textwrap
from collections.abc import Iterable

from absl import flags

from warm_jax.cli.flag_table import EXAMPLES, MEANS, MODES, OF_A_RUN, READ_BY, SECTIONS, WITHOUT_CONFIG
from warm_jax.experiments import config_files

COMMAND = "python -m warm_jax"
HELP, FULL = "help", "helpfull"
_ASKING = {"help": HELP, "h": HELP, "?": HELP, "helpshort": HELP, "helpfull": FULL}
_WIDEST, _NARROWEST = 100, 60
_EVERY = ("config", "workdir", "mode", "version")
_PLACE, _AMONG = ("coordinator", "processes", "process", "start_seconds"), "One process among several"


def without_help(argv: list[str]) -> tuple[list[str], str]:
    """The arguments without those that ask for help, and what they ask for: HELP, FULL or nothing."""
    end = argv.index("--") if "--" in argv else len(argv)
    named = [argument.lstrip("-") if argument.startswith("-") else "" for argument in argv[:end]]
    asked = [_ASKING[name] for name in named if name in _ASKING]
    kept = [argument for argument, name in zip(argv[:end], named, strict=True) if name not in _ASKING]
    return [*kept, *argv[end:]], asked[-1] if asked else ""


def overview() -> str:
    """Every mode with its flags and an example, and what the flags mean that all modes read."""
    parts = [
        f"{COMMAND} --config=CONFIG [--mode=MODE] [--FLAG=VALUE …] [--config.KEY=VALUE …]\n"
        f"{COMMAND} --workdir=RUN   [--mode=MODE] [--FLAG=VALUE …] [--config.KEY=VALUE …]",
        _wrapped("Trains, samples and scores blur-noise mixture diffusion models. Flags may stand in any order."),
    ]
    for mode, what in MODES.items():
        own = [f"--{name}" for name, modes in READ_BY.items() if mode in modes and name not in (*_EVERY, *_PLACE)]
        lines = [_wrapped(f"{what[0].upper()}{what[1:]}.", 2)]
        lines += [_wrapped(f"flags: {' '.join(own)}", 2, 9)] if own else []
        parts.append("\n".join([mode, *lines, _example(mode)]))
    parts += [_flags("Flags of every mode", _EVERY), _flags(f"{_AMONG}, in every mode but doctor", _PLACE)]
    parts.append("\n".join(["Configs", _wrapped(f"{', '.join(config_files.names())}.", 2)]))
    parts.append(
        _wrapped(
            f"{COMMAND} --help --mode=MODE explains the flags of one mode and names what it reads of the config; "
            "--helpfull lists the flags of the libraries too."
        )
    )
    return "\n\n".join(parts)


def of_mode(mode: str) -> str:
    """One mode: what it does, an example, its flags with their meaning, and what it reads of the config."""
    names = [name for name, modes in READ_BY.items() if mode in modes and name != "mode"]
    place = [name for name in names if name in _PLACE]
    parts = [_wrapped(f"--mode={mode}: {MODES[mode]}."), _example(mode)]
    parts.append(_flags("Flags", [name for name in names if name not in place], mode))
    parts += [_flags(_AMONG, place, mode)] if place else []
    parts.append("\n".join(["Config", _config(mode)]))
    return "\n\n".join(parts)


def _config(mode: str) -> str:
    if not SECTIONS[mode]:
        return _wrapped("Nothing of it is read.", 2)
    said = f"Sections that are read: {', '.join(SECTIONS[mode])}."
    if mode in WITHOUT_CONFIG:
        return _wrapped(f"{said} None is needed.", 2)
    said += " --config.SECTION.KEY=VALUE changes a value; the file of a config explains its keys."
    if mode in OF_A_RUN and mode != "train":
        said += " With --workdir=RUN and no --config they are as the run's own config.json has them."
    if mode == "train":
        said += " With --workdir=RUN and no --config a run goes on with its own config.json."
    return _wrapped(said, 2)


def _flags(title: str, names: Iterable[str], mode: str = "") -> str:
    """Flags with their defaults, and what they mean to a mode, or to all."""
    lines = [title]
    for name in names:
        flag = flags.FLAGS[name]
        default = flag.default_as_str.strip("'") if flag.default_as_str else ""
        lines.append(f"  --{name}" if flag.boolean else f"  --{name}={default or '…'}")
        lines.append(_wrapped(MEANS.get((name, mode), re.sub(r"^<[^>]*>: ", "", flag.help)), 6))
    return "\n".join(lines)


def _example(mode: str) -> str:
    """The command, in as many lines as it needs, as a shell takes it."""
    lines = textwrap.wrap(f"{COMMAND} {EXAMPLES[mode]}", _width() - 8, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(["  " + lines[0], *lines[1:]])


def _wrapped(text: str, indent: int = 0, later: int | None = None) -> str:
    return textwrap.fill(
        text,
        _width(),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if later is None else later),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))
