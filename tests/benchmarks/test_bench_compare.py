"""Two files of a suite: what counts as slower, and which are refused."""

from __future__ import annotations

import copy
import json

import pytest

from neuroada_kernels.benchmarks import compare as module
from neuroada_kernels.benchmarks.compare import CompareError, compare

SESSION = {"device": "cpu", "cpu": "a processor", "cpu_capability": "AVX2", "threads": 2}
SESSION |= {"commit": "0123456789"}
#: What a machine was held to.
LESS = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def row(name: str, milliseconds) -> dict:
    forward = [round(1e6 * time) - 1 for time in milliseconds]
    samples = {"forward": forward, "backward": [1] * len(forward)}
    return {"key": f"T1-8to8-k1 float32 {name}", "samples_ns": samples}


def linear(ours, frozen=(10.0, 10.0, 10.0), **facts) -> dict:
    rows = [row("frozen", frozen), row("neuroada-cpu", ours), {"key": "host-cost"}]
    return {"kind": "linear", "sessions": [{**SESSION, **facts}], "results": rows}


def model(milliseconds, frozen=()) -> dict:
    ours = {"samples_ms": list(milliseconds), "frozen_samples_ms": list(frozen)}
    rows = [{"key": "plain/neuroada", **ours}, {"key": "plain/peft-lora", "error": "no"}]
    return {"kind": "model", "sessions": [SESSION], "results": rows}


OLD = linear((11.0, 12.0, 13.0))


def test_a_machine_that_is_slower_as_a_whole_does_not_count() -> None:
    drift, ours = compare(OLD, linear((22.0, 24.0, 26.0), frozen=(20.0, 20.0, 20.0)))
    assert (drift.key, drift.ratio.median, drift.judged) == ("T1-8to8-k1 float32 frozen", 2, False)
    assert ours.judged
    assert (ours.old, ours.new, ours.ratio.median) == (1.2, 1.2, 1)


def test_the_spread_is_that_of_all_pairs_of_rounds() -> None:
    (change,) = compare(model((1, 2)), model((4, 4)))
    assert (change.ratio.lower, change.ratio.median, change.ratio.upper) == (2, 3, 4)
    assert (change.old, change.new) == (1.5, 4)
    (change,) = compare(model((1, 2), frozen=(1, 2)), model((4, 4), frozen=(4, 4)))
    assert (change.old, change.new, change.ratio.median) == (1, 1, 1)


def test_what_ran_alone_is_compared_by_its_own_time() -> None:
    alone = model((4, 4))
    alone["results"][0]["frozen_samples_ms"] = None
    for old, new in ((alone, alone), (alone, model((4, 4), frozen=(2, 2)))):
        (change,) = compare(old, new)
        assert (change.old, change.new, change.ratio.median) == (4, 4, 1)


def test_through_trainer_the_baseline_is_full_fine_tuning() -> None:
    def peers(speed):
        rows = [
            {"key": name, "samples_ms": [time * speed], "full_samples_ms": [2 * speed]}
            for name, time in (("neuroada", 3), ("full", 2))
        ]
        return {"kind": "peers-training", "sessions": [SESSION], "results": rows}

    found = {change.key: change for change in compare(peers(1), peers(5))}
    assert (found["neuroada"].ratio.median, found["neuroada"].judged) == (1, True)
    assert (found["full"].ratio.median, found["full"].judged) == (5, False)


@pytest.mark.parametrize(
    ("threshold", "status"), [([], 1), (["--threshold", "1.2"], 0), (["--threshold", "1.05"], 1)]
)
def test_the_exit_status_says_whether_it_is_slower(threshold, status, tmp_path, capsys) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(OLD))
    new.write_text(json.dumps(linear((12.1, 13.2, 14.3))))
    assert module.main([str(old), str(new), *threshold]) == status
    shown = capsys.readouterr().out
    assert "1.100" in shown
    assert "machine" in shown
    assert ("slower by more than 1.05: 1" in shown) == bool(status)


def test_both_machines_are_named_with_what_they_were_held_to(tmp_path, capsys) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(OLD))
    new.write_text(json.dumps(linear((11.0, 12.0, 13.0), environment=LESS)))
    assert module.main([str(old), str(new), "--anyway"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    plain = "2 threads of an a processor (AVX2)"
    assert f"old: {plain}, commit 0123456" in shown
    assert f"new: {plain} with ONEDNN_MAX_CPU_ISA=AVX2, commit 0123456" in shown


def test_the_worst_comes_first_and_rows_of_one_file_are_left_out() -> None:
    old, new = copy.deepcopy(OLD), copy.deepcopy(OLD)
    old["results"] += [row("lora-r8", (20, 20, 20)), row("reference", (1, 1, 1))]
    new["results"] += [row("lora-r8", (30, 30, 30))]
    first, *rest = compare(old, new)
    assert first.key.endswith("lora-r8")
    assert len(rest) == 2


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (linear((11.0, 12.0, 13.0), cpu="another"), "cpu: a processor and another"),
        (linear((11.0, 12.0, 13.0), threads=4), "threads: 2 and 4"),
        (linear((11.0, 12.0, 13.0), environment=LESS), f"environment: None and {LESS}"),
        (model((1, 2)), "kind: linear and model"),
        ({**OLD, "settings": {"sizes": {"layers": 2}}}, "sizes: None and {'layers': 2}"),
    ],
)
def test_other_machines_and_suites_are_refused(new, message) -> None:
    with pytest.raises(CompareError, match=message):
        compare(OLD, new)


def test_whoever_insists_compares_two_machines_but_not_nothing() -> None:
    assert len(compare(OLD, linear((11.0, 12.0, 13.0), cpu="another"), anyway=True)) == 2
    with pytest.raises(CompareError, match="no row with samples in common"):
        compare(OLD, model((1, 2)), anyway=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"results": []}', '{"kind": "linear"}'])
def test_what_is_no_results_file_is_refused(content, tmp_path, capsys) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        module.main([str(path), str(path)])
    assert exit_.value.code == 2
    assert f"{path}: no results file of a suite" in " ".join(capsys.readouterr().err.split())
