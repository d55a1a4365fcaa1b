"""What is read from a program about its samples, against many models of either kind."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Apply, often_or_slow
from jax import lax
from plain_jacobians import Numbers
from test_irregular_networks import IRREGULAR
from test_random_networks import LIBRARIES, LOOPS, STRAIGHT, stack_of

from ntkdp import empirical_ntk, models, per_sample_gradient_norms
from ntkdp._gradients.check_model import _read, check_model

N, D = 5, 4
X = Numbers(0)(N, D)
W = {"w": Numbers(1)(D, 3), "v": Numbers(2)(D, D), "b": Numbers(3)(3)}
KEY = jax.random.key(7)


def doubt(apply: Apply, params: Any, x: jax.Array) -> str | None:
    reading = _read(apply, params, x, "x")
    return "their number" if reading.counts else reading.doubt


def rows(x: jax.Array) -> jax.Array:
    """Samples as sequences (n, 2, 2)."""
    return x.reshape(x.shape[0], 2, 2)


def attend(h: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.einsum("...td,...sd->...ts", h, h)) @ h


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    def turn(state: jax.Array, token: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(state + token @ p["v"][:2, :3] + p["b"]), None

    start = jnp.zeros((x.shape[0], 3), x.dtype)
    return lax.scan(turn, start, jnp.swapaxes(rows(x), 0, 1))[0]


def solved(v: jax.Array) -> jax.Array:
    """A loop that ends when it has converged, of one sample."""
    return lax.while_loop(
        lambda h: jnp.sum(h[1]) > 1e-3, lambda h: (0.5 * jnp.sin(h[0]) + v, 0.5 * h[1]),
        (v, jnp.abs(v)),
    )[0]  # fmt: skip


@jax.custom_vjp
def own_gradient(h: jax.Array) -> jax.Array:
    return jnp.round(h)


own_gradient.defvjp(lambda h: (jnp.round(h), h), lambda h, g: (g * jnp.cos(h),))


def last_token(h: jax.Array, length: jax.Array) -> jax.Array:
    return h[jnp.arange(h.shape[0]), length]


#: Models that treat samples one by one, as a program shows.
SEPARATE: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "linear": lambda p, x: x @ p["w"] + p["b"],
    "transposed": lambda p, x: (p["w"].T @ x.T).T,
    "centred": lambda p, x: jnp.tanh(x @ p["w"]) - jnp.tanh(x @ W["w"]),
    "where": lambda p, x: jnp.where(x[:, :3] > 0, x[:, 1:], 2.0) * p["b"],
    "attention within a sample": lambda p, x: attend(rows(x)).reshape(x.shape[0], -1) @ p["w"],
    "layer norm": lambda p, x: jax.nn.standardize(x) @ p["w"],
    "einsum with ellipsis": lambda p, x: jnp.einsum("...d,dk->...k", x, p["w"]),
    "einsum, batch last": lambda p, x: jnp.einsum("dn,dk->nk", x.T, p["w"]),
    "vmap of one": lambda p, x: jax.vmap(lambda v: jnp.sort(v) @ p["w"])(x),
    "vmap at the end": lambda p, x: jax.vmap(lambda v: v @ p["w"], 1, 1)(x.T).T,
    "sort": lambda p, x: jnp.sort(x, axis=1) @ p["w"],
    "argsort": lambda p, x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1) @ p["w"],
    "top k": lambda p, x: lax.top_k(x, 3)[0] * p["b"],
    "cumsum": lambda p, x: jnp.cumsum(x, 1) @ p["w"],
    "fft": lambda p, x: jnp.abs(jnp.fft.rfft(x))[:, :3] * p["b"],
    "frames in one batch": lambda p, x: (
        jnp.tanh(rows(x).reshape(-1, 2) @ p["v"][:2, :3]).reshape(x.shape[0], 2, 3).sum(1)
    ),
    "frames, other order": lambda p, x: (
        jnp.tanh(rows(x).swapaxes(0, 1).reshape(-1, 2) @ p["v"][:2, :3])
        .reshape(2, x.shape[0], 3).sum(0)
    ),
    "class token": lambda p, x: (
        jnp.concatenate([jnp.broadcast_to(p["v"][:1], (x.shape[0], 1, 4)), x[:, None]], 1)
        .sum(1) @ p["w"]
    ),
    "positions of a sequence": lambda p, x: (
        (rows(x) + jnp.take(p["v"][:, :2], jnp.broadcast_to(jnp.arange(2), (x.shape[0], 2)), 0))
        .reshape(x.shape[0], -1) @ p["w"]
    ),
    "lookup": lambda p, x: p["w"][jnp.argmax(x, 1)],
    "one-hot": lambda p, x: jax.nn.one_hot(jnp.argmax(x, 1), 4) @ p["w"],
    "vmapped lookup": lambda p, x: jax.vmap(lambda v: p["w"][jnp.argmax(v)])(x),
    "written into": lambda p, x: jnp.zeros((x.shape[0], 3)).at[:, 1].set(x[:, 0]) @ p["v"][:3, :3],
    "added into": lambda p, x: x.at[:, 1:3].add(2.0) @ p["w"],
    "rolled": lambda p, x: jnp.roll(x, 1, axis=1) @ p["w"],
    "flipped": lambda p, x: x[:, ::-1] @ p["w"],
    "padded": lambda p, x: jnp.pad(x, ((0, 0), (1, 1)))[:, :4] @ p["w"],
    "pooled": lambda p, x: nn.max_pool(x[..., None], (2,), (1,))[..., 0] * p["b"],
    "recurrent": recurrent,
    "checkpoint in jit": jax.jit(jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"]))),
    "static branch": lambda p, x: lax.cond(p["b"][0] > 0, jnp.sin, jnp.cos, x @ p["w"]),
    "counted": lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h + i), x @ p["w"]),
    "custom derivative": lambda p, x: own_gradient(x) @ p["w"],
    "activations": lambda p, x: (
        jax.nn.relu(x) + jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.elu(x) + jax.nn.softplus(x)
        + jax.nn.logsumexp(x, 1, keepdims=True) + jax.nn.relu6(x) + jax.nn.selu(x)
    ) @ p["w"],
    "one noise for all": lambda p, x: (x + jax.random.normal(KEY, x.shape[1:])) @ p["w"],
    "noise of the sample itself": lambda p, x: (
        jax.vmap(
            lambda v: v + jax.random.normal(jax.random.fold_in(KEY, (v[0] * 100).astype(int)), (D,))
        )(x) @ p["w"]
    ),
    "determinant": lambda p, x: (
        jnp.linalg.cholesky(x[:, :, None] * x[:, None] + jnp.eye(D))[:, 0] @ p["w"]
    ),
    "numbers from outside": lambda p, x: (x + np.ones((x.shape[0], 1))) @ p["w"],
    "squeezed": lambda p, x: (x[:, None, :] @ p["w"]).reshape(x.shape[0], -1),
}  # fmt: skip

#: Models that treat samples one by one, as numbers show only.
TRIED: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "solved until all have converged": lambda p, x: jax.vmap(solved)(x) @ p["w"],
    "a branch for a batch of one": lambda p, x: (
        x @ p["w"] if x.shape[0] > 1 else jnp.sum(x[0, :, None] * p["w"], 0)[None]
    ),
    "last token": lambda p, x: last_token(x[:, :, None] * p["b"], jnp.argmax(x, 1)),
    "stacked one by one": lambda p, x: jnp.stack([v @ p["w"] for v in x]),
    "mapped one by one": lambda p, x: lax.map(lambda v: v @ p["w"], x),
    "mapped two by two": lambda p, x: lax.map(lambda v: v @ p["w"], x, batch_size=2),
    "pairwise, own": lambda p, x: jnp.diagonal((x @ p["w"]) @ (x @ p["w"]).T)[:, None] * p["b"],
    "softmax less the largest of all": lambda p, x: (
        jax.nn.softmax(x - lax.stop_gradient(jnp.max(x)), axis=1) @ p["w"]
    ),
    "filters of each sample": lambda p, x: jax.vmap(
        lambda v: (
            lax.conv(rows(v[None])[None], p["v"][None, None] * v[0], (1, 1), "SAME").sum() * p["b"]
        )
    )(x),
    "checked inside": lambda p, x: eqx.error_if(x, jnp.any(jnp.isnan(x)), "NaN") @ p["w"],
    "solve": lambda p, x: (
        jnp.linalg.solve(x[:, :, None] * x[:, None] + jnp.eye(D), x[..., None])[..., 0] @ p["w"]
    ),
}


@pytest.mark.parametrize("name", list(SEPARATE))
def test_independence_is_read(name: str) -> None:
    assert doubt(SEPARATE[name], W, X) is None


#: One of each kind is tried every time, the others among the slow tests.
KINDS_TRIED = ["a branch for a batch of one", "last token", "softmax less the largest of all"]
KINDS_REFUSED = ["batch normalisation", "times the number of samples"]


@pytest.mark.parametrize("name", often_or_slow(list(TRIED), KINDS_TRIED))
def test_independence_is_tried(name: str) -> None:
    assert doubt(TRIED[name], W, X) is not None
    assert check_model(TRIED[name], W, X)[1].shape == (N, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TRIED))
def test_independence_is_tried_in_single_precision(name: str) -> None:
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (W, X))
    assert check_model(TRIED[name], *single)[1].shape == (N, 3)


@pytest.mark.parametrize("piece", [*STRAIGHT, *LOOPS])
def test_pieces_of_random_networks_are_read(piece: str) -> None:
    new = Numbers(3)
    apply, params = stack_of([piece], 2, new)
    for shape in ((3, 4), (3, 2, 4)):
        assert doubt(apply, params, new(*shape)) is None


@pytest.mark.parametrize(
    "name", [name for name in IRREGULAR if name not in ("batch in a sample", "no position")]
)
def test_irregular_networks_are_read(name: str) -> None:
    apply, shape, x = IRREGULAR[name]
    data = Numbers(5)(*x) if isinstance(x, tuple) else x
    assert doubt(lambda p, x: apply(p["w"], x), {"w": Numbers(4)(*shape)}, data) is None


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_models_of_libraries_are_read(name: str) -> None:
    x = Numbers(1)(3, 4, 4, 2)
    model = LIBRARIES[name](jax.random.key(2))
    assert doubt(model.apply, model.init(jax.random.key(0), x), x) is None


def test_dropout_and_batch_normalisation_that_are_off_are_read() -> None:
    net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True),
                         nn.Dropout(0.5, deterministic=True), nn.Dense(2)])  # fmt: skip
    state = {"batch_stats": {"layers_1": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}
    model = models.from_flax(net, state=state)
    assert doubt(model.apply, model.init(KEY, X), X) is None


def batch_norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


@jax.custom_vjp
def normed_gradient(h: jax.Array) -> jax.Array:
    return h


normed_gradient.defvjp(lambda h: (h, None), lambda _, g: (g / jnp.linalg.norm(g),))


@jax.custom_jvp
def mixed_tangent(h: jax.Array) -> jax.Array:
    return h


mixed_tangent.defjvp(lambda h, t: (h[0], t[0] + jnp.mean(t[0], 0)))

TABLE = Numbers(9)(1000, D)

#: Models that couple samples, or treat them by their place.
COUPLED: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "batch normalisation": lambda p, x: batch_norm(x) @ p["w"],
    "centring": lambda p, x: (x - x.mean(0)) @ p["w"],
    "centring of the outputs": lambda p, x: x @ p["w"] - jnp.mean(x @ p["w"]),
    "weakly centred": lambda p, x: (x - 1e-6 * x.mean(0)) @ p["w"],
    "divided by maxima": lambda p, x: x / jnp.max(jnp.abs(x), 0) @ p["w"],
    "clipped at the largest": lambda p, x: jnp.minimum(x, x.max() - 1) @ p["w"],
    "contrast": lambda p, x: (x - jnp.roll(x, 1, 0)) @ p["w"],
    "attention over the batch": lambda p, x: attend(x) @ p["w"],
    "weak attention over the batch": lambda p, x: (x + 1e-3 * attend(x)) @ p["w"],
    "sorted samples": lambda p, x: jnp.sort(x, 0) @ p["w"],
    "sum over samples so far": lambda p, x: jnp.cumsum(x, 0) @ p["w"],
    "reversed samples": lambda p, x: x[::-1] @ p["w"],
    "the first sample": lambda p, x: (x + x[:1]) @ p["w"],
    "scan over samples": lambda p, x: lax.scan(lambda h, v: (h + v, h @ p["w"]), x[0] * 0, x)[1],
    "times the number of samples": lambda p, x: x.shape[0] * (x @ p["w"]),
    "power of the number of samples": lambda p, x: (x @ p["w"]) ** x.shape[0],
    "sum of ones": lambda p, x: jnp.sum(jnp.ones((x.shape[0],))) * (x @ p["w"]),
    "sum of copies": lambda p, x: jnp.sum(jnp.broadcast_to(x, (x.shape[0], *x.shape)), 0) @ p["w"],
    "product of copies": lambda p, x: jnp.ones((x.shape[0],) * 2) @ jnp.ones_like(x) * x @ p["w"],
    "a branch for a batch of one": lambda p, x: x @ p["w"] * (1 if x.shape[0] == 1 else 2),
    "a row for the number of samples": lambda p, x: (
        x @ p["w"] + jnp.concatenate([p["v"], p["v"]])[x.shape[0] - 1 : x.shape[0], :1]
    ),
    "half of the batch": lambda p, x: (
        jnp.where(jnp.arange(x.shape[0])[:, None] < 2, x, -x) @ p["w"]
    ),
    "dropout with a fixed key": lambda p, x: (
        jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0.0) @ p["w"]
    ),
    "dropout, a key a sample": lambda p, x: jax.vmap(
        lambda k, v: jnp.where(jax.random.bernoulli(k, 0.5, v.shape), v, 0.0) @ p["w"]
    )(jax.random.split(KEY, x.shape[0]), x),
    "noise": lambda p, x: (x + 0.01 * jax.random.normal(KEY, x.shape)) @ p["w"],
    "a table of one row a sample": lambda p, x: (x + TABLE[: x.shape[0]]) @ p["w"],
    "a trained row a sample": lambda p, x: (x + p["v"][jnp.arange(x.shape[0])]) @ p["w"],
    "positions over the batch": lambda p, x: (
        (x + jnp.sin(jnp.arange(x.shape[0]))[:, None]) @ p["w"]
    ),
    "fft over the batch": lambda p, x: jnp.real(jnp.fft.fft(x, axis=0)) @ p["w"],
    "convolution over the batch": lambda p, x: (
        lax.conv(x.T[:, None], jnp.asarray([[[0.1, 1.0, 0.1]]]), (1,), "SAME")[:, 0].T @ p["w"]
    ),
    "one loop for all": lambda p, x: lax.while_loop(
        lambda h: jnp.max(jnp.abs(h)) > 1.0, lambda h: h / 2, x @ p["w"]
    ),
    "one branch for all": lambda p, x: lax.cond(
        jnp.sum(x) > 0, lambda h: h, lambda h: 2 * h, x
    ) @ p["w"],
    "reshaped across": lambda p, x: x.T.reshape(x.shape) @ p["w"],
    "gradient normed over the batch": lambda p, x: normed_gradient(x @ p["w"]),
    "derivative mixed over the batch": lambda p, x: mixed_tangent(x @ p["w"]),
    "neighbours two by two": lambda p, x: (
        x + jnp.concatenate([x, x])[1 : x.shape[0] + 1]
    ) @ p["w"],
    "rank in the batch": lambda p, x: jnp.argsort(jnp.argsort(x, 0), 0) * x @ p["w"],
    "covariance": lambda p, x: x @ (x.T @ x) @ p["w"],
    "weights of the batch": lambda p, x: x * jax.nn.softmax(x[:, :1], 0) @ p["w"],
}  # fmt: skip

EQUAL_FIRST = X.at[1].set(X[0])
#: The first row holds the maxima, and the first two are equal in turn.
DATA = {"equal rows": EQUAL_FIRST, "largest first": X.at[0].set(9.0).at[1].set(1.0)}


@pytest.mark.parametrize("name", list(COUPLED))
def test_what_meets_in_a_batch_is_seen(name: str) -> None:
    for n in (1, 2, N):
        assert doubt(COUPLED[name], W, X[:n]) is not None


@pytest.mark.parametrize("name", often_or_slow(list(COUPLED), KINDS_REFUSED))
@pytest.mark.parametrize("x", DATA.values(), ids=DATA)
def test_what_meets_in_a_batch_is_refused(name: str, x: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"couples the samples of a batch|by their place"):
        check_model(COUPLED[name], W, x)


def test_a_branch_for_as_many_samples_as_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=f"other outputs among {N} than alone"):
        check_model(lambda p, x: x @ p["w"] * (1 if x.shape[0] < N else 2), W, X)


@pytest.mark.parametrize(("name", "where"), [("noise", "jit"), ("centring", "vmap")])
def test_coupling_is_refused_inside_transformations(name: str, where: str) -> None:
    a = jnp.ones((N, 3))

    def norms(p: Any, x: jax.Array) -> jax.Array:
        return per_sample_gradient_norms(COUPLED[name], p, x, a)

    transformed: Callable[..., jax.Array] = jax.jit(norms)
    x = EQUAL_FIRST
    if where == "vmap":
        transformed, x = jax.vmap(norms, (None, 0)), jnp.stack([X, EQUAL_FIRST])
    with pytest.raises(Exception, match="changes with its neighbours, or with its place"):
        transformed(W, x)


def test_what_is_tried_passes_inside_transformations() -> None:
    apply = TRIED["softmax less the largest of all"]
    np.testing.assert_allclose(
        jax.jit(lambda p, x: empirical_ntk(apply, p, x))(W, X), empirical_ntk(apply, W, X)
    )


def test_the_layer_and_the_line_are_named() -> None:
    def inner(x: jax.Array) -> jax.Array:
        with jax.named_scope("middle"):
            return x - jnp.mean(x, 0)

    line = inner.__code__.co_firstlineno + 2
    with pytest.raises(ValueError, match=rf"`reduce_sum` in middle \(test_batch_axis.py:{line}\)"):
        check_model(lambda p, x: inner(x) @ p["w"], W, X)


def test_a_centred_network_is_no_false_alarm_in_single_precision() -> None:
    model = models.mlp([64, 64], 2, activation="erf")
    x = jax.random.normal(KEY, (6, 8), jnp.float32)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.init(KEY, x))
    params = jax.tree.map(lambda v: v + 1e-6 * jnp.sin(1e3 * v), start)

    def centred(p: Any, x: jax.Array) -> jax.Array:
        return model.apply(p, x) - model.apply(start, x)

    assert doubt(centred, params, x) is None

    # With a number that all samples share and that changes nothing, it has to be tried.
    def stable(p: Any, x: jax.Array) -> jax.Array:
        return centred(p, x) + 0.0 * jnp.max(x)

    assert doubt(stable, params, x) is not None
    assert check_model(stable, params, x)[1].shape == (6, 2)


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: (x @ p["w"]).reshape(N, -1),
        lambda p, x: x.reshape(N, -1) @ p["w"],
        lambda p, x: x @ p["w"] + jnp.zeros((N, 1)),
        lambda p, x: jnp.squeeze(x) @ p["w"],
    ],
)
def test_a_batch_size_written_into_a_model_is_named(apply: Apply) -> None:
    with pytest.raises(ValueError, match="apply_fn must take batches of any size"):
        check_model(apply, W, X)
