"""Predicted ends of training over a grid of learning rates and clipping norms."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import losses, privacy
from ntkdp._backend import memory, validate
from ntkdp._backend.progress import part_of
from ntkdp._backend.types import Array, ArrayLike, Float, Progress, ScalarLike
from ntkdp.comparison import CellMetrics, measure
from ntkdp.gradient_flow import KernelFlow, check_kernel_flow
from ntkdp.ntk import LayerwiseKernel
from ntkdp.stochastic_flow import bytes_of_noise, final_outputs

#: Copies of a cell's outputs that a step and the metrics hold, for each term of the kernel.
_COPIES = 8
#: Part of the free memory that the cells predicted at once may take.
_SHARE = 0.25

#: Outputs at the start, or those of the training and of the test set.
Initial: TypeAlias = ArrayLike | tuple[ArrayLike, ArrayLike]


class Grid(NamedTuple):
    """Predicted ends of training over learning rates x clipping norms; a pytree.

    ``learning_rates`` ``(L,)`` and ``clip_norms`` ``(R,)``; ``metrics`` of the ``L R`` cells, all
    norms of the first learning rate first. All cells have the same ``initial_loss`` and the same
    ``noise_multiplier``, so they cost the same privacy, whatever their learning rate and norm are.

    Made by :func:`predict`, with an example.
    """

    learning_rates: np.ndarray
    clip_norms: np.ndarray
    metrics: CellMetrics
    initial_loss: float
    noise_multiplier: float

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Learning rate and clipping norm of each cell, each ``(L R,)``."""
        rates, norms = np.meshgrid(self.learning_rates, self.clip_norms, indexing="ij")
        return rates.ravel(), norms.ravel()


def predict(
    flow: KernelFlow,
    initial: Initial,
    *,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: int,
    noise_multiplier: ScalarLike | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: ArrayLike | LayerwiseKernel | None = None,
    noise_per_group: bool = False,
    progress: Progress = False,
    key: Array | None = None,
) -> Grid:
    r"""What training ends with, predicted for every learning rate with every clipping norm.

    Parameters
    ----------
    flow, initial, steps, sample_rate, noise_kernel, noise_per_group, progress
        As for :func:`ntkdp.stochastic_flow.final_outputs`. Test metrics need a test kernel and test
        targets.
    learning_rates, clip_norms : array
        ``(L,)`` and ``(R,)``, positive.
    noise_multiplier : float or Budget
        :math:`\sigma` of all cells, or a :class:`ntkdp.privacy.Budget` that sets it.
    key : PRNG key
        One, or an array of S keys, over which metrics are averaged; needed with noise or sampling.

    Returns
    -------
    Grid
        With the metrics of ``L R`` cells, whose noise differs in size alone.

    Raises
    ------
    TypeError, ValueError
        If an array is not of one dimension, and where
        :func:`ntkdp.stochastic_flow.final_outputs` raises them.
    MemoryError
        If not even one cell fits. Otherwise, as many are computed at once as fit into a quarter of
        the free memory.

    Notes
    -----
    A cell diverged if its final training loss, for any key, is not finite or above the initial one
    by more than rounding.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> grid = ntkdp.advisor.predict(flow, jnp.array([[5.0]]), learning_rates=[0.1, 1.0],
    ...                              clip_norms=[1.0, 1e3], steps=3)
    >>> [round(loss, 4) for loss in grid.metrics.loss.tolist()], grid.metrics.diverged.tolist()
    ([9.68, 0.5832, 0.5, 9112.5], [False, False, False, True])
    """
    flow = check_kernel_flow(flow)
    rates = _axis(learning_rates=learning_rates)
    norms = _axis(clip_norms=clip_norms)
    steps = validate.count(steps=steps)
    sigma = privacy.as_noise_multiplier(noise_multiplier, steps, sample_rate)
    sigma = float(validate.scalar(noise_multiplier=validate.non_negative(noise_multiplier=sigma)))
    train, test = flow.init(initial)
    initial_loss = float(losses.mean_or_sum(flow.loss, train, flow.targets, flow.reduction)[0])
    keys = None if key is None else jnp.atleast_1d(validate.keys(key=key))
    by_rate, by_norm = (part.ravel() for part in np.meshgrid(rates, norms, indexing="ij"))
    at_once = _cells_at_once(flow, train, test, 1 if keys is None else keys.size, sigma > 0)
    parts = np.array_split(np.arange(by_rate.size), -(-by_rate.size // at_once))
    measured = []
    for number, part in enumerate(parts):
        final = final_outputs(
            flow,
            initial,
            learning_rates=by_rate[part],
            clip_norms=by_norm[part],
            steps=steps,
            noise_multipliers=sigma,
            sample_rate=sample_rate,
            noise_kernel=noise_kernel,
            noise_per_group=noise_per_group,
            progress=part_of(progress, number, len(parts)),
            key=keys,
        )
        if keys is None:
            final = jax.tree.map(lambda outputs: outputs[:, None], final)
        test_pair = None
        if final.test is not None and flow.test_targets is not None:
            test_pair = (final.test, flow.test_targets)
        train_pair = (final.train, flow.targets)
        measured.append(measure(flow.loss, flow.reduction, initial_loss, train_pair, test_pair))
    metrics = jax.tree.map(lambda *pieces: np.concatenate(pieces), *measured)
    return Grid(rates, norms, metrics, initial_loss, sigma)


def _axis(**named: ArrayLike) -> Float[np.ndarray, " N"]:
    ((name, _),) = named.items()
    array = np.asarray(validate.positive(**named), np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be an array of one dimension, got shape {array.shape}")
    return array


def _cells_at_once(
    flow: KernelFlow, train: Array, test: Array | None, n_seeds: int, noisy: bool
) -> int:
    followed = train.size + (0 if test is None else test.size)
    item = train.dtype.itemsize
    cell_bytes = _COPIES * (flow.n_terms + 1) * followed * n_seeds * item
    noise_bytes = bytes_of_noise(flow) if noisy else 0
    way_out = "use fewer keys, samples or float32"
    memory.require(noise_bytes + cell_bytes, "predicting a cell", way_out)
    return max(1, int(_SHARE * (memory.available_bytes() - noise_bytes) / cell_bytes))
