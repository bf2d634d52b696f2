"""Signals and the end of a process: answered from the first second, whatever the main thread and others do."""

import contextlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from warm_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"}
ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True, scope="module")
def hangups_are_heard():
    """Also under nohup, whose children inherit that they ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(*command, **more):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, **pipes)


def end(process, seconds=60):
    """(status, stdout, stderr) of a process that is to end by itself."""
    late = threading.Timer(seconds, process.kill)
    late.start()
    out, err = process.stdout.read(), process.stderr.read()  # a line was read before, so not by `communicate`
    late.cancel()
    return process.wait(), out, err


def wait_until(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def catches(process, number):
    """Whether the process has a handler for the signal, by what Linux says of it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


# ── The command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("module", "number"), [("warm_jax", ALL[0]), ("warm_jax.main", ALL[1]), ("warm_jax", ALL[2])])
def test_at_start_up(module, number):
    """Before anything is imported that takes long."""
    process = start("-m", module, "--mode=train", "--config=configs/smoke.py", "--workdir=/nowhere/run")
    wait_until(lambda: catches(process, signal.SIGHUP), process)  # the last; Python catches SIGINT itself
    process.send_signal(number)
    status, out, err = end(process)
    assert (status, out) == (75, "")
    assert err == f"{number.name}: nothing was begun; the same command begins, or goes on from what is saved\n"


def test_prepare_keeps_its_finished_parts(tmp_path):
    out = tmp_path / "made.zip"
    command = ("-m", "warm_jax", "--mode=prepare", "--images=bundled", f"--out={out}", "--image_size=1024")
    process = start(*command)
    wait_until(lambda: (tmp_path / "made.zip.partial" / "settings.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    status, said, err = end(process)
    assert (status, said) == (75, "")
    assert f"SIGTERM: the finished parts are kept in {out}.partial; the same command goes on from there\n" in err
    assert "Traceback" not in err and not out.exists()


def test_a_terminal_that_is_closed_while_training(tmp_path):
    """As where a connection by ssh is lost: what was reached is saved. Writing to the terminal fails from then on."""
    try:
        master, slave = pty.openpty()
    except OSError as error:  # as in a root folder without /dev/pts
        pytest.skip(f"no terminal can be made here: {error}")
    training = {"steps": 100_000, "sample_every": 0, "log_every": 10, "checkpoint_every": 100_000}
    flags = [f"--config.train.{name}={value}" for name, value in training.items()]
    command = ["tests/pod_worker.py", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}", *flags]
    # setsid --ctty: the terminal is the session's, which so hears when it goes.
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", **QUICK},
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
    )
    os.close(slave)
    said = b""
    while b"step      10" not in said:
        said += os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=60) == 75
    (step,) = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", writable=False).steps()
    assert step >= 10


# ── The parts, in processes that import nothing else ─────────────────────────────────────────────────────────────────

BEGIN = "import hashlib, os, sys, threading, time, warnings; from warm_jax.runtime import ending, preemption"
LISTEN = f"{BEGIN}; preemption.listen()"
COMPILING = "print('begun', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # as XLA, it hears nothing


def program(*lines):
    process = start("-c", "\n".join(lines))
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", ALL)
def test_while_compiling(number):
    """What would lose nothing ends at once, and says what is kept; files of the moment are removed where it can be."""
    process = program(
        LISTEN, "with ending.bounded(), preemption.noted(), preemption.at_once('step 7 is saved'):", f"  {COMPILING}"
    )
    process.send_signal(number)
    assert end(process) == (75, "", f"{number.name}: step 7 is saved\n")


def test_the_main_thread_is_unwound():
    """With SystemExit, of which a library may make something else."""
    process = program(
        LISTEN,
        "with ending.bounded(), preemption.at_once('it is kept'):",
        "  try:",
        "    print('begun', flush=True); time.sleep(60)",
        "  except BaseException as error:",
        "    print('removed', flush=True)",
        "    raise ImportError('of a library') from error",
    )
    process.send_signal(signal.SIGTERM)
    assert end(process) == (75, "removed\n", "SIGTERM: it is kept\n")


def test_in_a_loop_the_first_is_noted_and_the_second_ends_it():
    process = program(
        LISTEN,
        "with ending.bounded(), preemption.noted():",
        "  print('begun', flush=True)",
        "  while not preemption.requested(): time.sleep(0.01)",
        "  print(preemption.requested(), flush=True)",
        f"  {COMPILING}",
    )
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "SIGHUP\n" and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    said = "SIGHUP: stopping after this step; again: at once\nSIGTERM again: this process ends at once; "
    assert end(process) == (75, "", f"{said}what is saved is whole\n")


def test_what_was_noted_before_ends_what_would_lose_nothing():
    process = program(
        LISTEN,
        "with ending.bounded(), preemption.noted():",
        "  print('begun', flush=True)",
        "  while not preemption.requested(): time.sleep(0.01)",
        "  with preemption.at_once('nothing to do'):",
        "    print('not reached')",
    )
    process.send_signal(signal.SIGINT)
    said = "SIGINT: stopping after this step; again: at once\nSIGINT: nothing to do\n"
    assert end(process) == (75, "", said)


def test_of_several_processes_none_leaves_alone():
    """The others would wait for it: it is noted, also while compiling."""
    process = program(
        LISTEN,
        "preemption.together()",
        "with ending.bounded(), preemption.noted(), preemption.at_once('it is saved'):",
        "  print('begun', flush=True)",
        "  while not preemption.requested(): time.sleep(0.01)",
        "sys.exit(3)",
    )
    process.send_signal(signal.SIGTERM)
    assert end(process) == (3, "", "SIGTERM: stopping after this step; again: at once\n")


def test_nohup_keeps_its_meaning():
    program = f"{LISTEN}; print('begun', flush=True); time.sleep(60)"
    ignored = "import os, signal, sys; signal.signal(1, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    process = start("-c", ignored, "python", "-c", program)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


def test_a_child_that_was_forked_is_not_its_parent():
    """What ends the child, as a pool of processes does, is no signal to the parent; and it ends the child."""
    process = program(
        LISTEN,
        "with preemption.noted():",
        "  warnings.simplefilter('ignore')",  # that other threads do not come with it, which Python 3.12 says
        "  child = os.fork()",
        "  if not child: time.sleep(60)",
        "  print('begun', flush=True)",
        "  os.kill(child, 15)",
        "  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(preemption.requested()))",
    )
    assert end(process) == (0, "-15 ''\n", "")


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why"),
        ("pass", 0, ""),
        ("raise OSError('why')", 1, "OSError: why"),
    ],
)
def test_threads_that_wait_for_ever_do_not_keep_the_process(last, status, said):
    """Nor does what is called at exit."""
    process = program(
        f"{LISTEN}; import atexit",
        "ending.SECONDS = 0.3",
        "threading.Thread(target=threading.Event().wait).start()",
        "atexit.register(time.sleep, 600)",
        "with ending.bounded():",
        "  print('begun', flush=True)",
        "  sys.stdout.write('not flushed')",
        f"  {last}",
    )
    found, out, err = end(process)
    assert (found, out) == (status, "not flushed") and (said in err if said else not err)


def test_in_a_script_the_handlers_are_as_they_were():
    """Within, a signal is noted; before and after, Python's own."""
    from warm_jax.runtime import preemption

    before = {number: signal.getsignal(number) for number in ALL}
    with preemption.noted():
        with preemption.at_once("this would end a command"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() == preemption.received() == "SIGTERM"
        with preemption.noted():
            assert preemption.requested() == "SIGTERM"
    assert {number: signal.getsignal(number) for number in ALL} == before
    with preemption.noted():
        assert preemption.requested() == ""
