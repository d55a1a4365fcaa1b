"""Configurations: what is documented is what there is, and every error names its field."""

import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from typer.testing import CliRunner

import ntkdp
from ntkdp import cli, experiment, models, sweep
from ntkdp._backend.config_files import describe
from ntkdp.experiment import _config

ROOT = Path(__file__).parents[2]


def test_the_documented_configuration_is_the_default() -> None:
    documented = experiment.load_config(ROOT / "docs" / "configuration.toml")
    assert documented == experiment.Config()


@pytest.mark.parametrize("training", [{"learning_rate": 0.1}, {"learning_rate": 1.5}])
def test_a_learning_rate_that_is_written_is_used_by_every_default_rule(
    training: dict[str, Any],
) -> None:
    written = experiment.config(**{"training": training})
    built = experiment.Config(training=_config.TrainingConfig(**training))
    for config in (written, built):
        rates = [rule.learning_rate_in(config.training) for rule in config.clipping]
        assert rates == [training["learning_rate"]] * 4
        assert [rule.label for rule in config.clipping] == [
            rule.label for rule in experiment.Config().clipping
        ]


def test_rules_keep_the_learning_rates_that_are_theirs() -> None:
    for tree in ({}, {"training": {"steps": 3}}, {"training": _config.TrainingConfig(steps=3)}):
        config = experiment.config(**tree)
        rates = [rule.learning_rate_in(config.training) for rule in config.clipping]
        assert rates == [2.5, 1.5, 2.5, 1.5]
    rules = [{"clip_norm": 0.1, "learning_rate": 7.0}, {"clip_norm": 0.2}]
    config = experiment.config(**{"training": {"learning_rate": 0.1}, "clipping": rules})
    assert [rule.learning_rate_in(config.training) for rule in config.clipping] == [7.0, 0.1]


@pytest.mark.parametrize(
    ("section", "built"),
    [
        (
            "widths = [4, 4]\nactivation = 'tanh'\nlayer_norm = true\nresidual = true\n"
            "parameterization = 'standard'",
            models.mlp(
                [4, 4], 10, activation="tanh", layer_norm=True, residual=True, W_std=1.5,
                parameterization="standard",
            ),
        ),
        (
            "kind = 'cnn'\nwidths = [2]\npooling = 'global_sum'",
            models.cnn([2], 10, activation="erf", pooling="global_sum", W_std=1.5),
        ),
    ],
)  # fmt: skip
def test_a_network_is_built_as_its_section_says(
    tmp_path: Path, section: str, built: models.Model
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(f"data = {{n_train = 4, n_test = 2}}\n[model]\n{section}")
    problem = experiment.problem_of(experiment.load_config(path))
    np.testing.assert_array_equal(problem.outputs, built.apply(problem.params, problem.x))


def _default_of(config: pydantic.BaseModel, name: str) -> object:
    """The value at a dotted name; of a section that repeats, that of a new one."""
    found: object = config
    for part in name.split("."):
        of_block = part.endswith("[]")
        found = _config.ClippingConfig() if of_block else getattr(found, part)
    return found


@pytest.mark.parametrize("kind", [experiment.Config, sweep.SweepConfig])
def test_the_defaults_that_are_shown_are_those_of_the_command(
    kind: type[pydantic.BaseModel],
) -> None:
    for name, shown, _ in describe(kind):
        value = _default_of(kind(), name)
        assert shown == ("" if value is None else str(value).replace("'", '"')), name


def test_the_help_of_a_sweep_shows_its_own_defaults() -> None:
    shown = {name: default for name, default, _ in describe(sweep.SweepConfig)}
    assert (shown["data.n_train"], shown["data.n_test"]) == ("1000", "500")
    assert shown["model.widths"] == "[512]"
    help_page = CliRunner().invoke(cli.app, ["sweep", "--help"], env={"COLUMNS": "200"}).output
    for words in ("data.n_train (1000)", "data.n_test (500)", "model.widths ([512])"):
        assert words in help_page


def test_the_documented_configuration_names_every_field() -> None:
    text = (ROOT / "docs" / "configuration.toml").read_text()
    for name, _, _ in describe(experiment.Config):
        assert name.rpartition(".")[2] in text, name


def test_every_field_has_a_description() -> None:
    described = describe(experiment.Config)
    assert len(described) > 30
    assert [name for name, _, description in described if not description] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.toml")), ids=lambda p: p.stem)
def test_the_benchmarks_configurations_are_valid(path: Path) -> None:
    experiment.rules_of(experiment.load_config(path))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sed": 1}, ["unknown field 'sed'", "'seed'"]),
        ({"data": {"n_tran": 3}}, ["unknown field 'data.n_tran'", "'n_train'"]),
        ({"clipping": [{}, {"norm": 1.0}]}, ["unknown field 'clipping.1.norm'", "clip_norm"]),
        ({"predictions": ["exat"]}, ["'predictions.0'", "'exat'", "did you mean 'exact'"]),
        ({"predictions": []}, ["'predictions'"]),
        ({"loss": "softmax"}, ["'loss'", "'softmax'", "softmax_cross_entropy"]),
        ({"dtype": "float16"}, ["'dtype'", "'float16'"]),
        ({"seed": -1}, ["'seed'", "-1"]),
        ({"seed": 1.5}, ["'seed'", "1.5"]),
        ({"training": {"learning_rate": 0.0}}, ["'training.learning_rate'", "0.0"]),
        ({"training": {"learning_rate": "fast"}}, ["'training.learning_rate'", "'fast'"]),
        ({"training": {"steps": 0}}, ["'training.steps'", "0"]),
        ({"training": {"sample_rate": 1.5}}, ["'training.sample_rate'", "1.5"]),
        ({"training": {"noise_multiplier": -1.0}}, ["'training.noise_multiplier'", "-1.0"]),
        ({"model": {"kind": "cnn", "widths": []}}, ["model.widths", "'cnn'", "got []"]),
        ({"model": 3}, ["'model'", "3"]),
        ({"model": {"pooling": "sum"}}, ["model.pooling", "'none'", "'mlp'", "'sum'"]),
        ({"clipping": [{}, {}]}, ["same rule twice", "flat abadi R=1"]),
        ({"training": {"epsilon": 3.0}}, ["epsilon", "delta", "together"]),
        ({"training": {"mu": 1.0, "noise_multiplier": 2.0}}, ["one way", "mu"]),
        ({"training": {"n_predicted": 1}}, ["'training.n_predicted'", "1"]),
        ({"training": {"optimizer": "adam", "momentum": 0.9}}, ["training.momentum", "0.9"]),
        ({"training": {"correct_noise": True}}, ["training.correct_noise", "'sgd'"]),
        ({"training": {"nesterov": True}}, ["training.nesterov", "training.momentum"]),
        (
            {"training": {"optimizer": "adam"}, "predictions": ["frozen"]},
            ["'frozen'", "'adam'", "use response"],
        ),
        (
            {"training": {"weight_decay": 0.1}, "predictions": ["exact"]},
            ["'exact'", "use recursion or response"],
        ),
        ({"training": {"batches": {"kind": "cyclic"}}}, ["batches.n_batches must be given"]),
        (
            {"training": {"batches": {"kind": "full", "n_batches": 2}}},
            ["batches.n_batches must be left out with kind = 'full', got 2"],
        ),
        (
            {"training": {"batches": {"kind": "cyclic", "n_batches": 2}, "sample_rate": 0.5}},
            ["training.sample_rate must be left out", "'cyclic'", "0.5"],
        ),
        ({"training": {"noise": {"kind": "toeplitz"}}}, ["noise.coefficients must be given"]),
        ({"model": {"kind": "function"}}, ["model.function", "together", "None"]),
        ({"model": {"function": "a:b"}}, ["model.function", "together", "'mlp'"]),
        ({"model": {"kind": "function", "function": "a.py"}}, ["my_models:", "'a.py'"]),
        (
            {"model": {"kind": "function", "function": "a:b", "widths": [8]}},
            ["model.widths must be left out"],
        ),
    ],
)
def test_errors_name_the_field_and_its_value(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(experiment.ConfigError) as caught:
        experiment.config(**tree)
    for word in words:
        assert word in str(caught.value)


def test_default_predictions_follow_the_noise() -> None:
    assert experiment.config(**{}).predictions == ["frozen", "infinite", "recursion"]
    noisy = experiment.config(**{"training": {"momentum": 0.9, "noise_multiplier": 1.0}})
    assert noisy.predictions == ["frozen", "infinite", "recursion", "response"]
    assert experiment.noise_free(noisy) == ["frozen"]
    assert experiment.config(**noisy.model_dump()) == noisy


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"optimizer": "adam"}, ["response"]),
        ({"optimizer": "adam", "noise_multiplier": 1.0}, ["response"]),
        ({"weight_decay": 0.1}, ["recursion"]),
        ({"average": 0.9, "noise_multiplier": 1.0}, ["infinite", "recursion", "response"]),
        (
            {"noise_multiplier": 1.0, "batches": {"kind": "shuffled", "n_batches": 2}},
            ["frozen", "infinite", "recursion", "response"],
        ),
    ],
)
def test_default_predictions_follow_the_optimizer(
    training: dict[str, Any], expected: list[str]
) -> None:
    assert experiment.config(training=training).predictions == expected


def test_default_predictions_need_no_infinite_width_of_a_function() -> None:
    model = {"kind": "function", "function": "a:b"}
    assert experiment.config(model=model).predictions == ["frozen", "recursion"]
    assert sweep.config(model=model).prediction == "empirical"
    with pytest.raises(experiment.ConfigError, match="'response' with rule 'batch'"):
        experiment.config(**{"predictions": ["response"], "clipping": [{"rule": "batch"}]})


@pytest.mark.parametrize(
    ("clipping", "words"),
    [
        ({"rule": "abady"}, ["clipping.0", "'abady'", "did you mean 'abadi'"]),
        ({"clip_norm": 0.0}, ["clipping.0", "R must be positive", "0.0"]),
        ({"clip_norm": float("nan")}, ["clipping.0", "R must be positive", "nan"]),
        ({"rule": "none", "clip_norm": float("inf")}, ["clipping.0", "R must be positive", "inf"]),
        ({"clip_norm": [1.0, 2.0]}, ["clipping.0", "scope='layerwise'"]),
        ({"gamma": 0.1}, ["clipping.0", "gamma"]),
        ({"rule": "automatic", "gamma": -1.0}, ["clipping.0", "gamma", "-1.0"]),
    ],
)
def test_rules_that_cannot_be_made_name_their_place(
    clipping: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(experiment.ConfigError) as caught:
        experiment.rules_of(experiment.config(**{"clipping": [clipping]}))
    for word in words:
        assert word in str(caught.value)


def test_noise_needs_a_rule_that_bounds_each_sample() -> None:
    tree = {"clipping": [{"rule": "batch"}], "training": {"noise_multiplier": 1.0}}
    with pytest.raises(experiment.ConfigError, match=r"noise_multiplier.*'batch'.*got 1.0"):
        experiment.rules_of(experiment.config(**tree))


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("name = 'unfinished\n")
    with pytest.raises(experiment.ConfigError, match=r"config.toml is not TOML: "):
        experiment.load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(experiment.ConfigError, match="is not TOML"):
        experiment.load_config(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.toml"):
        experiment.load_config(tmp_path / "nowhere.toml")
    # Some editors begin a file with a byte order mark.
    path.write_text("seed = 1\n", encoding="utf-8-sig")
    assert experiment.load_config(path).seed == 1
    path.write_text("seeed = 1\n")
    with pytest.raises(experiment.ConfigError, match=r"config.toml: unknown field 'seeed'"):
        experiment.load_config(path)


def test_defaults_survive_a_round_trip_through_toml(tmp_path: Path) -> None:
    fields = tomllib.loads((ROOT / "docs" / "configuration.toml").read_text())
    assert experiment.config(**fields).model_dump() == experiment.Config().model_dump()


def _name_of(requirement: str) -> str:
    """The package that a requirement such as ``jax>=0.10`` asks for."""
    return re.split(r"[^\w-]", requirement)[0]


def test_every_dependency_is_pinned_once_and_without_an_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["tool"]["uv"]["constraint-dependencies"]
    pinned = [_name_of(pin) for pin in pins]
    assert len(set(pinned)) == len(pinned)
    assert all("==" in pin and "://" not in pin for pin in pins)
    required = itertools.chain(
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    )
    assert {_name_of(requirement) for requirement in required} <= set(pinned)


def test_the_version_is_written_in_pyproject_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert ntkdp.__version__ == project["project"]["version"]
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("make", [experiment.config, sweep.config])
@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".hidden", "", "  ", "a\nb", "\x1b[31m", "\ud800",
     "x" * 151, "\u00e9" * 76, "a\0b"],
)  # fmt: skip
def test_a_name_is_no_path(make: Callable[..., Any], name: str) -> None:
    with pytest.raises(
        experiment.ConfigError, match=r"field 'name': must be a name .* --out"
    ) as caught:
        make(name=name)
    caught.value.args[0].encode()


def test_names_of_any_language_are_names() -> None:
    for name in ("digits", "R = 0.4, no noise", "Größe", "x" * 150, "-v"):
        assert experiment.config(**{"name": name}).name == name
