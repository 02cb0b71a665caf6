"""Answering the rows of a file into another: what is done stays done, and a row that fails does not stop the others."""

import json
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from molora.config import ConfigError
from molora.data.messages import Message
from molora.data.sources import Messages, MessagesConfig
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel
from molora.interrupt import Stopped
from molora.pack import Sample
from molora.shard import ALL_ROWS, Shard
from molora.storage import hold, write_atomically
from molora.terminal import progress, warn

_BEGINNING = b'{"id": '
_MAX_NAMED = 5
# What to do about a file of answers that is none.
_HOW = "name a new file, or this one's right name"

# What is made of a row: its id, what is written of it, and the error that stands in its place.
_Result = tuple[str, dict[str, Any], Exception | None]


@dataclass
class AnswerFile:
    """Rows to answer, or whose answers are to be scored, and the file of what is found, which goes on where it stopped.
    `ids` are those of all rows, and `rows` are the rows that go into this file. A row that failed before is tried
    again. `failed` names those that failed this time. Each row that is written has the `notes` too."""

    source: Messages
    output: Path
    ids: list[str]
    rows: range
    done: set[str]
    failed: list[str]
    notes: Mapping[str, Any]

    @property
    def left(self) -> list[int]:
        """The rows without an answer."""
        return [row for row in self.rows if self.ids[row] not in self.done]

    def fill(
        self,
        loaded: LoadedModel,
        config: GenerationConfig,
        *,
        strict: bool = False,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Answers the rows that have no answer, each written as it finishes. `strict` raises the first row's error."""

        def results(samples: Iterable[Sample | Failed]) -> Iterator[_Result]:
            for answer in loaded.answers(samples, config, keep_going=not strict):
                yield answer.id, told_answer(answer), answer.error

        self._write(loaded.encode, results, advance)

    def score(self, loaded: LoadedModel, *, strict: bool = False, advance: Callable[[], object] = lambda: None) -> None:
        """Writes the likelihood of the last message of each row that has none; else as `fill`."""

        def results(samples: Iterable[Sample | Failed]) -> Iterator[_Result]:
            for scored in loaded.scored(samples, keep_going=not strict):
                yield scored.id, asdict(scored.likelihood) if scored.likelihood else {}, scored.error

        self._write(loaded.encode_answered, results, advance)

    def _write(
        self,
        encode: Callable[[Sequence[Message], str], Sample],
        results: Callable[[Iterable[Sample | Failed]], Iterator[_Result]],
        advance: Callable[[], object],
    ) -> None:
        messages: dict[str, Any] = {}

        def encoded(row: int) -> Sample:
            messages[self.ids[row]] = self.source[row]["messages"]
            return encode(messages[self.ids[row]], self.ids[row])

        samples = (attempt(partial(encoded, row), self.ids[row]) for row in self.left)

        with appending(self.output) as write:
            for id, found, error in results(samples):
                told = found if error is None else {"error": str(error)}
                write({"id": id, "messages": messages.pop(id, None), **told, **self.notes})
                if error is None:
                    self.done.add(id)
                else:
                    self.failed.append(f"{id}: {error}")
                advance()

    def faults(self) -> str:
        """A sentence on the rows that failed; empty if none did."""
        if not self.failed:
            return ""
        named = "; ".join(self.failed[:_MAX_NAMED]) + ("; …" if len(self.failed) > _MAX_NAMED else "")
        told = f"{len(self.failed)} of {len(self.rows)} rows have no answer but an error"
        return f"{told}, and are tried again by the next call: {named}"


def answer_rows(
    load: Callable[[], LoadedModel],
    messages: Path,
    output: Path,
    config: GenerationConfig,
    *,
    shard: Shard = ALL_ROWS,
    strict: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> bool:
    """Answers the rows of a file that have no answer yet, with a bar, and tells which failed. Returns whether none did.
    Raises what `answer_file` raises, before the model is loaded; with `strict` the error of the first row that fails,
    and Stopped after Ctrl-C, with all that was finished in the file."""
    opened = answer_file(messages, output, shard=shard, notes=notes)
    with opened as rows, progress() as bars, _telling_what_is_done(rows):
        loaded = load()
        bar = bars.add_task("generate", total=len(rows.rows), completed=len(rows.rows) - len(rows.left), note="")
        rows.fill(loaded, config, strict=strict, advance=lambda: bars.advance(bar))
    return _told_of_faults(rows)


def score_rows(
    load: Callable[[], LoadedModel],
    messages: Path,
    output: Path,
    *,
    strict: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> bool:
    """Writes the likelihoods of the answers that the rows of a file end with; else as `answer_rows`."""
    opened = answer_file(messages, output, "log_probability", notes=notes)
    with opened as rows, progress() as bars, _telling_what_is_done(rows):
        loaded = load()
        bar = bars.add_task("score", total=len(rows.rows), completed=len(rows.rows) - len(rows.left), note="")
        rows.score(loaded, strict=strict, advance=lambda: bars.advance(bar))
    return _told_of_faults(rows)


@contextmanager
def _telling_what_is_done(rows: AnswerFile) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        told = f"stopped: {len(rows.done)} of {len(rows.rows)} rows are done, in {rows.output}"
        raise Stopped(f"{told}; the same call goes on with the others", signal.SIGINT) from interrupt


def _told_of_faults(rows: AnswerFile) -> bool:
    if faults := rows.faults():
        warn(f"{rows.output}: {faults}")
    return not faults


def told_answer(answer: Answer) -> dict[str, Any]:
    """What a row of a file tells of an answer."""
    counts = {"prompt_tokens": answer.prompt_tokens, "answer_tokens": answer.answer_tokens}
    return {"answer": answer.text, "adapters": list(answer.adapters), **counts, "finished": answer.finished}


@contextmanager
def answer_file(
    messages: Path,
    output: Path,
    result: str = "answer",
    shard: Shard = ALL_ROWS,
    notes: Mapping[str, Any] | None = None,
) -> Iterator[AnswerFile]:
    """Opens rows, and keeps other processes from the file of their answers, whose lines have the key `result`. The
    answers to a `shard` of the rows go beside `output`. A half-written last line, left by a kill, is dropped. Each row
    has the `notes` on what answers depend on beside their messages. Raises ConfigError for ids that are not unique, and
    for an output that is the input, cannot be written, holds anything but answers, has those of another shard, to other
    messages or with other notes, or is in use; it is left as it is then."""
    source = Messages(MessagesConfig(path=str(messages)))
    ids = row_ids(source, messages)
    output = shard_file(output, shard)
    check_outputs(messages, {"output": output})
    with hold(output):
        rows = shard.rows(len(ids))
        done = answered_ids(output, result, _same_question(source, ids, output, notes or {}))
        if shard.count > 1 and (strays := done - {ids[row] for row in rows}):
            told = f"answers {min(strays)!r}, which is none of the rows of shard {shard} of {messages}"
            raise ConfigError(f"output {output}: {told}; give another --output, or take the file away")
        yield AnswerFile(source, output, ids, rows, done, [], notes or {})


def check_outputs(messages: Path, outputs: Mapping[str, Path | None]) -> None:
    """Raises ConfigError for an output that is the file `messages` or another of the outputs, however both are spelled,
    or that cannot be written. The outputs are named by what they are called; one that is None is not wanted."""
    taken = {_file_at(messages): f"{messages}, where the rows come from"}
    for called, path in outputs.items():
        if path is None:
            continue
        if (file := _file_at(path)) in taken:
            raise ConfigError(f"{called} {path}: is {taken[file]}; give it another name")
        taken[file] = f"the file of {called} too"
        _check_writable(path, f"{called} {path}")


def _file_at(path: Path) -> object:
    """What tells the file at a path, there or not, from all others."""
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError:
        return real
    return found.st_dev, found.st_ino


def _check_writable(path: Path, where: str) -> None:
    if not os.path.exists(path.parent):
        raise ConfigError(f"{where}: no folder {path.parent}; make it first")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ConfigError(f"{where}: is no file; name one")
            open(path, "ab").close()
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{where}: cannot be written ({error.strerror}); give another place") from error


def shard_file(output: Path, shard: Shard) -> Path:
    """Where the answers of a shard go: beside `output`, or into it if the shard is all rows."""
    return output if shard.count == 1 else output.with_name(shard.name(output.stem) + output.suffix)


def row_ids(source: Messages, messages: Path) -> list[str]:
    """The ids of all rows of a file, each once. A row that cannot be read, which is told in its turn, has its number,
    and no other's id. Raises ConfigError."""
    ids = _ids(source)
    first: dict[str, int] = {}
    for row, id in enumerate(ids):
        if first.setdefault(id, row) != row:
            raise ConfigError(
                f"{messages}: ids are not unique: rows {first[id] + 1} and {row + 1} are both {id!r} (a row without an "
                "id has its number from 0); give each an id of its own, or give none"
            )
    return ids


def _ids(source: Messages) -> list[str]:
    ids: dict[int, str] = {}
    for row in range(len(source)):
        with suppress(ValueError):
            ids[row] = source.id_of(row)
    taken = set(ids.values())
    for row in range(len(source)):
        if row not in ids:
            name = f"row {row + 1}"
            while name in taken:
                name += " of the file"
            ids[row] = name
    return [ids[row] for row in range(len(source))]


def _same_question(
    source: Messages, ids: Sequence[str], output: Path, notes: Mapping[str, Any]
) -> Callable[[int, Mapping[str, Any]], None]:
    """What `answered_ids` calls to raise ConfigError for an answer to other messages than its row has now, or one with
    other notes; one without any passes."""
    rows = {id: row for row, id in enumerate(ids)} if output.exists() else {}

    def check(number: int, written: Mapping[str, Any]) -> None:
        if written["id"] in rows and not has_messages_of(source, rows[written["id"]], written):
            raise ConfigError(f"output {output}: {other_row_now(number, written['id'])}")
        if differing := differences({key: written.get(key, value) for key, value in notes.items()}, notes):
            told = f"output {output}: line {number} was made otherwise: {'; '.join(differing)}"
            raise ConfigError(f"{told}; give the same model and options, or another output")

    return check


def has_messages_of(source: Messages, row: int, written: Mapping[str, Any]) -> bool:
    """Whether what was written of a row has the messages that the row has now; none are as good as the same."""
    if (known := written.get("messages")) is None:
        return True
    now = attempt(lambda: source[row]["messages"], "")
    return not isinstance(now, Failed) and json.dumps(now, sort_keys=True) == json.dumps(known, sort_keys=True)


def other_row_now(number: int, id: str) -> str:
    """What is told of a line that answers what a row does not ask any more."""
    return f"line {number} answers {id!r}, and that row asks something else now; give another output, or the old rows"


def answered_ids(
    output: Path, result: str, check: Callable[[int, Mapping[str, Any]], None] = lambda number, row: None
) -> set[str]:
    """The ids that have an answer. Half a line and lines with an error are taken out of the file, once `check` was
    called with each answer and the number of its line."""
    first: dict[str, int] = {}
    errors = 0
    for number, row in written_rows(output, f"output {output}", result):
        if "error" in row:
            errors += 1
        elif first.setdefault(row["id"], number) != number:
            lines = f"lines {first[row['id']]} and {number}"
            raise ConfigError(f"output {output}: {lines} both answer {row['id']!r}; take one away")
        else:
            check(number, row)
    if errors:
        write_atomically(Path(os.path.realpath(output)), lambda temporary: _copy_answers(output, temporary))
    return set(first)


def row_bytes(row: Mapping[str, Any]) -> bytes:
    """A row as the line of a file."""
    # A half of a character has no bytes; its escape is JSON's own.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what writes rows to the end of a file, each at once, so that a kill loses no more than half a line."""
    with open(path, "ab") as file:

        def write(row: Mapping[str, Any]) -> None:
            file.write(row_bytes(row))
            file.flush()

        yield write


def written_rows(
    path: Path, where: str, result: str = "answer", *, how: str = _HOW
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows that `appending` wrote, each with the number of its line; none if there is no file. Half a line at the
    end, left by a kill, is taken out of the file when all others are read. Raises ConfigError, beginning with `where`,
    for a line without the key `result`, with what to do about it (`how`)."""
    if not path.exists():
        return
    half = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                half = len(line)
            elif line.strip():
                yield number, written_row(line, where, number, result, how)
    if half:
        os.truncate(path, path.stat().st_size - half)


def _copy_answers(output: Path, to: Path) -> None:
    with open(output, "rb") as old, open(to, "wb") as new:
        whole = (line for line in old if line.endswith(b"\n") and line.strip())
        new.writelines(line for line in whole if "error" not in json.loads(line))


def written_row(line: bytes, where: str, number: int, result: str = "answer", how: str = _HOW) -> dict[str, Any]:
    """The row that `appending` wrote as a line. Raises ConfigError, as `written_rows` does."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not (isinstance(row, dict) and isinstance(row.get("id"), str) and (result in row or "error" in row)):
        told = f"line {number} is no {result.replace('_', '-')} of molora: {line[:40]!r}"
        raise ConfigError(f"{where}: {told}; {how}")
    return row


def differences(there: Mapping[str, Any], here: Mapping[str, Any], above: str = "") -> list[str]:
    """What differs between what answers are of and what they should be of, each with both values."""
    found = []
    for key in {**here, **(there if above else {})}:
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{above}{key}.")
        elif one != other:
            found.append(f"{above}{key} is {_short(one)} there and {_short(other)} here")
    return found


def _short(value: Any) -> str:
    return f"{json.dumps(value, sort_keys=True, ensure_ascii=False):.60}"
