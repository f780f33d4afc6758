"""The compared variants of adapting, in groups that answer one question each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from neuroada_kernels.benchmarks.quality.settings import Settings

#: The variant that all others are compared with.
OURS = "NeuroAda"


@dataclass(frozen=True)
class Variant:
    """A way to adapt; ``k`` is also the budget of a method that has no k of its own."""

    name: str
    method: str
    k: int
    selection: str = "magnitude"
    neuron_fraction: float = 1.0
    delta_dtype: str = "float32"
    model_dtype: str = "float32"


#: Group to the question that it answers.
QUESTIONS = {
    "methods": "Methods at the same number of trainable parameters",
    "selection": "Which connections of a neuron",
    "k": "Connections per neuron",
    "fraction": "Share of the neurons",
    "dtype": "Dtype of the deltas",
}


def groups(task: str, settings: Settings) -> dict[str, list[Variant]]:
    """The groups of a task; a variant may be in several."""
    ours = Variant(OURS, "neuroada", settings.k)
    found = {
        "methods": [ours, *_methods(settings.k)],
        "selection": [
            ours,
            *(
                replace(ours, name=f"NeuroAda, {selection}", selection=selection)
                for selection in ("gradient", "random", "smallest")
            ),
        ],
    }
    if task == "text":
        found |= {
            "k": [*_every_k(ours, settings), *_lora_at(settings)],
            "fraction": [ours, *_fractions(ours, settings)],
            "dtype": [ours, *_dtypes(ours)],
        }
    return found


def unique(found: dict[str, list[Variant]]) -> list[Variant]:
    """Every variant once, in the order in which they are first named."""
    return list(dict.fromkeys(variant for group in found.values() for variant in group))


def _methods(k: int) -> list[Variant]:
    return [
        Variant("masked, the same connections", "masked", k),
        Variant("masked, largest gradients of a layer", "masked-layer", k, selection="gradient"),
        Variant("LoRA", "lora", k, selection="none"),
        Variant("SHiRA", "shira", k, selection="random"),
        Variant("full fine-tuning", "full", k, selection="none"),
        Variant("frozen", "frozen", k, selection="none"),
    ]


def _every_k(ours: Variant, settings: Settings) -> list[Variant]:
    return [
        ours if k == settings.k else replace(ours, name=f"NeuroAda, k = {k}", k=k)
        for k in settings.every_k
    ]


def _lora_at(settings: Settings) -> list[Variant]:
    return [Variant(f"LoRA, as k = {k}", "lora", k, selection="none") for k in settings.budgets] + [
        Variant("LoRA", "lora", settings.k, selection="none")
    ]


def _fractions(ours: Variant, settings: Settings) -> list[Variant]:
    """Fractions of the neurons, at the same k, and at the k with as many connections."""
    found = []
    for fraction in settings.fractions:
        for k in (ours.k, round(ours.k / fraction)):
            name = f"NeuroAda, {fraction:.0%} of the neurons, k = {k}"
            found.append(replace(ours, name=name, k=k, neuron_fraction=fraction))
    return found


def _dtypes(ours: Variant) -> list[Variant]:
    bfloat16 = "bfloat16"
    return [
        replace(ours, name="bfloat16 deltas", delta_dtype=bfloat16),
        replace(ours, name="bfloat16 model, float32 deltas", model_dtype=bfloat16),
        Variant(
            "bfloat16 model, bfloat16 deltas added to W",
            "authors",
            ours.k,
            delta_dtype=bfloat16,
            model_dtype=bfloat16,
        ),
    ]
