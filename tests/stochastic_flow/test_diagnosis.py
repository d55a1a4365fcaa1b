"""Diagnoses: stability against closed forms, noise and movement against their definitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkdp
from ntkdp import clipping, diagnose, losses, optimizers, stochastic_flow

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((8, 2)))
WEIGHTS = jnp.asarray(np.random.default_rng(2).standard_normal((4, 2)))
SQUARED = losses.SquaredError()
LARGEST = float(jnp.linalg.eigvalsh(X.T @ X / 8)[-1])


def linear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def of_linear(**options: Any) -> stochastic_flow.Diagnosis:
    rule = options.pop("rule", clipping.NoClipping())
    settings: dict[str, Any] = {"learning_rate": 0.1, "steps": 5} | options
    return diagnose(linear, WEIGHTS, (X, Y), SQUARED, rule, **settings)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (None, 2.0),
        (optimizers.SGD(momentum=0.9), 2 * 1.9),
        (optimizers.SGD(momentum=0.5, average=0.9), 2 * 1.5),
        # Damped modes of Nesterov's momentum: |z| = 1 at z = -1.
        (optimizers.SGD(momentum=0.5, nesterov=True), 2 * 1.5 / (1 + 2 * 0.5)),
    ],
)
def test_the_largest_stable_rate_of_a_quadratic(optimizer: Any, expected: float) -> None:
    seen = of_linear(optimizer=optimizer)
    assert seen.stable_learning_rate == pytest.approx(expected / LARGEST, rel=1e-2)


def test_steps_grow_above_that_rate_and_not_below() -> None:
    stable = of_linear().stable_learning_rate
    assert stable is not None
    flow = ntkdp.KernelFlow(
        ntkdp.empirical_ntk(linear, WEIGHTS, X), Y, SQUARED, clipping.NoClipping()
    )
    for factor, grows in ((0.97, False), (1.03, True)):
        path = ntkdp.recursion(flow, X @ WEIGHTS, learning_rate=stable * factor, steps=300)
        assert bool(path.loss[-1] > path.loss[0]) == grows


def test_clipping_stretches_the_stable_rate() -> None:
    # The global rule scales every gradient by R / Z.
    seen = of_linear(rule=clipping.Global(25.0, Z=100.0))
    assert seen.stable_learning_rate == pytest.approx(8 / LARGEST, rel=1e-2)


def test_noise_of_weights_is_that_of_the_runs() -> None:
    params = [WEIGHTS * 3]
    noise: dict[str, Any] = {"learning_rate": 0.1, "steps": 30, "noise_multiplier": 2.0}
    for optimizer in (None, optimizers.SGD(momentum=0.8)):
        seen = diagnose(
            lambda p, x: x @ p[0], params, (X, Y), SQUARED, clipping.Abadi(1.0),
            optimizer=optimizer, **noise,
        )  # fmt: skip
        variance = stochastic_flow.weight_noise_variance(
            clipping.Abadi(1.0), 8, optimizer=optimizer, **noise
        )
        expected = float(variance[-1, 0] / jnp.mean(params[0] ** 2))
        assert seen.weight_noise == pytest.approx(expected)


def test_noise_under_adam_where_it_dominates() -> None:
    rate, steps = 0.01, 200
    seen = diagnose(
        linear, WEIGHTS, (X, Y), SQUARED, clipping.Abadi(1e-3), learning_rate=rate, steps=steps,
        noise_multiplier=100.0, optimizer=optimizers.Adam(),
    )  # fmt: skip
    # Each step is a signed unit of noise times the rate, up to the bias of the first moment.
    expected = rate**2 * steps / float(jnp.mean(WEIGHTS**2))
    assert seen.weight_noise == pytest.approx(expected, rel=0.15)


def test_movement_of_the_kernel() -> None:
    # f = x w^2 has the kernel 4 x^2 w^2: from w = 1 to its end, without clipping.
    x, w, y = jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.full((1, 1), 0.25)
    seen = diagnose(
        lambda w, x: x @ w**2, w, (x, y), SQUARED, clipping.NoClipping(), learning_rate=0.1,
        steps=200,
    )  # fmt: skip
    assert seen.kernel_movement == pytest.approx(0.75, abs=1e-6)
    assert of_linear().kernel_movement == pytest.approx(0.0, abs=1e-12)


def test_groups_that_a_frozen_kernel_never_trains() -> None:
    params = {"base": WEIGHTS, "a": jnp.ones((4, 2)), "b": jnp.zeros((2, 2))}
    seen = diagnose(
        lambda p, x: x @ (p["base"] + p["a"] @ p["b"]), params, (X, Y), SQUARED,
        clipping.Abadi(1.0), learning_rate=0.1, steps=5, noise_multiplier=1e-3,
    )  # fmt: skip
    assert seen.still_groups == ("a",)
    assert seen.method == "response"
    assert "never trains a." in str(seen)


def test_what_is_trusted() -> None:
    still = of_linear(rule=clipping.Abadi(1.0), noise_multiplier=1e-3)
    assert (still.method, still.cautions) == ("frozen", ())
    assert of_linear(rule=clipping.Abadi(1.0)).method == "response"
    strong = of_linear(
        rule=clipping.Abadi(1.0), noise_multiplier=100.0, sample_rate=0.25, learning_rate=20.0
    )
    assert strong.method == "response"
    text = " ".join(strong.cautions)
    for part in ("above the largest stable one", "v(T) is", "a batch has 2.0 samples"):
        assert part in text
    assert "prediction to trust" in str(strong)


def test_the_response_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkdp.stochastic_flow import _diagnosis

    monkeypatch.setattr(_diagnosis, "is_room", lambda *_: False)
    seen = of_linear(rule=clipping.Abadi(1.0), noise_multiplier=10.0)
    assert seen.method == "shifted"
    assert "do not fit the memory" in str(seen)


def test_layerwise_clipping_and_a_model_of_the_package() -> None:
    model = ntkdp.models.mlp([16], 2)
    params = model.init(jax.random.key(0), X)
    seen = diagnose(
        model, params, (X, Y), SQUARED, clipping.Abadi(0.5, scope="layerwise"), learning_rate=0.5,
        steps=10, noise_multiplier=0.5, noise_per_group=True,
    )  # fmt: skip
    variance = stochastic_flow.weight_noise_variance(
        clipping.Abadi(0.5, scope="layerwise"), 8, learning_rate=0.5, steps=10,
        noise_multiplier=0.5, n_groups=2, noise_per_group=True,
    )  # fmt: skip
    assert seen.weight_noise == pytest.approx(float(variance[-1].max()))


def test_rules_that_couple_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clipping must treat each sample by itself"):
        of_linear(rule=clipping.Batch(1.0))
