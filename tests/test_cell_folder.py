"""Cells on disk: whole or not at all, found again, and never mixed with another sweep's."""

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ntkdp._cell_folder import CellFolder, DamagedCell, _encoded, _parsed

SETTINGS: dict[str, Any] = {"seed": 0, "grid": {"clip_norms": [0.1, 1.0]}}
CONTENT: dict[str, Any] = {"loss": 0.1, "bad": [float("nan"), float("inf"), -float("inf")], "n": 3}


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
    folder.write("00000", CONTENT)
    found = CellFolder(folder.path, SETTINGS, resume=True).read("00000")
    assert same(found, CONTENT)
    assert not list((folder.path / "cells").glob(".*"))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "float"), inner)
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
    folder = CellFolder(tmp_path, SETTINGS)
    folder.write("00003", CONTENT)
    path = tmp_path / "cells" / "00003.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedCell, match=r"00003.json is damaged"):
        folder.read("00003")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedCell, match=r"00003.json is damaged"):
        folder.read("00003")


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    CellFolder(tmp_path, SETTINGS).write("00000", CONTENT)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        CellFolder(tmp_path, SETTINGS | {"seed": 1}, resume=True)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json is damaged"):
        CellFolder(tmp_path, SETTINGS, resume=True)


def test_folders_are_safe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep to resume"):
        CellFolder(tmp_path, SETTINGS, resume=True)
    CellFolder(tmp_path, SETTINGS).write("00000", CONTENT)
    with pytest.raises(FileExistsError, match="holds a sweep; pass --resume"):
        CellFolder(tmp_path, SETTINGS)
    assert CellFolder(tmp_path, SETTINGS | {"seed": 1}, overwrite=True).read("00000") is None

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(other, SETTINGS, **options)
        with pytest.raises(FileExistsError, match="not a sweep"):
            CellFolder(other / "thesis.tex", SETTINGS, **options)
    assert (other / "thesis.tex").read_text() == "precious"


def test_left_over_temporary_files_go_on_resuming(tmp_path: Path) -> None:
    CellFolder(tmp_path, SETTINGS)
    left_over = tmp_path / "cells" / ".00001.json.123.tmp"
    left_over.write_text("half")
    CellFolder(tmp_path, SETTINGS, resume=True)
    assert not left_over.exists()
