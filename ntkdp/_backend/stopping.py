"""Ctrl-C, and the signals that end a process: one line and the status that shells know, whenever.

Python alone would raise ``KeyboardInterrupt`` in the main thread. That waits for compiled code, is
lost in callbacks, crashes extension modules that are being imported, and as the interpreter winds
down threads of XLA crash it. Here a thread of its own clears up and leaves.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
#: What a terminal needs after a progress bar that was cut off: an empty line, and its cursor.
_TERMINAL_AGAIN = "\r\x1b[K\x1b[?25h"

#: The options that continue the work, if any, as the last entry tells.
_continuations: list[Callable[[], str | None]] = []
#: What undoes the work that is half done, the outermost first.
_undoing: list[Callable[[], object]] = []
#: Held while something happens that must happen as a whole.
_whole = threading.Lock()
#: The longest that a signal waits for that.
_SECONDS_TO_BE_WHOLE = 30.0


def begin() -> None:
    """From here on these signals end the process, except those that it was told to ignore."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _known_signals():
        # nohup, and shells in the background, ignore some on purpose.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _halt)
    # To this the system's own handler writes at once, whatever the main thread is at.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def end() -> None:
    """Leave signals to the system again: all is done, and there is nothing to clear up."""
    for number in _known_signals():
        if signal.getsignal(number) is _halt:
            signal.signal(number, signal.SIG_DFL)
    # Last: a signal that halts this thread must reach the one that clears up.
    signal.set_wakeup_fd(-1)


def continued_by(options: Callable[[], str | None]) -> None:
    """Say what continues the work if it is stopped from here on: asked when it has stopped."""
    _continuations.append(options)


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Have ``undo`` called if a signal ends the process while the body runs."""
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)


@contextmanager
def as_a_whole() -> Iterator[None]:
    """Let a signal wait until the body has ended."""
    with _whole:
        yield


def line(options: str | None) -> str:
    """What is said of work that was stopped."""
    return "ntkdp: stopped" if options is None else f"ntkdp: stopped; {options} continues"


def _known_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]


def _halt(number: int, frame: FrameType | None) -> None:
    """Keep the main thread from starting anything new while the other clears up."""
    del number, frame
    if not _whole.locked():
        threading.Event().wait()


def _watch(reading: int) -> None:
    number = 0
    # Others may have handlers too, whose signals are written here as well.
    while number not in _known_signals():
        number = os.read(reading, 1)[0]
    try:
        _whole.acquire(timeout=_SECONDS_TO_BE_WHOLE)
        for undo in reversed(_undoing):
            with suppress(Exception):
                undo()
        options = _continuations[-1]() if _continuations else None
        said = (_TERMINAL_AGAIN if os.isatty(2) else "") + line(options) + "\n"
        with suppress(OSError):
            os.write(2, said.encode(errors="backslashreplace"))
    finally:
        os._exit(128 + number)
