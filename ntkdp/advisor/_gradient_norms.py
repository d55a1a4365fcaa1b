"""Where clipping sets in: the distribution of gradient norms."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Params, Real
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs
from ntkdp.losses import Loss, as_loss
from ntkdp.ntk import per_sample_gradient_norms


class GradientNorms(NamedTuple):
    """Quantiles of per-sample gradient norms: see :func:`gradient_norms`.

    ``quantiles`` ``(Q,)``, ``norms`` ``(Q,)`` or, by group, ``(R, Q)``, and ``groups``, the names
    of the R groups or None.
    """

    quantiles: np.ndarray
    norms: Array
    groups: tuple[str, ...] | None


def gradient_norms(
    apply_fn: ApplyFn,
    params: Params,
    x: Real[Array, "n ..."],
    targets: ArrayLike,
    loss: Loss | Callable[[Array, Array], Array],
    *,
    groups: _groups.GroupSpec = None,
    quantiles: ArrayLike = (0.05, 0.25, 0.5, 0.75, 0.95),
) -> GradientNorms:
    r"""Quantiles over samples of the gradient norms :math:`\|g_i\|` at given parameters.

    Below the smallest norm, a clipping norm R clips every sample, and with the rule of Abadi et al.
    only the product of learning rate and R matters (claim C11); above the largest it clips none.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`ntkdp.per_sample_gradient_norms`.
    targets : array
        As the loss takes them.
    loss : Loss or callable
        As for :class:`ntkdp.KernelFlow`. It is each sample's own, so norms are never divided by n.
    groups : pytree prefix of labels, or callable from key path to label, optional
        With it, norms by group, for layerwise clipping.
    quantiles : array
        ``(Q,)``, in [0, 1].

    Returns
    -------
    GradientNorms

    Raises
    ------
    TypeError, ValueError
        If quantiles are out of range or targets do not fit, and where
        :func:`ntkdp.per_sample_gradient_norms` raises them.

    Notes
    -----
    Between samples, quantiles are interpolated linearly. If x is private, so are the norms: see the
    warning of this module.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x, w = jnp.array([[3.0, 4.0], [6.0, 8.0]]), jnp.zeros((2, 1))
    >>> quartiles = ntkdp.advisor.gradient_norms(
    ...     lambda w, x: x @ w, w, x, jnp.ones(2), ntkdp.losses.SquaredError(), quantiles=[0, 0.5])
    >>> quartiles.norms.tolist()
    [5.0, 7.5]
    """
    shares = np.asarray(validate.non_negative(quantiles=quantiles), np.float64)
    if shares.ndim != 1 or not shares.size or np.any(shares > 1):
        raise ValueError(f"quantiles must be an array (Q,) of numbers in [0, 1], got {quantiles!r}")
    loss = as_loss(loss)
    x = check_inputs(apply_fn, params, x)
    outputs = apply_fn(params, x)
    n_samples, n_outputs = outputs.shape
    targets = loss.check(targets, n_samples, n_outputs)
    gradient = loss.output_gradient(outputs, targets)
    norms = per_sample_gradient_norms(apply_fn, params, x, gradient, groups=groups)
    by_share = jnp.quantile(norms, jnp.asarray(shares, norms.dtype), axis=-1)
    names = None if groups is None else _groups.resolve(params, groups).names
    return GradientNorms(shares, jnp.moveaxis(by_share, 0, -1), names)
