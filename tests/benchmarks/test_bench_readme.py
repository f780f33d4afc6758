"""The documentation's figures and tables say what the committed results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from neuroada_kernels.benchmarks import readme, readme_headline
from neuroada_kernels.benchmarks.html import block_memory, linear_tables
from neuroada_kernels.benchmarks.html.source import Source

ROOT = Path(__file__).parents[2]


def _row(candidate: str, ratio: float, automatic: bool = False) -> dict:
    case = {"name": "a", "tokens": 16, "d_in": 8, "d_out": 4, "k": 2}
    return {
        "case": case,
        "dtype": "float32",
        "candidate": candidate,
        "automatic": automatic,
        "ratio_to_frozen": {"median": ratio},
    }


SESSION = {
    "threads": 2,
    "cpu": "a processor",
    "cpu_capability": "AVX2",
    "torch": "2.13.0",
    "commit": "0123456789abcdef",
}
ROWS = [_row("frozen", 1.0), _row("neuroada-cpu", 1.043, True), _row("lora-r8", 1.127)]
HOST = {"over_frozen_us": {"median": 14.4}, "frozen_us": {"median": 3.1}}
OLD = {**SESSION, "rounds": 9, "host_cost": HOST, "results": ROWS}
FRAMED = {
    "kind": "linear",
    "command": "neuroada bench linear",
    "settings": {"rounds": 9},
    "sessions": [SESSION],
    "results": [*ROWS, {"key": "host-cost", "host_cost": HOST}],
}


@pytest.mark.parametrize("document", [OLD, FRAMED], ids=["without a frame", "framed"])
def test_the_table_has_a_row_a_case_with_ours_in_bold(document):
    lines = readme.linear_table(Source("linear.json", "linear", document)).splitlines()
    assert lines[0] == "| T | d_in × d_out | dtype | k | **neuroada-cpu** | lora-r8 |"
    assert lines[2] == "| 16 | 8 × 4 | float32 | 2 | **1.04** | 1.13 |"
    assert "9 interleaved rounds" in lines[-1]
    assert "2 threads of an a processor (AVX2), torch 2.13.0, commit 0123456." in lines[-1]
    assert "costs 14 µs of Python and dispatch overhead" in lines[-1]


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        (0.858, 0.944, "6 to 14 % *less* time"),
        (0.97, 1.084, "3 % less to 8 % more"),
        (1.003, 1.107, "up to 11 % more"),
        (1.065, 1.911, "6 to 91 % more"),
    ],
)
def test_the_headline_says_what_is_added_to_the_frozen_linear(least, most, said):
    rows = [_row("neuroada-cpu", ratio, True) for ratio in (most, least)]
    rows = [{**row, "case": {**row["case"], "tokens": 512}} for row in rows]
    rows += [{**row, "dtype": "bfloat16"} for row in rows] + ROWS
    source = Source("benchmarks/results/cpu/linear.json", "linear", {**FRAMED, "results": rows})
    line = readme_headline.table(source).splitlines()[-1]
    assert line == f"| AMD EPYC with AVX-512; 512 tokens | {said} | {said} |"


def _kept(method: str, count: int) -> dict:
    linears = count - (2 << 20)
    return {
        "dtype": "float32",
        "method": method,
        "kept_bytes": count,
        "kept_bytes_by_the_linears": linears,
    }


def test_the_memory_table_says_how_much_less_is_kept():
    rows = [_kept("frozen", 2 << 20), _kept("full", 10 << 20), _kept("compact", 8 << 20)]
    lines = block_memory.kept({"results": rows}).markdown().splitlines()
    assert lines[0] == "|  | block, float32 | by its linears, float32 |"
    assert lines[2:5] == [
        "| frozen | 2.0 | 0.0 |",
        "| full | 10.0 | 8.0 |",
        "| compact | 8.0 (−20%) | 6.0 (−25%) |",
    ]


def test_only_what_stands_between_the_markers_is_replaced():
    text = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n"
    new = readme.replaced(text, "page.md", "a", "new \\1")
    assert new == "before\n<!-- a -->\nnew \\1\n<!-- end of a -->\nafter\n"
    with pytest.raises(readme.DocumentError, match=r"page\.md: has no <!-- b -->"):
        readme.replaced(text, "page.md", "b", "new")


@pytest.mark.parametrize("page", sorted({part.page for part in readme.PARTS}))
def test_a_page_says_what_the_committed_results_say(page):
    text = (ROOT / page).read_text()
    assert readme.written_pages(ROOT)[page] == text, "run make figures"
    assert page == readme.BENCHMARKS or readme.NONE_YET not in text


@pytest.mark.parametrize("figure", readme.figures(ROOT), ids=lambda figure: figure.path)
def test_a_figure_shows_what_the_committed_results_say(figure):
    # The numbers, not the bytes: another matplotlib may draw the same otherwise.
    text = (ROOT / figure.path).read_text()
    said = re.search("<desc>(.*)</desc>", text)
    assert unescape(said[1]) == readme.description(ROOT, figure), "run make figures"
    assert f"<title>{figure.title}</title>" in text
    assert "var(--" not in text


def test_changed_results_change_the_pages_and_figures(tmp_path, capsys):
    for name in ("README.md", "docs", readme.RESULTS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    assert readme.main([str(tmp_path)]) == 0
    capsys.readouterr()
    path = tmp_path / readme.RESULTS / "linear.json"
    document = json.loads(path.read_text())
    for row in linear_tables.measurements(document):
        for quartile in row["ratio_to_frozen"]:
            row["ratio_to_frozen"][quartile] *= 2
    path.write_text(json.dumps(document))
    assert readme.main([str(tmp_path)]) == 0
    changed = capsys.readouterr().out
    assert "README.md, docs/benchmarks.md, docs/figures/ratio-to-frozen.svg\n" in changed
    assert readme.main([str(tmp_path)]) == 0
    assert "nothing, all is as the results say" in capsys.readouterr().out
