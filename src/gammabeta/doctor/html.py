"""The report as one self-contained page: no script, no font, no picture from anywhere else."""

import base64

from ..text import for_html
from .plots import plots
from .summary import Group, Summary
from .terminal import cells

STYLE = """
.gb { font: 15px/1.5 system-ui, sans-serif; color: #2b3036; background: #fff; max-width: 62rem; }
.gb h1 { font-size: 1.5rem; margin: 0 0 1rem; } .gb h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.gb .f { border-left: 4px solid #9aa3ad; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
.gb .error { border-color: #c0392b; } .gb .warning { border-color: #d99a1c; } .gb .note { border-color:
#2f6fb5; } .gb .f b { font-size: 1.02rem; } .gb .f code { color: #56606a; }
.gb dl { display: grid; grid-template-columns: 4rem 1fr; margin: .3rem 0; gap: .1rem .5rem; }
.gb dt { color: #6a747e; } .gb dd { margin: 0; }
.gb .wide { overflow-x: auto; }
.gb table { border-collapse: collapse; font-size: .88rem; }
.gb th, .gb td { text-align: right; padding: .22rem .7rem; border-bottom: 1px solid #e3e6e9; }
.gb th:nth-child(-n+2), .gb td:nth-child(-n+2) { text-align: left; }
.gb p.small, .gb figcaption { color: #56606a; font-size: .88rem; } .gb figure { margin: 0 0 1.2rem; }
.gb img { max-width: 100%; height: auto; }
"""
NAMED = 12


def page(report: Summary) -> str:
    """A whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Batch normalization: diagnosis</title><style>body { margin: 2rem; background: #fff; }</style>"
        f"</head><body>{body(report)}</body></html>\n"
    )


def body(report: Summary) -> str:
    """What stands in the page, and in a notebook's cell."""
    parts = [f'<style>{STYLE}</style><div class="gb"><h1>{for_html(report.verdict)}</h1>']
    parts += [_group(group) for group in report.groups]
    for title, explanation, svg in plots(report):
        data = base64.b64encode(svg.encode()).decode()
        parts.append(
            f"<h2>{for_html(title)}</h2><figure><img alt='{for_html(title)}'"
            f" src='data:image/svg+xml;base64,{data}'>"
            f"<figcaption>{for_html(explanation)}</figcaption></figure>"
        )
    if report.evidence.layers:
        parts.append(f"<h2>Layers</h2><div class='wide'>{_table(report)}</div>")
    if report.evidence.not_examined:
        items = "".join(f"<li>{for_html(line)}</li>" for line in report.evidence.not_examined)
        parts.append(f"<h2>Not examined</h2><ul>{items}</ul>")
    return "".join(parts) + "</div>"


def _group(group: Group) -> str:
    first = group.first
    texts = "".join(f"<dt>{label}</dt><dd>{for_html(text)}</dd>" for label, text in group.texts.items())
    return (
        f'<div class="f {first.severity}"><b>{first.check}</b> ({first.severity})'
        f" <code>{for_html(group.names(NAMED))}</code><dl>{texts}</dl></div>"
    )


def _table(report: Summary) -> str:
    rows = [cells(report.layer_row(layer), missing="–") for layer in report.evidence.layers]
    head = "".join(f"<th>{header}</th>" for header in rows[0])
    body = ("<tr>" + "".join(f"<td>{for_html(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
