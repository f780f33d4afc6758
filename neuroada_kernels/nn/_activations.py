"""What a layer saves of x for its backward: x itself, or a copy of its chosen columns.

dx needs nothing of x, and the gradient of ``delta`` needs only these columns. Whether a copy saves
memory depends on what else keeps x: the layer's siblings, which read the same x, and the function
that produced it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from neuroada_kernels import functional, ops
from neuroada_kernels._tracing import is_recorded
from neuroada_kernels.config import SAVE_ACTIVATIONS
from neuroada_kernels.nn._siblings import Siblings
from neuroada_kernels.plan import renumber, traceable_columns_of

#: Autograd nodes of views: their result shares the storage of their input.
_VIEWS = {
    f"{name}Backward{number}"
    for name in ("Alias", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose", "UnsafeView")
    for number in (0, 1, 2)
} | {"ExpandBackward0", "UnsqueezeBackward0", "ViewBackward0"}
#: Attributes of an autograd node that hold its saved result.
_RESULTS = ("_saved_result", "_saved_output", "_saved_out")


def check_save_activations(save_activations: str) -> None:
    """Raise ValueError if it is not one of ``SAVE_ACTIVATIONS``."""
    if save_activations not in SAVE_ACTIVATIONS:
        raise ValueError(
            f"save_activations: {save_activations!r}, expected one of {list(SAVE_ACTIVATIONS)}"
        )


def is_kept_by_its_maker(x: Tensor) -> bool:
    """Whether the function that produced x saves it for its own backward, as attention and relu do.

    Views are skipped. Decided by the node's type, so that no saved tensor is unpacked.
    """
    node, number = x.grad_fn, x.output_nr
    while node is not None and type(node).__name__ in _VIEWS:
        node, number = node.next_functions[0]
    return node is not None and number == 0 and any(hasattr(type(node), n) for n in _RESULTS)


def kept_of(
    x: Tensor,
    held: Mapping[str, Tensor | None],
    delta: Tensor,
    siblings: Siblings,
    dtype: torch.dtype | None = None,
    *,
    plain: bool | None = None,
) -> functional.Kept | None:
    """The columns of x to save instead of x, and the index into them; None to save x itself.

    ``held`` has the ``columns`` and ``kept_index`` of the layer that reads x. The copy has the
    dtype ``dtype``, by default autocast's or that of x. ``plain`` is ``ops.is_plain_eager(x)``, if
    the caller has computed it already.
    """
    columns = held["columns"]
    if columns is None or not torch.is_grad_enabled() or columns.device != x.device:
        return None
    plain = ops.is_plain_eager(x) if plain is None else plain
    if not delta.requires_grad or (not plain and functional.is_transformed()):
        return None
    dtype = dtype or functional.autocast_dtype(x) or x.dtype
    if not plain and is_recorded():
        # Siblings share the same columns tensor, so that the compiler can merge their copies.
        return traceable_columns_of(x, columns, dtype), cast(Tensor, held["kept_index"])
    if type(x) not in (Tensor, nn.Parameter) or (dtype == x.dtype and is_kept_by_its_maker(x)):
        return None
    with siblings.lock:
        columns, kept_index = held["columns"], held["kept_index"]
    if columns is None or kept_index is None:
        return None
    return siblings.copy_of(x, columns, dtype), kept_index


class ActivationSaver(nn.Module):
    """The part of a layer that decides what is saved of x.

    Attributes
    ----------
    columns : Tensor or None
        Non-persistent buffer, int32: the columns of x that are saved; None if x itself is.
    kept_index : Tensor or None
        Non-persistent buffer, int32, ``[out_features, k]``: ``index`` into these columns.
    """

    in_features: int
    index: Tensor
    columns: Tensor | None
    kept_index: Tensor | None
    _save_activations = "auto"
    _siblings: Siblings
    _for_compiler: Mapping[str, Tensor | None]

    def _start_saving(self) -> None:
        self.register_buffer("columns", None, persistent=False)
        self.register_buffer("kept_index", None, persistent=False)
        self._siblings = Siblings()
        self._siblings.layers.add(self)
        self._mirror()

    @property
    def save_activations(self) -> str:
        """``"auto"``, ``"full"`` or ``"compact"``: what is saved of x from forward to backward.

        ``"full"`` saves x itself, by reference. ``"compact"`` saves a copy of the columns that the
        layer and its siblings chose, unless they chose all columns. ``"auto"`` copies them if they
        are at most half of x. If x stays alive anyway, saved by a sibling or by the function that
        produced it, it is saved by reference in every mode. Gradients are bitwise the same.

        Raises
        ------
        ValueError
            On setting any other value.
        """
        return self._save_activations

    @save_activations.setter
    def save_activations(self, save_activations: str) -> None:
        check_save_activations(save_activations)
        if save_activations != self._save_activations:
            self._save_activations = save_activations
            self._siblings.settle()

    def join(self, siblings: Siblings) -> None:
        """Join the layers that read the same x; ``siblings.settle()`` has to follow."""
        self._siblings.layers.discard(self)
        siblings.layers.add(self)
        self._siblings = siblings

    def _is_planned(self) -> bool:
        """Whether the index is known to be valid; checks it again if it has changed."""
        return False

    def _keep_columns(self, columns: Tensor | None) -> None:
        kept_index = None if columns is None else renumber(self.index, columns)
        self._buffers["columns"], self._buffers["kept_index"] = columns, kept_index
        self._mirror()

    def _mirror(self) -> None:
        """Mirror the two buffers in a plain dict, since a compiler assumes static buffer shapes.

        Loading an index into a compiled model may change the number of columns.
        """
        self._for_compiler = {name: self._buffers.get(name) for name in ("columns", "kept_index")}

    def _keep(
        self, x: Tensor, dtype: torch.dtype | None = None, *, plain: bool | None = None
    ) -> functional.Kept | None:
        """:func:`kept_of` for the layer's own tensors."""
        delta = self._parameters["delta"]
        assert delta is not None
        compiling = not plain and torch.compiler.is_compiling()
        held = self._for_compiler if compiling else self._buffers
        return kept_of(x, held, delta, self._siblings, dtype, plain=plain)

    def _saving_repr(self) -> str:
        columns, mode = self._buffers.get("columns"), self._save_activations
        kept = "" if columns is None else f", keeps {len(columns)} columns of x"
        return (f", save_activations={mode}" if mode != "auto" else "") + kept

    def _share_columns(self) -> None:
        """Share ``columns`` with siblings again after a move: torch moves layer by layer."""
        mine = self._buffers.get("columns")
        if mine is not None and not mine.is_meta:
            for sibling in list(self._siblings.layers):
                theirs = None if sibling is self else sibling.columns
                if theirs is not None and theirs.device == mine.device and theirs.equal(mine):
                    self._buffers["columns"] = theirs
                    break
        self._mirror()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_siblings" not in state:  # pickled before siblings existed
            self._start_saving()
        self._siblings.layers.add(self)
        self._mirror()
