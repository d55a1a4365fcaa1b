"""Bad and awkward inputs over the whole public face, as users see them.

The table is run once in a process of its own, without the type checker of the tests, and with
warnings as errors. A row is a call and either the error with what its message must say, or the
right answer; and no row may leave a file behind that it did not mean to.
"""

# A row a line: a table is read by its columns.
# ruff: noqa: E501

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import linear

ntkdp: Any = None  # imported when the rows are run, so that no type checker has seen it


class Row(NamedTuple):
    """``call(folder)`` raises ``error`` with a message that ``match`` finds, or gives ``value``."""

    name: str
    call: Callable[[Path], Any]
    error: str = ""
    match: str = ""
    value: Any = None


X, Y, W = np.ones((3, 2)), np.zeros((3, 1)), np.ones((2, 1))
NAN, INF = float("nan"), float("inf")


def key() -> Any:
    return jax.random.key(0)


def abadi(R: Any = 1.0, **options: Any) -> Any:
    return ntkdp.clipping.Abadi(R, **options)


def squared() -> Any:
    return ntkdp.losses.SquaredError()


def train(**changed: Any) -> Any:
    given = {"apply_fn": linear, "params": W, "x": X, "targets": Y, "loss": squared()}
    given |= {"clipping": abadi(), "learning_rate": 0.1, "steps": 2, "key": key()} | changed
    positional = [given.pop(n) for n in ("apply_fn", "params", "x", "targets", "loss", "clipping")]
    return ntkdp.dp_sgd.run(*positional, **given)


def optimal(kernel: Any = None, **changed: Any) -> Any:
    given = {"learning_rate": 0.1, "steps": 4, "n_bands": 2, "batches": ntkdp.batches.Cyclic(2)}
    return ntkdp.noise.Correlated.optimal(
        np.eye(3) if kernel is None else kernel, **given | changed
    )


def flow(kernel: Any = None, rule: Any = None, **options: Any) -> Any:
    kernel = jnp.eye(3) if kernel is None else jnp.asarray(kernel)
    return ntkdp.KernelFlow(kernel, Y, squared(), rule or abadi(), **options)


def layered() -> Any:
    kernel = ntkdp.LayerwiseKernel(("a", "b"), jnp.stack([jnp.eye(3)] * 2))
    return ntkdp.KernelFlow(kernel, Y, squared(), abadi(scope="layerwise"))


def uphill(radius: float, n_params: Any = None, kernel: Any = None, **options: Any) -> Any:
    given = {"learning_rate": 0.1, "steps": 2, "noise_multiplier": 1.0, "key": key()} | options
    sharpness_aware = ntkdp.SharpnessAware(radius, n_params)
    return ntkdp.stochastic_flow.ensemble(flow(kernel), Y, sharpness_aware=sharpness_aware, **given)


def response() -> Any:
    return ntkdp.stochastic_flow.ResponseFlow(linear, W, X, Y, squared(), abadi())


def wide() -> Any:
    return ntkdp.stochastic_flow.TwoTimeFlow(ntkdp.models.mlp([4], 1), X, Y, squared(), abadi())


def solved(kernel: Any, start: Any, rule: Any = None, **options: Any) -> Any:
    path = ntkdp.solve(flow(kernel, rule), Y + start, [0.0, 1.0], outputs=True, **options)
    return path.outputs[-1]


def update_without_a_variance() -> Any:
    adam = ntkdp.optimizers.Adam(correct_noise=True)(0.1)
    return adam.update(jnp.ones(2), adam.init(jnp.ones(2)))


def trajectory() -> Any:
    return ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.ones(3), clip_fraction=jnp.zeros(3))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def csv(folder: Path, text: str, **options: Any) -> Any:
    return ntkdp.datasets.from_csv(written(folder / "given.csv", text.encode()), **options)


def idx(folder: Path, images: bytes, labels: bytes = b"\0\0\x08\1\0\0\0\2\0\1") -> Any:
    return ntkdp.datasets.from_idx(
        written(folder / "given.idx", images), written(folder / "given.labels", labels)
    )


def arrays(x: Any, y: Any = (0, 1, 0, 1), **options: Any) -> Any:
    return ntkdp.datasets.from_arrays(x, y, n_train=3, **options).x_train


def toml(folder: Path, content: bytes, load: Any = None) -> Any:
    return (load or ntkdp.experiment.load_config)(written(folder / "given.toml", content))


def on_a_full_disk(save: Callable[[], Any]) -> Any:
    """``save`` where the last step of every file that is written meets a full disk."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "replace", full):
        return save()


def saved_by_another(folder: Path, **changed: Any) -> Any:
    path = folder / "given.nc"
    dataset = trajectory().to_xarray().assign(changed)
    dataset.to_netcdf(path, engine="h5netcdf")
    return ntkdp.Trajectory.load(path)


def relu() -> Any:
    from neural_tangents import stax

    return stax.Relu


def figure() -> Any:
    from matplotlib.figure import Figure

    return Figure()


def probs(*given: Any, **options: Any) -> Any:
    return ntkdp.calibration.expected_calibration_error(*given, **options)


def experiment(**fields: Any) -> Any:
    return ntkdp.experiment.config(**fields)


V, T, F = "ValueError", "TypeError", "FileNotFoundError"
ROWS = [
    # -------------------------------------------------------------------- shapes
    Row("data in three parts", lambda t: ntkdp.diagnose(linear, W, (X, Y, X), squared(), abadi(), learning_rate=0.1, steps=2), T, r"data must be \(x, targets\).*got tuple of length 3"),
    Row("no model and no function", lambda t: ntkdp.diagnose(3, W, (X, Y), squared(), abadi(), learning_rate=0.1, steps=2), T, "model must be one of ntkdp.models or a function.*got int"),
    Row("an unknown method", lambda t: ntkdp.predict(linear, W, (X, Y), squared(), abadi(), learning_rate=0.1, steps=2, method="best", key=key()), V, "unknown method 'best'; known: auto, frozen"),
    Row("no run to predict", lambda t: ntkdp.predict(linear, W, (X, Y), squared(), abadi(), learning_rate=0.1, steps=2, noise_multiplier=1.0, n_runs=0, key=key()), V, "n_runs must be.*got 0"),
    Row("kernel not square", lambda t: flow(np.ones((3, 2))), V, "kernel must be square.* 3 by 2"),
    Row("targets of another length", lambda t: flow(np.eye(2)), V, r"targets.* 2, got shape \(3, 1\)"),
    Row("initial of another shape", lambda t: ntkdp.solve(flow(), Y[:, 0], [0, 1]), V, r"initial must have shape \(3, 1\), got \(3,\)"),
    Row("x of rank 1 for a model", lambda t: ntkdp.models.mlp([4], 1).init(key(), X[0]), V, r"x must be a batch.*got shape \(2,\)"),
    Row("x of rank 1 for a kernel", lambda t: ntkdp.empirical_ntk(linear, W, X[0]), V, r"x1 must have shape.*\(2,\)"),
    Row("gradient of other samples", lambda t: ntkdp.per_sample_gradient_norms(linear, W, X, Y[:2]), V, r"output_gradient must have.*\(2, 1\)"),
    Row("probabilities not one a label", lambda t: probs([0.5, 0.5], [0]), V, r"labels must be classes of shape \(2,\).* \(1,\)"),
    Row("R with a row too many", lambda t: abadi([[1.0]], scope="layerwise"), V, r"R must be one number.*\(1, 1\)"),
    Row("R for other groups", lambda t: abadi([1.0, 2.0], scope="layerwise").sensitivity(3), V, "R has 2 entries for 3"),
    Row("gamma for each sample", lambda t: ntkdp.clipping.Automatic(1.0, gamma=[0.1, 0.2]), V, r"gamma must be a single number.*\(2,\)"),
    Row("r for each sample", lambda t: ntkdp.clipping.PSAC(1.0, r=[0.1, 0.2]), V, r"r must be a single number.*\(2,\)"),
    Row("delta for each sample", lambda t: ntkdp.losses.Huber([1.0, 2.0]), V, r"delta must be a single number.*\(2,\)"),
    Row("factors of another length", lambda t: ntkdp.spectrum.eigenvalues(jnp.eye(2), np.ones(3)), V, r"factors must have shape \(2,\).*\(3,\)"),
    Row("margin for each sample", lambda t: ntkdp.datasets.separable(margin=[1.0, 2.0]), V, r"margin must be a single number.*\(2,\)"),
    Row("rows of unequal length", lambda t: arrays([[1.0], [2.0, 3.0]], [0, 1]), V, "x must be an array, got rows of unequal"),
    Row("scale that is a matrix", lambda t: ntkdp.calibration.Platt(np.eye(2), np.ones(2)), V, r"scale must have shape \(K,\).*\(2, 2\)"),
    Row("factor for each time", lambda t: trajectory().rescale_time([1.0, 2.0]), V, r"factor must be a single.*\(2,\)"),
    Row("schedule of two rates", lambda t: train(learning_rate=lambda k: jnp.ones(2)), V, "learning_rate must be a schedule.*one number"),
    Row("schedule of none", lambda t: train(learning_rate=lambda k: None), V, "learning_rate must be a schedule.*got None"),
    # -------------------------------------------------------------------- dtypes
    Row("no flow", lambda t: ntkdp.stochastic_flow.ensemble(None, Y, learning_rate=0.1, steps=1, key=key()), T, "flow must be a KernelFlow or a LinearisedFlow, got NoneType"),
    Row("no flow for cells", lambda t: ntkdp.stochastic_flow.final_outputs(None, Y, learning_rates=0.1, clip_norms=1.0, steps=1), T, "flow must be a KernelFlow"),
    Row("a number for a key", lambda t: ntkdp.stochastic_flow.ensemble(flow(), Y, learning_rate=0.1, steps=1, key=3), T, "key must be a JAX PRNG key"),
    Row("text for targets", lambda t: squared().check([["a"], ["b"], ["c"]], 3, 1), T, "targets must be real numbers.*<U1"),
    Row("complex targets", lambda t: squared().check(Y * 1j, 3, 1), T, "targets must be real.*complex128"),
    Row("text labels", lambda t: ntkdp.losses.SoftmaxCrossEntropy().check(["a", "b", "c"], 3, 2), T, "targets must be real numbers"),
    Row("labels as floats", lambda t: ntkdp.losses.SoftmaxCrossEntropy().check([0.0, 1.0, 0.0], 3, 2), T, "targets must be integer labels.*float64"),
    Row("no targets", lambda t: squared().check(None, 3, 1), T, "targets must be real numbers, got None"),
    Row("text for x of a flow", lambda t: ntkdp.WeightFlow(linear, "x", Y, squared(), abadi()), T, "x must be real numbers, got 'x'"),
    Row("no targets of a flow", lambda t: ntkdp.WeightFlow(linear, X, None, squared(), abadi()), T, "targets must be real numbers, got None"),
    Row("complex x", lambda t: ntkdp.empirical_ntk(linear, W, X * 1j), T, "x1 must be real numbers.*complex128"),
    Row("outputs that are whole numbers", lambda t: train(apply_fn=lambda w, x: jnp.round(x @ w).astype(int)), T, "must be floating-point outputs, got int64"),
    Row("whole numbers for parameters", lambda t: train(params=np.ones((2, 1), int)), T, "params must be a floating-point array, got int64"),
    Row("no function", lambda t: ntkdp.empirical_ntk(None, W, X), T, r"apply_fn must be a function.*got None"),
    Row("text for a kernel", lambda t: ntkdp.spectrum.eigenvalues("a"), T, "kernel must be real numbers, got 'a'"),
    Row("text for a gradient", lambda t: ntkdp.certificates.safe_clip_norm(jnp.eye(3), "a"), T, "output_gradient must be real"),
    Row("a seed that is not whole", lambda t: arrays(np.eye(4), seed=1.0), T, "seed must be a whole number, got 1.0"),
    Row("a truth value for a seed", lambda t: arrays(np.eye(4), seed=True), T, "seed must be a whole number, got True"),
    Row("a seed of NumPy", lambda t: arrays(np.eye(4), seed=np.int64(3)) - arrays(np.eye(4), seed=3), value=np.zeros((3, 4))),
    Row("a part that is not whole", lambda t: ntkdp.datasets.from_arrays(np.eye(4), [0, 1, 0, 1], n_train=2.0), T, "n_train must be a whole number, got 2.0"),
    Row("labels of any kind", lambda t: arrays(np.eye(4), [{}, 1, 2, 3]), T, "labels y must be whole numbers or text, got an array of obj"),
    Row("a schedule for a modified flow", lambda t: ntkdp.gradient_flow.ModifiedFlow(flow(), optax.linear_schedule(0.1, 0.0, 10)), T, "learning_rate must be a number, got a schedule.*use recursion"),
    Row("text for runs", lambda t: ntkdp.comparison.crps("a", "b"), T, "predicted must be real numbers, got 'a'"),
    Row("text for levels", lambda t: ntkdp.comparison.band(np.ones((2, 2)), levels="a"), T, "levels must be real"),
    Row("text for times", lambda t: ntkdp.solve(flow(), Y, ["a", "b"]), T, "times must be a real number or array"),
    Row("no probabilities", lambda t: probs(None, None), T, "probs must be real numbers, got None"),
    Row("text for labels", lambda t: probs([0.5], ["1"]), T, "labels must be real numbers"),
    Row("text for a scale", lambda t: ntkdp.calibration.Platt("a", "b"), T, "scale must be real numbers, got 'a'"),
    Row("true for R", lambda t: abadi(True), T, "R must be a number, got True"),
    Row("text for R", lambda t: abadi("0.1"), T, "R must be a number, got '0.1'"),
    Row("None for R", lambda t: abadi(None), T, "R must be a number, got None"),
    Row("text for flops", lambda t: ntkdp.plan(1, 1, 1, flops="fast"), T, "flops must be a number, got 'fast'"),
    Row("steps as a float", lambda t: train(steps=2.0), T, "steps must be a whole number, got 2.0"),
    Row("recorded steps as a float", lambda t: ntkdp.trajectory.recorded_steps(2.5, 1), T, "steps must be a whole number, got 2.5"),
    Row("groups as a float", lambda t: abadi(scope="layerwise").sensitivity(1.5), T, "n_groups must be a whole number, got 1.5"),
    Row("one width", lambda t: ntkdp.models.mlp(8, 1), T, "widths must be a sequence of whole numbers, got 8"),
    Row("a number for an activation", lambda t: ntkdp.models.mlp([8], 1, activation=3), T, "activation must be one of relu, .* or a function of one number, got 3"),
    Row("a stax layer that was not called", lambda t: ntkdp.models.serial(relu()), T, r"layers\[0\] must be a stax layer"),
    Row("a number for an equinox module", lambda t: ntkdp.models.from_equinox(3), T, "must be an equinox module or .*got 3"),
    Row("a function to a number for an equinox module", lambda t: ntkdp.models.from_equinox(lambda key: 3), T, "must be an equinox module or"),
    Row("a number for a flax module", lambda t: ntkdp.models.from_flax(3), T, "must be a flax module or a function .*got 3"),
    Row("numbers for a stax network", lambda t: ntkdp.models.from_stax(1, 2, 3), T, "init_fn must be a function.*got 1"),
    Row("a metric by its name", lambda t: ntkdp.calibration.bootstrap("brier", [0.5], [1], key=key()), T, "metric must be a function.*'brier'"),
    Row("a function that gives text", lambda t: ntkdp.clipping.Custom(lambda s: "a", 1.0), V, "function must map norms.*'a'"),
    Row("a function of another shape", lambda t: ntkdp.clipping.Custom(lambda s: jnp.ones(3), 1.0), V, r"function must map norms.*\(3,\)"),
    Row("delimiter as a number", lambda t: csv(t, "a,b\n1,2\n", target="b", delimiter=3), V, "delimiter must be a single character.*got 3"),
    Row("target as a number", lambda t: csv(t, "a,b\n1,2\n", target=3), V, r"has no column 3; known: a, b"),
    Row("whole numbers for x", lambda t: train(x=np.ones((3, 2), int)).loss, value=[2.0, (2 - 0.1 * 2**0.5) ** 2 / 2, (2 - 0.2 * 2**0.5) ** 2 / 2]),
    Row("truth values with gaps", lambda t: csv(t, "a,b\nTrue,2\nFalse,4\n,6\nTrue,1\n", target="b", missing="mean").feature_names[0], value="a"),
    # -------------------------------------------------------------------- NaN and infinities
    Row("NaN in x", lambda t: train(x=np.where(np.arange(6).reshape(3, 2) == 0, NAN, X)), V, "x must be finite, got 1 NaN or infinite of 6"),
    Row("infinite targets", lambda t: train(targets=Y + INF), V, "targets must be finite, got 3"),
    Row("NaN kernel", lambda t: flow(np.eye(3) * NAN), V, "kernel must be finite, got 9"),
    Row("infinite time", lambda t: ntkdp.solve(flow(), Y, [0, INF]), V, "times must be finite"),
    Row("NaN scale", lambda t: ntkdp.calibration.Platt([NAN], [0.0]), V, "scale must be finite, got 1"),
    Row("NaN probability", lambda t: probs([0.5, NAN], [0, 1]), V, "probs must be finite, got 1"),
    Row("NaN in a config", lambda t: toml(t, b"rtol = nan"), "ConfigError", "'rtol'.*got nan"),
    Row("infinite learning rate in a config", lambda t: toml(t, b"[training]\nlearning_rate = inf"), "ConfigError", "'training.learning_rate'.*finite.*got inf"),
    Row("infinite scale in a config", lambda t: experiment(model={"W_std": INF}), "ConfigError", "'model.W_std'.*finite"),
    Row("infinite number in a table", lambda t: csv(t, "a,b\n1e999,1\n3,4\n", target="b"), V, "x must be finite.*'a' \\(1\\)"),
    # -------------------------------------------------------------------- empty, one sample, one class
    Row("no samples", lambda t: train(x=X[:0], targets=Y[:0]), V, r"x must have shape.*got \(0, 2\)"),
    Row("no R", lambda t: abadi([], scope="layerwise"), V, "R must be one number.*empty"),
    Row("no groups", lambda t: abadi(scope="layerwise").sensitivity(0), V, "n_groups must be at least 1, got 0"),
    Row("no steps to record", lambda t: ntkdp.trajectory.recorded_steps(5, 0), V, "record_every must be at least 1, got 0"),
    Row("no phases", lambda t: ntkdp.dp_sgd.run_phases(linear, W, X, Y, squared(), [], key=key()), V, "phases must hold at least one"),
    Row("no mechanisms", lambda t: ntkdp.privacy.composed_epsilon([], 1e-5), V, "mechanisms must hold at least one"),
    Row("one class", lambda t: arrays(np.ones((4, 1)), [0, 0, 0, 0]), V, r"two classes or more, got only \[0\]"),
    Row("one sample to split", lambda t: ntkdp.datasets.from_arrays([[1.0]], [1.5]), V, "do not fit: there are 1 samples"),
    Row("images of no pixels", lambda t: idx(t, b"\0\0\x08\x02\0\0\0\2\0\0\0\0"), V, r"given.idx.* is empty.*\(2, 0\)"),
    Row("one sample trains", lambda t: train(x=X[:1], targets=Y[:1]).loss, value=[2.0, (2 - 0.1 * 2**0.5) ** 2 / 2, (2 - 0.2 * 2**0.5) ** 2 / 2]),
    Row("one sample has a condition", lambda t: ntkdp.spectrum.condition_number(jnp.ones((1, 1))), value=1.0),
    Row("one run has no standard error", lambda t: ntkdp.comparison.standardised_error(np.ones((1, 2)), np.ones(2)), V, "predicted must hold at least 2 runs"),
    # -------------------------------------------------------------------- constant and duplicated
    Row("a constant feature is zero", lambda t: arrays(np.full((4, 1), 7.0)), value=np.zeros((3, 1))),
    Row("duplicated samples: singular kernel", lambda t: ntkdp.spectrum.condition_number(jnp.ones((2, 2))), value=INF),
    Row("duplicated samples: no safe norm", lambda t: ntkdp.certificates.safe_clip_norm(jnp.ones((3, 3)), Y + 1), value=INF),
    Row("duplicated samples: flow", lambda t: solved(np.ones((3, 3)), 1.0), value=np.full((3, 1), np.exp(-1))),
    Row("a kernel of zeros stands still", lambda t: solved(np.zeros((3, 3)), 1.0), value=np.ones((3, 1))),
    Row("inputs of zeros do not train", lambda t: train(x=X * 0, targets=Y + 1).loss, value=[0.5, 0.5, 0.5]),
    # -------------------------------------------------------------------- huge and tiny
    Row("huge features", lambda t: arrays([[1e200], [-1e200], [1e200], [-1e200]], standardise="unit") ** 2, value=np.ones((3, 1))),
    Row("tiny features", lambda t: np.abs(arrays([[1e-200], [-1e-200], [1e-200], [-1e-200]], standardise="unit")), value=np.ones((3, 1))),
    Row("huge features by feature", lambda t: arrays([[1e300], [-1e300], [1e300], [0.0]]).std(), value=1.0),
    Row("tiny features by feature", lambda t: arrays([[1e-200], [-1e-200], [1e-200], [0.0]]).std(), value=1.0),
    Row("a huge R does not clip", lambda t: abadi(1e300).factors(jnp.array([1.0, 1e30], jnp.float32)), value=[1.0, 1.0]),
    Row("an R below single precision drops", lambda t: abadi(1e-60).factors(jnp.array([0.0, 1.0], jnp.float32)), value=[1.0, 0.0]),
    Row("an r below double precision", lambda t: ntkdp.clipping.PSAC(1.0, r=1e-320).factors(jnp.array([0.0, 2.0])), value=[1.0, 0.5]),
    Row("huge inputs", lambda t: train(x=X * 1e30).loss, value=0.5 * (2e30 - np.arange(3) * 0.1 * 2**0.5 * 1e30) ** 2),
    Row("tiny inputs", lambda t: train(x=X * 1e-30).loss * 1e60, value=[2.0, 2.0, 2.0]),
    Row("a huge kernel is told", lambda t: ntkdp.solve(flow(np.eye(3) * 1e30), Y + 1, [0.0, 1.0]).message.split(";")[0], value="the solver's step size shrank to rounding"),
    Row("overflow is told", lambda t: train(x=X * 1e200).message.split(":")[0], value="the trajectory became infinite or NaN"),
    Row("a tiny kernel stands still", lambda t: solved(np.eye(3) * 1e-30, 1.0), value=np.ones((3, 1))),
    Row("spectrum of a huge kernel", lambda t: ntkdp.spectrum.eigenvalues(jnp.eye(2) * 1e30), value=[1e30, 1e30]),
    Row("condition of a tiny kernel", lambda t: ntkdp.spectrum.condition_number(jnp.eye(2) * 1e-300), value=1.0),
    Row("a number of 5000 digits", lambda t: toml(t, b"seed = " + b"9" * 5000), "ConfigError", "is not TOML"),
    Row("brackets too deep", lambda t: toml(t, b"x = " + b"[" * 5000), "ConfigError", "is not TOML"),
    Row("a huge seed", lambda t: experiment(seed=10**30), "ConfigError", "field 'seed'.*less than"),
    # -------------------------------------------------------------------- numbers out of range
    Row("negative noise", lambda t: train(noise_multiplier=-1.0), V, "noise_multiplier must be at least 0.*-1.0"),
    Row("noise without a bound", lambda t: train(clipping=ntkdp.clipping.Batch(1.0), noise_multiplier=1.0), V, "noise_multiplier must be 0 with Batch"),
    Row("sampling rate above one", lambda t: train(sample_rate=1.1), V, r"sample_rate must be in \(0, 1\], got 1.1"),
    Row("batches by name", lambda t: train(batches="cyclic"), T, "batches must be one of ntkdp.batches or None, got str"),
    Row("batches of half a sample", lambda t: ntkdp.batches.FixedSize(1.5), T, "size must be a whole number, got 1.5"),
    Row("more batches than samples", lambda t: train(batches=ntkdp.batches.Cyclic(4)), V, "n_batches must be at most the 3 samples, got 4"),
    Row("batches and a rate", lambda t: train(batches=ntkdp.batches.Cyclic(2), sample_rate=0.5), V, "give batches or sample_rate, not both"),
    Row("noise as numbers", lambda t: train(noise=[1.0, 0.5], noise_multiplier=1.0), T, "noise must be one of ntkdp.noise or None, got list"),
    Row("a strategy as text", lambda t: ntkdp.noise.Correlated("square root"), T, "strategy"),
    Row("an optimal strategy of half a step", lambda t: optimal(steps=2.5), T, "steps must be a whole number, got 2.5"),
    Row("an optimal strategy without bands", lambda t: optimal(n_bands=0), V, "n_bands must be at least 1, got 0"),
    Row("an optimal strategy for random batches", lambda t: optimal(batches=ntkdp.batches.Poisson(0.5)), V, r"batches must be Full, Cyclic or Shuffled.*got Poisson\(q=0.5\)"),
    Row("an optimal strategy for batches by name", lambda t: optimal(batches="cyclic"), T, "batches must be one of ntkdp.batches, got str"),
    Row("an optimal strategy of a kernel that is not square", lambda t: optimal(np.ones((3, 2))), V, r"kernel must be a matrix .*got shape \(3, 2\)"),
    Row("an optimal strategy of no kernel", lambda t: optimal("ntk"), T, "kernel must be real numbers, got 'ntk'"),
    Row("an optimal strategy of a kernel with gaps", lambda t: optimal([1.0, NAN]), V, "kernel must be finite, got 1 NaN or infinite of 2 entries"),
    Row("an optimal strategy of a negative kernel", lambda t: optimal(-np.eye(2)), V, "kernel must have no negative eigenvalue, got -1"),
    Row("an optimal strategy of no noise", lambda t: optimal(np.zeros((2, 2))), V, "must let noise reach the loss, got zeros"),
    Row("an optimal strategy at an unstable rate", lambda t: optimal([1.0], learning_rate=1e3, steps=200), V, "learning_rate must be stable under the kernel.*is 1, got 1000"),
    Row("an optimal strategy at a negative rate", lambda t: optimal(learning_rate=-0.1), V, "learning_rate must be positive and finite, got -0.1"),
    Row("an optimal strategy with weights of a matrix", lambda t: optimal(weights=[1.0, 1.0, 1.0]), V, "weights must be None unless kernel is eigenvalues"),
    Row("an optimal strategy with a weight too few", lambda t: optimal([1.0, 2.0], weights=[1.0]), V, r"weights must have the shape \(2,\) of the eigenvalues, got \(1,\)"),
    Row("an optimal strategy with a momentum of one", lambda t: optimal(momentum=1.0), V, r"momentum must be in \[0, 1\), got 1.0"),
    Row("an optimal strategy of one row", lambda t: ntkdp.noise.Correlated.optimal_for_rows([1.0, 2.0], n_bands=2, batches=ntkdp.batches.Full()), V, r"rows must have shape \(m, T\).*got \(2,\)"),
    Row("optimal noise of a run without a flow", lambda t: ntkdp.stochastic_flow.optimal_noise(np.eye(3), Y, learning_rate=0.1, steps=2, n_bands=2, batches=ntkdp.batches.Full()), T, "flow must be a KernelFlow, got ndarray"),
    Row("an optimal strategy at scale zero", lambda t: optimal(scale=0.0), V, "scale must be positive and finite, got 0.0"),
    Row("a number for adaptive clipping", lambda t: train(adaptive=0.5), T, "adaptive must be an ntkdp.clipping.Adaptive or None, got float"),
    Row("the same for an ensemble", lambda t: ntkdp.stochastic_flow.ensemble(flow(), Y, learning_rate=0.1, steps=2, adaptive=True, key=key()), T, "adaptive must be an ntkdp.clipping.Adaptive or None, got bool"),
    Row("a number for the batches of a response", lambda t: ntkdp.stochastic_flow.response_ensemble(response(), learning_rate=0.1, steps=2, batches=2, key=key()), T, "batches must be one of ntkdp.batches or None, got int"),
    Row("a list for the noise of a response", lambda t: ntkdp.stochastic_flow.response_ensemble(response(), learning_rate=0.1, steps=2, noise=[1.0], key=key()), T, "noise must be one of ntkdp.noise or None, got list"),
    Row("a batch of a response that is too large", lambda t: ntkdp.stochastic_flow.response_ensemble(response(), learning_rate=0.1, steps=2, batches=ntkdp.batches.FixedSize(9), key=key()), V, "size must be at most the 3 samples, got 9"),
    Row("a string for the batches of wide networks", lambda t: ntkdp.stochastic_flow.two_time_ensemble(wide(), learning_rate=0.1, steps=2, batches="all", key=key()), T, "batches must be one of ntkdp.batches or None, got str"),
    Row("a function for the noise of moments", lambda t: ntkdp.stochastic_flow.moments(flow(), Y, learning_rate=0.1, steps=2, noise=lambda: 1.0), T, "noise must be one of ntkdp.noise or None, got function"),
    Row("shuffled batches of moments", lambda t: ntkdp.stochastic_flow.moments(flow(), Y, learning_rate=0.1, steps=2, batches=ntkdp.batches.Shuffled(2)), V, "batches must be Full, Poisson, FixedSize or Cyclic, .*got Shuffled"),
    Row("the class of adaptive clipping", lambda t: ntkdp.recursion(flow(), Y, learning_rate=0.1, steps=2, adaptive=ntkdp.clipping.Adaptive), T, "adaptive must be an ntkdp.clipping.Adaptive or None, got "),
    Row("a number of directions alone", lambda t: train(zeroth_order=4), T, "zeroth_order must be an ntkdp.ZerothOrder or None, got int"),
    Row("a number of directions of an ensemble", lambda t: ntkdp.stochastic_flow.ensemble(flow(), Y, learning_rate=0.1, steps=2, zeroth_order=4, key=key()), T, "zeroth_order must be an ntkdp.ZerothOrder or None, got int"),
    Row("no directions", lambda t: ntkdp.ZerothOrder(0), V, "directions must be"),
    Row("half a direction", lambda t: ntkdp.ZerothOrder(0.5), T, "directions must be"),
    Row("a reach of zero", lambda t: ntkdp.ZerothOrder(1, reach=0.0), V, "reach must be positive"),
    Row("directions by layer", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), clipping=abadi(scope="layerwise")), V, "zeroth_order needs a rule that clips each sample's slope"),
    Row("directions and adaptive clipping", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), adaptive=ntkdp.clipping.Adaptive()), V, "adaptive must be None with zeroth_order"),
    Row("directions and public rows", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), public=ntkdp.PublicRows(X, Y, weight=0.5)), V, "public must be None with zeroth_order"),
    Row("directions and correlated noise", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), noise=ntkdp.noise.Correlated.square_root(2)), V, "noise must be independent with zeroth_order"),
    Row("directions and microbatches", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), microbatch_size=2), V, "microbatch_size must be None with zeroth_order"),
    Row("directions and noise that is subtracted", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), optimizer=ntkdp.optimizers.Adam(correct_noise=True)), V, "optimizer must have correct_noise=False with zeroth_order"),
    Row("noise of slopes that are not clipped", lambda t: ntkdp.stochastic_flow.ensemble(flow(rule=ntkdp.clipping.NoClipping()), Y, learning_rate=0.1, steps=2, noise_multiplier=1.0, zeroth_order=ntkdp.ZerothOrder(), key=key()), V, "noise_multiplier must be 0 with NoClipping"),
    Row("a radius alone", lambda t: train(sharpness_aware=0.5), T, "sharpness_aware must be an ntkdp.SharpnessAware or None, got float"),
    Row("a radius alone of a recursion", lambda t: ntkdp.recursion(flow(), Y, learning_rate=0.1, steps=2, sharpness_aware=0.5), T, "sharpness_aware must be an ntkdp.SharpnessAware or None, got float"),
    Row("a negative radius", lambda t: ntkdp.SharpnessAware(-0.1), V, "radius must be at least 0 and finite, got -0.1"),
    Row("several radii", lambda t: ntkdp.SharpnessAware([0.1, 0.2]), V, "radius must be a single number"),
    Row("half a weight", lambda t: ntkdp.SharpnessAware(0.1, n_params=1.5), T, "n_params must be a whole number, got 1.5"),
    Row("a way uphill along random directions", lambda t: train(zeroth_order=ntkdp.ZerothOrder(), sharpness_aware=ntkdp.SharpnessAware(0.1)), V, "sharpness_aware must be None with zeroth_order"),
    Row("a noisy kernel of unknown weights", lambda t: uphill(0.1), V, "n_params of sharpness_aware must be the number of weights"),
    Row("a noisy kernel of too few weights", lambda t: uphill(0.1, 2, kernel=np.eye(3)), V, "n_params must be the number of weights of the kernel.*got 2 for a rank above 2"),
    Row("a noisy kernel uphill of correlated noise", lambda t: uphill(0.1, 9, noise=ntkdp.noise.Correlated.square_root(2)), V, "noise must be independent with sharpness_aware and a KernelFlow"),
    Row("a kernel by layer uphill", lambda t: ntkdp.recursion(layered(), Y, learning_rate=0.1, steps=2, sharpness_aware=ntkdp.SharpnessAware(0.1)), V, "clipping must have scope='flat' with sharpness_aware and a KernelFlow.*got 'layerwise'; take a LinearisedFlow"),
    Row("a preconditioned kernel uphill", lambda t: ntkdp.recursion(flow(preconditioned_kernel=np.eye(3)), Y, learning_rate=0.1, steps=2, sharpness_aware=ntkdp.SharpnessAware(0.1)), V, "flow must have no preconditioned_kernel with sharpness_aware"),
    Row("public rows as a pair", lambda t: train(public=(X, Y)), T, "public must be an ntkdp.PublicRows or None, got tuple"),
    Row("public rows of another width", lambda t: train(public=ntkdp.PublicRows(np.ones((2, 5)), np.zeros((2, 1)), weight=0.5)), V, r"fails for public\.x of shape \(2, 5\)"),
    Row("public targets of another length", lambda t: train(public=ntkdp.PublicRows(X, Y[:2], weight=0.5)), V, r"public\.targets must have the shape"),
    Row("a weight of public rows in per cent", lambda t: ntkdp.PublicRows(X, Y, weight=50), V, r"weight must be in \[0, 1\], got 50"),
    Row("a weight of public rows as text", lambda t: ntkdp.PublicRows(X, Y, weight="half"), T, "weight must be"),
    Row("public rows for a kernel that does not have them", lambda t: flow(public=ntkdp.PublicRows(X, Y, weight=0.5)), V, "public and public_kernel must be given together"),
    Row("a kernel of public rows of another shape", lambda t: flow(public=ntkdp.PublicRows(X, Y, weight=0.5), public_kernel=np.eye(3)), V, r"public_kernel must have shape \(n \+ p \+ m, p, \.\.\.\)"),
    Row("a quantile in per cent", lambda t: ntkdp.clipping.Adaptive(50), V, "quantile must be"),
    Row("several quantiles", lambda t: ntkdp.clipping.Adaptive([0.5, 0.8]), V, "quantile must be"),
    Row("a quantile as text", lambda t: ntkdp.clipping.Adaptive("median"), T, "quantile must be"),
    Row("a rate of zero", lambda t: ntkdp.clipping.Adaptive(0.5, rate=0.0), V, "rate must be positive"),
    Row("no noise of the count", lambda t: train(adaptive=ntkdp.clipping.Adaptive(), noise_multiplier=1.0), V, r"count_noise must be above 0\.5, got 0"),
    Row("a noise of the count that is not a number", lambda t: ntkdp.clipping.Adaptive(0.5, count_noise=NAN), V, "count_noise must be"),
    Row("an adaptive flow of a flow with inertia", lambda t: ntkdp.gradient_flow.AdaptiveFlow(ntkdp.HeavyBallFlow(flow(), 0.1), ntkdp.clipping.Adaptive(), 0.1), T, "flow must be a KernelFlow, a WeightFlow or a LinearisedFlow, got HeavyBallFlow"),
    Row("an adaptive flow without a rule for it", lambda t: ntkdp.gradient_flow.AdaptiveFlow(flow(), None, 0.1), T, "adaptive must be an ntkdp.clipping.Adaptive, got NoneType"),
    Row("an adaptive flow with a sharp step", lambda t: ntkdp.gradient_flow.AdaptiveFlow(flow(), ntkdp.clipping.Adaptive(), 0.1, smoothing=0), V, "smoothing must be positive"),
    Row("a budget without an accountant", lambda t: train(batches=ntkdp.batches.FixedSize(2), noise=ntkdp.noise.Correlated([1.0, 0.5]), noise_multiplier=ntkdp.privacy.Budget(1.0, 1e-5)), V, "no accountant of FixedSize"),
    Row("a budget for batches of an unknown share", lambda t: ntkdp.privacy.Budget(1.0, 1e-5).noise_multiplier(9, batches=ntkdp.batches.FixedSize(2)), T, r"n_samples must be given with batches=FixedSize\(size=2\), got None"),
    Row("a budget for batches that are too large", lambda t: ntkdp.privacy.Budget(1.0, 1e-5).noise_multiplier(9, batches=ntkdp.batches.FixedSize(4), n_samples=3), V, "size must be at most the 3 samples, got 4"),
    Row("unknown sampling", lambda t: ntkdp.privacy.epsilon(1.0, 0.5, 1, 1e-5, sampling="fixed"), V, "unknown sampling 'fixed'; did you mean 'fixed_size'"),
    Row("norms to share out of a flat rule", lambda t: ntkdp.advisor.allocate_clip_norms(flow(), Y, learning_rate=0.1, steps=2), V, r"flow must have layerwise clipping .*got Abadi with scope='flat'"),
    Row("norms to share out of no flow", lambda t: ntkdp.advisor.allocate_clip_norms(Y, Y, learning_rate=0.1, steps=2), T, "flow must be a"),
    Row("neighbours of no batches", lambda t: ntkdp.privacy.neighbours("poisson"), T, "batches must be one of ntkdp.batches"),
    Row("delta of one", lambda t: ntkdp.privacy.epsilon(1.0, 1.0, 1, 1.0), V, r"delta must be in \(0, 1\), got 1.0"),
    Row("no noise, no privacy", lambda t: ntkdp.privacy.epsilon(0.0, 1.0, 1, 1e-5), value=INF),
    Row("endless noise", lambda t: ntkdp.privacy.epsilon(1e30, 1.0, 1, 1e-5), value=0.0),
    Row("probability above one", lambda t: probs([0.5, 1.5], [0, 1]), V, "probs must lie in.*softmax"),
    Row("quantile above one", lambda t: ntkdp.advisor.gradient_norms(linear, W, X, Y, squared(), quantiles=[2.0]), V, r"quantiles must be.*\[2.0\]"),
    Row("level of zero", lambda t: ntkdp.comparison.band_coverage(np.ones((3, 2)), np.ones(2), level=0), V, r"level must be in \(0, 1\), got 0"),
    Row("negative friction", lambda t: ntkdp.HeavyBallFlow(flow(), friction=-1.0), V, "friction must be at least 0.*-1.0"),
    Row("a width of zero", lambda t: experiment(model={"widths": [8, 0]}), "ConfigError", r"'model.widths.1'.*got 0"),
    # -------------------------------------------------------------------- unknown names
    Row("unknown rule", lambda t: ntkdp.clipping.from_name("abady", R=1.0), V, "unknown rule 'abady'; did you mean 'abadi'"),
    Row("no rule", lambda t: ntkdp.clipping.from_name(3, R=1.0), V, "unknown rule 3; known: none, abadi"),
    Row("unknown loss", lambda t: ntkdp.losses.from_name("hubber"), V, "did you mean 'huber'"),
    Row("unknown claim", lambda t: ntkdp.claims.get("C99"), V, "unknown claim 'C99'; did you mean 'C9'"),
    Row("unknown data set", lambda t: ntkdp.datasets.load("digit"), V, "did you mean 'digits'"),
    Row("unknown option of a data set", lambda t: ntkdp.datasets.load("digits", sead=1), V, "unknown option 'sead' of digits; did you mean 'seed'"),
    Row("unknown suffix", lambda t: ntkdp.datasets.load("a.parquet"), V, "no reader for the file 'a.parquet'"),
    Row("unknown activation", lambda t: ntkdp.models.mlp([8], 1, activation="gellu"), V, "unknown activation 'gellu'; did you mean 'gelu'"),
    Row("unknown pooling", lambda t: ntkdp.models.cnn([8], 1, pooling="max"), V, "unknown pooling 'max'"),
    Row("unknown accountant", lambda t: ntkdp.privacy.epsilon(1.0, 1.0, 1, 1e-5, "pdl"), V, "unknown accountant 'pdl'; did you mean 'pld'"),
    Row("unknown quantity", lambda t: ntkdp.comparison.last_value(trajectory(), "los"), V, "unknown name 'los'; did you mean 'loss'"),
    Row("unknown group", lambda t: ntkdp.dp_sgd.run_phases(linear, W, X, Y, squared(), [ntkdp.Phase(1, abadi(), learning_rate=0.1, trainable=["head"])], key=key()), V, "unknown group 'head'; known: params"),
    Row("unknown attribute", lambda t: ntkdp.empirical_kernel, "AttributeError", "No ntkdp attribute empirical_kernel"),
    # -------------------------------------------------------------------- wrong configs
    Row("unknown field", lambda t: toml(t, b"sead = 1"), "ConfigError", "given.toml: unknown field 'sead'; did you mean 'seed'"),
    Row("a date for a section", lambda t: toml(t, b"data = 2020-01-01"), "ConfigError", "field 'data'.*dictionary"),
    Row("two ways to set the noise", lambda t: experiment(training={"mu": 1.0, "noise_multiplier": 1.0}), "ConfigError", "one way to set the noise"),
    Row("no rules", lambda t: experiment(clipping=[]), "ConfigError", r"field 'clipping'.*got \[\]"),
    Row("rate of zero in a sweep", lambda t: ntkdp.sweep.config(grid={"learning_rates": [0.0]}), "ConfigError", "grid.learning_rates must be positive.*0.0"),
    Row("no norms in a sweep", lambda t: ntkdp.sweep.config(grid={"clip_norms": []}), "ConfigError", r"'grid.clip_norms'.*got \[\]"),
    Row("noise without a bound in a sweep", lambda t: toml(t, b"[grid]\nrules = ['batch']", ntkdp.sweep.load_config), "ConfigError", "grid.rules must not hold 'batch' with noise"),
    Row("a path for a config", lambda t: ntkdp.experiment.run("a.toml"), T, r"config must be a Config, e.g. ntkdp.experiment.load_config\(path\), got str"),
    Row("a dictionary for a config", lambda t: ntkdp.sweep.run({}), T, r"config must be a SweepConfig, e.g. ntkdp.sweep.load_config\(path\), got dict"),
    Row("a folder for a config", lambda t: ntkdp.experiment.load_config(t), F, "config file does not exist"),
    # -------------------------------------------------------------------- truncated and foreign files
    Row("no bytes of netCDF", lambda t: ntkdp.Trajectory.load(written(t / "given.nc", b"")), V, "path is not a netCDF file: .*given.nc"),
    Row("half a signature of HDF5", lambda t: ntkdp.Trajectory.load(written(t / "given.nc", b"\x89HDF\r\n\x1a\n")), V, "not a netCDF file"),
    Row("a classic netCDF file", lambda t: ntkdp.Trajectory.load(written(t / "given.nc", b"CDF\x01" + bytes(99))), V, "not a netCDF file"),
    Row("netCDF of an outcome not yet known", lambda t: saved_by_another(t, outcome=99), V, r"not a trajectory: outcome must be one of \[0, 1, 2, 3, 4\], got 99"),
    Row("netCDF of a loss with other axes", lambda t: saved_by_another(t, loss=("step_size", [1.0, 2.0])), V, r"not a trajectory: loss must have dimensions \('time',\).*step_size"),
    Row("netCDF of a loss that is text", lambda t: saved_by_another(t, loss=("time", list("abc"))), V, "given.nc: loss must be real numbers"),
    Row("no data set", lambda t: ntkdp.Trajectory.from_xarray("x"), T, "dataset must be an xarray.Dataset, got str"),
    Row("no bytes of npz", lambda t: ntkdp.datasets.from_npz(written(t / "given.npz", b"")), V, "given.npz' is not an .npz archive"),
    Row("an archive of nothing", lambda t: ntkdp.datasets.from_npz(written(t / "given.npz", b"PK\x05\x06" + bytes(18))), V, "given.npz' has no array 'x'"),
    Row("IDX of rank 255", lambda t: idx(t, b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\0"), V, "given.idx' must hold an array of rank 1 to 8, got 255"),
    Row("IDX of four billion rows", lambda t: idx(t, b"\0\0\x08\x02" + b"\xff" * 8), V, "given.idx' is truncated"),
    Row("a table of bytes zero", lambda t: csv(t, "\0\0\0", target="a"), V, "given.csv' has one column"),
    Row("an open quotation", lambda t: csv(t, 'a,b\n"1,2\n3,4\n', target="b"), V, "given.csv' is not a table"),
    Row("a header alone", lambda t: csv(t, "a,b\n", target="b"), V, "x must be a non-empty array"),
    Row("half a gzip", lambda t: ntkdp.datasets.from_csv(written(t / "given.csv.gz", b"\x1f\x8b\x08\0"), target="b"), V, "truncated or damaged"),
    Row("bytes that are no text", lambda t: toml(t, b"\xff\xfe"), "ConfigError", "is not TOML"),
    # -------------------------------------------------------------------- places that cannot be written
    Row("a folder that is a file", lambda t: trajectory().save(written(t / "given", b"") / "x.nc"), F, "folder of path does not exist"),
    Row("a picture under a file", lambda t: ntkdp.plotting.save(figure(), written(t / "given", b"") / "x.png"), F, "folder of path does not exist"),
    Row("a folder in the place of a file", lambda t: trajectory().save(t), "IsADirectoryError", "directory"),
    Row("a full disk for a trajectory", lambda t: on_a_full_disk(lambda: trajectory().save(t / "x.nc")), "OSError", "No space left"),
    Row("a full disk for a picture", lambda t: on_a_full_disk(lambda: ntkdp.plotting.save(figure(), t / "x.png")), "OSError", "No space left"),
    Row("no reader for a folder", lambda t: ntkdp.datasets.from_npz(t), F, "is a folder"),
    # -------------------------------------------------------------------- keys
    Row("a number for the key of a run", lambda t: train(key=0), T, "key must be a JAX PRNG key"),
    Row("a budget where the steps are not known", lambda t: ntkdp.dp_sgd.build(linear, X, Y, squared(), abadi(), learning_rate=0.1, noise_multiplier=ntkdp.privacy.Budget(mu=1.0)), T, r"number of steps is not known, got Budget\(.*; use its .noise_multiplier\(steps"),
    Row("a flow for the kernel of phases", lambda t: ntkdp.stochastic_flow.ensemble_phases(ntkdp.LinearisedFlow(linear, W, X, Y, squared(), abadi()), Y, squared(), [ntkdp.Phase(1, abadi(), 0.1)], Y, key=key()), T, "must be a kernel, got a LinearisedFlow: .*one"),
    Row("a list of a flow for the kernels of phases", lambda t: ntkdp.stochastic_flow.ensemble_phases([ntkdp.LinearisedFlow(linear, W, X, Y, squared(), abadi())], Y, squared(), [ntkdp.Phase(1, abadi(), 0.1)], Y, key=key()), T, "must be a kernel, got a LinearisedFlow: .*one"),
    Row("no key", lambda t: train(key=None), T, r"key must be a JAX PRNG key.*got None"),
    Row("text for a key", lambda t: train(key="0"), T, "key must be a JAX PRNG key.*got '0'"),
    Row("half an old key", lambda t: train(key=np.zeros(3, np.uint32)), V, r"key must hold 2 numbers a key, got shape \(3,\)"),
    Row("a number for a key of a model", lambda t: ntkdp.models.mlp([8], 1).init(0, X), T, "key must be a JAX PRNG key"),
    Row("two keys for a model", lambda t: ntkdp.models.mlp([8], 1).init(jax.random.split(key()), X), V, r"key must be a single key, got shape \(2,\)"),
    Row("a number for a key of a bootstrap", lambda t: ntkdp.calibration.bootstrap(probs, [0.5], [1], key=0), T, "key must be a JAX PRNG key"),
    Row("a number for a key of a search", lambda t: ntkdp.counterexamples.find_rise(jnp.eye(3), Y, squared(), abadi(), key=0), T, "key must be a JAX PRNG key"),
    Row("a number for a key of a table", lambda t: ntkdp.table_one.compute(0), T, "key must be a JAX PRNG key"),
    Row("a number for a key of a fit", lambda t: ntkdp.calibration.fit_temperature_privately([[1.0, 2.0]], [1], clip_norm=1.0, noise_multiplier=1.0, learning_rate=0.1, steps=2, key=0), T, "key must be a JAX PRNG key"),
    Row("an optimizer that was made", lambda t: train(optimizer=optax.sgd(0.1)), T, "optimizer must be a function of the learning rate"),
    Row("a class for an optimizer", lambda t: train(optimizer=ntkdp.optimizers.SGD), T, r"optimizer must be an optimizer, e.g. SGD\(\), got the class SGD"),
    Row("text for an optimizer", lambda t: ntkdp.recursion(flow(), jnp.zeros((3, 1)), learning_rate=0.1, steps=1, optimizer="adam"), T, "optimizer must be a function of the learning rate, e.g. optax.adam, got str"),
    Row("a momentum of one", lambda t: ntkdp.optimizers.SGD(1.0), V, r"momentum must be in \[0, 1\), got 1.0"),
    Row("a momentum that is text", lambda t: ntkdp.optimizers.SGD("0.9"), T, "momentum must be a number, got '0.9'"),
    Row("no number for a momentum", lambda t: ntkdp.optimizers.SGD(None), T, "momentum must be a number, got None"),
    Row("several momenta", lambda t: ntkdp.optimizers.SGD([0.5, 0.9]), V, r"momentum must be a single number, got shape \(2,\)"),
    Row("a weight decay in the place of Nesterov", lambda t: ntkdp.optimizers.SGD(0.9, 0.1), T, "nesterov must be True or False, got 0.1"),
    Row("Nesterov without momentum", lambda t: ntkdp.optimizers.SGD(nesterov=True), V, "nesterov must be False without momentum"),
    Row("a weight decay below zero", lambda t: ntkdp.optimizers.SGD(weight_decay=-0.1), V, "weight_decay must be at least 0 and finite, got -0.1"),
    Row("an average that is never moved", lambda t: ntkdp.optimizers.Adam(average=1.0), V, r"average must be in \[0, 1\), got 1.0"),
    Row("a floor of nothing", lambda t: ntkdp.optimizers.Adam(floor=0.0), V, "floor must be positive and finite, got 0.0"),
    Row("a decay of NaN", lambda t: ntkdp.optimizers.Adam(b2=NAN), V, r"b2 must be in \[0, 1\), got nan"),
    Row("a correction of unknown noise", lambda t: update_without_a_variance(), V, r"noise_variance must be given to update with Adam\(correct_noise=True\)"),
    Row("weight decay of outputs alone", lambda t: ntkdp.recursion(flow(), jnp.zeros((3, 1)), learning_rate=0.1, steps=1, optimizer=ntkdp.optimizers.SGD(weight_decay=0.1)), V, r"outputs_at_zero must be given .* jax.jvp"),
    Row("Adam of outputs alone", lambda t: ntkdp.recursion(flow(), jnp.zeros((3, 1)), learning_rate=0.1, steps=1, optimizer=ntkdp.optimizers.Adam()), V, "optimizer must be linear in gradients and weights.*got Adam"),
]  # fmt: skip


def outcome(row: Row) -> dict[str, Any]:
    """What the call did: the names of the error's classes and its message, or a value."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(place)
        try:
            value = row.call(folder)
            found: dict[str, Any] = {
                "value": value if isinstance(value, str) else np.asarray(value).tolist()
            }
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            found = {"error": kinds, "message": str(error)}
        left = sorted(path.name for path in folder.rglob("*") if "given" not in path.name)
        return found | {"left": left}


@pytest.fixture(scope="module")
def outcomes() -> Any:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_named_and_awkward_input_is_right(row: Row, outcomes: Any) -> None:
    found = outcomes[row.name]
    assert found["left"] == []
    if row.error:
        assert row.error in found.get("error", []), found
        assert re.search(row.match, found["message"], re.DOTALL), found["message"]
    elif isinstance(row.value, str):
        assert found.get("value") == row.value, found
    else:
        assert "value" in found, found
        np.testing.assert_allclose(found["value"], row.value, rtol=1e-5, atol=1e-7)


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


if __name__ == "__main__":
    import ntkdp

    ntkdp.enable_x64()
    print(json.dumps({row.name: outcome(row) for row in ROWS}))
