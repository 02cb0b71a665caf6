"""The answers of an evaluation, kept so that an evaluation goes on where it stopped, and any metric can be computed
from them again.

In a folder, `NAME.jsonl` has a line for every question, with its prompt, the accepted answers and the model's;
`NAME.json` says which model, settings and versions they are of; and `media/` holds the pictures and sounds that are in
no file of their own, by the hash of their bytes. The steps of a training have a folder each, and one such folder above.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.evaluate.kept_media import found_again, kept
from molora.evaluate.metrics import Judged
from molora.evaluate.questions import Question, judge
from molora.inference.answers import appending, differences, row_bytes, written_rows
from molora.interrupt import Stopped
from molora.received import read_json
from molora.shard import Shard, unmergeable
from molora.storage import hold, write_atomically, write_json
from molora.terminal import say

FORMAT_VERSION = "1.0"
# What a line says of the question beside its messages, and of the answer beside its text.
_OF_QUESTION = ("expected", "answers", "choices", "choice", "tags")
_OF_ANSWER = ("cut_off", "error", "likelihoods", "adapters")


@dataclass
class Predictions:
    """The answers to an evaluation's questions in a file, to which `write` adds. `rows` has the last one by id. The
    folder of media lies `above`, or beside the file."""

    path: Path
    rows: dict[str, dict[str, Any]]
    write: Callable[[Mapping[str, Any]], None]
    above: Path | None = None

    def known(self, asked: Question, *, needs_likelihoods: bool = False) -> Judged | None:
        """The question with its answer, if there is one, with the likelihoods of its choices if it `needs` them: an
        error is tried again, and so is a row that asks something else now."""
        row = self.rows.get(asked.id)
        if row is None or row["error"] is not None or row["messages"] != self._kept(asked.prompt):
            return None
        if needs_likelihoods and len(row["likelihoods"]) != len(asked.choices):
            return None
        given = {key: row[key] for key in _OF_ANSWER}
        item = judge(asked, row["answer"], **given)
        self.rows[asked.id] = {**row, **_facts(item)}
        return item

    def add(self, item: Judged) -> None:
        """Writes an answer, at once."""
        row = {"id": item.id, "messages": self._kept(item.messages), **_facts(item)}
        self.write(row)
        self.rows[item.id] = row

    def settle(self, judged: Sequence[Judged]) -> None:
        """Puts the rows into the order of the questions, each once."""
        lines = b"".join(row_bytes(self.rows[item.id]) for item in judged)
        if not self.path.is_file() or self.path.read_bytes() != lines:
            write_atomically(self.path, lambda temporary: temporary.write_bytes(lines))

    def _kept(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the file says them."""
        return json.loads(json.dumps(kept(messages, self.path.parent, self.above)))


def _facts(item: Judged) -> dict[str, Any]:
    return {name: getattr(item, name) for name in (*_OF_QUESTION, "answer", *_OF_ANSWER)}


@contextmanager
def open_predictions(
    folder: Path, name: str, about: Mapping[str, Any], num_questions: int, *, anew: bool = False
) -> Iterator[Predictions]:
    """The file of an evaluation's answers, held so that no other process writes to it. Answers of another model, of
    other settings or versions (`about`), and with `anew` all answers, are taken out first, which is said. Raises
    ConfigError for a file that holds anything but answers, and Stopped on Ctrl-C."""
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format_version": FORMAT_VERSION, **about}
    now = {**about, "questions": num_questions}
    with hold(path):
        rows: dict[str, dict[str, Any]] = {}
        known = None if anew else _read_about(path)
        differing = [] if known is None else differences(known, about)
        if path.exists() and not differing and known is not None and not anew:
            rows = _rows(path)
            answered = sum(row["error"] is None for row in rows.values())
            if answered:
                say(f"{path}: has {answered} of {num_questions} answers of this model already; --anew asks again")
        elif path.exists():
            say(f"{path}: begun anew" + (f", as {'; '.join(differing)}" if differing else ""))
            path.unlink()
        if known != now:
            write_json(_about(path), now)
        with appending(path) as write:
            predictions = Predictions(path, rows, write)
            try:
                yield predictions
            except KeyboardInterrupt as interrupt:
                answered = sum(row["error"] is None for row in predictions.rows.values())
                told = f"stopped: {answered} of {num_questions} questions are answered, in {path}"
                raise Stopped(f"{told}; the same call goes on with the others", signal.SIGINT) from interrupt


def keep_predictions(folder: Path, name: str, about: Mapping[str, Any], judged: Sequence[Judged], above: Path) -> None:
    """Writes the answers to all questions of an evaluation at once, with media in the folder `above`."""
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with hold(path):
        predictions = Predictions(path, {}, lambda row: None, above)
        for item in judged:
            predictions.add(item)
        predictions.settle(judged)
        write_json(_about(path), {"format_version": FORMAT_VERSION, **about, "questions": len(judged)})


def merge_predictions(folder: Path, name: str, about: Mapping[str, Any], num_questions: int, count: int) -> None:
    """Makes the file of an evaluation's answers from those of its `count` shards, in the order of the questions. Raises
    ConfigError that names every shard that is missing, unfinished, of anything else than `about`, or of other versions
    than the first, or has the questions of another."""
    lines: dict[int, bytes] = {}
    problems: list[str] = []
    first: dict[str, Any] | None = None
    for shard in Shard.all(count):
        path = folder / f"{shard.name(name)}.jsonl"
        known = _read_about(path)
        if known is None or not path.is_file():
            problems.append(f"shard {shard} is missing: there is no {path}; make it with --shard {shard}")
            continue
        first = first or known
        expected = {**about, "environment": first.get("environment")}
        if differing := differences(known, {"format_version": FORMAT_VERSION, **expected}):
            told = f"shard {shard} has other answers: {path}: {'; '.join(differing)}"
            problems.append(f"{told}; make it again with --shard {shard} --anew")
            continue
        with hold(path):
            found = {int(id.partition(":")[0]): row_bytes(row) for id, row in _rows(path).items()}
        own = shard.rows(num_questions)
        if strays := found.keys() - own:
            told = f"{path} answers question {min(strays)}, which is in shard {min(strays) % count}/{count}"
            problems.append(f"shard {shard} is doubled: {told}; make it again with --shard {shard} --anew")
        elif left := [index for index in own if index not in found]:
            told = f"{len(left)} of its {len(own)} questions have no answer, the first is {left[0]}"
            problems.append(f"shard {shard} is unfinished: {told}; go on with --shard {shard}")
        lines |= found
    if problems:
        raise ConfigError(f"evaluation {name!r}: {unmergeable(problems, count)}")
    assert first is not None, "there are two shards or more"
    path = folder / f"{name}.jsonl"
    with hold(path):
        write_atomically(path, lambda to: to.write_bytes(b"".join(lines[index] for index in sorted(lines))))
        write_json(_about(path), {**first, "questions": num_questions})


def read_predictions(folder: Path, name: str, about: Mapping[str, Any], how: str) -> list[Judged]:
    """The answers to all questions of an evaluation, in order. `how` says what to do about answers that are not there.
    Raises ConfigError for answers that are missing, or of anything else than `about`."""
    path = folder / f"{name}.jsonl"
    known = _read_about(path)
    if known is None or not path.is_file():
        raise ConfigError(f"{path}: no answers of evaluation {name!r} are kept there; {how}")
    if differing := differences(known, {"format_version": FORMAT_VERSION, **about}):
        raise ConfigError(f"{path}: its answers are others: {'; '.join(differing)}; {how}")
    rows = _rows(path)
    if len(rows) != known.get("questions"):
        raise ConfigError(f"{path}: has {len(rows)} of {known.get('questions')} answers; {how}")
    judged = []
    for row in rows.values():
        try:
            messages = found_again(row["messages"], folder)
            asked = Question(row["id"], messages, **{name: row[name] for name in _OF_QUESTION})
            given = {key: row[key] for key in _OF_ANSWER}
            judged.append(judge(asked, row["answer"], **given))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: the row {row['id']!r} lacks {error}; {how}") from error
    return sorted(judged, key=lambda item: item.row)


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.json")


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(_about(path)) if _about(path).is_file() else None
    except ValueError as error:
        raise ConfigError(f"{error}; ask all questions again with --anew") from error


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each question, by its id."""
    how = "take that line out, or ask all questions again with --anew"
    return {row["id"]: row for _, row in written_rows(path, str(path), how=how)}
