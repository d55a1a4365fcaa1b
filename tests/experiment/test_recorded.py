"""Runs that were recorded elsewhere take the place of trained ones, and nothing else changes."""

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import ntkdp
from ntkdp import Trajectory, cli, dp_sgd, experiment
from ntkdp.experiment import _run
from ntkdp.experiment._reporting import metrics as _metrics
from ntkdp.experiment._reporting import report as _report
from ntkdp.experiment._reporting import tables as _tables

FIELDS: dict[str, Any] = {
    "name": "log",
    "predictions": ["frozen", "recursion"],
    "data": {"n_train": 12, "n_test": 6},
    "model": {"widths": [16]},
    "training": {
        "steps": 8,
        "learning_rate": 0.25,
        "record_every": 2,
        "noise_multiplier": 0.5,
        "n_predicted": 8,
    },
    "clipping": [{"clip_norm": 0.5}],
}
COLUMNS = ("loss", "accuracy", "test_loss", "test_accuracy", "clip_fraction")
TOML = """
name = "log"
predictions = ["recursion"]
[data]
n_train = 12
n_test = 6
[model]
widths = [16]
[training]
steps = 8
learning_rate = 0.25
record_every = 2
noise_multiplier = 0.5
n_predicted = 8
[[clipping]]
clip_norm = 0.5
"""

runner = CliRunner()


def config(**training: Any) -> experiment.Config:
    return experiment.config(**FIELDS | {"training": FIELDS["training"] | training})


@pytest.fixture(scope="module")
def runs() -> Trajectory:
    """Three private runs of the network that the configuration describes."""
    problem = experiment.problem_of(config())
    return dp_sgd.run(
        problem.model.apply,
        problem.params,
        problem.x,
        problem.targets,
        problem.loss,
        ntkdp.clipping.Abadi(0.5),
        learning_rate=0.25,
        steps=8,
        record_every=2,
        noise_multiplier=0.5,
        test_x=problem.test_x,
        test_targets=problem.test_targets,
        key=jax.random.split(jax.random.key(1), 3),
    )


def write(path: Path, runs: Trajectory, names: tuple[str, ...] = COLUMNS) -> Path:
    """A log as a loop of training would write it, a row for each recorded step of each run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "step", *names])
        for seed in range(3):
            for place, step in enumerate(np.asarray(runs.steps).tolist()):
                values = [float(getattr(runs, name)[seed, place]) for name in names]
                writer.writerow([seed, step, *values])
    return path


@pytest.fixture
def log(runs: Trajectory, tmp_path: Path) -> Path:
    return write(tmp_path / "runs.csv", runs)


def test_recorded_runs_are_compared_as_trained_ones(runs: Trajectory, log: Path) -> None:
    """The runs that the configuration trains are these, by its seed."""
    trained = experiment.run(config(n_seeds=3)).cases[0]
    for observed in (Trajectory.from_csv(log, learning_rate=0.25), runs):
        results = experiment.run(config(n_seeds=3), observed=observed)
        (case,) = results.cases
        assert case.run_seconds is None
        np.testing.assert_allclose(case.run.loss, trained.run.loss, rtol=1e-12)
        for name, prediction in case.predictions.items():
            of_trained = trained.predictions[name].comparison
            for kind in COLUMNS:
                assert prediction.comparison.errors[kind].sup == pytest.approx(
                    of_trained.errors[kind].sup, rel=1e-9, abs=1e-12
                )
            assert prediction.comparison.coverage == 1.0
        band = case.predictions["recursion"].comparison.band_coverage
        assert band is not None
        assert trained.predictions["recursion"].comparison.band_coverage is not None
        np.testing.assert_array_equal(
            band.share, trained.predictions["recursion"].comparison.band_coverage.share
        )


def test_what_a_log_does_not_say_is_left_out(
    runs: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = write(tmp_path / "runs.csv", runs, ("loss",))
    observed = Trajectory.from_csv(path, learning_rate=0.25)
    results = experiment.run(config(), observed=observed)
    folder = tmp_path / "run"
    folder.mkdir()
    _report.write_report(results, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["runs"] == "recorded"
    for entry in metrics["results"]:
        assert entry["initial_clip_fraction"] is None
        assert entry["error_of_margins"] is None
        assert entry["seconds"]["observation"] is None
        assert entry["final"]["observed"]["accuracy"] is None
        assert entry["final"]["observed"]["loss"] == pytest.approx(float(runs.loss[:, -1].mean()))
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"loss.png", "clip_fraction.png", "relative_error.png"} <= pictures
    assert not {"test_loss.png", "test_accuracy.png", "margins.png"} & pictures
    page = (folder / "report.html").read_text()
    assert "The runs were recorded elsewhere." in page
    assert ">nan" not in page
    monkeypatch.setenv("COLUMNS", "200")
    _tables.print_table(results)
    assert "nan" not in capsys.readouterr().out


def test_a_log_that_begins_late_has_no_start(runs: Trajectory) -> None:
    late = dataclasses.replace(
        runs,
        times=runs.times[1:],
        steps=None,
        **{name: getattr(runs, name)[:, 1:] for name in COLUMNS},
    )
    results = experiment.run(config(), observed=late)
    (case,) = results.cases
    assert case.run.steps is not None
    assert case.run.steps.tolist() == [2, 4, 6, 8]
    compared = case.predictions["frozen"].comparison
    assert len(compared.times) == 4
    # The fall is measured from the start that the prediction records.
    whole = experiment.run(config(), observed=runs).cases[0].predictions["frozen"].comparison
    assert compared.error_of_fall == pytest.approx(whole.error_of_fall)
    assert _metrics.metrics(results)["results"][0]["initial_clip_fraction"] is None


def others(**changes: Any) -> Callable[[Trajectory], Trajectory]:
    return lambda runs: dataclasses.replace(runs, **changes)


@pytest.mark.parametrize(
    ("fields", "change", "words"),
    [
        (
            {"clipping": [{"clip_norm": 0.5}, {"clip_norm": 1.0}]},
            None,
            "field 'clipping': must hold the one rule that observed runs were made with, got 2 "
            "(flat abadi R=0.5, flat abadi R=1)",
        ),
        (
            {"training": {"learning_rate": 0.5}},
            None,
            "field 'training.learning_rate': 0.5 takes step 8 to time 4, but observed is at time 2",
        ),
        (
            {"training": {"learning_rate": 0.4}},
            others(steps=None),
            "field 'training.learning_rate': must divide the times of observed into whole steps, "
            "got 0.4 for time 0.5",
        ),
        (
            {"training": {"steps": 10}},
            None,
            "field 'training.steps': must be the last step of observed, 8, got 10",
        ),
        (
            {"training": {"record_every": 3}},
            None,
            "'training.record_every': must make predictions record step 2, as observed does, got "
            "3; set 2",
        ),
        (
            {"training": {"n_seeds": 2}},
            None,
            "field 'training.n_seeds': must be left out, or be the number of observed runs, 3",
        ),
        ({"data": {"groups": "class"}}, None, "field 'data.groups': must be left out with observ"),
        (
            {"training": {"noise_multiplier": 0.25}},
            None,
            "field 'training.noise_multiplier': observed is of another training: 0.25 predicted, "
            "0.5 in the run",
        ),
        (
            {"clipping": [{"clip_norm": 0.25}]},
            None,
            "field 'clipping': observed is of another training: Abadi(R=0.25, scope=flat) predict",
        ),
        (
            {"training": {"sample_rate": 0.5}},
            None,
            "field 'training.sample_rate': observed is of another training: 0.5 predicted, 1 in",
        ),
        (
            {"training": {"momentum": 0.5}},
            None,
            "field 'training.optimizer': observed is of another training: sgd(momentum=0.5)",
        ),
        (
            {},
            others(loss=jnp.ones(3)),
            "observed must have times of shape (T,) and a loss of shape (T,) or (S, T), got (5,)",
        ),
    ],
)
def test_runs_of_another_training_are_named(
    runs: Trajectory,
    fields: dict[str, Any],
    change: Callable[[Trajectory], Trajectory] | None,
    words: str,
) -> None:
    changed = {
        name: FIELDS[name] | value if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    observed = runs if change is None else change(runs)
    with pytest.raises(experiment.ConfigError, match=re.escape(words)):
        experiment.run(experiment.config(**FIELDS | changed), observed=observed)


def test_what_cannot_be_observed_is_named(runs: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"observed must be a Trajectory, .* got str"):
        _run._check_observed(config(), "runs.csv", None, False)
    refused: list[dict[str, Any]] = [{"folder": tmp_path}, {"resume": True}, {"overwrite": True}]
    for options in refused:
        with pytest.raises(ValueError, match="must be left out with observed runs"):
            experiment.run(config(), observed=runs, **options)


def test_the_command_compares_a_log(log: Path, tmp_path: Path, drawn_empty: None) -> None:
    settings, out = tmp_path / "log.toml", tmp_path / "run"
    settings.write_text(TOML)
    renamed = tmp_path / "other.csv"
    renamed.write_text(log.read_text().replace("loss,acc", "train/loss,acc", 1))
    arguments = ["compare", str(settings), "--out", str(out), "--observed", str(renamed)]
    refused = runner.invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert "has no column 'loss'" in refused.output
    assert not out.exists()
    done = runner.invoke(cli.app, [*arguments, "--column", "loss=train/loss", "--column", "seed="])
    assert done.exit_code == 2
    assert "tells several runs apart" in done.output
    done = runner.invoke(cli.app, [*arguments, "--column", "loss=train/loss"])
    assert done.exit_code == 0, done.output
    assert "The runs were recorded elsewhere." in done.output
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["runs"] == "recorded"
    expected = experiment.run(
        experiment.load_config(settings), observed=Trajectory.from_csv(log, learning_rate=0.25)
    )
    found = expected.cases[0].predictions["recursion"].comparison.sup_relative_error
    assert metrics["results"][0]["sup_relative_error"] == pytest.approx(found, rel=1e-12)
    # These are not the runs that the configuration trains.
    resumed = runner.invoke(cli.app, ["compare", str(settings), "--out", str(out), "--resume"])
    assert resumed.exit_code == 2
    assert "holds another run" in resumed.output


def test_the_command_reads_files_of_trajectories(
    runs: Trajectory, log: Path, tmp_path: Path, drawn_empty: None
) -> None:
    settings, saved = tmp_path / "log.toml", tmp_path / "runs.nc"
    settings.write_text(TOML)
    runs.save(saved)
    found = []
    for number, path in enumerate((saved, log)):
        out = tmp_path / str(number)
        done = runner.invoke(
            cli.app, ["compare", str(settings), "--out", str(out), "--observed", str(path)]
        )
        assert done.exit_code == 0, done.output
        (entry,) = json.loads((out / "metrics.json").read_text())["results"]
        found.append(entry["sup_relative_error"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("step,loss\n0,1\n8,low\n", "must hold plain numbers, got 'low' in line 3"),
        ("step,loss\n0,1\n9,1\n", "'training.steps': must be the last step of observed, 9, got 8"),
        ("step,time,loss\n0,0,1\n8,17.5,1\n", "takes step 8 to time 2, but observed is at time 17"),
        ("time,loss\n0,1\n2,1\n", ""),
    ],
)
def test_the_command_names_what_is_wrong_with_a_file(
    text: str, words: str, tmp_path: Path, drawn_empty: None
) -> None:
    settings, path = tmp_path / "log.toml", tmp_path / "runs.csv"
    settings.write_text(TOML)
    path.write_text(text)
    out = tmp_path / "run"
    done = runner.invoke(
        cli.app, ["compare", str(settings), "--out", str(out), "--observed", str(path)]
    )
    assert done.exit_code == (2 if words else 0), done.output
    assert words in done.output
    assert out.exists() == (not words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--observed", "absent.csv"], "absent.csv"),
        (["--observed", "runs.csv", "--resume", "--out", "run"], "leave out --resume"),
        (["--observed", "runs.csv", "--predict-only"], "--observed trains nothing"),
        (["--observed", "runs.csv", "--column", "loss"], "must be of the form NAME=OWN"),
        (["--observed", "runs.nc", "--column", "loss=l"], "columns must be left out with a .nc"),
        (["--column", "loss=train/loss"], "--column needs --observed"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.toml").write_text(TOML)
    done = runner.invoke(cli.app, ["compare", "log.toml", *options])
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output
