r"""The kernels of all samples as features of low rank and a diagonal, and as noise moves them.

At the start the kernel of all points is

.. math:: \Theta \approx \Phi \Phi^\top + \mathrm{diag}(d), \qquad \Phi \in R^{N \times r},

with the diagonal of the whole kernel, so that norms, and clipping with them, are not approximated.
Noise that has gathered a variance v on every weight turns the kernel of a wide network into
:math:`\Theta(v, v)`, and gradients of one time act at another through :math:`\Theta(v, v')`. That
kernel is taken to be diagonal in the modes of the one at the start, as it is for inputs that are
uniform on a sphere:

.. math:: \Theta(v, v') \approx \Phi\, \mathrm{diag}_i[\alpha_i(v, v')]\, \Phi^\top
    + \alpha_d(v, v')\, \mathrm{diag}(d), \qquad
    \alpha_i(v, v') = \sum_{m \le M} \psi_{im}(v)\, \psi_{im}(v').
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import ntk
from ntkdp._backend import memory
from ntkdp._backend.types import Array, Float
from ntkdp.models import Model
from ntkdp.stochastic_flow import ResponseFlow

#: Landmarks, by feature, and the least number of them.
_LANDMARKS, _LEAST_LANDMARKS = 2, 1024
#: Eigenvalues below this share of the largest count as zero; single precision has no better ones.
_SMALLEST = 1e-6
#: Part of the kernel's trace that features may leave to the diagonal before more are kept.
_LEFT = 1e-3
#: Rows of the kernel whose diagonal is computed at once.
_ROWS = 32
#: Between two nodes noise fades by the exponential of this at most, found by so many halvings.
_MOST_FADED, _HALVINGS = 5.0, 50
#: In place of nothing as a divisor.
_TINY = 1e-300


class Features(NamedTuple):
    """Features of all points, training samples first, and how noise moves their kernel; a pytree.

    ``values`` ``(N, r)`` leave ``left`` ``(N,)`` of the kernel's diagonal at the start. ``nodes``
    ``(Q,)`` are variances of the noise on the weights, the first of which is zero. At each node
    ``own`` ``(Q, N)`` is the diagonal, ``parts`` ``(Q, M, r)`` are the numbers psi of each mode,
    and ``sizes`` ``(Q, r + 1)`` are the roots of alpha(v, v), the last of them that of what is
    left. Besides moving outputs at random, noise lessens them in the mean: up to the node, what
    they were at the start by the factor ``kept`` ``(Q,)``, and what noise has made of a mode by
    ``exp(-fades)``, ``(Q, r + 1)``.
    """

    values: Float[Array, "N r"]
    left: Float[Array, " N"]
    nodes: Float[Array, " Q"]
    own: Float[Array, "Q N"]
    parts: Float[Array, "Q M r"]
    sizes: Float[Array, "Q modes"]
    kept: Float[Array, " Q"]
    fades: Float[Array, "Q modes"]

    @property
    def share_left(self) -> float:
        """Part of the trace of the first kernel that the features leave to the diagonal."""
        return float(jnp.sum(self.left) / jnp.sum(self.own[0]))


def features_of(
    flow: ResponseFlow, model: Model | None, nodes: np.ndarray, rank: int, seed: int
) -> Features:
    r"""Features of a network, at infinite width if it has such kernels.

    Of the kernel of landmarks, which are training samples, the leading eigenvectors U and
    eigenvalues :math:`\Lambda` give :math:`\Phi = \Theta_{\cdot L}\, U \Lambda^{-1/2}` (Nyström;
    Williams and Seeger 2001) and :math:`\alpha_i(v, v') = u_i^\top \Theta(v, v')_{LL} u_i /
    \lambda_i`. If all samples are landmarks it is the whole kernel of the training samples.
    """
    from scipy.linalg import eigh

    n, n_points = flow.n_samples, flow.points.shape[0]
    n_landmarks = min(n, max(_LANDMARKS * rank, _LEAST_LANDMARKS))
    memory.require(
        (2 * n_points + 3 * n_landmarks) * n_landmarks * np.dtype(np.float64).itemsize,
        f"the kernel of {n_points:,} points with {n_landmarks:,} landmarks",
        "lower max_samples or rank",
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:n_landmarks])
    across = np.asarray(_kernel(flow, model, flow.x[chosen]), np.float64)
    joint = (across[chosen] + across[chosen].T) / 2
    first = max(0, n_landmarks - rank)
    spread, directions = eigh(joint, subset_by_index=(first, n_landmarks - 1))
    spread, directions = spread[::-1], directions[:, ::-1]
    kept = _kept(spread, float(np.trace(joint)))
    spread, directions = spread[:kept], directions[:, :kept]
    values = across @ (directions / np.sqrt(spread))
    own, variances, ratios = _diagonals(flow, model, nodes)
    squares = values**2
    left = np.maximum(own[0] - np.sum(squares, axis=1), 0.0)
    alphas, spreads = np.ones((1, 1, kept)), np.zeros((1, kept))
    if len(nodes) > 1:
        assert model is not None
        alphas, spreads = _between(model, flow.x[chosen], directions, spread, nodes)
    added = np.diagonal(alphas).T

    def with_rest(modes: np.ndarray, diagonals: np.ndarray) -> np.ndarray:
        """Modes, and what is left of the diagonals over what is left at the start."""
        rest = np.sum(diagonals - modes @ squares.T, axis=1) / max(np.sum(left), _TINY)
        return np.column_stack([modes, np.maximum(rest, 0.0)])

    added, spreads = with_rest(added, own), with_rest(spreads, variances)
    fades = _fades(spreads - np.outer(ratios**2, spreads[0]), added, nodes)
    arrays = (values, left, nodes, own, _parts(alphas), np.sqrt(added), ratios, fades)
    return Features(*(jnp.asarray(array, flow.dtype) for array in arrays))


def _kept(spread: np.ndarray, trace: float) -> int:
    """How many directions, of falling size, are no rounding and leave more than next to nothing."""
    usable = int(np.sum(spread > _SMALLEST * spread[0]))
    enough = np.flatnonzero(trace - np.cumsum(spread) <= _LEFT * trace)
    return min(usable, int(enough[0]) + 1 if enough.size else usable)


def _kernel(flow: ResponseFlow, model: Model | None, landmarks: Array) -> Array:
    """Kernel at the start of all points with the landmarks, the mean over outputs."""
    if model is not None and model.kernel_fn is not None:
        return ntk.infinite_ntk(model, flow.points, landmarks)
    kernel = ntk.empirical_ntk(flow.apply_fn, flow.params, flow.points, landmarks)
    mean: Array = jnp.trace(kernel, axis1=2, axis2=3) / flow.n_outputs
    return mean


def _between(
    model: Model,
    landmarks: Array,
    directions: np.ndarray,
    spread: np.ndarray,
    nodes: np.ndarray,
) -> tuple[Float[np.ndarray, "Q Q r"], Float[np.ndarray, "Q r"]]:
    """Tangent kernels between nodes and covariances of the outputs at nodes, in modes.

    They are relative to the tangent kernel at the start, whose eigenvalues are ``spread``.
    """
    count = len(spread)
    tangent, outputs = np.zeros((len(nodes), len(nodes), count)), np.zeros((len(nodes), count))

    def in_modes(kernel: Array) -> np.ndarray:
        whole = np.asarray(kernel, np.float64)
        modes: np.ndarray = np.sum(directions * (whole @ directions), axis=0) / spread
        return modes

    for later, earlier in zip(*np.tril_indices(len(nodes)), strict=True):
        kernels = ntk.two_time_kernel(
            model, landmarks, variance1=nodes[later], variance2=nodes[earlier]
        )
        tangent[later, earlier] = tangent[earlier, later] = in_modes(kernels.ntk.total)
        if later == earlier:
            outputs[later] = in_modes(kernels.nngp)
    return tangent, outputs


def _fades(
    spreads: Float[np.ndarray, "Q modes"],
    added: Float[np.ndarray, "Q modes"],
    nodes: Float[np.ndarray, " Q"],
) -> Float[np.ndarray, "Q modes"]:
    r"""How far noise that adds a variance fades, so that it leads to the spreads of the modes.

    From one node to the next, :math:`S^+ = e^{-2 k} S + \bar a\, dv\, (1 - e^{-2 k}) / (2 k)`.
    """
    fades = np.zeros_like(spreads)
    for place in range(1, len(nodes)):
        gained = (added[place] + added[place - 1]) / 2 * (nodes[place] - nodes[place - 1])
        low, high = np.full(spreads.shape[1], -_MOST_FADED), np.full(spreads.shape[1], _MOST_FADED)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            share = -np.expm1(-2 * middle) / np.where(middle == 0, 1.0, 2 * middle)
            share = np.where(middle == 0, 1.0, share)
            is_too_large = (
                np.exp(-2 * middle) * spreads[place - 1] + gained * share > spreads[place]
            )
            low, high = np.where(is_too_large, middle, low), np.where(is_too_large, high, middle)
        fades[place] = fades[place - 1] + (low + high) / 2
    return fades


def _parts(alphas: Float[np.ndarray, "Q Q r"]) -> Float[np.ndarray, "Q Q r"]:
    """Numbers of each mode at each node, whose products are its kernel between nodes."""
    spread, vectors = np.linalg.eigh(np.moveaxis(alphas, -1, 0))
    parts: np.ndarray = np.moveaxis(vectors * np.sqrt(np.maximum(spread[:, None], 0.0)), 0, -1)
    return parts


def may_move(flow: ResponseFlow, model: Model | None) -> bool:
    """Whether kernels under noise are known."""
    return model is not None and model.two_time is not None and _knows_times(flow, model)


def _knows_times(flow: ResponseFlow, model: Model) -> bool:
    try:
        ntk.check_two_time(model, flow.x)
    except ValueError:
        return False
    return True


def _diagonals(
    flow: ResponseFlow, model: Model | None, nodes: np.ndarray
) -> tuple[Float[np.ndarray, "Q N"], Float[np.ndarray, "Q N"], Float[np.ndarray, " Q"]]:
    """Kernels and variances of the outputs of each point, and how they follow those at the start.

    Variances are not known, nor needed, with a single node.
    """
    points = flow.points
    if len(nodes) == 1 and (model is None or model.kernel_fn is None):
        unit = jnp.eye(flow.n_outputs, dtype=flow.output_dtype)
        norms = [
            ntk.per_sample_gradient_norms(
                flow.apply_fn, flow.params, points, jnp.broadcast_to(row, (len(points), len(row)))
            )
            for row in unit
        ]
        own = np.asarray(jnp.mean(jnp.stack(norms) ** 2, axis=0), np.float64)[None]
        return own, np.zeros_like(own), np.ones(1)
    n_blocks = -(-len(points) // _ROWS)
    filled = points[np.arange(n_blocks * _ROWS) % len(points)]
    blocks = filled.reshape(n_blocks, -1, *points.shape[1:])

    def whole(of_block: Callable[[Array], Array]) -> Array:
        diagonals: Array = lax.map(
            lambda block: jnp.diagonal(of_block(block), axis1=-2, axis2=-1), blocks
        )
        return jnp.moveaxis(diagonals, 0, -2).reshape(*diagonals.shape[1:-1], -1)[
            ..., : len(points)
        ]

    assert model is not None
    if len(nodes) == 1:
        own = np.asarray(whole(lambda block: ntk.infinite_ntk(model, block)), np.float64)[None]
        return own, np.zeros_like(own), np.ones(1)

    @jax.jit
    def at(node: Array) -> Array:
        def kernels(block: Array) -> Array:
            same = ntk.two_time_kernel(model, block, variance1=node, variance2=node)
            across = ntk.two_time_kernel(model, block, variance1=node, variance2=0.0)
            return jnp.stack([same.ntk.total, same.nngp, across.nngp])

        return whole(kernels)

    found = np.stack([np.asarray(at(jnp.asarray(node, flow.dtype)), np.float64) for node in nodes])
    own, variances, across = np.moveaxis(found, 1, 0)
    follows = across.mean(axis=1)
    return own, variances, follows / follows[0]


def rows_in_order(n: int, most: int, seed: int) -> np.ndarray:
    """At most so many training samples in a random order: the first m are a random subset."""
    return np.random.default_rng(seed).permutation(n)[: min(n, most)]


def with_rows(flow: ResponseFlow, rows: np.ndarray) -> ResponseFlow:
    """The flow with these of its training samples."""
    return ResponseFlow(
        flow.apply_fn,
        flow.params,
        flow.x[rows],
        jax.tree.map(lambda part: part[rows], flow.targets),
        flow.loss,
        flow.clipping,
        reduction=flow.reduction,
        test_x=flow.test_x,
        test_targets=flow.test_targets,
    )
