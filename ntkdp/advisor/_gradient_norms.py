"""Where clipping sets in: the distribution of gradient norms."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ntkdp import losses
from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, Params, Real
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs
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
    targets: Any,
    loss: Any,
    *,
    groups: Any = None,
    quantiles: Any = (0.05, 0.25, 0.5, 0.75, 0.95),
) -> GradientNorms:
    r"""Quantiles over samples of the gradient norms :math:`\|g_i\|` at given parameters.

    Below the smallest norm, a clipping norm R clips every sample, and with the rule of Abadi et al.
    only the product of learning rate and R matters (claim C11); above the largest it clips none.

    Parameters
    ----------
    apply_fn, params, x
        As for :func:`ntkdp.per_sample_gradient_norms`.
    targets : array
        As the loss wants them.
    loss : Loss or callable
        As for :class:`ntkdp.KernelFlow`; each sample's own, so norms are never divided by n.
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
        Quantiles out of range, targets that do not fit, and what
        :func:`ntkdp.per_sample_gradient_norms` raises.

    Notes
    -----
    Between samples, quantiles are interpolated linearly. Norms are those of the private data if x
    is: see the warning of this module.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x, w = jnp.array([[3.0, 4.0], [6.0, 8.0]]), jnp.zeros((2, 1))
    >>> found = ntkdp.advisor.gradient_norms(
    ...     lambda w, x: x @ w, w, x, jnp.ones(2), ntkdp.losses.SquaredError(), quantiles=[0, 0.5])
    >>> found.norms.tolist()
    [5.0, 7.5]
    """
    shares = np.asarray(validate.non_negative(quantiles=quantiles), np.float64)
    if shares.ndim != 1 or not shares.size or np.any(shares > 1):
        raise ValueError(f"quantiles must be an array (Q,) of numbers in [0, 1], got {quantiles!r}")
    loss = losses.as_loss(loss)
    x = check_inputs(apply_fn, params, x)
    outputs = apply_fn(params, x)
    targets = loss.check(targets, *outputs.shape)
    gradient = loss.output_gradient(outputs, targets)
    norms = per_sample_gradient_norms(apply_fn, params, x, gradient, groups=groups)
    found = jnp.moveaxis(jnp.quantile(norms, jnp.asarray(shares, norms.dtype), axis=-1), 0, -1)
    names = None if groups is None else _groups.resolve(params, groups).names
    return GradientNorms(shares, found, names)
