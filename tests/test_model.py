"""Whole models: which modules are replaced, what trains, and what stays as it was on an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels import (
    NeuroAdaLinear,
    ReferenceNeuroAdaLinear,
    adapt,
    merge,
    merge_requantized,
    select,
    unmerge,
)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.q_proj(x) * self.v_proj(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return x + self.proj(self.attn(self.norm(x)))


class LanguageModel(nn.Module):
    """An embedding tied to the head, two blocks, and names that end like one another."""

    def __init__(self, words: int = 20, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LINEARS = [
    *(f"layers.{i}.{name}" for i in range(2) for name in ("attn.q_proj", "attn.v_proj", "proj")),
    "head",
]
TOKENS = torch.arange(12).view(3, 4)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


def replaced(model: nn.Module) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [name for name, m in named if isinstance(m, NeuroAdaLinear | ReferenceNeuroAdaLinear)]


def disturb(model: nn.Module) -> None:
    """Give every delta values, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.normal_(std=0.1)


class Unchanged:
    """Within the block, modules, tensors and flags of the model stay the very same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def facts(self):
        named = dict(self.model.named_modules(remove_duplicate=False))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return (
            {name: id(module) for name, module in named.items()},
            {name: (id(p), p.requires_grad) for name, p in parameters.items()},
            {name: module.training for name, module in named.items()},
        )

    def __enter__(self) -> None:
        self.before = self.facts()
        self.values = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def __exit__(self, *error) -> None:
        assert self.facts() == self.before
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, self.values[name]), name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEARS),
        (["q_proj"], ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        (["proj"], ["layers.0.proj", "layers.1.proj"]),
        (["attn.v_proj", "head"], ["layers.0.attn.v_proj", "layers.1.attn.v_proj", "head"]),
        (["layers.1.proj"], ["layers.1.proj"]),
        (("1.proj", "layers.1.proj"), ["layers.1.proj"]),
        (["head", "head"], ["head"]),
    ],
    ids=str,
)
def test_exactly_the_matching_modules_are_replaced(model, targets, expected):
    others = {n: m for n, m in model.named_modules() if n not in expected}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    summary = adapt(model, 2, targets)
    assert sorted(replaced(model)) == sorted(expected)
    assert sorted(summary.modules) == sorted(expected)
    assert all(model.get_submodule(name) is module for name, module in others.items())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor for name, tensor in tensors.items())


def test_everything_but_the_deltas_is_frozen(model):
    adapt(model, 2, ["q_proj", "proj"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"layers.{i}.{name}.delta" for i in range(2) for name in ("attn.q_proj", "proj")
    }
    model(TOKENS).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable


def test_adapted_model_computes_the_same_before_training(model):
    expected = model(TOKENS)
    adapt(model, 2)
    torch.testing.assert_close(model(TOKENS), expected)


def test_training_flags_stay(model):
    model.eval()
    adapt(model)
    assert not any(module.training for module in model.modules())


def test_counts(model):
    total = sum(p.numel() for p in model.parameters())
    summary = adapt(model, 3)
    neurons = 6 * 8 + 20
    assert summary.trainable == 3 * neurons
    assert summary.total == total + 3 * neurons
    assert summary.share == pytest.approx(3 * neurons / (total + 3 * neurons))
    assert summary.adapter_bytes == (4 + 4) * 3 * neurons
    assert summary.optimizer_bytes == 2 * 4 * 3 * neurons
    assert str(summary) == (
        f"7 modules adapted; 204 of {summary.total:,} parameters train ({summary.share:.3%}); "
        "1.63 kB of adapter, 1.63 kB of AdamW's state"
    )


def test_counts_leave_out_slots_without_a_connection(model):
    generator = torch.Generator().manual_seed(0)
    summary = adapt(model, 3, ["proj"], neuron_fraction=0.5, generator=generator)
    assert summary.trainable == 3 * (4 + 4)


def test_tied_weights_stay_tied(model):
    adapt(model, 1)
    assert model.head.weight is model.embed.weight
    assert not model.embed.weight.requires_grad
    assert sum(p is model.embed.weight for p in model.parameters()) == 1


def test_module_under_two_names_becomes_one_layer():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    summary = adapt(model, 2)
    assert model[0] is model[2]
    assert isinstance(model[0], NeuroAdaLinear)
    assert summary.trainable == 2 * 6
    assert set(summary.modules) == {"0", "2"}


def test_module_under_two_names_is_replaced_under_both_when_one_is_named():
    """Otherwise one use would train and the other would not."""
    model = nn.ModuleDict({"encoder": nn.Linear(6, 6)})
    model["decoder"] = model["encoder"]
    try:
        adapt(model, 2, ["encoder"])
    except ValueError:
        assert isinstance(model["encoder"], nn.Linear)
    assert model["encoder"] is model["decoder"]


def test_module_inside_a_shared_parent_is_replaced_once():
    block = nn.Sequential(nn.Linear(6, 6))
    model = nn.ModuleList([block, block])
    summary = adapt(model, 1, ["0.0"])
    assert isinstance(block[0], NeuroAdaLinear)
    assert summary.trainable == 6


def rising(index: torch.Tensor) -> torch.Tensor:
    """The columns of each row as ``select`` gives them; a layer holds them in its own order."""
    return index.sort(dim=1).values


@pytest.mark.parametrize("layer_type", [NeuroAdaLinear, ReferenceNeuroAdaLinear])
def test_layer_type_and_options_are_passed_on(model, layer_type):
    adapt(model, 2, ["proj"], layer_type=layer_type, delta_dtype=torch.bfloat16)
    for block in model.layers:
        assert type(block.proj) is layer_type
        assert block.proj.delta.dtype == torch.bfloat16
        assert rising(block.proj.index).equal(select(block.proj.weight, 2))


def test_selection_method_is_passed_on(model):
    smallest = {i: select(model.layers[i].proj.weight, 2, "smallest") for i in range(2)}
    adapt(model, 2, ["proj"], selection="smallest")
    assert all(rising(model.layers[i].proj.index).equal(smallest[i]) for i in range(2))


def test_random_selection_repeats_with_the_generator():
    def chosen(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = LanguageModel()
        adapt(model, 2, selection="random", generator=torch.Generator().manual_seed(seed))
        return [model.get_submodule(name).index for name in LINEARS]

    assert all(map(torch.equal, chosen(1), chosen(1)))
    assert not all(map(torch.equal, chosen(1), chosen(2)))


def test_scores_are_looked_up_by_module_name(model):
    scores = {f"layers.{i}.proj": torch.rand(8, 8) for i in range(2)}
    adapt(model, 2, ["proj"], selection="scores", scores=scores)
    for i in range(2):
        expected = scores[f"layers.{i}.proj"].topk(2).indices.sort().values.int()
        assert rising(model.layers[i].proj.index).equal(expected)


def with_heads() -> nn.Module:
    return nn.ModuleDict(
        {
            "first": nn.Linear(8, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "narrow": nn.Linear(3, 4),
        }
    )


WRONG = {
    "nothing": ({"target_modules": ["first", "k_proj"]}, ValueError, "'k_proj' matches nothing"),
    "part of a name": ({"target_modules": ["irst"]}, ValueError, "'irst' matches nothing"),
    "no linear": ({"target_modules": ["first", "dropout"]}, TypeError, "dropout: Dropout, exp"),
    "the attention": ({"target_modules": ["attention"]}, TypeError, "MultiheadAttention, exp"),
    "attention's child": (
        {"target_modules": ["first", "attention.out_proj"]},
        ValueError,
        "out_proj: its parent MultiheadAttention reads the weight",
    ),
    "encoder's child": (
        {"target_modules": ["first", "linear1"]},
        ValueError,
        "linear1: its parent TransformerEncoderLayer reads the weight",
    ),
    "all of them": ({}, ValueError, "its parent"),
    "part of a name, as expression": ({"target_modules": "fir"}, ValueError, "'fir' matches not"),
    "a number": ({"target_modules": 1}, TypeError, "target_modules: 1, expected names"),
    "second too narrow": (
        {"target_modules": ["first", "narrow"], "k": 4},
        ValueError,
        "narrow: k: 4, expected 1 to 3",
    ),
    "second without scores": (
        {
            "target_modules": ["first", "narrow"],
            "selection": "scores",
            "scores": {"first": torch.rand(4, 8)},
        },
        ValueError,
        "scores: missing for targets .*narrow",
    ),
    "second's scores misshapen": (
        {
            "target_modules": ["first", "narrow"],
            "scores": {"first": torch.rand(4, 8), "narrow": torch.rand(3, 4)},
        },
        ValueError,
        r"narrow: scores: shape \[3, 4\]",
    ),
    "method": (
        {"target_modules": ["first"], "selection": "best"},
        ValueError,
        "selection: 'best', expected one of",
    ),
    "delta dtype": (
        {"target_modules": ["first"], "delta_dtype": torch.int8},
        TypeError,
        "delta_dtype: torch.int8",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_error_leaves_the_model_as_it_was(wrong):
    options, error, message = WRONG[wrong]
    model = with_heads()
    model["narrow"].bias.requires_grad_(False)
    model["encoder"].eval()
    with Unchanged(model), pytest.raises(error, match=message):
        adapt(model, **options)


def test_nan_in_the_second_weight_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="1: weight: has NaN"):
        adapt(model)
    assert all(type(layer) is nn.Linear for layer in model)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("lonely", [nn.Linear(4, 4), nn.Sequential(nn.ReLU())])
def test_model_without_a_linear_inside(lonely):
    with Unchanged(lonely), pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        adapt(lonely)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_type", [NeuroAdaLinear, ReferenceNeuroAdaLinear])
def test_merge_keeps_the_output_and_unmerge_restores_every_bit(model, layer_type, dtype):
    model.to(dtype)
    adapt(model, 2, ["q_proj", "v_proj", "proj"], layer_type=layer_type)
    disturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = model(TOKENS)
    merge(model)
    assert all(model.get_submodule(name).merged for name in replaced(model))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    error = (model(TOKENS) - y).double().norm() / y.double().norm()
    assert error < tolerance
    merge(model)
    unmerge(model)
    unmerge(model)
    assert not any(model.get_submodule(name).merged for name in replaced(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(model(TOKENS), y)


def test_an_interrupt_leaves_no_layer_merged(monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = model[0].weight.clone()
    adapt(model, 2)
    with torch.no_grad():
        model[0].delta.fill_(1)
    monkeypatch.setattr(model[1], "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model)
    assert not model[0].merged
    assert model[0].weight.equal(before)


def test_two_layers_over_one_weight_unmerge_bit_for_bit():
    """Both choose the same entries, so the second keeps what the first has written."""
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    adapt(model, 3)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].index, model[1].index)
    disturb(model)
    weight = first.weight.detach().clone()
    for _ in range(3):
        with pytest.warns(UserWarning, match="^[01]: its weight is shared with [01].weight"):
            merge(model)
        assert not torch.equal(model[0].weight, weight)
        unmerge(model)
        assert torch.equal(model[0].weight, weight)
    unmerge(model)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("merging", [merge, merge_requantized])
def test_merging_into_a_tied_weight_warns(model, merging):
    adapt(model, 1)
    with pytest.warns(UserWarning, match="^head: its weight is shared with embed.w") as warnings:
        merging(model)
    assert len(warnings) == 1


def test_merging_a_layer_that_stands_in_two_places_does_not_warn():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    adapt(model, 2)
    merge(model)  # a warning would be an error
    assert model[0].merged


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_a_compiled_model_is_adapted_as_itself():
    models = []
    for wrap in (lambda m: m, torch.compile):
        torch.manual_seed(0)
        models.append(LanguageModel())
        nk.adapt(wrap(models[-1]), k=2, selection="random")
    plain, compiled = models
    assert compiled.neuroada_config == plain.neuroada_config
    state = plain.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in compiled.state_dict().items())


@pytest.mark.parametrize("call", [nk.merge, nk.unmerge, nk.select_connections])
def test_a_model_that_is_not_adapted_is_refused(call, model):
    with Unchanged(model), pytest.raises(ValueError, match="model: has no NeuroAda layer inside"):
        call(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model: list, expected torch\.nn\.Module"):
        nk.adapt([nn.Linear(4, 4)])
