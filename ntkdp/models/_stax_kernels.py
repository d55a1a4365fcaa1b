"""Infinite-width kernels of a stack of stax layers: by layer, and between times under noise."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ntkdp._backend import neural_tangents
from ntkdp._backend.types import Array, PyTree
from ntkdp.models._model import LayerLaws
from ntkdp.models._noisy_layers import noisy
from ntkdp.models._stax_types import KernelFn, StaxInitFn, StaxKernel, StaxLayer, stax


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
    laws: LayerLaws,
) -> tuple[Array, dict[str, Array]]:
    """Covariance of the outputs, and terms of the tangent kernel, between two times.

    ``laws`` holds the covariances of each layer's weights by name.
    """
    moved = [
        noisy(layer, laws[str(position)]) if position in positions else layer
        for position, layer in enumerate(layers)
    ]
    found = [kernel_from(moved, position)(x1, x2, ("nngp", "ntk")) for position in positions]
    return found[0].nngp, _differences(positions, [kernel.ntk for kernel in found])


def kernel_from(layers: Sequence[StaxLayer], position: int) -> KernelFn:
    """The kernel whose neural tangent part counts only the layers from ``position`` on."""
    boundary = _mapped(lambda kernel: {"ntk": jnp.zeros_like(kernel.ntk)})
    return stax().serial(*layers[:position], boundary, *layers[position:])[2]


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
