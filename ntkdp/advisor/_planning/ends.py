r"""Outputs that many runs end with, under kernels of features and a diagonal.

With v the variance of the noise on the weights at a step, which adds dv, a run is

.. math:: f &= \rho(v) f_0 + \Phi \Big[ \sum_m \psi_m(v)\, \theta_m + b \Big], \qquad
    \theta_m^+ = \theta_m - \frac{\eta}{q n} \psi_m(v) \Phi^\top (s\, C a), \\
    b^+ &= e^{\lambda(v) - \lambda(v + dv)} b + \sqrt{\alpha(v, v)\, dv}\; z,

and the same for the diagonal, a feature that each sample has to itself, with the root of alpha for
psi; psi, alpha, the share rho that noise leaves of the outputs at the start, and lambda, by which
what noise has made fades, are those of `Features`. A frozen kernel is that of a linear model.

Numbers of all cells and seeds lie in the last two axes, so that a step of all of them is two
products of matrices. All cells draw the same numbers.
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
    """What is followed, with what the optimizer remembers along the first axis.

    Gradients gather in ``of_features`` ``(s, M, r, K, C, S)``, the weights of the features, M for
    the kernel between times, and in ``of_samples`` ``(s, n, K, C, S)``, those that a sample has to
    itself. Noise gathers in ``noise`` ``(s, r, K, C, S)`` and ``own_noise`` ``(s, N, K, C, S)``.
    ``variance`` ``(C,)`` is that of the noise on the weights, and ``of_noise`` what it carries on.
    """

    of_features: Array
    of_samples: Array
    noise: Array
    own_noise: Array
    variance: Array
    of_noise: PyTree


class _Kernel(NamedTuple):
    """A kernel that noise has moved, by cell: as in `Features`, with cells along the last axis."""

    own: Float[Array, "N C"]
    parts: Float[Array, "M r C"]
    sizes: Float[Array, "modes C"]
    kept: Float[Array, " C"]
    fades: Float[Array, "modes C"]

    @classmethod
    def at(cls, features: Features, variance: Float[Array, " C"]) -> "_Kernel":
        """Between nodes, linear in the variance of the noise on the weights."""
        arrays = (
            features.own, features.parts, features.sizes, features.kept, features.fades,
        )  # fmt: skip
        last = len(features.nodes) - 1
        if last == 0:
            own, parts, sizes, kept, fades = (
                jnp.repeat(array[0][..., None], len(variance), axis=-1) for array in arrays
            )
            return cls(own, parts, sizes, kept, fades)
        place = jnp.searchsorted(features.nodes, variance, side="right") - 1
        place = jnp.clip(place, 0, last - 1)
        low, high = features.nodes[place], features.nodes[place + 1]
        share = jnp.clip((variance - low) / (high - low), 0.0, 1.0)
        own, parts, sizes, kept, fades = (
            (1 - share) * jnp.moveaxis(array[place], 0, -1)
            + share * jnp.moveaxis(array[place + 1], 0, -1)
            for array in arrays
        )
        return cls(own, parts, sizes, kept, fades)


@eqx.filter_jit
def ends(
    problem: Problem, steps: Steps, keys: Key[Array, " S"], level: Array, merged: bool
) -> Float[Array, "C S N K"]:
    """Outputs of all points after the last step, for each cell and key.

    Merged steps of level l + 1 halve those of level l, and refine its Brownian path and weights.
    """
    n, (n_points, n_outputs) = len(problem.targets), problem.start.shape
    dtype, features = problem.start.dtype, problem.features
    rank = features.values.shape[1]
    matrices, gradients, _ = jax.vmap(lambda rate: transition(problem.optimizer, rate, dtype))(
        steps.rate
    )
    size = size_of_state(problem.optimizer)
    is_in = jnp.arange(n)[:, None] < steps.rows
    divisor = steps.rows / steps.scale
    last_step = jnp.max(steps.total)
    # Noise of a step on a weight; only plain steps of noise of its own move the kernel.
    added = jnp.square(steps.rate * steps.deviation)

    def clipped(f: Array, clip_norm: Array, weights: Array, own: Array) -> Array:
        """Weighted clipped output gradients ``(n, K)`` of one run."""
        a = problem.loss.output_gradient(f, problem.targets)
        rule = eqx.tree_at(lambda rule: rule.R, problem.clipping, clip_norm)
        # From the largest entry, so that squares stay in range.
        largest = jnp.max(jnp.abs(a), axis=1)
        scaled = a / jnp.where(largest > 0, largest, 1.0)[:, None]
        norms = largest * jnp.sqrt(own * jnp.sum(scaled**2, axis=1))
        moved: Array = (rule.factors(norms) * weights)[:, None] * a
        return moved

    over_runs = jax.vmap(jax.vmap(clipped, (-1, None, -1, None), -1), (-2, 0, -2, -1), -2)

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

    def outputs(carry: _Carry, kernel: _Kernel, state: int, rows: slice) -> Array:
        """Outputs by what the optimizer holds at this place of its state."""
        of_features = jnp.sum(kernel.parts[:, :, None, :, None] * carry.of_features[state], axis=0)
        of_samples = kernel.sizes[-1, :, None] * carry.of_samples[state]
        f = problem.start[rows, :, None, None] * kernel.kept[:, None]
        f = f + carry.own_noise[state, rows]
        f = f + jnp.einsum("nr,rkcs->nkcs", features.values[rows], of_features + carry.noise[state])
        return f.at[:n].add(root[:n] * of_samples)

    root = jnp.sqrt(features.left)[:, None, None, None]

    def step(number: Array, carry: _Carry) -> _Carry:
        kernel = _Kernel.at(features, carry.variance)
        weights = weights_of(number) * is_in[..., None]
        f = outputs(carry, kernel, 0, slice(n))
        charges = over_runs(f, steps.clip_norm, weights, kernel.own[:n]) / divisor[:, None]
        gathered = jnp.einsum("nr,nkcs->rkcs", features.values[:n], charges)
        (normals, own_normals), of_noise = noise_of(number, carry.of_noise)
        going = number < steps.total
        variance = carry.variance + jnp.where(going, added, 0.0)
        fade = jnp.exp(kernel.fades - _Kernel.at(features, variance).fades)
        deviation = steps.deviation[:, None]

        def moved(state: Array, gradient: Array) -> Array:
            by_axes = (1,) * (gradient.ndim - 2)
            held = matrices.transpose(1, 2, 0).reshape(size, size, *by_axes, -1, 1) * state
            pushed = gradients.T.reshape(size, *by_axes, -1, 1) * gradient
            return jnp.where(going[:, None], jnp.sum(held, axis=1) + pushed, state)

        return _Carry(
            moved(carry.of_features, kernel.parts[:, :, None, :, None] * gathered),
            moved(carry.of_samples, kernel.sizes[-1, :, None] * root[:n] * charges),
            moved(
                fade[:-1, None, :, None] * carry.noise,
                deviation * kernel.sizes[:-1, None, :, None] * normals[:, :, None],
            ),
            moved(
                fade[-1, :, None] * carry.own_noise,
                deviation * kernel.sizes[-1, :, None] * root * own_normals[:, :, None],
            ),
            variance,
            of_noise,
        )

    n_parts, runs = features.parts.shape[1], (len(steps.rate), len(keys))
    like = (
        jnp.zeros((rank, n_outputs, len(keys)), dtype),
        jnp.zeros((n_points, n_outputs, len(keys)), dtype),
    )
    carry = _Carry(
        jnp.zeros((size, n_parts, rank, n_outputs, *runs), dtype),
        jnp.zeros((size, n, n_outputs, *runs), dtype),
        jnp.zeros((size, rank, n_outputs, *runs), dtype),
        jnp.zeros((size, n_points, n_outputs, *runs), dtype),
        jnp.zeros(len(steps.rate), dtype),
        jax.vmap(problem.noise.start, -1, -1)(like),
    )
    last = lax.fori_loop(0, last_step, step, carry)
    # The average of the weights, if there is one, comes last.
    measured = 0 if problem.optimizer.average is None else -1
    f = outputs(last, _Kernel.at(features, last.variance), measured, slice(None))
    return jnp.moveaxis(f, (2, 3), (0, 1))


def is_plain(optimizer: Optimizer, noise: Noise) -> bool:
    """Whether steps are plain and have noise of their own: then they may be merged."""
    return size_of_state(optimizer) == 1 and isinstance(noise, Independent)


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
