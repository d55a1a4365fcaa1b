"""The families of instances among which a search looks, with parameters of order one."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, losses
from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, Float, Key, PyTree
from ntkdp.clipping import ClippingRule
from ntkdp.counterexamples._search import Problem
from ntkdp.counterexamples._state import State
from ntkdp.losses import Loss

#: Standard deviation of parameters at the start, before the hyperbolic sine spreads them over
#: decades.
_SPREAD = 1.5
#: Added to each sample's diagonal, relative to it, so that kernels are positive definite.
_RIDGE = 0.2
#: The ridge for divergences, whose layers must be nearly singular.
_SMALL_RIDGE = 0.05
#: Eigenvalue ratio of the whole kernel below which an equilibrium does not count.
_CONDITION = 0.05
#: Equilibria are sought first at gradient norms of this many times the norm where the rule bends.
_INSIDE = 4.0
#: Weight of a penalty on numbers far from where the rule bends: at equal strength the plainer
#: instance is preferred.
_PRICE = 0.1
#: How far out the outputs of a divergence are, in thresholds of clipping.
_FAR_OFF = 1000.0
#: How far out the outputs of a divergence are, in logits.
_FAR_LOGIT = 30.0


def bend_of(rule: ClippingRule, n_groups: int) -> np.ndarray:
    """The gradient norm at which a rule bends, one for each group: the scale of the search."""
    match rule:
        case clipping.Global(Z=Z) if Z is not None:
            norm: Any = Z
        case clipping.Automatic(gamma=gamma) if gamma > 0:
            norm = gamma
        case clipping.PSAC(r=r):
            norm = (np.sqrt(r**2 + 4 * r) - r) / 2  # where s = r/(s + r)
        case _:
            norm = rule.R
    return np.broadcast_to(np.asarray(norm, float), (n_groups,))


def n_outputs_of(loss: Loss) -> int:
    """The fewest outputs that a loss takes."""
    return 2 if isinstance(loss, losses.SoftmaxCrossEntropy) else 1


def fitted_targets(loss: Loss, n: int) -> Array:
    """Zeros as targets: the signs of the kernel cover every other case."""
    if isinstance(loss, losses.SoftmaxCrossEntropy):
        return jnp.zeros(n, int)
    return jnp.zeros((n, 1))


def is_regression(loss: Loss) -> bool:
    """Whether outputs are measured from the targets."""
    return isinstance(loss, losses.SquaredError | losses.Huber)


def _spread(parameters: Array) -> Array:
    return jnp.sinh(jnp.clip(parameters, -12, 12))


class RiseOnKernel(Problem):
    """Outputs at which the loss rises under a given kernel."""

    terms: Array
    targets: Array
    loss: Loss
    rule: ClippingRule
    bend: Array  # (R,)
    scale: Array  # (n, 1), of the output gradients
    n_outputs: int = eqx.field(static=True)

    def __init__(
        self, terms: Array, targets: Array, loss: Loss, rule: ClippingRule, n_outputs: int
    ) -> None:
        self.terms, self.targets, self.loss, self.rule = terms, targets, loss, rule
        self.n_outputs = n_outputs
        diagonal = jnp.diagonal(terms.sum(0), axis1=0, axis2=1)
        if terms.ndim == 5:
            diagonal = jnp.trace(diagonal) / n_outputs
        self.bend = jnp.asarray(bend_of(rule, terms.shape[0]))
        threshold = self.bend.mean()
        lengths = jnp.where(diagonal > 0, jnp.sqrt(jnp.maximum(diagonal, 0)), 1.0)
        if isinstance(loss, losses.Huber):
            self.scale = jnp.minimum(threshold / lengths, jnp.asarray(loss.delta))[:, None]
        else:
            self.scale = (threshold / lengths)[:, None]

    def draw(self, key: Key[Array, ""]) -> PyTree:
        shape = (self.terms.shape[1], self.n_outputs)
        return _SPREAD * jax.random.normal(key, shape, self.terms.dtype)

    def instance(self, parameters: PyTree, mask: Float[Array, " n"]) -> tuple[Array, Array]:
        outputs = parameters
        if is_regression(self.loss):
            outputs = self.targets + self.scale * _spread(parameters)
        return masked(self.terms, mask), outputs

    def score(self, terms: Array, outputs: Array, mask: Float[Array, " n"]) -> Float[Array, ""]:
        state = State(terms, self.targets, self.loss, self.rule, outputs)
        return state.rise() / _price(state, self.bend)


class OverKernels(Problem):
    """A search over kernels too, through features of the samples, ``(groups, n, weights)``."""

    targets: Array
    loss: Loss
    rule: ClippingRule
    bend: Array  # (groups,)
    kernel_scale: Array  # (groups, 1, 1)
    output_scale: Array
    n_weights: int = eqx.field(static=True)

    def features(self, parameters: Array) -> Array:
        """Gradients of the outputs, ``(groups, n, weights)``."""
        return self.kernel_scale * _spread(parameters)

    def _draw_features(self, key: Key[Array, ""]) -> Array:
        shape = (self.kernel_scale.shape[0], self.targets.shape[0], self.n_weights)
        return _SPREAD * jax.random.normal(key, shape)

    def _draw_outputs(self, key: Key[Array, ""]) -> Array:
        shape = (self.targets.shape[0], n_outputs_of(self.loss))
        return _SPREAD * jax.random.normal(key, shape)

    def _positive_definite(self, parameters: Array, ridge: float) -> Array:
        terms = gram(self.features(parameters))
        return terms + ridge * terms * jnp.eye(terms.shape[1])

    def outputs(self, parameters: Array) -> Array:
        """Outputs from parameters of order one."""
        if is_regression(self.loss):
            return self.output_scale * _spread(parameters)
        return parameters


_Family = TypeVar("_Family", bound=OverKernels)


class RiseOverKernels(OverKernels):
    """A positive definite kernel and outputs at which the loss rises."""

    def draw(self, key: Key[Array, ""]) -> PyTree:
        first, second = jax.random.split(key)
        return self._draw_features(first), self._draw_outputs(second)

    def instance(self, parameters: PyTree, mask: Float[Array, " n"]) -> tuple[Array, Array]:
        features, outputs = parameters
        return masked(self._positive_definite(features, _RIDGE), mask), self.outputs(outputs)

    def score(self, terms: Array, outputs: Array, mask: Float[Array, " n"]) -> Float[Array, ""]:
        state = State(terms, self.targets, self.loss, self.rule, outputs)
        return state.rise() / _price(state, self.bend)


class Equilibrium(OverKernels):
    """A positive definite sum of singular layers, and outputs at which nothing moves.

    If there is one layer of one weight for each sample, a sample that is masked out takes its layer
    with it.
    """

    def draw(self, key: Key[Array, ""]) -> PyTree:
        first, second = jax.random.split(key)
        return self._draw_features(first), self._draw_outputs(second)

    def instance(self, parameters: PyTree, mask: Float[Array, " n"]) -> tuple[Array, Array]:
        features, outputs = parameters
        return self.terms(self.features(features), mask), self.outputs(outputs)

    def terms(self, features: Array, mask: Float[Array, " n"]) -> Array:
        """Terms of the kernel from features."""
        if features.shape[0] == mask.shape[0]:
            features = features * mask[:, None, None]
        return masked(gram(features), mask)

    def score(self, terms: Array, outputs: Array, mask: Float[Array, " n"]) -> Float[Array, ""]:
        state = State(terms, self.targets, self.loss, self.rule, outputs)
        kernel = terms.sum(0)
        size = jnp.trace(kernel)
        # Samples that are masked out must not give the smallest eigenvalue.
        eigenvalues = decompositions.eigvalsh(kernel + size * jnp.diag(1 - mask))
        ratio = eigenvalues[0] / jnp.maximum(size, jnp.finfo(terms.dtype).tiny)
        stillness = 1 - state.speed() - jnp.maximum(_CONDITION - ratio, 0) / _CONDITION
        # Well inside the clipped zone: at its edge equilibria are not those of a smooth flow.
        return stillness / _price(state, _INSIDE * self.bend)


class Divergence(OverKernels):
    """Positive definite layers that drive far-off outputs of every sample further up its loss."""

    def draw(self, key: Key[Array, ""]) -> PyTree:
        return self._draw_features(key)

    def instance(self, parameters: PyTree, mask: Float[Array, " n"]) -> tuple[Array, Array]:
        return masked(self._positive_definite(parameters, _SMALL_RIDGE), mask), self.far_off()

    def far_off(self) -> Array:
        """Outputs far from fitting, on one side: the signs of the kernel cover the other."""
        n = self.targets.shape[0]
        if is_regression(self.loss):
            return jnp.full((n, 1), _FAR_OFF) * self.output_scale
        if n_outputs_of(self.loss) == 1:
            return jnp.full((n, 1), _FAR_LOGIT)
        return jnp.tile(jnp.array([[0.0, _FAR_LOGIT]]), (n, 1))

    def score(self, terms: Array, outputs: Array, mask: Float[Array, " n"]) -> Float[Array, ""]:
        growth = State(terms, self.targets, self.loss, self.rule, outputs).growth()
        sizes = jnp.diagonal(terms, axis1=1, axis2=2) / self.kernel_scale[:, :, 0] ** 2
        return jnp.min(jnp.where(mask > 0, growth, jnp.inf)) / _spread_price(sizes)


def _price(state: State, bend: Array) -> Array:
    """At least one, and more the further gradient norms are from where the rule bends."""
    return _spread_price(state.norms / bend[:, None])


def _spread_price(sizes: Array) -> Array:
    takes_part = sizes > 0
    logs = jnp.log(jnp.where(takes_part, sizes, 1.0))
    return 1 + _PRICE * jnp.sum(logs**2) / jnp.maximum(jnp.sum(takes_part), 1)


def family(
    cls: type[_Family], loss: Loss, rule: ClippingRule, n: int, n_groups: int, n_weights: int
) -> _Family:
    """A family of up to ``n`` samples, on the scales of the loss and the rule."""
    norms = bend_of(rule, n_groups)
    if isinstance(loss, losses.Huber):
        size = float(loss.delta)
    else:
        # Output gradients of classifiers are of order one; others are scaled to the norms.
        size = float(np.exp(np.log(norms).mean())) if is_regression(loss) else 1.0
    return cls(
        targets=fitted_targets(loss, n),
        loss=loss,
        rule=rule,
        bend=jnp.asarray(norms),
        kernel_scale=jnp.asarray(norms / size)[:, None, None],
        output_scale=jnp.asarray(size if is_regression(loss) else 1.0),
        n_weights=n_weights,
    )


def masked(terms: Array, mask: Float[Array, " n"]) -> Array:
    """Terms without the gradients of the samples that are masked out."""
    pairs = mask[:, None] * mask[None]
    return terms * (pairs if terms.ndim == 3 else pairs[:, :, None, None])


def gram(features: Array) -> Array:
    """Kernels from features, one for each group."""
    return jnp.einsum("rik,rjk->rij", features, features)
