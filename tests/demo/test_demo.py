"""A whole run: what it writes, what it claims, and that a failed check is told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuroada_kernels import demo
from neuroada_kernels.demo import compare, merging
from neuroada_kernels.demo.data import documentation, python_source
from neuroada_kernels.demo.experiment import Experiment, Settings

#: Made before a test replaces ``Settings.quick``.
QUICK = Settings.quick(0)


@pytest.fixture
def written(quick_run: tuple[int, Path]) -> dict[str, Any]:
    return json.loads((quick_run[1] / "demo.json").read_text())


def test_a_run_succeeds_and_writes_both_files(quick_run: tuple[int, Path]) -> None:
    status, output = quick_run
    assert status == 0
    assert {path.name for path in output.iterdir()} == {"demo.json", "demo.png"}
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_says_where_and_with_what_it_was_made(written: dict[str, Any]) -> None:
    assert written["environment"]["threads"] == 1
    assert {"version", "torch", "python", "backends"} <= written["environment"].keys()
    assert (written["device"], written["seed"], written["passed"]) == ("cpu", 0, True)
    assert all(check["passed"] for check in written["checks"])


@pytest.mark.parametrize("k", [1, 8])
def test_adapting_lowers_the_loss_on_the_new_domain(written: dict[str, Any], k: int) -> None:
    run = written["adapted"][str(k)]
    assert run["loss_after"] < run["loss_before"]
    assert run["curve"][0] == [0, run["loss_before"]]
    assert run["curve"][-1] == [written["settings"]["adapt"][str(k)]["steps"], run["loss_after"]]
    assert 0 < run["share"] < 0.1


def test_more_connections_learn_more(written: dict[str, Any]) -> None:
    one, eight = (written["adapted"][k] for k in ("1", "8"))
    assert eight["trainable"] == 8 * one["trainable"]
    assert eight["loss_after"] < one["loss_after"]


def test_training_state_is_four_numbers_a_trained_parameter(written: dict[str, Any]) -> None:
    """Parameter, gradient and AdamW's two moments, in float32; AdamW counts steps besides."""
    for measured in written["compared"].values():
        memory = measured["memory"]
        assert memory["gradients"] == memory["trained"]
        assert 0 <= memory["training_state"] - 4 * memory["trained"] < 1000
    kernels, masked = (written["compared"][name]["memory"] for name in ("kernels", "masked"))
    assert kernels["trained"] == 4 * written["adapted"]["8"]["trainable"]
    assert masked["trained"] + masked["frozen"] == kernels["frozen"]
    assert kernels["total_peak"] < masked["total_peak"]


def test_every_implementation_is_compared(written: dict[str, Any]) -> None:
    assert list(written["compared"]) == ["kernels", "eager", "reference", "masked"]
    for measured in written["compared"].values():
        assert measured["tokens_per_second"]["median"] > 0
    assert written["compared"]["kernels"]["relative_speed"]["median"] == 1


def test_a_check_that_fails_is_named_and_sets_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unmerging that restores nothing must not pass unseen."""
    monkeypatch.setattr(demo.Settings, "quick", lambda seed: _tiny())
    monkeypatch.setattr(merging.nk, "unmerge", lambda model: None)
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: unmerging restores every weight bit for bit" in " ".join(shown.split())
    assert json.loads((tmp_path / "demo.json").read_text())["passed"] is False


def test_an_implementation_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    masked = compare.MaskedDenseLinear
    forward = masked.forward
    monkeypatch.setattr(masked, "forward", lambda self, x: 1.01 * forward(self, x))
    monkeypatch.setattr(demo.Settings, "quick", lambda seed: _tiny())
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["compared"] == {}
    failed = [check["name"] for check in written["checks"] if not check["passed"]]
    assert len(failed) == 1
    assert failed[0].startswith("masked dense: loss and gradients")


def test_without_matplotlib_the_figure_alone_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo.Settings, "quick", lambda seed: _tiny())
    demo.main(["--quick", "--output", str(tmp_path)])
    assert "matplotlib is missing" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json"}


def test_the_losses_repeat_with_the_seed() -> None:
    def losses() -> list[float]:
        source = python_source(QUICK.source_bytes)
        experiment = Experiment(_tiny(), documentation(), source, lambda *_: None)
        experiment.pretrain()
        experiment.adapt()
        return [run.loss_after for run in experiment.results.adapted.values()]

    assert losses() == losses()


def _tiny() -> Settings:
    """Too short to learn anything, long enough to pass through every stage."""
    return replace(
        QUICK,
        pretrain=replace(QUICK.pretrain, steps=2),
        adapt={k: replace(schedule, steps=2) for k, schedule in QUICK.adapt.items()},
        held_out_windows=4,
        rounds=2,
        sample_bytes=2,
    )
