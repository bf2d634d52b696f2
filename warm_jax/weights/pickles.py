"""Pickles read without unpickling them.

Unpickling calls whatever a file names. Here `pickletools` splits the stream into opcodes, and `Machine` knows what
those that files of weights need would build. Globals stay strings: nothing that a file names is ever looked up,
imported or called. A reader says which globals it knows and which function of ours stands for each; any other, and any
other opcode, is refused by name. What is built holds no more bytes than the file.
"""

import io
import pickletools
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping

ORDERED_DICT = "collections OrderedDict"
Call = Callable[[tuple], object]

_MARK = object()
_MAX_KEY = 1000
_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_PUSH |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(str):
    """The name ("module attribute") of something that a pickle may refer to; never the thing."""


class Record:
    """An object of a class that is not here: the class's name, the arguments it was made with, its attributes."""

    def __init__(self, name: str, arguments: tuple = (), state: object = None):
        self.name, self.arguments, self.state = name, arguments, state


def wrong(text: str) -> ValueError:
    """What a reader raises for a file that it refuses."""
    return ValueError(f"not a file of tensors: {text}")


_KINDS = {  # how other files begin that people give for one of weights
    b"PK\x03\x04": "a zip, as torch.save writes it (tensors by name, without the network around them)",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "PyTorch's older format, as torch.save wrote it before 1.6",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file: run git lfs pull",
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "an array of numpy's",
    b"<": "a web page in place of the file: download it again",
}


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxtuple, _SHORT.maxstring = 2, 4, 4, 4, 80


def shown(value: object) -> str:
    """A value out of a file, for messages: short, whatever it holds. The repr of lists in lists could take for ever."""
    return _SHORT.repr(value)


def looks_like(data: bytes) -> str:
    """What a file is by its beginning, for messages; "" where that does not tell."""
    known = [text for start, text in _KINDS.items() if data[:1000].lstrip(b" \r\n").startswith(start)]
    safetensors = data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data)
    return (known or ["a file of safetensors" if safetensors else ""])[0]


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            yield opcode, argument
    except UnicodeDecodeError:  # of opcodes that only text has
        raise wrong("no pickle, or a damaged one") from None
    except ValueError as error:
        raise wrong(f"no pickle, or cut short ({error})") from None


def empty_dict(arguments: tuple) -> dict:
    """What `OrderedDict()` stands for."""
    if arguments != ():
        raise wrong("it calls 'collections.OrderedDict' with unexpected arguments")
    return {}


class Machine:
    """Reads one pickle into dicts, lists (sets too), tuples, numbers, strings, bytes and what `calls` return.

    Args:
      calls: Global → what calling it, or making an object of it, stands for: a function of ours of its arguments.
      names: Globals that may be referred to, but not called.
      persistent: What a persistent reference stands for; without, they are refused.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        names: Collection[str] = (),
        persistent: Callable[[object], object] | None = None,
    ):
        self.calls, self.names, self.persistent = calls, names, persistent
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self, stream: io.BytesIO) -> object:
        """What the pickle at the stream's position builds; the stream is left behind its end. Or ValueError."""
        try:
            for opcode, argument in _opcodes(stream):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (IndexError, KeyError, AttributeError, TypeError) as error:
            raise wrong(f"a malformed pickle ({error!r})") from None
        raise wrong("the pickle has no end")

    def step(self, name: str, argument: object) -> None:
        """One opcode."""
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "GLOBAL":
            stack.append(self.known(argument))
        elif name == "INST":
            raise wrong(f"it builds an instance of {argument.replace(' ', '.', 1)!r}, which is refused")
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self.known(f"{module} {attribute}"))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in _TUPLES:
            values = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(values))
        elif name == "APPEND":
            value = stack.pop()
            self.top(list).append(value)
        elif name in ("APPENDS", "ADDITEMS"):
            values = self.marked()
            self.top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self.marked() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self.set_items(values)
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            self.set_state(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise wrong(f"opcode {name} is refused")

    def known(self, name: str) -> Global:
        """The global's name, if it is one that this reader knows."""
        if name not in self.calls and name not in self.names:
            raise wrong(f"it asks for the global {name.replace(' ', '.', 1)[:200]!r}, which is refused")
        return Global(name)

    def call(self, function: object, arguments: object) -> object:
        """What calling one of the globals would return."""
        if type(function) is not Global or type(arguments) is not tuple:
            raise wrong("it calls something that is not a global")
        if function not in self.calls:
            raise wrong(f"it calls {function!r} with unexpected arguments")
        return self.calls[function](arguments)

    def set_state(self, state: object) -> None:
        """A record takes it; attributes of an OrderedDict (`_metadata` of a state_dict) are dropped."""
        if type(self.stack[-1]) is Record:
            self.stack[-1].state = state
        else:
            self.top(dict)

    def marked(self) -> list:
        """Pops what lies above the last mark."""
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise wrong("a malformed pickle (no mark)")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def top(self, kind: type) -> object:
        """The object on top, which must be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise wrong(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def set_items(self, values: list) -> None:
        """Keys are short strings: hashing a deep tuple could take for ever, and names of parts are put together."""
        if len(values) % 2 or not all(type(key) is str and len(key) <= _MAX_KEY for key in values[::2]):
            raise wrong(f"a dict whose keys are not strings of at most {_MAX_KEY} letters")
        self.top(dict).update(zip(values[::2], values[1::2], strict=True))
