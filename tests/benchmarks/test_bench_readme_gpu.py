"""The documentation has a GPU's tables where its results are committed, and nothing otherwise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gpu_results
import pytest

pytest.importorskip("matplotlib")

from neuroada_kernels.benchmarks import readme, readme_gpu
from neuroada_kernels.benchmarks.html import linear, llama_block, model
from neuroada_kernels.benchmarks.html.source import Source

ROOT = Path(__file__).parents[2]
LINEAR = gpu_results.linear(
    {
        "frozen": (1_000_000, 1_000_000, 2_000_000),
        "neuroada-cuda": (1_250_000, 1_260_000, 2_500_000),
        "full": (1_500_000, 1_500_000, 3_000_000),
        "resident": lambda d_in, d_out: (1_100_000, 1_100_000, 2_200_000),
    },
    tokens=(8192, 1024),
)
MODEL = gpu_results.model(
    {"neuroada": 24.5, "peft-lora-r16": 30}, {"masked-dense": "OutOfMemoryError: CUDA"}
)
MODEL["results"].append({**MODEL["results"][0], "mode": "checkpointed", "peak_bytes": 18 << 30})


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The pages, and no results."""
    for page in {part.page for part in readme.PARTS}:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def between(text: str, marker: str) -> list[str]:
    (found,) = re.findall(f"<!-- {marker} -->\n(.*)\n<!-- end of {marker} -->", text, re.DOTALL)
    return found.splitlines()


def test_without_results_of_a_gpu_the_pages_say_nothing_of_it(checkout):
    pages = readme.written_pages(checkout)
    for part in readme.PARTS:
        if part.folder == readme_gpu.RESULTS:
            assert between(pages[part.page], part.marker) == []


def test_results_of_a_gpu_become_tables(checkout):
    folder = checkout / readme_gpu.RESULTS
    folder.mkdir(parents=True)
    (folder / "linear.json").write_text(json.dumps(LINEAR))
    (folder / "model.json").write_text(json.dumps(MODEL))
    pages = readme.written_pages(checkout)

    title, _, heading, _, *rows, _, note = between(pages["README.md"], "GPU linears")
    assert title.endswith("as a ratio to frozen, bfloat16, on an NVIDIA H200:")
    assert heading == "| T | k | frozen, ms | **neuroada-cuda** | resident | full |"
    sizes = [f"| {tokens} | {k} " for tokens in (1024, 8192) for k in (1, 8, 20)]
    assert rows == [f"{size}| 7.00 | **1.25** | 1.10 | 1.50 |" for size in sizes]
    assert "3 interleaved rounds. NVIDIA H200; torch 2.11.0, driver 580.1; commit 0123456." in note

    title, _, heading, _, *rows, _, note = between(pages["README.md"], "GPU training step")
    assert "32 layers of width 4096" in title
    assert heading == (
        "| method | tokens/s, plain | peak GiB, plain | tokens/s, checkpointed "
        "| peak GiB, checkpointed |"
    )
    assert rows == [
        "| **neuroada** | 8,765 | 24.5 | 8,765 | 18.0 |",
        "| peft-lora-r16 | 8,765 | 30.0 |  |  |",
        "| masked-dense | out of memory |  |  |  |",
    ]
    assert note.startswith("Blank cells were not measured. NVIDIA H200")
    assert note.endswith("commit 0123456. `benchmarks/gpu_run.sh OUTDIR` repeats it.")

    machine = "NVIDIA H200; 8192 tokens, the linears of a Llama-3-8B block"
    more = "25 / 25 / 25 % more at k = 1 / 8 / 20 (`resident`: 10 / 10 / 10 %)"
    assert between(pages["README.md"], "headline")[2:] == [
        f"| {machine} | not served by default | {more} |"
    ]

    targets = between(pages[readme.BENCHMARKS], "GPU targets")
    assert (
        "| block, T 8192, k 8: bypass over frozen | 1.250 | missed (at most 1.20) "
        "| missed (at most 1.08) | neuroada-cuda |"
    ) in targets
    assert any("| -18.3 % | met (not more) | met (less) |" in row for row in targets)
    cases = between(pages[readme.BENCHMARKS], "GPU cases")
    assert sum(line.startswith("| 8192 | 4096 × ") for line in cases) == 9
    *_, steps = between(pages[readme.BENCHMARKS], "GPU model tables")
    assert "Mode: checkpointed:" in between(pages[readme.BENCHMARKS], "GPU model tables")
    assert steps.startswith("Rows that a mode lacks were not measured.")


def test_a_gpus_command_selects_the_modes_and_methods_of_its_rows():
    settings = {**MODEL["settings"], "device": "cuda"}
    source = Source("model.json", "model", {**MODEL, "settings": settings})
    methods = "neuroada peft-lora-r16 masked-dense"
    modes = "--modes plain checkpointed"
    assert source.command == f"neuroada bench model --device cuda {modes} --methods {methods}"
    assert Source("model.json", "model", MODEL).command == "neuroada bench model --device cuda"


def test_linears_that_make_no_block_are_no_table():
    part = {**LINEAR, "results": LINEAR["results"][:4]}
    assert readme_gpu.block_table(Source("linear.json", "linear", part)) == ""


def test_blocks_of_several_dtypes_are_told_apart():
    single = [{**row, "dtype": "float32"} for row in LINEAR["results"]]
    both = {**LINEAR, "results": [*LINEAR["results"], *single]}
    table = llama_block.summed(both)
    assert table.headings[:3] == ["T", "dtype", "k"]
    assert [row[:3] for row in table.rows[:6:3]] == [
        ["1024", "bfloat16", "1"],
        ["1024", "float32", "1"],
    ]


def test_the_report_sums_a_block_and_shows_what_a_gpu_does_in_its_units():
    section = linear.section(Source("linear.json", "linear", LINEAR))
    shown = "".join(section.blocks)
    assert "Linears of a Llama-3-8B block as a ratio to frozen, bfloat16" in section.blocks[0]
    assert "<strong>1.25</strong>" in section.blocks[0]
    assert "TFLOP/s</th>" in shown
    assert "<td>765</td>" in shown
    assert "765 TFLOP/s</text>" in shown
    assert "GFLOP/s" not in shown
    shown = "".join(model.section(Source("model.json", "model", MODEL)).blocks)
    assert "peak, GiB</th>" in shown
    assert "<td>24.5</td>" in shown
