"""Plans of memory and time against what the compiler plans and which arrays are alive."""

import sys
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SQUARED
from hypothesis import given, settings
from hypothesis import strategies as st

import ntkdp
from ntkdp import clipping, gradient_flow
from ntkdp._backend import devices as _mesh
from ntkdp.gradient_flow import _solve
from ntkdp.stochastic_flow import _distributed_eigh as distributed_eigh
from ntkdp.stochastic_flow._ensemble import ensemble, step_noise
from ntkdp.trajectory._stepping import Stepping

PLENTY = 10**18


def _method(found: Any, name: str) -> Any:
    return next(method for method in found.methods if method.name == name)


def _network(n: int, k: int, width: int, inputs: int) -> tuple[Any, Any, jax.Array, Any]:
    model = ntkdp.models.mlp([width], k)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, inputs)))
    params = model.init(jax.random.key(0), x)
    sizes = {
        "n_samples": n,
        "n_outputs": k,
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "n_inputs": inputs,
        "activations": inputs + 2 * width + k,
    }
    return model, params, x, sizes


def _alive() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def _operations(flow: Any, state: Any) -> float:
    """Of a velocity, as the compiler counts them."""
    program = jax.jit(lambda state: flow.velocity(state)).lower(state).compile()
    counts: Any = program.cost_analysis()
    return float(counts["flops"])


@pytest.mark.parametrize(("groups", "with_test"), [(1, False), (1, True), (2, False), (2, True)])
def test_kernel_flow_takes_what_is_planned(groups: int, with_test: bool) -> None:
    n, k, m = 60, 3, 60 if with_test else 0
    random = np.random.default_rng(1)
    values = jnp.asarray(random.uniform(size=(groups, n, n, k, k)))
    test_values = jnp.asarray(random.uniform(size=(groups, n, n, k, k))) if with_test else None
    scope: Any = "layerwise" if groups > 1 else "flat"

    def kernel_of(v: Any) -> Any:
        if groups > 1:
            return ntkdp.LayerwiseKernel(("a", "b"), v)
        return v[0]

    kernel, test_kernel = kernel_of(values), kernel_of(test_values) if with_test else None
    own = (2 if with_test else 1) * groups * (n * k) ** 2 * 8
    if groups == 1:
        del values, test_values
    before = _alive() - own
    most = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal most
        if event == "return" and frame.f_code.co_name in ("_terms", "_as_operator", "__init__"):
            most = max(most, _alive())

    previous = sys.getprofile()
    sys.setprofile(look)
    try:
        ntkdp.KernelFlow(
            kernel,
            jnp.zeros((n, k)),
            SQUARED,
            clipping.Abadi(1.0, scope=scope),
            test_kernel=test_kernel,
        )
    finally:
        sys.setprofile(previous)
    found = ntkdp.plan(n, k, 100, n_test=m, n_groups=groups, dtype="float64", memory=PLENTY)
    assert _method(found, "empirical kernel").memory_bytes == pytest.approx(most - before, rel=0.25)


def _bytes(lowered: Any) -> int:
    """Arguments, results and work that the compiler plans."""
    used = lowered.compile().compiled.memory_analysis()
    return int(used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes)


def _of_a_solve(name: str, n: int, width: int, inputs: int, devices: int) -> tuple[int, int]:
    """Bytes on a device: planned, and in the compiler's plan."""
    model, params, x, sizes = _network(n, 4, width, inputs)
    targets, rule = jnp.zeros((n, 4)), clipping.Abadi(1.0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("any",)) if devices > 1 else None
    flow: Any = (
        ntkdp.WeightFlow(model.apply, x, targets, SQUARED, rule, mesh=mesh)
        if name == "WeightFlow"
        else ntkdp.LinearisedFlow(model.apply, params, x, targets, SQUARED, rule, mesh=mesh)
    )
    integrate: Any = _solve._integrate
    lowered = integrate.lower(
        flow,
        flow.init(params),
        jnp.zeros(()),
        jnp.linspace(0.0, 1.0, 3),
        diffrax.Tsit5(),
        diffrax.RecursiveCheckpointAdjoint(),
        (1e-6, 1e-9),
        100,
        False,
        None,
    )
    found = ntkdp.plan(**sizes, n_devices=devices, dtype="float64", memory=PLENTY)
    return _method(found, name).memory_bytes, _bytes(lowered)


def _of_a_noisy_run(n: int, width: int, inputs: int) -> tuple[int, int, int]:
    """The same of a run without a kernel: planned, planned for its batches, and compiled."""
    model, params, x, sizes = _network(n, 4, width, inputs)
    flow = ntkdp.LinearisedFlow(
        model.apply, params, x, jnp.zeros((n, 4)), SQUARED, clipping.Abadi(1.0)
    )
    noise = step_noise.noise_of_step(
        flow, 1.0, ntkdp.batches.Full(), None, False, ntkdp.noise.Independent()
    )
    stepping = Stepping(0.1, 10, 1)
    walk = gradient_flow.optimizer_steps(flow, None, stepping.learning_rate, None)
    draw: Any = ensemble.draw
    lowered = draw.lower(
        walk, noise, (flow.init(params), None), False, stepping, jax.random.key(0), False, None
    )
    asked: Any = {**sizes, "dtype": "float64", "noise": True, "memory": PLENTY}
    planned, for_batches = (
        _method(ntkdp.plan(**asked, batch_size=size), "LinearisedFlow").memory_bytes
        for size in (None, flow.batch_size)
    )
    return planned, for_batches, _bytes(lowered)


MANY_SAMPLES, FEW_SAMPLES = (2000, 64, 32), (20, 256, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "width", "inputs"),
    [
        ("WeightFlow", *MANY_SAMPLES),
        ("WeightFlow", *FEW_SAMPLES),
        ("LinearisedFlow", *MANY_SAMPLES),
        ("LinearisedFlow", *FEW_SAMPLES),
    ],
)
def test_solves_take_what_is_planned(name: str, n: int, width: int, inputs: int) -> None:
    """Many samples, where factors dominate, and few, where states of the solver do."""
    planned, measured = _of_a_solve(name, n, width, inputs, 1)
    assert planned == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "width", "inputs"), [pytest.param(*MANY_SAMPLES, marks=pytest.mark.slow), FEW_SAMPLES]
)
def test_noisy_runs_without_a_kernel_take_what_is_planned(n: int, width: int, inputs: int) -> None:
    planned, for_batches, measured = _of_a_noisy_run(n, width, inputs)
    assert planned == for_batches == pytest.approx(measured, rel=0.25)


def test_the_batches_of_a_flow_may_be_told() -> None:
    """Biases take room: the flow makes two batches of what 164 numbers a sample would let pass."""
    planned, for_batches, measured = _of_a_noisy_run(40_000, 64, 32)
    assert for_batches == pytest.approx(measured, rel=0.25)
    assert planned > 2 * measured


@pytest.mark.slow
def test_a_single_batch_takes_more_than_one_of_several() -> None:
    """Of a single batch the compiler keeps what it computes anew for each of several."""
    found = [_of_a_solve("LinearisedFlow", 100_000, 64, 32, devices) for devices in (1, 4)]
    for planned, measured in found:
        assert planned == pytest.approx(measured, rel=0.25)
    assert found[1][1] > 1.3 * found[0][1]


def test_a_batch_has_a_sample_or_more() -> None:
    p, a = 1000, 10**9

    def linearised(n_devices: int) -> int:
        found = ntkdp.plan(4, 1, p, activations=a, n_devices=n_devices, memory=PLENTY)
        return int(_method(found, "LinearisedFlow").memory_bytes)

    assert linearised(1) == 4 * (15 * p + 2 * a)
    assert linearised(4) == linearised(8) == 4 * (15 * p + 8 * a)


def test_kernel_operations_are_what_the_compiler_counts() -> None:
    """A velocity is one product with the kernel; of as many operations as in the program."""
    n, k = 80, 3
    kernel = jnp.eye(n)[:, :, None, None] * jnp.eye(k)
    flow = ntkdp.KernelFlow(kernel, jnp.zeros((n, k)), SQUARED, clipping.Abadi(1.0))
    state = flow.init(jnp.ones((n, k)))
    counted = _operations(flow, state)
    step = _method(ntkdp.plan(n, k, 100, memory=PLENTY), "empirical kernel").step_operations
    assert step == 2 * (n * k) ** 2
    assert counted == pytest.approx(step, rel=0.25)


def test_weight_operations_are_what_the_compiler_counts() -> None:
    model, params, x, sizes = _network(100, 2, 128, 128)
    flow = ntkdp.WeightFlow(model.apply, x, jnp.zeros((100, 2)), SQUARED, clipping.NoClipping())
    counted = _operations(flow, params)
    step = _method(ntkdp.plan(**sizes, memory=PLENTY), "WeightFlow").step_operations
    # A single hidden layer needs no cotangents of its inputs: a third of the products fall away.
    assert counted == pytest.approx(2 / 3 * step, rel=0.25)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 10**7),
    k=st.integers(1, 1000),
    p=st.integers(1, 10**10),
    a=st.integers(1, 10**8),
    m=st.integers(0, 10**5),
    groups=st.integers(1, 50),
    devices=st.integers(1, 512),
    noise=st.booleans(),
)
def test_more_devices_take_no_more_memory_of_each_but_for_a_batch(
    n: int, k: int, p: int, a: int, m: int, groups: int, devices: int, noise: bool
) -> None:
    asked: Any = {"n_test": m, "n_groups": groups, "noise": noise, "memory": 10**10, "flops": 1e12}
    asked["activations"] = a
    fewer = ntkdp.plan(n, k, p, n_devices=devices, **asked)
    more = ntkdp.plan(n, k, p, n_devices=devices + 1, **asked)
    double = ntkdp.plan(2 * n, k, p, n_devices=devices, **asked)
    for one, other, larger in zip(fewer.methods, more.methods, double.methods, strict=True):
        most = one.memory_bytes
        in_batches = n > devices and 4 * n * a > devices * 2**26
        if one.name == "LinearisedFlow" and in_batches:
            # A single batch takes 8 sets of what several have 2 of, and is no larger than they.
            most += 8 * max(2**26, 4 * a)
        assert 0 < other.memory_bytes <= most
        assert one.operations < larger.operations
        assert one.fits == (one.memory_bytes <= 10**10)
        assert one.seconds is not None
        assert one.seconds > 0
    assert fewer.best is None or fewer.best.fits


def test_the_best_fits_and_is_cheap() -> None:
    few = ntkdp.plan(100, 1, 10**6, activations=10**4, memory=PLENTY)
    assert few.best is not None
    assert few.best.name == "empirical kernel"
    many = ntkdp.plan(50_000, 10, 1_900_000, activations=5000, n_devices=8, memory=80e9)
    assert many.best is not None
    assert many.best.name == "LinearisedFlow"
    assert not _method(many, "empirical kernel").fits
    assert _method(many, "infinite kernel").fits
    noisy = ntkdp.plan(50_000, 10, 1_900_000, n_devices=8, memory=80e9, noise=True)
    assert noisy.best is not None
    assert noisy.best.name == "LinearisedFlow"
    assert "without noise" not in noisy.best.note
    assert "without noise" in _method(noisy, "WeightFlow").note
    assert ntkdp.plan(10, 1, 100, memory=1).best is None
    assert ntkdp.plan(2, 1, 10**9, memory=10**6).best is not None  # a kernel needs no parameters


def test_seconds_are_operations_over_the_rate() -> None:
    plain = ntkdp.plan(100, 2, 1000, n_devices=4, steps=7, evaluations=50, memory=PLENTY)
    timed = ntkdp.plan(100, 2, 1000, n_devices=4, steps=7, evaluations=50, memory=PLENTY, flops=1e9)
    for one, other in zip(plain.methods, timed.methods, strict=True):
        repeats = 50 if one.name == "WeightFlow" else 7
        assert one.seconds is None
        assert other.seconds == pytest.approx(one.operations / 4e9)
        assert one.operations == one.kernel_operations + repeats * one.step_operations


@pytest.mark.parametrize(("name", "rows"), [("empirical kernel", 240), ("infinite kernel", 120)])
def test_devices_find_the_root_of_the_noise_together(name: str, rows: int) -> None:
    asked: Any = {"n_test": 20, "steps": 7, "memory": PLENTY, "flops": 1e9}
    sizes = (100, 2, 1000)
    for devices in (1, 4):
        plain, noisy = (
            _method(ntkdp.plan(*sizes, **asked, n_devices=devices, noise=noise), name)
            for noise in (False, True)
        )
        root = noisy.kernel_operations - plain.kernel_operations
        # LAPACK's dsyevd, 9 N^3, and the product V sqrt(L) V^T; or eight sweeps.
        expected = 11 if devices == 1 else 98 + 144 / devices
        assert root == pytest.approx(expected * rows**3)
        assert noisy.seconds == pytest.approx(noisy.operations / devices / 1e9)


def test_a_round_of_a_sweep_takes_three_products() -> None:
    n, devices = 256, 4
    mesh = _mesh.as_mesh(jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("any",)))
    assert mesh is not None
    program = distributed_eigh.eigh.lower(mesh, _mesh.spread(mesh, np.eye(n))).compile()
    counts: Any = program.cost_analysis()
    # Of loops the compiler counts one turn, of LAPACK nothing.
    assert counts["flops"] == pytest.approx(3 * 2 * n * (n / devices) ** 2, rel=0.1)


@pytest.mark.parametrize(("groups", "m"), [(1, 0), (1, 30), (3, 0), (3, 30)])
def test_noise_takes_what_is_said(groups: int, m: int) -> None:
    """Numbers of kernel and matrix, kernel of all points, covariance, vectors and workspace."""
    n, k = 50, 2
    found = ntkdp.plan(n, k, 100, n_test=m, n_groups=groups, noise=True, memory=PLENTY)
    followed = (n + m) ** 2
    numbers = 2 * groups * n * (n + m) + 4 * followed + (groups * followed if m else 0)
    assert _method(found, "infinite kernel").memory_bytes == 4 * numbers
    assert _method(found, "empirical kernel").memory_bytes == 4 * k**2 * numbers
    if groups == 1 and m == 0:
        assert numbers == 6 * n**2
    shared = ntkdp.plan(
        n, k, 100, n_test=m, n_groups=groups, noise=True, memory=PLENTY, n_devices=2
    )
    in_parts = 4 * (numbers + 2 * followed) / 2
    assert _method(shared, "infinite kernel").memory_bytes == in_parts


def test_the_table_has_a_row_for_each_method() -> None:
    found = ntkdp.plan(100, 2, 1000, memory=PLENTY, flops=1e9)
    rows = found.table().splitlines()
    assert len(rows) == 2 + len(found.methods)
    assert len({row.count("|") for row in rows}) == 1
    for row, method in zip(rows[2:], found.methods, strict=True):
        assert row.startswith(f"| {method.name} |")


def test_the_memory_of_this_machine_is_the_default() -> None:
    assert 0 < ntkdp.plan(10, 1, 10).memory_bytes < PLENTY


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples must be at least 1, got 0"),
        ({"n_outputs": 1.5}, TypeError, "n_outputs"),
        ({"n_parameters": True}, TypeError, "n_parameters must be a whole number"),
        ({"n_test": -1}, ValueError, "n_test must be at least 0, got -1"),
        ({"n_test": False}, TypeError, "n_test must be a whole number"),
        ({"n_inputs": -1}, ValueError, "n_inputs must be at least 0, got -1"),
        ({"n_groups": 0}, ValueError, "n_groups must be at least 1"),
        ({"n_devices": 0}, ValueError, "n_devices must be at least 1"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"evaluations": 0}, ValueError, "evaluations must be at least 1"),
        ({"activations": 0}, ValueError, "activations must be at least 1"),
        ({"activations": 3, "n_inputs": 5}, ValueError, "activations must be at least n_inputs"),
        ({"memory": -1}, ValueError, "memory must be positive"),
        ({"memory": np.array([1.0, 2.0])}, ValueError, "memory must be a single number"),
        ({"flops": 0}, ValueError, "flops must be positive"),
        ({"flops": "fast"}, TypeError, "flops must be a number|parameter .flops."),
        ({"dtype": "int32"}, TypeError, "dtype must be a floating dtype"),
        ({"dtype": "flat32"}, TypeError, "dtype must be a floating dtype"),
        ({"noise": 1.0}, TypeError, "noise"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_sizes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    asked: dict[str, Any] = {"n_samples": 10, "n_outputs": 2, "n_parameters": 50, "memory": 1e9}
    with pytest.raises(error, match=message):
        ntkdp.plan(**{**asked, **change})
