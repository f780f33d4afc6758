"""Safetensors checkpoints, a file or a folder of shards, read and changed in blocks of rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Bytes of a tensor that are in memory at a time.
BLOCK_BYTES = 16 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: file, dtype as safetensors names it, shape, and first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, for a floating dtype."""
        return math.prod(self.shape[1:]) * FLOATING[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by name, and the files that hold them.

    ``folder`` is None where the checkpoint is a single file.
    """

    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    folder: Path | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers of a file, or of a folder of shards with an index.

        Raises
        ------
        FileNotFoundError
            If there is no such file, or a shard is missing.
        ValueError
            If a file is no safetensors file, or a folder holds none, or its index names files
            outside the folder or tensors that are not where it says.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(dict(_stored(path)), (path,), None)
        files, expected = _files_of(path)
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _stored(file):
                if expected is None or expected.get(name) == file.name:
                    tensors[name] = stored
        if expected is not None and expected.keys() != tensors.keys():
            odd = sorted(expected.keys() - tensors.keys())
            raise ValueError(f"{path}: {odd[0]} is not in the file that the index names")
        return cls(tensors, files, path)


def blocks(stored: Stored, file: BinaryIO) -> Iterator[tuple[slice, Tensor, Callable[[], None]]]:
    """The rows of a floating tensor in blocks, each with a function that writes it back."""
    if 0 in stored.shape:
        return
    d_out = stored.shape[0] if stored.shape else 1
    step = max(1, BLOCK_BYTES // stored.row_bytes)
    for first in range(0, d_out, step):
        rows = slice(first, min(first + step, d_out))
        place = stored.start + first * stored.row_bytes
        file.seek(place)
        data = bytearray(file.read((rows.stop - first) * stored.row_bytes))
        block = torch.frombuffer(data, dtype=FLOATING[stored.dtype])

        def write(place: int = place, data: bytearray = data) -> None:
            file.seek(place)
            file.write(data)

        yield rows, block.view(-1, *stored.shape[1:]), write


def _files_of(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The files of a folder that hold the model, and the index's map of tensor to file."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if folder / INDEX in indices:
        indices = [folder / INDEX]
    if len(indices) == 1:
        return _read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE in files:
        files = [folder / SINGLE]
    if indices or len(files) != 1:
        raise ValueError(
            f"{folder}: {len(indices)} indices and {len(files)} safetensors files, expected "
            f"{INDEX}, {SINGLE}, or one file of either kind"
        )
    return tuple(files), None


def _read_index(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    try:
        index = json.loads(path.read_bytes())
        where = index["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no index of shards: {error!r:.200}") from error
    for name in names:
        # Another path could be read outside the folder, or written outside its copy.
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{path}: {name!r:.200}, expected names of files in its folder")
    return tuple(path.with_name(name) for name in names), where


def _stored(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of one file, after safetensors has validated its header."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file, or a damaged one: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            start = 8 + length + tensor["data_offsets"][0]
            yield name, Stored(file, tensor["dtype"], tuple(tensor["shape"]), start)
