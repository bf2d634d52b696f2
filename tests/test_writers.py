"""Threads that write while the next is made: order, bounds, errors."""

import threading

import numpy as np
import pytest

from warm_jax.runtime import writers
from warm_jax.sampling import batches


def test_all_is_written_and_at_most_one_batch_waits():
    gate, written, made = threading.Event(), [], writers.Writers()

    def save(number):
        assert gate.wait(10)
        written.append(number)

    made.write(save, [(i,) for i in range(9)])  # returns at once
    assert written == []
    gate.set()
    made.write(save, [(9,)])
    assert set(written) >= set(range(9))  # the batch before is whole first
    made.wait()
    assert sorted(written) == list(range(10))
    made.wait()


def test_an_error_of_a_thread_comes_once_all_have_ended():
    written, made = [], writers.Writers()

    def save(number):
        if number == 1:
            raise OSError(28, "No space left on device", "1.png")
        written.append(number)

    made.write(save, [(0,), (1,)])
    with pytest.raises(OSError, match=r"No space left on device: '1\.png'"):
        made.write(save, [(2,)])
    assert written == [0]
    made.write(save, [(3,)])  # it is told once
    made.wait()
    assert written == [0, 3]


@pytest.mark.parametrize(
    ("stopped_after", "expected"),
    [
        (99, ["begin 0", "begin 2", "fetch 0", "begin 4", "fetch 2", "fetch 4"]),
        (2, ["begin 0", "begin 2", "fetch 0", "fetch 2"]),
        (0, []),
    ],
)
def test_a_batch_is_begun_before_the_last_is_fetched(monkeypatch, stopped_after, expected):
    """Two are on the devices at most, and what was begun before a signal still comes."""
    events, draw = [], object.__new__(batches.Sampler)
    draw.batch_size = 2

    def begin(self, weights, seeds, labels):
        events.append(f"begin {seeds[0]}")
        assert labels.tolist() == [7] * len(seeds)
        return batches.Begun(seeds, [])

    def fetch(self, begun):
        events.append(f"fetch {begun.seeds[0]}")
        return begun.seeds * 10

    monkeypatch.setattr(batches.Sampler, "begin", begin)
    monkeypatch.setattr(batches.Sampler, "_fetch", fetch)
    begun = lambda: sum(event.startswith("begin") for event in events)  # noqa: E731
    found = list(draw.stream(None, np.arange(5), np.full(5, 7), lambda: begun() >= stopped_after))
    assert events == expected
    seeds = [seed for part, _ in found for seed in part]
    assert seeds == list(range(min(5, 2 * stopped_after)))
    assert all((samples == 10 * part).all() for part, samples in found)
