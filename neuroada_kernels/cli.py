"""The command ``neuroada``: each subcommand's own parser reads what follows its name."""

from __future__ import annotations

import argparse
import importlib
import sys

from neuroada_kernels._version import __version__

#: Subcommand to the module whose ``main`` runs it, and its help text.
COMMANDS = {
    "info": ("neuroada_kernels.info", "what is installed, and which backends can run here"),
    "demo": ("neuroada_kernels.demo", "train, adapt, compare and merge a small language model"),
    "inspect": ("neuroada_kernels.inspection", "show what an adapter's file holds"),
    "merge": ("neuroada_kernels.merging", "merge an adapter into a checkpoint on disk"),
    "convert": ("neuroada_kernels.convert", "make an adapter of the authors' or PEFT's files"),
    "bench": (
        "neuroada_kernels.benchmarks.suites",
        "time the layer, or compare what it learns",
    ),
    "report": (
        "neuroada_kernels.benchmarks.html.command",
        "show results of bench as one HTML page",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="neuroada",
        description="Kernels and layers for NeuroAda fine-tuning.",
        epilog="`neuroada COMMAND --help` describes a command's own options.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[arguments.command][0])
    status: int = module.main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
