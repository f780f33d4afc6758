"""A table of text, for the page and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


class Strong(str):
    """A bold cell."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """The first ``words`` columns are text, the others numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    note: str = ""

    def markdown(self) -> str:
        """As GitHub Markdown, without the title."""
        rule = "|" + "---|" * self.words + "---:|" * (len(self.headings) - self.words)
        lines = [_line(self.headings), rule, *map(_line, self.rows)]
        return "\n".join(lines)

    def html(self) -> str:
        """As HTML, in a box that scrolls if the table is wider than the page."""
        head = "".join(self._cell("th scope='col'", i, c) for i, c in enumerate(self.headings))
        body = "\n".join(
            "<tr>" + "".join(self._cell("td", i, c) for i, c in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        label = escape(self.title or "table")
        wide = ' class="wide"' if len(self.headings) > 7 else ""
        return (
            f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table{wide}>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    def _cell(self, tag: str, column: int, text: str) -> str:
        kind = ' class="word"' if column < self.words else ""
        if column == 0 and len(text) > 16:
            kind = ' class="word long"'
        inner = f"<strong>{escape(text)}</strong>" if isinstance(text, Strong) else escape(text)
        return f"<{tag}{kind}>{inner}</{tag.split()[0]}>"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(f"**{c}**" if isinstance(c, Strong) else c for c in cells) + " |"
