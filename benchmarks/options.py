"""What the suites' command lines have in common."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected at least 1")
    return number


def output_file(text: str) -> Path:
    """A path in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory")
    return path


class OutputFile(argparse.Action):
    """A file that is written; no two options may name the same one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(value, Path)
        for other in parser._actions:
            taken = getattr(namespace, other.dest, None)
            if not isinstance(other, OutputFile) or other is self or taken is None:
                continue
            if taken.resolve() == value.resolve():
                parser.error(f"{option_string}: {value}, which --{other.dest} names too")
        setattr(namespace, self.dest, value)


def add_output(parser: argparse.ArgumentParser, name: str, words: str) -> None:
    """An option for a file that is written."""
    parser.add_argument(name, type=output_file, action=OutputFile, metavar="FILE", help=words)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--html``, as every suite has them."""
    add_output(parser, "--json", "every row; those that FILE has stay")
    add_output(parser, "--html", "write a page (needs matplotlib)")


def command_line(suite: str, argv: Sequence[str] | None) -> str:
    """The command that repeats a call of the suite, without the files that it writes."""
    words = iter(sys.argv[1:] if argv is None else argv)
    kept = []
    for word in words:
        if word in ("--json", "--html", "--png"):
            next(words, None)
        elif not word.startswith(("--json=", "--html=", "--png=")):
            kept.append(word)
    return shlex.join(["neuroada", "bench", suite, *kept])


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set torch's number of threads within the block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress_bar(console: Console) -> Progress:
    """A bar without a refresh thread, which would take time from what is timed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, auto_refresh=False, transient=True)
