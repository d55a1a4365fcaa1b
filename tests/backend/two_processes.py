"""One of two processes that share a problem: run by test_mesh.py, prints what it found as JSON."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkdp


def main(coordinator: str, number: int, roads: Sequence[str]) -> None:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1 "
        "--xla_force_host_platform_device_count=2 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    ntkdp.enable_x64()
    jax.distributed.initialize(coordinator, num_processes=2, process_id=number)
    found = trajectories(jax.make_mesh((jax.device_count(),), ("samples",)), roads)
    print(json.dumps({"devices": jax.device_count(), "found": found}))
    jax.distributed.shutdown()


def trajectories(mesh: jax.sharding.Mesh | None, roads: Sequence[str]) -> dict[str, list[float]]:
    """Losses of a small problem by these roads, on a mesh or on one device."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)))
    targets = jnp.sin(x[:, :2])
    model = ntkdp.models.mlp([8], 2, activation="erf")
    params = model.init(jax.random.key(0), x)
    loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(0.3)
    outputs = model.apply(params, x)
    keys = jax.random.split(jax.random.key(1), 3)
    steps: dict[str, Any] = {"learning_rate": 0.5, "steps": 6, "noise_multiplier": 0.5, "key": keys}
    times = [0.0, 1.0, 3.0]
    recorded: dict[str, Any] = {"outputs": True, "test_x": x[:4], "test_targets": targets[:4]}

    @functools.cache
    def flow() -> ntkdp.KernelFlow:
        kernel = ntkdp.empirical_ntk(model.apply, params, x, mesh=mesh)
        return ntkdp.KernelFlow(kernel, targets, loss, rule, mesh=mesh)

    def by_layer() -> ntkdp.KernelFlow:
        kernel = ntkdp.layerwise_infinite_ntk(model, x, mesh=mesh)
        by_layer = ntkdp.clipping.Abadi(0.3, scope="layerwise")
        return ntkdp.KernelFlow(kernel, targets, loss, by_layer, mesh=mesh)

    def weights() -> ntkdp.WeightFlow:
        return ntkdp.WeightFlow(model.apply, x, targets, loss, rule, mesh=mesh)

    def linearised() -> ntkdp.LinearisedFlow:
        return ntkdp.LinearisedFlow(model.apply, params, x, targets, loss, rule, mesh=mesh)

    def between_times() -> ntkdp.stochastic_flow.TwoTimeFlow:
        return ntkdp.stochastic_flow.TwoTimeFlow(model, x, targets, loss, rule, mesh=mesh)

    runs: dict[str, Callable[[], Any]] = {
        "flow": lambda: ntkdp.solve(flow(), outputs, times),
        "infinite, by layer": lambda: ntkdp.solve(by_layer(), outputs, times),
        "weights": lambda: ntkdp.solve(weights(), params, times, outputs=True),
        "linearised": lambda: ntkdp.recursion(
            linearised(), params, learning_rate=0.5, steps=3, outputs=True
        ),
        "recursion": lambda: ntkdp.recursion(flow(), outputs, learning_rate=0.5, steps=6),
        "ensemble": lambda: ntkdp.stochastic_flow.ensemble(flow(), outputs, **steps),
        "moments": lambda: ntkdp.stochastic_flow.moments(
            flow(), outputs, learning_rate=0.5, steps=2, noise_multiplier=0.5, outputs=True
        ),
        "ensemble without a kernel": lambda: ntkdp.stochastic_flow.ensemble(
            linearised(), params, sample_rate=0.5, **steps
        ),
        "between times": lambda: ntkdp.stochastic_flow.two_time_ensemble(
            between_times(), outputs, nodes=2, rank=5, outputs=True, **steps | {"key": keys[0]}
        ),
        "dp_sgd": lambda: ntkdp.dp_sgd.run(
            model.apply, params, x, targets, loss, rule, mesh=mesh, sample_rate=0.5, **steps,
            **recorded,
        ),
    }  # fmt: skip
    return {
        f"{name}, {what}": np.asarray(values).ravel().tolist()
        for name in roads
        for run in [runs[name]()]
        for what, values in (
            ("loss", run.loss),
            ("outputs", getattr(run, "outputs", None)),
            ("test", getattr(run, "test_outputs", None)),
            ("covariance", getattr(run, "covariance", None)),
        )
        if values is not None
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
