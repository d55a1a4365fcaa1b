"""Noise over eight devices, its root, its runs and its moments: those of one device."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known
from mesh_problem import (
    FLAT,
    LAYERWISE,
    LOSS,
    MODEL,
    OUTPUTS,
    PARAMS,
    TEST_X,
    TEST_Y,
    X,
    Y,
    assert_same,
    bytes_on_first_device,
    flow,
    kernel,
    lowered,
    mesh_of,
)

import ntkdp
from ntkdp import stochastic_flow
from ntkdp._backend import devices
from ntkdp.batches import FixedSize, Full
from ntkdp.noise import Independent
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow import _distributed_eigh as distributed_eigh
from ntkdp.stochastic_flow._matrix_root import square_root
from ntkdp.stochastic_flow._moments import moments
from ntkdp.stochastic_flow._moments.optimizer_steps import MomentSteps
from ntkdp.trajectory._stepping import Stepping

slow = pytest.mark.slow
EVERYTHING = jnp.concatenate([X, TEST_X])


def symmetric_matrix(kind: str, n: int) -> np.ndarray:
    square = np.random.default_rng(0).normal(size=(n, n))
    if kind == "singular":
        return square[:, : n // 3] @ square[:, : n // 3].T
    if kind == "decaying":
        basis, _ = np.linalg.qr(square)
        decaying = (basis * 10.0 ** -np.linspace(0, 14, n)) @ basis.T
        return (decaying + decaying.T) / 2
    if kind == "of few values":
        basis, _ = np.linalg.qr(square)
        return (basis * np.random.default_rng(1).integers(0, 3, n)) @ basis.T
    if kind in ("tiny", "huge"):
        return square @ square.T * (1e-200 if kind == "tiny" else 1e200)
    if kind == "zero":
        return np.zeros((n, n))
    return (square + square.T) / 2


KINDS = ("singular", "decaying", "indefinite", "of few values", "tiny", "huge", "zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_devices", "own"), [(8, 5), (3, 1), (2, 12), (1, 7)])
def test_eigenvalues_of_a_matrix_in_parts(kind: str, n_devices: int, own: int) -> None:
    matrix = symmetric_matrix(kind, n_devices * own)
    mesh = devices.as_mesh(mesh_of(n_devices))
    assert mesh is not None
    spread = distributed_eigh.eigh(mesh, devices.spread(mesh, matrix))
    parts = [shard.data.shape for shard in spread[1].addressable_shards]
    assert parts == [(own, n_devices * own)] * n_devices
    values, vectors = map(np.asarray, spread)
    size = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=0, atol=1e-13 * float(size))
    np.testing.assert_allclose(
        (vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-13 * float(size)
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(matrix)), rtol=0, atol=1e-12)


def test_eigenvalues_in_single_precision() -> None:
    matrix = symmetric_matrix("indefinite", 16).astype(np.float32)
    mesh = devices.as_mesh(mesh_of(4))
    assert mesh is not None
    values, vectors = distributed_eigh.eigh(mesh, devices.spread(mesh, matrix))
    assert values.dtype == vectors.dtype == jnp.float32
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=0, atol=3e-5)
    for scale in (1e-25, 1e25):
        scaled, _ = distributed_eigh.eigh(mesh, devices.spread(mesh, np.float32(scale) * matrix))
        np.testing.assert_allclose(scaled / np.float32(scale), values, rtol=0, atol=3e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_root_of_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = np.eye(8)
    matrix[6, 1] = matrix[1, 6] = bad
    for mesh in (None, devices.as_mesh(mesh_of(4))):
        with pytest.raises(ValueError, match="must be positive semi-definite"):
            square_root(jnp.asarray(matrix), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "per_group", "sample_rate"),
    [(LAYERWISE, True, 0.5), (FLAT, False, 1.0)],
)
def test_noisy_runs_without_a_kernel_are_those_of_one_device(
    rule: Any, per_group: bool, sample_rate: float
) -> None:
    found, expected = (
        stochastic_flow.ensemble(
            ntkdp.LinearisedFlow(
                MODEL.apply, PARAMS, X, Y, LOSS, rule, test_x=TEST_X[:5], test_targets=TEST_Y[:5],
                batch_size=batch_size, mesh=mesh,
            ),
            PARAMS,
            learning_rate=0.5,
            steps=4,
            noise_multiplier=1.0,
            noise_per_group=per_group,
            sample_rate=sample_rate,
            outputs=True,
            key=jax.random.split(jax.random.key(1), 3),
        )
        for mesh, batch_size in ((mesh_of(8), 1), (None, None))
    )  # fmt: skip
    assert_same(found, expected)


@slow
@pytest.mark.parametrize("kind", ["infinite", "by layer"])
def test_noise_of_test_samples_is_that_of_one_device(kind: str) -> None:
    found, expected = (
        stochastic_flow.final_outputs(
            flow(kind, mesh),
            OUTPUTS,
            learning_rates=[0.5],
            clip_norms=[0.3],
            noise_multipliers=1.0,
            steps=3,
            noise_kernel=kernel(kind, None, EVERYTHING),
            key=jax.random.key(1),
        )
        for mesh in (mesh_of(8), None)
    )
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "sample_rate"), [pytest.param("by layer", 0.5, marks=slow), ("infinite", 1.0)]
)
def test_noisy_flows_are_those_of_one_device(kind: str, sample_rate: float) -> None:
    settings: dict[str, Any] = {
        "sample_rate": sample_rate,
        "key": jax.random.split(jax.random.key(1), 3),
    }
    found, expected = (
        (
            stochastic_flow.ensemble(
                of,
                OUTPUTS[0],
                learning_rate=0.5,
                steps=4,
                noise_multiplier=1.0,
                outputs=True,
                **settings,
            ),
            stochastic_flow.final_outputs(
                of,
                OUTPUTS[0],
                learning_rates=[0.1, 0.5],
                clip_norms=[1.0, 0.3],
                noise_multipliers=1.0,
                steps=4,
                **settings,
            ),
        )
        for of in (flow(kind, mesh_of(8), test=False), flow(kind, None, test=False))
    )
    assert_same(found, expected)


MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("whole", {"optimizer": SGD(0.5, nesterov=True, average=0.5)}),
    "by layer, test points": ("by layer", {"sample_rate": 0.5}),
    "infinite, test points": ("infinite", {}),
    "a few modes": ("infinite", {"rank": 9, "sample_rate": 0.5}),
    "a few modes by layer": ("by layer", {"rank": 20}),
    "by layer, a fixed size, test points": ("by layer", {"batches": FixedSize(4)}),
    "a few modes, a fixed size": ("whole", {"rank": 20, "batches": FixedSize(4)}),
    "a few modes of sampling": ("whole", {"rank": 20, "sample_rate": 0.5, "noise_multiplier": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_of_one_device(name: str) -> None:
    kind, own = MOMENTS[name]
    options = {"noise_multiplier": 0.5, "outputs": True, **own}
    test = "test" in name or "modes" in name
    if test and options["noise_multiplier"]:
        options["noise_kernel"] = kernel(kind, None, EVERYTHING)
    start = OUTPUTS if test else OUTPUTS[0]
    found, expected = (
        (
            stochastic_flow.moments(of, start, learning_rate=0.5, steps=3, **options),
            stochastic_flow.moment_flow(of, start, [0.0, 0.5], learning_rate=0.5, **options)
            if name == "infinite, test points"
            else None,
        )
        for of in (flow(kind, mesh_of(8), test=test), flow(kind, None, test=test))
    )
    assert_same(found, expected)


@slow
@pytest.mark.parametrize("rank", [None, 6])
def test_memory_of_moments_falls_with_the_devices(rank: int | None) -> None:
    n = 128
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, 4)))
    test_x, everything = x[:64], jnp.concatenate([x, x[:64]])
    model = ntkdp.models.mlp([8], 1, activation="erf")
    rule = ntkdp.clipping.Abadi(0.3)

    def needed(n_devices: int) -> dict[str, int]:
        mesh = mesh_of(n_devices)
        of = ntkdp.KernelFlow(
            ntkdp.infinite_ntk(model, x, mesh=mesh),
            jnp.sin(x[:, :1]),
            ntkdp.losses.SquaredError(),
            rule,
            test_kernel=ntkdp.infinite_ntk(model, test_x, x, mesh=mesh),
            mesh=mesh,
        )
        noise_kernel = ntkdp.infinite_ntk(model, everything, mesh=mesh)
        settings = (0.5, Full(), noise_kernel, False, rank)
        start = jnp.zeros((n, 1)), jnp.zeros((64, 1))
        closure, mean = moments._closure(of, start, *settings)
        step = (
            lowered(
                moments._step_moments,
                MomentSteps(closure, SGD(), None, Full(), Independent().recursion(2)),
                mean,
                Stepping(0.5, 2, 1),
                False,
                None,
            )
            .compile()
            .compiled.memory_analysis()
        )
        points: Any = getattr(closure.form, "points", None)
        reordered = (
            jax.jit(points.in_order)
            .lower(devices.spread(of.mesh, jnp.zeros((n + 64, n + 64))))
            .compile()
            .memory_analysis()
        )
        return {
            "order": known(reordered).output_size_in_bytes + known(reordered).temp_size_in_bytes,
            "form": bytes_on_first_device(eqx.filter(closure.form, eqx.is_array)),
            "steps": step.argument_size_in_bytes + step.temp_size_in_bytes,
        }

    one, many = needed(1), needed(8)
    # Rows that are exchanged: a device's part, as it comes, on its way and as it goes.
    assert many.pop("order") < 3 * one.pop("order") / 8
    for what in one:
        # What is small is whole on each: means, points of integration, what the modes do.
        assert many[what] < one[what] / 5, (what, one, many)


def test_memory_of_a_root_falls_with_the_devices() -> None:
    matrix = symmetric_matrix("decaying", 256)

    def needed(n_devices: int) -> int:
        mesh = devices.as_mesh(mesh_of(n_devices))
        assert mesh is not None
        found = (
            distributed_eigh.eigh.lower(mesh, devices.spread(mesh, matrix))
            .compile()
            .memory_analysis()
        )
        return int(
            known(found).argument_size_in_bytes
            + known(found).output_size_in_bytes
            + known(found).temp_size_in_bytes
        )

    assert needed(8) < needed(1) / 5


@pytest.mark.parametrize("n_devices", [8])
def test_a_head_over_devices(n_devices: int) -> None:
    """Its features are spread, and the runs are those of one device in the outputs."""
    head = ntkdp.models.linear(3)

    def runs(mesh: Any) -> Any:
        flow = ntkdp.KernelFlow(
            ntkdp.linear_ntk(head, X), Y, LOSS, FLAT, mesh=mesh,
            test_kernel=ntkdp.linear_ntk(head, TEST_X, X), test_targets=TEST_Y,
        )  # fmt: skip
        if mesh is not None:
            assert bytes_on_first_device(flow.drive) == 2 * X.shape[0] * 5 * 8 // n_devices
        return stochastic_flow.ensemble(
            flow, OUTPUTS, learning_rate=0.5, steps=3, noise_multiplier=0.5, outputs=True,
            optimizer=SGD(momentum=0.5), key=jax.random.key(0),
            noise_kernel=None if mesh is not None else ntkdp.linear_ntk(head, EVERYTHING),
        )  # fmt: skip

    assert_same(runs(mesh_of(n_devices)), runs(None))
