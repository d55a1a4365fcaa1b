"""Extreme eigenvalues of kernels and Hessians that are never formed."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ntkdp import losses
from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Float, Params, PyTree, Real
from ntkdp._gradients.check_model import check_model
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss, SampleLoss
from ntkdp.ntk import per_sample_gradient_norms
from ntkdp.trajectory import check_clipping

#: Up to this size a matrix is formed from its products: the iteration would span all of it.
_DENSE_SIZE = 20


class ExtremeEigenvalues(NamedTuple):
    """The smallest and the largest eigenvalue of a symmetric operator.

    Made by :func:`extreme_eigenvalues`.
    """

    smallest: float
    largest: float


def extreme_eigenvalues(
    apply_fn: ApplyFn,
    params: Params,
    x: Real[Array, "n ..."],
    *,
    factors: ArrayLike | None = None,
    batch_size: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> ExtremeEigenvalues:
    r"""Smallest and largest eigenvalue of the empirical kernel, which is never formed.

    The kernel, or with flat clipping factors :math:`C^{1/2} H C^{1/2}`, whose eigenvalues are those
    of HC, meets vectors only: :math:`H v = J (J^\top v)`, a backward and a forward pass.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`ntkdp.empirical_ntk`.
    factors : array, optional
        Flat clipping factors ``(n,)``, at least 0.
    batch_size : int, optional
        Samples that pass through the network at once; all by default.
    tolerance : float, optional
        Error of both eigenvalues relative to the largest; by default the dtype's rounding to the
        power 2/3. A smallest eigenvalue below it is not resolved.
    max_iterations : int
        Restarts of the iteration after which to give up.

    Returns
    -------
    ExtremeEigenvalues
        ``smallest`` and ``largest``.

    Raises
    ------
    ValueError
        As for :func:`ntkdp.empirical_ntk`; factors that do not fit.
    RuntimeError
        If the iteration does not converge, with what helps.

    Notes
    -----
    Restarted Lanczos (ARPACK, by SciPy) from a fixed start; it runs on the host, the products where
    JAX runs, so it cannot itself be compiled.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> extremes = ntkdp.spectrum.extreme_eigenvalues(lambda w, x: x @ w, jnp.ones((2, 1)), x)
    >>> round(extremes.smallest, 12), round(extremes.largest, 12)
    (1.0, 4.0)
    """
    x, outputs = check_model(apply_fn, params, x)
    n, n_outputs = outputs.shape
    batch_size = n if batch_size is None else min(validate.count(batch_size=batch_size), n)
    if factors is None:
        factors = jnp.ones(n, outputs.dtype)
    factors = jnp.asarray(validate.non_negative(factors=factors))
    if factors.shape != (n,):
        raise ValueError(f"factors must have shape ({n},), one a sample, got {factors.shape}")
    roots = jnp.sqrt(factors)[:, None].astype(outputs.dtype)
    product = partial(_kernel_product, apply_fn, batch_size, params, x, roots)
    size, settings = n * n_outputs, (outputs.dtype, tolerance, max_iterations)
    largest = _largest_eigenvalue(product, size, *settings)
    # From the other end, the iteration stops relative to the largest one: the smallest may be zero.
    below = _largest_eigenvalue(lambda v: largest * v - product(v), size, *settings, scale=largest)
    return ExtremeEigenvalues(largest - below, largest)


class Sharpness(NamedTuple):
    """Two curvatures in units of 1 / learning rate, to be held against 2 / learning rate.

    Made by :func:`sharpness`.
    """

    hessian: float | Float[np.ndarray, " T"]
    clipped_kernel: float | Float[np.ndarray, " T"]


def sharpness(
    apply_fn: ApplyFn,
    params: Params,
    x: Real[Array, "n ..."],
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    batch_size: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Sharpness:
    r"""Largest eigenvalue of the loss's Hessian, and of the clipped kernel, at parameters.

    A step of size :math:`\eta` on a quadratic is stable while its largest curvature is below
    :math:`2/\eta`. Clipping replaces the curvature of the squared loss, the spectrum of H, by that
    of :math:`C^{1/2} H C^{1/2}`.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`ntkdp.empirical_ntk`.
    targets, loss
        As the run has them.
    clipping : ClippingRule
        Its scope must be flat.
    reduction : {"mean", "sum"}
        How the loss is reduced over samples. With ``"mean"`` the clipped kernel is divided by n, so
        that both numbers are in units of 1 / learning rate.
    batch_size, tolerance, max_iterations
        As for :func:`extreme_eigenvalues`.

    Returns
    -------
    Sharpness
        ``hessian``, the largest (not the largest in modulus) eigenvalue of the reduced loss's
        Hessian in the parameters, and ``clipped_kernel``; two floats.

    Raises
    ------
    ValueError, TypeError
        As for :func:`extreme_eigenvalues`; targets that do not fit; layerwise clipping, whose
        operator is not similar to a symmetric one.
    RuntimeError
        If the iteration does not converge.

    Notes
    -----
    The Hessian against :math:`2/\eta` is Cohen et al. (2103.00065), under DP noise 2512.19019. The
    clipped kernel is *derived*: it is the linearised drift with the factors held, and leaves out
    the second derivative of the loss in the outputs, which is 1 for the squared loss. For a run,
    call it at ``state.params`` between the steps of :func:`ntkdp.dp_sgd.build`; the products are
    compiled once.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> now = ntkdp.spectrum.sharpness(
    ...     lambda w, x: x @ w, jnp.array([[4.0]]), jnp.array([[2.0]]), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(4.0))
    >>> now.hessian, now.clipped_kernel
    (4.0, 1.0)
    """
    x, outputs = check_model(apply_fn, params, x)
    n, n_outputs = outputs.shape
    loss = losses.as_loss(loss)
    check_clipping(clipping)
    if clipping.scope != "flat":
        raise ValueError(
            f"clipping must have scope='flat' here, got {clipping.scope!r}: sum_r H_r C_r is not "
            "similar to a symmetric matrix; see eigenvalues for its spectrum"
        )
    validate.choice(("mean", "sum"), reduction=reduction)
    targets = loss.check(targets, n, n_outputs)
    size = n if batch_size is None else min(validate.count(batch_size=batch_size), n)
    scale = 1 / losses.divisor(reduction, n)

    output_gradient = _output_gradient(apply_fn, loss, params, x, targets)
    norms = per_sample_gradient_norms(apply_fn, params, x, output_gradient)
    total_norm = None
    if clipping.needs_total_norm:
        summed = _pull_back(apply_fn, size, params, x, output_gradient)
        total_norm = jnp.linalg.norm(ravel_pytree(summed)[0])
    factors = validate.non_negative(factors=clipping.factors(norms, total_norm))
    roots = jnp.sqrt(factors)[:, None].astype(outputs.dtype)

    weights, unravel = ravel_pytree(params)
    hessian = partial(_hessian_product, apply_fn, loss, size, unravel, weights, x, targets)
    kernel = partial(_kernel_product, apply_fn, size, params, x, roots)
    return Sharpness(
        scale * _largest_eigenvalue(hessian, weights.size, weights.dtype, tolerance,
                                    max_iterations),
        scale * _largest_eigenvalue(kernel, n * n_outputs, outputs.dtype, tolerance,
                                    max_iterations),
    )  # fmt: skip


def sharpness_along(
    apply_fn: ApplyFn,
    params_over_time: Params,
    x: Real[Array, "n ..."],
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    **options: Any,
) -> Sharpness:
    """The sharpness at each of several parameters, stacked along a leading time axis.

    Parameters
    ----------
    apply_fn, x, targets, loss, clipping
        As for :func:`sharpness`.
    params_over_time : pytree
        Parameters, every leaf with a leading time axis ``T``.
    **options
        Keyword arguments of :func:`sharpness`.

    Returns
    -------
    Sharpness
        ``hessian`` and ``clipped_kernel``, NumPy arrays ``(T,)`` in units of 1 / learning rate.

    Raises
    ------
    ValueError
        If the leaves have no common leading axis; as for :func:`sharpness`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> path = ntkdp.spectrum.sharpness_along(
    ...     lambda w, x: x @ w, jnp.array([[[4.0]], [[1.0]]]), jnp.array([[2.0]]),
    ...     jnp.zeros((1, 1)), ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(4.0))
    >>> path.clipped_kernel.tolist()
    [1.0, 4.0]
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params_over_time)}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        raise ValueError(
            "params_over_time must have one leading time axis of at least 1 in every leaf, "
            f"got leading axes {sorted(lengths)}"
        )
    ((length,),) = lengths
    path = [
        sharpness(apply_fn, jax.tree.map(lambda leaf, k=k: leaf[k], params_over_time), x, targets,
                  loss, clipping, **options)
        for k in range(length)
    ]  # fmt: skip
    return Sharpness(*map(np.asarray, zip(*path, strict=True)))


def _largest_eigenvalue(
    product: Callable[[Array], Array],
    size: int,
    dtype: np.dtype,
    tolerance: float | None,
    max_iterations: int,
    *,
    scale: float = 0.0,
) -> float:
    """The largest eigenvalue of a symmetric operator; zero if it is not above rounding.

    An operator whose products are below the tolerance times ``scale`` counts as zero.
    """
    if tolerance is None:
        tolerance = float(jnp.finfo(dtype).eps) ** (2 / 3)
    tolerance = float(validate.positive(tolerance=tolerance))
    max_iterations = validate.count(max_iterations=max_iterations)

    def image_of(vector: np.ndarray) -> np.ndarray:
        image = np.asarray(product(jnp.asarray(np.ravel(vector), dtype)), np.float64)
        if not np.all(np.isfinite(image)):
            raise ValueError("derivatives of apply_fn must be finite, got NaN or infinity")
        return image

    if size <= _DENSE_SIZE:
        matrix = np.stack([image_of(column) for column in np.eye(size)])
        return float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
    start = np.random.default_rng(0).normal(size=size)
    start = start / np.linalg.norm(start)
    if np.linalg.norm(image_of(start)) <= tolerance * scale:
        return 0.0
    operator = LinearOperator((size, size), matvec=image_of, dtype=np.float64)
    try:
        (largest,) = eigsh(
            operator, k=1, which="LA", v0=start, tol=tolerance, maxiter=max_iterations,
            return_eigenvectors=False,
        )  # fmt: skip
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the iteration did not converge to tolerance={tolerance:g} in "
            f"max_iterations={max_iterations}; raise either, or use float64"
        ) from error
    return float(largest)


def _blocks(batch_size: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays with their first axis cut into blocks; the last is filled up with the last row."""
    n = arrays[0].shape[0]
    rows = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
    return tuple(array[rows.reshape(-1, batch_size)] for array in arrays)


def _sum_over_blocks(
    function: Callable[..., PyTree], batch_size: int, *arrays: Array, present: Array
) -> PyTree:
    """Sum of ``function(*block, present)``; rows that fill up the last block are not present."""
    *blocks, present = _blocks(batch_size, *arrays, present)
    extra = jnp.arange(present.shape[0] * batch_size).reshape(-1, batch_size) >= arrays[0].shape[0]
    mask = extra.reshape(extra.shape + (1,) * (present.ndim - 2))
    present = jnp.where(mask, 0, present)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(function, *[block[0] for block in blocks], present[0]),
    )

    def add(total: PyTree, block: tuple[Array, ...]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*block)), None

    return lax.scan(add, zeros, (*blocks, present))[0]


@eqx.filter_jit
def _pull_back(
    apply_fn: ApplyFn, batch_size: int, params: Params, x: Array, vector: Array
) -> Params:
    r""":math:`J^\top v` of ``(n, K)`` outputs."""
    return _sum_over_blocks(
        lambda x, v: jax.vjp(lambda p: apply_fn(p, x), params)[1](v)[0],
        batch_size, x, present=vector,
    )  # fmt: skip


@eqx.filter_jit
def _kernel_product(
    apply_fn: ApplyFn, batch_size: int, params: Params, x: Array, roots: Array, vector: Array
) -> Array:
    r""":math:`C^{1/2} J J^\top C^{1/2} v`."""
    weighted = roots * vector.reshape(x.shape[0], -1)
    direction = _pull_back(apply_fn, batch_size, params, x, weighted)
    (blocks,) = _blocks(batch_size, x)
    images: Array = lax.map(
        lambda x: jax.jvp(lambda p: apply_fn(p, x), (params,), (direction,))[1], blocks
    )
    return (roots * images.reshape(-1, weighted.shape[1])[: x.shape[0]]).reshape(-1)


@eqx.filter_jit
def _hessian_product(
    apply_fn: ApplyFn,
    loss: Loss,
    batch_size: int,
    unravel: Callable[[Array], Params],
    weights: Array,
    x: Array,
    targets: Array,
    vector: Array,
) -> Array:
    """The Hessian of the summed loss times a vector, in flat parameters."""

    def product_of_block(x: Array, targets: Array, present: Array) -> Array:
        def summed(weights: Array) -> Array:
            return jnp.sum(present * loss(apply_fn(unravel(weights), x), targets))

        product: Array = jax.jvp(jax.grad(summed), (weights,), (vector,))[1]
        return product

    present = jnp.ones(x.shape[0], weights.dtype)
    product: Array = _sum_over_blocks(product_of_block, batch_size, x, targets, present=present)
    return product


@eqx.filter_jit
def _output_gradient(
    apply_fn: ApplyFn, loss: Loss, params: Params, x: Array, targets: Array
) -> Array:
    return loss.output_gradient(apply_fn(params, x), targets)
