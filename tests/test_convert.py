"""Other people's adapters: what becomes of them, and which cannot be ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapted import NAMES, Model, adapted, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.cli import main
from neuroada_kernels.convert import convert_adapter

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path, Model())


def save_base(folder: Path, model: nn.Module) -> Path:
    save_file(dict(model.state_dict()), folder / "base.safetensors")
    return folder / "base.safetensors"


def places(layer: nk.NeuroAdaLinear) -> tuple[Tensor, Tensor]:
    """Rows and columns ``[n, 2]`` of the connections in the order of a mask, and their values."""
    mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int64)
    dense = torch.zeros(mask.shape, dtype=layer.delta.dtype)
    for row, columns in enumerate(layer.index.tolist()):
        for slot, column in enumerate(columns):
            if column >= 0:
                mask[row, column] = 1
                dense[row, column] = layer.delta[row, slot].detach()
    return mask.nonzero(), dense[mask.bool()]


def save_as_authors(folder: Path, model: nn.Module, flat: bool = False) -> Path:
    """As their code does: the positions one folder up from the values, in a pickled dict."""
    folder.mkdir()
    (folder / "tunable_para").mkdir()
    state, positions = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nk.NeuroAdaLinear):
            where, values = places(layer)
            state[f"{name}.weight_new"] = nn.Parameter(values)
            positions[f"{name}.weight"] = (
                where[:, 0] * layer.in_features + where[:, 1] if flat else where
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("delta"):
            state[name] = parameter
    np.save(folder / "positions.npy", positions)
    torch.save(state, folder / "tunable_para" / "state_dict_tunable.pt")
    return folder / "tunable_para" / "state_dict_tunable.pt"


def save_as_peft(folder: Path, model: nn.Module, kind: str, **config: object) -> Path:
    folder.mkdir()
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nk.NeuroAdaLinear):
            where, values = places(layer)
            prefix = f"base_model.model.{name}"
            if kind == "SHIRA":
                tensors[f"{prefix}.shira_weight"] = values
                tensors[f"{prefix}.shira_indices"] = where.t().int().contiguous()
            else:
                # The largest first, as topk has them.
                order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
                flat = where[:, 0] * layer.in_features + where[:, 1]
                tensors[f"{prefix}.supertuning_values"] = values[order]
                tensors[f"{prefix}.supertuning_indices"] = flat[order].int()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    return folder


def by_column(layer: nk.NeuroAdaLinear) -> nk.NeuroAdaLinear:
    """The layer with its slots in the order of their columns, as converted ones are."""
    columns, order = layer.index.sort(dim=1)
    with torch.no_grad():
        layer.delta.copy_(layer.delta.gather(1, order))
    layer.index = columns
    return layer


def assert_same(path: Path, expected: nn.Module) -> None:
    """The file makes of the base what ``expected`` is."""
    for name in NAMES:
        by_column(expected.get_submodule(name))
    model = Model(dtype=next(expected.parameters()).dtype)
    nk.load_adapter(model, path)
    assert torch.equal(
        model(inputs(model.head.weight.dtype)), expected(inputs(model.head.weight.dtype))
    )
    for name in NAMES:
        assert torch.equal(model.get_submodule(name).index, expected.get_submodule(name).index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["row and column", "flat"])
def test_the_authors_files_become_an_adapter(tmp_path, dtype, flat):
    model = adapted(dtype=dtype, delta_dtype=dtype)
    model.head.bias.requires_grad_()
    source = save_as_authors(tmp_path / "theirs", model, flat)
    base = save_base(tmp_path, Model(dtype=dtype))
    with pytest.warns(UserWarning, match="loaded as a pickle, which can run any code"):
        convert_adapter(source, base, tmp_path / "ours", allow_pickle=True)
    assert_same(tmp_path / "ours", model)
    assert list(read_adapter(tmp_path / "ours").parameters) == ["head.bias"]


def test_rows_without_an_entry_become_neurons_without_connections(tmp_path, base):
    model = adapted(neuron_fraction=0.5)
    source = save_as_authors(tmp_path / "theirs", model)
    with pytest.warns(UserWarning, match="pickle"):
        convert_adapter(source, base, tmp_path / "ours", allow_pickle=True)
    assert_same(tmp_path / "ours", model)


def test_a_pickle_is_loaded_only_when_allowed(tmp_path, base):
    source = save_as_authors(tmp_path / "theirs", adapted())
    with pytest.raises(ValueError, match="can run any code: an array of objects; allow_pickle"):
        convert_adapter(source, base, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["values", "positions"])
def test_code_in_a_pickle_does_not_run(tmp_path, base, part):
    source = save_as_authors(tmp_path / "theirs", adapted())
    if part == "values":
        torch.save({"up.weight_new": Bomb(tmp_path / "exploded")}, source)
    else:
        np.save(tmp_path / "theirs" / "positions.npy", {"up.weight": Bomb(tmp_path / "exploded")})
    with pytest.raises(ValueError, match="can run any code"):
        convert_adapter(source, base, tmp_path / "ours")
    assert not (tmp_path / "exploded").exists()


def test_positions_in_an_npz_need_no_pickle(tmp_path, base):
    source = save_as_authors(tmp_path / "theirs", adapted())
    arrays = np.load(tmp_path / "theirs" / "positions.npy", allow_pickle=True).item()
    np.savez(tmp_path / "where.npz", **{name: t.numpy() for name, t in arrays.items()})
    convert_adapter(source, base, tmp_path / "ours", positions=tmp_path / "where.npz")
    assert_same(tmp_path / "ours", adapted())


@pytest.mark.parametrize("flat", [False, True], ids=["row and column", "flat"])
def test_one_weight_has_its_positions_in_a_plain_array(tmp_path, flat):
    linear = nn.Linear(6, 4)
    layer = nk.NeuroAdaLinear.from_linear(linear, 2)
    nn.init.normal_(layer.delta)
    by_column(layer)
    save_file({"only.weight": linear.weight.detach()}, tmp_path / "base")
    where, values = places(layer)
    np.save(tmp_path / "positions.npy", (where[:, 0] * 6 + where[:, 1] if flat else where).numpy())
    torch.save({"only.weight_new": values}, tmp_path / "state_dict_tunable.pt")
    convert_adapter(tmp_path, tmp_path / "base", tmp_path / "ours")
    module = read_adapter(tmp_path / "ours").modules["only"]
    assert torch.equal(module.index, layer.index)
    assert torch.equal(module.delta, layer.delta)


@pytest.mark.parametrize("kind", ["SHIRA", "SUPERTUNING"])
def test_an_adapter_of_peft_becomes_ours(tmp_path, base, kind):
    source = save_as_peft(tmp_path / "theirs", adapted(), kind)
    convert_adapter(source, base, tmp_path / "ours")
    assert_same(tmp_path / "ours", adapted())


def test_indices_that_peft_saved_on_windows_are_read(tmp_path, base):
    source = save_as_peft(tmp_path / "theirs", adapted(), "SHIRA")
    tensors = load_file(source / "adapter_model.safetensors")
    floats = {n: t.float() if n.endswith("indices") else t for n, t in tensors.items()}
    save_file(floats, source / "adapter_model.safetensors")
    convert_adapter(source, base, tmp_path / "ours")
    assert_same(tmp_path / "ours", adapted())


def change(source: Path, alter) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    alter(tensors)
    save_file(tensors, source / "adapter_model.safetensors")


def place(name: str, where: list[int], value: int):
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.blocks.0.up.{name}"][tuple(where)] = value

    return alter


def drop(name: str):
    return lambda tensors: tensors.pop(f"base_model.model.blocks.0.up.{name}")


def twice(tensors: dict[str, Tensor]) -> None:
    indices = tensors["base_model.model.blocks.0.up.shira_indices"]
    indices[:, 1] = indices[:, 0]


def narrow(tensors: dict[str, Tensor]) -> None:
    name = "base_model.model.blocks.0.up.shira_weight"
    tensors[name] = tensors[name][1:].clone()


IMPOSSIBLE = {
    "rows of unequal length": (
        "SHIRA",
        place("shira_indices", [0, 0], 11),
        "up: positions: 1 in row 0 but 3 in row 11",
    ),
    "a row out of range": ("SHIRA", place("shira_indices", [0, 0], 12), "up: positions: none, or"),
    "a negative column": ("SHIRA", place("shira_indices", [1, 0], -1), "out of range for a weight"),
    "flat and out of range": (
        "SUPERTUNING",
        place("supertuning_indices", [0], 72),
        r"out of range for a weight \[12, 6\]",
    ),
    "an entry twice": ("SHIRA", twice, "up: positions: one stands twice"),
    "a value less": ("SHIRA", narrow, r"positions: shape \[24, 2\], expected \[23\] or \[23, 2\]"),
    "no indices": (
        "SUPERTUNING",
        drop("supertuning_indices"),
        "up: has no supertuning_indices in the file, which PEFT saves with",
    ),
    "no values at all": ("SHIRA", dict.clear, "has no tensor NAME.shira_weight"),
    "a module that the base lacks": (
        "SHIRA",
        lambda tensors: tensors.update(
            {n.replace("blocks.0", "layers.0"): t.clone() for n, t in tensors.items()}
        ),
        "base: has no layers.0.down.weight",
    ),
    "a parameter that the base lacks": (
        "SHIRA",
        lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(2)}),
        r"score.weight: not in the base in its shape \[2\]",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_ours_is_refused(tmp_path, base, case):
    kind, alter, message = IMPOSSIBLE[case]
    source = save_as_peft(tmp_path / "theirs", adapted(), kind)
    change(source, alter)
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, base, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("LORA", {}, r"peft_type 'LORA', expected one of \['NEUROADA', 'SHIRA', 'SUPERTUNING'\]"),
        ("SUPERTUNING", {"r": 8}, "has a low-rank part, r 8"),
        ("SHIRA", {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_other_kinds_of_adapter_are_refused(tmp_path, base, kind, config, message):
    source = save_as_peft(tmp_path / "theirs", adapted(), kind, **config)
    with pytest.raises(ValueError, match=message):
        convert_adapter(source, base, tmp_path / "ours")


def test_damaged_sources_are_refused(tmp_path, base):
    theirs = save_as_peft(tmp_path / "peft", adapted(), "SHIRA")
    (theirs / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no safetensors file"):
        convert_adapter(theirs, base, tmp_path / "ours")
    (theirs / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json: TypeError"):
        convert_adapter(theirs, base, tmp_path / "ours")

    source = save_as_authors(tmp_path / "theirs", adapted())
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"state_dict_tunable\.pt: "):
        convert_adapter(source, base, tmp_path / "ours")
    torch.save([torch.zeros(1)], source)
    with pytest.raises(ValueError, match="list, expected tensors by name"):
        convert_adapter(source, base, tmp_path / "ours")
    torch.save({"up.weight": torch.zeros(1)}, source)
    with pytest.raises(ValueError, match=r"has no tensor NAME\.weight_new"):
        convert_adapter(source, base, tmp_path / "ours")
    source.write_bytes(whole)
    (tmp_path / "theirs" / "positions.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"positions\.npy: "):
        convert_adapter(source, base, tmp_path / "ours")
    np.save(tmp_path / "theirs" / "positions.npy", np.arange(4))
    with pytest.raises(ValueError, match="one array, expected one for each of 4 weights"):
        convert_adapter(source, base, tmp_path / "ours")
    np.savez(tmp_path / "some.npz", nothing=np.arange(4))
    with pytest.raises(ValueError, match=r"positions: none for blocks\.0\.up\.weight"):
        convert_adapter(source, base, tmp_path / "ours", positions=tmp_path / "some.npz")
    (tmp_path / "theirs" / "positions.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no positions\.npy beside"):
        convert_adapter(source, base, tmp_path / "ours")


def test_the_command_converts(tmp_path, base, capsys):
    source = save_as_authors(tmp_path / "theirs", adapted())
    command = ["convert", str(source), str(base), str(tmp_path / "ours")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "neuroada convert: " in capsys.readouterr().err
    with pytest.warns(UserWarning, match="pickle"):
        assert main([*command, "--allow-pickle"]) == 0
    assert "ours: 4 modules" in capsys.readouterr().out
    assert_same(tmp_path / "ours", adapted())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_what_peft_itself_saves_is_read(tmp_path, base, kind):
    """Where it is installed. Super-Tuning chooses all entries here, so as many in each row."""
    peft = pytest.importorskip("peft")
    if kind == "shira":
        config = peft.ShiraConfig(r=1, target_modules=["up"], init_weights=False)
        config.mask_fn = mask
    else:
        config = peft.SupertuningConfig(sparsity=0.0, target_modules=["up"], init_weights=False)
    model = peft.get_peft_model(Model(), config)
    model.save_pretrained(tmp_path / "theirs")
    convert_adapter(tmp_path / "theirs", base, tmp_path / "ours")
    ours = Model()
    nk.load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(ours(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


def mask(layer: nn.Module, r: int, **options: object) -> Tensor:
    """r (d_in + d_out) entries, as SHiRA wants them, as many in each row: here 18 in 6 rows."""
    chosen = torch.zeros_like(layer.weight)
    chosen[::2, ::2] = r
    return chosen
