"""Kills, full disks, damaged files, too little memory: nothing is half-written, and work that is
resumed ends with the numbers of work that was left alone.

The environment variable NTKDP_KILLS says how many processes are killed at random moments.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from typer.testing import CliRunner, Result

from ntkdp import cli, experiment
from ntkdp._results import figure_style
from ntkdp._results.own_files import LIST, OwnFiles
from ntkdp._results.provenance import VERSION
from ntkdp._results.run_folder import RunFolder
from ntkdp.experiment import _run

KILLS = int(os.environ.get("NTKDP_KILLS", "2"))
PROBLEM = "loss = 'squared_error'\ndata = {n_train = 16, n_test = 8}\nmodel = {widths = [32]}\n"
CONFIGS = {
    "sweep": PROBLEM + "training = {steps = 1000, n_predicted = 2, sample_rate = 0.5}\n"
    "[grid]\nlearning_rates = [0.1, 0.2, 0.4]\nclip_norms = [0.1, 1.0, 10.0]\n"
    "noise_multipliers = [0.0]\n",
    "compare": PROBLEM + "predictions = ['recursion']\n"
    "training = {steps = 200, record_every = 20, n_predicted = 8, sample_rate = 0.5}\n"
    + "".join(f"[[clipping]]\nclip_norm = {norm}\n" for norm in (0.1, 0.3, 1.0)),
}


def _command(verb: str, folder: Path) -> list[str]:
    """The verb, its small configuration and its output folder."""
    config = folder / f"{verb}.toml"
    config.write_text(CONFIGS[verb])
    (folder / "runs").mkdir(exist_ok=True)
    return [verb, str(config), "--out", str(folder / "runs" / "out")]


def _growing(verb: str, out: Path) -> Path:
    """Where finished cells and cases are until the end, in a folder that is not there before."""
    return out if verb == "sweep" else out.with_name(f".{out.name}-partial")


def _finished(out: Path, settings: dict[str, Any]) -> None:
    """A run folder with so much as it is known by."""
    with RunFolder(out).replacing() as path, OwnFiles(path).replacing("metrics.json") as temporary:
        temporary.write_text(json.dumps({"ntkdp": VERSION, "config": settings}))


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def _said_in_one_line(shown: Result) -> str:
    """What a failed command printed."""
    assert shown.exit_code == 2, shown.output
    assert shown.output.startswith("ntkdp: error: ")
    assert len(shown.output.splitlines()) == 1
    return shown.output


def _measured(out: Path) -> Any:
    """What a folder holds, bit for bit, but for what a clock said."""
    assert not list(out.parent.rglob(".*"))
    tree = json.loads((out / "metrics.json").read_text())
    for name in ("seconds", "speed_up", "kernel_seconds"):
        tree.pop(name, None)
    for entry in tree.get("results", []):
        entry.pop("seconds")
    arrays = {}
    if (out / "trajectories.nc").exists():
        with xr.open_datatree(out / "trajectories.nc", engine="h5netcdf") as paths:
            arrays = {
                f"{node.path}/{name}": (part.dims, part.dtype, part.values.tobytes())
                for node in paths.subtree
                for name, part in node.variables.items()
            }
            assert len(arrays) > 10
    return tree, {path.name for path in out.iterdir()}, arrays


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in this process are files without one: to draw them takes most of the time."""
    monkeypatch.setattr(
        figure_style, "draw_into", lambda path, *_, **__: path.write_bytes(b"drawn")
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a verb measures when it is left alone."""

    @cache
    def measure(verb: str) -> Any:
        folder = tmp_path_factory.mktemp(verb)
        shown = _invoke(*_command(verb, folder))
        assert shown.exit_code == 0, shown.output
        return _measured(folder / "runs" / "out")

    return measure


def _killed_until_it_ends(verb: str, folder: Path, most: int, moments: random.Random) -> int:
    """Run, kill and resume until the end; how many kills there were."""
    command = _command(verb, folder)
    out = folder / "runs" / "out"
    growing = _growing(verb, out)
    kills = 0
    while True:
        there = len(list(growing.glob("cells/0*.npz")))
        begun = (growing / ("sweep.json" if verb == "sweep" else "run.json")).exists()
        resume = ["--resume"] if begun or (out / "metrics.json").exists() else []
        # The process compiles as the tests do: conftest has set XLA_FLAGS.
        process = subprocess.Popen(
            [sys.executable, "-c", "from ntkdp.cli import main; main()", *command, *resume],
            stdout=subprocess.DEVNULL,
        )
        with process:
            if kills < most:
                # In turn after some cells and at any time: while Python starts, a kernel is made,
                # or before the first cell is there.
                wanted = there + (moments.randint(1, 3) if kills % 2 == 0 else 0)
                time.sleep(moments.uniform(0, 10) if wanted == there else 0)
                while process.poll() is None:
                    if len(list(growing.glob("cells/0*.npz"))) >= wanted or (
                        verb == "compare" and out.exists()
                    ):
                        time.sleep(moments.uniform(0, 0.5))
                        process.send_signal(signal.SIGKILL)
                        break
                    time.sleep(0.01)
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL
        assert not (verb == "compare" and out.exists() and not (out / "metrics.json").exists())
        kills += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "kills"),
    [
        ("sweep", KILLS - KILLS // 2),
        # Its cases are cells, as those of a sweep.
        ("compare", max(KILLS // 2, 1)),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_numbers(
    verb: str, kills: int, undisturbed: Callable[[str], Any], tmp_path: Path
) -> None:
    expected = undisturbed(verb)
    moments = random.Random(verb)
    number = 0
    while kills > 0:
        folder = tmp_path / str(number)
        folder.mkdir()
        kills -= _killed_until_it_ends(verb, folder, min(kills, 3), moments)
        assert _measured(folder / "runs" / "out") == expected
        number += 1
        assert number <= 2 * KILLS, "the processes end before they are killed"


class _FullDisk:
    """A disk that is full once it comes to a file of some name, half of which it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        for method in ("write_text", "write_bytes"):
            monkeypatch.setattr(Path, method, self._half(getattr(Path, method), name))

    @staticmethod
    def _half(write: Callable[..., int], name: str) -> Callable[..., int]:
        def half(path: Path, content: Any, *arguments: Any, **options: Any) -> int:
            if name not in path.name:
                return write(path, content, *arguments, **options)
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return half


@pytest.mark.slow
def test_a_sweep_on_a_full_disk(
    undisturbed: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn_empty: None,
) -> None:
    command, out = _command("sweep", tmp_path), tmp_path / "runs" / "out"
    for name, resume, continues in (
        ("00002.npz", [], True),
        ("metrics.json", ["--resume"], False),
    ):
        with monkeypatch.context() as patched:
            _FullDisk(patched, name)
            said = _said_in_one_line(_invoke(*command, *resume))
        assert "No space left on device" in said
        assert ("--resume continues" in said) >= continues
        assert not list(tmp_path.rglob(".*"))
        assert not (out / "metrics.json").exists()
    assert len(list(out.glob("cells/*.npz"))) == 10
    shown = _invoke(*command, "--resume")
    assert shown.exit_code == 0, shown.output
    assert _measured(out) == undisturbed("sweep")


@pytest.mark.slow
def test_a_comparison_on_a_full_disk_and_a_damaged_case(
    undisturbed: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured first: below, every measured case counts.
    expected = undisturbed("compare")
    command, out = _command("compare", tmp_path), tmp_path / "runs" / "out"
    partial = _growing("compare", out)
    for name, resume, n_cases in (("00001.npz", [], 1), ("report.html", ["--resume"], 3)):
        with monkeypatch.context() as patched:
            _FullDisk(patched, name)
            said = _said_in_one_line(_invoke(*command, *resume))
        assert "No space left on device" in said
        assert [path.name for path in out.parent.iterdir()] == [partial.name]
        assert {path.name for path in partial.iterdir()} == {LIST, "cells", "run.json"}
        assert len(list((partial / "cells").glob("*.npz"))) == n_cases

    # What is left of a killed run is neither forgotten nor mixed with another's.
    said = _said_in_one_line(_invoke(*command))
    assert ".out-partial holds a run; pass --resume to continue it" in said
    other = Path(command[1])
    other.write_text("seed = 1\n" + CONFIGS["compare"])
    said = _said_in_one_line(_invoke(*command, "--resume"))
    assert "has other settings (seed: 0 there, 1 now)" in said
    other.write_text(CONFIGS["compare"])

    damaged = partial / "cells" / "00002.npz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    measure = _run._measured
    made: list[float] = []

    def counted(*arguments: Any) -> Any:
        made.append(arguments[3].clip_norm)
        return measure(*arguments)

    monkeypatch.setattr(_run, "_measured", counted)
    shown = _invoke(*command, "--resume")
    assert shown.exit_code == 0, shown.output
    assert f"{damaged} is damaged" in shown.output
    assert made == [1.0]
    assert _measured(out) == expected

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shown = _invoke(*command, "--resume")
    assert shown.exit_code == 0, shown.output
    assert "holds the finished run already" in shown.output
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert made == [1.0]


def test_a_run_that_replaces_another_is_continued_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = _command("compare", tmp_path), tmp_path / "runs" / "out"
    config = tmp_path / "other.toml"
    config.write_text("seed = 1\n" + CONFIGS["compare"])
    _finished(out, experiment.load_config(config).model_dump(mode="json"))
    measure = _run._measured
    done: list[Any] = []

    def stopped(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(measure(*arguments))
        return done[0]

    monkeypatch.setattr(_run, "_measured", stopped)
    shown = _invoke(*command, "--overwrite")
    assert shown.exit_code == 130
    assert shown.output == f"ntkdp: stopped; --out {out} --resume --overwrite continues\n"
    cell = out / ".partial" / "cells" / "00000.npz"
    assert cell.exists()
    said = _said_in_one_line(_invoke(*command, "--resume"))
    assert "pass --overwrite with --resume to replace it with the resumed run" in said
    # The finished run is another one: it does not take these cases with it.
    shown = _invoke("compare", str(config), *command[2:], "--resume")
    assert shown.exit_code == 0, shown.output
    assert "holds the finished run already" in shown.output
    assert cell.exists()
    assert _invoke(*command, "--resume", "--overwrite").exit_code == 130
    assert len(done) == 1
    assert cell.exists()


def test_resuming_a_comparison_needs_something_to_resume(tmp_path: Path) -> None:
    command, out = _command("compare", tmp_path), tmp_path / "runs" / "out"
    assert "no run to resume" in _said_in_one_line(_invoke(*command, "--resume"))
    assert "--resume needs --out" in _said_in_one_line(_invoke(*command[:2], "--resume"))
    assert not list(out.parent.iterdir())
    _finished(out, {})
    said = _said_in_one_line(_invoke(*command, "--resume"))
    assert "holds another run; pass --overwrite with --resume" in said
    assert "no run to resume" in _said_in_one_line(_invoke(*command, "--resume", "--overwrite"))
    assert {path.name for path in out.iterdir()} == {LIST, "metrics.json"}


@pytest.mark.parametrize("verb", CONFIGS)
def test_too_little_memory_is_said_with_the_ways_out(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkdp._backend.memory.available_bytes", lambda: 1000)
    said = _said_in_one_line(_invoke(*_command(verb, tmp_path)))
    assert "bytes" in said
    assert "1,000 bytes" in said
    assert "batch_size" in said or "float32" in said
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("verb", CONFIGS)
def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    verb: str, tmp_path: Path
) -> None:
    command = _command(verb, tmp_path)
    file = tmp_path / "file"
    file.write_text("precious")
    said = _said_in_one_line(_invoke(*command[:-1], str(file / "out")))
    assert f"{file} is not a folder" in said
    assert file.read_text() == "precious"


@pytest.mark.parametrize("verb", CONFIGS)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(verb: str, tmp_path: Path) -> None:
    command = _command(verb, tmp_path)
    runs = tmp_path / "runs"
    runs.chmod(0o555)
    assert f"{runs} cannot be written to" in _said_in_one_line(_invoke(*command))


TOO_LARGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import jax.numpy as jnp
import ntkdp
t = jnp.arange(2000.0)
try:
    ntkdp.Trajectory(t, loss=t, clip_fraction=t).save(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_trajectory_larger_than_a_file_may_be_is_an_error_alone(tmp_path: Path) -> None:
    """In a process of its own, which ends well: HDF5 would crash it at its end."""
    command = [sys.executable, "-c", TOO_LARGE, str(tmp_path / "long.nc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "File too large" in done.stdout
    assert str(tmp_path / "long.nc") in done.stdout
    assert list(tmp_path.iterdir()) == []
