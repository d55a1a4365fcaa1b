r"""What the variance of the loss has over that of a Gaussian of the same mean and covariance.

Gaussian closure follows means and covariances well, and misses the fourth moments: where clipping
bends the drift, or the noise of sampling grows with the outputs, the loss spreads by more than that
of a Gaussian. But the loss has an equation of its own, with :math:`u = H^\top \nabla L` and per
unit of time

.. math:: \frac{d}{dt} \operatorname{Var} L = -2 \operatorname{Cov}(L, u^\top \varphi)
          + E[\nabla L^\top Q\, \nabla L],

of whose right-hand side Gaussian closure keeps what is left with linear :math:`\varphi` and with
the sampling noise of the mean square. So the excess D obeys :math:`\dot D = 2 b D + S` with S that
difference, a sum over samples of integrals over each one's own outputs, given which the others are
Gaussian; and b the coefficient of regression of the loss's drift on the loss. *Derived*, with the
loss expanded to second order.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ntkdp._backend.types import Array, Float

#: Deviation, relative to the largest of a sample, below which a direction counts as certain.
_CERTAIN = 1e-6


class Links(NamedTuple):
    r"""How each sample's drift bears on the loss :math:`g^\top x + \tfrac12 x^\top W x`.

    With O_j the sample's columns of the operator and :math:`\Sigma_j` of the covariance:
    ``pull`` :math:`O_j^\top g`, ``turn`` :math:`O_j^\top W \Sigma_j`, ``slope``
    :math:`\Sigma_j^\top g`, ``bend`` :math:`\Sigma_j^\top W \Sigma_j`, ``far_pull``
    :math:`O_j^\top W \Sigma g` and ``far_turn`` :math:`O_j^\top W \Sigma W \Sigma_j`.
    """

    pull: Float[Array, "n R K"]
    turn: Float[Array, "n R K K"]
    slope: Float[Array, "n K"]
    bend: Float[Array, "n K K"]
    far_pull: Float[Array, "n R K"]
    far_turn: Float[Array, "n R K K"]


def of_sample(
    links: Links,
    axes: Float[Array, "K K"],
    deviations: Float[Array, " K"],
    clipped: Float[Array, "p R K"],
    points: Float[Array, "p K"],
    weights: Float[Array, " p"],
) -> Float[Array, "3"]:
    """One sample's part of Cov(drift of L, L), of S without sampling, and of that with it."""
    wide = deviations > _CERTAIN * jnp.max(deviations)
    inverse = jnp.where(wide, 1 / jnp.where(wide, deviations, 1.0), 0.0)
    scaled = (points * inverse[None]) @ axes.T
    bent = scaled @ links.bend
    loss = scaled @ links.slope + 0.5 * jnp.sum(bent * scaled, axis=1)
    loss = loss - weights @ loss
    pull = links.pull[None] + jnp.einsum("rkl,pl->prk", links.turn, scaled)
    own = (links.slope[None] + bent) @ (axes * inverse[None] ** 2) @ axes.T
    others = (
        links.far_pull[None]
        + jnp.einsum("rkl,pl->prk", links.far_turn, scaled)
        - jnp.einsum("rkl,pl->prk", links.turn, own)
    )
    together = pull * loss[:, None, None] + others
    linear = jnp.einsum("p,prk,pl->rkl", weights, clipped, points)
    rest = clipped - jnp.einsum("p,prk->rk", weights, clipped)[None]
    rest = rest - jnp.einsum("rkl,pl->prk", linear, points)
    drift = -jnp.einsum("p,prk,prk->", weights, clipped, together)
    bending = -2 * jnp.einsum("p,prk,prk->", weights, rest, together)
    squares = jnp.einsum("p,prk,psl->rksl", weights, pull, pull)
    sampling = weights @ jnp.einsum("prk,prk->p", clipped, pull) ** 2 - jnp.einsum(
        "rksl,prk,psl,p->", squares, clipped, clipped, weights
    )
    return jnp.stack([drift, bending, sampling])


def rates(
    parts: Float[Array, "n 3"], variance: Array, sample_rate: float, rate: Array
) -> tuple[Array, Array]:
    """b and S, of the samples' parts and the variance of a Gaussian."""
    drift, bending, sampling = jnp.sum(parts, axis=0)
    certain = variance <= 0
    coefficient = jnp.where(certain, 0.0, drift / jnp.where(certain, 1.0, variance))
    return coefficient, bending + rate * (1 / sample_rate - 1) * sampling
