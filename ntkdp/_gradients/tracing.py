"""Where the parameters of a model meet data, read off its jaxpr.

The model is traced for one sample, so that independence of the samples holds by construction. Each
leaf is followed as a *view* through operations that only rearrange or cut it, scale it by a
constant or shift it; where a view meets data in a product, a convolution or a lookup of rows is a
*site*. Any other use makes the leaf *loose*: it gets its plain per-sample gradient, and only it
does. For an addition or multiplication element by element that is the cheapest form anyway.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import ApplyFn, Array, Params
from ntkdp._gradients import primitive_rules
from ntkdp._gradients.leaf_layout import Cut, Layout, Rearrangement, Reshaped, Transposed
from ntkdp._gradients.primitive_rules import Meeting

_INLINED = {"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_RESHAPES = {"reshape", "squeeze", "expand_dims", "copy", "convert_element_type"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "add_any"}
_ELEMENT_BY_ELEMENT = "element by element"
#: A loop of up to so many turns is unrolled to look inside; every turn is compiled anew.
_LONGEST_UNROLLED = 64


class View(NamedTuple):
    """A leaf through rigid operations: ``value = scale * rearranged(leaf) + constant``.

    A view that is ``spread`` was broadcast, and can meet data element by element only.
    """

    leaf: int
    scale: Any = 1.0
    rearranged: tuple[Rearrangement, ...] = ()
    spread: bool = False

    def then(self, step: Rearrangement) -> "View":
        """The view after one more rearrangement."""
        return self if self.spread else self._replace(rearranged=(*self.rearranged, step))


class Value(NamedTuple):
    """An intermediate result and where it comes from: a leaf, constants alone, or data."""

    array: Any
    view: View | None = None
    constant: bool = False
    uniform: bool = False


class Site(NamedTuple):
    """A meeting of a leaf with data, and what the product's output looks like."""

    leaf: int
    meeting: Meeting
    layout: Layout
    tap_shape: tuple[int, ...]
    tap_dtype: Any

    @property
    def place(self) -> tuple[str, tuple[int, int, int], Layout]:
        """Equal for sites whose gradients are sums of outer products of the same axes."""
        family = "lookup" if self.meeting.kind == "lookup" else "product"
        return family, self.meeting.extents, self.layout


Path = tuple[int, ...]


class Visitor(NamedTuple):
    """What to do at a meeting and at any other use of a leaf.

    ``meet(path, view, meeting, data, weight, out)`` returns the output, perhaps changed.
    """

    meet: Callable[[Path, View, Meeting, Any, Any, Any], Any]
    loosen: Callable[[int, str], None]


class Structure(NamedTuple):
    """What tracing a model for one sample found."""

    jaxpr: jex.ClosedJaxpr
    sites: dict[Path, Site]
    loose: tuple[int, ...]
    n_leaves: int
    n_outputs: int
    descriptions: tuple[str, ...]


def interpret(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], visitor: Visitor, path: Path = ()
) -> list[Value]:
    """Evaluate ``jaxpr``, following views of the parameters to where they are used."""
    env: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        if isinstance(atom, jex.Literal):
            return Value(atom.val, constant=True, uniform=np.ndim(atom.val) == 0)
        return env[atom]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Value(const, constant=True, uniform=np.ndim(const) == 0)
    env.update(zip(jaxpr.invars, args, strict=True))
    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in eqn.invars]
        outs = _evaluate(eqn, values, visitor, (*path, number))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: Any, values: list[Value], visitor: Visitor, path: Path) -> list[Value]:
    name = eqn.primitive.name
    viewed = [i for i, value in enumerate(values) if value.view is not None]
    if viewed and name in _INLINED:
        inner = eqn.params["jaxpr"]
        consts = getattr(inner, "consts", ())
        return interpret(getattr(inner, "jaxpr", inner), consts, values, visitor, path)
    if viewed and name == "scan" and 1 <= eqn.params["length"] <= _LONGEST_UNROLLED:
        return _unroll(eqn, values, visitor, path)
    arrays = bind(eqn, [value.array for value in values])
    if not viewed:
        return [_constant_or_data(eqn, values, array) for array in arrays]
    if len(viewed) == 1:
        position = viewed[0]
        seen = _rigid(eqn, values, position, arrays)
        if seen is not None:
            return seen
        view: View = values[position].view  # type: ignore[assignment]
        meeting = None if view.spread else primitive_rules.find(eqn, position)
        if meeting is not None:
            weight, data = values[position].array, values[1 - position].array
            met = visitor.meet(path, view, meeting, data, weight, arrays[0])
            return [Value(met)]
    reason = f"used in `{name}`"
    if name in _ELEMENTWISE and len(viewed) == 1 and not (name == "div" and viewed == [1]):
        other = values[1 - viewed[0]]
        reason = "scaled by an array" if other.constant else _ELEMENT_BY_ELEMENT
    if name == "scan":
        reason = f"inside a loop of {eqn.params['length']} turns"
    for i in viewed:
        visitor.loosen(values[i].view.leaf, reason)  # type: ignore[union-attr]
    return [Value(array) for array in arrays]


def bind(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    """What an equation makes of arrays."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *arrays, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _constant_or_data(eqn: Any, values: Sequence[Value], array: Any) -> Value:
    constant = all(value.constant for value in values)
    spread = eqn.primitive.name in {"broadcast_in_dim", "convert_element_type"}
    uniform = constant and (np.ndim(array) == 0 or (spread and values[0].uniform))
    return Value(array, constant=constant, uniform=uniform)


def _rigid(
    eqn: Any, values: Sequence[Value], position: int, outs: Sequence[Any]
) -> list[Value] | None:
    """The view after a rearrangement, a cut, a constant scaling or shift; None after all else."""
    name, out = eqn.primitive.name, outs[0]
    view: View = values[position].view  # type: ignore[assignment]
    before = np.shape(values[position].array)
    if name in _RESHAPES or name == "broadcast_in_dim":
        permuted = name == "reshape" and eqn.params.get("dimensions") is not None
        if permuted or not jnp.issubdtype(out.dtype, jnp.floating):
            return None
        if name == "broadcast_in_dim" and np.size(out) != math.prod(before):
            return [Value(out, view._replace(spread=True))]
        return [Value(out, view.then(Reshaped(before)))]
    if name == "transpose":
        inverse = tuple(int(i) for i in np.argsort(eqn.params["permutation"]))
        return [Value(out, view.then(Transposed(inverse)))]
    if name == "slice" and eqn.params["strides"] is None:
        return [Value(out, view.then(Cut(eqn.params["start_indices"], np.shape(out), before)))]
    if name == "split":
        axis = eqn.params["axis"]
        starts = np.cumsum([0, *eqn.params["sizes"]])
        corners = [tuple(int(s) if d == axis else 0 for d in range(len(before))) for s in starts]
        return [
            Value(piece, view.then(Cut(corner, np.shape(piece), before)))
            for piece, corner in zip(outs, corners, strict=False)
        ]
    if name == "neg":
        return [Value(out, view._replace(scale=-view.scale))]
    if len(values) != 2 or np.shape(out) != before:
        return None
    other = values[1 - position]
    if name in {"add", "sub"} and other.constant:
        sign = -1.0 if name == "sub" and position == 1 else 1.0
        return [Value(out, view._replace(scale=sign * view.scale))]
    if name in {"mul", "div"} and other.uniform and not (name == "div" and position == 1):
        factor = jnp.asarray(other.array).reshape(-1)[0]
        scale = view.scale * factor if name == "mul" else view.scale / factor
        return [Value(out, view._replace(scale=scale))]
    return None


def _unroll(eqn: Any, values: list[Value], visitor: Visitor, path: Path) -> list[Value]:
    """A loop turn by turn, so that a leaf that it uses or steps through can be seen inside."""
    params = eqn.params
    n_consts, n_carry = params["num_consts"], params["num_carry"]
    body, length = params["jaxpr"], params["length"]

    def data_only(value: Value) -> Value:
        if value.view is not None:
            visitor.loosen(value.view.leaf, "carried through a loop")
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
    array = value.array[k]
    if value.view is None:
        return value._replace(array=array)
    cut = Cut((k, *[0] * (len(whole) - 1)), (1, *whole[1:]), whole)
    return Value(array, value.view.then(cut).then(Reshaped(cut.size)))


def trace(apply_fn: ApplyFn, params: Params, x: Array) -> Structure:
    """Trace ``apply_fn`` for one sample of ``x`` and find where each leaf meets data."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    def single(flat: list[Any], x_i: Array) -> Array:
        return apply_fn(jax.tree.unflatten(treedef, flat), x_i[None])[0]

    jaxpr = jax.make_jaxpr(single)(shapes, sample)
    sites: dict[Path, Site] = {}
    reasons: dict[int, set[str]] = {}

    def meet(path: Path, view: View, meeting: Meeting, data: Any, weight: Any, out: Any) -> Any:
        rearranged = (*view.rearranged, *meeting.layout.rearranged)
        layout = meeting.layout._replace(rearranged=rearranged)
        sites[path] = Site(view.leaf, meeting, layout, out.shape, out.dtype)
        return out

    def loosen(leaf: int, reason: str) -> None:
        reasons.setdefault(leaf, set()).add(reason)

    def discover(flat: list[Any], x_i: Array) -> Any:
        args = [Value(leaf, View(i)) for i, leaf in enumerate(flat)] + [Value(x_i)]
        (out,) = interpret(jaxpr.jaxpr, jaxpr.consts, args, Visitor(meet, loosen))
        if out.view is not None:
            loosen(out.view.leaf, "returned")
        for leaf, shape in enumerate(shapes):
            if 0 in shape.shape:
                loosen(leaf, "empty")
        return out.array

    output = jax.eval_shape(discover, shapes, sample)
    descriptions = []
    for leaf in range(len(leaves)):
        mine = [site for site in sites.values() if site.leaf == leaf]
        if mine and leaf in reasons:
            loosen(leaf, f"used in a {mine[0].meeting.kind}, too")
        elif not _separable(mine):
            loosen(leaf, f"used in {len(mine)} products that lie across each other")
        descriptions.append(_describe(mine, reasons.get(leaf)))
    return Structure(
        jaxpr=jaxpr,
        sites={path: site for path, site in sites.items() if site.leaf not in reasons},
        loose=tuple(sorted(reasons)),
        n_leaves=len(leaves),
        n_outputs=output.shape[0],
        descriptions=tuple(descriptions),
    )


def _separable(sites: Sequence[Site]) -> bool:
    """Whether the sites of a leaf fall in places that certainly have no entry in common."""
    layouts = {site.place: site.layout for site in sites}.values()
    return all(a.apart(b) for a, b in itertools.combinations(layouts, 2))


def _describe(sites: Sequence[Site], reasons: set[str] | None) -> str:
    if reasons == {_ELEMENT_BY_ELEMENT}:
        return _ELEMENT_BY_ELEMENT
    if reasons:
        return "per-sample Jacobian: " + "; ".join(sorted(reasons))
    if not sites:
        return "unused"
    kinds = Counter(site.meeting.kind for site in sites)
    return ", ".join(kind if m == 1 else f"{m} {kind}s" for kind, m in kinds.items())
