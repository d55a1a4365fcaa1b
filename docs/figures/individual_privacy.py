"""What each of 1,000 digits pays, predicted and observed: the figure of individual_privacy.md.

`make figures` runs this file, which draws docs/images/individual_privacy.png and prints the
numbers. One run of width 1024 at epsilon 8 is held against 16 draws by its infinite-width kernel at
the start; nothing is fitted.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import ntkdp
from ntkdp import clipping, datasets, dp_sgd, losses, models, plotting, privacy, stochastic_flow

N, STEPS, DELTA = 1000, 100, 1e-4
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)


def costs(sample_rate: float) -> tuple[Any, privacy.IndividualPrivacy, privacy.IndividualPrivacy]:
    """Labels, and what samples pay: predicted, and observed."""
    data = datasets.digits(n_train=N, n_test=1, standardise="unit")
    x, labels = jnp.asarray(data.x_train, jnp.float32), data.y_train
    model = models.mlp([1024], data.n_outputs)
    params = model.init(jax.random.key(0), x)
    sigma = privacy.noise_multiplier(8.0, sample_rate, STEPS, DELTA)
    plan: Any = {
        "learning_rate": 2.0, "steps": STEPS, "noise_multiplier": sigma,
        "sample_rate": sample_rate,
    }  # fmt: skip
    run = dp_sgd.run(
        model.apply, params, x, labels, LOSS, RULE, individual=True, record_every=STEPS,
        key=jax.random.key(1), **plan,
    )  # fmt: skip
    flow = ntkdp.KernelFlow(ntkdp.infinite_ntk(model, x), labels, LOSS, RULE)
    draws = stochastic_flow.ensemble(
        flow, model.apply(params, x), outputs=True, key=jax.random.split(jax.random.key(2), 16),
        **plan,
    )  # fmt: skip
    assert run.sensitivities is not None
    assert draws.outputs is not None
    options: Any = {"noise_multiplier": sigma, "sample_rate": sample_rate}
    predicted = privacy.individual(flow.sensitivities(draws.outputs), steps=draws.steps, **options)
    return labels, predicted, privacy.individual(run.sensitivities, **options)


def draw(labels: Any, predicted: Any, observed: Any) -> None:
    """The picture: epsilon by class, and predicted against observed."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.individual_epsilon(observed, DELTA, labels, ax=left)
    left.set_title("observed, by digit", pad=24)
    one = observed.epsilon(DELTA)
    other = predicted.epsilon(DELTA).mean(axis=0)
    right.plot(one, other, ".", color="#0072B2", markersize=3, alpha=0.5)
    top = 1.03 * max(one.max(), other.max())
    right.plot([0, top], [0, top], color="0.6", linewidth=1)
    right.set_xlim(0, top)
    right.set_ylim(0, top)
    right.set_aspect("equal")
    right.set_xlabel(r"$\varepsilon_i$ observed")
    right.set_ylabel(r"$\varepsilon_i$ predicted by the kernel at the start")
    figure.savefig(Path(__file__).parent.parent / "images" / "individual_privacy.png", dpi=150)


if __name__ == "__main__":
    for rate in (0.25, 1.0):
        found = costs(rate)
        classes, expected, measured = found
        correlation = spearmanr(expected.mu.mean(axis=0), measured.mu).statistic
        epsilon = measured.epsilon(DELTA)
        least, middle, most = np.quantile(epsilon, (0.0, 0.5, 1.0))
        print(f"q = {rate}: rank correlation {correlation:.3f}")
        print(f"epsilon {least:.2f} to {most:.2f}, median {middle:.2f}, by class")
        for side in (expected, measured):
            print(side.by_group(classes, DELTA).epsilon.round(2))
    draw(*found)
