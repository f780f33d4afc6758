"""A model whose weights accelerate keeps elsewhere is adapted as the same model in memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from peft import get_peft_model
from small_llama import batch, give_values, llama, logits, loss_of, trainable
from transformers import LlamaForCausalLM

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig


@pytest.fixture(params=["memory", "disk"])
def offloaded(request, tmp_path):
    """What makes a model without weights of its own."""

    def make() -> LlamaForCausalLM:
        model = llama()
        if request.param == "memory":
            return cpu_offload(model, execution_device="cpu")
        disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
        return model

    return make


def test_it_trains_and_is_saved_as_the_same_model_in_memory(offloaded, tmp_path):
    gradients, files = [], []
    for name, model in (("off", offloaded()), ("in", llama())):
        nk.adapt(model, k=4)
        give_values(model)
        loss_of(model, 0).backward()
        gradients.append([delta.grad for delta in trainable(model).values()])
        files.append(tmp_path / name)
        nk.save_adapter(model, files[-1])
    torch.testing.assert_close(*gradients)
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = offloaded()
    nk.load_adapter(loaded, files[1])
    torch.testing.assert_close(logits(loaded), logits(model))


def test_connections_by_gradient_are_those_of_the_same_model_in_memory(offloaded):
    indices = []
    for model in (offloaded(), llama()):
        nk.adapt(model, k=4, selection="gradient", data=[0], loss=loss_of)
        indices.append([m.index.sort(1).values for m in model.modules() if hasattr(m, "index")])
    torch.testing.assert_close(*indices, rtol=0, atol=0)


def test_its_weights_are_not_written(offloaded):
    model = offloaded()
    nk.adapt(model, k=4, strategy="auto")
    give_values(model)
    with pytest.raises(ValueError, match=r"linear with .* whose values .*neuroada merge"):
        nk.merge(model)
    with pytest.raises(ValueError, match="hooks, which cannot be quantised"):
        nk.merge_requantized(model)
    nk.unload(model)
    assert logits(model).equal(logits(llama()))


def test_a_model_with_hooks_and_its_weights_in_place_is_merged_too(tmp_path):
    """As one that is shared out over several devices."""
    model, plain = llama(), llama()
    attach_align_device_hook(model, execution_device="cpu")
    for one in (model, plain):
        nk.adapt(one, k=4)
        give_values(one)
        nk.save_adapter(one, tmp_path / type(one.model.layers[0].mlp.up_proj).__name__)
        nk.merge(one)
    assert logits(model).equal(logits(plain))
    first, second = (path.read_bytes() for path in tmp_path.iterdir())
    assert first == second


@pytest.fixture
def offloaded_late() -> LlamaForCausalLM:
    model = llama()
    nk.adapt(model, k=4)
    return cpu_offload(give_values(model), execution_device="cpu")


def test_what_is_offloaded_once_it_is_adapted_does_not_train(offloaded_late):
    expected = llama()
    nk.adapt(expected, k=4)
    give_values(expected)
    assert logits(offloaded_late).equal(logits(expected))
    with pytest.raises(RuntimeError, match="delta: accelerate makes another one for each forward"):
        loss_of(offloaded_late, 0)
    remove_hook_from_submodules(offloaded_late)
    loss_of(offloaded_late, 0).backward()
    assert all(delta.grad is not None for delta in trainable(offloaded_late).values())


@pytest.mark.parametrize(
    "change",
    [nk.merge, nk.unload, lambda model: nk.add_adapter(model, "other")],
    ids=["merge", "unload", "add"],
)
def test_nor_is_it_changed(offloaded_late, change):
    before = logits(offloaded_late)
    with pytest.raises(ValueError, match=r"layers.0.*weight: accelerate keeps it elsewhere"):
        change(offloaded_late)
    assert logits(offloaded_late).equal(before)


def test_peft_adapts_and_merges_it(offloaded):
    pair = [get_peft_model(model, NeuroAdaPeftConfig(k=4)) for model in (offloaded(), llama())]
    for model in pair:
        give_values(model)
    torch.testing.assert_close(*(logits(model) for model in pair))
    tokens = batch(0)
    merged = [model.merge_and_unload(safe_merge=True) for model in pair]
    torch.testing.assert_close(*(logits(model, tokens) for model in merged))
