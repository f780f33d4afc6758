"""``neuroada inspect``: what an adapter's file holds."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from neuroada_kernels._dtypes import name_of
from neuroada_kernels.adapter_file import read_adapter


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything that :func:`main` shows, as plain data; raises as ``read_adapter`` does."""
    adapter = read_adapter(path)
    modules = {}
    for name, module in adapter.modules.items():
        delta = module.delta.double().masked_fill(module.index < 0, 0)
        modules[name] = {
            "shape": list(module.base.shape),
            "dtype": module.base.dtype,
            "kind": module.base.kind,
            "k": module.index.shape[1],
            "connections": int((module.index >= 0).sum()),
            "delta_dtype": name_of(module.delta.dtype),
            "largest_delta": float(delta.abs().max()),
        }
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "created_by": adapter.created_by,
        "config": adapter.config,
        "connections": sum(module["connections"] for module in modules.values()),
        "modules": modules,
        "parameters": {name: list(t.shape) for name, t in adapter.parameters.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Run ``neuroada inspect``; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="neuroada inspect", description="Check an adapter's file and show what it holds."
    )
    parser.add_argument("file", metavar="FILE", help="a file of save_adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    try:
        facts = describe(arguments.file)
    except (OSError, ValueError) as error:
        parser.exit(1, f"neuroada inspect: {error}\n")
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    modules = facts["modules"]
    lines = [
        f"{facts['file']}: {facts['bytes']:,} bytes, written by {facts['created_by']}",
        f"{facts['connections']:,} connections in {len(modules)} modules",
    ]
    if facts["config"] is not None:
        lines.append("config: " + ", ".join(f"{k}={v!r}" for k, v in facts["config"].items()))
    width = max(map(len, modules))
    for name, module in modules.items():
        d_out, d_in = module["shape"]
        lines.append(
            f"  {name:{width}}  {d_in} to {d_out} {module['dtype']}"
            + (f" ({module['kind']})" if module["kind"] else "")
            + f", k {module['k']}, "
            f"{module['connections']:,} connections, {module['delta_dtype']}, "
            f"max |delta| {module['largest_delta']:.3g}"
        )
    lines += [f"  {name}: {shape}, as a whole" for name, shape in facts["parameters"].items()]
    return "\n".join(lines)
