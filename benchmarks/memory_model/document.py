"""The tables of ``docs/memory.md``, from a results file of ``neuroada bench memory``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neuroada_kernels.benchmarks.memory_model.command import GIB, MIB, PEERS, described, of_a_layer
from neuroada_kernels.benchmarks.records import Row


def validation_table(results: dict[str, Any]) -> str:
    """Measured and predicted, a row for each measurement."""
    rows = [row for row in results["results"] if "measured" in row]
    lines = _table(
        ("model", "tokens", "dtype", "k", "checkpointing", "method"),
        ("at rest, MiB", "step measured", "predicted", "error", "error of peak", "peak at"),
        (
            [
                row["model"],
                str(row["setting"]["batch"] * row["setting"]["sequence"]),
                row["setting"]["dtype"],
                str(row["setting"]["k"]),
                "yes" if row["setting"]["checkpointing"] else "no",
                row["method"],
                f"{row['measured']['at_rest'] / MIB:.2f}",
                f"{row['measured']['step_peak'] / MIB:.2f}",
                f"{row['predicted']['step_peak'] / MIB:.2f}",
                _percent(row["error"]["step_peak"]),
                _percent(row["error"]["peak"]),
                row["predicted"]["at"],
            ]
            for row in rows
        ),
    )
    worst = max(max(abs(row["error"][n]) for n in ("peak", "step_peak")) for row in rows)
    session = results["sessions"][0]
    return (
        f"{lines}\n\n{len(rows)} measurements, the largest error {worst:.2%}; torch "
        f"{session['torch']}, commit {session['commit'][:7]}. `{results['command']}` repeats them."
    )


def headline_table(results: dict[str, Any]) -> str:
    """NeuroAda's peak, and its relative difference from those of the others."""
    groups: dict[str, dict[str, Row]] = {}
    for row in results["results"]:
        if row["part"] == "models":
            groups.setdefault(described(row), {})[row["method"]] = row
    return _table(
        ("model and step",),
        ("neuroada, GiB", *(f"vs {peer}" for peer in PEERS)),
        (
            [title, f"{peak(group['neuroada']) / GIB:.2f}", *_ratios(group)]
            for title, group in groups.items()
        ),
    )


def parts_table(results: dict[str, Any], model: str, k: int, checkpointing: bool) -> str:
    """The parts of a real model's peak, a row for each method."""
    names = ("weights", "trained", "selection", "optimizer")
    names_at_peak = ("peak_gradients", "peak_kept", "peak_scratch", "peak")
    rows = [
        row
        for row in results["results"]
        if row["part"] == "models" and row["model"] == model and row["setting"]["k"] == k
    ]
    rows = [row for row in rows if row["setting"]["checkpointing"] == checkpointing]
    return _table(
        (f"{described(rows[0])}, GiB",),
        (
            *("weights", "trained", "selection", "optimizer", "gradients", "saved", "scratch"),
            *("peak", "held per layer", "saved per layer"),
        ),
        (
            [
                row["method"],
                *(f"{row['predicted'][name] / GIB:.2f}" for name in (*names, *names_at_peak)),
                *(f"{nbytes / GIB:.3f}" for nbytes in of_a_layer(row)),
            ]
            for row in rows
        ),
    )


def peak(row: Row) -> int:
    predicted: int = row["predicted"]["peak"]
    return predicted


def _ratios(group: dict[str, Row]) -> list[str]:
    return [_percent(peak(group["neuroada"]) / peak(group[peer]) - 1, 0) for peer in PEERS]


def _percent(ratio: float, digits: int = 2) -> str:
    return f"{ratio:+.{digits}%}".replace("-", "−")


def _table(left: Iterable[str], right: Iterable[str], rows: Iterable[list[str]]) -> str:
    left, right = list(left), list(right)
    lines = [
        "| " + " | ".join([*left, *right]) + " |",
        "|" + "---|" * len(left) + "---:|" * len(right),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables by the names of the document's markers."""
    return {
        "validation": validation_table(results),
        "headline": headline_table(results),
        "parts": parts_table(results, "Llama-3-8B", 20, False),
        "parts with checkpointing": parts_table(results, "Llama-3-8B", 20, True),
    }
