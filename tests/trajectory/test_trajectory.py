"""Trajectories: on disk and back, labels, outcomes, and the arithmetic of steps and times."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import h5py
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from ntkdp import Trajectory, clipping, losses, trajectory
from ntkdp.trajectory import Measurement, Outcome

T, S, N, M, K = 4, 3, 5, 2, 2
FIELDS = list(Trajectory.__dataclass_fields__)


def array(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def full(*seeds: int) -> Trajectory:
    return Trajectory(
        times=jnp.linspace(0, 1, T),
        loss=array(*seeds, T),
        clip_fraction=array(*seeds, T),
        steps=jnp.arange(T),
        accuracy=array(*seeds, T),
        outputs=array(*seeds, T, N, K),
        test_loss=array(*seeds, T),
        test_accuracy=array(*seeds, T),
        test_outputs=array(*seeds, T, M, K),
        outcome=jnp.zeros(seeds, int),
    )


def least(dtype: Any = jnp.float64) -> Trajectory:
    return Trajectory(jnp.arange(3, dtype=dtype), jnp.ones(3, dtype), jnp.zeros(3, dtype))


CASES = {
    "full": full(),
    "seeds": full(S),
    "one seed": full(1),
    "least": least(),
    "float32": least(jnp.float32),
    "failed": Trajectory(
        jnp.arange(2.0), jnp.ones((2, 2)), jnp.ones((2, 2)), outcome=jnp.array([0, 3])
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    path, saved = tmp_path / "run.nc", CASES[name]
    saved.save(path)
    loaded = Trajectory.load(str(path))
    for field in FIELDS:
        before, after = getattr(saved, field), getattr(loaded, field)
        if before is None:
            assert after is None
        else:
            np.testing.assert_array_equal(after, before)
            assert np.asarray(after).dtype == np.asarray(before).dtype
    assert loaded.message == saved.message
    assert loaded.successful is saved.successful
    assert os.listdir(tmp_path) == ["run.nc"]


def test_the_file_is_plain_netcdf(tmp_path: Path) -> None:
    full(S).save(tmp_path / "run.nc")
    with h5py.File(tmp_path / "run.nc") as file:
        np.testing.assert_array_equal(file["loss"][:], full(S).loss)
    with xr.open_dataset(tmp_path / "run.nc", engine="h5netcdf") as dataset:
        assert dataset["loss"].dims == ("seed", "time")
        assert dataset["outputs"].dims == ("seed", "time", "sample", "output")
        assert dataset["test_outputs"].dims == ("seed", "time", "test_sample", "output")
        assert dataset["step"].dims == ("time",)
        assert dataset.attrs["message"] == "success"


def test_an_existing_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run.nc"
    least().save(path)
    before = path.read_bytes()

    def breaks(target: Path, content: bytes) -> None:
        target.write_text("half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks)
    with pytest.raises(OSError, match="no space left"):
        full().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.nc"]
    monkeypatch.undo()
    full().save(path)
    assert Trajectory.load(path).outputs is not None
    with pytest.raises(OSError, match="directory"):
        full().save(tmp_path)
    assert os.listdir(tmp_path) == ["run.nc"]


def test_a_link_a_pipe_and_a_protected_file_are_not_replaced(tmp_path: Path) -> None:
    """As writing in place would have it: a renamed file would take their place without asking."""
    for name in ("disk", "protected"):
        (tmp_path / name).write_text("old")
    (tmp_path / "protected").chmod(0o444)
    os.mkfifo(tmp_path / "pipe")
    for name in ("disk", "nothing", "pipe", "protected"):
        (tmp_path / f"{name}.nc").symlink_to(tmp_path / name)
    for name, message in (("pipe", "is no plain file"), ("protected", "is read-only")):
        for path in (tmp_path / name, tmp_path / f"{name}.nc"):
            with pytest.raises(OSError, match=rf"path {message}: .*{name}; choose another"):
                full().save(path)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "protected").read_text() == "old"
    for name in ("disk", "nothing"):
        full().save(tmp_path / f"{name}.nc")
        assert (tmp_path / f"{name}.nc").is_symlink()
        assert Trajectory.load(tmp_path / name).outputs is not None


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    least().save(tmp_path / "run.nc")
    (tmp_path / "plain").write_text("")
    modes = [(tmp_path / name).stat().st_mode for name in ("run.nc", "plain")]
    assert modes[0] == modes[1]


def test_files_that_are_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path does not exist: .*nothing\.nc"):
        Trajectory.load(tmp_path / "nothing.nc")
    with pytest.raises(FileNotFoundError, match="no_folder"):
        least().save(tmp_path / "no_folder" / "run.nc")
    (tmp_path / "text.nc").write_text("time,loss\n0,1\n")
    (tmp_path / "empty.nc").write_bytes(b"")
    least().save(tmp_path / "whole.nc")
    (tmp_path / "cut.nc").write_bytes((tmp_path / "whole.nc").read_bytes()[:3000])
    for name in ("text.nc", "empty.nc", "cut.nc", "."):
        with pytest.raises(ValueError, match="path is not a netCDF file: "):
            Trajectory.load(tmp_path / name)
    other = xr.Dataset({"loss": ("x", np.ones(3))})
    other.to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="not a trajectory: lacks clip_fraction, outcome"):
        Trajectory.load(tmp_path / "other.nc")
    with pytest.raises(ValueError, match="not a trajectory: lacks time"):
        Trajectory.from_xarray(least().to_xarray().drop_vars("time"))


@pytest.mark.parametrize(
    ("seeds", "changed", "message"),
    [
        ((S,), {"clip_fraction": "time"}, r"clip_fraction .*\('seed', 'time'\), got \('time',\)"),
        ((S,), {"loss": "time"}, r"accuracy .*\('time',\), got \('seed', 'time'\)"),
        ((), {"loss": ("seed", "time")}, r"accuracy .*\('seed', 'time'\), got \('time',\)"),
        ((), {"loss": "seed"}, r"loss .*\('seed', 'time'\), got \('seed',\)"),
        ((), {"loss": ("time", "seed")}, r"loss .* got \('time', 'seed'\)"),
        ((S,), {"outputs": ("time", "sample", "output")}, r"outputs .*'seed', 'time', 'sample'"),
        ((), {"test_outputs": "time"}, r"test_outputs .*\('time', 'test_sample', 'output'\), got"),
        ((), {"outcome": "time"}, r"outcome .* dimensions \(\), got \('time',\)"),
        ((), {"outcome": "seed"}, r"outcome .* dimensions \(\), got \('seed',\)"),
        (
            (S,),
            {"outcome": ("seed", "time")},
            r"outcome .*\('seed',\) or \(\), got \('seed', 'time'",
        ),
        ((S,), {"step": ("seed", "time")}, r"step .*\('time',\), got \('seed', 'time'\)"),
    ],
)
def test_dimensions_that_no_trajectory_has(
    seeds: tuple[int, ...], changed: dict[str, Any], message: str
) -> None:
    ((name, dims),) = changed.items()
    dims = (dims,) if isinstance(dims, str) else dims
    sizes = {"seed": S, "time": T, "sample": N, "output": K}
    dataset = full(*seeds).to_xarray()
    other = (dims, np.zeros([sizes[dim] for dim in dims], int))
    other_dataset = (dataset.assign_coords if name == "step" else dataset.assign)({name: other})
    with pytest.raises(ValueError, match=f"not a trajectory: {message}"):
        Trajectory.from_xarray(other_dataset)


def _external_link(file: h5py.File, other: Path) -> None:
    del file["loss"]
    file["loss"] = h5py.ExternalLink(other, "/loss")


def _deep_external_link(file: h5py.File, other: Path) -> None:
    file.create_group("a/b")["c"] = h5py.ExternalLink(other, "/loss")


def _virtual(file: h5py.File, other: Path) -> None:
    del file["loss"]
    layout = h5py.VirtualLayout((T,), float)
    layout[:] = h5py.VirtualSource(other, "loss", (T,))
    file.create_virtual_dataset("loss", layout)


def _external_storage(file: h5py.File, other: Path) -> None:
    del file["loss"]
    file.create_dataset("loss", (T,), float, external=[(other, 0, 8 * T)])


def _soft_link(file: h5py.File, other: Path) -> None:
    file["again"] = h5py.SoftLink("/loss")


def _loop(file: h5py.File, other: Path) -> None:
    group = file.create_group("group")
    group["itself"] = group
    _external_link(file, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_external_link, r"/loss is a link"),
        (_deep_external_link, r"/a/b/c is a link"),
        (_virtual, r"/loss is a virtual data set"),
        (_external_storage, r"/loss has external storage"),
        (_soft_link, r"/again is a link"),
        (_loop, r"/loss is a link"),
    ],
)
def test_a_file_that_reads_others_is_refused(
    tmp_path: Path, change: Callable[[h5py.File, Path], None], words: str
) -> None:
    path, other = tmp_path / "run.nc", tmp_path / "secret.nc"
    full().save(path)
    full().save(other)
    with h5py.File(path, "a") as file:
        change(file, other)
    with pytest.raises(ValueError, match=rf"run\.nc \({words}\)"):
        Trajectory.load(path)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("time", 0, np.nan), ("time", 1, np.nan), ("time", 2, -1.0), ("step", 2, 0)],
)
def test_times_that_go_back_are_refused(
    tmp_path: Path, name: str, place: int, value: float
) -> None:
    path = tmp_path / "run.nc"
    full().save(path)
    with h5py.File(path, "a") as file:
        file[name][place] = value
    message = rf"run\.nc: not a trajectory: {name} must not decrease or be NaN, got {value} at"
    with pytest.raises(ValueError, match=message):
        Trajectory.load(path)


def test_times_may_stand_still(tmp_path: Path) -> None:
    """As the running sum of a learning rate that starts at 0 does."""
    path = eqx.tree_at(lambda path: path.times, full(), jnp.array([0.0, 0.0, *range(1, T - 1)]))
    path.save(tmp_path / "run.nc")
    np.testing.assert_array_equal(Trajectory.load(tmp_path / "run.nc").times, path.times)


def test_one_outcome_may_be_that_of_all_seeds(tmp_path: Path) -> None:
    path = eqx.tree_at(lambda path: path.outcome, full(S), 0)
    path.save(tmp_path / "run.nc")
    loaded = Trajectory.load(tmp_path / "run.nc")
    assert np.shape(loaded.outcome) == ()
    np.testing.assert_array_equal(loaded.loss, path.loss)


def test_messages() -> None:
    assert least().message == "success"
    assert least().successful
    for outcome in Outcome:
        ended = eqx.tree_at(lambda t: t.outcome, least(), int(outcome))
        assert ended.successful is (outcome == Outcome.SUCCESS)
    both = eqx.tree_at(lambda t: t.outcome, full(S), jnp.array([1, 0, 3]))
    assert not both.successful
    assert "raise max_steps" in both.message
    assert "lower the learning rate" in both.message
    assert "success" not in both.message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_ended_badly(bad: float) -> None:
    loss = jnp.ones((S, T)).at[1, -1].set(bad)
    measured = Measurement(loss=loss, clip_fraction=jnp.zeros((S, T)))
    path = trajectory.from_measurements(jnp.arange(T), measured)
    np.testing.assert_array_equal(path.outcome, [0, Outcome.NON_FINITE, 0])
    path = trajectory.from_measurements(jnp.arange(T), measured, outcome=Outcome.MAX_STEPS)
    np.testing.assert_array_equal(path.outcome, [Outcome.MAX_STEPS] * S)


def test_rescaled_time() -> None:
    path = full().rescale_time(2.5)
    np.testing.assert_allclose(path.times, 2.5 * np.linspace(0, 1, T), rtol=1e-15)
    np.testing.assert_array_equal(path.loss, full().loss)
    with pytest.raises(ValueError, match=r"factor must be positive and finite, got 0.0"):
        full().rescale_time(0.0)


def test_a_trajectory_is_a_pytree() -> None:
    doubled = jax.tree.map(lambda leaf: 2 * leaf, full(S))
    np.testing.assert_array_equal(doubled.loss, 2 * full(S).loss)
    assert least().outputs is None


@hypothesis.given(steps=st.integers(1, 300), record_every=st.integers(1, 400))
def test_recorded_steps(steps: int, record_every: int) -> None:
    recorded = trajectory.recorded_steps(steps, record_every)
    every = set(range(0, steps + 1, record_every))
    assert set(recorded.tolist()) == every | {0, steps}
    assert np.all(np.diff(recorded) > 0)


@pytest.mark.parametrize(("steps", "record_every"), [(1, 1), (7, 3), (60, 7)])
def test_times_of_steps(steps: int, record_every: int) -> None:
    recorded = trajectory.recorded_steps(steps, record_every)
    np.testing.assert_allclose(trajectory.times_of_steps(0.3, recorded), 0.3 * recorded, rtol=1e-15)
    schedule = optax.cosine_decay_schedule(0.3, 40)
    times = trajectory.times_of_steps(schedule, recorded)
    rates = [0.15 * (1 + np.cos(np.pi * min(k, 40) / 40)) for k in range(steps)]
    expected = np.concatenate([[0], np.cumsum(rates)])[recorded]
    np.testing.assert_allclose(times, expected, rtol=1e-6)
    constant = trajectory.times_of_steps(optax.constant_schedule(0.3), recorded)
    np.testing.assert_allclose(constant, 0.3 * recorded, rtol=1e-6)


def test_learning_rates() -> None:
    assert trajectory.check_learning_rate(0.1, 3) == 0.1
    warm_up = optax.linear_schedule(0.0, 0.1, 3)
    assert trajectory.check_learning_rate(warm_up, 3) is warm_up
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"learning_rate must be positive .* got {bad}"):
            trajectory.check_learning_rate(bad, 3)
    falling = optax.linear_schedule(0.1, -0.1, 10)
    assert trajectory.check_learning_rate(falling, 5) is falling
    with pytest.raises(ValueError, match=r"learning_rate must be a schedule .* got -0.1"):
        trajectory.check_learning_rate(falling, 11)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"of at least 0, got {value}"):
            trajectory.check_learning_rate(lambda k: jnp.where(k < 2, 0.1, value), 3)  # noqa: B023


def test_a_changed_training_set_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = clipping.Abadi(1.0)
    ones, zeros = jnp.ones((3, 1)), jnp.zeros((2, 1))
    both = trajectory.TrainingSet(ones, losses.SquaredError(), rule, "mean", zeros)
    alone = trajectory.TrainingSet(ones, losses.SquaredError(), rule, "sum")
    monkeypatch.setattr("ntkdp.trajectory._training_set.check_clipping", None)
    for data, n_test in ((both, 2), (alone, None)):
        single = data.fit(3, n_test, 1).in_precision(np.dtype("float32"))
        assert single.targets.dtype == jnp.float32
        assert (single.test_targets is None) == (n_test is None)
        assert type(single.clipping) is clipping.Abadi
        assert (single.reduction, single.divisor) == (data.reduction, data.divisor)
