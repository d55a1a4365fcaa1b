"""Where the batch is after each primitive, given where it is in the operands.

For each output a rule gives the places at which every operand that depends on the samples has the
batch, and at which every other operand that matters there is uniform.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.extend.core as jex
import numpy as np
from jax.lax import GatherDimensionNumbers

from ntkdp._gradients.equations import shape_of


class Place(NamedTuple):
    """The batch along ``axis``, with neighbouring samples ``inner`` entries apart.

    An axis that holds (frame, sample, pixel) has the batch with ``inner`` pixels.
    """

    axis: int
    inner: int


Places: TypeAlias = frozenset[Place]
#: The parameters of JAX's primitives hold NumPy's whole numbers, too.
Axis: TypeAlias = int | np.integer


class Value(NamedTuple):
    """An array: whether it depends on the samples, and where it has the batch.

    ``trouble`` says in words where a value that depends on the samples lost the batch.
    """

    shape: tuple[int, ...]
    depends: bool
    places: Places = frozenset()
    trouble: str | None = None


Rule: TypeAlias = Callable[[jex.JaxprEqn, Sequence[Value], int], list[Places]]


def every_place(shape: Sequence[int], axis: int, n: int) -> list[Place]:
    """All places that a batch of n can have along an axis."""
    if shape[axis] % n or shape[axis] == 0:
        return []
    rest = shape[axis] // n
    return [Place(axis, inner) for inner in range(1, rest + 1) if rest % inner == 0]


def _common(values: Iterable[Value]) -> Places:
    """Places that all values have; an array without axes has none."""
    places = [value.places for value in values]
    return functools.reduce(frozenset.intersection, places) if places else frozenset()


def _moved(places: Places, to: Mapping[int, Axis]) -> Places:
    """Places on the axes that remain, by their new numbers."""
    return frozenset(Place(int(to[axis]), inner) for axis, inner in places if axis in to)


def _without(axes: Iterable[Axis], ndim: int) -> dict[int, int]:
    """New numbers of the axes that are left when some are taken away."""
    gone = {int(axis) for axis in axes}
    return {axis: i for i, axis in enumerate(d for d in range(ndim) if d not in gone)}


def _kept(axes: Iterable[Axis], ndim: int) -> dict[int, int]:
    """All axes but some, where they were."""
    gone = {int(axis) for axis in axes}
    return {axis: axis for axis in range(ndim) if axis not in gone}


def _same(eqn: jex.JaxprEqn, places: Places) -> list[Places]:
    return [places] * len(eqn.outvars)


def _elementwise(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    shape = shape_of(eqn.outvars[0])
    spread = [_spread(value, shape, n) for value in values if value.shape or value.depends]
    return _same(eqn, functools.reduce(frozenset.intersection, spread) if spread else frozenset())


def _spread(value: Value, shape: Sequence[int], n: int) -> Places:
    """Places of a value that is repeated along its axes of size 1 to fill a shape."""
    if len(value.shape) != len(shape):
        return frozenset()  # one number for all samples
    sizes = list(enumerate(zip(value.shape, shape, strict=True)))
    places = _moved(value.places, {d: d for d, (old, new) in sizes if old == new})
    repeated = [d for d, (old, new) in sizes if old != new and not value.depends]
    return places | {place for d in repeated for place in every_place(shape, d, n)}


def _each(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    return [value.places for value in values]


def _reshape(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    value, new = values[0], shape_of(eqn.outvars[0])
    # Only a reshape reads its entries in another order; the dimensions of a squeeze are others.
    permuted = eqn.params.get("dimensions") if eqn.primitive.name == "reshape" else None
    order = range(len(value.shape)) if permuted is None else [int(axis) for axis in permuted]
    old = [value.shape[axis] for axis in order]
    if 0 in new:  # there are no entries that could differ
        return [frozenset(Place(axis, 1) for axis, size in enumerate(new) if size == n)]
    apart = {
        inner * math.prod(old[axis + 1 :])
        for axis, inner in _moved(value.places, {axis: i for i, axis in enumerate(order)})
    }
    places = set()
    for axis, size in enumerate(new):
        below = math.prod(new[axis + 1 :])
        inners = [distance // below for distance in apart if distance % below == 0]
        places |= {Place(axis, inner) for inner in inners if size % (n * inner) == 0}
    return [frozenset(places)]


def _broadcast(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    value, new = values[0], shape_of(eqn.outvars[0])
    axes = eqn.params["broadcast_dimensions"]
    kept = {d: axis for d, axis in enumerate(axes) if value.shape[d] == new[axis]}
    places = _moved(value.places, kept)
    if not value.depends:
        spread = set(range(len(new))) - set(kept.values())
        places |= {place for axis in spread for place in every_place(new, axis, n)}
    return [places]


def _transpose(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    order = eqn.params["permutation"]
    return [_moved(values[0].places, {int(axis): i for i, axis in enumerate(order)})]


def _reduce(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    shape = values[0].shape
    if any(value.depends for value in values if value.shape != shape):
        return _same(eqn, frozenset())
    whole = _common(value for value in values if value.shape == shape)
    return _same(eqn, _moved(whole, _without(axes, len(shape))))


def _along(*names: str) -> Rule:
    """Operations that mix the entries along the axes that a parameter names."""

    def rule(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
        axes: set[int] = set()
        for name in names:
            named = eqn.params[name]
            axes |= set(named) if isinstance(named, Sequence) else {named}
        return _same(eqn, _moved(_common(values), _kept(axes, len(values[0].shape))))

    return rule


def _leading(n_last: int) -> Rule:
    """Operations on the last axes, for each entry along the others."""

    def rule(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
        ndim = max(len(value.shape) for value in values)
        if any(len(value.shape) != ndim for value in values):
            return _same(eqn, frozenset())
        places = _moved(_common(values), _kept(range(ndim - n_last, ndim), ndim))
        sizes = [shape_of(var) for var in eqn.outvars]
        return [frozenset(p for p in places if p.axis < len(size)) for size in sizes]

    return rule


def _fft(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    return _leading(len(eqn.params["fft_lengths"]))(eqn, values, n)


def _pad(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    value, filling = values
    padded = [d for d, sides in enumerate(eqn.params["padding_config"]) if any(sides)]
    places = _moved(value.places, _kept(padded, len(value.shape)))
    return [frozenset() if filling.depends else places]


def _whole_axes(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Axes along which nothing is cut."""
    return {d: d for d, (old, new) in enumerate(zip(before, after, strict=True)) if old == new}


def _cut(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    value, *starts = values
    if any(start.depends for start in starts):
        return _same(eqn, frozenset())
    return [_moved(value.places, _whole_axes(value.shape, shape_of(var))) for var in eqn.outvars]


def _stack(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    new, ndim = eqn.params["axis"], len(values[0].shape)
    return [_moved(_common(values), {d: d + (d >= new) for d in range(ndim)})]


def _unstack(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    (value,) = values
    return _same(eqn, _moved(value.places, _without([eqn.params["axis"]], len(value.shape))))


def _update(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    value, new, *starts = values
    if any(start.depends for start in starts):
        return [frozenset()]
    return [_moved(value.places & new.places, _whole_axes(value.shape, new.shape))]


def _product(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    left, right = values
    (summed_left, summed_right), (paired_left, paired_right) = eqn.params["dimension_numbers"]
    places = set()
    for i, (a, b) in enumerate(zip(paired_left, paired_right, strict=True)):
        inners = {inner for axis, inner in left.places if axis == a}
        places |= {Place(i, inner) for inner in inners if Place(b, inner) in right.places}
    position = len(paired_left)
    for value, other, used in (
        (left, right, (*summed_left, *paired_left)),
        (right, left, (*summed_right, *paired_right)),
    ):
        free = _without(used, len(value.shape))
        if not other.depends:
            shifted = {axis: position + i for axis, i in free.items()}
            places |= _moved(value.places, shifted)
        position += len(free)
    return [frozenset(places)]


def _convolution(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    data, filters = values
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    out = shape_of(eqn.outvars[0])
    places: set[Place] = set()
    if params["batch_group_count"] > 1:
        return [frozenset()]
    if not filters.depends:
        places |= _moved(data.places, {numbers.lhs_spec[0]: numbers.out_spec[0]})
    groups = params["feature_group_count"]
    if not data.depends and groups == 1:
        places |= _moved(filters.places, {numbers.rhs_spec[0]: numbers.out_spec[1]})
    # Filters of each sample: the samples are the outermost groups of the channels.
    ends = [(data, numbers.lhs_spec[1]), (filters, numbers.rhs_spec[0])]
    outermost = all(
        value.shape[axis] % n == 0 and Place(axis, value.shape[axis] // n) in value.places
        for value, axis in ends
    )
    if groups % n == 0 and outermost:
        places.add(Place(numbers.out_spec[1], out[numbers.out_spec[1]] // n))
    return [frozenset(places)]


def _batched_gather(numbers: GatherDimensionNumbers, n_index: int, out_ndim: int) -> dict[int, int]:
    """Axes of the output for each axis of the indices but the last."""
    rest = [d for d in range(out_ndim) if d not in numbers.offset_dims]
    return dict(zip(range(n_index - 1), rest, strict=True))


def _gather(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    data, index = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    to_out = _batched_gather(numbers, len(index.shape), len(shape_of(eqn.outvars[0])))
    pairs = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    places: set[Place] = set()
    for axis, inner in index.places:
        if axis not in to_out:
            continue
        paired = axis in pairs
        fits = Place(pairs[axis], inner) in data.places if paired else not data.depends
        if fits:
            places.add(Place(to_out[axis], inner))
    if not index.depends:
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        window = [d for d in range(len(data.shape)) if d not in gone]
        whole = {
            d: axis
            for d, axis in zip(window, numbers.offset_dims, strict=True)
            if sizes[d] == data.shape[d] and d not in numbers.start_index_map
        }
        places |= _moved(data.places, whole)
    return [frozenset(places)]


def _scatter(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    data, index, new = values
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [d for d in range(len(data.shape)) if d not in gone]
    places: set[Place] = set()
    for d, axis in zip(window, numbers.update_window_dims, strict=True):
        steered = d in numbers.scatter_dims_to_operand_dims
        if index.depends or steered or new.shape[axis] != data.shape[d]:
            continue
        mine = _moved(data.places, {d: d})
        places |= mine & _moved(new.places, {axis: d})
    rest = [d for d in range(len(new.shape)) if d not in numbers.update_window_dims]
    for d, axis in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        mine = _moved(data.places, {d: d}) & _moved(index.places, {axis: d})
        places |= mine & _moved(new.places, {rest[axis]: d})
    return [frozenset(places)]


def _reduce_window(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    params, shape = eqn.params, values[0].shape
    if any(value.depends for value in values if value.shape != shape):
        return _same(eqn, frozenset())

    def stands_still(d: int) -> bool:
        ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        alone = all(params[name][d] == 1 for name in ones if name in params)
        return alone and tuple(params["padding"][d]) == (0, 0)

    still = {d: d for d in range(len(shape)) if stands_still(d)}
    whole = _common(value for value in values if value.shape == shape)
    return _same(eqn, _moved(whole, still))


def _iota(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    shape, counted = shape_of(eqn.outvars[0]), eqn.params["dimension"]
    axes = [axis for axis in range(len(shape)) if axis != counted]
    return [frozenset(place for axis in axes for place in every_place(shape, axis, n))]


def _from_keys(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    """Random numbers of each of several keys; those of one key differ from place to place."""
    places, ndim = values[0].places, len(shape_of(eqn.outvars[0]))
    return [frozenset(place for place in places if place.axis < ndim)]


def _bitcast(eqn: jex.JaxprEqn, values: Sequence[Value], n: int) -> list[Places]:
    shared = min(len(values[0].shape), len(shape_of(eqn.outvars[0])))
    same_size = len(values[0].shape) == len(shape_of(eqn.outvars[0]))
    return [frozenset(p for p in values[0].places if same_size or p.axis < shared)]


_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "cos", "cosh", "device_put", "digamma", "div", "eq", "eq_to",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma",
    "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log",
    "log1p", "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg",
    "nextafter", "not", "or", "polygamma", "population_count", "pow", "random_clone",
    "random_fold_in", "random_gamma", "random_gamma_grad", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "sharding_constraint",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
}  # fmt: skip

_MATRICES = {
    "cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "qr", "schur",
    "svd", "triangular_solve", "tridiagonal",
}  # fmt: skip
_WINDOWS = {
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum",
    "select_and_gather_add",
}  # fmt: skip
_SCATTERS = {"scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"}
_RANDOM = {"random_bits", "random_seed", "random_split", "random_unwrap", "random_wrap"}
_REDUCTIONS = {
    "argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
    "reduce_prod", "reduce_sum", "reduce_xor",
}  # fmt: skip
_CUMULATIVE = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _along("axis")),
    **dict.fromkeys(_MATRICES, _leading(2)),
    **dict.fromkeys(_WINDOWS, _reduce_window),
    **dict.fromkeys(_SCATTERS, _scatter),
    **dict.fromkeys(_RANDOM, _from_keys),
    **dict.fromkeys(("optimization_barrier", "tile"), _each),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("slice", "dynamic_slice"), _cut),
    **dict.fromkeys(("split", "top_k"), _along("axis")),
    **dict.fromkeys(("concatenate", "sort"), _along("dimension")),
    "approx_top_k": _along("reduction_dimension"),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "dynamic_update_slice": _update,
    "fft": _fft,
    "gather": _gather,
    "iota": _iota,
    "lu_pivots_to_permutation": _leading(1),
    "pad": _pad,
    "rev": _along("dimensions"),
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
