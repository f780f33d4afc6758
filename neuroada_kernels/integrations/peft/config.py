"""The config of a NeuroAda adapter in PEFT, which saves it beside the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig

#: Selections that need the weight alone; other choices go through ``set_connections``.
SELECTIONS = ("magnitude", "smallest", "random")


@dataclass
class NeuroAdaPeftConfig(PeftConfig):
    """The config of a ``neuroada`` adapter.

    Its fields are those of :class:`neuroada_kernels.NeuroAdaConfig`, with the same meaning, except
    two. ``strategy`` is always ``"bypass"``, since the base's weights serve several adapters. There
    is no ``siblings``: layers are siblings by :data:`neuroada_kernels.siblings.KNOWN` names.

    Parameters
    ----------
    k : int
        Connections per neuron.
    target_modules : str or sequence of str
        Names, their last parts, a regular expression, or ``"all-linear"``.
    exclude_modules : str or sequence of str, optional
        Names, last parts or a regular expression of modules to leave out.
    selection : str
        ``"magnitude"``, ``"smallest"`` or ``"random"``; others by :func:`set_connections`.
    neuron_fraction : float
        Share of the neurons of each module that get bypasses, in (0, 1].
    bias : str
        ``"none"``, or ``"all"``: every bias of the model also trains and is saved.
    delta_dtype : str
        Dtype of the deltas, whatever the model's; neither ``autocast_adapter_dtype`` nor
        ``model.half()`` changes it.
    save_activations : str
        ``"auto"``, ``"full"`` or ``"compact"``: what is kept of x for the backward, decided by all
        active adapters of the layers that read the same x.
    layers : int or sequence of int, optional
        Numbers of the layers to adapt; a module's is the first number in its name.
    seed : int
        Seed of random choices; each module's choice depends on it and on the module's name alone.
    k_pattern : dict of str to int
        Another ``k`` for some modules, by name, last part or regular expression.
    modules_to_save : list of str, optional
        Modules that train in full and are saved, such as a new head.

    Raises
    ------
    TypeError, ValueError
        If a field is not as expected.
    """

    k: int = 1
    target_modules: list[str] | str = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    selection: str = "magnitude"
    neuron_fraction: float = 1.0
    bias: str = "none"
    delta_dtype: str = "float32"
    save_activations: str = "auto"
    layers: list[int] | int | None = None
    seed: int = 0
    k_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.NEUROADA
        settings = self.neuroada
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"selection: {self.selection!r}, expected one of {list(SELECTIONS)}; others choose "
                "with neuroada_kernels.select, and set_connections puts that in"
            )
        self.delta_dtype = str(settings.delta_dtype)
        if not isinstance(self.target_modules, str):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if not isinstance(self.exclude_modules, str | None):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @property
    def neuroada(self) -> NeuroAdaConfig:
        """These fields as the package's own config, checked anew, since PEFT sets fields later."""
        return NeuroAdaConfig(
            k=self.k,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            selection=self.selection,
            neuron_fraction=self.neuron_fraction,
            bias=self.bias,
            delta_dtype=self.delta_dtype,
            save_activations=self.save_activations,
            layers=self.layers,
            seed=self.seed,
            k_pattern=self.k_pattern,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON; sets are sorted, so that equal configs give equal files."""
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in super().to_dict().items()
        }
