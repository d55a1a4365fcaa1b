"""The record of a prediction or a run over time."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import devices, validate
from ntkdp._backend.files import replacing
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.types import Array, LearningRate, Params, is_traced
from ntkdp._results import setup as setups
from ntkdp._results.setup import Setup
from ntkdp.privacy import Sensitivities
from ntkdp.trajectory._from_csv import read_log
from ntkdp.trajectory._labelled import RECORD, check_dimensions, in_order, record_of, storable
from ntkdp.trajectory._outcome import ADVICE, Outcome, message, succeeded
from ntkdp.trajectory._stored_elsewhere import stored_elsewhere
from ntkdp.trajectory._training_set import Measurement

if TYPE_CHECKING:
    import xarray


class Trajectory(eqx.Module):
    """Recorded times of a prediction or a run; a pytree.

    Every array has time as its first axis, after a leading seed axis for repeated runs. ``None``
    stands for what was not recorded or does not apply.

    Parameters
    ----------
    times : array
        ``(T,)``, increasing; t is the running sum of the learning rate.
    loss : array
        ``(T,)``, training loss, reduced over samples as the flow or run was told to. Runs and flows
        in half precision are measured and recorded in float32.
    clip_fraction : array
        ``(T,)``, share of samples (layerwise: of samples and groups) whose factor is below one; NaN
        throughout if it was not recorded.
    steps : array, optional
        ``(T,)``, step numbers, for what proceeds in steps.
    accuracy, test_loss, test_accuracy : array, optional
        ``(T,)``.
    outputs, test_outputs : array, optional
        ``(T, n, K)``, on request.
    outcome : int array
        An :class:`Outcome`; see ``successful`` and ``message``.
    start : number, optional
        Time of the initial state, which need not be recorded; by default the first of ``times``.
    setup : tuple
        The training that it is of, one entry for each phase: clipping, loss, learning rate, noise,
        sampling and optimizer. What made the trajectory puts them there, so that
        :func:`ntkdp.compare` can tell what does not belong together; empty if not known. It is part
        of the structure of the pytree: ``jax.tree.map`` joins runs of one setting, and refuses runs
        of several until each is ``dataclasses.replace(path, setup=())``.
    clip_norm : array, optional
        ``(T, R)``, the clipping norm by group if it moves; flat clipping has one group.
    sensitivities : privacy.Sensitivities, optional
        What each sample has added to all steps together, if a run was asked to record it; without
        an axis of time. Phases that follow one another have none.
    params : pytree, optional
        Parameters at the end, if a run was asked to keep them. Files of trajectories do not hold
        them.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> path = ntkdp.Trajectory(jnp.arange(2.0), loss=jnp.ones(2), clip_fraction=jnp.zeros(2))
    >>> path.successful, path.message
    (True, 'success')
    """

    times: Array
    loss: Array
    clip_fraction: Array
    steps: Array | None = None
    accuracy: Array | None = None
    outputs: Array | None = None
    test_loss: Array | None = None
    test_accuracy: Array | None = None
    test_outputs: Array | None = None
    outcome: Array | np.ndarray | int = 0
    start: Array | None = None
    setup: tuple[Setup, ...] = eqx.field(default=(), static=True)
    clip_norm: Array | None = None
    sensitivities: Sensitivities | None = None
    params: Params | None = None

    def __str__(self) -> str:
        """What was recorded, in a table in plain text."""
        from ntkdp.trajectory import _table

        return _table.as_text(self)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        from ntkdp.trajectory import _table

        return _table.as_html(self)

    @property
    def successful(self) -> bool:
        """Whether every recorded number, of every seed, is valid."""
        return succeeded(self.outcome)

    @property
    def message(self) -> str:
        """What went wrong and what to do about it, or ``"success"``."""
        return message(self.outcome, ADVICE)

    @property
    def method(self) -> str:
        """How :func:`ntkdp.predict` predicted it and why, in sentences; empty for anything else."""
        return " ".join(phase.method for phase in self.setup if phase.method)

    def rescale_time(self, factor: float) -> "Trajectory":
        """The trajectory with all times multiplied, e.g. to compare with a `HeavyBallFlow`."""
        factor = validate.scalar(factor=validate.positive(factor=factor))
        return replace(
            self,
            times=self.times * factor,
            start=None if self.start is None else self.start * factor,
            setup=setups.rescaled(self.setup, factor),
        )

    def then(self, other: "Trajectory") -> "Trajectory":
        """This one and then another that starts where this one ends.

        Times and steps are added up. The state that both share is recorded once, as the start of
        the other: its clip fraction belongs to the step to come.

        Raises
        ------
        ValueError
            If one has what the other lacks, or the numbers of seeds, samples or outputs differ, or
            the other does not record its own start.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> path = ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))
        >>> path.then(path).times.tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        """
        if not isinstance(other, Trajectory):
            raise TypeError(f"other must be a Trajectory, got {type(other).__name__}")
        other = _with_its_start(other)

        fields: dict[str, Any] = {
            name: _joined(self, other, name, -1 - len(trailing))
            for name, trailing in ({"times": (), "steps": ()} | _DIMENSIONS).items()
        }
        ended = jnp.asarray(self.outcome)
        return Trajectory(
            outcome=jnp.where(ended == Outcome.SUCCESS, other.outcome, ended),
            start=self.start,
            setup=self.setup + other.setup if self.setup and other.setup else (),
            params=other.params,
            **fields,
        )

    def to_xarray(self) -> "xarray.Dataset":
        """As a labelled :class:`xarray.Dataset` with dimensions seed, time, sample and output.

        Half precision, which netCDF lacks, becomes float32; the attribute ``computed_in`` of such a
        variable holds its dtype.

        Raises
        ------
        ValueError
            If an array has more than one axis of seeds.
        """
        import xarray as xr

        data: dict[str, Any] = {}
        for name, trailing in _DIMENSIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            array, attributes = storable(value)
            leading = ("seed",) * (array.ndim - 1 - len(trailing))
            if len(leading) > 1:
                raise ValueError(f"{name} must have one seed axis at most, got shape {array.shape}")
            data[name] = ((*leading, "time", *trailing), array, attributes)
        coordinates: dict[str, Any] = {"time": ("time", *storable(self.times))}
        if self.steps is not None:
            coordinates["step"] = ("time", np.asarray(self.steps))
        outcome = np.asarray(self.outcome)
        data["outcome"] = (("seed",) * outcome.ndim, outcome)
        if self.start is not None:
            data["start"] = ((), *storable(self.start))
        if self.sensitivities is not None:
            seeds = ("seed",) * jnp.ndim(self.sensitivities.steps)
            for name, trailing in RECORD.items():
                part = np.asarray(getattr(self.sensitivities, name))
                data[f"sensitivity_{name}"] = ((*seeds, *trailing), part)
        attributes = {"message": self.message}
        if self.setup:
            attributes["setup"] = setups.to_json(self.setup)
        return xr.Dataset(data, coordinates, attributes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a netCDF file, whole or not at all.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        FileExistsError, PermissionError
            If there is something else than a file, or a file that is read-only.
        """
        # In memory first: HDF5 crashes the process after a file that it could not write.
        content = self.to_xarray().to_netcdf(engine="h5netcdf")
        with replacing(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a trajectory, or would read other files: naming the file.
        """
        import xarray as xr

        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path does not exist: {path}")
        try:
            # Damage is seen here first if it can be: h5netcdf leaves half-open files behind.
            elsewhere = stored_elsewhere(path)
            if elsewhere is None:
                with xr.open_dataset(path, engine="h5netcdf") as dataset:
                    dataset.load()
        except Exception as error:  # of a damaged file the libraries raise errors of any kind
            raise ValueError(f"path is not a netCDF file: {path} ({error})") from error
        if elsewhere is not None:
            raise ValueError(f"path must hold all its data itself: {path} ({elsewhere})")
        try:
            return cls.from_xarray(dataset)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        learning_rate: LearningRate | None = None,
        columns: Mapping[str, str | None] | None = None,
        delimiter: str | None = None,
    ) -> "Trajectory":
        """Read a log of training that anything may have written: a row for each recorded step.

        A row of step k holds the state after k steps, step 0 the initial one. Losses are those of
        the whole training set, reduced as the prediction's, and not of a batch. A log that begins
        later starts at time 0 all the same: predict it by ``solve(..., start=0.0)``.

        Parameters
        ----------
        path : path
            CSV text whose first line names the columns, gzipped or not. It has a column ``loss``,
            ``step`` or ``time`` (learning rate x step), and perhaps ``accuracy``, ``test_loss``,
            ``test_accuracy``, ``clip_fraction`` (shares from 0 to 1) and ``seed``, which tells runs
            apart: they become the leading axis, in the order of the file. Others are left out.
        learning_rate : float or optax schedule, optional
            Turns steps into times, where there is no column of times.
        columns : mapping of str to str, optional
            The file's own name of a column, e.g. ``{"loss": "train/loss"}``; None leaves it out.
        delimiter : str, optional
            Default: whichever of comma, semicolon, tab and bar splits the first line into most.

        Returns
        -------
        Trajectory
            Without ``setup``, so that :func:`ntkdp.compare` cannot check that it is of the training
            that was predicted. Without a column of clip fractions they are NaN, which
            :func:`ntkdp.compare` leaves out.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError, TypeError
            If it is no table, lacks a column or an entry, holds what is no number or out of order,
            or seeds differ in their steps: naming the column, the line and the value.

        Examples
        --------
        >>> import ntkdp, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
        >>> _ = path.write_text("step,train/loss\\n0,2.0\\n10,1.5\\n20,1.25\\n")
        >>> run = ntkdp.Trajectory.from_csv(
        ...     path, learning_rate=0.5, columns={"loss": "train/loss"})
        >>> run.times.tolist(), run.loss.tolist()
        ([0.0, 5.0, 10.0], [2.0, 1.5, 1.25])
        """
        log = read_log(path, learning_rate, columns, delimiter)
        return from_measurements(log.times, log.measured, log.steps, start=log.start)

    @classmethod
    def from_xarray(cls, dataset: "xarray.Dataset") -> "Trajectory":
        """The inverse of :meth:`to_xarray`.

        Raises
        ------
        TypeError, ValueError
            If it is no data set, or not one of a trajectory.
        """
        import xarray as xr

        if not isinstance(dataset, xr.Dataset):
            raise TypeError(f"dataset must be an xarray.Dataset, got {type(dataset).__name__}")
        missing = {"loss", "clip_fraction", "outcome"} - set(dataset.data_vars)
        if missing or "time" not in dataset.coords:
            raise ValueError(f"not a trajectory: lacks {', '.join(sorted(missing or {'time'}))}")
        seed = ("seed",) if "seed" in dataset["loss"].dims else ()
        fields = {}
        for name, trailing in _DIMENSIONS.items():
            if name in dataset:
                check_dimensions(dataset, name, [(*seed, "time", *trailing)])
                fields[name] = validate.array(**{name: dataset[name].values})
        steps = None
        if "step" in dataset.coords:
            check_dimensions(dataset, "step", [("time",)])
            steps = in_order(step=dataset["step"].values)
        check_dimensions(dataset, "outcome", [seed, ()])
        outcome = dataset["outcome"].values
        if not np.all(np.isin(outcome, [int(known) for known in Outcome])):
            raise ValueError(
                f"not a trajectory: outcome must be one of {[int(known) for known in Outcome]}, "
                f"got {outcome.tolist()!r}"
            )
        times = in_order(time=dataset["time"].values)
        start = None
        if "start" in dataset:
            check_dimensions(dataset, "start", [()])
            start = validate.array(start=dataset["start"].values)
            if not np.all(start <= times[:1]):
                raise ValueError(
                    f"not a trajectory: start must not be after the first time, got {start}"
                )
        record = None
        if "sensitivity_squares" in dataset:
            record = record_of(dataset, seed)
        setup: tuple[Setup, ...] = ()
        if "setup" in dataset.attrs:
            try:
                setup = setups.from_json(dataset.attrs["setup"])
            except ValueError as error:
                raise ValueError(f"not a trajectory: {error}") from error
        return cls(
            times,
            steps=steps,
            outcome=outcome,
            start=start,
            setup=setup,
            sensitivities=record,
            **fields,
        )


_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "loss": (),
    "accuracy": (),
    "clip_fraction": (),
    "outputs": ("sample", "output"),
    "test_loss": (),
    "test_accuracy": (),
    "test_outputs": ("test_sample", "output"),
    "clip_norm": ("group",),
}


def _with_its_start(other: Trajectory) -> Trajectory:
    """The trajectory if its first state is its initial one, where another can join it."""
    if other.start is None:
        return other
    unrecorded = other.times[0] > other.start
    if is_traced(unrecorded):
        message = "other must record its start, to follow another trajectory"
        return replace(other, times=eqx.error_if(other.times, unrecorded, message))
    if unrecorded:
        raise ValueError(
            f"other must record its start, t = {float(other.start):g}, to follow another "
            f"trajectory, got times from {float(other.times[0]):g}; put the start before its times"
        )
    return other


def _joined(one: Trajectory, other: Trajectory, name: str, time: int) -> Array | None:
    """Both records along the time axis; the state that they share is taken from the other."""
    first, second = getattr(one, name), getattr(other, name)
    if first is None and second is None:
        return None
    shapes = [
        None if part is None else np.delete(part.shape, time).tolist() for part in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"other must record {name} as this trajectory does, of shape {shapes[0]} at a time, "
            f"got {shapes[1]}; None stands for what was not recorded"
        )
    if name in ("times", "steps"):
        second = second - second[..., :1] + first[..., -1:]
    before = jnp.take(first, jnp.arange(first.shape[time] - 1), time)
    return jnp.concatenate([before, second], time)


def from_measurements(
    times: Array,
    measured: Measurement,
    steps: Array | None = None,
    outcome: Array | np.ndarray | int | None = None,
    start: Array | None = None,
    setup: Setup | None = None,
) -> Trajectory:
    """A trajectory of stacked measurements, ``measured`` at ``times`` and ``steps``.

    What is not finite has ended badly, whatever ``outcome`` says so far. ``start`` is the time of
    the initial state, by default the first of ``times``; ``setup`` what training it is of, if that
    is known. Half precision is recorded as float32.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> measured = ntkdp.trajectory.Measurement(loss=jnp.ones(2), clip_fraction=jnp.zeros(2))
    >>> ntkdp.trajectory.from_measurements(jnp.arange(2.0), measured).successful
    True
    """
    measured_finite = jnp.all(jnp.isfinite(measured.loss), axis=-1)
    outcome = Outcome.SUCCESS if outcome is None else outcome
    outcome = jnp.where(
        (jnp.asarray(outcome) == Outcome.SUCCESS) & ~measured_finite, Outcome.NON_FINITE, outcome
    )
    measured = jax.tree.map(at_least_single, devices.whole(measured))
    return Trajectory(
        times=times,
        steps=steps,
        outcome=outcome,
        start=start,
        setup=() if setup is None else (setup,),
        **measured._asdict(),
    )
