"""``neuroada bench [SUITE]``: each suite's own parser reads what follows its name."""

from __future__ import annotations

import importlib
import sys

DEFAULT = "linear"
#: Suite to the module whose ``main`` runs it, and its help text.
SUITES = {
    DEFAULT: ("neuroada_kernels.benchmarks.linear", "time linear layers, methods side by side"),
    "memory": (
        "neuroada_kernels.benchmarks.memory_model.command",
        "memory of training, by method: an analytical model, and measurements",
    ),
    "model": (
        "neuroada_kernels.benchmarks.model",
        "training steps of a whole transformer: tokens per second, peak memory",
    ),
    "peers-training": (
        "neuroada_kernels.benchmarks.peers.command",
        "PEFT's methods and NeuroAda through Hugging Face's Trainer",
    ),
    "quality": (
        "neuroada_kernels.benchmarks.quality.command",
        "compare what methods learn at equal trainable budgets",
    ),
    "kernels": (
        "neuroada_kernels.benchmarks.kernels",
        "what each kernel of a step takes, by torch's profiler",
    ),
    "compare": (
        "neuroada_kernels.benchmarks.compare",
        "two results files of one suite: exit status 1 where the second is slower",
    ),
    "gpu-bars": (
        "neuroada_kernels.benchmarks.bars_gpu",
        "results of an H200 beside its bars and goals: exit status 1 where a bar is missed",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the suite that the first argument names, or the linear one; returns its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    named = bool(arguments) and not arguments[0].startswith("-")
    if named and arguments[0] not in SUITES:
        expected = ", ".join(SUITES)
        unknown = f"unknown suite {arguments[0]!r}"
        print(f"neuroada bench: {unknown}, expected one of {expected}", file=sys.stderr)
        return 2
    module = importlib.import_module(SUITES[arguments[0] if named else DEFAULT][0])
    status: int = module.main(arguments[named:])
    return status


def _help() -> str:
    width = max(map(len, SUITES))
    return "\n".join(
        [
            "usage: neuroada bench [SUITE] [OPTION ...]",
            "",
            f"Measure, side by side with other methods. Without a SUITE: {DEFAULT}.",
            "",
            *(f"  {name:{width}}  {text}" for name, (_, text) in SUITES.items()),
            "",
            "`neuroada bench SUITE --help` describes a suite's own options.",
        ]
    )
