"""JAX's coordinator, which lives in process 0 of a pod: the only file that knows `jax.distributed`."""

import ctypes
import functools
import os
from collections.abc import Callable

from warm_jax.runtime import door, rollcall

_JAX_SECONDS = 100  # without a sign of life, until JAX itself ends the job; peers.HUNG_SECONDS is shorter
_kept: list[object] = []  # what C++ calls must not be collected


def connect(place: rollcall.Place, seconds: float):
    """Starts the coordinator in process 0, and connects to it; the client, which has the key-value store."""
    import jax
    from jax._src import distributed

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, port = rollcall.address(place)
    here = door.LOOPBACK.get(host)  # of a job on one machine the port is not open to others
    make = distributed._jax.get_distributed_runtime_client
    distributed._jax.get_distributed_runtime_client = _ending_with_one_line(make, place)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=None if place.local_device is None else [place.local_device],
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(seconds)),
            coordinator_bind_address=here and (f"[{here}]:{port}" if ":" in here else f"{here}:{port}"),
            heartbeat_timeout_seconds=_JAX_SECONDS,
            shutdown_timeout_seconds=60,
        )
    finally:
        distributed._jax.get_distributed_runtime_client = make
    return distributed.global_state.client


def leave() -> None:
    """Leaves together with the others."""
    import jax

    jax.distributed.shutdown()


def _ending_with_one_line(make: Callable, place: rollcall.Place) -> Callable:
    """`make`, whose client ends this process with one line and status 1 when process 0 is gone.

    JAX's own answer is a page of C++ and SIGABRT, within milliseconds of the end of process 0: earlier than any thread
    here could notice. The client takes a function to call instead. Up to jaxlib 0.10 it cannot hand its argument to
    Python, and C++ ends the process for that (std::bad_cast): the same function is called there, too.
    """

    def lost(*_: object) -> None:
        text = f"error: process 0 at {place.coordinator} is gone, or JAX's coordinator there; this process ends with it"
        os.write(2, f"{text}\n".encode())
        os._exit(1)

    try:
        library = ctypes.CDLL("libstdc++.so.6")
        kind, replace = library.__cxa_current_exception_type, library._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return make  # another C++ library: JAX's own answer is better than none
    kind.restype = replace.restype = ctypes.c_void_p

    def terminate() -> None:
        thrown = kind()  # a std::type_info: a pointer to its functions, and one to its name
        if thrown and ctypes.c_char_p.from_address(thrown + ctypes.sizeof(ctypes.c_void_p)).value == b"St8bad_cast":
            lost()
        ctypes.CFUNCTYPE(None)(before)()

    _kept.append(ctypes.CFUNCTYPE(None)(terminate))
    before = replace(_kept[-1])
    return functools.partial(make, missed_heartbeat_callback=lost)
