"""Which process this is, by what Slurm, GKE and people set; and the meeting of processes, here in threads."""

import socket
import threading
import time

import pytest

from warm_jax.runtime import rollcall

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[08-10,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1", "JAX_PLATFORMS": "tpu"}


@pytest.mark.parametrize(
    ("text", "names"),
    [  # Slurm's documentation of hostlists
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[008-010],other7", ["node008", "node009", "node010", "other7"]),
        ("a[1,5-6]b,c", ["a1b", "a5b", "a6b", "c"]),
        ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
    ],
)
def test_hostlists(text, names):
    assert list(rollcall.expand_hosts(text)) == names


def test_places():
    assert rollcall.find({"JAX_PLATFORMS": "cpu"}) is None
    given = rollcall.Place("host:1234", 8, 3)
    assert rollcall.find(SLURM, "host:1234", 8, 3) == given
    named = {"WARM_JAX_COORDINATOR": "host:1234", "WARM_JAX_PROCESSES": "8", "WARM_JAX_PROCESS": "3"}
    assert rollcall.find(SLURM | named) == given
    assert rollcall.find(SLURM | {"WARM_JAX_PROCESSES": "1"}) is None
    assert rollcall.find(SLURM) == rollcall.Place("gpu08:61586", 4, 2, ("gpu08", "gpu09", "gpu10", "gpu12"))
    crowded = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert rollcall.find(crowded)[1:] == (8, 5, (), 1)  # a device of its own
    batch_script = {key: value for key, value in SLURM.items() if "STEP" not in key} | {"SLURM_NTASKS": "4"}
    assert rollcall.find(batch_script | {"JAX_PLATFORMS": "cpu"}) is None
    assert rollcall.find(GKE) == rollcall.Place("job-0.svc:8482", 2, 1, ("job-0.svc", "job-1.svc"))
    assert rollcall.find({**GKE, "TPU_WORKER_HOSTNAMES": "localhost"}) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host", 2, 0), "--coordinator is 'host'; give HOST:PORT"),
        (("host:99999", 2, 0), "a port below 65536"),
        (("", 2, 0), "--coordinator is ''"),
        (("host:80", 2, 2), "--process is 2 of --processes 2"),
        (("host:80", 0, 0), "give the number of all processes"),
    ],
)
def test_half_a_place_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rollcall.find({}, *given)
    with pytest.raises(ValueError, match="WARM_JAX_PROCESS is 'two'"):
        rollcall.find({"WARM_JAX_PROCESS": "two"})


def meet(facts, processes=None, seconds=20.0, numbers=None):
    """What each process, given its facts, got from the meeting: None or the error."""
    with socket.socket() as door:
        door.bind(("", 0))
        coordinator = f"localhost:{door.getsockname()[1]}"
    found = [None] * len(facts)

    def come(index, number):
        try:
            rollcall.meet(rollcall.Place(coordinator, processes or len(facts), number), facts[index], seconds)
        except (TimeoutError, ValueError) as error:
            found[index] = error

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(numbers or range(len(facts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_come():
    assert meet([{"a": 1, "b": (1, 2)}] * 4) == [None] * 4


def test_one_runs_something_else():
    """All are told, and what is different."""
    errors = meet([{"a": 1, "code": "x"}, {"a": 1, "code": "x"}, {"a": 2, "code": "x", "c": 0}])
    for error in errors:
        assert type(error) is ValueError and f"process 2 on {socket.gethostname()} runs something else" in str(error)
        assert "a is 2 there and 1 on process 0; c is 0 there and '(not there)' on process 0" in str(error)
        assert "code" not in str(error).partition("else")[2]


def test_some_are_missing(monkeypatch):
    """Those that came are told who did not, and what to run there."""
    monkeypatch.setattr("sys.argv", ["main.py", "--config=a b.py", "--process=2"])
    began = time.monotonic()
    first, other = meet([{}, {}], processes=4, seconds=1.0, numbers=[0, 2])
    assert type(first) is type(other) is TimeoutError and str(first) == str(other)
    assert "of 4 processes 1, 3 did not come" in str(first) and "within 1 s" in str(first)
    for number in (1, 3):
        assert f"python -m warm_jax '--config=a b.py' --process={number}" in str(first)
    assert time.monotonic() - began < 5


def test_nobody_at_the_coordinator(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "--process=1"])
    (error,) = meet([{}], processes=2, seconds=0.5, numbers=[1])
    assert type(error) is TimeoutError and "process 1 of 2 found no process 0 at localhost:" in str(error)
    assert str(error).endswith("start it there with: python -m warm_jax --process=0")


def test_two_of_one_number():
    for error in meet([{}, {}, {}], processes=3, seconds=2.0, numbers=[0, 1, 1]):
        assert "two processes say that they are process 1" in str(error)


def test_strangers_are_ignored():
    with socket.socket() as door:
        door.bind(("", 0))
        port = door.getsockname()[1]
    results = []

    def come(number):
        results.append(rollcall.meet(rollcall.Place(f"localhost:{port}", 2, number), {}, 20.0))

    first = threading.Thread(target=come, args=[0])
    first.start()
    for said in (b"GET / HTTP/1.1\r\n\r\n\n", b'["process"]\n', b'{"process": 1}\n', b"\xff\n"):
        until = time.monotonic() + 10
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(said)
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)
    come(1)
    first.join()
    assert results == [None, None]
