"""Samples that are not private, and their weight in training with those that are."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import losses
from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Float, PyTree, ScalarLike, as_constant, is_traced
from ntkdp._results.setup import number
from ntkdp.losses import Loss, Reduction
from ntkdp.trajectory._training_set import as_samples


@final
class PublicRows(eqx.Module):
    r"""Public samples in a private run, whose gradient is neither clipped nor noised.

    A step descends :math:`(1 - \alpha)\, \hat g + \alpha \nabla L_{pub}`, where :math:`\hat g` is
    the clipped and noised gradient of the private samples as it is without public ones, and
    :math:`L_{pub}` is the loss of all p public samples, reduced as that of the private ones is. In
    the outputs under a frozen kernel,

    .. math:: \dot f = -\tfrac{1 - \alpha}{n} \sum_r H_r C_r a
              - \tfrac{\alpha}{p} H_{pub}\, a_{pub}.

    The sensitivity is that of the private samples alone, and their gradient and its noise are both
    multiplied by :math:`1 - \alpha`. Epsilon therefore depends neither on the public samples nor on
    their weight; a step with :math:`\alpha = 1` releases nothing that is private.

    Parameters
    ----------
    x : array
        Public inputs ``(p, ...)``, of the form of the private ones.
    targets : array
        As the loss wants them.
    weight : float
        :math:`\alpha` in [0, 1]. Zero is training without public samples, to the last bit.

    Raises
    ------
    ValueError, TypeError
        If the weight is outside [0, 1], or there are no samples. Where they are used: if targets
        do not fit.

    Notes
    -----
    *Derived*; that public gradients cost no privacy is postprocessing. All that a run or a
    prediction records is of the private samples, but for the test samples.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> public = ntkdp.PublicRows(jnp.ones((2, 1)), jnp.zeros((2, 1)), weight=0.5)
    >>> run = ntkdp.dp_sgd.run(
    ...     lambda w, x: x @ w, jnp.array([[3.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=1,
    ...     public=public, outputs=True, key=jax.random.key(0))
    >>> run.outputs[:, 0, 0].tolist()  # 0.5 times half of the clipped 1 and half of 3
    [3.0, 2.0]
    """

    x: Array
    targets: Array
    weight: ScalarLike

    def __init__(self, x: ArrayLike, targets: ArrayLike, weight: ScalarLike) -> None:
        self.x = as_samples(x=x)
        self.targets = validate.array(targets=targets)
        self.weight = as_constant(validate.scalar(weight=validate.share(weight=weight)))

    @property
    def n_samples(self) -> int:
        """Public samples p."""
        return self.x.shape[0]

    @property
    def private_share(self) -> ScalarLike:
        r""":math:`1 - \alpha`, by which the private gradient and its noise are multiplied."""
        return 1 - self.weight

    @property
    def counts(self) -> bool:
        """Whether the weight is above zero, or not known yet."""
        return is_traced(self.weight) or bool(self.weight > 0)

    @property
    def in_words(self) -> str:
        """Number and weight, for comparisons; nothing if the weight is zero."""
        if not self.counts:
            return ""
        weight = number(self.weight)
        share = "unknown weight" if weight is None else f"weight {weight:g}"
        return f"{self.n_samples} public rows of {share}"

    def fit(self, loss: Loss, n_outputs: int | None) -> "PublicRows":
        """The same with targets that fit the loss and outputs of K columns, if K is known."""
        known = loss.n_outputs(self.targets) if n_outputs is None else n_outputs
        if known is None:
            return self
        targets = loss.check(self.targets, self.n_samples, known, "public.targets")
        return PublicRows(self.x, targets, self.weight)

    def output_gradient(
        self, loss: Loss, outputs: Float[Array, "p K"], reduction: Reduction
    ) -> Float[Array, "p K"]:
        """Gradient of the reduced public loss in the outputs of the public samples."""
        gradient = loss.output_gradient(outputs, self.targets)
        return (gradient / losses.divisor(reduction, self.n_samples)).astype(outputs.dtype)

    def mixed(self, private: PyTree, public: PyTree) -> PyTree:
        """What a step descends or moves along: the weighted sum of both."""

        def mix(own: Array, other: Array) -> Array:
            weight = jnp.asarray(self.weight, own.dtype)
            return (1 - weight) * own + weight * other.astype(own.dtype)

        return jax.tree.map(mix, private, public)


def check_public(public: object) -> PublicRows | None:
    """``public`` if it is of public samples, or None."""
    if public is not None and not isinstance(public, PublicRows):
        raise TypeError(
            "public must be an ntkdp.PublicRows or None, got "
            f"{type(public).__name__}, e.g. PublicRows(x, targets, weight=0.5)"
        )
    return public
