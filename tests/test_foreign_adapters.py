"""Adapter files of models with bases whose forward is not ours."""

from __future__ import annotations

import foreign
import pytest
import torch
from foreign import D_IN
from safetensors.torch import load_file, save_file
from test_foreign_model import LIBRARY, Mixed, layers_of, train

import neuroada_kernels as nk
from neuroada_kernels import info
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.inspection import describe
from neuroada_kernels.inspection import main as inspect
from neuroada_kernels.merging import merge_checkpoint

KINDS = ("plain", *LIBRARY, "scaled")
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def trained(kinds=KINDS, **options):
    model = Mixed(kinds)
    nk.adapt(model, 3, list(kinds), **options)
    train(model, 3)
    return model


@pytest.mark.filterwarnings("ignore:delta. new parameters")
@pytest.mark.parametrize("into", ["the base", "an adapted model"])
def test_what_was_saved_loads_over_every_kind_of_base(path, into):
    model = trained(bias="all")
    nk.save_adapter(model, path)
    fresh = Mixed(KINDS)
    if into == "an adapted model":
        nk.adapt(fresh, 5, list(KINDS), selection="smallest")
    summary = nk.load_adapter(fresh, path)
    assert summary.modules == tuple(f"layers.{kind}" for kind in KINDS)
    assert torch.equal(fresh(X), model(X))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags
    assert flags["layers.conv1d.base.bias"]


def test_parameters_go_by_the_names_of_the_model_before(path):
    nk.save_adapter(trained(("conv1d", "nf4"), bias="all"), path)
    assert set(read_adapter(path).parameters) == {"layers.conv1d.bias", "layers.nf4.bias"}


def test_a_layer_that_stands_twice_is_saved_once(path):
    def twice():
        torch.manual_seed(0)
        base = foreign.make("conv1d", d_out=D_IN)
        return torch.nn.Sequential(base, torch.nn.Tanh(), base)

    model = twice()
    nk.adapt(model, 2, bias="all")
    assert model[0] is model[2]
    train(model, 3)
    nk.save_adapter(model, path)
    assert set(read_adapter(path).parameters) == {"0.bias"}
    fresh = twice()
    nk.load_adapter(fresh, path)
    assert fresh[0] is fresh[2]
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused(path, kind):
    nk.save_adapter(trained((kind,)), path)
    other = Mixed((kind,))
    index = read_adapter(path).modules[f"layers.{kind}"].index
    base = other.layers[kind]
    with torch.no_grad():
        if kind in ("plain", "scaled"):
            base.weight[2, int(index[2, 0])] += 0.5
        elif kind == "conv1d":
            base.weight[int(index[2, 0]), 2] += 0.5
        else:
            torch.manual_seed(9)
            other.layers[kind] = foreign.make(kind, d_out=D_IN)
    before = dict(other.named_modules())
    with pytest.raises(ValueError, match=f"layers.{kind}: other values at the chosen"):
        nk.load_adapter(other, path)
    assert dict(other.named_modules()) == before
    nk.load_adapter(other, path, allow_mismatch=True)
    assert layers_of(other)[kind].delta.any()


def test_another_kind_of_base_is_refused(path):
    nk.save_adapter(trained(("nf4",)), path)
    other = Mixed(("nf4",))
    other.layers["nf4"] = torch.nn.Linear(D_IN, D_IN)
    with pytest.raises(ValueError, match="kind plain linear, expected bitsandbytes nf4"):
        nk.load_adapter(other, path)
    other.layers["nf4"] = foreign.QUANTISED["fp4"](torch.nn.Linear(D_IN, D_IN))
    with pytest.raises(ValueError, match="kind bitsandbytes fp4, expected bitsandbytes nf4"):
        nk.load_adapter(other, path)
    other.layers["nf4"] = torch.nn.ReLU()
    with pytest.raises(TypeError, match=r"layers\.nf4: ReLU, expected torch.nn.Linear"):
        nk.load_adapter(other, path)


def test_a_base_without_a_weight_is_known_by_its_shape(path):
    model = Mixed(("hidden",))
    nk.adapt(model, 2, ["hidden"], selection="random")
    train(model, 2)
    nk.save_adapter(model, path)
    fresh = Mixed(("hidden",))
    nk.load_adapter(fresh, path)
    assert torch.equal(fresh(X), model(X))
    fresh = Mixed(("scaled",))
    fresh.layers["hidden"] = fresh.layers["scaled"]
    with pytest.raises(ValueError, match="kind module, expected module without a weight"):
        nk.load_adapter(fresh, path)


def test_a_merged_layer_is_saved_with_the_base_it_had(path):
    model = trained(("conv1d", "plain"))
    expected = model(X)
    nk.merge(model)
    nk.save_adapter(model, path)
    fresh = Mixed(("conv1d", "plain"))
    nk.load_adapter(fresh, path)
    assert torch.equal(fresh(X), expected)


def test_inspect_says_what_kind_of_base_it_was(path, capsys):
    nk.save_adapter(trained(("plain", "conv1d", "nf4")), path)
    kinds = {name: module["kind"] for name, module in describe(path)["modules"].items()}
    assert kinds == {
        "layers.plain": None,
        "layers.conv1d": "transformers Conv1D",
        "layers.nf4": "bitsandbytes nf4",
    }
    assert inspect([str(path)]) == 0
    assert "64 to 64 float32 (bitsandbytes nf4), k 3" in capsys.readouterr().out


def test_a_file_of_conv1d_is_not_merged_into_a_checkpoint_the_wrong_way_round(path, tmp_path):
    model = trained(("conv1d",))
    nk.save_adapter(model, path)
    save_file(Mixed(("conv1d",)).state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"transformers Conv1D, which is transposed"):
        merge_checkpoint(
            tmp_path / "base.safetensors", path, tmp_path / "out.safetensors", allow_mismatch=True
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_a_library_that_is_missing_is_named(path, monkeypatch):
    nk.save_adapter(trained(("nf4",)), path)
    other = Mixed(("plain",))
    other.layers["nf4"] = other.layers["plain"]
    monkeypatch.setattr("neuroada_kernels.nn.foreign.find_spec", lambda name: None)
    assert info.facts()["other_bases"]["torchao"].startswith("not installed: install")
    words = r"bitsandbytes is not installed: install the extra 'quantized'"
    with pytest.raises(ValueError, match=f"expected bitsandbytes nf4, {words}"):
        nk.load_adapter(other, path)


def test_what_four_bits_were_trained_for_goes_into_the_weight_before_them(path, tmp_path):
    linear = torch.nn.Linear(D_IN, D_IN)
    files = [tmp_path / "base.safetensors", path, tmp_path / "out.safetensors"]
    save_file({"layers.nf4.weight": linear.weight.detach()}, files[0])
    model = Mixed(("nf4",))
    model.layers["nf4"] = foreign.QUANTISED["nf4"](linear)
    nk.adapt(model, 2)
    train(model, 3)
    nk.save_adapter(model, path)
    with pytest.raises(ValueError, match="trained on, a bitsandbytes nf4; allow_mismatch"):
        merge_checkpoint(*files)
    merge_checkpoint(*files, allow_mismatch=True)
    layer = model.layers["nf4"]
    expected = nk.reference.merged_weight(linear.weight, layer.index, layer.delta)
    assert torch.equal(load_file(files[2])["layers.nf4.weight"], expected)
