"""Files that are no adapters, or damaged ones: each refused, with little memory, and unchanged."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import Model, Unchanged, adapted
from safetensors.torch import load_file, save_file

import neuroada_kernels as nk
from neuroada_kernels import adapter_file
from neuroada_kernels.adapter_file import KEY, read_adapter

MODULE = "blocks.0.up"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    model = adapted()
    model.head.bias.requires_grad_()
    nk.save_adapter(model, path)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors, to be changed."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"][KEY]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    return json.loads(header), tensors


def write(path: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A file of these, with a hash that is right."""
    if isinstance(header, dict):
        header.pop("sha256", None)
        header["sha256"] = adapter_file._digest(header, tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def assert_refused(path: Path, message: str) -> None:
    for model in (Model(), adapted(seed=5)):
        with Unchanged(model), pytest.raises(ValueError, match=message) as caught:
            nk.load_adapter(model, path, allow_mismatch=True)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_what_the_tests_write_again_loads(path):
    write(path, *contents(path))
    nk.load_adapter(Model(), path)


Bytes = Callable[[bytes], bytes]
RAW: dict[str, tuple[Bytes, str]] = {
    "empty": (lambda data: b"", "safetensors"),
    "one byte": (lambda data: data[:1], "safetensors"),
    "no header": (lambda data: data[:8], "no safetensors file: a header of"),
    "half a header": (lambda data: data[:300], "no safetensors file: a header of"),
    "no tensors": (lambda data: data[: 8 + int.from_bytes(data[:8], "little")], "safetensors"),
    "a byte less": (lambda data: data[:-1], "safetensors"),
    "half of it": (lambda data: data[: 2 * len(data) // 3], "safetensors"),
    "a byte more": (lambda data: data + b"0", "safetensors"),
    "zeros": (lambda data: bytes(len(data)), "safetensors"),
    "noise": (lambda data: random.Random(0).randbytes(len(data)), "safetensors"),
    "text": (lambda data: b"these are no weights, but a sentence of English", "safetensors"),
    "a pickle": (lambda data: pickle.dumps({"a": 1}), "safetensors"),
    "header of 2^63 bytes": (lambda data: (2**63).to_bytes(8, "little") + data[8:], "a header of"),
    "header of all bytes": (
        lambda data: len(data).to_bytes(8, "little") + data[8:],
        "safetensors",
    ),
    "header without end": (
        lambda data: (4 << 20).to_bytes(8, "little") + b"[" * (4 << 20),
        "safetensors",
    ),
}


@pytest.mark.parametrize("damage", RAW)
def test_bytes_that_are_no_safetensors_are_refused(path, damage):
    change, message = RAW[damage]
    path.write_bytes(change(path.read_bytes()))
    assert_refused(path, message)


def test_a_pickle_is_never_run(path, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"state": Bomb()}, path)
    assert_refused(path, "safetensors")
    assert not (tmp_path / "exploded").exists()


def test_every_flipped_bit_is_noticed(path):
    """At each of 200 places, in header and tensors alike."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(0)
    places = [generator.randrange(header) for _ in range(100)]
    places += [generator.randrange(header, len(data)) for _ in range(100)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"adapter\.safetensors: "):
            read_adapter(path)
    path.write_bytes(data)
    read_adapter(path)


def change_header(**changes: Any) -> Callable[[dict, dict], Any]:
    return lambda header, tensors: header.update(changes)


def change_base(**changes: Any) -> Callable[[dict, dict], Any]:
    return lambda header, tensors: header["modules"][MODULE].update(changes)


def rename(old: str, new: str) -> Callable[[dict, dict], Any]:
    def change(header: dict, tensors: dict) -> None:
        header["modules"][new] = header["modules"].pop(old)
        for part in ("index", "delta"):
            tensors[f"{new}.{part}"] = tensors.pop(f"{old}.{part}")

    return change


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda header, tensors: tensors.update({name: change(tensors[name])})


def repeat(index: torch.Tensor) -> torch.Tensor:
    return index[:, :1].expand(-1, 2).contiguous()


def resize(rows: int, k: int) -> Callable[[dict, dict], None]:
    def change(header: dict, tensors: dict) -> None:
        tensors[f"{MODULE}.index"] = torch.zeros(rows, k, dtype=torch.uint16)
        tensors[f"{MODULE}.delta"] = torch.zeros(rows, k)

    return change


HOSTILE = {
    "a later version": (change_header(version=2), "version: 2, expected 1"),
    "no version": (change_header(version=None), "version: None, expected 1"),
    "version as text": (change_header(version="1" * 10000), "version: '1111"),
    "an unknown key": (change_header(extra=1), "header: keys"),
    "config as text": (change_header(config="k=1"), "config: expected"),
    "author as number": (change_header(created_by=1), "created_by"),
    "no modules": (change_header(modules={}), "modules: expected"),
    "modules as list": (change_header(modules=["a"]), "modules: expected"),
    "parameters as text": (change_header(parameters="head.bias"), "parameters: expected"),
    "parameters of numbers": (change_header(parameters=[1]), "parameters: expected"),
    "a parameter without values": (change_header(parameters=["head.bias", "x"]), "'x'"),
    "a parameter twice": (change_header(parameters=["head.bias"] * 2), "not those that the head"),
    "a tensor too many": (change_header(parameters=[]), r"\['head.bias'\]"),
    "a module without tensors": (
        lambda header, tensors: header["modules"].update({"head": header["modules"][MODULE]}),
        "head.delta",
    ),
    "the weight as parameter": (
        change_header(parameters=["head.bias", f"{MODULE}.delta"]),
        "not those that the header names",
    ),
    "no hash of the weight": (change_base(sha256=""), "sha256 ''"),
    "hash as number": (change_base(sha256=0), "sha256 0, expected 64 hex digits"),
    "hash in capitals": (change_base(sha256="A" * 64), "expected 64 hex digits"),
    "weight of integers": (change_base(dtype="int8"), "dtype 'int8', expected a floating"),
    "dtype as list": (change_base(dtype=["float32"]), "dtype"),
    "shape as text": (change_base(shape="12, 6"), "shape '12, 6'"),
    "shape of three": (change_base(shape=[12, 6, 1]), "shape"),
    "shape of fractions": (change_base(shape=[12.0, 6.0]), "shape"),
    "shape of flags": (change_base(shape=[True, True]), "shape"),
    "a negative shape": (change_base(shape=[-12, 6]), "shape"),
    "no inputs": (change_base(shape=[12, 0]), "shape"),
    "10^18 inputs": (change_base(shape=[12, 10**18]), "shape"),
    "10^9 rows": (change_base(shape=[10**9, 6]), r"index: shape \[12, 2\], expected \[10000"),
    "too wide for 16 bits": (change_base(shape=[12, 65536]), "dtype U16, expected I32"),
    "index of 32 bits": (
        replace(f"{MODULE}.index", lambda index: index.int()),
        "dtype I32, expected U16 for 6 inputs",
    ),
    "delta of integers": (
        replace(f"{MODULE}.delta", lambda delta: delta.int()),
        "delta: dtype I32, expected a floating",
    ),
    "delta of another shape": (
        replace(f"{MODULE}.delta", lambda delta: delta[:, :1].contiguous()),
        r"delta: shape \[12, 1\], expected \[12, 2\]",
    ),
    "index flat": (
        replace(f"{MODULE}.index", lambda index: index.view(-1)),
        r"index: shape \[24\]",
    ),
    "k of 0": (resize(12, 0), r"index: shape \[12, 0\]"),
    "k above the inputs": (resize(12, 7), r"index: shape \[12, 7\]"),
    "rows missing": (resize(11, 2), r"index: shape \[11, 2\]"),
    "a column out of range": (
        replace(f"{MODULE}.index", lambda index: index.int().fill_(6).to(torch.uint16)),
        f"{MODULE}: index: column 6 in row 0 is out of range",
    ),
    "a column twice": (
        replace(f"{MODULE}.index", repeat),
        f"{MODULE}: index: column . stands twice in row 0",
    ),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_file_that_contradicts_itself_is_refused(path, change):
    """Its hash is right, as in a file that someone made on purpose."""
    alter, message = HOSTILE[change]
    header, tensors = contents(path)
    alter(header, tensors)
    write(path, header, tensors)
    assert_refused(path, message)


@pytest.mark.parametrize("header", [[], 1, "text", None, {}])
def test_a_header_that_is_no_header_is_refused(path, header):
    _, tensors = contents(path)
    write(path, header, tensors)
    assert_refused(path, "header|version")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "NaN", "9" * 5000, '{"version": 1e999}'])
def test_a_header_that_is_no_json_is_refused(path, text):
    save_file(contents(path)[1], path, metadata={KEY: text})
    assert_refused(path, r"adapter\.safetensors: ")


def test_any_other_safetensors_file_is_refused(path):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2, 2)}, path, metadata=metadata)
        assert_refused(path, "no adapter: its metadata have no 'neuroada'")


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "blocks", "blocks.0.up.weight", "__class__", "blocks.0.__init__", "", "/"],
)
def test_a_name_leads_nowhere_but_to_a_linear_of_the_model(path, name):
    header, tensors = contents(path)
    rename(MODULE, name)(header, tensors) if name else change_header(modules={})(header, tensors)
    write(path, header, tensors)
    model = Model()
    with Unchanged(model), pytest.raises((TypeError, ValueError)):
        nk.load_adapter(model, path, allow_mismatch=True)


MEMORY = """
import sys
from neuroada_kernels import adapter_file

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

adapter_file.HEADER_LIMIT = int(sys.argv[1])
before = peak()
for path in sys.argv[2:]:
    try:
        adapter_file.read_adapter(path)
    except ValueError as error:
        print(peak() - before)
"""


def test_a_file_that_claims_much_takes_little_memory(tmp_path):
    """Sparse files of 2 TiB that are all header, and a header full of empty lists.

    The longest header is shorter here than it is else, and so takes less time.
    """
    limit = 2 << 20
    paths = [tmp_path / name for name in ("huge", "long", "lists")]
    for path, length in zip(paths, (1 << 40, limit + 1), strict=False):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":')
        with path.open("r+b") as file:
            file.truncate(2 << 40)
    text = '{"version": 1, "modules": [' + "[]," * (limit // 3 - 100) + "[]]}"
    save_file({}, paths[2], metadata={KEY: text})
    assert 0.9 * limit < paths[2].stat().st_size < limit < adapter_file.HEADER_LIMIT

    command = [sys.executable, "-c", MEMORY, str(limit), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    huge, long, lists = (int(line) for line in done.stdout.split())
    assert max(huge, long) < 4 << 20
    # In proportion, a gigabyte for the longest there may be.
    assert lists < 32 * limit + (4 << 20)


def test_a_delta_that_no_file_may_have_is_not_written(path):
    adapter, before = read_adapter(path), path.read_bytes()
    module = adapter.modules[MODULE]
    narrow = dataclasses.replace(module, delta=module.delta.to(torch.float8_e4m3fn))
    odd = dataclasses.replace(adapter, modules={**adapter.modules, MODULE: narrow})
    with pytest.raises(ValueError, match=r"up\.delta: dtype torch\.float8_e4m3fn, exp"):
        adapter_file.write_adapter(odd, path)
    assert path.read_bytes() == before
