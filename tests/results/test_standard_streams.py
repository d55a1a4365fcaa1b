"""What commands print: literally, on any terminal, and one line if nothing can be printed."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ntkdp import claims, cli, experiment
from ntkdp._results import console as _console
from ntkdp._results import standard_streams
from ntkdp.claims import _claim
from ntkdp.cli import _progress_bar, _terminal
from ntkdp.cli._verification import run

ENTRY = "from ntkdp.cli import main; main()"
#: The command with a light application, for what is not its own.
LIGHT = (
    "import sys, types; sys.modules['ntkdp.cli._app'] = types.ModuleType('ntkdp.cli._app'); "
    "sys.modules['ntkdp.cli._app'].app = lambda: print('done')\n" + ENTRY
)
#: Markup of rich, control characters, a lone surrogate as in the name of a file, and letters.
ODD = "[/x] [red]a\x1b[31mb\nc\u202ed\udcffé±"
SHOWN = r"[/x] [red]a\x1b[31mb\nc\u202ed\udcffé±"


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("", 0, ""),
        (">/dev/full", 2, "standard output cannot be written to: No space left on device"),
        (">&-", 2, "standard output cannot be written to: Bad file descriptor"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">&- 2>&- <&-", 2, ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_streams_that_take_nothing(redirection: str, status: int, said: str) -> None:
    command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr == (f"ntkdp: error: {said}\n" if said else "")
    assert done.stdout == ("" if ">&-" in redirection.split() or status else "done\n")


def test_a_pipe_that_is_closed() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 2
    assert done.stderr == "ntkdp: error: standard output cannot be written to: Broken pipe\n"


def test_a_closed_stream_gives_its_number_to_no_data_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom ntkdp._results import standard_streams\nstandard_streams.replace()\n"
        "file = open(sys.argv[1], 'w')\nos.write(2, b'a warning')\nassert file.fileno() > 2\n"
    )
    file = tmp_path / "file"
    command = ["bash", "-c", '"$0" -c "$1" "$2" 2>&-', sys.executable, code, str(file)]
    subprocess.run(command, check=True, timeout=60)
    assert file.read_bytes() == b""


def test_text_is_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    assert standard_streams.printable(ODD) == SHOWN
    console = _console.open_console()
    _console.say(console, ODD)
    assert capsys.readouterr().out == SHOWN + "\n"
    _terminal.announce(ODD, on_error=True)
    assert capsys.readouterr().err == SHOWN + "\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "é ± ≤ 日"), ("latin-1", r"\xe9 +- <= \u65e5"), ("ascii", r"\xe9 +- <= \u65e5")],
)
def test_characters_that_the_terminal_lacks_are_spelled(encoding: str, shown: str) -> None:
    assert standard_streams.spelled("é ± ≤ 日", encoding) == shown


def test_a_terminal_in_ascii_takes_whatever_is_printed() -> None:
    code = (
        "from ntkdp._results import standard_streams as s; s.replace(); "
        "print('1 ± 2 \\u65e5 \\udcff')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "1 +- 2 \\u65e5 \\udcff\n"


def test_verdicts_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = (
        _claim.equal("q", 1.0, 1.0, within=0.5),
        _claim.at_most("q", 1.0, 2.0),
        _claim.at_least("q", math.inf, 2.0),
    )
    verdicts = tuple(
        claims.Verdict("C1", "it [/x] holds", "a", "derived", (finding,), 0.1)
        for finding in findings
    )
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr(sys, "stdout", plain)
    run.print_verdicts(run.Verification(verdicts, None, 1.0))
    plain.seek(0)
    lines = plain.read().splitlines()
    assert "it [/x] holds" in lines[1]
    assert "1 +- 0.5" in lines[1]
    assert "<= 2" in lines[2]
    assert ">= 2" in lines[3]
    # The columns stay where they are.
    assert len({line.rstrip().rfind(" ") for line in lines[1:4]}) == 1


def test_the_bar_shows_the_time_since_its_start_and_text_as_it_is() -> None:
    now, shown = [0.0], io.StringIO()
    console = Console(file=shown, force_terminal=True, width=160)
    with _progress_bar.progress_bar(console, clock=lambda: now[0]) as report:
        now[0] = 5.0
        report("one phase", 1.0)
        now[0] = 65.0
        report("the next [/x] [red]", 0.5)
    assert "0:01:05" in shown.getvalue()
    assert "the next [/x] [red]" in shown.getvalue()


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_files_that_are_not_there_have_their_own_names_in_one_line(verb: str) -> None:
    shown = CliRunner().invoke(cli.app, [verb, f"{ODD.replace(chr(0xDCFF), '')}.toml"])
    assert shown.exit_code == 2
    assert shown.output.startswith("ntkdp: error: config file does not exist: [/x] [red]a\\x1b[31m")
    assert len(shown.output.splitlines()) == 1


@pytest.mark.slow
def test_a_backend_that_matplotlib_does_not_know(tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "compare", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ntkdp: error: environment variable MPLBACKEND: ")
    assert "'nonsense'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_device_without_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*arguments: object, **options: object) -> None:
        jnp.zeros(2**50).block_until_ready()

    monkeypatch.setattr(experiment, "run", allocate)
    shown = CliRunner().invoke(cli.app, ["compare", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 2, shown.output
    assert shown.output.startswith("ntkdp: error: a device is out of memory (RESOURCE_EXHAUSTED")
    assert "batch_size" in shown.output
    assert len(shown.output.splitlines()) == 1


def test_other_errors_of_a_device_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(experiment, "run", fail)
    shown = CliRunner().invoke(cli.app, ["compare", "--out", str(tmp_path / "out")])
    assert isinstance(shown.exception, jax.errors.JaxRuntimeError)
