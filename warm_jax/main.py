"""The command line of warm_jax: trains, samples, restores, scores and more, as --mode and --config say."""

import os
import sys

if __name__ == "__main__" and not __package__:  # `python warm_jax/main.py`: its folder is no place to import from
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from warm_jax.runtime import ending, preemption

if __name__ == "__main__":
    preemption.listen()  # before the imports below, which take seconds

import contextlib
import errno
import hashlib
import pathlib
import tempfile
import traceback

from absl import app, logging
from absl import flags as absl_flags
from ml_collections import ConfigDict

from warm_jax.cli import flags, modes
from warm_jax.data import buckets
from warm_jax.experiments import config_files
from warm_jax.runtime import host, jax_settings, pod, quiet, rollcall

CACHE = host.CACHE


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage or input, 75 saved after a signal and worth running again."""
    del argv
    if not absl_flags.FLAGS["verbosity"].present:
        quiet.quiet()
    if flags.MODE.value == "doctor":  # which must not fail where JAX does
        return _doctor()
    jax_settings.take_out(os.environ)
    import jax

    host.keep_programs()
    if flags.MODE.value == "preflight":  # its compilers have processes of their own: an accelerator here is left alone
        jax.config.update("jax_platforms", "cpu")
    try:
        place = rollcall.find(os.environ, flags.COORDINATOR.value, flags.PROCESSES.value, flags.PROCESS.value)
        if place and flags.MODE.value not in flags.TOGETHER:
            raise ValueError(
                f"--mode={flags.MODE.value} runs in one process, and this is one of {place.processes}; give "
                "--processes=1, and run it once"
            )
        share_cores(flags.config(), place.processes if place else 1)
        if flags.MODE.value in flags.SAVING:  # the others look at no device, or not for long
            host.keep_memory()
        pod.start(place, _facts(flags.config()), flags.START_SECONDS.value)
    except TimeoutError as error:
        return flags.fail(error, flags.EXIT_FAILED)
    except (ValueError, OSError) as error:
        return flags.fail(error, flags.EXIT_USAGE)
    given = flags.config_name()
    workdir = flags.WORKDIR.value or str(flags.default_workdir(given or "images"))
    with jax_settings.pinned(), _answering(flags.MODE.value):
        return _run(flags.MODE.value, flags.config(), workdir)


def _answering(mode: str) -> contextlib.AbstractContextManager:
    """What a signal does while `mode` runs: the program asks for it, or the process leaves at once."""
    if mode in flags.SAVING:
        return preemption.noted()
    kept = "nothing was written; the same command begins anew"
    if mode == "prepare":
        kept = f"the finished parts are kept in {flags.OUT.value}.partial; the same command goes on from there"
    return preemption.at_once(kept)


def _doctor() -> int:
    from warm_jax.doctor import doctor

    given = dict(os.environ)  # as people set it
    cache = given.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser(CACHE)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    jax_settings.take_out(os.environ)
    config = flags.config()
    try:
        out = flags.path(flags.OUT)
        if out:
            _check_report(out)
        workdir = buckets.local(flags.WORKDIR.value) if flags.WORKDIR.value else pathlib.Path()
        if config is not None and not flags.WORKDIR.value:
            workdir = flags.default_workdir(flags.config_name())
    except (ValueError, OSError) as error:
        return flags.fail(error, flags.EXIT_USAGE)
    with contextlib.suppress(Exception):  # where JAX is broken, which the table says
        share_cores(config)
    try:
        smoke = config_files.load("smoke")
    except OSError:
        smoke = None
    try:
        return doctor.doctor(config, smoke, pathlib.Path(cache), out, given, pathlib.Path(workdir))
    except OSError as error:
        return flags.fail(error, flags.EXIT_USAGE)


def _check_report(out: str) -> None:
    """Raises ValueError or OSError where `out` is no FILE.json that can be written."""
    folder = os.path.dirname(os.path.abspath(out))
    if not out.endswith(".json") or os.path.isdir(out) or not os.path.isdir(folder):
        raise ValueError(f"--out={out}: --mode=doctor writes FILE.json, in a folder that is there")
    try:
        with open(out, "ab") if os.path.exists(out) else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out={out} cannot be written ({error.strerror}); name another FILE.json") from error


def _facts(config: ConfigDict | None) -> dict[str, object]:
    """What must be the same in all processes of a job: the code, its versions, the config, what is asked for."""
    import jax

    from warm_jax.runtime import workdirs

    code = hashlib.sha256()
    package = pathlib.Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)} {path.stat().st_size} ".encode() + path.read_bytes())
    facts = {"code of warm_jax": code.hexdigest()[:12], "jax": jax.__version__, "python": sys.version.split()[0]}
    facts |= {f"--{name}": absl_flags.FLAGS[name].value for name in flags.SAME_FLAGS}
    facts["--init_from is given"] = bool(flags.INIT_FROM.value)
    return facts | (workdirs.flat(config) if config is not None else {})


def share_cores(config: ConfigDict | None, processes: int = 1) -> None:
    """On a CPU, as many devices as cores (at most 8) that divide the batch: `host.share_cores`, of a config."""
    if config is not None:
        fsdp = config.mesh.fsdp if "mesh" in config else 1
        host.share_cores(config.train.batch_size, config.train.accumulation, fsdp, processes)


def _run(mode: str, config: ConfigDict | None, workdir: str) -> int:
    import jax

    program = wrong = None
    try:
        with preemption.at_once("while reading the input; the same command goes on from what is saved"):
            program = modes.prepare(mode, config, buckets.local(workdir))
    except (ValueError, TypeError, OSError) as error:
        logging.debug("while checking the input", exc_info=True)
        wrong = error
        if mode in flags.SAVING and preemption.requested():  # it waited for something that did not come
            return _leave(preemption.EXIT_AGAIN)
    except Exception as error:
        _end_the_pod(error)
        raise
    try:
        pod.all_or_none("prepared", wrong)
    except (ValueError, TypeError, OSError) as error:
        return _leave(flags.fail(error, flags.EXIT_USAGE), str(error))
    try:
        return _leave(program())
    except (ValueError, TypeError, OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        logging.info("traceback", exc_info=True)  # --verbosity=0 shows it
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            error = OSError(f"{error}: the disk of {flags.OUT.value or workdir} is full; make room, and run it again")
        status = flags.fail(error, flags.EXIT_USAGE if mode in (*flags.WITHOUT_CONFIG, "stats") else flags.EXIT_FAILED)
        return _leave(status, str(error))
    except Exception as error:
        _end_the_pod(error)
        raise


def _end_the_pod(error: Exception) -> None:
    """Of an error that nobody thought of: the others would wait for this process."""
    if pod.count() > 1:
        traceback.print_exc()
        pod.end(flags.EXIT_FAILED, str(error))


def _leave(status: int, why: str = "") -> int:
    pod.end(status, why)
    return status


def run() -> None:
    """The process of the command line: ends with the exit status of `main`, in seconds."""
    preemption.listen()
    with ending.bounded():
        app.run(main, flags_parser=flags.parse)


if __name__ == "__main__":
    run()
