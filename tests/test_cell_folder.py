"""Cells on disk: whole or not at all, found again, and never mixed with another sweep's."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from ntkdp._cell_folder import CellFolder, DamagedCell, _encoded, _parsed, resumable

SETTINGS: dict[str, Any] = {"seed": 0, "grid": {"clip_norms": [0.1, 1.0]}}
CONTENT: dict[str, Any] = {"loss": 0.1, "bad": [float("nan"), float("inf"), -float("inf")], "n": 3}


def written(folder: CellFolder, name: str = "00000") -> CellFolder:
    with folder.growing():
        folder.write(name, CONTENT)
    return folder


def same(a: Any, b: Any) -> bool:
    """Equal, NaN to NaN and bit for bit otherwise."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "new" / "sweep", SETTINGS)
    assert folder.read("00000") is None
    written(folder)
    found = CellFolder(folder.path, SETTINGS, resume=True).read("00000")
    assert same(found, CONTENT)
    assert not list((folder.path / "cells").glob(".*"))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text().filter(lambda key: key not in ("float", "array")), inner)
    ),
    max_leaves=20,
)


@given(trees)
def test_numbers_survive_bit_for_bit(tree: Any) -> None:
    text = json.dumps(_encoded(tree), allow_nan=False)
    assert same(_parsed(json.loads(text)), tree)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("0.1", "0.2"),
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: '{"checksum": "0", "content": {}}',
    ],
)
def test_a_damaged_cell_is_named(tmp_path: Path, damage: Any) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS), "00003")
    path = tmp_path / "cells" / "00003.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedCell, match=r"00003.json is damaged"):
        folder.read("00003")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedCell, match=r"00003.json is damaged"):
        folder.read("00003")


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    written(CellFolder(tmp_path, SETTINGS))
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        CellFolder(tmp_path, SETTINGS | {"seed": 1}, resume=True)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json is damaged"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    assert CellFolder(tmp_path, SETTINGS, overwrite=True).read("00000") is None


def test_folders_are_safe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep to resume"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    written(CellFolder(tmp_path, SETTINGS))
    with pytest.raises(FileExistsError, match="holds a sweep; pass --resume"):
        CellFolder(tmp_path, SETTINGS)
    assert CellFolder(tmp_path, SETTINGS | {"seed": 1}, overwrite=True).read("00000") is None
    assert not tmp_path.exists()

    other = tmp_path / "other"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("precious")
    every: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for options in every:
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(other, SETTINGS, **options)
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(other / "thesis.tex", SETTINGS, **options)
    with pytest.raises(NotADirectoryError, match=r"thesis.tex is not a folder"):
        CellFolder(other / "thesis.tex" / "sweep", SETTINGS)
    assert (other / "thesis.tex").read_text() == "precious"


def test_left_over_temporary_files_go_on_resuming(tmp_path: Path) -> None:
    written(CellFolder(tmp_path, SETTINGS))
    left_over = [tmp_path / "cells" / ".00001.json.123.tmp", tmp_path / ".metrics.json.9.tmp"]
    for path in left_over:
        path.write_text("half")
    folder = CellFolder(tmp_path, SETTINGS, resume=True)
    assert not any(path.exists() for path in left_over)
    assert same(folder.read("00000"), CONTENT)


def test_a_folder_that_was_killed_before_it_was_one_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".sweep.json.123.tmp").write_text("{")
    with pytest.raises(FileNotFoundError, match="no sweep to resume"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    written(CellFolder(tmp_path, SETTINGS))


def test_nothing_is_made_before_it_grows_and_nothing_is_left_without_a_cell(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "sweep", SETTINGS)
    assert folder.read("00000") is None
    assert not list(tmp_path.iterdir())

    def fail(error: type[BaseException], cells: list[str]) -> None:
        with folder.growing():
            assert resumable(folder.path)
            for name in cells:
                folder.write(name, CONTENT)
            raise error

    with pytest.raises(MemoryError):
        fail(MemoryError, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt, ["00000"])
    assert {path.name for path in folder.path.iterdir()} == {"cells", "sweep.json"}
    assert resumable(folder.path)


@pytest.mark.parametrize(
    ("call", "name", "left"),
    [
        (1, "sweep.json", set()),
        (2, "cells/00000.json", set()),
        (3, "cells/00001.json", {"sweep.json", "cells", "00000.json"}),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, name: str, left: set[str]
) -> None:
    replace, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    path = tmp_path / "sweep"
    folder = CellFolder(path, SETTINGS)

    def write_two() -> None:
        with folder.growing():
            folder.write("00000", CONTENT)
            folder.write("00001", CONTENT)

    with pytest.raises(OSError, match=r"No space left on device") as caught:
        write_two()
    assert caught.value.errno == errno.ENOSPC
    assert ("--resume continues" in str(caught.value)) == bool(left)
    assert calls[-1] == path / name
    assert {file.name for file in path.rglob("*")} == left
    folder = written(CellFolder(path, SETTINGS, resume=bool(left)), "00001")
    assert same(folder.read("00001"), CONTENT)


def test_a_cell_of_other_settings_is_damaged(tmp_path: Path) -> None:
    # As a process that was thought dead may put it there.
    folder = written(CellFolder(tmp_path / "a", SETTINGS))
    other = written(CellFolder(tmp_path / "b", SETTINGS | {"seed": 1}))
    other.file("00000").write_bytes(folder.file("00000").read_bytes())
    with pytest.raises(DamagedCell, match=r"00000.json is damaged \(its checksum differs\)"):
        other.read("00000")


def test_links_are_emptied_and_not_followed(tmp_path: Path) -> None:
    folder = written(CellFolder(tmp_path / "disk", SETTINGS))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("precious")
    (folder.path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "linked").symlink_to(folder.path)
    CellFolder(tmp_path / "linked", SETTINGS, overwrite=True)
    assert not list(folder.path.iterdir())
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert same(written(CellFolder(tmp_path / "linked", SETTINGS)).read("00000"), CONTENT)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"seed": 0}'])
def test_settings_of_another_program_are_not_touched(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    every: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for options in every:
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(tmp_path, SETTINGS, **options)
    assert (tmp_path / "sweep.json").read_text() == text


def test_another_thing_than_a_sweep_has_its_own_name(tmp_path: Path) -> None:
    written(CellFolder(tmp_path, SETTINGS, what="run"))
    with pytest.raises(FileExistsError, match="not a sweep"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    with pytest.raises(FileExistsError, match="holds a run; pass --resume"):
        CellFolder(tmp_path, SETTINGS, what="run")


@given(
    arrays(
        st.sampled_from(["<f4", "<f8", ">f8", "<i4", "<i8", "|b1"]),
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_survive_bit_for_bit(array: np.ndarray) -> None:
    found = _parsed(json.loads(json.dumps(_encoded(array))))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


WRITTEN = CONTENT | {"losses": np.linspace(1.0, 0.1, 7), "text": "abadi", "many": [1e-300, 2.5e7]}


@pytest.fixture(scope="module")
def whole_cell(tmp_path_factory: pytest.TempPathFactory) -> CellFolder:
    folder = CellFolder(tmp_path_factory.mktemp("cells"), SETTINGS)
    with folder.growing():
        folder.write("whole", WRITTEN)
    return folder


@given(data=st.data())
def test_a_flipped_byte_or_a_lost_end_is_seen(whole_cell: CellFolder, data: st.DataObject) -> None:
    """Whatever a disk does to a cell: it is found damaged, or what it says is what was written."""
    whole = whole_cell.file("whole").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[place] ^ data.draw(st.integers(1, 255))
    damaged = whole[:place] + bytes([flipped]) + whole[place + 1 :]
    if data.draw(st.booleans()):
        damaged = whole[:place]
    whole_cell.file("damaged").write_bytes(damaged)
    try:
        found = whole_cell.read("damaged")
    except DamagedCell:
        return
    assert found is not None
    assert same(found.pop("losses").tolist(), WRITTEN["losses"].tolist())
    assert same(found, {name: part for name, part in WRITTEN.items() if name != "losses"})


def test_finding_notes_what_is_damaged(tmp_path: Path) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS), "00003")
    assert same(folder.find("00003"), CONTENT)
    folder.file("00003").write_text("{")
    assert folder.find("00003") is None
    assert folder.find("00004") is None
    (note,) = folder.notes
    assert note.startswith(f"{folder.file('00003')} is damaged")
