"""Problems that several claims share."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import clipping, dp_sgd, gradient_flow, losses, models
from ntkdp._backend import decompositions
from ntkdp._backend.types import Array, ArrayLike, Params, PRNGKeyArray, PyTree, ScalarLike
from ntkdp.ntk import LayerwiseKernel
from ntkdp.trajectory import Trajectory

Gradients: TypeAlias = Literal["structured", "vmap"]
#: The two ways in which a run may form its gradients; "vmap" shares nothing with the predictions.
GRADIENTS: tuple[Gradients, ...] = ("structured", "vmap")

SCOPES: tuple[clipping.Scope, ...] = ("flat", "layerwise")


class Problem(NamedTuple):
    """A model at given parameters, its data and its loss."""

    apply: Callable[[Params, Array], Array]
    params: Params
    x: Array
    targets: Array
    loss: losses.Loss

    def run(self, rule: clipping.ClippingRule, **options: Any) -> Trajectory:
        """DP-SGD, in the sum form and without randomness unless told otherwise."""
        options = {"reduction": "sum", "key": jax.random.key(0)} | options
        return dp_sgd.run(self.apply, self.params, self.x, self.targets, self.loss, rule, **options)

    def flow(self, rule: clipping.ClippingRule) -> gradient_flow.WeightFlow:
        """The exact flow of the parameters, in the sum form."""
        return gradient_flow.WeightFlow(
            self.apply, self.x, self.targets, self.loss, rule, reduction="sum"
        )


class Instance(NamedTuple):
    """A kernel as an array or a LayerwiseKernel, with targets and initial outputs ``(n, 1)``."""

    kernel: Any
    targets: Array
    outputs: Array

    def flow(self, rule: clipping.ClippingRule) -> gradient_flow.KernelFlow:
        """The flow of the squared loss, summed over samples."""
        return squared_flow(self.kernel, self.targets, rule)

    def model(self) -> Problem:
        """A model linear in its weights that has this kernel and these initial outputs.

        The weights start at zero; the Jacobian of a group is a root of its term.
        """
        names = self.kernel.names if isinstance(self.kernel, LayerwiseKernel) else ("all",)
        roots = [_root(term) for term in jnp.reshape(terms_of(self.kernel), (len(names), -1))]
        n = len(roots[0])

        def apply(params: Params, x: Array) -> Array:
            parts = [x[:, r * n : (r + 1) * n] @ params[name] for r, name in enumerate(names)]
            return sum(parts, start=x[:, -1:])

        params = {name: jnp.zeros((n, 1)) for name in names}
        x = jnp.concatenate([*roots, self.outputs], axis=1)
        return Problem(apply, params, x, self.targets, losses.SquaredError())


def terms_of(kernel: Array | LayerwiseKernel) -> Array:
    """Terms ``(R, n, n, ...)`` of a kernel, a single one if it is not split by group."""
    return kernel.values if isinstance(kernel, LayerwiseKernel) else jnp.asarray(kernel)[None]


def _root(term: Array) -> Array:
    n = round(term.size**0.5)
    values, vectors = decompositions.eigh(term.reshape(n, n))
    root: Array = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return root


def squared_flow(
    kernel: Array | LayerwiseKernel, targets: Array, rule: clipping.ClippingRule
) -> gradient_flow.KernelFlow:
    """The flow of the outputs for the squared loss, summed over samples."""
    return gradient_flow.KernelFlow(kernel, targets, losses.SquaredError(), rule, reduction="sum")


def loss_rate(flow: gradient_flow.KernelFlow, outputs: Array) -> Array:
    """dL/dt of a flow in the sum form, at training outputs."""
    a = flow.loss.output_gradient(outputs, flow.targets)
    return jnp.sum(a * flow.velocity(flow.init(outputs))[0])


def unclipped(scope: clipping.Scope = "flat") -> clipping.ClippingRule:
    """The rule that clips nothing, which gives plain descent."""
    return clipping.from_name("none", scope=scope)


def rules(R: ScalarLike, scope: clipping.Scope = "flat") -> dict[str, clipping.ClippingRule]:
    """All rules whose factor is positive at every norm above zero."""
    return {
        "none": unclipped(scope),
        "abadi": clipping.Abadi(R, scope=scope),
        "AUTO-V": clipping.Automatic(R, gamma=0.0, scope=scope),
        "AUTO-S": clipping.Automatic(R, scope=scope),
        "PSAC": clipping.PSAC(R, scope=scope),
        "batch": clipping.Batch(R, scope=scope),
    }


def random_terms(
    key: PRNGKeyArray, count: int, n: int, n_outputs: int = 1, n_groups: int = 1
) -> tuple[Array, Array]:
    """Random positive definite terms ``(count, R, n, n, K, K)`` and residuals ``(count, n, K)``.

    Rows of the Jacobians and residuals differ in scale by up to a hundred, and there is only one
    weight more than there are rows, so that samples oppose each other.
    """
    keys = jax.random.split(key, 3)
    rows = n * n_outputs
    jacobian = jax.random.normal(keys[0], (count, n_groups, rows, rows + 1))
    scales = 10 ** jax.random.uniform(keys[1], (2, count, n), minval=-1.0)
    jacobian *= jnp.repeat(scales[0], n_outputs, axis=1)[:, None, :, None]
    split = (jacobian @ jnp.swapaxes(jacobian, -1, -2)).reshape(
        count, n_groups, n, n_outputs, n, n_outputs
    )
    residuals = 10 * scales[1][..., None] * jax.random.normal(keys[2], (count, n, n_outputs))
    return jnp.swapaxes(split, -3, -2), residuals


def layers(terms: Array) -> LayerwiseKernel:
    """Terms as a kernel, named in the order of the alphabet, which is that of the weights."""
    return LayerwiseKernel(tuple("abcdefgh"[: len(terms)]), terms)


def rising() -> Instance:
    """Three samples whose loss rises under flat clipping with R = 1 (C7, C8, C24)."""
    kernel = jnp.ones((3, 3)) + 0.1 * jnp.eye(3)
    return Instance(kernel, jnp.array([[-3.0], [1.0], [1.0]]), jnp.zeros((3, 1)))


def one_sample() -> Instance:
    """One sample, h = 4, residual 5 (C9, C10, C21)."""
    return Instance(jnp.array([[4.0]]), jnp.zeros((1, 1)), jnp.array([[5.0]]))


def stuck() -> Instance:
    """Two layers of one weight each, which layerwise clipping with R = 1 balances (C12)."""
    u, v = jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])
    kernel = LayerwiseKernel(("first", "second"), jnp.stack([jnp.outer(u, u), jnp.outer(v, v)]))
    return Instance(kernel, jnp.zeros((2, 1)), jnp.array([[5.0], [-3.0]]))


def divergent() -> Instance:
    """Two positive definite layers that layerwise clipping with R = 1 drives apart (C13)."""
    P = jnp.array([[1.0, -0.9, -0.22], [-0.9, 1.0, -0.22], [-0.22, -0.22, 1.0]])
    Q = jnp.array([[1.0, -0.22, -0.22], [-0.22, 1.0, -0.9], [-0.22, -0.9, 1.0]])
    first, second = jnp.diag(jnp.array([1.0, 1.0, 0.1])), jnp.diag(jnp.array([0.1, 1.0, 1.0]))
    terms = jnp.stack([first @ P @ first, second @ Q @ second])
    kernel = LayerwiseKernel(("first", "second"), terms)
    return Instance(kernel, jnp.zeros((3, 1)), jnp.full((3, 1), 20.0))


def tanh_network() -> Problem:
    """Five samples, two layers of tanh units, one output, squared loss (C19, C20)."""
    params = {"W": stored("c19_W"), "v": stored("c19_v")}
    x, targets = stored("c19_x"), stored("c19_y")[:, None]
    return Problem(_apply_tanh, params, x, targets, losses.SquaredError())


def _apply_tanh(params: Params, x: Array) -> Array:
    outputs: Array = jnp.tanh(x @ params["W"].T) @ params["v"][:, None] / jnp.sqrt(20.0)
    return outputs


def relu_network() -> Problem:
    """Six samples, two hidden ReLU layers, ten outputs, cross-entropy."""
    model = models.mlp([12, 12], 10)
    x = jax.random.normal(jax.random.key(1), (6, 5))
    targets = jnp.array([0, 3, 9, 3, 7, 1])
    params = model.init(jax.random.key(2), x)
    return Problem(model.apply, params, x, targets, losses.SoftmaxCrossEntropy())


def convolutional_network() -> Problem:
    """Four images, a convolution with ReLU, three outputs, squared loss."""
    model = models.cnn([4], 3)
    x = jax.random.normal(jax.random.key(3), (4, 3, 3, 2))
    targets = jax.random.normal(jax.random.key(4), (4, 3))
    params = model.init(jax.random.key(5), x)
    return Problem(model.apply, params, x, targets, losses.SquaredError())


@cache
def networks() -> dict[str, Problem]:
    """Networks of three kinds, made once, so that claims share their compiled programs."""
    return {
        "tanh": tanh_network(),
        "ReLU": relu_network(),
        "convolutional": convolutional_network(),
    }


def solved(flow: gradient_flow.Flow, initial: PyTree, times: ArrayLike) -> Trajectory:
    """Solve a flow at tight tolerances; equal numbers of times share a compiled program."""
    return gradient_flow.solve(flow, initial, times, rtol=1e-9, atol=1e-12, outputs=True)


def outputs_of(path: Trajectory) -> Array:
    """Recorded outputs of a model with one output, ``(T, n)``."""
    assert path.outputs is not None
    return path.outputs[..., 0]


def largest_difference(tree: PyTree, reference: PyTree) -> float:
    """Largest difference of two pytrees' entries over the largest entry of the second."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True))
    scale = max(float(jnp.max(jnp.abs(b))) for _, b in pairs)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / scale


def stored(name: str) -> Array:
    """An array of the random problems whose numbers are quoted."""
    with files("ntkdp.claims").joinpath("_data", "instances.npz").open("rb") as file:
        return jnp.asarray(np.load(file)[name])
