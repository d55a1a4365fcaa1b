"""Seconds of predicted runs against those of real ones, for the response and the noise path alone.

Handwritten digits, 256 samples, two hidden layers, cross-entropy, full batches, a hundred runs. The
programs are compiled by a few steps first, and everything is in single precision.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--observed-steps", type=int, help="real steps; seconds are scaled to all")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    data = ntkdp.datasets.digits(n_train=asked.samples, n_test=10)
    x, y = data.x_train.astype(jnp.float32), data.y_train
    model = ntkdp.models.mlp([asked.width] * 2, 10)
    params = model.init(jax.random.key(0), x)
    loss, rule = ntkdp.losses.SoftmaxCrossEntropy(), ntkdp.clipping.Abadi(1.0)
    flow = ntkdp.stochastic_flow.ResponseFlow(model.apply, params, x, y, loss, rule)
    budget = ntkdp.privacy.Budget(8.0, 1e-5)
    options: dict[str, Any] = {
        "learning_rate": 0.5,
        "noise_multiplier": budget.noise_multiplier(asked.steps, 1.0),
        "key": jax.random.split(jax.random.key(1), asked.runs),
    }

    def observe(steps: int) -> ntkdp.Trajectory:
        return ntkdp.dp_sgd.run(model.apply, params, x, y, loss, rule, steps=steps, **options)

    def predict(about: Any) -> ntkdp.Trajectory:
        return ntkdp.stochastic_flow.response_ensemble(
            flow, about=about, steps=asked.steps, **options
        )

    def seconds(work: Callable[[], ntkdp.Trajectory], repeats: int) -> tuple[float, np.ndarray]:
        """Median after a first call that compiles, and the mean loss."""
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            path = np.asarray(work().loss)
            taken.append(time.perf_counter() - start)
        print(f"  first call {taken[0]:.1f} s, then", ", ".join(f"{t:.1f}" for t in taken[1:]))
        return float(np.median(taken[1:])), path.mean(0)

    print(f"{os.cpu_count()} cores, {asked.samples} samples, 2 x {asked.width}, {asked.runs} runs")
    response, mean = seconds(lambda: predict("path"), asked.repeats)
    alone, mean_alone = seconds(lambda: predict("start"), asked.repeats)
    steps = asked.observed_steps or asked.steps
    observed, mean_observed = seconds(lambda: observe(steps), 1)
    observed *= asked.steps / steps
    print(f"runs {observed:.0f} s, response {response:.1f} s, noise path alone {alone:.1f} s")
    print(f"a response costs 1/{observed / response:.0f}, a noise path 1/{observed / alone:.0f}")
    error = np.abs(mean[: steps + 1] / mean_observed - 1).max()
    error_alone = np.abs(mean_alone[: steps + 1] / mean_observed - 1).max()
    print(f"largest error up to step {steps}: response {error:.1%}, noise path {error_alone:.1%}")


if __name__ == "__main__":
    main()
