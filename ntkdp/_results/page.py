"""Self-contained HTML pages with one style, from templates that escape all text."""

import base64
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, *, title: str, heading: str, **values: object) -> str:
    """A page from the template at this path in ntkdp, which extends ``_results/page.html``."""
    return _templates().get_template(template).render(title=title, heading=heading, **values)


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
    return templates


def _as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
