"""Every public name is documented and tested, and what the pages print and link to is there."""

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DOCS, ROOT

sys.path.insert(0, str(DOCS))

import claims_page
import public_names
from public_names import PublicName

import ntkdp
from ntkdp import claims

NAMES = list(public_names.public_names())


def _text(value: Any) -> str:
    """The docstring of an object, its own or of a constant the comment that documents it."""
    return inspect.cleandoc(value.__doc__ or "") if inspect.isroutine(value) else _class_text(value)


def _class_text(value: Any) -> str:
    text = inspect.cleandoc(vars(value).get("__doc__") or "")
    # What dataclasses and named tuples write where there is nothing.
    return "" if text.startswith(f"{value.__name__}(") else text


def _has_section(text: str, title: str) -> bool:
    return re.search(rf"^{title}\n-+$", text, flags=re.MULTILINE) is not None


def _shown_elsewhere(name: PublicName, text: str) -> bool:
    """Whether an example of what makes a class, or of its base, shows the class."""
    bases = [base for base in name.value.__mro__[1:] if base.__module__.startswith("ntkdp")]
    if any(name.name in _examples(_class_text(base)) for base in bases):
        return True
    for target in re.findall(r":(?:func|meth):`~?([\w.]+)`", text):
        for path in (target, f"{name.module}.{target}"):
            shown = _named(path.removeprefix("ntkdp."))
            if shown is not None and ">>>" in _text(shown):
                return True
    return False


def _named(path: str) -> Any:
    value: Any = ntkdp
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _examples(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith((">>>", "...")))


def _undocumented_parameters(function: Callable[..., Any], text: str) -> list[str]:
    """Parameters that are not in the section, nor quoted in the text.

    Where the text sends the reader to another function, that one has the rest.
    """
    if re.search(r"(as for|those of|arguments of) (its\s+loader|:(func|class):`)", text):
        return []
    section = re.search(
        r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+$|\Z)", text, flags=re.MULTILINE | re.DOTALL
    )
    # Names stand at the margin, several with commas, a backslash carrying them on.
    heads = re.sub(r"\\\n\s*", " ", section[1]) if section else ""
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"^(?! )([^:\n]+)", heads, re.MULTILINE))))
    quoted = set(re.findall(r"\w+", " ".join(re.findall(r"``(.+?)``", text))))
    return [name for name in inspect.signature(function).parameters if name not in listed | quoted]


def missing(name: PublicName) -> list[str]:
    """What the documentation of a name lacks."""
    if name.kind == "data":
        return []
    text = _text(name.value)
    if not text:
        return ["a docstring"]
    found = []
    summary = text.split("\n\n")[0].strip()
    if not summary.endswith((".", ":")):
        found.append("a summary that is a sentence")
    shown = ">>>" in text
    if name.kind == "class":
        shown = shown or _shown_elsewhere(name, text)
    else:
        found += [f"parameter {p}" for p in _undocumented_parameters(name.value, text)]
        returns = inspect.signature(name.value).return_annotation
        # Without any section the summary says what is returned.
        if _has_section(text, "Parameters") and returns not in (None, "None"):
            found += [] if _has_section(text, "Returns") else ["what is returned"]
    return found if shown else [*found, "an example"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.qualified)
def test_public_names_are_documented(name: PublicName) -> None:
    assert missing(name) == []


def test_what_is_missing_is_found() -> None:
    """Functions and classes that lack one thing each."""

    def whole(x: int) -> int:
        """Twice ``x``.

        Examples
        --------
        >>> 2 * 1
        2
        """
        return 2 * x

    def without_parameter(x: int, y: int) -> int:
        """Twice ``x``.

        >>> 2 * 1
        2
        """
        return 2 * x

    def without_returns(x: int) -> int:
        """Twice as much.

        Parameters
        ----------
        x : int

        Examples
        --------
        >>> 2 * 1
        2
        """
        return 2 * x

    def without_example(x: int) -> int:
        """Twice ``x``."""
        return 2 * x

    def without_docstring(x: int) -> int:
        return 2 * x

    class WithoutExample:
        """Made by :func:`nothing_that_is_there`."""

    expected: dict[Any, list[str]] = {
        whole: [],
        without_parameter: ["parameter y"],
        without_returns: ["what is returned"],
        without_example: ["an example"],
        without_docstring: ["a docstring"],
        WithoutExample: ["an example"],
    }
    for value, lacks in expected.items():
        assert missing(PublicName("ntkdp", value.__name__, value)) == lacks


def test_public_names_follow_the_source() -> None:
    source = "from a import b as b, c\nD = 1\n_E = 2\ndef f(): ...\nclass _G: ..."
    assert public_names.names_in(source) == ["b", "D", "f"]
    assert public_names.names_in(f'{source}\n__all__ = ["f"]') == ["f"]
    assert {name for name in ntkdp.__all__ if name not in public_names.MODULES} <= {
        name.name for name in NAMES
    }
    assert {f"ntkdp.{module}" for module in public_names.MODULES} <= {name.module for name in NAMES}


def _names_in_tests() -> Iterator[str]:
    """Names that the code of the tests uses."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Attribute):
                yield node.attr


def _annotations_of(value: Any) -> list[str]:
    """Types of the fields of a class, and of what a function returns."""
    if inspect.isclass(value):
        return [str(kind) for kind in inspect.get_annotations(value).values()]
    return [str(inspect.signature(value).return_annotation)]


def test_public_names_are_tested() -> None:
    """The tests use each one, or get it from another that they use."""
    named = set(_names_in_tests())
    functions_and_classes = [name for name in NAMES if name.kind != "data"]
    received = {
        word
        for name in functions_and_classes
        for annotation in _annotations_of(name.value)
        for word in re.findall(r"\w+", annotation)
    }
    untested = [n.qualified for n in functions_and_classes if n.name not in named | received]
    assert untested == []


PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "tutorials"} & {*path.parts})
#: Pages that tests of their own run.
RUN_ELSEWHERE = {"phases.md", "choosing.md"}
#: Whose examples take long.
SLOW = {
    "high_dimensional_sgd.md",
    "noise.md",
    "noise_and_batches.md",
    "cluster.md",
    "features.md",
    "large_data.md",
    "several_machines.md",
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else (), id=page.name)
        for page in PAGES
        if page.name not in RUN_ELSEWHERE
    ],
)
def test_examples_of_a_page_run(page: Path, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # some write pictures
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    if page.name == "index.md" and page.parent == DOCS:
        assert 0 < float(capsys.readouterr().out.strip("%\n")) < 1


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        # Tutorials and the reference are written when the pages are built.
        if ":" in target or path.endswith(("tutorials/index.md",)):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


def test_the_page_of_claims_says_what_the_code_says() -> None:
    written = claims_page.PAGE.read_text()
    parts = re.split(r"^(?=## )", written, flags=re.MULTILINE)[1:]
    assert len(parts) == len(claims.names())
    for name, part in zip(claims.names(), parts, strict=True):
        assert part.startswith(claims_page.static_part(claims.get(name))), name


@pytest.mark.parametrize("name", ["C3", "C6", "C9", "C31"])
def test_the_page_of_claims_has_the_numbers(name: str) -> None:
    findings = claims.verify(name).findings
    assert claims_page.numbers(findings) in claims_page.PAGE.read_text()


def test_every_claim_has_a_sketch() -> None:
    assert {name.lower() for name in claims.names()} <= _anchors(DOCS / "theory.md")


def _floors() -> dict[int, set[str]]:
    """Rooms by floor, as the contract of the imports has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    return {floor: set(layer.split(" | ")) for floor, layer in enumerate(reversed(layers), start=1)}


def test_the_pages_of_the_architecture_show_the_floors_of_the_contract() -> None:
    rooms: dict[int, set[str]] = {}
    page = (DOCS / "architecture.md").read_text()
    for floor, room in re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE):
        rooms.setdefault(int(floor), set()).add(room)
    assert rooms == _floors()
    tree = re.findall(r"^ ?(\d+)  (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {int(floor): set(names.split()) for floor, names in tree} == _floors()


@pytest.mark.parametrize("page", [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"])
def test_files_that_the_architecture_names_are_there(page: Path) -> None:
    for path in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text()):
        assert (ROOT / path).exists() or (ROOT / "ntkdp" / path).exists(), path


@pytest.mark.parametrize("name", ["experiment", "sweep"])
def test_a_lazy_face_lists_the_names_of_its_stub(name: str) -> None:
    room = importlib.import_module(f"ntkdp.{name}")
    stub = Path(room.__file__ or "").with_suffix(".pyi").read_text(encoding="utf-8")
    assert sorted(room.__all__) == sorted(public_names.names_in(stub))


def test_the_face_lists_its_version() -> None:
    assert "__version__" in dir(ntkdp)
