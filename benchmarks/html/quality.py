"""What methods reach at equal budgets: means over seeds with intervals, and loss against budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import Painter, draw
from neuroada_kernels.benchmarks.html.plots import (
    Dot,
    Series,
    Style,
    dots,
    legend,
    lines,
    rows_height,
    styles,
)
from neuroada_kernels.benchmarks.html.source import Source, with_variables
from neuroada_kernels.benchmarks.html.tables import Table

Group = Mapping[str, Any]
#: The suite's name of the method that the others are compared with.
OURS = "NeuroAda"
#: Wording of older files to the present one.
_REWORDED = {"bits a byte": "bits per byte", "Connections a neuron": "Connections per neuron"}
HEADINGS = ("", "trainable", "rate", "held-out loss", "minus NeuroAda's", "")


def section(source: Source) -> Section:
    """A figure and a table for every question on every task."""
    document = framed(source.document)
    found = Section("Quality at equal budgets", described(document))
    if "summary" not in document:
        found.blocks.append("<p>The suite was stopped before its end; its command resumes it.</p>")
    for question, groups in _by_question(groups_of(document)).items():
        if groups[0]["name"] == "k":
            found.blocks += [_budgets(source, group) for group in groups]
        else:
            found.blocks.append(_differences(source, question, groups))
        tables = [table(group) for group in groups]
        found.blocks.append(blocks.folded(source, f"Tables: {question}", tables))
    found.blocks += blocks.skipped(document.get("summary", {}).get("skipped", {}))
    return found


def framed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document in the common frame, unchanged if it already has that.

    In older files ``runs`` without keys were ``results``, and ``skipped`` was beside ``summary``.
    """
    if document.get("kind") == "quality":
        return dict(document)
    groups, skipped = document["summary"], document["skipped"]
    return {
        "kind": "quality",
        "command": "neuroada bench quality",
        "settings": document["settings"],
        "sessions": document["sessions"],
        "results": [{"key": run_key(run), **run} for run in document["runs"]],
        **({"summary": {"groups": groups, "skipped": skipped}} if groups else {}),
    }


def run_key(run: Mapping[str, Any]) -> str:
    """The key of a training's row."""
    return "/".join(str(run[name]) for name in ("task", "variant", "part", "rate", "seed"))


def groups_of(document: Mapping[str, Any]) -> list[Group]:
    """The groups of the summary, in the order of tasks; none before the suite's end."""
    groups = framed(document).get("summary", {}).get("groups", ())
    return [
        {**g, **{n: _REWORDED.get(g[n], g[n]) for n in ("unit", "question") if n in g}}
        for g in groups
    ]


def _by_question(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group["question"], []).append(group)
    return found


def _differences(source: Source, question: str, groups: list[Group]) -> str:
    """Paired differences: seeds differ more from one another than methods do."""
    panels = []
    for group in groups:
        shown = differences(group)
        paint = difference_dots(group, shown)
        name, label = (
            f"{source.name} {group['task']} {group['name']}",
            f"{group['task']}: {question}",
        )
        svg = draw(name, label, paint, height=rows_height(len(shown)))
        panels.append((group["task"], svg))
    note = (
        f"Held-out loss minus {OURS}'s, paired by seed, with 95 % intervals: what lies left of the "
        "dashed line is better, and an interval that crosses it is even."
    )
    found: str = blocks.figure(source, question, panels, note=note)
    return found


def differences(group: Group) -> list[Dot]:
    """Held-out loss minus NeuroAda's, of each variant that has one.

    Frozen and diverged runs are only in the tables: frozen would hide the differences.
    """
    rows = [r for r in group["rows"] if r["difference"] is not None and r["method"] != "frozen"]
    looks = styles(_family(row) for row in group["rows"])
    return [
        Dot(r["variant"], r["difference"]["mean"], _sides(r["difference"]), looks[_family(r)])
        for r in rows
    ]


def difference_dots(group: Group, shown: list[Dot]) -> Painter:
    """Paints :func:`differences`."""
    painter: Painter = dots(shown, f"loss minus {OURS}'s, {group['unit']}", reference=0)
    return painter


def _family(row: Mapping[str, Any]) -> str:
    """The method of a variant, which sets its style."""
    return str(row["method"])


def _budgets(source: Source, group: Group) -> str:
    """Loss against trained parameters, a line for each method that has several budgets."""
    series = budgets(group)
    title = f"Quality against budget, {group['task']}"
    panel = draw(f"{source.name} budgets {group['task']}", title, budget_lines(group, series))
    shown = {one.label: one.style for one in series}
    note = (
        "Means and 95 % intervals over seeds; less is better. k is 1, 2, 4 and so on for NeuroAda."
    )
    panels = [(group["task"], panel)]
    found: str = blocks.figure(source, title, panels, legend=legend(shown), note=note)
    return found


def budgets(group: Group) -> list[Series]:
    """Losses over trained parameters, for each method with several budgets."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in group["rows"]:
        if row["loss"] is not None:
            by_method.setdefault(row["method"], []).append(row)
    by_method = {name: rows for name, rows in by_method.items() if len(rows) > 1}
    names = {"neuroada": OURS, "lora": "LoRA"}
    looks = styles(by_method)
    return [_line(names.get(name, name), rows, looks[name]) for name, rows in by_method.items()]


def budget_lines(group: Group, series: list[Series]) -> Painter:
    """Paints :func:`budgets`; a loss has no meaningful zero, so the axis shows what was reached."""
    paint = lines(series, "trainable parameters", f"held-out loss, {group['unit']}", log="x")

    def closer(axes: Any) -> None:
        paint(axes)
        axes.set_ylim(
            min(min(one.lower) for one in series) - 0.01,
            max(max(one.upper) for one in series) + 0.01,
        )

    return closer


def _line(label: str, rows: list[Mapping[str, Any]], style: Style) -> Series:
    rows = sorted(rows, key=lambda row: int(row["trainable"]))
    means = [row["loss"]["mean"] for row in rows]
    halves = [_half(row["loss"]) for row in rows]
    lower = [mean - half for mean, half in zip(means, halves, strict=True)]
    upper = [mean + half for mean, half in zip(means, halves, strict=True)]
    return Series(label, [row["trainable"] for row in rows], means, style, lower, upper)


def table(group: Group) -> Table:
    """A row for each variant of a group: numbers with their intervals' half widths."""
    with_accuracy = any(row["accuracy"] is not None for row in group["rows"])
    headings = [*HEADINGS, *(["accuracy"] if with_accuracy else [])]
    rows = [cells(row, baseline(group)) for row in group["rows"]]
    title = f"{group['task']}: {group['question']}"
    return Table(title, headings, rows, note=f"Loss in {group['unit']}.")


def cells(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    edge = " (edge)" if row["at_edge"] else ""
    budget = row["trainable"] / base["trainable"] - 1 if base["trainable"] else 0.0
    share = f" ({budget:+.1%})" if row["trainable"] not in (0, base["trainable"]) else ""
    found = [
        row["variant"],
        f"{row['trainable']:,}{share}",
        "–" if row["rate"] is None else f"{row['rate']:g}{edge}",
        spread(row["loss"]),
        "" if row["difference"] is None else spread(row["difference"], signed=True),
        row["verdict"],
    ]
    return found if row["accuracy"] is None else [*found, spread(row["accuracy"], percent=True)]


def spread(
    interval: Mapping[str, float] | None, signed: bool = False, percent: bool = False
) -> str:
    """The mean and half the width of its interval, or that training diverged."""
    if interval is None:
        return "diverged"
    scale, digits = (100, 1) if percent else (1, 4)
    mean = round(scale * interval["mean"], digits) + 0.0  # -0.0 becomes 0.0
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    if interval["lower"] is not None:
        text += f" ± {scale * _half(interval):.{digits}f}"
    return text + " %" * percent


def baseline(group: Group) -> Mapping[str, Any]:
    """NeuroAda's row, with which the others' budgets are compared."""
    rows: list[Mapping[str, Any]] = group["rows"]
    return next((row for row in rows if row["variant"] == OURS), rows[0])


def described(document: Mapping[str, Any]) -> str:
    """Sentences on the sizes of the runs and on where they ran."""
    document = framed(document)
    settings, session = document["settings"], document["sessions"][-1]
    text, digits = settings["text"], settings["digits"]
    model = text["model"]
    commit = (session["commit"] or "unknown")[:7]
    return (
        f"Intervals: Student's t, 95 %, over {settings['seeds']} seeds; differences are paired by "
        f"seed. Each learning rate is the best of {len(settings['rates'])} on validation data. "
        f"Text: {model['layers']} layers of width {model['d_model']}, {text['pretrain_steps']} "
        f"steps of pretraining and {text['steps']} of adapting with {text['batch']} windows of "
        f"{model['context']} bytes. Digits: an MLP of width {digits['width']}, "
        f"{digits['steps']} steps on {digits['images']} images. {len(document['results'])} "
        f"runs, {session['cpu']}{with_variables(session)}, torch {session['torch']}, "
        f"commit {commit}."
    )


def _sides(interval: Mapping[str, float]) -> tuple[float, float]:
    half = _half(interval)
    return half, half


def _half(interval: Mapping[str, float]) -> float:
    """Half the width; 0 for one seed, which has no interval."""
    if interval["lower"] is None or interval["upper"] is None:
        return 0.0
    return (interval["upper"] - interval["lower"]) / 2
