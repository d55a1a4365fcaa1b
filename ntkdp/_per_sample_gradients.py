r"""Per-sample gradients in factored form, read off a model's jaxpr.

Where a parameter meets data in a product, the gradient of sample i is
:math:`g_i = \sum_t x_{it} \otimes \delta_{it}`, an outer product of what entered the product and
the cotangent of what left it, summed over positions t. Norms, weighted sums and kernels follow from
the two factors without the gradient itself. The model is traced for one sample, so that
independence of the samples holds by construction, and mapped over the batch.

A leaf is *structured* when it meets data once, in a product, after reshapes, transposes, casts and
scalings by a constant; every other leaf (a bias, a tied weight, a parameter inside a loop) gets
its plain per-sample gradient, and only it does.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._types import ApplyFn, Array, Params

_INLINED = {"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_RESHAPES = {"reshape", "squeeze", "expand_dims", "copy", "convert_element_type"}


class Outer(NamedTuple):
    """Gradients ``sum_t inputs[n, t, p] cotangents[n, b, t, q]``, laid out as ``layout`` says."""

    inputs: Array
    cotangents: Array
    layout: Callable[[Array], Array]


class Dense(NamedTuple):
    """Gradients as they are, ``(n, b, *leaf)``."""

    gradients: Array


#: One entry a leaf of the parameters; None for a leaf that the outputs do not depend on.
Factor = Outer | Dense | None


class _View(NamedTuple):
    """A leaf seen through rigid operations: ``value = scale * rearranged(leaf)``."""

    leaf: int
    scale: Any
    undo: tuple[tuple[str, tuple[int, ...]], ...]

    def restore(self, gradient: Array) -> Array:
        """Lay a gradient in the view out as the leaf."""
        for operation, argument in reversed(self.undo):
            gradient = (
                gradient.reshape(argument)
                if operation == "reshape"
                else jnp.transpose(gradient, argument)
            )
        return gradient


class _Value(NamedTuple):
    array: Any
    view: _View | None = None
    constant: bool = False
    uniform: bool = False


class _Site(NamedTuple):
    """Where a structured leaf meets data: how to read both factors and put a gradient together."""

    leaf: int
    tap_shape: tuple[int, ...]
    tap_dtype: Any
    read_cotangent: Callable[[Array], Array]
    layout: Callable[[Array], Array]


class Structure(NamedTuple):
    """What tracing a model for one sample found."""

    jaxpr: jex.ClosedJaxpr
    sites: dict[tuple[int, ...], _Site]
    loose: tuple[int, ...]
    n_leaves: int
    n_outputs: int


def _bind(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *arrays, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _interpret(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[_Value],
    meet: Callable[..., Any],
    loosen: Callable[[int], None],
    path: tuple[int, ...] = (),
) -> list[_Value]:
    """Evaluate ``jaxpr``, following views of the parameters to where they meet data.

    ``meet(path, view, data, eqn, position, out)`` is called at each recognised product and returns
    its output; ``loosen(leaf)`` is called where a view enters anything else.
    """
    env: dict[Any, _Value] = {}

    def read(atom: Any) -> _Value:
        if isinstance(atom, jex.Literal):
            return _Value(atom.val, constant=True, uniform=np.ndim(atom.val) == 0)
        return env[atom]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = _Value(const, constant=True, uniform=np.ndim(const) == 0)
    env.update(zip(jaxpr.invars, args, strict=True))

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in eqn.invars]
        here = (*path, number)
        viewed = [v for v in values if v.view is not None]
        if viewed and eqn.primitive.name in _INLINED:
            inner = eqn.params["jaxpr"]
            inner_jaxpr = getattr(inner, "jaxpr", inner)
            inner_consts = getattr(inner, "consts", ())
            outs = _interpret(inner_jaxpr, inner_consts, values, meet, loosen, here)
        else:
            arrays = _bind(eqn, [v.array for v in values])
            if not viewed:
                outs = [_constant_or_data(eqn, values, array) for array in arrays]
            else:
                outs = _use_of_view(eqn, values, arrays, meet, loosen, here)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _constant_or_data(eqn: Any, values: Sequence[_Value], array: Any) -> _Value:
    constant = all(v.constant for v in values)
    spread = eqn.primitive.name in {"broadcast_in_dim", "convert_element_type"}
    uniform = constant and (np.ndim(array) == 0 or (spread and values[0].uniform))
    return _Value(array, constant=constant, uniform=uniform)


def _use_of_view(
    eqn: Any,
    values: Sequence[_Value],
    arrays: list[Any],
    meet: Callable[..., Any],
    loosen: Callable[[int], None],
    here: tuple[int, ...],
) -> list[_Value]:
    viewed = [i for i, v in enumerate(values) if v.view is not None]
    if len(viewed) == 1:
        position = viewed[0]
        view: _View = values[position].view  # type: ignore[assignment]
        seen = _rigid(eqn, values, position, view, arrays[0])
        if seen is not None:
            return [seen]
        if _is_product(eqn, position):
            data = values[1 - position].array
            return [_Value(meet(here, view, data, eqn, position, arrays[0]))]
    for i in viewed:
        loosen(values[i].view.leaf)  # type: ignore[union-attr]
    return [_Value(array) for array in arrays]


def _rigid(
    eqn: Any, values: Sequence[_Value], position: int, view: _View, out: Any
) -> _Value | None:
    """The view after a rearrangement or a constant scaling, or None if the equation is neither."""
    name = eqn.primitive.name
    before = np.shape(values[position].array)
    if name in _RESHAPES or (name == "broadcast_in_dim" and np.size(out) == int(np.prod(before))):
        if name == "reshape" and eqn.params.get("dimensions") is not None:
            return None
        if not jnp.issubdtype(out.dtype, jnp.floating):
            return None
        return _Value(out, view._replace(undo=(*view.undo, ("reshape", before))))
    if name == "transpose":
        inverse = tuple(int(i) for i in np.argsort(eqn.params["permutation"]))
        return _Value(out, view._replace(undo=(*view.undo, ("transpose", inverse))))
    if name == "neg":
        return _Value(out, view._replace(scale=-view.scale))
    if name in {"mul", "div"} and len(values) == 2:
        other = values[1 - position]
        if not other.uniform or (name == "div" and position == 1):
            return None
        factor = jnp.asarray(other.array).reshape(-1)[0]
        scale = view.scale * factor if name == "mul" else view.scale / factor
        return _Value(out, view._replace(scale=scale))
    return None


def _is_product(eqn: Any, position: int) -> bool:
    if eqn.primitive.name == "dot_general":
        _, batch = eqn.params["dimension_numbers"]
        return not batch[position]
    if eqn.primitive.name == "conv_general_dilated":
        return (
            position == 1
            and eqn.params["feature_group_count"] == 1
            and eqn.params["batch_group_count"] == 1
        )
    return False


def _dot_readers(view: _View, eqn: Any, position: int) -> tuple[Any, Any, Any]:
    """Readers of both factors, and the layout, for ``dot_general``."""
    contracting, _ = eqn.params["dimension_numbers"]
    weight_shape = eqn.invars[position].aval.shape
    weight_contracting = [int(d) for d in contracting[position]]
    data_contracting = [int(d) for d in contracting[1 - position]]
    weight_free = [d for d in range(len(weight_shape)) if d not in weight_contracting]
    data_ndim = eqn.invars[1 - position].aval.ndim
    data_free = [d for d in range(data_ndim) if d not in data_contracting]
    n_in = int(np.prod([weight_shape[d] for d in weight_contracting]))
    n_out = int(np.prod([weight_shape[d] for d in weight_free]))

    def read_input(x: Array) -> Array:
        return jnp.transpose(x, data_free + data_contracting).reshape(-1, n_in)

    def read_cotangent(delta: Array) -> Array:
        if position == 0:
            return delta.reshape(n_out, -1).T
        return delta.reshape(-1, n_out)

    order = weight_contracting + weight_free
    back = [int(i) for i in np.argsort(order)]

    def layout(gradient: Array) -> Array:
        blocked = gradient.reshape([weight_shape[d] for d in order])
        return view.restore(jnp.transpose(blocked, back))

    return read_input, read_cotangent, layout


def _conv_readers(view: _View, eqn: Any) -> tuple[Any, Any, Any]:
    """The same for ``conv_general_dilated``: a product with the patches under the filter."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    weight_shape = eqn.invars[1].aval.shape
    filter_order = [int(d) for d in numbers.rhs_spec]  # (out, in, *spatial)
    n_out = weight_shape[filter_order[0]]
    window = [weight_shape[d] for d in filter_order[2:]]
    out_order = [int(d) for d in numbers.out_spec]  # (batch, features, *spatial)

    def read_input(x: Array) -> Array:
        patches = lax.conv_general_dilated_patches(
            x,
            filter_shape=window,
            window_strides=p["window_strides"],
            padding=p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=numbers,
            precision=p["precision"],
        )
        patches = jnp.transpose(patches, (out_order[0], *out_order[2:], out_order[1]))
        return patches.reshape(-1, patches.shape[-1])

    def read_cotangent(delta: Array) -> Array:
        delta = jnp.transpose(delta, (out_order[0], *out_order[2:], out_order[1]))
        return delta.reshape(-1, n_out)

    back = [int(i) for i in np.argsort([*filter_order[1:], filter_order[0]])]

    def layout(gradient: Array) -> Array:
        blocked = gradient.reshape([weight_shape[d] for d in filter_order[1:]] + [n_out])
        return view.restore(jnp.transpose(blocked, back))

    return read_input, read_cotangent, layout


def _readers(view: _View, eqn: Any, position: int) -> tuple[Any, Any, Any]:
    if eqn.primitive.name == "dot_general":
        return _dot_readers(view, eqn, position)
    return _conv_readers(view, eqn)


def trace(apply_fn: ApplyFn, params: Params, x: Array) -> Structure:
    """Trace ``apply_fn`` for one sample of ``x`` and find where each leaf meets data."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    def single(flat: list[Any], x_i: Array) -> Array:
        return apply_fn(jax.tree.unflatten(treedef, flat), x_i[None])[0]

    jaxpr = jax.make_jaxpr(single)(shapes, sample)
    sites: dict[tuple[int, ...], _Site] = {}
    uses: Counter[int] = Counter()

    def meet(path: Any, view: _View, data: Any, eqn: Any, position: int, out: Any) -> Any:
        _, read_cotangent, layout = _readers(view, eqn, position)
        sites[path] = _Site(view.leaf, out.shape, out.dtype, read_cotangent, layout)
        uses[view.leaf] += 1
        return out

    def loosen(leaf: int) -> None:
        uses[leaf] += 2

    def discover(flat: list[Any], x_i: Array) -> Any:
        args = [_Value(leaf, _View(i, 1.0, ())) for i, leaf in enumerate(flat)] + [_Value(x_i)]
        (out,) = _interpret(jaxpr.jaxpr, jaxpr.consts, args, meet, loosen)
        if out.view is not None:
            loosen(out.view.leaf)
        return out.array

    output = jax.eval_shape(discover, shapes, sample)
    return Structure(
        jaxpr=jaxpr,
        # A leaf that is used again elsewhere has a gradient that is not one outer product.
        sites={path: site for path, site in sites.items() if uses[site.leaf] == 1},
        loose=tuple(leaf for leaf, times in sorted(uses.items()) if times > 1),
        n_leaves=len(leaves),
        n_outputs=output.shape[0],
    )


def factored(
    structure: Structure,
    params: Params,
    x: Array,
    cotangent: Callable[..., Array],
    *args: Array,
) -> tuple[Array, list[Factor]]:
    """Outputs ``(n, K)`` and per-sample gradients of every leaf, in factored form.

    ``cotangent(f_i, *args_i)`` maps one sample's outputs ``(K,)`` to ``(b, K)`` cotangents: the
    output gradient (b = 1) or a basis of the outputs (b = K).
    """
    leaves = jax.tree.leaves(params)
    paths = list(structure.sites)

    def one_sample(x_i: Array, *args_i: Array) -> Any:
        def tapped(taps: list[Array], loose: list[Array]) -> Any:
            flat = list(leaves)
            for index, leaf in zip(structure.loose, loose, strict=True):
                flat[index] = leaf
            inputs: dict[tuple[int, ...], Array] = {}

            def meet(path: Any, view: _View, data: Any, eqn: Any, position: int, out: Any) -> Any:
                if path not in structure.sites:
                    return out
                read_input, _, _ = _readers(view, eqn, position)
                inputs[path] = read_input(data * view.scale)
                return out + taps[paths.index(path)]

            values = [_Value(leaf, _View(i, 1.0, ())) for i, leaf in enumerate(flat)]
            (out,) = _interpret(
                structure.jaxpr.jaxpr,
                structure.jaxpr.consts,
                [*values, _Value(x_i)],
                meet,
                lambda leaf: None,
            )
            return out.array, [inputs[path] for path in paths]

        taps = [jnp.zeros(s.tap_shape, s.tap_dtype) for s in structure.sites.values()]
        loose = [leaves[index] for index in structure.loose]
        f_i, pull, inputs = jax.vjp(tapped, taps, loose, has_aux=True)
        deltas, gradients = jax.vmap(pull)(cotangent(f_i, *args_i))
        read = [
            jax.vmap(site.read_cotangent)(delta)
            for site, delta in zip(structure.sites.values(), deltas, strict=True)
        ]
        return f_i, inputs, read, gradients

    outputs, inputs, deltas, gradients = jax.vmap(one_sample)(x, *args)
    factors: list[Factor] = [None] * structure.n_leaves
    for site, site_inputs, delta in zip(structure.sites.values(), inputs, deltas, strict=True):
        factors[site.leaf] = Outer(site_inputs, delta, site.layout)
    for index, gradient in zip(structure.loose, gradients, strict=True):
        factors[index] = Dense(gradient)
    return outputs, factors


def _gradients(factor: Outer) -> Array:
    """The gradients themselves, ``(n, b, p, q)``."""
    return jnp.einsum("ntp,nbtq->nbpq", factor.inputs, factor.cotangents)


def squared_norms(factor: Factor, n: int) -> Array:
    """Squared norm of each sample's gradient (b = 1), ``(n,)``."""
    if factor is None:
        return jnp.full(n, 0.0)  # weakly typed
    if isinstance(factor, Dense):
        return jnp.sum(factor.gradients.reshape(n, -1) ** 2, axis=1)
    x, delta = factor.inputs, factor.cotangents[:, 0]
    _, positions, n_in = x.shape
    n_out = delta.shape[-1]
    if positions == 1:
        return jnp.sum(x**2, axis=(1, 2)) * jnp.sum(delta**2, axis=(1, 2))
    if positions * (n_in + n_out) < n_in * n_out:
        grams = jnp.einsum("ntp,nsp->nts", x, x) * jnp.einsum("ntq,nsq->nts", delta, delta)
        return jnp.sum(grams, axis=(1, 2))
    return jnp.sum(_gradients(factor) ** 2, axis=(1, 2, 3))


def keep(factor: Factor, usable: Array) -> Factor:
    """The factor with zeros for samples that are not usable, whatever they hold."""

    def zeroed(values: Array) -> Array:
        return jnp.where(usable.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    if factor is None:
        return None
    if isinstance(factor, Dense):
        return Dense(zeroed(factor.gradients))
    return Outer(zeroed(factor.inputs), zeroed(factor.cotangents), factor.layout)


def weighted_sum(factor: Factor, weights: Array, like: Array) -> Array:
    """``sum_i weights[i] g_i`` (b = 1), laid out as the leaf ``like``."""
    if factor is None:
        return jnp.zeros_like(like)
    if isinstance(factor, Dense):
        total = jnp.tensordot(weights, factor.gradients[:, 0], axes=1)
        return total.reshape(like.shape).astype(like.dtype)
    delta = factor.cotangents[:, 0] * weights[:, None, None]
    n_in, n_out = factor.inputs.shape[-1], delta.shape[-1]
    total = factor.inputs.reshape(-1, n_in).T @ delta.reshape(-1, n_out)
    return factor.layout(total).astype(like.dtype)


def kernel(rows: Factor, columns: Factor) -> Array | float:
    """Inner products of all gradients, ``(n1, b1, n2, b2)``."""
    if rows is None or columns is None:
        return 0.0
    if isinstance(rows, Outer) and isinstance(columns, Outer) and rows.inputs.shape[1] == 1:
        gram = rows.inputs[:, 0] @ columns.inputs[:, 0].T
        cotangents = jnp.tensordot(
            rows.cotangents[:, :, 0], columns.cotangents[:, :, 0], [[2], [2]]
        )
        return cotangents * gram[:, None, :, None]
    first, second = (
        _gradients(factor) if isinstance(factor, Outer) else factor.gradients
        for factor in (rows, columns)
    )
    first = first.reshape(*first.shape[:2], -1)
    second = second.reshape(*second.shape[:2], -1)
    return jnp.tensordot(first, second, [[2], [2]])
