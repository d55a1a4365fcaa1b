"""Factored per-sample gradients: norms, sums and kernels against plain Jacobians."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples, normal
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from ntkdp._gradients import per_sample as per_sample


class Case(NamedTuple):
    """A model, its parameters, a batch, and at how many sites leaves must be found to meet data."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.Array
    structured: int


def outputs_and_jacobians(
    apply: Callable[..., jax.Array], params: Any, x: jax.Array
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Plain reverse-mode Jacobian of every leaf, ``(n, K, size)``; the batch at once."""
    both = jax.jit(lambda params: (apply(params, x), jax.jacrev(apply)(params, x)))
    outputs, jacobian = both(params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jacobian)]
    return np.asarray(outputs), [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]


@jax.custom_jvp
def surrogate(z: jax.Array) -> jax.Array:
    """A step with a made-up derivative: only a rule of its own can give it."""
    return jnp.where(z > 0, 1.0, 0.0)


surrogate.defjvps(lambda dz, out, z: dz / (1 + z**2))


@jax.custom_vjp
def doubled_backwards(z: jax.Array) -> jax.Array:
    return jnp.tanh(z)


doubled_backwards.defvjp(lambda z: (jnp.tanh(z), z), lambda z, d: (2 * d * (1 - jnp.tanh(z) ** 2),))


def norm(h: jax.Array) -> jax.Array:
    centred = h - jnp.mean(h, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)


def attention(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Two heads over the positions, a residual, layer norm, and a mean over positions."""
    q, k, v = (jnp.einsum("ntd,dhe->nthe", x, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("nthe,nshe->nhts", q, k))
    mixed = jnp.einsum("nhts,nshe->nthe", weights, v)
    h = norm(x + jnp.einsum("nthe,hed->ntd", mixed, p["o"])) * p["gain"] + p["shift"]
    return jnp.mean(h, 1) @ p["head"]


def attention_params(d: int, heads: int, e: int, n_out: int) -> dict[str, jax.Array]:
    shapes: dict[str, tuple[int, ...]] = {
        "q": (d, heads, e),
        "k": (d, heads, e),
        "v": (d, heads, e),
        "o": (heads, e, d),
    }
    shapes |= {"gain": (d,), "shift": (d,), "head": (d, n_out)}
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def conv(**options: Any) -> Callable[[Any, jax.Array], jax.Array]:
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    with_head = options.pop("head", True)

    def apply(p: list[jax.Array], x: jax.Array) -> jax.Array:
        h = jnp.tanh(lax.conv_general_dilated(x, p[0], **options)).reshape(x.shape[0], -1)
        return h @ p[1] if with_head else h

    return apply


def conv_case(filter_shape: tuple[int, ...], structured: int, **options: Any) -> Case:
    x, filters = normal(1, 3, 6, 5, 2), normal(2, *filter_shape)
    flat = jax.eval_shape(conv(**options, head=None), [filters], x).shape[1]
    return Case(conv(**options), [filters, normal(3, flat, 2)], x, structured)


def scanned(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return h @ p["head"]


def blocks(p: list[jax.Array], x: jax.Array) -> jax.Array:
    """Jitted and checkpointed pieces, one of them used by two leaves in turn."""
    layer = jax.jit(lambda w, h: jax.nn.silu(h @ w))
    remat = jax.checkpoint(lambda w, h: jnp.sin(h @ w.T))
    return layer(p[1], layer(p[0], x)) @ p[2] + remat(p[3], x)


def conditional(p: list[jax.Array], x: jax.Array) -> jax.Array:
    def one(x_i: jax.Array) -> jax.Array:
        return lax.cond(x_i[0] > 0, lambda: x_i @ p[0], lambda: jnp.tanh(x_i) @ p[1])

    return jax.vmap(one)(x)


X = normal(9, 3, 3)
CASES: dict[str, Callable[[], Case]] = {
    "weight on the left": lambda: Case(
        lambda p, x: (p[1] @ jnp.tanh(p[0] @ x.T)).T, [normal(0, 4, 3), normal(1, 2, 4)], X, 2
    ),
    "transposed use": lambda: Case(
        lambda p, x: jnp.tanh(x @ p[0].T) @ p[1].T, [normal(0, 4, 3), normal(1, 2, 4)], X, 2
    ),
    "scaled by constants": lambda: Case(
        lambda p, x: jnp.tanh(x @ (0.3 * p[0] / jnp.sqrt(3.0))) @ (-p[1] * jnp.full((4, 2), 0.7)),
        [normal(0, 3, 4), normal(1, 4, 2)],
        X,
        2,
    ),
    "reshaped": lambda: Case(
        lambda p, x: jnp.tanh(x @ p[0].reshape(3, 4)) @ jnp.squeeze(p[1].T[None], 0),
        [normal(0, 2, 6), normal(1, 2, 4)],
        X,
        2,
    ),
    "residual, bias": lambda: Case(
        lambda p, x: (x @ p[0] + jnp.tanh(x @ p[0] @ p[1] + p[2])) @ p[3],
        [normal(0, 3, 4), normal(1, 4, 4), normal(2, 4), normal(3, 4, 2)],
        X,
        4,
    ),
    "tied": lambda: Case(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[0].T) @ p[1],
        [normal(0, 3, 4), normal(1, 3, 2)],
        X,
        1,
    ),
    "weight times itself": lambda: Case(
        lambda p, x: x @ (p[0] @ p[0].T)[:, :2], [normal(0, 3, 4)], X, 0
    ),
    "product of weights": lambda: Case(
        lambda p, x: x @ (p[0] @ p[1]), [normal(0, 3, 4), normal(1, 4, 2)], X, 0
    ),
    "scalar, unused": lambda: Case(
        lambda p, x: p["s"] * jnp.tanh(x @ p["w"]) + p["s"] ** 2,
        {"s": jnp.asarray(0.7), "unused": normal(1, 5), "w": normal(0, 3, 2)},
        X,
        1,
    ),
    "scaled elementwise": lambda: Case(
        lambda p, x: jnp.tanh(x @ (p[0] * jnp.linspace(0.1, 2.0, 12).reshape(3, 4))) @ p[1],
        [normal(0, 3, 4), normal(1, 4, 2)],
        X,
        1,
    ),
    "scalar spread by a constant": lambda: Case(
        lambda p, x: x @ (p[0] * jnp.full((3, 2), 0.7)),
        [jnp.asarray(1.3)],
        X,
        0,
    ),
    "scaled by another leaf": lambda: Case(
        lambda p, x: x @ (p[0] * p[1]), [normal(0, 3, 2), normal(1, 3, 2)], X, 0
    ),
    "scaled by data": lambda: Case(
        lambda p, x: jax.vmap(lambda x_i: x_i @ (p[0] * x_i[0]))(x), [normal(0, 3, 2)], X, 0
    ),
    "weight returned": lambda: Case(
        lambda p, x: jnp.broadcast_to(p[0], (x.shape[0], 2)) + 0 * x[:, :2],
        [normal(0, 1, 2)],
        X,
        0,
    ),
    "outer product": lambda: Case(
        lambda p, x: jnp.einsum("ni,k->nik", jnp.sin(x), p[0]).reshape(x.shape[0], -1),
        [normal(0, 2)],
        X,
        1,
    ),
    "einsum over positions": lambda: Case(
        lambda p, x: jnp.einsum("ntd,tdk->nk", jnp.tanh(jnp.einsum("ntd,de->nte", x, p[0])), p[1]),
        [normal(0, 3, 4), normal(1, 5, 4, 2)],
        normal(9, 3, 5, 3),
        2,
    ),
    "weight per position": lambda: Case(
        lambda p, x: jnp.sum(jnp.tanh(jnp.einsum("ntd,tdk->ntk", x, p[0])), 1),
        [normal(0, 5, 3, 2)],
        normal(9, 3, 5, 3),
        1,
    ),
    "attention": lambda: Case(attention, attention_params(4, 2, 3, 2), normal(9, 3, 5, 4), 5),
    "layer norm": lambda: Case(
        lambda p, x: (norm(x @ p[0]) * p[1] + p[2]) @ p[3],
        [normal(0, 3, 4), normal(1, 4), normal(2, 4), normal(3, 4, 2)],
        X,
        2,
    ),
    "embedding": lambda: Case(
        lambda p, x: jnp.tanh(p[0][x]).reshape(x.shape[0], -1) @ p[1],
        [normal(0, 7, 3), normal(1, 12, 2)],
        jnp.array([[0, 3, 6, 3], [1, 1, 2, 0], [5, 4, 6, 6]]),
        2,
    ),
    "conv, same": lambda: conv_case((3, 2, 2, 4), 2, window_strides=(1, 1), padding="SAME"),
    "conv, strides and dilation": lambda: conv_case(
        (2, 2, 2, 3), 2, window_strides=(2, 1), padding=((1, 0), (0, 2)), rhs_dilation=(2, 3)
    ),
    "conv, input dilation": lambda: conv_case(
        (3, 2, 2, 3), 2, window_strides=(1, 1), padding=((0, 1), (1, 1)), lhs_dilation=(2, 1)
    ),
    "conv, other layout": lambda: conv_case(
        (3, 2, 2, 3),
        2,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NWHC", "OIHW", "NCWH"),
    ),
    "conv, groups": lambda: conv_case(
        (3, 2, 1, 4), 2, window_strides=(1, 1), padding="VALID", feature_group_count=2
    ),
    "scan over layers": lambda: Case(
        scanned, {"layers": normal(0, 3, 4, 4) / 2, "head": normal(1, 4, 2)}, normal(9, 3, 4), 4
    ),
    "jit and checkpoint": lambda: Case(
        blocks, [normal(0, 3, 4), normal(1, 4, 4), normal(2, 4, 2), normal(3, 2, 3)], X, 4
    ),
    "condition on data": lambda: Case(conditional, [normal(0, 3, 2), normal(1, 3, 2)], X, 0),
    "custom_jvp": lambda: Case(
        lambda p, x: surrogate(jax.nn.relu(x @ p[0]) @ p[1]) @ p[2],
        [normal(0, 3, 4), normal(1, 4, 4), normal(2, 4, 2)],
        X,
        3,
    ),
    "custom_vjp": lambda: Case(
        lambda p, x: doubled_backwards(x @ p[0]) @ p[1], [normal(0, 3, 4), normal(1, 4, 2)], X, 2
    ),
    "stopped gradient": lambda: Case(
        lambda p, x: jnp.tanh(x @ lax.stop_gradient(p[0])) @ p[1],
        [normal(0, 3, 4), normal(1, 4, 2)],
        X,
        1,
    ),
    "half of a leaf": lambda: Case(
        lambda p, x: jnp.tanh(x @ p[0][:, :4]) @ p[0][:, 4:6].repeat(4, 0)[:4],
        [normal(0, 3, 6)],
        X,
        0,
    ),
}


def check(case: Case) -> None:
    apply, params, x, structured = case
    expected, jacobians = outputs_and_jacobians(apply, params, x)
    n, n_outputs = expected.shape
    structure = per_sample.trace(apply, params, x)
    assert len(structure.uses) == structured
    random = np.random.default_rng(0)
    weights, a = random.normal(size=n), random.normal(size=(n, n_outputs))

    @jax.jit
    def engine(params: Any, x: jax.Array) -> Any:
        outputs, factors = per_sample.factored(
            structure, params, x, lambda f, a_i: a_i[None], jnp.asarray(a)
        )
        factors = [per_sample.for_norms(factor) for factor in factors]
        rows = per_sample.factored_for_kernel(structure, params, x)
        leaves = jax.tree.leaves(params)
        return (
            outputs,
            per_sample.grouped_norms(factors, tuple(range(len(factors))), len(factors), n) ** 2,
            [
                per_sample.weighted_sum(factor, jnp.asarray(weights), leaf)
                for factor, leaf in zip(factors, leaves, strict=True)
            ],
            [per_sample.kernel(row, row) for row in rows],
        )

    outputs, squares, sums, kernels = jax.tree.map(np.asarray, engine(params, x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-11, atol=1e-12)
    for leaf, J, square, total, kernel in zip(
        jax.tree.leaves(params), jacobians, squares, sums, kernels, strict=True
    ):
        gradients = np.einsum("nkp,nk->np", J, a)
        tolerance = {"rtol": 1e-9, "atol": 1e-11 * (1 + np.max(np.abs(J)) ** 2)}
        np.testing.assert_allclose(square, np.sum(gradients**2, 1), **tolerance)
        np.testing.assert_allclose(total, (weights @ gradients).reshape(leaf.shape), **tolerance)
        H = np.einsum("nkp,mlp->nkml", J, J)
        np.testing.assert_allclose(np.broadcast_to(kernel, H.shape), H, **tolerance)


@pytest.mark.parametrize("name", list(CASES))
def test_norms_sums_and_kernels_of_every_leaf(name: str) -> None:
    check(CASES[name]())


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "erf": lax.erf,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


@examples(3, 12)
@given(
    widths=st.lists(st.integers(1, 6), max_size=3),
    n_outputs=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_networks(
    widths: list[int], n_outputs: int, activation: str, bias: bool, residual: bool, seed: int
) -> None:
    sizes = [3, *widths, n_outputs]
    params = [
        {"w": normal(seed + i, fan_in, out)} | ({"b": normal(seed + 7 + i, out)} if bias else {})
        for i, (fan_in, out) in enumerate(itertools.pairwise(sizes))
    ]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = x
        for i, layer in enumerate(params):
            z = h @ layer["w"] / np.sqrt(h.shape[-1]) + layer.get("b", 0.0)
            z = z if i == len(params) - 1 else ACTIVATIONS[activation](z)
            h = h + z if residual and z.shape == h.shape else z
        return h

    check(Case(apply, params, normal(seed, 3, 3), len(params)))


def test_both_ways_to_norms_of_sums_over_positions() -> None:
    """Few positions of many channels go by Gram matrices, many of few channels by the gradient."""
    for positions, channels in ((2, 9), (9, 2)):
        x = normal(0, 3, positions, channels)
        params = [normal(1, channels, channels)]

        def apply(p: list[jax.Array], x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.tanh(x @ p[0]), 1)[:, :2]

        check(Case(apply, params, x, 1))


def test_samples_that_are_kept_out_leave_no_trace() -> None:
    """A NaN sample weighted by zero would still be NaN: it is zeroed first."""
    x = jnp.stack([jnp.ones(3), jnp.full(3, jnp.nan)])
    params = {"b": jnp.ones(2), "unused": jnp.ones(1), "w": jnp.ones((3, 2))}

    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) * p["b"]

    structure = per_sample.trace(apply, params, x)
    _, factors = per_sample.factored(structure, params, x, lambda f: jnp.ones((1, 2)))
    usable = jnp.array([True, False])
    kept = [per_sample.keep(factor, usable) for factor in factors]
    _, alone = outputs_and_jacobians(apply, params, x[:1])
    for factor, leaf, gradient in zip(kept, jax.tree.leaves(params), alone, strict=True):
        total = per_sample.weighted_sum(factor, jnp.ones(2), leaf)
        np.testing.assert_allclose(np.ravel(total), gradient[0].sum(0), rtol=1e-12)


def test_float32_stays_float32() -> None:
    params = {"unused": jnp.ones(2, jnp.float32), "w": normal(0, 3, 2).astype(jnp.float32)}
    x = normal(1, 4, 3).astype(jnp.float32)
    structure = per_sample.trace(lambda p, x: x @ p["w"], params, x)

    def ones(f: jax.Array) -> jax.Array:
        return jnp.ones((1, 2), f.dtype)

    outputs, factors = per_sample.factored(structure, params, x, ones)
    assert outputs.dtype == jnp.float32
    weights = jnp.ones(4, jnp.float32)
    for factor, leaf in zip(factors, jax.tree.leaves(params), strict=True):
        assert per_sample.weighted_sum(factor, weights, leaf).dtype == jnp.float32
    assert per_sample.grouped_norms(factors, (0, 0), 1, 4).dtype == jnp.float32
