"""What ``ntkdp explore`` shows is what runs and accountants say, whatever slider moves."""

import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import ntkdp
from ntkdp import cli, clipping, dp_sgd, experiment, losses, privacy, stochastic_flow
from ntkdp.cli import _explore, _predict
from ntkdp.cli._demonstration.compilation import Compilation
from ntkdp.cli._exploration import kernels, words
from ntkdp.cli._exploration.explorer import AXIS, Explorer
from ntkdp.cli._exploration.program import Head, Measured, Mechanism, Numbers, drawn, ends
from ntkdp.cli._exploration.setting import DIGITS, INFINITE, OWN, Position, setting_of
from ntkdp.experiment import ConfigError

N, M, D, K = 12, 8, 3, 3
X = jax.random.normal(jax.random.key(0), (N + M, D))
Y = jax.random.randint(jax.random.key(1), (N + M,), 0, K)
START = 0.5 * jax.random.normal(jax.random.key(2), (N + M, K))
LOSS = losses.SoftmaxCrossEntropy()
#: A linear head on few digits.
HEAD: dict[str, Any] = {
    "data": {"n_train": 40, "n_test": 20},
    "model": {"widths": []},
    "training": {"learning_rate": 0.7, "steps": 6, "epsilon": 4.0, "delta": 1e-3},
    "clipping": [{"clip_norm": 0.3}],
}


def kernel_flow(rule: clipping.ClippingRule) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(
        ntkdp.FeatureKernel(X[:N]),
        Y[:N],
        LOSS,
        rule,
        test_kernel=ntkdp.FeatureKernel(X[N:], X[:N]),
        test_targets=Y[N:],
    )


def head(rule: clipping.ClippingRule) -> Head:
    classes = jax.nn.one_hot(Y, K)
    return Head(
        X[:N], X[N:], START[:N], START[N:], classes[:N], classes[N:], LOSS, rule, "mean"
    )  # fmt: skip


def mechanism(R: Any, rate: Any, sigma: float = 0.0, q: float = 1.0) -> Mechanism:
    return Mechanism(*(jnp.asarray(number) for number in (R, rate, sigma * R, q)))


def numbers(seed: int, n_runs: int, kept: int = 5) -> Numbers:
    """For more steps than are kept."""
    return Numbers.of(jax.random.key(seed), head(clipping.Abadi(1.0)), n_runs, kept)


def test_kept_numbers_are_those_that_are_drawn_anew() -> None:
    few, many = numbers(8, 3, kept=1), numbers(8, 3, kept=4)
    assert (len(few.normals), len(many.normals)) == (1, 4)
    for step in (0, 3):
        for kept, anew in zip(many.at(jnp.asarray(step)), few.at(jnp.asarray(step)), strict=True):
            np.testing.assert_array_equal(kept, anew)


def test_without_noise_runs_are_the_recursion_at_every_mark() -> None:
    marks = jnp.array([0, 1, 4, 10])
    runs = drawn(head(clipping.Abadi(1.0)), mechanism(0.2, 0.9), marks, numbers(3, 2))
    exact = ntkdp.recursion(
        kernel_flow(clipping.Abadi(0.2)), (START[:N], START[N:]), learning_rate=0.9, steps=10
    )
    for name in Measured._fields:
        expected = getattr(exact, name)[marks]
        for run in getattr(runs.measured, name):
            np.testing.assert_allclose(run, expected, rtol=1e-10, atol=1e-12)


def test_no_move_of_a_slider_compiles_anything() -> None:
    learner, own = head(clipping.Abadi(1.0)), numbers(3, 4)
    drawn(learner, mechanism(0.2, 0.9, 1.0, 0.5), jnp.array([0, 1, 4, 10]), own)
    mechanisms = [
        (mechanism(R, rate, sigma, q), jnp.array([0, 1, 2, steps]))
        for R, rate, sigma, q, steps in ((2.0, 0.1, 0.3, 1.0, 7), (0.1, 3.0, 0.0, 0.1, 33))
    ]
    with Compilation() as compilation:
        for moved, marks in mechanisms:
            drawn(learner, moved, marks, own)
    assert compilation.seconds == 0


@pytest.mark.parametrize("rule", [clipping.Abadi, clipping.Automatic])
def test_noisy_runs_have_the_law_of_the_ensemble_and_of_dp_sgd(rule: Any) -> None:
    S, R, rate, sigma, q, steps = 2000, 0.4, 1.2, 0.8, 0.5, 8
    marks = jnp.array([0, steps])
    runs = drawn(head(rule(1.0)), mechanism(R, rate, sigma, q), marks, numbers(4, S))
    training: dict[str, Any] = {
        "learning_rate": rate, "steps": steps, "noise_multiplier": sigma, "sample_rate": q,
        "record_every": steps,
    }  # fmt: skip
    others = [
        stochastic_flow.ensemble(
            kernel_flow(rule(R)),
            (START[:N], START[N:]),
            noise_kernel=ntkdp.FeatureKernel(X),
            key=jax.random.split(jax.random.key(5), S),
            **training,
        ),
        dp_sgd.run(
            lambda W, x: x[:, D:] + x[:, :D] @ W,
            jnp.zeros((D, K)),
            jnp.concatenate([X, START], axis=1)[:N],
            Y[:N],
            LOSS,
            rule(R),
            test_x=jnp.concatenate([X, START], axis=1)[N:],
            test_targets=Y[N:],
            gradients="vmap",
            key=jax.random.split(jax.random.key(6), S),
            **training,
        ),
    ]
    for other in others:
        for name in ("loss", "test_loss"):
            ours, theirs = (np.asarray(getattr(a, name)[:, -1]) for a in (runs.measured, other))
            error = np.hypot(ours.std(), theirs.std()) / np.sqrt(S)
            assert abs(ours.mean() - theirs.mean()) < 4 * error
            assert abs(ours.std() / theirs.std() - 1) < 0.1


def test_each_cell_of_a_map_is_a_run_of_its_own() -> None:
    own, steps, learner = numbers(7, 1), jnp.asarray(9), head(clipping.Abadi(1.0))
    R, rate = jnp.array([0.1, 0.5, 2.0]), jnp.array([2.0, 0.5, 1.0])
    cells = ends(learner, mechanism(R, rate, 0.7, 0.5), steps, own)
    for number in range(3):
        alone = mechanism(R[number], rate[number], 0.7, 0.5)
        run = drawn(learner, alone, steps[None], own).measured
        for name in Measured._fields:
            np.testing.assert_allclose(getattr(cells, name)[number], getattr(run, name)[0, 0])


@pytest.mark.parametrize("loss", [losses.SquaredError(), losses.Huber(0.5)])
def test_other_losses_have_their_own_gradients(loss: losses.Loss) -> None:
    targets = jax.nn.one_hot(Y, K)
    learner = eqx.tree_at(lambda own: own.loss, head(clipping.Abadi(1.0)), loss)
    runs = drawn(learner, mechanism(0.3, 0.4), jnp.array([6]), numbers(0, 1))
    flow = ntkdp.KernelFlow(
        ntkdp.FeatureKernel(X[:N]), targets[:N], loss, clipping.Abadi(0.3)
    )  # fmt: skip
    exact = ntkdp.recursion(flow, START[:N], learning_rate=0.4, steps=6)
    np.testing.assert_allclose(runs.measured.loss[0, 0], exact.loss[-1])


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(setting_of(HEAD), 16)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_the_noise_spends_the_budget_and_its_variance_is_that_of_the_weights(
    explorer: Explorer, sample_rate: float
) -> None:
    place = explorer.setting.start._replace(sample_rate=sample_rate, clip_norm=0.5, steps=10)
    answer = explorer.answer(place)
    spent = privacy.epsilon(answer.noise_multiplier, sample_rate, 10, explorer.setting.delta)
    assert 0.97 * place.epsilon <= spent <= place.epsilon
    variance = stochastic_flow.weight_noise_variance(
        clipping.Abadi(0.5),
        40,
        learning_rate=place.learning_rate,
        steps=10,
        noise_multiplier=answer.noise_multiplier,
        sample_rate=sample_rate,
    )
    kernel = explorer.kernel(OWN)
    assert kernel.relative == 0  # noise does not move the kernel of a head
    explorer._kernels[OWN] = kernel._replace(relative=2.0)
    moved = explorer.answer(place).weight_noise
    explorer._kernels[OWN] = kernel
    np.testing.assert_allclose(moved, 2 * variance[answer.steps, 0], rtol=1e-6)


def test_the_spectrum_is_that_of_the_clipped_kernel(explorer: Explorer) -> None:
    place = explorer.setting.start
    problem, start = explorer.kernel(OWN).problem, explorer.answer(place).spectrum
    norms = np.asarray(
        ntkdp.per_sample_gradient_norms(
            problem.model.apply,
            problem.params,
            problem.x,
            problem.loss.output_gradient(problem.outputs, problem.targets),
        )
    )
    assert problem.model.features is not None
    features = np.asarray(problem.model.features(problem.x), np.float64)
    roots = np.sqrt(np.minimum(1.0, place.clip_norm / norms))
    whole = features @ features.T
    for found, matrix in (
        (start.kernel, whole),
        (start.first, roots[:, None] * whole * roots),
    ):
        expected = np.linalg.eigvalsh(matrix)[::-1] / len(features)
        np.testing.assert_allclose(found[:10], expected[:10], rtol=1e-4)


def test_the_map_has_clipping_norms_down_and_learning_rates_across(explorer: Explorer) -> None:
    place = explorer.setting.start._replace(clip_norm=AXIS[4], learning_rate=AXIS[5])
    part = explorer.part_of_map(place, 1)
    assert part.shape == (3, len(AXIS))
    answer = Explorer(explorer.setting, 1).answer(place)
    np.testing.assert_allclose(part[1, 5], answer.bands["test_accuracy"].mean[-1], atol=1e-6)


def test_reliability_counts_all_runs(explorer: Explorer) -> None:
    found = explorer.answer(explorer.setting.start).reliability
    assert found is not None
    assert found.bins.counts.sum() == 16 * 20
    assert 0 <= found.error.low <= found.error.mean <= found.error.high <= 1


def test_few_features_predict_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**DIGITS, "data": {"n_train": 120, "n_test": 60}}
    place = setting_of(fields).start
    ends = []
    for rank in (kernels.RANK, 180):
        monkeypatch.setattr(kernels, "RANK", rank)
        explorer = Explorer(setting_of(fields), 16)
        answer = explorer.answer(place._replace(width=INFINITE))
        ends.append([answer.bands[name].mean[-1] for name in ("loss", "test_loss")])
    np.testing.assert_allclose(ends[0], ends[1], rtol=0.03)


def test_a_finite_width_has_a_kernel_of_its_own() -> None:
    fields = {**DIGITS, "data": {"n_train": 30, "n_test": 10}}
    setting = setting_of(fields)
    assert setting.choices["width"] == ("64", "256", "768", "1024", "infinite")
    narrow = kernels.kernel_of(setting, "64")
    network = narrow.problem
    assert network.params[0][0].shape[1] == 64
    kernel = ntkdp.empirical_ntk(network.model.apply, network.params, network.x)
    mean = np.trace(np.asarray(kernel), axis1=2, axis2=3) / 10
    np.testing.assert_allclose(np.asarray(narrow.rows @ narrow.rows.T), mean, rtol=1e-2, atol=1e-2)


def test_runs_that_diverge_are_an_answer_too() -> None:
    fields = {**HEAD, "loss": "squared_error", "training": {"steps": 500, "learning_rate": 1.0}}
    fields["clipping"] = [{"clip_norm": 1e30}]
    explorer = Explorer(setting_of(fields), 2)
    answer = explorer.answer(explorer.setting.start._replace(learning_rate=100.0))
    assert not np.isfinite(answer.bands["loss"].mean[-1])
    assert "ends above its start" in words.summary(answer)


def test_a_regression_has_losses_alone() -> None:
    fields = {
        "data": {"name": "diabetes", "n_train": 30, "n_test": 10},
        "model": {"widths": []},
        "loss": "squared_error",
    }
    answer = Explorer(setting_of(fields), 2).answer(
        setting_of(fields).start._replace(learning_rate=0.01, clip_norm=1.0)
    )
    assert set(answer.bands) == {"loss", "test_loss", "clip_fraction"}
    assert answer.reliability is None


def test_the_copied_file_is_the_run_of_the_sliders(tmp_path: Path) -> None:
    fields = {
        **HEAD,
        "name": 'a "quoted" näme',
        "model": {"widths": [32, 32]},
        "training": {**HEAD["training"], "n_seeds": 3},
        "clipping": [{"rule": "automatic", "clip_norm": 0.3, "gamma": 0.05, "steps": 9}],
    }
    setting = setting_of(fields)
    assert setting.start.steps == 9
    place = Position("automatic", 1.5, 0.07, 2.0, 30, 0.15, "256")
    path = tmp_path / "copied.toml"
    path.write_text(setting.as_toml(place), encoding="utf-8")
    config = experiment.load_config(path)
    training, (case,) = config.training, config.clipping
    assert config.name == fields["name"]
    assert config.model.widths == [256, 256]
    assert (training.learning_rate, training.steps, training.sample_rate) == (0.07, 30, 0.15)
    assert (training.epsilon, training.delta, training.n_seeds) == (2.0, 1e-3, 3)
    assert (case.rule, case.clip_norm, case.gamma) == ("automatic", 1.5, 0.05)
    assert case.steps is None
    # Opened again, sliders start where they stood; predict and compare read the same file.
    again = setting_of(tomllib.loads(path.read_text(encoding="utf-8")))
    assert again.start._replace(width="256") == place
    other = setting.fields_at(place._replace(rule="abadi", width=INFINITE))
    assert other["clipping"] == [{"rule": "abadi", "clip_norm": 1.5}]
    assert other["model"] == {"widths": [32, 32]}


def test_predict_takes_the_copied_file(tmp_path: Path) -> None:
    explorer = Explorer(setting_of(HEAD), 200)
    place = explorer.setting.start
    path = tmp_path / "copied.toml"
    path.write_text(explorer.setting.as_toml(place), encoding="utf-8")
    settings = _predict._settings(path, None, None, None, None, None, None)
    (forecast,) = experiment.forecast(settings)
    answer = explorer.answer(place)
    np.testing.assert_allclose(answer.noise_multiplier, forecast.noise_multiplier)
    ours, theirs = answer.bands["loss"], forecast.final("loss")
    assert theirs is not None
    spread = theirs[2] - theirs[1]
    assert abs(ours.mean[-1] - theirs[0]) < 0.2 * spread
    assert abs((ours.high - ours.low)[-1] / spread - 1) < 0.3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"training": {"optimizer": "adam"}}, "training.optimizer"),
        ({"training": {"momentum": 0.9}}, "training.momentum"),
        ({"training": {"noise_multiplier": 1.0}}, "training.epsilon"),
        ({"training": {"mu": 1.0}}, "training.mu"),
        ({"training": {"batches": {"kind": "cyclic", "n_batches": 2}}}, "training.batches.kind"),
        ({"clipping": [{"scope": "layerwise"}]}, "clipping.0.scope"),
        ({"clipping": [{"rule": "batch"}]}, "clipping.0.rule"),
        ({"clipping": [{"clip_norm": -1.0}]}, "R must be positive"),
        ({"data": {"n_train": 0}}, "data.n_train"),
    ],
)
def test_what_cannot_be_explored_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setting_of(fields)


def test_a_file_of_features_is_a_head(tmp_path: Path) -> None:
    np.savez(tmp_path / "features.npz", x=np.asarray(X), y=np.asarray(Y))
    setting = setting_of(_explore._fields(tmp_path / "features.npz"))
    assert setting.config.model.is_linear
    assert setting.choices["width"] == (OWN,)
    place = setting.start._replace(learning_rate=0.1, epsilon=100.0)
    answer = Explorer(setting, 2).answer(place)
    assert np.all(answer.weight_noise == 0)
    assert "the law of DP-SGD" in words.summary(answer)


def explore(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["explore", "--no-browser", *arguments])


def test_errors_name_the_argument_and_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = explore("--port", str(port))
        assert done.exit_code == 2
        assert f"--port {port}" in done.output
        assert "0 for a free one" in done.output
    done = explore("--port", "0", str(tmp_path / "missing.toml"))
    assert done.exit_code == 2
    assert "missing.toml" in done.output
    done = explore("--port", "0", str(tmp_path / "missing.npz"))
    assert done.exit_code == 2
    assert "missing.npz" in done.output
    assert explore("--port", "70000").exit_code == 2
    assert explore("--draws", "1").exit_code == 2


def test_without_the_extra_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    done = explore()
    assert done.exit_code == 2
    assert "ntkdp[explore]" in done.output
