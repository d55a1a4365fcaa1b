"""Run folders: whole or not at all, in every kind of place, and nobody's files are lost."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ntkdp import cli
from ntkdp._results.checkpoints import CellFolder
from ntkdp._results.own_files import LIST, OwnFiles
from ntkdp._results.provenance import VERSION
from ntkdp._results.run_folder import MARKER, RunFolder


def put(folder: RunFolder, number: int, names: tuple[str, ...] = ("report.html",)) -> None:
    """A run of this number, in these files besides its marker."""
    with folder.replacing() as path:
        for name in (*names, MARKER):
            with OwnFiles(path).replacing(name) as temporary:
                temporary.write_text(json.dumps({"ntkdp": VERSION, "config": number}))


def number_in(path: Path) -> int:
    """Of the run that is there, whole."""
    (found,) = {json.loads(file.read_text())["config"] for file in path.glob("*.[hj]*")}
    return int(found)


def test_a_run_is_replaced_whole(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    put(RunFolder(run), 1, ("report.html", "old.html"))
    assert {path.name for path in run.iterdir()} == {LIST, MARKER, "report.html", "old.html"}
    with pytest.raises(FileExistsError, match="holds another run; pass --overwrite to replace it"):
        RunFolder(run)
    put(RunFolder(run, overwrite=True), 2)
    assert {path.name for path in run.iterdir()} == {LIST, MARKER, "report.html"}
    assert number_in(run) == 2
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert stat.S_IMODE(run.stat().st_mode) & stat.S_IROTH


def test_the_list_is_one_of_sha256sum(tmp_path: Path) -> None:
    put(RunFolder(tmp_path / "run"), 1)
    command = ["sha256sum", "--check", "--quiet", "--strict", LIST]
    done = subprocess.run(command, cwd=tmp_path / "run", capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_folders_that_are_not_runs_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"files that are not a run: thesis.tex; choose"):
        RunFolder(tmp_path, overwrite=True)
    # A sweep, and another program's folder, have files of this name too.
    first = json.dumps({"ntkdp": "0", "config": {}})
    for names, text in ((["metrics.json"], '{"loss": 1}'), (["metrics.json", "sweep.json"], first)):
        other = tmp_path / str(len(names))
        other.mkdir()
        for name in names:
            (other / name).write_text(text)
        with pytest.raises(FileExistsError, match=r"files that are not a run: metrics.json"):
            RunFolder(other, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        RunFolder(tmp_path / "thesis.tex" / "run")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", [MARKER, "sweep.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_read(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Reading it would wait for ever, or never end."""
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(FileExistsError, match=rf"files that are not a run: {name}; choose"):
        RunFolder(tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match=rf"files that are not a run: {name}; choose"):
        RunFolder(tmp_path, finished={"seed": 1})
    options: list[dict[str, Any]] = [{}, {"overwrite": True}, {"resume": True}]
    for option in options:
        with pytest.raises(FileExistsError, match=rf"files that are not a sweep: {name}; choose"):
            CellFolder(tmp_path, {"seed": 1}, **option)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_of_an_earlier_version_has_no_list_and_stays(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"ntkdp": VERSION, "config": {"seed": 1}}))
    with pytest.raises(FileExistsError, match=rf"holds a run, and .*: {MARKER}; nothing is remov"):
        RunFolder(tmp_path, overwrite=True)
    assert RunFolder(tmp_path, finished={"seed": 1}).is_finished


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    put(RunFolder(tmp_path / "run"), 1)
    again = RunFolder(tmp_path / "run", overwrite=True)

    class Failed(Exception):
        pass

    def fail_half_way() -> None:
        with again.replacing() as path:
            with OwnFiles(path).replacing(MARKER) as temporary:
                temporary.write_text("second")
            raise Failed

    with pytest.raises(Failed):
        fail_half_way()
    assert number_in(tmp_path / "run") == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"run", LIST, MARKER, "report.html"}


def test_the_current_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(RunFolder(Path()), 1)
    put(RunFolder(Path(), overwrite=True), 2)
    assert number_in(tmp_path) == 2
    assert Path.cwd().samefile(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "disk")
    put(RunFolder(link), 1)
    put(RunFolder(link, overwrite=True), 2)
    assert link.is_symlink()
    assert number_in(tmp_path / "disk") == 2
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="broken is a link to no folder"):
        RunFolder(tmp_path / "broken")


@pytest.mark.parametrize("n_moved", range(8))
def test_killed_while_files_are_put_in_place_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_moved: int
) -> None:
    put(RunFolder(tmp_path), 1, ("a.html", "b.html"))
    change: dict[str, Callable[..., None]] = {"rename": os.rename, "unlink": os.unlink}
    done: list[str] = []

    def slow(name: str) -> Callable[..., None]:
        def changed(source: Path, *rest: Any, **options: Any) -> None:
            if not os.path.basename(source).endswith(".tmp"):
                done.append(name)
                if len(done) > n_moved:
                    raise KeyboardInterrupt
            change[name](source, *rest, **options)

        return changed

    with monkeypatch.context() as patched:
        for name in change:
            patched.setattr(os, name, slow(name))
        with pytest.raises(KeyboardInterrupt):
            put(RunFolder(tmp_path, overwrite=True), 2, ("b.html", "c.html"))
    if (tmp_path / MARKER).exists():
        assert number_in(tmp_path) in (1, 2)
    put(RunFolder(tmp_path, overwrite=True), 3, ("d.html",))
    assert number_in(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == {LIST, MARKER, "d.html"}


@pytest.mark.parametrize("there", [True, False])
def test_what_comes_while_a_run_is_made_stays(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "run"
    if there:
        put(RunFolder(run), 1)
    folder = RunFolder(run, overwrite=True)

    def write() -> None:
        with folder.replacing() as path:
            with OwnFiles(path).replacing(MARKER) as temporary:
                temporary.write_text("{}")
            run.mkdir(exist_ok=True)
            (run / "thesis.tex").write_text("precious")

    with pytest.raises(FileExistsError, match=r"thesis.tex"):
        write()
    assert (run / "thesis.tex").read_text() == "precious"
    assert (run / MARKER).exists() == there


@pytest.mark.parametrize("there", [True, False])
def test_one_process_at_a_time_puts_a_run_in_place(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "run"
    if there:
        run.mkdir()
    first, second = RunFolder(run), RunFolder(run)
    with first.replacing() as path:
        with pytest.raises(BlockingIOError, match="another ntkdp is at work"):
            put(second, 2)
        with OwnFiles(path).replacing(MARKER) as temporary:
            temporary.write_text(json.dumps({"ntkdp": VERSION, "config": 1}))
    assert number_in(run) == 1
    with pytest.raises(FileExistsError, match="holds another run"):
        put(second, 2)


def test_a_disk_that_is_full_as_a_run_is_put_in_place_can_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that was cut short would be taken for somebody else's file."""

    def full(source: Path, target: Path) -> None:
        Path(target).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            put(RunFolder(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []
    put(RunFolder(tmp_path), 1)
    assert number_in(tmp_path) == 1


def test_copies_by_hard_links_keep_their_content(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    put(RunFolder(run), 1)
    shutil.copytree(run, copy, copy_function=os.link)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    put(RunFolder(run, overwrite=True), 2)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert number_in(run) == 2


MOUNTS = """
import json, subprocess, sys
from pathlib import Path
from ntkdp._results.checkpoints import CellFolder
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.run_folder import RunFolder

def put(overwrite):
    folder = RunFolder(Path("run"), overwrite=overwrite)
    with folder.replacing() as path, OwnFiles(path).replacing("metrics.json") as temporary:
        temporary.write_text(json.dumps({"ntkdp": "0", "config": overwrite}))

def grow(overwrite):
    folder = CellFolder(Path("sweep"), {"seed": overwrite}, overwrite=overwrite)
    with folder.growing():
        folder.write("00000", {"n": 3})

def mount(path):
    Path(path).mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)

# Folders that are mount points are filled and emptied.
mount("run")
mount("sweep")
for act in (put, grow):
    act(False)
    act(True)
assert json.loads(Path("run/metrics.json").read_text())["config"] is True
assert json.loads(Path("sweep/sweep.json").read_text())["seed"] is True
assert Path("run").is_mount() and Path("sweep").is_mount()
# What is mounted inside one is not touched, and nothing else is.
mount("sweep/cells")
Path("sweep/cells/thesis.tex").write_text("precious")
mount("run/notes")
before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
for act, name in ((put, "notes/"), (grow, "cells/")):
    try:
        act(True)
    except FileExistsError as error:
        assert name in str(error), error
    else:
        raise AssertionError("removed")
assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before
"""


def _can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="nothing can be mounted here")
def test_mount_points(tmp_path: Path) -> None:
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", MOUNTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Path("runs") / ("x" * 230), "is too long: a name in it has 230 bytes, of at most 215"),
        (Path("runs", *["x" * 100] * 40), r"is too long: its path has \d+ bytes"),
        (Path("runs") / "caf\udce9", r"'runs/caf\\udce9' is not UTF-8 text"),
        (Path("runs") / "a\0b", r"has a zero byte"),
        (Path("nowhere") / "..", r"nowhere/.. has no name"),
    ],
)
def test_a_path_that_no_folder_can_have_is_refused_at_once(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunFolder(path)


def test_a_deep_path_is_made(tmp_path: Path) -> None:
    put(RunFolder(tmp_path.joinpath(*["d"] * 1500, "run")), 1)
    assert number_in(tmp_path.joinpath(*["d"] * 1500, "run")) == 1
    # Python would remove it by a function that calls itself for every folder.
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)


@pytest.mark.parametrize("verb", ["compare", "sweep", "verify"])
@pytest.mark.parametrize("out", ["x" * 230, "x/" * 2000, "caf\udce9"])
def test_commands_refuse_such_a_path_in_one_line_before_any_work(verb: str, out: str) -> None:
    shown = CliRunner().invoke(cli.app, [verb, "--out", out])
    assert shown.exit_code == 2
    assert shown.output.startswith("ntkdp: error: output folder ")
    assert shown.output.endswith("choose another --out\n")
    assert len(shown.output.splitlines()) == 1
