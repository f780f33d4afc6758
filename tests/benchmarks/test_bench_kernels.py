"""What each kernel of a step takes is said for what ran, by its name."""

from __future__ import annotations

import pytest
import torch

from neuroada_kernels import cli
from neuroada_kernels.benchmarks import kernels
from neuroada_kernels.benchmarks.candidates import bench_inputs, prepare, table
from neuroada_kernels.testing import Case


def test_the_kernels_of_a_step_are_there_as_often_as_they_run_and_the_longest_comes_first():
    inputs = bench_inputs(Case(tokens=64, d_in=48, d_out=32, k=2), torch.float32)
    times = kernels.kernel_times(prepare(table()["frozen"], inputs), steps=3)
    assert [t.us for t in times] == sorted((t.us for t in times), reverse=True)
    products = {t.kernel: t.calls for t in times if t.kernel in ("aten::addmm", "aten::mm")}
    assert sum(products.values()) == 2, "forward and dx"


def test_a_kernels_name_is_said_without_what_all_have():
    recorded = "void neuroada::cuda::sum_kernel<neuroada::Half, 2>(neuroada::cuda::SumLaunch)"
    assert kernels._NOISE.sub("", recorded) == "sum_kernel<Half, 2>"


def test_the_suite_prints_a_table_for_each_candidate(capsys):
    options = ["--device", "cpu", "--shapes", "32x48", "--tokens", "8", "--k", "2", "--steps", "1"]
    candidates = ["--candidates", "frozen", "neuroada-eager", "--dtype", "float32"]
    assert cli.main(["bench", "kernels", *options, *candidates]) == 0
    said = capsys.readouterr().out
    for candidate in ("frozen", "neuroada-eager"):
        assert f"T8-32to48-k2, {candidate}:" in said


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "--device cuda: no GPU is visible" in capsys.readouterr().err
