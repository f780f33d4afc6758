"""Where a weight may not be written: refused with a reason, or left at bypass by ``"auto"``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear


def with_weight(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(24, 16, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    linear.bias = nn.Parameter(torch.zeros(16))
    return linear


class Quantised(Tensor):
    """Stands for the subclasses in which libraries hold quantised weights."""


def mapped(tmp_path) -> Tensor:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(4 * 16 * 24))
    storage = torch.UntypedStorage.from_file(str(file), shared=True, nbytes=4 * 16 * 24)
    return torch.tensor([]).set_(storage, 0, (16, 24))


def in_inference_mode(tmp_path) -> Tensor:
    with torch.inference_mode():
        return nn.Parameter(torch.randn(16, 24), requires_grad=False)


def sharded(tmp_path) -> Tensor:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    return nn.Parameter(distribute_tensor(torch.randn(16, 24), mesh), requires_grad=False)


REFUSED = {
    "rows of a larger one": (lambda _: torch.randn(48, 24)[16:32], "is a view"),
    "its first rows": (lambda _: torch.randn(48, 24)[:16], "is a view"),
    "one row for all": (lambda _: torch.randn(1, 24).expand(16, 24), "is a view"),
    "quantised": (
        lambda _: nn.Parameter(torch.randn(16, 24).as_subclass(Quantised)),
        "is a Quantised, expected a plain tensor",
    ),
    "made in inference mode": (in_inference_mode, "was made under inference_mode"),
    "in shared memory": (lambda _: torch.randn(16, 24).share_memory_(), "shared with other proc"),
    "mapped from a file": (mapped, "is mapped from .*weights.bin"),
    "sharded": (sharded, "is a DTensor, expected a plain tensor: what is sharded"),
}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=REFUSED)
def refused(request, tmp_path):
    """A linear and the reason that is expected."""
    if request.param == "sharded":
        request.getfixturevalue("process_group")
    make, reason = REFUSED[request.param]
    return with_weight(make(tmp_path)), reason


INDEX = torch.arange(3, dtype=torch.int32).repeat(16, 1)


def test_resident_is_refused_with_the_reason_and_nothing_changes(refused):
    linear, reason = refused
    flags = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(ValueError, match=rf"strategy: 'resident' is refused: weight .*{reason}"):
        NeuroAdaLinear.from_linear(linear, index=INDEX, strategy="resident")
    assert [p.requires_grad for p in linear.parameters()] == flags


def test_auto_leaves_it_at_bypass_and_says_why(refused):
    linear, reason = refused
    layer = NeuroAdaLinear.from_linear(linear, index=INDEX, strategy="auto")
    assert layer.strategy == "bypass"
    assert "strategy=bypass since weight" in repr(layer)
    if type(linear.weight) is nn.Parameter:
        before = linear.weight.clone()
        with torch.no_grad():
            layer.delta.fill_(1)
            layer(torch.randn(2, 24))
        assert linear.weight.equal(before)
    with pytest.raises(ValueError, match=f"refused: weight .*{reason}"):
        layer.strategy = "resident"
    assert layer.strategy == "bypass"


@pytest.mark.skipif(nk.available_backends()["cpu"] is not None, reason="not built")
def test_a_weight_that_the_named_backend_does_not_patch_stays_at_bypass():
    linear = with_weight(nn.Parameter(torch.randn(24, 16).t()))
    with nk.use_backend("cpu"):
        layer = NeuroAdaLinear.from_linear(linear, index=INDEX, strategy="auto")
        assert layer.strategy == "bypass"
        assert "expected 1" in layer.strategy_reason
        with pytest.raises(ValueError, match=r"'resident' is refused: no backend serves .*patch_"):
            layer.strategy = "resident"


def test_auto_is_resident_where_nothing_is_against_it():
    layer = NeuroAdaLinear(24, 16, 3, strategy="auto")
    assert layer.strategy == "resident"
    assert layer.strategy_reason is None
    assert repr(layer).endswith("strategy=resident)")


@pytest.mark.parametrize("kind", [NeuroAdaLinear, ReferenceNeuroAdaLinear])
@pytest.mark.parametrize("wrong", ["residents", "", None, 3])
def test_an_unknown_strategy_is_refused(kind, wrong):
    expected = r"expected one of \['bypass', 'resident', 'auto'\]"
    linear = nn.Linear(24, 16)
    with pytest.raises(ValueError, match=f"strategy: .*{expected}"):
        kind.from_linear(linear, 3, strategy=wrong)
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match=f"strategy: .*{expected}"):
        kind(24, 16, 3, strategy=wrong)
    layer = kind.from_linear(linear, 3)
    with pytest.raises(ValueError, match=f"strategy: .*{expected}"):
        layer.strategy = wrong
    with pytest.raises(ValueError, match=f"strategy: .*{expected}"):
        nk.adapt(nn.Sequential(nn.Linear(4, 4)), strategy=wrong)
    with pytest.raises(ValueError, match=f"strategy: .*{expected}"):
        nk.set_strategy(nn.Sequential(layer), wrong)


def test_two_adapters_cannot_be_resident_in_one_weight():
    linear = nn.Linear(24, 16)
    first = NeuroAdaLinear.from_linear(linear, 3, strategy="resident")
    with pytest.raises(ValueError, match="another adapter is resident in this weight"):
        NeuroAdaLinear.from_linear(linear, 3, strategy="resident")
    second = NeuroAdaLinear.from_linear(linear, 3, strategy="auto")
    assert second.strategy == "bypass"
    assert second.strategy_reason == "another adapter is resident in this weight"
    first.strategy = "bypass"
    second.strategy = "resident"
    with pytest.raises(ValueError, match="another adapter"):
        first.strategy = "resident"


def test_an_index_that_is_wrong_is_refused_before_anything_is_written():
    layer = NeuroAdaLinear(24, 16, 3)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.delta.fill_(1)
        layer.index[3] = layer.index[3, 0]
    with pytest.raises(ValueError, match=r"index: column \d+ stands twice in row 3"):
        layer.strategy = "resident"
    assert layer.weight.equal(before)


def test_a_copy_is_another_weight():
    layer = NeuroAdaLinear(24, 16, 3, strategy="resident")
    twin = copy.deepcopy(layer)
    twin(torch.randn(2, 24))
    twin.strategy = "bypass"
    twin.strategy = "resident"
    assert layer.strategy == "resident"


def test_a_layer_whose_weight_is_shared_with_processes_later_falls_back_and_says_so():
    layer = NeuroAdaLinear(24, 16, 3, strategy="resident")
    before = layer.state_dict()["weight"]
    layer.share_memory()
    with pytest.warns(UserWarning, match=r"refused: weight lies in memory .* from now on"):
        layer(torch.randn(2, 24))
    assert layer.strategy == "bypass"
    assert layer.weight.equal(before)


class Tied(nn.Module):
    """A language model's embedding, two layers, and a head that shares the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.down(torch.relu(self.up(self.embed(tokens)))))


def also_by_another_parameter(model):
    model.down.weight = nn.Parameter(model.up.weight.detach())


def also_as_a_buffer(model):
    model.embed.register_buffer("copy", model.up.weight.detach()[:3])


def test_a_tied_weight_is_refused_and_the_model_is_as_before():
    model = Tied()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"head: strategy: .* shared with embed\.weight"):
        nk.adapt(model, 2, strategy="resident")
    assert type(model.up) is nn.Linear
    assert all(p.requires_grad and p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("share", [also_by_another_parameter, also_as_a_buffer])
def test_a_storage_that_is_shared_otherwise_is_found(share):
    model = Tied()
    share(model)
    with pytest.raises(ValueError, match="up: strategy: 'resident' is refused: weight is shared"):
        nk.adapt(model, 2, ["up"], strategy="resident")


def test_auto_takes_what_it_may_and_the_summary_says_so():
    model = Tied()
    embedding = model.embed.weight.clone()
    summary = nk.adapt(model, 2, strategy="auto")
    assert summary.resident == ("up", "down")
    assert summary.refused == {"head": "weight is shared with embed.weight"}
    assert str(summary).endswith("; 2 resident; head by bypass: weight is shared with embed.weight")
    assert "strategy=bypass since weight is shared with embed.weight" in repr(model.head)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(torch.arange(24)).square().mean().backward()
        optimiser.step()
    assert model.embed.weight.equal(embedding)


def test_a_summary_of_bypasses_says_nothing_of_strategies():
    summary = nk.adapt(Tied(), 2)
    assert summary.resident == ()
    assert summary.refused == {}
    assert "resident" not in str(summary)
    assert "bypass" not in str(summary)


def test_a_module_under_two_names_is_no_sharing():
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    summary = nk.adapt(model, 2, strategy="resident")
    assert summary.resident == ("a", "b")


def test_strategies_of_a_whole_model():
    model = Tied()
    nk.adapt(model, 2)
    with pytest.raises(ValueError, match=r"head: strategy: .* shared with embed\.weight"):
        nk.set_strategy(model, "resident")
    assert {model.up.strategy, model.down.strategy} == {"bypass"}, "all or none"
    reasons = nk.set_strategy(model, "auto")
    assert reasons == {"head": "weight is shared with embed.weight"}
    assert {model.up.strategy, model.down.strategy} == {"resident"}
    assert nk.set_strategy(model, "bypass") == {}
    assert model.head.strategy_reason is None
    with pytest.raises(ValueError, match="model: has no NeuroAda layer inside"):
        nk.set_strategy(nn.Linear(2, 2), "bypass")


def test_a_block_leaves_every_layer_at_bypass():
    model = Tied()
    nk.adapt(model, 2, strategy="auto")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with nk.resident(model, "auto"):
        for layer in (model.up, model.down, model.head):
            nn.init.normal_(layer.delta)
        model(torch.arange(24))
        assert not model.up.weight.equal(base["up.weight"])
    assert {m.strategy for m in (model.up, model.down, model.head)} == {"bypass"}
    for name, parameter in model.named_parameters():
        assert "delta" in name or parameter.equal(base[name]), name
    with pytest.raises(ValueError, match="head: strategy"), nk.resident(model):
        pytest.fail("not entered")
