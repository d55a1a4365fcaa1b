"""Private runs that are predicted from a configuration or a file of features alone."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from typer.testing import CliRunner

from ntkdp import clipping, dp_sgd, experiment, losses, sweep
from ntkdp.cli import app
from ntkdp.comparison import standardised_error

N, D, STEPS, R, SIGMA = 40, 5, 12, 0.5, 3.0
LINEAR: dict[str, Any] = {
    "data": {"name": "gaussian", "n_train": N, "n_test": 10, "options": {"n_features": D}},
    "model": {"widths": []},
}
TRAINING = {"learning_rate": 0.8, "steps": STEPS, "noise_multiplier": SIGMA, "n_predicted": 400}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "digits.npz"
    rng = np.random.default_rng(0)
    y = np.arange(50) % 3
    np.savez(path, x=rng.normal(size=(50, 4)) + y[:, None], y=y)
    return path


def test_runs_of_a_linear_head_have_the_predicted_law(features: Path) -> None:
    fields = experiment.fields_of_features(features)
    config = experiment.config(**{**fields, "training": TRAINING, "clipping": [{"clip_norm": R}]})
    (one,) = experiment.forecast(config)
    problem = experiment.problem_of(config)
    run = dp_sgd.run(
        problem.model.apply, problem.params, problem.x, problem.targets,
        losses.SoftmaxCrossEntropy(), clipping.Abadi(R), learning_rate=0.8, steps=STEPS,
        noise_multiplier=SIGMA, record_every=2, key=jax.random.split(jax.random.key(9), 400),
    )  # fmt: skip
    assert one.trajectory.loss.shape == run.loss.shape
    z = standardised_error(one.trajectory.loss, run.loss)
    assert z is not None
    assert float(jnp.max(jnp.abs(z[1:]))) < 4
    mean, low, high = one.final("loss") or (math.nan,) * 3
    inside = np.mean((run.loss[:, -1] >= low) & (run.loss[:, -1] <= high))
    assert low < mean < high
    assert abs(inside - 0.9) < 0.06  # 4 standard errors
    assert "exact" in str(one.trajectory.method)


def test_epsilon_is_that_of_the_accountant(features: Path) -> None:
    fields = experiment.fields_of_features(features)
    training = {"learning_rate": 0.5, "steps": 6, "sample_rate": 0.25, "noise_multiplier": 1.2}
    config = experiment.config(**{**fields, "training": training, "clipping": [{}]})
    (one,) = experiment.forecast(config, method="frozen")
    known = privacy_loss_distribution.from_gaussian_mechanism(1.2, sampling_prob=0.25)
    assert one.delta == 1e-5
    assert one.epsilon == pytest.approx(
        known.self_compose(6).get_epsilon_for_delta(one.delta), rel=1e-2
    )


def test_without_noise_there_is_one_run_and_no_epsilon(features: Path) -> None:
    fields = experiment.fields_of_features(features)
    config = experiment.config(**{**fields, "training": {"steps": 3}, "clipping": [{}]})
    (one,) = experiment.forecast(config)
    assert one.epsilon is None
    final = one.final("test_accuracy")
    assert final is not None
    assert len(set(final)) == 1
    assert one.band("loss").mean.shape == one.trajectory.loss.shape


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"adaptive": {"quantile": 0.5}}, "training.adaptive"),
        ({"public": {"rows": 5}}, "training.public"),
        ({"noise": {"kind": "kernel_optimal", "n_bands": 2}}, "training.noise.kind"),
    ],
)
def test_training_without_such_a_prediction_is_named(training: dict[str, Any], field: str) -> None:
    config = experiment.config(**{**LINEAR, "training": training, "clipping": [{}]})
    with pytest.raises(experiment.ConfigError, match=rf"'{field}': must be left out"):
        experiment.forecast(config)


def test_a_file_that_holds_no_features_is_named(tmp_path: Path) -> None:
    with pytest.raises(experiment.ConfigError, match=r"none\.npz.*does not exist"):
        experiment.fields_of_features(tmp_path / "none.npz")


def test_numbers_are_fitted_by_squared_error(tmp_path: Path) -> None:
    path = tmp_path / "heights.npz"
    rng = np.random.default_rng(1)
    np.savez(path, x=rng.normal(size=(30, 3)), y=rng.normal(size=30))
    fields = experiment.fields_of_features(path)
    assert (fields["loss"], fields["name"]) == ("squared_error", "heights")
    assert fields["data"]["n_train"] + fields["data"]["n_test"] == 30


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_predicts_a_file_of_features(features: Path) -> None:
    done = command("predict", str(features), "--epsilon", "2", "--steps", "5", "--json")
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(done.stdout)
    assert entry["epsilon"] == pytest.approx(2.0, abs=0.01)
    assert entry["steps"] == 5
    assert entry["delta"] == 1e-5
    ends = entry["final"]["loss"]
    assert ends["low"] < ends["mean"] < ends["high"]


def test_options_replace_the_fields_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(
        "data = {n_train = 12, n_test = 4}\nmodel = {widths = []}\n"
        "training = {steps = 2, epsilon = 1.0, delta = 1e-3}\n"
    )
    options = ("--epsilon", "4", "--clip-norm", "0.3", "--learning-rate", "0.2")
    done = command("compare", str(path), "--predict-only")
    assert done.exit_code == 0, done.output
    assert "flat abadi R=1000" in done.stdout
    done = command("predict", str(path), *options, "--method", "frozen")
    assert done.exit_code == 0, done.output
    assert "flat abadi R=0.3" in done.stdout
    assert "Kernel frozen at the start" in done.stdout


def test_predict_only_writes_nothing(tmp_path: Path) -> None:
    done = command("compare", "--predict-only", "--out", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert "--predict-only writes nothing" in done.output
    assert not list(tmp_path.iterdir())


def test_the_command_advises_from_a_file_of_features(features: Path) -> None:
    done = command("advise", str(features), "--epsilon", "3", "--steps", "20")
    assert done.exit_code == 0, done.output
    assert "epsilon 3: train at learning rate" in done.stdout
    assert "expect a test accuracy of" in done.stdout
    assert "no epsilon here counts that" in done.stdout


def test_advice_names_the_map_that_has_no_cell_to_train_at(features: Path) -> None:
    fields = experiment.fields_of_features(features)
    grid = {"learning_rates": [1e6], "clip_norms": [1e3], "epsilons": [1.0]}
    config = sweep.config(**fields, grid=grid, training={"steps": 3}, observe=False)
    first, warning = sweep.advice_in_words(sweep.run(config))
    assert "grid must have a cell that converges" in first
    assert "pay for looking" in warning
