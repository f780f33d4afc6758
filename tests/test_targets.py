"""Which modules a config means, and what of the model trains then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels import NeuroAdaConfig, _progress


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)


class Decoder(nn.Module):
    """Two blocks and a head, as a model of transformers tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict({"attn": Attention(), "mlp": nn.Linear(8, 8)})
            block["norm"] = nn.LayerNorm(8)
            self.blocks.append(block)
        self.lm_head = nn.Linear(8, 10, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


ATTENTION = [f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
ALL = sorted([*ATTENTION, "blocks.0.mlp", "blocks.1.mlp"])
FIRST = [name for name in ALL if name.startswith("blocks.0")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ["mlp", "lm_head"]}, ["blocks.0.mlp", "blocks.1.mlp", "lm_head"]),
        ({"target_modules": r".*\.[qv]_proj"}, ATTENTION),
        ({"target_modules": r"blocks\.0\.(attn\..*|mlp)"}, FIRST),
        ({"target_modules": "lm_head"}, ["lm_head"]),
        ({"exclude_modules": ["mlp"]}, ATTENTION),
        ({"exclude_modules": r"blocks\.1.*"}, FIRST),
        ({"exclude_modules": ["lm_head", "mlp"]}, ATTENTION),
        (
            {"target_modules": ["q_proj", "mlp"], "exclude_modules": ["blocks.1.mlp"]},
            ["blocks.0.attn.q_proj", "blocks.0.mlp", "blocks.1.attn.q_proj"],
        ),
        ({"layers": 0}, FIRST),
        ({"layers": [1, 0]}, ALL),
        ({"layers": [1], "target_modules": ["mlp", "lm_head"]}, ["blocks.1.mlp"]),
    ],
    ids=str,
)
def test_the_modules_of_a_config(options, expected):
    for adapt in (
        lambda model: nk.adapt(model, NeuroAdaConfig(**options)),
        lambda model: nk.adapt(model, config=NeuroAdaConfig(**options)),
        lambda model: nk.adapt(model, **options),
    ):
        model = Decoder()
        summary = adapt(model)
        assert sorted(summary.modules) == sorted(expected)
        found = [n for n, m in model.named_modules() if isinstance(m, nk.NeuroAdaLinear)]
        assert sorted(found) == sorted(expected)
        assert model.neuroada_config == NeuroAdaConfig(**options)


@pytest.mark.parametrize("find", [None, lambda: None, "text", NotImplementedError, AttributeError])
def test_without_a_head_to_be_told_of_every_linear_is_meant(find):
    def fails() -> None:
        raise find

    model = Decoder()
    model.get_output_embeddings = fails if isinstance(find, type) else find
    assert sorted(nk.adapt(model).modules) == sorted([*ALL, "lm_head"])


def test_a_head_stays_out_under_every_name():
    model = Decoder()
    model.again = model.lm_head
    assert sorted(nk.adapt(model).modules) == ALL


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": "q_proj"}, ValueError, r"list \['q_proj'\] matches last parts, "),
        ({"target_modules": ["mlp", "k_proj"]}, ValueError, "'k_proj' matches nothing"),
        ({"target_modules": ".*attn.*"}, TypeError, "attn: Attention, expected torch.nn.Linear"),
        ({"exclude_modules": ["mpl"]}, ValueError, "exclude_modules: 'mpl' matches nothing"),
        ({"exclude_modules": "mlp"}, ValueError, r"exclude_modules: 'mlp' .* list \['mlp'\]"),
        ({"exclude_modules": "m.*p"}, ValueError, r"exclude_modules: 'm\.\*p' matches nothing$"),
        ({"exclude_modules": ".*"}, ValueError, "nothing is left of them"),
        ({"layers": [0, 5]}, ValueError, r"layers: no module of target_modules is in \[5\]"),
        ({"k_pattern": {"k_proj": 2}}, ValueError, "k_pattern: 'k_proj' matches no module that"),
        ({"k_pattern": {"mlp": 9}}, ValueError, "blocks.0.mlp: k: 9, expected 1 to 8"),
        ({"k": 9}, ValueError, "blocks.0.attn.q_proj: k: 9, expected 1 to 8"),
        ({"selection": "scores"}, ValueError, "scores: missing with selection 'scores'"),
        (
            {"scores": {}, "selection": "random"},
            ValueError,
            "scores: given with selection 'random'",
        ),
        ({"rank": 8}, TypeError, "rank"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_model_is_refused(options, error, message):
    model = Decoder()
    with pytest.raises(error, match=message):
        nk.adapt(model, **options)
    assert not any(isinstance(m, nk.NeuroAdaLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "neuroada_config")


def test_a_config_and_its_fields_are_not_given_together():
    for arguments, options in (
        ((NeuroAdaConfig(), ["mlp"]), {}),
        ((NeuroAdaConfig(),), {"k": 2}),
        ((1,), {"k": 2}),
        ((1,), {"config": NeuroAdaConfig()}),
        ((), {"config": NeuroAdaConfig(), "k": 1}),
        ((1, ["mlp"], "magnitude"), {}),
    ):
        with pytest.raises(TypeError, match=r"given|by place"):
            nk.adapt(Decoder(), *arguments, **options)


def test_k_may_differ_by_module():
    model = Decoder()
    config = NeuroAdaConfig(k=2, k_pattern={"mlp": 5, r"blocks\.1\.attn\..*": 1})
    summary = nk.adapt(model, config)
    ks = {name: model.get_submodule(name).k for name in summary.modules}
    assert ks == {name: 5 if "mlp" in name else 2 if "0" in name else 1 for name in ALL}
    assert summary.trainable == 8 * sum(ks.values())


@pytest.mark.parametrize("bias", ["none", "all"])
def test_biases_train_where_the_config_says_so(bias):
    model = Decoder()
    summary = nk.adapt(model, 1, ["mlp"], bias=bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = (
        {n for n, _ in model.named_parameters() if n.endswith("bias")} if bias == "all" else set()
    )
    assert trained == {f"blocks.{i}.mlp.delta" for i in (0, 1)} | biases
    assert bool(biases) == (bias == "all")
    numbers = 2 * 8 + len(biases) * 8
    assert summary.trainable == numbers
    assert summary.optimizer_bytes == 8 * numbers
    assert summary.adapter_bytes == 8 * 2 * 8


def test_the_choice_in_one_module_does_not_depend_on_the_others():
    def chosen(targets: list[str]) -> torch.Tensor:
        torch.manual_seed(0)
        model = Decoder()
        nk.adapt(model, 2, targets, selection="random", neuron_fraction=0.5, seed=3)
        return model.blocks[1].mlp.index

    torch.manual_seed(5)
    assert torch.equal(chosen(["blocks.1.mlp"]), chosen(["q_proj", "mlp"]))


def test_progress_is_shown_on_request(capsys):
    nk.adapt(Decoder(), progress=True)
    assert "selecting connections" in capsys.readouterr().err
    nk.adapt(Decoder())
    nk.adapt(Decoder(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_for_large_models_on_a_terminal(monkeypatch):
    monkeypatch.setattr(_progress.sys, "stderr", type("Terminal", (), {"isatty": lambda _: True})())
    assert _progress.worth_showing(10**9)
    assert not _progress.worth_showing(10**9 - 1)
    monkeypatch.setattr(_progress.sys, "stderr", type("File", (), {"isatty": lambda _: False})())
    assert not _progress.worth_showing(10**9)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_who_adapts_a_model_twice_is_told_of_add_adapter(targets):
    model = Decoder()
    nk.adapt(model)
    with pytest.raises((TypeError, ValueError), match="; add_adapter gives an adapted model anoth"):
        nk.adapt(model, target_modules=targets)


def test_all_linear_says_how_to_leave_out_whatever_cannot_be_adapted():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.out_proj = Router(8, 4), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

    model = nn.ModuleList([Block(), Block()])
    excluded = ["0.attention.out_proj", "1.attention.out_proj", "router"]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0\.router: Router has a forward of its own") as raised:
        nk.adapt(model, 1)
    said = f"; adding {excluded} to exclude_modules leaves out all 4 of the 6 linears that cannot"
    assert said in str(raised.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert nk.adapt(model, 1, exclude_modules=excluded).modules == ("0.out_proj", "1.out_proj")


def test_a_lazy_linear_has_to_have_its_weight():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="0: LazyLinear has no weight yet, expected a model that"):
        nk.adapt(model, 1)
    model(torch.zeros(2, 3))
    assert nk.adapt(model, 1).modules == ("0",)
