"""Whole models that mix layers of ours with bases whose forward is not ours."""

from __future__ import annotations

import foreign
import pytest
import torch
from adapted import regression
from foreign import D_IN
from torch import nn
from torch.nn.utils import parametrize

import neuroada_kernels as nk
from neuroada_kernels.nn import NeuroAdaBypass, NeuroAdaLinear, ReferenceNeuroAdaLinear

LIBRARY = ["conv1d", "nf4", "int8", "torchao-int8", "torchao-int4", "torchao-float8"]
BY_NAME = ["scaled", "hidden"]


class Mixed(nn.Module):
    """One layer of each kind, 64 wide, each added to what comes before."""

    def __init__(self, kinds=("plain", *LIBRARY, *BY_NAME)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                kind: nn.Linear(D_IN, D_IN) if kind == "plain" else foreign.make(kind, d_out=D_IN)
                for kind in kinds
            }
        )

    def forward(self, x):
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x))
        return x


def train(model, steps=30):
    """The losses of a regression to targets that a base cannot reach."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, D_IN, generator=generator)
    target = model(x).detach() + torch.randn(32, D_IN, generator=generator)
    return regression(model, x, target, steps, lr=0.01)


def layers_of(model):
    return {name.rpartition(".")[2]: m for name, m in model.named_modules() if hasattr(m, "delta")}


def test_all_linear_takes_what_is_known_and_no_stranger():
    model = Mixed()
    x = torch.randn(5, D_IN)
    before = model(x)
    summary = nk.adapt(model, k=4)
    assert summary.modules == tuple(f"layers.{kind}" for kind in ("plain", *LIBRARY))
    found = layers_of(model)
    assert {kind: type(layer) for kind, layer in found.items()} == {
        "plain": NeuroAdaLinear,
        **dict.fromkeys(LIBRARY, NeuroAdaBypass),
    }
    assert summary.trainable == 7 * 4 * D_IN
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.delta" for name in summary.modules}
    # 9 weights, 7 of them with a bias, and the deltas: 4-bit numbers are two a byte.
    assert summary.total == 9 * D_IN**2 + 7 * D_IN + summary.trainable
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all(layer.delta.any() for layer in found.values())


def test_a_stranger_is_wrapped_where_it_is_named():
    model = Mixed(("plain", *BY_NAME))
    with pytest.raises(ValueError, match=r"layers\.hidden: base: Hidden has no plain weight"):
        nk.adapt(model, 2, ["scaled", "hidden"])
    assert not layers_of(model)
    nk.adapt(model, 2, ["scaled", "hidden"], selection="random")
    assert {type(layer) for layer in layers_of(model).values()} == {NeuroAdaBypass}
    assert set(layers_of(model)) == {"scaled", "hidden"}


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_a_linear_with_a_forward_of_its_own_is_wrapped_where_it_is_named(method):
    class Doubled(nn.Linear):
        pass

    setattr(Doubled, method, lambda self, x: 2 * getattr(nn.Linear, method)(self, x))
    model = nn.Sequential(Doubled(8, 8))
    with pytest.raises(ValueError, match="0: Doubled has a forward of its own, expected its name"):
        nk.adapt(model)
    nk.adapt(model, target_modules=["0"])
    x = torch.randn(3, 8)
    assert torch.equal(model(x), 2 * nn.functional.linear(x, model[0].weight, model[0].bias))


def test_layer_type_is_for_the_layers_that_are_ours():
    model = Mixed(("plain", "conv1d"))
    nk.adapt(model, layer_type=ReferenceNeuroAdaLinear)
    types = [type(layer) for layer in layers_of(model).values()]
    assert types == [ReferenceNeuroAdaLinear, NeuroAdaBypass]


def test_adapting_again_sees_no_base_inside_a_layer():
    model = Mixed(("plain", "conv1d", "torchao-int8"))
    nk.adapt(model, 2, ["conv1d", "torchao-int8"])
    assert nk.adapt(model, 2).modules == ("layers.plain",)
    with pytest.raises(TypeError, match="NeuroAdaBypass, expected a module without a bypass"):
        nk.adapt(model, 2, ["conv1d"])
    with pytest.raises(ValueError, match="'base' matches nothing"):
        nk.adapt(model, 2, ["base"])


def test_a_target_inside_a_target_is_refused():
    class Outer(foreign.Scaled):
        def __init__(self):
            super().__init__(D_IN, D_IN)
            self.inner = nn.Linear(D_IN, D_IN)

    model = nn.Sequential(Outer())
    with pytest.raises(ValueError, match=r"0\.inner: lies in 0, which is a target too"):
        nk.adapt(model, 2, ["0", "inner"])
    assert not layers_of(model)


def test_a_failure_leaves_the_model_as_it_was():
    model = Mixed(("conv1d", "nf4", "scaled"))
    modules = dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    # As on a CPU with AVX512-BF16, where evaluation packs a weight that is not adapted.
    model.layers["nf4"].support_avx512bf16_for_cpu = True
    for options, message in (
        ({"k_pattern": {"nf4": D_IN + 1}}, r"layers\.nf4: k: 65, expected 1 to 64"),
        ({"strategy": "resident"}, r"layers\.conv1d: strategy: 'resident' is refused: the base"),
        ({"scores": {"layers.conv1d": torch.ones(2, 2)}}, "scores: missing for targets"),
    ):
        with pytest.raises(ValueError, match=message):
            nk.adapt(model, **options)
        assert dict(model.named_modules()) == modules
        assert [p.requires_grad for p in model.parameters()] == flags
        assert model.layers["nf4"].support_avx512bf16_for_cpu
    nk.adapt(model)
    assert not model.layers["nf4"].base.support_avx512bf16_for_cpu


def test_meta_models_with_other_bases_wait_for_their_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), foreign.Conv1D(8, 8))
    with pytest.raises(ValueError, match="1: base: its weight is on the meta device"):
        nk.adapt(model)
    assert not layers_of(model)


def test_strategies_know_what_cannot_be_resident():
    model = Mixed(("plain", "conv1d", "torchao-int8"))
    summary = nk.adapt(model, strategy="auto")
    others = {"layers.conv1d", "layers.torchao-int8"}
    assert summary.resident == ("layers.plain",)
    assert set(summary.refused) == others
    assert "whose forward is its own" in str(summary)
    with pytest.raises(ValueError, match=r"layers\.conv1d: strategy: 'resident' is refused"):
        nk.set_strategy(model, "resident")
    assert set(nk.set_strategy(model, "auto")) == others
    with nk.resident(model, "auto"):
        assert model.layers["plain"].strategy == "resident"


@pytest.mark.parametrize("kind", ["conv1d", "hidden", "nf4"])
def test_by_gradient_is_by_the_gradient_of_the_weight_inside(kind):
    model, twin = Mixed((kind,)).eval(), Mixed((kind,))
    data = [torch.randn(6, D_IN) for _ in range(2)]

    def loss(model, batch):
        return model(batch).square().sum()

    expected = torch.zeros(D_IN, D_IN)
    for batch in data:
        y = twin.layers[kind](batch).detach().requires_grad_()
        (batch + torch.tanh(y)).square().sum().backward()
        expected += y.grad.t() @ batch
    nk.adapt(model, 3, [kind], selection="gradient", data=data, loss=loss)
    chosen = model.layers[kind].index.sort(1).values
    assert torch.equal(chosen, nk.select(expected, 3, scores=expected.abs()))


def test_merging_is_all_or_nothing():
    model = Mixed(("plain", "conv1d", "torchao-int8"))
    nk.adapt(model, 2)
    train(model, 3)
    before = foreign.raw(model)
    with pytest.raises(ValueError, match=r"layers\.torchao-int8: base: .*merge_requantized"):
        nk.merge(model)
    assert not any(layer.merged for layer in layers_of(model).values())
    assert foreign.same(foreign.raw(model), before)


@pytest.mark.parametrize("failing", ["merge", "unmerge"])
def test_a_failure_midway_is_undone(failing, monkeypatch):
    model = Mixed(("conv1d", "plain", "scaled"))
    nk.adapt(model, 2, ["conv1d", "plain", "scaled"])
    train(model, 3)
    model.layers["scaled"].merge()
    if failing == "unmerge":
        nk.merge(model)
        with torch.no_grad():
            model.layers["plain"].delta.add_(1)  # what was merged is not what delta is now
    before = {n: t.clone() for n, t in model.state_dict().items()}
    merged = {kind: layer.merged for kind, layer in layers_of(model).items()}
    last = model.layers["plain" if failing == "merge" else "conv1d"]

    def fail(*args):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(
        last, "_merge_into_weight" if failing == "merge" else "_restore_weight", fail
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        getattr(nk, failing)(model)
    monkeypatch.undo()
    assert {kind: layer.merged for kind, layer in layers_of(model).items()} == merged
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_merge_requantized_merges_everything_and_reports_what_is_not_exact():
    model = Mixed(("plain", "conv1d", "nf4", "torchao-int8"))
    nk.adapt(model, 2)
    train(model)
    x = torch.randn(50, D_IN)
    expected = model(x).detach()
    bases = {kind: layer for kind, layer in layers_of(model).items() if "-" in kind or "4" in kind}
    reports = nk.merge_requantized(model)
    assert set(reports) == {f"layers.{kind}" for kind in bases}
    assert reports["layers.torchao-int8"].of_weight < 0.02 < reports["layers.nf4"].of_weight < 0.12
    assert all(not layer.delta.any() and not layer.merged for layer in bases.values())
    assert model.layers["plain"].merged
    assert model.layers["conv1d"].merged
    assert 0 < (model(x) - expected).norm() / expected.norm() < 0.1
    plain = Mixed(("plain",))
    nk.adapt(plain, 2)
    assert nk.merge_requantized(plain) == {}


def test_merge_requantized_is_all_or_nothing():
    model = Mixed(("plain", "nf4", "hidden"))
    nk.adapt(model, 2, ["plain", "nf4", "hidden"], selection="random")
    train(model, 3)
    nf4 = model.layers["nf4"]
    before, delta = foreign.raw(nf4.base), nf4.delta.detach().clone()
    with pytest.raises(ValueError, match=r"layers\.hidden: base: Hidden has no plain weight"):
        nk.merge_requantized(model)
    assert foreign.same(foreign.raw(nf4.base), before)
    assert torch.equal(nf4.delta, delta)
    assert not model.layers["plain"].merged


def test_a_4_bit_base_trains_and_keeps_its_bytes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (foreign.make("nf4", *s) for s in ((64, 128), (128, 64)))

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    model = Net()
    bases = foreign.raw(model)
    nk.adapt(model, k=4)
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 64))  # an evaluation before and after
    losses = train(model.train(), 60)
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 64))
    assert losses[-1] < 0.7 * losses[0]
    held = [layer.base for layer in (model.up, model.down)]
    assert foreign.same([t for base in held for t in foreign.raw(base)], bases)


def test_a_parametrised_linear_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    nk.adapt(model)
    nk.save_adapter(model, tmp_path / "adapter.safetensors")
    other = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(other[0], "weight", nn.Identity())
    for load in (
        lambda: nk.load_adapter(other, tmp_path / "adapter.safetensors"),
        lambda: nk.adapt(other),
    ):
        with pytest.raises(ValueError, match="0: has parametrizations, expected a weight of its"):
            load()
