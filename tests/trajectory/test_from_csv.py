"""Logs of training that something else wrote, read as trajectories."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import ntkdp
from ntkdp import Trajectory, plotting
from ntkdp.trajectory import Outcome

#: Writes text to a file and gives its path.
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "run.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_a_log_of_steps_is_read_as_written(write: Write) -> None:
    path = write(
        "step,loss,accuracy,test_loss,test_accuracy,clip_fraction,epsilon,note\n"
        "0,2.5,0.1,2.6,0.05,1,0.0,a\n"
        "10,1e0,0.5,1.25,0.45,0.75,0.4,b\n\n"
        "25,.5,0.75,1,0.7,0.5,0.9,\n"
    )
    run = Trajectory.from_csv(path, learning_rate=0.5)
    assert run.times.tolist() == [0.0, 5.0, 12.5]
    assert run.steps is not None
    assert run.steps.tolist() == [0, 10, 25]
    frame = pd.read_csv(path)
    for name in ("loss", "accuracy", "test_loss", "test_accuracy", "clip_fraction"):
        np.testing.assert_array_equal(getattr(run, name), frame[name])
    assert run.start is None
    assert run.setup == ()
    assert run.message == "success"


def test_what_a_trajectory_writes_comes_back(tmp_path: Path) -> None:
    steps = ntkdp.trajectory.recorded_steps(7, 3)
    values = np.linspace(0.0, 1.0, 8).reshape(2, 4)
    run = Trajectory(
        ntkdp.trajectory.times_of_steps(0.3, steps),
        loss=jnp.asarray(values + 1 / 3),
        clip_fraction=jnp.asarray(values),
        steps=jnp.asarray(steps),
        accuracy=jnp.asarray(1 - values),
        outcome=jnp.zeros(2, int),
    )
    path = tmp_path / "run.csv"
    run.to_xarray().to_dataframe().to_csv(path)
    for found in (
        Trajectory.from_csv(path),
        Trajectory.from_csv(path, learning_rate=0.3, columns={"time": None}),
    ):
        assert (
            found.to_xarray().drop_vars("outcome").identical(run.to_xarray().drop_vars("outcome"))
        )
        np.testing.assert_array_equal(found.outcome, run.outcome)


def test_times_alone_are_enough(write: Write) -> None:
    run = Trajectory.from_csv(write("time;loss\n0;2\n0.25;1\n"))
    assert run.times.tolist() == [0.0, 0.25]
    assert run.steps is None


def test_a_schedule_gives_the_running_sum_of_its_rates(write: Write) -> None:
    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.1})
    run = Trajectory.from_csv(write("step,loss\n0,4\n1,3\n3,2\n"), learning_rate=schedule)
    np.testing.assert_allclose(run.times, [0.0, 0.5, 1.05], rtol=1e-6)
    with pytest.raises(ValueError, match="finite values of at least 0"):
        Trajectory.from_csv(write("step,loss\n0,4\n5,3\n"), learning_rate=lambda step: 1.0 - step)


def test_the_initial_state_alone_has_time_zero(write: Write) -> None:
    def schedule(step: Any) -> Any:
        return 0.5 + 0.0 * step

    for learning_rate in (0.5, schedule):
        run = Trajectory.from_csv(write("step,loss\n0,4\n"), learning_rate=learning_rate)
        assert run.times.tolist() == [0.0]


def test_a_log_that_begins_late_starts_at_time_zero(write: Write) -> None:
    late = write("step,loss\n1,1.5\n2,1.0\n")
    run = Trajectory.from_csv(late, learning_rate=0.5)
    assert run.start is not None
    assert float(run.start) == 0.0
    prediction = Trajectory(
        jnp.array([0.0, 0.5, 1.0]), loss=jnp.array([2.0, 3.0, 1.0]), clip_fraction=jnp.zeros(3)
    )
    compared = ntkdp.compare(prediction, run)
    assert compared.times.tolist() == [0.5, 1.0]
    assert compared.sup_relative_error == 1.0


def test_seeds_become_the_leading_axis_in_the_order_of_the_file(write: Write) -> None:
    path = write("step,seed,loss\n0,b,4\n0,a,5\n2,b,2\n2,a,3\n")
    run = Trajectory.from_csv(path, learning_rate=1.0)
    assert run.loss.tolist() == [[4.0, 2.0], [5.0, 3.0]]
    assert run.clip_fraction.shape == (2, 2)
    assert run.times.tolist() == [0.0, 2.0]
    one = Trajectory.from_csv(write("step,seed,loss\n0,7,4\n2,7,2\n"), learning_rate=1.0)
    assert one.loss.shape == (1, 2)


def test_columns_may_have_names_of_their_own(write: Write) -> None:
    path = write("\ufeffglobal_step\ttrain/loss\ttime\taccuracy\n0\t2\t17.2\t88\n5\t1\t18.9\t90\n")
    run = Trajectory.from_csv(
        path,
        learning_rate=2.0,
        columns={
            "step": "global_step",
            "loss": "train/loss",
            "time": None,
            "accuracy": None,
        },
    )
    assert run.times.tolist() == [0.0, 10.0]
    assert run.loss.tolist() == [2.0, 1.0]
    assert run.accuracy is None


def test_gzipped_files_and_delimiters_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.csv.gz"
    path.write_bytes(gzip.compress(b"step loss\n0 2\n1 1\n"))
    run = Trajectory.from_csv(path, learning_rate=1.0, delimiter=" ")
    assert run.loss.tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match="delimiter must be a single character or None, got ', '"):
        Trajectory.from_csv(path, learning_rate=1.0, delimiter=", ")


def test_a_run_that_diverged_has_ended_badly(write: Write) -> None:
    path = write("step,seed,loss\n0,0,2\n1,0,nan\n0,1,2\n1,1,1\n")
    run = Trajectory.from_csv(path, learning_rate=1.0)
    np.testing.assert_array_equal(run.outcome, [Outcome.NON_FINITE, Outcome.SUCCESS])
    assert "lower the learning rate" in run.message
    assert np.isinf(ntkdp.compare(run, run).sup_relative_error)


def test_clip_fractions_that_were_not_recorded_are_not_compared(write: Write) -> None:
    run = Trajectory.from_csv(write("step,loss\n0,2\n1,1\n2,0.5\n"), learning_rate=1.0)
    assert bool(jnp.isnan(run.clip_fraction).all())
    prediction = Trajectory(run.times, loss=run.loss, clip_fraction=jnp.ones(3))
    for pair in ((prediction, run), (run, prediction)):
        compared = ntkdp.compare(*pair)
        assert compared.clip_fraction_error is None
        assert compared.sup_relative_error == 0.0
    ax = plotting.clip_fraction(prediction, run)
    assert [line.get_label() for line in ax.lines] == ["observed: not recorded", "predicted"]
    assert plotting.loss_curves(prediction, run).lines[0].get_label() == "observed"


def test_clip_fractions_of_runs_that_diverged_are_compared() -> None:
    bad = jnp.full(3, jnp.nan)
    run = Trajectory(jnp.arange(3.0), loss=bad, clip_fraction=bad)
    assert ntkdp.compare(run, run).clip_fraction_error == np.inf


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "run.csv' is empty"),
        (",\n,\n", {}, "run.csv' is not a table: all its lines are empty"),
        ("step,loss\n0,1_0\n", {}, "column 'loss' must hold plain numbers, got '1_0' in line 2"),
        ("step,loss\n", {}, "has no rows after its first line, which names ['step', 'loss']"),
        ("step,loss\n0,1,2\n", {}, "line 2 has 3 fields when split at ',', and the first line nam"),
        ('step,loss\n0,"' + "1" * 200_000 + '"\n', {}, "is not a table: field larger than"),
        (
            "step,train_loss\n0,1\n",
            {},
            "has no column 'loss'; did you mean 'train_loss'? known: step, train_loss; name the "
            "one that holds the training loss, columns={'loss': ...}",
        ),
        ("steps,loss\n0,1\n", {}, "has no column 'step' or 'time'; did you mean 'steps'?"),
        ("step,loss\n0,1\n", {"columns": {"los": "loss"}}, "unknown columns 'los'; did you mean"),
        (
            "step,loss\n0,1\n",
            {"columns": {"accuracy": "train_acc"}},
            "columns['accuracy']: ",
        ),
        ("step,loss\n0,1\n", {"columns": {"loss": "Loss"}}, "has no column 'Loss'; did you mean"),
        ("step,loss,loss\n0,1,2\n", {}, "must have one column 'loss', got 2; rename all but that"),
        ("step,loss\n0,1\n", {"learning_rate": None}, "learning_rate must be given, got None: "),
        (
            "step,time,loss\n0,0,1\n",
            {},
            "learning_rate must be left out, got 0.5, since ",
        ),
        ("step,loss\n0,1\n", {"learning_rate": -1.0}, "learning_rate must be positive and finite"),
        (
            "step,loss,test_loss\n0,1,2\n1,1,\n",
            {},
            "column 'test_loss' has no entry in line 3; leave out the rows that lack it, or the "
            "column, columns={'test_loss': None}",
        ),
        ("step,loss\n0,\n", {}, "'loss' has no entry in line 2; leave out the rows that lack it"),
        ("seed,step,loss\n,0,1\n", {}, "column 'seed' has no entry in line 2"),
        (
            "step,loss\n0,1\n1,low\n",
            {},
            "column 'loss' must hold plain numbers, got 'low' in line 3; write 1234.5",
        ),
        ("step;loss\n0;1,5\n", {}, "column 'loss' must hold plain numbers, got '1,5' in line 2"),
        ("step,loss\n0.5,1\n", {}, "'step' must hold whole numbers from 0 to 2,147,483,647, got"),
        ("step,loss\nnan,1\n", {}, "'step' must hold whole numbers from 0 to 2,147,483,647, got"),
        ("step,loss\n-1,1\n", {}, "must hold whole numbers from 0 to 2,147,483,647, got '-1'"),
        (
            "time,loss\ninf,1\n",
            {"learning_rate": None},
            "'time' must hold finite numbers of at least 0, got 'inf' in line 2",
        ),
        (
            "step,loss,accuracy\n0,1,0.5\n1,1,87.5\n",
            {},
            "'accuracy' must hold shares from 0 to 1, got '87.5' in line 3; divide percentages",
        ),
        ("step,loss,accuracy\n0,1,50%\n", {}, "got '50%' in line 2; divide percentages by 100"),
        (
            "step,loss\n0,1\n2,1\n0,1\n",
            {},
            "'step' must increase along a run, got 0 after 2 in line 4; sort the rows, and name "
            "the column that tells several runs apart, columns={'seed': ...}",
        ),
        ("step,loss\n0,1\n0,1\n", {}, "'step' must increase along a run, got 0 after 0 in line 3"),
        (
            "step,time,loss\n0,1,1\n1,0,1\n",
            {"learning_rate": None},
            "'time' must increase along a run, got 0 after 1 in line 3",
        ),
        (
            "seed,step,loss\na,0,1\na,2,1\nb,0,1\n",
            {},
            "'step' must be the same for all seeds, but seed 'b' lacks 2, unlike seed 'a'; leave",
        ),
        ("seed,step,loss\na,0,1\nb,0,1\nb,1,1\n", {}, "but seed 'b' has 1 as well, unlike seed"),
        (
            "seed,step,time,loss\na,0,0,1\na,1,1,1\nb,0,0,1\nb,1,2,1\n",
            {"learning_rate": None},
            "'time' must be the same for all seeds, but that of seed 'b' differs from that of",
        ),
    ],
)
def test_errors_name_the_column_the_line_and_a_way_out(
    write: Write, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Trajectory.from_csv(write(text), **({"learning_rate": 0.5} | options))


def test_arguments_of_other_types_are_refused(write: Write, tmp_path: Path) -> None:
    path = write("step,loss\n0,1\n")
    columns: Any = ["loss"]
    with pytest.raises(TypeError, match=r"columns"):
        Trajectory.from_csv(path, learning_rate=0.5, columns=columns)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv' does not exist"):
        Trajectory.from_csv(tmp_path / "absent.csv", learning_rate=0.5)
    path.write_bytes(b"step,loss\n0,\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Trajectory.from_csv(path, learning_rate=0.5)


def test_times_may_stay_while_the_learning_rate_is_zero(write: Write) -> None:
    run = Trajectory.from_csv(write("step,time,loss\n0,0,1\n1,0,1\n2,0.5,0.5\n"))
    assert run.times.tolist() == [0.0, 0.0, 0.5]
