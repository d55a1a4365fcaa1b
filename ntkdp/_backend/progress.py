"""Progress of compiled work: a bar on a terminal, nothing in a pipe, or the caller's function."""

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ntkdp._backend.types import Array, Progress, ProgressCallback, ScalarLike

#: The number of a run, or None if nobody listens to it. Compiled programs take it as an argument,
#: so that one program serves every run, and tells each run's own listener.
Listener: TypeAlias = Array | None


class _Stopped(Exception):
    """Ends a run whose listener has failed."""


class _Listening:
    """A caller's function, told fractions that only grow until it raises an exception."""

    def __init__(self, callback: ProgressCallback) -> None:
        self.callback = callback
        self.done = -1.0
        self.part, self.parts = 0, 1
        self.error: BaseException | None = None
        # Devices call from threads of their own.
        self.lock = threading.Lock()

    def hear(self, done: float) -> None:
        with self.lock:
            done = (self.part + done) / self.parts
            if self.error is not None or done <= self.done:
                return
            self.done = done
            try:
                self.callback(done)
            except BaseException as error:
                self.error = error
                if _may_stop():
                    raise _Stopped from None


_numbers = itertools.count()
_listening: dict[int, _Listening] = {}


def _may_stop() -> bool:
    """Whether a failing callback ends the program alone: other devices would wait for this one."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


# JAX logs an exception that ends a program; this one is raised by `listening` in the end.
logging.getLogger("jax._src.debugging").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _Stopped))
)


def _emit(number: ScalarLike, done: ScalarLike) -> None:
    # The program of a run may be called again, by a caller's own `jit`, after the run has ended.
    listening = _listening.get(int(number))
    if listening is not None:
        listening.hear(float(done))


def report(listener: Array, done: ScalarLike) -> None:
    """Tell the listener, from inside compiled code, which fraction is done."""
    jax.debug.callback(_emit, listener, done)


def begin_part(listener: Listener, part: int, parts: int) -> None:
    """From now on the listener is told of one part of the work, after the parts before it."""
    if listener is not None:
        jax.effects_barrier()
        heard = _listening[int(listener)]
        heard.part, heard.parts = part, parts


@contextmanager
def listening(progress: bool | Callable[[float], None], description: str) -> Iterator[Listener]:
    """Show or pass on progress while the body runs; yields the listener, or None without one.

    An exception of the caller's function is raised here: at once if the program may stop, or else
    when it has ended.
    """
    if callable(progress):
        with _registered(progress) as listener:
            yield listener
    elif progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=1.0)
            with _registered(lambda done: bar.update(task, completed=done)) as listener:
                yield listener
    else:
        yield None


@contextmanager
def _registered(callback: ProgressCallback) -> Iterator[Array]:
    number, heard = next(_numbers), _Listening(callback)
    _listening[number] = heard
    try:
        try:
            yield jnp.asarray(number, jnp.int32)
            jax.effects_barrier()
        except Exception:
            if heard.error is None:
                raise
        if heard.error is not None:
            # Without the error of the program, which is only how it was stopped.
            raise heard.error from heard.error.__cause__
        callback(1.0)
    finally:
        del _listening[number]


def part_of(progress: Progress, number: int, parts: int) -> Progress:
    """Progress of one part of the work, reported as progress of the whole."""
    if not callable(progress):
        return progress
    return lambda done: progress((number + done) / parts)
