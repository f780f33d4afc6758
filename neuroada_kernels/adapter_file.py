"""The adapter file: safetensors, with a JSON header in its metadata.

For each adapted module ``NAME`` it holds ``NAME.index`` and ``NAME.delta``, ``[d_out, k]``. Every
other trained parameter is stored under its own name. An index is uint16 if all columns fit, with
65535 for a slot without a connection, and else int32. The header is stored under the metadata key
``neuroada``::

    {"version": 1, "created_by": "...", "config": {...} or null,
     "modules": {NAME: {"shape": [d_out, d_in], "dtype": "bfloat16", "sha256": "...",
                        "kind": "bitsandbytes nf4"}},
     "parameters": [NAME, ...], "sha256": "..."}

A module's ``shape``, ``dtype`` and ``sha256`` are those of its base weight; the hash is over the
chosen entries, dequantised if the weight is quantised. ``kind`` is present only for a base that is
no ``nn.Linear`` with a plain weight. The outer ``sha256`` is over the header and all tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from neuroada_kernels._dtypes import FLOATING, NAMES
from neuroada_kernels._files import replacing
from neuroada_kernels._version import __version__
from neuroada_kernels.plan import check_index

VERSION = 1
KEY = "neuroada"
#: Maximum length of a header in bytes; one of 70,000 modules fits.
HEADER_LIMIT = 32 << 20
_NO_CONNECTION = 0xFFFF
_FLOATING = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a weight: ``shape`` ``[d_out, d_in]``, dtype, hash of the chosen entries.

    ``kind`` is the kind of base, if that is no ``nn.Linear`` with a plain weight.
    """

    shape: tuple[int, int]
    dtype: str
    sha256: str
    kind: str | None = None

    def differences(self, found: Fingerprint) -> list[str]:
        """Descriptions of what in ``found`` differs from this."""
        words = [
            f"{name} {show(actual)}, expected {show(expected)}"
            for name, actual, expected, show in (
                ("shape", found.shape, self.shape, lambda shape: str(list(shape))),
                ("kind", found.kind, self.kind, lambda kind: kind or "plain linear"),
                ("dtype", found.dtype, self.dtype, str),
            )
            if actual != expected
        ]
        # Reported alone: in another dtype the hash differs anyway.
        if not words and found.sha256 != self.sha256:
            words = ["other values at the chosen connections"]
        return words


class EntryHash:
    """The hash of a weight's chosen entries, taken in blocks of rows."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, values: Tensor, index: Tensor) -> None:
        """Add ``values [rows, k]``, the weight's entries at ``index [rows, k]``."""
        self._sha256.update(_raw(values.detach().masked_fill(index < 0, 0)))

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._sha256.hexdigest()


@dataclass(frozen=True)
class AdaptedModule:
    """``index`` (int32) and ``delta``, both ``[d_out, k]``, and the weight they were trained on."""

    index: Tensor
    delta: Tensor
    base: Fingerprint


@dataclass(frozen=True)
class Adapter:
    """The contents of a file: adapted modules and other trained parameters by name, the config."""

    modules: Mapping[str, AdaptedModule]
    parameters: Mapping[str, Tensor]
    config: dict[str, Any] | None = None
    created_by: str = f"neuroada-kernels {__version__}"


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write ``adapter`` to ``path`` atomically.

    Raises
    ------
    ValueError
        If ``path`` is a folder, or the adapter has no modules, or a delta of an unsupported
        dtype.
    """
    if not adapter.modules:
        raise ValueError("adapter: has no modules, expected at least one")
    for name, module in adapter.modules.items():
        if module.delta.dtype not in FLOATING:
            raise ValueError(f"{name}.delta: dtype {module.delta.dtype}, expected {NAMES}")
    tensors = {}
    for name, module in adapter.modules.items():
        tensors[within(name, "index")] = _narrow(module.index, module.base.shape[1])
        tensors[within(name, "delta")] = module.delta
    tensors.update(adapter.parameters)
    tensors = {name: _on_its_own(tensor) for name, tensor in tensors.items()}
    header = {
        "version": VERSION,
        "created_by": adapter.created_by,
        "config": adapter.config,
        "modules": {name: _fingerprint_json(m.base) for name, m in adapter.modules.items()},
        "parameters": sorted(adapter.parameters),
    }
    header["sha256"] = _digest(header, tensors)
    with replacing(path) as temporary:
        # safetensors' save_file would replace it by a file that only its owner can read.
        temporary.write_bytes(save(tensors, metadata={KEY: _canonical(header)}))


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in ``path``, after validating the whole file.

    Nothing in the file is executed, and memory use is bounded by the file's size.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, is no adapter, or has an unknown version.
    """
    path = Path(path)
    try:
        _check_length(path)
        with safe_open(path, framework="pt") as file:
            header = _parse((file.metadata() or {}).get(KEY))
            _check_header(header)
            _check_tensors(header, {name: _form(file, name) for name in file.keys()})  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("sha256") != _digest(header, tensors):
            raise ValueError("its contents have changed since it was written (sha256)")
        return _adapter(header, tensors)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def within(module: str, name: str) -> str:
    """The full name of a tensor of ``module``."""
    return f"{module}.{name}" if module else name


def _adapter(header: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    modules = {}
    for name, base in header["modules"].items():
        index = _widen(tensors[within(name, "index")])
        try:
            check_index(index, base["shape"][1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        fingerprint = Fingerprint(
            tuple(base["shape"]), base["dtype"], base["sha256"], base.get("kind")
        )
        modules[name] = AdaptedModule(index, tensors[within(name, "delta")], fingerprint)
    parameters = {name: tensors[name] for name in header["parameters"]}
    return Adapter(modules, parameters, header["config"], header["created_by"])


def _check_length(path: Path) -> None:
    """Reject a header whose parsing would take much more memory than an adapter's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_LIMIT, path.stat().st_size):
        raise ValueError(
            f"no safetensors file: a header of {length} bytes, expected at most "
            f"{min(HEADER_LIMIT, path.stat().st_size)}"
        )


def _parse(text: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError(f"no adapter: its metadata have no {KEY!r}")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("header: expected a JSON object")
    if header.get("version") != VERSION:
        raise ValueError(f"version: {header.get('version')!r:.40}, expected {VERSION}")
    return header


def _check_header(header: dict[str, Any]) -> None:
    expected = {"version", "created_by", "config", "modules", "parameters", "sha256"}
    if header.keys() != expected:
        raise ValueError(f"header: keys {sorted(header)!s:.200}, expected {sorted(expected)}")
    if not isinstance(header["created_by"], str) or not isinstance(header["sha256"], str):
        raise ValueError("created_by, sha256: expected text")
    if not (header["config"] is None or isinstance(header["config"], dict)):
        raise ValueError("config: expected a JSON object or null")
    parameters = header["parameters"]
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise ValueError("parameters: expected a list of names")
    if not isinstance(header["modules"], dict) or not header["modules"]:
        raise ValueError("modules: expected a JSON object with at least one module")
    for name, base in header["modules"].items():
        if not isinstance(base, dict) or base.keys() - {"kind"} != {"shape", "dtype", "sha256"}:
            raise ValueError(f"{name}: expected shape, dtype and sha256 of its weight")
        if not isinstance(base.get("kind", ""), str):
            raise ValueError(f"{name}: kind {base['kind']!r:.40}, expected text")
        shape = base["shape"]
        is_pair = isinstance(shape, list) and [type(n) for n in shape] == [int, int]
        if not is_pair or not all(1 <= n < 2**31 for n in shape):
            raise ValueError(f"{name}: shape {shape!r:.80}, expected [d_out, d_in]")
        if base["dtype"] not in _FLOATING.values():
            raise ValueError(f"{name}: dtype {base['dtype']!r:.40}, expected a floating dtype")
        if not (isinstance(base["sha256"], str) and _SHA256.fullmatch(base["sha256"])):
            raise ValueError(f"{name}: sha256 {base['sha256']!r:.80}, expected 64 hex digits")


def _form(file: Any, name: str) -> tuple[str, list[int]]:
    part = file.get_slice(name)
    return part.get_dtype(), part.get_shape()


def _check_tensors(header: dict[str, Any], forms: dict[str, tuple[str, list[int]]]) -> None:
    """Reject missing or extra tensors, and tensors of a wrong shape or dtype."""
    names = [within(m, part) for m in header["modules"] for part in ("index", "delta")]
    names += header["parameters"]
    if len(set(names)) != len(names) or set(names) != forms.keys():
        odd = sorted(set(names) ^ forms.keys())[:5]
        raise ValueError(f"tensors: not those that the header names, such as {odd!s:.200}")
    for name, base in header["modules"].items():
        d_out, d_in = base["shape"]
        dtype, shape = forms[within(name, "index")]
        expected = "U16" if _fits_16_bits(d_in) else "I32"
        if dtype != expected:
            raise ValueError(f"{name}.index: dtype {dtype}, expected {expected} for {d_in} inputs")
        if len(shape) != 2 or shape[0] != d_out or not 1 <= shape[1] <= d_in:
            raise ValueError(
                f"{name}.index: shape {shape}, expected [{d_out}, k] with k from 1 to {d_in}"
            )
        delta_dtype, delta_shape = forms[within(name, "delta")]
        if delta_dtype not in _FLOATING:
            raise ValueError(f"{name}.delta: dtype {delta_dtype}, expected a floating dtype")
        if delta_shape != shape:
            raise ValueError(f"{name}.delta: shape {delta_shape}, expected {shape}, as index")


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(header).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _fingerprint_json(base: Fingerprint) -> dict[str, Any]:
    known = {"shape": list(base.shape), "dtype": base.dtype, "sha256": base.sha256}
    return known if base.kind is None else {**known, "kind": base.kind}


def _fits_16_bits(d_in: int) -> bool:
    """Whether every column and the mark of an empty slot fit in 16 bits."""
    return d_in <= _NO_CONNECTION


def _narrow(index: Tensor, d_in: int) -> Tensor:
    if not _fits_16_bits(d_in):
        return index
    return index.masked_fill(index < 0, _NO_CONNECTION).to(torch.uint16)


def _widen(index: Tensor) -> Tensor:
    if index.dtype != torch.uint16:
        return index
    wide = index.to(torch.int32)
    return wide.masked_fill(wide == _NO_CONNECTION, -1)


def _on_its_own(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, in a storage that holds nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _raw(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a tensor, through the buffer protocol."""
    dense = tensor.detach().cpu().contiguous()
    view = (ctypes.c_char * dense.nbytes).from_address(dense.data_ptr())
    view.owner = dense  # type: ignore[attr-defined]
    return view
