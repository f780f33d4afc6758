"""The benchmark of whole models, on one that is tiny."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks import model
from neuroada_kernels.benchmarks.baselines import MaskedDenseLinear, MaterialisedLinear

HAS_TRANSFORMERS = find_spec("transformers") is not None
TINY = ["--hidden", "32", "--intermediate", "48", "--layers", "2", "--heads", "4"]
TINY += ["--kv-heads", "2", "--vocabulary", "50", "--sequence", "16", "--batch", "2"]
TINY += ["--k", "3", "--steps", "3", "--warmup", "1", "--dtype", "float32", "--rank", "2"]
LAYER_OF = {
    "neuroada": nk.NeuroAdaLinear,
    "materialised": MaterialisedLinear,
    "masked-dense": MaskedDenseLinear,
}
#: Of one block's linears in the order of LINEARS, [d_out, d_in].
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]


class Block(nn.Module):
    """The linears of a Llama's block, each used once."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_out, d_in) in zip(model.LINEARS, SHAPES, strict=True):
            setattr(self, name, nn.Linear(d_in, d_out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        x = x + self.o_proj(heads)
        return x + self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))


class StandIn(nn.Module):
    """What the benchmark asks of a Llama, where transformers is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(Block(), Block())
        self.checkpointing: object = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.checkpointing = options

    def forward(self, inputs_embeds: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.blocks(inputs_embeds) @ self.embeddings.weight.t()
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.fixture(params=["transformers", "stand_in"])
def methods(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that can run over a model that :func:`model.build` makes."""
    if request.param == "transformers":
        if not HAS_TRANSFORMERS:
            pytest.skip("transformers is missing")
        return [m for m in model.METHODS if m != "peft-lora" or find_spec("peft") is not None]
    monkeypatch.setattr(model, "build", lambda *_: StandIn().requires_grad_(False).train())
    monkeypatch.setattr(model, "find_spec", lambda name: name)
    monkeypatch.setattr(model, "_transformers_version", lambda: "none")
    return [m for m in model.METHODS if m != "peft-lora"]


@pytest.mark.filterwarnings("default")  # other packages' are theirs
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", ""])
def test_every_method_trains_the_same_model(checkpointing, methods, tmp_path: Path, capsys) -> None:
    path = tmp_path / "model.json"
    flags = ["--checkpointing"] * checkpointing
    assert model.main([*TINY, *flags, "--methods", *methods, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["torch"] == torch.__version__
    assert found["sizes"]["hidden"] == 32
    assert [row["method"] for row in found["results"]] == methods
    rows = {row["method"]: row for row in found["results"]}
    for row in rows.values():
        assert row["checkpointing"] is checkpointing
        assert len(row["samples_ms"]) == 3
        assert row["tokens_per_second"] == 32 / row["step_ms"]["median"] * 1e3
        assert len(row["losses"]) == 4
    trained = {name: row["trainable"] for name, row in rows.items()}
    bypasses = 2 * sum(3 * d_out for d_out, _ in SHAPES)
    assert trained["frozen"] == 0
    assert trained["neuroada"] == trained["materialised"] == bypasses
    assert trained["masked-dense"] == 2 * sum(d_out * d_in for d_out, d_in in SHAPES)
    if "peft-lora" in rows:
        assert trained["peft-lora"] == 2 * sum(2 * (d_out + d_in) for d_out, d_in in SHAPES)
    shown = capsys.readouterr().out
    assert all(f"{method}: " in shown for method in methods)


@pytest.mark.filterwarnings("default")
def test_the_methods_that_choose_connections_take_the_same_steps(methods) -> None:
    losses = {}
    for method, layer in LAYER_OF.items():
        torch.manual_seed(0)
        built = model.build(model.Sizes(32, 48, 2, 4, 2, 50), 16, torch.float32, "cpu")
        adapted = model.METHODS[method](built, argparse.Namespace(k=3, rank=2))
        assert sum(isinstance(module, layer) for module in adapted.modules()) == 14
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        tokens = torch.arange(32).view(2, 16)
        embeddings = built.get_input_embeddings()(tokens).detach().requires_grad_()
        losses[method] = [
            model._step(adapted, embeddings, tokens, optimizer).item() for _ in range(5)
        ]
        assert losses[method][-1] < losses[method][0]
    for other in ("materialised", "masked-dense"):
        assert losses[other] == pytest.approx(losses["neuroada"], rel=1e-5)


@pytest.mark.filterwarnings("default")
def test_a_method_that_does_not_fit_says_so_and_the_others_go_on(
    methods, monkeypatch, capsys
) -> None:
    def exhausted(built: object, options: object) -> None:
        raise torch.OutOfMemoryError("out of memory\ntried to allocate")

    monkeypatch.setitem(model.METHODS, "frozen", exhausted)
    assert model.main([*TINY, "--methods", "frozen", "neuroada"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "frozen: out of memory"
    assert shown[1].startswith("neuroada: ")
    assert model.main([*TINY, "--methods", "frozen"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_or_transformers_it_stops_at_once(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        model.main(["--device", "cuda"])
    assert "--device cuda: no GPU is visible" in capsys.readouterr().err
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        model.main([])
    assert "transformers is missing" in capsys.readouterr().err


def test_transformers_are_imported_only_when_a_model_is_built() -> None:
    code = "import sys, neuroada_kernels.benchmarks.model; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
