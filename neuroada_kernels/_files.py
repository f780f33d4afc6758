"""Atomic replacement of files: an interrupted write leaves the old file unchanged."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty file beside ``path``, renamed to ``path`` when the block ends.

    The file is synced to disk before the rename and its folder after, so that ``path`` is either
    the old or the new file at any moment, also after a crash. If the block raises, the new file
    is removed; if the process is killed, it stays as ``.NAME.XXXXXXXX.tmp``.

    Raises
    ------
    ValueError
        If ``path`` is a folder.
    FileNotFoundError
        If its folder is none.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"path: {path} is a folder, expected a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: {target.parent} is no folder, expected one for {path}")
    temporary = beside(target)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def beside(target: Path) -> Path:
    """A hidden path in the folder of ``target``, with a random suffix."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Write a file, or a folder's entries, from the page cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
