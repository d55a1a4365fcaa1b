"""The tables and the figure of docs/noise.md: noisy clipped runs against their predictions.

`make figures` runs this file, which draws docs/images/noise.png and prints the tables: about an
hour on two cores. `python docs/figures/two_times.py digits` prints the table of digits alone;
`figure`, `small` and `width` do the rest.
"""

import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ntkdp
from ntkdp import clipping, datasets, dp_sgd, losses, models, plotting, stochastic_flow
from ntkdp.claims._instances import stored

STEPS, RATE, RUNS, PREDICTED = 80, 0.4, 400, 2000


class Setting(NamedTuple):
    """One combination of the small problem: 16 samples, two hidden layers, random networks."""

    variance: float
    activation: str
    scope: str
    loss: str
    width: int = 256

    def parts(self) -> tuple[Any, ...]:
        """Model, inputs, targets, loss and rule."""
        x, y = stored("c38_x"), stored("c38_y")[:, None]
        layers = models.mlp(
            [self.width] * 2, 1 if self.loss == "squared" else 2, activation=self.activation
        )
        rule = clipping.from_name(
            "abadi", R=1.0 if self.scope == "flat" else 3**-0.5, scope=self.scope
        )
        if self.loss == "squared":
            return layers, x, y, losses.SquaredError(), rule
        return layers, x, (y[:, 0] > 0).astype(int), losses.SoftmaxCrossEntropy(), rule

    def options(self) -> dict[str, Any]:
        """Noise such that v(T) is the variance asked for."""
        sigma = 16 / RATE * (self.variance / STEPS) ** 0.5
        return {"learning_rate": RATE, "steps": STEPS, "noise_multiplier": sigma}


def observe(setting: Setting) -> ntkdp.Trajectory:
    """Runs of networks drawn at random."""
    model, x, targets, loss, rule = setting.parts()

    def one_run(key: Any) -> ntkdp.Trajectory:
        of_network, of_run = jax.random.split(key)
        params = model.init(of_network, x)
        # Single precision is faster, and its rounding far below what is measured.
        start, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
        return dp_sgd.run(
            model.apply, start, inputs, targets, loss, rule, key=of_run, **setting.options()
        )

    keys = jax.random.split(jax.random.key(0), RUNS)
    runs = jax.jit(partial(jax.lax.map, one_run, batch_size=20))(keys)
    return ntkdp.Trajectory(runs.times[0], runs.loss, runs.clip_fraction)


def predict(setting: Setting, *, frozen: bool) -> ntkdp.Trajectory:
    """Runs of infinitely wide networks."""
    flow = stochastic_flow.TwoTimeFlow(*setting.parts(), frozen=frozen)
    keys = jax.random.split(jax.random.key(1), PREDICTED)
    return stochastic_flow.two_time_ensemble(flow, key=keys, **setting.options())


def quarters(compared: ntkdp.Comparison) -> tuple[str, str]:
    """Shares of runs in the 90% band at each quarter of the horizon, and the least p-value."""
    covered = compared.band_coverage
    assert covered is not None
    at = [len(covered.share) * q // 4 - 1 for q in (1, 2, 3, 4)]
    return " ".join(f"{covered.share[k]:.2f}" for k in at), f"{np.min(covered.p_value[at]):.2g}"


def small_table() -> list[str]:
    """Every combination of noise, activation, scope and loss."""
    rows = [
        "| v(T) | activation | scope | loss | E L(T), runs | between times | error | z | frozen "
        "kernel | error | in the band at T/4 ... T | least p |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in map(
        Setting._make,
        product((0.09, 1.0), ("relu", "erf"), ("flat", "layerwise"), ("squared", "softmax")),
    ):
        runs = observe(setting)
        found = {frozen: predict(setting, frozen=frozen) for frozen in (False, True)}
        between, frozen = (ntkdp.compare(found[kind], runs) for kind in (False, True))
        z = between.standardised_error
        assert z is not None
        final = [float(np.mean(path.loss[:, -1])) for path in (runs, found[False], found[True])]
        rows.append(
            f"| {setting.variance:g} | {setting.activation} | {setting.scope} | {setting.loss} "
            f"| {final[0]:.4f} | {final[1]:.4f} | {between.sup_relative_error:.1%} "
            f"| {np.max(np.abs(z)):.1f} | {final[2]:.4f} | {frozen.sup_relative_error:.1%} "
            f"| {' | '.join(quarters(between))} |"
        )
        print(rows[-1], flush=True)
    return rows


def width_table() -> list[str]:
    """How the spread of runs comes to that of infinite width as networks get wider."""
    rows = ["| width | std of L(T), runs / predicted | in the band at T/4 ... T | least p |"]
    rows.append("|---|---|---|---|")
    setting = Setting(0.09, "erf", "flat", "softmax")
    found = predict(setting, frozen=False)
    for width in (64, 128, 256, 512):
        compared = ntkdp.compare(found, observe(setting._replace(width=width)))
        bands = (compared.observed_band, compared.predicted_band)
        spread = [band.standard_deviation[-1] for band in bands if band is not None]
        rows.append(f"| {width} | {spread[0] / spread[1]:.2f} | {' | '.join(quarters(compared))} |")
        print(rows[-1], flush=True)
    return rows


def draw() -> Figure:
    """The small problem at both noises, ReLU, flat, squared loss."""
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    for ax, variance in zip(figure.subplots(1, 2), (0.09, 1.0), strict=True):
        setting = Setting(variance, "relu", "flat", "squared")
        runs = observe(setting)
        flow = stochastic_flow.TwoTimeFlow(*setting.parts())
        keys = jax.random.split(jax.random.key(1), PREDICTED)
        quiet = stochastic_flow.two_time_ensemble(
            flow, key=keys, **(setting.options() | {"noise_multiplier": 0.0})
        )
        loss, clipped = (jnp.mean(path, axis=0) for path in (quiet.loss, quiet.clip_fraction))
        predictions = {
            "kernels between times": predict(setting, frozen=False),
            "frozen kernel": predict(setting, frozen=True),
            "without noise": ntkdp.Trajectory(quiet.times, loss, clipped),
        }
        plotting.loss_curves(predictions, runs, ax=ax)
        ax.set_title(f"v(T) = {variance:g}")
        handles = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def digits_row(n_runs: int) -> list[str]:
    """Digits: one network of width 1024, ten classes; runs in single precision, which is faster."""
    data = datasets.load("digits", n_train=128, n_test=128, standardise="unit")
    x, test_x = jnp.asarray(data.x_train), jnp.asarray(data.x_test)
    model, loss = (
        models.mlp([1024, 1024], 10, activation="erf", W_std=1.5),
        losses.SoftmaxCrossEntropy(),
    )
    params = model.init(jax.random.key(0), x)
    start_single, x_single, test_single = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), (params, x, test_x)
    )
    initial = (model.apply(params, x), model.apply(params, test_x))
    rows = [
        "| scope | v(T) | E L(T), runs | between times | error | frozen kernel | error | without "
        "noise | error | error of test loss | in the band at T/4 ... T | least p "
        "| seconds, 100 runs | prediction |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scope, R in (("flat", 1.0), ("layerwise", 3**-0.5)):
        rule = clipping.from_name("abadi", R=R, scope=scope)
        rate, steps, variance = 2.0, 100, 1.0
        shared: Any = {
            "learning_rate": rate, "steps": steps, "record_every": 10,
            "noise_multiplier": 128 / rate * (variance / steps) ** 0.5,
        }  # fmt: skip
        start = time.perf_counter()
        runs = dp_sgd.run(
            model.apply, start_single, x_single, data.y_train, loss, rule, test_x=test_single,
            test_targets=data.y_test, key=jax.random.split(jax.random.key(5), n_runs), **shared,
        )  # fmt: skip
        jax.block_until_ready(runs.loss)
        observing = (time.perf_counter() - start) * 100 / n_runs
        compared = {}
        for kind in ("between", "frozen", "quiet"):
            flow = stochastic_flow.TwoTimeFlow(
                model, x, data.y_train, loss, rule, test_x=test_x, test_targets=data.y_test,
                frozen=kind == "frozen",
            )  # fmt: skip
            start = time.perf_counter()
            options = shared | ({"noise_multiplier": 0.0} if kind == "quiet" else {})
            path = stochastic_flow.two_time_ensemble(
                flow, initial, key=jax.random.split(jax.random.key(1), 200), **options
            )
            jax.block_until_ready(path.loss)
            if kind == "between":
                predicting = time.perf_counter() - start
            compared[kind] = ntkdp.compare(path, runs, allow="noise_multiplier")
        final = {
            kind: float(np.mean(found.predicted.loss[..., -1])) for kind, found in compared.items()
        }
        between = compared["between"]
        rows.append(
            f"| {scope} | {variance:g} | {np.mean(runs.loss[:, -1]):.4f} | {final['between']:.4f} "
            f"| {between.sup_relative_error:.1%} | {final['frozen']:.4f} "
            f"| {compared['frozen'].sup_relative_error:.1%} | {final['quiet']:.4f} "
            f"| {compared['quiet'].sup_relative_error:.1%} "
            f"| {between.test_sup_relative_error:.1%} | {' | '.join(quarters(between))} "
            f"| {observing:.0f} | {predicting:.0f} |"
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    ntkdp.enable_x64()
    wanted = sys.argv[1:] or ["figure", "small", "width", "digits"]
    if "figure" in wanted:
        plotting.save(draw(), Path(__file__).parent.parent / "images" / "noise.png", dpi=150)
    if "small" in wanted:
        print("\n".join(small_table()))
    if "width" in wanted:
        print("\n".join(width_table()))
    if "digits" in wanted:
        print("\n".join(digits_row(100)))
