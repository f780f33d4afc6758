"""Sizes of the suite: full, and a smaller quick one with the same procedure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from neuroada_kernels.demo.transformer import Config


@dataclass(frozen=True)
class TextSettings:
    """A Llama over bytes, pretrained on documentation and adapted to Python source."""

    model: Config
    batch: int
    source_bytes: int
    windows: int  # of each held-out part
    pretrain_steps: int
    pretrain_rate: float
    steps: int


@dataclass(frozen=True)
class DigitsSettings:
    """An MLP on scikit-learn's digits, adapted to shifted ones."""

    width: int
    shifts: tuple[str, ...]
    images: int  # to adapt on
    held_out: int  # to choose the learning rate on; the rest is tested on
    batch: int
    pretrain_images: int
    pretrain_steps: int
    pretrain_rate: float
    steps: int


@dataclass(frozen=True)
class Settings:
    """``k`` is that of the comparisons at an equal budget; every method searches ``rates``."""

    text: TextSettings
    digits: DigitsSettings
    rates: tuple[float, ...]
    seeds: int
    k: int
    every_k: tuple[int, ...]
    budgets: tuple[int, ...]  # other k, at which LoRA is compared too
    fractions: tuple[float, ...]

    @classmethod
    def full(cls) -> Settings:
        """About half an hour on two cores."""
        return cls(
            text=TextSettings(
                model=Config(d_model=128, layers=3, heads=4, d_hidden=256, context=96),
                batch=8,
                source_bytes=1 << 21,
                windows=192,
                pretrain_steps=800,
                pretrain_rate=3e-3,
                steps=120,
            ),
            digits=DigitsSettings(
                width=128,
                shifts=("rotated", "inverted", "noisy"),
                images=200,
                held_out=250,
                batch=32,
                pretrain_images=800,
                pretrain_steps=300,
                pretrain_rate=3e-3,
                steps=300,
            ),
            rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            seeds=5,
            k=8,
            every_k=(1, 2, 4, 8, 16, 32, 64),
            budgets=(2, 32),
            fractions=(0.5, 0.25),
        )

    @classmethod
    def quick(cls) -> Settings:
        """A few minutes on two cores: smaller models, fewer steps and seeds."""
        full = cls.full()
        return replace(
            full,
            text=TextSettings(
                model=Config(d_model=64, layers=2, heads=4, d_hidden=128, context=48),
                batch=8,
                source_bytes=1 << 21,
                windows=192,
                pretrain_steps=600,
                pretrain_rate=5e-3,
                steps=50,
            ),
            digits=replace(full.digits, width=64, steps=200),
            rates=(5e-4, 2e-3, 5e-3, 1.25e-2, 3e-2, 8e-2, 0.2),
            seeds=3,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings for JSON: lists instead of tuples."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The settings that :meth:`as_dict` wrote.

        Raises
        ------
        TypeError
            If a setting is missing or unknown.
        """
        text, digits = dict(values["text"]), _tuples(values["digits"])
        text["model"] = Config(**text["model"])
        parts = {"text": TextSettings(**text), "digits": DigitsSettings(**digits)}
        return cls(**(_tuples(values) | parts))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
