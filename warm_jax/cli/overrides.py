"""Changes of a config on the command line, --config.KEY=VALUE, taken as people mean them or refused in one line.

ml_collections finds the keys and their types; the values of some types are read here: a whole number may be 1e6, an
unset number None, and a tuple a bare list, as --config.eval.metrics=fd,lsd.
"""

import ast
import difflib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from warm_jax.runtime import workdirs

PATTERN = re.compile(r"--?(no)?config\.")  # how an argument begins that changes a config
_UNSET = ("none", "None", "null")
_OFTEN = ("train", "model", "data", "process", "sample")  # sections whose keys are likely to be meant, in this order


class Whole(flags.IntegerParser):
    """390625, 390_625 or 1e6."""

    def convert(self, argument: int | str) -> int | None:
        """The number; ValueError for what is none, and for parts of one."""
        if not isinstance(argument, str):
            return super().convert(argument)
        try:
            return super().convert(argument)
        except ValueError:
            pass
        try:
            number = float(argument)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
        raise ValueError("it must be a whole number (int)")


class _WholeOrNone(Whole):
    def convert(self, argument: int | str) -> int | None:
        """As of `Whole`, or None."""
        return None if isinstance(argument, str) and argument in _UNSET else super().convert(argument)


class _Number(flags.FloatParser):
    """0.5, 1e-3 or None."""

    def convert(self, argument: float | str) -> float | None:
        """The number; ValueError for what is none."""
        if isinstance(argument, str) and argument in _UNSET:
            return None
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("it must be a number (float), as 0.5 or 1e-3") from None


class _Tuple(tuple_parser.TupleParser):
    """fd,lsd or 16,8 or ('fd','lsd') or () or nothing."""

    def parse(self, argument: object) -> tuple:
        """The values; ValueError for brackets and quotes that do not close."""
        if not isinstance(argument, str):
            return super().parse(argument)
        text = argument.strip()
        try:
            value = ast.literal_eval(text or "()")
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        except (ValueError, SyntaxError):
            pass
        bare = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        if set(bare) & set("()[]{}'\""):
            raise ValueError("values stand between commas, as 16,8 or fd,lsd; none are ()")
        words = [word.strip() for word in bare.split(",")]
        return tuple(map(_word, words if words[-1] else words[:-1]))


def _word(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class _Truth(flags.BooleanParser):
    """True or False, in any case, t or f, 1 or 0."""

    def parse(self, argument: bool | str) -> bool:
        """The truth value; ValueError for anything else."""
        try:
            return super().parse(argument)
        except (ValueError, TypeError):
            raise ValueError("it must be True or False") from None


for _type, _parser in ((int, _WholeOrNone()), (float, _Number()), (bool, _Truth()), (tuple, _Tuple())):
    config_flags.register_flag_parser_for_type(_type, _parser)


def apply(config: ConfigDict, argv: list[str], unset: set[str]) -> tuple[ConfigDict, dict[str, object], list[str]]:
    """The config with what `argv` changes of it, the changes by dotted key, and the arguments that change nothing.

    `unset` are the keys that may be None. flags.Error, ValueError, KeyError, AttributeError or TypeError for a key that
    there is not, and for a value of another type.
    """
    _check_keys(config, argv)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    rest = values(argv, known_only=True)
    config, changes = holder.value, dict(config_flags.get_override_values(values["config"]))
    for key, value in changes.items():
        if key in unset and value in (*_UNSET, (None,)):
            changes[key] = value = None
            config.update_from_flattened_dict({key: None})
        if value is None and key not in unset:
            raise flags.Error(f"--config.{key}=None: {key} cannot be unset; give a value")
    return config, changes, rest


def _check_keys(config: ConfigDict, argv: list[str]) -> None:
    """Raises flags.Error for a change of a key that there is not, or of a whole section."""
    keys = workdirs.flat(config)
    for argument in argv[1:]:
        match = re.match(r"--?config\.([\w.]+)(=|$)", argument)
        if match is None or match[1] in keys or "{" in argument:
            continue
        key, _, value = argument.lstrip("-").removeprefix("config.").partition("=")
        inside = [name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")]
        if inside:
            raise flags.Error(f"{argument}: {key} is a section; change one of its keys, as {key}.{min(inside)}")
        meant = changing(key, config, value)
        section = key.partition(".")[0]
        inside = sorted(name.removeprefix(f"{section}.") for name in keys if name.startswith(f"{section}."))
        known = f"{section} has {', '.join(inside)}" if inside else f"its sections are {', '.join(sorted(config))}"
        raise flags.Error(f"{argument}: the config has no key {key}; {f'did you mean {meant}?' if meant else known}")


def changing(name: str, config: ConfigDict, value: str = "") -> str:
    """The changes that may be meant by `name`, a key or the end of one, with `value`; "" where none is like it."""
    keys, end = list(workdirs.flat(config)), name.rpartition(".")[2]
    found = [key for key in keys if key.rpartition(".")[2] == end]
    if "." in name or not found:
        found = difflib.get_close_matches(name, found or keys, n=1, cutoff=0.8)
    if not found:
        ends = difflib.get_close_matches(end, [key.rpartition(".")[2] for key in keys], n=1, cutoff=0.8)
        found = [key for key in keys if key.rpartition(".")[2] in ends]
    found.sort(key=lambda key: _OFTEN.index(section) if (section := key.partition(".")[0]) in _OFTEN else len(_OFTEN))
    return " or ".join(f"--config.{key}{f'={value}' if value else ''}" for key in found[:3])


def unset_keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted keys whose value is None."""
    found = set()
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            found |= unset_keys(value, f"{prefix}{key}.")
        elif value is None:
            found.add(prefix + key)
    return found
