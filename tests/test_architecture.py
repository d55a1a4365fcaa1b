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


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _is_private(module: str, room: str) -> bool:
    """Whether a module imported by full name is a file behind the face of another room."""
    top, *parts = module.split(".")
    is_other = top == "ntkdp" and len(parts) > 1 and parts[0] != room
    return is_other and any(part.startswith("_") for part in parts[1:])


def test_rooms_take_from_each_other_what_their_faces_hand_on() -> None:
    for path in SOURCES:
        private = {name for name in _imported(path) if _is_private(name, _room(path))}
        assert not private, (path, private)


def test_files_and_folders_stay_small() -> None:
    assert {path.name for path in SOURCES if len(path.read_text().splitlines()) > 500} == set()
    for folder in {path.parent for path in SOURCES} - {PACKAGE}:
        assert sum(path.is_file() for path in folder.iterdir()) <= 16, folder


def test_the_list_of_rooms_fits_on_a_screen() -> None:
    assert len({path.name for path in PACKAGE.iterdir()} - {"__pycache__"}) <= 34


def test_decompositions_of_possibly_many_matrices_cannot_wait_for_ever() -> None:
    # One device of a mesh decomposes one matrix of its own.
    exempt = {"decompositions.py", "_distributed_eigh.py"}
    batched = {"eigh", "eigvalsh", "eig", "eigvals", "cholesky", "pinv", "qr"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in batched:
                of_jax = ast.unparse(node.value) in ("jnp.linalg", "jsp.linalg", "jax.lax.linalg")
                assert not of_jax or path.name in exempt, (path, ast.unparse(node))
