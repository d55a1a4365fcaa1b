"""Unknown fields of configuration files: the error names the field that is meant."""

import re
from typing import Any

import pytest

from ntkdp import experiment, sweep

RATES = "'training.learning_rate' or 'clipping[].learning_rate'"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lr": 0.1}, f"unknown field 'lr'; did you mean {RATES}?"),
        ({"training": {"LR": 0.1}}, f"unknown field 'training.LR'; did you mean {RATES}?"),
        ({"max_grad_norm": 1.0}, "'max_grad_norm'; did you mean 'clipping[].clip_norm'?"),
        ({"training": {"l2_norm_clip": 1.0}}, "l2_norm_clip'; did you mean 'clipping[].clip_norm'"),
        (
            {"training": {"batch_size": 64}},
            "'training.batch_size'; did you mean 'training.sample_rate', which is batch_size / "
            "n_train?",
        ),
        ({"expected_batch_size": 64}, "'training.sample_rate', which is expected_batch_size / n_t"),
        (
            {"training": {"epochs": 5}},
            "did you mean 'training.steps' or 'clipping[].steps', which is epochs / sample_rate?",
        ),
        ({"n_epochs": 5}, "which is n_epochs / sample_rate?"),
        ({"num_epochs": 5}, "which is num_epochs / sample_rate?"),
        ({"iterations": 5}, "did you mean 'training.steps' or 'clipping[].steps'?"),
        ({"training": {"max_steps": 5}}, "did you mean 'training.steps' or 'clipping[].steps'?"),
        ({"training": {"num_steps": 5}}, "did you mean 'training.steps' or 'clipping[].steps'?"),
        ({"training": {"sigma": 1.0}}, "did you mean 'training.noise_multiplier'?"),
        ({"target_epsilon": 3.0}, "did you mean 'training.epsilon'?"),
        ({"target_delta": 1e-5}, "did you mean 'training.delta'?"),
        ({"loss_fn": "mse"}, "did you mean 'loss'?"),
        ({"model": {"criterion": "mse"}}, "unknown field 'model.criterion'; did you mean 'loss'?"),
        ({"loss_reduction": "mean"}, "did you mean 'training.reduction'?"),
    ],
)
def test_words_of_other_libraries_are_understood(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(experiment.ConfigError, match=re.escape(message)):
        experiment.config(**tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"max_grad_norm": 1.0}, "did you mean 'grid.clip_norms'?"),
        ({"training": {"lr": 1.0}}, "did you mean 'grid.learning_rates'?"),
        ({"sigma": 1.0}, "did you mean 'grid.noise_multipliers'?"),
        ({"training": {"target_epsilon": 1.0}}, "did you mean 'grid.epsilons'?"),
        ({"batch_size": 0.5, "epochs": 3}, "did you mean 'training.steps', which is epochs / sam"),
    ],
)
def test_words_lead_to_the_axes_of_a_sweep(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(experiment.ConfigError, match=re.escape(message)):
        sweep.config(**tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"n_train": 64}, "unknown field 'n_train'; did you mean 'data.n_train'?"),
        ({"training": {"clip_norm": 1.0}}, "did you mean 'clipping[].clip_norm'?"),
        ({"adaptive": {}}, "unknown field 'adaptive'; did you mean 'training.adaptive'?"),
        ({"training": {"widths": [8]}}, "did you mean 'model.widths'?"),
        ({"training": {"stepps": 8}}, "did you mean 'steps'? known: sample_rate, "),
    ],
)
def test_a_field_in_the_wrong_section_is_led_to_its_own(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(experiment.ConfigError, match=re.escape(message)):
        experiment.config(**tree)


def test_a_block_of_a_kernel_keeps_its_name() -> None:
    assert experiment.config(batch_size=16).batch_size == 16
