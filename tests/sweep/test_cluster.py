"""A sweep on a cluster: the same numbers, whoever computes them and whoever is killed meanwhile."""

import json
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed
import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from ntkdp import cli, datasets, experiment, sweep
from ntkdp.sweep import _cluster, _workers

RATES, NORMS = [0.3, 3.0], [0.01, 0.1, 1.0]
GRID = {"learning_rates": RATES, "clip_norms": NORMS, "noise_multipliers": [0.0]}
#: With samples drawn at random, and quick to compile.
SMALL: dict[str, Any] = {
    "loss": "squared_error",
    "data": {"n_train": 16, "n_test": 8},
    "model": {"widths": [32]},
    "training": {"steps": 6, "n_predicted": 2, "sample_rate": 0.5},
    "grid": GRID,
}


@pytest.fixture(scope="module")
def config() -> sweep.SweepConfig:
    return sweep.config(**SMALL)


@pytest.fixture(scope="module")
def alone(config: sweep.SweepConfig) -> sweep.Results:
    """The sweep without a cluster."""
    return sweep.run(config)


@pytest.fixture(scope="module")
def processes() -> Iterator[distributed.Client]:
    """Two worker processes, each with a nanny that starts it again when it dies."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="localhost:0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def threads() -> Iterator[distributed.Client]:
    """A worker in this process, which has compiled everything already."""
    with distributed.Client(
        processes=False,
        n_workers=1,
        threads_per_worker=1,
        dashboard_address="localhost:0",
        set_as_default=False,
    ) as client:
        yield client


def assert_same(one: sweep.Results, other: sweep.Results) -> None:
    """Bit for bit, but for what a clock said."""
    without = [results._replace(seconds={}) for results in (one, other)]
    paths = [jax.tree_util.tree_leaves_with_path(results) for results in without]
    for (path, mine), (same_path, theirs) in zip(*paths, strict=True):
        assert path == same_path
        np.testing.assert_array_equal(mine, theirs)


def wait_until(happened: Callable[[], bool]) -> None:
    """Look often, for a minute at most."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen within a minute")


@pytest.mark.slow
def test_a_killed_worker_loses_no_cell_and_changes_none(
    config: sweep.SweepConfig,
    alone: sweep.Results,
    processes: distributed.Client,
    tmp_path: Path,
) -> None:
    pids = processes.run(os.getpid)
    killed: list[int] = []
    said: list[tuple[str, float]] = []

    def kill_once(what: str, done: float) -> None:
        said.append((what, done))
        if what == "cell 2 of 6" and not killed:
            # The one that works: the cell that came back first was computed by either of them.
            working = [address for address, tasks in processes.processing().items() if tasks]
            killed.append(pids[working[0]])
            os.kill(killed[0], signal.SIGKILL)

    found = sweep.run(config, tmp_path / "out", client=processes, report=kill_once)
    assert killed
    assert killed[0] not in processes.run(os.getpid).values()
    assert_same(found, alone)
    assert found.notes == []
    cells = sorted(path.name for path in (tmp_path / "out" / "cells").iterdir())
    assert cells == [
        *(f"{number:05d}.npz" for number in range(6)),
        "ntkdp-files.sha256",
        "predicted.npz",
    ]
    of_cells = [done for what, done in said if what.startswith("cell")]
    assert of_cells == [number / 6 for number in range(6)]


@pytest.mark.slow
def test_the_command_by_address(
    alone: sweep.Results, processes: distributed.Client, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        "loss = 'squared_error'\ndata = {n_train = 16, n_test = 8}\nmodel = {widths = [32]}\n"
        "training = {steps = 6, n_predicted = 2, sample_rate = 0.5}\n"
        f"grid = {{learning_rates = {RATES}, clip_norms = {NORMS}, noise_multipliers = [0.0]}}\n"
    )
    out = tmp_path / "out"
    address = processes.scheduler_info()["address"]
    options = ["sweep", str(file), "--out", str(out), "--scheduler", address]
    shown = CliRunner().invoke(cli.app, options)
    assert shown.exit_code == 0, shown.output
    assert "written to" in shown.output
    (plane,) = json.loads((out / "metrics.json").read_text())["planes"]
    assert alone.observed is not None
    for number, cell in enumerate(plane["cells"]):
        assert cell["observed"] == alone.observed[0].cell(number)


def test_results_that_die_with_their_worker_are_computed_again(tmp_path: Path) -> None:
    """Finished and waiting to be fetched; what has been fetched is not computed again."""
    tasks = {name: (None, name, str(tmp_path)) for name in ("one", "two", "three")}
    with _cluster.connected("local", 1) as client:

        def statuses() -> list[str]:
            return [state.status for state in client.futures.values()]

        (pid,) = client.run(os.getpid).values()
        coming = _cluster.results(client, tempfile.mkdtemp, tasks)
        found = [next(coming)]
        wait_until(lambda: statuses() == ["finished"] * 2)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "finished" not in statuses())
        found += coming
    assert sorted(name for name, _ in found) == sorted(tasks)
    made = [len(list(tmp_path.glob(f"{name}*"))) for name in tasks]
    assert made == [1, 2, 2]
    assert all(Path(folder).exists() for _, folder in found)


def test_a_result_that_fails_when_computed_again_is_named(tmp_path: Path) -> None:
    tasks = {name: (str(tmp_path / name),) for name in ("one", "two")}
    with _cluster.connected("local", 1) as client:
        (pid,) = client.run(os.getpid).values()
        coming = _cluster.results(client, os.mkdir, tasks)
        next(coming)
        wait_until((tmp_path / "two").exists)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(_cluster.TaskFailed, match=r"^two: FileExistsError"):
            list(coming)


@pytest.mark.slow
def test_what_kills_every_worker_is_named(processes: distributed.Client) -> None:
    cluster: Any = processes.cluster
    scheduler = cluster.scheduler
    allowed, scheduler.allowed_failures = scheduler.allowed_failures, 1
    # The scheduler cannot tell which of a worker's tasks it was.
    blamed = r"^cell 7: 2 workers died while it ran there or was next in line, .*memory"
    try:
        with pytest.raises(_cluster.TaskFailed, match=blamed):
            list(_cluster.results(processes, os._exit, {"cell 7": (9,)}))
    finally:
        scheduler.allowed_failures = allowed


def test_finished_cells_are_not_sent(
    config: sweep.SweepConfig,
    alone: sweep.Results,
    threads: distributed.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep.run(config, tmp_path)
    lost = [1, 4]
    for number in lost:
        (tmp_path / "cells" / f"{number:05d}.npz").unlink()
    sent: list[sweep.Cell] = []
    observe = _workers.observe

    def counted(*arguments: Any) -> Any:
        sent.append(arguments[-1])
        return observe(*arguments)

    monkeypatch.setattr(_workers, "observe", counted)
    assert_same(sweep.run(config, tmp_path, resume=True, client=threads), alone)
    assert sorted(sent) == [alone.cells[number] for number in lost]
    sent.clear()
    assert_same(sweep.run(config, tmp_path, resume=True, client=threads), alone)
    assert sent == []


def test_a_cell_that_fails_is_named_and_the_others_are_kept(
    config: sweep.SweepConfig,
    alone: sweep.Results,
    threads: distributed.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observe = _workers.observe

    def fail_at_four(*arguments: Any) -> Any:
        if arguments[-1] == alone.cells[4]:
            raise MemoryError("too large")
        return observe(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(_workers, "observe", fail_at_four)
        named = (
            r"cell 4 \(flat abadi, no noise, learning rate 3, clipping norm 0.1\): MemoryError: too"
        )
        with pytest.raises(_cluster.TaskFailed, match=named):
            sweep.run(config, tmp_path, client=threads)
    kept = sorted(path.name for path in (tmp_path / "cells").iterdir())
    assert kept == [
        *(f"{number:05d}.npz" for number in range(4)),
        "ntkdp-files.sha256",
        "predicted.npz",
    ]
    assert_same(sweep.run(config, tmp_path, resume=True, client=threads), alone)


def test_a_worker_must_have_what_the_sweep_has(
    config: sweep.SweepConfig, alone: sweep.Results
) -> None:
    told = _workers.instructions(config, experiment.problem_of(config))
    there = (alone.planes[0], alone.cells[0])
    assert alone.observed is not None
    content = _workers.observe_on_worker(told, *there)
    assert content["metrics"] == alone.observed[0].cell(0)
    with pytest.raises(RuntimeError, match=r"the worker has ntkdp .*, the sweep ntkdp 0\.0\.1"):
        _workers.observe_on_worker(told._replace(version="0.0.1"), *there)


def write_table(path: Path, row: int | None = None, factor: float = 1.0) -> Path:
    """A data file of 24 samples, one of them perhaps with other features."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(24, 3)), generator.normal(size=24)
    if row is not None:
        x[row] *= factor
    np.savez(path, x=x, y=y)
    return path


def of_table(path: Path) -> tuple[sweep.SweepConfig, int]:
    """A sweep of one cell on the data file, and a row of it that is a test sample."""
    config = sweep.config(
        loss="squared_error",
        objective="loss",
        prediction="empirical",
        data={"name": str(path), "n_train": 16, "n_test": 8, "standardise": "none"},
        model={"widths": [32], "activation": "relu"},
        training={"steps": 2},
        grid={"learning_rates": [0.1], "clip_norms": [1.0], "noise_multipliers": [0.0]},
    )
    data = datasets.load(path, n_train=16, n_test=8, standardise="none", seed=config.seed)
    x = np.load(path)["x"]
    return config, np.flatnonzero((x == np.asarray(data.x_test[3])).all(axis=1)).item()


@pytest.mark.slow
def test_a_worker_with_another_test_sample_is_refused(
    threads: distributed.Client, tmp_path: Path
) -> None:
    """And no longer when it has the same file."""
    path = write_table(tmp_path / "table.npz")
    config, row = of_table(path)
    here = sweep.run(config)

    def exchange(what: str, done: float) -> None:
        if what.startswith("cell"):  # All that is done here is done.
            write_table(path, row, 1.01)

    refused = r"other data: at the start .* of the test part .*table.npz' must be the same there"
    with pytest.raises(_cluster.TaskFailed, match=refused):
        sweep.run(config, tmp_path / "out", client=threads, report=exchange)
    write_table(path)
    assert_same(sweep.run(config, tmp_path / "out", client=threads, resume=True), here)


def test_an_infinite_loss_at_the_start_is_no_other_data(
    threads: distributed.Client, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "table.npz")
    config, row = of_table(path)
    write_table(path, row, 1e200)
    here = sweep.run(config)
    assert here.initial.test_loss == np.inf
    assert_same(sweep.run(config, client=threads), here)


def test_an_undefined_loss_at_the_start_is_no_other_data(tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.npz")
    config, row = of_table(path)
    write_table(path, row, 1e308)
    problem = experiment.problem_of(config)
    assert np.isnan(problem.test_outputs).any()
    told = _workers.instructions(config, problem)
    _, made = _workers._problem(told)
    # As if it came again, from elsewhere: the same is not made twice.
    assert _workers._problem(pickle.loads(pickle.dumps(told)))[1] is made
    write_table(path)
    told = _workers.instructions(config, experiment.problem_of(config))
    write_table(path, row, 1e308)
    with pytest.raises(RuntimeError, match=r"other data: .*test part is nan"):
        _workers._problem(told)


@pytest.mark.slow
def test_precision_is_that_of_the_sweep(alone: sweep.Results) -> None:
    """Single precision travels, though 64 bits are on in the process of the worker."""
    single = sweep.config(**SMALL | {"dtype": "float32"})
    there = (alone.planes[0], alone.cells[0])
    with jax.enable_x64(False):
        problem = experiment.problem_of(single)
        here = _workers.observe(single, problem, *there)
        told = _workers.instructions(single, problem)
    assert jax.config.read("jax_enable_x64")
    assert _workers.observe_on_worker(told, *there)["metrics"] == here["metrics"]
    assert np.float32(here["metrics"]["test_loss"]) == here["metrics"]["test_loss"]


def test_a_client_must_be_one(threads: distributed.Client) -> None:
    with pytest.raises(TypeError, match=r"client must be a distributed.Client.*got 'tcp"):
        list(_cluster.results("tcp://host:8786", abs, {"one": (1,)}))  # type: ignore[arg-type]
    assert list(_cluster.results(threads, abs, {})) == []
    assert dict(_cluster.results(threads, abs, {"one": (1,), "two": (-2,)})) == {
        "one": 1,
        "two": 2,
    }


@pytest.mark.parametrize("closed", [True, False])
def test_a_client_that_does_not_do_is_refused_before_any_work(
    config: sweep.SweepConfig, tmp_path: Path, closed: bool
) -> None:
    client: Any = "tcp://host:8786"
    if closed:
        with distributed.Client(
            processes=False, n_workers=0, dashboard_address="localhost:0", set_as_default=False
        ) as client:
            pass
    said: list[str] = []
    message = "client must be connected" if closed else "client must be a distributed.Client"
    with pytest.raises((ConnectionError, TypeError), match=message):
        sweep.run(config, tmp_path, client=client, report=lambda what, done: said.append(what))
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_predictions_need_no_client(
    config: sweep.SweepConfig, alone: sweep.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    unused: Any = "no client at all"
    found = sweep.run(config.model_copy(update={"observe": False}), client=unused)
    assert found.observed is None
    np.testing.assert_array_equal(found.predicted[0].loss, alone.predicted[0].loss)


def test_a_scheduler_without_workers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster, "_SECONDS_TO_A_WORKER", 0.2)
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, dashboard_address="localhost:0"
        ) as empty,
        distributed.Client(empty, set_as_default=False) as client,
        pytest.raises(ConnectionError, match=r"has no worker; start some with `dask worker inproc"),
    ):
        list(_cluster.results(client, abs, {"one": (1,)}))


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:9", "127.0.0.1:9", "nonsense", "wrong://host:1", "tls://127.0.0.1:9", ""],
)
def test_an_address_without_a_scheduler_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cluster, "_SECONDS_TO_CONNECT", 0.5)
    out = tmp_path / "out"
    shown = CliRunner().invoke(cli.app, ["sweep", "--scheduler", address, "--out", str(out)])
    assert shown.exit_code == 2
    assert f"no scheduler at {address!r}" in shown.output
    assert "start one with `dask scheduler`" in shown.output
    assert not out.exists()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20])
def test_what_is_no_scheduler_is_named(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster, "_SECONDS_TO_CONNECT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)
                connection.settimeout(10)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            pytest.raises(ConnectionError, match=f"no scheduler at '{address}'"),
            _cluster.connected(address),
        ):
            pass
        thread.join()


def test_a_worker_is_no_scheduler(threads: distributed.Client) -> None:
    (address,) = threads.scheduler_info()["workers"]
    with (
        pytest.raises(ConnectionError, match=r"\(a worker is there\)"),
        _cluster.connected(address),
    ):
        pass


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    options = ["sweep", "--scheduler", "local", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(cli.app, options)
    assert shown.exit_code == 2
    assert 'pip install "ntkdp[cluster]"' in shown.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--workers", "2"], ["--scheduler", "tcp://host:1", "--workers", "2"]]
)
def test_workers_are_of_a_local_cluster(options: list[str]) -> None:
    shown = CliRunner().invoke(cli.app, ["sweep", *options])
    assert shown.exit_code == 2
    assert "--workers needs --scheduler local" in shown.output


def test_a_local_cluster_is_as_large_as_asked() -> None:
    with _cluster.connected("local", 1) as client:
        assert [worker["nthreads"] for worker in client.scheduler_info()["workers"].values()] == [1]
        pids = client.run(os.getpid)
        assert os.getpid() not in pids.values()
        assert dict(_cluster.results(client, abs, {"one": (-1,)})) == {"one": 1}
    assert client.status == "closed"


def test_a_lost_scheduler_is_said() -> None:
    cluster = distributed.LocalCluster(
        n_workers=1, processes=False, dashboard_address="localhost:0"
    )
    with distributed.Client(cluster, set_as_default=False) as client:
        coming = _cluster.results(client, abs, {"one": (-1,), "two": (-2,)})
        next(coming)
        cluster.close()
        with pytest.raises(ConnectionError, match="was lost during"):
            list(coming)
