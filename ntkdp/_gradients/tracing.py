"""Where the parameters of a model meet data, read from its jaxpr.

The model is traced for one sample, so that the samples are independent by construction. Each leaf
is followed as a :class:`LeafView` through operations that only rearrange or cut it, scale it by a
constant or shift it. Where a view meets data in a product, a convolution or a lookup of rows, the
leaf has a :class:`LeafUse`, and its gradient has factors. A leaf with any other use is *dense*: its
per-sample gradient is formed as it is, for that leaf alone. If the leaf is added or multiplied
element by element, that is the cheapest form anyway, but for a bias that is added to the product of
a vector: it has the cotangent of the product, and shares all that is computed from it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import ApplyFn, Array, Params, is_traced
from ntkdp._gradients import primitive_rules
from ntkdp._gradients.equations import CALLS, Atom, Operand, called_program, evaluate
from ntkdp._gradients.leaf_layout import Cut, Layout, Rearrangement, Reshaped, Transposed
from ntkdp._gradients.primitive_rules import Contraction

_RESHAPES = {"reshape", "squeeze", "expand_dims", "copy", "convert_element_type"}
#: In a vector of any shape these do not move an entry past another.
_KEEP_VECTORS = {"reshape", "squeeze", "expand_dims", "copy", "transpose"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "add_any"}
_ELEMENT_BY_ELEMENT = "element by element"
#: A loop of at most this many turns is unrolled to look inside; every turn is compiled anew.
_LONGEST_UNROLLED = 64

#: A bias shares the cotangent of a product whose scale is from this up to one over it.
_LEAST_SCALE = 1e-3

#: The equation that a leaf is used in, by its number, and before it those of the calls around it.
Path: TypeAlias = tuple[int, ...]
#: The family of a contraction, its extents and its layout in the leaf.
Place: TypeAlias = tuple[str, tuple[int, int, int], Layout]


class LeafView(NamedTuple):
    """A leaf after rigid operations: ``value = scale * rearranged(leaf) + constant``.

    A view that is ``spread`` was broadcast, and can meet data element by element only.
    """

    leaf: int
    scale: float | Array = 1.0
    rearranged: tuple[Rearrangement, ...] = ()
    spread: bool = False

    def then(self, step: Rearrangement) -> "LeafView":
        """The view after one more rearrangement."""
        return self if self.spread else self._replace(rearranged=(*self.rearranged, step))


class Scaled(NamedTuple):
    """The output of a contraction, by its path, times a number; nothing else reads it."""

    path: Path
    scale: float | Array = 1.0


class Value(NamedTuple):
    """An intermediate result and its source: a leaf, constants alone, or data."""

    array: Operand
    view: LeafView | None = None
    constant: bool = False
    uniform: bool = False
    product: Scaled | None = None


class LeafUse(NamedTuple):
    """A contraction of a leaf with data, and the shape and dtype of its output, the tap."""

    leaf: int
    contraction: Contraction
    layout: Layout
    tap_shape: tuple[int, ...]
    tap_dtype: np.dtype

    @property
    def place(self) -> Place:
        """Equal for uses whose gradients are sums of outer products of the same axes."""
        family = "lookup" if self.contraction.kind == "lookup" else "product"
        return family, self.contraction.extents, self.layout


class Bias(NamedTuple):
    """A leaf that is added to the product at a path, and to nothing else."""

    leaf: int
    product: Path
    layout: Layout


class Visitor(NamedTuple):
    """Functions to call at each use of a leaf.

    ``visit_contraction(path, view, contraction, data, weight, out)`` and ``visit_sum(path, view,
    product, out)``, if a leaf is added to a product, return the output, perhaps changed;
    ``visit_other_use(leaf, reason)`` hears of any use that has no factors.
    """

    visit_contraction: Callable[[Path, LeafView, Contraction, Operand, Operand, Array], Array]
    visit_sum: Callable[[Path, LeafView, Scaled, Array], Array]
    visit_other_use: Callable[[int, str], None]


class Structure(NamedTuple):
    """A model traced for one sample: the uses of its leaves, and which leaves are dense.

    Biases are found by the path of their sum.
    """

    jaxpr: jex.ClosedJaxpr
    uses: dict[Path, LeafUse]
    biases: dict[Path, Bias]
    dense: tuple[int, ...]
    n_leaves: int
    n_outputs: int
    descriptions: tuple[str, ...]


def interpret(
    jaxpr: jex.Jaxpr,
    consts: Sequence[Operand],
    args: Sequence[Value],
    visitor: Visitor,
    path: Path = (),
) -> list[Value]:
    """Evaluate ``jaxpr``, following views of the parameters to where they are used."""
    env: dict[Atom, Value] = {}
    atoms = itertools.chain(*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
    readers = Counter(atom for atom in atoms if isinstance(atom, jex.Var))

    def read(atom: Atom) -> Value:
        if isinstance(atom, jex.Literal):
            return Value(atom.val, constant=True, uniform=np.ndim(atom.val) == 0)
        return env[atom] if readers[atom] == 1 else env[atom]._replace(product=None)

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Value(const, constant=True, uniform=np.ndim(const) == 0)
    env.update(zip(jaxpr.invars, args, strict=True))
    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in eqn.invars]
        outs = _evaluate(eqn, values, visitor, (*path, number))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: jex.JaxprEqn, values: list[Value], visitor: Visitor, path: Path) -> list[Value]:
    name = eqn.primitive.name
    views = {i: value.view for i, value in enumerate(values) if value.view is not None}
    if views and name in CALLS:
        return interpret(*called_program(eqn), values, visitor, path)
    if views and name == "scan" and 1 <= eqn.params["length"] <= _LONGEST_UNROLLED:
        return _unroll(eqn, values, visitor, path)
    arrays = evaluate(eqn, [value.array for value in values])
    if not views:
        return [_constant_or_data(eqn, values, array) for array in arrays]
    if len(views) == 1:
        ((position, view),) = views.items()
        rigid = _rigid(eqn, values, position, view, arrays)
        if rigid is not None:
            return rigid
        contraction = None if view.spread else primitive_rules.contraction_of(eqn, position)
        if contraction is not None:
            weight, data = values[position].array, values[1 - position].array
            out = visitor.visit_contraction(path, view, contraction, data, weight, arrays[0])
            return [Value(out, product=Scaled(path))]
        if name == "add" and (product := values[1 - position].product) is not None:
            return [Value(visitor.visit_sum(path, view, product, arrays[0]))]
    for view in views.values():
        visitor.visit_other_use(view.leaf, _reason(eqn, values, list(views)))
    return [Value(array) for array in arrays]


def _reason(eqn: jex.JaxprEqn, values: Sequence[Value], viewed: list[int]) -> str:
    """Why the leaves at these positions have no factors in an equation."""
    name = eqn.primitive.name
    if name in _ELEMENTWISE and len(viewed) == 1 and not (name == "div" and viewed == [1]):
        other = values[1 - viewed[0]]
        return "scaled by an array" if other.constant else _ELEMENT_BY_ELEMENT
    if name == "scan":
        return f"inside a loop of {eqn.params['length']} turns"
    return f"used in `{name}`"


def _constant_or_data(eqn: jex.JaxprEqn, values: Sequence[Value], array: Array) -> Value:
    constant = all(value.constant for value in values)
    spread = eqn.primitive.name in {"broadcast_in_dim", "convert_element_type"}
    uniform = constant and (np.ndim(array) == 0 or (spread and values[0].uniform))
    return Value(array, constant=constant, uniform=uniform, product=_scaled_product(eqn, values))


def _scaled_product(eqn: jex.JaxprEqn, values: Sequence[Value]) -> Scaled | None:
    """The product that an equation scales by a number or reshapes, else None."""
    for position, value in enumerate(values):
        if value.product is not None:
            if eqn.primitive.name in _KEEP_VECTORS:
                return value.product
            scale = _scale_after(eqn, values, position, value.product.scale)
            return None if scale is None else value.product._replace(scale=scale)
    return None


def _scale_after(
    eqn: jex.JaxprEqn, values: Sequence[Value], position: int, scale: float | Array
) -> float | Array | None:
    """The scale of an operand after a scaling by a number, else None."""
    name = eqn.primitive.name
    if name == "neg":
        return -scale
    if name not in {"mul", "div"} or (name == "div" and position == 1):
        return None
    other = values[1 - position]
    if not other.uniform:
        return None
    factor: float | Array
    if is_traced(other.array) or (name == "div" and not np.any(other.array)):
        factor = jnp.asarray(other.array).reshape(-1)[0]
    else:
        factor = float(np.asarray(other.array).reshape(-1)[0])
    return scale * factor if name == "mul" else scale / factor


def _rigid(
    eqn: jex.JaxprEqn,
    values: Sequence[Value],
    position: int,
    view: LeafView,
    outs: Sequence[Array],
) -> list[Value] | None:
    """The view after a rearrangement, a cut, a constant scaling or shift; None after all else."""
    before = np.shape(values[position].array)
    views = _rearranged(eqn, view, before, outs)
    if views is None and (len(values) == 1 or (len(values) == 2 and np.shape(outs[0]) == before)):
        scaled = _scaled_or_shifted(eqn, values, position, view)
        views = None if scaled is None else [scaled]
    if views is None:
        return None
    return [Value(out, after) for out, after in zip(outs, views, strict=True)]


def _rearranged(
    eqn: jex.JaxprEqn, view: LeafView, before: tuple[int, ...], outs: Sequence[Array]
) -> list[LeafView] | None:
    """A view for each result of an equation that rearranges or cuts its operand, else None."""
    name, out = eqn.primitive.name, outs[0]
    if name in _RESHAPES or name == "broadcast_in_dim":
        permuted = name == "reshape" and eqn.params.get("dimensions") is not None
        if permuted or not jnp.issubdtype(out.dtype, jnp.floating):
            return None
        if name == "broadcast_in_dim" and np.size(out) != math.prod(before):
            return [view._replace(spread=True)]
        return [view.then(Reshaped(before))]
    if name == "transpose":
        inverse = tuple(int(i) for i in np.argsort(eqn.params["permutation"]))
        return [view.then(Transposed(inverse))]
    if name == "slice" and eqn.params["strides"] is None:
        return [view.then(Cut(eqn.params["start_indices"], np.shape(out), before))]
    if name == "split":
        axis = eqn.params["axis"]
        starts = np.cumsum([0, *eqn.params["sizes"]])
        corners = [tuple(int(s) if d == axis else 0 for d in range(len(before))) for s in starts]
        return [
            view.then(Cut(corner, np.shape(piece), before))
            for piece, corner in zip(outs, corners, strict=False)
        ]
    return None


def _scaled_or_shifted(
    eqn: jex.JaxprEqn, values: Sequence[Value], position: int, view: LeafView
) -> LeafView | None:
    """The view after a constant shift, or a scaling by a number, else None."""
    name = eqn.primitive.name
    if name in {"add", "sub"} and values[1 - position].constant:
        sign = -1.0 if name == "sub" and position == 1 else 1.0
        return view._replace(scale=sign * view.scale)
    scale = _scale_after(eqn, values, position, view.scale)
    return None if scale is None else view._replace(scale=scale)


def _unroll(eqn: jex.JaxprEqn, values: list[Value], visitor: Visitor, path: Path) -> list[Value]:
    """A loop turn by turn, so that a leaf that it uses or steps through can be seen inside."""
    params = eqn.params
    n_consts, n_carry = params["num_consts"], params["num_carry"]
    body, length = params["jaxpr"], params["length"]

    def data_only(value: Value) -> Value:
        if value.view is not None:
            visitor.visit_other_use(value.view.leaf, "carried through a loop")
        return Value(value.array)

    consts = values[:n_consts]
    carry = [data_only(value) for value in values[n_consts : n_consts + n_carry]]
    stepped = values[n_consts + n_carry :]
    turns: list[list[Value]] = [[]] * length
    for k in reversed(range(length)) if params["reverse"] else range(length):
        here = [_turn(value, k) for value in stepped]
        outs = interpret(body.jaxpr, body.consts, [*consts, *carry, *here], visitor, (*path, k))
        outs = [data_only(value) for value in outs]
        carry, turns[k] = outs[:n_carry], outs[n_carry:]
    stacked = [Value(jnp.stack([value.array for value in ys])) for ys in zip(*turns, strict=True)]
    return [*carry, *stacked]


def _turn(value: Value, k: int) -> Value:
    """Entry k along the first axis."""
    whole = np.shape(value.array)
    array = cast(Array, value.array)[k]
    if value.view is None:
        return value._replace(array=array)
    cut = Cut((k, *[0] * (len(whole) - 1)), (1, *whole[1:]), whole)
    return Value(array, value.view.then(cut).then(Reshaped(cut.size)))


def trace(apply_fn: ApplyFn, params: Params, x: Array) -> Structure:
    """Trace ``apply_fn`` for one sample of ``x`` and find where each leaf meets data."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    def single(flat: list[Array], x_i: Array) -> Array:
        return apply_fn(jax.tree.unflatten(treedef, flat), x_i[None])[0]

    jaxpr = jax.make_jaxpr(single)(shapes, sample)
    uses: dict[Path, LeafUse] = {}
    biases: dict[Path, Bias] = {}
    reasons: dict[int, list[str]] = {}

    def add_use(
        path: Path,
        view: LeafView,
        contraction: Contraction,
        data: Operand,
        weight: Operand,
        out: Array,
    ) -> Array:
        rearranged = (*view.rearranged, *contraction.layout.rearranged)
        layout = contraction.layout._replace(rearranged=rearranged)
        uses[path] = LeafUse(view.leaf, contraction, layout, out.shape, out.dtype)
        return out

    def add_reason(leaf: int, reason: str) -> None:
        reasons.setdefault(leaf, []).append(reason)

    def add_sum(path: Path, view: LeafView, product: Scaled, out: Array) -> Array:
        add_reason(view.leaf, _ELEMENT_BY_ELEMENT)
        use, layout = uses[product.path], Layout((out.size,), (0,), view.rearranged)
        whole = math.prod(shapes[view.leaf].shape) == out.size
        if whole and _is_moderate(product.scale) and _adds_to_vector(view, use, out):
            biases[path] = Bias(view.leaf, product.path, layout)
        return out

    def discover(flat: list[Array], x_i: Array) -> Operand:
        args = [Value(leaf, LeafView(i)) for i, leaf in enumerate(flat)] + [Value(x_i)]
        (out,) = interpret(jaxpr.jaxpr, jaxpr.consts, args, Visitor(add_use, add_sum, add_reason))
        if out.view is not None:
            add_reason(out.view.leaf, "returned")
        for leaf, shape in enumerate(shapes):
            if 0 in shape.shape:
                add_reason(leaf, "empty")
        return out.array

    output = jax.eval_shape(discover, shapes, sample)
    descriptions = []
    for leaf in range(len(leaves)):
        own = [use for use in uses.values() if use.leaf == leaf]
        if own and leaf in reasons:
            add_reason(leaf, f"used in a {own[0].contraction.kind}, too")
        elif not _separable(own):
            add_reason(leaf, f"used in {len(own)} products that lie across each other")
        descriptions.append(_describe(own, set(reasons.get(leaf, ()))))
    factored = {path: use for path, use in uses.items() if use.leaf not in reasons}
    biases = {
        path: bias
        for path, bias in biases.items()
        if len(reasons[bias.leaf]) == 1 and bias.product in factored
    }
    return Structure(
        jaxpr=jaxpr,
        uses=factored,
        biases=biases,
        dense=tuple(sorted(set(reasons) - {bias.leaf for bias in biases.values()})),
        n_leaves=len(leaves),
        n_outputs=output.shape[0],
        descriptions=tuple(descriptions),
    )


def _is_moderate(scale: float | Array) -> bool:
    """Whether a cotangent may be divided by the scale again, in any precision."""
    return isinstance(scale, float) and _LEAST_SCALE <= abs(scale) <= 1 / _LEAST_SCALE


def _adds_to_vector(view: LeafView, use: LeafUse, out: Array) -> bool:
    """Whether a whole leaf is added to a product that is a vector, of whatever shape."""
    g, _, q = use.contraction.extents
    is_vector = use.contraction.kind == "product" and g == 1 and max(use.tap_shape, default=1) == q
    is_whole = not view.spread and not any(isinstance(step, Cut) for step in view.rearranged)
    same_entries = out.size == math.prod(use.tap_shape) == q and out.dtype == use.tap_dtype
    return is_vector and is_whole and same_entries


def _separable(uses: Sequence[LeafUse]) -> bool:
    """Whether the uses of a leaf fall in places that certainly have no entry in common."""
    layouts = {use.place: use.layout for use in uses}.values()
    return all(a.apart(b) for a, b in itertools.combinations(layouts, 2))


def _describe(uses: Sequence[LeafUse], reasons: set[str]) -> str:
    if reasons == {_ELEMENT_BY_ELEMENT}:
        return _ELEMENT_BY_ELEMENT
    if reasons:
        return "per-sample Jacobian: " + "; ".join(sorted(reasons))
    if not uses:
        return "unused"
    kinds = Counter(use.contraction.kind for use in uses)
    return ", ".join(kind if m == 1 else f"{m} {kind}s" for kind, m in kinds.items())
