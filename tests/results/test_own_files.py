"""Nothing is removed or replaced that somebody else made, whatever they do to a folder."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers import examples
from hypothesis import example, given

from ntkdp._results.checkpoints import CellFolder
from ntkdp._results.own_files import LIST, OwnFiles
from ntkdp._results.run_folder import RunFolder

SETTINGS = {"seed": 0}


def grow(path: Path, **options: Any) -> None:
    """A sweep of two cells, with a report."""
    folder = CellFolder(path, SETTINGS, **options)
    with folder.growing():
        for name in ("00000", "00001"):
            folder.write(name, {"n": 3})
    for name in ("map.png", "report.html", "metrics.json"):
        with OwnFiles(path).replacing(name) as temporary:
            temporary.write_text(json.dumps({"ntkdp": "0", "config": name}))


def put(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """A run, with cases next to it or in it that go as it comes."""
    folder = RunFolder(path, overwrite=overwrite, finished=SETTINGS if resume else None)
    cases = CellFolder(folder.partial, SETTINGS, overwrite=overwrite, resume=resume, kind="run")
    with cases.growing():
        cases.write("00000", {"n": 3})
    with folder.replacing() as new:
        for name in ("loss.png", "report.html", "metrics.json"):
            with OwnFiles(new).replacing(name) as temporary:
                temporary.write_text(json.dumps({"ntkdp": "0", "config": name}))
    cases.remove()


KINDS: dict[str, Callable[..., None]] = {"sweep": grow, "run": put}


def everything(path: Path) -> dict[str, Any]:
    """What is there, to the last byte and link."""
    found: dict[str, Any] = {}
    for part in sorted(path.rglob("*")):
        name = str(part.relative_to(path))
        if part.is_symlink():
            found[name] = os.readlink(part)
        else:
            found[name] = part.read_bytes() if part.is_file() else part.lstat().st_mode
    return found


def _thesis(path: Path) -> str:
    (path / "thesis.tex").write_text("precious")
    return "thesis.tex"


def _notes(path: Path) -> str:
    (path / "notes").mkdir()
    return "notes/"


def _another_run(path: Path) -> str:
    put(path / "old")
    return "old/"


def _edited(path: Path) -> str:
    with (path / "report.html").open("a") as file:
        file.write("<p>My remarks")
    return "report.html"


def _looks_temporary(path: Path) -> str:
    (path / ".report.html.0123456789abcdef.tmp").write_text("precious")
    return ".report.html.0123456789abcdef.tmp"


def _link(path: Path) -> str:
    (path.parent / "elsewhere").write_text("precious")
    (path / "link").symlink_to(path.parent / "elsewhere")
    return "link"


def _link_in_place(path: Path) -> str:
    (path / "report.html").rename(path.parent / "report.html")
    (path / "report.html").symlink_to(path.parent / "report.html")
    return "report.html"


def _copy(path: Path) -> str:
    shutil.copy(path / "report.html", path / "report-2.html")
    return "report-2.html"


def _swapped(path: Path) -> str:
    shutil.copy(path / "metrics.json", path / "report.html")
    return "report.html"


def _pipe(path: Path) -> str:
    (path / "report.html").unlink()
    os.mkfifo(path / "report.html")
    return "report.html"


def _protected(path: Path) -> str:
    (path / "report.html").chmod(0o444)
    return "report.html"


def _other_list(path: Path) -> str:
    (path / LIST).write_text(f"{'0' * 64}  thesis.tex\n")
    return "report.html"


def _no_list(path: Path) -> str:
    (path / LIST).unlink()
    return "report.html"


def _many(path: Path) -> str:
    for number in range(9):
        (path / f"a{number}").write_text("precious")
    return r"a0, a1, a2, a3, a4 and 4 more"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "meddle",
    [
        _thesis, _notes, _another_run, _edited, _looks_temporary, _link, _link_in_place, _copy,
        _swapped, _pipe, _protected, _other_list, _no_list, _many,
    ],
)  # fmt: skip
def test_what_is_not_the_programs_is_named_and_nothing_is_removed(
    tmp_path: Path, kind: str, meddle: Callable[[Path], str]
) -> None:
    path = tmp_path / "out"
    KINDS[kind](path)
    name = meddle(path)
    before = everything(tmp_path)
    with pytest.raises(FileExistsError) as caught:
        KINDS[kind](path, overwrite=True)
    assert name in str(caught.value)
    assert "nothing is removed" in str(caught.value)
    assert everything(tmp_path) == before


def test_links_in_the_place_of_cells_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    grow(path)
    (path / "cells").rename(tmp_path / "precious")
    (path / "cells").symlink_to(tmp_path / "precious")
    (tmp_path / "precious" / "00001.npz").unlink()
    before = everything(tmp_path)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(FileExistsError, match="cells"):
            grow(path, **options)
        assert everything(tmp_path) == before


def test_resuming_leaves_what_is_not_the_programs(tmp_path: Path) -> None:
    grow(tmp_path)
    (tmp_path / "cells" / "00001.npz").unlink()
    _thesis(tmp_path)
    _notes(tmp_path)
    before = everything(tmp_path)
    grow(tmp_path, resume=True)
    after = everything(tmp_path)
    assert {name: after[name] for name in ("thesis.tex", "notes")} == {
        name: before[name] for name in ("thesis.tex", "notes")
    }
    _edited(tmp_path)
    with pytest.raises(FileExistsError, match=r"report.html .* has changed since; move it away"):
        grow(tmp_path, resume=True)
    assert (tmp_path / "report.html").read_text().endswith("<p>My remarks")


def test_a_list_that_a_full_disk_cut_short_goes_on(tmp_path: Path) -> None:
    grow(tmp_path)
    with (tmp_path / LIST).open("a") as file:
        file.write("\n0123456789abc")
    with OwnFiles(tmp_path).replacing("late.png") as temporary:
        temporary.write_text("late")
    assert OwnFiles(tmp_path).foreign() == []
    grow(tmp_path, overwrite=True)
    assert not (tmp_path / "late.png").exists()


@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_list_of_which_a_full_disk_left_no_line_goes_on(tmp_path: Path, length: int) -> None:
    with OwnFiles(tmp_path).replacing("first.png") as temporary:
        temporary.write_text("first")
    whole = (tmp_path / LIST).read_bytes()
    (tmp_path / "first.png").unlink()
    (tmp_path / LIST).write_bytes(whole[:length])
    # It stands in nobody's way, and is the program's to remove.
    grow(tmp_path)
    grow(tmp_path, overwrite=True)
    assert OwnFiles(tmp_path).foreign() == []
    OwnFiles(tmp_path).remove()
    assert not (tmp_path / LIST).exists()


@pytest.mark.parametrize("name", ["thesis.tex", "thesis.tmp", ".thesis.tex.0123.tmp"])
def test_a_list_gives_no_file_away_by_its_name(tmp_path: Path, name: str) -> None:
    grow(tmp_path)
    (tmp_path / name).write_text("precious")
    with (tmp_path / LIST).open("a") as file:
        file.write(f"\n# being written: {name}")
    with pytest.raises(FileExistsError, match=name):
        grow(tmp_path, overwrite=True)
    grow(tmp_path, resume=True)
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("name", ["../precious", "{place}/precious", "..", "../elsewhere"])
def test_a_list_reaches_nothing_outside(tmp_path: Path, name: str) -> None:
    name = name.format(place=tmp_path)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("precious")
    checksum = hashlib.sha256(b"precious").hexdigest()
    grow(tmp_path / "out")
    for inner in (tmp_path / "out", tmp_path / "out" / "cells"):
        with (inner / LIST).open("a") as file:
            file.write(f"\n{checksum}  {name}\n# folder: {name}\n# being written: {name}")
    grow(tmp_path / "out", overwrite=True)
    OwnFiles(tmp_path / "out").remove_with_folder()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {"precious", "elsewhere", "elsewhere/precious"}


#: Names that the program has for its own files too, apart from those of cells, which it makes
#: again if they are damaged.
NAMES = (
    "thesis.tex", "notes/a", "old/metrics.json", "report.html", "metrics.json", "sweep.json",
    "run.json", "loss.png", "map.png", LIST, "cells/note.txt", f"cells/{LIST}", "cells", ".partial",
    ".partial/a", ".partial/run.json", ".metrics.json.0123456789abcdef.tmp",
)  # fmt: skip
VERBS = tuple((kind, option) for kind in KINDS for option in ("", "overwrite", "resume"))
DEEDS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES)),
    st.tuples(st.just("link"), st.sampled_from(NAMES)),
    st.tuples(st.just("make"), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("run"), st.sampled_from(VERBS)),
)


@examples(60, 300)
@given(st.lists(DEEDS, min_size=2, max_size=10))
@example([("write", "sweep.json"), ("write", "thesis.tex"), ("run", ("sweep", "overwrite"))])
@example([("run", ("run", "")), ("write", "report.html"), ("run", ("run", "overwrite"))])
@example([("run", ("sweep", "")), ("write", "map.png"), ("run", ("sweep", "resume"))])
@example([("run", ("sweep", "")), ("remove", "map.png"), ("write", "map.png"),
          ("run", ("sweep", "resume"))])  # fmt: skip
def test_nobody_loses_a_file(deeds: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        path, elsewhere = Path(place, "out"), Path(place, "elsewhere")
        path.mkdir()
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("precious")
        theirs: dict[Path, str] = {elsewhere / "precious": "precious"}
        links: set[Path] = set()
        for number, (deed, what) in enumerate(deeds):
            with suppress(OSError, ValueError):
                if deed == "run":
                    KINDS[what[0]](path, **({what[1]: True} if what[1] else {}))
                    continue
                target = path / what
                if any(parent in links for parent in target.parents):
                    continue
                if deed == "remove":
                    target.unlink()
                    theirs.pop(target, None)
                    links.discard(target)
                elif deed == "make":
                    target.mkdir(parents=True)
                elif deed == "link":
                    target.parent.mkdir(exist_ok=True)
                    target.symlink_to(elsewhere)
                    links.add(target)
                elif target not in links:
                    target.parent.mkdir(exist_ok=True)
                    target.write_text(f"mine {number}")
                    theirs[target] = f"mine {number}"
        for file, text in theirs.items():
            assert file.is_file(), f"{file} is lost"
            assert file.read_text() == text, f"{file} is lost"
        for link in links:
            assert link.is_symlink(), f"{link} is lost"
        assert [file.name for file in elsewhere.iterdir()] == ["precious"]
