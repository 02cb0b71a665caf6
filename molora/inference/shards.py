"""Answers of several workers, put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from molora.config import ConfigError
from molora.data.sources import Messages, MessagesConfig
from molora.inference.answers import differences, has_messages_of, row_ids, shard_file, written_row
from molora.shard import Shard, unmergeable
from molora.storage import hold, write_atomically
from molora.terminal import say, warn


class _Line(NamedTuple):
    """A line of a file of answers: where it begins, and whether it says an error."""

    path: Path
    offset: int
    failed: bool


def merge_answers(messages: Path, output: Path, count: int) -> bool:
    """Writes the answers that `count` shards have beside `output` into it, in the order of the rows. Returns whether no
    row failed. Raises ConfigError that names every shard that is missing, unfinished, in use, or has a row twice, one
    of another shard, an answer to other messages or one of another model or settings than the first; and for an output
    that is there already."""
    if output.exists():
        raise ConfigError(f"output {output}: is there already, and merging would replace it; take it away first")
    source = Messages(MessagesConfig(path=str(messages)))
    ids = row_ids(source, messages)
    lines: dict[str, _Line] = {}
    drawn: dict[str, Any] = {}
    problems: list[str] = []
    for shard in Shard.all(count):
        problems += _faults(shard, source, ids, shard_file(output, shard), lines, drawn)
    if problems:
        raise ConfigError(f"output {output}: {unmergeable(problems, count)}")

    def write(temporary: Path) -> None:
        with ExitStack() as opened, open(temporary, "wb") as merged:
            files = {path: opened.enter_context(open(path, "rb")) for path in {line.path for line in lines.values()}}
            for id in ids:
                file = files[lines[id].path]
                file.seek(lines[id].offset)
                merged.write(file.readline())

    with hold(output):
        write_atomically(output, write)
    say(f"{output}: has the {len(ids)} rows of {count} shards")
    if failed := [id for id in ids if lines[id].failed]:
        told = f"{len(failed)} of {len(ids)} rows have no answer but an error, the first is {failed[0]}"
        warn(f"{output}: {told}; the same call without --merge tries them again")
    return not failed


def _faults(
    shard: Shard, source: Messages, ids: list[str], path: Path, lines: dict[str, _Line], drawn: dict[str, Any]
) -> Iterator[str]:
    """What is wrong with the file of a shard; the lines that it should have are added to those by id. `drawn` becomes
    what the first line of all shards notes."""
    if not path.is_file():
        yield f"shard {shard} is missing: there is no {path}; make it with --shard {shard}"
        return
    own = {ids[row]: row for row in shard.rows(len(ids))}
    found: set[str] = set()
    with hold(path), open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip() and line.endswith(b"\n"):  # a kill leaves half a line
                row = written_row(line, str(path), number)
                id = row["id"]
                if id in found or id not in own:
                    told = "has it twice" if id in found else "is a shard of other rows, or another one copied"
                    yield f"shard {shard} is doubled: {path} answers {id!r} in line {number}, and {told}"
                    return
                if "error" not in row and not has_messages_of(source, own[id], row):
                    told = f"{path} answers {id!r} in line {number}, and that row asks something else now"
                    yield f"shard {shard} is of other rows: {told}; take it away, and make it with --shard {shard}"
                    return
                drawn.update({} if drawn else row.get("drawn", {}))
                if differing := differences(drawn, row.get("drawn", drawn)):
                    told = f"{path} was drawn otherwise in line {number}: {'; '.join(differing)}"
                    yield f"shard {shard} has other answers: {told}; take it away, and make it with --shard {shard}"
                    return
                found.add(id)
                lines[id] = _Line(path, offset, "error" in row)
            offset += len(line)
    if left := [id for id in (ids[row] for row in shard.rows(len(ids))) if id not in found]:
        told = f"{len(left)} of its {len(own)} rows have no answer, the first is {left[0]!r}"
        yield f"shard {shard} is unfinished: {told}; go on with --shard {shard}"
