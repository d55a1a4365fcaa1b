r"""Noise on the path of the optimizer, and the outputs of the network along it.

A run on the noise path descends with the output gradients :math:`\bar C \bar a` of the path without
noise, which do not respond to it, through its own Jacobian:

.. math:: \bar g_k = J(w_k)^\top \bar C_k \bar a_k + noise .

Without noise it is the path. What the output gradients make of the noise is left to the response.
"""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp import optimizers
from ntkdp._backend import norms
from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, Float, Key, Params, PRNGKeyArray, PyTree
from ntkdp._gradients import clipped_sum, per_sample
from ntkdp.noise import Noise
from ntkdp.stochastic_flow._linear_filter import LinearFilter
from ntkdp.stochastic_flow._response.flow import ResponseFlow
from ntkdp.stochastic_flow._response.noise_free_path import Descent, NoiseFreePath, cells


class Transfers(NamedTuple):
    """How states of the filter go from node to node.

    Attributes
    ----------
    carried, added
        The matrix of the noise's state, which begins with that of the filter, and the root of the
        covariance of the noise that is added, ``(M, D, D)``.
    before, after
        What drives the state, charges of the path, through the Jacobians of a cell's first and of
        its last node, ``(M, d, T, n, K)``; None if nothing drives it.
    """

    carried: Float[Array, "M D D"]
    added: Float[Array, "M D D"]
    before: Float[Array, "M d T n K"] | None
    after: Float[Array, "M d T n K"] | None


def transfers(
    filter: LinearFilter,
    of_noise: LinearFilter,
    times: np.ndarray,
    nodes: np.ndarray,
    path: NoiseFreePath,
) -> Transfers:
    """Transfers between neighbouring nodes, for noise of unit deviation and its filter."""
    carried, added, before, after = [], [], [], []
    _, along = cells(times, nodes)
    for start, stop in zip(nodes[:-1].tolist(), nodes[1:].tolist(), strict=True):
        carried.append(of_noise.propagators(start, stop)[-1])
        added.append(_root(of_noise.added_covariance(start, stop)))
        if path.charges is not None:
            responses = jnp.asarray(filter.responses(start, stop), path.charges.dtype)
            share = jnp.asarray(along[start:stop], path.charges.dtype)
            charges = path.charges[start:stop]
            before.append(jnp.einsum("jd,j,jtnk->dtnk", responses, 1 - share, charges))
            after.append(jnp.einsum("jd,j,jtnk->dtnk", responses, share, charges))
    dtype = path.outputs.dtype
    return Transfers(
        jnp.asarray(np.stack(carried), dtype),
        jnp.asarray(np.stack(added), dtype),
        jnp.stack(before) if before else None,
        jnp.stack(after) if after else None,
    )


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = vectors * np.sqrt(values.clip(min=0))
    return root


class _Pulled(NamedTuple):
    """Gradients that the charges of cells cause on the path itself, ``(M, d, ...)`` by leaf.

    ``before`` and ``after`` are at the first node of a cell, ``ahead`` those after at the last.
    """

    before: list[Array]
    after: list[Array]
    ahead: list[Array]


class _Cell(NamedTuple):
    """Key and transfer of a cell, the path's weights at its two nodes, and its metric."""

    key: PRNGKeyArray
    transfer: Transfers
    here: list[Array]
    ahead: list[Array]
    metric: list[Array] | None
    pulled: _Pulled | None


class NoisePath(eqx.Module):
    """The law of noisy weights on a path, at the nodes.

    Attributes
    ----------
    directions
        In which gradients of all points are measured at the nodes, of length one, ``(nodes, N,
        K)``: those of the loss on the path, and any for test points.
    pulled
        What the path's own Jacobian makes of its charges; None if nothing drives it.
    """

    flow: ResponseFlow
    path: NoiseFreePath
    transfers: Transfers
    deviations: list[Array]
    directions: Float[Array, "nodes N K"]
    pulled: _Pulled | None = None

    def pull(self, params: Params, charges: Float[Array, "d T n K"]) -> list[Array]:
        """Gradients of the weights that charges of the path's samples cause, ``(d, ...)``."""
        flow, groups = self.flow, self.flow.weight_groups()
        _, pullback = jax.vjp(lambda p: flow.apply_fn(p, self.path.x), params)
        pulled: list[list[Array]] = [[]] * groups.size
        for group in range(groups.size):
            through = jax.vmap(pullback)(charges[:, group].astype(flow.output_dtype))
            pulled[group] = jax.tree.leaves(through[0])
        return [pulled[group][leaf] for leaf, group in enumerate(groups.leaf_to_group)]

    def draw(self, key: PRNGKeyArray) -> Params:
        """Weights at the nodes, with a leading axis of them."""
        leaves, structure = jax.tree.flatten(self.flow.params)
        size = self.transfers.carried.shape[1]
        nodes = jax.tree.leaves(self.path.params)

        def weights(node: list[Array], states: list[Array]) -> Params:
            moved = [w + state[0].astype(w.dtype) for w, state in zip(node, states, strict=True)]
            return jax.tree.unflatten(structure, moved)

        def advance(
            states: list[Array],
            at: _Cell,
        ) -> tuple[list[Array], list[Array]]:
            own, transfer, here, ahead, metric, pulled = at
            stay = [transfer.carried[0, 0].astype(state.dtype) * state[0] for state in states]
            # The position stays; all else that moves it goes through the metric.
            carried = transfer.carried.at[0, 0].set(0)
            more = [
                jnp.tensordot(carried.astype(state.dtype), state, axes=1)
                + jnp.tensordot(
                    transfer.added.astype(state.dtype),
                    deviation * jax.random.normal(leaf_key, state.shape, state.dtype),
                    axes=1,
                )
                for leaf_key, state, deviation in zip(
                    jax.random.split(own, len(states)), states, self.deviations, strict=True
                )
            ]

            def arrived(more: list[Array]) -> list[Array]:
                moves = [one[0] for one in more]
                if metric is not None:
                    moves = [move * factor for move, factor in zip(moves, metric, strict=True)]
                return [
                    one.at[0].set(place + move)
                    for one, place, move in zip(more, stay, moves, strict=True)
                ]

            if pulled is not None and transfer.before is not None and transfer.after is not None:
                size = transfer.before.shape[0]
                both = jnp.concatenate([transfer.before, transfer.after])
                noisy = self.pull(weights(here, states), both)
                before, after = (
                    [_less(leaf[part], plain) for leaf, plain in zip(noisy, known, strict=True)]
                    for part, known in (
                        (slice(size), pulled.before),
                        (slice(size, None), pulled.after),
                    )
                )
                more = _added(more, before)
                # The Jacobian at the cell's end is taken where that of its beginning leads to.
                guess = weights(ahead, arrived(_added(more, after)))
                noisy = self.pull(guess, transfer.after)
                more = _added(more, list(map(_less, noisy, pulled.ahead)))
            following = arrived(more)
            return following, [state[0] for state in following]

        start = [jnp.zeros((size, *leaf.shape), wide(leaf).dtype) for leaf in leaves]
        keys = jax.random.split(key, self.transfers.carried.shape[0])
        ends = [leaf[:-1] for leaf in nodes], [leaf[1:] for leaf in nodes]
        metric = None
        if self.path.metric is not None:
            metric = [(leaf[:-1] + leaf[1:]) / 2 for leaf in jax.tree.leaves(self.path.metric)]
        _, positions = lax.scan(
            advance, start, _Cell(keys, self.transfers, *ends, metric, self.pulled)
        )
        weights_at_nodes = [
            node + jnp.concatenate([jnp.zeros_like(path[:1]), path]).astype(node.dtype)
            for path, node in zip(positions, nodes, strict=True)
        ]
        return jax.tree.unflatten(structure, weights_at_nodes)

    def seen(self, params: Params, directions: Float[Array, "N K"]) -> tuple[Array, Array]:
        """Outputs of all points ``(N, K)``, and norms of gradients ``(T, N)`` in directions."""
        flow, groups = self.flow, self.flow.weight_groups()
        outputs, factors = clipped_sum.gradients(
            flow.apply_fn, params, flow.points, lambda f, a: a, directions.astype(flow.output_dtype)
        )
        lengths = per_sample.grouped_norms(
            factors, groups.leaf_to_group, groups.size, outputs.shape[0]
        )
        return outputs.astype(flow.dtype), lengths.astype(flow.dtype)


@eqx.filter_jit
def noise_path(
    flow: ResponseFlow,
    path: NoiseFreePath,
    transfers: Transfers,
    deviations: list[Array],
    nodes: Array,
) -> NoisePath:
    """The law of noisy weights on a path whose nodes are steps of these numbers."""
    law = NoisePath(flow, path, transfers, deviations, _directions(flow, path.outputs[nodes]))
    if transfers.before is None or transfers.after is None:
        return law

    def pull(at: tuple[Params, Params, Array, Array]) -> _Pulled:
        here, ahead, before, after = at
        size = before.shape[0]
        both = law.pull(here, jnp.concatenate([before, after]))
        return _Pulled(
            [leaf[:size] for leaf in both],
            [leaf[size:] for leaf in both],
            law.pull(ahead, after),
        )

    ends = [
        jax.tree.map(lambda leaf, part=part: leaf[part], path.params)
        for part in (slice(-1), slice(1, None))
    ]
    pulled = lax.map(pull, (*ends, transfers.before, transfers.after))
    driven: NoisePath = eqx.tree_at(
        lambda law: law.pulled, law, pulled, is_leaf=lambda node: node is None
    )
    return driven


def _directions(
    flow: ResponseFlow, outputs: Float[Array, "nodes N K"]
) -> Float[Array, "nodes N K"]:
    n = flow.n_samples
    a = jax.vmap(lambda f: flow.loss.output_gradient(f[:n], flow.targets))(outputs)
    others = jax.random.normal(jax.random.key(0), outputs[:, n:].shape, outputs.dtype)
    both = jnp.concatenate([a, others], axis=1)
    # Of a sample whose loss is at its least there is no direction: any will do.
    largest = jnp.max(jnp.abs(both), axis=2, keepdims=True)
    scaled = jnp.where(largest > 0, both / jnp.where(largest > 0, largest, 1.0), 1.0)
    lengths: Array = jnp.linalg.norm(scaled, axis=2, keepdims=True)
    return scaled / lengths


def _less(one: Array, other: Array) -> Array:
    return one - other


def _added(states: list[Array], more: list[Array]) -> list[Array]:
    """States with more in their first entries; what the noise carries is not driven."""

    def added(state: Array, one: Array) -> Array:
        missing = len(state) - len(one)
        if missing:
            one = jnp.pad(one, [(0, missing), *[(0, 0)] * (one.ndim - 1)])
        return state + one.astype(state.dtype)

    return list(map(added, states, more))


def diagonal_blocks(flow: ResponseFlow, params: Params) -> Float[Array, "T N K K"]:
    """Blocks of the kernel of each point with itself, by group."""
    groups, points = flow.weight_groups(), flow.points
    structure = per_sample.trace(flow.apply_fn, params, points)
    factors = per_sample.factored_for_kernel(structure, params, points)
    blocks: list[Array | float] = [0.0] * groups.size
    for group, factor in zip(groups.leaf_to_group, factors, strict=True):
        block = jax.vmap(
            lambda one: per_sample.kernel(jax.tree.map(lambda leaf: leaf[None], one), None)
        )(factor)
        blocks[group] = blocks[group] + jnp.asarray(block)
    shape = (points.shape[0], flow.n_outputs, flow.n_outputs)
    return jnp.stack(
        [
            jnp.broadcast_to(block, (shape[0], 1, *shape[1:2], 1, shape[2])).reshape(shape)
            for block in blocks
        ]
    ).astype(flow.dtype)


class PathNorms(NamedTuple):
    """Norms of the path's gradients.

    Attributes
    ----------
    blocks
        The kernel's blocks of each point with itself at the nodes, ``(nodes, T, N, K, K)``.
    lengths
        Norms of gradients at the nodes in their directions, ``(nodes, T, N)``.
    corrections
        Norms at each step over those of interpolated blocks, ``(steps + 1, T, n)``; None if the
        norms of the samples along the path are not known.
    """

    blocks: Float[Array, "nodes T N K K"]
    lengths: Float[Array, "nodes T N"]
    corrections: Float[Array, "steps1 T n"] | None


@eqx.filter_jit
def path_norms(law: NoisePath, cell: Array, along: Array) -> PathNorms:
    """Norms of the path's gradients, where blocks are interpolated at a place for each state."""
    flow, path = law.flow, law.path
    at_nodes = lax.map(lambda params: diagonal_blocks(flow, params), path.params)
    in_directions = jax.vmap(norms.through_kernel)(at_nodes, law.directions)
    if path.norms is None:
        return PathNorms(at_nodes, in_directions, None)

    def lengths(at: tuple[Array, Array, Array]) -> Array:
        outputs, cell, along = at
        a = flow.loss.output_gradient(outputs[: flow.n_samples], flow.targets)
        blocks = (1 - along) * at_nodes[cell] + along * at_nodes[cell + 1]
        return norms.through_kernel(blocks[:, : flow.n_samples], a)

    interpolated = lax.map(lengths, (path.outputs[:-1], cell[:-1], along[:-1].astype(flow.dtype)))
    ratios = over(path.norms, interpolated)
    return PathNorms(at_nodes, in_directions, jnp.concatenate([ratios, ratios[-1:]]))


def over(lengths: Array, others: Array) -> Array:
    """Ratios of lengths; one where there is no length."""
    usable = others > 0
    return jnp.where(usable, lengths / jnp.where(usable, others, 1.0), 1.0)


class SeenByRuns(NamedTuple):
    """What runs on the noise path see, the last axis being that of the runs.

    Attributes
    ----------
    outputs
        Of all points at the nodes ``(nodes, N, K, S)``, or at every step.
    lengths
        Norms of gradients in the directions of the nodes, ``(nodes, T, N, S)``.
    """

    outputs: Float[Array, "times N K S"]
    lengths: Float[Array, "nodes T N S"]


@eqx.filter_jit
def at_nodes(law: NoisePath, keys: Key[Array, " S"]) -> SeenByRuns:
    """What each of many runs sees at the nodes."""
    # Steps fold their numbers in, and a split key is one that is folded in too: the nodes have the
    # number after all of those, or their noise would be that of the first steps between them.
    number = law.path.outputs.shape[0]

    def of_run(key: PRNGKeyArray) -> tuple[Array, Array]:
        noisy = jax.tree.map(lambda leaf: leaf[1:], law.draw(jax.random.fold_in(key, number)))
        seen: tuple[Array, Array] = lax.map(lambda at: law.seen(*at), (noisy, law.directions[1:]))
        return seen

    # There is no noise at the first node, which all runs see alike.
    start = jax.tree.map(lambda leaf: leaf[0], law.path.params)
    parts = zip(law.seen(start, law.directions[0]), lax.map(of_run, keys), strict=True)
    return SeenByRuns(
        *(
            jnp.concatenate(
                [
                    jnp.broadcast_to(first[None, ..., None], (1, *first.shape, len(keys))),
                    jnp.moveaxis(later, 0, -1),
                ]
            )
            for first, later in parts
        )
    )


@eqx.filter_jit
def at_steps(
    law: NoisePath, descent: Descent, correlated: Noise, slot: Array, keys: Key[Array, " S"]
) -> SeenByRuns:
    """The same at every step, under the very noise that runs with these keys have."""
    flow, transformation = law.flow, descent.transformation()
    leaves, structure = jax.tree.flatten(flow.params)
    n_nodes = law.transfers.carried.shape[0] + 1

    def draw(key: PRNGKeyArray) -> list[Array]:
        return [
            deviation * jax.random.normal(leaf_key, leaf.shape, wide(leaf).dtype)
            for leaf_key, leaf, deviation in zip(
                jax.random.split(key, len(leaves)), leaves, law.deviations, strict=True
            )
        ]

    def outputs(params: Params) -> Array:
        return flow.outputs(params, flow.points)

    def kept(lengths: Array, at: Array, params: Params) -> Array:
        """Lengths with those of a node, if the step is one."""

        def put() -> Array:
            own = lax.map(lambda one: law.seen(one, law.directions[at])[1], params)
            return lengths.at[at].set(jnp.moveaxis(own, 0, -1))

        result: Array = lax.cond(at < n_nodes, put, lambda: lengths)
        return result

    def step(carry: _Runs, at: _Step) -> tuple[_Runs, Array]:
        params, states, buffers, lengths = carry
        lengths = kept(lengths, at.slot, params)
        seen = jax.vmap(outputs, out_axes=-1)(params)

        def follow(
            key: PRNGKeyArray, params: Params, state: PyTree, buffer: PyTree
        ) -> tuple[Params, PyTree, PyTree]:
            _, own = jax.random.split(jax.random.fold_in(key, at.number))
            gradient, buffer = correlated.next(draw, own, at.number, buffer)
            if at.charges is not None:
                gradient = _added(gradient, [g[0] for g in law.pull(params, at.charges[None])])
            gradient = [g.astype(leaf.dtype) for g, leaf in zip(gradient, leaves, strict=True)]
            updates, state = optimizers.updated(
                transformation,
                jax.tree.unflatten(structure, gradient),
                state,
                params,
                jax.tree.unflatten(structure, descent.noise_variances),
            )
            return optax.apply_updates(params, updates), state, buffer

        params, states, buffers = jax.vmap(follow)(keys, params, states, buffers)
        return (params, states, buffers, lengths), seen

    shape = (n_nodes, flow.weight_groups().size, flow.points.shape[0], keys.size)
    start = descent.source.params
    buffer = correlated.start(jax.eval_shape(draw, keys[0]))
    many = [
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (keys.size, *jnp.shape(leaf))), one)
        for one in (start, transformation.init(start), buffer)
    ]
    steps = _Step(jnp.arange(len(slot) - 1), slot[:-1], law.path.charges)
    (params, _, _, lengths), seen = lax.scan(step, (*many, jnp.zeros(shape, flow.dtype)), steps)
    last = jax.vmap(outputs, out_axes=-1)(params)
    return SeenByRuns(jnp.concatenate([seen, last[None]]), kept(lengths, slot[-1], params))


class _Step(NamedTuple):
    """Number of a step, which node it is, and the charges of the path."""

    number: Array
    slot: Array
    charges: Array | None


#: Parameters, optimizers and carried noise of all runs, and their lengths at the nodes.
_Runs: TypeAlias = tuple[Params, PyTree, PyTree, Array]
