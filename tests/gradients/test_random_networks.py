"""Random networks: kernels, norms and sums of the engine against plain Jacobians."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Apply, examples
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from plain_jacobians import Numbers, assert_close, check, jacobians, numbered, products

from ntkdp import layerwise_ntk, models
from ntkdp._backend import neural_tangents
from ntkdp._gradients import factors

stax = neural_tangents.stax
SEEDS = st.integers(0, 2**16)


def normalised(h: jax.Array) -> jax.Array:
    centred = h - jnp.mean(h, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)


def _mixed(h: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.tanh(h @ q) * jnp.cos(h @ k) + jnp.tanh(h @ q - h @ k) @ v


def rms(h: jax.Array) -> jax.Array:
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)


def scanned(h: jax.Array, layers: jax.Array, b: jax.Array, reverse: bool = False) -> jax.Array:
    def turn(h: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w, scale = layer
        return jnp.tanh(h @ (2.0 * w.T) * scale + b), None

    return lax.scan(turn, h, (layers, jnp.arange(1.0, 4.0)), reverse=reverse)[0]


def nested(h: jax.Array, layers: jax.Array, w: jax.Array) -> jax.Array:
    def outer(h: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        inner = jax.checkpoint(lambda h, _: (jnp.sin(h @ layer + h @ w), None))
        return lax.scan(inner, h, None, length=2)

    return lax.scan(outer, h, layers)[0]


def recurrent(h: jax.Array, w: jax.Array, v: jax.Array, length: int = 3) -> jax.Array:
    def turn(state: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(state @ w + h * jnp.cos(k))
        return state, state @ v

    state, out = lax.scan(turn, h, jnp.arange(length), reverse=length == 3, unroll=2)
    return state + jnp.mean(jnp.sin(out), 0)


def branching(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    def one(row: jax.Array) -> jax.Array:
        row = lax.cond(row[0] > 0, lambda w: row @ w, lambda w: jnp.sin(row) @ w.T, w)
        return lax.switch(1, [lambda r: r, lambda r: jnp.tanh(r @ v)], row)

    return jax.vmap(one)(h.reshape(-1, D)).reshape(h.shape)


def wrapped(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    layer = jax.jit(lambda w, h, b: jax.nn.silu(h @ w + b))
    return jax.checkpoint(lambda w, h: layer(w.T, layer(jax.jit(lambda w: w / 2)(w), h, 0.1), b))(
        w, h
    )


D = 4
#: Pieces of networks: shapes of the parameters, and a map of features ``(..., D)``.
PIECES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., jax.Array]]] = {
    "ntk scaling": (((D, D), (D,)), lambda h, w, b: jnp.tanh(1.5 * h @ w / D**0.5 + 0.1 * b)),
    "transposed": (((5, D), (5, D)), lambda h, w, v: jax.nn.silu(h @ w.T) @ v),
    "residual": (((D, D), (D,)), lambda h, w, b: h + jax.nn.gelu(h @ w + b)),
    "tied": (((D, D),), lambda h, w: jnp.tanh(jnp.tanh(h @ w) @ w)),
    "tied, transposed": (((D, 3),), lambda h, w: jnp.sin(h @ w) @ w.T),
    "scalars": (((), (), ()), lambda h, s, t, u: s * h + t**2 - u),
    "layer norm": (((D,), (D,)), lambda h, gain, shift: normalised(h) * gain + shift),
    "rms norm": (((D,),), lambda h, gain: rms(h) * (1 + gain)),
    "fused, sliced": (
        ((D, 3 * D),),
        lambda h, w: (
            jax.nn.sigmoid(h @ w[:, :D]) * (h @ w[:, D : 2 * D]) + jnp.sin(h @ w[:, 2 * D :])
        ),
    ),
    "fused, split": (
        ((D, 3 * D),),
        lambda h, w: _mixed(h, *jnp.split(w, 3, axis=1)),
    ),
    "split by rows": (
        ((2 * D, 3),),
        lambda h, w: jnp.tanh(h @ w.T[:, :D].T) @ w[D:].T + h @ w[:D] @ jnp.ones((3, D)),
    ),
    "overlapping slices": (((D, D + 1),), lambda h, w: h @ w[:, :D] + jnp.tanh(h @ w[:, 1:])),
    "frozen": (((D, D), (D, D)), lambda h, w, v: jnp.tanh(h @ lax.stop_gradient(w)) @ v),
    "frozen inside": (((D, D), (D, D)), lambda h, w, v: h + lax.stop_gradient(h @ w) * (h @ v)),
    "unused": (((3,), ()), lambda h, w, s: jnp.tanh(h)),
    "meets a constant": (((D, D),), lambda h, w: jnp.sin(h) + jnp.arange(1.0, D + 1) @ w),
    "product of weights": (((D, D), (D, D)), lambda h, w, v: jnp.tanh(h @ (w @ v))),
    "stack, tied": (((2, D, D),), lambda h, w: jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]) @ w[0]),
    "reshaped": (((D * D,),), lambda h, w: jnp.tanh(h @ w.reshape(D, D).T[None, ::1][0])),
    "blocks": (
        ((2, 2, 2),),
        lambda h, w: jnp.tanh(
            jnp.einsum("...gi,gio->...go", h.reshape(*h.shape[:-1], 2, 2), w).reshape(h.shape)
        ),
    ),
    "spread": (((D, 1),), lambda h, w: jnp.tanh(h @ jnp.broadcast_to(w, (D, D)))),
    "layers": (((3, D, D), (D,)), scanned),
    "layers, reversed": (((3, D, D), (D,)), lambda h, w, b: scanned(h, w, b, True)),
    "nested": (((2, D, D), (D, D)), nested),
    "recurrent": (((D, D), (D, D)), recurrent),
    "recurrent, long": (((D, D), (D, D)), lambda h, w, v: recurrent(h, w, v, 66)),
    "branching": (((D, D), (D, D)), branching),
    "jit, checkpoint": (((D, D), (D,)), wrapped),
    "counted": (
        ((3, D, D),),
        lambda h, w: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i] + h @ w[0]), h),
    ),
}


def stack_of(pieces: list[str], n_outputs: int, new: Numbers) -> tuple[Apply, Any]:
    params = {f"{i}": [new.weight(*s) for s in PIECES[p][0]] for i, p in enumerate(pieces)}
    params["out"] = [new.weight(D, n_outputs)]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = x
        for i, piece in enumerate(pieces):
            h = PIECES[piece][1](h, *params[f"{i}"])
        h = h @ params["out"][0]
        return h if h.ndim == 2 else jnp.mean(h, 1)

    return apply, params


LOOPS = ["layers", "layers, reversed", "nested", "recurrent", "recurrent, long",
         "branching", "jit, checkpoint", "counted"]  # fmt: skip
STRAIGHT = [name for name in PIECES if name not in LOOPS]


@examples(2, 8)
@given(
    st.lists(st.sampled_from(STRAIGHT), min_size=3, max_size=5, unique=True),
    st.integers(1, 3),
    st.sampled_from([(), (), (1,), (3,)]),
    SEEDS,
)
def test_dense(pieces: list[str], n_outputs: int, positions: tuple[int, ...], seed: int) -> None:
    new = Numbers(seed)
    apply, params = stack_of(pieces, n_outputs, new)
    check(apply, params, new(3, *positions, D), sums=seed % 2 == 0)


@pytest.mark.slow
@examples(2, 8)
@given(st.lists(st.sampled_from(LOOPS), min_size=2, max_size=2, unique=True), SEEDS)
def test_loops(pieces: list[str], seed: int) -> None:
    new = Numbers(seed)
    check(*stack_of(pieces, 2, new), new(3, D), sums=seed % 2 == 0)


@pytest.mark.slow
@examples(2, 8)
@given(st.data())
def test_blocks(data: st.DataObject) -> None:
    draw, new = data.draw, Numbers(data.draw(SEEDS))
    pieces = draw(st.lists(st.sampled_from(STRAIGHT), min_size=1, max_size=2, unique=True))
    apply, params = stack_of(pieces, draw(st.integers(1, 2)), new)
    n, n2 = draw(st.integers(1, 5)), draw(st.sampled_from([None, None, 1, 4]))
    size, t = draw(st.integers(1, n + 1)), draw(st.sampled_from([1, 5]))
    x, x2 = new(n, t, D), None if n2 is None else new(n2, t, D)
    J = jacobians(apply, params, x)
    expected = products(J, J if x2 is None else jacobians(apply, params, x2))
    kernel = layerwise_ntk(apply, params, x, x2, groups=numbered(params), batch_size=size)
    values = np.asarray(kernel.values)
    assert_close(values, expected, "kernel")
    if x2 is None:
        mirrored = values.transpose(0, 2, 1, 4, 3)
        np.testing.assert_allclose(values, mirrored, rtol=0, atol=1e-13 * np.max(np.abs(values)))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a convolution, and the shapes of its samples and filters."""
    dims = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 2)] * dims)
    side = st.integers(-1, 2)
    explicit = st.tuples(*[st.tuples(side, side)] * dims)
    gaps = draw(st.booleans())
    # XLA has no names of padding for inputs with gaps.
    padding = draw(explicit if gaps else st.one_of(st.sampled_from(["SAME", "VALID"]), explicit))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 2), (1, 9), (2, 1), (2, 2), (3, 1)]))
    letters = "NC" + "HWD"[:dims]
    filters = "OI" + "HWD"[:dims]
    shuffled = ["".join(draw(st.permutations(s))) for s in (letters, filters, letters)]
    window = draw(st.tuples(*[st.integers(1, 3)] * dims))
    sizes = {"O": groups * draw(st.integers(1, 2)), "I": per_group}
    sizes |= dict(zip("HWD", window, strict=False))
    return {
        "sample": (groups * per_group, *[draw(st.integers(3, 5)) for _ in range(dims)]),
        "filters": tuple(sizes[s] for s in shuffled[1]),
        "specs": tuple(shuffled),
        "options": {
            "window_strides": draw(each),
            "padding": padding,
            "lhs_dilation": draw(each) if gaps else (1,) * dims,
            "rhs_dilation": draw(each),
            "feature_group_count": groups,
        },
    }


def convolved(case: dict[str, Any], x: jax.Array, filters: jax.Array) -> jax.Array:
    """``x`` of shape ``(n, channels, *spatial)``; outputs likewise."""
    lhs, rhs, out = case["specs"]
    plain = "NC" + "HWD"[: x.ndim - 2]
    x = jnp.transpose(x, [plain.index(s) for s in lhs])
    h = lax.conv_general_dilated(x, filters, dimension_numbers=(lhs, rhs, out), **case["options"])
    return jnp.transpose(h, [out.index(s) for s in plain])


@examples(2, 8)
@given(
    convolutions(),
    st.integers(1, 2),
    st.sampled_from(["flat", "mean", "pooled"]),
    st.booleans(),
    SEEDS,
)
def test_convolutions(
    case: dict[str, Any], n_outputs: int, end: str, shared: bool, seed: int
) -> None:
    new = Numbers(seed)
    x, filters = new(3, *case["sample"]), new.weight(*case["filters"])

    def features(filters: jax.Array, shift: jax.Array, x: jax.Array) -> jax.Array:
        h = jnp.tanh(convolved(case, jnp.sin(x), filters) + shift)
        h = h + jnp.sin(convolved(case, x**2, 0.5 * filters)) if shared else h
        if end == "mean" and h.size:
            return jnp.mean(h, tuple(range(2, h.ndim)))
        if end == "pooled" and min(h.shape[2:]) >= 2:
            ones = (1,) * h.ndim
            h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, *[2] * (h.ndim - 2)), ones, "VALID")
        return h.reshape(h.shape[0], -1)

    try:
        width = jax.eval_shape(features, filters, jnp.zeros(()), x).shape[1]
    except (TypeError, ValueError):  # the padding takes more away than there is
        width = 0
    assume(width > 0)
    params = {"w": filters, "head": new.weight(width, n_outputs), "s": jnp.asarray(0.3)}

    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return features(p["w"], p["s"], x) @ p["head"]

    check(apply, params, x, sums=end == "flat")


@pytest.mark.slow
@examples(2, 6)
@given(
    st.sampled_from(["SAME", ((1, -1), (0, 2))]),
    st.sampled_from([(2, 1), (2, 2), (1, 3)]),
    st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([("NCHW", "OIHW", "NCHW"), ("HCNW", "IWOH", "CWNH")]),
    SEEDS,
)
def test_strided_convolutions_of_many_channels(
    padding: Any, strides: Any, dilation: Any, specs: tuple[str, ...], seed: int
) -> None:
    """The form in which the cotangents of many outputs go back: below it is a trained layer."""
    new = Numbers(seed)
    sizes = {"O": 3, "I": 8, "H": 2, "W": 3}
    options = {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}
    if not isinstance(padding, str):
        options["lhs_dilation"] = (1, 2)
    case = {"specs": specs, "options": options}
    filters = new.weight(*(sizes[s] for s in specs[1]))

    def apply(p: list[jax.Array], x: jax.Array) -> jax.Array:
        h = jnp.tanh(jnp.einsum("nchw,cd->ndhw", x, p[0]))
        return jnp.sin(convolved(case, h, p[1])).sum((2, 3)) @ p[2]

    check(apply, [new.weight(2, 8), filters, new.weight(3, 2)], new(3, 2, 5, 6))


@examples(2, 8)
@given(st.data())
def test_tokens(data: st.DataObject) -> None:
    draw, seed = data.draw, data.draw(SEEDS)
    new, mode = Numbers(seed), draw(st.sampled_from(["fill", "clip", "index"]))
    lookups, axis, tied = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
    attends, n_outputs = draw(st.booleans()), draw(st.integers(1, 2))
    length = draw(st.sampled_from([2, 6]))
    vocabulary, d, heads = 5, 4, 2
    params = {"table": new(vocabulary, d) if axis == 0 else new(d, vocabulary)}
    params |= {name: new.weight(d, heads, 3) for name in "qkv"}
    params |= {"o": new.weight(heads, 3, d), "position": new(7, d), "head": new.weight(d, 2)}
    options: dict[str, Any] = {"fill_value": 0.0, "mode": "fill"} if mode == "fill" else {}
    options |= {"mode": "clip"} if mode == "clip" else {}

    def look_up(table: jax.Array, x: jax.Array) -> jax.Array:
        if mode == "index":
            return table[x] if axis == 0 else jnp.moveaxis(table[:, x], 0, -1)
        rows = jnp.take(table, x, axis=axis, **options)
        return rows if axis == 0 else jnp.moveaxis(rows, 0, -1)

    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        h = look_up(p["table"], x) + p["position"][:length]
        if lookups == 2:
            h = h + jnp.sin(look_up(p["table"], x[:, ::-1])) * 0.5
        if attends:
            q, k, v = (jnp.einsum("ntd,dhe->nhte", normalised(h), p[name]) for name in "qkv")
            scores = jax.nn.softmax(jnp.einsum("nhte,nhse->nhts", q, k) / 3**0.5)
            h = h + jnp.einsum("nhts,nhse,hed->ntd", scores, v, p["o"])
        h = jnp.tanh(jnp.mean(h, 1))
        table = p["table"].T if axis == 0 else p["table"]
        return (h @ table if tied else h @ p["head"])[:, :n_outputs]

    # Inputs of a model are declared to be floating-point numbers.
    low, high = (0, vocabulary) if mode == "index" else (-3, vocabulary + 3)
    x = jnp.asarray(new.random.integers(low, high, size=(3, length)) + 0.0)
    check(lambda p, x: apply(p, x.astype(int)), params, x.at[0].set(x[0, 0]), sums=seed % 2 == 0)


LINEN = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (2, 2), 2, feature_group_count=4),
                       nn.GroupNorm(2), nn.Dense(4), lambda x: x.mean((1, 2)), nn.RMSNorm(),
                       nn.Dense(2)])  # fmt: skip


class Equinox(eqx.Module):
    """One sample at a time; positions by another ``vmap``."""

    parts: tuple[Any, ...]

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        conv = eqx.nn.Conv2d(2, 4, 2, stride=2, padding=1, key=keys[0])
        attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        cell = eqx.nn.GRUCell(4, 2, key=keys[2])
        self.parts = (conv, eqx.nn.LayerNorm(4), attention, cell)

    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm, attention, cell = self.parts
        tokens = jax.vmap(norm)(conv(jnp.transpose(x, (2, 0, 1))).reshape(4, -1).T)
        tokens = tokens + attention(tokens, tokens, tokens)
        return lax.scan(lambda h, token: (cell(token, h), None), jnp.zeros(2), tokens[:3])[0]


def stax_model() -> models.Model:
    first = stax.Conv(8, (2, 2), padding="SAME", W_std=1.4, b_std=0.1)
    branches = stax.parallel(stax.Identity(), stax.Conv(8, (3, 3), padding="SAME"))
    middle = [stax.Relu(), stax.FanOut(2), branches, stax.FanInSum(), stax.AvgPool((2, 2), (2, 2))]
    end = [stax.LayerNorm(), stax.Flatten(), stax.Dense(2, 1.0, 0.1)]
    return models.from_stax(*stax.serial(first, *middle, *end))


LIBRARIES: dict[str, Callable[[jax.Array], models.Model]] = {
    "linen": lambda key: models.from_flax(LINEN),
    "equinox": lambda key: models.from_equinox(Equinox(key)),
    "stax": lambda key: stax_model(),
}


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_models_of_libraries(name: str) -> None:
    x = Numbers(1)(3, 4, 4, 2)
    key = jax.random.key(2)
    model = LIBRARIES[name](key)
    # Zeros at the start would make whole leaves see nothing.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1, float), model.init(key, x))
    check(model.apply, params, x, sums=name == "linen")


def through(layer: str, p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Features ``(n, t, q)`` of each kind of layer, from ``(n, t, p)``."""
    if layer == "product":
        return x @ p["w"]
    if layer == "lookup":
        return p["w"][jnp.argsort(x)[..., 0] * x.shape[1] + jnp.argsort(x)[..., 1]]
    if layer == "blocks":
        halves = x.reshape(*x.shape[:2], 2, -1)
        joined = jnp.einsum("ntgp,gpq->ntgq", halves, p["w"].reshape(2, halves.shape[-1], -1))
        return joined.reshape(*x.shape[:2], -1)
    return lax.conv_general_dilated(
        x, p["w"][None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


@pytest.mark.slow
@examples(2, 8)
@given(st.data())
def test_both_orders_of_contraction(data: st.DataObject) -> None:
    draw, new = data.draw, Numbers(data.draw(SEEDS))
    layer = draw(st.sampled_from(["product", "lookup", "blocks", "convolution"]))
    t, p, q = draw(st.sampled_from([(2, 8, 6), (8, 2, 2), (2, 2, 8), (3, 6, 4)]))
    constants = {"_SLAB": st.sampled_from([5, 16, 10_000]), "_BAND": st.sampled_from([2, 160])}
    constants["_COST_OF_SMALL_PRODUCTS"] = st.sampled_from([0.0, 2.0, 1e9])
    n2, batch_size = draw(st.sampled_from([None, None, 2])), draw(st.sampled_from([None, 3]))
    rows = p * t + p + t if layer == "lookup" else p
    params = {"w": new(rows, q // 2 if layer == "blocks" else q), "head": new(q, 3)}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(through(layer, params, x)), 1) @ params["head"]

    with pytest.MonkeyPatch.context() as patch:
        for name, values in constants.items():
            patch.setattr(factors, name, draw(values))
        check(apply, params, new(4, t, p), None if n2 is None else new(n2, t, p), batch_size)
