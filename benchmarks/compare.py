"""The command ``neuroada bench compare OLD.json NEW.json``: is the second file slower?

Rows with samples are compared by their key: candidate, case and dtype of the linear suite, a method
of the model suite. Every round's time is first divided by the baseline's in the same round
(the frozen linear or model; through Trainer, full fine-tuning), so that drift of the machine
between the files cancels; the baseline's own time shows the drift and is not judged. Rounds of two
files are not paired: a ratio is the median over all pairs of one round of each, its spread their
quartiles.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.linear_results import KIND, framed
from neuroada_kernels.benchmarks.timing import Quartiles, paired_ratio

#: Facts of a session that have to be equal for times to be comparable.
MACHINE = ("device", "cpu", "gpu", "threads", "environment")
#: Settings that have to be equal for rows of one key to be of the same work.
WORK = ("sizes", "sequence", "batch", "dtype", "k")
#: The baseline of a suite, if it is not the frozen model.
_BASELINES = {"peers-training": "full"}
_FROZEN = "frozen"


class CompareError(ValueError):
    """Two files cannot be compared."""


@dataclass(frozen=True)
class Change:
    """New over old; above 1 is slower."""

    key: str
    old: float  # medians: relative to the baseline, or else ms
    new: float
    ratio: Quartiles
    judged: bool = True


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], *, anyway: bool = False
) -> list[Change]:
    """The changes of all rows that both files have, the worst first.

    Parameters
    ----------
    old, new : mapping
        Files of a suite whose rows have samples, as their JSON holds them.
    anyway : bool
        Compare also files of two machines, suites or sizes.

    Raises
    ------
    CompareError
        If they are of different suites, machines or sizes, or have no row in common.
    """
    differing = _differing(old, new)
    if differing and not anyway:
        raise CompareError(f"{'; '.join(differing)}; --anyway compares all the same")
    before, after = _samples(old), _samples(new)
    baseline = _baseline(old)
    changes = [
        _change(key, *_alike(before[key], after[key]), judged=_method(key) != baseline)
        for key in before
        if key in after
    ]
    if not changes:
        raise CompareError("the files have no row with samples in common")
    return sorted(changes, key=lambda change: -change.ratio.median)


def read(path: Path) -> dict[str, Any]:
    """A suite's results file; of the linear suite also one that predates the common frame.

    Raises
    ------
    CompareError
        If it is no such file.
    """
    try:
        found = json.loads(path.read_text())
        if "kind" not in found and "ratio_to_frozen" in found["results"][0]:
            found = framed(found)
        if not {"kind", "sessions", "results"} <= found.keys():
            raise KeyError("kind, sessions or results")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CompareError(f"{path}: no results file of a suite ({error!r})") from error
    return dict(found)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    facts = [("kind", old["kind"], new["kind"])]
    before, after = ((found["sessions"] or [{}])[0] for found in (old, new))
    facts += [(fact, before.get(fact), after.get(fact)) for fact in MACHINE]
    one, other = (found.get("settings", {}) for found in (old, new))
    facts += [(name, one.get(name), other.get(name)) for name in WORK]
    return [f"{fact}: {one} and {other}" for fact, one, other in facts if one != other]


@dataclass(frozen=True)
class _Samples:
    """Milliseconds of each round, and the baseline's if they are known."""

    own: Sequence[float]
    baseline: Sequence[float]

    @property
    def relative(self) -> list[float] | None:
        if len(self.baseline) != len(self.own):
            return None
        return [time / least for time, least in zip(self.own, self.baseline, strict=True)]


def _samples(document: Mapping[str, Any]) -> dict[str, _Samples]:
    """Samples by key; rows of the baseline itself have no baseline."""
    name = _baseline(document)
    rows = {row["key"]: row for row in document["results"]}
    times = {key: _milliseconds(row) for key, row in rows.items()}
    if document["kind"] == KIND:
        over = {key: times.get(f"{key.rpartition(' ')[0]} {name}", []) for key in times}
    else:
        # None where methods ran one after the other, as on a GPU.
        over = {key: row.get(f"{name}_samples_ms") or [] for key, row in rows.items()}
    return {
        key: _Samples(own, [] if _method(key) == name else over[key])
        for key, own in times.items()
        if own
    }


def _alike(old: _Samples, new: _Samples) -> tuple[Sequence[float], Sequence[float]]:
    """Both relative to the baseline if known for both, or else both in milliseconds."""
    if old.relative is not None and new.relative is not None:
        return old.relative, new.relative
    return old.own, new.own


def _baseline(document: Mapping[str, Any]) -> str:
    return _BASELINES.get(document["kind"], _FROZEN)


def _method(key: str) -> str:
    return re.split("[ /]", key)[-1]


def _milliseconds(row: Mapping[str, Any]) -> list[float]:
    if "samples_ns" in row:
        parts = row["samples_ns"]
        return [(f + b) / 1e6 for f, b in zip(parts["forward"], parts["backward"], strict=True)]
    return list(row.get("samples_ms", ()))


def _change(key: str, old: Sequence[float], new: Sequence[float], judged: bool) -> Change:
    pairs = [(after, before) for before in old for after in new]
    ratio = paired_ratio([after for after, _ in pairs], [before for _, before in pairs])
    return Change(key, Quartiles.of(old).median, Quartiles.of(new).median, ratio, judged)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns 1 if a judged ratio is above the threshold."""
    parser = argparse.ArgumentParser(prog="neuroada bench compare", description=__doc__)
    add = parser.add_argument
    add("old", type=Path, metavar="OLD.json")
    add("new", type=Path, metavar="NEW.json")
    add("--threshold", type=float, default=1.05, help="ratio beyond which it is slower; 1.05")
    add("--anyway", action="store_true", help="also files of two machines, suites or sizes")
    options = parser.parse_args(argv)
    if options.threshold <= 0:
        parser.error(f"--threshold: {options.threshold}, expected a positive ratio")
    try:
        old, new = read(options.old), read(options.new)
        changes = compare(old, new, anyway=options.anyway)
    except CompareError as error:
        parser.error(str(error))
    console = Console()
    for name, document in (("old", old), ("new", new)):
        source = Source(name, document["kind"], document)
        console.print(f"{name}: {source.machine}, commit {source.commit}", markup=False)
    slower = [c for c in changes if c.judged and c.ratio.median > options.threshold]
    console.print(_table(changes, options.threshold))
    console.print(
        f"{len(changes)} rows compared, slower by more than {options.threshold:g}: {len(slower)}"
    )
    return int(bool(slower))


def _table(changes: Sequence[Change], threshold: float) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("row", overflow="fold")
    for heading in ("old", "new", "ratio", "quartiles", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        ratio = change.ratio
        slower, faster = ratio.median > threshold, ratio.median < 1 / threshold
        verdict = "slower" if slower else "faster" if faster else ""
        table.add_row(
            change.key,
            f"{change.old:.4g}",
            f"{change.new:.4g}",
            f"{ratio.median:.3f}",
            f"{ratio.lower:.3f}-{ratio.upper:.3f}",
            verdict if change.judged else "machine",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
