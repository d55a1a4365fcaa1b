"""The face is whole and cheap to import, and one module imports neural-tangents."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ntkdp"

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_one_module_imports_neural_tangents() -> None:
    for path in SOURCES:
        tops = {name.split(".")[0] for name in _imported(path)}
        assert "neural_tangents" not in tops, path


def test_importing_ntkdp_imports_nothing_heavy() -> None:
    code = (
        "import sys, ntkdp; "
        "heavy = {'jax', 'matplotlib', 'xarray', 'dp_accounting', 'neural_tangents', 'sklearn', "
        "'diffrax', 'tensorflow'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_face_is_whole() -> None:
    import ntkdp

    assert {name for name in ntkdp.__all__ if not hasattr(ntkdp, name)} == set()
