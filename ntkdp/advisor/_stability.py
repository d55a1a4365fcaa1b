"""How far the learning rate may go."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp import privacy
from ntkdp._backend import validate
from ntkdp._backend.types import Array, ScalarLike
from ntkdp.advisor._grid import Grid, Initial, predict
from ntkdp.clipping import Abadi, NoClipping
from ntkdp.gradient_flow import KernelFlow, KernelLike, check_kernel_flow

#: Rates tried at once, in each round of the search for the largest stable one.
_TRIED = 33


def largest_stable_learning_rate(
    flow: KernelFlow,
    initial: Initial,
    *,
    steps: int,
    clip_norm: float | None = None,
    noise_multiplier: ScalarLike | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    low: float = 1e-4,
    high: float = 1e6,
    tolerance: float = 1e-2,
    key: Array | None = None,
) -> float:
    r"""The learning rate up to which training ends no higher than it starts.

    A rate is stable if the final training loss is finite and at most the initial one, for every
    key. Rates on a logarithmic grid are tried from ``low`` to ``high``, then between the first that
    is not stable and the one before, and so on. All tried rates below the result are therefore
    stable, and stable rates above an unstable one are not seen.

    Parameters
    ----------
    flow, initial, steps, sample_rate, noise_kernel, noise_per_group, key
        As for :func:`ntkdp.stochastic_flow.final_outputs`. The flow may be one without clipping.
    clip_norm : float, optional
        By default the flow's own.
    noise_multiplier : float or Budget
        As for :func:`ntkdp.stochastic_flow.ensemble`.
    low, high : float
        Where to search.
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
        If ``low`` is not stable (with noise, no rate may be) or not below ``high``, and where
        :func:`ntkdp.stochastic_flow.final_outputs` raises them.

    Notes
    -----
    *Derived.* For the squared loss without clipping, outputs in the kernel's range and infinitely
    many steps it is :math:`2n / \lambda_{max}(H)` with the mean loss, :math:`2/\lambda_{max}(H)`
    with the sum. For few steps it is larger, since growth has to outweigh decay.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping(), reduction="sum")
    >>> rate = ntkdp.advisor.largest_stable_learning_rate(flow, jnp.ones((1, 1)), steps=10)
    >>> 0.99 < rate / (2 / 4.0) <= 1
    True
    """
    flow = check_kernel_flow(flow)
    low, high, tolerance = (
        float(validate.scalar(**{name: validate.positive(**{name: value})}))
        for name, value in (("low", low), ("high", high), ("tolerance", tolerance))
    )
    if low >= high:
        raise ValueError(f"low must be below high, got low={low:g} and high={high:g}")
    flow, clip_norm = _with_one_norm(flow, clip_norm)

    def try_rates(rates: np.ndarray) -> Grid:
        return predict(
            flow,
            initial,
            learning_rates=rates,
            clip_norms=[clip_norm],
            steps=steps,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            noise_kernel=noise_kernel,
            noise_per_group=noise_per_group,
            key=key,
        )

    # Small tolerances cannot be met below the rounding of the rates themselves.
    return _search(try_rates, low, high, max(tolerance, 4 * _machine_epsilon(flow)))


def _machine_epsilon(flow: KernelFlow) -> float:
    return float(jnp.finfo(flow.drive.dtype).eps)


def _with_one_norm(flow: KernelFlow, clip_norm: float | None) -> tuple[KernelFlow, float]:
    """A flow that clips, if only far above all norms, and its one clipping norm."""
    rule = flow.clipping
    if clip_norm is None and np.ndim(rule.R):
        raise ValueError(
            "clip_norm must be given if the flow has one for each group, since all groups share "
            "one here, got None"
        )
    if not isinstance(rule, NoClipping):
        return flow, float(np.asarray(rule.R)) if clip_norm is None else clip_norm
    if clip_norm is not None:
        raise ValueError(
            f"clip_norm must be None with a flow that does not clip, got {clip_norm!r}"
        )
    largest = float(jnp.finfo(flow.drive.dtype).max)
    clipping_flow = eqx.tree_at(lambda flow: flow.clipping, flow, Abadi(largest, scope=rule.scope))
    return clipping_flow, largest


def _search(
    try_rates: Callable[[np.ndarray], Grid], low: float, high: float, tolerance: float
) -> float:
    """The last stable rate before the first that is not, bracketed again and again."""
    stable, unstable = low, high
    first_round = True
    while first_round or unstable / stable > 1 + tolerance:
        rates = np.geomspace(stable, unstable, _TRIED)
        grid = try_rates(rates)
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
        first_failed = int(np.clip(failed[0] if failed.size else _TRIED - 1, 1, _TRIED - 1))
        stable, unstable = float(rates[first_failed - 1]), float(rates[first_failed])
        first_round = False
    return stable
