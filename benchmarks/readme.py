"""Writes a table of the README from a results file of ``neuroada bench --json``.

python -m neuroada_kernels.benchmarks.readme benchmarks/results/cpu/linear.json README.md
python -m neuroada_kernels.benchmarks.readme benchmarks/results/cpu/block-memory.json README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroada_kernels.benchmarks.linear_results import HOST_COST, framed

_BEGIN, _END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"
_MEMORY_BEGIN, _MEMORY_END = "<!-- memory table -->", "<!-- end of memory table -->"


def table(results: dict[str, Any]) -> str:
    """A Markdown table of the ratios to frozen, ours in bold, and how they were taken."""
    results = framed(results)
    rows = [row for row in results["results"] if "ratio_to_frozen" in row]
    names = [n for n in dict.fromkeys(r["candidate"] for r in rows) if n != "frozen"]
    ours = {r["candidate"] for r in rows if r["automatic"]}
    headings = ["T", "d_in × d_out", "dtype", "k", *(_heading(n, n in ours) for n in names)]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * 4 + "---:|" * len(names)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _rows(rows, names, ours)]
    where = results["sessions"][0]
    measured = (
        f"Forward and backward as a ratio to the frozen linear (`F.linear` and dx alone), medians "
        f"of {results['settings']['rounds']} interleaved rounds, ratio taken round by round; "
        f"{where['threads']} threads of an {where['cpu']} "
        f"({where['cpu_capability']}), torch {where['torch']}, "
        f"commit {where['commit'][:7]}. `{results['command']}` repeats it."
    )
    for host in (row["host_cost"] for row in results["results"] if row["key"] == HOST_COST):
        measured += (
            f" One call at T = 1 costs {host['over_frozen_us']['median']:.0f} µs of host time "
            f"more than the frozen linear's {host['frozen_us']['median']:.0f} µs."
        )
    return "\n".join([*lines, "", measured])


def memory_table(results: dict[str, Any]) -> str:
    """A Markdown table of the bytes that a block keeps, and of those that its linears keep."""
    rows = results["results"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    kept = {(row["dtype"], row["method"]): row for row in rows}
    headings = [
        "",
        *(f"{part}, {dtype}" for dtype in dtypes for part in ("block", "by its linears")),
    ]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            f"{kept[dtype, method][key] / 2**20:.1f}{_less(kept, dtype, method, key)}"
            for dtype in dtypes
            for key in ("kept_bytes", "kept_bytes_by_the_linears")
        ]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    sizes = results["sizes"]
    measured = (
        f"MiB that a Llama-shaped block keeps for its backward: T {sizes['tokens']}, "
        f"d {sizes['width']}, MLP {sizes['hidden']}, k {sizes['k']}, random weights, commit "
        f"{results['commit'][:7]}. `{results['command']}` repeats it."
    )
    return "\n".join([*lines, "", measured])


def _less(kept: dict[tuple[str, str], dict[str, Any]], dtype: str, method: str, key: str) -> str:
    """By how much it is less than ``full``, where it is and something is kept."""
    share = kept[dtype, method][key] / kept[dtype, "full"][key]
    return f" (−{1 - share:.0%})" if method != "frozen" and share < 0.99 else ""


def main(argv: list[str] | None = None) -> int:
    """Replace what stands between the README's two markers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("readme", type=Path)
    options = parser.parse_args(argv)
    text, results = options.readme.read_text(), json.loads(options.results.read_text())
    begin, end, lines = _BEGIN, _END, table
    if results.get("kind") == "block-memory":
        begin, end, lines = _MEMORY_BEGIN, _MEMORY_END, memory_table
    if begin not in text or end not in text:
        parser.error(f"readme: {options.readme} has no {begin} and {end}")
    new = f"{begin}\n{lines(results)}\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    options.readme.write_text(re.sub(pattern, lambda _: new, text, count=1, flags=re.DOTALL))
    return 0


def _heading(name: str, ours: bool) -> str:
    return f"**{name}**" if ours else name


def _rows(rows: list[dict[str, Any]], names: list[str], ours: set[str]) -> Iterator[list[str]]:
    ratios = {
        (r["case"]["name"], r["dtype"], r["candidate"]): r["ratio_to_frozen"]["median"]
        for r in rows
    }
    cases = {(r["dtype"], r["case"]["name"]): r["case"] for r in rows}
    for (dtype, name), case in cases.items():
        cells = [str(case["tokens"]), f"{case['d_in']} × {case['d_out']}", dtype, str(case["k"])]
        for candidate in names:
            ratio = ratios.get((name, dtype, candidate))
            text = "" if ratio is None else f"{ratio:.2f}"
            cells.append(f"**{text}**" if candidate in ours and text else text)
        yield cells


if __name__ == "__main__":
    sys.exit(main())
