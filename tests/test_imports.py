"""Imports run one way, without a cycle, and importing the package loads nothing optional."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "neuroada_kernels"
#: Where the modules of a dotted name lie; the longest name that fits is taken.
SOURCES = {
    NAME: ROOT / NAME,
    f"{NAME}.benchmarks": ROOT / "benchmarks",
    f"{NAME}.triton_kernels": ROOT / "triton_kernels",
}

#: Suites that are built on the demo, which itself is built on the other benchmarks.
QUALITY, PEERS = "benchmarks.quality", "benchmarks.peers"
#: Makes a page of any suite's files, of which it knows the content alone.
HTML = "benchmarks.html"

#: What the modules of each part may import, besides their own part. The package itself is "".
BELOW = {
    "_dtypes": set(),
    "_version": set(),
    "_sharding": set(),
    "_tracing": set(),
    "_extension": set(),
    "_registry": set(),
    "reference": {"_dtypes"},
    "selection": {"_dtypes", "_extension", "_tracing"},
    "plan": {"_dtypes", "_extension", "_tracing"},
    "triton_kernels": set(),
    "backends": {"_dtypes", "_registry", "_extension", "plan", "reference", "triton_kernels"},
    "ops": {"_registry", "_tracing"},
    "flops": {"ops"},
    "functional": {"_dtypes", "ops", "reference"},
    "nn": {
        "_dtypes",
        "_sharding",
        "_tracing",
        "config",
        "functional",
        "ops",
        "selection",
        "plan",
        "reference",
    },
    "config": {"_dtypes", "selection"},
    "_models": {"nn"},
    "replacing": {"nn"},
    "targets": {"_sharding", "config", "nn", "replacing"},
    "_progress": set(),
    "strategies": {"_models", "nn"},
    "siblings": {"_models", "config", "nn"},
    "gradient": {"_dtypes", "_progress", "functional", "nn"},
    "arguments": {"config", "gradient", "nn"},
    "choices": {"_progress", "config", "gradient", "nn", "targets"},
    "freezing": {"_models", "config", "targets"},
    "model": {
        "_models",
        "arguments",
        "choices",
        "config",
        "freezing",
        "gradient",
        "nn",
        "replacing",
        "siblings",
        "strategies",
        "targets",
    },
    "model_merge": {"_models", "nn", "strategies"},
    "named": {"_models", "_sharding", "config", "model", "model_merge", "nn", "targets"},
    "combination": {"plan"},
    "adding": {
        "_models",
        "arguments",
        "choices",
        "combination",
        "config",
        "freezing",
        "gradient",
        "model",
        "named",
        "nn",
        "siblings",
        "targets",
    },
    "unloading": {"_models", "model", "model_merge", "named", "nn", "replacing", "targets"},
    "_files": set(),
    "adapter_file": {"_dtypes", "_files", "_version", "plan"},
    "adapter_base": {"_dtypes", "adapter_file", "nn", "targets"},
    "adapter_match": {"_dtypes", "adapter_base", "adapter_file", "nn", "targets"},
    "adapters": {
        "_dtypes",
        "_models",
        "_sharding",
        "adapter_base",
        "adapter_file",
        "adapter_match",
        "adding",
        "config",
        "freezing",
        "model",
        "named",
        "nn",
        "plan",
        "targets",
    },
    "testing": {"selection"},
    "integrations": {
        "combination",
        "config",
        "functional",
        "nn",
        "ops",
        "plan",
        "replacing",
        "selection",
        "siblings",
        "targets",
    },
    "": {
        "_registry",
        "_version",
        "adapters",
        "adding",
        "backends",
        "config",
        "functional",
        "model",
        "model_merge",
        "named",
        "nn",
        "plan",
        "reference",
        "selection",
        "siblings",
        "strategies",
        "unloading",
    },
}
LIBRARY = set(BELOW)
BELOW["distributed"] = {"_models", "_sharding", "functional", "nn"}
BELOW["checkpoint"] = set()
BELOW["inspection"] = {"_dtypes", "adapter_file"}
BELOW["merging"] = {"_dtypes", "_files", "adapter_file", "checkpoint", "nn", "ops"}
BELOW["convert"] = {"_dtypes", "adapter_file", "checkpoint"}
BELOW[HTML] = {"_files"}
BELOW["benchmarks"] = LIBRARY | {HTML}
BELOW["info"] = LIBRARY | {"benchmarks"}
BELOW["demo"] = LIBRARY | {"benchmarks", "info"}
BELOW[QUALITY] = BELOW[PEERS] = LIBRARY | {"benchmarks", "demo", HTML}
BELOW["cli"] = LIBRARY | {"benchmarks", "info", "demo", "inspection", "merging", "convert"}

#: Parts that only the package's own ``__init__`` imports, though they lie below others.
REGISTERED = {"backends"}
#: Modules of a part that serve its other modules; those do not import one another.
SHARED = {"backends": {"_compiled", "_dense", "_entries"}, "ops": {"_library"}}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names = [package, *parts[: -1 if parts[-1] == "__init__" else None]]
            found[".".join(names)] = path
    return found


def imports(module: str, source: str, known: set[str], is_package: bool) -> set[str]:
    """The modules of the package that ``source`` imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
    return {name for name in found if name == NAME or name.startswith(NAME + ".")}


def graph() -> dict[str, set[str]]:
    files = modules()
    return {
        module: imports(module, path.read_text(), set(files), path.name == "__init__.py")
        for module, path in files.items()
    }


def part_of(module: str) -> str:
    name = module.removeprefix(NAME).removeprefix(".")
    nested = (part for part in (QUALITY, PEERS, HTML) if (name + ".").startswith(part + "."))
    return next(nested, name.partition(".")[0])


def why_wrong(importer: str, imported: str) -> str | None:
    """Why this arrow may not be, or None."""
    source, target = part_of(importer), part_of(imported)
    if source not in BELOW:
        return f"{importer}: has no place among the layers of this test"
    if source != target:
        if target not in BELOW[source]:
            return f"{importer} imports {imported}, which is not below it"
        if target in REGISTERED and source != "":
            return f"{importer} imports {imported}, which only the package itself registers"
    is_sibling = source == target and source in SHARED and importer.count(".") > 1
    if is_sibling and imported.rpartition(".")[2] not in SHARED[source]:
        return f"{importer} imports its sibling {imported}"
    return None


def cycle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a ring, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(arrows.get(module, ())):
            ring = visit(target, [*path, module])
            if ring:
                return ring
        done.add(module)
        return None

    return next(filter(None, (visit(module, []) for module in sorted(arrows))), None)


def test_every_module_has_a_place():
    found = {part_of(module) for module in modules()}
    assert found <= set(BELOW), "say in BELOW what the new part may import"


def test_imports_run_one_way():
    arrows = [(a, b) for a, targets in graph().items() for b in sorted(targets)]
    assert len(arrows) > 20, "the walk has found too little"
    wrong = [reason for arrow in arrows if (reason := why_wrong(*arrow))]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    assert cycle(graph()) is None


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("ops.linear", "backends.eager"),
        ("ops.linear", "ops.merge"),
        ("ops._library", "_extension"),
        ("backends.cpu", "ops"),
        ("backends.cpu", "backends.eager"),
        ("backends.cpu", "functional"),
        ("backends._dense", "nn"),
        ("functional", "backends.eager"),
        ("functional", "nn"),
        ("nn.linear", "model"),
        ("nn._base", "backends"),
        ("selection", "plan"),
        ("plan", "_registry"),
        ("triton_kernels.merge", "plan"),
        ("ops.linear", "triton_kernels"),
        ("reference", "selection"),
        ("model", "benchmarks"),
        ("model", "adapters"),
        ("adapter_file", "adapters"),
        ("functional", "integrations.peft"),
        ("model", "integrations.peft"),
        ("integrations.peft.layer", "backends"),
        ("benchmarks.linear", "cli"),
        ("benchmarks.linear", "backends.cpu"),
        ("benchmarks.linear", "benchmarks.quality.suite"),
        ("benchmarks.model", "benchmarks.peers.training"),
        ("benchmarks.quality.suite", "cli"),
        ("benchmarks.html.linear", "benchmarks.linear"),
        ("newcomer", "reference"),
    ],
)
def test_an_arrow_that_runs_back_is_found(importer, imported):
    assert why_wrong(f"{NAME}.{importer}", f"{NAME}.{imported}")


def test_every_form_of_import_is_seen():
    source = f"""
import {NAME}.model
from {NAME} import plan, select
from {NAME}.nn import linear as layer
from . import _library
from .. import functional
from ..backends.eager import _merge
def later():
    from .merge import merge_
import torch.nn
"""
    known = set(modules())
    found = imports(f"{NAME}.ops.linear", source, known, is_package=False)
    assert found == {
        NAME,
        *(
            f"{NAME}.{name}"
            for name in (
                "model",
                "plan",
                "nn.linear",
                "ops._library",
                "functional",
                "backends.eager",
                "ops.merge",
            )
        ),
    }
    assert imports(f"{NAME}.ops", "from . import merge", known, is_package=True) == {
        f"{NAME}.ops.merge"
    }


def test_a_ring_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_triton_kernels_need_torch_and_triton_alone():
    for path in SOURCES[f"{NAME}.triton_kernels"].glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        found = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert found <= {"torch", "triton", NAME}, path


def test_importing_the_package_loads_nothing_optional():
    code = f"""
import json, sys, torch
before = set(sys.modules)
import {NAME}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert NAME in loaded
    optional = {"matplotlib", "rich", "triton", "pytest", "hypothesis"}
    optional |= {"accelerate", "bitsandbytes", "peft", "torchao", "transformers"}
    assert not loaded & optional
