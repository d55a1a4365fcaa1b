"""Self-contained HTML pages in one look: tables that scroll, pictures inside the page."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path


def document(title: str, heading: str, body: str, *, style: str = "") -> str:
    """A whole page; ``body`` and ``style`` are HTML and CSS, the others text."""
    return _TEMPLATE.format(
        title=html.escape(title), heading=html.escape(heading), body=body, style=style
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int = 1) -> str:
    """A table of text, the first columns to the left and the others to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if place < n_left else ' class=number'}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(path: Path, caption: str) -> str:
    """A PNG file as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    attribute = f" class={kind}" if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.25rem; margin: 2rem 0 .4rem; }}
h3 {{ font-size: 1rem; margin-bottom: 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ccc; text-align: left; }}
.number {{ text-align: right; }}
th {{ border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #444; font-size: .9rem; }}
.warning {{ border-left: .3rem solid #d55e00; padding-left: .8rem; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; }}
{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
</body>
</html>
"""
