"""The command ``neuroada bench gpu-bars``: results of an H200 beside its bars and goals.

Nothing is measured: it reads ``linear.json`` and ``model.json`` of a folder, as
``benchmarks/gpu_run.sh`` writes them, and prints one line per target. The exit status is 1 where a
bar is missed, or where not one was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_kernels.benchmarks.gpu_targets import DTYPE, TARGETS, Files, Limit, Target, Value
from neuroada_kernels.benchmarks.html.source import Source, kind_of
from neuroada_kernels.benchmarks.html.tables import Table

#: Kind of results to the file that has them.
FILES = {"linear": "linear.json", "model": "model.json"}


class BarsError(ValueError):
    """A folder has no results that could be judged."""


@dataclass(frozen=True)
class Verdict:
    """A target and its measured value."""

    target: Target
    found: Value

    @property
    def bar(self) -> str:
        return self._outcome(self.target.bar)

    @property
    def goal(self) -> str:
        return self._outcome(self.target.goal)

    def _outcome(self, limit: Limit | None) -> str:
        """``met``, ``missed``, ``not measured``, or nothing where there is no limit.

        A limit is not met if only some cases were measured, and missed if one case misses it.
        """
        if limit is None:
            return ""
        if self.found.value is None:
            return "not measured"
        if not limit.passes(self.found.value):
            return "missed"
        return "not measured" if self.found.lacking else "met"

    @property
    def measured(self) -> str:
        return "" if self.found.value is None else self.target.shown(self.found.value)

    @property
    def remark(self) -> str:
        """The rows that the value is of, and what is lacking."""
        lacking = f"lacking: {self.found.lacking}" if self.found.lacking else ""
        return "; ".join(part for part in (self.found.of, lacking) if part)


def judge(
    linear: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    targets: Sequence[Target] = TARGETS,
) -> list[Verdict]:
    """A verdict for every target, from the files of the suites ``linear`` and ``model``."""
    files = Files(linear, model)
    return [Verdict(target, target.value(files)) for target in targets]


def status(verdicts: Sequence[Verdict]) -> int:
    """The exit status: 1 where a bar is missed, or where not one was measured."""
    outcomes = {verdict.bar for verdict in verdicts}
    return int("missed" in outcomes or "met" not in outcomes)


def table(verdicts: Sequence[Verdict]) -> Table:
    """One row per target."""
    rows = [
        [
            v.target.meaning,
            v.measured,
            _with_limit(v.bar, v.target.limit(v.target.bar)),
            _with_limit(v.goal, v.target.limit(v.target.goal)),
            v.remark,
        ]
        for v in verdicts
    ]
    note = (
        f"Forward and backward in {DTYPE}, medians of the ratios within each round. `bypass` "
        "is the backend selected by default."
    )
    return Table("Bars and goals", ("", "measured", "bar", "goal", "measured on"), rows, note=note)


def _with_limit(outcome: str, limit: str) -> str:
    return f"{outcome} ({limit})" if limit else ""


def read(folder: Path) -> list[Source]:
    """The results files of a folder.

    Raises
    ------
    BarsError
        If it has none, or a file is not of the kind of its name.
    """
    found = []
    for kind, name in FILES.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BarsError(f"{path}: is no JSON that can be read ({error})") from error
        if kind_of(document) != kind:
            raise BarsError(f"{path}: kind {kind_of(document)!r}, expected {kind!r}")
        found.append(Source(name, kind, document))
    if not found:
        raise BarsError(f"{folder}: has neither {' nor '.join(FILES.values())}")
    return found


def judged(sources: Sequence[Source]) -> list[Verdict]:
    """A verdict for every target, from the files of a folder."""
    documents = {source.kind: source.document for source in sources}
    return judge(documents.get("linear"), documents.get("model"))


def main(argv: list[str] | None = None) -> int:
    """Print one line per target; returns the exit status."""
    parser = argparse.ArgumentParser(prog="neuroada bench gpu-bars", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help=f"with {', '.join(FILES.values())}"
    )
    options = parser.parse_args(argv)
    try:
        sources = read(options.folder)
    except BarsError as error:
        parser.error(str(error))
    for source in sources:
        print(f"{source.name}: {source.machine}, commit {source.commit}")
        if "H200" not in source.machine:
            print(f"{source.name}: the bars and goals are those of an H200, which this is not")
    verdicts = judged(sources)
    content = table(verdicts)
    rows = [content.headings, *content.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return status(verdicts)


if __name__ == "__main__":
    sys.exit(main())
