"""Which cases a run of the linear suite measures."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace

from neuroada_kernels.benchmarks.options import positive
from neuroada_kernels.testing import MODEL_SHAPES, Case, Shape

#: What ``--sweep`` measures without ``--k`` or ``--tokens``.
SWEEP_K = (1, 2, 4, 8, 16, 32, 64, 128)
SWEEP_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def shape_names(text: str) -> tuple[Shape, ...]:
    """The linears of a model by name, or the one that ``D_INxD_OUT`` says."""
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return (Shape(int(found[1]), int(found[2])),)
    if text not in MODEL_SHAPES:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected D_INxD_OUT or one of {', '.join(MODEL_SHAPES)}"
        )
    return MODEL_SHAPES[text]


def add_cases(parser: argparse.ArgumentParser, tokens: str) -> None:
    """Add the options of :func:`bench_cases`; ``tokens`` describes the default of ``--tokens``."""
    add = parser.add_argument
    add("--cases", nargs="+", metavar="TEXT", help="only cases with one of these in their name")
    add(
        "--shapes",
        nargs="+",
        type=shape_names,
        metavar="NAME",
        help=f"linears of a model ({', '.join(MODEL_SHAPES)}) or one, D_INxD_OUT",
    )
    add("--tokens", nargs="+", type=positive, metavar="T", help=f"default: {tokens}")
    connections = "connections per neuron; default: 1 8 20"
    add("--k", nargs="+", type=positive, metavar="K", help=connections)


def bench_cases(
    known: Sequence[Case],
    *,
    quick: bool = False,
    shapes: Sequence[Shape] | None = None,
    tokens: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
    sweep: str | None = None,
    filters: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of the shared table, at other shapes, tokens or k if given.

    Parameters
    ----------
    known : sequence of Case
        The table of default cases.
    quick : bool
        Square shapes alone, at k = 8.
    shapes, tokens, k : sequence, optional
        Instead of the table's.
    sweep : "k" or "tokens", optional
        Many k at one number of tokens, or the other way round, of the table's first square shape.
    filters : sequence of str, optional
        Only cases with one of these in their name.
    """
    square = [case for case in known if case.d_in == case.d_out]
    if sweep is not None:
        shapes = shapes or [Shape(square[0].d_in, square[0].d_out)]
        k = k or (SWEEP_K if sweep == "k" else [8])
        tokens = tokens or ([square[0].tokens] if sweep == "k" else SWEEP_TOKENS)
    if shapes:
        one = replace(square[0], k=1)
        bases = [replace(one, d_in=s.d_in, d_out=s.d_out, bias=s.bias) for s in shapes]
    else:
        bases = [replace(case, k=1) for case in (square if quick else known)]
    if tokens:
        bases = [replace(base, tokens=count) for base in bases for count in tokens]
    every_k = k or ([8] if quick else dict.fromkeys(case.k for case in known))
    bases = list(dict.fromkeys(bases))
    cases = [replace(base, k=each) for base in bases for each in every_k if each <= base.d_in]
    return [c for c in cases if filters is None or any(text in c.name for text in filters)]
