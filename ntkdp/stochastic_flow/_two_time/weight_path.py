r"""How noise and decay alone move a weight, at every step and at nodes of time.

A linear optimizer makes of gradients g and noise :math:`\xi` of deviation s the weight

.. math:: w_k = a_k w_0 + \sum_{j < k} h_{kj} (g_j + s_j \xi_j),

so that noise has the covariance :math:`V(t, s) = \sum_j h_{tj} h_{sj} s_j^2` between times, and
gradients pass through the same filter (`_linear_filter`). Correlated noise is white noise through a
filter of its own, whose state begins with that of the optimizer. A **reader** is an entry of the
state: the weight itself, at which gradients are taken, and its average if there is one, at which a
run is measured.

Between nodes, the noise is what its values at the nodes say on average, and a rest that is
independent of them; for plain steps these are the straight line and the Brownian bridge. *Derived.*
"""

from typing import NamedTuple

import numpy as np

from ntkdp._backend.types import Float, LearningRate
from ntkdp.noise import Noise
from ntkdp.optimizers import Optimizer, average_of
from ntkdp.stochastic_flow._linear_filter import (
    LinearFilter,
    averaged,
    linear_filter,
    mixed,
    pinned,
    readings,
)

#: Weights of nodes below this are left out, so that few nodes are read.
_SMALL = 1e-6


class WeightPath(NamedTuple):
    """What an optimizer makes of gradients and noise, step by step.

    ``filter`` is driven by gradients, and ``of_noise`` by white noise, up to a scale of each layer;
    ``readers`` are the entries of both that are read.
    """

    filter: LinearFilter
    of_noise: LinearFilter
    readers: tuple[int, ...]

    @property
    def clock(self) -> Float[np.ndarray, " steps"]:
        """A running sum that says how far the weights have come: noise, or else steps."""
        moved = self.of_noise.drives[:, 0] ** 2
        if not np.any(moved > 0):
            moved = np.abs(self.filter.drives[:, 0])
        return np.append(0.0, np.cumsum(moved))

    def kept(self) -> Float[np.ndarray, "steps readers"]:
        """Shares of the initial weights that the readers have at every step."""
        start = np.zeros(self.filter.size)
        start[list(self.readers)] = 1.0
        return self.filter.undriven(start)[:, list(self.readers)]


class Nodes(NamedTuple):
    """Covariances of the noise and shares of the initial weights, for all readers at all nodes.

    ``covariance`` is ``(Q, Q)`` and ``kept`` ``(Q,)``, the Q = readers x nodes in the order of
    readers; ``weights`` ``(K + 1, readers, Q)`` say how each step is read off the nodes.
    """

    covariance: Float[np.ndarray, "Q Q"]
    kept: Float[np.ndarray, " Q"]
    weights: Float[np.ndarray, "steps readers Q"]


def path_of(
    optimizer: Optimizer, learning_rate: LearningRate, steps: int, noise: Noise
) -> WeightPath:
    """The path of a linear optimizer, under noise in units of its deviation."""
    filter, decay = linear_filter(optimizer, learning_rate, steps), average_of(optimizer)
    readers: tuple[int, ...] = (0,)
    if decay is not None:
        readers = (0, filter.size)
        filter = averaged(filter, float(np.asarray(decay)))
    return WeightPath(filter, mixed(filter, noise.recursion(steps)), readers)


def nodes_of(path: WeightPath, at: np.ndarray) -> Nodes:
    """The law of the noise at steps ``at``, and between them."""
    of_steps = path.of_noise.covariance(at, path.readers)
    covariance = np.swapaxes(of_steps[at], 0, 1).reshape(-1, of_steps.shape[-1])
    weights = readings(of_steps, at)
    shares = path.kept()
    kept = shares[at].T.reshape(-1)
    # The rest of the initial weights is that at the first node.
    weights[:, :, 0] += shares - weights @ kept
    weights[np.abs(weights) < _SMALL] = 0.0
    return Nodes((covariance + covariance.T) / 2, kept, weights)


def rest_of(path: WeightPath, at: np.ndarray) -> LinearFilter:
    """The noise that is left between steps ``at``: it is zero there."""
    return pinned(path.of_noise, at, path.readers)
