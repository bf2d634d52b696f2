"""The door of a job: what its processes say to process 0 before JAX is started, and how it knows that they are its own.

Whoever reaches the port can connect. A process proves that it has the job's token by a code (HMAC-SHA256) of a number
that process 0 drew for this connection and of what it says; process 0 proves it in the same way. The token itself is
never sent, nothing else of a message is looked at before its code is right, and what is said is not hidden: these are
names of hosts and settings. Messages, connections and times are bounded.

    process 0   warm_jax CHALLENGE
    another     CODE NONCE {"process": …}       code of CHALLENGE, NONCE and the JSON text
    process 0   CODE {…}                        code of NONCE and the JSON text;   or: token
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Mapping

TOKEN = "WARM_JAX_TOKEN"
LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
_LEAST_TOKEN = 16  # characters: who listens to the network can try short ones at home
_MOST_BYTES = 1 << 18  # of a message
_MOST_DEPTH = 4  # of lists and objects in it
_MOST_UNHEARD = 256  # connections at one time of which nothing is known
_SAY_SECONDS = 10.0  # for a connection to say who it is
_LEAVE_SECONDS = 2.0  # for all together to read the answer
_REFUSED = b"token\n"


def token(environment: Mapping[str, str]) -> bytes:
    """The job's secret; empty where there is none. ValueError for one that is too short."""
    text = environment.get(TOKEN, "").strip()
    if text and len(text) < _LEAST_TOKEN:
        raise ValueError(
            f"{TOKEN} has {len(text)} characters; it must have at least {_LEAST_TOKEN}, as from: openssl rand -hex 32"
        )
    return text.encode()


def shown(text: object, most: int = 200) -> str:
    """What another process said, in one line for people: control characters escaped, and at most so long."""
    cut = str(text)[: most + 1]
    cut = cut if len(cut) <= most else f"{cut[:most]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _code(secret: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, b" ".join(parts), hashlib.sha256).hexdigest().encode()


def _message(text: bytes) -> dict:
    """A JSON object that is not deep. ValueError otherwise."""
    try:
        message = json.loads(text)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    _check_depth(message, _MOST_DEPTH)
    return message


def _check_depth(value: object, left: int) -> None:
    if left < 0:
        raise ValueError("too deep")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(child, left - 1)


class Visitor:
    """A connection to process 0; of whom is known when it has said so."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.until = time.monotonic() + _SAY_SECONDS
        self.challenge = secrets.token_hex(32).encode()
        self.nonce = self.data = b""

    def gone(self) -> bool:
        """Whether the other side has closed: a process that was ended, and is started again."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Door:
    """Where process 0 waits for the others.

    Args:
      host: The name under which the others look for it: on the loopback interface it is open there only.
      port: Of TCP. OSError where it cannot be opened.
      secret: The job's token; empty: whoever comes is believed.
    """

    def __init__(self, host: str, port: int, secret: bytes):
        both = socket.has_dualstack_ipv6() and host not in LOOPBACK
        family = socket.AF_INET6 if both or host == "::1" else socket.AF_INET
        self._secret, self.refused = secret, ""
        self._waiting: list[Visitor] = []
        self._door = socket.create_server(
            (LOOPBACK.get(host, ""), port), family=family, dualstack_ipv6=both, backlog=_MOST_UNHEARD
        )
        self._door.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)

    def heard(self, until: float) -> tuple[Visitor, dict] | None:
        """The next that proves to be of this job, and what it says; None when the time has come."""
        while (now := time.monotonic()) < until:
            for late in [visitor for visitor in self._waiting if visitor.until < now]:
                self.refuse(late)
            for key, _ in self._selector.select(min(until - now, 0.5)):
                if key.data is None:
                    self._take()
                elif (said := self._read(key.data)) is not None:
                    self._forget(key.data)
                    return key.data, said
        return None

    def _take(self) -> None:
        try:
            connection, address = self._door.accept()
            connection.setblocking(False)
            visitor = Visitor(connection, shown(address[0]))
            connection.send(b"warm_jax " + visitor.challenge + b"\n")
        except OSError:
            return
        if len(self._waiting) >= _MOST_UNHEARD:  # who has waited longest has had the most time to speak
            self.refuse(self._waiting[0])
        self._waiting.append(visitor)
        self._selector.register(connection, selectors.EVENT_READ, visitor)

    def _read(self, visitor: Visitor) -> dict | None:
        try:
            more = visitor.connection.recv(65536)
            visitor.data += more
            if visitor.data.endswith(b"\n"):
                code, visitor.nonce, text = visitor.data[:-1].split(b" ", 2)
                if not hmac.compare_digest(code, _code(self._secret, b"other", visitor.challenge, visitor.nonce, text)):
                    visitor.connection.send(_REFUSED)
                    raise ValueError("of another job")
                return _message(text)
            if not more or len(visitor.data) > _MOST_BYTES:
                raise ValueError("it said nothing, or no end")
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            self.refuse(visitor)
        return None

    def _forget(self, visitor: Visitor) -> None:
        if visitor in self._waiting:
            self._waiting.remove(visitor)
            self._selector.unregister(visitor.connection)

    def refuse(self, visitor: Visitor) -> None:
        """Closes a connection that is of no process of this job; `refused` is where the last one came from."""
        self.refused = visitor.address
        self._forget(visitor)
        visitor.connection.close()

    def answer(self, visitors: list[Visitor], message: dict) -> None:
        """Tells them, and waits until they have closed: the port is to be free for JAX."""
        text, until = json.dumps(message).encode(), time.monotonic() + _LEAVE_SECONDS
        for visitor in visitors:
            with contextlib.suppress(OSError):
                visitor.connection.send(_code(self._secret, b"first", visitor.nonce, text) + b" " + text + b"\n")
        for visitor in visitors:
            with contextlib.suppress(OSError), visitor.connection as connection:
                connection.settimeout(max(0.01, until - time.monotonic()))
                connection.recv(1)

    def close(self) -> None:
        """Closes the door, and on all who have not said who they are."""
        for visitor in list(self._waiting):
            self.refuse(visitor)
        self._selector.close()
        self._door.close()


def ask(address: tuple[str, int], secret: bytes, said: dict, until: float, patience: float) -> dict:
    """Goes to process 0, says `said`, and returns what it answers.

    Raises OSError or ValueError where nobody of this job is there; PermissionError where its token is another one.
    `until` (of the monotonic clock) bounds the way there, `patience` in seconds the wait for the answer.
    """
    seconds = max(0.1, min(5.0, until - time.monotonic()))
    with socket.create_connection(address, timeout=seconds) as connection:
        greeting = _line(connection, 200, time.monotonic() + _SAY_SECONDS).split()
        if len(greeting) != 2 or greeting[0] != b"warm_jax":
            raise ValueError("what answers there is no process of warm_jax")
        nonce, text = secrets.token_hex(32).encode(), json.dumps(said).encode()
        if len(text) > _MOST_BYTES - 200:
            raise ValueError(f"the config has {len(text):,} bytes, more than processes can compare")
        connection.sendall(_code(secret, b"other", greeting[1], nonce, text) + b" " + nonce + b" " + text + b"\n")
        line = _line(connection, 2 * _MOST_BYTES, time.monotonic() + patience)
    if line == _REFUSED.strip():
        raise PermissionError("refused")
    code, _, text = line.partition(b" ")
    if not hmac.compare_digest(code, _code(secret, b"first", nonce, text)):
        raise ValueError("what answers there has not this job's token")
    return _message(text)


def _line(connection: socket.socket, most: int, until: float) -> bytes:
    """One line, without its end; ValueError or OSError where there is none in time, or it is too long."""
    data = b""
    while not data.endswith(b"\n"):
        connection.settimeout(max(0.01, until - time.monotonic()))
        more = connection.recv(65536)
        if not more or len(data) > most or time.monotonic() > until:
            raise ValueError("the connection was closed")
        data += more
    return data[:-1]
