"""Gradients that are taken a little way up the last noisy gradient."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, Float, PyTree, ScalarLike, as_constant, is_traced
from ntkdp._results.setup import number


@final
class SharpnessAware(eqx.Module):
    r"""Sharpness-aware steps (DP-SAT): gradients are taken a little way up the last noisy one.

    With :math:`\hat g_{k-1}` the noisy gradient of the step before, as the optimizer got it,

    .. math:: \tilde w_k = w_k + \rho \frac{\hat g_{k-1}}{\|\hat g_{k-1}\|}, \qquad
              \hat g_k = \frac{1}{qn} \Big(\sum_{i \in batch} C_i g_i(\tilde w_k)
              + \sigma S z_k\Big),

    and the optimizer steps with :math:`\hat g_k` from :math:`w_k`. The first step has no gradient
    before it and is taken at :math:`w_0`.

    It costs no privacy. :math:`\tilde w_k` is a function of the weights and of a noisy gradient
    that were released before the step, so what the step adds is what it adds at :math:`w_k`: a sum
    of clipped gradients at a known point, with noise. Accountants and budgets count as always.

    Parameters
    ----------
    radius : float
        :math:`\rho`, in the unit of the weights, at least 0. Zero is training without it, to the
        last bit.
    n_params : int, optional
        Number p of weights that train, over which the norm is taken. Only a noisy ensemble of a
        `KernelFlow` asks for it, since its kernel does not tell.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range. Where it is used: with zeroth-order steps, and with a
        `KernelFlow` that clips by layer, has a preconditioner, or has noise that is correlated.

    Notes
    -----
    DP-SAT: Park et al. 2306.05651. With public samples the gradient is the mixed one.

    *Derived*: in the outputs of a linear model, :math:`\tilde f_k = f_k + \rho J \hat g_{k-1} /
    \|\hat g_{k-1}\|`, where :math:`-J \hat g_{k-1}` is the velocity of the step before. The norm is
    taken over the weights. With the clipped output gradients :math:`\beta`, so that :math:`\hat g =
    J^\top \beta + s z`,

    .. math:: \|\hat g\|^2 = \beta^\top H \beta + 2 \beta^\top (s J z) + s^2 \|z\|^2 .

    The first two terms are known in the outputs. Of :math:`\|z\|^2` the outputs show the part in
    the span of J; the rest is independent of all that they show, :math:`\chi^2` with one degree of
    freedom for each weight beyond the rank of J, and is drawn. An ensemble of a `KernelFlow` is
    therefore exact in law for linear models, and one of a `LinearisedFlow` key by key.

    Where noise dominates, :math:`\|\hat g\| \approx s \sqrt p`: with many weights hardly any of the
    radius lies along the gradient, and a random way of length :math:`\rho` hardly moves the
    outputs.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> run = ntkdp.dp_sgd.run(
    ...     lambda w, x: x @ w, jnp.array([[4.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.NoClipping(), learning_rate=0.5, steps=2,
    ...     sharpness_aware=ntkdp.SharpnessAware(radius=1.0), outputs=True, key=jax.random.key(0))
    >>> run.outputs[:, 0, 0].tolist()  # 4 - 0.5 * 4, then 2 - 0.5 * (2 + 1)
    [4.0, 2.0, 0.5]
    """

    radius: ScalarLike
    n_params: int | None = eqx.field(static=True)

    def __init__(self, radius: ScalarLike, n_params: int | None = None) -> None:
        self.radius = as_constant(validate.scalar(radius=validate.non_negative(radius=radius)))
        self.n_params = None if n_params is None else validate.count(n_params=n_params)

    @property
    def counts(self) -> bool:
        """Whether the radius is above zero, or not known yet."""
        return is_traced(self.radius) or bool(self.radius > 0)

    @property
    def in_words(self) -> str:
        """The radius, for comparisons."""
        radius = number(self.radius)
        return f"SharpnessAware(radius={'?' if radius is None else f'{radius:g}'})"

    def ascent(self, gradient: PyTree, norm: Float[Array, ""]) -> PyTree:
        """The way from the weights, or from their outputs, to where the next gradient is taken."""
        is_positive = norm > 0
        safe = jnp.where(is_positive, norm, 1)
        scale = jnp.where(is_positive, jnp.asarray(self.radius, norm.dtype) / safe, 0)

        def scaled(g: Array) -> Array:
            accurate = wide(g)
            return (scale.astype(accurate.dtype) * accurate).astype(g.dtype)

        return jax.tree.map(scaled, gradient)


def ahead(position: PyTree, ascent: PyTree | None) -> PyTree:
    """Where gradients are taken: at the position itself without an ascent."""
    return position if ascent is None else jax.tree.map(jnp.add, position, ascent)


def check_sharpness_aware(given: object) -> SharpnessAware | None:
    """``given`` if it moves anything, or None, which leaves it out of the program."""
    if given is None:
        return None
    if not isinstance(given, SharpnessAware):
        raise TypeError(
            "sharpness_aware must be an ntkdp.SharpnessAware or None, got "
            f"{type(given).__name__}, e.g. SharpnessAware(radius=0.05)"
        )
    return given if given.counts else None
