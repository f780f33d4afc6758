"""One results file: its suite, the command that repeats it, and where it ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ReportError(ValueError):
    """A file claims to be a suite's results and does not hold them."""


@dataclass(frozen=True)
class Source:
    """A results file by its name, with the common frame or an older one without it."""

    name: str
    kind: str
    document: Mapping[str, Any]

    @property
    def sessions(self) -> list[Mapping[str, Any]]:
        """Where the suite ran, one session for each run that added rows."""
        found = self.document.get("sessions") or [self.document.get("environment", self.document)]
        return list(found)

    @property
    def command(self) -> str:
        command: str = self.document.get("command") or _COMMANDS[self.kind]
        selected = _selected(self.kind, self.document)
        return " && ".join(part + selected for part in command.split(" && "))

    @property
    def commit(self) -> str:
        """Seven digits, or ``unknown`` outside a checkout; marked if files were changed."""
        names = [
            (session.get("commit") or "unknown")[:7]
            + " with changes" * bool(session.get("uncommitted_changes"))
            for session in self.sessions
        ]
        return ", ".join(dict.fromkeys(names))

    @property
    def machine(self) -> str:
        """The GPU, or the threads of a processor, and the variables that select kernels."""
        return machine_of(self.sessions[-1])

    @property
    def chip(self) -> str:
        """The name of the GPU or processor without trademark signs, for titles."""
        here = self.sessions[-1]
        name = str(here.get("gpu") or here["cpu"]).replace("(R)", "").replace("(TM)", "")
        return name + with_variables(here)

    @property
    def origin(self) -> str:
        """File, kind and commit, for captions."""
        return f"{self.name}, kind {self.kind}, commit {self.commit}"

    def facts(self) -> dict[str, str]:
        """Machine, versions, commit and date, of the last session."""
        here = self.sessions[-1]
        facts = {
            "Machine": self.machine,
            "Versions": ", ".join(
                f"{label} {here[key]}" for key, label in _VERSIONS.items() if here.get(key)
            ),
            "Commit": self.commit,
            "Date": str(here.get("date", "unknown"))[:10],
            "Repeat": self.command,
        }
        return facts


def machine_of(session: Mapping[str, Any]) -> str:
    """Where a session ran, for a sentence."""
    if session.get("gpu"):
        return str(session["gpu"]) + with_variables(session)
    threads = session["threads"]
    processor = f"{session['cpu']} ({session['cpu_capability']})"
    return f"{threads} thread{'s' * (threads > 1)} of an {processor}{with_variables(session)}"


def with_variables(session: Mapping[str, Any]) -> str:
    """`` with NAME=value`` for variables that change which kernels run, to follow the machine."""
    variables = session.get("environment") or {}
    return " with " * bool(variables) + " ".join(f"{n}={v}" for n, v in variables.items())


def _selected(kind: str, document: Mapping[str, Any]) -> str:
    """Modes and methods of the rows of the suite ``model``, as options, where it ran on a GPU.

    Its stored command leaves them out, since several calls may fill one file. On a CPU the default
    is all of them; on a GPU it is one mode, and memory seldom holds every method.
    """
    if kind != "model" or document["settings"].get("device") != "cuda":
        return ""
    modes, methods = (
        " ".join(dict.fromkeys(row[name] for row in document["results"]))
        for name in ("mode", "method")
    )
    return f" --modes {modes} --methods {methods}"


#: Fact of a session to its name in a sentence.
_VERSIONS = {
    "package": "neuroada-kernels",
    "torch": "torch",
    "triton": "Triton",
    "cuda": "CUDA",
    "driver": "driver",
    "peft": "PEFT",
    "python": "Python",
}
#: Kind to the command of files that do not name theirs.
_COMMANDS = {
    "linear": "neuroada bench linear --host-cost",
    "quality": "neuroada bench quality",
    "adapting": "python -m neuroada_kernels.benchmarks.adapting",
    "block-memory": "neuroada bench --memory",
}


def kind_of(document: Any) -> str | None:
    """The suite that wrote a results file; None where it does not look like one.

    Older files have no ``kind``, or one that means something else today; they are recognised by
    the fields of their rows.
    """
    if not isinstance(document, Mapping):
        return None
    rows = document.get("results")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) else {}
    if "kept_bytes_by_the_linears" in first:
        return "block-memory"
    if isinstance(document.get("kind"), str):
        return str(document["kind"])
    if {"settings", "summary", "runs"} <= document.keys():
        return "quality"
    if "seconds_per_billion" in first:
        return "adapting"
    return "linear" if {"case", "ratio_to_frozen"} <= first.keys() else None
