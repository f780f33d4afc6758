"""What adapted layers compute under PEFT: in every precision, and with nothing of W's size."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from small_llama import batch, give_values, llama, logits, loss_of, trainable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.model import adapted_layers

HALVES = [torch.float16, torch.bfloat16]


def adapted(dtype: torch.dtype = torch.float32, base: nn.Module | None = None) -> nn.Module:
    base = llama(dtype) if base is None else base
    return give_values(get_peft_model(base, NeuroAdaPeftConfig(k=4)))


def gradients(model: nn.Module, run: nn.Module | None = None) -> dict[str, Tensor]:
    """Of the loss, which ``run`` computes: the model, if it is not given."""
    model.zero_grad()
    loss_of(model if run is None else run, 0).backward()
    return {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_in_every_precision_it_is_the_package_s_own_layer(dtype, autocast):
    """In the deltas' gradients, to the bit; these are float32 whatever the rest is."""
    own = llama(dtype)
    nk.adapt(own, k=4)
    give_values(own)
    model = adapted(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found, expected = gradients(model), gradients(own)
    assert logits(model).dtype == dtype
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(f.equal(e) for f, e in zip(found.values(), expected.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_of_delta_is_the_config_s_whatever_happens_to_the_model(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    model = give_values(get_peft_model(llama(), NeuroAdaPeftConfig(delta_dtype=name)))
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    model.half().float().bfloat16().save_pretrained(tmp_path)
    loaded = [
        PeftModel.from_pretrained(llama(torch.float16), tmp_path, low_cpu_mem_usage=low)
        for low in (False, True)
    ]
    for one in (model, *loaded):
        state = one.state_dict()
        assert all(state[n].dtype == dtype and state[n].equal(p) for n, p in before.items())
        assert {t.dtype for n, t in state.items() if "neuroada_index" in n} == {torch.int32}


def test_an_update_below_the_base_s_last_place_acts():
    linear = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(linear[0].weight)
    model = get_peft_model(linear, NeuroAdaPeftConfig(target_modules=["0"]))
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[:, 0] = 1  # ties go to the lower column: the one that is chosen
    x[:, 1] = -1
    with torch.no_grad():
        linear[0].neuroada_delta["default"].fill_(2**-12)
    assert model(x).equal(torch.full((1, 64), 2**-12, dtype=torch.bfloat16))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_gradient(use_reentrant):
    expected = gradients(adapted())
    model = adapted()
    model.enable_input_require_grads()
    model.train()
    # Older transformers, the newest for Python 3.10 among them, have the other name.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


class SizesMade(TorchDispatchMode):
    """Numbers of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)
        }
        self.sizes |= {
            t.numel()
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs
        }
        return out


@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=len)
def test_nothing_of_the_weight_s_size_is_made(active):
    d_in, d_out = 60, 70
    model = get_peft_model(
        nn.Sequential(nn.Linear(d_in, d_out)), NeuroAdaPeftConfig(target_modules=["0"])
    )
    model.add_adapter("other", NeuroAdaPeftConfig(target_modules=["0"], selection="random"))
    model.base_model.set_adapter(active)
    x = torch.randn(3, d_in, requires_grad=True)
    with SizesMade() as made:
        model(x).sum().backward()
    assert 3 * d_out in made.sizes, "the output at least"
    assert max(made.sizes) < d_in * d_out


def test_the_whole_model_compiles_to_one_graph_that_takes_another_adapter():
    torch.compiler.reset()
    model = adapted(base=llama(num_hidden_layers=1))
    expected = gradients(model)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), expected)
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: tensor.roll(1, 0) for name, tensor in state.items()})
    with torch.compiler.set_stance("fail_on_recompile"):
        found = gradients(model, compiled)
    torch.testing.assert_close(found, gradients(model))
    torch.compiler.reset()


def test_an_index_written_in_place_is_planned_anew():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), NeuroAdaPeftConfig(target_modules=["0"]))
    give_values(model)
    layer = adapted_layers(model)["0"]
    layer.neuroada_index["default"].copy_(torch.arange(8, dtype=torch.int32)[:, None])
    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()
    delta = layer.neuroada_delta["default"].detach()
    expected = layer.base_layer.weight.sum(0) + delta[:, 0]
    torch.testing.assert_close(x.grad, expected.expand(3, 8))


def test_generating_takes_no_gradient_and_no_plan():
    model = adapted().eval()
    tokens = model.generate(input_ids=batch(0), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (4, 27)
