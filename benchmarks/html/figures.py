"""Plots as SVG in the page's own colours, drawn by matplotlib.

A panel is as wide as a phone, and a figure has as many of them side by side as there is room for.
One unit of a panel is a CSS pixel. Colours are names of :data:`~.style.COLORS`, which become
variables of the page (and so follow its colour scheme), or the light colours in a standalone file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from neuroada_kernels.benchmarks.html.style import COLORS

WIDTH, HEIGHT = 320, 240
Painter = Callable[[Any], None]
#: A unique placeholder colour for each name, replaced in the text of the SVG.
_STAND_INS = {name: f"#fa00{place:02x}" for place, name in enumerate(COLORS)}


def color(name: str) -> str:
    """The placeholder to give matplotlib for a colour of the page."""
    return _STAND_INS[name]


def draw(
    name: str,
    label: str,
    *painters: Painter,
    width: int = WIDTH,
    height: int = HEIGHT,
    titles: Sequence[str] = (),
    key: Sequence[tuple[str, str, float]] = (),
) -> str:
    """Axes side by side, each filled by its painter, as an ``<svg>`` for the page.

    Parameters
    ----------
    name
        Unique on the page: the ids of the plot derive from it.
    label
        The text that screen readers read.
    key
        Label, colour and opacity of the patches of a legend below, if the page has none.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ink, quiet, line = color("ink"), color("quiet"), color("line")
    settings: Any = {
        "svg.hashsalt": name,  # fixed ids: the same page from the same files
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.labelsize": 12,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 11.5,
        "text.color": ink,
        "axes.labelcolor": quiet,
        "axes.edgecolor": quiet,
        "axes.linewidth": 0.8,
        "xtick.color": quiet,
        "ytick.color": quiet,
        "grid.color": line,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_alpha(0)
        for place, (axes, paint) in enumerate(
            zip(figure.subplots(1, len(painters), squeeze=False)[0], painters, strict=True)
        ):
            axes.patch.set_alpha(0)
            paint(axes)
            if titles:
                axes.set_title(titles[place], loc="left")
        if key:
            patches = [Patch(color=color(hue), alpha=alpha) for _, hue, alpha in key]
            names = [name for name, _, _ in key]
            look = {"frameon": False, "fontsize": 11, "handlelength": 1.4, "columnspacing": 1.2}
            figure.legend(patches, names, loc="outside lower left", ncols=len(key), **look)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    return _for_the_page(target.getvalue(), label)


def _for_the_page(text: str, label: str) -> str:
    # Group ids are the same in all figures, but must be unique in a page; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= )(?:d|x|y|transform|points)="[^"]*"', _rounded, text)
    for name, stand_in in _STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    found = re.search(r'viewBox="[^"]*"', text)
    assert found is not None
    inner = text[text.index(">", text.index("<svg")) + 1 :].strip()
    return f'<svg class="plot" {found[0]} role="img" aria-label="{escape(label)}">{inner}'


def _rounded(attribute: re.Match[str]) -> str:
    """Hundredths of a pixel are enough for coordinates; nothing else is touched."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def standalone(svg: str, title: str, description: str) -> str:
    """The SVG as a standalone file, in light colours, with its title and description."""
    for name, (light, _) in COLORS.items():
        svg = svg.replace(f"var(--{name})", light)
    head = f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n"
    paper = f'<rect width="100%" height="100%" fill="{COLORS["paper"][0]}"/>\n'
    begin, inner = svg[: svg.index(">")], svg[svg.index(">") + 1 :]
    begin = begin.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    if "xlink:" in inner:
        begin += ' xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{begin}>\n{head}{paper}{inner}\n"
