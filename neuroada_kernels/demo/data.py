"""The two domains, both shipped with CPython: its documentation, and its library's source.

Bytes are tokens. Only complete topics and files are held out.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: One of this many documents is held out.
HELD_OUT_EVERY = 8

#: ``pydoc_data`` holds the documentation, the other domain.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Documents of a domain, by name; training and held-out ones are disjoint."""

    train: dict[str, bytes]
    held_out: dict[str, bytes]

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise ValueError("corpus: no documents to train on, or none to hold out")

    @property
    def train_bytes(self) -> int:
        return sum(map(len, self.train.values()))

    @property
    def held_out_bytes(self) -> int:
        return sum(map(len, self.held_out.values()))


def documentation() -> Corpus:
    """The topics of the language reference that ``help()`` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return split([(name, topics[name].encode()) for name in sorted(topics)])


def python_source(limit: int) -> Corpus:
    """Files of the standard library in sorted order, without tests, up to ``limit`` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    documents, total = [], 0
    for path in _source_files(root):
        content = path.read_bytes()
        documents.append((path.relative_to(root).as_posix(), content))
        total += len(content)
        if total >= limit:
            break
    return split(documents)


def _source_files(root: Path) -> Iterator[Path]:
    """Files breadth first: top-level modules are more alike than, say, tables of encodings."""
    paths = (p.relative_to(root) for p in root.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED.intersection(path.parts)]
    yield from (root / p for p in sorted(kept, key=lambda p: (len(p.parts), p.as_posix())))


def split(documents: Sequence[tuple[str, bytes]]) -> Corpus:
    """Hold out every ``HELD_OUT_EVERY``-th document; empty and repeated ones are dropped."""
    distinct = list({content: name for name, content in reversed(documents) if content}.items())
    named = [(name, content) for content, name in reversed(distinct)]
    last = HELD_OUT_EVERY - 1
    return Corpus(
        train={n: c for i, (n, c) in enumerate(named) if i % HELD_OUT_EVERY != last},
        held_out={n: c for i, (n, c) in enumerate(named) if i % HELD_OUT_EVERY == last},
    )


class Batches:
    """Windows of ``context + 1`` bytes drawn at random from training documents."""

    def __init__(self, documents: dict[str, bytes], batch: int, context: int, seed: int) -> None:
        self._bytes = _joined(documents, context)
        self._batch, self._context = batch, context
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """int64, shape ``[batch, context + 1]``."""
        starts = len(self._bytes) - self._context
        first = torch.randint(starts, (self._batch, 1), generator=self._generator)
        return self._bytes[first + torch.arange(self._context + 1)].long()


def windows(documents: dict[str, bytes], count: int, context: int) -> Tensor:
    """At most ``count`` windows without overlap, spread evenly: int64 ``[n, context + 1]``."""
    tokens = _joined(documents, context)
    rows = tokens[: len(tokens) // (context + 1) * (context + 1)].view(-1, context + 1)
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // count].long()


def _joined(documents: dict[str, bytes], context: int) -> Tensor:
    joined = bytearray(b"\n\n".join(documents.values()))
    if len(joined) <= context:
        raise ValueError(f"documents: {len(joined)} bytes, expected more than {context}")
    return torch.frombuffer(joined, dtype=torch.uint8)
