"""What libraries print of failures that the program handles is left out, unless --verbosity=0 asks for it."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# As TensorBoard's writer on a full disk, as Orbax, as TensorStore's callbacks, and as what is closed at exit.
PROGRAM = """
import sys, threading
from absl import logging
from warm_jax.runtime import quiet
logging.use_absl_handler()
if {verbose}:
    logging.set_verbosity(0)
else:
    quiet.quiet()

def fails():
    raise OSError("no space")

thread = threading.Thread(target=fails)
thread.start()
thread.join()
exec(compile("logging.error('it failed in orbax')", "/x/orbax/checkpoint/async_checkpointer.py", "exec"))
logging.warning("of this program")
def prints():
    try:
        fails()
    except OSError as error:
        sys.excepthook(type(error), error, error.__traceback__)
thread = threading.Thread(target=prints)
thread.start()
thread.join()

class Closed:
    def __del__(self):
        raise OSError("closed")

Closed()
{last}
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_quiet(verbose):
    command = [sys.executable, "-c", PROGRAM.format(verbose=verbose, last="fails()")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if "absl::InitializeLog" not in line]
    assert done.returncode == 1 and lines[-1] == "OSError: no space"  # of the main thread: it is not hidden
    assert any("of this program" in line for line in lines)
    assert ("it failed in orbax" in done.stderr) is ("OSError: closed" in done.stderr) is verbose
    assert done.stderr.count("Traceback") == (4 if verbose else 1)
