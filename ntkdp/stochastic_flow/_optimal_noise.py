"""Correlated noise that adds least to the final loss of a predicted run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import decompositions, validate
from ntkdp._backend.types import Array, ArrayLike, Float, LearningRate
from ntkdp.batches import Batches
from ntkdp.gradient_flow import (
    KernelFlow,
    OptimizerSteps,
    OutputsAtZero,
    Walked,
    check_kernel_flow,
    optimizer_steps,
)
from ntkdp.noise import Correlated
from ntkdp.ntk import FeatureKernel
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow._noise_covariance import covariance_of_weights, factor_of_features
from ntkdp.stochastic_flow._weight_noise import deviations
from ntkdp.trajectory import Stepping


def optimal_noise(
    flow: KernelFlow,
    initial: ArrayLike,
    *,
    learning_rate: LearningRate,
    steps: int,
    n_bands: int,
    batches: Batches,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    n_probes: int = 32,
) -> Correlated:
    r"""The strategy that adds least to the final loss of a predicted run, at equal privacy.

    About the run without noise, noise :math:`\xi_j` of step j moves the last outputs by
    :math:`P_j \xi_j`, with :math:`P_j` the product of the linearised steps that follow. The
    strategy C makes

    .. math:: \operatorname{sens}(C)^2 \sum_{jl} (C^{-1} C^{-\top})_{jl}
              \operatorname{tr} (Q P_j H P_l^\top)

    least, with Q the second derivative of the final loss by the outputs and H the kernel, over
    Toeplitz strategies of so many bands without negative coefficients.

    Parameters
    ----------
    flow : KernelFlow
        Kernel, targets, loss and clipping, without test kernel and preconditioner.
    initial : array
        Outputs ``(n, K)`` at the start.
    learning_rate, steps, optimizer, outputs_at_zero
        As for :func:`ntkdp.recursion`.
    n_bands : int
        A run carries one noise vector less than this.
    batches : batches.Batches
        Full, cyclic or shuffled ones, for the sensitivity. The run without noise takes all samples.
    n_probes : int
        Random directions of the last outputs, always the same ones, that estimate the trace.

    Returns
    -------
    noise.Correlated
        By its Toeplitz coefficients.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`; if the flow has a test kernel, no noise reaches the loss, or no
        strategy has a sensitivity under the batches.

    Notes
    -----
    *Derived*. :meth:`ntkdp.noise.Correlated.optimal` is the same for a squared loss in which
    nothing is clipped, or all by the same factor. Each probe takes the time of a run without noise
    and of one product of the kernel with ``(n, K T)`` numbers. What is left out: that noise moves
    the outputs so far that the linearised steps differ, which matters where noise dominates.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(2), jnp.array([0, 1]), ntkdp.losses.SoftmaxCrossEntropy(),
    ...                         ntkdp.clipping.Abadi(1.0))
    >>> noise = ntkdp.stochastic_flow.optimal_noise(
    ...     flow, jnp.zeros((2, 2)), learning_rate=0.5, steps=20, n_bands=3,
    ...     batches=ntkdp.batches.Cyclic(10))
    >>> noise.n_bands, bool(noise.strategy[1] > 0.4)
    (3, True)
    """
    flow = check_kernel_flow(flow)
    if flow.test_drive is not None:
        raise ValueError("flow must have no test_kernel: the loss is that of the training set")
    stepping = Stepping(learning_rate, steps, steps)
    stds = deviations(flow.clipping, 1.0, flow.n_terms, per_group=False)
    if not bool(jnp.any(stds > 0)):
        raise ValueError("flow must have clipping with a positive sensitivity, got 0")
    features = factor_of_features(flow, stds, None)
    if features is None:
        covariance: Array | FeatureKernel = covariance_of_weights(flow, stds, None)
    else:
        covariance = FeatureKernel(features)
    walk = optimizer_steps(flow, optimizer, stepping.learning_rate, outputs_at_zero)
    start, _ = flow.init(initial)
    keys = jax.random.split(jax.random.key(0), validate.count(n_probes=n_probes))
    products = _products(walk, start, stepping.steps, covariance, keys)
    squares, directions = np.linalg.eigh(np.asarray(products, np.float64))
    rows = np.sqrt(np.maximum(squares, 0.0))[:, None] * directions.T
    return Correlated.optimal_for_rows(rows, n_bands=n_bands, batches=batches)


@eqx.filter_jit
def _products(
    walk: OptimizerSteps,
    start: Array,
    steps: int,
    covariance: Float[Array, "N N"] | FeatureKernel,
    keys: Array,
) -> Float[Array, "T T"]:
    """What noise of two steps does to the final loss together, a mean over probes."""

    def last(noise: Float[Array, "T n K"]) -> Float[Array, "n K"]:
        def step(walked: Walked, added: Array) -> tuple[Walked, None]:
            velocity, _ = walk.flow.velocity((walked.position[0], None))
            return walk.step(walked, (velocity + added, None)), None

        walked, _ = jax.lax.scan(step, walk.start((start, None)), noise)
        final: Array = (walked.position if walked.average is None else walked.average)[0]
        return final

    outputs, pull = jax.vjp(last, jnp.zeros((steps, *start.shape), start.dtype))
    root = _root_of_second_derivative(walk, outputs)

    def add(total: Array, key: Array) -> tuple[Array, None]:
        probe = jax.random.rademacher(key, outputs.shape, outputs.dtype)
        (moved,) = pull(jnp.einsum("nij,nj->ni", root, probe))
        columns = moved.reshape(steps, covariance.shape[0], -1)
        if isinstance(covariance, FeatureKernel):
            in_weights = jnp.einsum("ND,tNk->tDk", covariance.rows, columns)
            return total + jnp.tensordot(in_weights, in_weights, axes=((1, 2), (1, 2))), None
        through = jnp.einsum("NM,tMk->tNk", covariance, columns)
        return total + jnp.tensordot(columns, through, axes=((1, 2), (1, 2))), None

    total, _ = jax.lax.scan(add, jnp.zeros((steps, steps), start.dtype), keys)
    return total / len(keys)


def _root_of_second_derivative(walk: OptimizerSteps, outputs: Array) -> Float[Array, "n K K"]:
    """A root of the second derivative of each sample's loss, where it bends upwards."""
    second = walk.flow.loss.output_hessian(outputs, walk.flow.targets)
    squares, directions = decompositions.eigh(second)
    root: Array = directions * jnp.sqrt(jnp.maximum(squares, 0.0))[:, None]
    return root
