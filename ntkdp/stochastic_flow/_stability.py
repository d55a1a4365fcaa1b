"""The curvature that training meets, and the learning rate that it allows."""

from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp._backend import norms
from ntkdp._backend.types import Array, Params
from ntkdp.optimizers import Adam, Optimizer, OptimizerLike, transition
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._response.noise_path import diagonal_blocks

#: Products with the curvature: its largest eigenvalue is then known to a few percent.
_ITERATIONS = 40
#: Learning rates that are tried at once, in as many rounds, between these parts of 2 / curvature.
_TRIED, _ROUNDS, _FROM, _TO = 65, 3, 1e-3, 1e3

#: Curvature at each of some parameters.
Curvatures: TypeAlias = Array


@eqx.filter_jit
def curvatures(flow: ResponseFlow, params: Params, metrics: Params | None) -> Curvatures:
    r"""Largest eigenvalue of the clipped curvature at parameters with a leading axis.

    It is that of :math:`D \sum_i \sum_r C_{ir} J_{ir}^\top A_i J_i / n`, with A the Hessian of the
    loss in the outputs and D the metric of the optimizer.
    """

    def at(place: tuple[Params, Params | None]) -> Array:
        return _largest(flow, *place)

    result: Array = lax.map(at, (params, metrics))
    return result


def _largest(flow: ResponseFlow, params: Params, metric: Params | None) -> Array:
    n, groups = flow.n_samples, flow.weight_groups()
    outputs = flow.outputs(params, flow.x)

    def gradient(f: Array) -> Array:
        return flow.loss.output_gradient(f, flow.targets)

    lengths = norms.through_kernel(diagonal_blocks(flow, params)[:, :n], gradient(outputs))
    factors = flow.clipping.by_group(lengths) / flow.data.divisor

    def forward(params: Params) -> Array:
        return flow.outputs(params, flow.x)

    _, pull = jax.vjp(forward, params)

    def product(v: Params) -> Params:
        _, moved = jax.jvp(forward, (params,), (v,))
        _, bent = jax.jvp(gradient, (outputs,), (moved,))
        by_group = [jax.tree.leaves(pull(c[:, None] * bent)[0]) for c in factors]
        leaves = [by_group[group][leaf] for leaf, group in enumerate(groups.leaf_to_group)]
        pulled = jax.tree.unflatten(jax.tree.structure(params), leaves)
        if metric is None:
            return pulled
        return jax.tree.map(lambda leaf, d: leaf * d.astype(leaf.dtype), pulled, metric)

    def size(v: Params) -> Array:
        return jnp.sqrt(sum(jnp.sum(leaf.astype(flow.dtype) ** 2) for leaf in jax.tree.leaves(v)))

    def iterate(_: Array, state: tuple[Params, Array]) -> tuple[Params, Array]:
        v, _ = state
        moved = product(v)
        length = size(moved)
        scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1.0), 0.0)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), moved), length

    start = optax.tree.random_like(jax.random.key(0), params)
    largest: Array = lax.fori_loop(0, _ITERATIONS, iterate, (start, jnp.zeros((), flow.dtype)))[1]
    return largest


def largest_stable_rate(optimizer: OptimizerLike, curvature: float) -> float | None:
    """The learning rate up to which steps on a quadratic of this curvature do not grow.

    None for an optimizer of which that is not known.
    """
    if not curvature > 0:
        return float("inf")
    if isinstance(optimizer, Adam):
        b1 = float(optimizer.b1)
        return 2 * (1 + b1) / ((1 - b1) * curvature)
    if not isinstance(optimizer, Optimizer) or not optimizer.is_linear:
        return None
    low, high = _FROM * 2 / curvature, _TO * 2 / curvature
    for _ in range(_ROUNDS):
        rates = np.geomspace(low, high, _TRIED)
        steps = jax.vmap(lambda rate: transition(optimizer, rate))(jnp.asarray(rates))
        matrices = np.array(steps.of_state)
        matrices[:, :, 0] += curvature * np.asarray(steps.of_gradient)
        grows = np.abs(np.linalg.eigvals(matrices)).max(axis=1) > 1 + 1e-6
        first = int(np.argmax(grows)) if grows.any() else _TRIED - 1
        low, high = float(rates[max(first - 1, 0)]), float(rates[first])
    return low
