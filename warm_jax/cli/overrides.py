"""Changes of a config on the command line, --config.KEY=VALUE, taken as people mean them or refused in one line.

ml_collections finds the keys and their types; the values of some types are read here: a whole number may be 1e6, an
unset number None, and a tuple a bare list, as --config.eval.metrics=fd,lsd.
"""

import ast
import re

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

PATTERN = re.compile(r"--?(no)?config\.")  # how an argument begins that changes a config
_UNSET = ("none", "None", "null")


class _Whole(flags.IntegerParser):
    """390625, 390_625, 1e6 or None."""

    def convert(self, argument: int | str) -> int | None:
        """The number; ValueError for what is none, and for parts of one."""
        if not isinstance(argument, str):
            return super().convert(argument)
        if argument in _UNSET:
            return None
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


for _type, _parser in ((int, _Whole()), (float, _Number()), (bool, _Truth()), (tuple, _Tuple())):
    config_flags.register_flag_parser_for_type(_type, _parser)


def apply(config: ConfigDict, argv: list[str], unset: set[str]) -> tuple[ConfigDict, dict[str, object], list[str]]:
    """The config with what `argv` changes of it, the changes by dotted key, and the arguments that change nothing.

    `unset` are the keys that may be None. flags.Error, ValueError, KeyError, AttributeError or TypeError for a key that
    there is not, and for a value of another type.
    """
    section = re.compile(r"--?config\.([\w.]+)(=|$)")
    for argument in argv[1:]:
        match = section.match(argument)
        if match and match[1] in config and isinstance(config[match[1]], ConfigDict) and "{" not in argument:
            first = next(iter(config[match[1]]))
            raise flags.Error(f"{argument}: {match[1]} is a section; change one of its keys, as {match[1]}.{first}")
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
