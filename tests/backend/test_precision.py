"""Kernels of float32 inputs at infinite width: computed in float64, whatever transforms them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known, often_or_slow
from jax.sharding import Mesh

import ntkdp
from ntkdp import models
from ntkdp._backend.neural_tangents import stax
from ntkdp.ntk import _infinite

X = np.asarray(jax.random.uniform(jax.random.key(0), (4, 30)))
#: Networks and sizes of inputs at which float32 arithmetic is wrong or infinite.
EXTREME: dict[str, tuple[Callable[[], models.Model], float]] = {
    "relu of large weights": (
        lambda: models.serial(
            *[layer for s in (9, 11, 13, 15) for layer in (stax.Dense(1, float(s)), stax.Relu())],
            stax.Dense(1, 1.0, 0.0),
        ),
        1.0,
    ),
    "relu of 1e10": (lambda: models.mlp([16], 1), 1e10),
    "erf of pixels": (lambda: models.mlp([16], 1, activation="erf"), 255.0),
    "erf of 1e4": (lambda: models.mlp([16], 1, activation="erf"), 1e4),
    "relu as it is": (lambda: models.mlp([16, 16], 1), 1.0),
}
EPS = float(jnp.finfo(jnp.float32).eps)


def plain(model: models.Model, x: np.ndarray) -> np.ndarray:
    """neural-tangents alone, in float64."""
    assert model.kernel_fn is not None
    return np.asarray(model.kernel_fn(jnp.asarray(x, jnp.float64), None, "ntk"))


def single(name: str) -> tuple[models.Model, Any]:
    make, size = EXTREME[name]
    return make(), jnp.asarray(size * X, jnp.float32)


@pytest.mark.parametrize(
    ("name", "double"), [*((name, False) for name in EXTREME), ("erf of 1e4", True)]
)
def test_float32_entries_are_those_of_float64_rounded(name: str, double: bool) -> None:
    model, x = single(name)
    right = plain(model, x)
    with jax.enable_x64(double):
        found = ntkdp.infinite_ntk(model, x)
        columns = ntkdp.infinite_ntk(model, x[:2], x[2:])
    assert found.dtype == columns.dtype == jnp.float32
    np.testing.assert_allclose(found, right, rtol=2 * EPS)
    np.testing.assert_allclose(columns, right[:2, 2:], rtol=2 * EPS)


@pytest.mark.parametrize("name", ["erf of 1e4", "relu as it is"])
def test_terms_by_layer_and_between_times_are_those_of_float64(name: str) -> None:
    model, x = single(name)
    right = plain(model, x)
    with jax.enable_x64(False):
        by_layer = ntkdp.layerwise_infinite_ntk(model, x)
        between = ntkdp.two_time_kernel(model, x, variance1=0.0, variance2=0.0).ntk
    for kernel in (by_layer, between):
        assert kernel.values.dtype == jnp.float32
        # Terms are rounded before they are added up.
        np.testing.assert_allclose(kernel.total, right, rtol=4 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_blocks_of_rows_are_those_of_the_whole(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_infinite, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(_infinite, "_LEAST_ROWS", 3)
    mesh = Mesh(jax.devices()[:devices], "samples") if devices > 1 else None
    inputs = np.asarray(jax.random.normal(jax.random.key(1), (10, 4, 4, 2)))
    model = models.cnn([2], 1, pooling="global")
    right = plain(model, inputs)
    with jax.enable_x64(False):
        x = jnp.asarray(inputs, jnp.float32)
        found = ntkdp.infinite_ntk(model, x, mesh=mesh)
        terms = ntkdp.layerwise_infinite_ntk(model, x, mesh=mesh)
        between = ntkdp.two_time_kernel(model, x, variance1=0.0, variance2=0.0, mesh=mesh)
        slope = jax.grad(lambda x: ntkdp.infinite_ntk(model, x).sum())(x)
    for kernel in (found, terms.total, between.ntk.total):
        np.testing.assert_allclose(kernel, right, rtol=4 * EPS)
    assert model.kernel_fn is not None
    expected = jax.grad(lambda x: known(model.kernel_fn)(x, None, "ntk").sum())(
        jnp.asarray(x, float)
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_a_mesh_computes_in_float64_too() -> None:
    model, x = single("erf of 1e4")
    mesh = Mesh(jax.devices()[:2], "samples")
    with jax.enable_x64(False):
        found = ntkdp.infinite_ntk(model, x, mesh=mesh)
    np.testing.assert_allclose(found, plain(model, x), rtol=2 * EPS)


TRANSFORMED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "jit": jax.jit,
    "vmap of jit": lambda f: lambda x: jax.vmap(jax.jit(f))(jnp.stack([x, x]))[1],
    "grad of jit": lambda f: jax.grad(lambda x: jax.jit(f)(x).sum()),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "grad of vmap": lambda f: (
        lambda x: jax.grad(lambda both: jax.vmap(f)(both).sum())(jnp.stack([x, x]))[1]
    ),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(lambda x: f(x).sum())),
}


@pytest.mark.parametrize(
    "name", often_or_slow(TRANSFORMED, ["vmap of jit", "jit of grad", "grad of vmap"])
)
@pytest.mark.filterwarnings("error")
def test_transformations_keep_float64_inside(name: str) -> None:
    model = models.mlp([8], 1, activation="erf")
    x, x2 = (jnp.asarray(1e3 * part[:, :3], jnp.float32) for part in (X[:2], X[2:]))
    assert model.kernel_fn is not None
    expected = TRANSFORMED[name](
        lambda x: known(model.kernel_fn)(x, jnp.asarray(x2, float), "ntk")
    )(jnp.asarray(x, float))
    with jax.enable_x64(False):
        found = TRANSFORMED[name](lambda x: ntkdp.infinite_ntk(model, x, x2))(x)
    assert found.dtype == jnp.float32
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=4 * EPS, atol=EPS * scale)


def test_whole_numbers_are_computed_as_real_ones() -> None:
    model = models.mlp([8], 1)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20), np.uint8)
    found = ntkdp.infinite_ntk(model, jnp.asarray(pixels))
    np.testing.assert_allclose(found, plain(model, pixels), rtol=1e-12)


def test_a_kernel_beyond_the_range_says_so() -> None:
    model, x = models.mlp([8], 1), jnp.asarray(1e20 * X, jnp.float32)
    for compute in (
        ntkdp.infinite_ntk,
        ntkdp.layerwise_infinite_ntk,
        lambda model, x: ntkdp.two_time_kernel(model, x, variance1=0.0, variance2=0.0),
    ):
        with (
            jax.enable_x64(False),
            pytest.raises(ValueError, match=r"must fit in float32.*rescale.*enable_x64"),
        ):
            compute(model, x)
        with pytest.raises(ValueError, match=r"must fit in float64.*rescale the inputs"):
            compute(model, jnp.asarray(1e160 * X))
