"""Losses: values and output gradients against SciPy, scikit-learn, optax and closed forms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.metrics
from helpers import known

from ntkdp import losses

N, K = 7, 3
RNG = np.random.default_rng(0)
OUTPUTS = 3 * RNG.normal(size=(N, K))
REAL = RNG.normal(size=(N, K))
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])
SOFT = RNG.dirichlet(np.ones(K), size=N)
BINARY = np.array([[0.0], [1.0], [1.0], [0.0], [1.0], [0.25], [0.0]])
DELTA = 1.3


def huber(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    return scipy.special.huber(DELTA, np.linalg.norm(f - y, axis=1))


def huber_gradient(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(f - y, axis=1, keepdims=True)
    return (f - y) * np.minimum(1, DELTA / distance)


def cross_entropy(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = np.eye(K)[y] if y.ndim == 1 else y
    return -np.sum(y * scipy.special.log_softmax(f, axis=1), axis=1)


def cross_entropy_gradient(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(f, axis=1) - (np.eye(K)[y] if y.ndim == 1 else y)


def logistic(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    by_row = y * scipy.special.log_expit(f) + (1 - y) * scipy.special.log_expit(-f)
    return -by_row[:, 0]


Case = tuple[losses.Loss, np.ndarray, np.ndarray, Callable[..., Any], Callable[..., Any]]
CASES: dict[str, Case] = {
    "squared": (
        losses.SquaredError(),
        OUTPUTS,
        REAL,
        lambda f, y: 0.5 * np.sum((f - y) ** 2, axis=1),
        lambda f, y: f - y,
    ),
    "huber": (losses.Huber(DELTA), OUTPUTS, REAL, huber, huber_gradient),
    "huber, small residuals": (
        losses.Huber(DELTA),
        REAL + 0.05 * OUTPUTS,
        REAL,
        huber,
        huber_gradient,
    ),
    "softmax, labels": (
        losses.SoftmaxCrossEntropy(),
        OUTPUTS,
        LABELS,
        cross_entropy,
        cross_entropy_gradient,
    ),
    "softmax, soft": (
        losses.SoftmaxCrossEntropy(),
        OUTPUTS,
        SOFT,
        cross_entropy,
        cross_entropy_gradient,
    ),
    "logistic": (
        losses.Logistic(),
        OUTPUTS[:, :1],
        BINARY,
        logistic,
        lambda f, y: scipy.special.expit(f) - y,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_scipys(case: str) -> None:
    loss, f, y, value, gradient = CASES[case]
    f_, y_ = jnp.asarray(f), jnp.asarray(y)
    np.testing.assert_allclose(loss(f_, y_), value(f, y), rtol=1e-13)
    a = loss.output_gradient(f_, y_)
    np.testing.assert_allclose(a, gradient(f, y), rtol=1e-12, atol=1e-14)
    by_autodiff = jax.grad(lambda f: jnp.sum(loss(f, y_)))(f_)
    np.testing.assert_allclose(a, by_autodiff, rtol=1e-12, atol=1e-14)
    step = 1e-5
    for k in range(f.shape[1]):
        direction = step * np.eye(f.shape[1])[k]
        numerical = (value(f + direction, y) - value(f - direction, y)) / (2 * step)
        np.testing.assert_allclose(a[:, k], numerical, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_jit_and_vmap_change_nothing(case: str) -> None:
    loss, outputs, targets, *_ = CASES[case]
    f, y = jnp.asarray(outputs), jnp.asarray(targets)
    np.testing.assert_allclose(jax.jit(lambda f, y: loss(f, y))(f, y), loss(f, y), rtol=1e-14)
    alone = jax.vmap(lambda f_i, y_i: loss.output_gradient(f_i[None], y_i[None])[0])(f, y)
    np.testing.assert_allclose(alone, loss.output_gradient(f, y), rtol=1e-13, atol=1e-15)


def test_means_are_scikit_learns() -> None:
    probabilities = scipy.special.softmax(OUTPUTS, axis=1)
    loss, accuracy = losses.mean_or_sum(
        losses.SoftmaxCrossEntropy(), jnp.asarray(OUTPUTS), jnp.asarray(LABELS), "mean"
    )
    np.testing.assert_allclose(loss, sklearn.metrics.log_loss(LABELS, probabilities), rtol=1e-12)
    predicted = OUTPUTS.argmax(axis=1)
    np.testing.assert_allclose(known(accuracy), sklearn.metrics.accuracy_score(LABELS, predicted))
    hard, f = np.round(BINARY), OUTPUTS[:, :1]
    loss, accuracy = losses.mean_or_sum(
        losses.Logistic(), jnp.asarray(f), jnp.asarray(hard), "mean"
    )
    expected = sklearn.metrics.log_loss(hard[:, 0], scipy.special.expit(f[:, 0]))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(known(accuracy), sklearn.metrics.accuracy_score(hard, f > 0))
    loss, accuracy = losses.mean_or_sum(
        losses.SquaredError(), jnp.asarray(OUTPUTS), jnp.asarray(REAL), "sum"
    )
    expected = sklearn.metrics.mean_squared_error(OUTPUTS, REAL) * N * K / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert accuracy is None


def test_one_output_huber_is_optaxs() -> None:
    f, y = jnp.asarray(OUTPUTS[:, :1]), jnp.asarray(REAL[:, :1])
    expected = optax.huber_loss(f, y, delta=DELTA)[:, 0]
    np.testing.assert_allclose(losses.Huber(DELTA)(f, y), expected, rtol=1e-13)
    norms = np.linalg.norm(losses.Huber(DELTA).output_gradient(f, y), axis=1)
    assert norms.max() <= DELTA * (1 + 1e-15)
    assert np.any(norms < DELTA)
    assert np.any(np.isclose(norms, DELTA))


def test_a_residual_of_zero_has_a_zero_gradient() -> None:
    f = jnp.ones((2, K))
    for loss in (losses.SquaredError(), losses.Huber(DELTA)):
        np.testing.assert_array_equal(loss.output_gradient(f, f), jnp.zeros((2, K)))
        jacobian = jax.jit(jax.jacobian(loss.output_gradient))(f, f)
        np.testing.assert_allclose(jacobian[0, :, 0], np.eye(K), atol=1e-15)


def test_labels_equal_one_hot_rows() -> None:
    loss, f = losses.SoftmaxCrossEntropy(), jnp.asarray(OUTPUTS)
    one_hot = jax.nn.one_hot(LABELS, K)
    for given in (LABELS, LABELS.astype(np.uint8), LABELS.astype(np.int32)):
        labels = loss.check(given, N, K)
        np.testing.assert_allclose(loss(f, labels), loss(f, one_hot), rtol=1e-14)
        difference = loss.output_gradient(f, labels) - loss.output_gradient(f, one_hot)
        np.testing.assert_allclose(difference, 0, atol=1e-15)
        np.testing.assert_array_equal(loss.correct(f, labels), loss.correct(f, one_hot))
    np.testing.assert_array_equal(loss.check(np.eye(K, dtype=int)[LABELS], N, K), one_hot)


def test_extreme_logits_stay_finite() -> None:
    f = jnp.array([[800.0, -800.0], [-800.0, 800.0]])
    y = jnp.array([0, 0])
    np.testing.assert_allclose(losses.SoftmaxCrossEntropy()(f, y), [0, 1600])
    np.testing.assert_allclose(
        losses.SoftmaxCrossEntropy().output_gradient(f, y), [[0, 0], [-1, 1]], atol=1e-300
    )
    y = jnp.array([[1.0], [1.0]])
    np.testing.assert_allclose(losses.Logistic()(f[:, :1], y), [0, 800], atol=1e-300)
    gradient = losses.Logistic().output_gradient(f[:, :1], y)
    np.testing.assert_allclose(gradient, [[0], [-1]], atol=1e-300)


def test_custom_loss_equals_a_built_in_one() -> None:
    f, y = jnp.asarray(OUTPUTS), jnp.asarray(REAL)
    custom, built_in = losses.Custom(lambda f, y: jnp.sum((f - y) ** 2) / 2), losses.SquaredError()
    np.testing.assert_allclose(custom(f, y), built_in(f, y), rtol=1e-14)
    np.testing.assert_allclose(
        custom.output_gradient(f, y), built_in.output_gradient(f, y), rtol=1e-14
    )
    custom = losses.Custom(lambda f, y: jax.nn.logsumexp(f) - f[y])
    labels = custom.check(LABELS, N, K)
    np.testing.assert_allclose(custom(f, labels), cross_entropy(OUTPUTS, LABELS), rtol=1e-13)
    as_any: losses.Loss = custom
    assert as_any.correct(f, labels) is None


@pytest.mark.parametrize("targets_dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("case", CASES)
def test_the_dtype_is_that_of_the_outputs(case: str, targets_dtype: str) -> None:
    loss, outputs, targets, *_ = CASES[case]
    f = jnp.asarray(outputs, jnp.float32)
    if targets.ndim == 2:
        first = (np.arange(targets.shape[1]) == 0) * np.ones((N, 1))
        targets = first.astype(targets_dtype)
    n, n_outputs = f.shape
    y = loss.check(targets, n, n_outputs)
    assert loss.output_gradient(f, y).dtype == jnp.float32
    correct = loss.correct(f, y)
    assert correct is None or correct.dtype == jnp.float32


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_good_as_its_digits(case: str) -> None:
    loss, f, y, value, gradient = CASES[case]
    f32 = jnp.asarray(f, jnp.float32)
    y32 = jnp.asarray(y, jnp.float32 if y.ndim == 2 else jnp.int32)
    assert loss(f32, y32).dtype == jnp.float32
    np.testing.assert_allclose(loss(f32, y32), value(f, y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss.output_gradient(f32, y32), gradient(f, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [losses.SquaredError(), losses.Huber(DELTA), losses.Logistic()], ids=repr
)
def test_targets_of_shape_n_are_a_column(loss: losses.Loss) -> None:
    f, y = jnp.asarray(OUTPUTS[:, :1]), jnp.asarray(np.round(BINARY[:, 0]))
    column = loss.check(y, N, 1)
    assert column.shape == (N, 1)
    np.testing.assert_array_equal(loss(f, y), loss(f, column))
    np.testing.assert_array_equal(loss.output_gradient(f, y), loss.output_gradient(f, column))


@pytest.mark.parametrize("loss", [losses.SquaredError(), losses.Huber(DELTA)], ids=repr)
@pytest.mark.parametrize(
    ("targets", "n_outputs", "match"),
    [
        (REAL[:-1], K, r"targets must have the shape of the outputs, \(7, 3\), got \(6, 3\)"),
        (REAL[:, 0], K, r"targets must have the shape of the outputs, \(7, 3\), got \(7,\)"),
        (REAL[:, 0], 2, r"\(7, 2\), got \(7,\)"),
        (np.where(REAL > 1, np.nan, REAL), K, r"targets must be finite, got \d+ NaN"),
        (np.full((N, K), np.inf), K, "targets must be finite, got 21 NaN or infinite"),
    ],
)
def test_bad_real_targets(loss: losses.Loss, targets: Any, n_outputs: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loss.check(targets, N, n_outputs)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (LABELS + 1, ValueError, r"targets must be labels in 0..2 .* from 1 to 3"),
        (LABELS - 1, ValueError, r"from -1 to 1"),
        (LABELS.astype(float), TypeError, "targets must be integer labels, got dtype float64"),
        (LABELS > 0, TypeError, "got dtype bool"),
        (LABELS[:-1], ValueError, r"labels of shape \(7,\) or \(7, 3\), got \(6,\)"),
        (SOFT[:, :2], ValueError, r"\(7, 3\), got \(7, 2\)"),
        (2 * SOFT, ValueError, "rows of targets must be non-negative and sum to 1"),
        (SOFT - np.array([1, -1, 0]), ValueError, "rows of targets must be non-negative"),
        (np.full((N, K), np.nan), ValueError, "targets must be finite, got 21"),
        (np.zeros((N, K, 1)), ValueError, r"got \(7, 3, 1\)"),
    ],
)
def test_bad_labels(targets: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        losses.SoftmaxCrossEntropy().check(targets, N, K)


def test_bad_numbers_of_outputs() -> None:
    with pytest.raises(ValueError, match="at least 2 outputs, got 1; for one output use Logistic"):
        losses.SoftmaxCrossEntropy().check(np.zeros(N, int), N, 1)
    with pytest.raises(ValueError, match="one output, got 3; use SoftmaxCrossEntropy"):
        losses.Logistic().check(BINARY, N, K)
    for targets in (2 * BINARY, BINARY - 0.5, 2 * BINARY - 1):
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\], got values from"):
            losses.Logistic().check(targets, N, 1)


def test_the_name_of_the_argument_is_in_the_message() -> None:
    with pytest.raises(ValueError, match="test_targets must be labels in"):
        losses.SoftmaxCrossEntropy().check(LABELS + 5, N, K, "test_targets")


def test_bad_custom_losses() -> None:
    with pytest.raises(ValueError, match="must map one sample's outputs and target to a scalar"):
        losses.Custom(lambda f, y: f - y).check(REAL, N, K)
    custom = losses.Custom(lambda f, y: jnp.sum(f - y))
    with pytest.raises(ValueError, match=r"targets must have 7 rows, .* got shape \(6, 3\)"):
        custom.check(REAL[:-1], N, K)
    with pytest.raises(ValueError, match="targets must be finite"):
        custom.check(np.full((N, K), np.nan), N, K)


@pytest.mark.parametrize("delta", [0.0, -1.0, np.nan, np.inf])
def test_bad_delta(delta: float) -> None:
    with pytest.raises(ValueError, match=f"delta must be positive and finite, got {delta}"):
        losses.Huber(delta)


def test_names() -> None:
    assert isinstance(losses.from_name("squared_error"), losses.SquaredError)
    assert isinstance(losses.from_name("softmax_cross_entropy"), losses.SoftmaxCrossEntropy)
    assert isinstance(losses.from_name("logistic"), losses.Logistic)
    huber = losses.from_name("huber", delta=2.0)
    assert isinstance(huber, losses.Huber)
    assert huber.delta == 2.0
    for name in losses.names():
        assert losses.name_of(losses.from_name(name)) == name
        assert isinstance(losses.from_name(name), losses.class_of(name))
    with pytest.raises(TypeError, match="loss must be one of huber, "):
        losses.name_of(losses.Custom(lambda f, y: f[0]))
    with pytest.raises(ValueError, match="unknown loss 'hubber'; did you mean 'huber'"):
        losses.from_name("hubber")


def test_what_counts_as_a_loss() -> None:
    loss = losses.SquaredError()
    assert losses.as_loss(loss) is loss
    assert isinstance(losses.as_loss(lambda f, y: jnp.sum(f)), losses.Custom)
    with pytest.raises(TypeError, match=r"loss must be one of ntkdp.losses, .* got <class"):
        losses.as_loss(losses.SquaredError)  # type: ignore[arg-type]


def test_second_derivatives_have_closed_forms() -> None:
    outputs = jax.random.normal(jax.random.key(0), (3, 4))
    p = np.asarray(jax.nn.softmax(outputs))
    softmax = losses.SoftmaxCrossEntropy().output_hessian(outputs, jnp.array([0, 3, 1]))
    expected = p[:, :, None] * np.eye(4) - p[:, :, None] * p[:, None]
    np.testing.assert_allclose(softmax, expected, rtol=1e-12, atol=1e-15)
    squared = losses.SquaredError().output_hessian(outputs, jnp.zeros((3, 4)))
    np.testing.assert_array_equal(squared, np.tile(np.eye(4), (3, 1, 1)))
