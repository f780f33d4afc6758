"""A progress bar, for what takes long on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told of each piece done, in the unit of ``total``."""
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task(title, total=total)
        yield lambda done: bars.update(bar, advance=done)


def worth_showing(parameters: int) -> bool:
    """Whether looking at that many parameters takes seconds, and somebody is looking."""
    return parameters >= 10**9 and sys.stderr.isatty()
