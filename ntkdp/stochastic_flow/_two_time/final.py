r"""Outputs that noisy training of a wide network ends with, for many cells of a sweep.

Cells whose noise is of one size, :math:`\eta \sigma R`, have the same law of the weights, and so
the same kernels between times and the same undriven outputs: they are steps of one batched product.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import memory, validate
from ntkdp._backend.progress import part_of
from ntkdp._backend.types import Array, ArrayLike, Float, KeyLike, Progress, PyTree
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import NoClipping
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow._final_outputs import FinalOutputs, cells_of
from ntkdp.stochastic_flow._two_time.ensemble import check_flow, draw
from ntkdp.stochastic_flow._two_time.flow import TwoTimeFlow
from ntkdp.stochastic_flow._two_time.volterra import Cases
from ntkdp.stochastic_flow._two_time.weight_path import path_of
from ntkdp.stochastic_flow._weight_noise import deviations
from ntkdp.trajectory import check_steps

#: Nodes, and the number of nodes times modes that are kept together, by default.
_NODES, _MOST_TOGETHER = 7, 3000
#: Cells have noise of one size if the logarithms differ by less.
_SAME_NOISE = 1e-6
#: Copies of a run's paths and charges, for each node, and part of the free memory for them.
_COPIES, _SHARE = 4, 0.25


def two_time_final_outputs(
    flow: TwoTimeFlow,
    initial: PyTree,
    *,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: int,
    noise_multipliers: ArrayLike = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_per_group: bool = False,
    nodes: int | None = None,
    rank: int | None = None,
    progress: Progress = False,
    key: KeyLike,
) -> FinalOutputs:
    r"""Outputs that noisy training of a wide network ends with, for many cells at once.

    The runs are those of :func:`two_time_ensemble` with plain steps. Cells with the same
    :math:`\eta \sigma R` have the same noise, and so the same kernels between times: these are
    computed once for all of them.

    Parameters
    ----------
    flow : TwoTimeFlow
        Network, data, loss and clipping; ``clip_norms`` replace the R of its clipping rule.
    initial
        As for :func:`two_time_ensemble`.
    learning_rates, clip_norms, noise_multipliers : float or array
        ``(C,)``, or one number for all cells, as for :func:`final_outputs`.
    steps : int
        At least 1.
    sample_rate, batches, noise, noise_per_group, progress
        As for :func:`two_time_ensemble`.
    nodes, rank : int, optional
        As for :func:`two_time_ensemble`; by default 7, and what makes 3000 with the nodes.
    key : PRNG key
        One key, or an array of S keys. All cells draw the same numbers.

    Returns
    -------
    FinalOutputs

    Raises
    ------
    ValueError, TypeError
        As for :func:`two_time_ensemble`; if sizes differ, numbers are out of range, or the rule has
        no clipping norm.
    MemoryError
        If not even one cell fits. Otherwise, as many are computed at once as fit into a quarter of
        the free memory.

    Notes
    -----
    *Derived*; see :func:`two_time_ensemble`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.stochastic_flow.TwoTimeFlow(
    ...     ntkdp.models.mlp([16], 1), jnp.eye(3), jnp.zeros(3), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0))
    >>> final = ntkdp.stochastic_flow.two_time_final_outputs(
    ...     flow, None, learning_rates=[0.1, 0.2], clip_norms=[2.0, 1.0], steps=4,
    ...     noise_multipliers=0.5, key=jax.random.split(jax.random.key(0), 5))
    >>> final.train.shape
    (2, 5, 3, 1)
    """
    check_flow(flow)
    if isinstance(flow.clipping, NoClipping):
        raise ValueError(
            "flow must have a rule with a clipping norm, got NoClipping; for no clipping take "
            "Abadi and a large clip_norm"
        )
    steps = check_steps(steps)
    rates, norms, sigmas = (
        np.asarray(part, np.float64)
        for part in cells_of(jnp.result_type(float), learning_rates, clip_norms, noise_multipliers)
    )
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    drawn.check(flow.n_samples)
    keys = validate.keys(key=key)
    unit = _unit_deviations(flow, bool(np.any(sigmas > 0)), noise_per_group)
    share = drawn.share(flow.n_samples)
    unit = unit / (share * (flow.n_samples if flow.reduction == "mean" else 1))
    nodes = min(steps + 1, _NODES) if nodes is None else nodes
    dtype = flow.points.dtype
    parts = _parts(flow, rates * norms * sigmas, keys.size, nodes)
    found: list[FinalOutputs] = []
    # All parts are filled up to one size, so that one program makes their steps.
    size = max(map(len, parts))
    seeds = keys.reshape(-1)
    for number, part in enumerate(parts):
        first = part[0]
        filled = np.append(part, np.full(size - len(part), first))
        cases = Cases(norms[filled], rates[filled] / rates[first])
        measured = draw(
            flow,
            initial,
            path_of(SGD(), jnp.asarray(rates[first]), steps, added),
            (sigmas[first] * norms[first] * unit) ** 2,
            np.array([steps]),
            cases=Cases(*(jnp.asarray(np.repeat(v, seeds.size), dtype) for v in cases)),
            nodes=nodes,
            rank=max(_MOST_TOGETHER // nodes, 1) if rank is None else rank,
            batches=drawn,
            outputs=True,
            progress=part_of(progress, number, len(parts)),
            key=seeds[np.tile(np.arange(seeds.size), size)],
        )
        assert measured.outputs is not None

        def by_cell(outputs: Array, count: int = len(part)) -> Array:
            return outputs[:, 0].reshape(size, *keys.shape, *outputs.shape[2:])[:count]

        test = None if measured.test_outputs is None else by_cell(measured.test_outputs)
        found.append(FinalOutputs(by_cell(measured.outputs), test))
    order = np.argsort(np.concatenate(parts))
    whole: FinalOutputs = jax.tree.map(lambda *each: jnp.concatenate(each)[order], *found)
    return whole


def _parts(
    flow: TwoTimeFlow, noise: Float[np.ndarray, " C"], n_seeds: int, nodes: int
) -> list[np.ndarray]:
    """Cells with noise of one size, as many at once as there is room for."""
    points, itemsize = flow.points.shape[0], flow.points.dtype.itemsize
    numbers = (nodes + 2) * (points + flow.n_terms * flow.n_samples)
    cell_bytes = _COPIES * numbers * n_seeds * flow.n_outputs * itemsize
    at_once = max(1, int(_SHARE * memory.available_bytes() / cell_bytes))
    sizes = np.full(len(noise), -np.inf)
    sizes[noise > 0] = np.log(noise[noise > 0])
    parts: list[np.ndarray] = []
    left = np.argsort(sizes, kind="stable")
    while len(left):
        same = np.isclose(sizes[left], sizes[left[0]], rtol=0, atol=_SAME_NOISE)
        same |= sizes[left] == sizes[left[0]]
        group = np.sort(left[same])
        parts += np.array_split(group, -(-len(group) // at_once))
        left = left[~same]
    return parts


def _unit_deviations(flow: TwoTimeFlow, noisy: bool, per_group: bool) -> Float[np.ndarray, " R"]:
    """Deviations of the noise of the sum by layer, for a clipping norm and a sigma of one."""
    rule = eqx.tree_at(lambda rule: rule.R, flow.clipping, np.asarray(1.0))
    stds = deviations(rule, 1.0 if noisy else 0.0, len(flow.names), per_group)
    return np.asarray(stds, np.float64)
