"""The configuration of an adaptation: validated, comparable, serializable as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch

from neuroada_kernels._dtypes import FLOATING, NAMES, name_of
from neuroada_kernels.selection import METHODS

ALL_LINEAR = "all-linear"
SELECTIONS = (*METHODS, "gradient")
BIASES = ("none", "all")
STRATEGIES = ("bypass", "resident", "auto")
SAVE_ACTIVATIONS = ("auto", "full", "compact")


@dataclass(frozen=True)
class NeuroAdaConfig:
    """The arguments of :func:`neuroada_kernels.adapt` except tensors and functions.

    Lists become tuples, and dtypes their names, so that equivalent configs compare equal.

    Parameters
    ----------
    k : int
        Connections per neuron.
    target_modules : str or sequence of str
        As in PEFT: a list of names, or of their last parts (``"q_proj"`` matches
        ``"layers.0.attn.q_proj"``); or a regular expression that matches whole names; or
        ``"all-linear"``, every linear, including quantised ones and ``Conv1D``, except the output
        head that ``get_output_embeddings()`` returns, if any.
    exclude_modules : str or sequence of str, optional
        Names, last parts or a regular expression of the modules to leave out.
    selection : str
        ``"magnitude"``, ``"smallest"``, ``"random"``, ``"scores"`` as in
        :func:`neuroada_kernels.select`, or ``"gradient"``: the largest gradients over given data.
    neuron_fraction : float
        Fraction of the neurons of each module that get bypasses, in (0, 1].
    bias : str
        ``"none"``, or ``"all"``: every parameter of the model that is a bias trains too.
    delta_dtype : str or torch.dtype
        Dtype of the deltas.
    strategy : str
        ``"bypass"``, ``"resident"`` or ``"auto"``, see :class:`NeuroAdaLinear`. ``"resident"``
        raises if another module reads a weight, as with tied embeddings; ``"auto"`` leaves such
        layers at ``"bypass"`` and makes the others ``"resident"``. The default is ``"bypass"``,
        which is exact: ``"resident"`` writes ``W + delta``, rounded to the weight's dtype.
    save_activations : str
        ``"auto"``, ``"full"`` or ``"compact"``, see :class:`NeuroAdaLinear`.
    siblings : sequence of sequences of str, optional
        Modules that read the same x, so that they share the saved columns of x: groups of names
        or last parts; modules whose names differ only in that part form a group. By default
        :data:`neuroada_kernels.siblings.KNOWN`; an empty list disables sharing.
    layers : int or sequence of int, optional
        Numbers of the layers to adapt; a module's layer is the first number in its name.
    seed : int
        Seed of random choices; each module's choice depends only on it and on the module's name.
    k_pattern : mapping of str to int
        Another ``k`` for some modules, by name, last part or regular expression; the first match
        applies.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as expected.
    """

    k: int = 1
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    selection: str = "magnitude"
    neuron_fraction: float = 1.0
    bias: str = "none"
    delta_dtype: str | torch.dtype = "float32"
    strategy: str = "bypass"
    save_activations: str = "auto"
    siblings: Sequence[Sequence[str]] | None = None
    layers: int | Sequence[int] | None = None
    seed: int = 0
    k_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._set("k", _checked_k("k", self.k))
        self._set("target_modules", _names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            self._set("exclude_modules", _names("exclude_modules", self.exclude_modules))
        _check_choice("selection", self.selection, SELECTIONS)
        if not _is_number(self.neuron_fraction):
            raise TypeError(f"neuron_fraction: {self.neuron_fraction!r}, expected a number")
        if not 0 < self.neuron_fraction <= 1:
            raise ValueError(f"neuron_fraction: {self.neuron_fraction}, expected a share in (0, 1]")
        self._set("neuron_fraction", float(self.neuron_fraction))
        _check_choice("bias", self.bias, BIASES)
        self._set("delta_dtype", _dtype_name(self.delta_dtype))
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("save_activations", self.save_activations, SAVE_ACTIVATIONS)
        if self.siblings is not None:
            self._set("siblings", _groups("siblings", self.siblings))
        if self.layers is not None:
            if not isinstance(self.layers, Integral | Sequence):
                raise TypeError(f"layers: {self.layers!r}, expected numbers of layers")
            layers = tuple(self.layers) if isinstance(self.layers, Sequence) else (self.layers,)
            if not layers or not all(_is_integer(n) and n >= 0 for n in layers):
                raise ValueError(f"layers: {self.layers!r}, expected numbers of layers")
            self._set("layers", tuple(map(int, layers)))
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed!r}, expected an integer from 0 to 2^63 - 1")
        self._set("seed", int(self.seed))
        if not isinstance(self.k_pattern, Mapping):
            raise TypeError(f"k_pattern: {self.k_pattern!r}, expected k by name")
        for name in self.k_pattern:
            if not isinstance(name, str):
                raise TypeError(f"k_pattern: {name!r}, expected a name or a regular expression")
            _names("k_pattern", name)
            _names("k_pattern", _ending_in(name))
        checked = {n: _checked_k(f"k_pattern[{n!r}]", k) for n, k in self.k_pattern.items()}
        self._set("k_pattern", checked)

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def torch_delta_dtype(self) -> torch.dtype:
        """``delta_dtype`` as a ``torch.dtype``."""
        dtype: torch.dtype = getattr(torch, str(self.delta_dtype))
        return dtype

    def k_of(self, name: str) -> int:
        """The ``k`` of the module with that name."""
        return next(
            (k for pattern, k in self.k_pattern.items() if self.k_matches(pattern, name)), self.k
        )

    @staticmethod
    def k_matches(pattern: str, name: str) -> bool:
        """Whether a key of ``k_pattern`` matches the module with that name."""
        return matches(name, (pattern,)) or matches(name, _ending_in(pattern))

    def generator_of(self, name: str) -> torch.Generator | None:
        """The generator for random choices in the named module, None if none are random."""
        if self.selection != "random" and self.neuron_fraction == 1:
            return None
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: lists, strings and numbers."""
        return {name: _as_json(value) for name, value in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NeuroAdaConfig:
        """The config that :meth:`to_dict` wrote; missing keys take their defaults.

        Raises
        ------
        TypeError, ValueError
            If a key is unknown, or a value is not as expected.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values: {type(values).__name__}, expected a mapping")
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"config: unknown {unknown}, expected of {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> NeuroAdaConfig:
        """The config that :meth:`to_json` wrote; raises as :meth:`from_dict` does."""
        return cls.from_dict(json.loads(text))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a regular expression matches the whole name, or an item of a list its last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _ending_in(pattern: str) -> str:
    """The regular expression of names whose last parts match ``pattern``."""
    return rf"(?:.*\.)?(?:{pattern})"


def _names(argument: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{argument}: {value!r} is no regular expression: {error}") from error
        if value:
            return value
    elif isinstance(value, Sequence | set | frozenset):
        names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"{argument}: {value!r}, expected names")
        if names and all(names):
            return names
    else:
        raise TypeError(f"{argument}: {value!r}, expected names or a regular expression")
    raise ValueError(f"{argument}: {value!r}, expected at least one name, and none empty")


def _groups(argument: str, value: object) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{argument}: {value!r}, expected groups of names")
    for group in value:
        if isinstance(group, str):
            raise TypeError(f"{argument}: {group!r}, expected a group of names")
    return tuple(tuple(_names(argument, group)) for group in value)


def _as_json(value: object) -> object:
    return [_as_json(entry) for entry in value] if isinstance(value, tuple) else value


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: {value!r}, expected one of {list(choices)}")


def _checked_k(argument: str, k: object) -> int:
    if not _is_integer(k):
        raise TypeError(f"{argument}: {k!r}, expected an integer")
    if k < 1:
        raise ValueError(f"{argument}: {k}, expected at least 1")
    return int(k)


def _dtype_name(dtype: object) -> str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in FLOATING:
        raise TypeError(f"delta_dtype: {dtype}, expected {NAMES}")
    return name_of(found)


def _is_integer(value: object) -> TypeGuard[int]:
    """Also NumPy's; not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
