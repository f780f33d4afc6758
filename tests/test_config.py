"""The config: what it takes, what it refuses, and that it survives JSON."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from neuroada_kernels import NeuroAdaConfig

FULL = {
    "k": 3,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": r".*\.0\..*",
    "selection": "random",
    "neuron_fraction": 0.5,
    "bias": "all",
    "delta_dtype": "bfloat16",
    "strategy": "auto",
    "save_activations": "compact",
    "siblings": [["q_proj", "v_proj"], ["a", "b"]],
    "layers": [0, 2],
    "seed": 7,
    "k_pattern": {"v_proj": 5},
}


def test_the_defaults_are_the_papers():
    assert NeuroAdaConfig().to_dict() == {
        "k": 1,
        "target_modules": "all-linear",
        "exclude_modules": None,
        "selection": "magnitude",
        "neuron_fraction": 1.0,
        "bias": "none",
        "delta_dtype": "float32",
        "strategy": "bypass",
        "save_activations": "auto",
        "siblings": None,
        "layers": None,
        "seed": 0,
        "k_pattern": {},
    }


@pytest.mark.parametrize("values", [{}, FULL])
def test_a_config_survives_json_pickle_and_copies(values):
    config = NeuroAdaConfig(**values)
    assert NeuroAdaConfig.from_json(config.to_json()) == config
    assert NeuroAdaConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(NeuroAdaConfig.from_json(config.to_json())) == hash(config)
    assert config != NeuroAdaConfig(k=9)
    assert NeuroAdaConfig(**values | {"k_pattern": {"x": 1}}) != config


def test_forms_of_one_value_are_equal():
    config = NeuroAdaConfig(target_modules=("a", "b"), layers=1, delta_dtype=torch.bfloat16)
    same = NeuroAdaConfig(target_modules={"b", "a"}, layers=[1], delta_dtype="bfloat16")
    assert config == same
    assert config.torch_delta_dtype == torch.bfloat16


def test_what_is_given_is_not_shared():
    pattern, targets = {"a": 2}, ["a"]
    config = NeuroAdaConfig(target_modules=targets, k_pattern=pattern)
    pattern["b"] = 3
    targets.append("b")
    assert config == NeuroAdaConfig(target_modules=["a"], k_pattern={"a": 2})


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("layers.0.q_proj", 4),
        ("q_proj", 4),
        ("layers.0.xq_proj", 1),
        ("layers.1.v_proj", 5),
        ("layers.11.v_proj", 1),
        ("layers.2.o_proj", 6),
        ("layers.3.o_proj", 7),
    ],
)
def test_k_of_a_module(name, k):
    pattern = {"q_proj": 4, "layers.1.v_proj": 5, r"layers\.[0-2]\.o_proj": 6, "o_proj": 7}
    assert NeuroAdaConfig(k_pattern=pattern).k_of(name) == k


def test_what_is_random_depends_on_seed_and_name_alone():
    def drawn(seed: int, name: str) -> float:
        generator = NeuroAdaConfig(selection="random", seed=seed).generator_of(name)
        return torch.rand(1, generator=generator).item()

    assert drawn(0, "a") == drawn(0, "a")
    assert len({drawn(0, "a"), drawn(0, "b"), drawn(1, "a"), drawn(1, "b")}) == 4
    assert NeuroAdaConfig().generator_of("a") is None
    assert NeuroAdaConfig(neuron_fraction=0.5).generator_of("a") is not None


WRONG = [
    ({"k": 0}, ValueError, "k: 0, expected at least 1"),
    ({"k": True}, TypeError, "k: True, expected an integer"),
    ({"k": 1.0}, TypeError, r"k: 1\.0, expected an integer"),
    ({"target_modules": []}, ValueError, r"target_modules: \[\], expected at least one name"),
    ({"target_modules": ""}, ValueError, "target_modules: '', expected at least"),
    ({"target_modules": ["a", ""]}, ValueError, "and none empty"),
    ({"target_modules": ["a", 1]}, TypeError, "expected names"),
    ({"target_modules": None}, TypeError, "target_modules: None, expected names or a regular"),
    ({"target_modules": "(a"}, ValueError, r"target_modules: '\(a' is no regular expression"),
    ({"exclude_modules": []}, ValueError, "exclude_modules: "),
    ({"selection": "best"}, ValueError, r"selection: 'best', expected one of \['magnitude'"),
    ({"selection": None}, ValueError, "selection: None"),
    ({"neuron_fraction": 0}, ValueError, "neuron_fraction: 0, expected a share"),
    ({"neuron_fraction": 1.5}, ValueError, "neuron_fraction: 1.5"),
    ({"neuron_fraction": float("nan")}, ValueError, "neuron_fraction: nan"),
    ({"neuron_fraction": "all"}, TypeError, "neuron_fraction: 'all', expected a number"),
    ({"bias": "lora_only"}, ValueError, r"bias: 'lora_only', expected one of \['none', 'all'\]"),
    ({"bias": True}, ValueError, "bias: True"),
    ({"delta_dtype": "int8"}, TypeError, "delta_dtype: int8, expected float32, "),
    ({"delta_dtype": "Tensor"}, TypeError, "delta_dtype: Tensor"),
    ({"delta_dtype": "float8_e4m3fn"}, TypeError, "delta_dtype: float8_e4m3fn, expected"),
    ({"delta_dtype": torch.int32}, TypeError, "delta_dtype: torch.int32"),
    ({"strategy": "dense"}, ValueError, "strategy: 'dense', expected one of"),
    ({"layers": []}, ValueError, r"layers: \[\], expected numbers of layers"),
    ({"layers": -1}, ValueError, "layers: -1"),
    ({"layers": [True]}, ValueError, "layers: "),
    ({"layers": "12"}, ValueError, "layers: '12'"),
    ({"layers": 1.5}, TypeError, "layers: 1.5"),
    ({"seed": -1}, ValueError, "seed: -1"),
    ({"seed": "a"}, ValueError, "seed: 'a'"),
    ({"k_pattern": ["a"]}, TypeError, "k_pattern: "),
    ({"k_pattern": {"a": 0}}, ValueError, r"k_pattern\['a'\]: 0, expected at least 1"),
    ({"k_pattern": {"(": 1}}, ValueError, r"k_pattern: '\(' is no regular expression"),
    ({"k_pattern": {"(?i)q": 1}}, ValueError, r"k_pattern: .* is no regular expression"),
    ({"k_pattern": {1: 1}}, TypeError, "k_pattern: 1, expected a name"),
    ({"k_pattern": {("a",): 1}}, TypeError, "k_pattern: .*, expected a name"),
]


@pytest.mark.parametrize(("values", "error", "message"), WRONG, ids=lambda case: str(case)[:40])
def test_a_wrong_value_is_refused(values, error, message):
    for make in (lambda: NeuroAdaConfig(**values), lambda: NeuroAdaConfig.from_dict(values)):
        with pytest.raises(error, match=message):
            make()


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"config: unknown \['rank'\], expected of"):
        NeuroAdaConfig.from_dict({"rank": 8})
    with pytest.raises(TypeError, match="values: list"):
        NeuroAdaConfig.from_dict([])
    with pytest.raises(ValueError, match="Expecting value"):
        NeuroAdaConfig.from_json("no JSON")


def test_numbers_of_numpy_are_numbers():
    config = NeuroAdaConfig(
        k=np.int64(2),
        k_pattern={"up": np.int32(3)},
        layers=[np.int64(1)],
        seed=np.int64(4),
        neuron_fraction=np.float32(0.5),
    )
    plain = NeuroAdaConfig(k=2, k_pattern={"up": 3}, layers=[1], seed=4, neuron_fraction=0.5)
    assert config == plain
    assert hash(NeuroAdaConfig(neuron_fraction=1)) == hash(NeuroAdaConfig())
    assert NeuroAdaConfig(layers=np.int64(1)).layers == (1,)
    assert NeuroAdaConfig.from_dict(json.loads(config.to_json())) == plain
