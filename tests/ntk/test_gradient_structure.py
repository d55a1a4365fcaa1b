"""What the engine finds in a model, what it says of it, and the memory that follows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known, normal
from jax import lax

import ntkdp
from ntkdp._gradients import per_sample as per_sample
from ntkdp.ntk import gradient_structure


def test_every_leaf_of_a_transformer_block_is_structured() -> None:
    def norm(p: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * p[name]

    def block(p: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = p["token"][tokens] + p["position"]
        h = norm(p, "gain", x)
        q, k, v = (jnp.einsum("ntd,dhe->nthe", h, p[name]) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("nthe,nshe->nhts", q, k))
        x = x + jnp.einsum("nhts,nshe,hed->ntd", weights, v, p["out"])
        x = x + jax.nn.gelu(x @ p["up"] + p["shift"]) @ p["down"]
        return jnp.mean(x, 1) @ p["head"]

    shapes: dict[str, tuple[int, ...]] = {
        "down": (6, 4),
        "gain": (4,),
        "head": (4, 3),
        "k": (4, 2, 2),
        "out": (2, 2, 4),
        "position": (5, 4),
        "q": (4, 2, 2),
        "shift": (6,),
        "token": (7, 4),
        "up": (4, 6),
        "v": (4, 2, 2),
    }
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    tokens = jnp.array([[0, 3, 3, 6, 1], [2, 2, 2, 5, 0]])
    found = gradient_structure(block, params, tokens)
    expected = dict.fromkeys(shapes, "product")
    expected |= dict.fromkeys(("gain", "position", "shift"), "element by element")
    expected["token"] = "lookup"
    assert found == expected


CASES: dict[str, tuple[Any, Any, str]] = {
    "tied alike": (lambda w, x: jnp.tanh(x @ w) @ w, normal(0, 3, 3), "2 products"),
    "tied across": (
        lambda w, x: jnp.tanh(x @ w) @ w.T,
        normal(0, 3, 4),
        "per-sample Jacobian: used in 2 products that lie across each other",
    ),
    "apart": (
        lambda w, x: jnp.tanh(x @ w[:, :4]) @ w[:, 4:].T[:, :2].repeat(2, 0)[:4],
        normal(0, 3, 6),
        "per-sample Jacobian: used in `dot_general`; used in a product, too",
    ),
    "halves": (
        lambda w, x: jnp.tanh(x @ w[:, :3]) @ w[:, 3:],
        normal(0, 3, 5),
        "2 products",
    ),
    "split": (
        lambda w, x: sum(jnp.tanh(x @ part) for part in jnp.split(w, 3, axis=1)),
        normal(0, 3, 6),
        "3 products",
    ),
    "overlapping": (
        lambda w, x: jnp.tanh(x @ w[:, :3]) @ w[:, 2:],
        normal(0, 3, 5),
        "per-sample Jacobian: used in 2 products that lie across each other",
    ),
    "stepped through": (
        lambda w, x: lax.scan(lambda h, w_i: (jnp.tanh(h @ w_i), None), x, w)[0],
        normal(0, 4, 3, 3),
        "4 products",
    ),
    "recurrent": (
        lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=5)[0],
        normal(0, 3, 3),
        "5 products",
    ),
    "a long loop": (
        lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=65)[0],
        normal(0, 3, 3),
        "per-sample Jacobian: inside a loop of 65 turns",
    ),
    "carried": (
        lambda w, x: lax.scan(lambda c, _: ((jnp.sin(c[0]), c[1] @ c[0]), None), (w, x), None, 3)[
            0
        ][1],
        normal(0, 3, 3),
        "per-sample Jacobian: carried through a loop",
    ),
    "shifted": (lambda w, x: x @ (1.0 + 0.5 * w), normal(0, 3, 2), "product"),
    "masked": (
        lambda w, x: x @ (w * jnp.arange(6.0).reshape(3, 2)),
        normal(0, 3, 2),
        "per-sample Jacobian: scaled by an array",
    ),
    "unused": (lambda w, x: x, normal(0, 3), "unused"),
    "depthwise": (
        lambda w, x: lax.conv_general_dilated(
            x.reshape(-1, 1, 3),
            w,
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=3,
        )[:, 0],
        normal(0, 1, 1, 6),
        "convolution",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_descriptions(name: str) -> None:
    apply, w, description = CASES[name]
    x = normal(9, 2, 3)
    assert gradient_structure(apply, w, x) == {"": description}
    expected = jax.jacrev(apply)(w, x).reshape(2, -1, w.size)
    kernel = ntkdp.empirical_ntk(apply, w, x)
    truth = np.einsum("nkp,mlp->nmkl", expected, expected)
    np.testing.assert_allclose(kernel, truth, rtol=1e-10, atol=1e-12 * np.max(np.abs(truth)))


def mlp(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def planned_bytes(function: Any, *args: Any) -> tuple[int, int]:
    """Result and work of a program, as its compiler plans them."""
    planned = jax.jit(function).lower(*args).compile().memory_analysis()
    return known(planned).output_size_in_bytes, known(planned).temp_size_in_bytes


@pytest.mark.parametrize("batch_size", [None, 32])
@pytest.mark.parametrize("second", [False, True])
def test_a_kernel_takes_little_more_memory_than_its_result(
    batch_size: int | None, second: bool
) -> None:
    params = [normal(i, *shape) for i, shape in enumerate([(20, 40), (40, 40), (40, 10)])]
    x = jax.ShapeDtypeStruct((384, 20), jnp.float64)

    def kernel(params: Any, x1: Any, x2: Any) -> jax.Array:
        x2 = x2 if second else None
        return ntkdp.empirical_ntk(mlp, params, x1, x2, batch_size=batch_size)

    result, work = planned_bytes(kernel, params, x, x)
    assert result == 8 * 384**2 * 10**2
    block = 2**26 + 2**25 if batch_size is None else 8 * 10 * 32 * (3 * 32 * 10 + 130)
    assert work <= result + 2 * block
    # A real bound: the Jacobian alone would take more.
    assert work < 8 * 384 * 10 * sum(w.size for w in params)


def test_norms_and_clipped_sums_take_no_per_sample_gradients() -> None:
    params = [normal(i, *shape) for i, shape in enumerate([(64, 256), (256, 256), (256, 4)])]
    n = 128
    x = jax.ShapeDtypeStruct((n, 64), jnp.float64)
    y = jnp.zeros((n, 4))
    clipping = ntkdp.clipping.Abadi(1.0)

    def step(params: Any, x: Any) -> Any:
        algorithm = ntkdp.dp_sgd.build(
            mlp, x, y, ntkdp.losses.SquaredError(), clipping, learning_rate=0.1
        )
        state = algorithm.init(params)
        return algorithm.step(jax.random.key(0), state)[0].params

    _, work = planned_bytes(step, params, x)
    size = 8 * sum(w.size for w in params)
    assert work < 8 * size < n * size
    _, work = planned_bytes(
        lambda p, x: ntkdp.per_sample_gradient_norms(mlp, p, x, y + 1.0), params, x
    )
    assert work < 4 * size


def test_loops_of_no_turns_and_in_reverse() -> None:
    w, x = normal(0, 3, 3, 3), normal(1, 2, 3)

    def backwards(w: jax.Array, x: jax.Array) -> jax.Array:
        def turn(h: jax.Array, w_i: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(h @ w_i)
            return h, h

        h, hs = lax.scan(turn, x, w, reverse=True)
        nothing, _ = lax.scan(turn, h, w[:0])
        return nothing + hs[0] * hs[2]

    J = jax.jacrev(backwards)(w, x).reshape(2, 3, -1)
    truth = np.einsum("nkp,mlp->nmkl", J, J)
    np.testing.assert_allclose(ntkdp.empirical_ntk(backwards, w, x), truth, rtol=1e-10, atol=1e-12)


def test_lookups_of_rows_that_are_not_there() -> None:
    """Beyond the table jnp.take fills with NaN or clips; a filled row has no gradient."""
    table, rows = normal(0, 4, 3), jnp.array([[0, 3, 9], [9, -9, 1]])
    for mode, fill in (("clip", None), ("fill", 0.0)):

        def apply(table: jax.Array, rows: jax.Array, mode: str = mode, fill: Any = fill) -> Any:
            return jnp.sum(jnp.sin(jnp.take(table, rows, 0, mode=mode, fill_value=fill)), 1)

        assert gradient_structure(apply, table, rows) == {"": "lookup"}
        J = jax.jacrev(apply)(table, rows).reshape(2, 3, -1)
        kernel = ntkdp.empirical_ntk(apply, table, rows)
        np.testing.assert_allclose(kernel, np.einsum("nkp,mlp->nmkl", J, J), rtol=1e-10, atol=1e-12)


def test_few_rows_of_a_large_table_are_never_written_out() -> None:
    table, rows = normal(0, 5000, 4), jnp.array([[7, 7, 11], [11, 0, 7]])

    def apply(table: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.cumsum(jnp.tanh(table[rows]), 1)[:, -1, :2]

    structure = per_sample.trace(apply, table, rows)
    (factor,) = per_sample.factored_for_kernel(structure, table, rows)
    assert isinstance(factor[0], per_sample.Lookup)
    J = jax.jacrev(apply)(table, rows).reshape(2, 2, -1)
    kernel = ntkdp.empirical_ntk(apply, table, rows)
    np.testing.assert_allclose(kernel, np.einsum("nkp,mlp->nmkl", J, J), rtol=1e-10, atol=1e-12)
    assert planned_bytes(lambda t: ntkdp.empirical_ntk(apply, t, rows), table)[1] < table.nbytes
