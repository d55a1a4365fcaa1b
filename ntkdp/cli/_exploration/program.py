r"""Runs that are drawn in the weights of a head, as one program for all that sliders move.

The law is that of DP-SGD on the linear model :math:`f = f_0 + \phi W`, step by step:

.. math:: W^+ = W - \eta \Big[ \frac{1}{q n} \sum_{i \in \text{batch}} C_i\, \phi_i a_i^\top
    + \frac{\sigma S}{q n} z \Big].

Numbers of steps are arrays too, so that no move of a slider compiles anything. All moves draw the
same numbers: what changes on the page is due to the slider. Runs lie in the last axis, which makes
a step two products of matrices and what lies between them quick.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ntkdp import clipping, losses
from ntkdp._backend.types import Array, Float, PRNGKeyArray
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss, Reduction, SoftmaxCrossEntropy

#: Random numbers that are kept.
_KEPT_BYTES = 2**27


class Head(eqx.Module):
    """A linear head on features, where its outputs start, and what it is trained with.

    Classes of a softmax are rows of zeros and ones.
    """

    rows: Float[Array, "n D"]
    test_rows: Float[Array, "m D"]
    start: Float[Array, "n K"]
    test_start: Float[Array, "m K"]
    targets: Array
    test_targets: Array
    loss: Loss
    clipping: ClippingRule
    reduction: Reduction = eqx.field(static=True)

    @property
    def divisor(self) -> int:
        """What sums over the samples are divided by."""
        return losses.divisor(self.reduction, len(self.rows))

    def outputs(self, weights: Float[Array, "D K S"]) -> Float[Array, "n K S"]:
        """Outputs of the training samples in all runs."""
        return self.start[..., None] + _times(self.rows, weights)

    def test_outputs(self, weights: Float[Array, "D K S"]) -> Float[Array, "m K S"]:
        """Outputs of the test points in all runs."""
        return self.test_start[..., None] + _times(self.test_rows, weights)

    def gradient(self, outputs: Float[Array, "n K S"]) -> Float[Array, "n K S"]:
        """Gradients of the losses in the outputs."""
        if isinstance(self.loss, SoftmaxCrossEntropy):
            # Under vmap a softmax moves the axis of the runs to the front and back.
            probabilities: Array = jax.nn.softmax(outputs, axis=1)
            return probabilities - self.targets[..., None]
        over_runs = jax.vmap(self.loss.output_gradient, (-1, None), -1)
        gradients: Array = over_runs(outputs, self.targets)
        return gradients

    def factors(
        self, gradient: Float[Array, "n K S"], clip_norm: Float[Array, "*S"]
    ) -> Float[Array, "n S"]:
        """Clipping factors of all samples in all runs, at one clipping norm or one for each run."""
        square = jnp.sum(self.rows**2, axis=1)
        norms = jnp.sqrt(square[:, None] * jnp.sum(gradient**2, axis=1))

        def at(clip_norm: Array, norms: Array) -> Array:
            rule = eqx.tree_at(lambda own: own.R, self.clipping, clip_norm)
            found: Array = rule.factors(norms)
            return found

        if clip_norm.ndim == 0:
            return at(clip_norm, norms.ravel()).reshape(norms.shape)
        factors: Array = jax.vmap(at, (0, -1), -1)(clip_norm, norms)
        return factors

    def measure(self, weights: Float[Array, "D K S"], clip_norm: Float[Array, "*S"]) -> "Measured":
        """Losses and accuracies of all runs, and the share of the samples that are clipped."""
        outputs = self.outputs(weights)
        factors = self.factors(self.gradient(outputs), clip_norm)
        return Measured(
            *self._reduced(outputs, self.targets),
            *self._reduced(self.test_outputs(weights), self.test_targets),
            jax.vmap(clipping.clip_fraction, -1)(factors),
        )

    def _reduced(
        self, outputs: Float[Array, "p K S"], targets: Array
    ) -> tuple[Array, Array | None]:
        """Losses and accuracies of all runs."""
        if isinstance(self.loss, SoftmaxCrossEntropy):
            rows = targets[..., None]
            by_sample = jax.nn.logsumexp(outputs, axis=1) - jnp.sum(rows * outputs, axis=1)
            correct = jnp.argmax(outputs, axis=1) == jnp.argmax(rows, axis=1)
            reduced = jnp.mean if self.reduction == "mean" else jnp.sum
            return reduced(by_sample, axis=0), jnp.mean(correct, axis=0, dtype=outputs.dtype)
        over_runs = jax.vmap(losses.mean_or_sum, (None, -1, None, None))
        loss, accuracy = over_runs(self.loss, outputs, targets, self.reduction)
        return loss, accuracy


class Mechanism(NamedTuple):
    """How runs are made, numbers or, where a run of a map has its own, arrays ``(S,)``.

    ``deviation`` is that of the noise of the summed gradient.
    """

    clip_norm: Float[Array, "*S"]
    learning_rate: Float[Array, "*S"]
    deviation: Float[Array, "*S"]
    sample_rate: Float[Array, ""]


class Numbers(eqx.Module):
    """Random numbers of the steps of S runs: normal ones, and those that draw the batches.

    Those of the first steps are kept, since to draw them takes half as long as a step.
    """

    key: PRNGKeyArray
    normals: Float[Array, "T D K S"]
    uniforms: Float[Array, "T n S"]

    @classmethod
    def of(cls, key: PRNGKeyArray, head: Head, n_runs: int, steps: int) -> "Numbers":
        """Numbers for a head, kept for so many steps, or for as many as take little memory."""
        (n, n_features), n_outputs, dtype = head.rows.shape, head.start.shape[1], head.rows.dtype
        bytes_of_step = (n + n_features * n_outputs) * n_runs * dtype.itemsize
        kept = max(1, min(steps, _KEPT_BYTES // bytes_of_step))
        shapes = (n_features, n_outputs, n_runs), (n, n_runs)
        # One after another: all at once takes several times the memory.
        return cls(key, *lax.map(lambda k: _of_step(key, k, *shapes, dtype), jnp.arange(kept)))

    def at(self, number: Array) -> tuple[Float[Array, "D K S"], Float[Array, "n S"]]:
        """Those of a step."""
        shapes = self.normals.shape[1:], self.uniforms.shape[1:]
        normals, uniforms = lax.cond(
            number < len(self.normals),
            lambda: (self.normals[number], self.uniforms[number]),
            lambda: _of_step(self.key, number, *shapes, self.normals.dtype),
        )
        return normals, uniforms


class Measured(NamedTuple):
    """What is measured of runs, by the names of a trajectory's quantities."""

    loss: Array
    accuracy: Array | None
    test_loss: Array
    test_accuracy: Array | None
    clip_fraction: Array


class Runs(NamedTuple):
    """What was measured of S runs at M times, ``(S, M)``, and where they begin and end.

    ``first`` and ``last`` are clipping factors ``(n,)``, the mean over the runs.
    """

    measured: Measured
    test_outputs: Float[Array, "S m K"]
    first: Float[Array, " n"]
    last: Float[Array, " n"]


@eqx.filter_jit
def drawn(head: Head, mechanism: Mechanism, marks: Array, numbers: Numbers) -> Runs:
    """Runs of one mechanism, measured after as many steps as the marks ``(M,)`` say."""
    n_runs = numbers.normals.shape[-1]

    def until(weights: Array, ends: tuple[Array, Array]) -> tuple[Array, Measured]:
        weights = _walked(head, mechanism, weights, *ends, numbers)
        return weights, head.measure(weights, mechanism.clip_norm)

    def factors(weights: Array) -> Array:
        return head.factors(head.gradient(head.outputs(weights)), mechanism.clip_norm)

    # Up to the first mark too, which may be the start.
    firsts = jnp.concatenate([jnp.zeros_like(marks[:1]), marks[:-1]])
    last, measured = lax.scan(until, _at_rest(head, n_runs), (firsts, marks))
    return Runs(
        jax.tree.map(jnp.transpose, measured),
        jnp.moveaxis(head.test_outputs(last), -1, 0),
        # Where all runs are the same: a mean over copies of one became NaN in XLA of jaxlib 0.10.2.
        factors(_at_rest(head, 1))[:, 0],
        jnp.mean(factors(last), axis=1),
    )


@eqx.filter_jit
def ends(head: Head, mechanisms: Mechanism, steps: Array, numbers: Numbers) -> Measured:
    """What a run of each of S mechanisms ends with; all take the numbers of one run."""
    start = _at_rest(head, len(mechanisms.clip_norm))
    last = _walked(head, mechanisms, start, jnp.zeros_like(steps), steps, numbers)
    return head.measure(last, mechanisms.clip_norm)


def _at_rest(head: Head, n_runs: int) -> Float[Array, "D K S"]:
    return jnp.zeros((head.rows.shape[1], head.start.shape[1], n_runs), head.rows.dtype)


def _walked(
    head: Head,
    mechanism: Mechanism,
    weights: Float[Array, "D K S"],
    first: Array,
    last: Array,
    numbers: Numbers,
) -> Float[Array, "D K S"]:
    """The weights after the steps from ``first`` to ``last``."""
    clip_norm, learning_rate, deviation, sample_rate = mechanism
    divisor = sample_rate * head.divisor
    columns = head.rows.T

    def step(number: Array, weights: Array) -> Array:
        normals, uniforms = numbers.at(number)
        a = head.gradient(head.outputs(weights))
        clipped = (head.factors(a, clip_norm) * (uniforms < sample_rate))[:, None] * a
        gradient = _times(columns, clipped) + deviation * normals
        return weights - learning_rate / divisor * gradient

    walked: Array = lax.fori_loop(first, last, step, weights)
    return walked


def _of_step(
    key: PRNGKeyArray,
    number: Array,
    normals: tuple[int, ...],
    uniforms: tuple[int, ...],
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """Numbers of a step, of these shapes."""
    of_noise, of_batch = jax.random.split(jax.random.fold_in(key, number))
    drawn_uniforms = jax.random.uniform(of_batch, uniforms, dtype)
    return jax.random.normal(of_noise, normals, dtype), drawn_uniforms


def _times(matrix: Float[Array, "a b"], numbers: Float[Array, "b K S"]) -> Float[Array, "a K S"]:
    """A product of two matrices, which is quicker than one over several axes."""
    product = matrix @ numbers.reshape(len(numbers), -1)
    return product.reshape(-1, *numbers.shape[1:])
