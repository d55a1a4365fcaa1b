"""The public names of ntkdp: what the reference lists, and what must be documented."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ntkdp

#: Modules of the public face, in alphabetical order.
MODULES = tuple(name for name in ntkdp.__all__ if inspect.ismodule(getattr(ntkdp, name)))


class PublicName(NamedTuple):
    """A name, where users find it, and what it is."""

    module: str
    name: str
    value: Any

    @property
    def kind(self) -> str:
        """``"class"``, ``"function"`` or ``"data"``."""
        if inspect.isclass(self.value):
            return "class"
        return "function" if callable(self.value) else "data"

    @property
    def qualified(self) -> str:
        """The name with its module."""
        return f"{self.module}.{self.name}"


def names_in(source: str) -> list[str]:
    """Public names of a module's source: its ``__all__`` or, without one, what it defines.

    Definitions are functions, classes and capitalised constants without a leading underscore, and
    imports of the form ``from module import name as name``.
    """
    found: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            if target.id == "__all__":
                return [str(name) for name in ast.literal_eval(node.value)]
            if target.id.isupper():
                found.append(target.id)
    return [name for name in found if not name.startswith("_")]


def _source_of(module: ModuleType) -> str:
    """The source of a module's face, which is its stub if it loads its names lazily."""
    path = Path(module.__file__ or "")
    stub = path.with_suffix(".pyi")
    return (stub if stub.exists() else path).read_text(encoding="utf-8")


def public_names() -> Iterator[PublicName]:
    """All public names once each: those of the public modules, then the package's own."""
    homes = set()
    for module_name in MODULES:
        module = importlib.import_module(f"ntkdp.{module_name}")
        for name in names_in(_source_of(module)):
            value = getattr(module, name)
            homes.add(id(value))
            yield PublicName(f"ntkdp.{module_name}", name, value)
    for name in ntkdp.__all__:
        value = getattr(ntkdp, name)
        if name not in MODULES and id(value) not in homes:
            yield PublicName("ntkdp", name, value)
