"""Settings of the documentation site: `make docs`."""

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import api_pages  # noqa: E402  (it lies next to this file)

import ntkdp  # noqa: E402

project = "ntkdp"
author = copyright = "The ntkdp developers"
version = release = ntkdp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "figures", "experiments"]
default_role = "py:obj"
# A prime after a matrix is a transpose, not a quotation mark.
smartquotes = False

# Notebooks are shown as committed; `make notebooks` runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
# Every reference must lead somewhere; references to other libraries are plain text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|enum|equinox|flax|jax|jaxlib|jaxtyping|xarray)\..*"),
    ("py:obj", r"(neural_tangents|nnx|stax)\..*"),
    ("py:class", r"ntkdp\.(\w+\.)?_.*|'\d*'"),
]

html_theme = "pydata_sphinx_theme"
html_title = "ntkdp"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_sourcelink = False
html_copy_source = False
# Pages without subpages need no room for a list.
html_sidebars: dict[str, list[str]] = {page: [] for page in ("install", "limits", "peers")}
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "ntkdp"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}


def write_tutorials(folder: Path) -> None:
    """Put the notebooks where Sphinx looks for pages, with a page that lists them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    notebooks = sorted((HERE.parent / "theory_notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, folder)
    listed = "\n".join(notebook.stem for notebook in notebooks)
    (folder / "index.md").write_text(
        "# Tutorials\n\n"
        "The notebooks of `theory_notebooks/`, in order. Each states a theorem, predicts, runs,\n"
        "plots and ends in assertions; they are shown with the outputs that they were committed\n"
        "with, and `make notebooks` runs them all.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n",
        encoding="utf-8",
    )


write_tutorials(HERE / "tutorials")
api_pages.write(HERE / "api")


def setup(app: Any) -> None:
    """Point references at the names that users type."""
    app.connect("missing-reference", api_pages.resolve)
    app.connect("autodoc-process-docstring", api_pages.read_numpydoc)
