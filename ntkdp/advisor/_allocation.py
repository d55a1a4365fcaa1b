"""Clipping norms by group that share out one sensitivity."""

from typing import NamedTuple

import numpy as np

from ntkdp import privacy
from ntkdp._backend.types import KeyLike, LearningRate, PyTree, ScalarLike
from ntkdp.batches import Batches
from ntkdp.clipping import Global
from ntkdp.gradient_flow import (
    KernelFlow,
    KernelLike,
    LinearisedFlow,
    LinearModelFlow,
    OutputsAtZero,
    check_linear_model_flow,
)
from ntkdp.noise import Noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow import FinalLoss, final_loss

#: The least clipping norm of a group, relative to the sensitivity: a rule has no norm of zero.
_LEAST = 1e-3
#: Relative change of the loss below which the search ends.
_TOLERANCE = 1e-9


class Allocation(NamedTuple):
    """Clipping norms by group ``(R,)``, and the predicted final losses with them and equal ones.

    Made by :func:`allocate_clip_norms`.
    """

    clip_norms: np.ndarray
    loss: float
    equal_loss: float


def allocate_clip_norms(
    flow: KernelFlow | LinearisedFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: ScalarLike | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    test: bool = False,
    key: KeyLike | None = None,
) -> Allocation:
    r"""Clipping norms by group that end with the least predicted loss at the same privacy.

    Layerwise clipping has the sensitivity :math:`S = \sqrt{\sum_r R_r^2}`: at a given S and
    :math:`\sigma` all norms cost the same epsilon, and, unless noise is by group, have the same
    noise. The norms minimise the mean final loss of the runs that
    :func:`ntkdp.stochastic_flow.ensemble` draws from the keys. With noise by group, which is in
    proportion to the norms, S is just a scale that they share.

    Parameters
    ----------
    flow : KernelFlow or LinearisedFlow
        With layerwise clipping. S is that of its rule, and its norms are where the search begins.
    initial, learning_rate, steps, noise_multiplier, sample_rate, batches, noise, noise_kernel, \
    noise_per_group, optimizer, outputs_at_zero
        As for :func:`ntkdp.stochastic_flow.ensemble`.
    test : bool
        Take the loss of the test points in place of that of the training set.
    key : PRNG key
        One, or an array of S keys; needed with noise or sampling. All norms draw the same numbers.

    Returns
    -------
    Allocation
        ``clip_norms`` for a rule such as ``Abadi(clip_norms, scope="layerwise")``, ``loss``, and
        ``equal_loss``, that of :math:`R_r = S/\sqrt m` in each of m groups, which is no smaller.

    Raises
    ------
    ValueError, TypeError
        If clipping is flat, has a rule that jumps (`Global`), bounds no sample, or there is one
        group; if the loss is not finite with equal norms; as for
        :func:`ntkdp.stochastic_flow.ensemble`.

    Notes
    -----
    *Derived*. A step in which all samples are clipped is linear in the norms, so that the best ones
    are in proportion to what each group does to the loss, however many weights it has. Derivatives
    by the norms are exact, in forward mode: a step of the search takes the time of m + 1
    predictions. It finds a local minimum, without norms below a thousandth of S. With few keys it
    fits their noise too. The gain is only as reliable as the prediction: if the frozen kernel errs
    by more than the gain, real runs may not show it.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel = ntkdp.LayerwiseKernel(("body", "head"), jnp.array([[[9.0]], [[16.0]]]))
    >>> rule = ntkdp.clipping.Abadi(1.0, scope="layerwise")
    >>> flow = ntkdp.KernelFlow(kernel, jnp.zeros((1, 1)), ntkdp.losses.SquaredError(), rule)
    >>> found = ntkdp.advisor.allocate_clip_norms(
    ...     flow, jnp.full((1, 1), 90.0), learning_rate=0.1, steps=20)
    >>> (found.clip_norms / 2**0.5).round(2).tolist(), found.loss < found.equal_loss
    ([0.6, 0.8], True)
    """
    own, sensitivity = _norms_of(flow)
    loss = final_loss(
        flow,
        initial,
        learning_rate=learning_rate,
        steps=steps,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        batches=batches,
        noise=noise,
        noise_kernel=noise_kernel,
        noise_per_group=noise_per_group,
        optimizer=optimizer,
        outputs_at_zero=outputs_at_zero,
        test=test,
        key=key,
    )
    equal = np.full(own.size, sensitivity / own.size**0.5)
    equal_loss = float(loss.value_and_gradient(equal)[0])
    if not np.isfinite(equal_loss):
        raise ValueError(
            f"learning_rate must be stable with equal norms, whose predicted loss is {equal_loss}"
        )
    stable = np.isfinite(float(loss.value_and_gradient(own)[0]))
    norms, least = _search(loss, own if stable else equal, sensitivity, equal_loss)
    # Where steps of the search diverge, it ends without a number.
    found = (norms, least) if least < equal_loss else (equal, equal_loss)
    return Allocation(*found, equal_loss)


def _norms_of(flow: LinearModelFlow) -> tuple[np.ndarray, float]:
    """The clipping norms of a flow's groups and their sensitivity, if they can be shared out."""
    rule, n_groups = check_linear_model_flow(flow).clipping, flow.n_terms
    if rule.scope == "flat" or isinstance(rule, Global) or not rule.bounds_each_sample:
        raise ValueError(
            "flow must have layerwise clipping by a continuous rule that bounds each sample, e.g. "
            f"Abadi(1.0, scope='layerwise'), got {type(rule).__name__} with scope={rule.scope!r}"
        )
    if n_groups < 2:
        raise ValueError("flow must have two groups or more, got one, which has all of S")
    norms = np.asarray(rule.group_norms(n_groups), np.float64)
    return norms, float(rule.sensitivity(n_groups))


def _search(
    loss: FinalLoss, start: np.ndarray, sensitivity: float, scale: float
) -> tuple[np.ndarray, float]:
    """The norms with the least loss among those with the sensitivity, and that loss."""
    from scipy.optimize import minimize

    unit = max(abs(scale), np.finfo(float).tiny)

    def objective(direction: np.ndarray) -> tuple[float, np.ndarray]:
        size = np.linalg.norm(direction)
        value, gradient = loss.value_and_gradient(sensitivity * direction / size)
        slope = np.asarray(gradient, np.float64) * sensitivity / size
        across = slope - direction * (slope @ direction) / size**2
        return float(value) / unit, across / unit

    found = minimize(
        objective,
        start / sensitivity,
        jac=True,
        method="L-BFGS-B",
        bounds=[(_LEAST, 1.0)] * len(start),
        options={"ftol": _TOLERANCE, "gtol": 1e-7},
    )
    return sensitivity * found.x / np.linalg.norm(found.x), float(found.fun) * unit
