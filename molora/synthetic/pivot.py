"""Pivotal tokens of a model's own solutions, searched for many questions at a time through the running batch."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from molora.evaluate.questions import Question
from molora.inference.answers import appending
from molora.inference.generate import Batch, Failed, GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel
from molora.inference.running import Asked
from molora.inference.text import ends_at
from molora.pack import Sample
from molora.seeding import seed_of
from molora.synthetic.pivotal import Found, Pivot, Prefix, SearchConfig, Wanted, difference, search
from molora.synthetic.rated import RatedFile, Verifier
from molora.terminal import progress

# The key of a question's row that says it is done.
_RESULT = "solutions"
# A token in a pivotal one's place is compared with it if it was drawn so often.
_FEWEST_DRAWS = 4


@dataclass
class _Solution:
    """An answer that was drawn as one of many: its tokens, with the one that ended it, and whether it is right."""

    number: int
    tokens: tuple[int, ...]
    right: bool


@dataclass
class _Draw:
    """One draw of a question, by its number: behind which prefix of a solution, and the tokens that came so far. The
    draws behind a prefix have one sample, which is read once for all of them."""

    of: _Search
    number: int
    prefix: Prefix
    before: tuple[int, ...]
    sample: Sample
    tokens: list[int]


class PivotSearch(RatedFile):
    """The questions of a file, what searches them, and the file that their searches go to."""

    result = _RESULT

    def __init__(
        self,
        messages: Path,
        output: Path,
        verifier: Verifier,
        config: SearchConfig,
        num_solutions: int = 2,
        drawn_by: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.config, self.num_solutions = config, num_solutions
        by = {**vars(config), "solutions": num_solutions}
        name = ", ".join([verifier.name, *(f"{key} {value}" for key, value in by.items())])
        super().__init__(messages, output, verifier, name, drawn_by)

    @property
    def told(self) -> str:
        return f"{len(self.done)} of {len(self.questions)} questions are done"

    @property
    def left(self) -> list[Question]:
        return [asked for asked in self.questions if asked.id not in self.done]

    def find(self, loaded: LoadedModel, decoding: GenerationConfig) -> None:
        """Searches the questions that are not done. Draws of many questions run together; each has a seed of its own,
        so that a search finds the same beside whatever others."""
        with progress() as bars, appending(self.output) as write:
            bar = bars.add_task("pivot", total=len(self.questions), completed=len(self.done), note="")
            searches = _Searches(loaded, decoding, self.verifier, self.config, self.num_solutions)
            for id, row in searches.run(self.left, lambda draws: bars.update(bar, note=f"{draws:,} draws")):
                if "error" in row:
                    write({"id": id, **row})
                    self.failed.append(f"{id}: {row['error']}")
                else:
                    write({"id": id, **row, **self.notes(id)})
                    self.done.add(id)
                bars.advance(bar)

    def found(self) -> Iterator[tuple[Question, dict[str, Any]]]:
        """The questions that are done, each with its row, in the order of their rows."""
        rows = self.rows()
        for asked in self.questions:
            if _RESULT in rows.get(asked.id, ()):
                yield asked, rows[asked.id]

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """What the rows of questions hold, and how many of these were not searched, with what to do about it."""
        solutions = [solution for row in rows for solution in row[_RESULT]]
        tokens = sum(len(solution["pivots"]) for solution in solutions)
        # Rows of older files do not say how often a question was drawn that was not searched.
        draws = sum(row.get("draws", self.config.fewest) for row in rows)
        yield f"{tokens} pivotal tokens in {len(solutions)} solutions, {draws:,} draws"
        low, high = self.config.lowest, self.config.highest
        for count, share, advice in (
            (
                sum(row["share"] < low for row in rows),
                f"below {low:g}",
                "ask easier ones, or give more --max-new-tokens",
            ),
            (sum(row["share"] > high for row in rows), f"above {high:g}", "ask harder ones"),
        ):
            if count:
                why = f"their share of right answers is {share}"
                yield f"{count} of {len(rows)} questions are not searched, as {why}; {advice}"


class _Search:
    """The search of one question, as a generator that says what it wants to be drawn."""

    def __init__(self, asked: Question, sample: Sample, config: SearchConfig, num_solutions: int, decode: Any) -> None:
        self.asked, self.sample, self.config, self.decode = asked, sample, config, decode
        self.num_solutions = num_solutions
        self.drawn: list[_Solution] = []
        self.before: tuple[int, ...] = ()
        self.num_draws = 0
        self.waiting = 0
        self.steps = self._steps()

    def _steps(self) -> Generator[Wanted, None, dict[str, Any]]:
        start = Prefix(0)
        yield [(start, self.config.fewest)]
        row = {"prompt_tokens": len(self.sample), "share": start.share, _RESULT: []}
        chosen = self._chosen() if self.config.lowest <= start.share <= self.config.highest else []
        for solution in chosen:
            self.before = solution.tokens
            pivots, prefixes = yield from search(len(solution.tokens), start, solution.right, self.config)
            row[_RESULT].append(self._told(solution, pivots, prefixes))
        return {**row, "draws": self.num_draws}

    def _chosen(self) -> list[_Solution]:
        """The first solutions that were drawn, right and wrong ones in turn."""
        drawn = sorted(self.drawn, key=lambda each: each.number)
        sides = [deque(each for each in drawn if each.right == right) for right in (True, False)]
        chosen: list[_Solution] = []
        while len(chosen) < self.num_solutions and any(sides):
            if side := sides[len(chosen) % 2] or sides[1 - len(chosen) % 2]:
                chosen.append(side.popleft())
        return chosen

    def _told(self, solution: _Solution, pivots: Sequence[Pivot], prefixes: Found) -> dict[str, Any]:
        sure = self.config.deviations
        return {
            "token_ids": list(solution.tokens),
            "right": solution.right,
            "probabilities": [
                {"place": place, "share": each.share, "interval": each.interval(sure), "draws": len(each.draws)}
                for place, each in sorted(prefixes.items())
                if each.known is not None or each.draws
            ],
            "pivots": [self._pivot(solution, pivot) for pivot in pivots],
        }

    def _pivot(self, solution: _Solution, pivot: Pivot) -> dict[str, Any]:
        """A pivotal token with the probabilities around it, and what else was drawn in its place: each token with how
        often it came and how often it ended right."""
        others: dict[int, list[bool]] = {}
        for token, right in pivot.before.draws:
            others.setdefault(token, []).append(right)
        low, high = difference(pivot.before, pivot.after, self.config.deviations)
        return {
            "place": pivot.place,
            "token_id": solution.tokens[pivot.place],
            "token": self.decode([solution.tokens[pivot.place]]),
            "before": pivot.before.share,
            "after": pivot.after.share,
            "interval": [low, high],
            "draws": [len(pivot.before.draws), len(pivot.after.draws)],
            "others": [
                {"token_id": token, "token": self.decode([token]), "draws": len(rights), "right": sum(rights)}
                for token, rights in sorted(others.items(), key=lambda each: (-len(each[1]), each[0]))
                if token != solution.tokens[pivot.place]
            ],
        }


class _Searches:
    """Searches that run together, and their draws in one batch."""

    def __init__(
        self,
        loaded: LoadedModel,
        decoding: GenerationConfig,
        verifier: Verifier,
        config: SearchConfig,
        num_solutions: int,
    ) -> None:
        self.loaded, self.decoding, self.verifier = loaded, decoding, verifier
        self.config, self.num_solutions = config, num_solutions
        self.batch = Batch(loaded.model, decoding, loaded.frames)
        self.is_over = ends_at(loaded.processor.decode, decoding.stop)
        self.draws: dict[str, _Draw] = {}
        self.wanted: deque[_Draw] = deque()

    def run(self, questions: Sequence[Question], tell: Callable[[int], object]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows by the ids of their questions, as they are done. One that fails has its error. Tells how many draws
        there were so far, as a question takes hundreds."""
        num_draws = 0
        coming = iter(questions)
        read_all = False
        while not read_all or self.draws or self.wanted:
            # All that there is room for before a step: the first one makes room for those that wait.
            while self.batch.has_room and (self.wanted or not read_all):
                if self.wanted:
                    self._add(self.wanted.popleft())
                    continue
                if (asked := next(coming, None)) is None:
                    read_all = True
                    continue
                sample = attempt(partial(self.loaded.encode, asked.prompt, asked.id), asked.id)
                if isinstance(sample, Failed):
                    yield asked.id, {"error": str(sample.error)}
                    continue
                decode = self.loaded.processor.decode
                yield from self._goes_on(_Search(asked, sample, self.config, self.num_solutions, decode))
            for step in self.batch.step() if self.draws else ():
                draw = self.draws.get(step.id)
                if draw is None:  # of a question that failed
                    continue
                if step.finished == "error":
                    yield self._fails(draw.of, str(step.error))
                    continue
                draw.tokens.append(step.token_id)
                if step.finished:
                    del self.draws[step.id]
                    num_draws += 1
                    tell(num_draws)
                    try:
                        self._rate(draw, step.finished)
                    except ValueError as error:
                        yield self._fails(draw.of, str(error))
                        continue
                    if not draw.of.waiting:
                        yield from self._goes_on(draw.of)

    def _goes_on(self, one: _Search) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lets a search say what it wants next, or what it found."""
        try:
            for prefix, count in next(one.steps):
                before = one.before[: prefix.length]
                sample = one.sample.followed_by(before)
                for _ in range(count - len(prefix.draws)):
                    self.wanted.append(_Draw(one, one.num_draws, prefix, before, sample, []))
                    one.num_draws += 1
                    one.waiting += 1
        except StopIteration as end:
            yield one.asked.id, end.value

    def _add(self, draw: _Draw) -> None:
        """Draws from behind a prefix, by its token ids: nothing is read again by the tokenizer."""
        id = f"{draw.of.asked.id}#{draw.number}"
        sample = replace(draw.sample, id=id)
        left = self.decoding.max_new_tokens - len(draw.before)
        decoding = replace(self.decoding, max_new_tokens=max(1, left))
        self.draws[id] = draw
        over = partial(_is_over, self.is_over, draw.before)
        self.batch.add(Asked(sample, decoding, seed_of(self.decoding.seed, id), over))

    def _rate(self, draw: _Draw, finished: Any) -> None:
        one, tokens = draw.of, (*draw.before, *draw.tokens)
        stops = tokens[-1] in self.loaded.model.backbone.stop_ids
        text = self.loaded.text(tokens[:-1] if stops else tokens, self.decoding).strip()
        _, right = self.verifier.rate(one.asked, Answer(one.asked.id, text, (), 0, tokens, finished))
        draw.prefix.draws.append((draw.tokens[0], right))
        if not draw.before and finished == "stop":
            one.drawn.append(_Solution(draw.number, tokens, right))
        one.waiting -= 1

    def _fails(self, one: _Search, error: str) -> tuple[str, dict[str, Any]]:
        for id in [id for id, draw in self.draws.items() if draw.of is one]:
            self.batch.remove(id)
            del self.draws[id]
        self.wanted = deque(draw for draw in self.wanted if draw.of is not one)
        return one.asked.id, {"error": error}


def _is_over(ends: Any, before: Sequence[int], tokens: Sequence[int]) -> bool:
    return ends([*before, *tokens])


def published_rows(asked: Question, row: Mapping[str, Any], decode: Any) -> Iterator[dict[str, Any]]:
    """Pivotal tokens as github.com/codelion/pts publishes them, and the interval of each change beside."""
    query = next((turn["content"] for turn in reversed(asked.prompt) if turn["role"] == "user"), "")
    query = query if isinstance(query, str) else json.dumps(query)
    for solution in row[_RESULT]:
        for pivot in solution["pivots"]:
            context = solution["token_ids"][: pivot["place"]]
            yield {
                "query": query,
                "pivot_context": decode(context),
                "pivot_context_token_ids": context,
                "pivot_token": pivot["token"],
                "pivot_token_id": pivot["token_id"],
                "prob_before": pivot["before"],
                "prob_after": pivot["after"],
                "prob_delta": pivot["after"] - pivot["before"],
                "prob_delta_interval": pivot["interval"],
                "is_positive": pivot["after"] > pivot["before"],
            }


def pairs(asked: Question, row: Mapping[str, Any], decode: Any, threshold: float) -> Iterator[dict[str, Any]]:
    """Preferences of single tokens: at each pivotal token, it and the token in its place that ended otherwise, of those
    that were drawn a few times, by token ids."""
    for number, solution in enumerate(row[_RESULT]):
        for pivot in solution["pivots"]:
            rises = pivot["after"] > pivot["before"]
            others = [
                (each["right"] / each["draws"], each)
                for each in pivot["others"]
                if each["draws"] >= _FEWEST_DRAWS and abs(each["right"] / each["draws"] - pivot["after"]) >= threshold
            ]
            others = [(share, each) for share, each in others if (share < pivot["after"]) == rises]
            if not others:
                continue
            _, other = (min if rises else max)(others, key=lambda each: each[0])
            before = solution["token_ids"][: pivot["place"]]
            sides = (pivot, other) if rises else (other, pivot)
            chosen, rejected = (_turn(before, each["token_id"], decode) for each in sides)
            id = f"{asked.id}#{number}.{pivot['place']}"
            yield {"id": id, "prompt": asked.prompt, "chosen": chosen, "rejected": rejected}


def _turn(before: Sequence[int], token: int, decode: Any) -> dict[str, Any]:
    """What an assistant had said, and one token more, by token ids."""
    ids = {"before": [*before], "answer": [token]}
    return {"role": "assistant", "content": decode([*before, token]), "token_ids": ids}
