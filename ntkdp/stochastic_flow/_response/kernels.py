"""Kernels between a few times of noisy training, from a few draws of the noise."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import ntk
from ntkdp._backend.types import Array, Float, Key, Params
from ntkdp.stochastic_flow._response.noise_path import NoisePath

#: The kernel of one draw of the noise, by its number.
_OneDraw: TypeAlias = Callable[[Array], Array]


class NodeKernels(NamedTuple):
    r"""Kernels of all points with samples that drive them, as matrices by group ``(T, N K, n K)``.

    The samples are those of the flow, and those of its path after them if these are others.

    Attributes
    ----------
    between
        :math:`\Theta` for each pair of nodes, the later first: of a node with itself averaged over
        the draws, and of two nodes in one of the draws, which take turns.
    covariance
        :math:`\Theta(a, a)` at each node between all points, weighted by the variances of the
        groups, ``(nodes, N K, N K)``.
    number
        The place of a pair, ``(nodes, nodes)``.
    lengths
        Root mean squares over the draws of the lengths of gradients at each node, ``(nodes, T,
        N)``.
    spread
        Deviation of :math:`\Theta(a, a)` over draws of the noise, relative to it, ``(nodes,)``.
    """

    between: Float[Array, "pairs T NK nK"]
    covariance: Float[Array, "nodes NK NK"]
    number: Array
    lengths: Float[Array, "nodes T N"]
    spread: Float[Array, " nodes"]


def pairs_of_nodes(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (later, earlier) of nodes, and their numbers ``(nodes, nodes)``; those equal first."""
    equal = [(a, a) for a in range(n_nodes)]
    different = [(a, b) for a in range(n_nodes) for b in range(a)]
    pairs = np.asarray(equal + different)
    number = np.zeros((n_nodes, n_nodes), int)
    number[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    return pairs, number


@eqx.filter_jit
def node_kernels(
    law: NoisePath, variances: Float[Array, " T"], keys: Key[Array, " D"]
) -> NodeKernels:
    """Kernels from as many draws of the noise as there are keys."""
    flow, path = law.flow, law.path
    groups, points, dtype = flow.weight_groups(), flow.points, flow.dtype
    foreign = path.charges is not None and not path.is_own
    driving = jnp.concatenate([flow.x, path.x]) if foreign else flow.x
    n_nodes, n_driving = law.transfers.carried.shape[0] + 1, flow.n_samples * flow.n_outputs
    drawn = lax.map(law.draw, keys)

    def kernel(draw: Array, later: Array, earlier: Array, x: Array, power: int = 1) -> Array:
        """The kernel of a draw, through a power of the metric at the earlier node."""

        def weights(node: Array) -> Params:
            return jax.tree.map(lambda leaf: leaf[draw, node], drawn)

        terms = ntk.between_parameters(
            flow.apply_fn,
            weights(later),
            weights(earlier),
            points,
            x,
            groups,
            metric(earlier, power),
        )
        rows, columns = terms.shape[1] * terms.shape[3], terms.shape[2] * terms.shape[4]
        return jnp.transpose(terms, (0, 1, 3, 2, 4)).reshape(-1, rows, columns).astype(dtype)

    def metric(node: Array, power: int) -> Params | None:
        if path.metric is None:
            return None
        return jax.tree.map(lambda leaf: leaf[node] ** power, path.metric)

    def mean_over_draws(one: _OneDraw, node: Array) -> tuple[Array, Array]:
        """Mean over draws, and the mean of the squared norms."""
        # There is no noise at the first node.
        count = jnp.where(node == 0, 1, keys.size)

        def add(draw: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            drawn = one(draw)
            return total[0] + drawn, total[1] + jnp.sum(drawn**2)

        zeros = jnp.zeros_like(jax.eval_shape(one, jnp.asarray(0)))
        total = lax.fori_loop(0, count, add, (zeros, jnp.zeros((), dtype)))
        return total[0] / count, total[1] / count

    def at_node(node: Array) -> tuple[Array, Array, Array, Array]:
        x = jnp.concatenate([points, path.x]) if foreign else points
        mean, squares = mean_over_draws(lambda draw: kernel(draw, node, node, x), node)
        of_mean = jnp.sum(mean**2)
        excess = jnp.maximum(squares - of_mean, 0) * keys.size / max(keys.size - 1, 1)
        size = mean.shape[1]
        chosen = jnp.concatenate([mean[:, :, :n_driving], mean[:, :, size:]], axis=2)
        noisy = mean[:, :, :size]
        if path.metric is not None:
            noisy, _ = mean_over_draws(lambda draw: kernel(draw, node, node, points, 2), node)
        covariance = jnp.tensordot(variances, noisy, 1)

        def squares_of(draw: Array) -> Array:
            params = jax.tree.map(lambda leaf: leaf[draw, node], drawn)
            return law.seen(params, law.directions[node])[1] ** 2

        lengths = jnp.sqrt(jnp.mean(lax.map(squares_of, jnp.arange(keys.size)), axis=0))
        return chosen, covariance, lengths, jnp.sqrt(excess / of_mean)

    def between(pair: Array) -> Array:
        # The sum over nodes averages; means over draws here were no closer to runs.
        return kernel((pair[0] + pair[1]) % keys.size, pair[0], pair[1], driving)

    pairs, number = pairs_of_nodes(n_nodes)
    equal, covariance, lengths, spread = lax.map(at_node, jnp.arange(n_nodes))
    different = lax.map(between, jnp.asarray(pairs[n_nodes:]))
    return NodeKernels(
        jnp.concatenate([equal, different]), covariance, jnp.asarray(number), lengths, spread
    )
