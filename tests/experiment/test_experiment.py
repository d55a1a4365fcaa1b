"""The main job end to end, small: predictions hold, files are whole, folders are safe."""

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from helpers import known, often_or_slow
from typer.testing import CliRunner

import ntkdp
from ntkdp import cli, experiment, privacy
from ntkdp._backend.config_files import describe
from ntkdp.experiment import _predictions, _problem, _run
from ntkdp.experiment._reporting import metrics as _metrics
from ntkdp.experiment._reporting import report as _report
from ntkdp.experiment._reporting import tables as _tables
from ntkdp.experiment._reporting import verdict as _verdict

SMALL: dict[str, Any] = {
    "predictions": ["exact", "frozen", "infinite", "recursion"],
    "data": {"n_train": 24, "n_test": 8},
    "model": {"widths": [256]},
    "training": {"steps": 40, "learning_rate": 0.5, "record_every": 10},
    "clipping": [{"clip_norm": 0.2}, {"clip_norm": 100.0}],
}


@pytest.fixture(scope="module")
def results() -> experiment.Results:
    return experiment.run(experiment.config(**SMALL))


@pytest.fixture(scope="module")
def run_folder(results: experiment.Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    _report.write_report(results, path)
    return path


def assert_close_and_ordered(results: experiment.Results) -> None:
    for case in results.cases:
        errors = {
            name: prediction.comparison.sup_relative_error
            for name, prediction in case.predictions.items()
        }
        # Step size alone; the drift of the kernel too; the width too.
        assert errors["exact"] < 0.01
        assert errors["frozen"] < 0.05
        assert errors["recursion"] < 0.05
        assert errors["infinite"] < 0.2
        assert all(prediction.trajectory.successful for prediction in case.predictions.values())


def test_predictions_are_close_and_ordered_by_what_they_neglect(
    results: experiment.Results,
) -> None:
    assert_close_and_ordered(results)


@pytest.mark.slow
def test_predictions_by_layer_are_close_and_ordered_too() -> None:
    layerwise = [{"clip_norm": 0.2, "scope": "layerwise"}]
    results = experiment.run(experiment.config(**SMALL | {"clipping": layerwise}))
    assert_close_and_ordered(results)
    assert float(results.cases[0].run.clip_fraction[0]) > 0.9


def test_clipping_norms_do_what_they_say(results: experiment.Results) -> None:
    small, large = results.cases
    assert float(small.run.clip_fraction[0]) == 1.0
    assert float(large.run.clip_fraction.max()) == 0.0
    assert float(large.run.loss[-1]) < float(small.run.loss[-1])


def test_the_large_norm_is_gradient_descent(results: experiment.Results) -> None:
    problem = experiment.problem_of(results.config)

    def loss(params: Any) -> jax.Array:
        outputs = problem.model.apply(params, problem.x)
        log_probabilities = jax.nn.log_softmax(outputs)
        picked = jnp.take_along_axis(log_probabilities, problem.targets[:, None], axis=1)
        return -jnp.mean(picked)

    params = problem.params
    step = jax.jit(
        lambda params: jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(loss)(params))
    )
    for _ in range(40):
        params = step(params)
    assert float(loss(params)) == pytest.approx(float(results.cases[1].run.loss[-1]), rel=1e-10)


def test_metrics_have_the_promised_form(results: experiment.Results, run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert len(metrics["results"]) == 8
    kernels = {"exact": None, "frozen": "empirical", "infinite": "infinite"}
    for entry in metrics["results"]:
        assert set(entry["clipping"]) == {"rule", "scope", "clip_norm"}
        expected = kernels.get(entry["prediction"], "empirical")
        assert entry["kernel"] == expected
        assert 0 <= entry["sup_relative_error"] < 0.2
        for side in ("predicted", "observed"):
            assert entry["final"][side]["loss"] > 0
            assert 0 <= entry["final"][side]["accuracy"] <= 1
        assert entry["seconds"]["prediction"] > 0
        assert entry["seconds"]["observation"] > 0
    first = metrics["results"][0]
    assert first["clipping"] == {"rule": "abadi", "scope": "flat", "clip_norm": 0.2}
    assert first["final"]["observed"]["loss"] == float(results.cases[0].run.loss[-1])


def test_the_learning_rate_of_every_case_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment.config(
        **SMALL
        | {
            "predictions": ["recursion"],
            "training": {"steps": 4, "learning_rate": 0.125},
            "clipping": [{"clip_norm": 0.2, "learning_rate": 0.375}, {"clip_norm": 100.0}],
        }
    )
    found = experiment.run(config)
    assert [case.learning_rate for case in found.cases] == [0.375, 0.125]
    # The times that a run passes through are those of the rate that is shown.
    assert [float(case.run.times[-1]) / 4 for case in found.cases] == [0.375, 0.125]
    titles: list[str] = []

    def only_titles(path: Path, figure: Any, form: str, dpi: int) -> None:
        if form == "png":
            titles.extend(ax.get_title() for ax in figure.get_figure(root=True).axes)
        path.write_bytes(b"")

    monkeypatch.setattr("ntkdp._results.figure_style.draw_into", only_titles)
    _report.write_report(found, tmp_path)
    for rate in ("0.375", "0.125"):
        # loss, relative error, clip fraction, test loss, test accuracy, margins
        assert sum(title.endswith(f"learning rate {rate}") for title in titles) == 6
        assert f"<td>{rate}</td>" in (tmp_path / "report.html").read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [entry["learning_rate"] for entry in metrics["results"]] == [0.375, 0.125]
    for columns in ("80", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        _tables.print_table(found)
        printed = capsys.readouterr().out
        assert "0.375" in printed
        assert "0.125" in printed


def test_metrics_can_be_recomputed_from_the_trajectories(run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics.json").read_text())
    with xr.open_datatree(run_folder / "trajectories.nc", engine="h5netcdf") as tree:
        tree.load()
    for entry in metrics["results"]:
        label = f"{entry['clipping']['scope']} abadi R={entry['clipping']['clip_norm']:g}"
        observed = np.asarray(tree[f"/{label}/observed"]["loss"])
        predicted = np.asarray(tree[f"/{label}/{entry['prediction']}"]["loss"])
        error = np.max(np.abs(predicted - observed)[1:] / observed[1:])
        assert entry["sup_relative_error"] == pytest.approx(error, rel=1e-12)
        share = np.max(np.abs(predicted - observed)) / np.max(np.abs(observed - observed[0]))
        assert entry["error_of_fall"] == pytest.approx(share, rel=1e-12)
        assert f">{share:.2%}</td>" in (run_folder / "report.html").read_text()


def test_the_page_stands_alone_and_shows_every_picture(run_folder: Path) -> None:
    page = (run_folder / "report.html").read_text()
    pictures = sorted(path.name for path in run_folder.glob("*.png"))
    assert {"loss.png", "clip_fraction.png", "spectrum_empirical.png"} <= set(pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "flat abadi R=0.2" in page


def test_divergence_is_said_and_written(tmp_path: Path, drawn_empty: None) -> None:
    config = experiment.config(
        **SMALL
        | {
            "predictions": ["recursion"],
            "loss": "squared_error",
            "training": {"steps": 400, "learning_rate": 50.0, "record_every": 100},
            "clipping": [{"rule": "none"}],
        }
    )
    results = experiment.run(config)
    _report.write_report(results, tmp_path)
    entry = json.loads((tmp_path / "metrics.json").read_text())["results"][0]
    # Of a prediction and a run that both overflow, not even the sign of the error is known.
    assert entry["sup_relative_error"] in ("nan", "inf")
    observed = float(entry["final"]["observed"]["loss"])
    np.testing.assert_equal(observed, float(results.cases[0].run.loss[-1]))
    assert entry["clipping"]["clip_norm"] is None
    assert "diverges" in entry["message"]["prediction"]
    assert "diverges" in entry["message"]["observation"]
    assert "diverges" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_momentum_noise_sampling_and_seeds(tmp_path: Path) -> None:
    config = experiment.config(
        **SMALL
        | {
            "predictions": ["frozen", "infinite", "recursion"],
            "training": {
                "steps": 30,
                "learning_rate": 0.01,
                "record_every": 5,
                "momentum": 0.5,
                "n_predicted": 5,
                "noise_multiplier": 0.05,
                "sample_rate": 0.5,
                "n_seeds": 3,
            },
            "clipping": [{"clip_norm": 0.5, "rule": "automatic", "gamma": 0.1}],
        }
    )
    results = experiment.run(config)
    case = results.cases[0]
    assert case.run.loss.shape == (3, 7)
    assert len({float(loss) for loss in case.run.loss[:, -1]}) == 3
    prediction = case.predictions["frozen"]
    np.testing.assert_allclose(prediction.trajectory.times, case.run.times, rtol=1e-12)
    assert prediction.comparison.sup_relative_error < 0.05
    # Discrete steps have the momentum itself, and the noise passes through it.
    for name, most in (("recursion", 0.05), ("infinite", 0.1)):
        drawn = case.predictions[name]
        assert drawn.trajectory.loss.shape == (5, 7)
        assert drawn.comparison.sup_relative_error < most, name
        assert drawn.trajectory.setup[0].optimizer_options == (("momentum", (0.5,)),)
    response = np.sum(((1 - 0.5 ** np.arange(1, 31)) / 0.5) ** 2)
    std = 0.01 * 0.05 * 0.5 / (0.5 * config.data.n_train)
    np.testing.assert_allclose(known(case.weight_noise), response * std**2, rtol=1e-6)
    _report.write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Without the noise: frozen kernel" in page
    assert "Without the sampling: frozen kernel" in page
    assert "differ in one sample: add or remove one sample" in page
    assert _metrics.metrics(results)["neighbours"] == "add or remove one sample"


@pytest.mark.slow
def test_noise_is_predicted_and_compared_as_a_distribution(
    tmp_path: Path, drawn_empty: None
) -> None:
    # At a budget, n_seeds runs of one network; the noise moves the kernel, v(T) = (T S/(n mu))^2.
    config = experiment.config(
        **SMALL
        | {
            "predictions": ["frozen", "infinite", "recursion"],
            "data": {"name": "gaussian", "n_train": 16, "n_test": 8, "options": {"n_features": 8}},
            "model": {"widths": [256], "activation": "relu"},
            "loss": "squared_error",
            "training": {
                "steps": 20,
                "learning_rate": 1.0,
                "record_every": 5,
                "mu": 0.75,
                "n_seeds": 60,
                "n_predicted": 400,
            },
            "clipping": [{"clip_norm": 0.5}],
        }
    )
    results = experiment.run(config)
    case = results.cases[0]
    assert case.noise_multiplier == pytest.approx(20**0.5 / 0.75)
    assert case.weight_noise == pytest.approx((20 * 0.5 / (16 * 0.75)) ** 2)
    for name in ("infinite", "recursion"):
        assert case.predictions[name].trajectory.loss.shape == (400, 5)
    errors = {
        name: prediction.comparison.sup_relative_error
        for name, prediction in case.predictions.items()
    }
    assert errors["infinite"] < 0.15
    # Which of the two ensembles is closer is not resolved by so few runs.
    assert max(errors["infinite"], errors["recursion"]) < errors["frozen"]
    measured = _metrics.metrics(results)["results"]
    bands = {entry["prediction"]: entry["band"] for entry in measured}
    assert bands["frozen"] is None
    assert bands["infinite"]["p_value"] > 0.01
    assert abs(bands["infinite"]["standardised_error"]) < 3
    # What a forecast by the law of the runs itself scores on average: E |L - L'| / 2.
    runs = np.asarray(case.run.loss)[:, 1:]  # All start at one loss, which is not scored.
    own = np.mean(np.abs(runs[:, None] - runs)) / 2
    for name in ("infinite", "recursion"):
        assert bands[name]["mean_crps"] == pytest.approx(own, rel=0.1)
    _report.write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "0.694 (flat abadi R=0.5)" in page
    assert "Without the noise: frozen kernel" in page
    # The 20th smallest and largest of 400 predicted runs are the band, for 361 of 401 places.
    predicted = np.sort(np.asarray(case.predictions["recursion"].trajectory.loss)[:, 1:], axis=0)
    share = np.mean((predicted[19] <= runs) & (runs <= predicted[-20]))
    assert f">{share:.0%} of {361 / 401:.0%}</td>" in page


def test_the_noise_of_weights_is_relative_to_their_own_variance() -> None:
    noise = {}
    for kind in ("ntk", "standard"):
        config = experiment.config(
            data={"n_train": 8, "n_test": 4},
            model={"widths": [50], "W_std": 2.0, "parameterization": kind},
            training={"steps": 5, "learning_rate": 0.1, "noise_multiplier": 2.0},
            clipping=[{"clip_norm": 0.5}],
        )
        problem, (rule,) = experiment.problem_of(config), experiment.rules_of(config)
        mechanism = _predictions.Mechanism.of(config, config.clipping[0], problem.n_params)
        noise[kind] = known(_predictions.weight_noise(config, problem, rule, mechanism))
    assert noise["ntk"] == pytest.approx(5 * (0.1 * 2 * 0.5 / 8) ** 2)
    # W^2 / N is 4 / 64 for the 64 pixels, and 1 / 50 for the last layer.
    assert noise["standard"] == pytest.approx(50 * noise["ntk"])


@pytest.mark.slow
def test_layerwise_noise_sampling_and_a_budget_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With so many outputs that the recursion leaves out the test points.
    monkeypatch.setattr("ntkdp.experiment._predictions._MOST_WITH_TEST", 10)
    config = experiment.config(
        **SMALL
        | {
            "predictions": ["infinite", "recursion"],
            "training": {
                "steps": 12,
                "learning_rate": 0.5,
                "record_every": 4,
                "epsilon": 4.0,
                "delta": 1e-3,
                "sample_rate": 0.5,
                "n_predicted": 50,
            },
            "clipping": [{"clip_norm": 0.2, "scope": "layerwise"}],
        }
    )
    results = experiment.run(config)
    case = results.cases[0]
    spent = privacy.epsilon(case.noise_multiplier, 0.5, 12, 1e-3)
    assert spent == pytest.approx(4.0, rel=0.01)
    for name, prediction in case.predictions.items():
        assert prediction.trajectory.successful, name
        assert prediction.comparison.sup_relative_error < 0.3, name
    assert case.predictions["infinite"].trajectory.test_loss is not None
    assert case.predictions["recursion"].trajectory.test_loss is None
    _report.write_report(results, tmp_path)
    assert (tmp_path / "test_loss.png").stat().st_size > 0
    assert "leaves out the test points" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"name": "digts"}}, ["field 'data'", "'digts'", "digits"]),
        ({"data": {"n_train": 5000}}, ["field 'data'", "n_train", "5000"]),
        ({"data": {"options": {"flatt": True}}}, ["field 'data'", "'flatt'", "flat"]),
        ({"data": {"name": "nowhere.npz"}}, ["field 'data'", "nowhere.npz"]),
        ({"model": {"activation": "rellu"}}, ["field 'model'", "'rellu'", "relu"]),
        (
            {"model": {"kind": "cnn", "widths": [4]}, "data": {"name": "gaussian"}},
            ["field 'model'", "cnn", "(16,)"],
        ),
        (
            {"clipping": [{"scope": "layerwise", "clip_norm": [0.1, 0.1, 0.1]}]},
            ["field 'clipping.0.clip_norm'", "3 entries for 2 parameter groups"],
        ),
        ({"loss": "logistic"}, ["field 'loss'", "logistic"]),
        ({"data": {"name": "diabetes"}}, ["field 'loss'", "diabetes"]),
    ],
)
def test_what_does_not_fit_together_names_its_field(
    changes: dict[str, Any], words: list[str]
) -> None:
    data = {"n_train": 24, "n_test": 8} | changes.pop("data", {})
    with pytest.raises(experiment.ConfigError) as caught:
        experiment.run(experiment.config(**SMALL | changes | {"data": data}))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
def test_regression_and_images_run() -> None:
    shared = {
        "predictions": ["frozen", "infinite"],
        "training": {"steps": 10, "learning_rate": 0.05},
        "clipping": [{"clip_norm": 0.5}],
    }
    regression = {
        "data": {"name": "diabetes", "n_train": 24, "n_test": 8},
        "loss": "squared_error",
        "model": {"widths": [64]},
    }
    images = {"data": {"n_train": 8, "n_test": 4}, "model": {"kind": "cnn", "widths": [8]}}
    for tree in (shared | regression, shared | images):
        case = experiment.run(experiment.config(**tree)).cases[0]
        assert case.predictions["frozen"].comparison.sup_relative_error < 0.05
    assert case.run.accuracy is not None


runner = CliRunner()


def _write_config(folder: Path) -> Path:
    path = folder / "small.toml"
    path.write_text(
        'name = "small"\npredictions = ["recursion"]\n[data]\nn_train = 8\nn_test = 4\n'
        "[model]\nwidths = [16]\n[training]\nsteps = 4\n[[clipping]]\nclip_norm = 0.5\n"
    )
    return path


def test_the_command_writes_a_run_and_refuses_to_write_over_it(
    tmp_path: Path, drawn_empty: None
) -> None:
    config, out = _write_config(tmp_path), tmp_path / "deep" / "run"
    arguments = ["compare", str(config), "--out", str(out)]
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "kernel recursion" in done.output
    written = {path.name for path in out.iterdir()}
    assert {"metrics.json", "trajectories.nc", "report.html", "loss.png"} <= written
    before = (out / "metrics.json").read_bytes()

    refused = runner.invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert "holds another run; pass --overwrite" in refused.output
    assert (out / "metrics.json").read_bytes() == before

    again = runner.invoke(cli.app, [*arguments, "--overwrite"])
    assert again.exit_code == 0, again.output
    assert (out / "metrics.json").read_bytes() != before
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_the_command_explains_bad_input_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    bad = tmp_path / "bad.toml"
    for text, words in (
        ("nam = 'x'", "unknown field 'nam'; did you mean 'name'?"),
        ("= nothing", "is not TOML"),
        ("[[clipping]]\nclip_norm = -1.0", "R must be positive"),
    ):
        bad.write_text(text)
        done = runner.invoke(cli.app, ["compare", str(bad), "--out", str(out)])
        assert done.exit_code == 2
        assert words in done.output
        assert "Traceback" not in done.output
        assert not out.exists()
    done = runner.invoke(cli.app, ["compare", str(tmp_path / "none.toml"), "--out", str(out)])
    assert done.exit_code == 2
    assert "does not exist" in done.output


def test_help_documents_every_field() -> None:
    done = runner.invoke(cli.app, ["compare", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for name, _, _ in describe(experiment.Config):
        assert name in done.output, name
    version = runner.invoke(cli.app, ["--version"])
    assert version.output.strip() == f"ntkdp {ntkdp.__version__}"


@pytest.mark.slow
def test_single_precision_follows_double(results: experiment.Results) -> None:
    config = experiment.config(
        **SMALL
        | {
            "dtype": "float32",
            "predictions": ["recursion"],
            "clipping": SMALL["clipping"][:1],
        }
    )
    single = experiment.run(config).cases[0]
    double = results.cases[0]
    assert single.run.loss.dtype == jnp.float32
    start = float(double.run.loss[0])
    # Initial weights are drawn in the precision asked for, so only the scale can be compared.
    assert math.isclose(float(single.run.loss[0]), start, rel_tol=0.5)
    assert single.predictions["recursion"].comparison.sup_relative_error < 0.05


def whole_case() -> dict[str, Any]:
    """A case as a folder holds it."""
    path = _run._fields(
        ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))
    )
    return {
        "noise_multiplier": 0.0,
        "weight_noise": 0.0,
        "run": path,
        "run_margins": np.ones((3, 2)),
        "run_seconds": 1.0,
        "predictions": {
            "recursion": {"trajectory": dict(path), "margins": np.ones((3, 2)), "seconds": 1.0}
        },
        "by_group": {
            "names": ["a", "b"],
            "counts": [1, 2],
            "test_counts": [0, 1],
            "delta": 0.5,
            "run": of_groups(),
            "predictions": {"recursion": of_groups()},
        },
    }


def of_groups() -> dict[str, Any]:
    """Numbers of two subgroups as a folder holds them."""
    of_times = dict.fromkeys(("loss", "accuracy", "test_loss", "test_accuracy"), np.ones((3, 2)))
    return {**of_times, "clipped": np.ones(2), "epsilon": np.ones(2)}


OF_CASE = experiment.config(**{"predictions": ["recursion"], "clipping": [{"clip_norm": 0.2}]})
OTHERS: list[Any] = [
    None, 7, "text", [], {}, ["abadi"], {"float": 1}, float("nan"), np.ones(2), np.ones((2, 3, 4)),
    np.array([2.0, 1.0, 0.0]), np.array([0.0, np.nan, 2.0]), np.array(["a", "b", "c"]),
]  # fmt: skip


@pytest.mark.parametrize("other", [*OTHERS, "left out"], ids=str)
@pytest.mark.parametrize(
    "where",
    [
        ("run",),
        ("predictions",),
        ("predictions", "recursion"),
        ("predictions", "recursion", "trajectory"),
        ("run", "times"),
        ("run", "loss"),
        ("run", "outcome"),
        ("run", "clip_fraction"),
        ("run_margins",),
        ("predictions", "recursion", "margins"),
        ("by_group",),
        ("by_group", "names"),
        ("by_group", "run"),
        ("by_group", "run", "loss"),
        ("by_group", "predictions", "recursion"),
        ("predictions", "recursion", "trajectory", "times"),
    ],
    ids="/".join,
)
def test_other_content_of_a_case_is_an_error(where: tuple[str, ...], other: Any) -> None:
    content: Any = whole_case()
    assert _run._checked_case(OF_CASE, OF_CASE.clipping[0], content).run_seconds == 1.0
    part = content
    for name in where[:-1]:
        part = part[name]
    if isinstance(other, str) and other == "left out":
        del part[where[-1]]
    else:
        part[where[-1]] = other
    # Values are not judged, shapes and kinds are.
    judged = np.shape(other) != (3,) or np.asarray(other).dtype != float
    if where[-1] in ("loss", "clip_fraction") and not judged:
        return
    if ("margins" in where[-1] or where == ("by_group",)) and other is None:  # not asked for
        return
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        _run._checked_case(OF_CASE, OF_CASE.clipping[0], content)


OWN_MODEL = """
import jax, jax.numpy as jnp
from ntkdp.models import Model

def init(key, x):
    keys = jax.random.split(key)
    return {"in": jax.random.normal(keys[0], (x.shape[1], 32)) / x.shape[1] ** 0.5,
            "out": jax.random.normal(keys[1], (32, 10)) / 32 ** 0.5}

def normalised(n_outputs):
    def apply(params, x):
        hidden = jnp.tanh(x @ params["in"])
        return hidden / (1 + jnp.linalg.norm(hidden, axis=1, keepdims=True)) @ params["out"]
    return Model(init, apply)

def affine(n_outputs):
    def apply(params, x):
        return jnp.arange(10.0) / 5 + x @ params["in"] @ jnp.eye(32, 10)
    return Model(lambda key, x: {"in": init(key, x)["in"]}, apply)

def no_model(n_outputs):
    return n_outputs

finished = normalised(10)
number = 7
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the folder where the command is run."""
    name = "models_of_a_test"
    (tmp_path / f"{name}.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_model_of_ones_own_under_any_optimizer(own_models: str) -> None:
    """Without noise the response is exact, and the recursion is for a model that is linear."""
    shared = SMALL | {"model": {"kind": "function", "function": f"{own_models}:normalised"}}
    shared |= {"clipping": [{"clip_norm": 0.2}]}
    shared.pop("predictions")
    training = {"steps": 12, "learning_rate": 0.05, "record_every": 4}
    adam = experiment.run(
        experiment.config(**shared | {"training": {**training, "optimizer": "adam"}})
    )
    for case in adam.cases:
        assert list(case.predictions) == ["response"]
        found = case.predictions["response"].comparison
        assert found.sup_relative_error < 1e-9
    decayed = {**training, "momentum": 0.8, "nesterov": True, "weight_decay": 0.5}
    # What is left of its outputs if the weights are zero does not decay.
    shared |= {"model": {"kind": "function", "function": f"{own_models}:affine"}}
    for case in experiment.run(experiment.config(**shared | {"training": decayed})).cases:
        assert list(case.predictions) == ["recursion"]
        assert case.predictions["recursion"].comparison.sup_relative_error < 1e-9


def test_models_that_cannot_be_had_are_named(own_models: str) -> None:
    def problem(function: str, **options: Any) -> Any:
        shared = SMALL | {"model": {"kind": "function", "function": function}} | options
        return experiment.run(experiment.config(**shared))

    with pytest.raises(experiment.ConfigError, match=r"'model.function': 'nowhere:f' cannot be"):
        problem("nowhere:f")
    with pytest.raises(experiment.ConfigError, match="has no attribute 'absent'"):
        problem(f"{own_models}:absent")
    with pytest.raises(experiment.ConfigError, match=r"must return an ntkdp.models.Model, got int"):
        problem(f"{own_models}:no_model")
    with pytest.raises(experiment.ConfigError, match=r"Model, or such a model, got 7 of type int"):
        problem(f"{own_models}:number")
    with pytest.raises(experiment.ConfigError, match="'predictions': must not ask for 'infinite'"):
        problem(f"{own_models}:normalised", predictions=["infinite"])


def test_a_name_is_short_for_the_section_of_a_function(own_models: str, tmp_path: Path) -> None:
    name = f"{own_models}:normalised"
    path = tmp_path / "short.toml"
    path.write_text(f'model = "{name}"\n[data]\nn_train = 16\n')
    short = experiment.load_config(path)
    long = experiment.config(data={"n_train": 16}, model={"kind": "function", "function": name})
    assert short == long
    assert experiment.config(**short.model_dump()) == long
    assert short.predictions == ["frozen", "recursion"]
    assert ntkdp.sweep.config(model=name).model == long.model
    with pytest.raises(experiment.ConfigError, match="must name a module and a function, such as"):
        experiment.config(model="normalised")
    with pytest.raises(experiment.ConfigError, match=r"field 'model'.* got 7"):
        experiment.config(model=7)


def test_a_model_is_given_in_python(own_models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model, as a function and by its name it is the same network."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    module = importlib.import_module(own_models)
    fields = {name: value for name, value in SMALL.items() if name not in ("model", "predictions")}
    fields |= {"clipping": [{"clip_norm": 0.2}], "training": {"steps": 4, "record_every": 2}}
    config = experiment.config(**fields)
    named = experiment.config(**fields, model=f"{own_models}:normalised")
    expected = experiment.run(named).cases[0]
    for model in (module.finished, module.normalised, f"{own_models}:normalised"):
        results = experiment.run(config, model=model)
        (case,) = results.cases
        assert list(case.predictions) == ["frozen", "recursion"]
        np.testing.assert_array_equal(case.run.loss, expected.run.loss)
        problem = experiment.problem_of(config, model)
        assert float(case.run.loss[0]) == pytest.approx(
            float(jnp.mean(problem.loss(problem.outputs, problem.targets))), rel=1e-12
        )
    given = experiment.run(config, model=module.finished).config
    assert given.model.kind == "given"
    assert given.model.words == "the network given"
    assert experiment.config(**given.model_dump()) == given
    with pytest.raises(experiment.ConfigError, match="'given' stands for the argument model"):
        experiment.run(given)
    (forecast,) = experiment.forecast(config, method="frozen", model=module.finished)
    assert float(forecast.trajectory.loss[0]) == pytest.approx(float(expected.run.loss[0]))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda n_outputs: n_outputs, "model must return an ntkdp.models.Model, got int"),
        (ntkdp.models.linear(3), "field 'model': must have 10 outputs for the classification"),
        ("nowhere:make", "'nowhere:make' cannot be imported: .* modules are looked for in /"),
        ("nowhere", "model.function must name a module and a function"),
    ],
)
def test_a_model_that_cannot_be_given_is_named(model: Any, words: str) -> None:
    with pytest.raises(experiment.ConfigError, match=r"model must be a function of .* got 7 of"):
        _problem._made_by(7, 10, "model")
    fields = {name: value for name, value in SMALL.items() if name != "model"}
    config = experiment.config(**fields | {"predictions": ["recursion"]})
    with pytest.raises(experiment.ConfigError, match=words):
        experiment.run(config, model=model)
    with pytest.raises(experiment.ConfigError, match="'model': must be left out where the argume"):
        experiment.run(experiment.config(**SMALL), model=model)


def test_tokens_stay_whole_for_a_model_that_looks_them_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 24)
    tokens = rng.integers(0, 10, (24, 5)) + 10 * y[:, None]
    path = tmp_path / "tokens.npz"
    np.savez(path, x=tokens, y=y)

    def bag_of_words(n_outputs: int) -> ntkdp.models.Model:
        def init(key: Any, x: Any) -> Any:
            keys = jax.random.split(key)
            return {
                "table": jax.random.normal(keys[0], (20, 16)),
                "out": jax.random.normal(keys[1], (16, n_outputs)) / 4,
            }

        def apply(params: Any, x: Any) -> Any:
            assert jnp.issubdtype(x.dtype, jnp.integer)
            return jnp.mean(params["table"][x], axis=1) @ params["out"]

        return ntkdp.models.Model(init, apply)

    config = experiment.config(
        data={"name": str(path), "n_train": 16, "n_test": 8, "standardise": "none"},
        training={"steps": 6, "learning_rate": 0.1, "record_every": 3},
        clipping=[{"clip_norm": 0.5}],
    )
    (case,) = experiment.run(config, model=bag_of_words).cases
    assert case.predictions["recursion"].comparison.sup_relative_error < 0.02
    assert float(case.run.loss[-1]) < float(case.run.loss[0])


SUMS = {"kind": "shuffled", "n_batches": 4}, {"kind": "optimal_for_sums", "n_bands": 4}
ROOTS = {"kind": "cyclic", "n_batches": 4}, {"kind": "square_root", "n_bands": 8}
BANDS = {"kind": "cyclic", "n_batches": 2}, {"kind": "toeplitz", "coefficients": [1, 0.5]}


@pytest.mark.parametrize(
    ("batches", "noise", "names"),
    often_or_slow(
        [(*given, ["infinite", "recursion", "response"]) for given in (SUMS, ROOTS, BANDS)]
        + [(*ROOTS, ["recursion"])],
        [(*ROOTS, ["recursion"])],
    ),
)
def test_batches_and_correlated_noise_are_predicted(
    batches: dict[str, Any], noise: dict[str, Any], names: list[str]
) -> None:
    training = {
        "steps": 24, "learning_rate": 0.3, "record_every": 6, "n_seeds": 40, "n_predicted": 40,
        "epsilon": 8.0, "delta": 1e-2, "batches": batches, "noise": noise,
    }  # fmt: skip
    config = experiment.config(
        **SMALL | {"training": training, "predictions": names, "clipping": [{"clip_norm": 0.2}]}
    )
    (case,) = experiment.run(config).cases
    assert batches["kind"].capitalize() in repr(case.run.setup[0].batches)
    assert known(case.weight_noise) > 0
    alone = privacy.Budget(8.0, 1e-2).noise_multiplier(24)
    assert abs(case.noise_multiplier / alone - 1) > 0.1
    assert list(case.predictions) == names
    for name, prediction in case.predictions.items():
        allowed = 0.2 if name == "infinite" else 0.05
        assert prediction.comparison.sup_relative_error < allowed


def test_a_budget_is_spent_on_batches_of_a_fixed_size() -> None:
    training = {
        "epsilon": 8.0, "delta": 1e-2, "steps": 6, "batches": {"kind": "fixed_size", "size": 6}
    }  # fmt: skip
    config = experiment.config(
        **SMALL
        | {"training": training, "predictions": ["recursion"], "clipping": [{"clip_norm": 0.2}]}
    )
    results = experiment.run(config)
    spent = privacy.epsilon(
        results.cases[0].noise_multiplier, 6 / 24, 6, 1e-2, sampling="fixed_size"
    )
    assert 7.9 < spent <= 8
    assert _metrics.metrics(results)["neighbours"] == "replace one sample"


ADAPTIVE = {"quantile": 0.6, "rate": 0.3}


def adapting(**training: Any) -> experiment.Config:
    shared = SMALL | {"clipping": [{"clip_norm": 3.0}]}
    shared.pop("predictions")
    steps = {"steps": 20, "learning_rate": 0.1, "record_every": 5, "adaptive": ADAPTIVE}
    return experiment.config(**shared | {"training": steps | training})


def test_a_clipping_norm_that_moves_is_predicted_by_the_recursion() -> None:
    (case,) = experiment.run(adapting()).cases
    assert list(case.predictions) == ["recursion"]
    assert case.predictions["recursion"].comparison.sup_relative_error < 0.05
    assert float(case.run.clip_fraction[0]) < 0.1
    assert float(case.run.clip_fraction[-1]) > 0.2
    predicted = known(case.predictions["recursion"].trajectory.clip_norm)
    np.testing.assert_allclose(predicted, known(case.run.clip_norm), rtol=0.1)


@pytest.mark.slow
def test_a_noisy_clipping_norm_is_predicted_too() -> None:
    noise = {"noise_multiplier": 0.5, "n_seeds": 40, "n_predicted": 80}
    (case,) = experiment.run(adapting(**noise, adaptive=ADAPTIVE | {"count_noise": 3.0})).cases
    assert case.weight_noise is None
    assert case.predictions["recursion"].comparison.sup_relative_error < 0.05


def test_what_cannot_adapt_is_named() -> None:
    for changes, message in (
        ({"optimizer": "adam"}, "must be left out with training.optimizer = 'adam'"),
        ({"noise": {"kind": "square_root", "n_bands": 2}}, "must be independent with training.ada"),
        ({"adaptive": {"quantile": 2.0}}, "less than or equal to 1"),
        ({"adaptive": {"rate": 0.1}}, "adaptive.rate must be left out without"),
    ):
        with pytest.raises(experiment.ConfigError, match=message):
            adapting(**changes)
    with pytest.raises(experiment.ConfigError, match=r"'training.adaptive': count_noise must be"):
        experiment.run(adapting(noise_multiplier=1.0))
    fields = SMALL | {"training": {"adaptive": ADAPTIVE}}
    with pytest.raises(experiment.ConfigError, match=r"'frozen' with training.adaptive"):
        experiment.config(**fields | {"predictions": ["frozen"]})
    nothing = fields | {"predictions": ["recursion"], "clipping": [{"rule": "none"}]}
    with pytest.raises(experiment.ConfigError, match=r"'training.adaptive': adaptive must be None"):
        experiment.run(experiment.config(**nothing))


def test_a_budget_without_an_accountant_is_named() -> None:
    made = {"batches": {"kind": "fixed_size", "size": 4}, "noise": BANDS[1]}
    training = {"epsilon": 8.0, "delta": 1e-2, **made}
    config = experiment.config(**SMALL | {"training": training, "predictions": ["recursion"]})
    with pytest.raises(experiment.ConfigError, match=r"'training': .*no accountant of FixedSize"):
        experiment.run(config)


@pytest.mark.slow
def test_a_linear_head_with_noise_is_exact_in_law() -> None:
    """Its kernel is that of infinite width too, noise and all, and test points need no more."""
    training = {
        "steps": 10, "learning_rate": 1.0, "noise_multiplier": 3.0, "n_seeds": 200,
        "n_predicted": 200, "record_every": 5,
    }  # fmt: skip
    config = experiment.config(
        predictions=["infinite", "recursion"],
        model={"widths": []},
        data=SMALL["data"],
        training=training,
        clipping=[{"clip_norm": 0.2}, {"clip_norm": 0.2, "scope": "layerwise"}],
    )
    assert config.model.words == "a linear head"
    assert experiment.noise_free(config) == []
    results = experiment.run(config)
    for case in results.cases:
        for prediction in case.predictions.values():
            for test in (False, True):
                drawn, observed = (
                    np.asarray(known(path.test_loss if test else path.loss))[:, -1]
                    for path in (prediction.trajectory, case.run)
                )
                spread = np.sqrt((drawn.var(ddof=1) + observed.var(ddof=1)) / 200)
                assert abs(drawn.mean() - observed.mean()) < 4 * spread
    assert not any("small v(T)" in words for words in _verdict.warnings(results))
