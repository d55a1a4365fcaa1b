r"""Kernels as features of low rank, for heads that are as quick to train as a slider moves.

Of the kernel of all points, with eigenvectors U and eigenvalues :math:`\Lambda`, the features are
:math:`U \Lambda^{1/2}`: a head on them has this kernel. Those of a linear head are its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import ntk, stochastic_flow
from ntkdp._backend import memory
from ntkdp._backend.types import Array, Float
from ntkdp.cli._exploration.program import Head
from ntkdp.cli._exploration.setting import INFINITE, Setting
from ntkdp.clipping import ClippingRule
from ntkdp.experiment import Problem, problem_of
from ntkdp.losses import Reduction, SoftmaxCrossEntropy

#: The most features of a network and of a head: a step costs n of them for each output and run.
RANK, RANK_OF_HEADS = 48, 72


class Kernel(NamedTuple):
    """A head on features, where its outputs start, and what its kernel is like.

    ``eigenvalues`` ``(n,)`` are those of the whole kernel of the training samples, from the largest
    on. ``relative`` is the noise of the weights with variance one over the weights' own variance;
    zero if no noise moves the kernel.
    """

    problem: Problem
    rows: Float[Array, "n D"]
    test_rows: Float[Array, "m D"]
    eigenvalues: Float[np.ndarray, " n"]
    relative: float

    def head(self, rule: ClippingRule, reduction: Reduction) -> Head:
        """The head that is trained with a rule."""
        problem = self.problem
        targets, test_targets = problem.targets, problem.test_targets
        if isinstance(problem.loss, SoftmaxCrossEntropy):
            n_outputs, dtype = problem.outputs.shape[1], self.rows.dtype
            targets = jax.nn.one_hot(targets, n_outputs, dtype=dtype)
            test_targets = jax.nn.one_hot(test_targets, n_outputs, dtype=dtype)
        return Head(
            self.rows,
            self.test_rows,
            problem.outputs,
            problem.test_outputs,
            targets,
            test_targets,
            problem.loss,
            rule,
            reduction,
        )


def kernel_of(setting: Setting, width: str) -> Kernel:
    """The kernel of a network of this width, or of infinite width.

    The kernel of a finite width is the mean over its outputs.

    Raises
    ------
    ConfigError
        If data or model cannot be made.
    MemoryError
        If the kernel does not fit.
    """
    config = setting.config.model_copy(update={"dtype": "float32"})
    if width.isdigit():
        widths = [int(width)] * len(config.model.widths)
        model = config.model.model_copy(update={"widths": widths})
        config = config.model_copy(update={"model": model})
    problem = problem_of(config)
    n, points = len(problem.x), jnp.concatenate([problem.x, problem.test_x])
    if problem.model.features is not None:
        rows, rank, relative = problem.model.features(points), RANK_OF_HEADS, 0.0
    else:
        rows, rank = _features_of(_matrix(problem, points, width)), RANK
        relative = _relative(problem, points)
    values = np.linalg.svd(np.asarray(rows[:n], np.float64), compute_uv=False)
    eigenvalues = np.zeros(n)
    eigenvalues[: len(values)] = values**2
    few, few_test = ntk.fewer_features(
        rows[:n], rows[n:], n_features=rank, key=jax.random.key(config.seed)
    )
    return Kernel(problem, few, few_test, eigenvalues, relative)


def _matrix(problem: Problem, points: Array, width: str) -> Array:
    """The kernel ``(N, N)`` of all points."""
    model = problem.model
    if width == INFINITE:
        return ntk.infinite_ntk(model, points)
    kernel = ntk.empirical_ntk(model.apply, problem.params, points)
    mean: Array = jnp.trace(kernel, axis1=2, axis2=3) / kernel.shape[-1]
    return mean


def _features_of(kernel: Array) -> Array:
    """Features ``(N, N)`` with this kernel, exact but for rounding."""
    from scipy.linalg import eigh

    n_points = len(kernel)
    memory.require(
        4 * n_points**2 * np.dtype(np.float64).itemsize,
        f"the eigenvectors of a kernel of {n_points:,} points",
        "use fewer samples (data.n_train, data.n_test)",
    )
    whole = np.asarray(kernel, np.float64)
    values, vectors = eigh((whole + whole.T) / 2)
    return jnp.asarray(vectors * np.sqrt(np.maximum(values, 0.0)), kernel.dtype)


def _relative(problem: Problem, points: Array) -> float:
    return float(stochastic_flow.relative_weight_noise(1.0, problem.model, problem.params, points))
