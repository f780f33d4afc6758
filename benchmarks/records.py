"""What a suite found out so far: a JSON file, whole after each row; a later run goes on.

Every suite's file has the same frame, which ``neuroada report`` reads: ``kind`` (the suite),
``command`` (what repeats it), ``settings``, ``sessions`` (where and with what it ran, see
:mod:`neuroada_kernels.benchmarks.environment`) and ``results``, rows of plain data; and where a
suite computes something of the rows, ``summary``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroada_kernels._files import replacing
from neuroada_kernels.benchmarks.environment import environment

Row = dict[str, Any]
#: Facts that rows of one file share unless a suite says otherwise: others are not comparable.
SAME = ("package", "commit", "torch", "cpu", "gpu", "threads", "environment")


class RecordsError(ValueError):
    """A results file cannot be gone on with."""


@dataclass
class Records:
    """Rows by their key; with a ``path``, written there after each as a whole."""

    kind: str
    command: str
    settings: dict[str, Any]
    device: str = "cpu"
    path: Path | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    same: Sequence[str] = SAME
    _here: bool = False  # whether this process has a session of its own

    @classmethod
    def open(
        cls,
        kind: str,
        command: str,
        settings: dict[str, Any],
        path: Path | None = None,
        device: str = "cpu",
        *,
        same: Sequence[str] = SAME,
        framed: Callable[[Any], Mapping[str, Any]] = dict,
    ) -> Records:
        """What ``path`` holds already, or nothing where there is no such file.

        Parameters
        ----------
        kind, command, settings, device
            Of the rows to come; those that ``path`` holds must have the kind and the settings.
        path : Path, optional
            The file, which need not be there yet.
        same
            The facts of :mod:`~neuroada_kernels.benchmarks.environment` that all rows share.
        framed
            Gives a file from before the frame as it would be today.

        Raises
        ------
        RecordsError
            If it holds something else, or rows of other settings.
        """
        settings = json.loads(json.dumps(settings))  # as a file gives them back
        records = cls(kind, command, settings, device, path, same=same)
        if path is None or not path.exists():
            return records
        try:
            found = framed(json.loads(path.read_text()))
            before = {"kind": found["kind"], **found["settings"]}
            records.sessions = list(found["sessions"])
            records.rows = {row["key"]: row for row in found["results"]}
            commands = found["command"].split(" && ")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordsError(f"{path}: holds no results of {kind} ({error!r})") from error
        records._expect({"kind": kind, **settings}, before)
        # Rows of an earlier call stay, and so does what repeats it.
        records.command = " && ".join(dict.fromkeys([*commands, command]))
        return records

    def once(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row of that key: the one at hand, or what ``measure`` returns, added."""
        if key not in self.rows:
            self._open_session()
            self.rows[key] = {"key": key, **measure()}
            self.write()
        return self.rows[key]

    def group(self, keys: Sequence[str], measure: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of those keys, which are measured together: once more where one is missing."""
        if not all(key in self.rows for key in keys):
            self._open_session()
            rows = zip(keys, measure(), strict=True)
            self.rows.update({key: {"key": key, **row} for key, row in rows})
            self.write()
        return [self.rows[key] for key in keys]

    def _open_session(self) -> None:
        if self._here:
            return
        here = environment(self.device)
        for session in self.sessions:
            self._expect(*({fact: of.get(fact) for fact in self.same} for of in (here, session)))
        self.sessions.append(here)
        self._here = True

    def _expect(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise RecordsError(
                    f"{self.path}: has rows of {name} {found.get(name)}, "
                    f"expected {expected.get(name)}"
                )

    def write(self) -> None:
        """Write everything to ``path``, if there is one."""
        if self.path is not None:
            with replacing(self.path) as new:
                new.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "command": self.command,
            "settings": self.settings,
            "sessions": self.sessions,
            "results": list(self.rows.values()),
            **({"summary": self.summary} if self.summary else {}),
        }
