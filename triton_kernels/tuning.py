"""Tuning, opt-in: ``NEUROADA_AUTOTUNE=1`` times the candidates of a kernel once per problem.

The fastest are kept in one JSON file per GPU name in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Config = TypeVar("Config")
Timer = Callable[[Callable[[], object]], float]


def enabled() -> bool:
    """Whether the environment enables tuning."""
    return os.environ.get("NEUROADA_AUTOTUNE") == "1"


def problem(
    tokens: int, d_in: int, entries: Tensor, *operands: Tensor | None
) -> tuple[object, ...]:
    """What a choice depends on, the tokens as the next power of two; ``entries`` is [d_out, k].

    An operand contributes its dtype, or None if there is none.
    """
    dtypes = (None if operand is None else operand.dtype for operand in operands)
    return (1 << max(tokens - 1, 0).bit_length(), d_in, *entries.shape, *dtypes)


def cache_file(gpu_name: str) -> Path:
    """The file of the results for a GPU, under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "neuroada_kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name)}.json"


def pick(
    kernel: str,
    problem: Sequence[object],
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The first candidate, or with tuning on the fastest of them.

    Parameters
    ----------
    kernel : str
        Name of the kernel.
    problem : sequence
        From :func:`problem`.
    candidates : sequence of configs
        Frozen dataclasses, the heuristic choice first.
    run : callable
        Launches the kernel with a config; called many times, so it must not accumulate.
    device : torch.device
        The tensors' device. Nothing is timed while a CUDA graph is being captured.
    """
    if not enabled() or device.type != "cuda":
        return candidates[0]
    return _Results(cache_file(torch.cuda.get_device_name(device))).pick(
        f"{kernel} {' '.join(map(str, problem))}", candidates, run, _time
    )


class _Results:
    """A file of results, read at first use and replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pick(
        self, key: str, candidates: Sequence[Config], run: Callable[[Config], object], time: Timer
    ) -> Config:
        known = _read(self.path)
        for candidate in candidates:
            if asdict(candidate) == known.get(key):  # type: ignore[call-overload]
                return candidate
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        seconds = {}
        for candidate in candidates:
            # Skips candidates that exceed the resources of this GPU.
            with contextlib.suppress(_out_of_resources()):
                seconds[candidate] = time(functools.partial(run, candidate))
        best = min(seconds, key=seconds.__getitem__, default=candidates[0])
        known[key] = asdict(best)  # type: ignore[call-overload]
        with contextlib.suppress(OSError):  # the result still holds for this process
            _write(self.path, known)
        return best


_loaded: dict[Path, dict[str, Any]] = {}


def _read(path: Path) -> dict[str, Any]:
    if path not in _loaded:
        _loaded[path] = _in_file(path)
    return _loaded[path]


def _in_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or invalid: tune again
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    known = {**_in_file(path), **known}  # another process may have written since
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def _time(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources
