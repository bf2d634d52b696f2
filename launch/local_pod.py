"""A pretended pod: several processes of warm_jax.main on this machine, which take themselves for hosts.

    python launch/local_pod.py --hosts=4 -- --config=configs/fashion_mnist.py --workdir=runs/pod
    python launch/local_pod.py --hosts=2 --devices-per-host=4 --dry-run -- --config=configs/smoke.py

What stands after `--` goes to warm_jax.main. Host 0 speaks on the console, the others to host1.log, host2.log, … in
--logs. SIGTERM, SIGINT and SIGHUP go to all. As in a pod, where one host dies the job is over: the others are
killed, and its exit status is this one's (128 + N for signal N). The same command goes on from the last checkpoint.
"""

import argparse
import os
import pathlib
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Statuses that all hosts come to agree on, so that the others get time to end by themselves.
AGREED = (0, 2, 75)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as door:
        door.bind(("", 0))
        return door.getsockname()[1]


def commands(hosts: int, port: int, arguments: list[str]) -> list[list[str]]:
    """The command line of each host."""
    start = [sys.executable, "-m", "warm_jax.main", f"--coordinator=localhost:{port}", f"--processes={hosts}"]
    return [[*start, f"--process={number}", *arguments] for number in range(hosts)]


def environment(devices: int, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of each host: CPUs only, and `devices` of them."""
    flags = [f for f in inherited.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    # Cores are few here, and hosts many: one may be late without being dead.
    flags += [f"--xla_cpu_collective_{name}_seconds=600" for name in ("timeout", "call_terminate_timeout")]
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH", "")]))
    token = inherited.get("WARM_JAX_TOKEN") or secrets.token_hex(32)  # by which the processes know one another
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": path, "WARM_JAX_TOKEN": token}
    return {**inherited, **own}


def start(lines: list[list[str]], env: dict[str, str], logs: pathlib.Path) -> list[subprocess.Popen]:
    """Starts every host, in a session of its own so that a Ctrl-C comes to them once, through us."""
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for number, line in enumerate(lines):
        out = None if number == 0 else (logs / f"host{number}.log").open("w", encoding="utf-8")
        error = None if out is None else subprocess.STDOUT
        started.append(subprocess.Popen(line, env=env, stdout=out, stderr=error, start_new_session=True))
        (logs / f"host{number}.pid").write_text(f"{started[-1].pid}\n", encoding="utf-8")
    return started


def wait(hosts: list[subprocess.Popen], grace: float) -> int:
    """Until all have ended, or one has died and the others were killed; the exit status of the job."""
    until, first = None, 0
    while None in (codes := [host.poll() for host in hosts]):
        ended = [code for code in codes if code]
        if ended and until is None:
            first = ended[0]
            until = time.monotonic() + (grace if first in AGREED else 0)
        if until is not None and time.monotonic() >= until:
            for number, host in enumerate(hosts):
                if host.poll() is None:
                    print(f"local_pod: host {number} is killed: another ended with {first}", file=sys.stderr)
                    host.kill()
                    host.wait()
        time.sleep(0.05)
    # What was there before we killed the others; else the first that is not 0.
    code = first or next((code for code in codes if code), 0)
    print(f"local_pod: exit statuses {codes}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def main() -> int:
    """Exit status: as warm_jax.main's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True, help="how many processes")
    parser.add_argument("--devices-per-host", type=int, default=1, help="pretended devices of each (default 1)")
    parser.add_argument(
        "--logs", type=pathlib.Path, help="folder of host1.log, … and pids (default: a new one in /tmp)"
    )
    parser.add_argument("--grace", type=float, default=60, help="seconds for all to end after a signal (default 60)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
    parser.add_argument("arguments", nargs="*", help="of warm_jax, after --")
    given = parser.parse_args()
    if given.hosts < 1 or given.devices_per_host < 1:
        parser.error("--hosts and --devices-per-host must be at least 1")
    lines = commands(given.hosts, free_port(), given.arguments)
    env = environment(given.devices_per_host, dict(os.environ))
    if given.dry_run:
        for line in lines:
            print(f"JAX_PLATFORMS=cpu XLA_FLAGS={shlex.quote(env['XLA_FLAGS'])} {shlex.join(line)}")
        return 0
    logs = given.logs or pathlib.Path(tempfile.mkdtemp(prefix="local_pod_"))
    hosts = start(lines, env, logs)
    print(f"local_pod: {given.hosts} hosts, logs in {logs}", file=sys.stderr, flush=True)

    def pass_on(number: int, frame: object) -> None:
        for host in hosts:
            if host.poll() is None:
                host.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        return wait(hosts, given.grace)
    finally:
        for host in hosts:
            if host.poll() is None:
                host.kill()


if __name__ == "__main__":
    sys.exit(main())
