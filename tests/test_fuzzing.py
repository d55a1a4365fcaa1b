"""Fuzzing of everything that reads what it did not write: configurations, data, trajectories."""

import gzip
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st

from ntkdp import datasets, experiment, sweep
from ntkdp.experiment import ConfigError
from ntkdp.experiment._config import Config
from ntkdp.sweep._config import SweepConfig
from ntkdp.trajectory import Trajectory

LOADERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "experiment": (experiment.load_config, Config),
    "sweep": (sweep.load_config, SweepConfig),
}
LOADED = pytest.mark.parametrize("verb", LOADERS)

# ---------------------------------------------------------------------------- configurations

NUMBERS = st.integers() | st.floats(allow_subnormal=True)
LEAVES = (
    NUMBERS
    | st.booleans()
    | st.none()
    | st.text(max_size=8)
    | st.sampled_from(["abadi", "flat", "frozen", "relu", "mean", "digits", "float32", "accuracy"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def fields_of(kind: Any) -> list[str]:
    return list(kind.model_fields)


def trees(kind: Any) -> Any:
    """Trees near the schema: known names and sections more often than not, any values."""
    sections = {
        name: field.default
        for name, field in kind.model_fields.items()
        if hasattr(field.default, "model_fields_set")
    }
    near = {
        name: st.dictionaries(
            st.sampled_from(fields_of(type(default))) | st.text(max_size=4), VALUES, max_size=4
        )
        for name, default in sections.items()
    }
    names = st.sampled_from(fields_of(kind)) | st.text(max_size=4)
    pairs = names.flatmap(lambda name: st.tuples(st.just(name), near.get(name, VALUES)))
    return st.lists(pairs, max_size=5).map(dict)


def refused(make: Callable[[], Any], kind: Any) -> str | None:
    """None for a valid configuration; what the error says; nothing else is raised."""
    try:
        made = make()
    except ConfigError as error:
        return str(error)
    assert isinstance(made, kind)
    # What was accepted is accepted again, and is the same.
    assert kind.model_validate(made.model_dump()) == made
    return None


@LOADED
@examples(80, 300)
@given(data=st.data())
def test_trees_are_valid_or_the_field_is_named(verb: str, data: Any) -> None:
    kind = LOADERS[verb][1]
    module = {"experiment": experiment, "sweep": sweep}[verb]
    tree = data.draw(trees(kind))
    message = refused(lambda: module.config(**tree), kind)
    if message is not None:
        assert any(is_named(name, message) for name in tree)


def is_named(name: str, message: str) -> bool:
    """Whether an error is about the field, not counting the fields that it offers instead."""
    said = re.split("; (?:known|did you mean)", message)[0]
    shown = re.escape(repr(name)[1:-1])
    return re.search(rf"(?<!\w){shown}(?!\w)" if name else "''", said) is not None


def test_offers_and_parts_of_words_name_no_field() -> None:
    assert is_named("data", "data.n_train must be at least 1, got 0")
    assert is_named("", "unknown field ''; known: name")
    for name in ("", "n", "name", "seed"):
        assert not is_named(name, "unknown field 'naem'; did you mean 'name'? known: name, seed")


@LOADED
@examples(60, 200)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
@example(text="[data]\nn_train = 9" + "9" * 5000)
@example(text="x = " + "[" * 10_000)
@example(text="x = " + "{a = " * 3000)
@example(text="a.b.c.d = 1\na.b = 2")
@example(text=b"\xef\xbb\xbfseed = 1")
@example(text="seed = 1\x00")
@example(text='name = "\\ud800"')
def test_any_text_is_a_configuration_or_not(verb: str, text: str | bytes) -> None:
    load, kind = LOADERS[verb]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        assert refused(lambda: load(path), kind) != ""


@LOADED
@examples(60, 200)
@given(data=st.data())
def test_damaged_configurations_are_seen(verb: str, data: Any) -> None:
    load, kind = LOADERS[verb]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.toml"
        path.write_bytes(data.draw(damaged(documented(verb))))
        assert refused(lambda: load(path), kind) != ""


@cache
def documented(verb: str) -> bytes:
    name = {"experiment": "configuration.toml", "sweep": "sweep.toml"}[verb]
    return (Path(__file__).parent.parent / "docs" / name).read_bytes()


def damaged(whole: bytes) -> Any:
    """Cut short, with some bytes changed, or with a stretch left out, put in twice or foreign."""
    place = st.integers(0, len(whole) - 1)
    cut = place.map(lambda k: whole[:k])
    byte_at = st.tuples(place, st.integers(0, 255))
    flips = st.lists(byte_at, min_size=1, max_size=4).map(lambda changes: _changed(whole, changes))
    stretch = st.tuples(place, place).map(sorted)
    without = stretch.map(lambda ends: whole[: ends[0]] + whole[ends[1] :])
    twice = stretch.map(lambda ends: whole[: ends[1]] + whole[ends[0] :])
    foreign = st.tuples(place, st.binary(max_size=20)).map(
        lambda pair: whole[: pair[0]] + pair[1] + whole[pair[0] + len(pair[1]) :]
    )
    return cut | flips | without | twice | foreign


def _changed(whole: bytes, changes: list[tuple[int, int]]) -> bytes:
    content = bytearray(whole)
    for at, byte in changes:
        content[at] = byte
    return bytes(content)


# ---------------------------------------------------------------------------- data files


def _idx_file(array: np.ndarray) -> bytes:
    lengths = np.asarray(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


IMAGES = np.arange(6 * 2 * 3).reshape(6, 2, 3)
CLASSES = np.array([0, 1, 2, 0, 1, 2])
TABLE = b"size,colour,price\n1.5,red,2\n2.5,blue,3\n0.5,red,1\n4,green,7\n3,blue,5\n2,red,2.5\n"


def _npz_file(compressed: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.npz"
        save = np.savez_compressed if compressed else np.savez
        save(path, x=np.arange(12.0).reshape(6, 2), y=CLASSES)
        return path.read_bytes()


def _of_idx(folder: Path, content: bytes) -> Any:
    (folder / "labels.idx").write_bytes(_idx_file(CLASSES))
    path = folder / "images.idx"
    path.write_bytes(content)
    return datasets.from_idx(path, folder / "labels.idx")


def _of_npz(folder: Path, content: bytes) -> Any:
    (folder / "any.npz").write_bytes(content)
    return datasets.from_npz(folder / "any.npz")


def _of_csv(folder: Path, content: bytes) -> Any:
    (folder / "any.csv").write_bytes(content)
    return datasets.from_csv(folder / "any.csv", target="price")


READERS: dict[str, tuple[Callable[[Path, bytes], Any], bytes]] = {
    "idx": (_of_idx, _idx_file(IMAGES)),
    "idx.gz": (_of_idx, gzip.compress(_idx_file(IMAGES), mtime=0)),
    "npz": (_of_npz, _npz_file(False)),
    "compressed npz": (_of_npz, _npz_file(True)),
    "csv": (_of_csv, TABLE),
    "csv.gz": (_of_csv, gzip.compress(TABLE, mtime=0)),
}


def is_read_or_refused(read: Callable[[Path, bytes], Any], content: bytes) -> None:
    """Finite data of the shapes that were promised, or one of the documented errors."""
    with tempfile.TemporaryDirectory() as place:
        try:
            found = read(Path(place), content)
        except (ValueError, TypeError):
            return
    for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        assert len(x) == len(y) >= 1
        assert bool(jnp.all(jnp.isfinite(x)))
        assert bool(jnp.all(jnp.isfinite(y)))


@pytest.mark.parametrize("kind", READERS)
@examples(40, 150)
@given(data=st.data())
def test_damaged_data_are_read_or_refused(kind: str, data: Any) -> None:
    read, whole = READERS[kind]
    is_read_or_refused(read, data.draw(damaged(whole)))


@pytest.mark.parametrize("kind", ["idx", "npz", "csv"])
@examples(40, 150)
@given(content=st.binary(max_size=80))
@example(content=b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94(K\x01e.")
@example(content=b"price\n")
@example(content=b"price,price\n1,2\n3,4\n5,6")
@example(content=b"price,a\n" + b"1,1e400\n" * 3)
def test_any_bytes_are_read_or_refused(kind: str, content: bytes) -> None:
    is_read_or_refused(READERS[kind][0], content)


@pytest.mark.parametrize("kind", READERS)
def test_the_whole_files_are_read(kind: str, tmp_path: Path) -> None:
    read, whole = READERS[kind]
    found = read(tmp_path, whole)
    assert len(found.x_train) + len(found.x_test) == 6


def test_an_archive_of_a_later_zip_version_is_refused(tmp_path: Path) -> None:
    whole = bytearray(_npz_file(True))
    whole[whole.index(b"PK\x01\x02") + 6] = 64  # the version that is needed to read it, by ten
    path = tmp_path / "later.npz"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot be read \(zip file version 6.4"):
        datasets.from_npz(path)


class _Trap:
    """An object whose unpickling would be seen."""

    sprung = False

    def __reduce__(self) -> Any:
        return (_spring, ())


def _spring() -> None:
    _Trap.sprung = True


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "trap.npz"
    np.savez(path, x=np.array([_Trap(), _Trap()], dtype=object), y=np.array([0, 1]))
    with pytest.raises(ValueError, match="need no pickle"):
        datasets.from_npz(path)
    assert not _Trap.sprung
    np.load(path, allow_pickle=True)["x"]
    assert _Trap.sprung  # the trap works


# ---------------------------------------------------------------------------- trajectories


@cache
def trajectory_file() -> bytes:
    path = Trajectory(
        times=jnp.arange(4.0),
        loss=jnp.array([3.0, 2.0, 1.5, 1.25]),
        clip_fraction=jnp.array([1.0, 0.5, 0.5, 0.0]),
        steps=jnp.arange(4),
        outputs=jnp.arange(8.0).reshape(4, 2, 1),
    )
    with tempfile.TemporaryDirectory() as folder:
        path.save(Path(folder) / "whole.nc")
        return (Path(folder) / "whole.nc").read_bytes()


def is_loaded_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.nc"
        path.write_bytes(content)
        try:
            found = Trajectory.load(path)
        except (ValueError, TypeError):
            return
    assert found.loss.shape[-1] == found.times.shape[0]
    assert isinstance(found.message, str)


@examples(80, 300)
@given(data=st.data())
def test_damaged_trajectories_are_loaded_or_refused(data: Any) -> None:
    is_loaded_or_refused(data.draw(damaged(trajectory_file())))


@examples(40, 120)
@given(tail=st.binary(max_size=60))
def test_any_bytes_are_no_trajectory(tail: bytes) -> None:
    for head in (b"", b"\x89HDF\r\n\x1a\n", b"CDF\x02"):
        is_loaded_or_refused(head + tail)
