"""Strict numerics for every test: float64, and shapes checked at run time."""

import contextlib
import gc
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests compile far more than they compute: the first three take half of it off, and
# change rounding only. But without its fusion emitters XLA gets lookups by short indices wrong:
# test_irregular_networks looks at those in a process of its own, and `make test-slow` runs as users
# do. Eight devices are for the tests of meshes, where they may wait long for one another.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

import equinox as eqx
import hypothesis
import jax
import jaxtyping
import less_compilation
import pytest
import strict_types
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_enable_x64", True)

# The first example compiles; the same examples every time, so that a failure is one for everybody.
hypothesis.settings.register_profile("ntkdp", deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("ntkdp"))
hypothesis.settings.load_profile("ntkdp")

_PACKAGE = Path(__file__).parent.parent / "ntkdp"
#: Typer reads the signatures of the command line itself, and neural-tangents must be imported late.
_UNCHECKED = {_PACKAGE / "_backend" / "neural_tangents.py", _PACKAGE / "cli" / "_app.py"}


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)


vars(jaxtyping)["jaxtyped"] = strict_types.jaxtyped
jaxtyping.install_import_hook(
    [
        _module_name(path)
        for path in _PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path not in _UNCHECKED
    ],
    "strict_types.check",
)

less_compilation.share_contexts()

# Tracing makes many objects and little garbage: at Python's own thresholds a tenth of the time goes
# into looking for it.
gc.set_threshold(100_000, 20, 20)

#: Programs that tests compiled, and after how many days they are forgotten.
_COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
_DAYS_KEPT = 14
#: The folder of this process in there.
_OWN_PROGRAMS = pytest.StashKey[Path]()


def _link_programs(source: Path, target: Path) -> None:
    for name in {*os.listdir(source)} - {*os.listdir(target)}:
        # It may be there by now; and without links, programs are compiled anew.
        if name.endswith("-cache"):
            with contextlib.suppress(OSError):
                (target / name).hardlink_to(source / name)


@pytest.fixture(scope="module", autouse=True)
def _programs_for_all_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """What one process compiled for a file of tests, others read from then on."""
    own = request.config.stash.get(_OWN_PROGRAMS, None)
    if own is None:
        yield
        return
    _link_programs(_COMPILED, own)
    yield
    _link_programs(own, _COMPILED)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the programs of a session that came to its end; otherwise a write may be cut off."""
    # Pytest looks for garbage five times at the end, which takes seconds each time: once will do.
    gc.collect()
    gc.freeze()
    own = session.config.stash.get(_OWN_PROGRAMS, None)
    if own is None or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    _link_programs(own, _COMPILED)
    oldest = time.time() - _DAYS_KEPT * 86_400
    # Folders too: those of processes that were killed.
    for entry in _COMPILED.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def pytest_configure(config: pytest.Config) -> None:
    """Programs that were compiled before are read, by each process from a folder of its own.

    JAX writes a program where another process may read half of it. Processes that tests start read
    programs and write none, since some are killed.
    """
    try:
        _COMPILED.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=_COMPILED))
    except OSError:  # a checkout that cannot be written to: programs are compiled anew
        return
    config.stash[_OWN_PROGRAMS] = own
    config.add_cleanup(lambda: shutil.rmtree(own))
    _link_programs(_COMPILED, own)
    # A further cache is for GPUs; with it, a program's key would depend on the folder.
    switches = {"compilation_cache_dir": str(own), "persistent_cache_enable_xla_caches": "none"}
    for name, value in switches.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = value
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"


#: A process may have 65,530 memory maps on Linux, and every compiled program takes several. With
#: 20,000 of them it held 9 GB.
_MOST_MEMORY_MAPS = 10_000


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Forget compiled programs before there are so many that the process is killed."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > _MOST_MEMORY_MAPS:
        jax.clear_caches()
        eqx.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _meshes_compile_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs over several devices are not read from disk: such ones wait for ever at times."""
    if not request.path.name.startswith("test_mesh"):
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples with PyTorch need it."""
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.path == _PACKAGE / "torch.py":
                item.add_marker(pytest.mark.skip(reason="PyTorch is not installed"))


@pytest.fixture
def drawn_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that a test doesn't look at take no time."""
    monkeypatch.setattr(
        "ntkdp._results.figure_style.draw_into", lambda path, *_, **__: path.write_bytes(b"drawn")
    )


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, Any], None]]:
    """Patch, with nothing compiled before or left behind."""

    def patch(owner: Any, name: str, wrong: Any) -> None:
        monkeypatch.setattr(owner, name, wrong)
        jax.clear_caches()
        eqx.clear_caches()

    yield patch
    monkeypatch.undo()
    jax.clear_caches()
    eqx.clear_caches()
