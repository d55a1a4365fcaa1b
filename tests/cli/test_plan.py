"""The command ``ntkdp plan``: its configuration, its folder and its sentences."""

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers import DOCS
from typer.testing import CliRunner

from ntkdp import cli, privacy
from ntkdp._backend.config_files import check_as, load_as
from ntkdp.cli._planning.config import PlanConfig, PlanningConfig
from ntkdp.experiment import ConfigError

CONFIG = """
name = "small"
dtype = "float64"
data = {n_train = 40, n_test = 20}
model = {widths = [16]}
[plan]
epsilons = [8.0]
delta = 1e-3
learning_rates = [1.0, 8.0]
clip_norms = [0.1, 1.0]
steps = [4, 8]
sample_rates = [0.5, 1.0]
max_epochs = 5.0
refinements = 0
n_runs = 2
kernels = "frozen"
more_data = false
"""


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *arguments])


def test_a_plan_fills_a_folder(tmp_path: Path) -> None:
    config, out = tmp_path / "small.toml", tmp_path / "out"
    config.write_text(CONFIG)
    done = plan(str(config), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "At epsilon 8: q = " in done.output
    pictures = {"epsilon.png", "compute.png", "map_0.png"}
    assert {path.name for path in out.iterdir()} >= pictures | {"report.html", "cells.csv"}
    metrics = json.loads((out / "metrics.json").read_text())
    # Full batches afford four steps, and half of the samples eight.
    assert metrics["n_grid"] == 2 * 2 * 3
    assert [one["epsilon"] for one in metrics["recommended"]] == [8.0]
    with (out / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(metrics["cells"]) == metrics["n_grid"]
    for cell in cells:
        spent = privacy.epsilon(
            float(cell["noise_multiplier"]), float(cell["sample_rate"]), int(cell["steps"]), 1e-3
        )
        assert 0.99 * float(cell["epsilon"]) < spent <= float(cell["epsilon"])
        assert float(cell["compute"]) <= 5 * 40
    page = (out / "report.html").read_text()
    assert metrics["recommended"][-1]["sentence"] in page
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "costs privacy" in page
    again = plan(str(config), "--out", str(out))
    assert again.exit_code == 2
    assert "--overwrite" in again.output


def test_the_documented_configuration_is_the_default() -> None:
    assert load_as(PlanningConfig, DOCS / "plan.toml") == PlanningConfig()
    shown = tomllib.loads((DOCS / "plan.toml").read_text())["plan"]
    assert set(PlanConfig.model_fields) - set(shown) == {"max_epochs"}
    assert check_as(PlanningConfig, PlanningConfig().model_dump()) == PlanningConfig()
    assert "plan.sample_rates" in plan("--help").output


def test_a_regression_is_planned_by_its_loss() -> None:
    assert check_as(PlanningConfig, {"loss": "squared_error"}).plan.objective == "loss"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": "squared_error", "plan": {"objective": "ece"}}, "plan.objective must be loss"),
        ({"plan": {"steps": [4, 4]}}, "plan.steps must not hold a value twice"),
        ({"plan": {"sample_rates": [2.0]}}, "plan.sample_rates"),
        ({"plan": {"clip_norm": [1.0]}}, "clip_norms"),
    ],
)
def test_a_wrong_field_is_named(fields: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_as(PlanningConfig, fields)
