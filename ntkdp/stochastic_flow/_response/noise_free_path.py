"""The run without noise that a response is taken about."""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp import optimizers
from ntkdp._backend.types import Array, Float, LearningRate, Params, PyTree
from ntkdp._gradients import clipped_sum
from ntkdp.optimizers import Adam, OptimizerLike
from ntkdp.stochastic_flow._response.flow import ResponseFlow

#: Nodes lie at this power of even parts of the time: 1 would place them evenly.
_GRADING = 1.5


class NoiseFreePath(NamedTuple):
    """A run without noise, seen by the points of a flow.

    Attributes
    ----------
    params
        At the nodes, with a leading axis of them.
    outputs
        Of all points at each step, ``(steps + 1, N, K)``.
    charges, norms
        Clipped output gradients of each step over the divisor of the reduction, ``(steps, T, n,
        K)``, and norms of the gradients ``(steps, T, n)``, of the samples that the run is trained
        on. Charges are None if nothing drives it, and so are norms of samples of another flow.
    x
        Those samples.
    averaged
        Outputs at the average of the weights, if the optimizer keeps one.
    metric
        What the optimizer multiplies a gradient by at the nodes, besides its filter, in the shape
        of the parameters with a leading axis; None for one.
    """

    params: Params
    outputs: Float[Array, "steps1 N K"]
    charges: Float[Array, "steps T n K"] | None
    norms: Float[Array, "steps T n"] | None
    x: Array
    averaged: Float[Array, "steps1 N K"] | None = None
    metric: Params | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is trained on the samples that are predicted."""
        return self.norms is not None


def place_nodes(times: Float[np.ndarray, " steps1"], count: int) -> np.ndarray:
    """Numbers of at most ``count`` steps, the first and the last among them.

    They lie closer at the beginning, where training moves kernels most and the loss falls most.
    """
    last = len(times) - 1
    order = np.arange(min(count, len(times)))
    along = np.linspace(0, 1, len(order)) ** _GRADING
    wanted = times[0] + (times[-1] - times[0]) * along
    nearest = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    # Each a step of its own, with room for those that follow.
    places = np.maximum.accumulate(nearest - order) + order
    places = np.minimum(places, last - order[::-1])
    places[0], places[-1] = 0, last
    return places


def cells(times: Float[np.ndarray, " steps1"], nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell between nodes that each step is in, and how far along it, in time, from 0 to 1."""
    steps = np.arange(len(times))
    cell = np.clip(np.searchsorted(nodes, steps, side="right") - 1, 0, len(nodes) - 2)
    start, stop = times[nodes[cell]], times[nodes[cell + 1]]
    return cell, (times - start) / np.where(stop > start, stop - start, 1.0)


def slots(nodes: np.ndarray, steps: int) -> np.ndarray:
    """Which node each step is, or one past the last if it is none."""
    result = np.full(steps + 1, len(nodes))
    result[nodes] = np.arange(len(nodes))
    return result


class Descent(eqx.Module):
    r"""Full-batch steps without noise; if they are not driven, the optimizer acts by itself.

    Adam is told of the noise: its second moment is that of the gradient without noise plus the
    variance of the noise, which is what it expects of a noisy gradient.
    """

    source: ResponseFlow
    optimizer: OptimizerLike
    learning_rate: LearningRate
    noise_variances: list[Array]
    is_driven: bool = eqx.field(static=True)

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer at its learning rate."""
        return self.optimizer(self.learning_rate)

    def init(self) -> PyTree:
        """The optimizer's state before the first step."""
        if isinstance(self.optimizer, Adam):
            return self._moments().init(self.source.params)
        return self.transformation().init(self.source.params)

    def step(self, params: Params, state: PyTree) -> "Step":
        """A step, with what the samples saw before it."""
        gradient, seen = self._gradient(params)
        gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, params)
        metric = None
        if isinstance(self.optimizer, Adam):
            updates, state, metric = self._expected_adam(self.optimizer, gradient, state, params)
        else:
            updates, state = optimizers.updated(self.transformation(), gradient, state, params, 0.0)
        return Step(optax.apply_updates(params, updates), state, seen, metric)

    def _moments(self) -> optax.GradientTransformation:
        assert isinstance(self.optimizer, Adam)
        return optax.scale_by_adam(self.optimizer.b1, self.optimizer.b2)

    def _expected_adam(
        self, adam: Adam, gradient: Params, state: optax.ScaleByAdamState, params: Params
    ) -> tuple[Params, optax.ScaleByAdamState, Params]:
        """Updates, state, and what multiplies the first moment."""
        count = state.count
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            _, state = self._moments().update(gradient, state, params)
            moments = optax.tree.bias_correction(state.mu, adam.b1, state.count)
            squares = optax.tree.bias_correction(state.nu, adam.b2, state.count)
            variances = jax.tree.unflatten(jax.tree.structure(params), self.noise_variances)

            def inverse(square: Array, variance: Array) -> Array:
                if adam.correct_noise:
                    return 1 / jnp.sqrt(jnp.maximum(square, adam.floor))
                return 1 / (jnp.sqrt(square + variance) + adam.eps)

            metric = jax.tree.map(inverse, squares, variances)
            chosen = self.learning_rate
            rate = jnp.asarray(chosen(count) if callable(chosen) else chosen)
            updates = jax.tree.map(
                lambda m, inverse, w: (-rate * (m * inverse + adam.weight_decay * w)).astype(
                    w.dtype
                ),
                moments,
                metric,
                params,
            )
        return updates, state, jax.tree.map(lambda d, w: d.astype(w.dtype), metric, params)

    def _gradient(self, params: Params) -> tuple[Params, "Seen | None"]:
        source = self.source
        if not self.is_driven:
            return jax.tree.map(jnp.zeros_like, params), None
        summed = clipped_sum.clipped_sum(
            source.apply_fn,
            source.loss,
            source.clipping,
            source.weight_groups(),
            params,
            source.x,
            source.targets,
            None,
            lambda leaves: leaves,
        )
        train = summed.outputs.astype(source.dtype)
        a = source.loss.output_gradient(train, source.targets)
        charges = summed.factors[:, :, None] * a[None] / source.data.divisor
        gradient = [leaf / source.data.divisor for leaf in summed.leaves]
        structure = jax.tree.structure(params)
        seen = Seen(train, charges.astype(source.dtype), summed.norms.astype(source.dtype))
        return jax.tree.unflatten(structure, gradient), seen


class Seen(NamedTuple):
    """Outputs, charges and gradient norms of the samples of a run."""

    outputs: Float[Array, "n K"]
    charges: Float[Array, "T n K"]
    norms: Float[Array, "T n"]


class Step(NamedTuple):
    """Parameters and optimizer's state after a step, what was seen before it, and its metric."""

    params: Params
    state: PyTree
    seen: Seen | None
    metric: Params | None


@eqx.filter_jit
def follow(
    descent: Descent, watched: ResponseFlow | None, slot: Array, n_nodes: int
) -> NoiseFreePath:
    """The path of a descent, seen by the points of ``watched`` (None: its own).

    ``slot`` says for each step which node it is.
    """
    source = descent.source

    def outputs(params: Params, train: Array | None) -> Array:
        return _watched(source, watched, params, train)

    def keep(kept: Params, at: Array, leaves: Params) -> Params:
        return jax.tree.map(lambda nodes, leaf: nodes.at[at].set(leaf), kept, leaves)

    def step(carry: _Carry, at: Array) -> tuple[_Carry, tuple[Array, Seen | None, Array | None]]:
        params, state, average, kept, metrics = carry
        after = descent.step(params, state)
        train = None if after.seen is None else after.seen.outputs
        at_average = None if average is None else outputs(_in_dtype(average, params), None)
        average = optimizers.next_average(descent.optimizer, average, after.params)
        if after.metric is not None:
            # The last node has the metric of the last step.
            metrics = keep(keep(metrics, at, after.metric), jnp.asarray(n_nodes - 1), after.metric)
        carry = (after.params, after.state, average, keep(kept, at, params), metrics)
        return carry, (outputs(params, train), after.seen, at_average)

    empty = jax.tree.map(
        lambda leaf: jnp.zeros((n_nodes + 1, *leaf.shape), leaf.dtype), source.params
    )
    average = optimizers.start_average(descent.optimizer, source.params)
    metrics = empty if isinstance(descent.optimizer, Adam) else None
    start = (source.params, descent.init(), average, empty, metrics)
    (params, _, average, kept, metrics), (seen_outputs, seen, averaged) = lax.scan(
        step, start, slot[:-1]
    )
    if average is not None and averaged is not None:
        last = outputs(_in_dtype(average, params), None)
        averaged = jnp.concatenate([averaged, last[None]])
    kept = keep(kept, slot[-1], params)
    return NoiseFreePath(
        params=jax.tree.map(lambda nodes: nodes[:-1], kept),
        outputs=jnp.concatenate([seen_outputs, outputs(params, None)[None]]),
        charges=None if seen is None else seen.charges,
        norms=None if seen is None or watched is not None else seen.norms,
        x=source.x,
        averaged=averaged,
        metric=jax.tree.map(lambda nodes: nodes[:-1], metrics),
    )


#: Parameters, optimizer and average, and parameters and metrics at the nodes.
_Carry: TypeAlias = tuple[Params, PyTree, Params | None, Params, Params | None]


def _in_dtype(average: Params, params: Params) -> Params:
    return jax.tree.map(lambda mean, w: mean.astype(w.dtype), average, params)


def _watched(
    source: ResponseFlow, watched: ResponseFlow | None, params: Params, train: Array | None
) -> Float[Array, "N K"]:
    """Outputs of the watched points, of which those of the training samples may be known."""
    if watched is not None:
        return watched.outputs(params, watched.points)
    if train is None:
        return source.outputs(params, source.points)
    if source.test_x is None:
        return train
    return jnp.concatenate([train, source.outputs(params, source.test_x)])


def resting(
    flow: ResponseFlow, steps: int, n_nodes: int, optimizer: OptimizerLike
) -> NoiseFreePath:
    """The path that stays at the initial parameters."""
    outputs = flow.outputs(flow.params, flow.points)
    outputs = jnp.broadcast_to(outputs, (steps + 1, *outputs.shape))
    return NoiseFreePath(
        params=jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (n_nodes, *leaf.shape)), flow.params
        ),
        outputs=outputs,
        charges=None,
        norms=None,
        x=flow.x,
        averaged=None if optimizers.average_of(optimizer) is None else outputs,
    )
