"""Ctrl-C and similar signals: one line, the status that shells know, nothing half written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import often_or_slow

ENTRY = "from ntkdp.cli import main; main()"
CONFIG = (
    "loss = 'squared_error'\ndata = {n_train = 16, n_test = 8}\nmodel = {widths = [32]}\n"
    "predictions = ['recursion']\ntraining = {steps = 20, record_every = 10}\n"
)
#: What a signal may find the main thread at; a line on standard output says when it is.
STATES = {
    "a loop": "print(flush=True)\nwhile True: pass",
    "a system call": "print(flush=True)\ntime.sleep(60)",
    "a callback that swallows errors": (
        "class Deaf:\n    def __del__(self):\n        print(flush=True)\n        time.sleep(60)\n"
        "Deaf()\ntime.sleep(60)"
    ),
    "a library that catches everything": (
        "try:\n    print(flush=True)\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)"
    ),
    "a lock that is never free": (
        "import threading\nlock = threading.Lock()\nlock.acquire()\nprint(flush=True)\n"
        "lock.acquire()"
    ),
}
PREPARED = (
    "import signal, sys, time\nfrom pathlib import Path\n"
    "from ntkdp._backend import files, stopping\n"
)


@pytest.fixture(autouse=True)
def _children_hear_signals() -> Iterator[None]:
    """Also if these tests run in the background of a shell, whose programs ignore some."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        # Until the end of the test: a handler, which a new program does not inherit.
        signal.signal(number, signal.default_int_handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def _stopped(code: str, number: int, *arguments: str) -> tuple[int, str, str]:
    """Status and output of a program that gets a signal once it has printed a line."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("state", STATES)
def test_a_signal_ends_the_process_whatever_it_is_at(state: str) -> None:
    code = f"{PREPARED}stopping.begin()\n{STATES[state]}"
    assert _stopped(code, signal.SIGINT) == (130, "", "ntkdp: stopped\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_nothing_half_written_stays_and_what_continues_is_said(name: str, tmp_path: Path) -> None:
    number = getattr(signal, name)
    code = (
        f"{PREPARED}stopping.begin()\nstopping.continued_by(lambda: '--resume')\n"
        "with files.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    print(flush=True)\n    time.sleep(60)\n"
    )
    expected = (128 + number, "", "ntkdp: stopped; --resume continues\n")
    assert _stopped(code, number, str(tmp_path / "file")) == expected
    assert list(tmp_path.iterdir()) == []


def test_what_must_happen_as_a_whole_does(tmp_path: Path) -> None:
    code = (
        f"{PREPARED}stopping.begin()\nwith stopping.as_a_whole():\n    print(flush=True)\n"
        "    time.sleep(0.5)\n    Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )
    assert _stopped(code, signal.SIGTERM, str(tmp_path / "file"))[0] == 143
    assert (tmp_path / "file").exists()


def test_a_signal_that_the_process_was_told_to_ignore_is_ignored() -> None:
    """As nohup does."""
    code = (
        f"{PREPARED}signal.signal(signal.SIGHUP, signal.SIG_IGN)\nstopping.begin()\n"
        "print(flush=True)\ntime.sleep(0.3)\nprint('done')\nstopping.end()\n"
    )
    assert _stopped(code, signal.SIGHUP) == (0, "done\n", "")


def test_at_the_end_signals_are_the_systems_again() -> None:
    code = f"{PREPARED}stopping.begin()\nstopping.end()\nprint(flush=True)\ntime.sleep(60)\n"
    assert _stopped(code, signal.SIGINT) == (-signal.SIGINT, "", "")


def test_a_signal_at_the_very_end_does_not_hang() -> None:
    """Nobody would hear it between the two steps of leaving signals to the system again."""
    code = (
        f"{PREPARED}import os\nstopping.begin()\nset_it = signal.set_wakeup_fd\n"
        "def late(descriptor):\n    set_it(descriptor)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.set_wakeup_fd = late\nprint(flush=True)\nstopping.end()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def _wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    """Until then, some hundredths of a second, Python itself starts."""
    status = Path(f"/proc/{process.pid}/status")
    while status.exists() and process.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def _interrupted(folder: Path, number: int, seconds: float) -> None:
    config, out = folder / "config.toml", folder / "out"
    config.write_text(CONFIG)
    command = [sys.executable, "-c", ENTRY, "compare", str(config), "--out", str(out)]
    # In a folder of its own, and compiling as the tests do: conftest has set XLA_FLAGS.
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _wait_until_it_listens(process)
        time.sleep(seconds)
        process.send_signal(number)
        output, errors = process.communicate(timeout=300)
    # While Python winds down, all being done, the system's own handler ends it: to shells the same.
    if process.returncode in (0, -number):
        assert (out / "metrics.json").exists()
        assert "report.html" in output
        return
    assert (process.returncode, output) == (128 + number, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith("ntkdp: stopped")
    assert not out.exists()
    names = {path.name for path in folder.iterdir()}
    assert names <= {"config.toml", ".out-partial"}
    # What has grown is whole, and the line says how it goes on.
    assert ("--resume continues" in errors) == (".out-partial" in names)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("seconds", often_or_slow([0.0, 0.5, 2.0, 6.0], [0.0, 2.0]))
def test_a_run_is_interrupted(seconds: float, tmp_path: Path) -> None:
    _interrupted(tmp_path, signal.SIGINT, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("tenth", range(10))
def test_a_run_is_interrupted_at_any_moment(name: str, tenth: int, tmp_path: Path) -> None:
    _interrupted(tmp_path, getattr(signal, name), 1.2 * tenth)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_a_sweep_on_worker_processes_is_interrupted_as_a_terminal_does(tmp_path: Path) -> None:
    """Ctrl-C goes to every process in the group; none prints a traceback or stays."""
    config = tmp_path / "config.toml"
    config.write_text(
        "data = {n_train = 16, n_test = 8}\nmodel = {widths = [8]}\ntraining = {steps = 100}\n"
        "grid = {clip_norms = [0.1, 1.0], noise_multipliers = [0.0]}\n"
    )
    command = [sys.executable, "-c", ENTRY, "sweep", str(config), "--out", str(tmp_path / "out")]
    command += ["--scheduler", "local", "--workers", "2"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        time.sleep(15)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("ntkdp: stopped") == 1
    assert "Traceback" not in errors
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("some worker has outlived the sweep")
