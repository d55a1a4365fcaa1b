"""Readers against files written byte by byte, by NumPy and by the csv module, and canned OpenML."""

import csv
import gzip
import hashlib
import io
import json
import struct
import tracemalloc
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.response import addinfourl

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils import Bunch

from ntkdp import datasets
from ntkdp.datasets import _files

GENERATOR = np.random.default_rng(7)
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    """IDX as its specification words it: big-endian lengths, then big-endian entries."""
    code = IDX_CODES[array.dtype.str[1:]]
    header = struct.pack(">BBBB", 0, 0, code, array.ndim)
    lengths = b"".join(struct.pack(">I", length) for length in array.shape)
    return header + lengths + array.astype(array.dtype.newbyteorder(">")).tobytes()


def numbered(n: int, n_features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose first feature is their row number, with labels that the row decides."""
    x = np.column_stack([np.arange(n), GENERATOR.normal(size=(n, n_features - 1))])
    return x, np.arange(n) % 3


def rows(data: datasets.Dataset) -> list[list[int]]:
    return [np.asarray(part[:, 0]).astype(int).tolist() for part in (data.x_train, data.x_test)]


def write_csv(
    path: Path, header: list[str], lines: Iterable[Sequence[object]], delimiter: str = ","
) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)
    writer.writerows([header, *lines])
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


# --- IDX -----------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(IDX_CODES)).flatmap(
        lambda dtype: hnp.arrays(
            np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
        )
    ),
    st.booleans(),
)
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, array: Any, zipped: Any) -> None:
    path = tmp_path_factory.mktemp("idx") / "data.idx"
    path.write_bytes(gzip.compress(idx_bytes(array), mtime=0) if zipped else idx_bytes(array))
    read = _files.read_idx(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_idx_written_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "two-by-three.idx"
    path.write_bytes(bytes([0, 0, 0x0B, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(12)))
    expected = [[0x0001, 0x0203, 0x0405], [0x0607, 0x0809, 0x0A0B]]
    np.testing.assert_array_equal(_files.read_idx(path), expected)


IdxPair = tuple[Path, Path, np.ndarray, np.ndarray]


@pytest.fixture
def idx_pair(tmp_path: Path) -> IdxPair:
    images = GENERATOR.integers(0, 256, size=(12, 4, 3), dtype=np.uint8)
    labels = (np.arange(12) % 3).astype(np.uint8)
    paths = tmp_path / "t-images-idx3-ubyte.gz", tmp_path / "t-labels-idx1-ubyte"
    paths[0].write_bytes(gzip.compress(idx_bytes(images), mtime=0))
    paths[1].write_bytes(idx_bytes(labels))
    return *paths, images, labels


def test_from_idx_keeps_images_with_their_labels(idx_pair: IdxPair) -> None:
    images_path, labels_path, images, labels = idx_pair
    data = datasets.from_idx(images_path, labels_path, flat=False, standardise="none")
    assert (data.name, data.n_outputs) == ("t-images-idx3-ubyte", 3)
    assert data.x_train.shape == (10, 4, 3, 1)
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for image, label in zip(np.asarray(data.x_train), data.y_train, strict=True):
        assert truth[image.astype(np.uint8).tobytes()] == label
    assert datasets.load(images_path, labels_path=str(labels_path)).x_test.shape == (2, 12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number ''"),
        (b"\x89PNG\r\n", "not an IDX file: its magic number '89504e47'"),
        (bytes([0, 0, 0x0A, 1, 0, 0, 0, 0]), "unknown IDX type 0x0a; known: 0x08"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "truncated: a header of rank 3 takes 16 bytes.*holds 8"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), r"truncated: shape \(9,\) of uint8 takes 17 bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), "extra bytes at its end"),
        (gzip.compress(idx_bytes(np.arange(99.0)), mtime=0)[:40], "truncated or damaged"),
    ],
)
def test_bad_idx_files_say_what_is_wrong(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        _files.read_idx(path)
    assert str(path) in str(raised.value)


def test_idx_files_that_do_not_fit_each_other(idx_pair: IdxPair, tmp_path: Path) -> None:
    images_path, labels_path, _, labels = idx_pair
    with pytest.raises(ValueError, match="images must have rank 2 or more and labels rank 1"):
        datasets.from_idx(labels_path, images_path)
    short = tmp_path / "short.idx"
    short.write_bytes(idx_bytes(labels[:-1]))
    with pytest.raises(ValueError, match="x and y must be of equal length, got 12 and 11"):
        datasets.from_idx(images_path, short)
    with pytest.raises(FileNotFoundError, match=r"no-such\.idx' does not exist"):
        datasets.from_idx(images_path, tmp_path / "no-such.idx")


# --- NumPy archives ------------------------------------------------------------------------------


def test_from_npz_reads_what_numpy_wrote(tmp_path: Path) -> None:
    x, y = numbered(15)
    np.savez_compressed(tmp_path / "set.npz", inputs=x, labels=y)
    data = datasets.from_npz(tmp_path / "set.npz", x="inputs", y="labels", standardise="none")
    train, test = rows(data)
    np.testing.assert_array_equal(data.x_train, x[train])
    np.testing.assert_array_equal(data.y_test, y[test])
    assert (data.name, data.task, data.feature_names) == ("set", "classification", None)


def test_bad_npz_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, inputs=np.eye(3), y=np.array([{}, 1, 2], dtype=object))
    with pytest.raises(ValueError, match="has no array 'input'; did you mean 'inputs'"):
        datasets.from_npz(path, x="input")
    with pytest.raises(ValueError, match="save plain numbers or text, which need no pickle"):
        datasets.from_npz(path, x="inputs")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is not an \.npz archive, or is truncated"):
        datasets.from_npz(path)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        datasets.from_npz(tmp_path)


# --- CSV -----------------------------------------------------------------------------------------

HOUSES = [
    [-122.2, 4.5, "NEAR BAY", 452600.0],
    [-122.3, 3.5, "INLAND", 358500.0],
    [-118.0, 9.0, "<1H OCEAN", 352100.0],
    [-117.5, 7.25, "INLAND", 341300.0],
    [-121.0, 1.0, "NEAR BAY", 342200.0],
    [-120.9, 2.0, "INLAND", 269700.0],
]
HOUSE_COLUMNS = ["longitude", "rooms", "near, ocean", "value"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_from_csv_finds_the_delimiter_and_encodes_text(
    tmp_path: Path, delimiter: str, suffix: str
) -> None:
    path = write_csv(tmp_path / f"houses{suffix}", HOUSE_COLUMNS, HOUSES, delimiter)
    data = datasets.from_csv(path, target="value", standardise="none", n_test=1)
    categories = ["<1H OCEAN", "INLAND", "NEAR BAY"]
    assert data.name == "houses"
    assert data.feature_names == (
        "longitude",
        "rooms",
        *(f"near, ocean={category}" for category in categories),
    )
    source = {row[0]: row for row in HOUSES}
    ordered = [source[float(longitude)] for longitude in data.x_train[:, 0]]
    one_hot = OneHotEncoder(sparse_output=False).fit([[row[2]] for row in HOUSES])
    np.testing.assert_array_equal(data.x_train[:, 1], [row[1] for row in ordered])
    np.testing.assert_array_equal(
        data.x_train[:, 2:], one_hot.transform([[row[2]] for row in ordered])
    )
    np.testing.assert_array_equal(data.y_train[:, 0], [row[3] for row in ordered])


def test_from_csv_text_targets_are_classes_and_numbers_are_not(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "wine.csv", ["ph", "quality", "colour"], [[3.1, 5, "red"]] * 4)
    with path.open("a") as file:
        file.write("3.0,6,white\n2.9,7,white\n")
    colours = datasets.from_csv(path, target="colour", features=["ph"])
    assert (colours.task, colours.class_names) == ("classification", ("red", "white"))
    assert colours.feature_names == ("ph",)
    assert datasets.from_csv(path, target="quality").task == "regression"
    quality = datasets.from_csv(path, target="quality", task="classification")
    assert quality.class_names == ("5", "6", "7")
    with pytest.raises(TypeError, match="y must be real numbers"):
        datasets.from_csv(path, target="colour", task="regression")


@pytest.fixture
def gappy(tmp_path: Path) -> Path:
    lines: list[list[object]] = [[i, i * i, "ab"[i % 2], i / 4] for i in range(10)]
    lines[2][1], lines[5][1], lines[5][2], lines[7][2] = "", "NA", "?", ""
    return write_csv(tmp_path / "gappy.csv", ["row", "square", "letter", "y"], lines)


def test_missing_values_are_refused_with_their_count(gappy: Path) -> None:
    message = r"gappy.csv' lacks values in 3 of 10 rows, in columns 'square' \(2\), 'letter' \(2\)"
    with pytest.raises(ValueError, match=message + ".*missing='drop' or missing='mean'"):
        datasets.from_csv(gappy, target="y")


def test_missing_values_are_dropped(gappy: Path) -> None:
    data = datasets.from_csv(gappy, target="y", missing="drop", standardise="none")
    train, test = rows(data)
    assert sorted(train + test) == [0, 1, 3, 4, 6, 8, 9]


def test_missing_values_are_filled_by_means_of_the_training_part(gappy: Path) -> None:
    for seed in range(5):
        data = datasets.from_csv(
            gappy, target="y", missing="mean", standardise="none", n_train=5, seed=seed
        )
        train, test = rows(data)
        squares = [i * i for i in train if i not in (2, 5)]
        share = float(np.mean([i % 2 for i in train if i not in (5, 7)]))
        expected: dict[int, list[float]] = {i: [i, i * i, 1 - i % 2, i % 2] for i in range(10)}
        expected[2][1] = expected[5][1] = float(np.mean(squares))
        expected[5][2:] = expected[7][2:] = [1 - share, share]
        np.testing.assert_allclose(data.x_train, [expected[i] for i in train], rtol=1e-14)
        np.testing.assert_allclose(data.x_test, [expected[i] for i in test], rtol=1e-14)


def test_a_missing_target_is_never_filled(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a", "y"], [[1, 2.0], [2, ""], [3, 4.0], [4, 5.0]])
    with pytest.raises(ValueError, match=r"1 of 4 rows, in columns 'y' \(1\).*missing='drop'$"):
        datasets.from_csv(path, target="y", missing="mean")
    assert len(datasets.from_csv(path, target="y", missing="drop").x_train) == 2


def test_a_column_without_a_training_value_has_no_mean(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a", "b", "y"], [[i, "", i / 2] for i in range(5)])
    with pytest.raises(ValueError, match="in every column of the training part, got none in 'b'"):
        datasets.from_csv(path, target="y", missing="mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,y\n", "x must be a non-empty array"),
        ("alpha\n1\n2\n", "one column, 'alpha', when split at ','; pass delimiter="),
        ("1.5,2\n3,4\n5,6\n", "must name the columns"),
        ("a,y\n1,2\n3,4,5\n", "is not a table"),
        ("a,y\n1,2,9\n3,4,9\n", "is not a table"),
        ("a,b,y\n1,inf,2\n2,-inf,3\n3,1,4\n", r"got 2 NaN or infinite of 6.*features 'b' \(2\)"),
        (
            "a,b,y\n1,2,2\n2,3,3\n3,n/k,4\n",
            "column 'b' holds numbers mixed with text such as 'n/k'",
        ),
        ("a,c\n1,2\n3,4\n", "has no column 'y'.*known: a, c"),
        ("b,y\n" + "".join(f"t{i},{i}\n" for i in range(101)), "text with 101 distinct values"),
        ("y,q\n1,\n", "lacks values in 1 of 1 rows"),
    ],
)
def test_bad_csv_files_say_what_is_wrong(tmp_path: Path, text: Any, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.from_csv(path, target="y")


def test_csv_options_are_checked(tmp_path: Path, gappy: Path) -> None:
    with pytest.raises(ValueError, match="delimiter must be a single character or None, got ', '"):
        datasets.from_csv(gappy, target="y", delimiter=", ")
    with pytest.raises(ValueError, match="unknown missing 'means'; did you mean 'mean'"):
        datasets.from_csv(gappy, target="y", missing="means")
    with pytest.raises(ValueError, match="no column 'sqare'; did you mean 'square'"):
        datasets.from_csv(gappy, target="y", features=["sqare"])
    with pytest.raises(ValueError, match="features must not name the target column 'y'"):
        datasets.from_csv(gappy, target="y", features=["row", "y"])
    with pytest.raises(ValueError, match="no feature column besides the target 'y'"):
        datasets.from_csv(gappy, target="y", features=[])
    spaced = tmp_path / "spaced.txt"
    spaced.write_text("a y\n1 2\n2 4\n3 6\n")
    assert datasets.load(str(spaced), target="y", delimiter=" ").feature_names == ("a",)
    spaced.write_bytes(b"a,y\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        datasets.from_csv(spaced, target="y")


# --- OpenML --------------------------------------------------------------------------------------

ARFF = b"""@RELATION flowers
@ATTRIBUTE width REAL
@ATTRIBUTE colour {red,blue}
@ATTRIBUTE id REAL
@ATTRIBUTE species {setosa,virginica}
@DATA
1.5,red,1,setosa
2.5,blue,2,virginica
?,red,3,setosa
4.5,blue,4,virginica
5.5,red,5,virginica
"""


class CannedOpenML(urllib.request.HTTPSHandler):
    """Answers as openml.org does for a data set of one ARFF file."""

    def https_open(self, request: urllib.request.Request) -> Any:
        columns = ["width", "colour", "id", "species"]
        features = [
            {
                "index": str(index),
                "name": name,
                "data_type": "nominal" if name in ("colour", "species") else "numeric",
                "is_target": str(name == "species").lower(),
                "is_ignore": "false",
                "is_row_identifier": str(name == "id").lower(),
                "number_of_missing_values": "0",
            }
            for index, name in enumerate(columns)
        ]
        description = {
            "id": "9",
            "name": "flowers",
            "version": "1",
            "format": "ARFF",
            "file_id": "77",
            "url": "https://www.openml.org/data/v1/download/77/flowers.arff",
            "status": "active",
            "description": "Flowers.",
            "md5_checksum": hashlib.md5(ARFF).hexdigest(),
        }
        found = [{"did": 9, "name": "flowers", "version": 1, "status": "active"}]
        answers = {
            "/data/list/": {"data": {"dataset": found}},
            "/data/features/": {"data_features": {"feature": features}},
            "/data/qualities/": {"data_qualities": {"quality": []}},
            "/json/data/9": {"data_set_description": description},
        }
        bodies = [json.dumps(v).encode() for k, v in answers.items() if k in request.full_url]
        body = ARFF if "/download/" in request.full_url else bodies[0]
        response = addinfourl(io.BytesIO(body), Message(), request.full_url, 200)
        response.msg = "OK"  # type: ignore[attr-defined]
        return response


@pytest.fixture
def canned_openml() -> Iterator[None]:
    urllib.request.install_opener(urllib.request.build_opener(CannedOpenML))
    yield
    urllib.request.install_opener(None)


def test_openml_from_the_wire_to_the_arrays(canned_openml: None, tmp_path: Path) -> None:
    data = datasets.openml(
        "flowers", version=1, missing="drop", data_home=tmp_path, standardise="none"
    )
    assert (data.name, data.task) == ("flowers", "classification")
    assert data.class_names == ("setosa", "virginica")
    assert data.feature_names == ("width", "colour=blue", "colour=red")
    ours = np.column_stack([data.x_train, data.y_train]).tolist()
    ours += np.column_stack([data.x_test, data.y_test]).tolist()
    assert sorted(ours) == [[1.5, 0, 1, 0], [2.5, 1, 0, 1], [4.5, 1, 0, 1], [5.5, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"set 'flowers' lacks values in 1 of 5.*'width' \(1\)"):
        datasets.load("openml", name="flowers", data_home=str(tmp_path))
    width = datasets.openml(
        "flowers", target="width", features=["colour"], missing="drop", data_home=tmp_path
    )
    assert (width.task, width.feature_names) == ("regression", ("colour=blue", "colour=red"))


def bunch(data: Any, target: Any) -> Bunch:
    names = [target.name] if isinstance(target, pd.Series) else ["several"]
    return Bunch(data=data, target=target, target_names=names)


def test_openml_passes_on_what_it_is_asked_and_explains_what_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def answer(result: Any) -> None:
        def fetch(**options: Any) -> Any:
            asked.update(options)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)

    frame = pd.DataFrame({"a": np.arange(6.0), "b": [True, False] * 3})
    target = pd.Series(pd.Categorical([str(i % 3 + 9) for i in range(6)]), name="class")
    answer(bunch(frame, target))
    data = datasets.openml("canned", version=3, data_home="somewhere")
    assert data.class_names == ("9", "10", "11")
    assert {k: asked[k] for k in ("name", "version", "data_home", "target_column")} == {
        "name": "canned",
        "version": 3,
        "data_home": "somewhere",
        "target_column": "default-target",
    }
    answer(bunch(frame, frame))
    with pytest.raises(ValueError, match=r"must have one target column.*pass target="):
        datasets.openml("canned")
    answer(bunch(frame, None))
    with pytest.raises(ValueError, match="must have one target column"):
        datasets.openml("canned")
    answer(URLError("no route"))
    with pytest.raises(ConnectionError, match=r"'canned' cannot be downloaded .*no route"):
        datasets.openml("canned")


def test_a_small_file_that_unpacks_to_a_large_one_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2**26
    packed = gzip.compress(b"0" * size, mtime=0)
    assert len(packed) < size / 500
    (tmp_path / "bomb.csv").write_bytes(packed)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((size // 8, 1)), y=np.zeros(3))
    monkeypatch.setattr("ntkdp._backend.memory.available_bytes", lambda: 2**22)
    for read in (
        lambda: datasets.from_csv(tmp_path / "bomb.csv", target="a"),
        lambda: datasets.from_idx(tmp_path / "bomb.csv", tmp_path / "bomb.csv"),
        lambda: datasets.from_npz(tmp_path / "bomb.npz"),
    ):
        tracemalloc.start()
        with pytest.raises(MemoryError, match=r"bomb\.(csv|npz)' takes .* a quarter of the memory"):
            read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size / 4


def test_a_large_plain_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "long.csv").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no disk
    monkeypatch.setattr("ntkdp._backend.memory.available_bytes", lambda: 2**30)
    with pytest.raises(MemoryError, match=r"long\.csv' takes 1,099,511,627,776 bytes or more"):
        datasets.from_csv(tmp_path / "long.csv", target="a")


def test_the_home_of_nobody_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'~no-such-user/x\.csv' does not exist"):
        datasets.from_csv("~no-such-user/x.csv", target="a")
