"""A whole Llama of transformers under ``nk.adapt``: its loss curve, compiled, exported, merged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from small_llama import (
    batch,
    changed,
    curve,
    give_values,
    layers,
    llama,
    logits,
    loss_of,
    trainable,
    values,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import neuroada_kernels as nk

STEPS = 50


class Materialised(nn.Module):
    """The scheme of every other implementation: ``W + delta`` built whole in each forward."""

    def __init__(self, linear: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.weight = linear.weight
        self.index = index.long()
        self.delta = nn.Parameter(torch.zeros(index.shape, dtype=self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.scatter_add(1, self.index, self.delta))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def float64_llama() -> LlamaForCausalLM:
    """In float64 throughout, where transformers takes norms in float32 whatever the model's."""
    model = llama(torch.float64)
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            replace(model, name, norm)
    return model


def materialised() -> LlamaForCausalLM:
    model = float64_llama().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            replace(model, name, Materialised(module, nk.select(module.weight, 4)))
    return model


def test_fifty_steps_have_the_losses_of_the_materialised_scheme():
    """And merging afterwards leaves the logits as they are; both to 1e-9."""
    model = float64_llama()
    nk.adapt(model, k=4, delta_dtype="float64")
    dense = materialised()
    before = values(model)
    losses, expected = curve(model, STEPS), curve(dense, STEPS)
    assert losses[-1] < losses[0] - 0.05, "a run that learns nothing shows nothing"
    assert losses != expected, "rounding alone differs, or it was no float64"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-9)
    trained = logits(model)
    torch.testing.assert_close(trained, logits(dense), rtol=0, atol=1e-9)

    nk.merge(model)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-9)
    assert logits(model).equal(logits(plain_from_merged(model)))
    nk.unmerge(model)
    assert logits(model).equal(trained)
    assert all(name.endswith("delta") for name in changed(model, before))


def plain_from_merged(merged: LlamaForCausalLM) -> LlamaForCausalLM:
    """A Llama that knows nothing of adapters, with the weights of the merged one."""
    model = float64_llama()
    own = model.state_dict()
    model.load_state_dict({n: t for n, t in merged.state_dict().items() if n in own})
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(run: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(run, 0).backward()
    return {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_one_graph_that_takes_another_adapter(tmp_path):
    files = []
    for number, selection in enumerate(["magnitude", "random"]):
        source = llama(num_hidden_layers=1)
        nk.adapt(source, k=4, selection=selection)
        give_values(source, number)
        files.append((tmp_path / f"{selection}.safetensors", gradients(source, source)))
        nk.save_adapter(source, files[-1][0])
    model = llama(num_hidden_layers=1)
    nk.load_adapter(model, files[0][0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, model), files[0][1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for file, expected in reversed(files):
            nk.load_adapter(model, file)
            torch.testing.assert_close(gradients(compiled, model), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast_it_computes_what_eager_does():
    model = llama(num_hidden_layers=1)
    nk.adapt(model, k=4)
    give_values(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, model)
        found = gradients(compiled, model)
    assert logits(model).dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_exported_it_is_a_program_of_its_own():
    model = llama(num_hidden_layers=1)
    nk.adapt(model, k=4)
    give_values(model)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": batch(0), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    run = program.module()
    for tokens in (batch(1), batch(2)[:, :9]):
        found = run(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(found, logits(model, tokens))


def test_it_is_saved_as_a_model_of_transformers_once_merged(tmp_path):
    model = llama()
    nk.adapt(model, k=4)
    give_values(model)
    expected = model.generate(batch(0), max_new_tokens=4, do_sample=False)
    nk.merge(model)
    state = {name: t for name, t in model.state_dict().items() if name in llama().state_dict()}
    model.save_pretrained(tmp_path, state_dict=state)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not layers(plain)
    assert plain.generate(batch(0), max_new_tokens=4, do_sample=False).equal(expected)


def test_rows_of_a_batch_generate_by_their_own_adapters():
    model = llama()
    nk.adapt(model, k=4)
    give_values(model, 0)
    nk.add_adapter(model, "other", k=4, target_modules=["q_proj", "up_proj"])
    nk.set_adapter(model, "other")
    give_values(model, 1)
    prompts = batch(0, rows=3)
    options = {"max_new_tokens": 8, "do_sample": False}
    with nk.rows_of(model, ["other", "default", "other"]):
        tokens = model.generate(prompts, **options)
    for name, rows in (("other", [0, 2]), ("default", [1])):
        nk.set_adapter(model, name)
        assert tokens[rows].equal(model.generate(prompts[rows], **options))


def test_unloaded_it_is_saved_as_an_ordinary_checkpoint(tmp_path):
    model = llama()
    nk.adapt(model, k=4)
    give_values(model)
    expected = logits(model)
    nk.unload(model, merge=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert logits(loaded).equal(logits(model))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert loaded.state_dict().keys() == llama().state_dict().keys()
