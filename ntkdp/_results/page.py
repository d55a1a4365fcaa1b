"""Self-contained HTML pages with one style, from templates that escape all text.

A page shows everything without scripts. With them its charts answer the pointer and its tables
sort; the scripts are part of the page, so that it needs no network.
"""

import base64
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, *, title: str, heading: str, **values: object) -> str:
    """A page from the template at this path in ntkdp, which extends ``_results/page.html``."""
    return _templates().get_template(template).render(title=title, heading=heading, **values)


def summary(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A table with a title and sentences below it, as a part of a page, such as a notebook."""
    parts: Any = _templates().get_template("_results/page_parts.html").module
    return str(parts.summary(title, head, rows, notes)).strip()


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("ntkdp", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["base64"] = _as_base64
    templates.globals["interactive"] = _interactive
    return templates


def _as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@cache
def _interactive(name: str) -> str:
    """A script or style sheet of ours, which pages take as it is."""
    return resources.files("ntkdp._results.interactive").joinpath(name).read_text("utf-8")
