"""The bars are the ones promised, and are judged right on made-up times."""

from __future__ import annotations

import itertools

import pytest

from neuroada_kernels.benchmarks.bars import BARS, HOST, Bar, Verdict, judge, status
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.memory import Memory
from neuroada_kernels.benchmarks.timing import HostCost, Quartiles, Timings, paired_ratio
from neuroada_kernels.benchmarks.work import Work
from neuroada_kernels.testing import BENCH_CASES, Case

CASE = Case(tokens=512, d_in=2048, d_out=2048, k=8)


def measured(name: str, times: tuple[int, ...], frozen=(100, 100, 100), automatic=False, case=CASE):
    timings = Timings(forward=times, backward=(0,) * len(times))
    return Measurement(
        case=case,
        dtype="float32",
        candidate=name,
        backend=None,
        automatic=automatic,
        timings=timings,
        ratio=paired_ratio(times, frozen),
        work=Work(flops=1, bytes=1),
        memory=Memory(peak=0, beyond_outputs=0, kept=0),
    )


def host(over: float) -> HostCost:
    return HostCost(
        Quartiles(5, 5, 5), Quartiles(5 + over, 5 + over, 5 + over), Quartiles(0, over, 99)
    )


def limits(against: str, dtype: str = "float32") -> dict[str, float]:
    chosen = [bar for bar in BARS if bar.candidate is None]
    return {bar.case: bar.limit for bar in chosen if (bar.against, bar.dtype) == (against, dtype)}


@pytest.mark.parametrize(
    ("dtype", "promised"),
    [("float32", {1: 1.05, 8: 1.08, 20: 1.12}), ("bfloat16", {1: 1.08, 8: 1.15, 20: 1.25})],
)
@pytest.mark.parametrize("shape", ["2048to2048", "1024to4096", "4096to1024"])
def test_bars_over_frozen_at_512_tokens(shape: str, dtype: str, promised) -> None:
    bars = limits("frozen", dtype)
    assert {k: bars[f"T512-{shape}-k{k}"] for k in promised} == promised


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bars_at_16_tokens_and_over_the_other_methods(dtype: str) -> None:
    assert limits("frozen", dtype)["T16-2048to2048-k8"] == 1.15
    every = {case.name for case in BENCH_CASES}
    assert limits("materialised", dtype) == dict.fromkeys(every, 1 / 1.5)
    small = {case.name for case in BENCH_CASES if case.k in (1, 8)}
    assert limits("lora-r8", dtype) == dict.fromkeys(small, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bars_of_resident_over_frozen(dtype: str) -> None:
    bars = [bar for bar in BARS if bar.candidate == "resident" and bar.dtype == dtype]
    assert {bar.case: bar.limit for bar in bars} == {
        "T512-2048to2048-k1": 1.03,
        "T512-2048to2048-k8": 1.05,
        "T512-2048to2048-k20": 1.08,
    }
    assert {bar.against for bar in bars} == {"frozen"}


def test_the_candidate_that_a_bar_names_is_judged() -> None:
    rows = [
        measured("frozen", (100,) * 3),
        measured("neuroada-cpu", (90,) * 3, automatic=True),
        measured("resident", (104,) * 3),
    ]
    (verdict,) = judge(rows, None, [Bar(1.03, "frozen", CASE.name, candidate="resident")])
    assert verdict.value == 1.04
    assert verdict.outcome == "missed"
    (verdict,) = judge(rows[:2], None, [Bar(1.03, "frozen", CASE.name, candidate="resident")])
    assert verdict.outcome == "not measured"


def test_the_bar_of_the_host_cost() -> None:
    assert [bar.limit for bar in BARS if bar.against == HOST] == [25.0]


def test_every_bar_says_what_it_means() -> None:
    meanings = [bar.meaning for bar in BARS]
    assert len(set(meanings)) == len(meanings)
    assert "T512-2048to2048-k8 float32: at most 1.08x frozen" in meanings
    assert "T512-2048to2048-k8 float32: at most 0.667x materialised" in meanings
    assert "T512-2048to2048-k8 float32: resident at most 1.05x frozen" in meanings


@pytest.mark.parametrize(
    ("ours", "outcome"), [((107, 107, 107), "met"), ((108,) * 3, "met"), ((109,) * 3, "missed")]
)
def test_a_ratio_up_to_the_limit_meets_it(ours, outcome: str) -> None:
    rows = [measured("frozen", (100,) * 3), measured("neuroada-cpu", ours, automatic=True)]
    (verdict,) = judge(rows, None, [Bar(1.08, "frozen", CASE.name)])
    assert verdict.outcome == outcome


def test_a_ratio_is_paired_and_not_one_of_medians() -> None:
    # Medians 20 and 20 would give 1; the rounds give 2, 2 and 0.5.
    rows = [
        measured("frozen", (10, 20, 40)),
        measured("neuroada-cpu", (20, 40, 20), automatic=True),
    ]
    (verdict,) = judge(rows, None, [Bar(1.5, "frozen", CASE.name)])
    assert verdict.value == 2
    assert verdict.outcome == "missed"


def test_the_backend_chosen_automatically_is_judged() -> None:
    rows = [
        measured("frozen", (100,) * 3),
        measured("neuroada-eager", (50,) * 3),
        measured("neuroada-cpu", (120,) * 3, automatic=True),
    ]
    (verdict,) = judge(rows, None, [Bar(1.08, "frozen", CASE.name)])
    assert verdict.value == 1.2


def test_another_case_or_dtype_does_not_count() -> None:
    rows = [measured("frozen", (100,) * 3), measured("neuroada-cpu", (101,) * 3, automatic=True)]
    bars = [Bar(1.08, "frozen", CASE.name, "bfloat16"), Bar(1.08, "frozen", "T16-2048to2048-k8")]
    assert [v.outcome for v in judge(rows, None, bars)] == ["not measured"] * 2


@pytest.mark.parametrize(
    ("cost", "outcome"), [(host(25), "met"), (host(25.1), "missed"), (None, "not measured")]
)
def test_the_host_cost_is_judged_by_its_difference(cost, outcome: str) -> None:
    (verdict,) = judge([], cost, [Bar(25, HOST)])
    assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.9, 1.0), 0), ((0.9, None), 0), ((0.9, 1.1), 1), ((None, None), 1), ((), 1)],
)
def test_the_exit_status_is_1_where_a_bar_is_missed_or_none_was_judged(values, expected) -> None:
    assert status([Verdict(Bar(1.0, "frozen"), value) for value in values]) == expected


def test_a_full_run_leaves_no_bar_unjudged() -> None:
    rows = []
    for case, dtype in itertools.product(BENCH_CASES, ("float32", "bfloat16")):
        for name in ("frozen", "materialised", "lora-r8", "neuroada-cpu", "resident"):
            row = measured(name, (100,) * 3, automatic=name == "neuroada-cpu", case=case)
            rows.append(Measurement(**{**vars(row), "dtype": dtype}))
    assert "not measured" not in {verdict.outcome for verdict in judge(rows, host(1))}
