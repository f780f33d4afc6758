"""The command ``neuroada report``: results files as one self-contained HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neuroada_kernels.benchmarks.html.page import write_html
from neuroada_kernels.benchmarks.html.source import ReportError


def main(argv: list[str] | None = None) -> int:
    """Read every file, then write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="neuroada report", description=__doc__)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="JSON", help="files of neuroada bench --json")
    add("-o", "--output", type=Path, required=True, metavar="HTML", help="the page to be written")
    options = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        parser.error("matplotlib is missing, install the extra 'bench'")
    if not options.output.parent.is_dir():
        parser.error(f"--output: {options.output.parent} is no directory")
    if options.output.resolve() in {path.resolve() for path in options.results}:
        parser.error(f"--output: {options.output} is one of the results, expected another file")
    try:
        left_out = write_html(_read(options.results), options.output)
    except ReportError as error:
        parser.error(str(error))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    print(
        f"{options.output}: {len(options.results) - len(left_out)} of {len(options.results)} files"
    )
    return 0


def _read(paths: list[Path]) -> dict[str, Any]:
    """Contents by file name, prefixed by as many folders as make the names unique."""
    paths = list(dict.fromkeys(paths))
    documents = {}
    for path in paths:
        tails = ("/".join(path.parts[-depth:]) for depth in range(1, len(path.parts) + 1))
        ends = (tail for tail in tails if sum(str(p).endswith(tail) for p in paths) == 1)
        name = next(ends, str(path))
        try:
            documents[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"{path}: is no JSON that can be read ({error})") from error
    return documents


if __name__ == "__main__":
    sys.exit(main())
