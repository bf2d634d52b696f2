"""Strangers at the door of a job, on the loopback interface: none ends it, keeps it, or is taken for one of its own."""

import contextlib
import hashlib
import hmac
import json
import os
import socket
import threading
import time

import pytest

from warm_jax.runtime import door, rollcall

TOKEN = "4f1d2c3b5a69788796a5b4c3d2e1f001"
FACTS = {"--seeds": "0-63", "seed": 0}


@pytest.fixture(params=[TOKEN, ""], ids=["token", "no token"])
def secret(request, monkeypatch):
    monkeypatch.setenv("WARM_JAX_TOKEN", request.param)
    return request.param.encode()


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


class Job:
    """Process 0 of two, in a thread."""

    def __init__(self, seconds=60.0):
        self.port, self.seconds, self.result = free_port(), seconds, []
        self.first = threading.Thread(target=self._come, args=[0], daemon=True)
        self.first.start()

    def _come(self, number):
        try:
            place = rollcall.Place(f"localhost:{self.port}", 2, number)
            self.result.append(rollcall.meet(place, FACTS, self.seconds))
        except (TimeoutError, ValueError) as error:
            self.result.append(error)

    def connect(self):
        """A connection to the door, and the number that process 0 has drawn for it."""
        until = time.monotonic() + 20
        while True:
            try:
                connection = socket.create_connection(("localhost", self.port), timeout=20)
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
        greeting = connection.recv(200).split()
        assert greeting[0] == b"warm_jax" and len(greeting[1]) == 64
        return connection, greeting[1]

    def ends_well(self):
        """Process 1 comes, and both go on."""
        self._come(1)
        self.first.join(20)
        assert self.result == [None, None]


def coded(secret, challenge, text, nonce=b"n"):
    """A message as the protocol has it: written here anew, from RFC 2104 as Python's hmac has it."""
    code = hmac.new(secret, b"other " + challenge + b" " + nonce + b" " + text, hashlib.sha256)
    return code.hexdigest().encode() + b" " + nonce + b" " + text + b"\n"


def says(process, host="here", facts=None):
    return json.dumps({"process": process, "host": host, "facts": FACTS if facts is None else facts}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"process": 1, "host": "h", "facts": ' + b"[" * 50 + b"]" * 50 + b"}",
        says(99),
        says(0),
        says(-1),
        says(True),
        says("1"),
        says(1.0),
        says(1, host=["h"]),
        says(1, facts=[]),
        b"{}",
        b"null",
        b"\xff\xfe",
        b"",
    ],
    ids=lambda text: text[:20].decode("latin-1"),
)
def test_what_no_process_would_say(secret, text):
    """Even from one that has the token."""
    job = Job()
    connection, challenge = job.connect()
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):  # of one that is too long
        connection.sendall(coded(secret, challenge, text))
        assert connection.recv(1) == b""  # it is closed, and nothing is said
    job.ends_well()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\n", b"\n", b" \n", b"a b c\n"])
def test_what_speaks_another_language(secret, said):
    job = Job()
    connection, _ = job.connect()
    with connection:
        connection.sendall(said)
        job.ends_well()


def test_no_end_of_a_message(secret):
    """Its size is bounded; the deadline is tested below."""
    job = Job()
    connection, _ = job.connect()
    with connection, contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"a" * 10_000)
    job.ends_well()


def test_a_byte_now_and_then_holds_nobody(secret):
    """While one speaks slowly the others are heard."""
    job, stop = Job(), threading.Event()
    connection, _ = job.connect()

    def drip():
        with contextlib.suppress(OSError):
            while not stop.wait(0.002):
                connection.sendall(b"a")

    slow = threading.Thread(target=drip)
    slow.start()
    with connection:
        job.ends_well()
        stop.set()
        slow.join()


def test_a_connection_has_so_long_to_say_who_it_is(monkeypatch):
    monkeypatch.setattr(door, "_SAY_SECONDS", 0.2)
    job = Job()
    connection, _ = job.connect()
    with connection:
        assert connection.recv(1) == b""
    monkeypatch.undo()
    job.ends_well()


def test_one_deadline_for_all():
    """However many come meanwhile."""
    job = Job(seconds=1.0)
    until = time.monotonic() + 60
    while job.first.is_alive() and time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", job.port)).close()
    job.first.join(1)
    assert isinstance(job.result[0], TimeoutError) and "of 2 processes 1 did not come" in str(job.result[0])


@pytest.mark.parametrize("count", [40, door._MOST_UNHEARD + 40])
def test_silent_connections_starve_nobody(secret, count):
    job = Job()
    with contextlib.ExitStack() as silent:
        for _ in range(count):
            silent.enter_context(job.connect()[0])
        job.ends_well()


def test_a_stranger_without_the_token(monkeypatch):
    """With all that a process says: refused, and told to be; the job goes on with its own."""
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN)
    job = Job()
    for wrong in (b"", b"another-token-of-24-char"):
        job.connect()[0].close()
        with pytest.raises(PermissionError):
            door.ask(("localhost", job.port), wrong, json.loads(says(1)), time.monotonic() + 20, 20.0)
    job.ends_well()


def test_what_was_heard_cannot_be_said_again(monkeypatch):
    """Somebody who listens has a message of process 1 with its code, of another connection."""
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN)
    job = Job()
    _, challenge = job.connect()
    message = coded(TOKEN.encode(), challenge, says(1))
    connection, _ = job.connect()
    with connection:
        connection.sendall(message)
        assert connection.recv(100) == b"token\n"
    job.ends_well()


def test_the_token_is_never_sent(monkeypatch):
    """A false process 0 hears all that a process says."""
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN)
    heard = []

    def listen(server):
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"warm_jax " + b"0" * 64 + b"\n")
            heard.append(connection.recv(65536))

    with socket.create_server(("localhost", 0)) as server:
        thread = threading.Thread(target=listen, args=[server])
        thread.start()
        with pytest.raises((OSError, ValueError)):
            door.ask(server.getsockname()[:2], TOKEN.encode(), json.loads(says(1)), time.monotonic() + 20, 20.0)
        thread.join()
    assert b'"process": 1' in heard[0] and TOKEN.encode() not in heard[0]


@pytest.mark.parametrize(
    "answer",
    [
        b'0 {"missing": "", "wrong": ""}\n',
        b'{"missing": "", "wrong": ""}\n',
        b"[" * 200_000 + b"\n",
        b"a" * 2_000_000,
        b"",
    ],
    ids=["code", "no code", "deep", "long", "nothing"],
)
def test_a_false_process_0(monkeypatch, answer):
    """Who took the port of process 0 cannot tell the others to go on."""
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN)

    def serve(server):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"warm_jax " + b"0" * 64 + b"\n")
                    connection.recv(65536)
                    connection.sendall(answer)

    with socket.create_server(("localhost", 0)) as server:
        thread = threading.Thread(target=serve, args=[server], daemon=True)
        thread.start()
        place = rollcall.Place(f"localhost:{server.getsockname()[1]}", 2, 1)
        with pytest.raises(TimeoutError, match="found no process 0"):
            rollcall.meet(place, FACTS, 0.5)


def test_another_token_is_said_to_be_it(monkeypatch):
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN)
    job = Job(seconds=1.5)
    job.connect()[0].close()
    monkeypatch.setenv("WARM_JAX_TOKEN", TOKEN[::-1])
    job._come(1)
    job.first.join(20)
    other, first = map(str, job.result)
    assert "WARM_JAX_TOKEN is another one in process 1; give it the one of process 0 at localhost:" in other
    assert "from 127.0.0.1 was refused: is WARM_JAX_TOKEN the same there?" in first
    monkeypatch.setenv("WARM_JAX_TOKEN", "short")
    with pytest.raises(ValueError, match="WARM_JAX_TOKEN has 5 characters; it must have at least 16"):
        rollcall.meet(rollcall.Place("localhost:1", 2, 1), FACTS, 1.0)


def test_what_others_say_is_shown_without_its_escapes(secret):
    """Neither colours nor new lines, nor letters that turn the line round; of a long one the beginning."""
    job = Job()
    connection, challenge = job.connect()
    with connection:
        facts = {"--seeds\x1b[2J": "\x1b]0;title\x07", "seed": "x" * 100_000}
        connection.sendall(coded(secret, challenge, says(1, host="h\x1b[31m\n\u202eerror: ", facts=facts)))
        job.first.join(30)
    text = str(job.result[0])
    assert text.isprintable() and len(text) < 2000
    assert r"process 1 on h\x1b[31m\n\u202eerror:  runs something else" in text and r"\x1b]0;title\x07" in text


def test_it_is_open_to_this_machine_alone_where_the_others_are_here():
    """By what the kernel says of the listening socket."""
    entrance = door.Door("localhost", free_port(), b"")
    with contextlib.closing(entrance):
        assert entrance._door.getsockname()[0] == "127.0.0.1"
    with contextlib.closing(door.Door(socket.gethostname(), free_port(), b"")) as entrance:
        assert entrance._door.getsockname()[0] in ("::", "0.0.0.0")


def test_a_job_without_a_token_is_told(monkeypatch, capsys):
    monkeypatch.delenv("WARM_JAX_TOKEN", raising=False)
    for host, told in (("localhost", False), (socket.gethostname(), True)):
        with pytest.raises(TimeoutError):
            rollcall.meet(rollcall.Place(f"{host}:{free_port()}", 2, 0), FACTS, 0.1)
        assert ("note: WARM_JAX_TOKEN is not set: whoever reaches port" in capsys.readouterr().err) is told
    assert "WARM_JAX_TOKEN" not in os.environ
