"""A sweep end to end, small: maps agree, cells survive a kill, nothing runs twice."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known
from typer.testing import CliRunner

import ntkdp
from ntkdp import cli, experiment, sweep
from ntkdp._results import cell_file
from ntkdp._results.checkpoints import CellFolder
from ntkdp.comparison._cells import CellMetrics
from ntkdp.sweep import _config, _report, _run

RATES, NORMS = [0.3, 3.0, 30.0], [0.001, 0.01, 0.1]
SMALL: dict[str, Any] = {
    "data": {"n_train": 32, "n_test": 24},
    "model": {"widths": [256]},
    "training": {"steps": 12, "n_predicted": 2, "delta": 1e-2},
    "grid": {"learning_rates": RATES, "clip_norms": NORMS, "noise_multipliers": [0.0]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "small"


@pytest.fixture(scope="module")
def results(folder: Path) -> sweep.Results:
    found = sweep.run(sweep.config(**SMALL), folder)
    _report.write_report(found, folder)
    return found


def without_seconds(path: Path) -> Any:
    """The metrics of a sweep without what a clock said."""
    tree = json.loads((path / "metrics.json").read_text())
    return {name: part for name, part in tree.items() if name not in ("seconds", "speed_up")}


def test_the_maps_agree(results: sweep.Results) -> None:
    assert results.observed is not None
    predicted, observed = results.predicted[0], results.observed[0]
    for name, part in predicted.items():
        seen = dict(observed.items())[name]
        assert part is not None
        assert seen is not None
        assert part.shape == seen.shape == (9,)
    np.testing.assert_allclose(predicted.loss, observed.loss, rtol=0.1)
    assert not predicted.diverged.any()
    # What is trained most has learned something; what is trained least is what it was.
    assert observed.accuracy is not None
    assert observed.accuracy[-1] > 0.75
    assert observed.loss[0] == pytest.approx(results.initial.loss.item(), rel=1e-2)


def test_fully_clipped_cells_depend_on_the_product_alone(results: sweep.Results) -> None:
    """Claim C11, in prediction and observation: (rate, norm) and (rate / 10, norm * 10)."""
    assert results.observed is not None
    for metrics in (results.predicted[0], results.observed[0]):
        losses = np.asarray(metrics.test_loss).reshape(3, 3)
        for (i, j), (k, m) in (((1, 0), (0, 1)), ((2, 0), (1, 1)), ((2, 0), (0, 2))):
            assert losses[i, j] == pytest.approx(losses[k, m], rel=1e-10)
        assert len(np.unique(np.round(losses, 8))) == 5


def test_a_cell_is_the_run_of_its_own(results: sweep.Results) -> None:
    problem = experiment.problem_of(results.config)
    run = ntkdp.dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.targets,
        problem.loss,
        ntkdp.clipping.Abadi(NORMS[1]),
        learning_rate=RATES[2],
        steps=12,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        record_every=12,
        outputs=True,
        gradients="vmap",
        key=jax.random.key(0),
    )
    assert run.test_outputs is not None
    assert results.observed is not None
    cell = results.observed[0].cell(2 * 3 + 1)
    assert run.test_loss is not None
    assert cell["test_loss"] == pytest.approx(float(run.test_loss[-1]), rel=1e-10)
    probs = jax.nn.softmax(run.test_outputs[-1])
    error = ntkdp.calibration.expected_calibration_error(probs, problem.test_targets)
    assert cell["test_ece"] == pytest.approx(float(error), rel=1e-9)


def test_noise_by_budget_and_by_multiplier_is_accounted() -> None:
    config = sweep.config(
        **SMALL | {"grid": {"epsilons": [2.0], "noise_multipliers": [0.0, 3.0], "scopes": ["flat"]}}
    )
    by_budget, without, by_sigma = _config.planes(config)
    assert ntkdp.privacy.epsilon(by_budget.noise_multiplier, 1.0, 12, 1e-2) <= 2.0
    assert ntkdp.privacy.epsilon(by_budget.noise_multiplier * 0.99, 1.0, 12, 1e-2) > 2.0
    assert (without.noise_multiplier, without.epsilon) == (0.0, float("inf"))
    assert by_sigma.epsilon == ntkdp.privacy.epsilon(3.0, 1.0, 12, 1e-2)
    assert [plane.label for plane in (without, by_sigma)] == [
        "flat abadi, no noise",
        f"flat abadi, sigma 3, epsilon {by_sigma.epsilon:.3g}",
    ]


TURNS = {"kind": "cyclic", "n_batches": 4}
ROOTS = {"kind": "square_root", "n_bands": 4}


def test_the_budget_is_that_of_noise_and_batches() -> None:
    """Each sample takes part three times in twelve steps, four steps apart."""
    training = {"steps": 12, "delta": 1e-2, "batches": TURNS}
    grid = {"epsilons": [2.0], "noise_multipliers": [3.0], "scopes": ["flat"]}
    by_budget, by_sigma = _config.planes(
        sweep.config(**SMALL | {"training": training, "grid": grid})
    )
    three_times = ntkdp.privacy.Budget(2.0, 1e-2).noise_multiplier(3)
    assert by_budget.noise_multiplier == pytest.approx(three_times, rel=1e-6)
    assert by_sigma.epsilon == pytest.approx(ntkdp.privacy.epsilon(3.0, 1.0, 3, 1e-2), rel=1e-6)
    # Bands that do not reach the next epoch have the sensitivity of their column, in each of them.
    config = sweep.config(**SMALL | {"training": training | {"noise": ROOTS}, "grid": grid})
    correlated = _config.planes(config)[1].epsilon
    column = ntkdp.noise.Correlated.square_root(4).strategy_matrix(4)[:, 0]
    sigma = 3.0 / float((column**2).sum() ** 0.5)
    assert correlated == pytest.approx(ntkdp.privacy.epsilon(sigma, 1.0, 3, 1e-2), rel=1e-6)
    training |= {"batches": {"kind": "fixed_size", "size": 4}}
    fixed = _config.planes(sweep.config(**SMALL | {"training": training, "grid": grid}))[1]
    share = 4 / SMALL["data"]["n_train"]
    expected = ntkdp.privacy.epsilon(3.0, share, 12, 1e-2, sampling="fixed_size")
    assert fixed.epsilon == pytest.approx(expected, rel=1e-6)
    unknown = training | {"noise": ROOTS}
    config = sweep.config(**SMALL | {"training": unknown, "grid": grid | {"epsilons": []}})
    assert _config.planes(config)[0].epsilon == float("inf")
    with pytest.raises(ntkdp.experiment.ConfigError, match=r"field 'training': there is no accou"):
        _config.planes(sweep.config(**SMALL | {"training": unknown, "grid": grid}))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["frozen", "between times"])
def test_planes_of_correlated_noise_and_cyclic_batches(kernels: str) -> None:
    config = sweep.config(**SMALL | {
        "kernels": kernels,
        "training": {"steps": 12, "n_predicted": 40, "n_seeds": 40, "delta": 1e-2,
                     "batches": TURNS, "noise": ROOTS},
        "grid": {"learning_rates": [1.0], "clip_norms": [0.5], "noise_multipliers": [4.0]},
    })  # fmt: skip
    found = sweep.run(config)
    assert found.observed is not None
    for predicted, observed in zip(found.predicted, found.observed, strict=True):
        np.testing.assert_allclose(predicted.loss, observed.loss, rtol=0.1)
        np.testing.assert_allclose(known(predicted.test_loss), known(observed.test_loss), rtol=0.1)


@pytest.mark.parametrize(
    "scopes", [["layerwise"], pytest.param(["flat", "layerwise"], marks=pytest.mark.slow)]
)
def test_planes_of_rules_scopes_and_noise(
    scopes: list[str], tmp_path: Path, drawn_empty: None
) -> None:
    """Layerwise and noisy planes too; Poisson sampling; the noise of prediction and run agree."""
    config = sweep.config(**
        SMALL
        | {
            "training": {
                "steps": 6, "n_predicted": 40, "n_seeds": 40, "sample_rate": 0.5, "delta": 1e-2
            },
            "grid": {
                "learning_rates": [1.0], "clip_norms": [0.5], "rules": ["automatic"],
                "scopes": scopes, "noise_multipliers": [4.0],
            },
        }
    )  # fmt: skip
    found = sweep.run(config)
    assert found.observed is not None
    assert len(found.planes) == len(found.predicted) == len(found.observed) == len(scopes)
    for predicted, observed in zip(found.predicted, found.observed, strict=True):
        np.testing.assert_allclose(predicted.loss, observed.loss, rtol=0.1)
        np.testing.assert_allclose(known(predicted.test_loss), known(observed.test_loss), rtol=0.1)
    # Noise of this size moves the kernel: v(T) = 6 (eta sigma S / (q n))^2, S^2 = 2 R^2 by layer.
    assert found.kernels == ["between times"] * len(scopes)
    squares = [{"flat": 1, "layerwise": 2}[scope] for scope in scopes]
    assert found.weight_noise == pytest.approx([6 * (4 * 0.5 / 16) ** 2 * s for s in squares])
    metrics = _report.write_report(found, tmp_path)
    assert [plane["cells"][0]["kernels"] for plane in metrics["planes"]] == found.kernels
    words = f"kernels between times predict {len(scopes)} of {len(scopes)} cells with noise."
    assert words in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.glob("map*.png"))) == len(scopes)


def test_divergence_is_predicted_and_written(tmp_path: Path, drawn_empty: None) -> None:
    config = sweep.config(
        **SMALL
        | {
            "loss": "squared_error",
            "training": {"steps": 60},
            "grid": {
                "learning_rates": [1.0, 3000.0],
                "clip_norms": [100.0],
                "noise_multipliers": [0.0],
            },
        }
    )
    found = sweep.run(config)
    assert found.observed is not None
    assert found.predicted[0].diverged.tolist() == [False, True]
    assert found.observed[0].diverged.tolist() == [False, True]
    _report.write_report(found, tmp_path)
    plane = json.loads((tmp_path / "metrics.json").read_text())["planes"][0]
    assert plane["cells"][1]["observed"]["diverged"] is True
    # Squared errors have no probabilities, and what has diverged no finite loss.
    assert plane["cells"][1]["observed"]["test_ece"] in (None, "nan")
    assert plane["epsilon"] == "inf"
    assert plane["agreement"]["divergence_called_right"] == 1.0
    assert plane["advice"]["test_loss"]["learning_rate"] == 1.0


def test_metrics_and_page(results: sweep.Results, folder: Path) -> None:
    tree = json.loads((folder / "metrics.json").read_text())
    (plane,) = tree["planes"]
    assert results.observed is not None
    for index, cell in enumerate(plane["cells"]):
        assert (cell["learning_rate"], cell["clip_norm"]) == (RATES[index // 3], NORMS[index % 3])
        assert cell["observed"]["test_loss"] == results.observed[0].cell(index)["test_loss"]
    best = max(cell["predicted"]["test_accuracy"] for cell in plane["cells"])
    assert plane["advice"]["test_accuracy"]["predicted"]["test_accuracy"] == best
    assert tree["speed_up"] == pytest.approx(
        tree["seconds"]["observation"] / (tree["seconds"]["kernel"] + tree["seconds"]["prediction"])
    )
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(folder.glob("*.png"))) == 2
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)


def test_what_is_printed_is_literal(
    results: sweep.Results, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = results.config.data.model_copy(update={"name": "[/x]/d[red].csv"})
    config = results.config.model_copy(update={"data": odd})
    shown = results._replace(config=config, notes=["[/x] is damaged"])
    _report.print_table(shown, _report.metrics(results))
    printed = capsys.readouterr().out
    assert printed.startswith("[/x]/d[red].csv, 32 training")
    assert printed.endswith("[/x] is damaged\n")


def test_resuming_runs_nothing_again(results: sweep.Results, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")}
    assert len(before) == 10
    again = sweep.run(results.config, folder, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")}
    for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(results), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_lost_and_damaged_cells_are_made_again(
    results: sweep.Results, folder: Path, drawn_empty: None
) -> None:
    expected = without_seconds(folder)
    cells = folder / "cells"
    (cells / "00002.npz").unlink()
    (cells / "00005.npz").write_text('{"content": {}}')
    (cells / "predicted.npz").write_bytes((cells / "predicted.npz").read_bytes()[:-40])
    # Whole, with the label that belongs to it, and none of this program's cells.
    on_disk = CellFolder(folder, results.config.model_dump(mode="json"), resume=True)
    foreign = {"metrics": {"loss": 1.0}, "seconds": 1.0}
    (cells / "00006.npz").write_bytes(cell_file.encode(foreign, on_disk._label("00006")))
    untouched = (cells / "00000.npz").stat().st_mtime_ns
    again = sweep.run(results.config, folder, resume=True)
    assert [note.split("/")[-1].split()[0] for note in again.notes] == [
        "predicted.npz",
        "00005.npz",
        "00006.npz",
    ]
    _report.write_report(again, folder)
    found = without_seconds(folder)
    assert found.pop("notes") != expected.pop("notes") == []
    assert found == expected
    assert (cells / "00000.npz").stat().st_mtime_ns == untouched


def test_predict_only_trains_nothing(tmp_path: Path, drawn_empty: None) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "name = 'tiny'\ndata = {n_train = 8, n_test = 8}\nmodel = {widths = [8]}\n"
        "training = {steps = 2}\n"
        "grid = {learning_rates = [0.1, 1.0], clip_norms = [1.0], noise_multipliers = [0.0]}\n"
    )
    out = tmp_path / "out"
    options = ["sweep", str(config), "--predict-only", "--out", str(out)]
    shown = CliRunner().invoke(cli.app, options)
    assert shown.exit_code == 0, shown.output
    assert "test accuracy" in shown.output
    tree = json.loads((out / "metrics.json").read_text())
    assert tree["speed_up"] is None
    assert tree["planes"][0]["agreement"] is None
    assert {path.name for path in (out / "cells").glob("*.npz")} == {"predicted.npz"}
    assert CliRunner().invoke(cli.app, options).exit_code == 2
    assert CliRunner().invoke(cli.app, [*options, "--resume"]).exit_code == 0


CELL = dict.fromkeys(CellMetrics._fields, 0.5) | {"diverged": False, "accuracy": None}
INITIAL = CellMetrics.of_cells([CELL])


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        7,
        [],
        {},
        CELL | {"loss": None},
        CELL | {"loss": "0.5"},
        CELL | {"loss": True},
        CELL | {"loss": [0.5]},
        CELL | {"accuracy": 0.5},
        CELL | {"diverged": 0.0},
        CELL | {"more": 0.5},
    ],
)
def test_other_content_of_a_cell_is_an_error(metrics: Any) -> None:
    groups = {"loss": [0.5, 0.1], "accuracy": None}
    good: Any = {"cell": {}, "metrics": CELL, "by_group": groups, "seconds": 1.0}
    assert _run._observation(INITIAL, good) == good
    of_all: Any = {
        "metrics": [CELL, CELL], "by_group": [None, groups], "kernels": ["frozen", "between times"],
        "weight_noise": [0.0, 1.0], "strategies": [None, [1.0, 0.5]],
        "kernel_seconds": 1.0, "prediction_seconds": 2.0,
    }  # fmt: skip
    assert _run._prediction(INITIAL, 2, of_all) == of_all
    errors = (LookupError, TypeError, ValueError, AttributeError)
    contents: tuple[Any, ...] = (
        good | {"metrics": metrics},
        {},
        good | {"seconds": None},
        good | {"by_group": {"loss": ["x"], "accuracy": None}},
        good | {"by_group": {"loss": [0.5]}},
    )
    for content in contents:
        with pytest.raises(errors):
            _run._observation(INITIAL, content)
    for content in (
        of_all | {"metrics": metrics},
        of_all | {"metrics": [CELL, metrics]},
        of_all | {"metrics": [CELL]},
        of_all | {"kernel_seconds": []},
        of_all | {"kernels": ["frozen"]},
        of_all | {"by_group": [None]},
        of_all | {"weight_noise": [0.0, None]},
    ):
        with pytest.raises(errors):
            _run._prediction(INITIAL, 2, content)


@pytest.mark.slow
def test_regression_has_losses_alone(tmp_path: Path) -> None:
    config = sweep.config(
        **{
            "loss": "squared_error",
            "objective": "loss",
            "data": {"name": "diabetes", "n_train": 32, "n_test": 16, "standardise": "feature"},
            "model": {"widths": [32]},
            "training": {"steps": 4},
            "grid": {
                "learning_rates": [0.1, 1.0],
                "clip_norms": [0.1, 1.0],
                "noise_multipliers": [0.0],
            },
        }
    )
    found = sweep.run(config)
    assert found.predicted[0].test_accuracy is None
    assert found.predicted[0].test_ece is None
    _report.write_report(found, tmp_path)
    plane = json.loads((tmp_path / "metrics.json").read_text())["planes"][0]
    assert list(plane["advice"]) == ["test_loss"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["map.png"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"grid": {"learning_rate": [0.1]}}, r"unknown field 'grid.learning_rate'; did you mean"),
        ({"grid": {"learning_rates": []}}, "grid.learning_rates"),
        ({"grid": {"learning_rates": [0.1, -1.0]}}, "learning_rates must be positive.*-1.0"),
        ({"grid": {"clip_norms": [0.1, 0.1]}}, "must not hold a value twice, got 0.1"),
        ({"grid": {"clip_norms": [float("inf")]}}, r"clip_norms.*finite number.*inf"),
        ({"grid": {"rules": ["abadii"]}}, "did you mean 'abadi'"),
        ({"grid": {"rules": ["batch"]}}, "'batch' with noise"),
        ({"grid": {"noise_multipliers": [-1.0]}}, "noise_multipliers must be at least 0"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"delta": 1.5}}, "training.delta"),
        ({"objective": "ece", "loss": "huber"}, "objective must be accuracy or loss"),
        ({"prediction": "empirical", "kernels": "between times"}, "kernels must be 'auto' or"),
        ({"kernels": "frozenn"}, "'kernels'.*did you mean 'frozen'"),
        ({"kernels_move_from": -1.0}, "kernels_move_from"),
        ({"clipping": [{}]}, "unknown field 'clipping'"),
    ],
)
def test_wrong_configurations_name_the_field(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(experiment.ConfigError, match=message):
        sweep.config(**tree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume needs --out"),
        (["--resume", "--overwrite", "--out", "x"], "exclude each other"),
        (["nowhere.toml"], "does not exist"),
        (["--data", "nowhere", "--out", "{folder}/a"], "unknown name 'nowhere'|nowhere"),
    ],
)
def test_wrong_commands_say_why(tmp_path: Path, options: list[str], message: str) -> None:
    filled = [option.format(folder=tmp_path) for option in options]
    shown = CliRunner().invoke(cli.app, ["sweep", *filled])
    assert shown.exit_code == 2
    assert re.search(message, shown.output)


def test_the_documented_configuration_is_the_default() -> None:
    documented = sweep.load_config(Path(__file__).parents[2] / "docs" / "sweep.toml")
    assert documented == sweep.SweepConfig()
    assert "grid.learning_rates" in CliRunner().invoke(cli.app, ["sweep", "--help"]).output


@pytest.mark.slow
def test_float32_without_x64(tmp_path: Path) -> None:
    """As the command runs it: single precision in a process of its own."""
    config = tmp_path / "config.toml"
    config.write_text(
        "dtype = 'float32'\ndata = {n_train = 8, n_test = 8}\nmodel = {widths = [8]}\n"
        "training = {steps = 2}\ngrid = {learning_rates = [0.1], clip_norms = [1.0]}\n"
    )
    with jax.enable_x64(False):
        found = sweep.run(sweep.load_config(config))
    assert found.observed is not None
    assert jnp.isfinite(jnp.asarray(found.observed[0].loss)).all()
