"""Numbers written in other ways: read where that is unambiguous, refused by name where not."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkdp import datasets
from ntkdp.datasets._number_notation import PLAIN, Notation, looks_like_number, notations, readings

ALL = notations(None, None)


def load(tmp_path: Path, columns: dict[str, list[str]], **options: Any) -> datasets.Dataset:
    """The data set of a file with these entries as they are, in order, one test sample aside."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    quoted = ['"' + entry + '"' for row in rows for entry in row]
    path = tmp_path / "table.csv"
    width = len(columns)
    path.write_text(
        "\n".join(",".join(quoted[i : i + width]) for i in range(0, len(quoted), width))
    )
    return datasets.from_csv(path, target="y", standardise="none", **options)


def column(data: datasets.Dataset, n: int) -> list[float]:
    """The first feature in the order of the file, the target of which counts the rows."""
    x = np.concatenate([data.x_train[:, 0], data.x_test[:, 0]])
    y = np.concatenate([data.y_train[:, 0], data.y_test[:, 0]])
    return [float(x[y == row][0]) for row in range(n)]


SPELLINGS: dict[str, tuple[list[str], list[float]]] = {
    "decimal commas": (["1,5", "-2,25", "3"], [1.5, -2.25, 3]),
    "a leading zero is no thousand": (["0,500", "1,250", "2,125"], [0.5, 1.25, 2.125]),
    "four decimals are no thousand": (["1,2345", "2,125", "1"], [1.2345, 2.125, 1]),
    "thousands and decimals": (["1,234.5", "12", "-1,000,000"], [1234.5, 12, -1e6]),
    "thousands by points": (["1.234,5", "1.234.567", "7"], [1234.5, 1234567, 7]),
    "thousands by spaces": (["1 234,5", "1\u00a0000", "1\u202f000"], [1234.5, 1000, 1000]),
    "thousands by apostrophes": (["1'234.5", "1\u2019000", "7"], [1234.5, 1000, 7]),
    "thousands by underscores": (["1_234.5", "1_000", "7"], [1234.5, 1000, 7]),
    "lakhs and crores": (["1,00,000", "12,34,567", "1,50"[:1]], [100000, 1234567, 1]),
    "percent": (["10%", "2.5 %", "-1%"], [0.1, 0.025, -0.01]),
    "per mille": (["10\u2030", "2\u2030", "0\u2030"], [0.01, 0.002, 0]),
    "dollars": (["$5", "-$1.50", "$-2"], [5, -1.5, -2]),
    "euros": (["5,50 \u20ac", "1.000,00 \u20ac", "-3 \u20ac"], [5.5, 1000, -3]),
    "a code": (["USD 5", "USD 1,234.50", "USD -3"], [5, 1234.5, -3]),
    "Fortran": (["1D+02", "1.5d-3", "2.5D2"], [100, 0.0015, 250]),
    "a minus sign": (["\u22125", "1.5", "2"], [-5, 1.5, 2]),
    "exponents": (["1,5e3", "2E-1", "3"], [1500, 0.2, 3]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_are_numbers_however_they_are_written(name: str, tmp_path: Path) -> None:
    entries, values = SPELLINGS[name]
    rows = [str(row) for row in range(len(entries))]
    data = load(tmp_path, {"a": entries, "y": rows})
    assert data.feature_names == ("a",)
    np.testing.assert_allclose(column(data, len(rows)), values, rtol=1e-15)
    as_target = load(tmp_path, {"a": rows, "y": entries})
    assert as_target.task == "regression"
    found = np.concatenate([as_target.y_train[:, 0], as_target.y_test[:, 0]])
    np.testing.assert_allclose(np.sort(found), np.sort(values), rtol=1e-15)


AMBIGUOUS = {
    "one group of three": (["1,234", "5", "60,000"], r"'1,234', which is 1234 with thousands=','"),
    "of money": (["\u20ac1.234", "\u20ac2.500", "\u20ac5"], r"which is 1\.234 with decimal='\.'"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_may_be_two_numbers_is_refused(name: str, tmp_path: Path) -> None:
    entries, message = AMBIGUOUS[name]
    rows = ["0", "1", "2"]
    with pytest.raises(ValueError, match="column 'a' holds " + ".*" + message):
        load(tmp_path, {"a": entries, "y": rows})
    with pytest.raises(ValueError, match="column 'y' holds " + ".*" + message):
        load(tmp_path, {"a": rows, "y": entries})


@pytest.mark.parametrize(
    ("entries", "option", "values"),
    [
        (["1,234", "5", "60,000"], {"thousands": ","}, [1234, 5, 60000]),
        (["1,234", "5", "60,000"], {"decimal": ","}, [1.234, 5, 60]),
        (["1,234", "5", "60,000"], {"decimal": "."}, [1234, 5, 60000]),
        (["1.234", "5", "60.000"], {}, [1.234, 5, 60]),
        (["1.234", "5", "60.000"], {"decimal": ","}, [1234, 5, 60000]),
        (["1.234", "5", "60.000"], {"thousands": "."}, [1234, 5, 60000]),
        (["1 234", "5", "60 000"], {}, [1234, 5, 60000]),
    ],
)
def test_an_option_decides(
    entries: Any, option: dict[str, Any], values: Any, tmp_path: Path
) -> None:
    data = load(tmp_path, {"a": entries, "y": ["0", "1", "2"]}, **option)
    assert column(data, 3) == values


def test_another_column_decides(tmp_path: Path) -> None:
    rows = ["0", "1", "2"]
    data = load(tmp_path, {"a": ["1,234", "5", "6"], "b": ["0.5", "1.5", "2"], "y": rows})
    assert column(data, 3) == [1234, 5, 6]
    data = load(tmp_path, {"a": ["1,234", "5", "6"], "b": ["0,5", "1,5", "2"], "y": rows})
    assert column(data, 3) == [1.234, 5, 6]
    # pandas alone would take these for 1.234 and 12.5: one of the columns would be wrong.
    with pytest.raises(ValueError, match=r"column 'a' holds '1\.234', which is 1\.234 with.*1234"):
        load(tmp_path, {"a": ["1.234", "5", "6"], "b": ["12,5", "1,5", "2"], "y": rows})
    with pytest.raises(
        ValueError, match=r"one way, got '1\.5' in 'a', '12,5' in 'b'|'12,5' in 'b'"
    ):
        load(tmp_path, {"a": ["1.5", "5", "6"], "b": ["12,5", "1,5", "2"], "y": rows})
    # A column that is not used decides nothing.
    columns = {"a": ["1.5", "5", "6"], "b": ["12,5", "1,5", "2"], "y": rows}
    assert column(load(tmp_path, columns, features=["a"]), 3) == [1.5, 5, 6]


@pytest.mark.parametrize(
    "entries",
    [
        ["10%", "10", "20%"],
        ["$5", "\u20ac5", "$6"],
        ["(5)", "(6)", "7"],
        ["5-", "6-", "7"],
        ["1D2", "2D3", "3D1"],
        ["1,5", "2.5", "3"],
        ["1,5", "2,5", "n/k"],
        ["1", "2", "three"],
    ],
)
def test_what_looks_like_numbers_is_never_text(entries: Any, tmp_path: Path) -> None:
    rows = ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"column 'a' holds numbers .*categorical="):
        load(tmp_path, {"a": entries, "y": rows})
    with pytest.raises(ValueError, match=r"column 'y' holds numbers .*categorical="):
        load(tmp_path, {"a": rows, "y": entries})
    assert load(tmp_path, {"a": entries, "y": rows}, categorical=["a"]).x_train.shape[1] == 3
    for told in ({"categorical": ["y"]}, {"task": "classification"}):
        classes = load(tmp_path, {"a": rows, "y": entries}, **told)
        assert classes.class_names == tuple(sorted(set(entries)))


@pytest.mark.parametrize(
    "entries",
    [
        ["red", "green", "blue"],
        ["Q1", "Q2", "Q3"],
        ["1.2.3", "1.3.0", "2.0.0"],
        ["10.0.0.1", "10.0.0.2", "127.0.0.1"],
        ["2020-01-02", "2021-03-04", "2022-05-06"],
        ["12:30", "13:45", "14:00"],
        ["1-2", "3-4", "5-6"],
        ["12 kg", "13 kg", "14 kg"],
        ["1st", "2nd", "3rd"],
    ],
)
def test_text_is_text(entries: Any, tmp_path: Path) -> None:
    data = load(tmp_path, {"a": entries, "y": ["0", "1", "2"]})
    assert data.feature_names == tuple(f"a={entry}" for entry in sorted(entries))
    data = load(tmp_path, {"a": ["0", "1", "2"], "y": entries})
    assert data.task == "classification"


def test_gaps_and_categories_keep_their_meaning(tmp_path: Path) -> None:
    data = load(
        tmp_path, {"a": ["1,5", "", "NA", "2,5"], "y": ["0", "1", "2", "3"]}, missing="mean",
        n_test=1, seed=1,
    )  # fmt: skip
    assert data.feature_names == ("a",)
    codes = load(tmp_path, {"a": ["007", "07", "7"], "y": ["0", "1", "2"]}, categorical=["a"])
    assert codes.feature_names == ("a=007", "a=07", "a=7")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"decimal": ";"}, "unknown decimal ';'"),
        ({"thousands": "-"}, "unknown thousands '-'"),
        ({"decimal": ",", "thousands": ","}, "decimal and thousands must differ"),
        ({"categorical": ["b"]}, "no column 'b'"),
        ({"decimal": ","}, r"column 'a' holds '1\.5', which is no number with decimal=','"),
        ({"decimal": ".", "thousands": ","}, None),
    ],
)
def test_options_are_checked(option: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    columns = {"a": ["1.5", "2", "3"], "y": ["0", "1", "2"]}
    if message is None:
        assert column(load(tmp_path, columns, **option), 3) == [1.5, 2, 3]
        return
    with pytest.raises(ValueError, match=message):
        load(tmp_path, columns, **option)


def written(value: float, notation: Notation, decimals: int) -> str:
    """Python's own spelling with separators, put in another notation."""
    text = f"{value:,.{decimals}f}" if notation.thousands else f"{value:.{decimals}f}"
    swap = {",": notation.thousands, ".": notation.decimal}
    return "".join(swap.get(character, character) for character in text)


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 6), st.sampled_from(ALL), st.sampled_from(ALL)
)
def test_a_number_is_read_back_and_no_other_notation_reads_it_wrong_alone(
    digits: Any, decimals: Any, notation: Any, other: Any
) -> None:
    value = digits / 10**decimals
    entry = written(value, notation, decimals)
    found = readings([entry], ALL)
    assert found[notation][entry] == float(f"{value:.{decimals}f}")
    assert looks_like_number(entry)
    if other in found and found[other] != found[notation]:
        # It takes exactly one separator before three digits to be two numbers.
        marks = [character for character in entry if character in ",. '_"]
        assert len(marks) == 1
        assert entry[::-1].index(marks[0]) == 3


@given(st.text(string.printable, max_size=12))
def test_any_text_is_read_or_left(entry: Any) -> None:
    found = readings([entry], ALL)
    assert not found or looks_like_number(entry)
    if PLAIN in found and entry.strip(string.digits + ".eE+-") == "":
        assert found[PLAIN][entry] == float(entry)
