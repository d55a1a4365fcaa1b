r"""Infinite-width kernels of a stack of stax layers: by layer, and between times under noise.

Between times t and s at which noise of variance v has been added to every weight, the weights of a
layer have covariance :math:`c_{ts} = 1 + \min(v_t, v_s)`. A layer's rule
:math:`\Sigma' = W^2 \Sigma + b^2`, :math:`\Theta' = \Sigma' + W^2 \Theta` becomes
:math:`c \Sigma'` and :math:`\Sigma' + c W^2 \Theta`: the neural tangent part is scaled before
the layer and the covariances after it, and neural-tangents does the rest.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from ntkdp._backend import neural_tangents
from ntkdp._backend.types import Array, PyTree
from ntkdp.models._stax_types import KernelFn, StaxInitFn, StaxKernel, StaxLayer, stax

#: Layers whose kernel is linear in that of their input, weights and bias of one scale each.
_AFFINE = ("Dense", "Conv", "ConvLocal", "ConvTranspose")


def layers_with_parameters(init_fn: StaxInitFn, shape: tuple[int, ...]) -> list[int]:
    """Positions of the layers that hold parameters."""
    params = jax.eval_shape(lambda: init_fn(jax.random.key(0), shape)[1])
    positions = [position for position, entry in enumerate(params) if jax.tree.leaves(entry)]
    if not positions:
        raise ValueError("layers must hold parameters for the kernel to have terms, got none")
    # The default groups would descend into a block that holds everything; its layers are hidden.
    only = params[positions[0]]
    if len(positions) == 1 and any(isinstance(child, list | tuple | dict) for child in only):
        raise ValueError(
            f"layers[{positions[0]}] holds all parameters in nested layers, whose kernel terms "
            "cannot be told apart; pass these layers themselves to serial"
        )
    return positions


def layer_terms(
    layers: Sequence[StaxLayer], positions: Sequence[int], x1: Array, x2: Array | None
) -> dict[str, Array]:
    """The neural tangent kernel as a sum over the layers at ``positions``."""
    from_layer = [kernel_from(layers, position)(x1, x2, "ntk") for position in positions]
    return _differences(positions, from_layer)


def two_time_terms(
    layers: Sequence[StaxLayer],
    positions: Sequence[int],
    x1: Array,
    x2: Array,
    covariances: Mapping[str, tuple[Array, Array, Array]],
) -> tuple[Array, dict[str, Array]]:
    """Covariance of the outputs, and terms of the tangent kernel, between two times.

    ``covariances`` holds (c_tt, c_ts, c_ss) of each layer's weights by name.
    """
    noisy: list[StaxLayer] = []
    starts = {}
    for position, layer in enumerate(layers):
        if position in positions:
            of_first, between, of_second = covariances[str(position)]
            starts[position] = len(noisy)
            noisy += [_before(between), layer, _after(of_first, between, of_second)]
        else:
            noisy.append(layer)
    found = [kernel_from(noisy, starts[p])(x1, x2, ("nngp", "ntk")) for p in positions]
    return found[0].nngp, _differences(positions, [kernel.ntk for kernel in found])


def check_two_time(
    layers: Sequence[StaxLayer], positions: Sequence[int], shape: tuple[int, ...]
) -> None:
    """Raise unless every layer with parameters has the two-time rule."""
    for position in positions:
        name = getattr(layers[position][2], "__name__", "?")
        if name not in _AFFINE:
            raise ValueError(
                f"layers[{position}] must be one of {', '.join(_AFFINE)} for a kernel between "
                f"times, got {name}; pass the layers of a block themselves to serial"
            )

    @jax.jit
    def terms(x: Array) -> list[tuple[Array, Array]]:
        kernels = [
            kernel_from(layers[: position + 1], position)(x, None, ("nngp", "ntk"))
            for position in positions
        ]
        return [(kernel.nngp, kernel.ntk) for kernel in kernels]

    # One input tells: a layer's own term is the covariance of its outputs, whatever they are.
    with jax.ensure_compile_time_eval():
        found = terms(jnp.ones((1, *shape[1:])))
    for position, (nngp, own) in zip(positions, found, strict=True):
        if not bool(jnp.allclose(nngp, own, rtol=1e-3)):
            raise ValueError(
                f"layers[{position}] must have parameterization='ntk' for a kernel between times: "
                "noise of one size on weights of another parameterization has no limit at "
                "infinite width"
            )


def kernel_from(layers: Sequence[StaxLayer], position: int) -> KernelFn:
    """The kernel whose neural tangent part counts only the layers from ``position`` on."""
    boundary = _mapped(lambda kernel: {"ntk": jnp.zeros_like(kernel.ntk)})
    return stax().serial(*layers[:position], boundary, *layers[position:])[2]


def _before(between: Array) -> StaxLayer:
    return _mapped(lambda kernel: {"ntk": between * kernel.ntk})


def _after(of_first: Array, between: Array, of_second: Array) -> StaxLayer:
    return _mapped(
        lambda kernel: {
            "cov1": of_first * kernel.cov1,
            "nngp": between * kernel.nngp,
            "cov2": of_second * kernel.cov2,
        }
    )


def _mapped(change: Callable[[StaxKernel], dict[str, Array]]) -> StaxLayer:
    """A layer that changes fields of the kernel and nothing else."""
    kernel_type = neural_tangents.Kernel

    def kernel_fn(kernels: PyTree, **_: object) -> PyTree:
        return jax.tree.map(
            lambda kernel: kernel.replace(**change(kernel)),
            kernels,
            is_leaf=lambda node: isinstance(node, kernel_type),
        )

    return (
        lambda key, shape: (shape, ()),
        lambda params, x, **_: x,
        stax().requires()(kernel_fn),
    )


def _differences(positions: Sequence[int], from_layer: Sequence[Array]) -> dict[str, Array]:
    following = [*from_layer[1:], jnp.zeros_like(from_layer[0])]
    return {
        str(position): own - rest
        for position, own, rest in zip(positions, from_layer, following, strict=True)
    }
