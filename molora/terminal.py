"""What people see: text, tables and findings within 80 columns, and progress bars with time left.

Data are shown as they are: no markup is read in them, and a control character, which could move the cursor, hide text
or talk to the terminal, is shown as its escape.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Lines that molora lays out are no longer, on any terminal.
COLUMNS = 80

# C0 and C1 except tab and line break, DEL, what reverses the direction of text, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

console = Console(highlight=False)
_errors = Console(highlight=False, stderr=True)


@dataclass(frozen=True)
class Finding:
    """What was examined, what was found there, and whether that is right. None: nobody can tell, or it does no harm.
    `needed` is what should be found, and `remedy` says how to get it. `cause` names the finding that kept this one from
    being reached."""

    what: str
    found: str
    ok: bool | None = True
    needed: str = ""
    remedy: str = ""
    cause: str = ""


def visible(text: str) -> str:
    """The text with control characters as escapes, such as `\\x1b`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def styled(text: str, style: str) -> Text:
    """Text for `say` and `print_table` in a style such as "bold" or "red"."""
    return Text(visible(text), style)


def say(*pieces: str | Text) -> None:
    """Prints a paragraph within 80 columns. One with a longer word is not broken, so that a path can be copied."""
    _print(console, Text.assemble(*map(_shown, pieces)))


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    _print(_errors, styled(f"warning: {text}", "yellow"))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    wide: str | None = None,
    right: Collection[str] = (),
) -> None:
    """Prints rows within 80 columns; long words are broken. The column `wide` takes the room that the others leave,
    columns in `right` have their cells at the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        side, share = "right" if heading in right else "left", 1 if heading == wide else None
        table.add_column(_shown(heading), overflow="fold", justify=side, ratio=share)
    for row in rows:
        table.add_row(*map(_shown, row))
    console.print(table, width=min(console.width, COLUMNS))


def print_findings(heading: str, findings: Iterable[Finding], marks: tuple[str, str, str] = ("ok", "no", "--")) -> bool:
    """Prints a table of findings, then their remedies; returns whether nothing is wrong. `marks` are for right, wrong
    and None."""
    findings = list(findings)
    right, wrong, neither = marks
    mark = {True: styled(right, "green"), False: styled(wrong, "red"), None: styled(neither, "yellow")}
    headings = ("", heading, "found", *(["needed"] if any(each.needed for each in findings) else []))
    rows = [(mark[each.ok], each.what, each.found, each.needed)[: len(headings)] for each in findings]
    print_table(headings, rows, wide="found")
    for each in findings:
        if each.remedy:
            say(mark[each.ok], " ", styled(each.what, "bold"), f": {each.remedy}")
    return all(each.ok is not False for each in findings)


def _print(to: Console, text: Text) -> None:
    width = min(to.width, COLUMNS)
    longest = max(map(len, text.plain.split()), default=0)
    to.print(text, width=width, soft_wrap=longest > width)


def _shown(piece: str | Text) -> Text:
    return Text(visible(piece)) if isinstance(piece, str) else piece


class _Name(ProgressColumn):
    """What a task is called."""

    def render(self, task: Task) -> Text:
        return Text(f"{visible(task.description):<16.32}")


class _Note(ProgressColumn):
    """A task's `note`, such as its loss."""

    def render(self, task: Task) -> Text:
        return Text(visible(str(task.fields.get("note", ""))), overflow="ellipsis", no_wrap=True)


def progress(*, shown: bool = True) -> Progress:
    """A progress display that fits 80 columns; give a task the field `note` to show a few words beside it."""
    columns = (_Name(), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(compact=True), _Note())
    return Progress(*columns, console=console, disable=not shown)
