"""Stacked experts with a bypass for each of their neurons."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapted import regression
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.testing import rms_error, tolerance

EXPERTS, D, D_FF, TOKENS, TOP_K = 5, 24, 16, 33, 2
STACKS = ("gate_up_proj", "down_proj")


class Experts(nn.Module):
    """As transformers 5 writes Mixtral's, expert after expert."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * D_FF, D) / 5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, D, D_FF) / 4)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            h = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
            y = F.linear(h, self.down_proj[e]) * top_k_weights[token, place, None]
            out = out.index_add(0, token, y)
        return out


class Mixture(nn.Module):
    """A router and its experts."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.router = nn.Linear(D, EXPERTS)
        self.experts = Experts()

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(TOP_K)
        return x + self.experts(x, index, weights)


def inputs(dtype=torch.float32, experts=EXPERTS):
    x = torch.randn(TOKENS, D, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, dtype=dtype, requires_grad=True)
    return x, index, weights


def wrapped(experts, k=3, **options):
    layer = nk.NeuroAdaExperts(experts, k, **options)
    with torch.no_grad():
        for stack in layer.stacks.values():
            stack.delta.normal_(std=0.1)
    return layer


def materialised(layer) -> Experts:
    """The experts in float64, their weights ``W + delta`` entry by entry."""
    experts = Experts().double()
    for name, stack in layer.stacks.items():
        rows = stack.weight.detach().double().flatten(0, 1)
        for j, columns in enumerate(stack.index.tolist()):
            for s, column in enumerate(columns):
                if column >= 0:
                    rows[j, column] += stack.delta[j, s].item()
        setattr(experts, name, nn.Parameter(rows.view(stack.weight.shape)))
    return experts


@pytest.mark.parametrize("used", [EXPERTS, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_the_formulas(dtype, used):
    layer = wrapped(Experts().to(dtype), neuron_fraction=0.8)
    x, index, weights = inputs(dtype, used)
    grad_output = torch.randn(TOKENS, D, dtype=dtype)
    y = layer(x, index, weights)
    y.backward(grad_output)

    exact = materialised(layer)
    x_64, weights_64 = (t.detach().double().requires_grad_() for t in (x, weights))
    y_64 = exact(x_64, index, weights_64)
    y_64.backward(grad_output.double())
    allowed = 4 * tolerance(dtype, D)  # two products, the gate and the weighted sum are rounded
    assert y.dtype == dtype
    assert rms_error(y, y_64) <= allowed
    assert rms_error(x.grad, x_64.grad) <= allowed
    assert rms_error(weights.grad, weights_64.grad) <= allowed
    for name, stack in layer.stacks.items():
        dense = getattr(exact, name).grad.flatten(0, 1)
        chosen = dense.gather(1, stack.index.clamp(min=0).long()).masked_fill(stack.index < 0, 0)
        assert rms_error(stack.delta.grad, chosen) <= allowed
        assert stack.weight.grad is None


def test_untrained_it_computes_what_the_experts_do_and_shares_their_weights():
    experts = Experts()
    arguments = inputs()
    expected = experts(*arguments)
    layer = nk.NeuroAdaExperts(experts, 2)
    assert rms_error(layer(*arguments), expected) <= tolerance(torch.float32, D)
    assert all(stack.weight is getattr(experts, name) for name, stack in layer.stacks.items())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        f"{name}.delta" for name in STACKS
    }
    # The module it was made of is whole, and what is left of it inside has no weights twice.
    assert torch.equal(experts(*arguments), expected)
    assert not list(layer.base.parameters())


def test_each_expert_chooses_the_largest_of_its_own_rows():
    experts = Experts()
    layer = nk.NeuroAdaExperts(experts, 4)
    for name, stack in layer.stacks.items():
        rows = getattr(experts, name).flatten(0, 1)
        assert torch.equal(stack.index, nk.order_slots(nk.select(rows, 4)))


def test_an_expert_beyond_the_last_is_none():
    layer = wrapped(Experts())
    x, index, weights = inputs()
    with torch.no_grad():
        without = layer(x, index, weights.masked_fill(index == 0, 0))
        elsewhere = layer(x, index.masked_fill(index == 0, EXPERTS), weights)
    assert torch.equal(elsewhere, without)
    with torch.no_grad():
        assert not layer(x, torch.full_like(index, EXPERTS), weights).any()


def test_merging_is_exact_and_undone_bit_for_bit():
    layer = wrapped(Experts(), neuron_fraction=0.8)
    arguments = inputs()
    expected, before = layer(*arguments), copy.deepcopy(layer.state_dict())
    nk.merge(layer)
    exact = materialised_weights(before)
    for name, stack in layer.stacks.items():
        assert torch.equal(stack.weight.flatten(0, 1), exact[name])
    assert rms_error(layer(*arguments), expected) <= 4 * tolerance(torch.float32, D)
    twin = wrapped(Experts())
    twin.load_state_dict(layer.state_dict())
    for one in (layer, twin):
        nk.unmerge(one)
        after = one.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], t) for n, t in before.items())


def materialised_weights(state):
    return {
        name: nk.reference.merged_weight(
            state[f"{name}.weight"].flatten(0, 1), state[f"{name}.index"], state[f"{name}.delta"]
        )
        for name in STACKS
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_moved_layers_compute_the_same(copied):
    layer = wrapped(Experts())
    arguments = inputs()
    grads = []
    for one in (layer, copied(layer), copied(layer).double().float()):
        y = one(*arguments)
        grads.append((y, *torch.autograd.grad(y.sum(), [s.delta for s in one.stacks.values()])))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_an_index_that_is_set_is_planned_for_each_expert():
    layer, other = wrapped(Experts()), wrapped(Experts(), selection="smallest", neuron_fraction=0.5)
    for name, stack in layer.stacks.items():
        stack.index = other.stacks[name].index
    x, index, weights = inputs()
    (grad,) = torch.autograd.grad(layer(x, index, weights).sum(), x)
    x_64 = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        materialised(layer)(x_64, index, weights.detach().double()).sum(), x_64
    )
    assert rms_error(grad, expected) <= 4 * tolerance(torch.float32, D)


def train(model, steps=5):
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    return regression(model, x, model(x).detach() + 1, steps, lr=0.02)


@pytest.mark.filterwarnings("ignore:delta. new parameters")
@pytest.mark.parametrize("into", ["the base", "an adapted model"])
def test_a_model_is_adapted_by_name_trained_and_saved(tmp_path, into):
    model, path = Mixture(), tmp_path / "adapter.safetensors"
    assert nk.adapt(Mixture(), 2).modules == ("router",)
    summary = nk.adapt(model, 2, ["experts"], strategy="auto")
    names = tuple(f"experts.{name}" for name in STACKS)
    assert summary.modules == names
    assert summary.trainable == 2 * EXPERTS * (2 * D_FF + D)
    assert set(summary.refused) == set(names)
    losses = train(model, 40)
    assert losses[-1] < 0.8 * losses[0]
    nk.save_adapter(model, path)
    assert read_adapter(path).modules[names[0]].base.kind == "stacked experts"

    fresh = Mixture()
    if into == "an adapted model":
        nk.adapt(fresh, 3, ["experts"], selection="random")
    assert nk.load_adapter(fresh, path).modules == names
    x = torch.randn(7, D)
    assert torch.equal(fresh(x), model(x))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags

    other = Mixture(seed=5)
    modules, grads = dict(other.named_modules()), [p.requires_grad for p in other.parameters()]
    with pytest.raises(ValueError, match="other values at the chosen connections"):
        nk.load_adapter(other, path)
    assert dict(other.named_modules()) == modules
    assert [p.requires_grad for p in other.parameters()] == grads


def refused(name, value):
    experts = Experts()
    if isinstance(value, torch.Tensor):
        experts._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        setattr(experts, name, value)
    return experts


REFUSED = {
    "transposed": ("is_transposed", True, r"has stacks of \[experts, d_in, d_out\] \(is_tr"),
    "bias": ("has_bias", True, r"has biases \(has_bias\), which is not supported"),
    "no gate": ("_apply_gate", None, "has no _apply_gate"),
    "shapes": ("down_proj", torch.zeros(EXPERTS, D_FF, D), "expected .experts, 2 d_ff, d"),
    "dtype": ("down_proj", torch.zeros(EXPERTS, D, D_FF).int(), "int32 as down_proj"),
    "meta": ("down_proj", torch.zeros(EXPERTS, D, D_FF, device="meta"), "on the meta device"),
    "strides": ("down_proj", torch.zeros(EXPERTS, D_FF, D).mT, "that is not contiguous"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_experts_are_refused(case):
    name, value, message = REFUSED[case]
    model = Mixture()
    model.experts = refused(name, value)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match=f"experts: Experts .*{message}"):
        nk.adapt(model, 1, ["experts"])
    with pytest.raises(TypeError, match=message):
        nk.NeuroAdaExperts(model.experts)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "resident"}, "'resident' is refused: the weight is a stack of experts"),
        ({"k": D_FF + 1}, "experts: k: 17, expected 1 to 16"),
        (
            {"selection": "gradient", "data": [0], "loss": lambda model, batch: None},
            "experts: stacked experts with selection 'gradient', expected",
        ),
        ({"scores": {}}, "stacked experts with selection 'scores', expected"),
    ],
    ids=["resident", "k", "gradient", "scores"],
)
def test_what_experts_do_not_take_leaves_the_model_alone(options, message):
    model = Mixture()
    with pytest.raises(ValueError, match=message):
        nk.adapt(model, target_modules=["experts"], **options)
    assert type(model.experts) is Experts
    assert all(p.requires_grad for p in model.parameters())


def test_experts_with_hooks_are_refused():
    model = Mixture()
    model.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="experts: has hooks, which its replacement would lose"):
        nk.adapt(model, 1, ["experts"])


def test_a_layer_of_experts_is_not_adapted_again():
    model = Mixture()
    nk.adapt(model, 1, ["experts"])
    with pytest.raises(TypeError, match=r"experts: NeuroAdaExperts, expected torch\.nn\.Linear"):
        nk.adapt(model, 1, ["experts"])
    assert nk.adapt(model, 1).modules == ("router",)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_of_transformers(kind):
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tokens = torch.randint(32, (2, 7))
    expected = model(tokens).logits
    summary = nk.adapt(model, 2, ["experts"])
    assert len(summary.modules) == 2
    assert rms_error(model(tokens).logits, expected) <= 1e-6


def test_no_tokens_at_all():
    experts = nk.NeuroAdaExperts(Experts())
    ids, weights = torch.zeros(0, TOP_K, dtype=torch.long), torch.zeros(0, TOP_K)
    x = torch.zeros(0, D, requires_grad=True)
    y = experts(x, ids, weights)
    assert y.shape == (0, D)
    y.sum().backward()
    assert x.grad.shape == (0, D)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_experts_of_a_file_are_refused_in_ddp(tmp_path):
    """Their deltas would be new, and not averaged."""
    saved = Mixture()
    nk.adapt(saved, 1, ["experts"])
    nk.save_adapter(saved, tmp_path / "adapter.safetensors")
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Mixture())
        with pytest.raises(ValueError, match="model: is in DistributedDataParallel"):
            nk.load_adapter(wrapped, tmp_path / "adapter.safetensors")
    finally:
        dist.destroy_process_group()
    assert type(wrapped.module.experts) is Experts
