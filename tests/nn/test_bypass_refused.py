"""What ``NeuroAdaBypass`` does not take, and that it says why before anything is changed."""

from __future__ import annotations

import foreign
import pytest
import torch
from foreign import D_IN, D_OUT
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.nn.foreign import is_of


def meta(make):
    with torch.device("meta"):
        return make()


def unquantised():
    return foreign.library("bitsandbytes").nn.Linear4bit(D_IN, D_OUT)


def half_weights():
    return foreign.library("bitsandbytes").nn.Linear8bitLt(D_IN, D_OUT, has_fp16_weights=True)


def packed():
    """What bitsandbytes leaves behind an evaluation on a CPU that has AVX-512 with bfloat16."""
    base = foreign.make("nf4")
    base.weight.quant_state.packing_format_for_cpu = True
    return base


def other_way_round():
    base = foreign.make("nf4")
    base.weight.quant_state.shape = torch.Size((D_IN, D_OUT))
    return base


def integers():
    base = foreign.make("conv1d")
    base.weight = nn.Parameter(torch.zeros(D_IN, D_OUT, dtype=torch.int8), requires_grad=False)
    return base


BASES = {
    "no layer": (lambda: nn.ReLU(), TypeError, "ReLU, expected in_features and out_features"),
    "no module": (lambda: 3, TypeError, "int, expected in_features and out_features"),
    "a layer of ours": (
        lambda: nk.NeuroAdaLinear(D_IN, D_OUT),
        TypeError,
        "NeuroAdaLinear, expected a layer without a bypass",
    ),
    "meta": (lambda: meta(lambda: foreign.make("conv1d")), ValueError, "on the meta device"),
    "4 bit on meta": (lambda: meta(unquantised), ValueError, "on the meta device"),
    "4 bit not yet": (unquantised, ValueError, "Linear4bit is not quantised yet"),
    "4 bit packed": (packed, ValueError, "was packed for inference by an evaluation on the CPU"),
    "4 bit transposed": (other_way_round, ValueError, r"quantised as \[64, 48\], expected"),
    "8 bit not yet": (
        lambda: foreign.library("bitsandbytes").nn.Linear8bitLt(4, 4, has_fp16_weights=False),
        ValueError,
        "Linear8bitLt is not quantised yet",
    ),
    "8 bit in each forward": (half_weights, ValueError, "expected has_fp16_weights=False"),
    "integers": (
        integers,
        ValueError,
        "Conv1D without a plain weight",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_is_none_is_refused(case):
    make, error, message = BASES[case]
    base = make()
    flags = [p.requires_grad for p in base.parameters()] if isinstance(base, nn.Module) else []
    with pytest.raises(error, match=message):
        nk.NeuroAdaBypass(base)
    if isinstance(base, nn.Module):
        assert [p.requires_grad for p in base.parameters()] == flags


ARGUMENTS = {
    "k": ({"k": D_IN + 1}, ValueError, "k: 65, expected 1 to 64"),
    "selection": ({"selection": "gradient"}, ValueError, "method: 'gradient'"),
    "scores": ({"scores": torch.zeros(2, 3)}, ValueError, r"scores: shape \[2, 3\], expected \["),
    "delta_dtype": ({"delta_dtype": torch.int8}, TypeError, "delta_dtype"),
    "strategy": ({"strategy": "sideways"}, ValueError, "strategy: 'sideways'"),
    "resident": (
        {"strategy": "resident"},
        ValueError,
        "'resident' is refused: the base is a transformers Conv1D, whose forward is its own",
    ),
    "index": ({"index": torch.zeros(D_OUT, 2, dtype=torch.int32)}, ValueError, "stands twice"),
    "index dtype": ({"index": torch.zeros(D_OUT, 2)}, TypeError, "index: dtype torch.float32"),
    "index shape": (
        {"index": torch.zeros(3, 1, dtype=torch.int32)},
        ValueError,
        r"index: shape \[3, 1\], expected \[48, k\]",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument_leaves_the_base_alone(case):
    options, error, message = ARGUMENTS[case]
    base = foreign.make("conv1d")
    with pytest.raises(error, match=message):
        nk.NeuroAdaBypass(base, **options)
    assert base.weight.requires_grad


def test_a_base_without_a_weight_is_not_chosen_from_by_magnitude():
    base = foreign.make("hidden")
    with pytest.raises(ValueError, match=r"Hidden has no plain weight .* to read; selection"):
        nk.NeuroAdaBypass(base)
    assert nk.NeuroAdaBypass(base, selection="random").connections == D_OUT
    layer = nk.NeuroAdaBypass(base, scores=torch.arange(D_IN).expand(D_OUT, D_IN))
    assert (layer.index == D_IN - 1).all()
    with pytest.raises(ValueError, match="nothing can be merged exactly"):
        layer.merge()


def fails(*args):
    raise NotImplementedError("not for this layout")


def test_a_weight_that_has_no_rows_is_dequantised_as_a_whole(monkeypatch):
    base = foreign.make("torchao-int8")
    expected = nk.NeuroAdaBypass(base, 3)
    monkeypatch.setattr(type(base.weight), "__getitem__", fails)
    layer = nk.NeuroAdaBypass(base, 3)
    assert torch.equal(layer.index, expected.index)
    assert torch.equal(
        layer.base_entries(layer.index), foreign.dense(base).gather(1, layer.index.long())
    )
    monkeypatch.setattr(type(base.weight), "dequantize", fails)
    with pytest.raises(ValueError, match="torchao Int8Tensor, which cannot be dequantised: not f"):
        nk.NeuroAdaBypass(base, 3)


@pytest.mark.parametrize("kind", ["nf4", "torchao-float8"])
def test_the_layer_that_is_ours_does_not_take_quantised_weights(kind):
    with pytest.raises(TypeError, match=r"expected plain numbers; see NeuroAdaBypass"):
        nk.NeuroAdaLinear.from_linear(foreign.make(kind))


def test_auto_comes_to_bypass_and_says_why():
    layer = nk.NeuroAdaBypass(foreign.make("conv1d"), strategy="auto")
    assert layer.strategy == "bypass"
    assert layer.strategy_reason == "the base is a transformers Conv1D, whose forward is its own"
    with pytest.raises(ValueError, match="'resident' is refused"):
        layer.strategy = "resident"
    layer.strategy = "bypass"
    assert layer.strategy_reason is None


def test_inputs_and_outputs_are_checked():
    layer = nk.NeuroAdaBypass(foreign.make("scaled"))
    for x in (torch.randn(3, D_IN + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x: shape .*, expected \[\.\.\., 64\]"):
            layer(x)
    for gave, words in ((lambda x: (x, x), "tuple"), (lambda x: x.int(), "dtype torch.int32")):
        layer.base.forward = gave
        with pytest.raises(TypeError, match=f"base: gave {words}, expected a floating tensor"):
            layer(torch.randn(3, D_IN))


def test_a_library_is_known_by_its_types_and_not_by_what_tensors_can_do():
    assert hasattr(nn.Parameter(torch.zeros(2)), "dequantize")
    assert not is_of(nn.Parameter(torch.zeros(2)), "torchao")
    assert is_of(nn.Parameter(torch.zeros(2)), "torch", "Parameter")
    assert is_of(foreign.make("torchao-int8").weight, "torchao")
