r"""Certificates of decay: clipping norms at which the loss must fall.

At a state with kernel H and output gradients a, :math:`\dot L = -a^\top \mathrm{sym}(HC)\, a`, so a
positive definite :math:`\mathrm{sym}(HC)` certifies that the loss falls, whatever the directions
of a. Under the rule min(1, R/s) this holds at large R if H > 0; the **safe clipping norm** is where
it first fails on the way down. All of it works under ``jit``.

Clipping norms are in units of a per-sample gradient's norm, :math:`s_i^2 = a_i^\top H_{ii} a_i`, of
each sample's own loss, so the reduction over samples does not enter.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool

from ntkdp import clipping, losses
from ntkdp._backend import decompositions, validate
from ntkdp._backend.types import Array, ArrayLike, Float
from ntkdp.clipping import ClippingRule, NoClipping, Scope
from ntkdp.losses import Loss, SampleLoss
from ntkdp.ntk import LayerwiseKernel
from ntkdp.spectrum import as_matrices, is_positive_definite, symmetric_part, to_unit_diagonal
from ntkdp.trajectory import Trajectory, check_clipping

__all__ = ["Certificates", "certify", "safe_clip_norm", "safe_clip_norm_bound"]


def safe_clip_norm(
    kernel: ArrayLike | LayerwiseKernel, output_gradient: ArrayLike, *, scope: Scope = "flat"
) -> Float[Array, ""]:
    r"""The smallest clipping norm above which decay is certified at a state.

    The smallest :math:`R_0` such that :math:`\mathrm{sym}(\sum_r H_r C_r(R)) > 0` for every
    :math:`R > R_0`, with :math:`C_{ir}(R) = \min(1, R/\|g_{ir}\|)`.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        ``(n, n, K, K)``, or ``(n, n)`` meaning ``(x) I_K``, or a LayerwiseKernel of either, which
        layerwise scope needs.
    output_gradient : array
        :math:`a_i`, shape ``(n, K)``: the gradient of each sample's own loss in its outputs, never
        divided by n.
    scope : {"flat", "layerwise"}
        With layerwise scope, R is the same in every group.

    Returns
    -------
    array
        A scalar in units of R. Zero: every R is safe. Infinity: the kernel is singular, and no R
        is: without clipping the loss cannot rise but may stand still, and unequal factors make it
        rise in some direction of a, unless they leave the kernel's null space invariant.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are NaN or infinite, the kernel is not symmetric, the scope is
        unknown, or it is layerwise and the kernel has no layer terms.

    Notes
    -----
    *Derived*. Positivity is not monotone in R, so the norms :math:`\|g_{ir}\|` are visited from the
    largest, above which C = 1. Between two of them C is affine in R, and so is the symmetric part:
    its smallest eigenvalue is concave in R, and positive on the whole interval if and only if it is
    so at both ends. In the first interval whose lower end fails, the symmetric part at distance t
    below the upper end is :math:`M - tB`, with M > 0, and first singular at
    :math:`1/t = \lambda_{\max}(M^{-1/2} B M^{-1/2})`. That the kernel is positive is judged as in
    :func:`ntkdp.spectrum.has_positive_quadratic_form`. Time grows as (n K)^3 times the number of
    norms visited; use float64.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, a = jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.array([[5.0], [1.0]])
    >>> round(5.0 / ntkdp.certificates.safe_clip_norm(kernel, a).item(), 4)
    2.5454
    """
    matrices, norms = _state(kernel, output_gradient, scope)
    return _safe(matrices, norms)


def safe_clip_norm_bound(
    kernel: ArrayLike | LayerwiseKernel, output_gradient: ArrayLike, *, scope: Scope = "flat"
) -> Float[Array, ""]:
    r"""A cheap upper bound on the safe clipping norm, from condition numbers.

    With flat scope, :math:`\mathrm{sym}(HC) > 0` if
    :math:`\kappa_C < ((\sqrt{\kappa_H} + 1) / (\sqrt{\kappa_H} - 1))^2`, and the factors at R have
    :math:`\kappa_C \le \min(\max_i s_i / R, \max_i s_i / \min_i s_i)`. With layerwise scope, the
    symmetric part is positive if
    :math:`\sum_r \lambda_{\max}(H_r) (1 - \min_i C_{ir}) < \lambda_{\min}(H)`.

    Parameters
    ----------
    kernel, output_gradient, scope
        As for :func:`safe_clip_norm`.

    Returns
    -------
    array
        A scalar in units of R, at least :func:`safe_clip_norm`: decay is certified at every R
        above it. Infinity if the kernel is singular.

    Raises
    ------
    ValueError
        As for :func:`safe_clip_norm`.

    Notes
    -----
    *Derived*: the flat condition is :math:`(\kappa_C - 1)/(\kappa_C + 1) < 2
    \sqrt{\kappa_H}/(\kappa_H + 1)`, solved for :math:`\kappa_C`. Positivity does not change when
    the kernel is multiplied from both sides by matrices that act on each sample alone, for they
    commute with C; here they make every :math:`H_{ii}` the identity. With two samples the flat
    bound is then exact. One eigenvalue decomposition a term.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, a = jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.array([[5.0], [1.0]])
    >>> round(5.0 / ntkdp.certificates.safe_clip_norm_bound(kernel, a).item(), 4)
    2.5454
    """
    matrices, norms = _state(kernel, output_gradient, scope)
    return _bound(matrices, norms)


class Certificates(NamedTuple):
    """Certificates of decay at each recorded time of a trajectory, made by :func:`certify`.

    ``times`` and ``loss`` are the trajectory's, ``clip_norm`` is the R of the run, infinite without
    clipping. ``safe_clip_norm`` and ``safe_clip_norm_bound`` belong to the rule min(1, R/s),
    whatever rule the run has. ``smallest_eigenvalue`` is the symmetric part's at the factors of the
    run (in units of the kernel), and ``certified`` says whether it is positive: then the loss
    falls, unless every output gradient is zero. All but ``times`` and ``clip_norm`` have a leading
    seed axis if the trajectory has.
    """

    times: Float[Array, " T"]
    loss: Float[Array, "*seeds T"]
    clip_norm: Float[Array, ""]
    safe_clip_norm: Float[Array, "*seeds T"]
    safe_clip_norm_bound: Float[Array, "*seeds T"]
    smallest_eigenvalue: Float[Array, "*seeds T"]
    certified: Bool[Array, "*seeds T"]


def certify(
    kernel: ArrayLike | LayerwiseKernel,
    trajectory: Trajectory,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
) -> Certificates:
    r"""Certificates of decay along a trajectory, under one kernel.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        As for :func:`safe_clip_norm`, of the training points; the same at all times.
    trajectory : Trajectory
        It must have recorded outputs.
    targets, loss
        As the flow or the run has them.
    clipping : ClippingRule
        The rule of the run; layerwise with one R for all groups.

    Returns
    -------
    Certificates
        A state that was not reached (NaN) is not certified.

    Raises
    ------
    ValueError, TypeError
        If the trajectory has no outputs, or shapes do not fit; as for :func:`safe_clip_norm`.

    Notes
    -----
    *Derived*. A certificate is of the state, not of the way between two recorded times; and of the
    flow under this kernel: a discrete step needs a small learning rate too. Where the kernel moves,
    call :func:`safe_clip_norm` with the kernel of each state.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel, y = jnp.ones((3, 3)) + 0.1 * jnp.eye(3), jnp.array([-3.0, 1.0, 1.0])
    >>> loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    >>> flow = ntkdp.KernelFlow(kernel, y, loss, rule, reduction="sum")
    >>> path = ntkdp.solve(flow, jnp.zeros((3, 1)), [0.0, 30.0], outputs=True)
    >>> ntkdp.certificates.certify(kernel, path, y, loss, rule).certified.tolist()
    [False, True]
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory must be a Trajectory, got {type(trajectory).__name__}")
    if trajectory.outputs is None:
        raise ValueError("trajectory records no outputs; pass outputs=True where it is made")
    check_clipping(clipping)
    R = jnp.asarray(clipping.R)
    if R.ndim:
        raise ValueError(
            f"clipping must have one R for all groups, got R of shape {R.shape}; the safe clipping "
            "norm is one number"
        )
    loss = losses.as_loss(loss)
    *_, n, n_outputs = trajectory.outputs.shape
    targets = loss.check(targets, n, n_outputs)
    matrices = _terms(kernel, n, n_outputs, clipping.scope)
    columns = _along(matrices, trajectory.outputs, targets, loss, clipping)
    used = jnp.asarray(jnp.inf if isinstance(clipping, NoClipping) else R, matrices.dtype)
    return Certificates(trajectory.times, trajectory.loss, used, *columns)


@eqx.filter_jit
def _along(
    matrices: Array, outputs: Array, targets: Array, loss: Loss, rule: ClippingRule
) -> tuple[Array, Array, Array, Array]:
    def certificates(f: Array) -> tuple[Array, Array, Array, Array]:
        a = loss.output_gradient(f, targets).astype(matrices.dtype)
        norms = _norms(matrices, a)
        total = _total_norms(matrices, a) if rule.needs_total_norm else None
        factors = rule.by_group(norms, total)
        symmetric = _symmetric(matrices, factors)
        return (
            _safe(matrices, norms),
            _bound(matrices, norms),
            decompositions.eigvalsh(symmetric)[0],
            is_positive_definite(symmetric),
        )

    values = lax.map(certificates, outputs.reshape(-1, *outputs.shape[-2:]))
    safe, bound, smallest, certified = (v.reshape(outputs.shape[:-2]) for v in values)
    return safe, bound, smallest, certified


@eqx.filter_jit
def _safe(matrices: Float[Array, "R N N"], norms: Float[Array, "R n"]) -> Float[Array, ""]:
    size, eps = matrices.shape[-1], jnp.finfo(matrices.dtype).eps
    downwards = jnp.append(jnp.sort(norms.ravel())[::-1], 0.0)

    def symmetric_at(R: Array) -> Array:
        return _symmetric(matrices, jnp.where(norms > R, R / norms, 1.0))

    def lower_end_holds(k: Array) -> Array:
        return (k < norms.size) & is_positive_definite(symmetric_at(downwards[k + 1]))

    # Stops at R = 0 at the latest, where every clipped gradient has vanished.
    k = lax.while_loop(lower_end_holds, lambda k: k + 1, jnp.zeros((), int))
    upper, lower = downwards[k], downwards[k + 1]
    slope = _symmetric(matrices, jnp.where(norms >= upper, 1 / norms, 0.0))
    scaled, scale = to_unit_diagonal(symmetric_at(upper))
    factor = decompositions.cholesky(scaled)
    half = decompositions.solve_lower(factor, slope * scale[:, None] * scale[None])
    pencil = decompositions.solve_lower(factor, half.T)
    root = upper - 1 / decompositions.eigvalsh(pencil)[-1]
    # Cancellation may leave a root at the end, or past it.
    safe = jnp.where(root - lower > size * eps * upper, root, lower)
    # Below the least of positive norms all factors are R/s, and R changes no sign.
    safe = jnp.where(upper > jnp.min(norms), safe, 0.0)
    safe = jnp.where(is_positive_definite(jnp.sum(matrices, axis=0)), safe, jnp.inf)
    return jnp.where(jnp.all(jnp.isfinite(norms)), safe, jnp.nan)


@eqx.filter_jit
def _bound(matrices: Float[Array, "R N N"], norms: Float[Array, "R n"]) -> Float[Array, ""]:
    terms = _to_identity_blocks(matrices, norms.shape[1])
    spectrum = decompositions.eigvalsh(jnp.sum(terms, axis=0))
    if len(terms) == 1:
        root = jnp.sqrt(spectrum[-1] / spectrum[0])
        ratio = ((root + 1) / (root - 1)) ** 2
        largest, smallest = jnp.max(norms), jnp.min(norms)
        bound = jnp.where(largest < ratio * smallest, 0.0, largest / ratio)
    else:
        tops = decompositions.eigvalsh(terms)[:, -1]
        largest = jnp.max(norms, axis=1)
        R = jnp.append(0.0, jnp.sort(largest))
        largest, R_of = largest[None], R[:, None]
        clipped = largest > R_of
        removed = jnp.where(clipped, 1 - R_of / jnp.where(clipped, largest, 1.0), 0.0) @ tops
        bound = jnp.interp(spectrum[0], removed[::-1], R[::-1])
    bound = jnp.where(is_positive_definite(jnp.sum(matrices, axis=0)), bound, jnp.inf)
    return jnp.where(jnp.all(jnp.isfinite(norms)), bound, jnp.nan)


def _state(
    kernel: ArrayLike | LayerwiseKernel, output_gradient: ArrayLike, scope: str
) -> tuple[Array, Array]:
    """Terms ``(R, N, N)`` and norms ``(R, n)`` of a state, checked."""
    a = validate.finite(output_gradient=validate.array(output_gradient=output_gradient))
    if a.ndim != 2:
        raise ValueError(f"output_gradient must have shape (n, K), got {a.shape}")
    matrices = _terms(kernel, a.shape[0], a.shape[1], scope)
    return matrices, _norms(matrices, a.astype(matrices.dtype))


def _terms(kernel: ArrayLike | LayerwiseKernel, n: int, n_outputs: int, scope: str) -> Array:
    """Terms ``(R, N, N)`` for outputs ``(n, K)``, N = n K, or n for a kernel ``(x) I_K``."""
    layerwise = validate.choice(clipping.SCOPES, scope=scope) == "layerwise"
    matrices = as_matrices(kernel, layerwise=layerwise)
    shape = (
        jnp.shape(kernel.values)[1:]
        if isinstance(kernel, LayerwiseKernel)
        else validate.array(kernel=kernel).shape
    )
    if shape not in ((n, n), (n, n, n_outputs, n_outputs)):
        raise ValueError(
            f"kernel must have shape ({n}, {n}) or ({n}, {n}, {n_outputs}, {n_outputs}) for "
            f"outputs of shape ({n}, {n_outputs}), got {shape}"
        )
    return matrices


def _blocks(matrices: Array, n: int) -> Array:
    """The matrices as ``(R, n, k, n, k)``, k outputs inside."""
    k = matrices.shape[-1] // n
    return matrices.reshape(-1, n, k, n, k)


def _norms(matrices: Array, a: Float[Array, "n K"]) -> Float[Array, "R n"]:
    diagonal = jnp.einsum("riaib->riab", _blocks(matrices, len(a)))
    if diagonal.shape[-1] == 1:
        squares = diagonal[:, :, 0, 0] * jnp.sum(a**2, axis=1)[None]
    else:
        squares = jnp.einsum("ia,riab,ib->ri", a, diagonal, a)
    return clipping.norms_from_squares(squares)


def _total_norms(matrices: Array, a: Float[Array, "n K"]) -> Float[Array, " R"]:
    """Norm of the summed gradient in each group."""
    vectors = a.reshape(matrices.shape[-1], -1)
    return clipping.norms_from_squares(jnp.einsum("ik,rij,jk->r", vectors, matrices, vectors))


def _symmetric(matrices: Array, factors: Float[Array, "R n"]) -> Array:
    columns = jnp.repeat(factors, matrices.shape[-1] // factors.shape[1], axis=1)
    return symmetric_part(jnp.einsum("rij,rj->ij", matrices, columns))


def _to_identity_blocks(matrices: Array, n: int) -> Array:
    """The terms between matrices that turn each diagonal block of their sum into the identity."""
    blocks = _blocks(matrices, n)
    total = jnp.einsum("riaib->iab", blocks)
    identity = jnp.broadcast_to(jnp.eye(total.shape[-1], dtype=total.dtype), total.shape)
    inverse = decompositions.solve_lower(decompositions.cholesky(total), identity)
    scaled = jnp.einsum("iab,ribjc,jdc->riajd", inverse, blocks, inverse)
    return scaled.reshape(matrices.shape)
