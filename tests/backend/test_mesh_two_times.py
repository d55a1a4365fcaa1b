"""Kernels between times, and runs under them, over eight devices: those of one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_problem import (
    LOSS,
    OUTPUTS,
    TEST_X,
    TEST_Y,
    K,
    X,
    Y,
    assert_same,
    bytes_on_first_device,
    lowered,
    mesh_of,
)

import ntkdp
from ntkdp import clipping, models
from ntkdp._backend import devices, memory
from ntkdp.batches import Full
from ntkdp.noise import Independent
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow import TwoTimeFlow, two_time_ensemble, two_time_flow
from ntkdp.stochastic_flow._two_time import gaussian_process, volterra, weight_path

MODEL = models.mlp([8], K, activation="erf", W_std=1.5, b_std=0.3)
FLAT, LAYERWISE = clipping.Abadi(1.0), clipping.Abadi(0.8, scope="layerwise")
TEST = {"test_x": TEST_X, "test_targets": TEST_Y}
COARSE = {"nodes": 3, "rank": 5}
KEYS = jax.random.split(jax.random.key(1), 3)


@pytest.mark.parametrize("x2", [None, TEST_X])
def test_kernels_between_times_are_those_of_one_device_in_equal_parts(x2: Any) -> None:
    found, expected = (
        ntkdp.two_time_kernel(MODEL, X, x2, variance1=[0.2, 0.3], variance2=0.5, mesh=mesh)
        for mesh in (jax.make_mesh((4, 2), ("a", "b")), None)
    )
    assert_same(found, expected)
    for leaf in jax.tree.leaves(found):
        assert [shard.data.nbytes for shard in leaf.addressable_shards] == [leaf.nbytes // 8] * 8


RUNS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "by layer, test points, few modes": (LAYERWISE, OUTPUTS, TEST, COARSE | {"sample_rate": 0.5}),
    "random start": (FLAT, None, {}, {}),
    "frozen, random start": (FLAT, None, {"frozen": True} | TEST, COARSE),
    "frozen by layer, bridges": (LAYERWISE, OUTPUTS[0], {"frozen": True}, {"nodes": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_one_device(name: str) -> None:
    rule, initial, of_flow, of_runs = RUNS[name]
    found, expected = (
        two_time_ensemble(
            TwoTimeFlow(MODEL, X, Y, LOSS, rule, mesh=mesh, **of_flow),
            initial,
            learning_rate=0.5,
            steps=7,
            noise_multiplier=6.0,
            record_every=2,
            outputs=True,
            key=KEYS,
            **of_runs,
        )
        for mesh in (mesh_of(8), None)
    )
    assert_same(found, expected)
    assert 0 < np.mean(found.clip_fraction) < 1


PATHS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "frozen by layer, random start": (LAYERWISE, None, {"frozen": True}, {}),
    "test points": (FLAT, OUTPUTS, TEST, {"nodes": 4}),
    "few modes, random start": (FLAT, None, TEST, COARSE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_paths_in_flow_time_are_those_of_one_device(name: str) -> None:
    rule, initial, of_flow, of_paths = PATHS[name]
    told: list[float] = []
    found, expected = (
        two_time_flow(
            TwoTimeFlow(MODEL, X, Y, LOSS, rule, mesh=mesh, **of_flow),
            initial,
            [0.0, 1.0, 2.0],
            variance=0.4,
            steps=6,
            outputs=True,
            progress=progress,
            key=KEYS[0],
            **of_paths,
        )
        for mesh, progress in ((mesh_of(8), told.append), (None, False))
    )
    assert_same(found, expected)
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.mark.slow
def test_memory_of_a_device_falls_as_their_number_grows() -> None:
    n, m, rank = 192, 64, 4
    N = n + m
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, 4)))
    path, at = weight_path.path_of(SGD(), 0.2, 6, Independent()), np.array([0, 3, 6, 6])
    nodes, rest = weight_path.nodes_of(path, at), weight_path.rest_of(path, at)
    cells = volterra.grid(path, nodes, rest, np.arange(7), 3, np.dtype(float))

    def needed(n_devices: int) -> dict[str, int]:
        flow = TwoTimeFlow(
            MODEL, x[:n], np.arange(n) % K, LOSS, LAYERWISE, test_x=x[n:], frozen=True,
            mesh=mesh_of(n_devices),
        )  # fmt: skip
        modes = devices.spread(flow.mesh, jnp.zeros((N, N)))
        small = (
            jnp.zeros((4, N, K)),
            jnp.zeros((3 * rank, 3 * rank)),
            jnp.zeros((N - rank, 3, 3)),
            jnp.array([0, 1, 2, 2]),
            jnp.zeros((3, rank, rank)),
            jnp.zeros((3, N - rank)),
            jnp.zeros(()),
        )
        laws = gaussian_process.Laws.of(nodes, np.ones(2), np.dtype(float))
        pairs: Any
        small, laws, pairs, last, of_run = devices.everywhere(
            flow.mesh, (small, laws, np.tril_indices(3), jnp.asarray(2), (cells, KEYS[:1]))
        )
        process = gaussian_process.OutputProcess(modes, *small)
        options: tuple[Any, ...] = (None, (0,), 7, Full(), True, False, None)
        programs = {
            "covariance": lowered(gaussian_process._covariance, flow, laws, last),
            "modes": lowered(gaussian_process._signed, modes, flow.mesh),
            "blocks": lowered(gaussian_process._blocks, flow, laws, pairs, modes, rank),
            "run": lowered(volterra.run, flow, process, laws, *of_run, *options),
        }
        taken = {"flow": bytes_on_first_device(flow)}
        for name, program in programs.items():
            found = program.compile().compiled.memory_analysis()
            taken[name] = (
                found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
            )
        return taken

    one, many = needed(1), needed(8)
    for what in one:
        # What is small is whole on each: points, paths, what the leading modes do. For the blocks
        # a device holds the part that goes round next to its own.
        share = 5 if what == "blocks" else 7
        assert one[what] / 8 <= many[what] < one[what] / share, (what, one, many)


def test_memory_asked_for_is_that_of_all_devices_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = TwoTimeFlow(MODEL, X, Y, LOSS, FLAT, mesh=mesh_of(8))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"shape \(3, 16, 16\) needs 6,144 bytes"):
        ntkdp.two_time_kernel(MODEL, X, variance1=0.1, variance2=0.1, mesh=mesh_of(8))
    with pytest.raises(MemoryError, match=r"shape \(3, 16, 16\) needs 6,144 bytes"):
        TwoTimeFlow(MODEL, X, Y, LOSS, FLAT, frozen=True, mesh=mesh_of(8))
    # Kernels once; paths and the covariance of all nodes on each of the eight.
    kernels, paths, joint = 2 * 5 * 16 * 16, 3 * 5 * 16 * K, 3 * (5 * 16) ** 2
    filters = 3 * 3 * 1 * (5 + 1)
    needed = 8 * (kernels + 8 * (paths + joint)) + 8 * filters
    with pytest.raises(MemoryError, match=f"needs {needed:,} bytes"):
        two_time_ensemble(flow, learning_rate=0.5, steps=3, key=KEYS[0])


def test_samples_that_do_not_divide_are_refused() -> None:
    options: dict[str, Any] = {"variance1": 0.1, "variance2": 0.1, "mesh": mesh_of(3)}
    with pytest.raises(ValueError, match=r"x1 must .* e\.g\. 15, got 16"):
        ntkdp.two_time_kernel(MODEL, X, **options)
    with pytest.raises(ValueError, match=r"x must .* the 3 devices of mesh, e\.g\. 15, got 16"):
        TwoTimeFlow(MODEL, X, Y, LOSS, FLAT, mesh=mesh_of(3))
    with pytest.raises(ValueError, match=r"test_x must .* the 8 devices of mesh, e\.g\. 8, got 7"):
        TwoTimeFlow(MODEL, X, Y, LOSS, FLAT, test_x=TEST_X[:7], mesh=mesh_of(8))
