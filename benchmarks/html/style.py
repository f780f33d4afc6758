"""Colours and typography of the page; the figures take their colours from the same variables."""

from __future__ import annotations

#: Variable to its light and dark value; every series has a contrast of at least 4.5:1 on both.
COLORS = {
    "ink": ("#1d2733", "#e3e8ee"),
    "quiet": ("#57636f", "#a3afbb"),
    "paper": ("#ffffff", "#14181d"),
    "raised": ("#f5f7f9", "#1c2229"),
    "line": ("#d9dfe5", "#343d47"),
    "blue": ("#1d5fc4", "#7fb5ff"),
    "orange": ("#b04d00", "#ffb066"),
    "green": ("#13744e", "#5fd3a4"),
    "purple": ("#7a3bb0", "#cba6f7"),
    "red": ("#b42f45", "#ff9aa2"),
    "teal": ("#0b6f83", "#62cfe0"),
    "olive": ("#6a6500", "#d6cd5e"),
    "pink": ("#a92f74", "#ff9ccb"),
    "brown": ("#7d4a1d", "#dcab82"),
    "grey": ("#5b6773", "#a9b4c0"),
}


def _variables(scheme: int) -> str:
    return " ".join(f"--{name}: {values[scheme]};" for name, values in COLORS.items())


CSS = (
    f"""
:root {{ color-scheme: light; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(1)} }} }}
@media print {{ :root {{ color-scheme: light; {_variables(0)} }} }}
"""
    + """
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.page { max-width: 82rem; margin: 0 auto; padding: 0 1rem 4rem; }
main, header { min-width: 0; }
header { padding: 2.5rem 0 1.5rem; }
h1, h2, h3, h4 { line-height: 1.25; letter-spacing: -.01em; text-wrap: balance;
  overflow-wrap: anywhere; }
h1 { font-size: clamp(1.7rem, 1.3rem + 1.8vw, 2.5rem); margin: 0 0 .5rem; }
h2 { font-size: 1.5rem; margin: 0 0 .75rem; }
h3 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
section { padding-top: 2.5rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  scroll-margin-top: 1rem; }
p { max-width: 68ch; margin: .5rem 0; overflow-wrap: anywhere; }
.lead { font-size: 1.075rem; }
.quiet, figcaption { color: var(--quiet); font-size: .85rem; line-height: 1.5; }
a { color: var(--blue); text-underline-offset: .15em; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
nav h2 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase;
  color: var(--quiet); margin: 0 0 .5rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: .35rem 0; color: var(--ink); text-decoration: none;
  line-height: 1.35; }
nav a:hover, nav a:focus-visible { color: var(--blue); text-decoration: underline; }
nav small { display: block; color: var(--quiet); overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem;
  margin: 1rem 0; padding: .8rem 1rem; background: var(--raised); border-radius: .5rem;
  font-size: .875rem; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0 2rem; }
figure > h3 { margin: 0 0 .35rem; }
figcaption { margin-top: .5rem; max-width: 80ch; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.panels.few { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 26rem)); }
.panel { min-width: 0; max-width: 30rem; }
.panel h4 { margin: 0 0 .1rem; font-size: .875rem; font-weight: 600; }
svg.plot { display: block; width: 100%; height: auto; overflow: visible; }
svg.plot text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0;
  margin: .4rem 0 .8rem; font-size: .85rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.legend svg { flex: none; width: 1.75rem; height: .8rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: .5rem 0;
  border: 1px solid var(--line); border-radius: .5rem; }
.scroll:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
.word { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) {
  td.long { white-space: normal; min-width: 9rem; max-width: 11rem; } }
figcaption code { font-size: .88em; }
details { margin: .75rem 0; }
details figure { margin: .75rem 0 1.5rem; }
summary { cursor: pointer; font-size: .9rem; color: var(--blue); padding: .25rem 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media (min-width: 64rem) {
  .page { display: grid; grid-template: "nav header" auto "nav main" 1fr / 13.5rem minmax(0, 1fr);
    column-gap: 3rem; padding: 0 2rem 4rem; }
  header { grid-area: header; }
  main { grid-area: main; }
  nav { grid-area: nav; position: sticky; top: 0; align-self: start; max-height: 100vh;
    overflow-y: auto; padding: 2.9rem 0 1rem; font-size: .875rem; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  @page { margin: 15mm; }
  body { font-size: 10pt; }
  .page { display: block; max-width: none; padding: 0; }
  nav { display: none; }
  section { break-before: page; border: 0; margin: 0; padding: 0; }
  section:first-of-type { break-before: auto; padding-top: 1rem; }
  .panel, tr, .facts { break-inside: avoid; }
  h2, h3, h4, .legend { break-after: avoid; }
  .panels, .panels.few { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 8pt; }
  table.wide { font-size: 6.5pt; }
  table.wide th { overflow-wrap: anywhere; }
  th, td { white-space: normal; padding: .12rem .3rem; }
  th:first-child, td:first-child { position: static; min-width: 0; }
  a { color: inherit; }
  summary { list-style: none; color: inherit; }
  details::details-content { content-visibility: visible; display: block; }
}
"""
)
