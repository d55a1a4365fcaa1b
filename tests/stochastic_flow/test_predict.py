"""One call for a prediction: each method is the function that it stands for, and says so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known, often_or_slow

import ntkdp
from ntkdp import clipping, losses, optimizers, predict
from ntkdp.stochastic_flow import _predict

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)))
TEST_X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)))
Y, TEST_Y = jnp.arange(6) % 2, jnp.arange(3) % 2
DATA = (X, Y, TEST_X, TEST_Y)
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
MODEL = ntkdp.models.mlp([64], 2)
PARAMS = MODEL.init(jax.random.key(0), X)
LINEAR = jnp.asarray(np.random.default_rng(2).standard_normal((4, 2)))
STEPS: dict[str, Any] = {"learning_rate": 0.5, "steps": 8}


def linear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


@pytest.mark.parametrize(
    "method",
    often_or_slow(["frozen", "shifted", "response", "noise_path"], ["response"]),
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"optimizer": optimizers.SGD(momentum=0.9, weight_decay=0.1), "reduction": "sum"},
    ],
)
def test_a_linear_model_has_the_law_of_its_runs(method: Any, options: dict[str, Any]) -> None:
    settings = STEPS | {"learning_rate": 0.1, "noise_multiplier": 0.5, "sample_rate": 0.7}
    settings |= options
    predicted = predict(
        linear, LINEAR, DATA, LOSS, RULE, method=method, n_runs=1000, key=jax.random.key(1),
        **settings,
    )  # fmt: skip
    runs = ntkdp.dp_sgd.run(
        linear, LINEAR, X, Y, LOSS, RULE, test_x=TEST_X, test_targets=TEST_Y, gradients="vmap",
        key=jax.random.split(jax.random.key(2), 1000), **settings,
    )  # fmt: skip
    for name in ("loss", "test_loss"):
        ours, theirs = (np.asarray(getattr(path, name))[:, 1:] for path in (predicted, runs))
        error = np.sqrt((ours.var(0) + theirs.var(0)) / 1000)
        assert np.abs((ours.mean(0) - theirs.mean(0)) / error).max() < 4
    np.testing.assert_allclose(predicted.times, runs.times)
    assert not ntkdp.compare(predicted, runs).neglected


@pytest.mark.slow
def test_without_noise_there_is_one_run_and_it_is_exact() -> None:
    predicted = predict(MODEL, PARAMS, DATA, LOSS, RULE, key=jax.random.key(0), **STEPS)
    run = ntkdp.dp_sgd.run(
        MODEL.apply, PARAMS, X, Y, LOSS, RULE, test_x=TEST_X, test_targets=TEST_Y,
        gradients="vmap", key=jax.random.key(0), **STEPS,
    )  # fmt: skip
    np.testing.assert_allclose(predicted.loss, run.loss, rtol=1e-9)
    np.testing.assert_allclose(known(predicted.test_loss), known(run.test_loss), rtol=1e-9)
    assert "there is one run" in predicted.method


SAYS = "Kernel frozen at the start. The kernel moves by 0.0%"


@pytest.mark.slow
def test_it_says_what_it_chose_and_why() -> None:
    noise: dict[str, Any] = {"noise_multiplier": 0.6, "n_runs": 5, "key": jax.random.key(0)}
    moving = predict(MODEL, PARAMS, (X, Y), LOSS, RULE, **STEPS, **noise)
    assert moving.method.startswith("Response of the network to noise. ")
    assert "v(T) is" in moving.method
    assert ntkdp.Trajectory(jnp.arange(2.0), jnp.ones(2), jnp.ones(2)).method == ""


def test_a_saved_prediction_still_says_it(tmp_path: Any) -> None:
    predicted = predict(
        linear, LINEAR, (X, Y), LOSS, RULE, noise_multiplier=1e-4, n_runs=2,
        key=jax.random.key(0), **STEPS,
    )  # fmt: skip
    assert predicted.method.startswith(SAYS)
    predicted.save(tmp_path / "path.nc")
    assert ntkdp.Trajectory.load(tmp_path / "path.nc").method == predicted.method


@pytest.mark.slow
def test_each_method_by_name() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    noise: dict[str, Any] = {"noise_multiplier": 0.3, "key": keys, **STEPS}
    start = MODEL.apply(PARAMS, X), MODEL.apply(PARAMS, TEST_X)
    flow = ntkdp.stochastic_flow.TwoTimeFlow(
        MODEL, X, Y, LOSS, RULE, test_x=TEST_X, test_targets=TEST_Y
    )
    infinite = ntkdp.stochastic_flow.two_time_ensemble(flow, start, **noise)
    by_name = predict(MODEL, PARAMS, DATA, LOSS, RULE, method="two_time", **noise)
    np.testing.assert_array_equal(by_name.loss, infinite.loss)
    assert by_name.outputs is None
    response = ntkdp.stochastic_flow.ResponseFlow(
        MODEL.apply, PARAMS, X, Y, LOSS, RULE, test_x=TEST_X, test_targets=TEST_Y
    )
    expected = ntkdp.stochastic_flow.response_ensemble(response, about="start", **noise)
    by_name = predict(MODEL, PARAMS, DATA, LOSS, RULE, method="noise_path", **noise)
    np.testing.assert_array_equal(by_name.loss, expected.loss)


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError

    noise: dict[str, Any] = {"noise_multiplier": 0.3, "n_runs": 400, **STEPS}
    whole = predict(
        MODEL, PARAMS, DATA, LOSS, RULE, method="frozen", key=jax.random.key(0), **noise
    )
    monkeypatch.setattr(_predict, "_kernel", refuse)
    free = predict(MODEL, PARAMS, DATA, LOSS, RULE, key=jax.random.key(1), **noise)
    error = np.sqrt((whole.loss.var(0) + free.loss.var(0)) / 400)[1:]
    assert np.abs((whole.loss.mean(0) - free.loss.mean(0))[1:] / error).max() < 4


@pytest.mark.parametrize("method", ["frozen", pytest.param("response", marks=pytest.mark.slow)])
def test_adam_and_data_sets(method: Any) -> None:
    data = ntkdp.datasets.digits(n_train=8, n_test=4)
    model = ntkdp.models.mlp([16], 10)
    params = model.init(jax.random.key(0), data.x_train)
    runs = predict(
        model, params, data, LOSS, RULE, learning_rate=0.01, steps=5, noise_multiplier=0.5,
        optimizer=optimizers.Adam(), method=method, n_runs=3, outputs=True, key=jax.random.key(0),
    )  # fmt: skip
    assert runs.test_outputs is not None
    assert runs.test_outputs.shape == (3, 6, 4, 10)


def test_bad_arguments_are_named() -> None:
    noise: dict[str, Any] = {"noise_multiplier": 1.0, "key": jax.random.key(0), **STEPS}
    with pytest.raises(ValueError, match=r"'two_time' without a model of ntkdp\.models"):
        predict(linear, LINEAR, (X, Y), LOSS, RULE, method="two_time", **noise)
    with pytest.raises(ValueError, match="n_runs"):
        predict(linear, LINEAR, (X, Y), LOSS, RULE, n_runs=0, **noise)
