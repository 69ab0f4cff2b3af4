"""Prepared data as one HTML file: no script, no external resource, everything of the data escaped."""

from html import escape

from opensloth import log
from opensloth.data.show.view import Bar, RowView, View

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a90d9; height: .8rem; min-width: 1px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; padding: .6rem; border-radius: .3rem }
.trained { background: #2e9e4a33; box-shadow: inset 0 -2px #2e9e4a } .masked { opacity: .65 }
"""
# Whatever gets past the escaping can still load and run nothing
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(shown: View) -> str:
    """The whole document. Control characters of the data are made visible."""
    title = f"{shown.source} for {shown.model}"
    figures = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in shown.summary.lines())
    drops = "".join(f"<tr><td class=n>{line}</td><td>{text(reason)}</td></tr>" for line, reason in shown.drops)
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<table><tr><th>directory</th><td>{text(str(shown.summary.directory))}</td></tr>{figures}</table>",
        f"<h2>Tokens of a {shown.unit}</h2>{bars(shown.lengths)}",
        f"<h2>Tokens of a pack</h2>{bars(shown.fills)}" if shown.fills else "",
        f"<h2>Dropped (the first)</h2><table><tr><th>line</th><th>reason</th></tr>{drops}</table>" if drops else "",
        "<p><span class=trained>trained</span> <span class=masked>masked</span></p>" if shown.fills else "",
        *(row(one) for one in shown.rows),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def text(value: str) -> str:
    return escape(log.printable(value))


def bars(histogram: list[Bar]) -> str:
    most = max(bar.count for bar in histogram)
    lines = (
        f"<tr><td class=n>{bar.low:,} - {bar.high:,}</td><td style='width:24rem'>"
        f"<div class=bar style='width:{100 * bar.count / most:.1f}%'></div></td><td class=n>{bar.count:,}</td></tr>"
        for bar in histogram
    )
    return f"<table>{''.join(lines)}</table>"


def row(one: RowView) -> str:
    spans = "".join(
        f"<span class={'trained' if piece.trained else 'masked'}>{text(piece.text)}</span>" for piece in one.pieces
    )
    known = "".join(f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in (one.known or {}).items())
    return f"<h3>{text(one.title)}</h3><pre>{spans}</pre>" + (f"<table>{known}</table>" if known else "")
