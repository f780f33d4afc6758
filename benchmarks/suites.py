"""``neuroada bench [SUITE]``: each suite's own parser reads what follows its name."""

from __future__ import annotations

import importlib
import sys

DEFAULT = "linear"
#: Suite to the module whose ``main`` runs it.
SUITES = {
    DEFAULT: "neuroada_kernels.benchmarks.linear",
    "quality": "neuroada_kernels.benchmarks.quality.command",
    "model": "neuroada_kernels.benchmarks.model",
    "peers-training": "neuroada_kernels.benchmarks.peers.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run the suite that the first argument names, or the linear one; its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    named = bool(arguments) and arguments[0] in SUITES
    module = importlib.import_module(SUITES[arguments[0] if named else DEFAULT])
    status: int = module.main(arguments[named:])
    return status
