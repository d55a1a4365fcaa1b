r"""Outputs that many runs end with, under a kernel of features and a diagonal.

The state of a run are weights of the features, and for each point an amount of its own, which the
diagonal moves. Numbers of all cells and seeds lie in the last two axes, so that a step of all of
them is two products of matrices. All cells draw the same numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray, PyTree, Real
from ntkdp.advisor._planning.features import Features
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss
from ntkdp.noise import Independent, Noise
from ntkdp.optimizers import Optimizer, size_of_state, transition


class Problem(eqx.Module):
    """What all cells share: the kernel, where outputs start, targets, and the mechanism."""

    features: Features
    start: Float[Array, "N K"]
    targets: Array
    loss: Loss
    clipping: ClippingRule
    optimizer: Optimizer
    noise: Noise


class Steps(NamedTuple):
    """How each of C cells makes its steps, arrays ``(C,)``.

    A step moves the weights by ``rate`` times the weighted sum of clipped gradients, plus noise of
    deviation ``deviation``, over ``rows``, the number of samples. Weights of the samples have mean
    one and variance ``variance``: in a single step they are those of Poisson sampling, and in
    merged ones Gaussian. ``total`` is the number of steps.
    """

    rate: Float[Array, " C"]
    clip_norm: Float[Array, " C"]
    deviation: Float[Array, " C"]
    variance: Float[Array, " C"]
    rows: Real[Array, " C"]
    scale: Float[Array, " C"]
    total: Real[Array, " C"]


class _Carry(NamedTuple):
    """Weights of the features ``(s, r, K, C, S)`` and amounts of the points ``(s, N, K, C, S)``.

    The first axis is what the optimizer remembers; ``of_noise`` is what the noise does.
    """

    of_features: Array
    of_points: Array
    of_noise: PyTree


@eqx.filter_jit
def ends(
    problem: Problem, steps: Steps, keys: Key[Array, " S"], level: Array, merged: bool
) -> Float[Array, "C S N K"]:
    """Outputs of all points after the last step, for each cell and key.

    Merged steps of level l + 1 halve those of level l, and refine its Brownian path and weights.
    """
    n, (n_points, n_outputs) = len(problem.targets), problem.start.shape
    phi, left = problem.features.values[:n], problem.features.left
    dtype, rank = problem.start.dtype, problem.features.values.shape[1]
    own = jnp.sum(phi**2, axis=1) + left[:n]
    matrices, gradients, _ = jax.vmap(lambda rate: transition(problem.optimizer, rate, dtype))(
        steps.rate
    )
    size = size_of_state(problem.optimizer)
    is_in = jnp.arange(n)[:, None] < steps.rows
    divisor = steps.rows / steps.scale

    def clipped(f: Array, clip_norm: Array, weights: Array) -> Array:
        """Weighted clipped output gradients ``(n, K)`` of one run."""
        a = problem.loss.output_gradient(f, problem.targets)
        rule = eqx.tree_at(lambda rule: rule.R, problem.clipping, clip_norm)
        # From the largest entry, so that squares stay in range.
        largest = jnp.max(jnp.abs(a), axis=1)
        scaled = a / jnp.where(largest > 0, largest, 1.0)[:, None]
        norms = largest * jnp.sqrt(own * jnp.sum(scaled**2, axis=1))
        moved: Array = (rule.factors(norms) * weights)[:, None] * a
        return moved

    over_runs = jax.vmap(jax.vmap(clipped, (-1, None, -1), -1), (-2, 0, -2), -2)

    def normal(key: PRNGKeyArray, number: Array, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers of a step."""
        if merged:
            return _refined(key, number, level, shape, dtype)
        return jax.random.normal(key, shape, dtype)

    def of_step(number: Array, kind: int) -> Key[Array, " S"]:
        """Keys of a step for one kind of numbers; those of all steps if they are refined."""
        by_kind = _folded(keys, kind)
        return by_kind if merged else _folded(by_kind, number)

    def weights_of(number: Array) -> Float[Array, "n C S"]:
        keys_of_step = of_step(number, 0)
        if merged:
            normals = _over_seeds(lambda key: normal(key, number, (n,)), keys_of_step)
            return 1 + jnp.sqrt(steps.variance)[:, None] * normals[:, None]
        chance = 1 / (1 + steps.variance)
        uniform = _over_seeds(lambda key: jax.random.uniform(key, (n,), dtype), keys_of_step)
        return jnp.where(uniform[:, None] < chance[:, None], 1 / chance[:, None], 0.0)

    def noise_of(number: Array, carried: PyTree) -> tuple[tuple[Array, Array], PyTree]:
        """Noise of the features ``(r, K, S)`` and of the points ``(N, K, S)``."""

        def of_seed(key: PRNGKeyArray, carried: PyTree) -> tuple[tuple[Array, Array], PyTree]:
            def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
                shapes = ((rank, n_outputs), (n_points, n_outputs))
                keys = [jax.random.fold_in(key, i) for i in range(2)]
                first, second = (
                    normal(one, number, shape) for one, shape in zip(keys, shapes, strict=True)
                )
                return first, second

            drawn, carried = problem.noise.next(draw, key, number, carried)
            return drawn, carried

        over_seeds = jax.vmap(of_seed, (0, -1), -1)
        return over_seeds(of_step(number, 1), carried)

    def step(number: Array, carry: _Carry) -> _Carry:
        f = problem.start[:n, :, None, None] + carry.of_points[0, :n]
        f = f + jnp.einsum("nr,rkcs->nkcs", phi, carry.of_features[0])
        weights = weights_of(number) * is_in[..., None]
        charges = over_runs(f, steps.clip_norm, weights) / divisor[:, None]
        drawn, of_noise = noise_of(number, carry.of_noise)
        noise, own_noise = (steps.deviation[:, None] * part[..., None, :] for part in drawn)
        of_features = jnp.einsum("nr,nkcs->rkcs", phi, charges) + noise
        root = jnp.sqrt(left)[:, None, None, None]
        of_points = root * own_noise
        of_points = of_points.at[:n].add(left[:n, None, None, None] * charges)
        going = number < steps.total

        def moved(state: Array, gradient: Array) -> Array:
            kept = jnp.moveaxis(matrices, 0, -1)[:, :, None, None, :, None] * state
            after = jnp.sum(kept, axis=1) + gradients.T[:, None, None, :, None] * gradient
            return jnp.where(going[:, None], after, state)

        return _Carry(
            moved(carry.of_features, of_features), moved(carry.of_points, of_points), of_noise
        )

    runs = (len(steps.rate), len(keys))
    like = (
        jnp.zeros((rank, n_outputs, len(keys)), dtype),
        jnp.zeros((n_points, n_outputs, len(keys)), dtype),
    )
    carry = _Carry(
        jnp.zeros((size, rank, n_outputs, *runs), dtype),
        jnp.zeros((size, n_points, n_outputs, *runs), dtype),
        jax.vmap(problem.noise.start, -1, -1)(like),
    )
    last = lax.fori_loop(0, jnp.max(steps.total), step, carry)
    # The average of the weights, if there is one, comes last.
    measured = 0 if problem.optimizer.average is None else -1
    f = problem.start[..., None, None] + last.of_points[measured]
    f = f + jnp.einsum("nr,rkcs->nkcs", problem.features.values, last.of_features[measured])
    return jnp.moveaxis(f, (2, 3), (0, 1))


def may_merge(problem: Problem) -> bool:
    """Whether steps may be merged: plain ones, with noise of their own."""
    return size_of_state(problem.optimizer) == 1 and isinstance(problem.noise, Independent)


def _folded(keys: Key[Array, " S"], number: Array | int) -> Key[Array, " S"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _over_seeds(draw: Callable[[PRNGKeyArray], Array], keys: Key[Array, " S"]) -> Array:
    """What is drawn with each key, along a last axis."""
    drawn: Array = jax.vmap(draw, out_axes=-1)(keys)
    return drawn


def _refined(
    key: PRNGKeyArray, number: Array, level: Array, shape: tuple[int, ...], dtype: jnp.dtype
) -> Array:
    """Normal numbers of a step: two steps of one level are a step of the level above, over root 2.

    So the levels follow one Brownian path, each on a grid twice as fine.
    """

    def draw(depth: Array, place: Array) -> Array:
        at = jax.random.fold_in(jax.random.fold_in(key, depth), place)
        return jax.random.normal(at, shape, dtype)

    def halve(depth: Array, normals: Array) -> Array:
        place = number >> (level - depth)
        sign = jnp.where(place % 2 == 0, 1.0, -1.0).astype(dtype)
        return (normals + sign * draw(depth, place >> 1)) / jnp.sqrt(jnp.asarray(2.0, dtype))

    zero = jnp.zeros((), level.dtype)
    refined: Array = lax.fori_loop(1, level + 1, halve, draw(zero, number >> level))
    return refined
