r"""Excess of the loss's variance over that of a Gaussian of the same mean and covariance.

Gaussian closure follows means and covariances well but misses the fourth moments: if clipping bends
the drift, or the noise of sampling grows with the outputs, the loss spreads by more than a Gaussian
does. But the loss has an equation of its own, with :math:`u = H^\top \nabla L` and per unit of
time

.. math:: \frac{d}{dt} \operatorname{Var} L = -2 \operatorname{Cov}(L, u^\top \varphi)
          + E[\nabla L^\top Q\, \nabla L],

Gaussian closure keeps the right-hand side for linear :math:`\varphi` and for the sampling noise of
the mean square. So the excess D obeys :math:`\dot D = 2 b D + S`. Here S is the difference to the
full right-hand side, a sum over samples of integrals over each sample's own outputs, given which
the others are Gaussian; b is the coefficient of regression of the loss's drift on the loss.
*Derived*, with the loss expanded to second order.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ntkdp._backend.types import Array, Float

#: Standard deviation, relative to a sample's largest, below which a direction counts as certain.
_CERTAIN = 1e-6


class Links(NamedTuple):
    r"""How each sample's drift affects the loss :math:`g^\top x + \tfrac12 x^\top W x`.

    With :math:`O_j` and :math:`\Sigma_j` the sample's columns of the operator and the covariance:
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
    """One sample's part of Cov(drift of L, L), and of S from bending and from sampling."""
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
    parts: Float[Array, "n 3"], variance: Array, alone: float, rate: Array
) -> tuple[Array, Array]:
    """b and S from the samples' parts and the variance of a Gaussian."""
    drift, bending, sampling = jnp.sum(parts, axis=0)
    certain = variance <= 0
    coefficient = jnp.where(certain, 0.0, drift / jnp.where(certain, 1.0, variance))
    return coefficient, bending + rate * alone * sampling
