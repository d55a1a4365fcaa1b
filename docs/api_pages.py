"""Pages of the reference, one a public module, and references to what they list."""

import inspect
import re
from pathlib import Path
from typing import Any

from public_names import MODULES, PublicName, public_names
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import NumpyDocstring

import ntkdp

_NUMPYDOC: Any = Config(
    napoleon_custom_sections=[("Attributes", "params_style")],
    napoleon_use_param=False,
    napoleon_use_rtype=False,
)


def write(folder: Path) -> None:
    """Write a page a module, and one of the package's own names, as reStructuredText."""
    folder.mkdir(exist_ok=True)
    names: dict[str, list[PublicName]] = {"ntkdp": []}
    for module in MODULES:
        names[f"ntkdp.{module}"] = []
    for name in public_names():
        names[name.module].append(name)
    for module, members in names.items():
        text = _page(module, members)
        path = folder / f"{module}.rst"
        # Unchanged pages keep their time, so that Sphinx does not build them again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(module: str, members: list[PublicName]) -> str:
    title = f"``{module}``"
    lines = [title, "=" * len(title), "", f".. automodule:: {module}", ""]
    listed = [name.qualified for name in members]
    if module == "ntkdp":
        listed = [homes()[id(getattr(ntkdp, name))] for name in _own_names()]
    shown = [name.removeprefix(f"{module}.") for name in listed]
    lines += [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in shown), ""]
    lines += [".. currentmodule:: " + module, ""]
    for name in members:
        lines += [f".. auto{name.kind}:: {name.qualified}"]
        if name.kind == "class":
            lines += ["   :members:", "   :exclude-members: model_config", "   :show-inheritance:"]
        lines += [""]
    return "\n".join(lines)


def _own_names() -> list[str]:
    return [name for name in ntkdp.__all__ if name not in MODULES]


_homes: dict[int, str] = {}


def homes() -> dict[int, str]:
    """The documented name of each public object, by identity."""
    if not _homes:
        for name in public_names():
            _homes.setdefault(id(name.value), name.qualified)
    return _homes


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A reference to a public object by another of its names, e.g. ``ntkdp.KernelFlow``."""
    if node.get("refdomain") != "py":
        return None
    found = _documented(node["reftarget"])
    if found is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found, node, contnode)


def _documented(target: str) -> str | None:
    """The documented name of a dotted path from the package, or of a name that only one has."""
    first, *rest = target.split(".")
    value: Any = ntkdp
    if first != "ntkdp":
        named = [name for name in public_names() if name.name == first]
        if len(named) != 1:
            return None
        return ".".join([named[0].qualified, *rest])
    for number, part in enumerate(rest):
        value = getattr(value, part, None)
        if value is None:
            return None
        if id(value) in homes() and not inspect.ismodule(value):
            return ".".join([homes()[id(value)], *rest[number + 1 :]])
    return None


def read_numpydoc(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the sections of a docstring into reStructuredText.

    As the extension napoleon does, but a property's text stays text, where napoleon takes what is
    before a colon for a type, and a constant does not inherit the text of its type.
    """
    text = "\n".join(lines)
    if what == "data" and text.strip() == inspect.getdoc(type(obj)):
        text = ""
    # A backslash carries a list of names on.
    text = re.sub(r", *\\\n *", ", ", text)
    kind: Any = "method" if what in ("property", "attribute") else what
    lines[:] = NumpyDocstring(text, _NUMPYDOC, app, kind, name, obj, options).lines()
