"""Kernels, flows and runs over eight devices and over two processes: those of one device."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known
from mesh_problem import (
    FLAT,
    KERNELS,
    LAYERWISE,
    LOSS,
    MODEL,
    OUTPUTS,
    PARAMS,
    TEST_X,
    TEST_Y,
    K,
    N,
    X,
    Y,
    assert_same,
    bytes_on_first_device,
    flow,
    kernel,
    lowered,
    mesh_of,
)
from two_processes import trajectories

import ntkdp
from ntkdp import clipping, dp_sgd
from ntkdp._backend import memory
from ntkdp.ntk._empirical import _kernel_in_blocks

MESHES = [
    pytest.param(lambda: mesh_of(8), id="eight"),
    # As jax.make_mesh makes them, with two axes and explicit ones.
    pytest.param(lambda: jax.make_mesh((4, 2), ("a", "b")), id="four by two"),
]


@pytest.mark.parametrize("make_mesh", MESHES)
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_are_those_of_one_device_in_equal_parts(kind: str, make_mesh: Any) -> None:
    for x1, x2 in [(X, None), (TEST_X, X)]:
        found = kernel(kind, make_mesh(), x1, x2)
        assert_same(found, kernel(kind, None, x1, x2))
        for leaf in jax.tree.leaves(found):
            parts = [shard.data.nbytes for shard in leaf.addressable_shards]
            assert parts == [leaf.nbytes // 8] * 8


def test_blocks_of_a_device_make_the_same_kernel() -> None:
    found = ntkdp.empirical_ntk(MODEL.apply, PARAMS, X, batch_size=3, mesh=mesh_of(4))
    assert_same(found, kernel("whole", None))
    rescaled = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0), PARAMS)
    found = ntkdp.ntk.preconditioned_ntk(MODEL.apply, PARAMS, rescaled, X, mesh=mesh_of(2))
    assert_same(found, kernel("whole", None) / 2)


@pytest.mark.parametrize(
    "kind",
    [
        "whole",
        *(pytest.param(k, marks=pytest.mark.slow) for k in KERNELS[1:]),
    ],
)
def test_flows_and_recursions_are_those_of_one_device(kind: str) -> None:
    found, expected = (
        (
            ntkdp.solve(of, OUTPUTS, [0.0, 1.0, 5.0], outputs=True),
            ntkdp.recursion(of, OUTPUTS, learning_rate=0.5, steps=4, outputs=True),
        )
        for of in (flow(kind, mesh_of(8)), flow(kind, None))
    )
    assert_same(found, expected)


def test_a_rule_that_needs_the_norm_of_the_sum() -> None:
    rule = clipping.Batch(0.3)
    found, expected = (
        ntkdp.recursion(flow("whole", mesh, rule), OUTPUTS, learning_rate=0.5, steps=3)
        for mesh in (mesh_of(8), None)
    )
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [LAYERWISE, clipping.Batch(0.3)],
    ids=["by layer", "batch"],
)
def test_weight_flows_are_those_of_one_device(rule: Any) -> None:
    found, expected = (
        ntkdp.solve(
            ntkdp.WeightFlow(
                MODEL.apply, X, Y, LOSS, rule, test_x=TEST_X, test_targets=TEST_Y, mesh=mesh
            ),
            PARAMS,
            [0.0, 2.0],
            outputs=True,
        )
        for mesh in (mesh_of(8), None)
    )
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "solved"),
    [
        (LAYERWISE, False),
        (LAYERWISE, True),
        (clipping.Batch(0.3), True),
    ],
    ids=["by layer", "by layer, solved", "batch, solved"],
)
def test_flows_without_a_kernel_are_those_of_one_device(rule: Any, solved: bool) -> None:
    def path(mesh: Any, **options: Any) -> Any:
        of = ntkdp.LinearisedFlow(
            MODEL.apply, PARAMS, X, Y, LOSS, rule, test_x=TEST_X[:5], test_targets=TEST_Y[:5],
            mesh=mesh, **options,
        )  # fmt: skip
        if solved:
            return ntkdp.solve(of, PARAMS, [0.0, 2.0], outputs=True)
        return ntkdp.recursion(of, PARAMS, learning_rate=0.5, steps=3, outputs=True)

    # A device has two samples, in batches of one.
    assert_same(path(mesh_of(8), batch_size=1), path(None))


def test_what_lies_on_one_device_goes_to_all() -> None:
    # Such as parameters that were trained elsewhere.
    params, mesh = jax.device_put(PARAMS, jax.devices()[0]), mesh_of(4)
    of = ntkdp.WeightFlow(MODEL.apply, X, Y, LOSS, FLAT, preconditioner=params, mesh=mesh)
    with pytest.raises(ValueError, match=r"preconditioner\[0\]\[0\] must be positive"):
        of.init(params)
    ones = jax.device_put(jax.tree.map(jnp.ones_like, PARAMS), jax.devices()[0])
    velocity = eqx.filter_jit(lambda of, state: of.velocity(state))
    found, expected = (
        ntkdp.WeightFlow(MODEL.apply, X, Y, LOSS, FLAT, preconditioner=ones, mesh=where)
        for where in (mesh, None)
    )
    assert_same(velocity(found, found.init(params)), velocity(expected, expected.init(params)))
    algorithm = dp_sgd.build(MODEL.apply, X, Y, LOSS, FLAT, learning_rate=0.5, mesh=mesh)
    assert algorithm.init(params).step == 0


def test_a_mesh_of_the_context_is_refused() -> None:
    with jax.set_mesh(mesh_of(2)), pytest.raises(ValueError, match=r"outside of jax\.set_mesh"):
        kernel("whole", mesh_of(2))


@pytest.mark.parametrize(
    ("rule", "noise", "sample_rate", "gradients"),
    [
        pytest.param(FLAT, 1.0, 1.0, "vmap", marks=pytest.mark.slow),
        (LAYERWISE, 1.0, 0.4, "structured"),
        pytest.param(clipping.Batch(0.3), 0.0, 1.0, "structured", marks=pytest.mark.slow),
    ],
    ids=["flat", "by layer", "batch"],
)
def test_runs_are_those_of_one_device(
    rule: Any, noise: float, sample_rate: float, gradients: Any
) -> None:
    found, expected = (
        dp_sgd.run(
            MODEL.apply,
            PARAMS,
            X,
            Y,
            LOSS,
            rule,
            learning_rate=0.5,
            steps=4,
            record_every=2,
            noise_multiplier=noise,
            sample_rate=sample_rate,
            gradients=gradients,
            test_x=TEST_X,
            test_targets=TEST_Y,
            outputs=True,
            mesh=mesh,
            key=jax.random.split(jax.random.key(1), 2),
        )
        for mesh in (mesh_of(8), None)
    )
    assert_same(found, expected)


@pytest.mark.slow
def test_phases_and_microbatches_are_those_of_one_device() -> None:
    phases = [
        ntkdp.Phase(2, LAYERWISE, learning_rate=0.5, noise_multiplier=0.5, trainable=["4"]),
        ntkdp.Phase(2, FLAT, learning_rate=0.5),
    ]
    found, expected = (
        dp_sgd.run_phases(
            MODEL.apply,
            PARAMS,
            X,
            Y,
            LOSS,
            phases,
            # Test samples that do not divide over the devices are on all of them.
            test_x=TEST_X[:5],
            test_targets=TEST_Y[:5],
            microbatch_size=3,
            mesh=mesh,
            key=jax.random.key(1),
        )
        for mesh in (mesh_of(4), None)
    )
    assert_same(found, expected)


def test_memory_of_a_device_falls_as_their_number_grows() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 4)))
    groups = ntkdp._gradients.groups.resolve(PARAMS)

    def needed(n_devices: int) -> dict[str, int]:
        mesh = ntkdp._backend.devices.as_mesh(mesh_of(n_devices))
        place = ntkdp._backend.devices.everywhere
        kernel = (
            lowered(
                _kernel_in_blocks,
                MODEL.apply,
                place(mesh, PARAMS),
                ntkdp._backend.devices.spread(mesh, x),
                place(mesh, x),
                groups,
                4,
                K,
                False,
                mesh,
            )
            .compile()
            .compiled.memory_analysis()
        )
        of = ntkdp.KernelFlow(
            ntkdp.layerwise_ntk(MODEL.apply, PARAMS, x, mesh=mesh),
            np.arange(256) % K,
            LOSS,
            LAYERWISE,
            mesh=mesh,
        )
        state = of.init(jnp.zeros((256, K)))
        step = (
            jax.jit(lambda of, state: of.velocity(state))
            .lower(of, state)
            .compile()
            .memory_analysis()
        )
        return {
            "kernel": kernel.output_size_in_bytes + kernel.temp_size_in_bytes,
            "flow": bytes_on_first_device(of),
            "step": known(step).argument_size_in_bytes + known(step).temp_size_in_bytes,
        }

    one, many = needed(1), needed(8)
    for what in one:
        # An eighth of the kernel, and what every device has: inputs, targets and outputs.
        assert one[what] / 8 <= many[what] < one[what] / 7, what


def test_memory_asked_for_is_that_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="18,432 bytes"):
        kernel("whole", mesh_of(8))


@pytest.mark.parametrize(
    ("n_devices", "words"),
    [(3, "divides over the 3 devices of mesh, e.g. 15, got 16"), (7, "e.g. 14, got 16")],
)
def test_meshes_that_do_not_fit_are_refused(n_devices: int, words: str) -> None:
    wrong: dict[str, Any] = {"mesh": mesh_of(n_devices)}
    data: tuple[Any, ...] = (MODEL.apply, PARAMS, X)
    problem: tuple[Any, ...] = (Y, LOSS, FLAT)
    rest: dict[str, Any] = {"learning_rate": 1.0, "steps": 1, "key": jax.random.key(0)}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: ntkdp.empirical_ntk(*data, **wrong),
        lambda: ntkdp.infinite_ntk(MODEL, X, **wrong),
        lambda: ntkdp.KernelFlow(jnp.eye(N), Y, LOSS, FLAT, **wrong),
        lambda: ntkdp.WeightFlow(MODEL.apply, X, Y, LOSS, FLAT, **wrong),
        lambda: ntkdp.LinearisedFlow(*data, *problem, **wrong),
        lambda: dp_sgd.run(MODEL.apply, PARAMS, X, Y, LOSS, FLAT, **rest, **wrong),
    )
    for refuse in calls:
        with pytest.raises(ValueError, match=words):
            refuse()


def test_what_is_no_mesh_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, .* got 'eight'"):
        ntkdp._backend.devices.as_mesh("eight")


def test_what_is_not_finite_is_found_on_any_device() -> None:
    bad = jnp.eye(N).at[-1, -1].set(jnp.nan)
    with pytest.raises(ValueError, match="kernel must be finite, got 1 NaN"):
        ntkdp.KernelFlow(bad, Y, LOSS, FLAT, mesh=mesh_of(8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "roads",
    [
        ["recursion"],
        pytest.param(
            [
                "flow",
                "ensemble",
                "dp_sgd",
                "infinite, by layer",
                "weights",
                "linearised",
                "moments",
                "ensemble without a kernel",
                "between times",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a kernel", "without one, and more"],
)
def test_two_processes_find_what_one_finds(roads: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "two_processes.py"
    processes = []
    for number in range(2):
        # Into files: a full pipe would keep one from the end, where they wait for each other.
        with (tmp_path / f"said {number}").open("w") as said:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), f"localhost:{port}", str(number), *roads],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    cwd=script.parents[2],
                )
            )
    for process in processes:
        process.wait(timeout=600)
    expected = trajectories(None, roads)
    for number, process in enumerate(processes):
        text = (tmp_path / f"said {number}").read_text()
        assert process.returncode == 0, text
        (line,) = [line for line in text.splitlines() if line.startswith('{"devices"')]
        found = json.loads(line)
        assert found["devices"] == 4
        assert found["found"].keys() == expected.keys()
        for name, losses_found in found["found"].items():
            np.testing.assert_allclose(losses_found, expected[name], rtol=0, atol=1e-10)
