"""The quality suite at sizes that take seconds, and made-up runs."""

from __future__ import annotations

from dataclasses import replace

from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import Run
from neuroada_kernels.benchmarks.quality.variants import OURS
from neuroada_kernels.demo.transformer import Config

QUICK = Settings.quick()
TINY = replace(
    QUICK,
    text=replace(
        QUICK.text,
        model=Config(d_model=16, layers=1, heads=2, d_hidden=32, context=16),
        batch=2,
        windows=4,
        pretrain_steps=5,
        steps=3,
    ),
    digits=replace(QUICK.digits, shifts=("rotated",), width=16, pretrain_steps=10, steps=5),
    rates=(1e-3, 1e-2),
    seeds=2,
    k=2,
    every_k=(1, 2),
    budgets=(),
    fractions=(0.5,),
)
DIGITS = "digits, rotated"


def run_of(part: str, rate: float | None, loss: float | None, **more) -> Run:
    """A made-up run of NeuroAda on text."""
    fields = {"task": "text", "variant": OURS, "seed": 0, "trainable": 1, "accuracy": None}
    return Run(**(fields | {"seconds": 0.0} | more), part=part, rate=rate, loss=loss)
