"""Writes the tables of docs/quality.md from a results file of ``neuroada bench quality --json``.

python -m neuroada_kernels.benchmarks.quality.document \
benchmarks/results/cpu/quality.json docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import Store, Suite
from neuroada_kernels.benchmarks.quality.summary import Group, Interval, Row, summarise

BEGIN, END = "<!-- quality tables -->", "<!-- end of quality tables -->"
HEADINGS = ("", "trainable", "rate", "held-out loss", "minus NeuroAda's", "")


def load(path: Path) -> Suite:
    """The suite whose runs a results file holds.

    Raises
    ------
    ValueError
        If it holds no runs of the suite.
    """
    settings = Settings.from_dict(json.loads(path.read_text())["settings"])
    return Suite(settings, Store.open(settings, path))


def cells(row: Row, baseline: Row) -> list[str]:
    """A row of the table: numbers with their intervals' half widths."""
    edge = " (edge)" if row.at_edge else ""
    budget = row.trainable / baseline.trainable - 1 if baseline.trainable else 0.0
    share = f" ({budget:+.1%})" if row.trainable and row.trainable != baseline.trainable else ""
    found = [
        row.variant,
        f"{row.trainable:,}{share}",
        "–" if row.rate is None else f"{row.rate:g}{edge}",
        spread(row.loss),
        "" if row.difference is None else spread(row.difference, signed=True),
        row.verdict,
    ]
    return found if row.accuracy is None else [*found, spread(row.accuracy, percent=True)]


def spread(interval: Interval | None, signed: bool = False, percent: bool = False) -> str:
    """The mean and half the width of its interval, or that training diverged."""
    if interval is None:
        return "diverged"
    scale, digits = (100, 1) if percent else (1, 4)
    sign = "+" if signed else ""
    mean = round(scale * interval.mean, digits) + 0.0  # -0.0 becomes 0.0
    text = f"{mean:{sign}.{digits}f}"
    if math.isfinite(interval.half):
        text += f" ± {scale * interval.half:.{digits}f}"
    return text + " %" * percent


def headings(group: Group) -> list[str]:
    """Of the columns that :func:`cells` fills."""
    with_accuracy = any(row.accuracy is not None for row in group.rows)
    return [*HEADINGS, *(["accuracy"] if with_accuracy else [])]


def baseline(group: Group) -> Row:
    """NeuroAda's row, with which the others' budgets are compared."""
    return next((row for row in group.rows if row.variant == "NeuroAda"), group.rows[0])


def markdown(groups: Sequence[Group]) -> str:
    """A table for every group."""
    lines: list[str] = []
    for group in groups:
        names = headings(group)
        lines += [f"### {group.task}: {group.question}", ""]
        lines += ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
        base = baseline(group)
        lines += ["| " + " | ".join(cells(row, base)) + " |" for row in group.rows]
        lines += ["", f"Loss in {group.unit}.", ""]
    return "\n".join(lines).strip()


def described(store: Store) -> str:
    """Of what size the runs were and where they ran, in a sentence."""
    settings, session = Settings.from_dict(store.settings), store.sessions[-1]
    model = settings.text.model
    commit = (session["commit"] or "unknown")[:7]
    return (
        f"Intervals: Student's t, 95 %, over {settings.seeds} seeds; differences are paired by "
        f"seed. Each learning rate is the best of {len(settings.rates)} on validation data. Text: "
        f"{model.layers} layers of width {model.d_model}, {settings.text.pretrain_steps} steps of "
        f"pretraining and {settings.text.steps} of adapting with {settings.text.batch} windows of "
        f"{model.context} bytes. Digits: an MLP of width {settings.digits.width}, "
        f"{settings.digits.steps} steps on {settings.digits.images} images. {len(store.runs)} "
        f"runs, {session['cpu']}, torch {session['torch']}, commit {commit}."
    )


def main(argv: list[str] | None = None) -> int:
    """Replace what stands between the page's two markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args(argv)
    text = options.page.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"page: {options.page} has no {BEGIN} and {END}")
    suite = load(options.results)
    new = f"{BEGIN}\n{described(suite.store)}\n\n{markdown(summarise(suite))}\n{END}"
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    options.page.write_text(re.sub(pattern, lambda _: new, text, count=1, flags=re.DOTALL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
