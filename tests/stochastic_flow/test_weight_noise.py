"""The noise that weights accumulate through an optimizer, against runs and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, SQUARED, linear

from ntkdp import clipping, dp_sgd, optimizers, stochastic_flow
from ntkdp.optimizers import SGD

RULE = clipping.Abadi(0.7)


def test_momentum_passes_the_noise_of_a_step_on() -> None:
    """By the response to each step's noise, (1 - beta^i) / (1 - beta) after i steps."""
    sigma, steps, n = 1.2, 60, 8
    options: dict[str, Any] = {
        "learning_rate": 0.02, "steps": steps, "noise_multiplier": sigma, "n_groups": 1,
    }  # fmt: skip
    plain = stochastic_flow.weight_noise_variance(RULE, n, **options)[:, 0]
    found = stochastic_flow.weight_noise_variance(RULE, n, optimizer=SGD(0.9), **options)[:, 0]
    response = np.cumsum(((1 - 0.9 ** np.arange(1, steps + 1)) / 0.1) ** 2)
    np.testing.assert_allclose(found[1:], plain[1] * response, rtol=1e-12)
    # Where plain steps gather .0053, these gather .407.
    np.testing.assert_allclose(0.0053 * found[-1] / plain[-1], 0.407, atol=5e-3)


@pytest.mark.parametrize(
    "sgd",
    [
        SGD(0.8, nesterov=True, weight_decay=0.3, average=0.9),
        pytest.param(SGD(0.8, weight_decay=0.3, decoupled=True), marks=pytest.mark.slow),
        pytest.param(SGD(weight_decay=0.3), marks=pytest.mark.slow),
    ],
)
def test_it_is_the_variance_of_the_weights_of_runs(sgd: Any) -> None:
    # Inputs of zero have no gradient: noise alone moves the weights.
    n, d, steps = 4, 4000, 7
    options: dict[str, Any] = {
        "learning_rate": optax.linear_schedule(0.5, 0.1, steps), "noise_multiplier": 1.3,
        "sample_rate": 0.5,
    }  # fmt: skip
    found = stochastic_flow.weight_noise_variance(RULE, n, steps=steps, optimizer=sgd, **options)
    algorithm = dp_sgd.build(
        linear, jnp.zeros((n, d)), jnp.zeros((n, 1)), SQUARED, RULE, optimizer=sgd, **options
    )
    state, step = algorithm.init(jnp.zeros((d, 1))), algorithm.compile()
    for k in range(steps):
        state, _ = step(jax.random.fold_in(KEY, k), state)
    variance = float(jnp.mean(state.params**2))
    np.testing.assert_allclose(variance, found[-1, 0], rtol=4 * np.sqrt(2 / d))
    # Nothing is scaled by the number of groups or by their order.
    grouped = stochastic_flow.weight_noise_variance(
        clipping.Abadi(np.array([0.3, 1.1]), scope="layerwise"), n, steps=steps, optimizer=sgd,
        n_groups=2, noise_per_group=True, **options,
    )  # fmt: skip
    ratios = (np.sqrt(2) * np.array([0.3, 1.1]) / 0.7) ** 2
    np.testing.assert_allclose(grouped, found * ratios, rtol=1e-12)


def test_a_step_is_a_matrix() -> None:
    """Its entries by hand, from the equations of SGD."""
    beta, wd, d, eta = 0.8, 0.1, 0.6, 0.3
    step = optimizers.transition(SGD(beta, weight_decay=wd, average=d), eta)
    f, m = np.array([1 - eta * wd, -eta * beta, 0.0]), np.array([wd, beta, 0.0])
    np.testing.assert_allclose(step.of_state, [f, m, (1 - d) * f + [0, 0, d]], atol=1e-15)
    np.testing.assert_allclose(step.of_gradient, [-eta, 1, -(1 - d) * eta], atol=1e-15)
    np.testing.assert_allclose(step.of_zero, [eta * wd, -wd, (1 - d) * eta * wd], atol=1e-15)


def test_adam_has_no_such_variance() -> None:
    with pytest.raises(ValueError, match=r"optimizer must be linear .* got Adam"):
        stochastic_flow.weight_noise_variance(
            RULE, 4, learning_rate=0.1, steps=3, noise_multiplier=1.0, optimizer=optax.adam
        )
