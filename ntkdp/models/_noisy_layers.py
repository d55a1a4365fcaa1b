r"""Layers of neural-tangents whose weights carry noise, and which layers can.

Noise leaves the weights of a layer Gaussian: with initial ones :math:`w_0` of own variance
:math:`\tau^2`, of which the share :math:`a_t` is left, and noise :math:`B_t` of covariance
:math:`V_{ts}` between times, :math:`w_t = a_t w_0 + B_t` has the covariance
:math:`\tau^2 a_t a_s + V_{ts}`. Relative to the weights' own variance that is

.. math:: c_{ts} = a_t a_s + V_{ts} / \tau^2 .

NTK parameterisation has :math:`\tau^2 = 1` for weights and biases. Standard parameterisation has
:math:`\tau^2 = W^2 / N` for the weights of a layer with N inputs and :math:`b^2` for its biases:
noise of variance :math:`V` counts :math:`N V / W^2` there, so the limit of wide layers is one in
which :math:`N V` is kept (*derived*; it follows from the outputs of the layer,
:math:`z = \sum_j w_j x_j + b`, whose covariance is
:math:`(W^2/N + V) \sum_j x_j x'_j + b^2 + V`).

Let :math:`\Sigma_0' = K_W + K_b` be the rule of the layer at the start, weights and biases apart,
and :math:`\Omega = \Omega_W + \Omega_b` its own term of the tangent kernel. Both parts of
:math:`\Omega` are those of :math:`\Sigma_0'` over their own variances, and

.. math::
    \Sigma'_{ts} &= c^W_{ts} K_W + a_t a_s K_b + V_{ts} \Omega_b, \\
    \Theta'_{ts} &= \Omega + c^W_{ts}\, W^2 A[\Theta_{ts}],

where :math:`W^2 A` takes :math:`\Theta` as :math:`K_W` takes the covariances (*derived*). The own
variance :math:`\tau^2 = K_W / \Omega_W` is read off the layer itself, from a kernel of ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from ntkdp._backend import neural_tangents
from ntkdp._backend.types import Array, PyTree
from ntkdp.models._model import WeightLaw
from ntkdp.models._stax_types import KernelFn, Shape, StaxKernel, StaxLayer, stax

#: The kernel function of a layer, as the layer before calls it.
_OnKernel: TypeAlias = Callable[..., StaxKernel]
#: Layers whose kernel is linear in that of their input, with Gaussian weights and biases.
AFFINE = ("Dense", "Conv", "ConvLocal", "ConvTranspose")

_WAY_OUT = "stochastic_flow.response_ensemble predicts noise in any network"


def name_of(layer: StaxLayer) -> str:
    """The name of the function in `stax` that made a layer."""
    name: str = getattr(layer[2], "__name__", "?")
    return name


def parts_of(layer: StaxLayer) -> tuple[str, tuple[StaxLayer, ...]] | None:
    """How a layer combines others, "serial" or "parallel", and these; or None."""
    found = neural_tangents.composition(layer[2])
    if found is None:
        return None
    kind, arguments = found
    if kind == "repeat":
        repeated, count = arguments
        return "serial", (repeated,) * count
    return kind, arguments


def with_parts(
    layer: StaxLayer, change: Callable[[str, StaxLayer], StaxLayer], place: str = ""
) -> StaxLayer:
    """A layer made as ``layer`` is, of what ``change`` returns for the places and the layers in it.

    The place of a layer in another one is ``place[0]``, ``place[1]`` and so on.
    """
    composition = parts_of(layer)
    if composition is None:
        return change(place, layer)
    kind, parts = composition
    combine = stax().parallel if kind == "parallel" else stax().serial
    return combine(
        *(with_parts(part, change, f"{place}[{number}]") for number, part in enumerate(parts))
    )


def branches_are_independent(layer: StaxLayer) -> bool:
    """Whether of the branches in a layer, all but one have Gaussian weights of their own."""
    composition = parts_of(layer)
    if composition is None:
        return True
    kind, parts = composition
    without_weights = sum(not _has_weights(part) for part in parts)
    own = kind == "serial" or without_weights <= 1
    return own and all(map(branches_are_independent, parts))


def _has_weights(layer: StaxLayer) -> bool:
    composition = parts_of(layer)
    if composition is None:
        return name_of(layer) in AFFINE
    return any(map(_has_weights, composition[1]))


def noisy(layer: StaxLayer, law: WeightLaw) -> StaxLayer:
    """The layer with noise on all of its weights, those of layers that it is made of too."""

    def change(_: str, leaf: StaxLayer) -> StaxLayer:
        return _noisy_leaf(leaf, law) if name_of(leaf) in AFFINE else leaf

    return with_parts(layer, change)


def _noisy_leaf(layer: StaxLayer, law: WeightLaw) -> StaxLayer:
    plain = cast(_OnKernel, layer[2])
    kept_between = law.kept_first * law.kept_second

    def kernel_fn(kernel: StaxKernel, **options: object) -> StaxKernel:
        rule = _own_rule(plain, kernel, options)
        relative = kept_between + law.between / rule.variance
        after = plain(kernel.replace(ntk=relative * kernel.ntk), **options)
        own_axes = 1 if after.diagonal_batch else 2
        cov2 = after.cov2
        if cov2 is not None:
            cov2 = rule.grown(cov2, law.second, law.kept_second**2, own_axes)
        return after.replace(
            cov1=rule.grown(after.cov1, law.first, law.kept_first**2, own_axes),
            nngp=rule.grown(after.nngp, law.between, kept_between, 2),
            cov2=cov2,
        )

    return _with_kernel(layer, kernel_fn)


def _with_kernel(layer: StaxLayer, kernel_fn: Callable[..., PyTree]) -> StaxLayer:
    """The layer with another kernel function, which asks for the same form of kernels."""
    requirements: Mapping[str, object] = getattr(layer[2], "input_req", {})
    return layer[0], layer[1], stax().requires(**requirements)(kernel_fn)


class _OwnRule(NamedTuple):
    """The own variance of a layer's weights; covariance and tangent term of its biases."""

    variance: Array
    biases: tuple[Array, Array]

    def grown(
        self, covariance: Array, noise: Array | float, kept: Array | float, batch_axes: int
    ) -> Array:
        """The covariance of the layer's outputs, given the one for its initial weights."""
        bias, own = (part[0] if batch_axes == 1 else part for part in self.biases)
        relative = kept + noise / self.variance
        return relative * (covariance - bias) + kept * bias + noise * own


def _own_rule(kernel_fn: _OnKernel, kernel: StaxKernel, options: Mapping[str, object]) -> _OwnRule:
    """What a layer does to a kernel of ones and to one of zeros, of a single sample."""

    def applied(value: float) -> StaxKernel:
        def filled(array: Array, batch_axes: int) -> Array:
            return jnp.full((1,) * batch_axes + array.shape[batch_axes:], value, array.dtype)

        own_axes = 1 if kernel.diagonal_batch else 2
        single = kernel.replace(
            cov1=filled(kernel.cov1, own_axes),
            cov2=None if kernel.cov2 is None else filled(kernel.cov2, own_axes),
            nngp=filled(kernel.nngp, 2),
            ntk=jnp.zeros((), kernel.nngp.dtype),
        )
        return kernel_fn(single, **options)

    ones, zeros = applied(1.0), applied(0.0)
    # At the edges of images ones may be missing, in both alike.
    variance = jnp.max(ones.nngp - zeros.nngp) / jnp.max(ones.ntk - zeros.ntk)
    return _OwnRule(variance, (zeros.nngp, zeros.ntk))


def check(layers: Sequence[StaxLayer], shape: Shape) -> None:
    """Raise unless all layers, on inputs of a shape, have kernels between times."""
    for number, layer in enumerate(layers):
        if not branches_are_independent(layer):
            raise ValueError(
                f"layers[{number}] must have weights in all parallel branches but one for a kernel "
                f"at infinite width, which takes branches as independent; {_WAY_OUT}"
            )
    jax.eval_shape(lambda x: _walk(layers, _check_leaf)(x, None, "nngp"), _single(shape))


def own_variances(
    layers: Sequence[StaxLayer], positions: Sequence[int], shape: Shape
) -> dict[str, float]:
    r"""The least own variance :math:`\tau^2` of the weights of each layer with parameters."""
    found: dict[str, list[Array]] = {str(position): [] for position in positions}

    def read(place: str, leaf: StaxLayer, kernel: PyTree, options: Mapping[str, object]) -> None:
        if name_of(leaf) in AFFINE:
            position = place.removeprefix("layers[").partition("]")[0]
            rule = _own_rule(cast(_OnKernel, leaf[2]), kernel, options)
            found[position].append(rule.variance)

    @jax.jit
    def variances(x: Array) -> dict[str, Array]:
        _walk(layers, read)(x, None, "nngp")
        return {name: jnp.min(jnp.stack(each)) for name, each in found.items()}

    with jax.ensure_compile_time_eval():
        of_layers = variances(jnp.ones(_single(shape).shape))
    return {name: float(variance) for name, variance in of_layers.items()}


def _single(shape: Shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape[1:]), jnp.result_type(float))


#: Looks at a layer on the way, with its place, its input kernel and the options of the call.
_Visit: TypeAlias = Callable[[str, StaxLayer, PyTree, Mapping[str, object]], None]


def _walk(layers: Sequence[StaxLayer], visit: _Visit) -> KernelFn:
    """The kernel function of layers in which every innermost one is visited first."""

    def visited(place: str, leaf: StaxLayer) -> StaxLayer:
        plain = cast(Callable[..., PyTree], leaf[2])

        def kernel_fn(kernel: PyTree, **options: object) -> PyTree:
            visit(place, leaf, kernel, options)
            try:
                return plain(kernel, **options)
            except (NotImplementedError, ValueError) as error:
                raise ValueError(
                    f"{place}, {name_of(leaf)}, has no kernel at infinite width here: {error}; "
                    f"{_WAY_OUT}"
                ) from error

        return _with_kernel(leaf, kernel_fn)

    walked = [
        with_parts(layer, visited, f"layers[{number}]") for number, layer in enumerate(layers)
    ]
    return stax().serial(*walked)[2]


def _check_leaf(place: str, leaf: StaxLayer, kernel: PyTree, options: Mapping[str, object]) -> None:
    kernel_type = neural_tangents.Kernel
    shapes = jax.tree.map(
        lambda kernel: kernel.shape1, kernel, is_leaf=lambda node: isinstance(node, kernel_type)
    )
    params = jax.eval_shape(lambda: leaf[0](jax.random.key(0), shapes)[1])
    if jax.tree.leaves(params) and name_of(leaf) not in AFFINE:
        raise ValueError(
            f"{place} must be one of {', '.join(AFFINE)}, or a layer without parameters, for a "
            f"kernel between times, got {name_of(leaf)}; {_WAY_OUT}"
        )
