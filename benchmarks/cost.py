"""What ntkdp.plan predicts, held against what methods take.

Run alone on a machine. Memory is what the compiler plans and what arrays are alive, on one device
and on eight simulated ones; of time one rate is calibrated for each method at its first size, and
the other sizes are predicted. Prints the page and writes it to ``docs/cost.md``.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntkdp
from ntkdp import dp_sgd
from ntkdp._backend import devices as _mesh
from ntkdp._backend.files import replacing
from ntkdp.advisor import MethodCost
from ntkdp.dp_sgd import _seeds
from ntkdp.gradient_flow import Flow, _solve, optimizer_steps
from ntkdp.stochastic_flow import _distributed_eigh as distributed_eigh
from ntkdp.stochastic_flow import _noise_covariance
from ntkdp.stochastic_flow._ensemble.ensemble import draw
from ntkdp.stochastic_flow._ensemble.step_noise import noise_of_step
from ntkdp.trajectory._stepping import Stepping

Arguments = ParamSpec("Arguments")
PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
Shape = tuple[int, int, int, int, int]
LOSS = ntkdp.losses.SquaredError()
#: Batches, kernel of the noise, whether it is by group, and the noise.
FULL_AND_INDEPENDENT = (ntkdp.batches.Full(), None, False, ntkdp.noise.Independent())
DEVICES = 8
#: Samples, outputs, width, hidden layers, inputs.
KERNELS = ((400, 2, 64, 1, 16), (800, 1, 64, 2, 16), (240, 5, 64, 1, 16))
#: Large, so that the memory of the process shows the matrices and little else.
NOISY = ((3200, 1, 64, 2, 16), (1600, 2, 64, 1, 16), (640, 5, 64, 1, 16))
NETWORKS = ((2000, 10, 512, 1, 256), (2000, 10, 512, 3, 256), (400, 10, 512, 2, 256))
#: More samples than pass through at once.
IN_BATCHES = (60_000, 10, 128, 2, 64)
CALLS = 15


def network(
    n: int, k: int, width: int, depth: int, inputs: int
) -> tuple[ntkdp.models.Model, Any, jax.Array, dict[str, Any]]:
    """Model, parameters, inputs, and the sizes that a plan wants."""
    model = ntkdp.models.mlp([width] * depth, k)
    x = jax.random.normal(jax.random.key(0), (n, inputs))
    params = model.init(jax.random.key(1), x)
    sizes: dict[str, Any] = {
        "n_samples": n,
        "n_outputs": k,
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "n_inputs": inputs,
        "activations": inputs + 2 * width * depth + k,
    }
    return model, params, x, sizes


def predicted(name: str, **arguments: Any) -> MethodCost:
    """The plan of one method."""
    methods = ntkdp.plan(**arguments, memory=1e18).methods
    return next(method for method in methods if method.name == name)


def alive() -> int:
    """Bytes of all arrays, on each device that they are spread over."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize
        for a in jax.live_arrays()
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    )


def high_water(call: Callable[[], object]) -> tuple[int, object]:
    """Most bytes alive while Python runs a call, looked at whenever a step of it returns."""
    most = [alive()]
    steps = ("_terms", "_as_operator", "__init__")

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_name in steps:
            most[0] = max(most[0], alive())

    sys.setprofile(look)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return max(most[0], alive()), result


def compiled_bytes(
    program: Callable[Arguments, object], *arguments: Arguments.args, **named: Arguments.kwargs
) -> int:
    """Arguments, results and work that the compiler plans, on a device."""
    made_by_jit: Any = program
    compiled = made_by_jit.lower(*arguments, **named).compile()
    found = getattr(compiled, "compiled", compiled).memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def solved(flow: Flow, params: Any) -> int:
    """Peak of an adaptive solve."""
    times, tolerances = jnp.linspace(0.0, 1.0, 5), (1e-6, 1e-9)
    return compiled_bytes(
        _solve._integrate, flow, flow.init(params), times[0], times, diffrax.Tsit5(),
        diffrax.RecursiveCheckpointAdjoint(), tolerances, 1000, False, None,
    )  # fmt: skip


def drawn(flow: ntkdp.LinearisedFlow, params: Any) -> int:
    """Peak of one noisy run."""
    noise = noise_of_step(flow, 1.0, *FULL_AND_INDEPENDENT)
    key = _mesh.everywhere(flow.mesh, jax.random.key(0))
    stepping = Stepping(0.1, 100, 1)
    walk, start = optimizer_steps(flow, None, 0.1, None), (flow.init(params), None)
    return compiled_bytes(draw, walk, noise, start, False, stepping, key, False, None)


def resident(call: Callable[[], object]) -> int:
    """What the process holds more at the peak of a second call, workspace of LAPACK included."""

    def read(what: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in status if line.startswith(what)]
        return int(line.split()[1]) * 1024

    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def kernel_memory(shape: Shape, devices: int, grouped: bool) -> tuple[dict[str, Any], int]:
    """Peak of making a flow from the empirical kernel."""
    model, params, x, sizes = network(*shape)
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("samples",))
    rule = ntkdp.clipping.Abadi(1.0, scope="layerwise" if grouped else "flat")
    make: Callable[..., Any] = ntkdp.layerwise_ntk if grouped else ntkdp.empirical_ntk
    kernel = make(model.apply, params, x, mesh=mesh)
    groups = kernel.values.shape[0] if grouped else 1
    targets = jnp.zeros((shape[0], shape[1]))
    peak, _ = high_water(lambda: ntkdp.KernelFlow(kernel, targets, LOSS, rule, mesh=mesh))
    return {**sizes, "n_groups": groups, "n_devices": devices, "noise": False}, peak


def noise_memory(shape: Shape, devices: int) -> tuple[dict[str, Any], int]:
    """Peak of making a flow and its noise, the kernel that the caller keeps included."""
    model, params, x, sizes = network(*shape)
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("samples",))
    kernel = ntkdp.empirical_ntk(model.apply, params, x, mesh=mesh)
    targets, rule = jnp.zeros((shape[0], shape[1])), ntkdp.clipping.Abadi(1.0)

    def make() -> ntkdp.KernelFlow:
        return ntkdp.KernelFlow(kernel, targets, LOSS, rule, mesh=mesh)

    if mesh is None:
        peak = kernel.nbytes + resident(
            lambda: jax.block_until_ready(noise_of_step(make(), 1.0, *FULL_AND_INDEPENDENT))
        )
    else:
        flow = make()
        covariance = _noise_covariance.noise_covariance(flow, 1.0, None, False)
        held = alive()
        find: Any = distributed_eigh.eigh
        plan = find.lower(flow.mesh, covariance).compile().memory_analysis()
        peak = held + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return {**sizes, "n_devices": devices, "noise": True}, peak


def network_memory(
    name: str, shape: Shape, devices: int, noise: bool = False
) -> tuple[dict[str, Any], str, int]:
    """Peak of a method that has no kernel."""
    model, params, x, sizes = network(*shape)
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("samples",))
    targets, rule = jnp.zeros((shape[0], shape[1])), ntkdp.clipping.Abadi(1.0)
    if name == "DP-SGD":
        algorithm = dp_sgd.build(
            model.apply, x, targets, LOSS, rule, learning_rate=0.1,
            noise_multiplier=float(noise), mesh=mesh,
        )  # fmt: skip
        start = algorithm.init(params).params, None
        key = _mesh.everywhere(algorithm.mesh, jax.random.key(0))
        stepping = Stepping(0.1, 100, 1)
        peak = compiled_bytes(
            _seeds.run, algorithm, start, False, key, stepping, False, False, None
        )
    elif name == "WeightFlow":
        exact = ntkdp.WeightFlow(model.apply, x, targets, LOSS, rule, mesh=mesh)
        peak = solved(exact, params)
    else:
        flow = ntkdp.LinearisedFlow(model.apply, params, x, targets, LOSS, rule, mesh=mesh)
        peak = drawn(flow, params) if noise else solved(flow, params)
    return {**sizes, "n_devices": devices, "noise": noise}, name, peak


def memory() -> list[tuple[dict[str, Any], str, int]]:
    """Rows of predicted and measured peaks."""
    found = []
    for shape in KERNELS:
        for devices in (1, DEVICES):
            for grouped in (False, True):
                asked, peak = kernel_memory(shape, devices, grouped)
                found.append((asked, "empirical kernel", peak))
    for shape in NOISY:
        for devices in (1, DEVICES):
            asked, peak = noise_memory(shape, devices)
            found.append((asked, "empirical kernel", peak))
    for shape in NETWORKS:
        for devices in (1, DEVICES):
            found.append(network_memory("WeightFlow", shape, devices))
            found += [network_memory("DP-SGD", shape, devices, noise) for noise in (False, True)]
            found += [
                network_memory("LinearisedFlow", shape, devices, noise) for noise in (False, True)
            ]
    found += [network_memory("LinearisedFlow", IN_BATCHES, 1, noise) for noise in (False, True)]
    return found


def calls_of(name: str, shape: Shape) -> tuple[float, Callable[[], object]]:
    """A compiled velocity or step, and its operations."""
    model, params, x, sizes = network(*shape)
    n, k = shape[:2]
    targets, rule = jnp.zeros((n, k)), ntkdp.clipping.Abadi(1.0)
    cost = predicted(name.removesuffix(", assembly").removesuffix(", velocity"), **sizes)
    operations = cost.step_operations
    if name == "empirical kernel, assembly":
        return cost.kernel_operations, lambda: ntkdp.empirical_ntk(model.apply, params, x)
    if name == "infinite kernel, assembly":
        return cost.kernel_operations, lambda: ntkdp.infinite_ntk(model, x)
    if name == "DP-SGD":
        algorithm = dp_sgd.build(model.apply, x, targets, LOSS, rule, learning_rate=0.1)
        step, state = algorithm.compile(), algorithm.init(params)
        return operations, lambda: step(jax.random.key(0), state)
    flow: Flow
    initial: Any = params
    if name == "WeightFlow":
        flow = ntkdp.WeightFlow(model.apply, x, targets, LOSS, rule)
    elif name == "LinearisedFlow":
        flow = ntkdp.LinearisedFlow(model.apply, params, x, targets, LOSS, rule)
    else:
        empirical = name.startswith("empirical")
        kernel = (
            ntkdp.empirical_ntk(model.apply, params, x)
            if empirical
            else ntkdp.infinite_ntk(model, x)
        )
        flow, initial = ntkdp.KernelFlow(kernel, targets, LOSS, rule), targets
    at = flow.init(initial)
    velocity = eqx.filter_jit(lambda flow, state: flow.velocity(state))
    return operations, lambda: velocity(flow, at)


#: Samples that are timed, and the network they pass through.
TIMED: dict[str, tuple[tuple[int, ...], tuple[int, int, int, int]]] = {
    "empirical kernel, assembly": ((800, 1200, 1600), (4, 256, 1, 256)),
    "empirical kernel, velocity": ((2000, 2500, 3000), (3, 64, 1, 16)),
    "infinite kernel, assembly": ((3000, 4000, 5000), (10, 64, 1, 64)),
    "infinite kernel, velocity": ((4000, 5000, 6000), (10, 64, 1, 16)),
    "WeightFlow": ((1000, 1500, 2000), (10, 512, 2, 512)),
    "LinearisedFlow": ((1000, 1500, 2000), (10, 512, 2, 512)),
    "DP-SGD": ((1000, 1500, 2000), (10, 512, 2, 512)),
}


def seconds_of(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Least seconds of each call, taken in turns."""
    least = [np.inf] * len(calls)
    for turn in range(CALLS + 1):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                least[number] = min(least[number], time.perf_counter() - start)
    return least


def memory_table() -> str:
    """Peaks, in a process of its own with eight simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, __file__, "--job", "memory"],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = []
    for asked, name, measured in json.loads(done.stdout.splitlines()[-1]):
        cost = predicted(name, **asked)
        rows.append(
            f"| {name}{', noise' if asked['noise'] else ''} | {asked['n_samples']:,} "
            f"| {asked['n_outputs']} | {asked['n_parameters']:,} | {asked.get('n_groups', 1)} "
            f"| {asked['n_devices']} | {cost.memory_bytes / 1e6:.2f} MB | {measured / 1e6:.2f} MB "
            f"| {cost.memory_bytes / measured:.2f} |"
        )
    return "\n".join(rows)


def time_table() -> str:
    """Seconds, each method calibrated at its first size."""
    rows = []
    for name, (samples, rest) in TIMED.items():
        shapes: list[Shape] = [(n, *rest) for n in samples]
        operations, calls = zip(*[calls_of(name, shape) for shape in shapes], strict=True)
        measured = seconds_of(calls)
        rate = operations[0] / measured[0]
        for shape, count, taken in zip(shapes, operations, measured, strict=True):
            n, k, width, depth, inputs = shape
            layers = "-".join(map(str, [inputs, *[width] * depth, k]))
            shown = "calibrates" if shape == shapes[0] else f"{count / rate / taken:.2f}"
            rows.append(
                f"| {name} | {n:,} | {layers} | {rate / 1e9:.3g} | {1e3 * count / rate:.1f} ms "
                f"| {1e3 * taken:.1f} ms | {shown} |"
            )
    return "\n".join(rows)


def beyond() -> str:
    """Plans of what cannot be run here."""
    common: dict[str, Any] = {"n_outputs": 10, "n_inputs": 784, "memory": 80e9}
    # A network 784-1024-1024-10.
    large: dict[str, Any] = {"n_parameters": 1_900_000, "activations": 784 + 4 * 1024 + 10}
    plans: dict[str, dict[str, Any]] = {
        "50,000 samples on 8 devices of 80 GB": {"n_samples": 50_000, "n_devices": 8},
        "1,000,000 samples on one device of 80 GB": {"n_samples": 1_000_000},
    }
    shown = []
    for title, sizes in plans.items():
        found = ntkdp.plan(**common, **large, **sizes)
        best = "none" if found.best is None else found.best.name
        shown += [f"**{title}**", "", found.table(), "", f"To take: {best}.", ""]
    return "\n".join(shown).strip()


TEXT = """# Memory and time before a run

`ntkdp.plan` says what each method will take from sizes alone: n samples, K outputs, P parameters, R groups, D devices, A activations (numbers a sample that
enter all layers with parameters, and that leave them) and d inputs a sample.

| | numbers on a device | operations of a step | once |
|---|---|---|---|
| empirical kernel | 2 R (nK)^2 / D | 2 R (nK)^2 | n^2 (1 + K^2) A / 2 + 2 n (K + 1) P; the first term twice on several devices |
| infinite kernel | the same without K | 2 R n^2 K | R n^2 (2 d + 100) |
| WeightFlow | 14 P + n (2A - d) / D | 6 n P | |
| LinearisedFlow | 15 P + n d / D + b (2A - d), b samples of 64 MiB at a time; n (8A - 7d) / D for the last if all pass at once; a noisy run 7 P for 15 P, and 7A - 6d for 8A - 7d | 10 n P | |
| DP-SGD | 3 P + n (3A - d) / D, with noise 7 P | 6 n P | |

The kernel that its caller keeps and the matrix of `KernelFlow` are alive at once: two. Noise adds a covariance and its eigenvectors: six copies at the peak, two of
them workspace of LAPACK, and 11 (nK)^3 operations once; on several devices, which find them together by the block Jacobi method, eight copies in parts and
(98 + 144 / D) (nK)^3 operations. A kernel below about 100 MiB takes up to 200 MiB of blocks besides.

## Before work begins

Networks, kernels, flows, runs, moments and whole comparisons and sweeps ask for their memory before they take it, and raise `MemoryError` with the bytes needed, the
bytes there are and the ways out. A function asks for what it takes itself: a kernel for its result and its blocks, `KernelFlow` for its matrices, noise for the four
copies above; `ntkdp compare` and `ntkdp sweep` ask for all of it together. What there is on a CPU is the least of what is free in the machine, in the control groups
of the process up to the root (file cache that is not in use counts as free), and under `ulimit -v` and `-d`.

## Held against what is taken

`uv run python benchmarks/cost.py` measured this on: {machine}; float32. Memory is arguments, results and work that the compiler plans for a whole solve or run and, for
kernels, the most bytes of arrays alive while a flow is made; with noise on one device it is what the process holds more, workspace of LAPACK included. Eight devices are
simulated.

| method | n | K | P | R | D | predicted | measured | ratio |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{memory}

Time is the least of {calls} calls, all sizes of a method in turns; one rate a method is taken at its first size and predicts the others.

| method | n | layers | 10^9 operations a second | predicted | measured | ratio |
|---|--:|---|--:|--:|--:|--:|
{time}

## Past what runs here

P = 1.9 million, 784 inputs, 10 outputs, 200 evaluations, float32, by `ntkdp.plan`; memory is the peak, with the copies above: one copy of the
full kernel of 50,000 samples is 1 TB, 125 GB on each of eight devices.

{beyond}
"""  # noqa: E501


def main() -> None:
    """The job that is named, else the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=["memory"])
    if parser.parse_args().job:
        print(json.dumps(memory()))
        return
    machine = f"{os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__} on cpu"
    text = TEXT.format(
        machine=machine,
        memory=memory_table(),
        time=time_table(),
        calls=CALLS,
        beyond=beyond(),
    )
    print(text)
    with replacing(PAGE) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
