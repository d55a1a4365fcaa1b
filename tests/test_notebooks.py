"""The committed notebooks: executed, without errors or paths, on the public interface, asserting.

They are not run here; `make notebooks` does that.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "theory_notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: Bytes above which a notebook is a burden to a clone.
LARGEST = 600_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tree(cell: dict[str, Any]) -> ast.Module:
    return ast.parse("".join(cell["source"]))


def texts(node: Any) -> list[str]:
    """Every string in what an output holds, but for pictures."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [text for part in node for text in texts(part)]
    if isinstance(node, dict):
        return [
            t for key, part in node.items() if not key.startswith("image/") for t in texts(part)
        ]
    return []


def test_there_are_ten_in_order() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{k:02}_" for k in range(1, 11)]


def test_starts_with_what_it_shows_and_how_long_it_takes(
    path: Path, notebook: dict[str, Any]
) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    text = "".join(first["source"])
    assert text.startswith(f"# {path.name[:2]} ")
    assert "**What you will see.**" in text
    assert "**How long it takes.**" in text


def test_was_executed_in_order_without_error(notebook: dict[str, Any]) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    for cell in cells:
        body = tree(cell).body
        shows = any(isinstance(part, ast.Expr) for part in body)
        if shows and "enable_x64" not in "".join(cell["source"]):
            assert cell["outputs"], "".join(cell["source"])
    assert any(
        "image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]
    )


def test_prints_no_warning_and_no_path_of_a_machine(notebook: dict[str, Any]) -> None:
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    found = "\n".join(texts(outputs) + texts(notebook["metadata"]))
    sources = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    path_like = r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users|private|opt|var)/|[A-Z]:\\\\"
    assert not re.search(path_like, found + sources)


def test_holds_nothing_of_the_machine_that_ran_it(notebook: dict[str, Any]) -> None:
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]] == []


def test_uses_the_public_interface_alone(notebook: dict[str, Any]) -> None:
    for cell in code_cells(notebook):
        for node in ast.walk(tree(cell)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            for name in names:
                parts = name.split(".")
                assert not [p for p in parts if p.startswith("_") and not p.startswith("__")], name


def test_ends_in_assertions(notebook: dict[str, Any]) -> None:
    last = notebook["cells"][-1]
    assert last["cell_type"] == "code"
    asserted = [node for node in ast.walk(tree(last)) if isinstance(node, ast.Assert)]
    assert len(asserted) >= 3
    assert [node for node in asserted if isinstance(node.test, ast.Constant)] == []


def test_is_small_enough_to_commit(path: Path) -> None:
    assert path.stat().st_size < LARGEST
