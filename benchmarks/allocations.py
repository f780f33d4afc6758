"""The peak memory of a piece of work, by the profiler's record of allocations.

What goes through torch's allocator is counted: every tensor, including those inside other
libraries' ops. Not counted: scratch that a kernel takes from the C++ heap itself (ours, a block of
tokens per thread, and oneDNN's), and pages that the heap keeps after a free.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

UNSEEN = "scratch that kernels take from the C++ heap themselves, and pages kept after a free"


Returned = TypeVar("Returned")


def allocated_peak(work: Callable[[], object]) -> int:
    """Peak bytes, what ``work`` returns included; what was allocated before does not count."""
    return highest_alive(_recorded(work)[1])


def held_after(work: Callable[[], Returned]) -> tuple[Returned, int]:
    """What ``work`` returns, and the bytes that it has allocated and not freed."""

    def clean() -> Returned:
        found = work()
        gc.collect()  # modules are reference cycles, which only this frees
        return found

    gc.collect()
    returned, events = _recorded(clean)
    return returned, sum(_alive(events).values())


@contextmanager
def loaded_for_good() -> Iterator[None]:
    """Make garbage collections, which some loops trigger, skip all objects that exist by now."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _recorded(work: Callable[[], Returned]) -> tuple[Returned, list[tuple[int, int]]]:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    returned = work()
    with _quiet():
        profiler.stop()
    return returned, _events(profiler)


def _events(profiler: Any) -> list[tuple[int, int]]:
    """``(address, bytes)`` of allocations, and of frees with negative bytes, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with _quiet():
            profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    records.sort(key=lambda event: event["args"]["Ev Idx"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in records]


def _alive(events: list[tuple[int, int]]) -> dict[int, int]:
    """Bytes by address of what was allocated and not freed."""
    alive: dict[int, int] = {}
    for address, size in events:
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)
    return alive


def highest_alive(events: list[tuple[int, int]]) -> int:
    """The most bytes alive at once; frees of what was allocated before do not count."""
    alive: dict[int, int] = {}
    now = peak = 0
    for address, size in events:
        if size > 0:
            alive[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the profiler's C++ part writes to standard error on start and stop."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
