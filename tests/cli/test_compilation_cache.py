"""Programs that a command has compiled are read by the next one, unless the user says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ntkdp.cli._compilation_cache import make_room

#: A command's beginning, and a program that it compiles.
_COMMAND = """
import sys
from ntkdp.cli import _app
_app.app([*sys.argv[1:], "privacy", "--epsilon", "1", "--delta", "1e-5"], standalone_mode=False)
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


def programs(cache: Path, *options: str, **environment: str) -> set[str]:
    """Names of the programs below a user's cache folder after a command has ended."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    subprocess.run(
        [sys.executable, "-c", _COMMAND, *options],
        env={**inherited, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(cache), **environment},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {path.name for path in cache.rglob("*-cache")}


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_programs_are_kept_for_the_next_command(tmp_path: Path) -> None:
    first = programs(tmp_path)
    assert first
    assert programs(tmp_path) == first


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--no-compilation-cache"], {}),
        ([], {"NTKDP_COMPILATION_CACHE": "0"}),
        ([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}),
    ],
)
def test_no_programs_are_kept_if_the_user_does_not_want_them(
    options: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    assert programs(tmp_path, *options, **environment) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_a_folder_chosen_for_jax_stays(tmp_path: Path) -> None:
    own = tmp_path / "own"
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(own),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert programs(tmp_path / "cache", **settings) == set()
    assert list(own.glob("*-cache"))


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_without_a_folder_commands_compile_anew(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert programs(tmp_path / "file") == set()


def test_the_oldest_programs_make_room(tmp_path: Path) -> None:
    for age in range(5):
        path = tmp_path / f"program{age}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    make_room(tmp_path, 50)
    assert len(list(tmp_path.iterdir())) == 5
    make_room(tmp_path, 49)
    assert {path.name for path in tmp_path.iterdir()} == {"program0-cache", "program1-cache"}
