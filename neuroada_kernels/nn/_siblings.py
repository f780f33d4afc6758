"""Layers that read the same x, and the one copy of its chosen columns that they share.

The layer whose forward runs first makes the copy. A sibling finds it by the identity and version of
x, so that a copy is never stale or of another x. It is held until every sibling has read it or x is
freed, whichever comes first; from then on only the autograd graph holds it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from neuroada_kernels.plan import chosen_columns, columns_of


class Reader(Protocol):
    """The interface of a layer that can have siblings."""

    in_features: int
    index: Tensor

    @property
    def columns(self) -> Tensor | None: ...

    @property
    def save_activations(self) -> str: ...

    def _is_planned(self) -> bool: ...

    def _keep_columns(self, columns: Tensor | None) -> None: ...


class Siblings:
    """Weak references to the layers, and the latest copy of each thread.

    A deep or pickled copy of this is empty; the copied layers join it.
    """

    def __init__(self) -> None:
        self.layers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self.lock = threading.RLock()  # guards columns and the index into them as a pair
        self._latest = _Latest()

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return Siblings, ()

    def settle(self) -> None:
        """Decide which columns are saved, from the indices and modes of all the layers.

        To be called when an index or ``save_activations`` has changed.
        """
        # An inference tensor cannot be saved for a backward.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            places: dict[tuple[torch.device, int], list[Reader]] = {}
            for layer in list(self.layers):
                if layer._is_planned():
                    place = (layer.index.device, layer.in_features)
                    places.setdefault(place, []).append(layer)
            for layers in places.values():
                columns = _worth_keeping(layers)
                for layer in layers:
                    layer._keep_columns(columns)

    def copy_of(self, x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """``x[..., columns]``: the copy of a sibling, or a new one that siblings can find."""
        latest = self._latest.copy
        if latest is not None and latest.is_of(x, columns, dtype):
            kept = latest.read()
            if kept is not None:
                return kept
        kept = columns_of(x, columns, dtype)
        readers = len(self.layers) - 1
        shared = readers > 0 and not x.is_inference()  # inference tensors have no version
        self._latest.copy = _Copy(x, columns, kept, readers) if shared else None
        return kept


class _Copy:
    """The columns of one x, and the number of siblings that have not read them yet."""

    __slots__ = ("__weakref__", "address", "columns", "kept", "readers", "stream", "version", "x")

    def __init__(self, x: Tensor, columns: Tensor, kept: Tensor, readers: int) -> None:
        mine = weakref.ref(self)

        def drop(_: object) -> None:
            copy = mine()
            if copy is not None:
                copy.kept = None

        self.x = weakref.ref(x, drop)
        self.version, self.address, self.stream = x._version, x.data_ptr(), _stream(x)
        self.columns = columns
        self.kept: Tensor | None = kept
        self.readers = readers

    def is_of(self, x: Tensor, columns: Tensor, dtype: torch.dtype) -> bool:
        return (
            self.x() is x
            and self.columns is columns
            and self.kept is not None
            and self.kept.dtype == dtype
            and self.version == x._version
            and self.address == x.data_ptr()
            and self.stream == _stream(x)
        )

    def read(self) -> Tensor | None:
        kept = self.kept
        self.readers -= 1
        if self.readers <= 0:
            self.kept = None
        return kept


class _Latest(threading.local):
    copy: _Copy | None = None


def _stream(x: Tensor) -> object:
    """The stream that makes the copy: another stream would have to wait for it.

    Capture counts as a different stream: the replay of a CUDA graph has other values than a copy
    that was made before the capture.
    """
    if not x.is_cuda:
        return None
    return torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()


def _worth_keeping(layers: list[Reader]) -> Tensor | None:
    """The columns that any of the layers chose, or None if x itself is to be saved."""
    wishes = {layer.save_activations for layer in layers}
    if "full" in wishes:  # x is saved anyway, and all share it
        return None
    d_in = layers[0].in_features
    columns = chosen_columns([layer.index for layer in layers], d_in)
    most = d_in - 1 if wishes == {"compact"} else d_in // 2
    return columns if len(columns) <= most else None
