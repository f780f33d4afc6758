"""A progress bar for long operations on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by an amount in the unit of ``total``."""
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task(title, total=total)
        yield lambda done: bars.update(bar, advance=done)


def worth_showing(parameters: int) -> bool:
    """Whether processing that many parameters takes seconds, and stderr is a terminal."""
    return parameters >= 10**9 and sys.stderr.isatty()
