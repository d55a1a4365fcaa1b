"""Cells on disk: whole or not at all, found again, and never mixed with another sweep's."""

import errno
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from ntkdp._results import cell_file
from ntkdp._results.checkpoints import CellFolder, DamagedCell, resumable
from ntkdp._results.own_files import LIST

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


def compressed(array: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, array)
    return file.getvalue()


def claiming(data: bytes, shape: str) -> bytes:
    """An archive whose array says that it has this shape."""
    file = io.BytesIO()
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(file, "w") as archive:
        length = len(header).to_bytes(2, "little")
        archive.writestr("json.npy", b"\x93NUMPY\1\0" + length + header.encode() + data)
    return file.getvalue()


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
        st.lists(inner) | st.dictionaries(st.text().filter(lambda name: "/" not in name), inner)
    ),
    max_leaves=20,
)


@given(trees)
def test_numbers_survive_bit_for_bit(tree: Any) -> None:
    assert same(cell_file.decode(cell_file.encode({"tree": tree}, {}), {}), {"tree": tree})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b"0.1", b"0.2"),
        lambda data: b"[1, 2]",
        lambda data: b"{}",
        lambda data: b"\xff\xfe\x00",
        lambda data: cell_file.encode(CONTENT, {}),
        lambda data: npy(np.arange(3.0)),
        # They would take more memory than the disk has bytes.
        lambda data: compressed(np.zeros(10**6)),
        lambda data: claiming(data, "(100000000000000,)"),
    ],
)
def test_a_damaged_cell_is_named(tmp_path: Path, damage: Any) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS), "00003")
    path = tmp_path / "cells" / "00003.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedCell, match=r"00003.npz is damaged"):
        folder.read("00003")


def test_a_pipe_in_the_place_of_a_cell_is_not_read(tmp_path: Path) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS))
    os.mkfifo(folder.file("00001"))
    with pytest.raises(FileExistsError, match=r"00001.npz is no plain file; move it away"):
        folder.find("00001", dict)


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    written(CellFolder(tmp_path, SETTINGS))
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        CellFolder(tmp_path, SETTINGS | {"seed": 1}, resume=True)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json is damaged .*remove .* yourself"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    with pytest.raises(FileExistsError, match=r"changed since: sweep.json; nothing is removed"):
        CellFolder(tmp_path, SETTINGS, overwrite=True)
    assert (tmp_path / "cells" / "00000.npz").exists()


def test_folders_are_safe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep to resume"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    written(CellFolder(tmp_path, SETTINGS))
    with pytest.raises(FileExistsError, match="holds a sweep; pass --resume"):
        CellFolder(tmp_path, SETTINGS)
    again = CellFolder(tmp_path, SETTINGS | {"seed": 1}, overwrite=True)
    # What is asked for may still fail: until it begins, what is there stays.
    assert CellFolder(tmp_path, SETTINGS, resume=True).read("00000") is not None
    with again.growing():
        assert again.read("00000") is None
        again.write("00001", CONTENT)

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    every: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for options in every:
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(other, SETTINGS, **options)
        with pytest.raises(FileExistsError, match=r"thesis.tex is a file"):
            CellFolder(other / "thesis.tex", SETTINGS, **options)
    with pytest.raises(NotADirectoryError, match=r"thesis.tex is not a folder"):
        CellFolder(other / "thesis.tex" / "sweep", SETTINGS)
    assert (other / "thesis.tex").read_text() == "precious"


def killed(path: Path, name: str, n_written: int = 0) -> None:
    """A process that is killed while it writes a file of this name, after so many cells."""
    code = f"""
import os, sys
from pathlib import Path
from ntkdp._results.checkpoints import CellFolder
def patch(write):
    def half(path, content, **options):
        write(path, content[: len(content) // 2], **options)
        if {name!r} in path.name:
            os._exit(9)
        return write(path, content, **options)
    return half
Path.write_text, Path.write_bytes = patch(Path.write_text), patch(Path.write_bytes)
folder = CellFolder(Path({str(path)!r}), {SETTINGS!r})
with folder.growing():
    for number in range(3):
        folder.write(f"{{number:05d}}", {{"n": 3}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(path.rglob(".*.tmp"))) == 1
    assert len(list(path.glob("cells/0*"))) == n_written


def test_left_over_temporary_files_go_on_resuming(tmp_path: Path) -> None:
    killed(tmp_path, "00001.npz", 1)
    # Somebody else's, though it looks the same.
    (tmp_path / ".metrics.json.0123456789abcdef.tmp").write_text("precious")
    folder = CellFolder(tmp_path, SETTINGS, resume=True)
    with folder.growing():
        assert [path.read_text() for path in tmp_path.rglob(".*.tmp")] == ["precious"]
    assert folder.read("00000") == {"n": 3}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_what_another_process_works_on_is_left_alone(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "sweep"
    # Both have looked before either begins, as two commands do that start together.
    folder, early = CellFolder(path, SETTINGS), CellFolder(path, SETTINGS | {"seed": 1})
    with folder.growing():
        folder.write("00000", CONTENT)
        with folder._files.replacing("map.png") as temporary:
            late = CellFolder(path, SETTINGS, **options) if options else early
            with pytest.raises(BlockingIOError, match=r"another ntkdp is at work in .*sweep; wait"):
                written(late, "00001")
            temporary.write_text("map")
        folder.write("00002", CONTENT)
    assert {file.name for file in path.glob("cells/0*")} == {"00000.npz", "00002.npz"}
    assert (path / "map.png").read_text() == "map"


def test_what_another_process_has_left_meanwhile_is_not_mixed_with(tmp_path: Path) -> None:
    early = CellFolder(tmp_path, SETTINGS | {"seed": 1})
    resuming = CellFolder(written(CellFolder(tmp_path, SETTINGS)).path, SETTINGS, resume=True)
    with pytest.raises(FileExistsError, match="holds a sweep; pass --resume"):
        written(early)
    other = SETTINGS | {"seed": 2}
    written(CellFolder(tmp_path, other, overwrite=True))
    with pytest.raises(ValueError, match=r"other settings \(seed: 2 there, 0 now\)"):
        written(resuming)
    assert CellFolder(tmp_path, other, resume=True).read("00000") is not None


def test_what_was_killed_is_replaced_or_removed(tmp_path: Path) -> None:
    killed(tmp_path, "00001.npz", 1)
    folder = written(CellFolder(tmp_path, SETTINGS, overwrite=True), "00002")
    assert {path.name for path in tmp_path.rglob("*.[jn]*")} == {"sweep.json", "00002.npz"}
    assert not list(tmp_path.rglob(".*"))
    folder.remove()
    assert not tmp_path.exists()


def test_a_folder_that_was_killed_before_it_was_one_is_empty(tmp_path: Path) -> None:
    killed(tmp_path, "sweep.json")
    with pytest.raises(FileNotFoundError, match="no sweep to resume"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    written(CellFolder(tmp_path, SETTINGS))
    assert not list(tmp_path.rglob(".*"))


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
    assert {path.name for path in folder.path.iterdir()} == {LIST, "cells", "sweep.json"}
    assert resumable(folder.path)


@pytest.mark.parametrize(
    ("call", "name", "left"),
    [
        (1, "sweep.json", set()),
        (2, "cells/00000.npz", set()),
        (3, "cells/00001.npz", {LIST, "sweep.json", "cells", "00000.npz"}),
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
    with pytest.raises(DamagedCell, match=r"00000.npz is damaged \(it belongs to other settings"):
        other.read("00000")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    folder = written(CellFolder(tmp_path / "disk", SETTINGS))
    link = tmp_path / "linked"
    link.symlink_to(folder.path)
    again = written(CellFolder(link, SETTINGS, overwrite=True), "00001")
    assert again.read("00000") is None
    assert link.is_symlink()
    assert (folder.path / "cells" / "00001.npz").exists()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match="nowhere is a link to no folder"):
        CellFolder(tmp_path / "nowhere", SETTINGS, overwrite=True)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"seed": 0}', "[" * 200 + "]" * 200])
def test_settings_of_another_program_are_not_touched(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    every: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    for options in every:
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(tmp_path, SETTINGS, **options)
    assert (tmp_path / "sweep.json").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def test_another_thing_than_a_sweep_has_its_own_name(tmp_path: Path) -> None:
    written(CellFolder(tmp_path, SETTINGS, kind="run"))
    with pytest.raises(FileExistsError, match="not a sweep"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    with pytest.raises(FileExistsError, match="holds a run; pass --resume"):
        CellFolder(tmp_path, SETTINGS, kind="run")


@given(
    arrays(
        st.sampled_from(["<f4", "<f8", ">f8", "<i4", "<i8", "|b1"]),
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_survive_bit_for_bit(array: np.ndarray) -> None:
    content = cell_file.decode(cell_file.encode({"inner": {"array": array}}, {}), {})
    found = content["inner"]["array"]
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
    assert same(folder.find("00003", dict), CONTENT)
    folder.file("00003").write_text("{")
    assert folder.find("00003", dict) is None
    assert folder.find("00004", dict) is None
    (note,) = folder.notes
    assert note.startswith(f"{folder.file('00003')} is damaged")
    # And it is written again.
    assert same(written(folder, "00003").find("00003", dict), CONTENT)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + "]" * 5000,
        '{"a": ' * 5000 + "1" + "}" * 5000,
        "[" * 150 + "]" * 150,
        '{"label": {}, "content": NaN}',
        "7" * 5000,
        '"\\ud800"',
    ],
)
def test_json_that_nobody_would_write_is_damage(tmp_path: Path, text: str) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS))
    folder.file("00000").write_bytes(archive(json=np.array(text.encode())))
    assert folder.find("00000", dict) is None
    (note,) = folder.notes
    assert note.startswith(f"{folder.file('00000')} is damaged")
    note.encode()
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises((ValueError, FileExistsError), match=r"sweep\.json"):
        CellFolder(tmp_path, SETTINGS, resume=True)


def archive(**members: np.ndarray) -> bytes:
    """The bytes of an archive of arrays."""
    file = io.BytesIO()
    np.savez(file, **members)  # type: ignore[arg-type]
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """The bytes of a file of one array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "arrays"),
    [
        ({}, {}),
        ([], {}),
        (None, {}),
        (7, {}),
        ("text", {}),
        ({"seconds": "fast"}, {}),
        ({"seconds": None}, {}),
        ({"seconds": {}}, {}),
        ({}, {"/seconds": np.ones(2)}),
        ({}, {"/other/seconds": np.ones(())}),
        ({"other": 1.0}, {"/other/seconds": np.ones(())}),
        ({}, {"seconds": np.ones(())}),
        ({}, {"/seconds": np.array([None])}),
    ],
)
def test_labelled_cells_with_other_content_are_named(
    tmp_path: Path, content: Any, arrays: dict[str, np.ndarray]
) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS))
    whole = {"label": folder._label("00000"), "arrays": list(arrays), "content": content}
    text = np.array(json.dumps(whole).encode())
    folder.file("00000").write_bytes(archive(json=text, **arrays))
    assert folder.find("00000", lambda content: float(content["seconds"])) is None
    (note,) = folder.notes
    assert note.startswith(f"{folder.file('00000')} is damaged")


def test_a_cell_in_the_place_of_another_is_damaged(tmp_path: Path) -> None:
    folder = written(written(CellFolder(tmp_path, SETTINGS), "00000"), "00001")
    folder.file("00000").write_bytes(folder.file("00001").read_bytes())
    assert folder.read("00001") is not None
    with pytest.raises(DamagedCell, match=r"00000.npz is damaged \(it belongs to other settings"):
        folder.read("00000")


def test_arrays_that_are_missing_are_seen(tmp_path: Path) -> None:
    folder = written(CellFolder(tmp_path, SETTINGS))
    whole = {"label": folder._label("00000"), "arrays": ["/loss"], "content": {}}
    folder.file("00000").write_bytes(archive(json=np.array(json.dumps(whole).encode())))
    with pytest.raises(DamagedCell, match=r"it has other arrays than those written"):
        folder.read("00000")


@pytest.mark.parametrize(
    ("content", "error"), [({"a/b": 1}, ValueError), ({"a": [np.ones(2)]}, TypeError)]
)
def test_content_that_a_cell_cannot_hold_is_an_error(
    content: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        cell_file.encode(content, {})
