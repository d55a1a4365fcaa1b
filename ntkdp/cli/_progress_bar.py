"""The progress bar of a terminal during long work: current task, time since the start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text

from ntkdp._results.standard_streams import printable


class _ElapsedColumn(ProgressColumn):
    """Time since the start of the bar; rich's own column stops after the first phase."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.elapsed or 0))), style="progress.elapsed")


@contextmanager
def progress_bar(
    console: Console, *, clock: Callable[[], float] | None = None
) -> Iterator[Callable[[str, float], None]]:
    """A function (task, fraction done) that updates a bar, which disappears after the body."""
    columns = (
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _ElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, get_time=clock) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda name, done: bar.update(task, description=printable(name), completed=done)
