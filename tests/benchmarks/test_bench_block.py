"""``neuroada bench memory --block``: what a block keeps, beside what it has to be."""

from __future__ import annotations

import json

import pytest
import torch
from results_files import on_a_page

from neuroada_kernels.benchmarks import block
from neuroada_kernels.benchmarks.block import METHODS, Block, BlockSizes, measure_block
from neuroada_kernels.benchmarks.memory_model import command

SIZES = BlockSizes(tokens=16, width=64, hidden=256, heads=4)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_the_linears_keep_what_they_read_and_lora_its_ranks_too(dtype):
    kept = measure_block(SIZES, dtype)
    row = SIZES.tokens * dtype.itemsize
    inputs = SIZES.width + SIZES.width + SIZES.hidden  # of q, k, v; gate, up; down
    # o reads what attention keeps anyway.
    assert kept["full"] - kept["frozen"] == row * inputs
    assert kept["lora-r8"] - kept["full"] == row * 7 * block.RANK


@DTYPES
def test_compact_keeps_less_and_never_more(dtype):
    kept = measure_block(SIZES, dtype)
    linears = {method: count - kept["frozen"] for method, count in kept.items()}
    assert linears["compact"] == linears["resident, compact"]
    assert linears["compact"] <= linears["auto"] <= linears["full"] < linears["lora-r8"]
    assert linears["compact"] <= 0.6 * linears["full"]


def test_every_method_computes_the_same_block():
    """But for LoRA, which adds its own: a block that was not adapted would keep little."""
    outputs = {}
    for method, adapt in METHODS.items():
        torch.manual_seed(0)
        model = Block(SIZES)
        adapt(model, SIZES.k)
        x = torch.randn(1, SIZES.tokens, SIZES.width, requires_grad=True)
        outputs[method] = model(x)
        outputs[method].sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (0 if method == "frozen" else 14 if "lora" in method else 7)
        assert all(p.grad is not None for p in (x, *trained))
    expected = outputs.pop("frozen")
    assert not outputs.pop("lora-r8").allclose(expected)
    for y in outputs.values():
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_command_prints_and_writes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(block, "BlockSizes", lambda: SIZES)
    path = tmp_path / "memory.json"
    assert command.main(["--block", "--dtypes", "float32", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["kind"] == "block-memory"
    assert found["sizes"]["width"] == SIZES.width
    assert [row["method"] for row in found["results"]] == list(METHODS)
    expected = measure_block(SIZES, torch.float32)
    assert {row["method"]: row["kept_bytes"] for row in found["results"]} == expected
    shown, page = capsys.readouterr().out, on_a_page(path)
    assert all(method in shown and method in page for method in METHODS)
