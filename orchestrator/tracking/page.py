"""The frame of a report: one HTML page that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """\
:root { color-scheme: light dark; --back: #fff; --text: #1d2329; --dim: #626d78; --line: #dfe4e8; --card: #f5f7f9;
  --accent: #1769c2; --band: #1769c233; --productive: #2e9e5b; --stall: #e0a526; --evaluate: #25a5b5; --lost: #d64545;
  --detect: #a85fc9; --restart: #7d4fd1; --start: #3f7fe0; --down: #9aa5af; }
@media (prefers-color-scheme: dark) { :root { --back: #14181c; --text: #e3e8ec; --dim: #94a0ab; --line: #2f373e;
  --card: #1d2328; --accent: #62aef5; --band: #62aef533; --down: #5d6872; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.note { color: var(--dim); font-size: .85rem; }
.why { color: var(--lost); white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.cards b { display: block; font-size: 1.2rem; overflow-wrap: anywhere; }
.cards span { color: var(--dim); font-size: .85rem; }
svg { display: block; width: 100%; }
.chart { display: grid; grid-template-columns: 3.6rem 1fr; margin: 0; }
.chart svg { height: 16rem; background: var(--card); }
.ticks { position: relative; font-size: .8rem; color: var(--dim); }
.ticks span { position: absolute; right: .5rem; transform: translateY(-50%); }
.steps { grid-column: 2; display: flex; justify-content: space-between; font-size: .8rem; color: var(--dim); }
line, polyline, path, polygon { vector-effect: non-scaling-stroke; }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.6; }
.band { fill: var(--band); }
.grid { stroke: var(--line); }
.redone { fill: var(--lost); opacity: .16; }
.restarted { stroke: var(--lost); stroke-dasharray: 4 3; }
.mark { stroke: var(--lost); stroke-width: 2; }
.save { stroke: var(--accent); stroke-width: 2; }
.attempt0 { fill: var(--accent); opacity: .75; } .attempt1 { fill: var(--accent); opacity: .4; }
.timeline { display: grid; grid-template-columns: 5.6rem 1fr; gap: .3rem .4rem; align-items: center; font-size: .8rem;
  color: var(--dim); }
.timeline svg, .shares svg { height: 1.6rem; background: var(--card); }
.productive { fill: var(--productive); background: var(--productive); } .stall { fill: var(--stall);
  background: var(--stall); } .evaluate { fill: var(--evaluate); background: var(--evaluate); }
.lost { fill: var(--lost); background: var(--lost); } .detect { fill: var(--detect); background: var(--detect); }
.restart { fill: var(--restart); background: var(--restart); } .start { fill: var(--start); background: var(--start); }
.down { fill: var(--down); background: var(--down); }
i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
td:first-child, td.w { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .82rem; }
summary { cursor: pointer; color: var(--accent); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; }
.samples figure { margin: 0; } .samples img { width: 100%; image-rendering: pixelated; border-radius: .3rem; }
figcaption { font-size: .8rem; color: var(--dim); overflow-wrap: anywhere; }
"""


def frame(title: str, parts: Iterable[str]) -> str:
    """The whole document. Args: parts: HTML."""
    # The policy makes the browser refuse whatever else a value from the run could try to bring in.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline';"
        ' img-src data:">'
        f"<title>{escape(title)}</title><style>\n{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Args: parts: HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Labels and values, as text."""
    return '<div class="cards">' + "".join(f"<div><b>{_(v)}</b><span>{_(k)}</span></div>" for k, v in facts) + "</div>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in cells. A column whose name ends in `#` holds numbers, in `_` what is better not broken into lines."""
    kinds = {"#": ' class="n"', "_": ' class="w"'}
    classes = [kinds.get(column[-1:], "") for column in columns]
    head = "".join(f"<th{kind}>{_(name.rstrip('#_'))}</th>" for kind, name in zip(classes, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_(cell)}</td>" for kind, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def folded(title: str, text: str) -> str:
    """Text as it is, shown when asked for."""
    return f"<details><summary>{_(title)}</summary><pre>{_(text)}</pre></details>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_(text)}</p>' if kind else f"<p>{_(text)}</p>"


def _(text: str) -> str:
    return escape(text)
