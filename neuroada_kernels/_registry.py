"""Which backend serves a call: the backends, their priority, and their reasons for declining.

This module imports neither ops nor backends: ops query it, and backends register with it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class BackendError(RuntimeError):
    """The named backend, or every candidate, declines the call; the message lists the reasons."""


@dataclass(frozen=True)
class Implementation:
    """One op of one backend.

    ``unsupported`` takes the op's arguments and returns the reasons for not serving them; if the
    list is empty, the call is served. For a first argument of a dtype in ``always``, on a device
    type that the backend has a priority for, the list is always empty and the check is skipped.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., list[str]]
    always: frozenset[Any] = frozenset()


@dataclass(frozen=True)
class Backend:
    """A set of implementations, and the device types for which they are chosen automatically.

    ``priority`` maps a device type to a rank; the backend with the highest rank is tried first. On
    a device type without a rank the backend runs only when named. ``"*"`` stands for every device
    type. ``unavailable`` returns None, or why this backend cannot run in this process. An
    ``experimental`` backend, whose tests have not run on its own device, runs only when named. If
    they have run on some of its devices, ``untried`` takes a call's first tensor and returns None,
    or why its device or dtype is untested; then, too, the backend runs only when named.
    """

    name: str
    priority: Mapping[str, int]
    implementations: Mapping[str, Implementation]
    unavailable: Callable[[], str | None] = lambda: None
    experimental: bool = False
    untried: Callable[[Any], str | None] | None = None


_backends: dict[str, Backend] = {}
_order: dict[str, list[Backend]] = {}
_from_environment: str | None = os.environ.get("NEUROADA_BACKEND") or None
_named: str | None = _from_environment
_lock = threading.Lock()
_blocks: list[list[str | None]] = []  # open use_backend() blocks, the newest last


def register(backend: Backend) -> None:
    """Add a backend, or replace the one with the same name."""
    _backends[backend.name] = backend
    _order.clear()


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None if it can run here, otherwise the reason."""
    return {name: backend.unavailable() for name, backend in _backends.items()}


def untried(name: str, first: Any) -> str | None:
    """Why the backend ``name`` serves a call with this first tensor only when named, or None."""
    backend = _backends[name]
    return None if backend.untried is None else backend.untried(first)


def experimental_backends() -> set[str]:
    """The names of the backends that run only when named."""
    return {name for name, backend in _backends.items() if backend.experimental}


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, calls are served by the backend ``name``, or raise with its reasons.

    The choice holds for the whole process, including backward passes that run inside the block.
    ``None`` returns to the automatic choice. If several threads have open blocks, the newest open
    block applies. ``NEUROADA_BACKEND`` makes the same choice from the environment.

    Raises
    ------
    ValueError
        If no backend has that name.
    BackendError
        If the backend cannot run in this process.
    """
    global _named
    if name is not None:
        _check_named(name)
    block = [name]
    with _lock:
        _blocks.append(block)
        _named = name
    try:
        yield
    finally:
        with _lock:
            # Another thread may have opened a block since that is still open.
            del _blocks[next(n for n, other in enumerate(_blocks) if other is block)]
            _named = _blocks[-1][0] if _blocks else _from_environment


def run(op: str, *args: Any) -> Any:
    """Run ``op`` by the backend that serves these arguments, and return its result.

    The first argument is a tensor on the op's device.

    Raises
    ------
    BackendError
        If the named backend declines, or, if none is named, every backend.
    """
    # Fast path: the first candidate usually serves. This inlines the checks of serving(), since
    # after a GEMM has evicted the caches each further Python call takes microseconds.
    first = args[0]
    device_type = "cpu" if first.is_cpu else first.device.type
    candidates = _order.get(device_type) if _named is None else None
    if candidates:
        backend = candidates[0]
        implementation = backend.implementations.get(op)
        if (
            implementation is not None
            and (first.dtype in implementation.always or not implementation.unsupported(*args))
            and (backend.untried is None or backend.untried(first) is None)
        ):
            return implementation.run(*args)
    return serving(op, *args).implementations[op].run(*args)


def serving(op: str, *args: Any) -> Backend:
    """The backend whose function :func:`run` calls."""
    if _named is not None:
        _check_named(_named)
        candidates = [_backends[_named]]
    else:
        candidates = _candidates(args[0].device.type)
    for backend in candidates:
        if not _reasons(backend, op, args):
            return backend
    raise BackendError(
        f"no backend serves neuroada::{op} here: "
        + "; ".join(f"{backend.name}: {_why_not(backend, op, args)}" for backend in candidates)
    )


def _candidates(device_type: str) -> list[Backend]:
    order = _order.get(device_type)
    if order is None:

        def rank(backend: Backend) -> int:
            if backend.experimental:
                return -1
            return backend.priority.get(device_type, backend.priority.get("*", -1))

        usable = [b for b in _backends.values() if rank(b) >= 0 and b.unavailable() is None]
        order = _order[device_type] = sorted(usable, key=rank, reverse=True)
    return order


def _check_named(name: str) -> None:
    if name not in _backends:
        raise ValueError(f"backend: {name!r} is unknown, expected one of {sorted(_backends)}")
    reason = _backends[name].unavailable()
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run here: {reason}")


def _why_not(backend: Backend, op: str, args: tuple[Any, ...]) -> str:
    return ", ".join(_reasons(backend, op, args))


def _reasons(backend: Backend, op: str, args: tuple[Any, ...]) -> list[str]:
    implementation = backend.implementations.get(op)
    if implementation is None:
        return [f"has no {op}"]
    reasons = implementation.unsupported(*args)
    if not reasons and _named is None and backend.untried is not None:
        by_name_only = backend.untried(args[0])
        reasons = [] if by_name_only is None else [by_name_only]
    return reasons
