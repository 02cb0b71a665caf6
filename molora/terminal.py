"""What people see while they wait: progress bars with time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console()


class _Note(ProgressColumn):
    """A task's `note`, such as its loss."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("note", "")), overflow="ellipsis", no_wrap=True)


def progress(*, shown: bool = True) -> Progress:
    """A progress display that fits 80 columns; give a task the field `note` to show a few words beside it."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        _Note(),
    )
    return Progress(*columns, console=console, disable=not shown)
