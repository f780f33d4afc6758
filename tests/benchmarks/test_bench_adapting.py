"""The benchmark of adapting, on a model that is tiny."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from results_files import on_a_page

from neuroada_kernels.benchmarks import adapting
from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.plan import plan_size

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_one_layer_of_llama_has_its_parameters():
    shapes = adapting.shapes(Sizes())
    assert sum(d_out * d_in for d_out, d_in in shapes.values()) == 218_103_808
    assert 32 * 20 * sum(d_out for d_out, _ in shapes.values()) == 27_525_120


def test_it_measures_and_extrapolates(tmp_path, capsys):
    path = tmp_path / "adapting.json"
    threads = str(torch.get_num_threads())
    arguments = ["--hidden", "256", "--intermediate", "512", "--layers", "2", "--k", "1", "3"]
    assert adapting.main([*arguments, "--threads", threads, "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("s per 10⁹") == 2
    written = json.loads(path.read_text())
    shapes = adapting.shapes(Sizes(hidden=256, intermediate=512))
    for row, k in zip(written["results"], (1, 3), strict=True):
        neurons = 2 * (3 * 256 + 2 * 64 + 2 * 512)
        assert row["index_bytes"] == row["delta_bytes"] == 4 * k * neurons
        plans = 2 * sum(plan_size(d_in, k * d_out) for d_out, d_in in shapes.values())
        assert row["plan_bytes"] == 4 * plans
        kept = row["index_bytes"] + row["delta_bytes"] + row["plan_bytes"]
        assert row["peak_bytes"] == kept + row["peak_bytes_beside_what_is_kept"]
        assert row["parameters"] == 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 512)
        assert row["seconds_per_billion"] == pytest.approx(1e9 * row["seconds"] / row["parameters"])
        whole = row["extrapolated_to_all_layers"]
        assert whole["plan_bytes"] == 16 * row["plan_bytes"]
        assert whole["peak_bytes"] == 16 * kept + row["peak_bytes_beside_what_is_kept"]
        assert whole["seconds"] == pytest.approx(16 * row["seconds"])
    assert "Seconds and memory of adapt" in on_a_page(path)
