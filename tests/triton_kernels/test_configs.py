"""Which config and which kernel are chosen, and tuning: nothing here runs a kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from neuroada_kernels.triton_kernels import configs, tuning
from neuroada_kernels.triton_kernels.configs import H200, BypassConfig

CUDA = torch.device("cuda", 0)
SLOW, FAST, HUGE = BypassConfig(64, 64, 4), BypassConfig(64, 32, 4), BypassConfig(64, 64, 8)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 128, 129, 10_000])
def test_blocks_divide_the_padding(tokens):
    padding = configs.padding(tokens)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        blocks = [c.block_t for c in configs.bypass_configs(tokens, dtype)]
        blocks += [c.block_t for c in configs.transposed_configs(tokens, dtype)]
        blocks += [c.block_t for c in configs.sddmm_configs(tokens, dtype)]
        blocks += [c.block_m for c in configs.gemm_configs(tokens, dtype, H200)]
        assert all(padding % block == 0 for block in blocks)
    assert configs.transpose_config(tokens).block_t == padding
    assert padding in (16, 128) or padding < 2 * tokens


def test_a_chunk_fits_the_workspace_and_is_never_empty():
    for bytes_per_token in (2, 8192, 2 * 14336, 65536, 1 << 30):
        tokens = configs.tokens_per_chunk(bytes_per_token)
        assert tokens % 128 == 0
        assert tokens == 128 or tokens * bytes_per_token <= configs.WORKSPACE_BYTES
    for width in (0, 1, 4096, 14336, 1 << 28):
        tokens = configs.tokens_per_float32_gemm(width)
        assert tokens % 128 == 0
        assert tokens == 128 or tokens * 4 * width <= configs.WIDE_BYTES


@pytest.mark.parametrize("gpu", configs.KNOWN_GPUS.values(), ids=lambda g: f"sm_{g.capability}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 64, 4096])
def test_there_is_a_product_config_for_every_gpu(gpu, dtype, tokens):
    for config in configs.gemm_configs(tokens, dtype, gpu):
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert config.num_stages >= 2
        assert config.num_stages * stage <= gpu.shared_bytes
    assert configs.gemm_configs(tokens, dtype, gpu)


@pytest.mark.parametrize("d_in", [1, 63, 64, 1000, 4096, 14336])
def test_splits_are_joined_until_they_fill_a_block_of_columns(d_in):
    (config,) = configs.transposed_configs(64, torch.float32)[:1]
    joined = config.splits_per_program(64, d_in)
    assert 64 % joined == 0
    assert joined == 64 or joined * max(1, d_in // 64) >= config.block_c
    assert joined == 1 or joined // 2 * max(1, d_in // 64) < config.block_c


@pytest.mark.parametrize(
    ("d_out", "k", "most"), [(4096, 1, 16), (4096, 8, 16), (4096, 20, 40), (14336, 20, 140)]
)
def test_a_column_of_as_many_entries_as_most_have_is_light(d_out, k, most):
    d_in = 4096
    index = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(0)).topk(k).indices
    counts = torch.bincount(index.flatten(), minlength=d_in)
    (product,) = configs.gemm_configs(64, torch.float32, H200)[:1]
    for config in (*configs.transposed_configs(64, torch.float32)[:1], product):
        assert config.most_light(d_out * k, d_in) == most
        assert (counts > most).float().mean() < 0.01


def test_the_sampled_gradient_is_split_until_the_gpu_is_full():
    assert configs.sddmm_parts(4096, 8192, H200) == 5
    assert configs.sddmm_parts(4096, 16, H200) == 1
    assert configs.sddmm_parts(1 << 20, 8192, H200) == 1
    assert configs.sddmm_parts(1, 0, H200) == 0 + 1


def prefer(tokens=8192, d=4096, dtype=torch.bfloat16, gpu=H200) -> bool:
    return configs.prefer_fused(tokens, d, d, dtype, gpu)


def test_one_kernel_is_chosen_where_it_saves_more_than_it_loses(monkeypatch):
    assert not prefer()
    monkeypatch.setattr(configs, "_GEMM_EFFICIENCY", 0.99)
    assert prefer()
    assert not prefer(dtype=torch.float64)
    assert not prefer(dtype=torch.float32)
    assert not prefer(d=4090)
    assert not prefer(tokens=0)


def test_the_environment_decides(monkeypatch):
    for value, chosen in (("0", False), ("1", True)):
        monkeypatch.setenv("NEUROADA_TRITON_FUSED", value)
        assert prefer() is chosen
        assert prefer(dtype=torch.float32) is chosen
        assert not prefer(dtype=torch.float64)
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", "yes")
    with pytest.raises(ValueError, match=r"NEUROADA_TRITON_FUSED: 'yes', expected 0 or 1"):
        prefer()


def test_facts_of_a_gpu_come_from_the_device(monkeypatch):
    def properties(major: int, minor: int) -> SimpleNamespace:
        return SimpleNamespace(
            major=major,
            minor=minor,
            multi_processor_count=7,
            shared_memory_per_block_optin=99 << 10,
        )

    for capability, nearest in (((9, 0), (9, 0)), ((8, 6), (8, 9)), ((12, 0), (10, 0))):
        device = torch.device("cuda", capability[0])
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, c=capability: properties(*c)
        )
        found = configs.gpu_of.__wrapped__(device)
        expected = replace(
            configs.KNOWN_GPUS[nearest],
            multiprocessors=7,
            capability=capability,
            shared_bytes=99 << 10,
        )
        assert found == expected
    assert configs.gpu_of(torch.device("cpu")) is H200


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning on a GPU that is not there; the list of the configs that were timed."""
    timed = []

    def time(run):
        run()
        return {SLOW: 2.0, FAST: 1.0}[timed[-1]]

    def run(config):
        timed.append(config)
        if config is HUGE:
            raise tuning._out_of_resources()(300, 200, "shared memory")

    def pick(kernel="bypass_fwd", candidates=(SLOW, HUGE, FAST)):
        return tuning.pick(kernel, (1, 2), list(candidates), run, CUDA)

    monkeypatch.setenv("NEUROADA_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (test)")
    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "_loaded", {})
    file = tmp_path / "neuroada_kernels" / "NVIDIA-H200-test-.json"
    return SimpleNamespace(pick=pick, timed=timed, file=file)


def test_without_being_asked_for_nothing_is_timed(tuned, monkeypatch):
    monkeypatch.delenv("NEUROADA_AUTOTUNE")
    assert tuned.pick() is SLOW
    assert not tuned.timed
    assert not tuned.file.exists()


def test_tuning_takes_the_fastest_and_remembers_it(tuned, monkeypatch):
    assert tuned.pick() is FAST
    assert tuned.timed == [SLOW, HUGE, FAST]
    assert tuned.pick() is FAST
    monkeypatch.setattr(tuning, "_loaded", {})  # as in the next process
    assert tuned.pick() is FAST
    assert len(tuned.timed) == 3
    assert json.loads(tuned.file.read_text()) == {
        "bypass_fwd 1 2": {"block_t": 64, "block_n": 32, "num_warps": 4}
    }
    assert [path.name for path in tuned.file.parent.iterdir()] == [tuned.file.name]


def test_a_result_that_is_no_candidate_any_more_is_found_anew(tuned):
    tuned.pick()
    assert tuned.pick(candidates=[SLOW]) is SLOW
    assert tuned.pick(kernel="other", candidates=[FAST]) is FAST
    assert len(json.loads(tuned.file.read_text())) == 2


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_broken_file_is_replaced(tuned, content):
    tuned.file.parent.mkdir(parents=True)
    tuned.file.write_text(content)
    assert tuned.pick() is FAST
    assert json.loads(tuned.file.read_text())


def test_what_another_process_has_written_since_stays(tuned):
    tuned.pick()
    known = json.loads(tuned.file.read_text())
    tuned.file.write_text(json.dumps({**known, "sddmm 3": {"block_t": 1}}))
    tuned.pick(kernel="other")
    assert json.loads(tuned.file.read_text()).keys() == {"bypass_fwd 1 2", "sddmm 3", "other 1 2"}


def test_where_nothing_can_be_written_the_fastest_is_taken_all_the_same(tuned):
    tuned.file.mkdir(parents=True)
    assert tuned.pick() is FAST
    assert tuned.pick() is FAST
    assert len(tuned.timed) == 3
    assert list(tuned.file.parent.iterdir()) == [tuned.file]


def test_nothing_is_timed_while_a_graph_is_captured(tuned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned.pick() is SLOW
    assert not tuned.timed


def test_a_problem_is_the_same_for_all_tokens_up_to_a_power_of_two():
    index = torch.zeros(5, 3)
    keys = {tuning.problem(tokens, 7, index, index, None) for tokens in (513, 1000, 1024)}
    assert keys == {(1024, 7, 5, 3, torch.float32, None)}
    assert tuning.problem(0, 7, index, index)[0] == 1
