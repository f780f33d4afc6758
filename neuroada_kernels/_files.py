"""Files that are replaced as a whole: an interrupted write leaves the old one as it was."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty file beside ``path``, which takes its place when the block ends.

    It is written to the disk before it is renamed, and its folder after, so that ``path`` is the
    old file or the new one at any moment, also after a crash. Where the block raises, it is
    removed; where the process is killed, it stays, as ``.NAME.XXXXXXXX.tmp``.

    Raises
    ------
    ValueError
        If ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"path: {path} is a folder, expected a file")
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
    """A hidden name in the folder of ``target`` that no file has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Write a file, or a folder's entries, from the page cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
