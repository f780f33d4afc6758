"""The command ``neuroada bench quality``.

Adapts pretrained models by every method at equal trainable budgets, the learning rate of each
tuned by the same search, and compares what they reach on held-out data. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neuroada_kernels.benchmarks.options import (
    add_outputs,
    command_line,
    positive,
    progress_bar,
    threads,
)
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import Suite, open_records
from neuroada_kernels.benchmarks.records import RecordsError


def main(argv: list[str] | None = None) -> int:
    """Run what is requested and not done yet; write and show the results."""
    parser = _parser()
    options = parser.parse_args(argv)
    _require(options, parser)
    from neuroada_kernels.benchmarks.quality.summary import as_json, summarise

    settings = Settings.quick() if options.quick else Settings.full()
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    try:
        records = open_records(settings, options.json, command_line("quality", argv))
        suite = Suite(settings, records, options.tasks or ())
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if records.rows:
        console.print(f"{len(records.rows)} runs are done already.")
    try:
        with threads(options.threads):
            _run(suite, console)
    except RecordsError as error:
        parser.error(str(error))
    records.summary = {"groups": as_json(summarise(suite)), "skipped": suite.skipped}
    records.write()
    _show(suite, console)
    if options.html is not None:
        from neuroada_kernels.benchmarks.html import write_html

        name = options.json.name if options.json is not None else "quality.json"
        write_html({name: records.as_dict()}, options.html)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuroada bench quality", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller models, fewer steps and seeds")
    add("--seeds", type=positive, metavar="N", help="default: 5, or 3 with --quick")
    add("--tasks", nargs="+", metavar="TASK", help='"text", "digits, rotated", ...; default: all')
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add_outputs(parser)
    return parser


def _require(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Reject early what would fail after minutes."""
    needed = ["scipy", "sklearn", *(["matplotlib"] if options.html is not None else [])]
    for package in needed:
        if find_spec(package) is None:
            parser.error(f"{package} is missing, install the extra 'bench'")


def _run(suite: Suite, console: Console) -> None:
    with progress_bar(console) as progress:
        bar = progress.add_task("pretraining", total=suite.total)
        progress.refresh()
        suite.run(
            lambda done, total, name: progress.update(
                bar, completed=done, description=name, refresh=True
            )
        )


def _show(suite: Suite, console: Console) -> None:
    from neuroada_kernels.benchmarks.html.quality import described, table

    document = suite.records.as_dict()
    for group in document["summary"]["groups"]:
        content = table(group)
        shown = Table(
            title=f"{content.title} ({group['unit']})",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for number, name in enumerate(content.headings):
            shown.add_column(name, justify="right" if number else "left")
        for row in content.rows:
            shown.add_row(*row)
        console.print(shown)
    for name, reason in suite.skipped.items():
        console.print(f"not run: {name}: {reason}", markup=False)
    console.print(described(document), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
