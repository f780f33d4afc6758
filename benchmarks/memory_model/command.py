"""The command ``neuroada bench memory``: what training holds, by method.

Two parts. ``validation``: training steps of scaled models, measured on this CPU, beside the
predictions of the analytical model. ``models``: predictions for real models, which need not fit.

Rows of the results file have a ``part``, ``model`` (its name), ``setting`` (sizes, batch, sequence,
dtype, k, checkpointing), ``method`` and ``predicted``, bytes by what they are for, with
``at_rest``, ``peak``, ``at`` (the instant of the peak) and what the step adds at that instant:
``peak_kept``, ``peak_gradients``, ``peak_scratch``. Those of ``validation`` also have ``measured``
and ``error`` (of ``peak``, ``step_peak`` and ``kept``, relative); those of ``models`` ``layer``,
the bytes of one. A validation whose package is missing has ``skipped``, the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neuroada_kernels.benchmarks.memory_model.plan import (
    Work,
    model_work,
    validations,
)
from neuroada_kernels.benchmarks.options import add_outputs, positive, progress_bar, threads
from neuroada_kernels.benchmarks.records import Records, RecordsError, Row

GIB = 1 << 30
MIB = 1 << 20
#: Allowed relative error of a predicted peak.
TOLERANCE = 0.03
#: Methods that NeuroAda's peak is compared with.
PEERS = ("masked-dense", "materialised", "lora-r16", "full")


def main(argv: list[str] | None = None) -> int:
    """Measure and compute what FILE lacks; returns 1 if the model is off by more than 3 %."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.block:
        from neuroada_kernels.benchmarks import block

        found = block.run("cpu", options.dtypes, Console())
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    _require(options, parser)
    console = Console()
    command = "neuroada bench memory" + " --quick" * options.quick
    try:
        with threads(options.threads):
            settings = {"quick": options.quick, "tolerance": TOLERANCE}
            records = Records.open("memory", command, settings, options.json)
            _run(records, [*validations(options.quick), *model_work()], console)
    except RecordsError as error:
        parser.error(str(error))
    rows = list(records.rows.values())
    print_results(rows, console)
    if options.html is not None:
        from neuroada_kernels.benchmarks.html import write_html

        name = options.json.name if options.json is not None else "memory.json"
        write_html({name: records.as_dict()}, options.html)
    return int(any(off(row) > TOLERANCE for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench memory",
        description="Memory of training, by method: measured on scaled models, computed for real "
        "ones by an analytical model, which the measurements validate.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer measurements, under three minutes")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add("--block", action="store_true", help="instead: activations a block saves for backward")
    dtypes = ["float32", "bfloat16"]
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of --block; default: both")
    add_outputs(parser)
    return parser


def _require(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Reject early what would fail after minutes."""
    if find_spec("transformers") is None:
        parser.error("transformers is missing, install the extra 'peft'")
    if options.html is not None and find_spec("matplotlib") is None:
        parser.error("--html: matplotlib is missing, install the extra 'bench'")


def _run(records: Records, work: list[Work], console: Console) -> None:
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(work))
        for piece in work:
            progress.update(task, description=piece.key, refresh=True)
            records.once(piece.key, piece.row)
            progress.advance(task)
            progress.refresh()


def off(row: Row) -> float:
    """The larger relative error of the predicted peaks, in total and of what the step adds."""
    error = row.get("error")
    return max(abs(error["peak"]), abs(error["step_peak"])) if error else 0.0


def print_results(rows: list[Row], console: Console) -> None:
    """Print the validation, then a table for each real model and setting."""
    console.print(_validation_table([row for row in rows if row["part"] == "validation"]))
    for row in rows:
        if "skipped" in row:
            console.print(f"not measured: {row['key']}: {row['skipped']}", markup=False)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "models":
            groups.setdefault(described(row), []).append(row)
    for title, group in groups.items():
        console.print(_models_table(title, group))
        if not group[0]["setting"]["checkpointing"]:
            console.print(_layers_table(title, group))
    console.print(_headline_table(groups))


def of_a_layer(row: Row) -> tuple[int, int]:
    """Bytes that a layer holds at rest and for gradients, and that it saves for the backward."""
    layer = row["layer"]
    held = sum(nbytes for name, nbytes in layer.items() if name != "kept")
    return held, layer["kept"]


def described(row: Row) -> str:
    """A description of a model and its training step."""
    setting = row["setting"]
    checkpointing = "with" if setting["checkpointing"] else "without"
    return (
        f"{row['model']}, {setting['dtype']}, k {setting['k']}, batch {setting['batch']}, "
        f"sequence {setting['sequence']}, {checkpointing} checkpointing"
    )


def _validation_table(rows: list[Row]) -> Table:
    headings = ("at rest", "kept", "step", "predicted", "error")
    table = _table("measured, and predicted by the stated model, MiB", headings)
    for row in rows:
        if "measured" in row:
            measured, predicted = row["measured"], row["predicted"]
            table.add_row(
                row["key"].removeprefix("validation, "),
                *(f"{measured[name] / MIB:.2f}" for name in ("at_rest", "kept", "step_peak")),
                f"{predicted['step_peak'] / MIB:.2f}",
                f"{row['error']['step_peak']:+.2%}",
            )
    return table


def _models_table(title: str, rows: list[Row]) -> Table:
    at_rest = ("weights", "trained", "selection", "optimizer")
    names = (*at_rest, "peak_gradients", "peak_kept", "peak_scratch", "peak")
    headings = ("weights", "trains", "select", "optim", "grads", "kept", "scratch", "peak")
    table = _table(f"{title}, GiB", headings)
    for row in rows:
        numbers = (row["predicted"][name] / GIB for name in names)
        table.add_row(row["method"], *(f"{number:.2f}" for number in numbers))
    return table


def _layers_table(title: str, rows: list[Row]) -> Table:
    table = _table(f"one layer of {title}, MiB", ("holds", "keeps"))
    for row in rows:
        table.add_row(row["method"], *(f"{nbytes / MIB:.1f}" for nbytes in of_a_layer(row)))
    return table


def _headline_table(groups: dict[str, list[Row]]) -> Table:
    table = _table("peak of neuroada, GiB, and how much it is to others", ("", *PEERS))
    for title, rows in groups.items():
        peaks = {row["method"]: row["predicted"]["peak"] for row in rows}
        ours = peaks["neuroada"]
        ratios = (f"{ours / peaks[peer] - 1:+.0%}" for peer in PEERS)
        table.add_row(title, f"{ours / GIB:.2f}", *ratios)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


if __name__ == "__main__":
    sys.exit(main())
