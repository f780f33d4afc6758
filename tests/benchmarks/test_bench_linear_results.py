"""Rows come back from a file as they were, also from one older than the common frame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuroada_kernels.benchmarks.bars import BARS, status
from neuroada_kernels.benchmarks.linear_results import Results, Skipped, framed
from neuroada_kernels.testing import Case

OLDER = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/cpu/linear-xeon-amx.json").read_text()
)


@pytest.mark.skipif("kind" in OLDER, reason="the committed file has the common frame")
def test_an_older_file_is_read_and_nothing_is_made_up() -> None:
    document = framed(OLDER)
    assert framed(document) == document
    (session,) = document["sessions"]
    assert session == {name: OLDER[name] for name in session}
    assert document["settings"]["rounds"] == OLDER["rounds"]
    *rows, host = document["results"]
    assert host["host_cost"] == OLDER["host_cost"]
    for row, older in zip(rows, OLDER["results"], strict=True):
        assert row["key"] == f"{row['case']['name']} {row['dtype']} {row['candidate']}"
        assert {name: row.get(name) for name in older} == {**older, "gflop_per_s": None}
        assert row["host_us"] is None
        if row["candidate"] == "frozen":
            case = Case(**{n: v for n, v in row["case"].items() if n != "name"})
            assert row["flops"] == 4 * case.tokens * case.d_in * case.d_out


def test_rows_come_back_and_can_be_judged() -> None:
    rows = framed(OLDER)["results"]
    results = Results.of(rows)
    for row, measurement in zip(rows[:-1], results.measurements, strict=True):
        back = {"key": row["key"], **json.loads(json.dumps(measurement.as_dict()))}
        for rate in ("gb_per_s", "tflop_per_s"):
            assert back.pop(rate) == pytest.approx(row.pop(rate))
        assert back == row
    results.judge()
    assert len(results.verdicts) == len(BARS)
    assert "not measured" not in {verdict.outcome for verdict in results.verdicts}
    assert status(results.verdicts) in (0, 1)


def test_what_was_skipped_comes_back() -> None:
    skipped = Skipped(Case(1, 2, 3, 1), "float32", "neuroada-x", "no such thing")
    assert Results.of([{"key": "a", **skipped.as_dict()}]).skipped == [skipped]
