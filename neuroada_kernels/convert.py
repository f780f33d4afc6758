"""``neuroada convert``: adapters of the authors' code or PEFT's sparse tuners to our format.

The authors' code (github.com/FightingFighting/NeuroAda) saves ``state_dict_tunable.pt``, with
1-D values ``NAME.weight_new``, and ``positions.npy``, the positions of these values by weight. PEFT
saves ``adapter_model.safetensors``: SHiRA ``NAME.shira_weight`` and ``NAME.shira_indices``
``[2, n]``, Super-Tuning ``NAME.supertuning_values`` and flat ``NAME.supertuning_indices``, and our
own method in PEFT ``NAME.neuroada_delta`` and ``NAME.neuroada_index``, both ``[d_out, k]``. All add
the values to the weight. Our format needs the same number k of positions in every nonempty row.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neuroada_kernels._dtypes import name_of
from neuroada_kernels.adapter_file import (
    AdaptedModule,
    Adapter,
    EntryHash,
    Fingerprint,
    within,
    write_adapter,
)
from neuroada_kernels.checkpoint import FLOATING, Checkpoint, blocks

_PICKLE = "a pickle, which can run any code: {}; allow_pickle loads it, if you trust its author"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Entries:
    """Values of one weight and their positions, flat ``[n]`` or row and column ``[n, 2]``."""

    values: Tensor
    places: Tensor


def convert_adapter(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    positions: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Convert the adapter in ``source`` to our format; returns what was written.

    Parameters
    ----------
    source : str or path
        The authors' ``state_dict_tunable.pt``, or the folder of a PEFT adapter.
    base : str or path
        The checkpoint it was trained on, a safetensors file or a folder of shards, from which
        shapes and fingerprints are taken.
    out : str or path
        The file to write.
    positions : str or path, optional
        The authors' ``positions.npy``; by default beside ``source`` or one folder up. An ``.npz``
        with one array per weight needs no pickle.
    allow_pickle : bool
        Load files that are pickles of more than tensors, as the authors' positions are. **They can
        run arbitrary code**; a warning is issued.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If files are damaged, or would need a pickle; if the base lacks a weight; if positions are
        out of range or repeated; or if rows of a weight have different numbers of them.
    """
    source = Path(source)
    if source.is_dir() and (source / "adapter_config.json").exists():
        entries, parameters = _from_peft(source)
    else:
        entries, parameters = _from_authors(source, positions, allow_pickle)
    checkpoint = Checkpoint.open(base)
    modules = {name: _module(name, found, checkpoint) for name, found in entries.items()}
    for name, tensor in parameters.items():
        stored = checkpoint.tensors.get(name)
        if stored is None or stored.shape != tuple(tensor.shape):
            raise ValueError(f"{name}: not in the base in its shape {list(tensor.shape)}")
    adapter = Adapter(modules, parameters)
    write_adapter(adapter, out)
    return adapter


def _module(name: str, entries: _Entries, checkpoint: Checkpoint) -> AdaptedModule:
    stored = checkpoint.tensors.get(within(name, "weight"))
    if stored is None:
        raise ValueError(f"base: has no {within(name, 'weight')}, which the adapter is for")
    if stored.dtype not in FLOATING or len(stored.shape) != 2:
        raise ValueError(
            f"{name}: {stored.dtype} of shape {list(stored.shape)} in the base, expected a "
            "floating [d_out, d_in]"
        )
    d_out, d_in = stored.shape
    try:
        index, delta = _in_rows(entries, d_out, d_in)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    hashed = EntryHash()
    with stored.file.open("rb") as file:
        for rows, block, _ in blocks(stored, file):
            hashed.update(block.gather(1, index[rows].clamp(min=0).long()), index[rows])
    dtype = name_of(FLOATING[stored.dtype])
    return AdaptedModule(index, delta, Fingerprint((d_out, d_in), dtype, hashed.hexdigest()))


def _in_rows(entries: _Entries, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """``index`` and ``delta`` ``[d_out, k]``, columns ascending; rows without entries are empty."""
    values, places = entries.values.detach(), entries.places
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values: {values.dtype} {list(values.shape)}, expected floating [n]")
    n = len(values)
    if places.is_floating_point() and bool((places == places.round()).all()):
        places = places.long()  # as PEFT saves them on Windows
    if places.is_floating_point() or places.is_complex() or places.dtype == torch.bool:
        raise ValueError(f"positions: dtype {places.dtype}, expected integers")
    places = places.long()
    if places.shape == (n, 2):
        row, column = places.unbind(1)
    elif places.shape == (n,):
        row, column = places.div(d_in, rounding_mode="floor"), places.remainder(d_in)
    else:
        raise ValueError(f"positions: shape {list(places.shape)}, expected [{n}] or [{n}, 2]")
    if n == 0 or bool(((row < 0) | (row >= d_out) | (column < 0) | (column >= d_in)).any()):
        raise ValueError(f"positions: none, or out of range for a weight [{d_out}, {d_in}]")
    flat, order = (row * d_in + column).sort()
    if bool((flat[1:] == flat[:-1]).any()):
        raise ValueError("positions: one stands twice, expected distinct ones")
    counts = torch.bincount(row, minlength=d_out)
    k = int(counts.max())
    ragged = ((counts != k) & (counts != 0)).nonzero()
    if len(ragged):
        other = int(ragged[0])
        raise ValueError(
            f"positions: {int(counts[other])} in row {other} but {k} in row "
            f"{int(counts.argmax())}, expected as many in each row, or none"
        )
    index = torch.full((d_out, k), -1, dtype=torch.int32, device="cpu")
    delta = torch.zeros(d_out, k, dtype=values.dtype, device=values.device)
    index[counts > 0] = flat.remainder(d_in).int().view(-1, k)
    delta[counts > 0] = values[order].view(-1, k)
    return index, delta


def _from_authors(
    source: Path, positions: str | os.PathLike[str] | None, allow_pickle: bool
) -> tuple[dict[str, _Entries], dict[str, Tensor]]:
    if source.is_dir():
        source = source / "state_dict_tunable.pt"
    state = _load_state(source, allow_pickle)
    values = {n: t for n, t in state.items() if n.endswith("weight_new")}
    if not values:
        raise ValueError(f"{source}: has no tensor NAME.weight_new")
    places = _load_positions(_find_positions(source, positions), list(values), allow_pickle)
    entries = {}
    for name, tensor in values.items():
        weight = name.removesuffix("_new")
        if weight not in places:
            raise ValueError(f"positions: none for {weight}")
        entries[weight.rpartition(".")[0]] = _Entries(tensor.detach(), places[weight])
    others = {n: t.detach() for n, t in state.items() if n not in values}
    return entries, others


def _find_positions(source: Path, positions: str | os.PathLike[str] | None) -> Path:
    if positions is not None:
        return Path(positions)
    for folder in (source.parent, source.absolute().parent.parent):
        for name in ("positions.npz", "positions.npy"):
            if (folder / name).exists():
                return folder / name
    raise FileNotFoundError(f"positions: no positions.npy beside {source} or one folder up")


def _load_state(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file of ``torch.save``."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            first = str(error).partition("\n")[0]
            raise ValueError(f"{path}: {_PICKLE.format(first)}") from error
        _warn(path)
        state = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: no file of torch.save, or a damaged one: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: {type(state).__name__}, expected tensors by name")
    return dict(state)


def _load_positions(path: Path, names: list[str], allow_pickle: bool) -> dict[str, Tensor]:
    """Positions by weight, from a pickled dict, an ``.npz``, or a single array."""
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading it needs NumPy: pip install numpy") from error
    try:
        loaded = np.load(path, allow_pickle=False)
        found = dict(loaded) if path.suffix == ".npz" else loaded
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise ValueError(f"{path}: {error}") from error
        if not allow_pickle:
            raise ValueError(f"{path}: {_PICKLE.format('an array of objects')}") from error
        _warn(path)
        found = np.load(path, allow_pickle=True).item()
    if isinstance(found, np.ndarray):
        if len(names) != 1:
            raise ValueError(f"{path}: one array, expected one for each of {len(names)} weights")
        found = {names[0].removesuffix("_new"): found}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: {type(found).__name__}, expected positions by weight")
    try:
        return {str(name): torch.as_tensor(array) for name, array in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _warn(path: Path) -> None:
    warnings.warn(f"{path}: loaded as a pickle, which can run any code", stacklevel=4)


def _from_peft(folder: Path) -> tuple[dict[str, _Entries], dict[str, Tensor]]:
    try:
        config: Any = json.loads((folder / "adapter_config.json").read_bytes())
        kind = config["peft_type"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: adapter_config.json: {error!r:.200}") from error
    parts = {
        "SHIRA": ("shira_weight", "shira_indices"),
        "SUPERTUNING": ("supertuning_values", "supertuning_indices"),
        "NEUROADA": ("neuroada_delta", "neuroada_index"),
    }
    if kind not in parts:
        raise ValueError(f"{folder}: peft_type {kind!r:.80}, expected one of {sorted(parts)}")
    if config.get("fan_in_fan_out"):
        raise ValueError(f"{folder}: fan_in_fan_out, expected weights [d_out, d_in]")
    if config.get("r") and kind == "SUPERTUNING":
        raise ValueError(f"{folder}: has a low-rank part, r {config['r']!r:.40}, expected none")
    path = folder / "adapter_model.safetensors"
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one: {error}") from error
    state = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state.items()}
    values_name, places_name = parts[kind]
    entries = {}
    for name in [name for name in state if name.rpartition(".")[2] == values_name]:
        module = name.rpartition(".")[0]
        places = state.pop(within(module, places_name), None)
        if places is None:
            raise ValueError(
                f"{module}: has no {places_name} in the file, which PEFT saves with "
                "save_precomputed_indices=True"
            )
        values = state.pop(name)
        if kind == "SHIRA":  # [2, n]: rows, then columns
            places = places.t()
        elif kind == "NEUROADA":
            values, places = _live_slots(module, values, places)
        entries[module] = _Entries(values, places)
    if not entries:
        raise ValueError(f"{path}: has no tensor NAME.{values_name}")
    return entries, {name.replace(".base_layer.", "."): t for name, t in state.items()}


def _live_slots(module: str, delta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[n]`` and row and column ``[n, 2]`` of the connections of ``[d_out, k]``."""
    if index.dim() != 2 or index.shape != delta.shape or index.dtype != torch.int32:
        raise ValueError(
            f"{module}: index {index.dtype} {list(index.shape)} and delta {list(delta.shape)}, "
            "expected int32 and both [d_out, k]"
        )
    row, slot = (index != -1).nonzero(as_tuple=True)
    return delta[row, slot], torch.stack([row, index[row, slot].long()], 1)


def main(argv: list[str] | None = None) -> int:
    """Run ``neuroada convert``; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="neuroada convert",
        description="Make an adapter of state_dict_tunable.pt and positions.npy, as the authors' "
        "code saves them, or of the folder of a SHiRA, Super-Tuning or NeuroAda adapter of PEFT.",
    )
    parser.add_argument("source", metavar="SOURCE", help="the .pt file, or the folder")
    parser.add_argument("base", metavar="BASE", help="the checkpoint it was trained on")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--positions", metavar="FILE", help="positions.npy, where it lies elsewhere"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load pickles, which can run any code: only from an author you trust",
    )
    arguments = parser.parse_args(argv)
    try:
        adapter = convert_adapter(
            arguments.source,
            arguments.base,
            arguments.out,
            positions=arguments.positions,
            allow_pickle=arguments.allow_pickle,
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"neuroada convert: {error}\n")
    print(f"{arguments.out}: {len(adapter.modules)} modules")
    return 0
