r"""Recalibration on held-out data: temperature and Platt scaling, plain and differentially private.

Logits are ``(n, K)`` of a softmax, or ``(n,)`` or ``(n, 1)`` of a sigmoid; labels are whole numbers
in ``0 .. K-1`` (one logit: 0 or 1). The fit minimises the mean negative log-likelihood of labels
that the network was not trained on.
"""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import clipping, losses
from ntkdp._backend import norms as _norms
from ntkdp._backend import validate
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    PRNGKeyArray,
    ScalarLike,
    as_constant,
    is_traced,
)

#: Where the likelihood has lost all but this share of its curvature, it has no maximum.
_FLAT = 1e-7

#: ``scaled(theta, logits)``, the logits scaled by parameters.
_Scaled: TypeAlias = Callable[[Array, Array], Array]
_Number: TypeAlias = np.ndarray | Array


class Temperature(eqx.Module):
    """Temperature scaling, ``logits / temperature``: another confidence, the same top label.

    Parameters
    ----------
    temperature : float
        Positive; above 1 for an over-confident network.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.calibration.Temperature(2.0)(jnp.array([4.0, -2.0])).tolist()
    [2.0, -1.0]
    """

    temperature: ScalarLike = eqx.field(converter=lambda T: _checked_temperature(T))

    def __call__(self, logits: ArrayLike) -> Array:
        logits = _floating(logits)
        return logits / jnp.asarray(self.temperature, logits.dtype)


class Platt(eqx.Module):
    """Platt scaling, ``logits * scale + shift``, a pair of numbers for each class.

    For one logit it is Platt's sigmoid; for K classes, vector scaling, which can change the top
    label.

    Parameters
    ----------
    scale, shift : array
        ``(K,)``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.calibration.Platt(jnp.array([2.0]), jnp.array([1.0]))(jnp.array([[3.0]])).tolist()
    [[7.0]]
    """

    scale: Float[Array, " K"] = eqx.field(converter=lambda v: _checked_column(scale=v))
    shift: Float[Array, " K"] = eqx.field(converter=lambda v: _checked_column(shift=v))

    def __call__(self, logits: ArrayLike) -> Array:
        logits = _floating(logits)
        return logits * self.scale.astype(logits.dtype) + self.shift.astype(logits.dtype)


def _checked_temperature(T: ScalarLike) -> _Number:
    number: _Number = as_constant(validate.positive_number(temperature=T))
    return number


def _checked_column(**named: ArrayLike) -> Array:
    ((name, value),) = named.items()
    column: Array = validate.finite(**{name: _floating(value, name)})
    if column.ndim != 1:
        raise ValueError(
            f"{name} must have shape (K,), a number for each class, got {column.shape}"
        )
    return column


def _floating(logits: ArrayLike, name: str = "logits") -> Array:
    array = validate.array(**{name: logits})
    is_floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array if is_floating else array.astype(jnp.result_type(float))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> Temperature:
    r"""The temperature of the largest likelihood on held-out data.

    With :math:`\beta = 1/T` the negative log-likelihood is convex; the fit is the root of its
    derivative, :math:`\tfrac1n \sum_i \langle f_i, p_i(\beta) - y_i \rangle`.

    Parameters
    ----------
    logits : array
        ``(n, K)``, or ``(n,)`` or ``(n, 1)`` for one logit.
    labels : array of int
        ``(n,)``.

    Returns
    -------
    Temperature

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, logits are NaN or infinite, or labels are no classes; or if no finite
        positive temperature is best, because every label is predicted (0 would be best) or because
        the logits predict the labels no better than equal ones (infinity would be best).

    Notes
    -----
    Guo et al., *On Calibration of Modern Neural Networks*, 2017. By SciPy in float64; not under
    ``jit``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> logits, labels = jnp.full(4, 2.0), jnp.array([1, 1, 1, 0])  # sigmoid(2 / T) = 3/4
    >>> T = ntkdp.calibration.fit_temperature(logits, labels).temperature
    >>> round(float(2 / T), 4) == round(float(jnp.log(3.0)), 4)
    True
    """
    from scipy.optimize import root_scalar

    f, y = _fittable(logits, labels)
    label_logits = np.sum(f * y, axis=1)
    best = np.maximum(f[:, 0], 0) if f.shape[1] == 1 else np.max(f, axis=1)

    def slope(beta: float) -> float:
        return float(np.mean(np.sum(f * _probabilities(beta * f), axis=1) - label_logits))

    if slope(0.0) >= 0:
        raise ValueError(
            "logits must predict the labels better than equal ones for a temperature to be fitted, "
            "which would be infinite or negative; check that logits and labels belong together"
        )
    if np.all(label_logits == best):
        raise ValueError(
            "labels must not all be predicted right for a temperature to be fitted, which would "
            "be 0; take more held-out data"
        )
    above = 1 / float(np.max(np.abs(f)))
    while slope(above) < 0:
        above *= 2
    beta = root_scalar(slope, bracket=(0.0, above), xtol=1e-15 * above).root
    return Temperature(1 / beta)


def fit_platt(logits: ArrayLike, labels: ArrayLike) -> Platt:
    r"""Scales and shifts of the largest likelihood on held-out data.

    The negative log-likelihood of :math:`s \circ f_i + b` is convex in s and b. It does not depend
    on some directions, such as a shift of all logits of a softmax; along these, s = 1 and b = 0 are
    kept.

    Parameters
    ----------
    logits, labels : array
        As for :func:`fit_temperature`.

    Returns
    -------
    Platt

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, logits are NaN or infinite, or labels are no classes; or if there is
        no maximum, because a class is missing or scaled logits separate one from the others.

    Notes
    -----
    Platt, *Probabilistic Outputs for Support Vector Machines*, 1999 (here without his smoothing of
    the labels); vector scaling: Guo et al., 2017. By SciPy in float64; not under ``jit``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> logits, labels = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0]), jnp.array([1, 1, 0, 0, 1])
    >>> platt = ntkdp.calibration.fit_platt(logits, labels)  # shares of 2/3 at 1, 1/2 at -1
    >>> p = 1 / (1 + jnp.exp(-platt(jnp.array([1.0, -1.0]))))
    >>> [round(v, 4) for v in p.tolist()]
    [0.6667, 0.5]
    """
    from scipy.linalg import block_diag
    from scipy.optimize import minimize

    f, y = _fittable(logits, labels)
    n, K = f.shape
    unit = float(np.max(np.abs(f))) or 1.0
    # Scale and shift of one class are a row of theta: features (f, 1) times the row.
    features = np.stack([f / unit, np.ones_like(f)], axis=-1)
    start = np.tile([unit, 0.0], (K, 1))

    def gradient(theta: np.ndarray) -> np.ndarray:
        residual = _probabilities(np.sum(features * theta, axis=-1)) - y
        slope: np.ndarray = np.einsum("nk,nka->ka", residual, features).ravel() / n
        return slope

    def curvature(theta: np.ndarray) -> np.ndarray:
        p = _probabilities(np.sum(features * theta, axis=-1))
        own = np.einsum("nk,nka,nkb->kab", p, features, features) / n
        weighted = (p[..., None] * features).reshape(n, 2 * K)
        hessian: np.ndarray = block_diag(*own) - weighted.T @ weighted / n
        return hessian

    # Coordinates z in which the curvature at theta = 0 is the identity; directions that the
    # likelihood does not depend on have no coordinate.
    values, vectors = np.linalg.eigh(curvature(np.zeros_like(start)))
    there = values > 1e-12 * values[-1]
    basis = vectors[:, there] / np.sqrt(values[there])

    def theta_of(z: np.ndarray) -> np.ndarray:
        moved: np.ndarray = start + (basis @ z).reshape(K, 2)
        return moved

    def curvature_in_z(z: np.ndarray) -> np.ndarray:
        hessian: np.ndarray = basis.T @ curvature(theta_of(z)) @ basis
        return hessian

    z = minimize(
        lambda z: np.mean(_losses(np.sum(features * theta_of(z), axis=-1), y)),
        np.zeros(basis.shape[1]),
        jac=lambda z: basis.T @ gradient(theta_of(z)),
        hess=curvature_in_z,
        method="trust-exact",
        options={"gtol": 1e-9},
    ).x
    if np.linalg.eigvalsh(curvature_in_z(z))[0] < _FLAT:
        raise ValueError(
            "labels must leave the likelihood a maximum, got none: a class is missing, or scaled "
            "logits separate one from the others; take more held-out data, or fit a temperature"
        )
    scale, shift = theta_of(z).T
    return Platt(jnp.asarray(scale / unit), jnp.asarray(shift))


def fit_temperature_privately(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_multiplier: ScalarLike,
    clip_norm: ScalarLike,
    steps: int,
    learning_rate: ScalarLike,
    key: PRNGKeyArray,
) -> Temperature:
    r"""A temperature by noisy clipped gradient descent on held-out data.

    Full batches, in :math:`\theta = \ln T` from 0:
    :math:`\theta^+ = \theta - \tfrac\eta n (\sum_i C_i g_i + \sigma R z)`, :math:`z \sim N(0, 1)`,
    with Abadi's factors :math:`C_i = \min(1, R / |g_i|)`, and 0 where :math:`|g_i|` is not finite.

    **Privacy**: the fit costs as much as ``steps`` Gaussian mechanisms with this noise multiplier
    on the held-out set (sampling rate 1; samples added or removed; n public). The privacy that the
    training of the network spent on its own data is not included. The network must not have seen
    the held-out set.

    Parameters
    ----------
    logits, labels : array
        As for :func:`fit_temperature`.
    noise_multiplier : float
        :math:`\sigma`, the noise of the summed gradient in units of ``clip_norm``; 0 is not
        private.
    clip_norm : float
        R, in units of a per-sample gradient :math:`|\langle p_i - y_i, f_i \rangle| / T`.
    steps : int
        At least 1.
    learning_rate : float
        :math:`\eta`, of the mean loss.
    key : PRNG key

    Returns
    -------
    Temperature

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, logits are NaN or infinite, labels are no classes, the noise
        multiplier is below 0, the clipping norm or learning rate is not positive, or steps are
        below 1.

    Notes
    -----
    Temperature scaling by DP-SGD: Zhang, Li, Sen, Roukos, Hashimoto, *A Closer Look at the
    Calibration of Differentially Private Learners*, arXiv 2210.08248; full batches and
    :math:`\ln T` are choices made here.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> scaling = ntkdp.calibration.fit_temperature_privately(
    ...     jnp.full(4, 2.0), jnp.array([1, 1, 1, 0]), noise_multiplier=0.0, clip_norm=10.0,
    ...     steps=200, learning_rate=1.0, key=jax.random.key(0))
    >>> round(float(2 / scaling.temperature), 4) == round(float(jnp.log(3.0)), 4)
    True
    """
    f, y, loss = _checked(logits, labels)
    theta = _descend(
        _cooled, jnp.zeros((), f.dtype), f, y, loss,
        noise_multiplier, clip_norm, steps, learning_rate, key,
    )  # fmt: skip
    return Temperature(jnp.exp(theta))


def fit_platt_privately(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    noise_multiplier: ScalarLike,
    clip_norm: ScalarLike,
    steps: int,
    learning_rate: ScalarLike,
    key: PRNGKeyArray,
) -> Platt:
    r"""Scales and shifts by noisy clipped gradient descent on held-out data.

    Full batches, scales and shifts together as one vector :math:`\theta`, from 1 and 0; the step,
    the privacy, the parameters and the errors are those of :func:`fit_temperature_privately`, with
    :math:`z \sim N(0, I)` and :math:`\|g_i\|^2 = \sum_k (p_{ik} - y_{ik})^2 (f_{ik}^2 + 1)`.

    Returns
    -------
    Platt

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> platt = ntkdp.calibration.fit_platt_privately(
    ...     jnp.array([1.0, 1.0, 1.0, -1.0, -1.0]), jnp.array([1, 1, 0, 0, 1]),
    ...     noise_multiplier=0.0, clip_norm=10.0, steps=200, learning_rate=2.0,
    ...     key=jax.random.key(0))
    >>> p = 1 / (1 + jnp.exp(-platt(jnp.array([1.0, -1.0]))))
    >>> [round(v, 4) for v in p.tolist()]
    [0.6667, 0.5]
    """
    f, y, loss = _checked(logits, labels)
    K = f.shape[1]
    start = jnp.stack([jnp.ones(K, f.dtype), jnp.zeros(K, f.dtype)])
    scale, shift = _descend(
        _scaled, start, f, y, loss,
        noise_multiplier, clip_norm, steps, learning_rate, key,
    )  # fmt: skip
    return Platt(scale, shift)


def _cooled(theta: Array, logits: Array) -> Array:
    cooled: Array = logits * jnp.exp(-theta)
    return cooled


def _scaled(theta: Array, logits: Array) -> Array:
    scale, shift = theta[:, None]
    moved: Array = logits * scale + shift
    return moved


def _descend(
    scaled: _Scaled,
    theta: Array,
    logits: Array,
    labels: Array,
    loss: losses.Loss,
    noise_multiplier: ScalarLike,
    clip_norm: ScalarLike,
    steps: int,
    learning_rate: ScalarLike,
    key: PRNGKeyArray,
) -> Array:
    noise_multiplier = validate.non_negative(noise_multiplier=noise_multiplier)
    clip_norm = validate.positive_number(clip_norm=clip_norm)
    learning_rate = validate.positive(learning_rate=learning_rate)
    numbers = (
        as_constant(validate.scalar(noise_multiplier=noise_multiplier)),
        as_constant(validate.scalar(learning_rate=learning_rate)),
    )
    steps = validate.count(steps=steps)
    rule, key = clipping.Abadi(clip_norm), validate.key(key=key)
    fitted: Array = _noisy_descent(scaled, theta, logits, labels, loss, rule, numbers, steps, key)
    return fitted


@eqx.filter_jit
def _noisy_descent(
    scaled: _Scaled,
    theta: Array,
    logits: Array,
    labels: Array,
    loss: losses.Loss,
    rule: clipping.ClippingRule,
    numbers: tuple[_Number, _Number],
    steps: int,
    key: PRNGKeyArray,
) -> Array:
    noise_multiplier, learning_rate = (jnp.asarray(v, theta.dtype) for v in numbers)
    std = noise_multiplier * jnp.asarray(rule.sensitivity(), theta.dtype)

    def loss_of(theta: Array, f: Array, y: Array) -> Array:
        return loss(scaled(theta, f[None]), y[None])[0]

    def step(k: Array, theta: Array) -> Array:
        gradients = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(theta, logits, labels)
        gradients = gradients.reshape(len(logits), -1)
        norms = _norms.by_sample(gradients).unscaled()
        # Scaled logits may overflow. Zero times NaN is NaN: gradients that are dropped must be zero
        # before they are weighted.
        usable = jnp.isfinite(norms)
        gradients = jnp.where(usable[:, None], gradients, 0.0)
        factors = rule.factors(jnp.where(usable, norms, 0.0))
        noise = std * jax.random.normal(jax.random.fold_in(key, k), theta.shape, theta.dtype)
        clipped = (factors @ gradients).reshape(theta.shape)
        return theta - learning_rate * (clipped + noise) / len(logits)

    fitted: Array = lax.fori_loop(0, steps, step, theta)
    return fitted


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, losses.Loss]:
    """Logits ``(n, K)``, labels as the loss wants them, and the loss."""
    f: Array = validate.finite(logits=_floating(logits))
    y = validate.array(labels=labels)
    f = f[:, None] if f.ndim == 1 else f
    if f.ndim != 2 or f.size == 0:
        raise ValueError(
            f"logits must have shape (n, K), or (n,) or (n, 1) of one logit, got {f.shape}"
        )
    n, K = f.shape
    if y.shape != (n,):
        raise ValueError(f"labels must be classes of shape ({n},), got {y.shape}")
    y = y.astype(jnp.int32) if y.dtype == bool else y
    if K > 1:
        loss: losses.Loss = losses.SoftmaxCrossEntropy()
    else:
        loss = losses.Logistic()
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"labels must be integers, got dtype {y.dtype}")
    return f, loss.check(y, n, K, "labels"), loss


def _fittable(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Float64 logits ``(n, K)`` and their targets, one-hot for a softmax."""
    if is_traced((logits, labels)):
        raise TypeError(
            "logits and labels must be known, not traced: the fit does not work under jit; "
            "fit outside, and jit the code that uses the result"
        )
    checked_logits, checked_labels, loss = _checked(logits, labels)
    f = np.asarray(checked_logits, np.float64)
    y = np.asarray(checked_labels)
    if isinstance(loss, losses.SoftmaxCrossEntropy):
        y = np.eye(f.shape[1])[y]
    return f, y.astype(np.float64)


def _probabilities(f: np.ndarray) -> np.ndarray:
    from scipy.special import expit, softmax

    p: np.ndarray = expit(f) if f.shape[1] == 1 else softmax(f, axis=1)
    return p


def _losses(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    top = np.logaddexp(0.0, f[:, 0]) if f.shape[1] == 1 else np.logaddexp.reduce(f, axis=1)
    by_sample: np.ndarray = top - np.sum(f * y, axis=1)
    return by_sample
