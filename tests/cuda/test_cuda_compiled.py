"""The kernels as nvcc compiles them, read from the library: registers, spills, loads, stores.

``python tests/cuda/test_cuda_compiled.py`` rewrites the table; a spill must be explained in
``docs/kernels/cuda.md``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import neuroada_kernels
from neuroada_kernels import _extension

TABLE = Path(__file__).parents[1] / "data" / "cuda_resources.json"
LIBRARY = Path(neuroada_kernels.__file__).parent / "libneuroada.so"


def _why_not() -> str | None:
    if _extension.module is None:
        return f"not built: {_extension.module_error}"
    if not _extension.module.build_facts()["cuda_archs"]:
        return "built without CUDA: `make NEUROADA_BUILD=cuda test-python` gets nvcc and compiles"
    if importlib.util.find_spec("triton") is None or shutil.which("c++filt") is None:
        return "reading the library needs Triton's cuobjdump and c++filt"
    return None


if (reason := _why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

BUILD = _extension.module.build_facts()
ARCHS = BUILD["cuda_archs"].split()
every_arch = pytest.mark.parametrize("arch", ARCHS)


#: How blocks reach shared memory, in the order of ``Staging`` in staggered_staging.cuh.
STAGINGS = ("loaded", "copied", "staggered")


def _read(*options: str) -> str:
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        [tools / "cuobjdump", *options, LIBRARY],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    readable = subprocess.run(
        ["c++filt"], input=said, check=True, capture_output=True, text=True
    ).stdout
    readable = re.sub(r"\([\w:]+::Staging\)(\d)", lambda m: STAGINGS[int(m[1])], readable)
    return re.sub(r"\([\w:]+Mode\)|neuroada::(cuda::)?", "", readable)


def _name(signature: str) -> str:
    """``bypass_fwd_kernel<float, 2>`` of ``void bypass_fwd_kernel<float, 2>(BypassFwdLaunch)``."""
    return signature.removeprefix("void ").partition("(")[0]


@cache
def resources() -> dict[str, dict[str, int]]:
    """By arch and kernel; ``stack`` is in bytes per thread and holds spilled registers."""
    found, arch, name = {}, "", ""
    for line in _read("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (.+):$", line):
            name = _name(match[1])
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found[f"{arch} {name}"] = {
                "registers": used["REG"],
                "stack": used["STACK"] + used["LOCAL"],
                "shared": used["SHARED"],
            }
    return found


@cache
def instructions(arch: str) -> dict[str, set[str]]:
    """The memory instructions of each kernel, and those that only sm_90a has."""
    found, name = {}, ""
    for line in _read("-sass", "-arch", f"sm_{arch}").splitlines():
        if match := re.search(r"Function : (.+)$", line):
            name = _name(match[1])
        elif match := re.search(rf"\b({_INSTRUCTIONS})(?![\w.])", line):
            found.setdefault(name, set()).add(match[1] + ".tnspB" * (".tnspB," in line))
    return found


_INSTRUCTIONS = (
    r"(?:(?:LD|ST)[GSL]|HGMMA|UTMALDG|UTMASTG|UBLKCP|SYNCS|USETMAXREG|WARPGROUP)(?:\.\w+)*"
)


#: The GEMMs for sm_90a: ours with patched tiles of W, and CUTLASS's if built with it.
PATCHED, ONTO = PRODUCTS = ("linear_patched_sm90_kernel", "product_onto_sm90_kernel")


#: The two forms of CUTLASS's, and the columns of their wgmma instructions.
COLUMNS = {"OwnTiles": 128, "SharedTile": 256}

#: dx that writes groups of columns.
GROUPS = "bypass_bwd_input_groups_kernel"

#: The kernels of one slot, which read untransposed rows.
ROWS = ("bypass_fwd_rows_kernel", "sddmm_rows_kernel")


def is_bulk_copied(name: str) -> bool:
    """Whether it is a staged kernel with bulk-copied blocks."""
    if name.startswith(("bypass_bwd_input_tiles_kernel", GROUPS)):
        return True
    if name.startswith("bypass_bwd_input_kernel"):
        return name.endswith(", true>")
    staged = ("bypass_fwd_kernel", "sddmm_kernel")
    return name.startswith(staged) and not name.endswith(f", {STAGINGS[0]}>")


def is_for_sm90(name: str) -> bool:
    return name.startswith((*PRODUCTS, *ROWS, "block_entries_kernel")) or is_bulk_copied(name)


def test_every_kernel_is_compiled_for_every_arch_that_it_is_for():
    names = {key.partition(" ")[2] for key in resources()}
    # Staged kernels, their helpers, merge, columns; for sm_90a staged kernels with bulk-copied
    # blocks (forward, SDDMM, dx), of one slot with rows, GEMMs each way and their helper.
    products = 1 + len(COLUMNS) if BUILD["cutlass"] and "90a" in ARCHS else 1
    bulk, rows = 2 * (2 * 4 + 2 * 5 + 1 + 4), 2 * (2 + 3 * 2)
    assert len(names) == 3 * (5 + 5 + 2) + 3 + 3 * 4 + 2 + bulk + rows + products * 2 * 2 + 1
    assert set(resources()) == {
        f"sm_{arch} {name}"
        for arch in ARCHS
        for name in names
        if arch == "90a" or not is_for_sm90(name)
    }


def test_no_kernel_needs_more_than_the_table_says():
    table = json.loads(TABLE.read_text())
    for key, used in resources().items():
        known = table["kernels"][key]
        assert used["stack"] <= known["stack"], f"{key}: a new spill or stack frame"
        if table["nvcc"] == BUILD["nvcc"]:
            assert used == known, f"{key}: is the table to be written anew?"
    stale = {key for key in table["kernels"] if key.split()[0][3:] in ARCHS} - set(resources())
    assert not {key for key in stale if BUILD["cutlass"] or ONTO not in key}


def test_every_kernel_launches_with_the_threads_of_a_cta():
    """With 65536 registers: 384 for a GEMM, 1024 for dx with bulk copies, 512 for any other."""
    for key, used in resources().items():
        name = key.partition(" ")[2]
        threads = 384 if name.startswith(PRODUCTS) else 512
        if name.startswith(("bypass_bwd_input_kernel", GROUPS)) and is_bulk_copied(name):
            threads = 1024
        assert used["registers"] <= 65536 // threads // 8 * 8, key


def product_of(name: str) -> str:
    """The wgmma instruction of a tile's width; in dx, W's rows are along the sum."""
    bfloat16 = ".BF16" if "BFloat16" in name else ""
    rows_of_w = "" if "false" in name else ".tnspB"
    columns = next((columns for form, columns in COLUMNS.items() if form in name), 256)
    return f"HGMMA.64x{columns}x16.F32{bfloat16}{rows_of_w}"


@pytest.mark.skipif("90a" not in ARCHS, reason="nvcc does not know sm_90a")
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_for_sm90_are_made_by_the_hardware_for_them(product):
    """TMA, wgmma, mbarriers, setmaxnreg."""
    if product == ONTO and not BUILD["cutlass"]:
        pytest.skip("built without CUTLASS")
    kernels = {n: used for n, used in instructions("90a").items() if n.startswith(product)}
    assert len(kernels) == 4 * (len(COLUMNS) if product == ONTO else 1)
    for name, used in kernels.items():
        assert {i for i in used if i.startswith("HGMMA")} == {product_of(name)}, name
        parts = {i.partition(".")[0] for i in used}
        assert parts >= {"UTMALDG", "SYNCS", "USETMAXREG", "WARPGROUP"}, name
        if product == PATCHED:
            assert "STG.E.128" in used, "y goes in 16 bytes a lane"
        else:
            assert "UTMALDG.3D.MULTICAST" in used, "a pair of CTAs has one copy of a tile"
            assert {i for i in used if i.startswith("UTMASTG")} == {"UTMASTG.3D"}, name
            assert not [i for i in used if i.startswith("STG")], "y goes by TMA alone"


@every_arch
def test_staged_columns_are_read_and_written_sixteen_bytes_at_a_time(arch):
    staged = {name: used for name, used in instructions(arch).items() if "<" in name}
    others = ("merge", "columns", *PRODUCTS, *ROWS)
    staged = {name: used for name, used in staged.items() if not name.startswith(others)}
    assert len(staged) == 36 + 46 * (arch == "90a")
    for name, used in staged.items():
        shared = {i for i in used if i.startswith(("LDS", "STS"))}
        bulk = is_bulk_copied(name)
        # Lanes read rows 8 bytes at a time, bulk-copied ones from shared memory, others from
        # global memory, which leaves registers for what a lane holds.
        assert {i.partition(".")[0] + i.partition(".")[2].split(".")[0] for i in shared} == {
            "LDS128",
            "STS128",
            *(["LDS64"] if bulk else []),
            *(["STS"] if name.startswith(GROUPS) else []),  # a counter is set to zero
        }, name
        assert bulk or "LDG.E.64" in {i.replace(".CONSTANT", "") for i in used}, name
        assert bulk == any(i.startswith("UBLKCP") for i in used), name


@pytest.mark.skipif("90a" not in ARCHS, reason="nvcc does not know sm_90a")
def test_rows_are_copied_as_they_lie_and_read_value_by_value():
    kernels = {n: used for n, used in instructions("90a").items() if n.startswith(ROWS)}
    for name, used in kernels.items():
        copied = name.startswith(ROWS[0]) or "true" in name
        assert copied == any(i.startswith("UBLKCP") for i in used), name
        assert ("LDS.U16" if copied else "LDG.E.U16") in used, name
        wide = "STG.E.128" if name.startswith(ROWS[0]) else "LDS.128" if copied else "LDG.E.128"
        assert wide in used, f"{name}: eight neurons at a time"


@every_arch
def test_no_kernel_loads_byte_by_byte_or_from_a_stack_that_it_has_not(arch):
    for name, used in instructions(arch).items():
        own = ("LDL", "STL") if resources()[f"sm_{arch} {name}"]["stack"] == 0 else ()
        assert not [i for i in used if "U8" in i or (own and i.startswith(own))], name


if __name__ == "__main__":
    rows = ",\n".join(f'  "{key}": {json.dumps(used)}' for key, used in resources().items())
    TABLE.write_text(f'{{\n "nvcc": "{BUILD["nvcc"]}",\n "kernels": {{\n{rows}\n }}\n}}\n')
