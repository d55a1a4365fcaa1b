"""Labels of subgroups follow their samples through splits, gaps and files."""

from pathlib import Path

import numpy as np
import pytest

from ntkdp import datasets

ROWS = 12
NAMES = np.array(["north" if i % 3 else "south" for i in range(ROWS)])


def test_labels_follow_their_samples() -> None:
    x = np.arange(float(ROWS))[:, None]
    data = datasets.from_arrays(x, x[:, 0], groups=NAMES, n_train=8, standardise="none", seed=3)
    for inputs, labels in (
        (data.x_train, data.groups_train),
        (data.x_test, data.groups_test),
    ):
        assert labels is not None
        assert labels.tolist() == NAMES[np.asarray(inputs)[:, 0].astype(int)].tolist()
    numbers = datasets.from_arrays(x, x[:, 0], groups=np.arange(ROWS) % 2)
    assert numbers.groups_test is not None
    assert set(numbers.groups_test.tolist()) <= {"0", "1"}
    assert datasets.from_arrays(x, x[:, 0]).groups_train is None
    with pytest.raises(ValueError, match=r"groups must have shape \(12,\)"):
        datasets.from_arrays(x, x[:, 0], groups=["a"])


def test_a_column_of_a_table_is_no_feature(tmp_path: Path) -> None:
    lines = [f"{i}.5,{'' if i == 4 else NAMES[i]},{'' if i == 7 else i}" for i in range(ROWS)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["a,where,y", *lines]))
    data = datasets.load(
        str(path), target="y", groups="where", missing="drop", n_test=3, standardise="none"
    )
    assert data.feature_names == ("a",)
    for inputs, labels in ((data.x_train, data.groups_train), (data.x_test, data.groups_test)):
        assert labels is not None
        rows = np.asarray(inputs)[:, 0].astype(int)
        assert 7 not in rows
        expected = ["missing" if i == 4 else NAMES[i] for i in rows]
        assert labels.tolist() == expected
    with_it = datasets.from_csv(
        path, target="y", features=["a", "where"], groups="where", missing="drop"
    )
    assert with_it.feature_names == ("a", "where=north", "where=south")
    with pytest.raises(ValueError, match="has no column 'were'; did you mean 'where'"):
        datasets.from_csv(path, target="y", groups="were")


def test_an_array_of_an_archive(tmp_path: Path) -> None:
    x = np.arange(float(ROWS))[:, None]
    np.savez(tmp_path / "data.npz", x=x, y=x[:, 0], who=NAMES)
    data = datasets.from_npz(tmp_path / "data.npz", groups="who", standardise="none")
    assert data.groups_train is not None
    assert data.groups_train.tolist() == NAMES[np.asarray(data.x_train)[:, 0].astype(int)].tolist()
