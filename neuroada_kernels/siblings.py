"""Which layers of a model read the same x, so that they share one copy of its columns.

A wrong guess costs only memory: a copy is looked up by the x tensor that it was made of, so a
layer that reads another x makes its own copy, of more columns than it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from neuroada_kernels._models import layers_in
from neuroada_kernels.config import NeuroAdaConfig, matches
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn._siblings import Siblings

#: Names of the query, key and value projections of attention in current models.
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_GATED = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("gate", "up"))
#: Groups of names whose modules, under one parent, read the same x.
KNOWN: tuple[tuple[str, ...], ...] = (*_ATTENTION, *_GATED)
#: Substrings of a parent's name that mark cross-attention: q reads another x than k and v.
_CROSS = ("cross", "encoder_attn", "encdec", "attn2")


def set_save_activations(
    model: nn.Module, save_activations: str, siblings: Sequence[Sequence[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Set what every NeuroAda layer of ``model`` saves of x, and which layers share it.

    Parameters
    ----------
    model : nn.Module
        With layers from :func:`neuroada_kernels.adapt`.
    save_activations : str
        ``"auto"``, ``"full"`` or ``"compact"``, see ``NeuroAdaLinear.save_activations``.
    siblings : sequence of sequences of str, optional
        As in :class:`neuroada_kernels.NeuroAdaConfig`.

    Returns
    -------
    tuple of tuples of str
        The names of the layers that read the same x, group by group.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as expected, if a name of ``siblings`` matches nothing, or ``model``
        has no layer; no layer changes then.
    """
    siblings = NeuroAdaConfig(save_activations=save_activations, siblings=siblings).siblings
    layers = layers_in(model)
    check_siblings(layers, siblings)
    for layer in layers.values():
        layer.save_activations = save_activations
    return link_siblings(model, siblings)


def check_siblings(names: Iterable[str], siblings: Sequence[Sequence[str]] | None) -> None:
    """Raise ValueError if a name of ``siblings`` matches no adapted module."""
    adapted = list(names)
    for group in siblings or ():
        for end in group:
            if not any(matches(name, (end,)) for name in adapted):
                raise ValueError(f"siblings: {end!r} matches no module that is adapted")


class Sibling(Protocol):
    """A layer that can share its saved columns of x."""

    in_features: int

    def join(self, siblings: Siblings) -> None: ...


def link_siblings(
    model: nn.Module, siblings: Sequence[Sequence[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Link the layers that read the same x; returns the names of each group."""
    return link({n: m for n, m in model.named_modules() if isinstance(m, BypassLayer)}, siblings)


def link(
    layers: Mapping[str, Sibling], siblings: Sequence[Sequence[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """:func:`link_siblings` for layers by their names in the model."""
    groups: dict[tuple[int, str, int], list[str]] = {}
    for name, layer in layers.items():
        number, parent = _group_of(name, siblings)
        if number is not None:
            groups.setdefault((number, parent, layer.in_features), []).append(name)
    found = tuple(tuple(names) for names in groups.values() if len(names) > 1)
    alone = layers.keys() - {name for names in found for name in names}
    for names in (*found, *((name,) for name in alone)):
        together = Siblings()
        for name in names:
            layers[name].join(together)
        together.settle()
    return found


def _group_of(name: str, siblings: Sequence[Sequence[str]] | None) -> tuple[int | None, str]:
    """The number of the first group that matches ``name``, and the part of it before the match."""
    for number, group in enumerate(KNOWN if siblings is None else siblings):
        for end in group:
            if matches(name, (end,)):
                parent = name.removesuffix(end)
                if siblings is None and group in _ATTENTION and _is_cross(parent):
                    return (None if end == group[0] else number), parent
                return number, parent
    return None, ""


def _is_cross(parent: str) -> bool:
    last = parent.rstrip(".").rpartition(".")[2].lower()
    return any(word in last for word in _CROSS)
