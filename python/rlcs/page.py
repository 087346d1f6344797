"""A page that stands by itself: one file, no script, no address, legible by day and by night."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .files import write_text

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --rule: #d5dae0; --page: #ffffff; --card: #f6f8fa;
  --up: #1a7f37; --down: #cf222e; --accent: #2f6feb; --mark: #fff1b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --rule: #39414a; --page: #0f1318;
  --card: #171c23; --up: #3fb950; --down: #ff7b72; --accent: #79aaff; --mark: #5b4a12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 60rem; }
a { color: var(--accent); }
code, pre, .answer { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .86em; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
.verdict { font-size: 1.05rem; border-left: 4px solid var(--accent); padding: .5rem .9rem; background: var(--card);
  border-radius: 0 6px 6px 0; max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; white-space: nowrap; line-height: 1.25; }
.up { color: var(--up); } .down { color: var(--down); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--soft); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid var(--rule); }
thead th[colspan] { text-align: center; border-left: 1px solid var(--rule); }
table.words th, table.words td { text-align: left; white-space: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.1rem; }
figure { margin: 0; padding: .7rem .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figure.wide { grid-column: 1 / -1; }
figure h4 { margin: 0 0 .3rem; font-size: .95rem; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important; }
svg image { image-rendering: pixelated; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1.1rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem; min-width: 0; }
.card img { max-width: 100%; border-radius: 4px; border: 1px solid var(--rule); vertical-align: top; }
.card img.small { image-rendering: pixelated; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; margin-top: .5rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; margin: .25rem 0 .7rem;
  padding: .4rem .6rem; border-left: 3px solid var(--rule); background: var(--page); border-radius: 0 4px 4px 0; }
.answer.score { border-color: var(--up); } .answer.wrong, .answer.format { border-color: var(--down); }
.think { color: var(--soft); } mark { background: var(--mark); color: inherit; padding: 0 .2em; border-radius: 3px; }
.chip { display: inline-block; padding: 0 .5em; border: 1px solid var(--rule); border-radius: 1em; font-size: .8rem;
  color: var(--soft); margin-right: .3em; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem; }
"""


def document(title: str, body: Iterable[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    style = f"<title>{escape(title)}</title><style>{CSS}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{style}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def write(path: Path, text: str) -> Path:
    """The page, whole or not at all."""
    write_text(path, text)
    return path


def tile(label: str, value: str, detail: str = "", kind: str = "") -> str:
    return f'<div class="tile"><span class="soft">{escape(label)}</span><b class="{kind}">{escape(value)}</b>' + (
        f'<span class="soft">{escape(detail)}</span></div>' if detail else "</div>"
    )


def table(head: Sequence[Sequence[tuple[str, int]]], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """``head``: rows of (text, columns it spans). ``rows``: (class, cells), the cells being HTML."""

    def heading(text: str, span: int) -> str:
        return f'<th colspan="{span}">{escape(text)}</th>' if span > 1 else f"<th>{escape(text)}</th>"

    top = "".join("<tr>" + "".join(heading(*cell) for cell in row) + "</tr>" for row in head)
    body = "".join(
        f'<tr class="{of_row}">' + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells) + "</tr>"
        for of_row, cells in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def figure(title: str, svg: str, caption: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h4>{escape(title)}</h4>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
