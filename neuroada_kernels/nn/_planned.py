"""Layers that plan their index for the backward, and plan it again when it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuroada_kernels._tracing import unrecorded
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.plan import Planned, checksum, is_plan_of, is_wrapped, make_plan


class PlannedLayer(BypassLayer):
    """A layer that keeps its plan: see :mod:`neuroada_kernels.plan`.

    Loading and setting the index plan immediately, since a compiled forward cannot. An index that
    was written in place, copied or moved is detected by the next forward that is not compiled.
    """

    plan: Tensor
    _planned = Planned()  # identity of the index that the plan is of
    _plan_checksum: int | None = None  # of the plan when it was made; inherited by copies
    _plan_facts: tuple[str, ...] = ("_planned", "_plan_checksum")

    def _make_plan(self) -> None:
        self._plan()
        if self in self._siblings.layers:  # false in a DataParallel replica
            self._siblings.settle()

    def _plan(self) -> None:
        if self.index.is_meta:
            plan, self._planned = self.index.new_empty(0), Planned()
        else:
            # An inference tensor cannot be saved for a backward.
            with torch.inference_mode(False), torch.no_grad():
                plan, self._planned = self._plan_of(self.index), Planned(self.index)
                if self._is_held(plan):  # a trace knows the tensor that was there when it began
                    plan = self.plan
        self.register_buffer("plan", plan, persistent=False)
        self._plan_checksum = checksum(plan)

    def _is_held(self, plan: Tensor) -> bool:
        """Whether the layer has the same plan already, as a copied or moved layer may."""
        held = self._buffers.get("plan")
        return (
            held is not None
            and not held.is_inference()
            and held.device == plan.device
            and torch.equal(held, plan)
        )

    def _plan_of(self, index: Tensor) -> Tensor:
        return make_plan(index, self.in_features)

    def _has_plan_of(self, index: Tensor) -> bool:
        """Whether the plan is one of ``index``, in any order of entries: a GPU uses its own."""
        return is_plan_of(self.plan, index, self.in_features)

    def _check_not_averaged(self) -> None:
        """Raise if a moving average of all buffers has been written into the layer's buffers.

        AveragedModel truncates the averaged index to integers: other connections. Nothing
        else writes into a plan, so a changed checksum of the plan reveals it. A plan that fits the
        index is accepted, since DistributedDataParallel broadcasts the two together.
        """
        known, plan = self._plan_checksum, self.plan
        if known is None or self.index.is_meta or checksum(plan) in (None, known):
            return
        try:
            fits = self._has_plan_of(self.index)
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise RuntimeError(
                "index: was averaged, with all buffers, into one of other connections; expected "
                "AveragedModel(model, use_buffers=False), which averages delta alone"
            )

    def _replan(self) -> None:
        """Check and plan an index that was replaced, written in place, copied or moved.

        Skips an index that a transform has wrapped, as ``vmap`` over several layers does.
        """
        self._check_index_device(self.index)
        if not is_wrapped(self.index):
            self._check_not_averaged()
            self._leave_other_index()
            self._check_index(self.index)
            self._make_plan()

    def _leave_other_index(self) -> None:
        """Restore W if it is patched by another index than the layer's, or may not be resident.

        Otherwise W stays patched: a copied or moved layer is planned in its first forward, while
        other threads may be in their own.
        """
        patched = self.merged_index
        captured = self.index.is_cuda and torch.cuda.is_current_stream_capturing()
        if (
            patched is None
            or captured
            or patched.device != self.index.device
            or self._why_not_resident() is not None
            or not torch.equal(patched, self.index)
        ):
            self._leave_resident()

    def _is_planned(self) -> bool:
        if self.index.is_meta or self._disabled:
            return False
        if not self._planned.is_still(self.index):
            try:
                self._check_not_averaged()
                self._check_index(self.index)
            except (TypeError, ValueError, RuntimeError):
                return False  # the layer's own forward raises it
            self._leave_other_index()
            self._plan()
            self._resume()
        return True

    def _follow_index(self, index: Tensor) -> None:
        """Plan again if ``index``, the layer's own, is not the one that was planned."""
        # A replica's index and plan are copies of the layer's.
        if not self._planned.is_still(index) and not self._is_replica:
            with self._siblings.lock, unrecorded():  # only one of several threads plans
                if not self._planned.is_still(self.index):
                    self._replan()

    def check_selected(self) -> None:
        super().check_selected()
        self._check_not_averaged()

    def unmerge(self) -> None:
        self._check_not_averaged()
        super().unmerge()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._planned = Planned()
        self._plan_checksum = checksum(self.plan)  # differs if memory has no values yet
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self._check_not_averaged()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "index" in state_dict and self._deferred is None:
            self._plan_checksum = None  # the old plan is not checked any more
            self._follow_index(self.index)
            self._resume()  # a compiled forward cannot

    def __setattr__(self, name: str, value: Any) -> None:
        if self._put_into_replica(name, value):
            return
        super().__setattr__(name, value)
        if name == "index" and "plan" in self._buffers:
            self._make_plan()
