"""Cells of a sweep by subgroup, against their whole."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SOFTMAX

from ntkdp import KernelFlow, advisor, comparison, stochastic_flow, sweep
from ntkdp.clipping import Abadi
from ntkdp.sweep._report import write_report


def test_a_grid_has_the_subgroups_of_every_cell() -> None:
    rng = np.random.default_rng(0)
    x, test_x = rng.standard_normal((6, 3)), rng.standard_normal((4, 3))
    labels, test_labels = np.array([0, 1, 1, 0, 1, 0]), np.array([1, 0, 1, 0])
    flow = KernelFlow(
        x @ x.T, labels, SOFTMAX, Abadi(1.0), test_kernel=test_x @ x.T, test_targets=test_labels
    )
    both = np.concatenate([x, test_x])
    start: Any = (jnp.zeros((6, 2)), jnp.zeros((4, 2)))
    options: Any = {
        "steps": 3, "noise_multiplier": 1.0, "noise_kernel": both @ both.T,
        "key": jax.random.split(jax.random.key(0), 3),
    }  # fmt: skip
    names = ["a", "b", "a", "a"]
    grid = advisor.predict(
        flow, start, learning_rates=[0.1, 1.0], clip_norms=[0.5, 2.0], test_subgroups=names,
        **options,
    )  # fmt: skip
    assert grid.by_group is None
    found = grid.test_by_group
    assert found is not None
    assert found.accuracy is not None
    assert grid.metrics.test_loss is not None
    np.testing.assert_allclose(found.loss @ [0.75, 0.25], grid.metrics.test_loss, rtol=1e-9)
    final = stochastic_flow.final_outputs(
        flow, start, learning_rates=[1.0], clip_norms=[0.5], steps=3, noise_multipliers=1.0,
        noise_kernel=options["noise_kernel"], key=options["key"],
    )  # fmt: skip
    assert final.test is not None
    cell = comparison.by_group(final.test[0], test_labels, SOFTMAX, names)
    np.testing.assert_allclose(found.loss[2], cell.loss.mean(axis=0), rtol=1e-9)
    alone = KernelFlow(x @ x.T, labels, SOFTMAX, Abadi(1.0))
    with pytest.raises(ValueError, match="test_subgroups must be None without test samples"):
        advisor.predict(
            alone, start[0], learning_rates=[0.1], clip_norms=[0.5], steps=1, test_subgroups=names
        )


def test_a_sweep_has_the_subgroups_of_every_cell(tmp_path: Path) -> None:
    config = sweep.config(
        data={"n_train": 16, "n_test": 8, "groups": "class"},
        model={"widths": [32]},
        training={"steps": 3},
        grid={
            "learning_rates": [1.0], "clip_norms": [0.5, 1.0], "epsilons": [],
            "noise_multipliers": [0.0],
        },
    )  # fmt: skip
    results = sweep.run(config, tmp_path / "sweep")
    found = results.groups
    assert found is not None
    assert found.observed is not None
    weights = np.array(found.counts) / 8
    for numbers, cells in (
        (found.predicted, results.predicted),
        (found.observed, results.observed),
    ):
        assert cells is not None
        for number, of_groups in enumerate(numbers):
            for name in ("loss", "accuracy"):
                whole = getattr(cells[0], f"test_{name}")[number]
                np.testing.assert_allclose(np.array(of_groups[name]) @ weights, whole, rtol=1e-6)
    measured = write_report(results, tmp_path / "sweep")
    assert measured["subgroups"] == dict(zip(found.names, found.counts, strict=True))
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "The chosen cell by subgroup" in page
    again = sweep.run(config, tmp_path / "sweep", resume=True)
    assert json.dumps(again.groups) == json.dumps(found)
