"""The bar that a terminal shows during long work: what is being done, and the time it all takes."""

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
    """Time since the start of the bar: rich's own stops at the first phase that is done."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.elapsed or 0))), style="progress.elapsed")


@contextmanager
def progress_bar(
    console: Console, *, clock: Callable[[], float] | None = None
) -> Iterator[Callable[[str, float], None]]:
    """A function (what, fraction done) that a bar shows; the bar goes when the body ends."""
    columns = (
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _ElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, get_time=clock) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, done: bar.update(task, description=printable(what), completed=done)
