"""Merging into a checkpoint on disk: the same bytes as merging the model, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted import TARGETS, Model, adapted, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels import checkpoint
from neuroada_kernels.cli import main
from neuroada_kernels.merging import merge_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def write_base(folder: Path, model: nn.Module, shards: int = 3) -> Path:
    """A folder as Hugging Face writes it, an integer tensor among the others."""
    folder.mkdir()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    state["steps"] = torch.arange(3)
    names = sorted(state)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "small"}')
    (folder / "pooling").mkdir()
    (folder / "pooling" / "config.json").write_text("{}")
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    nk.save_adapter(adapted(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merged_checkpoint_is_the_merged_model(tmp_path, monkeypatch, dtype, block):
    """Bit for bit, however the weights are cut into blocks."""
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block)
    base = write_base(tmp_path / "base", Model(dtype=dtype))
    model = Model(dtype=dtype)
    nk.adapt(model, 2, TARGETS, neuron_fraction=0.7)
    model.head.requires_grad_()
    trained(model, 0)
    nk.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")

    nk.merge(model)
    expected = {name: p for name, p in model.named_parameters() if not name.endswith("delta")}
    merged = read_all(tmp_path / "out")
    assert torch.equal(merged.pop("steps"), torch.arange(3))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == dtype
        assert torch.equal(bits(merged[name]), bits(tensor)), name


def test_a_file_is_merged_into_a_file(tmp_path, adapter):
    save_file(dict(Model().state_dict()), tmp_path / "base.safetensors", metadata={"a": "b"})
    merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    model = adapted()
    nk.merge(model)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}
    plain = Model()
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"))
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), model(x))


def test_other_files_are_copied_and_other_weights_are_not(tmp_path, adapter):
    base = write_base(tmp_path / "base", Model())
    (base / "pytorch_model.bin").write_bytes(b"weights that would stay unmerged")
    (base / "consolidated.safetensors").write_bytes(b"these too")
    (base / ".cache").mkdir()
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    merge_checkpoint(base, adapter, tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {
        "model.safetensors.index.json",
        "config.json",
        "pooling",
        "pooling/config.json",
    }
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "small"}'
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before


def test_where_two_shards_have_a_tensor_the_index_decides(tmp_path, adapter):
    base = write_base(tmp_path / "base", Model())
    where = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    name = "blocks.0.down.weight"  # in the first of them
    for file in set(where.values()) - {where[name]}:
        stray = {**load_file(base / file), name: torch.zeros(1)}
        save_file(stray, base / file)
    merge_checkpoint(base, adapter, tmp_path / "out")
    model = adapted()
    nk.merge(model)
    for file in set(where.values()):
        expected = model.get_parameter(name) if file == where[name] else torch.zeros(1)
        assert torch.equal(load_file(tmp_path / "out" / file)[name], expected)


def test_links_to_shards_are_followed(tmp_path, adapter):
    """As in the cache of Hugging Face."""
    base = write_base(tmp_path / "base", Model())
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(base.glob("*.safetensors"))):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(tmp_path / "blobs" / str(i))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert not torch.equal(
        read_all(tmp_path / "out")["blocks.0.up.weight"], Model().blocks[0].up.weight
    )


def test_progress_adds_up_to_all_bytes(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("neuroada_kernels.merging.BLOCK_BYTES", 100)
    base = write_base(tmp_path / "base", Model())
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    told = []
    merge_checkpoint(base, adapter, tmp_path / "out", progress=lambda *count: told.append(count))
    assert {total for _, total in told} == {size}
    assert sum(count for count, _ in told) == size
    assert max(count for count, _ in told) <= 100


def without(base: Path, name: str) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file)
    change_map(base, lambda where: where.pop(name))


def change(base: Path, name: str, new) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = new(tensors[name])
            save_file(tensors, file)


def change_map(base: Path, alter) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    alter(index["weight_map"])
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


WEIGHT = "blocks.1.down.weight"
WRONG = {
    "a weight less": (lambda base: without(base, WEIGHT), f"base: has no {WEIGHT}, which the"),
    "another shape": (
        lambda base: change(base, WEIGHT, lambda w: w[:, 1:].contiguous()),
        rf"{WEIGHT}: shape \[6, 11\], expected \[6, 12\]",
    ),
    "another dtype": (lambda base: change(base, WEIGHT, torch.Tensor.half), "dtype float16, exp"),
    "integers": (lambda base: change(base, WEIGHT, torch.Tensor.int), "dtype I32, expected a fl"),
    "other values": (lambda base: change(base, WEIGHT, lambda w: 2 * w), "other values at the"),
    "a shard missing": (
        lambda base: (base / "model-00002-of-00003.safetensors").unlink(),
        "model-00002",
    ),
    "a shard cut off": (
        lambda base: (base / "model-00002-of-00003.safetensors").write_bytes(b"1234"),
        "no safetensors file",
    ),
    "a tensor elsewhere": (
        lambda base: change_map(base, lambda where: where.update({"ghost": where[WEIGHT]})),
        "ghost is not in the file that the index names",
    ),
    "a shard outside": (
        lambda base: change_map(base, lambda where: where.update({WEIGHT: "../adapter"})),
        "'../adapter', expected names of files in its folder",
    ),
    "a shard by its whole path": (
        lambda base: change_map(base, lambda where: where.update({WEIGHT: "/etc/passwd"})),
        "'/etc/passwd', expected names",
    ),
    "the folder as a shard": (
        lambda base: change_map(base, lambda where: where.update({WEIGHT: ".."})),
        r"'\.\.', expected names",
    ),
    "a number as a shard": (
        lambda base: change_map(base, lambda where: where.update(dict.fromkeys(where, 1))),
        "1, expected names of files",
    ),
    "an index without a map": (
        lambda base: (base / "model.safetensors.index.json").write_text("{}"),
        "no index of shards: KeyError",
    ),
    "an index that is no JSON": (
        lambda base: (base / "model.safetensors.index.json").write_text("[" * 99999),
        "no index of shards",
    ),
    "no index": (
        lambda base: (base / "model.safetensors.index.json").unlink(),
        "0 indices and 3 safetensors files",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_base_is_refused_and_nothing_is_left(tmp_path, adapter, wrong):
    spoil, message = WRONG[wrong]
    base = write_base(tmp_path / "base", Model())
    spoil(base)
    with pytest.raises((OSError, ValueError), match=message):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert set(tmp_path.iterdir()) == {base, adapter}


@pytest.mark.parametrize("wrong", ["other values", "another dtype"])
def test_a_mismatch_can_be_insisted_on(tmp_path, adapter, wrong):
    base = write_base(tmp_path / "base", Model())
    WRONG[wrong][0](base)
    merge_checkpoint(base, adapter, tmp_path / "out", allow_mismatch=True)
    before, merged = read_all(base)[WEIGHT], read_all(tmp_path / "out")[WEIGHT]
    layer = adapted().blocks[1].down
    expected = nk.reference.merged_weight(before, layer.index, layer.delta)
    assert torch.equal(bits(merged), bits(expected))


def test_nothing_is_written_over(tmp_path, adapter):
    base = write_base(tmp_path / "base", Model())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists, expected a new name"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="lies inside"):
        merge_checkpoint(base, adapter, base / "merged")
    assert not (base / "merged").exists()


def test_a_single_safetensors_file_in_a_folder_needs_no_index(tmp_path, adapter):
    base = tmp_path / "base"
    base.mkdir()
    save_file(dict(Model().state_dict()), base / "any name.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "any name.safetensors").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 indices and 0 safetensors files"):
        merge_checkpoint(tmp_path / "empty", adapter, tmp_path / "out2")


def test_a_scalar_that_trained_is_replaced(tmp_path):
    def with_scale() -> nn.Module:
        model = Model()
        model.scale = nn.Parameter(torch.tensor(1.0))
        return model

    model = with_scale()
    nk.adapt(model, 2, TARGETS)
    model.scale.requires_grad_()
    trained(model, 0)
    nk.save_adapter(model, tmp_path / "adapter")
    base = write_base(tmp_path / "base", with_scale())
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(read_all(tmp_path / "out")["scale"], model.scale)


PEAK = """
import sys
from neuroada_kernels import checkpoint, merging
from neuroada_kernels.merging import merge_checkpoint

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

checkpoint.BLOCK_BYTES = merging.BLOCK_BYTES = 2 << 20
merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])  # what is loaded on first use
before = peak()
merge_checkpoint(sys.argv[4], sys.argv[5], sys.argv[6])
print(peak() - before)
"""


def test_memory_is_a_few_blocks_whatever_the_size_of_the_base(tmp_path, adapter):
    small = write_base(tmp_path / "small", Model())
    linear = nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16, device="meta")
    linear.to_empty(device="cpu").weight.requires_grad_(False).zero_()
    index = torch.zeros(8192, 1, dtype=torch.int32)
    large = nn.Sequential(nk.NeuroAdaLinear.from_linear(linear, index=index))
    nk.save_adapter(large, tmp_path / "large.adapter")
    save_file({"0.weight": large[0].weight.detach()}, tmp_path / "large")
    paths = [small, adapter, tmp_path / "1"]
    paths += [tmp_path / "large", tmp_path / "large.adapter", tmp_path / "2"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 << 20 < (tmp_path / "large").stat().st_size // 2


def test_the_command_merges(tmp_path, adapter, capsys):
    base = write_base(tmp_path / "base", Model())
    command = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert main(command) == 0
    assert "out: merged" in capsys.readouterr().out
    assert read_all(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "neuroada merge: out: " in capsys.readouterr().err


def test_the_command_inspects(tmp_path, adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    model = adapted()
    assert f"{adapter.stat().st_size:,} bytes" in shown
    assert "72 connections in 4 modules" in shown
    largest = model.blocks[0].up.delta.abs().max().item()
    assert f"6 to 12 float32, k 2, 24 connections, float32, max |delta| {largest:.3g}" in shown

    assert main(["inspect", "--json", str(adapter)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["connections"] == 72
    assert facts["modules"]["blocks.0.up"]["shape"] == [12, 6]
    assert facts["modules"]["blocks.0.up"]["largest_delta"] == largest

    adapter.write_bytes(b"no adapter")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(adapter)])
    assert ended.value.code == 1
    assert "no safetensors file" in capsys.readouterr().err


def test_merging_does_not_warn_of_another_part_of_the_same_memory():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both = torch.randn(8, 4)
    model[0].weight, model[1].weight = (nn.Parameter(part) for part in both.chunk(2))
    nk.adapt(model, target_modules=["0"])
    nk.merge(model)  # a warning would be an error


def test_merging_warns_of_whoever_reads_the_same_memory():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    nk.adapt(model, target_modules=["0"])
    with pytest.warns(UserWarning, match=r"0: its weight is shared with 1\.weight, which changes"):
        nk.merge(model)
