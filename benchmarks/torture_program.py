"""The command of warm_jax with a stand-in network that compiles in a second, for benchmarks/torture.py.

    python benchmarks/torture_program.py FLAGS    one command, from its first second
    python benchmarks/torture_program.py          a server: each line of stdin is one command as JSON, {"arguments",
                                                  "folder", "environment", "out", "error"}; it runs in a process that
                                                  is forked from this one, which has imported everything

For each command the server answers with two lines: the number of its process; and when it has ended the exit status and
the most memory that it had, in KiB.
"""

from warm_jax.runtime import preemption

if __name__ == "__main__" and hasattr(preemption, "listen"):
    import sys

    if len(sys.argv) > 1:
        preemption.listen()  # as warm_jax.main does, before the imports that take seconds

import importlib
import json
import os
import signal
import warnings

import flax.linen as nn
import jax.numpy as jnp

from warm_jax import main
from warm_jax.doctor import selftest
from warm_jax.experiments import experiment

_LATER = (  # what the modes import when they begin
    *("training.train", "sampling.generate", "evaluation.evaluate", "evaluation.compare", "data.prepare"),
    *("convert.export", "convert.from_edm", "restoration.restore", "analysis.analyze", "analysis.inspection"),
)


class Linear(nn.Module):
    """F = gain · x + level · c + blur · c', with a gain a pixel and head."""

    heads: int
    platform: str = "cpu"  # as the networks have

    @nn.compact
    def __call__(self, x, condition, second=None, class_labels=None, augment_labels=None, train=False):
        """Raw outputs `[b, h, w, heads]` of grey images."""
        normal = nn.initializers.normal(0.3)
        raw = self.param("gain", normal, (*x.shape[1:3], self.heads)) * x
        raw = raw + self.param("level", normal, (self.heads,)) * condition[:, None, None, None]
        if second is None:
            return raw
        return raw + self.param("blur", normal, (self.heads,)) * jnp.asarray(second)[:, None, None, None]


selftest.training = lambda smoke: ("left out: the stand-in learns too little", 0.5)  # of doctor
experiment._network = lambda config, shape, around, two: Linear(heads=around.heads)


def _serve() -> None:
    """Returns in each child, ready to run its command; in the server at the end of stdin with `SystemExit`."""
    for module in _LATER:
        importlib.import_module(f"warm_jax.{module}")
    warnings.filterwarnings("ignore", message=".*fork.*")
    print("ready", flush=True)
    while line := _readline():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
            return
        print(child, flush=True)
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_maxrss, flush=True)
    sys.exit(0)


def _readline() -> bytes:
    """A line of stdin, past Python's buffer, which a child would inherit."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 1)):
        line += more
    return line


def _become(asked: dict) -> None:
    """Makes this process what a shell would have started."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("out", 1), ("error", 2)):
        target = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, number)
        os.close(target)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["arguments"]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _serve()
    if hasattr(main, "run"):
        main.run()
    else:
        from absl import app

        from warm_jax.cli import flags

        app.run(main.main, flags_parser=flags.parse)
