"""The bars and goals of an H200 are the ones promised, and are judged right on made-up results."""

from __future__ import annotations

import json

import gpu_results
import pytest

from neuroada_kernels import cli
from neuroada_kernels.benchmarks.bars_gpu import Verdict, judge, status
from neuroada_kernels.benchmarks.gpu_targets import (
    TARGETS,
    BlockSpeedUp,
    BlockTime,
    EveryShapeScratch,
    EveryShapeTime,
    Limit,
    ModelPeak,
    Target,
)

ALL_T = (1024, 8192, 16384)
#: What meets every limit of time.
FAST = {
    "frozen": (100,) * 3,
    "neuroada-cuda": (104,) * 3,
    "resident": (102,) * 3,
    "peft-lora-r16": (120,) * 3,
    "materialised": (270,) * 3,
}
SMALL = {"neuroada": 20, "masked-dense": 90, "materialised": 45, "peft-lora-r16": 21}


def verdict(target: Target, linear: dict | None = None, model: dict | None = None) -> Verdict:
    (found,) = judge(linear, model, [target])
    return found


def over_frozen(candidate: str = "bypass") -> BlockTime:
    return BlockTime(Limit(1.2), Limit(1.08), 8, candidate)


def limits(**wanted: object) -> dict[int, tuple]:
    """Bar and goal by k, of a block's targets that are so."""
    found = [t for t in TARGETS if isinstance(t, BlockTime)]
    found = [t for t in found if all(getattr(t, name) == is_ for name, is_ in wanted.items())]
    return {t.k: tuple(x and x.most for x in (t.bar, t.goal)) for t in found}


def test_the_limits_are_those_promised() -> None:
    assert limits(candidate="bypass", against="frozen", tokens=8192) == {
        1: (1.15, 1.05),
        8: (1.20, 1.08),
        20: (1.30, 1.13),
    }
    assert limits(candidate="resident", against="frozen") == {
        1: (1.06, 1.03),
        8: (1.08, 1.04),
        20: (1.12, 1.06),
    }
    for tokens, faster in ((8192, (1 / 1.35, 1 / 1.5)), (1024, (1 / 1.8, 1 / 2.5))):
        assert limits(against="materialised", tokens=tokens) == dict.fromkeys((1, 8, 20), faster)
    assert limits(against="peft-lora-r16") == dict.fromkeys((1, 8), (1, None))
    peaks = {t.against: (t.bar, t.goal) for t in TARGETS if isinstance(t, ModelPeak)}
    assert peaks == {
        "masked-dense": (Limit(0.40), Limit(0.25)),
        "materialised": (Limit(0.60), Limit(0.50)),
        "peft-lora-r16": (Limit(1), Limit(1, below=True)),
    }
    shapes = {(t.candidate, t.k): t for t in TARGETS if isinstance(t, EveryShapeTime)}
    assert {key: t.bar for key, t in shapes.items()} == {
        **{("resident", k): Limit(1, below=True) for k in (1, 8, 20)},
        **{("bypass", k): None for k in (1, 8, 20)},
    }
    assert {t.goal for t in shapes.values()} == {Limit(1, below=True)}


def test_every_target_says_what_it_means() -> None:
    meanings = [target.meaning for target in TARGETS]
    assert len(set(meanings)) == len(meanings)


def test_what_is_fast_and_small_everywhere_meets_everything() -> None:
    linear = gpu_results.linear(FAST, tokens=ALL_T)
    found = judge(linear, gpu_results.model(SMALL, {}))
    judged = [v for v in found if ", checkpointed:" not in v.target.meaning]
    assert {outcome for v in judged for outcome in (v.bar, v.goal) if outcome} == {"met"}
    assert len(found) - len(judged) == 3
    assert status(found) == 0


def test_a_block_counts_each_linear_as_often_as_it_has_it() -> None:
    own = {(4096, 4096): 10, (4096, 1024): 20, (4096, 14336): 40, (14336, 4096): 80}
    linear = gpu_results.linear(
        {"frozen": (100,) * 3, "neuroada-cuda": lambda *shape: (own[shape],) * 3}
    )
    found = verdict(over_frozen(), linear)
    assert found.found.value == (2 * 10 + 2 * 20 + 2 * 40 + 80) / 700


def test_a_ratio_is_paired_and_not_one_of_medians() -> None:
    # Medians of 20 and 20 would give 1; the rounds give 2, 2 and 0.5.
    linear = gpu_results.linear({"frozen": (10, 20, 40), "neuroada-cuda": (20, 40, 20)})
    assert verdict(over_frozen(), linear).found.value == 2


@pytest.mark.parametrize(
    ("time", "bar", "goal"),
    [
        (108, "met", "met"),
        (109, "met", "missed"),
        (120, "met", "missed"),
        (121, "missed", "missed"),
    ],
)
def test_a_value_up_to_its_limit_meets_it(time: int, bar: str, goal: str) -> None:
    linear = gpu_results.linear({"frozen": (100,) * 3, "neuroada-cuda": (time,) * 3})
    found = verdict(over_frozen(), linear)
    assert (found.bar, found.goal) == (bar, goal)


def test_faster_is_not_as_fast() -> None:
    linear = gpu_results.linear({**FAST, "peft-lora-r16": (104,) * 3})
    found = verdict(BlockTime(Limit(1), Limit(1, below=True), 8, against="peft-lora-r16"), linear)
    assert (found.bar, found.goal) == ("met", "missed")


def test_the_speed_up_is_shown_as_such() -> None:
    target = BlockSpeedUp(Limit(1 / 1.35), Limit(1 / 1.5), 8, against="materialised")
    found = verdict(target, gpu_results.linear({**FAST, "materialised": (145,) * 3}))
    assert (found.measured, found.bar, found.goal) == ("1.39x", "met", "missed")
    assert target.limit(target.bar) == "at least 1.35x"


def test_bypass_is_what_serves_where_none_is_named_or_else_the_fastest() -> None:
    times = {"frozen": (100,) * 3, "neuroada-cuda": (150,) * 3, "neuroada-triton": (130,) * 3}
    for automatic, expected in (("neuroada-cuda", 1.5), ("neuroada-eager", 1.3)):
        found = verdict(over_frozen(), gpu_results.linear(times, automatic))
        assert found.found.value == expected
    assert found.remark == "neuroada-triton"


def test_a_block_without_one_of_its_linears_is_not_measured() -> None:
    linear = gpu_results.linear(FAST)
    linear["results"] = [
        row
        for row in linear["results"]
        if (row["candidate"], row["case"]["d_in"]) != ("resident", 14336)
    ]
    found = verdict(over_frozen("resident"), linear)
    assert (found.bar, found.measured) == ("not measured", "")
    assert found.remark == "lacking: resident of 1 of 4 shapes"


@pytest.mark.parametrize(
    ("lora", "tokens", "expected"),
    [
        (120, ALL_T, "met"),
        (90, ALL_T, "missed"),
        (120, (8192,), "not measured"),
        (90, (8192,), "missed"),
    ],
)
def test_every_shape_is_met_where_all_were_measured(lora: int, tokens, expected: str) -> None:
    def times(d_in: int, d_out: int) -> tuple[int, ...]:
        return (lora if d_out == 1024 else 130,) * 3

    target = EveryShapeTime(Limit(1, below=True), None, 20, "resident")
    found = verdict(target, gpu_results.linear({**FAST, "peft-lora-r16": times}, tokens=tokens))
    assert found.bar == expected
    assert found.found.of == f"resident, T{tokens[0]}-4096to1024-k20"
    assert ("lacking: 8 of 12 cases" in found.remark) == (tokens != ALL_T)


def test_scratch_is_without_what_is_kept() -> None:
    target = EveryShapeScratch(Limit(32 << 20), None, 8, "bypass")
    found = verdict(target, gpu_results.linear(FAST, tokens=ALL_T))
    assert (found.measured, found.bar) == ("32.0 MiB", "met")


def test_the_peak_is_a_part_of_the_other_method_s() -> None:
    target = ModelPeak(Limit(0.4), Limit(0.25), "masked-dense", "plain")
    found = verdict(target, None, gpu_results.model({"neuroada": 30, "masked-dense": 90}, {}))
    assert (found.measured, found.bar, found.goal) == ("-66.7 %", "met", "missed")
    assert found.remark == "30.0 of 90.0 GiB"


def test_a_peak_of_what_did_not_fit_or_of_another_model_is_not_judged() -> None:
    target = ModelPeak(Limit(0.4), Limit(0.25), "masked-dense", "plain")
    without = gpu_results.model({"neuroada": 30}, {"masked-dense": "OutOfMemoryError: 141 GiB"})
    found = verdict(target, None, without)
    assert found.bar == "not measured"
    assert found.remark == "lacking: masked-dense: OutOfMemoryError: 141 GiB"
    found = verdict(target, None, gpu_results.model(SMALL, {}, layers=1))
    assert found.remark == "lacking: a Llama-3-8B in bfloat16 at k 20"


def test_the_command_prints_a_line_a_target(tmp_path, capsys) -> None:
    (tmp_path / "linear.json").write_text(json.dumps(gpu_results.linear(FAST)))
    assert cli.main(["bench", "gpu-bars", str(tmp_path)]) == 0
    source, _, *lines = capsys.readouterr().out.splitlines()
    assert source == "linear.json: NVIDIA H200, commit 0123456"
    assert len(lines) == len(TARGETS)
    assert " ".join(lines[0].split()) == (
        "block, T 8192, k 1: bypass over frozen 1.040 met (at most 1.15) met (at most 1.05) "
        "neuroada-cuda"
    )
    slow = gpu_results.linear({**FAST, "neuroada-cuda": (116,) * 3})
    slow["sessions"] = [{**gpu_results.SESSION, "gpu": "NVIDIA H100"}]
    (tmp_path / "linear.json").write_text(json.dumps(slow))
    assert cli.main(["bench", "gpu-bars", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "missed (at most 1.15)" in said
    assert "linear.json: the bars and goals are those of an H200, which this is not" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has neither linear.json nor model.json"),
        ("{", "linear.json: is no JSON that can be read"),
        ('{"kind": "model", "results": []}', "linear.json: kind 'model', expected 'linear'"),
    ],
)
def test_a_folder_without_results_is_an_error(content, message, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / "linear.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "gpu-bars", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("times", "expected"), [({}, 1), (FAST, 0), ({**FAST, "resident": (114,) * 3}, 1)]
)
def test_the_exit_status_is_1_where_a_bar_is_missed_or_none_was_judged(times, expected) -> None:
    assert status(judge(gpu_results.linear(times))) == expected
