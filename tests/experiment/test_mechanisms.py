"""Mechanisms from a configuration: each is predicted by what knows it, and by nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import known, often_or_slow

import ntkdp
from ntkdp import experiment, privacy, sweep
from ntkdp.experiment import _predictions
from ntkdp.noise import Independent

#: A model that is linear in its weights, so that the recursion is exact in law.
LINEAR = """
import jax, jax.numpy as jnp
from ntkdp.models import Model

def affine(n_outputs):
    def apply(params, x):
        return jnp.arange(n_outputs) / 5 + x @ params["w"]
    return Model(lambda key, x: {"w": jax.random.normal(key, (x.shape[1], n_outputs)) / 8}, apply)
"""
STEPS: dict[str, Any] = {"steps": 12, "learning_rate": 0.3, "record_every": 4}
PUBLIC: dict[str, Any] = {"public": {"rows": 8, "weight": 0.3}}
SHARP: dict[str, Any] = {"sharpness_aware": {"radius": 0.3}}
ZEROTH: dict[str, Any] = {"zeroth_order": {"directions": 4}}
NOISE: dict[str, Any] = {"noise_multiplier": 2.0, "n_seeds": 60, "n_predicted": 240}
BEST: dict[str, Any] = {
    "batches": {"kind": "cyclic", "n_batches": 4},
    "noise": {"kind": "kernel_optimal", "n_bands": 4},
}


@pytest.fixture(autouse=True)
def linear_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linear_model_of_a_test.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)


def small(training: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "data": {"n_train": 24, "n_test": 8},
        "model": {"kind": "function", "function": "linear_model_of_a_test:affine"},
        "training": STEPS | training,
        "clipping": [{"clip_norm": 2.0}],
    } | fields


def only_case(training: dict[str, Any], **fields: Any) -> experiment.Case:
    (case,) = experiment.run(experiment.config(**small(training, **fields))).cases
    return case


@pytest.mark.parametrize(
    "training",
    often_or_slow(
        [
            PUBLIC | SHARP | {"momentum": 0.5, "weight_decay": 0.2},
            PUBLIC | {"adaptive": {"quantile": 0.5}},
            SHARP | {"adaptive": {"quantile": 0.5}, "batches": BEST["batches"]},
        ],
        [PUBLIC | SHARP | {"momentum": 0.5, "weight_decay": 0.2}],
    ),
)
def test_steps_without_noise_are_those_of_a_linear_model(training: dict[str, Any]) -> None:
    case = only_case(training)
    assert list(case.predictions) == ["recursion"]
    predicted = case.predictions["recursion"]
    assert predicted.comparison.sup_relative_error < 1e-9
    test_losses = np.asarray(known(predicted.trajectory.test_loss))
    np.testing.assert_allclose(
        test_losses, np.broadcast_to(known(case.run.test_loss), test_losses.shape), rtol=1e-9
    )
    setup = case.run.setup[0]
    assert (setup.public == "8 public rows of weight 0.3") == ("public" in training)
    assert ("radius=0.3" in setup.sharpness_aware) == ("sharpness_aware" in training)


def test_flows_of_one_kernel_follow_public_samples() -> None:
    training = PUBLIC | {"steps": 200, "learning_rate": 0.005, "record_every": 50}
    case = only_case(training, predictions=["exact", "frozen"])
    exact, frozen = (case.predictions[name].trajectory for name in ("exact", "frozen"))
    assert case.predictions["frozen"].comparison.sup_relative_error < 0.01
    np.testing.assert_allclose(exact.loss, frozen.loss, rtol=1e-4)


@pytest.mark.parametrize("steps", often_or_slow([ZEROTH, PUBLIC, SHARP], [ZEROTH]))
def test_steps_with_noise_are_those_of_a_linear_model_in_law(steps: dict[str, Any]) -> None:
    case = only_case(steps | NOISE)
    prediction = case.predictions["recursion"]
    z = known(prediction.comparison.standardised_error)
    assert np.all(np.abs(np.asarray(z)) < 4)
    assert prediction.comparison.sup_relative_error < 0.05
    # Public samples leave 0.7 of the noise; the clipping norm is 2, weights have variance 1/64.
    share, n_private = (0.7, 16) if "public" in steps else (1.0, 24)
    scale = case.noise_multiplier * 2.0 * share * STEPS["learning_rate"] / n_private
    assert known(case.weight_noise) == pytest.approx(12 * scale**2 * 64, rel=0.1)


def test_a_budget_is_spent_on_the_private_samples() -> None:
    """A share of a batch of a fixed size is one of what is private."""
    training = PUBLIC | {
        "epsilon": 8.0, "delta": 1e-2, "batches": {"kind": "fixed_size", "size": 4},
        "n_predicted": 2,
    }  # fmt: skip
    config = experiment.config(**small(training | {"steps": 4}))
    sigma = _predictions.Mechanism.of(config, config.clipping[0], 650).noise_multiplier
    assert 7.9 < privacy.epsilon(sigma, 4 / 16, 4, 1e-2, sampling="fixed_size") <= 8


@pytest.mark.slow
def test_noise_that_is_best_under_the_kernel_costs_what_independent_noise_does() -> None:
    spent = {"epsilon": 8.0, "delta": 1e-2, "n_seeds": 60, "n_predicted": 240}
    best = only_case(BEST | spent)
    alone = only_case(BEST | spent | {"noise": {"kind": "independent"}})
    assert best.noise_multiplier == alone.noise_multiplier
    assert "Correlated" in best.run.setup[0].noise
    for case in (best, alone):
        assert case.predictions["recursion"].comparison.sup_relative_error < 0.05
    ends = [float(case.predictions["recursion"].trajectory.loss[:, -1].mean())
            for case in (best, alone)]  # fmt: skip
    assert ends[0] < ends[1]


def test_the_best_noise_is_scaled_and_not_changed() -> None:
    """What it adds is invariant: a strategy and sigma times a number are the same mechanism."""
    config = experiment.config(**small(BEST | {"noise_multiplier": 1.0}))
    problem = experiment.problem_of(config)
    kernel = experiment.kernel_of(config, problem, "empirical")
    flow = ntkdp.KernelFlow(kernel.train, problem.targets, problem.loss, ntkdp.clipping.Abadi(2.0))
    batches = ntkdp.batches.Cyclic(4)
    given: Any = {"learning_rate": 0.3, "steps": 12, "n_bands": 4, "batches": batches}
    scaled = experiment.least_noise(flow, problem.outputs, **given)
    best = ntkdp.stochastic_flow.optimal_noise(flow, problem.outputs, **given)
    np.testing.assert_allclose(scaled.strategy / scaled.strategy[0], best.strategy, rtol=1e-12)
    cost = Independent().sensitivity(batches, 12)
    assert scaled.sensitivity(batches, 12) == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize(
    ("training", "fields", "message"),
    [
        (PUBLIC | ZEROTH, {}, "training.zeroth_order must be left out with training.public"),
        (SHARP | ZEROTH, {}, "zeroth_order must be left out with training.sharpness_aware"),
        (ZEROTH | {"adaptive": {"quantile": 0.5}}, {}, "left out with training.adaptive"),
        (ZEROTH | {"optimizer": "adam"}, {}, "training.zeroth_order must be left out .* 'adam'"),
        (BEST | {"optimizer": "adam"}, {}, "noise.kind = 'kernel_optimal' must be left out"),
        (BEST | PUBLIC, {}, "must be independent with training.public, .* 'kernel_optimal'"),
        (BEST | SHARP, {}, "must be independent with training.sharpness_aware"),
        (BEST | {"batches": {}, "sample_rate": 0.5}, {}, "must not be 'kernel_optimal' with bat"),
        (SHARP, {"predictions": ["response"]}, "'response' with training.sharpness_aware; use rec"),
        (PUBLIC, {"predictions": ["response"]}, "'response' with training.public; use exact, fro"),
        (SHARP, {"clipping": [{"scope": "layerwise"}]}, "clipping.0.scope must be 'flat' with tr"),
        (ZEROTH, {"clipping": [{"rule": "batch"}]}, "clipping.0.rule must clip each sample"),
        ({"public": {"weight": 0.1}}, {}, "weight must be left out without training.public.rows"),
        ({"zeroth_order": {"reach": 0.1}}, {}, "reach must be left out without"),
    ],
)  # fmt: skip
def test_what_has_no_prediction_is_named(
    training: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(experiment.ConfigError, match=message):
        experiment.config(**small(training, **fields))


def test_one_sample_is_private_at_least() -> None:
    with pytest.raises(experiment.ConfigError, match=r"'training.public.rows': .* of the 24 .* 24"):
        only_case({"public": {"rows": 24}})


def test_default_rules_are_flat_where_layers_have_no_prediction() -> None:
    for training, scopes in ((SHARP, {"flat"}), (PUBLIC, {"flat", "layerwise"})):
        fields = small(training)
        fields.pop("clipping")
        config = experiment.config(**fields)
        assert {rule.scope for rule in config.clipping} == scopes
        assert experiment.config(**config.model_dump()) == config


def swept(training: dict[str, Any], **fields: Any) -> sweep.Results:
    grid = {"learning_rates": [0.1, 0.5], "clip_norms": [0.5, 2.0], "noise_multipliers": [0.0]}
    training = {"steps": 8, "n_predicted": 100, "n_seeds": 60} | training
    fields = {"grid": grid | fields.pop("grid", {})} | fields
    shared = {name: part for name, part in small({}).items() if name in ("data", "model")}
    return sweep.run(sweep.config(**shared | fields | {"training": training}))


@pytest.mark.parametrize("steps", often_or_slow([PUBLIC | SHARP, PUBLIC, SHARP], [PUBLIC | SHARP]))
def test_cells_of_other_steps_are_predicted_one_by_one(steps: dict[str, Any]) -> None:
    found = swept(steps | {"n_predicted": 2, "n_seeds": 1})
    for predicted, observed in zip(found.predicted, known(found.observed), strict=True):
        np.testing.assert_allclose(predicted.loss, observed.loss, rtol=1e-9)
        np.testing.assert_allclose(known(predicted.test_loss), known(observed.test_loss), rtol=1e-9)
    assert found.kernels == ["frozen"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [PUBLIC | SHARP, ZEROTH])
def test_noisy_cells_of_other_steps(steps: dict[str, Any]) -> None:
    found = swept(steps, grid={"epsilons": [8.0], "noise_multipliers": []})
    for predicted, observed in zip(found.predicted, known(found.observed), strict=True):
        np.testing.assert_allclose(predicted.loss, observed.loss, rtol=0.1)
    assert min(found.weight_noise) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["frozen", "auto"])
def test_each_cell_has_the_noise_that_is_best_for_it(kernels: str, tmp_path: Path) -> None:
    grid = {"epsilons": [8.0], "noise_multipliers": [], "clip_norms": [0.5]}
    found = swept(BEST, grid=grid, kernels=kernels)
    (plane,) = found.planes
    turns = ntkdp.batches.Cyclic(4)
    expected = privacy.Budget(8.0, 1e-4).noise_multiplier(8, batches=turns)
    assert plane.noise_multiplier == pytest.approx(expected)
    strategies = [ntkdp.noise.Correlated(known(cell.strategy)) for cell in found.cells]
    for strategy in strategies:
        assert strategy.sensitivity(turns, 8) == pytest.approx(2**0.5)
    first, last = (one.strategy / one.strategy[0] for one in strategies)
    assert np.abs(first - last).max() > 1e-3
    for predicted, observed in zip(found.predicted, known(found.observed), strict=True):
        np.testing.assert_allclose(predicted.loss, observed.loss, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": SHARP, "grid": {"scopes": ["layerwise"]}}, "grid.scopes must be"),
        (
            {"training": ZEROTH, "grid": {"rules": ["batch"], "noise_multipliers": [0.0]}},
            "grid.rules must not hold 'batch' with training.zeroth_order",
        ),
        ({"training": PUBLIC, "kernels": "between times"}, "'frozen' with training.public"),
    ],
)
def test_what_a_sweep_cannot_predict_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(experiment.ConfigError, match=message):
        sweep.config(**fields)
