"""The head of a report: what was run, and which prediction to trust."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ntkdp
from ntkdp import comparison, experiment, privacy
from ntkdp.experiment._reporting.tables import columns, rows
from ntkdp.experiment._reporting.verdict import facts, verdict
from ntkdp.experiment._run import Case, Prediction, Results

TIMES = jnp.linspace(0.0, 1.0, 5)
FALL = jnp.array([2.0, 1.7, 1.4, 1.2, 1.0])


def path(loss: Any, **fields: Any) -> ntkdp.Trajectory:
    loss = jnp.asarray(loss)
    return ntkdp.Trajectory(TIMES, loss=loss, clip_fraction=jnp.zeros_like(loss), **fields)


def results(
    run: ntkdp.Trajectory, predicted: dict[str, ntkdp.Trajectory], **training: Any
) -> Results:
    """Results of one case that were not computed, but are known."""
    config = experiment.config(
        predictions=list(predicted), data={"n_train": 40, "n_test": 8},
        training={"steps": 4, **training}, clipping=[{"clip_norm": 1.0}],
    )  # fmt: skip
    ready = {
        name: Prediction(one, comparison.compare(one, run), 0.1) for name, one in predicted.items()
    }
    sigma = training.get("noise_multiplier", 0.0)
    case = Case(config.clipping[0], sigma, 0.01, run, 1.0, ready, 0.5)
    return Results(config, [case], {}, jnp.ones(40), [])


def test_the_nearest_prediction_is_trusted_and_those_far_off_are_named() -> None:
    near, far = path(FALL * jnp.array([1, 1, 1.005, 1, 1])), path(FALL + 0.05 * TIMES)
    (words,) = verdict(results(path(FALL), {"exact": near, "frozen": far}))
    assert "trust the exact flow" in words
    assert "off by at most 0.7% of the most that the loss moves" in words
    assert "Further off: the frozen kernel by 5.0%." in words


def test_nothing_is_trusted_if_all_are_far_off() -> None:
    (words,) = verdict(results(path(FALL), {"exact": path(2 * FALL)}))
    assert "trust no prediction" in words
    assert "ntkdp.diagnose" in words


def test_a_prediction_that_is_not_finite_is_not_trusted() -> None:
    broken = path(FALL.at[3].set(jnp.nan))
    (words,) = verdict(results(path(FALL), {"exact": broken, "frozen": path(FALL)}))
    assert "trust the frozen kernel" in words
    assert "the exact flow by more than can be said" in words


def test_runs_in_the_band_are_counted_and_too_few_of_them_are_no_chance() -> None:
    rng = np.random.default_rng(0)
    spread = 0.02 * rng.normal(size=(99, 5)) * np.asarray(TIMES)
    drawn = path(FALL + spread, accuracy=jnp.full((99, 5), 0.75))
    inside = path(FALL + spread[:20], accuracy=jnp.full((20, 5), 0.7))
    outside = path(FALL + spread[:20] + 0.045 * TIMES, accuracy=jnp.full((20, 5), 0.7))
    (words,) = verdict(results(inside, {"recursion": drawn}, noise_multiplier=1.0))
    assert "of 20 runs end in its 90% band" in words
    assert "no chance" not in words
    assert "accuracy 75.0% predicted, 70.0% observed" in words
    (words,) = verdict(results(outside, {"recursion": drawn}, noise_multiplier=1.0))
    assert "which is no chance (p = " in words


@pytest.mark.parametrize(
    ("training", "epsilon"),
    [
        ({"noise_multiplier": 2.0}, privacy.epsilon(2.0, 1.0, 4, 1 / 40)),
        (
            {"noise_multiplier": 2.0, "sample_rate": 0.5, "delta": None},
            privacy.epsilon(2.0, 0.5, 4, 1 / 40),
        ),
        (
            {"noise_multiplier": 2.0, "batches": {"kind": "fixed_size", "size": 10}},
            privacy.epsilon(2.0, 0.25, 4, 1 / 40, sampling="fixed_size"),
        ),
    ],
)
def test_the_head_says_what_the_noise_spends(training: dict[str, Any], epsilon: float) -> None:
    told = dict(facts(results(path(FALL), {"recursion": path(FALL)}, **training)))
    assert told["epsilon"] == f"{epsilon:.4g} at delta = 0.025"
    assert told["sigma"] == "2"
    assert told["steps"] == "4"


def test_the_head_names_the_optimizer_and_the_batches() -> None:
    training = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "sample_rate": 0.25}
    told = dict(facts(results(path(FALL), {"recursion": path(FALL)}, **training)))
    assert told["optimizer"] == "SGD, Nesterov momentum 0.9, weight decay 0.1"
    assert told["batches"] == "Poisson sampling, q = 0.25"
    assert told["runs"].startswith("1 trained, ")


def test_a_run_without_noise_promises_nothing() -> None:
    told = dict(facts(results(path(FALL), {"exact": path(FALL)})))
    assert told["privacy"].startswith("none")
    assert "epsilon" not in told


def test_columns_that_have_nothing_to_say_are_left_out() -> None:
    one = results(path(FALL), {"exact": path(FALL)})
    assert "p-value" not in columns(one)
    assert "standard error of runs" not in columns(one)
    assert "accuracy, observed" not in columns(one)
    several = path(jnp.stack([FALL, FALL + 0.1]))
    (row,) = rows(results(several, {"exact": path(FALL)}))
    # Losses of 1 and 1.1 at the end: a deviation of 0.0707, over the root of 2 and the mean.
    assert row["standard error of runs"] == f"{0.05 / 1.05:.2%}"


def test_an_unknown_epsilon_is_said_to_be_unknown() -> None:
    noise = {"kind": "square_root", "n_bands": 2}
    found = results(
        path(FALL), {"recursion": path(FALL)}, noise_multiplier=1.0, sample_rate=0.5, noise=noise
    )
    assert dict(facts(found))["epsilon"].startswith("not known")
