"""``neuroada`` as a method of PEFT, which knows no entry points: its enum had to be extended."""

from __future__ import annotations

import enum
import importlib
import pickle
import subprocess
import sys

import peft
import peft.utils
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaModel, NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft._register import add_member, register


def test_the_member_is_found_by_every_way_to_look_one_up():
    member = PeftType.NEUROADA
    assert PeftType("NEUROADA") is PeftType["NEUROADA"] is member is list(PeftType)[-1]
    assert isinstance(member, PeftType)
    assert (member, member.name, member.value) == ("NEUROADA",) * 3
    assert member in PeftType
    assert member != PeftType.LORA
    assert pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == "<PeftType.NEUROADA: 'NEUROADA'>"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is NeuroAdaPeftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is NeuroAdaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "neuroada_"


def test_peft_still_needs_its_enum_extended():
    """Where this fails, PEFT takes methods of others by itself: delete the hack."""
    with pytest.raises(ValueError, match=r"add an entry to peft\.utils\.peft_types\.PeftType"):
        register_peft_method(name="newcomer", config_cls=NeuroAdaPeftConfig, model_cls=None)


def test_a_peft_that_changed_is_refused_by_name():
    with pytest.raises(ImportError, match=rf"peft {peft.__version__} takes no method 'neuroada'"):
        register(NeuroAdaPeftConfig, NeuroAdaModel)  # it is there already, as if it were PEFT's own


def test_a_peft_that_lacks_what_is_used_is_refused_by_name(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("neuroada_kernels.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(peft.utils, "resolve_quantization_backend")
    with pytest.raises(ImportError, match=rf"peft {peft.__version__} differs: cannot import name"):
        importlib.import_module("neuroada_kernels.integrations.peft")


class Frozen(str):
    pass


@pytest.mark.parametrize("kind", [enum.Enum("Plain", "A"), Frozen, enum.IntEnum("Number", "A")])
def test_only_an_enum_of_strings_is_extended(kind):
    with pytest.raises(TypeError, match="expected an enum of strings"):
        add_member(kind, "B")


def test_an_enum_that_looks_its_members_up_otherwise_is_refused():
    class Stubborn(enum.EnumMeta):
        def __contains__(cls, member: object) -> bool:
            return member == "A"

    class Kind(str, enum.Enum, metaclass=Stubborn):
        A = "A"

    with pytest.raises(TypeError, match="another form"):
        add_member(Kind, "B")


def test_without_peft_the_import_says_what_to_install():
    code = """
import sys
sys.modules["peft"] = None
import neuroada_kernels.integrations.peft
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stderr.strip().endswith(
        "ImportError: neuroada_kernels.integrations.peft needs PEFT, and there is no peft: "
        "install the extra 'peft'"
    )


def test_a_config_comes_back_from_its_file(tmp_path):
    config = NeuroAdaPeftConfig(
        k=3,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["layers.0.v_proj"],
        selection="random",
        neuron_fraction=0.5,
        delta_dtype="bfloat16",
        layers=[0, 1],
        seed=7,
        k_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
    )
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    first = (tmp_path / "adapter_config.json").read_bytes()
    config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == first


def test_fields_mean_what_they_mean_to_the_package():
    config = NeuroAdaPeftConfig(k=2, target_modules=["b", "a"], layers=3, k_pattern={"a": 1})
    own = nk.NeuroAdaConfig(k=2, target_modules=["a", "b"], layers=3, k_pattern={"a": 1})
    assert config.neuroada == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k: 0, expected at least 1"),
        ({"target_modules": []}, "target_modules: .*, expected at least one name"),
        ({"target_modules": "("}, "target_modules: .* is no regular expression"),
        ({"selection": "scores"}, "selection: 'scores', expected one of .* set_connections"),
        ({"selection": "best"}, "selection: 'best', expected one of"),
        ({"neuron_fraction": 0}, "neuron_fraction: 0, expected a share"),
        ({"bias": "lora_only"}, "bias: 'lora_only', expected one of"),
        ({"k_pattern": {"q_proj": 0}}, "k_pattern.* expected at least 1"),
        ({"layers": [-1]}, "layers: "),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NeuroAdaPeftConfig(**fields)
