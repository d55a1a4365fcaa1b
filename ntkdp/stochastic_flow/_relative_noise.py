"""The noise on the weights, relative to what the weights are without it."""

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Float, Params
from ntkdp._gradients import groups
from ntkdp.models import Model, TwoTimeRule


def relative_weight_noise(
    variance: ArrayLike, model: Model | None, params: Params, x: ArrayLike
) -> Float[Array, "..."]:
    r"""Variance of the noise on a weight over the weight's own, the largest over the layers.

    Noise of variance v leaves weights of own variance :math:`\tau^2` with
    :math:`\tau^2 (1 + v/\tau^2)`, so :math:`v/\tau^2` says when noise moves the kernel. In NTK
    parameterisation :math:`\tau = 1` and it is v. In standard parameterisation
    :math:`\tau^2 = W^2/N` for a layer with N inputs: it is N v / W^2, which the widest layer
    decides.

    Parameters
    ----------
    variance : float or array
        v, one number or ``(..., R)`` with a variance for each parameter group, or ``(..., 1)`` for
        all of them: of :func:`weight_noise_variance`.
    model : Model or None
        The network. If it knows its layers, the own variances are those that its layers are drawn
        with; otherwise, and with None, the mean squares of the arrays of ``params`` that have two
        axes or more.
    params : pytree
        Its parameters at the start.
    x : array
        Inputs ``(n, ...)``, for their shape.

    Returns
    -------
    array
        ``(...)``: the last axis is gone.

    Raises
    ------
    ValueError
        If a variance is negative, or none of the arrays of ``params`` tells an own variance.

    Notes
    -----
    *Derived*; see :func:`ntkdp.two_time_kernel`. Biases do not count: in standard parameterisation
    they start at zero in many networks, and one bias among N weights moves outputs little.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x = jnp.ones((3, 4))
    >>> model = ntkdp.models.mlp([50], 1, W_std=2.0, parameterization="standard")
    >>> params = model.init(jax.random.key(0), x)
    >>> round(float(ntkdp.stochastic_flow.relative_weight_noise(0.01, model, params, x)), 6)
    0.5
    """
    noise = jnp.atleast_1d(jnp.asarray(validate.non_negative(variance=variance)))
    own = _own_variances(model, params, jnp.asarray(x))
    if noise.shape[-1] not in (1, len(own)):
        raise ValueError(
            f"variance must be one number, or one for each of the {len(own)} groups, got shape "
            f"{noise.shape}"
        )
    return jnp.max(noise / jnp.asarray(own, noise.dtype), axis=-1)


def _own_variances(model: Model | None, params: Params, x: Array) -> list[float]:
    """The own variance of the weights of each group; infinite if a group has none."""
    if model is not None and model.two_time is not None and _is_known(model.two_time, x):
        return list(model.two_time.own_variances(x).values())
    resolved = groups.resolve(params)
    least = np.full(resolved.size, np.inf)
    leaves = jax.tree.leaves(params)
    for leaf, group in zip(leaves, resolved.leaf_to_group, strict=True):
        if sum(size > 1 for size in leaf.shape) > 1:
            square = float(jnp.mean(jnp.square(leaf.astype(jnp.result_type(float)))))
            least[group] = min(least[group], square) if square > 0 else least[group]
    if not np.any(np.isfinite(least)):
        raise ValueError(
            "params must hold an array of two axes or more that is not zero, to tell the own "
            "variance of the weights, got none"
        )
    return least.tolist()


def _is_known(rule: TwoTimeRule, x: Array) -> bool:
    """Whether the own variances can be read off the layers."""
    try:
        rule.check(x)
    except ValueError:
        return False
    return True
