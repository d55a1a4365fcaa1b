"""bfloat16 and float16: what needs more precision gets it, and every result can be saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from helpers import KEY, linear

import ntkdp
from ntkdp.clipping import Scope

HALF = (jnp.bfloat16, jnp.float16)
SQUARED, RULE = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
#: Exact in every precision.
W, X, Y = np.array([[1.0], [0.5], [-1.0]]), np.eye(4, 3) + 0.5, np.array([1.0, 0.0, -1.0, 2.0])


def kernel_of(dtype: Any) -> Any:
    """Invertible and exact in half precision."""
    return jnp.asarray(X @ X.T + np.eye(4), dtype)


def flow_of(dtype: Any) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(kernel_of(dtype), jnp.asarray(Y), SQUARED, RULE)


MECHANISM: dict[str, Any] = {"learning_rate": 0.1, "steps": 2, "noise_multiplier": 1.0}
LINEAR_ALGEBRA: dict[str, Callable[[Any], Any]] = {
    "eigenvalues": lambda t: ntkdp.spectrum.eigenvalues(kernel_of(t)),
    "clipped eigenvalues": lambda t: ntkdp.spectrum.eigenvalues(
        kernel_of(t), jnp.asarray([1.0, 0.5, 0.25, 1.0], t)
    ),
    "has_positive_eigenvalues": lambda t: ntkdp.spectrum.has_positive_eigenvalues(kernel_of(t)),
    "safe_clip_norm": lambda t: ntkdp.certificates.safe_clip_norm(
        kernel_of(t), jnp.asarray(Y[:, None], t)
    ),
    "ensemble": lambda t: ntkdp.stochastic_flow.ensemble(
        flow_of(t), jnp.zeros((4, 1), t), **MECHANISM, key=KEY
    ).loss.mean(),
    "moments": lambda t: (
        ntkdp.stochastic_flow.moments(flow_of(t), jnp.zeros((4, 1), t), **MECHANISM).loss
    ),
    "solve": lambda t: ntkdp.solve(flow_of(t), jnp.zeros((4, 1), t), [0.0, 1.0]).loss,
    "recursion": lambda t: (
        ntkdp.recursion(flow_of(t), jnp.zeros((4, 1), t), learning_rate=0.1, steps=3).loss
    ),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LINEAR_ALGEBRA)
def test_linear_algebra_of_half_kernels_is_that_of_single(name: str, dtype: Any) -> None:
    half, single = (np.asarray(LINEAR_ALGEBRA[name](t)) for t in (dtype, jnp.float32))
    assert half.dtype == single.dtype
    np.testing.assert_allclose(half, single, rtol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_a_run_in_half_precision_is_measured_in_single_and_saved(
    dtype: Any, tmp_path: Path
) -> None:
    w, x = jnp.asarray(W, dtype), jnp.asarray(X, dtype)
    run = ntkdp.dp_sgd.run(
        linear, w, x, jnp.asarray(Y), SQUARED, RULE, learning_rate=0.1, steps=2, outputs=True,
        test_x=x, test_targets=jnp.asarray(Y), key=KEY,
    )  # fmt: skip
    for name in ("loss", "outputs", "test_loss", "test_outputs", "clip_fraction"):
        assert getattr(run, name).dtype in (jnp.float32, jnp.float64), name
    # The first loss is of exact outputs.
    np.testing.assert_allclose(run.loss[0], 0.5 * np.mean((X @ W - Y[:, None]) ** 2), rtol=1e-6)
    run.save(tmp_path / "run.nc")
    loaded = ntkdp.Trajectory.load(tmp_path / "run.nc")
    for name in ("times", "steps", "loss", "outputs", "clip_fraction"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(run, name))


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_trajectory_is_stored_as_single_and_says_so(dtype: Any, tmp_path: Path) -> None:
    given = ntkdp.Trajectory(
        jnp.arange(3.0, dtype=dtype), loss=jnp.asarray([0.1, 0.2, 0.3], dtype),
        clip_fraction=jnp.zeros(3, dtype), outputs=jnp.ones((3, 2, 1), dtype),
    )  # fmt: skip
    given.save(tmp_path / "run.nc")
    with xr.open_dataset(tmp_path / "run.nc", engine="h5netcdf") as stored:
        assert stored["loss"].dtype == np.float32
        assert stored["loss"].attrs["computed_in"] == jnp.dtype(dtype).name
    loaded = ntkdp.Trajectory.load(tmp_path / "run.nc")
    np.testing.assert_array_equal(loaded.loss, given.loss.astype(jnp.float32))


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
def test_a_linearised_network_takes_targets_of_another_precision(
    weights: Any, scope: Scope
) -> None:
    data = jnp.float64 if weights == jnp.float32 else jnp.bfloat16
    params, x = {"w": jnp.asarray(W, weights)}, jnp.asarray(X, data)
    rule = ntkdp.clipping.Abadi(0.5, scope=scope)

    def predicted(params: Any, x: Any) -> np.ndarray:
        flow = ntkdp.LinearisedFlow(
            lambda p, x: jnp.tanh(x @ p["w"]), params, x, jnp.asarray(Y), SQUARED, rule
        )
        return np.asarray(ntkdp.recursion(flow, params, learning_rate=0.1, steps=2).loss)

    right = predicted({"w": jnp.asarray(W)}, jnp.asarray(X))
    rtol = 1e-6 if weights == jnp.float32 else 0.02
    np.testing.assert_allclose(predicted(params, x), right, rtol=rtol)


def test_output_gradients_of_another_precision() -> None:
    """They take the precision of the outputs, in which the network is differentiated."""
    for dtype, given in ((jnp.float32, jnp.float64), (jnp.bfloat16, jnp.float32)):
        found = ntkdp.per_sample_gradient_norms(
            linear, jnp.asarray(W, dtype), jnp.asarray(X, dtype), jnp.ones((4, 1), given)
        )
        np.testing.assert_allclose(found, np.linalg.norm(X, axis=1), rtol=1e-6)
