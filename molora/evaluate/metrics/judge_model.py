"""A metric that asks another model, at an OpenAI-compatible address, how good each answer is."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molora.config import ConfigError, require
from molora.data.messages import parts
from molora.evaluate.metrics import Counted, Judged, ratio
from molora.inference.remote import Refused, Server, ServerConfig, Silent
from molora.terminal import warn

_PROMPT = """How well does the answer agree with the accepted one?

Question: {question}
Accepted answer: {expected}
Answer: {answer}

Write one number from {lowest:g} (wrong) to {highest:g} (right) and nothing else."""

# A server that leaves so many answers in a row without a word, each after its retries, is asked no more.
_MAX_SILENT = 10


@dataclass(kw_only=True)
class JudgeConfig(ServerConfig):
    """`url` is where the server's `chat/completions` lies, as http://127.0.0.1:8000/v1, and `model` its name there.
    `prompt` names {answer}, and may name {question}, {expected}, {lowest} and {highest}; the judge sees no media. The
    last line of its reply must be a number from `lowest` to `highest`, alone or after "score:". `key_variable` names
    the environment variable that holds the server's key, if it asks for one. `parallel` requests run at a time. A
    request that has no answer in `timeout_seconds`, or that a busy server refuses, is sent again up to `retries` times,
    the first time after `wait_seconds` and then after twice as long each time. `more` is what else a request holds, in
    that server's words, such as a form of its reply."""

    prompt: str = _PROMPT
    lowest: float = 0.0
    highest: float = 10.0
    max_tokens: int = 512
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "max_tokens")
        if not self.lowest < self.highest:
            raise ConfigError(f"lowest is {self.lowest:g} and highest {self.highest:g}; lowest must be less")
        try:
            shown = self.prompt.format(question="", expected="", answer="\0", lowest=0.0, highest=1.0)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"prompt: {error!r} is no part of it; it may name {{question}}, {{expected}}, {{answer}}, {{lowest}} "
                "and {highest}, and writes other braces twice"
            ) from error
        if "\0" not in shown:
            raise ConfigError("prompt: does not name {answer}, so the judge would not see what it judges; put it in")


class NoScore(ValueError):
    """Why the judge gave an answer no score."""


class JudgeModel(Counted):
    """The mean score that a judge model gives the answers, and how many it gave none (`judge_failed`), which are not in
    the mean. Each answer is judged once. As the verifier of a roll-out its scores are spread over 0 to 1.

    Source: LLM-as-a-judge (arXiv 2306.05685)."""

    config_type = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.parallel = config.parallel
        self.server = Server(config)
        self.scores: dict[tuple[str, str], float | NoScore] = {}
        self.silent = 0
        self.server.check()

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        self.silent = 0
        new = {(item.id, item.answer): item for item in judged if (item.id, item.answer) not in self.scores}
        with ThreadPoolExecutor(self.config.parallel) as threads:
            given = list(threads.map(self.ask, new.values()))
        self.scores.update(zip(new, given, strict=True))
        if missing := [each for each in given if isinstance(each, NoScore)]:
            told = f"{len(missing)} of {len(given)} answers have no score; the first: {missing[0]}"
            warn(f"judge: {told}; --rescore asks again")
        found = [self.scores[item.id, item.answer] for item in judged]
        return np.array([(0.0, 0, 1) if isinstance(each, NoScore) else (each, 1, 0) for each in found])

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        total, scored, failed = sums_BK.T
        return {"judge": ratio(total, scored), "judge_failed": failed}

    def rate(self, item: Judged) -> float:
        """The score of one answer, from 0 to 1. Raises NoScore."""
        score = self.ask(item)
        if isinstance(score, NoScore):
            raise score
        return (score - self.config.lowest) / (self.config.highest - self.config.lowest)

    def ask(self, item: Judged) -> float | NoScore:
        """The judge's score of an answer, or why there is none."""
        config = self.config
        facts = {"question": _question(item), "expected": " or ".join(dict.fromkeys(item.answers))}
        text = config.prompt.format(**facts, answer=item.answer, lowest=config.lowest, highest=config.highest)
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": config.max_tokens,
            "temperature": 0,
            **config.more,
        }
        if self.silent >= _MAX_SILENT:
            return NoScore(f"not asked, as {config.url} was silent for {self.silent} others")
        try:
            reply = self.server.complete(body)
            self.silent = 0
            return self.read(reply)
        except NoScore as error:
            return error
        except Refused as error:
            return NoScore(str(error))
        except Silent as error:
            self.silent += 1
            return NoScore(str(error))

    def read(self, reply: bytes) -> float:
        """The score in a server's reply. Raises NoScore."""
        try:
            said = json.loads(reply)["choices"][0]["message"]["content"].strip()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoScore(f"no chat completion: {reply[:100]!r}") from error
        last = said.rpartition("\n")[2].strip(" *")
        found = re.fullmatch(r"(?:score\s*:[\s*]*)?([+-]?\d+(?:\.\d+)?)", last, flags=re.IGNORECASE)
        if found is None or not self.config.lowest <= float(found[1]) <= self.config.highest:
            raise NoScore(f"the reply ends with {last[:100]!r}, no number in the range")
        return float(found[1])


def _question(item: Judged) -> str:
    """The last message of a question as text, its media by their types."""
    last = parts(item.messages[-1]) if item.messages else []
    return "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in last)
