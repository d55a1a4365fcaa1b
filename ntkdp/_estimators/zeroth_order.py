"""Steps along random directions, by how the loss changes along them."""

from collections.abc import Callable
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray, ScalarLike, as_constant
from ntkdp._results.setup import number
from ntkdp.clipping import ClippingRule
from ntkdp.noise import Independent, Noise


@final
class ZerothOrder(eqx.Module):
    r"""Zeroth-order steps (DP-ZO, DPZero): no gradient is taken, and only scalars are released.

    A step draws m directions :math:`z_k \sim N(0, I)`, with a number for each weight. Each sample
    has a slope along each,

    .. math:: s_{ik} = \frac{\ell_i(w + \phi z_k) - \ell_i(w - \phi z_k)}{2 \phi},

    or :math:`z_k^\top g_i`, its limit. The clipping rule is applied to slopes as it is elsewhere to
    norms, :math:`|C_{ik} s_{ik}| \le R`, and in place of the noisy sum of gradients stands

    .. math:: \frac1m \sum_k z_k \Big(\sum_{i \in batch} C_{ik} s_{ik}
              + \sigma \sqrt m\, R\, \xi_k\Big), \qquad \xi_k \sim N(0, 1).

    What is released of the data are m sums, which one sample more or less moves by
    :math:`\sqrt m\, R` at most. A step is therefore one Gaussian mechanism of noise multiplier
    :math:`\sigma`, and accountants and budgets count steps as always.

    Parameters
    ----------
    directions : int
        m, at least 1.
    reach : float, optional
        :math:`\phi`, positive. By default slopes are derivatives, by a Jacobian-vector product.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range. Where it is used: with clipping by layer or of no single
        sample, with noise that is not independent, and with a clipping norm that moves, public
        samples or sharpness-aware steps.

    Notes
    -----
    DP-ZO: Tang et al. 2401.04343; DPZero: Zhang et al. 2310.09639. That noise grows with
    :math:`\sqrt m` is *derived*. For `Abadi` and the limit of small :math:`\phi` the mean of a
    step is that of clipped gradients with the factors
    :math:`C_i = \operatorname{erf}\big(R/(\sqrt2 \|g_i\|)\big)` (*derived*, Stein's identity).

    Under a frozen kernel a direction moves the outputs by :math:`J z_k \sim N(0, H)`, which is all
    that a step needs to know of it (*derived*). Ensembles are therefore exact in law for linear
    models, with a ``reach`` too. Recorded clip fractions are those of the gradients' norms, of
    which a slope is a random part.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> runs = ntkdp.dp_sgd.run(
    ...     lambda w, x: x @ w, jnp.array([[3.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=1,
    ...     zeroth_order=ntkdp.ZerothOrder(directions=2), outputs=True,
    ...     key=jax.random.split(jax.random.key(0), 1000))
    >>> mean = 3 - 0.5 * 3 * jax.scipy.special.erf(1 / (2**0.5 * 3))
    >>> abs(runs.outputs[:, -1].mean() - mean).item() < 0.05
    True
    """

    directions: int = eqx.field(static=True)
    reach: ScalarLike | None

    def __init__(self, directions: int = 1, reach: ScalarLike | None = None) -> None:
        self.directions = validate.count(directions=directions)
        self.reach = None
        if reach is not None:
            self.reach = as_constant(validate.positive_number(reach=reach))

    @property
    def in_words(self) -> str:
        """Number and reach of the directions, for comparisons."""
        reach = number(self.reach)
        of_reach = "" if reach is None else f", reach={reach:g}"
        return f"ZerothOrder(directions={self.directions}{of_reach})"

    def keys(self, key: PRNGKeyArray) -> Key[Array, " m"]:
        """Keys of the directions of a step, which splits its own for its batch and its noise."""
        keys: Key[Array, " m"] = jax.random.split(jax.random.fold_in(key, 3), self.directions)
        return keys

    def noise_deviation(self, rule: ClippingRule, noise_multiplier: ScalarLike) -> ScalarLike:
        """Standard deviation of the noise of each direction's sum, once divided by m."""
        deviation: ScalarLike = noise_multiplier * rule.sensitivity(1) / self.directions**0.5
        return deviation

    def slopes(self, losses_at: Callable[[Array], Float[Array, " n"]], like: Array) -> Array:
        """Slopes of the samples' losses, functions of the way along a direction."""
        zero = jnp.zeros((), like.dtype)
        if self.reach is None:
            slopes: Array = jax.jvp(losses_at, (zero,), (jnp.ones_like(zero),))[1]
            return slopes
        reach = jnp.asarray(self.reach, zero.dtype)
        return (losses_at(reach) - losses_at(-reach)) / (2 * reach)

    def clipped_sum(
        self, rule: ClippingRule, slopes: Float[Array, " n"], present: Array | None
    ) -> tuple[Array, Float[Array, " n"], Float[Array, " n"]]:
        """Sum of clipped slopes over m, their sizes and factors; what is not finite has no part."""
        slopes = wide(slopes)
        usable = jnp.isfinite(slopes)
        if present is not None:
            usable &= present
        sizes = jnp.abs(slopes)
        factors = rule.factors(jnp.where(usable, sizes, 0.0))
        clipped = jnp.where(usable & jnp.isfinite(factors), factors * slopes, 0.0)
        return jnp.sum(clipped) / self.directions, sizes, factors


def check_zeroth_order(
    given: object,
    rule: ClippingRule,
    noise: Noise,
    adaptive: object,
    clip_norm: object,
    public: object,
    sharpness_aware: object,
) -> ZerothOrder | None:
    """``given`` if its steps fit what they are taken with, or None."""
    if given is None:
        return None
    if not isinstance(given, ZerothOrder):
        raise TypeError(
            "zeroth_order must be an ntkdp.ZerothOrder or None, got "
            f"{type(given).__name__}, e.g. ZerothOrder(directions=4)"
        )
    if rule.scope != "flat" or rule.needs_total_norm:
        name = type(rule).__name__
        found = f"{name} with scope={rule.scope!r}" if rule.scope != "flat" else name
        raise ValueError(
            "zeroth_order needs a rule that clips each sample's slope, which has no layers, got "
            f"{found}; take e.g. Abadi(1.0)"
        )
    if not isinstance(noise, Independent):
        raise ValueError(
            "noise must be independent with zeroth_order, whose directions change from step to "
            f"step, got {type(noise).__name__}"
        )
    others = {
        "adaptive": adaptive,
        "clip_norm": clip_norm,
        "public": public,
        "sharpness_aware": sharpness_aware,
    }
    for name, other in others.items():
        if other is not None:
            raise ValueError(
                f"{name} must be None with zeroth_order, got {type(other).__name__}; it needs the "
                "steps of gradients"
            )
    return given
