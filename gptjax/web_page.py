"""Self-contained HTML pages, as every report is."""

import html

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #8882; padding: .8rem; overflow-x: auto; white-space: pre-wrap; border-radius: 4px; }
pre b { font-weight: 600; color: #3b6fb6; } img { max-width: 100%; background: #fff; }
"""


def page(title: str, parts: list[str]) -> str:
    """A self-contained HTML page of parts that are HTML."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>" + "\n".join(parts) + "</html>\n"
    )


def table(rows) -> str:
    """Two columns as HTML, of (name, text)."""
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"
