"""A data set: samples split into a training and a test part, and standardised."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, final

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Num, Real

from ntkdp._backend.types import Array
from ntkdp._backend.validate import choice, count, finite

Task = Literal["classification", "regression"]

TASKS = ("classification", "regression")
STANDARDISATIONS = ("feature", "unit", "none")


class Split(TypedDict, total=False):
    """How every loader splits and standardises: see :func:`from_arrays`."""

    n_train: int | None
    n_test: int | None
    seed: int
    standardise: str | None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    r"""A training part and a test part that shares no sample with it.

    Attributes
    ----------
    name : str
    x_train, x_test : array
        Inputs, ``(n, ...)`` and ``(m, ...)``, in JAX's default floating type (float64 when x64
        is on), or whole numbers such as tokens in its default integer type.
    y_train, y_test : array
        Classification: integer labels ``(n,)`` in 0..K-1. Regression: real targets ``(n, 1)``.
    task : "classification" or "regression"
    n_outputs : int
        K: the number of classes in the whole data set, or 1 for regression.
    class_names : tuple of str, or None for regression
        ``class_names[label]`` is the label as the source wrote it.
    feature_names : tuple of str, or None where the source names none
    groups_train, groups_test : array of str, or None
        The subgroup that each sample is in, ``(n,)`` and ``(m,)``, where the source says so.
    target_mean, target_scale : float
        Regression targets are :math:`(y - \text{mean}) / \text{scale}` of the source's y, by the
        mean and the standard deviation of the training part; 0 and 1 where nothing was done.

    Examples
    --------
    >>> from ntkdp.datasets import digits
    >>> data = digits(n_train=100, n_test=50)
    >>> data.x_train.shape, data.y_test.shape, data.n_outputs
    ((100, 64), (50,), 10)
    """

    name: str
    x_train: Real[Array, " n *features"] = field(repr=False)
    y_train: Num[Array, " n *K"] = field(repr=False)
    x_test: Real[Array, " m *features"] = field(repr=False)
    y_test: Num[Array, " m *K"] = field(repr=False)
    task: Task
    n_outputs: int
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = field(default=None, repr=False)
    groups_train: np.ndarray | None = field(default=None, repr=False)
    groups_test: np.ndarray | None = field(default=None, repr=False)
    target_mean: float = 0.0
    target_scale: float = 1.0

    def original_targets(self, y: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
        """Regression targets or outputs of any shape, back in the units of the source.

        Raises
        ------
        ValueError
            If the task is classification.

        Examples
        --------
        >>> from ntkdp.datasets import diabetes
        >>> data = diabetes()
        >>> bool(data.original_targets(data.y_train).min() >= 25.0 - 1e-3)
        True
        """
        if self.task != "regression":
            raise ValueError(
                f"original_targets undoes the scaling of regression targets; task is {self.task!r}"
            )
        return y * self.target_scale + self.target_mean


def from_arrays(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    name: str = "arrays",
    task: str | None = None,
    class_names: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    groups: npt.ArrayLike | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    standardise: str | None = None,
) -> Dataset:
    r"""A data set of arrays in memory, split by ``seed`` and standardised.

    Parameters
    ----------
    x : array (n, ...)
        Real inputs.
    y : array (n,) or (n, 1)
        Labels (whole numbers or text, any values: they become 0..K-1 in sorted order, numerals
        by their value) or real targets.
    name : str
        What the data set is called.
    task : "classification", "regression" or None
        None: real numbers mean regression; whole numbers, booleans and text mean classification.
    class_names : sequence of K str, optional
        With it, ``y`` must already be in 0..K-1. Default: the labels as text.
    feature_names : sequence of str, optional
        What the inputs are, one name for each column.
    groups : array (n,), optional
        Labels of subgroups, numbers or text, by which results may be shown. They are no inputs.
    n_train, n_test : int, optional
        Sizes of the parts. One alone leaves all other samples to the other part; without both a
        fifth of the samples, rounded down, is the test part.
    seed : int
        Permutes the samples (NumPy's ``default_rng``). The test part depends on ``seed`` and
        ``n_test`` alone, and a smaller training part is the beginning of a larger one. The parts
        share no row of the source; a row that the source holds twice may be in both.
    standardise : "feature", "unit", "none" or None
        None means ``"feature"``, but is refused if x holds whole numbers: tokens and other labels
        need ``"none"``, and measurements one of the others.

        - ``"feature"``: every feature has mean 0 and standard deviation 1 (divisor n) over the
          training part, and the test part is shifted and scaled by the same numbers; a feature that
          is constant over the training part is 0 in both.
        - ``"unit"``: every sample is scaled to norm :math:`\sqrt d`, d its number of entries, so
          that :math:`\lVert x \rVert^2 / d = 1`; a sample of zeros stays.
        - ``"none"``: inputs and targets are left as they are, and whole numbers stay whole.

        The first two also give regression targets mean 0 and standard deviation 1 over the training
        part (`Dataset.original_targets` undoes it); constant training targets are only shifted.

    Returns
    -------
    Dataset
        The two parts, and what is known of them.

    Raises
    ------
    ValueError
        If x holds whole numbers and ``standardise`` does not say what they are, or they exceed
        JAX's default integer type; if arrays are empty, ragged or of unequal length, hold NaN or
        inf (it says how many in which features), hold a single class or labels that are not whole,
        or have fewer samples than asked for; if a name is unknown or ``seed`` negative.
    TypeError
        If an array is not numeric, or a size or ``seed`` is not a whole number.

    Examples
    --------
    >>> data = from_arrays([[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"], n_train=2)
    >>> data.class_names, data.task
    (('no', 'yes'), 'classification')
    """
    split = Split(n_train=n_train, n_test=n_test, seed=seed, standardise=standardise)
    return build(x, y, name, task, class_names, feature_names, impute=False, groups=groups, **split)


def build(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    name: str,
    task: str | None,
    class_names: Sequence[str] | None,
    feature_names: Sequence[str] | None,
    *,
    impute: bool,
    groups: npt.ArrayLike | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    standardise: str | None = None,
) -> Dataset:
    """:func:`from_arrays`, which with ``impute`` fills NaN by means over the training part."""
    seed = count(0, seed=seed)
    x, y = _real(x, "x"), _array(y, "y")
    standardise = _checked_standardisation(standardise, x)
    if task is None:
        task = "regression" if y.dtype.kind == "f" else "classification"
    choice(TASKS, task=task)
    y = _vector(y, task)
    _check_inputs(x, len(y), feature_names, impute)
    labels = None if groups is None else _subgroups(groups, len(x))
    if task == "regression":
        y, class_names = _real(y, "y"), None
    elif class_names is None:
        y, class_names = _encode_labels(y)
    else:
        y = _check_labels(y, len(class_names))

    train_size, test_size = _part_sizes(len(x), n_train, n_test)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:train_size], order[len(x) - test_size :]
    x_train, x_test = x[train], x[test]
    if x.dtype.kind not in "iu" or standardise != "none":
        x_train, x_test = x_train.astype(np.float64), x_test.astype(np.float64)
    if impute:
        _fill_means(x_train, x_test, feature_names)
    x_train, x_test = _standardise_inputs(x_train, x_test, standardise)

    mean, scale = 0.0, 1.0
    if task == "regression":
        y = y.astype(np.float64)[:, None]
        if standardise != "none":
            mean, scale = float(y[train].mean()), float(y[train].std()) or 1.0
            y = (y - mean) / scale
    return Dataset(
        name=name,
        x_train=_inputs(x_train=x_train),
        y_train=_default_float(y_train=y[train]) if task == "regression" else _label(y[train]),
        x_test=_inputs(x_test=x_test),
        y_test=_default_float(y_test=y[test]) if task == "regression" else _label(y[test]),
        task="regression" if task == "regression" else "classification",
        n_outputs=1 if class_names is None else len(class_names),
        class_names=None if class_names is None else tuple(class_names),
        feature_names=None if feature_names is None else tuple(feature_names),
        groups_train=None if labels is None else labels[train],
        groups_test=None if labels is None else labels[test],
        target_mean=mean,
        target_scale=scale,
    )


def _subgroups(groups: npt.ArrayLike, n_samples: int) -> np.ndarray:
    """Labels of subgroups as text, one for each sample."""
    labels = _array(groups, "groups")
    if labels.shape != (n_samples,):
        raise ValueError(
            f"groups must have shape ({n_samples},), one label for each sample, got {labels.shape}"
        )
    return np.asarray([str(label) for label in labels.tolist()])


def _label(y: np.ndarray) -> Array:
    return jnp.asarray(y, dtype=int)


def _inputs(**named: np.ndarray) -> Array:
    ((name, array),) = named.items()
    if array.dtype.kind not in "iu":
        return _default_float(**named)
    limits = jnp.iinfo(jnp.asarray(0).dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise ValueError(
            f"{name} must fit in {limits.dtype}, got whole numbers from {array.min()} to "
            f"{array.max()}; renumber them, or pass real numbers"
        )
    return jnp.asarray(array, dtype=limits.dtype)


def _default_float(**named: np.ndarray) -> Array:
    ((name, array),) = named.items()
    # Numbers beyond float32's range become inf, and raise below rather than warn.
    with np.errstate(over="ignore"):
        converted = jnp.asarray(array, dtype=float)
    return finite(**{name: converted})


def data_generator(seed: int) -> np.random.Generator:
    """The stream that draws synthetic data, independent of the one that splits them."""
    return np.random.default_rng([count(0, seed=seed), 1])


def _checked_standardisation(standardise: str | None, x: np.ndarray) -> str:
    if standardise is not None:
        choice(STANDARDISATIONS, standardise=standardise)
    elif x.dtype.kind in "iu":
        raise ValueError(
            f"x holds whole numbers ({x.dtype}), which may be tokens: pass standardise='none' to "
            "keep them as they are, or 'feature' or 'unit' to scale them as measurements"
        )
    return "feature" if standardise is None else standardise


def _array(array: npt.ArrayLike, argument: str) -> np.ndarray:
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{argument} must be an array, got rows of unequal length") from error


def _real(array: npt.ArrayLike, argument: str) -> np.ndarray:
    numbers = _array(array, argument)
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must be real numbers, got an array of {numbers.dtype}")
    return numbers


def _feature_label(j: int, feature_names: Sequence[str] | None) -> str:
    return str(j) if feature_names is None else repr(feature_names[j])


def _describe_bad(bad: np.ndarray, feature_names: Sequence[str] | None, shown: int = 5) -> str:
    counts = {int(j): int(bad[:, j].sum()) for j in np.flatnonzero(bad.any(axis=0))}
    listed = [f"{_feature_label(j, feature_names)} ({k})" for j, k in counts.items()]
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" * (len(listed) > shown))


def _check_inputs(
    x: np.ndarray, n_labels: int, feature_names: Sequence[str] | None, impute: bool
) -> None:
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"x must be a non-empty array (n, ...) of samples by features, got shape {x.shape}; "
            "a single feature has shape (n, 1)"
        )
    if len(x) != n_labels:
        raise ValueError(f"x and y must be of equal length, got {len(x)} and {n_labels} samples")
    flat = x.reshape(len(x), -1)
    if feature_names is not None and len(feature_names) != flat.shape[1]:
        raise ValueError(
            f"feature_names must name {flat.shape[1]} features, got {len(feature_names)}"
        )
    if x.dtype.kind == "f":
        bad = np.isinf(flat) if impute else ~np.isfinite(flat)
        if bad.any():
            raise ValueError(
                f"x must be finite, got {bad.sum()} NaN or infinite of {x.size} entries, in "
                f"features {_describe_bad(bad, feature_names)}; remove or impute them first"
            )


def _vector(y: np.ndarray, task: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        hint = "; labels of one-hot rows are y.argmax(axis=1)" if task == "classification" else ""
        raise ValueError(f"y must have shape (n,) or (n, 1), got {y.shape}{hint}")
    if y.dtype.kind == "f" and not np.all(np.isfinite(y)):
        bad = np.count_nonzero(~np.isfinite(y))
        raise ValueError(f"y must be finite, got {bad} NaN or infinite of {y.size} entries")
    return y


def _encode_labels(y: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    if y.dtype.kind == "O" and all(isinstance(value, str) for value in y):
        y = y.astype(str)
    if y.dtype.kind == "f":
        fractional = (y != np.floor(y)) | (np.abs(y) > 2**53)
        if fractional.any():
            raise ValueError(
                f"labels y must be whole numbers or text, got {y[fractional][0]}; real targets "
                "need task='regression'"
            )
        y = y.astype(np.int64)
    if y.dtype.kind not in "biuU":
        raise TypeError(f"labels y must be whole numbers or text, got an array of {y.dtype}")
    values, labels = np.unique(y, return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"labels y must hold two classes or more, got only {values.tolist()!r}")
    if y.dtype.kind == "U" and np.all(np.char.isdecimal(values)):
        order = np.argsort([int(value) for value in values], kind="stable")  # "10" after "9"
        values, labels = values[order], np.argsort(order)[labels]
    return labels, tuple(str(value) for value in values)


def _check_labels(y: np.ndarray, n_classes: int) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= n_classes:
        raise ValueError(
            f"with {n_classes} class_names labels y must be whole numbers in 0..{n_classes - 1}, "
            f"got {y.dtype} in [{y.min()}, {y.max()}]"
        )
    return y


def _part_sizes(n: int, n_train: int | None, n_test: int | None) -> tuple[int, int]:
    test = None if n_test is None else count(n_test=n_test)
    train = None if n_train is None else count(n_train=n_train)
    if train is None:
        test = max(1, n // 5) if test is None else test
        train = n - test
    elif test is None:
        test = n - train
    if train < 1 or test < 1 or train + test > n:
        raise ValueError(
            f"{n_train=} and {n_test=} do not fit: there are {n} samples, and each part needs one "
            "or more"
        )
    return train, test


def _fill_means(train: np.ndarray, test: np.ndarray, feature_names: Sequence[str] | None) -> None:
    present = ~np.isnan(train)
    empty = np.flatnonzero(~present.any(axis=0))
    if empty.size:
        raise ValueError(
            "missing='mean' needs a value in every column of the training part, got none in "
            f"{', '.join(_feature_label(j, feature_names) for j in empty.tolist())}; leave them "
            "out with features="
        )
    means = np.nanmean(train, axis=0)
    for part in (train, test):
        np.copyto(part, means, where=np.isnan(part))


def _standardise_inputs(
    train: np.ndarray, test: np.ndarray, how: str
) -> tuple[np.ndarray, np.ndarray]:
    if how == "feature":
        # Relative to the largest entry first: squares may be beyond the range of the dtype.
        largest = np.max(np.abs(train), axis=0)
        unit = np.where(largest == 0, 1.0, largest)
        train, test = train / unit, test / unit
        constant = np.ptp(train, axis=0) == 0
        mean = train.mean(axis=0)
        scale = np.where(constant, 1.0, train.std(axis=0))

        def standardised(part: np.ndarray) -> np.ndarray:
            return np.where(constant, 0.0, (part - mean) / scale)

    elif how == "unit":
        axes = tuple(range(1, train.ndim))

        def standardised(part: np.ndarray) -> np.ndarray:
            # Relative to the largest entry first: squares may be beyond the range of the dtype.
            largest = np.max(np.abs(part), axis=axes, keepdims=True)
            part = part / np.where(largest == 0, 1.0, largest)
            norms = np.sqrt(np.sum(part**2, axis=axes, keepdims=True))
            scaled: np.ndarray = part * np.sqrt(part[0].size) / np.where(norms == 0, 1.0, norms)
            return scaled

    else:
        return train, test
    return standardised(train), standardised(test)
