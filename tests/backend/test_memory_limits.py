"""Memory that is not there is missed before it is taken, and said with the ways out."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import linear

import ntkdp
from ntkdp._backend import compiled, memory
from ntkdp.experiment import _run
from ntkdp.trajectory._stepping import Stepping

SQUARED, RULE = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: Any, usage: Any, inactive: int = 0) -> dict[str, str]:
    """Files of a control group of version 2."""
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def old_group(folder: str, limit: Any, usage: Any, inactive: int = 0) -> dict[str, str]:
    """The same of version 1, whose plain entry leaves out the groups below."""
    base = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{usage}\n",
        f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


UNLIMITED = 9223372036854771712

CASES: dict[str, tuple[dict[str, str], int | None]] = {
    "root of a container": (group(".", 1000, 300), 700),
    "own group of a job": (
        {"proc/self/cgroup": "0::/slurm/job/step\n", **group("slurm/job/step", 500, 100)},
        400,
    ),
    "a group above the own one is tighter": (
        {
            "proc/self/cgroup": "0::/user.slice/a.scope\n",
            **group("user.slice/a.scope", 5000, 100),
            **group("user.slice", 900, 800),
        },
        100,
    ),
    "a group of others sets no limit": (
        {"proc/self/cgroup": "0::/mine\n", **group("mine", 500, 0), **group("other", 1, 0)},
        500,
    ),
    "cache that is not in use is free": (group(".", 1000, 900, inactive=600), 700),
    "more cache than usage": (group(".", 1000, 100, inactive=600), 1000),
    "more usage than the limit": (group(".", 1000, 1200), 0),
    "no limit": (group(".", "max", 300), None),
    "version 1": (
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/abc\n",
            **old_group("docker/abc", 800, 500, inactive=200),
            **old_group(".", UNLIMITED, 7000),
        },
        500,
    ),
    "version 1, whose own path is mounted as the root": (
        {"proc/self/cgroup": "4:cpuset,memory:/docker/abc\n", **old_group(".", 800, 500)},
        300,
    ),
    "a path out of the mount": (
        {"proc/self/cgroup": "0::/../../elsewhere\n", **group(".", 1000, 300)},
        700,
    ),
    "no usage": ({"sys/fs/cgroup/memory.max": "1000\n"}, 1000),
    "figures that are no numbers": (group(".", "-1", "?"), None),
    "a usage that is no number": (group(".", 1000, "?"), 1000),
    "lines that are none": ({"proc/self/cgroup": "x\n:\n0\n\n", **group(".", 9, 2)}, 7),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_control_groups_leave_what_is_free(name: str, tmp_path: Path) -> None:
    files, expected = CASES[name]
    free = memory.free_in_control_groups(tree(tmp_path, files))
    assert min((one for one in free if one < UNLIMITED // 2), default=None) == expected


def test_figures_that_cannot_be_read_are_no_crash(tmp_path: Path) -> None:
    files = group(".", 1000, 300)
    root = tree(tmp_path, files)
    (root / "sys/fs/cgroup/memory.stat").unlink()
    (root / "sys/fs/cgroup/memory.stat").mkdir()
    (root / "sys/fs/cgroup/memory.current").write_bytes(b"\xff\xfe")
    assert memory.free_in_control_groups(root) == [1000]
    (root / "sys/fs/cgroup/memory.max").write_bytes(b"\xff\xfe")
    assert memory.free_in_control_groups(root) == []


def test_the_least_of_all_limits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, list[int]] = {
        "free_in_machine": [900],
        "free_in_control_groups": [800, 500],
        "free_in_process": [600],
    }
    for name, free in limits.items():
        monkeypatch.setattr(memory, name, lambda free=free: free)
    assert memory.available_bytes() == 500
    for name in limits:
        monkeypatch.setattr(memory, name, list)
    memory.require(2**62, "a kernel", "use less")


# What is asked under a limit on the address space, after the packages are there.
LIMITED = """
import resource
import jax, jax.numpy as jnp, psutil
import ntkdp
from ntkdp import clipping, losses

model = ntkdp.models.mlp([8], 10)
x = jnp.ones((5000, 4))
params = model.init(jax.random.key(0), x)
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
wide = jnp.ones((50_000, 4))
for ask in (
    lambda: ntkdp.empirical_ntk(model.apply, params, x),
    lambda: ntkdp.infinite_ntk(model, wide),
    lambda: ntkdp.layerwise_infinite_ntk(model, wide),
    lambda: ntkdp.models.mlp([100_000, 100_000], 1).init(jax.random.key(0), x),
    # Pairs of positions, of few images.
    lambda: ntkdp.infinite_ntk(
        ntkdp.models.cnn([4], 1, pooling="average"), jnp.ones((60, 28, 28, 1))),
):
    try:
        ask()
    except MemoryError as error:
        print(error)
ntkdp.empirical_ntk(model.apply, params, x[:20]).block_until_ready()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a limit of memory is not kept")
def test_limits_of_the_process_refuse_what_would_die() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    *said, end = done.stdout.splitlines()
    assert end == "done"
    assert done.stderr == ""
    assert len(said) == 5
    assert "shape (5000, 5000, 10, 10) needs 10,000,000,000 bytes" in said[0]
    assert "shape (50000, 50000) needs 10,000,000,000 bytes" in said[1]
    assert "shape (2, 50000, 50000) needs 20,000,000,000 bytes" in said[2]
    assert "a network of 10,000,700,001 parameters" in said[3]
    assert "the work for a kernel of shape (60, 60)" in said[4]
    for line in said:
        assert "bytes" in line.split(" needs ")[1]
        assert "are available; use " in line
        assert int(line.split(" and ")[1].split(" bytes")[0].replace(",", "")) <= 2**31


FLOW = ntkdp.KernelFlow(jnp.eye(30), jnp.zeros((30, 2)), SQUARED, RULE)
START = jnp.ones((30, 2))
STEPS: dict[str, Any] = {"learning_rate": 0.1, "steps": 3}


def train(**options: Any) -> Any:
    settings: Any = {**STEPS, "key": jax.random.key(0), **options}
    return ntkdp.dp_sgd.run(
        linear, jnp.ones((4, 2)), jnp.ones((30, 4)), jnp.zeros((30, 2)), SQUARED, RULE, **settings
    )


MANY = 2**31 - 1

STEPPED: dict[str, Any] = {
    "dp_sgd.run": train,
    "recursion": lambda **steps: ntkdp.recursion(FLOW, START, learning_rate=0.1, **steps),
    "ensemble": lambda **steps: ntkdp.stochastic_flow.ensemble(
        FLOW, START, learning_rate=0.1, key=jax.random.key(0), **steps
    ),
    "moments": lambda **steps: ntkdp.stochastic_flow.moments(
        FLOW, START, learning_rate=0.1, **steps
    ),
}


@pytest.mark.parametrize("name", STEPPED)
def test_steps_that_cannot_be_counted_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"steps must be at most 2,147,483,647, got 1,000,000,"):
        STEPPED[name](steps=10**12)


@pytest.mark.parametrize("name", STEPPED)
def test_records_that_do_not_fit_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**35)
    with pytest.raises(MemoryError, match=r"2,147,483,648 of 2,147,483,647 steps.*record_every"):
        STEPPED[name](steps=MANY)


def test_counted_steps_are_planned_without_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**32)
    stepping = Stepping(0.1, MANY, 10**8)
    assert len(stepping.recorded) == 23
    with pytest.raises(MemoryError, match="make fewer steps"):
        Stepping(lambda k: 0.1 / (1 + k), MANY, 10**8)


def test_whole_programs_are_asked_for_as_the_compiler_plans_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arguments are there already; outputs of every run at every time are not."""
    runs = 3000
    keys = jax.random.split(jax.random.key(0), runs)
    asked: list[int] = []
    enough = memory.require

    def listen(needed: int, what: str, ways_out: str) -> None:
        asked.append(needed)
        enough(needed, what, ways_out)

    monkeypatch.setattr(memory, "require", listen)
    found = ntkdp.stochastic_flow.ensemble(FLOW, START, **STEPS, outputs=True, key=keys)
    assert found.outputs is not None
    recorded = found.outputs.nbytes
    assert recorded == runs * 4 * 30 * 2 * 8
    # Results, and the paths that they are put together from.
    assert recorded < max(asked) < 6 * recorded
    monkeypatch.setattr(memory, "require", enough)
    monkeypatch.setattr(memory, "available_bytes", lambda: max(asked) - 1)
    with pytest.raises(MemoryError, match=r"drawing 3,000 runs of 3 steps .* fewer runs"):
        ntkdp.stochastic_flow.ensemble(FLOW, START, **STEPS, outputs=True, key=keys)
    monkeypatch.setattr(memory, "available_bytes", lambda: recorded)
    with pytest.raises(MemoryError, match=r"training 3,000 runs of 3 steps .* fewer runs"):
        train(key=keys, outputs=True)


def test_flows_and_noise_ask_for_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, targets = jnp.eye(30), jnp.zeros((30, 2))
    monkeypatch.setattr(memory, "available_bytes", lambda: 30 * 30 * 8 - 1)
    with pytest.raises(MemoryError, match=r"KernelFlow.* needs 7,200 bytes .* LinearisedFlow"):
        ntkdp.KernelFlow(kernel, targets, SQUARED, RULE)
    layered = ntkdp.LayerwiseKernel(("a", "b"), jnp.stack([kernel, kernel]))
    with pytest.raises(MemoryError, match="needs 7,200 bytes"):
        ntkdp.KernelFlow(layered, targets, SQUARED, RULE)
    with pytest.raises(MemoryError, match="needs 28,800 bytes"):
        ntkdp.KernelFlow(
            layered, targets, SQUARED, ntkdp.clipping.Abadi(1.0, scope="layerwise"),
            test_kernel=layered,
        )  # fmt: skip
    # Covariance, eigenvectors and the workspace of LAPACK.
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * 30 * 30 * 8 - 1)
    with pytest.raises(MemoryError, match=r"noise .* needs 28,800 bytes .* LinearisedFlow"):
        STEPPED["ensemble"](steps=2, noise_multiplier=1.0)
    STEPPED["ensemble"](steps=2)


def test_programs_on_a_mesh_are_asked_for_on_all_devices_of_a_host() -> None:
    mesh = jax.make_mesh((8,), ("samples",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("samples"))
    assert compiled._devices_that_share(jax.device_put(jnp.zeros(16), spread)) == 8
    assert compiled._devices_that_share((np.zeros(16), jnp.zeros(3))) == 1


SMALL: dict[str, Any] = {
    "data": {"n_train": 8, "n_test": 4},
    "model": {"widths": [16]},
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "training", [{"n_seeds": 10**9}, {"n_predicted": 10**9, "noise_multiplier": 1.0}]
)
def test_a_comparison_of_too_many_runs_is_refused_before_it_begins(
    training: dict[str, Any],
) -> None:
    config = ntkdp.experiment.config(
        **SMALL, training={"steps": 3, **training}, clipping=[{"clip_norm": 1.0}]
    )
    told: list[str] = []
    with pytest.raises(MemoryError, match=r"all of the work needs .*training\.n_seeds"):
        ntkdp.experiment.run(config, lambda what, done: told.append(what))
    assert told == ["loading data"]


def test_a_sweep_of_too_many_runs_is_refused_before_it_begins() -> None:
    config = ntkdp.sweep.config(**SMALL, training={"steps": 3, "n_seeds": 10**9})
    with pytest.raises(MemoryError, match=r"all of the work needs .*training\.n_seeds"):
        ntkdp.sweep.run(config)


def test_widths_and_steps_of_a_config_are_refused_by_name() -> None:
    with pytest.raises(ntkdp.experiment.ConfigError, match=r"training\.steps.*1000000000000"):
        ntkdp.experiment.config(training={"steps": 10**12})
    config = ntkdp.experiment.config(**{**SMALL, "model": {"widths": [10**12]}})
    with pytest.raises(MemoryError, match=r"a network of 75,000,000,000,010 parameters"):
        ntkdp.experiment.run(config)


def test_a_whole_comparison_asks_for_more_than_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise: the kernel of all points, its parts, a matrix of it and the root's four."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "require", lambda needed, *words: asked.append(needed))
    n, m, k = 24, 8, 10
    config = ntkdp.experiment.config(
        data={"n_train": n, "n_test": m}, model={"widths": [4]}, dtype="float32",
        predictions=["recursion"], clipping=[{"clip_norm": 1.0}],
        training={"steps": 2, "noise_multiplier": 1.0, "n_predicted": 2},
    )  # fmt: skip
    problem = ntkdp.experiment.problem_of(config)
    asked.clear()
    _run._require_room(config, problem)
    parts, whole = k * k * n * (n + m) * 4, k * k * (n + m) ** 2 * 4
    matrices = parts + whole + parts + 4 * whole
    assert matrices <= asked[0] < matrices * 1.1


def test_init_that_jax_cannot_follow_is_called_all_the_same() -> None:
    """Its sizes are not known before; that is no reason to refuse it."""

    def init(key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.asarray(np.ones((x.shape[1], 1)) * float(jax.random.uniform(key)))

    model = ntkdp.models.from_function(init, linear)
    assert model.init(jax.random.key(0), jnp.ones((2, 3))).shape == (3, 1)
