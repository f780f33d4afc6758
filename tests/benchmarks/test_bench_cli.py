"""The command ``neuroada bench``: what it runs, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import neuroada_kernels as nk
from neuroada_kernels import cli
from neuroada_kernels.benchmarks import environment, linear, linear_results, report, suites
from neuroada_kernels.benchmarks.bars import Bar, Verdict
from neuroada_kernels.benchmarks.candidates import table
from neuroada_kernels.benchmarks.linear_results import Results, Skipped
from neuroada_kernels.benchmarks.shapes import bench_cases, shape_names
from neuroada_kernels.testing import BENCH_CASES, GPU_BENCH_CASES, Case, Shape

#: What a default run compares.
ALWAYS = {name: row for name, row in table().items() if not row.peer}
TINY = tuple(Case(tokens=16, d_in=64, d_out=d_out, k=k) for d_out in (64, 48) for k in (1, 8))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BENCH_CASES", TINY)


def test_json_holds_what_it_takes_to_judge_and_repeat_a_run(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bench.json"
    arguments = ["--cases", "64to48", "--k", "2", "--rounds", "3", "--host-cost"]
    assert linear.main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["kind"] == "linear"
    assert found["command"] == f"neuroada bench linear {' '.join(arguments)}"
    assert found["settings"] == {
        "rounds": 3,
        "device": "cpu",
        "candidates": list(ALWAYS),
    }
    assert found["summary"] == {"fits": [], "bars": []}
    (session,) = found["sessions"]
    assert session["package"] == nk.__version__
    assert session["torch"] == torch.__version__
    assert session["threads"] == torch.get_num_threads()
    assert {"commit", "uncommitted_changes", "date", "cpu", "openmp", "python"} <= session.keys()

    *measured, host = found["results"]
    assert host["host_cost"]["over_frozen_us"].keys() == {"lower", "median", "upper"}
    rows = {(row["dtype"], row["candidate"]): row for row in measured}
    assert rows.keys() == {(dtype, name) for dtype in ("float32", "bfloat16") for name in ALWAYS}
    for (_, name), row in rows.items():
        assert row["case"]["name"] == "T16-64to48-k2"
        assert row["backend"] == table()[name].backend
        samples = row["samples_ns"]
        assert len(samples["forward"]) == len(samples["backward"]) == 3
        total = sorted(f + b for f, b in zip(*samples.values(), strict=True))
        assert row["total_us"]["median"] == total[1] / 1000
        for key in ("forward_us", "backward_us", "total_us", "ratio_to_frozen", "host_us"):
            assert 0 < row[key]["lower"] <= row[key]["median"] <= row[key]["upper"]
        for rate, work in (("gb_per_s", 1e3 * row["bytes"]), ("tflop_per_s", row["flops"])):
            assert row[rate] == pytest.approx(work / row["total_us"]["median"] / 1e6)
        assert row["peak_bytes"] >= row["peak_bytes_beyond_y_and_dx"] >= 0
        assert row["kept_bytes"] >= 0
    assert rows["float32", "frozen"]["ratio_to_frozen"]["median"] == 1
    chosen = [row["candidate"] for row in rows.values() if row["automatic"]]
    assert len(chosen) == 2
    assert len(set(chosen)) == 1

    shown = capsys.readouterr().out
    assert all(name in shown for name in ALWAYS)
    assert "host time of one forward call" in shown


def test_the_ratio_is_that_of_the_samples_round_by_round(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    linear.main(["--quick", "--candidates", "lora-r8", "--rounds", "1", "--json", str(path)])
    frozen, lora = json.loads(path.read_text())["results"]
    total = [
        sum(row["samples_ns"][part][0] for part in ("forward", "backward"))
        for row in (frozen, lora)
    ]
    assert lora["ratio_to_frozen"]["median"] == total[1] / total[0]


def test_a_png_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    linear.main(["--candidates", "lora-r8", "--rounds", "2", "--png", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_matplotlib_and_transformers_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, neuroada_kernels.benchmarks.linear, neuroada_kernels.benchmarks.model\n"
        "sys.exit(not sys.modules.keys().isdisjoint({'matplotlib', 'transformers'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_chart_without_matplotlib_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(linear, "measure_case", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(SystemExit):
        linear.main(["--png", str(tmp_path / "bench.png")])
    assert "matplotlib is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "expected"), [(1e9, 0), (0.0, 1)])
def test_assert_bars_gives_the_exit_status(limit, expected, monkeypatch, capsys) -> None:
    bar = Bar(limit, "frozen", "T16-64to64-k8")
    judge = linear_results.judge
    monkeypatch.setattr(linear_results, "judge", lambda rows, host: judge(rows, host, [bar]))
    assert linear.main(["--quick", "--assert-bars"]) == expected
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{'missed' if expected else 'met'} {bar.meaning}" in shown


def test_assert_bars_measures_the_host_cost(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = []

    def judge(rows, host):
        seen.append(host)
        return [Verdict(Bar(1.0, "frozen"), None)]

    monkeypatch.setattr(linear_results, "judge", judge)
    assert linear.main(["--quick", "--candidates", "lora-r8", "--assert-bars"]) == 1
    assert seen[0] is not None
    assert "bars without a measurement in this run: 1" in capsys.readouterr().out


def test_threads_are_set_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen = []

    def measure_case(case, dtype, candidates, *args, **kwargs):
        seen.append(torch.get_num_threads())
        return [Skipped(case, dtype, row.name, "a test") for row in candidates]

    monkeypatch.setattr(linear, "measure_case", measure_case)
    linear.main(["--quick", "--threads", "2"])
    assert seen == [2]
    assert torch.get_num_threads() == before


def test_cases_are_those_of_the_shared_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BENCH_CASES", BENCH_CASES)
    for known in (BENCH_CASES, GPU_BENCH_CASES):
        assert set(bench_cases(known)) == set(known)
    assert [case.name for case in bench_cases(BENCH_CASES, quick=True)] == [
        "T512-2048to2048-k8",
        "T16-2048to2048-k8",
    ]
    assert bench_cases(BENCH_CASES, k=[4], filters=["T16-"]) == [replace(BENCH_CASES[-1], k=4)]


def test_cases_of_models_and_sweeps() -> None:
    cases = bench_cases(BENCH_CASES, shapes=shape_names("qwen2.5-7b"), tokens=[1, 7], k=[2])
    assert [case.name for case in cases][::2] == [
        "T1-3584to3584-k2-bias",
        "T1-3584to512-k2-bias",
        "T1-3584to3584-k2",
        "T1-3584to18944-k2",
        "T1-18944to3584-k2",
    ]
    over_k = bench_cases(BENCH_CASES, sweep="k")
    assert {replace(case, k=1) for case in over_k} == {BENCH_CASES[0]}
    assert [case.k for case in over_k] == [1, 2, 4, 8, 16, 32, 64, 128]
    over_tokens = bench_cases(BENCH_CASES, sweep="tokens", k=[3], shapes=shape_names("64x32"))
    assert {(case.d_in, case.d_out, case.k) for case in over_tokens} == {(64, 32, 3)}
    assert [case.tokens for case in over_tokens][:: len(over_tokens) - 1] == [1, 16384]


def test_the_shapes_of_models_are_those_of_their_configurations() -> None:
    transformers = pytest.importorskip("transformers")
    bert, gpt2 = transformers.BertConfig(), transformers.GPT2Config()
    assert shape_names("bert-base")[1:] == (
        Shape(bert.hidden_size, bert.intermediate_size, True),
        Shape(bert.intermediate_size, bert.hidden_size, True),
    )
    assert shape_names("gpt-2")[0] == Shape(gpt2.n_embd, 3 * gpt2.n_embd, True)


def test_a_file_is_gone_on_with_and_shows_how_time_grows(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    fixed = ["--shapes", "64x64", "--dtypes", "float32", "--candidates", "lora-r8", "--rounds", "2"]
    linear.main([*fixed, "--k", "1", "2", "--json", str(path)])
    once = json.loads(path.read_text())
    linear.main([*fixed, "--k", "1", "2", "4", f"--json={path}"])
    found = json.loads(path.read_text())
    assert found["results"][: len(once["results"])] == once["results"]
    assert found["command"] == " && ".join(
        f"neuroada bench linear {' '.join(fixed)} --k {k}" for k in ("1 2", "1 2 4")
    )
    assert once["summary"]["fits"] == []
    fitted = {fit["candidate"]: fit for fit in found["summary"]["fits"]}
    assert fitted.keys() == {"frozen", "lora-r8"}
    assert fitted["frozen"]["over"] == "k"
    assert fitted["frozen"]["values"] == [1, 2, 4]
    assert "time = a + b k, k from 1 to 4; 64 to 64, T = 16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        linear.main([*fixed, "--peers", "--json", str(path)])
    assert f"--json: {path}: has rows of candidates " in capsys.readouterr().err
    assert json.loads(path.read_text()) == found


def test_the_page_is_written_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    page = types.ModuleType("html")
    page.write_html = lambda found, path: pages.append((json.loads(json.dumps(found)), path))
    monkeypatch.setitem(sys.modules, "neuroada_kernels.benchmarks.html", page)
    json_, html = tmp_path / "a.json", tmp_path / "a.html"
    linear.main(["--quick", "--candidates", "lora-r8", "--json", str(json_), "--html", str(html)])
    assert pages == [({"a.json": json.loads(json_.read_text())}, html)]


def test_the_help_shows_the_suites_and_how_to_see_their_options(capsys) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in suites.SUITES)
    assert "`neuroada bench SUITE --help`" in shown
    with pytest.raises(SystemExit):
        cli.main(["bench", "linear", "--help"])
    assert "usage: neuroada bench linear" in capsys.readouterr().out


def test_an_unknown_suite_is_refused_by_name(capsys) -> None:
    assert cli.main(["bench", "peersx", "--quick"]) == 2
    shown = capsys.readouterr().err
    assert f"unknown suite 'peersx', expected one of {', '.join(suites.SUITES)}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nothing"], "--k: no such case"),
        (["--candidates", "qlora"], "invalid choice: 'qlora'"),
        (["--k", "0"], "0, expected at least 1"),
        (["--shapes", "llama-4"], "'llama-4', expected D_INxD_OUT or one of llama-3-8b"),
        (["--shapes", "64x96", "--k", "65"], "no such case, or k larger than its d_in"),
        (["--json", "/nowhere/bench.json"], "/nowhere is no directory"),
        (["--json", "one", "--html", "./one"], "--html: one, which --json names too"),
        (["--assert-bars", "--rounds", "8"], "--rounds: 8, expected at least 9"),
    ],
)
def test_arguments_that_would_measure_nothing_are_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        linear.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_more_than_one_openmp_runtime_is_pointed_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(environment, "_openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    linear.main(["--quick", "--candidates", "lora-r8", "--rounds", "1"])
    assert "More than one OpenMP runtime" in capsys.readouterr().out


def test_what_was_not_timed_is_shown_with_its_reason(capsys) -> None:
    skipped = Skipped(TINY[0], "float32", "neuroada-x", "shape [1, 2]")
    report.print_results(Results(skipped=[skipped]), report.Console())
    shown = " ".join(capsys.readouterr().out.split())
    assert "not timed: neuroada-x, T16-64to64-k1 float32: shape [1, 2]" in shown
