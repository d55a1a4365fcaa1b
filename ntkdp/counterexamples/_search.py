"""Maximising a score from many starts at once, in one compiled program."""

from abc import abstractmethod
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from ntkdp._backend.types import Array, Float, Key, PyTree
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss


class Problem(eqx.Module):
    """A family of instances with parameters of order one, and a score that a failure makes large.

    A mask says which samples take part; the others have no gradient.
    """

    targets: eqx.AbstractVar[Array]
    loss: eqx.AbstractVar[Loss]
    rule: eqx.AbstractVar[ClippingRule]

    @abstractmethod
    def draw(self, key: Key[Array, ""]) -> PyTree:
        """Parameters to start from."""

    @abstractmethod
    def instance(self, parameters: PyTree, mask: Float[Array, " n"]) -> tuple[Array, Array]:
        """Terms of the kernel, and outputs."""

    @abstractmethod
    def score(self, terms: Array, outputs: Array, mask: Float[Array, " n"]) -> Float[Array, ""]:
        """Positive where the instance fails, and independent of scale."""


#: The best vector so far, and its score.
_Best: TypeAlias = tuple[Array, Array]
#: The vector, the optimizer's state, and the best so far.
_Ascent: TypeAlias = tuple[Array, optax.OptState, _Best]
#: The best so far, and the size of the next mutation.
_Evolution: TypeAlias = tuple[_Best, Array]


def _score(problem: Problem, parameters: PyTree, mask: Array) -> Array:
    score = problem.score(*problem.instance(parameters, mask), mask)
    return jnp.where(jnp.isfinite(score), score, -jnp.inf)


def _better(best: _Best, vector: Array, score: Array) -> _Best:
    improves = score > best[1]
    return jnp.where(improves, vector, best[0]), jnp.where(improves, score, best[1])


@eqx.filter_jit
def ascend(
    problem: Problem, masks: Float[Array, "starts n"], steps: int, key: Key[Array, ""]
) -> tuple[PyTree, Float[Array, " starts"]]:
    """Best parameters and score from each start, by Adam along the gradient of the score."""
    optimizer = optax.adam(0.1)

    def from_start(key: Array, mask: Array) -> tuple[PyTree, Array]:
        # A vector in place of a tree halves the program to compile.
        start, unravel = ravel_pytree(problem.draw(key))

        def step(carry: _Ascent, _: None) -> tuple[_Ascent, None]:
            vector, state, best = carry
            score, gradient = jax.value_and_grad(
                lambda vector: _score(problem, unravel(vector), mask)
            )(vector)
            best = _better(best, vector, score)
            downhill = -jnp.nan_to_num(gradient, posinf=0, neginf=0)
            updates, state = optimizer.update(downhill, state)
            return (vector + updates, state, best), None

        nothing = (start, jnp.asarray(-jnp.inf, start.dtype))
        carry = (start, optimizer.init(start), nothing)
        vector, score = lax.scan(step, carry, None, length=steps)[0][2]
        return unravel(vector), score

    return jax.vmap(from_start)(jax.random.split(key, masks.shape[0]), masks)


@eqx.filter_jit
def evolve(
    problem: Problem, masks: Float[Array, "starts n"], steps: int, key: Key[Array, ""]
) -> tuple[PyTree, Float[Array, " starts"]]:
    """Best parameters and score from each start, without gradients: one mutant in each step.

    The size of mutations follows the rule of one success in five.
    """

    def from_start(key: Array, mask: Array) -> tuple[PyTree, Array]:
        first, rest = jax.random.split(key)
        start, unravel = ravel_pytree(problem.draw(first))

        def step(carry: _Evolution, key: Array) -> tuple[_Evolution, None]:
            best, size = carry
            mutant = best[0] + size * jax.random.normal(key, start.shape, start.dtype)
            score = _score(problem, unravel(mutant), mask)
            size = size * jnp.where(score > best[1], 1.5, 1.5**-0.25)
            return (_better(best, mutant, score), size), None

        carry = ((start, _score(problem, unravel(start), mask)), jnp.asarray(0.5, start.dtype))
        (vector, score), _ = lax.scan(step, carry, jax.random.split(rest, steps))[0]
        return unravel(vector), score

    return jax.vmap(from_start)(jax.random.split(key, masks.shape[0]), masks)


@eqx.filter_jit
def instances(
    problem: Problem, parameters: PyTree, masks: Float[Array, "starts n"]
) -> tuple[Array, Array]:
    """Terms and outputs from each start."""
    return jax.vmap(problem.instance)(parameters, masks)
