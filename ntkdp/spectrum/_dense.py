"""Spectra of kernels that fit the memory."""

import jax.numpy as jnp
from jaxtyping import Bool, Inexact

from ntkdp import ntk
from ntkdp._backend import decompositions, validate
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.types import Array, ArrayLike, Float, is_traced
from ntkdp.ntk import LayerwiseKernel


def clipped_operator(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Float[Array, "N N"]:
    r"""The operator that drives the outputs, :math:`HC` or :math:`\sum_r H_r C_r`, as a matrix.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        ``(n, n, K, K)``, or ``(n, n)`` meaning ``(x) I_K``, or a LayerwiseKernel of either.
    factors : array, optional
        Clipping factors, at least 0: ``(n,)`` flat, or ``(R, n)`` with a LayerwiseKernel. Ones by
        default.

    Returns
    -------
    array
        ``(n K, n K)``, samples outside and outputs inside. For a kernel ``(n, n)`` it is
        ``(n, n)``, and still means ``(x) I_K``.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are NaN or infinite, the kernel is not symmetric, or a factor
        is negative.

    Notes
    -----
    Bu et al. (2023), Table 1. In the sum form; divide by n for ``reduction="mean"``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, factors = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 0.5])
    >>> ntkdp.spectrum.clipped_operator(kernel, factors).tolist()
    [[2.0, 0.5], [1.0, 1.0]]
    """
    return _operator(*_terms_and_factors(kernel, factors))


def eigenvalues(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Inexact[Array, " N"]:
    r"""Eigenvalues of the clipped operator, by real part, smallest first.

    With flat factors they are those of the symmetric :math:`C^{1/2} H C^{1/2}`: real, and accurate.
    With layerwise factors they are complex in general.

    Parameters
    ----------
    kernel, factors
        As for :func:`clipped_operator`. For an ``(n, n)`` kernel each eigenvalue comes once, though
        it stands for K.

    Returns
    -------
    array
        ``(N,)``, N = n K or n: real with flat factors or none, complex with ``(R, n)`` factors.

    Raises
    ------
    ValueError
        As for :func:`clipped_operator`.

    Notes
    -----
    Positive whenever H and the factors are (Bu et al. 2023, Table 1: flat; not so layerwise).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, factors = jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.array([1.0, 0.01])
    >>> [round(v, 4) for v in ntkdp.spectrum.eigenvalues(kernel, factors).tolist()]
    [0.0019, 1.0081]
    """
    terms, weights = _terms_and_factors(kernel, factors)
    if len(terms) == 1 and not _by_group(factors):
        real: Array = decompositions.eigvalsh(_congruent(terms[0], weights[0]))
        return real
    values: Array = decompositions.eigvals(_operator(terms, weights))
    return values[jnp.argsort(values.real)]


def symmetric_eigenvalues(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Float[Array, " N"]:
    r"""Eigenvalues of the clipped operator's symmetric part, smallest first.

    With A the operator, :math:`\mathrm{sym}(A) = (A + A^\top)/2`; the smallest one bounds the decay
    of the loss, :math:`-\dot L \ge \lambda_{\min} \|a\|^2`.

    Parameters
    ----------
    kernel, factors
        As for :func:`eigenvalues`.

    Returns
    -------
    array
        ``(N,)``, real.

    Raises
    ------
    ValueError
        As for :func:`clipped_operator`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, factors = jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.array([1.0, 0.01])
    >>> [round(2 * v, 3) for v in ntkdp.spectrum.symmetric_eigenvalues(kernel, factors).tolist()]
    [-0.334, 2.354]
    """
    values: Array = decompositions.eigvalsh(symmetric_part(clipped_operator(kernel, factors)))
    return values


def condition_number(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Float[Array, ""]:
    r"""Largest over smallest modulus of the eigenvalues of the clipped operator.

    With flat factors it is the condition number of :math:`C^{1/2} H C^{1/2}`, and without factors
    that of H.

    Parameters
    ----------
    kernel, factors
        As for :func:`eigenvalues`.

    Returns
    -------
    array
        A scalar; infinite if the smallest cannot be told from zero (below N roundings of the
        largest).

    Raises
    ------
    ValueError
        As for :func:`clipped_operator`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.spectrum.condition_number(jnp.diag(jnp.array([1.0, 4.0]))).item()
    4.0
    """
    moduli = jnp.abs(eigenvalues(kernel, factors))
    smallest, largest = jnp.min(moduli), jnp.max(moduli)
    regular = smallest > len(moduli) * jnp.finfo(moduli.dtype).eps * largest
    return jnp.where(regular, largest / jnp.where(regular, smallest, 1.0), jnp.inf)


def has_positive_quadratic_form(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Bool[Array, ""]:
    r"""Whether the loss must fall: the symmetric part of the clipped operator is positive definite.

    Parameters
    ----------
    kernel, factors
        As for :func:`eigenvalues`.

    Returns
    -------
    array
        A boolean scalar. What cannot be told from singular (within N roundings, the diagonal
        scaled to one) is not positive.

    Raises
    ------
    ValueError
        As for :func:`clipped_operator`.

    Notes
    -----
    Bu et al. (2023), Table 1, "positive quadratic form".

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> [ntkdp.spectrum.has_positive_quadratic_form(kernel, jnp.array([1.0, c])).item()
    ...  for c in (0.5, 0.01)]
    [True, False]
    """
    return is_positive_definite(symmetric_part(clipped_operator(kernel, factors)))


def has_positive_eigenvalues(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None = None
) -> Bool[Array, ""]:
    r"""Whether every eigenvalue of the clipped operator has a positive real part.

    Parameters
    ----------
    kernel, factors
        As for :func:`eigenvalues`.

    Returns
    -------
    array
        A boolean scalar; what cannot be told from zero is not positive.

    Raises
    ------
    ValueError
        As for :func:`clipped_operator`.

    Notes
    -----
    Bu et al. (2023), Table 1, "positive eigenvalues".

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> ntkdp.spectrum.has_positive_eigenvalues(kernel, jnp.array([1.0, 0.01])).item()
    True
    """
    terms, weights = _terms_and_factors(kernel, factors)
    if len(terms) == 1:
        return is_positive_definite(_congruent(terms[0], weights[0]))
    values = eigenvalues(kernel, factors)
    resolution = len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return values[0].real > resolution


def as_matrices(kernel: ArrayLike | LayerwiseKernel, *, layerwise: bool) -> Float[Array, "R N N"]:
    """Terms of a kernel as matrices, or flat their sum; samples outside, outputs inside."""
    values: Array
    if isinstance(kernel, LayerwiseKernel):
        values = kernel.values
    elif not layerwise:
        values = validate.array(kernel=kernel)[None]
    else:
        raise ValueError(
            "kernel must be a LayerwiseKernel for layerwise clipping, got an array without layer "
            "terms; use layerwise_ntk or layerwise_infinite_ntk"
        )
    shape = values.shape
    square = len(shape) in (3, 5) and shape[1] == shape[2] and shape[-2] == shape[-1]
    if not square or 0 in shape:
        raise ValueError(
            "kernel must have shape (n, n, K, K), or (n, n) meaning (x) I_K, not empty, "
            f"got {shape[1:]}"
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.result_type(float))
    resolution = float(jnp.finfo(values.dtype).eps)
    values = at_least_single(values)
    values = values if layerwise else jnp.sum(values, axis=0, keepdims=True)
    values = validate.finite(kernel=values)
    values = ntk.as_matrices(values)
    if not is_traced(values):
        asymmetry = float(jnp.max(jnp.abs(values - values.mT)))
        if asymmetry > resolution**0.5 * float(jnp.max(jnp.abs(values))):
            raise ValueError(f"kernel must be symmetric, got entries that differ by {asymmetry:g}")
    return values


def symmetric_part(matrix: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """Half the sum of a matrix and its transpose."""
    return (matrix + matrix.T) / 2


def to_unit_diagonal(
    matrix: Float[Array, "N N"],
) -> tuple[Float[Array, "N N"], Float[Array, " N"]]:
    """A symmetric matrix scaled from both sides, which changes no sign, and the scales."""
    diagonal = jnp.diagonal(matrix)
    scale = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    return matrix * scale[:, None] * scale[None], scale


def is_positive_definite(matrix: Float[Array, "N N"]) -> Bool[Array, ""]:
    """Whether a symmetric matrix is positive definite beyond N roundings of its norm.

    The diagonal is scaled to one first, so that samples of very different size are fine.
    """
    scaled, _ = to_unit_diagonal(matrix)
    norm = jnp.max(jnp.sum(jnp.abs(scaled), axis=1))
    margin = len(scaled) * jnp.finfo(scaled.dtype).eps * norm
    # Cholesky's factor is NaN where there is none.
    factor = decompositions.cholesky(scaled - margin * jnp.eye(len(scaled), dtype=scaled.dtype))
    return jnp.all(jnp.diagonal(matrix) > 0) & jnp.all(jnp.isfinite(factor))


def _by_group(factors: ArrayLike | None) -> bool:
    return factors is not None and validate.array(factors=factors).ndim == 2


def _terms_and_factors(
    kernel: ArrayLike | LayerwiseKernel, factors: ArrayLike | None
) -> tuple[Array, Array]:
    """Matrices ``(R, N, N)`` and a factor for each of their columns ``(R, N)``."""
    terms = as_matrices(kernel, layerwise=_by_group(factors))
    values = kernel.values[0] if isinstance(kernel, LayerwiseKernel) else jnp.asarray(kernel)
    n = values.shape[0]
    if factors is None:
        return terms, jnp.ones((1, terms.shape[-1]), terms.dtype)
    given = jnp.asarray(validate.non_negative(factors=factors), terms.dtype)
    expected = (n,) if given.ndim != 2 else (len(terms), n)
    if given.shape != expected:
        raise ValueError(
            f"factors must have shape ({n},), or (R, {n}) with a LayerwiseKernel of R terms, "
            f"got {given.shape}"
        )
    return terms, jnp.repeat(jnp.atleast_2d(given), terms.shape[-1] // n, axis=1)


def _operator(terms: Array, weights: Array) -> Array:
    return jnp.einsum("rij,rj->ij", terms, weights)


def _congruent(matrix: Array, weights: Array) -> Array:
    roots = jnp.sqrt(weights)
    return symmetric_part(matrix) * roots[:, None] * roots[None]
