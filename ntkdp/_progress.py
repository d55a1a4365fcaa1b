"""Progress of compiled work: a bar on a terminal, nothing in a pipe, or the caller's function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from ntkdp._types import ProgressCallback

#: Who listens to the work that runs now. Compiled code calls `_emit`, which looks here, so that one
#: compiled program serves every listener.
_listeners: list[ProgressCallback] = []


def _emit(done: Any) -> None:
    if _listeners:
        _listeners[-1](float(done))


def report(done: Any) -> None:
    """Tell the listener, from inside compiled code, what fraction is done."""
    jax.debug.callback(_emit, done)


@contextmanager
def listening(progress: bool | Callable[[float], None], description: str) -> Iterator[bool]:
    """Show or pass on progress while the body runs; yields whether anybody listens."""
    if callable(progress):
        with _registered(progress):
            yield True
    elif progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=1.0)
            with _registered(lambda done: bar.update(task, completed=done)):
                yield True
    else:
        yield False


@contextmanager
def _registered(callback: ProgressCallback) -> Iterator[None]:
    _listeners.append(callback)
    try:
        yield
        jax.effects_barrier()
        callback(1.0)
    finally:
        _listeners.remove(callback)
