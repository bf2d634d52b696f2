"""Configs from anywhere: by file, by the name of a shipped one, or as a run's own `config.json` has it.

A config file defines `get_config()`, or `get_config(system)` for --config=FILE:SYSTEM, and returns a ConfigDict. What
is wrong with one is a line that names the file, and where Python knows it the line in it.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator

from ml_collections import ConfigDict, config_dict

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
# A wheel has them inside of the package, where they are in nobody's way; a checkout beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
_MODULE = "__config__"  # under which a config file is read
TEMPLATE = "fashion_mnist"  # the shipped config that has every section


# ── Which file ───────────────────────────────────────────────────────────────────────────────────────────────────────


def names() -> list[str]:
    """The shipped configs, without the helpers that they share."""
    files = sorted(SHIPPED.glob("*.py"))
    return [path.stem for path in files if re.search(r"^def get_config\(", path.read_text("utf-8"), re.MULTILINE)]


def choices() -> str:
    """The shipped configs, for a message."""
    return f"there are {', '.join(names())}, or give FILE.py"


def find(path: str) -> pathlib.Path:
    """The file that `path`, a file or the name of a shipped config, means. FileNotFoundError with what there is.

    A file here comes first. `configs/NAME.py`, as in a checkout, is understood where there is no such file.
    """
    given = pathlib.Path(path)
    for here in (given, given.with_name(f"{given.name}.py")) if given.name else ():
        if here.is_file():
            return here
    shipped = SHIPPED / f"{given.name.removesuffix('.py')}.py"
    if given.parent in (pathlib.Path(), pathlib.Path("configs")) and shipped.is_file():
        return shipped
    near = difflib.get_close_matches(given.stem, names(), n=1)
    what = "no such file" if len(given.parts) > 1 or given.suffix else "no such config"
    raise FileNotFoundError(f"{path}: {what}; {f'did you mean {near[0]}? ' if near else ''}{choices()}")


# ── What it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def load(name: str) -> ConfigDict:
    """The config of a file or a name with an optional system, as cifar10:hot; locked.

    FileNotFoundError where there is none, ValueError, in one line, where it cannot be read.
    """
    path, colon, system = name.partition(":")
    file = find(path)
    try:
        with _configs_of(file.resolve()):
            make = read(file.resolve()).get("get_config")
            if not callable(make):
                raise _NoConfigError(f"{name}: this file defines no get_config(), so it is no config; {choices()}")
            arguments = [system] if colon else []
            try:
                inspect.signature(make).bind(*arguments)
            except TypeError:
                how = f"has no systems to choose from; leave :{system} out" if colon else "needs a system, as :NAME"
                raise _NoConfigError(f"{name}: this config {how}") from None
            config = make(*arguments)
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise _NoConfigError(f"{name}: get_config() returned {kind}; it must return an ml_collections.ConfigDict")
    except _NoConfigError:
        raise
    except Exception as error:  # whatever a file of Python may raise
        raise ValueError(f"{name}: {why(error, file.resolve())}") from error
    return config.lock()


class _NoConfigError(ValueError):
    """A file that is no config."""


def read(file: pathlib.Path) -> dict[str, object]:
    """The names that a file of Python defines. Whatever it raises is raised."""
    module = types.ModuleType(_MODULE)
    module.__file__ = str(file)
    sys.modules[_MODULE] = module  # where dataclasses look for it
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return vars(module)


@contextlib.contextmanager
def _configs_of(file: pathlib.Path) -> Iterator[None]:
    """What `from configs import …` in a config file means, wherever Python was started.

    Its own folder, where that is called configs; then what Python finds by the name; then what is shipped. What the
    process has imported as `configs` is set aside and comes back. Modules in the working directory are found too, as
    with `python -m`, also by the console script.
    """
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "configs"}
    here, path, finders = os.getcwd(), list(sys.path), list(sys.meta_path)
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    try:
        _import_configs(file.parent)
        sys.meta_path.append(_Shipped)
        yield
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            del sys.modules[name]
        sys.modules.update(kept)


def _import_configs(folder: pathlib.Path) -> None:
    """Makes the module `configs` of a config file in `folder`."""
    importlib.invalidate_caches()
    found = None if folder == SHIPPED else importlib.util.find_spec("configs")
    places = [str(folder)] if folder.name == "configs" else []
    places += [place for place in (found and found.submodule_search_locations) or () if place != str(SHIPPED)]
    package = importlib.util.module_from_spec(found) if found else types.ModuleType("configs")
    package.__path__ = places
    sys.modules["configs"] = package
    if found and found.loader:
        found.loader.exec_module(package)


class _Shipped(importlib.machinery.SourceFileLoader):
    """Finds the shipped `configs.NAME` after all others, and lets it import what is shipped, not what is called so."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Where the module is; None where there is none shipped of this name."""
        del path, target
        package, _, stem = name.partition(".")
        file = SHIPPED / f"{stem}.py"
        if package != "configs" or not file.is_file():
            return None
        return importlib.util.spec_from_file_location(name, file, loader=cls(name, str(file)))

    def exec_module(self, module: types.ModuleType) -> None:
        """Runs it."""
        with _configs_of(pathlib.Path(self.path)):
            super().exec_module(module)


def why(error: Exception, file: pathlib.Path) -> str:
    """One line that says what a file of Python raised, and where in it."""
    if isinstance(error, SyntaxError) and error.filename:
        where = "" if error.filename == str(file) else f"{error.filename}, "
        return f"{where}line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and pathlib.Path(frames[-1].filename).parent == SHIPPED:
        return str(error)  # as of a system that there is not: raised to be read
    inside = [frame for frame in frames if frame.filename == str(file)]
    text = error
    while isinstance(text, KeyError | AttributeError) and text.args:  # whose text may be another's repr
        text = text.args[0]
    text = re.sub(r"Other fields present: .*}\"?", "", str(text))  # a whole section
    where = f"line {inside[-1].lineno}: " if inside else ""
    return f"{where}{type(error).__name__}: {' '.join(text.split())}"


# ── A run's own ──────────────────────────────────────────────────────────────────────────────────────────────────────


def of_workdir(workdir: pathlib.Path) -> ConfigDict:
    """The config that a run wrote as its `config.json`, with the types that JSON forgets; locked.

    Lists are tuples again, and what is unset has its type. Sections and keys that it lacks, since it was written by an
    older version, are the shipped configs', except those that say what the weights are. FileNotFoundError or
    ValueError where there is none, or it is damaged.
    """
    from warm_jax.runtime import workdirs

    saved = workdirs.load_config(workdir)
    try:
        like = template(saved)
        made = _typed(saved.to_dict(), like)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{workdir / 'config.json'} is not a config ({error}); restore it") from error
    fixed = (*workdirs.MODEL_KEYS, *workdirs.RUN_KEYS)
    for section, value in like.items():
        if not isinstance(value, ConfigDict):
            continue
        if section not in made:
            made[section] = value
        for key in value:
            if key not in made[section] and not {section, f"{section}.{key}"} & set(fixed):
                made[section][key] = value[key]
    return made.lock()


def template(config: ConfigDict) -> ConfigDict:
    """The shipped config that has every key that a config of this system may have, with its type."""
    system = config.process.system
    if not isinstance(system, str):
        raise ValueError(f"process.system is {system!r}")
    return load(f"{SHIPPED / f'{TEMPLATE}.py'}:{system}")


def _typed(saved: dict[str, object], like: ConfigDict | None) -> ConfigDict:
    made = ConfigDict()
    for name, value in saved.items():
        known = like is not None and name in like
        if isinstance(value, dict):
            made[name] = _typed(value, like[name] if known and isinstance(like[name], ConfigDict) else None)
        elif value is None:
            made[name] = config_dict.placeholder(like.get_type(name) if known else object)
        else:
            made[name] = _tuple(value)
    return made


def _tuple(value: object) -> object:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
