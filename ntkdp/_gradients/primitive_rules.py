"""How a weight meets data in one equation of a jaxpr: products, convolutions, lookups of rows.

For each sample the weight's gradient is ``sum_t x[g, t, p] delta[g, t, q]``. The readers give its
factors, x from the data that entered and delta from the cotangent of the output, and a layout says
where the gradient lies in the weight.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend.types import Array, common_dtype
from ntkdp._gradients.equations import shape_of
from ntkdp._gradients.leaf_layout import Layout, Reshaped

#: The largest window for which a product for each of its places is worth it.
_LARGEST_SUMMED_WINDOW = 32
#: The fewest channels for which it is.
_FEWEST_CHANNELS = 8


class Contraction(NamedTuple):
    """Readers of both factors, and the extents ``(g, p, q)`` and layout of the gradient.

    ``read_input`` reads the data of all samples at once, ``(n, *shape)``, as ``(n, g, t, p)``;
    ``read_cotangent`` reads a cotangent of one sample as ``(g, t, q)``. A lookup reads row numbers
    ``(n, t)``, -1 where the row does not exist, and cotangents ``(t, q)``.
    """

    kind: Literal["product", "convolution", "lookup"]
    extents: tuple[int, int, int]
    layout: Layout
    read_input: Callable[[Array], Array]
    read_cotangent: Callable[[Array], Array]
    #: The same operation in a form that is faster for many cotangents of the data.
    evaluate_for_many: Callable[[Array, Array], Array] | None = None


def contraction_of(eqn: jex.JaxprEqn, position: int) -> Contraction | None:
    """The contraction of the weight at this position with the other operand, or None."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _product(eqn, position)
    if name == "conv_general_dilated" and position == 1 and eqn.params["batch_group_count"] == 1:
        return _convolution(eqn)
    if name == "gather" and position == 0:
        return _lookup(eqn)
    return None


def _in_order(order: Sequence[int], weight_shape: tuple[int, ...]) -> Layout:
    """The layout of a gradient whose axes are the weight's in this order."""
    permutation = tuple(int(i) for i in np.argsort(order))
    return Layout(tuple(weight_shape[d] for d in order), permutation, ())


def _product(eqn: jex.JaxprEqn, position: int) -> Contraction:
    contracting, batch = eqn.params["dimension_numbers"]
    weight_shape = shape_of(eqn.invars[position])
    data_ndim = len(shape_of(eqn.invars[1 - position]))
    weight_blocks, data_blocks = list(batch[position]), list(batch[1 - position])
    weight_in, data_in = list(contracting[position]), list(contracting[1 - position])
    weight_out = [d for d in range(len(weight_shape)) if d not in weight_blocks + weight_in]
    data_positions = [d for d in range(data_ndim) if d not in data_blocks + data_in]
    g, p, q = (
        math.prod(weight_shape[d] for d in axes) for axes in (weight_blocks, weight_in, weight_out)
    )

    def read_input(x: Array) -> Array:
        order = data_blocks + data_positions + data_in
        return jnp.transpose(x, [0, *(d + 1 for d in order)]).reshape(x.shape[0], g, -1, p)

    def read_cotangent(delta: Array) -> Array:
        if position == 0:
            return jnp.swapaxes(delta.reshape(g, q, -1), 1, 2)
        return delta.reshape(g, -1, q)

    layout = _in_order(weight_blocks + weight_in + weight_out, weight_shape)
    return Contraction("product", (g, p, q), layout, read_input, read_cotangent)


def _convolution(eqn: jex.JaxprEqn) -> Contraction:
    numbers = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    weight_shape = shape_of(eqn.invars[1])
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    window = [weight_shape[d] for d in window_axes]
    n_in, q = weight_shape[in_axis], weight_shape[out_axis] // groups
    extents = (groups, math.prod(window) * n_in, q)

    def read_input(x: Array) -> Array:
        windows = _windows(x, eqn)  # (n, t, window, g * in)
        windows = windows.reshape(*windows.shape[:3], groups, n_in)
        windows = jnp.moveaxis(windows, 3, 1)
        return windows.reshape(*windows.shape[:3], extents[1])

    def read_cotangent(delta: Array) -> Array:
        batch_axis, feature_axis, *spatial_axes = numbers.out_spec
        delta = jnp.transpose(delta, (batch_axis, *spatial_axes, feature_axis))
        return jnp.moveaxis(delta.reshape(-1, groups, q), 1, 0)

    # The gradient has shape (g, *window, in, q); the filters of a group are q consecutive outputs.
    source = {axis: [1 + i] for i, axis in enumerate((*window_axes, in_axis))}
    source[out_axis] = [0, len(weight_shape)]
    permutation = tuple(i for axis in range(len(weight_shape)) for i in source[axis])
    shape = (groups, *window, n_in, q)
    layout = Layout(shape, permutation, (Reshaped(weight_shape),))
    by_places = (
        groups == 1
        and math.prod(eqn.params["window_strides"]) > 1
        and math.prod(window) <= _LARGEST_SUMMED_WINDOW
        and n_in >= _FEWEST_CHANNELS
    )
    evaluate = functools.partial(_convolve_by_places, eqn) if by_places else None
    return Contraction("convolution", extents, layout, read_input, read_cotangent, evaluate)


def _convolve_by_places(eqn: jex.JaxprEqn, x: Array, filters: Array) -> Array:
    """A convolution of one sample as a sum of products, one for each place in the window.

    The cotangent of the data then comes from products, too. A convolution with gaps between its
    inputs would multiply the zeros in the gaps.
    """
    numbers = eqn.params["dimension_numbers"]
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    filters = jnp.transpose(filters, (*window_axes, in_axis, out_axis))
    filters = filters.reshape(-1, *filters.shape[-2:])
    starts, out = _window_and_output(eqn)
    strides = eqn.params["window_strides"]
    x = _padded(x[None], eqn)
    batch, channels = x.shape[0], x.shape[-1]
    pieces = []
    for start in itertools.product(*starts):
        end = [s + (m - 1) * stride + 1 for s, m, stride in zip(start, out, strides, strict=True)]
        pieces.append(lax.slice(x, (0, *start, 0), (batch, *end, channels), (1, *strides, 1)))
    total = functools.reduce(jnp.add, map(jnp.matmul, pieces, filters))
    batch_axis, feature_axis, *spatial_axes = numbers.out_spec
    order = np.argsort((batch_axis, *spatial_axes, feature_axis))
    return jnp.transpose(total, [int(d) for d in order])


def _padded(x: Array, eqn: jex.JaxprEqn) -> Array:
    """Samples ``(n, batch, ...)`` with padding and gaps, ``(n * batch, *spatial, channels)``.

    A sample is a batch of one, or of more: the frames of a film.
    """
    params = eqn.params
    batch_axis, feature_axis, *spatial_axes = params["dimension_numbers"].lhs_spec
    order = (batch_axis, *spatial_axes, feature_axis)
    x = jnp.transpose(x, [0, *(d + 1 for d in order)])
    x = x.reshape(-1, *x.shape[2:])
    padding = [
        (*sides, spread - 1)
        for sides, spread in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])


def _window_and_output(eqn: jex.JaxprEqn) -> tuple[list[np.ndarray], list[int]]:
    """Where the places in the window begin along each axis, and the extents of the output."""
    numbers = eqn.params["dimension_numbers"]
    window = [shape_of(eqn.invars[1])[d] for d in numbers.rhs_spec[2:]]
    starts = [np.arange(m) * d for m, d in zip(window, eqn.params["rhs_dilation"], strict=True)]
    return starts, [shape_of(eqn.outvars[0])[d] for d in numbers.out_spec[2:]]


def _windows(x: Array, eqn: jex.JaxprEqn) -> Array:
    """The window of samples ``(n, batch, ...)`` that each place of the output sees.

    The result is ``(n, t, window, channels)``, with the places of the whole batch along t.

    The corners are computed rather than constant, so that this becomes one loop that copies pieces:
    several times faster than slices or a convolution with the identity.
    """
    n = x.shape[0]
    starts, out = _window_and_output(eqn)
    x = _padded(x, eqn)
    places, window_size = x.shape[0] // n * math.prod(out), math.prod(map(len, starts))
    if places == 0:
        return jnp.zeros((n, 0, window_size, x.shape[-1]), x.dtype)
    extent = [start[-1] + 1 for start in starts]
    dilation = tuple(slice(None, None, d) for d in eqn.params["rhs_dilation"])
    corners = [
        jnp.arange(m) * stride for m, stride in zip(out, eqn.params["window_strides"], strict=True)
    ]

    def windows_of_sample(x_i: Array) -> Array:
        def window(*corner: Array) -> Array:
            return lax.dynamic_slice(x_i, (*corner, 0), (*extent, x_i.shape[-1]))[dilation]

        along_axes = window
        for axis in reversed(range(len(out))):
            in_axes = [0 if d == axis else None for d in range(len(out))]
            along_axes = jax.vmap(along_axes, in_axes)
        return along_axes(*corners)

    windows: Array = jax.vmap(windows_of_sample)(x)
    return windows.reshape(n, places, window_size, x.shape[-1])


def _lookup(eqn: jex.JaxprEqn) -> Contraction | None:
    numbers = eqn.params["dimension_numbers"]
    table_shape = shape_of(eqn.invars[0])
    sizes = eqn.params["slice_sizes"]
    cut = [d for d in numbers.start_index_map if sizes[d] != table_shape[d]] or [
        d for d in numbers.start_index_map if d in numbers.collapsed_slice_dims
    ]
    if numbers.operand_batching_dims or len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    (axis,) = cut
    column = tuple(numbers.start_index_map).index(axis)
    others = [d for d in range(len(table_shape)) if d != axis]
    if any(sizes[d] != table_shape[d] for d in others):
        return None
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if fills and len(numbers.start_index_map) > 1:
        return None  # whether a whole row is filled depends on where it starts
    mode, last = eqn.params["mode"], table_shape[axis] - 1
    width = math.prod(table_shape[d] for d in others)
    offsets = list(numbers.offset_dims)

    def read_input(index: Array) -> Array:
        rows = index[..., column].reshape(index.shape[0], -1)
        if jnp.issubdtype(rows.dtype, jnp.unsignedinteger):
            rows = jnp.minimum(rows, min(last + 1, jnp.iinfo(rows.dtype).max))
        rows = rows.astype(common_dtype(rows.dtype, jnp.int32))
        if mode == lax.GatherScatterMode.CLIP:
            return jnp.clip(rows, 0, last)
        # In mode PROMISE_IN_BOUNDS, too, JAX's derivatives skip rows that do not exist.
        return jnp.where((rows >= 0) & (rows <= last), rows, -1)

    def read_cotangent(delta: Array) -> Array:
        positions = [d for d in range(delta.ndim) if d not in offsets]
        return jnp.transpose(delta, positions + offsets).reshape(-1, width)

    layout = _in_order([axis, *others], table_shape)
    return Contraction("lookup", (1, table_shape[axis], width), layout, read_input, read_cotangent)
