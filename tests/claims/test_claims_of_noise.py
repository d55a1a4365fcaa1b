"""Claims C22-C25, C33-C36, C39-C42 and C47-C49 hold, and fail for wrong implementations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkdp import batches, claims, clipping, noise
from ntkdp.dp_sgd._algorithm import Algorithm
from ntkdp.gradient_flow import HeavyBallFlow
from ntkdp.stochastic_flow._ensemble import step_noise
from ntkdp.stochastic_flow._response import runs
from ntkdp.stochastic_flow._weight_noise import deviations


def failing(name: str) -> set[str]:
    return {found.quantity for found in claims.verify(name).findings if not found.holds}


@pytest.mark.slow
def test_c22_fails_with_noise_on_the_mean_or_with_summed_norms(mutate: Any) -> None:
    """Two mistakes that only the layerwise, averaged run can see, and it sees either."""
    grouped = "E L / closed form, groups with R = 300, 400, mean"
    noise = Algorithm._noise

    def on_the_mean(self: Algorithm, *args: Any) -> Any:
        scale = self.x.shape[0] if self.reduction == "mean" else 1
        return jax.tree.map(lambda leaf: scale * leaf, noise(self, *args))

    mutate(Algorithm, "_noise", on_the_mean)
    assert failing("C22") == {grouped}
    mutate(Algorithm, "_noise", noise)
    mutate(clipping.ClippingRule, "sensitivity", lambda self, n: jnp.sum(self.group_norms(n)))
    assert failing("C22") == {grouped}


@pytest.mark.slow
def test_c24_fails_with_twice_the_friction_on_the_momentum(mutate: Any) -> None:
    velocity = HeavyBallFlow.velocity

    def slower(self: HeavyBallFlow, state: Any) -> Any:
        moved, pushed = velocity(self, state)
        return moved, jax.tree.map(lambda g, v: g - self.friction * v, pushed, state[1])

    mutate(HeavyBallFlow, "velocity", slower)
    assert {"largest L", "|dE/dt + alpha |w'|^2|, relative, 500 random states"} <= failing("C24")


@pytest.mark.slow
def test_c25_fails_if_the_noise_does_not_scale_with_the_clipping_norm(mutate: Any) -> None:
    mutate(clipping.ClippingRule, "sensitivity", lambda self, n_groups=1: 0.01)
    assert "largest change of the outputs, R 0.001 for 0.01" in failing("C25")


@pytest.mark.slow
def test_c34_fails_with_twice_the_clipping_norm(mutate: Any) -> None:
    mutate(clipping.Abadi, "_weight", lambda self, s, R: 2 * R / jnp.maximum(s, 2 * R))
    wrong = failing("C34")
    assert {"w, flow, c 0.5", "w, run, c 0.5"} <= wrong
    assert not {"w, flow, c 4.0", "w, run, c 4.0"} & wrong


@pytest.mark.slow
def test_c36_fails_with_half_the_factor(mutate: Any) -> None:
    weight = clipping.Custom._weight
    mutate(clipping.Custom, "_weight", lambda self, s, R: 0.5 * weight(self, s, R))
    assert {
        "C at ||g|| = sqrt(14)",
        "mean estimate along the flow, linear model",
        "mean estimate along the flow, network, 5 samples, 2 outputs",
    } <= failing("C36")


@pytest.mark.slow
def test_c40_and_c41_fail_if_a_sample_is_thought_to_take_part_once(mutate: Any) -> None:
    """The claims that count how often it does, and those alone."""

    def once(self: noise.Noise, batches: Any, steps: int) -> float:
        return float(np.linalg.norm(self.strategy_matrix(steps)[:, 0]))

    mutate(noise.Noise, "sensitivity", once)
    full = {
        "variance over that of independent noise, full batches",
        "loss over that of independent noise, runs, full batches",
        "the same, predicted runs",
    }
    assert failing("C40") == full
    wrong = failing("C41")
    assert {
        "least ratio of 57 strategies over the bound, k 1",
        "loss over that of independent noise, runs, square root",
    } <= wrong


@pytest.mark.slow
def test_c42_fails_if_momentum_looks_ahead(mutate: Any) -> None:
    """Optax's own momentum still agrees, and the predicted moments follow the one that is wrong."""
    trace = optax.trace
    mutate(optax, "trace", lambda decay, nesterov=False: trace(decay, nesterov=True))
    wrong = failing("C42")
    assert {"E L / closed form", "E L of the predicted moments / closed form"} <= wrong
    assert "E L / closed form, groups with R = 300, 400, mean" not in wrong


@pytest.mark.slow
def test_c47_fails_where_noise_does_not_dominate(mutate: Any) -> None:
    mutate(clipping.ClippingRule, "sensitivity", lambda self, n_groups=1: 0.01)
    wrong = failing("C47")
    assert "largest |E L of Adam / E L of momentum - 1|, sigma 160" in wrong
    # Adam's noise does not depend on sigma, but that of momentum does.
    assert "v(T) / (eta^2 K), sigma 160" not in wrong
    assert "v(T) of that momentum / (eta^2 K)" in wrong


@pytest.mark.slow
def test_c39_fails_without_the_response(mutate: Any) -> None:
    """The noise path goes on with the output gradients of the path, which do not respond."""
    mutate(runs.Runs, "responding", lambda self, at, clipped: jnp.zeros_like(clipped))
    wrong = failing("C39")
    assert {"error of the response", "error of the noise path"} <= wrong


@pytest.mark.slow
def test_c49_fails_with_more_noise_or_larger_batches(mutate: Any) -> None:
    """In the predicted runs alone, by a fifth and by a half."""
    weights = batches.Batches.weights
    mutate(step_noise, "deviations", lambda *of, **by: 1.2 * deviations(*of, **by))
    wrong = failing("C49")
    assert {"mean loss, off in standard errors", "mean test loss, off in standard errors"} <= wrong
    mutate(step_noise, "deviations", deviations)
    mutate(batches.Batches, "weights", lambda self, *of: 1.5 * weights(self, *of))
    assert "mean loss, off in standard errors" in failing("C49")


@pytest.mark.slow
def test_c48_fails_if_the_predicted_noise_does_not_follow_the_norm(mutate: Any) -> None:
    mutate(step_noise.StepNoise, "at_clip_norm", lambda self, *args: self)
    wrong = failing("C48")
    assert "mean loss, off in standard errors, gamma 0.5, R(0) 20" in wrong
    assert not {name for name in wrong if ", runs," in name or "flow" in name}


@pytest.mark.slow
def test_c48_fails_for_another_quantile(mutate: Any) -> None:
    mutate(clipping.Adaptive, "log_change", lambda self, share: -self.rate * (share - 0.5))
    wrong = failing("C48")
    assert "share unclipped, runs, gamma 0.8, R(0) 0.05" in wrong
    assert not {name for name in wrong if "gamma 0.5" in name}
