"""Which layers read the same x: by their names, or as the user says."""

from __future__ import annotations

import pytest
from gated_block import Block, block_of, layers_of, qkv_of
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.siblings import link_siblings


class Two(nn.Module):
    """A block's attention under any name, with any names for its linears."""

    def __init__(self, parent: str, *names: str, d_in: int = 8) -> None:
        super().__init__()
        self.add_module(parent, nn.ModuleDict({n: nn.Linear(d_in, 8) for n in names}))


@pytest.mark.parametrize(
    ("model", "options", "groups"),
    [
        (Two("attn", "q_proj", "k_proj", "v_proj", "o_proj"), {}, [["q_proj", "k_proj", "v_proj"]]),
        (Two("attention", "query", "value", "dense"), {}, [["query", "value"]]),
        (Two("encoder_attn", "q_proj", "k_proj", "v_proj"), {}, [["k_proj", "v_proj"]]),
        (Two("EncDecAttention", "q", "k", "v"), {}, [["k", "v"]]),
        (Two("feed_forward", "w1", "w2", "w3"), {}, [["w1", "w3"]]),
        (Two("attn", "left", "right"), {}, []),
        (Two("attn", "left", "right"), {"siblings": [["left", "right"]]}, [["left", "right"]]),
        (
            Two("attn", "left", "right"),
            {"siblings": [["attn.left", "attn.right"]]},
            [["left", "right"]],
        ),
        (Two("attn", "q_proj", "k_proj"), {"siblings": []}, []),
    ],
)
def test_who_reads_the_same_x(model, options, groups):
    (parent,) = dict(model.named_children())
    config = nk.NeuroAdaConfig(**options)
    nk.adapt(model, config)
    expected = tuple(tuple(f"{parent}.{name}" for name in group) for group in groups)
    assert link_siblings(model, config.siblings) == expected
    assert nk.set_save_activations(model, "auto", config.siblings) == expected
    for names in expected:
        (together,) = {model.get_submodule(name)._siblings for name in names}
        assert set(together.layers) == {model.get_submodule(name) for name in names}


def test_other_widths_and_other_parents_are_no_siblings():
    model = nn.ModuleDict({"a": Two("attn", "q_proj"), "b": Two("attn", "k_proj")})
    model["c"] = Two("attn", "q_proj", "k_proj")
    model["c"].attn["k_proj"] = nn.Linear(9, 8)
    nk.adapt(model)
    assert link_siblings(model) == ()


def test_wrong_arguments_are_refused_and_change_nothing():
    model = block_of(save_activations="compact")
    with pytest.raises(ValueError, match="save_activations: 'some', expected one of"):
        nk.set_save_activations(model, "some")
    assert qkv_of(model)[0].save_activations == "compact"
    for wrong, error, words in (
        ("q_proj", TypeError, "siblings: 'q_proj', expected groups of names"),
        (["q_proj"], TypeError, "siblings: 'q_proj', expected a group of names"),
        ([[]], ValueError, "siblings: .*, expected at least one name"),
        ([["q_proj", "left"]], ValueError, "siblings: 'left' matches no module that is adapted"),
    ):
        with pytest.raises(error, match=words):
            nk.set_save_activations(model, "full", siblings=wrong)
        with pytest.raises(error, match=words):
            nk.adapt(Block(), siblings=wrong)
    assert qkv_of(model)[0].save_activations == "compact"
    with pytest.raises(ValueError, match="model: has no NeuroAda layer inside"):
        nk.set_save_activations(nn.Linear(2, 2), "full")
    plain = Block()
    with pytest.raises(ValueError, match="save_activations: 'some', expected one of"):
        nk.adapt(plain, save_activations="some")
    assert not layers_of(plain)
