r"""Per-sample losses :math:`\ell_i(f_i, y_i)` and their output gradients :math:`a_i`.

A loss maps outputs ``(n, K)`` and targets to one value for each sample, ``(n,)``; it never
averages. The flow and the run reduce over samples (``reduction="mean"`` or ``"sum"``).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp._backend import validate
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.types import Array, ArrayLike, Float, ScalarLike, as_constant, is_traced

#: How the losses of the samples become one number.
Reduction: TypeAlias = Literal["mean", "sum"]
#: ``function(f, y) -> scalar``, with one sample's outputs ``(K,)`` and its row of the targets.
SampleLoss: TypeAlias = Callable[[Array, Array], Array]


class Loss(eqx.Module):
    r"""A per-sample loss with its gradient in the outputs.

    Subclasses are final and define ``__call__``, ``check``, ``n_outputs`` and ``correct``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> loss = ntkdp.losses.SquaredError()
    >>> loss(jnp.array([[2.0]]), jnp.array([[0.0]])).tolist()
    [2.0]
    >>> loss.output_gradient(jnp.array([[2.0]]), jnp.array([[0.0]])).tolist()
    [[2.0]]
    """

    @abstractmethod
    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        r"""Loss of each sample, :math:`\ell_i`, shape ``(n,)``."""

    @abstractmethod
    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        """Return ``targets`` as an array that fits ``(n_samples, n_outputs)`` outputs, or raise."""

    @abstractmethod
    def n_outputs(self, targets: Array) -> int | None:
        """K if it follows from the targets alone, else ``None``."""

    @abstractmethod
    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"] | None:
        """One where the prediction is right and zero where it is not; ``None`` for regression."""

    def output_gradient(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, "n K"]:
        r""":math:`a_i = \partial \ell_i / \partial f_i`, shape ``(n, K)``, by autodiff."""
        gradient: Array = jax.grad(lambda f: jnp.sum(self(f, targets)))(outputs)
        return gradient

    def output_hessian(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, "n K K"]:
        r""":math:`\partial^2 \ell_i / \partial f_i^2`, shape ``(n, K, K)``, by autodiff."""

        def gradient(f: Array, y: Array) -> Array:
            return self.output_gradient(f[None], y[None])[0]

        hessian: Array = jax.vmap(jax.jacfwd(gradient))(outputs, targets)
        return hessian


def _vector_targets(targets: ArrayLike, n_samples: int, n_outputs: int, name: str) -> Array:
    """Real targets of shape ``(n, K)``; ``(n,)`` is read as ``(n, 1)`` when K is 1."""
    rows = validate.array(**{name: targets})
    if rows.shape == (n_samples,) and n_outputs == 1:
        rows = rows[:, None]
    if rows.shape != (n_samples, n_outputs):
        raise ValueError(
            f"{name} must have the shape of the outputs, ({n_samples}, {n_outputs}), "
            f"got {rows.shape}"
        )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        rows = rows.astype(jnp.result_type(float))
    finite: Array = validate.finite(**{name: rows})
    return finite


def _as_rows(targets: Array) -> Array:
    """Targets ``(n,)`` as ``(n, 1)``, so that outputs minus targets is not ``(n, n)``."""
    return targets[:, None] if targets.ndim == 1 else targets


def _columns(targets: Array) -> int:
    return 1 if targets.ndim == 1 else targets.shape[-1]


class SquaredError(Loss):
    r"""Half the squared distance, :math:`\ell = \tfrac12 \|f - y\|^2`, so :math:`a = f - y`.

    Targets are real, shape ``(n, K)``; ``(n,)`` is read as ``(n, 1)``.
    """

    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        return 0.5 * jnp.sum((outputs - _as_rows(targets)) ** 2, axis=-1)

    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        return _vector_targets(targets, n_samples, n_outputs, name)

    def n_outputs(self, targets: Array) -> int:
        return _columns(targets)

    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> None:
        return None


def _checked_delta(delta: ScalarLike) -> np.ndarray | Array:
    number: np.ndarray | Array = as_constant(validate.positive_number(delta=delta))
    return number


class Huber(Loss):
    r"""Huber's loss of the residual's norm: quadratic up to ``delta``, linear beyond.

    :math:`\ell = \tfrac12 s^2` for :math:`s = \|f - y\| \le \delta`, else
    :math:`\delta (s - \tfrac12 \delta)`. So :math:`\|a\| \le \delta`, and for one output it is the
    usual elementwise loss. Targets as for :class:`SquaredError`.

    Parameters
    ----------
    delta : float
        Where the loss turns linear, in units of the targets; positive.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.losses.Huber(1.0)(jnp.array([[0.5], [3.0]]), jnp.zeros((2, 1))).tolist()
    [0.125, 2.5]
    """

    delta: ScalarLike = eqx.field(default=1.0, converter=_checked_delta)

    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        squared = jnp.sum((outputs - _as_rows(targets)) ** 2, axis=-1)
        # The derivative of the root at zero is infinite, so the root is taken of a safe value.
        delta = jnp.asarray(self.delta, squared.dtype)
        outside = squared > delta**2
        distance = jnp.sqrt(jnp.where(outside, squared, 1.0))
        return jnp.where(outside, delta * (distance - 0.5 * delta), 0.5 * squared)

    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        return _vector_targets(targets, n_samples, n_outputs, name)

    def n_outputs(self, targets: Array) -> int:
        return _columns(targets)

    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> None:
        return None


class SoftmaxCrossEntropy(Loss):
    r"""Cross-entropy of the softmax, :math:`\ell = -\sum_k y_k \log p_k`, so :math:`a = p - y`.

    Targets are integer labels ``(n,)`` in ``0 .. K-1``, or one-hot or soft labels ``(n, K)`` whose
    rows are non-negative and sum to one.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> loss = ntkdp.losses.SoftmaxCrossEntropy()
    >>> loss.output_gradient(jnp.zeros((1, 2)), jnp.array([0])).tolist()
    [[-0.5, 0.5]]
    """

    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        by_sample: Array
        if targets.ndim == 1:
            by_sample = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        else:
            by_sample = optax.softmax_cross_entropy(outputs, targets)
        return by_sample

    def output_gradient(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, "n K"]:
        if targets.ndim == 1:
            targets = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        total = jnp.sum(targets, axis=-1, keepdims=True)
        return (jax.nn.softmax(outputs) * total - targets).astype(outputs.dtype)

    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        if n_outputs < 2:
            raise ValueError(
                f"softmax cross-entropy needs at least 2 outputs, got {n_outputs}; "
                "for one output use Logistic"
            )
        labels = validate.array(**{name: targets})
        if labels.shape == (n_samples, 1):
            raise ValueError(
                f"{name} must be labels of shape ({n_samples},), got {labels.shape}; "
                f"pass {name}[:, 0]"
            )
        if labels.ndim == 2:
            return self._check_soft(labels, n_samples, n_outputs, name)
        if labels.shape != (n_samples,):
            raise ValueError(
                f"{name} must be labels of shape ({n_samples},) or ({n_samples}, {n_outputs}), "
                f"got {labels.shape}"
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"{name} must be integer labels, got dtype {labels.dtype}")
        if not is_traced(labels):
            known = np.asarray(labels)
            if known.min() < 0 or known.max() >= n_outputs:
                raise ValueError(
                    f"{name} must be labels in 0..{n_outputs - 1} for {n_outputs} outputs, "
                    f"got values from {known.min()} to {known.max()}"
                )
        return labels

    def n_outputs(self, targets: Array) -> int | None:
        # One column is not a distribution but labels of the wrong shape; `check` says so.
        return None if _columns(targets) == 1 else _columns(targets)

    @staticmethod
    def _check_soft(targets: Array, n_samples: int, n_outputs: int, name: str) -> Array:
        targets = _vector_targets(targets, n_samples, n_outputs, name)
        if not is_traced(targets):
            rows = np.asarray(targets)
            tolerance = 100 * float(jnp.finfo(targets.dtype).eps)
            if rows.min() < 0 or np.max(np.abs(rows.sum(axis=-1) - 1)) > max(tolerance, 1e-5):
                raise ValueError(
                    f"rows of {name} must be non-negative and sum to 1, "
                    f"got values from {rows.min()} and sums from {rows.sum(axis=-1).min()} "
                    f"to {rows.sum(axis=-1).max()}"
                )
        return targets

    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        labels = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
        return (jnp.argmax(outputs, axis=-1) == labels).astype(outputs.dtype)


class Logistic(Loss):
    r"""Binary cross-entropy of one logit, :math:`\ell = \log(1 + e^f) - y f`.

    So :math:`a = \mathrm{sigmoid}(f) - y`. Targets are labels in {0, 1} (or probabilities between),
    shape ``(n,)`` or ``(n, 1)``; the model has one output, K = 1.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.losses.Logistic().output_gradient(jnp.zeros((1, 1)), jnp.array([1])).tolist()
    [[-0.5]]
    """

    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        by_sample: Array = optax.sigmoid_binary_cross_entropy(outputs, _as_rows(targets))[:, 0]
        return by_sample

    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        if n_outputs != 1:
            raise ValueError(
                f"the logistic loss needs one output, got {n_outputs}; use SoftmaxCrossEntropy"
            )
        rows = _vector_targets(targets, n_samples, n_outputs, name)
        if not is_traced(rows):
            labels = np.asarray(rows)
            if labels.min() < 0 or labels.max() > 1:
                raise ValueError(
                    f"{name} must lie in [0, 1], got values from {labels.min()} to {labels.max()}; "
                    "map labels -1, 1 to 0, 1"
                )
        return rows

    def n_outputs(self, targets: Array) -> int:
        return _columns(targets)

    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        return ((outputs > 0) == (_as_rows(targets) > 0.5)).astype(outputs.dtype)[:, 0]


class Custom(Loss):
    """A loss from any function of one sample; its output gradient comes from autodiff.

    Parameters
    ----------
    function : callable
        ``function(f, y) -> scalar`` with ``f`` of shape ``(K,)`` and ``y`` one row of the targets.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> log_cosh = ntkdp.losses.Custom(lambda f, y: jnp.sum(jnp.log(jnp.cosh(f - y))))
    >>> float(log_cosh.output_gradient(jnp.array([[1.0]]), jnp.array([[1.0]]))[0, 0])
    0.0
    """

    function: SampleLoss = eqx.field(static=True)

    def __call__(self, outputs: Float[Array, "n K"], targets: Array) -> Float[Array, " n"]:
        by_sample: Array = jax.vmap(self.function)(outputs, targets)
        return by_sample

    def check(
        self, targets: ArrayLike, n_samples: int, n_outputs: int, name: str = "targets"
    ) -> Array:
        rows = validate.array(**{name: targets})
        if rows.ndim == 0 or rows.shape[0] != n_samples:
            raise ValueError(
                f"{name} must have {n_samples} rows, one for each sample, got shape {rows.shape}"
            )
        finite: Array = validate.finite(**{name: rows})
        value = jax.eval_shape(
            self.function,
            jax.ShapeDtypeStruct((n_outputs,), jnp.result_type(float)),
            jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype),
        )
        if getattr(value, "shape", None) != ():
            raise ValueError(
                f"a custom loss must map one sample's outputs and target to a scalar, got {value}"
            )
        return finite

    def n_outputs(self, targets: Array) -> None:
        return None

    def correct(self, outputs: Float[Array, "n K"], targets: Array) -> None:
        return None


def mean_or_sum(
    loss: Loss, outputs: Array, targets: Array, reduction: Reduction
) -> tuple[Array, Array | None]:
    """The reduced ``loss`` of ``outputs`` against ``targets``, and the accuracy.

    ``reduction`` is "mean" or "sum" over samples; the accuracy is ``None`` for regression. If the
    outputs are in half precision, both are computed in float32.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> loss, f = ntkdp.losses.SquaredError(), jnp.array([[1.0], [3.0]])
    >>> ntkdp.losses.mean_or_sum(loss, f, jnp.zeros((2, 1)), "mean")[0].item()
    2.5
    """
    outputs = at_least_single(outputs)
    per_sample = loss(outputs, targets)
    reduced = jnp.mean(per_sample) if reduction == "mean" else jnp.sum(per_sample)
    correct = loss.correct(outputs, targets)
    return reduced, None if correct is None else jnp.mean(correct)


def divisor(reduction: Reduction, n_samples: int) -> int:
    """What ``reduction`` divides a sum over samples by: ``n_samples`` if "mean", 1 if "sum".

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.losses.divisor("mean", 8), ntkdp.losses.divisor("sum", 8)
    (8, 1)
    """
    return n_samples if reduction == "mean" else 1


_CLASSES: dict[str, type[Loss]] = {
    "squared_error": SquaredError,
    "softmax_cross_entropy": SoftmaxCrossEntropy,
    "logistic": Logistic,
    "huber": Huber,
}


def names() -> tuple[str, ...]:
    """The names of all losses, as :func:`from_name` takes them.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.losses.names()
    ('squared_error', 'softmax_cross_entropy', 'logistic', 'huber')
    """
    return tuple(_CLASSES)


def class_of(name: str) -> type[Loss]:
    """The class of the loss called ``name``.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.losses.class_of("huber") is ntkdp.losses.Huber
    True
    """
    return validate.lookup(_CLASSES, loss=name)


def name_of(loss: Loss) -> str:
    """The name under which :func:`from_name` makes a loss like ``loss``.

    Raises
    ------
    TypeError
        If the loss has no name, as :class:`Custom` has none.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.losses.name_of(ntkdp.losses.SquaredError())
    'squared_error'
    """
    for name, known in _CLASSES.items():
        if type(loss) is known:
            return name
    raise TypeError(
        f"loss must be one of {', '.join(sorted(_CLASSES))}, got {loss!r}: "
        "a function cannot be written down as data"
    )


def from_name(name: str, **options: Any) -> Loss:
    """The loss called ``name``: squared_error, softmax_cross_entropy, logistic or huber.

    ``options`` are the fields of the loss.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> type(ntkdp.losses.from_name("huber", delta=2.0)).__name__
    'Huber'
    """
    return class_of(name)(**options)


def as_loss(loss: Loss | SampleLoss) -> Loss:
    """``loss`` itself, or a :class:`Custom` loss around a function of one sample.

    Examples
    --------
    >>> import ntkdp
    >>> type(ntkdp.losses.as_loss(lambda f, y: (f[0] - y[0]) ** 2)).__name__
    'Custom'
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return Custom(loss)
    raise TypeError(
        f"loss must be one of ntkdp.losses, e.g. SquaredError(), or a function (f, y) -> scalar, "
        f"got {loss!r}"
    )
