"""DP-SGD: steps against optax and plain training, noise and sampling by statistics, bad input."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import KEY, SOFTMAX, SQUARED, Apply, Gradients, linear, often_or_slow
from jax import lax

from ntkdp import clipping, dp_sgd, losses
from ntkdp._gradients import per_sample
from ntkdp.clipping import PSAC, Abadi, Automatic, Batch, Custom, Global, NoClipping, Scope
from ntkdp.losses import Reduction
from ntkdp.trajectory import Phase

N, D, K = 6, 5, 3
X = jax.random.normal(jax.random.key(1), (N, D))
Y = jax.random.normal(jax.random.key(2), (N, K))
LABELS = jnp.array([0, 2, 1, 1, 0, 2])
HUGE = 1e9


def random_like(tree: Any, seed: int = 3, scale: float = 0.5) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef, [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    )


def mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["a"]["W"] + params["a"]["b"])
    return hidden @ params["b"]["W"] + params["b"]["b"]


MLP = random_like({"a": {"W": (D, 4), "b": (4,)}, "b": {"W": (4, K), "b": (K,)}})


def cnn(params: Any, x: jax.Array) -> jax.Array:
    image = x @ jnp.ones((D, 2 * 7 * 6)) * 0 + jnp.tile(x, (1, 17))[:, :84]
    image = image.reshape(-1, 7, 6, 2)
    numbers = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(image, params["c"], (1, 1), "SAME", dimension_numbers=numbers)
    z = jax.nn.relu(z + params["bias"])
    z = lax.reduce_window(z, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    z = lax.conv_general_dilated(z, params["d"], (2, 1), "VALID", dimension_numbers=numbers)
    return jnp.tanh(z).reshape(x.shape[0], -1) @ params["e"]


def tied(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params["W"]) @ params["W"].T) @ params["V"]


def recurrent(params: Any, x: jax.Array) -> jax.Array:
    def cell(state: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(state @ params["W"] + column[:, None] * params["u"]), None

    state, _ = lax.scan(cell, jnp.zeros((x.shape[0], 4), x.dtype), x.T)
    return state @ params["V"]


def normalised(params: Any, x: jax.Array) -> jax.Array:
    """Weights that meet no data as they are: transposed, scaled, normalised, masked, reshaped."""
    W = params["W"].T / math.sqrt(D)
    z = jax.nn.gelu(x @ W) * params["gain"]
    V = params["V"] / jnp.linalg.norm(params["V"], axis=0)
    z = jax.nn.relu(z @ V) @ jnp.triu(params["U"])
    return z @ params["flat"].reshape(4, K)


def attention(params: Any, x: jax.Array) -> jax.Array:
    """Positions share the weights, so a gradient is a sum of outer products."""
    tokens = x[:, :, None] * params["embedding"]
    scores = jnp.einsum("ntp,pq,nsq->nts", tokens, params["W"], tokens)
    mixed = jax.nn.softmax(scores) @ jnp.einsum("ntp,pq->ntq", tokens, params["V"])
    return jnp.sum(mixed, axis=1) @ params["out"]


W = random_like((D, K))


def kinked(params: Any, x: jax.Array) -> jax.Array:
    """Outputs finite everywhere, with a derivative of 0 * infinity where x @ w is zero."""
    return jnp.sqrt((x @ params["a"]) ** 2) + x @ params["b"]


MODELS: dict[str, tuple[Apply, Any]] = {
    "mlp": (mlp, MLP),
    "cnn": (
        cnn,
        random_like({"c": (3, 3, 2, 3), "bias": (3,), "d": (2, 2, 3, 2), "e": (4, K)}),
    ),
    "tied": (tied, random_like({"W": (D, 4), "V": (D, K)})),
    "unused": (
        lambda params, x: mlp(params["net"], x) + 0.0 * jnp.sum(params["zero"]),
        {"net": MLP, "unused": jnp.ones((2, 2)), "zero": jnp.ones(3)},
    ),
    "scalar": (
        lambda params, x: jnp.tanh(params["scale"] * x) @ params["W"] * params["scale"],
        random_like({"scale": (), "W": (D, K)}),
    ),
    "jitted": (jax.jit(mlp), MLP),
    "recurrent": (recurrent, random_like({"W": (4, 4), "u": (4,), "V": (4, K)})),
    "normalised": (
        normalised,
        random_like({"W": (4, D), "gain": (4,), "V": (4, 4), "U": (4, 4), "flat": (4 * K,)}),
    ),
    "attention": (
        attention,
        random_like({"embedding": (2,), "W": (2, 2), "V": (2, 2), "out": (2, K)}),
    ),
}

RULES: dict[str, Callable[[Scope], clipping.ClippingRule]] = {
    "none": lambda scope: NoClipping(scope=scope),
    "abadi": lambda scope: Abadi(0.8, scope=scope),
    "global": lambda scope: Global(0.8, Z=5.0, scope=scope),
    "automatic": lambda scope: Automatic(0.8, scope=scope),
    "auto-v": lambda scope: Automatic(0.8, gamma=0.0, scope=scope),
    "psac": lambda scope: PSAC(0.8, scope=scope),
    "batch": lambda scope: Batch(0.8, scope=scope),
    "custom": lambda scope: Custom(lambda s: 0.8 / (1 + s), 0.8, scope=scope),
}


def build(apply_fn: Apply, rule: clipping.ClippingRule, **options: Any) -> dp_sgd.Algorithm:
    chosen = {"x": X, "targets": Y, "loss": SQUARED, "learning_rate": 1.0, **options}
    return dp_sgd.build(apply_fn, clipping=rule, **chosen)


def run(rule: clipping.ClippingRule, **options: Any) -> Any:
    chosen = {
        "apply_fn": mlp,
        "params": MLP,
        "x": X,
        "targets": Y,
        "loss": SQUARED,
        "learning_rate": 0.1,
        "steps": 4,
        "key": KEY,
        **options,
    }
    return dp_sgd.run(clipping=rule, **chosen)


def run_linear(rule: clipping.ClippingRule, **options: Any) -> Any:
    return run(rule, **{"apply_fn": linear, "params": W, **options})


def steps(algorithm: dp_sgd.Algorithm, params: Any, n_steps: int = 1, key: Any = KEY) -> Any:
    """The loop of a user: compiled once, step k with the k-th key folded in."""
    step = algorithm.compile()
    state, infos = algorithm.init(params), []
    for k in range(n_steps):
        state, info = step(jax.random.fold_in(key, k), state)
        infos.append(info)
    return state, infos


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    assert str(jax.tree.structure(actual)) == str(jax.tree.structure(expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def per_sample_gradients(apply_fn: Apply, params: Any, loss: losses.Loss, targets: Any) -> Any:
    def of_one(params: Any, x_i: jax.Array, y_i: jax.Array) -> jax.Array:
        return loss(apply_fn(params, x_i[None]), y_i[None])[0]

    return jax.vmap(jax.grad(of_one), (None, 0, 0))(params, X, targets)


# One step against optax


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_a_flat_step_is_optaxs_private_aggregate(gradients: Gradients) -> None:
    # optax divides the clipped sum and its noise (of standard deviation noise_multiplier * R on the
    # sum) by the number of per-example gradients it is given: ours with reduction="mean" and a full
    # batch. With Poisson sampling ours divides by the expected batch size, not by the drawn one.
    R = 0.8
    algorithm = build(mlp, Abadi(R), targets=LABELS, loss=SOFTMAX, gradients=gradients)
    state, (info,) = steps(algorithm, MLP)
    each = per_sample_gradients(mlp, MLP, SOFTMAX, LABELS)
    aggregate = optax.contrib.differentially_private_aggregate(R, 0.0, key=KEY)
    mean, _ = aggregate.update(each, aggregate.init(MLP))
    assert_trees_close(jax.tree.map(jnp.subtract, MLP, state.params), mean)
    assert 0 < info.clip_fraction < 1
    summed = build(
        mlp, Abadi(R), targets=LABELS, loss=SOFTMAX, gradients=gradients, reduction="sum"
    )
    state, _ = steps(summed, MLP)
    difference = jax.tree.map(jnp.subtract, MLP, state.params)
    assert_trees_close(difference, jax.tree.map(lambda g: N * g, mean))


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_a_layerwise_step_is_optaxs_layer_norm_clip(gradients: Gradients) -> None:
    # optax takes one total clip norm C and makes every *array* a layer with norm C / sqrt(arrays);
    # ours takes the norm of a group, and by default groups weights and biases of a layer. So the
    # groups here are one an array, and R = C / sqrt(arrays): then both have sensitivity C. optax
    # returns the sum, ours with reduction="mean" the sum over n.
    C, n_arrays = 1.1, 4
    rule = Abadi(C / math.sqrt(n_arrays), scope="layerwise")
    assert rule.sensitivity(n_arrays) == pytest.approx(C)
    algorithm = build(
        mlp, rule, targets=LABELS, loss=SOFTMAX, gradients=gradients, groups=lambda path: path
    )
    state, (info,) = steps(algorithm, MLP)
    each = per_sample_gradients(mlp, MLP, SOFTMAX, LABELS)
    clipped, n_clipped = optax.per_example_layer_norm_clip(jax.tree.leaves(each), C)
    difference = jax.tree.map(lambda a, b: N * (a - b), MLP, state.params)
    assert_trees_close(jax.tree.leaves(difference), clipped)
    share = sum(int(count) for count in n_clipped) / (n_arrays * N)
    assert float(info.clip_fraction) == pytest.approx(share)
    assert 0 < share < 1
    assert info.norms.shape == (n_arrays, N)


def test_default_groups_are_the_layers() -> None:
    rule = Abadi([0.3, 0.9], scope="layerwise")
    state, (info,) = steps(build(mlp, rule), MLP)
    each = per_sample_gradients(mlp, MLP, SQUARED, Y)
    for layer, R, norms in zip("ab", (0.3, 0.9), info.norms, strict=True):
        clipped, _ = optax.per_example_global_norm_clip(each[layer], R)
        difference = jax.tree.map(lambda a, b: N * (a - b), MLP[layer], state.params[layer])
        assert_trees_close(difference, clipped)
        np.testing.assert_allclose(norms, jax.vmap(optax.tree.norm)(each[layer]), rtol=1e-12)


@pytest.mark.parametrize("model", often_or_slow(MODELS, ["mlp", "attention"]))
def test_structured_and_plain_gradients_agree(model: str) -> None:
    apply_fn, params = MODELS[model]
    # The rules see norms alone, so all of them are tried on one model, and on the others Abadi's
    # and the one that needs the norm of the sum.
    names = RULES if model == "mlp" else ("abadi", "batch")
    rules = [RULES[name](scope) for name in names for scope in ("flat", "layerwise")]

    def all_rules(gradients: Gradients) -> Any:
        algorithms = [build(apply_fn, rule, gradients=gradients) for rule in rules]
        state = algorithms[0].init(params)
        return jax.jit(lambda state: [a.step(KEY, state) for a in algorithms])(state)

    for rule, (state, info), (plain_state, plain_info) in zip(
        rules, all_rules("structured"), all_rules("vmap"), strict=True
    ):
        assert_trees_close(state.params, plain_state.params)
        assert_trees_close(info, plain_info)
        assert float(info.gradient_norm) > 0, rule


# Plain training

OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (None, optax.sgd),
    "momentum": (lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),) * 2,
    "adam": (optax.adam, optax.adam),
    "adamw": (lambda lr: optax.adamw(lr, weight_decay=0.1),) * 2,
}


def train(
    optimizer: Any, learning_rate: Any, n_steps: int, reduction: Reduction = "mean"
) -> list[Any]:
    """Losses and final parameters of full-batch training in plain optax."""
    transformation = optimizer(learning_rate)
    reduce = jnp.mean if reduction == "mean" else jnp.sum

    def objective(params: Any) -> jax.Array:
        return reduce(optax.softmax_cross_entropy_with_integer_labels(mlp(params, X), LABELS))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = transformation.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    params, state, values = MLP, transformation.init(MLP), []
    for _ in range(n_steps):
        value, params, state = step(params, state)
        values.append(value)
    return [np.array([*values, objective(params)]), params]


@pytest.mark.parametrize(
    ("name", "scheduled"),
    often_or_slow(
        [("momentum", False), ("adam", False), ("adamw", False), ("sgd", True)],
        [("adam", False), ("sgd", True)],
    ),
)
def test_without_clipping_or_noise_it_is_optax(name: str, scheduled: bool) -> None:
    optimizer, plain = OPTIMIZERS[name]
    rate = optax.exponential_decay(0.2, 3, 0.5) if scheduled else 0.2
    losses_, params = train(plain, rate, 5)
    options = {"targets": LABELS, "loss": SOFTMAX, "learning_rate": rate, "optimizer": optimizer}
    ours = run(Abadi(HUGE), steps=5, **options)
    np.testing.assert_allclose(ours.loss, losses_, rtol=1e-12)
    assert np.all(ours.clip_fraction == 0)
    if name == "adam":
        state, _ = steps(build(mlp, NoClipping(), **options), MLP, 5)
        assert_trees_close(state.params, params)
        assert int(state.step) == 5


def test_reduction_sum_is_gradient_descent_on_the_sum() -> None:
    losses_, _ = train(optax.sgd, 0.02, 4, "sum")
    options = {"targets": LABELS, "loss": SOFTMAX, "learning_rate": 0.02, "reduction": "sum"}
    ours = run(Abadi(HUGE, scope="layerwise"), test_x=X, test_targets=LABELS, **options)
    np.testing.assert_allclose(ours.loss, losses_, rtol=1e-12)
    np.testing.assert_allclose(ours.test_loss, losses_, rtol=1e-12)
    np.testing.assert_array_equal(ours.accuracy, ours.test_accuracy)


@pytest.mark.parametrize(
    ("size", "scope", "sample_rate"),
    often_or_slow(
        [(1, "flat", 1.0), (4, "flat", 0.6), (4, "layerwise", 1.0), (7, "layerwise", 0.6)],
        [(4, "flat", 0.6), (4, "layerwise", 1.0)],
    ),
)
def test_microbatches_change_no_number(size: int, scope: Scope, sample_rate: float) -> None:
    rule, n = Abadi(0.8, scope=scope), 7
    x, y = jnp.concatenate([X, -X[:1]]), jnp.concatenate([Y, Y[:1]])
    options = {"x": x, "targets": y, "sample_rate": sample_rate}
    params = random_like({"a": (D, K), "b": (D, K)})
    whole, (info,) = steps(build(kinked, rule, **options), params)
    parts, (parts_info,) = steps(build(kinked, rule, **options, microbatch_size=size), params)
    assert info.clip_fraction > 0
    assert_trees_close(parts.params, whole.params)
    assert_trees_close(parts_info, info)
    assert info.norms.shape[-1] == n


# Noise: with gradients of zero the update is the noise

P = 2000


def zero_gradient(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["a"] + x @ params["b"]


def noise_updates(rule: clipping.ClippingRule, n_steps: int = 1, **options: Any) -> list[Any]:
    params = {"a": jnp.zeros((P, 1)), "b": jnp.zeros((P, 1))}
    chosen = {"x": jnp.ones((4, P)), "targets": jnp.zeros((4, 1)), **options}
    algorithm = build(zero_gradient, rule, **chosen)
    step = algorithm.compile()
    state, updates = algorithm.init(params), []
    for k in range(n_steps):
        # Each step starts at zero, where the gradients are zero.
        state, info = step(jax.random.fold_in(KEY, k), state._replace(params=params))
        updates.append({name: -np.asarray(value).ravel() for name, value in state.params.items()})
    assert float(info.gradient_norm) == 0
    total = np.linalg.norm(list(updates[-1].values()))
    sum_over_update = 4 * chosen.get("sample_rate", 1.0) / chosen.get("learning_rate", 1.0)
    if chosen.get("reduction") == "sum":
        sum_over_update /= 4
    assert float(info.noise_norm) == pytest.approx(total * sum_over_update, rel=1e-12)
    return updates


def p_values(noise: np.ndarray, scale: float) -> tuple[float, float]:
    """Two-sided, of the variance (chi square) and of the distribution (Kolmogorov-Smirnov)."""
    below = scipy.stats.chi2.cdf(np.sum((noise / scale) ** 2), noise.size)
    shape = scipy.stats.kstest(noise / scale, "norm").pvalue
    return 2 * min(below, 1 - below), shape


def assert_noise(noise: np.ndarray, scale: float) -> None:
    assert min(p_values(noise, scale)) > 1e-4
    for wrong in (2 / 3, 3 / 2):
        assert p_values(noise, wrong * scale)[0] < 1e-12


SIGMA = 1.7
NOISY: dict[str, tuple[clipping.ClippingRule, dict[str, Any], tuple[float, float]]] = {
    "flat": (Abadi(0.3), {}, (0.3 / 4, 0.3 / 4)),
    "flat, sum": (Automatic(0.3), {"reduction": "sum"}, (0.3, 0.3)),
    "layerwise, one R": (
        Abadi(0.3, scope="layerwise"),
        {},
        (0.3 * math.sqrt(2) / 4, 0.3 * math.sqrt(2) / 4),
    ),
    "layerwise, each its R": (
        PSAC([0.3, 0.4], scope="layerwise"),
        {"reduction": "sum"},
        (0.5, 0.5),
    ),
    "per group": (
        Abadi([0.3, 0.6], scope="layerwise"),
        {"noise_per_group": True},
        (0.3 * math.sqrt(2) / 4, 0.6 * math.sqrt(2) / 4),
    ),
    "global": (Global(0.3, Z=0.9), {}, (0.3 / 4, 0.3 / 4)),
    "poisson": (Abadi(0.3), {"sample_rate": 0.25}, (0.3, 0.3)),
    "poisson, sum": (
        Abadi(0.3),
        {"sample_rate": 0.25, "reduction": "sum"},
        (0.3 / 0.25, 0.3 / 0.25),
    ),
    "microbatches": (Abadi(0.3), {"microbatch_size": 3}, (0.3 / 4, 0.3 / 4)),
    "vmap": (Abadi(0.3), {"gradients": "vmap"}, (0.3 / 4, 0.3 / 4)),
}


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_has_the_scale_of_the_mechanism(name: str) -> None:
    rule, options, scales = NOISY[name]
    options = {"learning_rate": 2.0, **options}
    (update,) = noise_updates(rule, noise_multiplier=SIGMA, **options)
    for leaf, scale in zip("ab", scales, strict=True):
        assert_noise(update[leaf], 2.0 * SIGMA * scale)


def test_noise_is_independent_across_leaves_and_steps() -> None:
    first, second = noise_updates(Abadi(0.3), n_steps=2, noise_multiplier=SIGMA)
    rows = np.stack([first["a"], first["b"], second["a"], second["b"]])
    off_diagonal = np.corrcoef(rows)[np.triu_indices(4, 1)]
    assert np.max(np.abs(off_diagonal)) < 4.5 / math.sqrt(P)


def test_noise_is_added_after_clipping() -> None:
    options = {"learning_rate": 1.0}
    plain, _ = steps(build(mlp, Abadi(0.8), **options), MLP)
    noisy, (info,) = steps(build(mlp, Abadi(0.8), noise_multiplier=1e3, **options), MLP)
    noise = [a - b for a, b in zip(*map(jax.tree.leaves, (noisy, plain)), strict=True)]
    norm = float(jnp.sqrt(sum(jnp.sum(part[...] ** 2) for part in noise)))
    assert norm * N == pytest.approx(float(info.noise_norm), rel=1e-10)


# Poisson sampling: with x the identity, the update tells who was drawn


def draws(n: int, q: float, n_draws: int, **options: Any) -> tuple[np.ndarray, Any]:
    algorithm = build(
        lambda w, x: x @ w,
        Abadi(1.0),
        x=jnp.eye(n),
        targets=jnp.full((n, 1), -1.0),
        sample_rate=q,
        **options,
    )
    state = algorithm.init(jnp.zeros((n, 1)))
    keys = jax.random.split(jax.random.key(7), n_draws)
    new, info = eqx.filter_jit(eqx.filter_vmap(algorithm.step, in_axes=(0, None)))(keys, state)
    return -np.asarray(new.params)[..., 0], info


def test_poisson_batches() -> None:
    n, q, n_draws = 30, 0.3, 3000
    updates, info = draws(n, q, n_draws)
    included = updates * q * n
    np.testing.assert_allclose(included, np.round(included), atol=1e-12)
    sizes = np.asarray(info.batch_size)
    np.testing.assert_allclose(included.sum(axis=1), sizes, atol=1e-9)
    np.testing.assert_array_equal(np.sum(~np.isnan(info.norms), axis=1), sizes)
    # The batch size is binomial, neither less nor more likely.
    quantiles = scipy.stats.binom.ppf(np.linspace(0.1, 0.9, 9), n, q)
    edges = np.unique([-1, *quantiles, n])

    def p_value(rate: float) -> float:
        expected = np.diff(scipy.stats.binom.cdf(edges, n, rate)) * n_draws
        observed, _ = np.histogram(sizes, edges + 0.5)
        return scipy.stats.chisquare(observed, expected).pvalue

    assert p_value(q) > 1e-4
    assert p_value(0.9 * q) < 1e-12
    assert p_value(1.1 * q) < 1e-12
    # Each sample is drawn with the same chance, apart from the others.
    z = (included.mean(axis=0) - q) / math.sqrt(q * (1 - q) / n_draws)
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-4
    correlations = np.asarray(np.corrcoef(included.T))[np.triu_indices(n, 1)]
    assert np.max(np.abs(correlations)) < 5.5 / math.sqrt(n_draws)
    # The drift is that of the full batch, 1/n a sample: unbiased.
    full, _ = draws(n, 1.0, 1)
    np.testing.assert_allclose(full, np.full((1, n), 1 / n), rtol=1e-14)
    drift = updates.mean()
    assert abs(drift - 1 / n) < 4.5 / n * math.sqrt((1 - q) / (q * n * n_draws))


def test_poisson_sum_is_divided_by_q() -> None:
    updates, info = draws(20, 0.5, 50, reduction="sum")
    np.testing.assert_allclose(updates.sum(axis=1), info.batch_size / 0.5, rtol=1e-12)


@pytest.mark.parametrize(("n", "q"), [(3, 0.5), (100, 0.01), (1000, 0.1), (10_000, 0.02)])
def test_the_buffer_holds_every_likely_batch(n: int, q: float) -> None:
    algorithm = build(
        lambda w, x: x @ w, Abadi(1.0), x=jnp.ones((n, 1)), targets=jnp.ones(n), sample_rate=q
    )
    assert scipy.stats.binom.sf(algorithm.capacity, n, q) <= 1e-12
    assert algorithm.capacity <= n
    if n > 100:
        assert algorithm.capacity < 3 * q * n


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    updates, info = draws(2, 1e-3, 20)
    empty = np.asarray(info.batch_size) == 0
    assert empty.any()
    np.testing.assert_array_equal(updates[empty], 0)
    assert np.all(np.isfinite(info.clip_fraction))


# Runs


def test_seeds_in_parallel_equal_separate_runs() -> None:
    keys = jax.random.split(jax.random.key(5), 3)
    options = {"noise_multiplier": 0.5, "sample_rate": 0.5, "outputs": True, "test_x": X[:2]}
    together = run_linear(Abadi(0.8), key=keys, **options)
    assert together.loss.shape == (3, 5)
    assert together.outputs.shape == (3, 5, N, K)
    assert together.test_outputs.shape == (3, 5, 2, K)
    assert together.times.shape == (5,)
    for s in range(3):
        alone = run_linear(Abadi(0.8), key=keys[s], **options)
        for name in ("loss", "clip_fraction", "outputs", "test_outputs"):
            np.testing.assert_allclose(
                getattr(together, name)[s], getattr(alone, name), rtol=1e-12, atol=1e-14
            )
    assert np.std(together.loss[:, -1]) > 0
    legacy = run_linear(Abadi(0.8), key=jax.random.key_data(keys), **options)
    np.testing.assert_array_equal(legacy.loss, together.loss)


@pytest.mark.parametrize("sample_rate", often_or_slow([1.0, 0.5], [0.5]))
def test_record_every_keeps_the_last_step(sample_rate: float) -> None:
    options = {"noise_multiplier": 0.5, "sample_rate": sample_rate, "steps": 7, "outputs": True}
    every = run_linear(Abadi(0.8), **options)
    np.testing.assert_array_equal(every.steps, np.arange(8))
    np.testing.assert_allclose(every.times, 0.1 * np.arange(8), rtol=1e-15)
    for spacing, kept in ((3, [0, 3, 6, 7]), (100, [0, 7]))[: 2 if sample_rate < 1 else 1]:
        some = run_linear(Abadi(0.8), record_every=spacing, **options)
        np.testing.assert_array_equal(some.steps, kept)
        for name in ("times", "loss", "clip_fraction", "outputs"):
            np.testing.assert_allclose(
                getattr(some, name), getattr(every, name)[np.array(kept)], rtol=1e-12
            )


def test_times_are_the_running_sum_of_the_schedule() -> None:
    schedule = optax.linear_schedule(0.3, 0.1, 4)
    ours = run_linear(Abadi(0.8), learning_rate=schedule, steps=6, record_every=2)
    rates = [0.3, 0.25, 0.2, 0.15, 0.1, 0.1]
    np.testing.assert_allclose(ours.times, [0, sum(rates[:2]), sum(rates[:4]), sum(rates)])


@pytest.mark.parametrize("sample_rate", often_or_slow([1.0, 0.5], [0.5]))
def test_a_loop_of_steps_equals_a_run(sample_rate: float) -> None:
    options = {
        "noise_multiplier": 0.5,
        "sample_rate": sample_rate,
        "learning_rate": 0.1,
        "optimizer": optax.adam,
    }
    ours = run_linear(Abadi(0.8), steps=3, outputs=True, **options)
    state, _ = steps(build(linear, Abadi(0.8), **options), W, 3)
    np.testing.assert_allclose(ours.outputs[-1], linear(state.params, X), rtol=1e-12)
    np.testing.assert_allclose(ours.outputs[0], linear(W, X), rtol=1e-12)
    np.testing.assert_allclose(
        ours.loss[-1], 0.5 * np.mean(np.sum((linear(state.params, X) - Y) ** 2, axis=1)), rtol=1e-12
    )


def test_recorded_clip_fraction_is_of_the_whole_set() -> None:
    ours = run_linear(Abadi(0.8), sample_rate=0.3, steps=1)
    each = per_sample_gradients(linear, W, SQUARED, Y)
    share = np.mean(np.asarray(jax.vmap(optax.tree.norm)(each)) > 0.8)
    assert float(ours.clip_fraction[0]) == pytest.approx(share)


def test_progress_is_told() -> None:
    seen: list[float] = []
    run_linear(Abadi(0.8), steps=5, progress=seen.append)
    assert seen
    assert all(0 <= done <= 1 for done in seen)
    assert sorted(seen) == seen
    assert run_linear(Abadi(0.8), steps=5, progress=True).successful  # no terminal, no bar


def test_other_numbers_compile_no_other_program() -> None:
    traces = []

    def counted(params: Any, x: jax.Array) -> jax.Array:
        if isinstance(params["a"]["W"], jax.core.Tracer):
            traces.append(x.shape)
        return mlp(params, x)

    def go(R: float, rate: float, sigma: float, seed: int) -> Any:
        rule = Abadi(R)
        return run(
            rule,
            apply_fn=counted,
            learning_rate=rate,
            noise_multiplier=sigma,
            key=jax.random.key(seed),
        )

    first = go(0.8, 0.1, 1.0, 0)
    before = len(traces)
    assert before > 0
    second = go(0.4, 0.3, 0.5, 1)
    assert len(traces) == before
    assert float(second.loss[-1]) != float(first.loss[-1])


# Precision


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "gradients"), [("flat", "structured"), ("layerwise", "vmap")], ids=str
)
def test_float32_stays_float32(scope: Scope, gradients: Gradients) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MLP)
    rule = Abadi(0.8, scope=scope)
    options = {
        "x": X.astype(jnp.float32),
        "targets": Y.astype(jnp.float32),
        "optimizer": optax.adam,
        "learning_rate": 0.1,
        "gradients": gradients,
    }
    noisy = {"noise_multiplier": 0.1, "sample_rate": 0.5, "microbatch_size": 2}
    state, (info,) = steps(build(mlp, rule, **options, **noisy), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moments = jax.tree.leaves(state.optimizer_state)
    assert {m.dtype for m in moments if m.ndim} == {jnp.dtype("float32")}
    assert info.norms.dtype == jnp.float32
    single = run(rule, params=params, **options)
    assert single.loss.dtype == jnp.float32
    double = run(rule, **{**options, "x": X, "targets": Y})
    np.testing.assert_allclose(single.loss, double.loss, rtol=1e-3)


@pytest.mark.parametrize("gradients", often_or_slow(["structured", "vmap"], ["structured"]))
def test_float32_parameters_with_other_targets(gradients: Gradients) -> None:
    options: dict[str, Any] = {"loss": SOFTMAX, "gradients": gradients, "steps": 2}
    reference = run_linear(Abadi(0.8), targets=LABELS, **options)
    options.update(params=W.astype(jnp.float32), x=X.astype(jnp.float32))
    for targets in (np.eye(K)[LABELS], np.eye(K, dtype=int)[LABELS], LABELS):
        ours = run_linear(Abadi(0.8), targets=targets, **options)
        np.testing.assert_allclose(ours.loss, reference.loss, rtol=1e-5)


# Trouble


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("flat", {}),
        ("layerwise", {}),
        ("flat", {"gradients": "vmap"}),
        ("layerwise", {"microbatch_size": 2}),
    ],
)
def test_a_sample_with_a_gradient_that_is_not_finite_is_dropped(scope: Scope, options: Any) -> None:
    params = random_like({"a": (D, K), "b": (D, K)})
    x = X.at[2].set(0.0)
    keep = jnp.array([0, 1, 3, 4, 5])
    rule = Abadi(0.8, scope=scope)
    common = {"reduction": "sum", **options}
    state, (info,) = steps(build(kinked, rule, x=x, **common), params)
    others, _ = steps(build(kinked, rule, x=x[keep], targets=Y[keep], **common), params)
    assert_trees_close(state.params, others.params)
    assert int(info.dropped) == 1
    assert int(info.batch_size) == N
    norms = np.atleast_2d(info.norms)
    assert not np.isfinite(norms[:, 2]).all()
    assert np.isfinite(norms[:, keep]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("start", [1.0, 1.7, 3.0, 4.0])
def test_divergence_is_reported(start: float, dtype: Any) -> None:
    one = jnp.ones((1, 1), dtype)
    ours = run(
        NoClipping(),
        apply_fn=linear,
        params=start * one,
        x=2 * one,
        targets=0 * one,
        learning_rate=1.5,
        steps=400,
        record_every=20,
    )
    assert not ours.successful
    assert "it diverges (lower the learning rate)" in ours.message


# Theory


@pytest.mark.parametrize("gradients", often_or_slow(["structured", "vmap"], ["structured"]))
def test_only_eta_times_R_counts_while_every_sample_is_clipped(gradients: Gradients) -> None:
    """C11. The noise scales with R, so the same key gives the same weights, noise included."""
    runs = [
        run(
            Abadi(R),
            targets=100 * Y,
            learning_rate=rate,
            steps=20,
            noise_multiplier=0.5,
            gradients=gradients,
            outputs=True,
        )
        for R, rate in ((0.1, 0.1), (0.01, 1.0), (0.001, 10.0))
    ]
    assert all(np.all(ours.clip_fraction == 1) for ours in runs)
    moved = np.max(np.abs(runs[0].outputs[-1] - runs[0].outputs[0]))
    for ours in runs[1:]:
        np.testing.assert_allclose(ours.outputs, runs[0].outputs, atol=1e-11 * moved, rtol=1e-11)


@pytest.mark.parametrize(
    "rule", [Abadi(HUGE), pytest.param(Abadi(HUGE, scope="layerwise"), marks=pytest.mark.slow)]
)
def test_R_above_every_norm_is_gradient_descent(rule: clipping.ClippingRule) -> None:
    """C16."""
    losses_, _ = train(optax.sgd, 0.3, 10)
    ours = run(rule, targets=LABELS, loss=SOFTMAX, learning_rate=0.3, steps=10)
    np.testing.assert_allclose(ours.loss, losses_, rtol=1e-13)


@pytest.mark.parametrize("gradients", often_or_slow(["structured", "vmap"], ["vmap"]))
def test_the_global_rule_that_screens_nothing_is_slower_gradient_descent(
    gradients: Gradients,
) -> None:
    """C18: gradient descent at learning rate eta R/Z."""
    rate, R, Z = 0.3, 2.0, 50.0
    losses_, _ = train(optax.sgd, rate * R / Z, 10)
    ours = run(
        Global(R, Z=Z),
        targets=LABELS,
        loss=SOFTMAX,
        learning_rate=rate,
        steps=10,
        gradients=gradients,
    )
    np.testing.assert_allclose(ours.loss, losses_, rtol=1e-13)


def test_clipped_edge_of_stability() -> None:
    """C21: a two-cycle of amplitude eta R sqrt(h), where unclipped training diverges."""
    rate, h, R = 1.5, 4.0, 1.0
    one = jnp.ones((1, 1))
    options = {
        "apply_fn": linear,
        "params": 3.7 * one,
        "x": 2 * one,
        "targets": 0 * one,
        "learning_rate": rate,
        "outputs": True,
    }
    ours = run(Abadi(R), steps=60, **options)
    a = np.asarray(ours.outputs)[20:, 0, 0]
    np.testing.assert_allclose(np.abs(a[1:]) + np.abs(a[:-1]), rate * R * math.sqrt(h), rtol=1e-12)
    np.testing.assert_allclose(a[2:], a[:-2], rtol=1e-12)
    mean_of_cycle = np.mean(np.asarray(ours.loss)[20:60])
    assert mean_of_cycle >= rate**2 * R**2 * h / 8
    unclipped = run(NoClipping(), steps=60, **options)
    np.testing.assert_allclose(
        unclipped.outputs[:, 0, 0], 7.4 * (-5.0) ** np.arange(61), rtol=1e-12
    )


# Transformations


def test_vmap_over_clipping_norms_rates_and_noise() -> None:
    def last(R: Any, rate: Any, sigma: Any) -> jax.Array:
        options = {"learning_rate": rate, "noise_multiplier": sigma, "steps": 2}
        return run_linear(Abadi(R), **options).loss[-1]

    settings = np.array([[0.8, 0.1, 0.5], [0.4, 0.1, 0.5], [0.8, 0.2, 0.5], [0.8, 0.1, 1.5]])
    separate = [last(*row) for row in settings.tolist()]
    assert len({float(value) for value in separate}) == 4
    np.testing.assert_allclose(jax.vmap(last)(*settings.T), separate, rtol=1e-12)


def test_jit_around_a_run() -> None:
    def last(rate: Any) -> jax.Array:
        return run_linear(Abadi(0.8), learning_rate=rate, steps=2).loss[-1]

    np.testing.assert_allclose(jax.jit(last)(0.5), last(0.5), rtol=1e-12)


# Bad input


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x": jnp.zeros((0, D))}, ValueError, r"x must have shape .* n >= 1, got \(0, 5\)"),
        ({"x": X[:, 0]}, ValueError, r"x must have shape \(n, \.\.\.\) .* got \(6,\)"),
        ({"x": X[:, :-1]}, ValueError, r"apply_fn\(params, x\) fails for x of shape \(6, 4\)"),
        ({"targets": Y[:-1]}, ValueError, r"targets must have one row a sample, 6, got .*\(5, 3\)"),
        ({"targets": Y[:, :-1]}, ValueError, r"targets must have .* \(6, 3\), got \(6, 2\)"),
        ({"targets": jnp.asarray(1.0)}, ValueError, r"targets must have one row a sample"),
        ({"x": X.at[0, 0].set(jnp.nan)}, ValueError, "x must be finite, got 1 NaN"),
        ({"x": X.at[0].set(jnp.inf)}, ValueError, "x must be finite, got 5 NaN or infinite of 30"),
        ({"targets": Y.at[1, 0].set(jnp.inf)}, ValueError, "targets must be finite, got 1"),
        (
            {"params": {**MLP, "a": {"W": MLP["a"]["W"] * jnp.nan, "b": MLP["a"]["b"]}}},
            ValueError,
            r"params\['a'\]\['W'\] must be finite, got 20",
        ),
        ({"params": {}}, ValueError, "params must hold at least one array"),
        (
            {"params": jax.tree.map(lambda w: w.astype(int), MLP)},
            TypeError,
            r"params\['a'\].*int64",
        ),
        ({"targets": LABELS + 1, "loss": SOFTMAX}, ValueError, r"targets must be labels in 0..2"),
        ({"targets": LABELS - 1, "loss": SOFTMAX}, ValueError, "from -1 to 1"),
        ({"targets": LABELS, "loss": losses.Logistic()}, ValueError, "targets must lie in|one out"),
        ({"rule": Abadi([1.0], scope="layerwise")}, ValueError, "R has 1 entries for 2"),
        ({"rule": Abadi([1.0] * 3, scope="layerwise")}, ValueError, "R has 3 entries for 2"),
        ({"noise_multiplier": -0.1}, ValueError, "noise_multiplier must be at least 0 .* -0.1"),
        ({"noise_multiplier": np.nan}, ValueError, "noise_multiplier must be at least 0 .* nan"),
        ({"rule": NoClipping(), "noise_multiplier": 1.0}, ValueError, "NoClipping, whose .* 1.0"),
        ({"rule": Batch(1.0), "noise_multiplier": 1.0}, ValueError, "with Batch, whose sens"),
        ({"rule": Batch(1.0), "microbatch_size": 2}, ValueError, "microbatch_size must be None"),
        ({"sample_rate": 0.0}, ValueError, r"sample_rate must be in \(0, 1\], got 0.0"),
        ({"sample_rate": 1.5}, ValueError, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"sample_rate": np.nan}, ValueError, r"sample_rate must be in \(0, 1\], got nan"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive .* got 0.0"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be positive .* got -0.1"),
        ({"learning_rate": np.inf}, ValueError, "learning_rate must be positive .* got inf"),
        ({"learning_rate": optax.linear_schedule(0.1, -0.3, 3)}, ValueError, "got -0.3"),
        ({"learning_rate": np.array([0.1, 0.2])}, ValueError, "learning_rate must be"),
        ({"noise_multiplier": np.array([0.1, 0.2])}, ValueError, "noise_multiplier must be"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"record_every": 0}, ValueError, "record_every must be at least 1, got 0"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1, got 0"),
        ({"noise_per_group": True}, ValueError, "noise_per_group=True needs .*layerwise"),
        ({"groups": {"c": 1}, "rule": Abadi(1.0, scope="layerwise")}, ValueError, "groups must be"),
        ({"test_targets": Y}, ValueError, "test_targets need test_x"),
        ({"test_x": X, "test_targets": Y[:-1]}, ValueError, "test_targets must have one row"),
        ({"test_x": X * jnp.nan, "test_targets": Y}, ValueError, "test_x must be finite"),
        ({"test_x": X[:, :2]}, ValueError, r"test_x of shape \(6, 2\)"),
        ({"test_x": 3.0, "test_targets": Y}, ValueError, r"test_x must have shape"),
        ({"key": jax.random.split(KEY, (2, 2))}, ValueError, r"key must be one key .* \(2, 2\)"),
        ({"key": jnp.zeros(3, jnp.uint32)}, (TypeError, ValueError), "^key must"),
        ({"apply_fn": lambda p, x: mlp(p, x)[:, 0]}, ValueError, r"shape \(n, K\) .* got \(6,\)"),
        (
            {"apply_fn": lambda p, x: mlp(p, x - x.mean(axis=0))},
            ValueError,
            "apply_fn couples the samples of a batch",
        ),
    ],
)
def test_bad_input(wrong: dict[str, Any], error: Any, match: str) -> None:
    options = {"rule": Abadi(0.8), **wrong}
    with pytest.raises(error, match=match):
        run(options.pop("rule"), **options)


def test_a_wrong_key_is_refused_before_work() -> None:
    def untouched(params: Any, x: jax.Array) -> jax.Array:
        raise AssertionError("the model was called")

    loss, rule, keys = losses.SquaredError(), Abadi(0.8), jax.random.split(KEY, (2, 2))
    with pytest.raises(ValueError, match="key must be one key"):
        dp_sgd.run(untouched, W, X, Y, loss, rule, learning_rate=0.1, steps=1, key=keys)
    phases = [Phase(1, rule, learning_rate=0.1)]
    with pytest.raises(ValueError, match="key must be one key"):
        dp_sgd.run_phases(untouched, W, X, Y, loss, phases, key=keys)


SEEN_BY_USERS = """
import warnings; warnings.simplefilter("error")
import jax, jax.numpy as jnp, optax
from ntkdp import clipping, dp_sgd, losses
from ntkdp.clipping import Abadi

def run(rule=Abadi(1.0), loss=losses.SquaredError(), targets=jnp.ones((2, 1)), **options):
    options = {"learning_rate": 0.1, "steps": 1, "key": jax.random.key(0), **options}
    return dp_sgd.run(lambda w, x: x @ w, jnp.ones((1, 1)), jnp.ones((2, 1)), targets, loss, rule,
                      **options)

def expect(message, call):
    try:
        call()
    except (TypeError, ValueError) as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError("no error: " + message)

expect("unknown reduction 'avg'; known: mean, sum", lambda: run(reduction="avg"))
expect("unknown gradients 'vmp'; did you mean 'vmap'?", lambda: run(gradients="vmp"))
expect("unknown scope 'layer'; did you mean 'layerwise'?", lambda: Abadi(1.0, scope="layer"))
expect("loss must be one of ntkdp.losses", lambda: run(loss="huber"))
expect("clipping must be a rule of ntkdp.clipping", lambda: run(rule=0.5))
expect("clipping must be a rule of ntkdp.clipping", lambda: run(rule=Abadi))
expect("steps must be a whole number, got 1.5", lambda: run(steps=1.5))
expect("learning_rate must be a number, got 'fast'", lambda: run(learning_rate="fast"))
expect("targets must be real numbers, got None", lambda: run(targets=None))
expect("key must be a JAX PRNG key, e.g. jax.random.key(0), got", lambda: run(key=0))
expect("sample_rate must be", lambda: run(sample_rate=jnp.array([0.1, 0.2])))
expect("function must map norms to factors, got 0.5", lambda: clipping.Custom(0.5, 1.0))
expect("optimizer must be", lambda: run(optimizer=optax.adam(0.1)))
assert run().loss.dtype == jnp.float32
print("all seen")
"""


def test_messages_where_no_type_checker_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEEN_BY_USERS],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all seen"


def test_plain_gradients_run_without_the_engine(mutate: Callable[[Any, str, Any], None]) -> None:
    """A run that is to disagree with predictions must not go through what they are made of."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the engine was used")

    for name in ("trace", "factored", "for_norms", "grouped_norms", "keep", "weighted_sum"):
        mutate(per_sample, name, refuse)
    w, x, y = jnp.ones((2, 1)), jnp.ones((3, 2)), jnp.zeros((3, 1))

    def run(gradients: Any) -> Any:
        return dp_sgd.run(
            lambda w, x: x @ w, w, x, y, SQUARED, Abadi(1.0), learning_rate=0.1, steps=2,
            gradients=gradients, microbatch_size=2, key=KEY,
        )  # fmt: skip

    loss = run("vmap").loss
    assert loss[-1] < loss[0]
    with pytest.raises(AssertionError, match="the engine was used"):
        run("structured")
