"""Privacy as a mechanism: what one sample can do to a step, and what an attacker learns of it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

from ntkdp import dp_sgd, losses, privacy
from ntkdp.clipping import PSAC, Abadi, Automatic, ClippingRule, Custom, Global, Scope
from ntkdp.dp_sgd._algorithm import Algorithm

slow = pytest.mark.slow

# ---------------------------------------------------------------------------- sensitivity
# A step without noise at learning rate 1 and with the sum moves the parameters by the clipped sum:
# the difference of two such steps is what one sample more or less does, by the public face alone.

N, D, K = 5, 6, 3


def mlp(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["a"]["W"] + params["a"]["b"])
    return hidden @ params["b"]["W"] + params["b"]["b"]


def cnn(params: Any, x: Any) -> Any:
    images = x.reshape(-1, 2, 3, 1)
    hidden = jax.lax.conv_general_dilated(
        images, params["a"]["W"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(hidden + params["a"]["b"]).mean(axis=(1, 2)) @ params["b"]["W"]


def attention(params: Any, x: Any) -> Any:
    tokens = x.reshape(-1, 3, 2) @ params["a"]["embed"]
    weights = jax.nn.softmax(tokens @ params["b"]["q"] @ jnp.swapaxes(tokens, 1, 2) / 2.0)
    tokens = tokens + weights @ tokens @ params["b"]["v"]
    tokens = tokens / jnp.sqrt(jnp.mean(tokens**2, axis=-1, keepdims=True) + 1e-6)
    return tokens.mean(axis=1) @ params["c"]["W"]


MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    "mlp": (
        mlp,
        {
            "a": {"W": normal(0, D, 4), "b": normal(1, 4)},
            "b": {"W": normal(2, 4, K), "b": normal(3, K)},
        },
    ),
    "cnn": (
        cnn,
        {"a": {"W": normal(0, 2, 2, 1, 4), "b": normal(1, 4)}, "b": {"W": normal(2, 4, K)}},
    ),
    "attention": (
        attention,
        {
            "a": {"embed": normal(0, 2, 4)},
            "b": {"q": normal(1, 4, 4), "v": normal(2, 4, 4)},
            "c": {"W": normal(3, 4, K)},
        },
    ),
}


def rules(scope: Any, R: Any) -> dict[str, ClippingRule]:
    return {
        "abadi": Abadi(R, scope=scope),
        "global": Global(R, scope=scope),
        "automatic": Automatic(R, gamma=0.0, scope=scope),
        "psac": PSAC(R, r=0.01, scope=scope),
        "custom": Custom(function=lambda s: 0.2 * jnp.cos(s) / (1 + s), R=R, scope=scope),
    }


#: Every rule once; slow are both scopes of all, and of other networks what shortens and what
#: lengthens gradients.
QUICK_CASES: list[tuple[str, str, Scope]] = [
    ("mlp", "abadi", "flat"),
    ("mlp", "global", "layerwise"),
    ("mlp", "psac", "flat"),
    ("mlp", "custom", "layerwise"),
    ("attention", "automatic", "layerwise"),
]
SENSITIVITY_CASES = [
    pytest.param(model, rule, scope, marks=[] if (model, rule, scope) in QUICK_CASES else slow)
    for model in MODELS
    for rule in ("abadi", "automatic", "global", "psac", "custom")
    for scope in ("flat", "layerwise")
    if model == "mlp" or rule in ("abadi", "automatic")
]

SCALES = np.array([1.0, 1e-30, 1e30, 1e200, 1e308])


@pytest.mark.parametrize(("model", "rule", "scope"), SENSITIVITY_CASES)
def test_one_sample_moves_a_step_by_at_most_the_sensitivity(
    model: str, rule: str, scope: Scope
) -> None:
    apply_fn, params = MODELS[model]
    n_groups = len(params)
    R = 0.7 if scope == "flat" else np.linspace(0.2, 0.9, n_groups)
    clip = rules(scope, R)[rule]

    @jax.jit
    def clipped_sum(x: Any, y: Any) -> tuple[Any, Any]:
        algorithm = dp_sgd.build(
            apply_fn, x, y, losses.SquaredError(), clip, learning_rate=1.0, reduction="sum"
        )
        state, info = algorithm.step(jax.random.key(0), algorithm.start(params))
        return jax.tree.map(lambda w, v: w - v, params, state.params), info

    def norms_by_group(difference: Any) -> np.ndarray:
        leaves = [jax.tree.leaves(group) for group in difference.values()]
        return np.sqrt([sum(float(jnp.sum(v**2)) for v in group) for group in leaves])

    rng = np.random.default_rng(0)
    largest = 0.0
    for scale in SCALES:
        x, y = rng.standard_normal((N, D)), rng.standard_normal((N, K))
        x[-1] *= scale
        y[-1] *= min(scale, 1e100)
        with_it, info = clipped_sum(x, y)
        without_it, _ = clipped_sum(x[:-1], y[:-1])
        moved = norms_by_group(jax.tree.map(jnp.subtract, with_it, without_it))
        assert np.all(np.isfinite(moved))
        assert np.linalg.norm(moved) <= clip.sensitivity(n_groups) * (1 + 1e-9)
        if scope == "layerwise":  # so that noise in proportion to each R_r keeps its promise too
            assert np.all(moved <= R * (1 + 1e-9))
        whole = float(np.linalg.norm(norms_by_group(with_it)))
        np.testing.assert_allclose(info.gradient_norm, whole, rtol=1e-9)
        share = float(np.linalg.norm(moved) / clip.sensitivity(n_groups))
        largest = max(largest, share)
    if rule in ("abadi", "automatic"):
        assert largest > 1 - 1e-6  # the bound is met: a smaller sensitivity would be broken


def test_a_sample_without_a_finite_gradient_moves_nothing() -> None:
    apply_fn, params = MODELS["mlp"]
    loss = losses.Custom(lambda f, y: jnp.sum((f - y) ** 2) * jnp.where(y[0] > 5, jnp.nan, 1.0))
    x, y = normal(4, N, D), np.array(normal(5, N, K))
    y[-1] = 9.0
    for rule in (Abadi(0.7), Automatic(0.7, gamma=0.0)):

        @jax.jit
        def step(x: Any, y: Any, rule: ClippingRule = rule) -> tuple[Any, Any]:
            algorithm = dp_sgd.build(apply_fn, x, y, loss, rule, learning_rate=1.0, reduction="sum")
            state, info = algorithm.step(jax.random.key(0), algorithm.start(params))
            return state.params, info.dropped

        sums = []
        for rows in (slice(None), slice(-1)):
            moved, dropped = step(x[rows], y[rows])
            assert int(dropped) == (rows == slice(None))
            sums.append(np.concatenate([np.ravel(v) for v in jax.tree.leaves(moved)]))
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-12)


# ---------------------------------------------------------------------------- membership
# The canary has an input coordinate of its own and a target so far away that its gradient is
# clipped at every step: the strongest sample there is against this mechanism. The attacker sees
# the network's output at that coordinate after every step, and nothing else depends on the canary.

RUNS, DELTA, CONFIDENCE = 16_000, 1e-3, 0.99
CLIP_NORM, RATE, STEPS, FAR = 1.0, 0.1, 16, 1e3

#: Noise multiplier and sampling rate: mu = 1 with full batches, and Poisson sampling.
MECHANISMS = [(4.0, 1.0), (2.0, 0.5)]


def scores(
    canary: bool, sigma: float, q: float, *, runs: int = RUNS, far: float = FAR, seed: int = 7
) -> np.ndarray:
    """The attacker's log likelihood ratio of both data sets, of many runs on one of them."""
    key = jax.random.split(jax.random.key(2 * seed + canary), runs)
    path = paths(canary, sigma, q, key, far)
    # One if the canary was drawn and zero if not, and noise of deviation sigma.
    seen = np.diff(path, axis=1) * q / (RATE * CLIP_NORM)
    never = np.log1p(-q) if q < 1 else -np.inf
    ratio: np.ndarray = np.logaddexp(never, np.log(q) + (seen - 0.5) / sigma**2)
    return ratio.sum(axis=1)


def paths(canary: bool, sigma: float, q: float, key: Any, far: float = FAR) -> np.ndarray:
    """The network's output at the canary's coordinate after each step, of a run for each key."""
    rng = np.random.default_rng(1)
    x = np.zeros((4, 4))
    x[:, :3] = rng.standard_normal((4, 3))
    y = rng.standard_normal((4, 1))
    own = np.array([[0.0, 0.0, 0.0, 1.0]])
    if canary:
        x, y = np.concatenate([x, own]), np.concatenate([y, [[far]]])
    run = dp_sgd.run(
        lambda params, x: x @ params["W"],
        {"W": jnp.zeros((4, 1))},
        x,
        y,
        losses.SquaredError(),
        Abadi(CLIP_NORM),
        learning_rate=RATE,
        steps=STEPS,
        noise_multiplier=sigma,
        sample_rate=q,
        reduction="sum",
        test_x=own,
        outputs=True,
        key=key,
    )
    assert run.test_outputs is not None
    return np.asarray(run.test_outputs[..., 0, 0])


def audit(present: np.ndarray, absent: np.ndarray) -> privacy.Audit:
    return privacy.audit(present, absent, DELTA, confidence=CONFIDENCE)


def audit_of(sigma: float, q: float, **options: Any) -> privacy.Audit:
    return audit(scores(True, sigma, q, **options), scores(False, sigma, q, **options))


def promised(sigma: float, q: float) -> float:
    return privacy.epsilon(sigma, q, STEPS, DELTA)


@pytest.mark.parametrize(("sigma", "q"), [pytest.param(*MECHANISMS[0], marks=slow), MECHANISMS[1]])
def test_the_attacker_learns_no_more_than_promised_and_nearly_as_much(
    sigma: float, q: float
) -> None:
    found, bound = audit_of(sigma, q), promised(sigma, q)
    assert (0.5 if q == 1 else 0.4) * bound < found.epsilon < bound
    if q == 1:
        assert 0.7 * bound < found.gaussian_epsilon < bound


def test_runs_of_one_key_share_their_noise_and_hide_nothing_from_each_other() -> None:
    key = jax.random.split(jax.random.key(0), 3)
    difference = paths(True, 4.0, 1.0, key) - paths(False, 4.0, 1.0, key)
    clipped = RATE * CLIP_NORM * np.arange(STEPS + 1)
    np.testing.assert_allclose(difference, np.tile(clipped, (3, 1)), rtol=1e-9, atol=1e-12)


def test_without_a_canary_there_is_nothing_to_find() -> None:
    found = audit(scores(False, 4.0, 1.0, runs=4000), scores(False, 4.0, 1.0, runs=4000, seed=8))
    assert found.epsilon < 0.2
    assert found.gaussian_epsilon < 0.2


@slow
@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_a_third_of_the_noise_is_found_out(
    sigma: float, q: float, mutate: Callable[[Any, str, Any], None]
) -> None:
    noise = Algorithm._noise

    def third(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf / 3, noise(*arguments))

    mutate(Algorithm, "_noise", third)
    assert audit_of(sigma, q).epsilon > 1.2 * promised(sigma, q)


@pytest.mark.parametrize(("sigma", "q"), [MECHANISMS[0], pytest.param(*MECHANISMS[1], marks=slow)])
def test_a_gradient_that_is_not_clipped_is_found_out(
    sigma: float, q: float, mutate: Callable[[Any, str, Any], None]
) -> None:
    mutate(Abadi, "_weight", lambda self, s, R: jnp.ones_like(s))
    found = audit_of(sigma, q, far=10 * CLIP_NORM, runs=4000)
    assert found.epsilon > 1.2 * promised(sigma, q)


# ---------------------------------------------------------------------------- cancellation
# A sample of two large and nearly equal views, whose gradients cancel in single precision: were its
# norm found too small, it would be clipped too little. The attacker knows both data sets and looks
# along the sample's own part of the sum.


def difference_of_views(params: Any, x: Any) -> Any:
    def branch(h: Any) -> Any:
        return jax.nn.relu(h @ params["w"]) @ params["v"]

    return branch(x[:, 0]) - branch(x[:, 1])


def steps_of_views(
    rule: ClippingRule, seed: int, keys: Any, sigma: float, rows: slice
) -> np.ndarray:
    """Steps with those rows, ``(runs, weights)``, in the sum form at rate 1."""
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.standard_normal((64, 64)) / 8, jnp.float32),
        "v": jnp.asarray(rng.standard_normal((64, 1)) / 8, jnp.float32),
    }
    view, gap = rng.standard_normal((2, 64))
    view *= 1e4 / np.linalg.norm(view)
    gap *= 2.4 / np.linalg.norm(gap)
    pairs = rng.standard_normal((4, 2, 64))
    pairs[-1] = view, view + gap
    x, y = pairs.astype(np.float32), rng.standard_normal((4, 1)).astype(np.float32)
    algorithm = dp_sgd.build(
        difference_of_views, x[rows], y[rows], losses.SquaredError(), rule,
        learning_rate=1.0, noise_multiplier=sigma, reduction="sum",
    )  # fmt: skip
    start = algorithm.init(params)
    moved = jax.jit(jax.vmap(lambda key: algorithm.step(key, start)[0].params))(keys)
    steps = np.concatenate([np.reshape(v, (len(keys), -1)) for v in moved.values()], 1)
    return steps.astype(float)


@slow
@pytest.mark.parametrize("rule", [Automatic(0.1), Abadi(0.1)], ids=["automatic", "abadi"])
def test_views_that_cancel_give_no_sample_away(rule: ClippingRule) -> None:
    sigma, trials = 20.0, 400
    bound = privacy.epsilon(sigma, 1.0, 1, DELTA)
    assert bound < 0.17
    # Of the data drawn with this seed a sum over pairs of positions finds next to no norm.
    seed, with_it, without_it = 2, slice(None), slice(-1)
    one = jax.random.split(jax.random.key(0), 1)
    quiet = (steps_of_views(rule, seed, one, 0.0, rows) for rows in (with_it, without_it))
    direction = np.subtract(*quiet)[0]
    assert np.linalg.norm(direction) <= rule.sensitivity() * (1 + 1e-4)
    direction /= np.linalg.norm(direction)
    keys = jax.random.split(jax.random.key(1), (2, 2 * trials))
    present = steps_of_views(rule, seed, keys[0], sigma, with_it) @ direction
    absent = steps_of_views(rule, seed, keys[1], sigma, without_it) @ direction
    assert audit(present, absent).epsilon <= bound


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_with_more_runs_the_bounds_close_in(sigma: float, q: float) -> None:
    found, bound = audit_of(sigma, q, runs=200_000), promised(sigma, q)
    assert 0.65 * bound < found.epsilon < bound
    if q == 1:
        assert 0.9 * bound < found.gaussian_epsilon < bound


def _print_table() -> None:
    """The numbers of docs/privacy_audit.md."""
    noise = Algorithm._noise

    def third(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf / 3, noise(*arguments))

    unclipped = (Abadi, "_weight", lambda self, s, R: jnp.ones_like(s))
    rows: list[tuple[str, Any, dict[str, Any]]] = [
        ("as it is", None, {}),
        ("as it is, 200,000 runs", None, {"runs": 200_000}),
        ("a third of the noise", (Algorithm, "_noise", third), {}),
        ("no clipping", unclipped, {"far": 10 * CLIP_NORM}),
    ]
    for sigma, q in MECHANISMS:
        print(f"sigma = {sigma}, q = {q}: epsilon promised {promised(sigma, q):.3f}")
        for name, patched, options in rows:
            jax.clear_caches()
            eqx.clear_caches()
            with mock.patch.object(*patched) if patched else nullcontext():
                found = audit_of(sigma, q, **options)
            print(f"  {name:<24} {found.epsilon:.2f}  {found.gaussian_epsilon:.2f}")


if __name__ == "__main__":
    _print_table()
