"""What limits private training of digits when: the figure of choosing.md.

`make figures` runs this file, which draws docs/images/step_terms.png and prints the numbers. All is
predicted, by the infinite-width kernel of two hidden layers of 512; nothing is trained.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ntkdp
from ntkdp import advisor, clipping, datasets, losses, models, plotting, privacy, stochastic_flow

N, STEPS, RATE, Q, DELTA, DRAWS = 1000, 200, 2.0, 0.25, 1e-4, 8
EPSILONS = (1.0, 8.0)


def parts(epsilon: float) -> tuple[Any, Any]:
    """Times, and the parts of steps, averaged over draws, for the test loss."""
    data = datasets.digits(n_train=N, n_test=200, standardise="unit")
    points = jnp.concatenate([data.x_train, data.x_test])
    model = models.mlp([512, 512], data.n_outputs)
    outputs = model.apply(model.init(jax.random.key(0), points), points)
    kernel = ntkdp.infinite_ntk(model, points)
    flow = ntkdp.KernelFlow(
        kernel[:N, :N], data.y_train, losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0),
        test_kernel=kernel[N:, :N], test_targets=data.y_test,
    )  # fmt: skip
    noise: Any = {
        "noise_multiplier": privacy.noise_multiplier(epsilon, Q, STEPS, DELTA),
        "sample_rate": Q, "noise_kernel": kernel,
    }  # fmt: skip
    draws = stochastic_flow.ensemble(
        flow, (outputs[:N], outputs[N:]), learning_rate=RATE, steps=STEPS, record_every=10,
        outputs=True, key=jax.random.split(jax.random.key(1), DRAWS), **noise,
    )  # fmt: skip
    assert draws.outputs is not None
    assert draws.test_outputs is not None
    found = [
        advisor.decompose(flow, pair, **noise).test
        for pair in zip(draws.outputs, draws.test_outputs, strict=True)
    ]
    totals = [one.total() for one in found if one is not None]
    mean = jax.tree.map(lambda *part: jnp.mean(jnp.stack(part), axis=0), *totals)
    return np.asarray(draws.times), mean


if __name__ == "__main__":
    figure = Figure(figsize=(7.0, 5.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(2, 1))
    for column, epsilon in zip(grid.T, EPSILONS, strict=True):
        times, terms = parts(epsilon)
        upper, lower = column
        plotting.step_terms(
            terms, times / RATE, learning_rate=RATE, xlabel="step", axes=(upper, lower)
        )
        upper.get_legend().remove()
        upper.set_title(rf"$\varepsilon$ = {epsilon:g}")
        best = np.asarray(terms.best_learning_rate())
        against = np.array([terms.curvature, terms.sampling, terms.privacy])
        shares = against / against.sum(axis=0)
        print(f"epsilon {epsilon:g}: step, best learning rate; curvature, sampling, privacy")
        for place in (0, 1, 5, 10, -1):
            print(f"{times[place] / RATE:.0f}, {best[place]:.3g};", shares[:, place].round(2))
    for axes in grid[:, 1]:
        axes.set_ylabel("")
    grid[1, 1].get_legend().remove()
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(Path(__file__).parent.parent / "images" / "step_terms.png", dpi=150)
