"""The demonstration counts what it says it counts, and its folder holds what it says."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkdp.cli._demonstration.compilation import Compilation
from ntkdp.cli._demonstration.parts import Private
from ntkdp.trajectory import Trajectory


def path(final: np.ndarray) -> Trajectory:
    """Runs whose loss falls from one to these numbers."""
    loss = jnp.stack([jnp.ones(len(final)), jnp.asarray(final)], axis=1)
    return Trajectory(jnp.arange(2.0), loss, jnp.zeros_like(loss))


def test_runs_inside_the_band_are_those_between_its_quantiles() -> None:
    predicted = path(np.arange(101) / 100)  # quantiles of 0.05 and 0.95
    observed = path(np.array([0.04, 0.06, 0.5, 0.94, 0.96, 2.0]))
    assert Private(predicted, observed, 1.0).n_inside == 3


def test_seconds_of_compilation_end_with_the_body() -> None:
    def program(x: jax.Array) -> jax.Array:
        return jnp.sin(x) * 3.25

    with Compilation() as compilation:
        jax.jit(program)(1.0)
    counted = compilation.seconds
    assert counted > 0
    jax.jit(lambda x: program(x) + 1)(1.0)
    assert compilation.seconds == counted


@pytest.mark.slow
def test_the_whole_demonstration_shows_what_it_measured(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    program = "from ntkdp.cli import main; main()"
    command = [sys.executable, "-c", program, "demo", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((folder / "metrics.json").read_text())
    assert all(sentence in done.stdout for sentence in found["sentences"].values())
    # A band that holds 90% of the runs has fewer than 13 of 20 inside once in 2,000 times.
    assert found["private"]["runs_inside_the_band"] >= 13
    assert found["private"]["sup_relative_error"] < 0.03
    assert found["map"]["regret"] < 0.02
    assert max(case["exact"] for case in found["without_noise"]) < 0.05
    assert found["failure"]["frozen"] > 3 * found["failure"]["between_times"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert f"{found['private']['runs_inside_the_band']} of 20 runs" in page
