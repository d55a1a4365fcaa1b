"""A clipping norm that follows a quantile of the gradients' norms."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, PRNGKeyArray, ScalarLike, as_constant, is_traced
from ntkdp.clipping._moving import MovingNorm
from ntkdp.clipping._rule import ClippingRule, in_range


@final
class Adaptive(MovingNorm):
    r"""A clipping norm that moves until a given share of the samples is not clipped.

    After each step, :math:`R \leftarrow R\, e^{-\rho (b - \gamma)}`, where b estimates the share of
    samples with :math:`\|g_i\| \le R`. In a batch of B = q n expected samples it is

    .. math:: b = \tfrac12 + \tfrac1B \Big(\sum_{i \in batch}
        \big(1[\|g_i\| \le R] - \tfrac12\big) + \sigma_b z\Big), \qquad z \sim N(0, 1).

    R begins as the rule's own. The rule moves with it, :math:`w(s R_0/R)`, and so does the noise
    of the summed gradient, whose sensitivity is that of the R at this step. With
    ``scope="layerwise"`` each group has an R and a count of its own.

    Parameters
    ----------
    quantile : float
        :math:`\gamma` in (0, 1]: the share of the samples that is not to be clipped.
    rate : float
        :math:`\rho`, positive: a step multiplies R by :math:`e^{\rho}` at most, but for noise.
    count_noise : float
        :math:`\sigma_b`, standard deviation of the count's noise, in samples; B / 20 is usual. Zero
        is for training without noise.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range.

    Notes
    -----
    Andrew, Thakkar, McMahan, Ramaswamy 1905.03871, algorithm 1 and theorem 1; with groups it is
    *derived*. A noise multiplier :math:`\sigma` is that of sum and counts together, which is what
    accountants and budgets are told: see :meth:`sum_noise_multiplier`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> x = jnp.arange(1.0, 11.0)[:, None]
    >>> run = ntkdp.dp_sgd.run(
    ...     lambda w, x: 0 * x + w, jnp.zeros((1, 1)), x, x, ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(50.0), adaptive=ntkdp.clipping.Adaptive(0.5, rate=0.1),
    ...     learning_rate=1e-6, steps=100, key=jax.random.key(0))
    >>> 5 <= run.clip_norm[-1, 0].item() < 6, round(run.clip_fraction[-1].item(), 1)
    (True, 0.5)
    """

    quantile: ScalarLike
    rate: ScalarLike
    count_noise: ScalarLike

    def __init__(
        self, quantile: ScalarLike = 0.5, rate: ScalarLike = 0.2, count_noise: ScalarLike = 0.0
    ) -> None:
        share = validate.scalar(quantile=validate.fraction(quantile=quantile))
        self.quantile = as_constant(share)
        self.rate = as_constant(validate.positive_number(rate=rate))
        noise = validate.scalar(count_noise=validate.non_negative(count_noise=count_noise))
        self.count_noise = as_constant(noise)

    def sum_noise_multiplier(self, noise_multiplier: ScalarLike, n_groups: int = 1) -> ScalarLike:
        r"""Noise multiplier of the summed gradient, for one of the sum and the counts together.

        .. math:: \sigma_{sum} = \big(\sigma^{-2} - G\,(2 \sigma_b)^{-2}\big)^{-1/2}

        One sample more or less moves each of G counts, centred at one half, by one half. Sum and
        counts over their sensitivities are therefore one Gaussian mechanism of noise multiplier
        :math:`\sigma`, and a run costs what it would cost with :math:`\sigma` and a constant R, by
        Poisson sampling too. Replacing a sample moves the counts by one at most, twice as far, as
        it does with the sum.

        Parameters
        ----------
        noise_multiplier : float
            :math:`\sigma`, at least 0; without noise the result is zero too.
        n_groups : int
            G: the number of groups with layerwise clipping, else 1.

        Raises
        ------
        ValueError
            If the counts alone cost as much: :math:`\sigma_b \le \sqrt G \sigma/2`. A traced number
            raises when it is computed.

        Notes
        -----
        Andrew et al. 1905.03871, theorem 1, for G = 1.

        Examples
        --------
        >>> import ntkdp
        >>> adaptive = ntkdp.clipping.Adaptive(0.5, rate=0.2, count_noise=5.0)
        >>> round(float(adaptive.sum_noise_multiplier(6.0)), 3)
        7.5
        """
        sigma = validate.non_negative(noise_multiplier=noise_multiplier)
        groups = validate.count(n_groups=n_groups)
        share = self._cost_of_counts(validate.scalar(noise_multiplier=sigma), groups)
        if is_traced(share):
            way_out = "count_noise must be above sqrt(n_groups) * noise_multiplier / 2"
            checked: Array = eqx.error_if(self.of_sum(sigma, groups), share >= 1, way_out)
            return checked
        if share >= 1:
            least = float(np.sqrt(groups) * np.asarray(sigma) / 2)
            raise ValueError(
                f"count_noise must be above {least:g}, got {float(np.asarray(self.count_noise)):g}:"
                f" the count would cost all the privacy of noise_multiplier = {float(sigma):g}"
                + (f" with {groups} groups" if groups > 1 else "")
                + "; give Adaptive a count_noise several times as large, or lower noise_multiplier"
            )
        return self.of_sum(sigma, groups)

    def of_sum(self, noise_multiplier: ScalarLike, n_groups: int) -> ScalarLike:
        """The same, not checked: NaN for a noise that the counts use up."""
        share = self._cost_of_counts(noise_multiplier, n_groups)
        return noise_multiplier / (1 - share) ** 0.5

    def _cost_of_counts(self, noise_multiplier: ScalarLike, n_groups: int) -> ScalarLike:
        """The counts' share of the squared privacy loss; none without noise."""
        numbers = jnp if is_traced((noise_multiplier, self.count_noise)) else np
        sigma, of_count = numbers.asarray(noise_multiplier), numbers.asarray(self.count_noise)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            share: ScalarLike = numbers.where(
                sigma > 0, n_groups * (sigma / (2 * of_count)) ** 2, 0.0
            )
        return share

    @property
    def in_words(self) -> str:
        """Its numbers, for comparisons."""
        numbers = {name: getattr(self, name) for name in ("quantile", "rate", "count_noise")}
        shown = ("?" if is_traced(v) else f"{float(np.asarray(v)):g}" for v in numbers.values())
        return f"Adaptive({', '.join(map('='.join, zip(numbers, shown, strict=True)))})"

    def next(
        self,
        clip_norm: Float[Array, " R"],
        norms: Float[Array, "R n"],
        present: Bool[Array, " n"] | None = None,
        batch_size: float | None = None,
        key: PRNGKeyArray | None = None,
        number: Array | int = 0,
    ) -> Float[Array, " R"]:
        """The clipping norms after a step, from those before it and the norms of gradients.

        Counted are samples that are ``present``, by default all, out of an expected ``batch_size``.
        ``key`` is that of the step; without one there is no noise.
        """
        within = norms <= in_range(clip_norm, norms.dtype)[:, None]
        votes = jnp.where(within, 0.5, -0.5).astype(clip_norm.dtype)
        if present is not None:
            votes = jnp.where(present, votes, 0.0)
        count = jnp.sum(votes, axis=1)
        if key is not None:
            # A step splits its key in two, for its batch and its noise: this is a third one.
            noise = jax.random.normal(jax.random.fold_in(key, 2), count.shape, count.dtype)
            count = count + jnp.asarray(self.count_noise, count.dtype) * noise
        share = 0.5 + count / (norms.shape[1] if batch_size is None else batch_size)
        limits = jnp.finfo(clip_norm.dtype)
        return jnp.clip(clip_norm * jnp.exp(self.log_change(share)), limits.tiny, limits.max)

    def log_change(self, share: Float[Array, " R"]) -> Float[Array, " R"]:
        r"""What a step adds to :math:`\ln R` if this share of the samples is not clipped."""
        rate, quantile = (jnp.asarray(v, share.dtype) for v in (self.rate, self.quantile))
        return -rate * (share - quantile)


def check_adaptive(adaptive: object, rule: ClippingRule) -> Adaptive | None:
    """``adaptive`` if it can move the norm of the rule, or None."""
    if adaptive is None:
        return None
    if not isinstance(adaptive, Adaptive):
        raise TypeError(
            "adaptive must be an ntkdp.clipping.Adaptive or None, got "
            f"{type(adaptive).__name__}, e.g. Adaptive(quantile=0.5)"
        )
    if not rule.bounds_each_sample:
        raise ValueError(
            f"adaptive must be None with {type(rule).__name__}, which has no norm to which each "
            "sample is clipped; take another rule, e.g. Abadi"
        )
    return adaptive
