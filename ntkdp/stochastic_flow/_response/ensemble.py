"""Noisy runs of any network, from its response to noise and gradients."""

import warnings
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp import optimizers, privacy
from ntkdp._backend import compiled, decompositions, memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.types import Array, Float, KeyLike, LearningRate, Progress
from ntkdp._results.setup import batches_in_words, noise_in_words
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.gradient_flow import with_steps
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import Adam, OptimizerLike
from ntkdp.stochastic_flow._linear_filter import LinearFilter, linear_filter, mixed
from ntkdp.stochastic_flow._response import noise_path
from ntkdp.stochastic_flow._response.flow import ResponseFlow, check_response_flow
from ntkdp.stochastic_flow._response.kernels import NodeKernels, node_kernels
from ntkdp.stochastic_flow._response.noise_free_path import (
    Descent,
    NoiseFreePath,
    follow,
    place_nodes,
    resting,
    slots,
)
from ntkdp.stochastic_flow._response.runs import Runs, Undriven, run
from ntkdp.stochastic_flow._response.schedule import middles, scheduled, steps_of_block
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, deviations
from ntkdp.trajectory import Measurement, Stepping, Trajectory, from_measurements, times_of_steps

#: Nodes, nodes of the noise path alone, and draws, by default.
NODES, NODES_OF_NOISE, DRAWS = 7, 5, 3
#: Deviation of the kernels, relative to them, that is worth a warning.
_LARGEST_ERROR = 0.1
#: Gradients in the shape of the weights that are kept at each node, of a filter with two entries.
_PULLED = 6
#: Copies of a filter's matrices that are alive at once.
_FILTERS = 6
#: Part of the largest entry that is added to a covariance before its root is taken, in epsilons.
_JITTER = 100


def response_ensemble(
    flow: ResponseFlow,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    optimizer: OptimizerLike | None = None,
    noise_per_group: bool = False,
    about: Literal["path", "start"] | ResponseFlow = "path",
    noise_at: Literal["nodes", "steps"] = "nodes",
    nodes: int | None = None,
    draws: int = DRAWS,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw runs of DP-SGD on any network: run without noise, noise alone, and linear response.

    See :class:`ResponseFlow` for the equation. Kernels are taken at a few times, from a few draws
    of the noise, and shared by all runs; between the times they are linear in each argument.

    Parameters
    ----------
    flow : ResponseFlow
        Network, data, loss and clipping.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        :math:`\sigma`: the noise of the summed gradient has standard deviation :math:`\sigma S` on
        every weight, with S the sensitivity. A budget is spent on all the steps.
    sample_rate : float
        q in (0, 1]: 1 for full batches, less for Poisson sampling.
    batches, noise
        Other batches and correlated noise, as for ``dp_sgd.run``.
    optimizer : optimizers.Optimizer or callable, optional
        :class:`ntkdp.optimizers.SGD` or :class:`ntkdp.optimizers.Adam` with all their options, or a
        function of the learning rate that returns an optax transformation whose updates are linear
        in gradients and weights; by default plain steps.
    noise_per_group : bool
        For layerwise clipping: the noise of group r is in proportion to its own R_r, as in
        ``dp_sgd.run``.
    about : "path", "start" or ResponseFlow
        What the response is taken about. ``"path"`` is the run without noise, which is made here
        on full batches. ``"start"`` stays at the initial weights, so that nothing is trained: the
        noise path alone, which is good while the drift of the weights moves the kernel little.
        Another flow, of the same network on public data say, gives its run without noise.
    noise_at : "nodes" or "steps"
        Noise of the weights is drawn at the nodes, with the noise of the outputs between them, or
        at every step. The latter is exact between nodes and takes a forward pass for each run and
        step; with the key of ``dp_sgd.run`` it is the noise of that run, and the prediction is of
        that very run.
    nodes : int, optional
        Number of times at which kernels are taken, at least 2, closer at the beginning. By default
        7, and 5 about the start, where training moves no kernel.
    draws : int
        Number of draws of the noise from which kernels are made.
    record_every : int
        Record every so many steps, and the last one.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True shows a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One key, or an array of S keys for S runs, which get a leading seed axis.

    Returns
    -------
    Trajectory
        Its times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``; if the optimizer is neither Adam nor linear.
    MemoryError
        If kernels or paths do not fit.

    Warns
    -----
    UserWarning
        If kernels differ by more than a tenth between draws of the noise, so that their mean is
        uncertain or each run has another one, or are not linear between neighbouring nodes.

    Notes
    -----
    *Derived*. Exact in law for a model that is linear in its parameters, and exact for any network
    without noise. If there are more than 512 outputs and noise is drawn at the nodes, a block of at
    most 32 steps shares what is drawn between the nodes, and the law is exact at its end.

    A kernel takes :math:`(n K)^2` entries, and there are ``nodes * (nodes + 1) / 2`` of them. That
    of a node with itself is averaged over all draws, and that of two nodes is of one draw, in turn.
    A step costs one product of a kernel with a matrix of S columns, and a block of steps four more.
    The norm of a gradient is that of the path's kernel at the run's own outputs, times how much
    longer the run's own gradient is in the direction of the path's.

    The second moment of Adam is its expectation along the run without noise, with the variance of
    the noise and without that of sampling. If the optimizer averages the weights, distances from
    the run without noise are averaged in the outputs.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.stochastic_flow.ResponseFlow(
    ...     lambda w, x: jnp.tanh(x @ w), jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0))
    >>> runs = ntkdp.stochastic_flow.response_ensemble(
    ...     flow, learning_rate=0.5, steps=4, noise_multiplier=0.1,
    ...     key=jax.random.split(jax.random.key(0), 10))
    >>> runs.loss.shape
    (10, 5)
    """
    flow = check_response_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    drawn.check(flow.n_samples)
    rate = drawn.share(flow.n_samples)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier,
        stepping.steps,
        batches=drawn,
        noise=correlated,
        n_samples=flow.n_samples,
    )
    validate.choice(("nodes", "steps"), noise_at=noise_at)
    if not isinstance(about, ResponseFlow):
        validate.choice(("path", "start"), about=about)
    keys = validate.keys(key=key)
    chosen = optimizers.recognised(optimizers.as_optimizer(optimizer))
    filter = linear_filter(filtered_part(chosen), stepping.learning_rate, stepping.steps)
    times = np.asarray(
        times_of_steps(stepping.learning_rate, np.arange(stepping.steps + 1)), np.float64
    )
    if nodes is None:
        nodes = NODES_OF_NOISE if isinstance(about, str) and about == "start" else NODES
    places = place_nodes(times, _at_least("nodes", nodes, 2))
    groups = flow.weight_groups()
    stds = deviations(flow.clipping, sigma, groups.size, noise_per_group)
    stds = (stds / (rate * flow.data.divisor)).astype(flow.dtype)
    is_noisy = bool(jnp.any(stds > 0))
    if not is_noisy:
        draws, correlated = 1, Independent()
    recursion = correlated.recursion(stepping.steps)
    _require_room(
        flow, keys.size, len(places), stepping, noise_at, outputs, draws, len(recursion.enters)
    )
    of_noise = mixed(filter, recursion)
    stds_of_leaves = [stds[group] for group in groups.leaf_to_group]
    with _progress.listening(progress, "drawing runs of the network") as listener:
        variances = [std**2 for std in stds_of_leaves]
        descent = Descent(
            about if isinstance(about, ResponseFlow) else flow,
            chosen,
            stepping.learning_rate,
            variances,
            validate.choice(
                ("path", "start"), about="path" if isinstance(about, ResponseFlow) else about
            )
            == "path",
        )
        path = _path(flow, descent, stepping, filter, places)
        transfers = noise_path.transfers(filter, of_noise, times, places, path)
        law = noise_path.noise_path(flow, path, transfers, stds_of_leaves, jnp.asarray(places))
        draw_keys = jax.random.split(jax.random.key(0), _at_least("draws", draws, 1))
        kernels = node_kernels(law, stds**2, draw_keys)
        if is_noisy or rate < 1 or not path.is_own:  # otherwise there is nothing to respond to
            _warn(kernels, times[places], draws)
        flat_keys = keys.reshape(-1)
        nodes_seen, roots, steps_seen = None, None, None
        if noise_at == "steps":
            slot = jnp.asarray(slots(places, stepping.steps))
            seen = noise_path.at_steps(law, descent, correlated, slot, flat_keys)
            steps_seen = _less(seen.outputs, path.outputs)
        else:
            seen = noise_path.at_nodes(law, flat_keys)
            nodes_seen = _less(seen.outputs, path.outputs[places])
            roots = _roots(kernels.covariance) if is_noisy else None
        schedule, propagators = scheduled(
            filter,
            of_noise,
            times,
            places,
            stepping.recorded,
            flow.points.shape[0] * flow.n_outputs,
            np.dtype(flow.dtype),
        )
        own_norms = noise_path.path_norms(law, *map(jnp.asarray, middles(schedule)))
        undriven = Undriven(nodes_seen, roots, steps_seen, seen.lengths)
        average = optimizers.average_of(chosen)
        average = None if average is None else jnp.asarray(average, flow.dtype)
        runs = Runs(flow, path, own_norms, kernels, undriven, flat_keys, average, drawn, outputs)
        measured = run(runs, schedule, propagators, len(stepping.recorded), listener)
        by_seed: Measurement = jax.tree.map(
            lambda path: jnp.swapaxes(path, 0, 1).reshape(
                *keys.shape, *path.shape[:1], *path.shape[2:]
            ),
            measured,
        )
        setup = with_steps(flow.setup(), stepping, sigma, rate, noise_per_group, chosen)
        return from_measurements(
            stepping.times,
            by_seed,
            steps=jnp.asarray(stepping.recorded),
            setup=replace(setup, batches=batches_in_words(drawn), noise=noise_in_words(correlated)),
        )


def _at_least(name: str, value: int, least: int) -> int:
    if validate.count(**{name: value}) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return value


def filtered_part(optimizer: OptimizerLike) -> OptimizerLike:
    """The optimizer as a filter: that of Adam acts in coordinates that its metric divides by."""
    if not isinstance(optimizer, Adam):
        return optimizer

    def moments(learning_rate: LearningRate) -> optax.GradientTransformation:
        return optax.chain(
            optax.ema(float(optimizer.b1), debias=True),
            optax.add_decayed_weights(float(optimizer.weight_decay)),
            optax.scale_by_learning_rate(learning_rate),
        )

    return moments


def _path(
    flow: ResponseFlow,
    descent: Descent,
    stepping: Stepping,
    filter: LinearFilter,
    places: np.ndarray,
) -> NoiseFreePath:
    """The path that the steps without noise make."""
    stays = not descent.is_driven and bool(np.all(filter.matrices[:, 0, 0] == 1))
    if stays and not isinstance(descent.optimizer, Adam):
        return resting(flow, stepping.steps, len(places), descent.optimizer)
    watched = None if descent.source is flow else flow
    return follow(descent, watched, jnp.asarray(slots(places, stepping.steps)), len(places))


def _less(
    seen: Float[Array, "times N K S"], path: Float[Array, "times N K"]
) -> Float[Array, "times NK S"]:
    moved = seen - path[..., None]
    return moved.reshape(len(moved), -1, moved.shape[-1])


@jax.jit
def _roots(covariance: Float[Array, "nodes NK NK"]) -> Float[Array, "M NK NK"]:
    """Roots of the mean covariance in each cell."""
    within = (covariance[1:] + covariance[:-1]) / 2
    size = within.shape[-1]
    largest = jnp.max(jnp.diagonal(within, axis1=1, axis2=2), axis=1)
    jitter = _JITTER * jnp.finfo(within.dtype).eps * largest
    eye = jnp.eye(size, dtype=within.dtype)
    roots: Array = decompositions.cholesky(within + jitter[:, None, None] * eye)
    return roots


def _warn(kernels: NodeKernels, times: Float[np.ndarray, " nodes"], draws: int) -> None:
    """Warn if kernels vary much between draws, or are curved between nodes."""
    spread = float(jnp.max(kernels.spread)) / draws**0.5
    if draws > 1 and spread > _LARGEST_ERROR:
        warnings.warn(
            f"kernels are known to {spread:.0%} only, from draws={draws}; use more draws",
            stacklevel=3,
        )
    curvature = float(_curvature(kernels.between[: len(times)], jnp.asarray(times)))
    if curvature > _LARGEST_ERROR:
        warnings.warn(
            f"kernels are not linear between nodes={len(times)} times, by {curvature:.0%}; "
            "use more nodes",
            stacklevel=3,
        )


@jax.jit
def _curvature(kernels: Float[Array, "nodes T NK nK"], times: Float[Array, " nodes"]) -> Array:
    """The error of linear interpolation between neighbours, relative to the kernels."""
    worst = jnp.zeros((), kernels.dtype)
    # At a learning rate of zero no time passes.
    lengths = jnp.maximum(jnp.diff(times), jnp.finfo(times.dtype).eps * times[-1])
    for k, here in enumerate(kernels[1:-1], start=1):
        one, other = lengths[k - 1], lengths[k]
        across = (other * kernels[k - 1] + one * kernels[k + 1]) / (one + other)
        # A parabola differs from its chord by the product of the distances to both ends.
        part = jnp.maximum(one, other) ** 2 / (4 * one * other)
        bend = part * jnp.linalg.norm(across - here)
        worst = jnp.maximum(worst, bend / jnp.linalg.norm(here))
    return worst


def is_room(
    flow: ResponseFlow, n_runs: int, n_nodes: int, stepping: Stepping, carried: int
) -> bool:
    """Whether runs with noise at the nodes fit the memory."""
    try:
        _require_room(flow, n_runs, n_nodes, stepping, "nodes", False, DRAWS, carried)
    except MemoryError:
        return False
    return True


def _require_room(
    flow: ResponseFlow,
    n_runs: int,
    n_nodes: int,
    stepping: Stepping,
    noise_at: str,
    outputs: bool,
    draws: int,
    carried: int,
) -> None:
    n_points = flow.points.shape[0]
    rows, columns = n_points * flow.n_outputs, flow.n_samples * flow.n_outputs
    n_kernels = n_nodes * (n_nodes + 1) // 2
    kernels = n_kernels * flow.weight_groups().size * rows * columns + 3 * n_nodes * rows**2
    states = stepping.steps + 1 if noise_at == "steps" else 3 * n_nodes
    # Outputs and charges at the steps of a block.
    longest = int(np.diff(place_nodes(np.arange(stepping.steps + 1.0), n_nodes)).max())
    states += 2 * steps_of_block(longest)
    kept = len(stepping.recorded) * bool(outputs)
    # Weights at the nodes, of the path and of the draws, and gradients that charges cause there.
    networks = (draws + 1 + _PULLED) * n_nodes
    # Of the noise, each run carries so many vectors, of outputs or of weights.
    if noise_at == "steps":
        networks += n_runs * carried
    else:
        states += carried
        networks += carried
        kernels += _FILTERS * stepping.steps * carried * (carried + n_nodes)
    memory.require(
        ((states + kept) * rows * n_runs + kernels) * np.dtype(flow.dtype).itemsize
        + networks * compiled.bytes_of(flow.params),
        f"the response of {n_runs:,} runs with {n_kernels} kernels of {rows:,} x {columns:,}",
        "use fewer samples, fewer nodes, fewer keys at a time, or float32",
    )
