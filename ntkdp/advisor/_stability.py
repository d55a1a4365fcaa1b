"""How far the learning rate may go."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp.advisor._grid import check_flow, predict
from ntkdp.clipping import Abadi, NoClipping

#: Rates tried at once, in each round of the search for the largest stable one.
_TRIED = 33


def largest_stable_learning_rate(
    flow: Any,
    initial: Any,
    *,
    steps: int,
    clip_norm: float | None = None,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    low: float = 1e-4,
    high: float = 1e6,
    tolerance: float = 1e-2,
    key: Any = None,
) -> float:
    r"""The learning rate up to which training ends no higher than it starts.

    A rate is stable if the final training loss is finite and at most the initial one, for every
    key. Rates on a logarithmic grid are tried from ``low`` to ``high``, then between the first that
    is not stable and the one before, again and again; so all tried rates below the result are
    stable, and stable rates above an unstable one are not seen.

    Parameters
    ----------
    flow, initial, steps, sample_rate, noise_kernel, noise_per_group, key
        As for :func:`ntkdp.stochastic_flow.final_outputs`; the flow may be one without clipping.
    clip_norm : float, optional
        By default the flow's own.
    noise_multiplier : float or Budget
        As for :func:`ntkdp.stochastic_flow.ensemble`.
    low, high : float
        Where to seek.
    tolerance : float
        Relative distance of the result, which is stable, to the next rate tried, which is not.

    Returns
    -------
    float
        Infinite if every rate tried up to ``high`` is stable: with clipping, or with a loss that
        grows linearly, there may be no end.

    Raises
    ------
    TypeError, ValueError
        ``low`` not stable (with noise no rate may be), an order of ``low`` and ``high``, and what
        :func:`ntkdp.stochastic_flow.final_outputs` raises.

    Notes
    -----
    *Derived.* For the squared loss without clipping, outputs in the kernel's range and steps to
    infinity, :math:`2n / \lambda_{max}(H)` with the mean loss, :math:`2/\lambda_{max}(H)` with the
    sum; for few steps the result is larger, since what grows has to outweigh what has decayed.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping(), reduction="sum")
    >>> rate = ntkdp.advisor.largest_stable_learning_rate(flow, jnp.ones((1, 1)), steps=10)
    >>> 0.99 < rate / (2 / 4.0) <= 1
    True
    """
    check_flow(flow)
    low, high, tolerance = (
        float(validate.scalar(**{name: validate.positive(**{name: value})}))
        for name, value in (("low", low), ("high", high), ("tolerance", tolerance))
    )
    if low >= high:
        raise ValueError(f"low must be below high, got low={low:g} and high={high:g}")
    if clip_norm is None and np.ndim(flow.clipping.R):
        raise ValueError(
            "clip_norm must be given where the flow has one a group, since here all groups share "
            "one, got None"
        )
    if isinstance(flow.clipping, NoClipping):
        if clip_norm is not None:
            raise ValueError(
                f"clip_norm must be None with a flow that does not clip, got {clip_norm!r}"
            )
        clip_norm = float(jnp.finfo(flow.drive.matrix.dtype).max)
        flow = eqx.tree_at(
            lambda flow: flow.clipping, flow, Abadi(clip_norm, scope=flow.clipping.scope)
        )
    elif clip_norm is None:
        clip_norm = float(flow.clipping.R)
    options = {
        "steps": steps,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "noise_kernel": noise_kernel,
        "noise_per_group": noise_per_group,
        "key": key,
    }
    # Small tolerances cannot be met below the rounding of the rates themselves.
    tolerance = max(tolerance, 4 * float(jnp.finfo(flow.drive.matrix.dtype).eps))
    stable, unstable = low, high
    first_round = True
    while first_round or unstable / stable > 1 + tolerance:
        rates = np.geomspace(stable, unstable, _TRIED)
        grid = predict(flow, initial, learning_rates=rates, clip_norms=[clip_norm], **options)
        failed = np.flatnonzero(grid.metrics.diverged)
        if first_round and not failed.size:
            return float("inf")
        if first_round and failed[0] == 0:
            raise ValueError(
                f"low must be a stable learning rate, got {low:g}: the loss starts at "
                f"{grid.initial_loss:g} and ends at {grid.metrics.loss[0]:g}; take a smaller one, "
                "or less noise"
            )
        # The ends of the bracket are known; a second look could differ by rounding.
        at = int(np.clip(failed[0] if failed.size else _TRIED - 1, 1, _TRIED - 1))
        stable, unstable = float(rates[at - 1]), float(rates[at])
        first_round = False
    return stable
