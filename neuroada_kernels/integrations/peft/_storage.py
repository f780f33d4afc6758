"""What an adapted layer stores per adapter: delta, index, and what is derived from the index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from neuroada_kernels import functional
from neuroada_kernels.nn._activations import kept_of
from neuroada_kernels.nn._layer import uncast
from neuroada_kernels.nn._siblings import Siblings
from neuroada_kernels.plan import Planned, check_index, is_wrapped, make_plan, renumber


class DeltaDict(nn.ParameterDict):
    """``delta [d_out, k]`` by adapter; ``model.half()`` does not cast it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(uncast(fn), recurse)  # type: ignore[no-untyped-call]


class Connections:
    """What is derived from an adapter's index in a layer: its plan, and what is kept of x.

    It is a reader of :class:`Siblings`: adapters of a layer read the same x, and so do those of
    sibling layers.
    """

    def __init__(self, in_features: int, siblings: Siblings) -> None:
        self.in_features = in_features
        self.siblings = siblings
        self.save_activations = "auto"
        self.index = torch.empty(0, 1, dtype=torch.int32, device="meta")
        self.plan: Tensor | None = None
        self.held: dict[str, Tensor | None] = {"columns": None, "kept_index": None}
        self._planned = Planned()  # which index the plan was made for
        self.reads = False  # whether the adapter is active, and so reads x

    @property
    def columns(self) -> Tensor | None:
        return self.held["columns"]

    def follow(self, index: Tensor) -> None:
        """Replan if ``index`` is another tensor, or was written in place since.

        Raises
        ------
        TypeError, ValueError
            If ``index`` is not valid.
        """
        if self._planned.is_still(index):
            return
        self.index = index
        if index.is_meta:
            self.plan, self._planned = None, Planned()
        else:
            self._plan()
        self._keep_columns(None)
        if self.reads:
            self.siblings.settle()

    def _plan(self) -> None:
        check_index(self.index, self.in_features)
        # A plan made in inference mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            self.plan = make_plan(self.index, self.in_features)
        self._planned = Planned(self.index)

    def read(self, reads: bool) -> None:
        """Join or leave the readers that decide what is kept of x."""
        if reads != self.reads:
            self.reads = reads
            self.join(self.siblings)
            self._keep_columns(None)
            self.siblings.settle()

    def join(self, siblings: Siblings) -> None:
        """Move to ``siblings``; the caller has to call ``settle`` afterwards."""
        self.siblings.layers.discard(self)
        self.siblings = siblings
        if self.reads:
            siblings.layers.add(self)

    def _is_planned(self) -> bool:
        if self.index.is_meta:
            return False
        if not self._planned.is_still(self.index):
            try:
                self._plan()
            except (TypeError, ValueError):
                return False  # its own forward raises the error
        return True

    def _keep_columns(self, columns: Tensor | None) -> None:
        kept_index = None if columns is None else renumber(self.index, columns)
        with self.siblings.lock:
            self.held.update(columns=columns, kept_index=kept_index)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.join(self.siblings)


class IndexDict(BufferDict):
    """``index [d_out, k]`` by adapter: persistent buffers, so that they are saved with delta.

    Each has a plan (see :mod:`neuroada_kernels.plan`), made when the index is set, loaded or
    moved, since a compiled forward cannot make it. The next eager forward replans an index that
    was written in place. The same holds for the columns of x that are kept for it.
    """

    def __init__(self, d_in: int) -> None:
        super().__init__(persistent=True)
        self._d_in = d_in
        self._siblings = Siblings()
        self._known: dict[str, Connections] = {}

    def add(self, adapter: str, index: Tensor, save_activations: str) -> None:
        """Add an adapter's index; ``save_activations`` says what it keeps of x."""
        self[adapter] = index
        self._known[adapter].save_activations = save_activations

    def save_activations(self, adapter: str) -> str:
        """What an adapter keeps of x for its backward."""
        return self._known[adapter].save_activations

    def plan(self, adapter: str) -> Tensor | None:
        """The plan of an adapter's index; None if the index has no readable values."""
        if not torch.compiler.is_compiling():
            if is_wrapped(self[adapter]):
                return None
            self._update(adapter)
        return self._known[adapter].plan

    def keep(
        self, adapter: str, x: Tensor, delta: Tensor, dtype: torch.dtype | None = None
    ) -> functional.Kept | None:
        """What an adapter keeps of x, see :func:`kept_of`; its index has to be planned already."""
        known = self._known[adapter]
        return kept_of(x, known.held, delta, known.siblings, dtype)

    def activate(self, adapters: Sequence[str]) -> None:
        """Keep of x what these adapters need, and nothing for the others."""
        for adapter, known in self._known.items():
            known.read(adapter in adapters)

    def join(self, siblings: Siblings) -> None:
        """Move all adapters to ``siblings``; the caller has to call ``settle`` afterwards."""
        self._siblings = siblings
        for known in self._known.values():
            known.join(siblings)

    def _update(self, adapter: str) -> None:
        self._known[adapter].follow(self[adapter])

    def _check(self, index: Tensor) -> None:
        if not index.is_meta:
            check_index(index, self._d_in)

    def __setitem__(self, adapter: str, index: Tensor) -> None:
        self._check(index)
        super().__setitem__(adapter, index)
        self._known.setdefault(adapter, Connections(self._d_in, self._siblings))
        self._update(adapter)

    def __setattr__(self, name: str, value: Any) -> None:
        is_index = name in self.__dict__.get("_buffers", ())  # as loading with assign=True sets it
        if is_index:
            self._check(value)
        super().__setattr__(name, value)
        if is_index:
            self._update(name)

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self._known.pop(adapter).read(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(uncast(fn), recurse)
        for adapter in self:
            with suppress(ValueError):  # after to_empty: values are loaded later, see plan
                self._update(adapter)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, after checking every incoming index."""
        errors: list[str] = args[-1]
        incoming = [name for name in self if prefix + name in state_dict]
        for name in incoming:
            try:
                self._check(state_dict[prefix + name])
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}{name}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in incoming:
            self._update(name)
