"""Results of a suite: a JSON file, complete after each row, which a later run resumes.

Every suite's file has the same frame, which ``neuroada report`` reads: ``kind`` (the suite),
``command`` (what repeats it), ``settings``, ``sessions`` (where and with what it ran, see
:mod:`neuroada_kernels.benchmarks.environment`) and ``results``, rows of plain data; and
``summary``, if the suite computes one from the rows.
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
#: Facts that rows of one file share by default: rows with other facts are not comparable.
SAME = ("package", "commit", "torch", "cpu", "gpu", "threads", "environment")


class RecordsError(ValueError):
    """A results file cannot be resumed."""


@dataclass
class Records:
    """Rows by their key; with a ``path``, the whole file is rewritten after each row."""

    kind: str
    command: str
    settings: dict[str, Any]
    device: str = "cpu"
    path: Path | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    same: Sequence[str] = SAME
    _here: bool = False  # whether this process has opened its session

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
        """The records in ``path``, or empty ones if there is no such file.

        Parameters
        ----------
        kind, command, settings, device
            Of the new rows; those in ``path`` must have the same kind and settings.
        path : Path, optional
            The file, which need not be there yet.
        same
            The facts of :mod:`~neuroada_kernels.benchmarks.environment` that all rows share.
        framed
            Converts a file that predates the common frame.

        Raises
        ------
        RecordsError
            If the file holds something else, or rows of other settings.
        """
        settings = json.loads(json.dumps(settings))  # as read back from a file
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
        # Rows of an earlier call stay, so its command does too.
        records.command = " && ".join(dict.fromkeys([*commands, command]))
        return records

    def once(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row of that key: the stored one, or the result of ``measure``, which is added."""
        if key not in self.rows:
            self._open_session()
            self.rows[key] = {"key": key, **measure()}
            self.write()
        return self.rows[key]

    def group(self, keys: Sequence[str], measure: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of those keys; if one is missing, all are measured together."""
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
