"""Margins by class: their definition, and that they tell what a loss hides."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import often_or_slow

import ntkdp
from ntkdp.experiment._of_outputs import margins as _margins

SMALL: dict[str, Any] = {
    "data": {"n_train": 12, "n_test": 6},
    "model": {"widths": [8]},
    "training": {
        "steps": 4,
        "record_every": 1,
        "noise_multiplier": 0.5,
        "n_seeds": 3,
        "n_predicted": 5,
    },
    "clipping": [{"clip_norm": 0.5}],
}


def test_they_are_means_over_samples_and_runs() -> None:
    outputs = np.random.default_rng(0).standard_normal((4, 2, 5, 3))
    labels = np.array([0, 2, 2, 0, 0])
    zeros = jnp.zeros((4, 2))
    path = ntkdp.Trajectory(jnp.arange(2.0), zeros, zeros, outputs=jnp.asarray(outputs))
    found = _margins.margins(path, labels)
    assert found is not None
    for column, label in enumerate((0, 2)):
        chosen = outputs[:, :, labels == label]
        others = np.delete(chosen, label, axis=-1).mean(-1)
        expected = (chosen[..., label] - others).mean((0, 2))
        np.testing.assert_allclose(found[:, column], expected)


def test_one_run_and_no_outputs() -> None:
    path = ntkdp.Trajectory(jnp.arange(2.0), jnp.zeros(2), jnp.zeros(2))
    assert _margins.margins(path, np.arange(3)) is None
    assert _margins.error_of_margins(None, np.ones((2, 2))) is None
    predicted, observed = np.array([[9.0, 9.0], [1.1, 1.8]]), np.array([[0.0, 0.0], [1.0, 2.0]])
    error = _margins.error_of_margins(predicted, observed)
    assert error == pytest.approx(0.15 / 1.5)


@pytest.mark.parametrize(
    "loss",
    ["softmax_cross_entropy", pytest.param("squared_error", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("prediction", often_or_slow(["recursion", "response"], ["recursion"]))
def test_a_comparison_has_them_for_classes(loss: str, prediction: str) -> None:
    config = ntkdp.experiment.config(predictions=[prediction], loss=loss, **SMALL)
    results = ntkdp.experiment.run(config)
    (case,) = results.cases
    problem = ntkdp.experiment.problem_of(config)
    labels = _margins.labels_of(problem)
    assert labels is not None
    assert case.run_margins is not None
    assert case.run_margins.shape == (5, len(np.unique(labels)))
    assert case.run.outputs is None
    # At the start all is known: the outputs of the network.
    start = np.asarray(problem.outputs)
    own = np.take_along_axis(start, labels[:, None], 1)[:, 0]
    margin = own - (start.sum(1) - own) / (start.shape[1] - 1)
    expected = [margin[labels == label].mean() for label in np.unique(labels)]
    for found in (case.run_margins, *(p.margins for p in case.predictions.values())):
        assert found is not None
        np.testing.assert_allclose(found[0], expected, rtol=1e-9)


@pytest.mark.slow
def test_a_regression_has_none_and_neither_have_too_many_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    regression = SMALL | {"data": {"name": "diabetes", "n_train": 12, "n_test": 6}}
    config = ntkdp.experiment.config(loss="squared_error", **regression)
    problem = ntkdp.experiment.problem_of(config)
    assert _margins.labels_of(problem) is None
    assert not _margins.keeps_outputs(problem, 1, 1)
    monkeypatch.setattr(_margins, "_MOST_BYTES", 1)
    config = ntkdp.experiment.config(predictions=["recursion"], **SMALL)
    case = ntkdp.experiment.run(config).cases[0]
    assert case.run_margins is None
    assert case.predictions["recursion"].margins is None
