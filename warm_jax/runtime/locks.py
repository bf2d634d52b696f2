"""One writer at a time: a file beside each output that says who writes there.

    WORKDIR/.checkpoints.lock      of training; sampling, scoring and figures beside it have locks of their own
    FOLDER/.writer.lock            of an output that is a folder
    .FILE.lock                     of an output that is a file, beside it

The file is made with O_EXCL, which one of several processes can do, on local disks, on NFS from version 3 on and on
buckets mounted by gcsfuse (there the second one fails when it closes the file). It holds host, process and mode, and a
thread touches it every `BEAT` seconds. Neither flock, which buckets ignore, nor links, which they lack, are needed, and
no two clocks are compared:

* Of a process on this machine the kernel knows whether it lives: by its number and its start time, so that a number
  that was given to another process is no obstacle. Its lock is taken over at once when it is dead.
* Of another machine or container, whose process numbers mean nothing here, the file is watched: one that is touched has
  a living writer, one that stays as it is for `DEAD` seconds (longer than NFS and gcsfuse cache what a file looks like)
  has none. So is a file that says nothing, as after a crash between making and writing it.

A writer whose lock was taken over, as after its host slept for longer than that, ends at once and writes no more.
Of a pod process 0 holds the lock for all.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator

from warm_jax.runtime import letters, pod
from warm_jax.weights import archives

BEAT, DEAD = 15.0, 90.0  # seconds
_SETTLE = 0.2  # seconds after which of two that took over one dead writer's lock only the last still finds its own


class HeldError(OSError):
    """Somebody else writes there."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What one writer writes: `place`, which an error names, and its lock.

    Nobody else writes in `folders`, nor the files `names` beside `place`: what a killed writer left there may go.
    """

    place: pathlib.Path
    lock: pathlib.Path
    folders: tuple[pathlib.Path, ...] = ()
    names: tuple[str, ...] = ()


def folder(path: pathlib.Path) -> Output:
    """A folder that is written as a whole; the lock lies in it: its parent may be a mount point, or not writable."""
    return Output(path, path / ".writer.lock", (path,))


def file(path: pathlib.Path, names: tuple[str, ...] = (), folders: tuple[pathlib.Path, ...] = ()) -> Output:
    """A file, or a folder whose content others list, with what belongs to it; the lock lies beside it."""
    return Output(path, path.with_name(f".{path.name}.lock"), folders, (path.name, *names))


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read().strip()
    return ""


def _started(process: int) -> str:
    """When a process of this machine started, as the kernel counts; empty where it is dead or nobody says."""
    return "".join(_read(f"/proc/{process}/stat").rpartition(")")[2].split()[19:20])


def _alive(process: int) -> bool:
    """Whether there is a process of this number; a zombie is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state = _read(f"/proc/{process}/stat").rpartition(")")[2].split()[:1]
    return state != ["Z"]


def _machine() -> str:
    """What is the same for all processes whose numbers mean the same: this boot of this machine, this container."""
    boot = _read("/proc/sys/kernel/random/boot_id") or platform.node()
    with contextlib.suppress(OSError):
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return boot


def _me(mode: str) -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    where = {"host": platform.node(), "process": os.getpid(), "machine": _machine(), "started": _started(os.getpid())}
    return where | {"mode": mode, "since": since, "token": secrets.token_hex(8)}


def _content(path: pathlib.Path) -> dict[str, object]:
    """What a lock says; empty where it says nothing or is gone."""
    try:
        found = json.loads(path.read_bytes().decode())
        return found if isinstance(found, dict) else {}
    except (OSError, *archives.DAMAGED):
        return {}


def _state(path: pathlib.Path) -> tuple[object, ...]:
    """What changes whenever a living writer touches its lock; empty where there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size, _content(path).get("token")
    return ()


def _is_dead(path: pathlib.Path, holder: dict[str, object]) -> bool:
    """Whether the writer that a lock names is dead; of another machine this takes up to `DEAD` seconds to see."""
    process, started = holder.get("process"), holder.get("started")
    if holder.get("machine") == _machine() and isinstance(process, int):
        return not _alive(process) or (bool(started) and _started(process) != started)
    before, until = _state(path), time.monotonic() + DEAD
    print(f"{path} is of {_named(holder)}; watching for up to {DEAD:.0f} s whether it is alive", flush=True)
    while before and time.monotonic() < until:
        time.sleep(min(1.0, DEAD / 10))
        if _state(path) != before:
            return not _state(path)  # it has ended meanwhile, or it lives
    return True


def _named(holder: dict[str, object]) -> str:
    if not holder:
        return "a writer that did not say who it is"
    text = "--mode={mode} on host {host} (process {process}) since {since}"
    return letters.printable(
        text.format_map({key: str(holder.get(key, "?"))[:100] for key in ("mode", "host", "process", "since")})
    )


def _make(path: pathlib.Path, me: dict[str, object]) -> bool:
    """Makes the lock; whether nobody else had. OSError where nothing can be written there."""
    try:
        opened = path.open("xb")
    except FileExistsError:
        return False
    try:
        with opened:
            opened.write(json.dumps(me).encode())
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        if _content(path).get("token", me["token"]) != me["token"]:  # a bucket says so when the file is closed
            return False
        path.unlink(missing_ok=True)
        raise archives.no_room(path, error) from error
    return _content(path).get("token") == me["token"]


def _take(path: pathlib.Path, me: dict[str, object], place: str) -> None:
    """Makes the lock, in place of one of a dead writer. Raises HeldError where its writer lives."""
    while not _make(path, me):
        holder = _content(path)
        if not _is_dead(path, holder):
            raise HeldError(
                f"{place} is being written by {_named(holder)}; wait until it ends, or name another --workdir or --out"
            )
        if _content(path) == holder:  # and nobody else's meanwhile
            print(f"{path}: the lock of {_named(holder)}, which is dead, is taken over", flush=True)
            path.unlink(missing_ok=True)
            if _make(path, me):
                time.sleep(_SETTLE)
                if _content(path).get("token") == me["token"]:
                    return


def _beat(path: pathlib.Path, me: dict[str, object], ended: threading.Event) -> None:
    """Touches the lock until it is released; ends the process where it has become somebody else's."""
    while not ended.wait(BEAT):
        holder = _content(path)
        try:
            if holder.get("token") == me["token"]:
                os.utime(path)
            elif not path.exists():  # somebody tidied up
                _make(path, me)
            elif holder:
                text = f"error: the lock {path} is now of {_named(holder)}; this process writes no more"
                print(text, file=sys.stderr, flush=True)
                os._exit(1)
        except OSError as error:
            text = f"WARNING: the lock {path} cannot be touched ({error}): another host may take this process for dead"
            print(text, file=sys.stderr, flush=True)


def _sweep(output: Output) -> None:
    """Removes what writers that were killed left of atomic writes; only for whoever holds the lock."""
    for place in {output.place.parent, *output.folders}:
        for path in list(place.iterdir()) if place.is_dir() else ():
            found = re.fullmatch(archives.LEFTOVER, path.name)
            if found and (place in output.folders or found["name"] in output.names):
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def writing(output: Output, mode: str) -> Iterator[None]:
    """Within, this process alone writes `output`; folders that are missing are made.

    Raises HeldError, which names the other writer and since when it writes, where there is one that lives; OSError of
    another kind where no file can be made there. What was made for the lock alone is removed at the end.
    """
    if pod.index() != 0:
        yield
        return
    path = output.lock
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    me, ended = _me(mode), threading.Event()

    def release() -> None:
        ended.set()
        with contextlib.suppress(OSError):
            if os.getpid() == me["process"] and _content(path).get("token") == me["token"]:  # not in a forked worker
                path.unlink()
            for folder in made:
                folder.rmdir()

    try:
        _take(path, me, str(output.place))
        _sweep(output)
        atexit.register(release)
        threading.Thread(target=_beat, args=(path, me, ended), daemon=True, name="warm_jax lock").start()
        yield
    finally:
        release()
        atexit.unregister(release)
