"""What ``neuroada bench quality`` says of its runs: statistics, the command, what is committed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from neuroada_kernels.benchmarks import suites

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("peft")

from quality_runs import DIGITS, TINY, run_of

from neuroada_kernels.benchmarks.html import quality as shown
from neuroada_kernels.benchmarks.quality import command
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import Run, Suite, open_records
from neuroada_kernels.benchmarks.quality.summary import Group, Interval, Row, as_json, summarise
from neuroada_kernels.benchmarks.quality.variants import OURS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_interval_is_students():
    # t = 2.776445 at 4 degrees of freedom, s = sqrt(2.5), n = 5.
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.mean, found.half) == (3.0, pytest.approx(half, rel=1e-6))
    assert found.lower == pytest.approx(3 - half)
    assert Interval.of([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert math.isnan(Interval.of([2.0]).half)


def rows_of(*runs: Run) -> dict[str, Row]:
    """What is said of the methods after such runs on text, by variant."""
    records = open_records(TINY)
    records.rows = {str(run): {"key": str(run), **asdict(run)} for run in runs}
    return {row.variant: row for row in summarise(Suite(TINY, records, ["text"]))[0].rows}


def test_differences_are_paired_by_seed():
    runs = [
        run
        for seed, ours, theirs in ((0, 1.0, 1.5), (1, 2.0, 2.6), (2, 3.0, 3.4))
        for run in (
            run_of("test", 1e-2, ours, seed=seed),
            run_of("test", 1e-3, theirs, seed=seed, variant="LoRA"),
        )
    ]
    rows = rows_of(*runs)
    difference = rows["LoRA"].difference
    assert difference.mean == pytest.approx(0.5)
    # t = 4.302653 at 2 degrees of freedom, s = 0.1: far less than the seeds differ.
    assert difference.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert rows["LoRA"].verdict == "worse"
    assert rows["LoRA"].at_edge
    assert rows[OURS].difference is None
    rows = rows_of(*runs, run_of("test", 1e-3, None, seed=1, variant="LoRA"))
    assert rows["LoRA"].loss is None
    plain = {
        row["variant"]: row
        for row in as_json([Group("", "", "methods", [*rows.values()])])[0]["rows"]
    }
    assert shown.cells(plain["LoRA"], plain[OURS])[3] == "diverged"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [((-0.2, -0.3, -0.1), "better"), ((-0.2, -0.5, 0.1), "even"), ((1e-5, 9e-6, 2e-5), "even")],
)
def test_the_verdict_is_that_of_the_interval(difference, verdict):
    row = Row("a", 1, 1e-2, False, Interval(1, 1, 1), Interval(*difference), None, 1, "lora")
    assert row.verdict == verdict


def test_the_command_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.Settings, "quick", classmethod(lambda cls: TINY))
    data, page = tmp_path / "quality.json", tmp_path / "quality.html"
    arguments = ["quality", "--quick", "--seeds", "1", "--tasks", DIGITS]
    assert suites.main([*arguments, "--json", str(data), "--html", str(page)]) == 0
    found = json.loads(data.read_text())
    assert found["settings"]["seeds"] == 1
    assert {group["task"] for group in found["summary"]["groups"]} == {DIGITS}
    assert found["sessions"][0]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert all(name in shown for name in (OURS, "LoRA", "SHiRA", "frozen"))
    assert page.read_text().startswith("<!doctype html>")
    assert suites.main([*arguments, "--json", str(data)]) == 0
    assert f"{len(found['results'])} runs are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "--tasks", "nothing"], "tasks: ['nothing'], expected of ['text', "),
        (["quality", "--seeds", "0"], "0, expected at least 1"),
        (["--cases", "nothing"], "--k: no such case"),
        (["linear", "--cases", "nothing"], "--k: no such case"),
    ],
)
def test_bench_runs_the_suite_that_is_named_and_linear_by_default(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        suites.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_run(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "scipy is missing, install the extra 'bench'" in capsys.readouterr().err


def test_the_committed_summary_is_that_of_the_committed_runs():
    path = ROOT / "benchmarks/results/cpu/quality.json"

    def rounded(text: str) -> dict:
        return json.loads(text, parse_float=lambda number: round(float(number), 6))

    found = rounded(path.read_text())
    settings = Settings.from_dict(found["settings"])
    suite = Suite(settings, open_records(settings, path))
    assert len(suite.runs) == suite.total
    assert shown.groups_of(found) == rounded(json.dumps(as_json(summarise(suite))))
