"""The run without noise that a response is taken about."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp._backend.types import Array, Float, LearningRate, Params, PyTree
from ntkdp._gradients import clipped_sum
from ntkdp.stochastic_flow._response.flow import ResponseFlow


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
    """

    params: Params
    outputs: Float[Array, "steps1 N K"]
    charges: Float[Array, "steps T n K"] | None
    norms: Float[Array, "steps T n"] | None
    x: Array

    @property
    def is_own(self) -> bool:
        """Whether it is trained on the samples that are predicted."""
        return self.norms is not None


def place_nodes(times: Float[np.ndarray, " steps1"], count: int) -> np.ndarray:
    """Numbers of at most ``count`` steps, evenly in time, with the first and the last."""
    wanted = np.linspace(times[0], times[-1], count)
    nearest = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    return np.unique(np.concatenate([[0], nearest, [len(times) - 1]]))


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
    """Full-batch steps without noise; if they are not driven, the optimizer acts by itself."""

    source: ResponseFlow
    optimizer: Callable[[LearningRate], optax.GradientTransformation]
    learning_rate: LearningRate
    is_driven: bool = eqx.field(static=True)

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer at its learning rate."""
        return self.optimizer(self.learning_rate)

    def step(self, params: Params, state: PyTree) -> tuple[Params, PyTree, "Seen | None"]:
        """Parameters and state after a step, and what the samples saw before it."""
        gradient, seen = self._gradient(params)
        params, state = moved(self.transformation(), params, state, gradient)
        return params, state, seen

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


def moved(
    transformation: optax.GradientTransformation, params: Params, state: PyTree, gradient: Params
) -> tuple[Params, PyTree]:
    """Parameters and state of an optimizer after a step."""
    gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, params)
    # Optimizers rely on promotion, of their count of steps for one.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = transformation.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@eqx.filter_jit
def follow(
    descent: Descent, watched: ResponseFlow | None, slot: Array, n_nodes: int
) -> NoiseFreePath:
    """The path of a descent, seen by the points of ``watched`` (None: its own).

    ``slot`` says for each step which node it is.
    """
    source = descent.source

    def step(
        carry: tuple[Params, PyTree, Params], at: Array
    ) -> tuple[tuple[Params, PyTree, Params], tuple[Array, Seen | None]]:
        params, state, kept = carry
        kept = jax.tree.map(lambda nodes, leaf: nodes.at[at].set(leaf), kept, params)
        after, state, seen = descent.step(params, state)
        train = None if seen is None else seen.outputs
        return (after, state, kept), (_watched(source, watched, params, train), seen)

    kept = jax.tree.map(
        lambda leaf: jnp.zeros((n_nodes + 1, *leaf.shape), leaf.dtype), source.params
    )
    start = (source.params, descent.transformation().init(source.params), kept)
    (params, _, kept), (outputs, seen) = lax.scan(step, start, slot[:-1])
    kept = jax.tree.map(lambda nodes, leaf: nodes.at[slot[-1]].set(leaf)[:-1], kept, params)
    last = _watched(source, watched, params, None)
    return NoiseFreePath(
        params=kept,
        outputs=jnp.concatenate([outputs, last[None]]),
        charges=None if seen is None else seen.charges,
        norms=None if seen is None or watched is not None else seen.norms,
        x=source.x,
    )


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


def resting(flow: ResponseFlow, steps: int, n_nodes: int) -> NoiseFreePath:
    """The path that stays at the initial parameters."""
    outputs = flow.outputs(flow.params, flow.points)
    return NoiseFreePath(
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n_nodes, *leaf.shape)), flow.params),
        jnp.broadcast_to(outputs, (steps + 1, *outputs.shape)),
        None,
        None,
        flow.x,
    )
