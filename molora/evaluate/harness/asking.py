"""What both harnesses do: open a model by their arguments, and have it answer by their settings."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora.config import ConfigError
from molora.inference.generate import GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel, load
from molora.pack import Sample
from molora.terminal import progress, warn

# Names of one setting; the first that is there counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = (*_MAX_TOKENS, "until", "do_sample", "temperature", "top_p")
_MAX_NAMED = 3


@dataclass(frozen=True)
class Asked:
    """A question of a harness: what it is called in errors, its sample when its turn comes, and how it is answered."""

    id: str
    sample: Callable[[], Sample]
    config: GenerationConfig


@dataclass(frozen=True)
class Reply:
    """The answer to a question, with the spaces around it, and its counts."""

    text: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def open_model(
    run: str, modalities: str | None, trust: str | None, dtype: str | None, device: str | None
) -> LoadedModel:
    """A run folder, or a backbone with the modality folders that `modalities` names, apart by colons. `trust` names
    plugins as `--trust-plugin` does, apart by colons too. Raises what `load` raises, and ConfigError in one of several
    processes, each of which would answer everything."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and molora runs in one process under a harness")
    return load(run, _listed(modalities), trust=_listed(trust), dtype=dtype, device=device)


def _listed(names: str | None) -> list[str]:
    return names.split(os.pathsep) if names else []


def generation_config(given: Mapping[str, Any], max_new_tokens: int) -> GenerationConfig:
    """A task's settings, with `max_new_tokens` where it does not say how many. Raises ValueError for a value that
    cannot be followed."""
    until = given.get("until") or ()
    most = next((given[name] for name in _MAX_TOKENS if given.get(name) is not None), max_new_tokens)
    temperature = float(given.get("temperature") or 0.0)
    sampled: dict[str, Any] = {}
    if temperature > 0 and given.get("do_sample") is not False:
        sampled = {"temperature": temperature, "top_p": float(given.get("top_p") or 1.0)}
    stop = (until,) if isinstance(until, str) else tuple(until)
    return GenerationConfig(max_new_tokens=int(most), stop=stop, **sampled)


def warn_of_unread(given: Iterable[Mapping[str, Any]]) -> None:
    """Tells which settings of tasks are not followed."""
    unread = {f"{key}={value}" for each in given for key, value in each.items() if key not in _READ and value}
    if unread := unread - {"num_beams=1"}:
        warn(f"generation settings of the task that molora does not read: {', '.join(sorted(unread))}")


def replies(loaded: LoadedModel, asked: Sequence[Asked]) -> list[Reply]:
    """Answers questions, whose ids are unique, in their order; those of equal settings decode together. One that cannot
    be answered has an empty reply, which the harness takes for a wrong one, and a warning says how many there are."""
    by_config: dict[GenerationConfig, list[Asked]] = {}
    for question in asked:
        by_config.setdefault(question.config, []).append(question)
    found: dict[str, Reply] = {}
    failed: list[str] = []
    with progress() as bars:
        bar = bars.add_task("generate", total=len(asked), note="")
        for config, questions in by_config.items():
            for answer in _answers(loaded, config, questions):
                found[answer.id] = Reply(
                    loaded.text(answer.token_ids, config), answer.prompt_tokens, answer.answer_tokens
                )
                if answer.error is not None:
                    failed.append(str(answer.error))
                    found[answer.id] = Reply()
                bars.advance(bar)
    warn_of_failed(failed, len(asked), "an empty answer")
    return [found[question.id] for question in asked]


def _answers(loaded: LoadedModel, config: GenerationConfig, asked: Sequence[Asked]) -> Iterator[Answer]:
    samples = (attempt(question.sample, question.id) for question in asked)
    return loaded.answers(samples, config, keep_going=True)


def warn_of_failed(failed: Sequence[str], count: int, stands_for: str) -> None:
    if failed:
        named = "; ".join(failed[:_MAX_NAMED]) + ("; …" if len(failed) > _MAX_NAMED else "")
        warn(f"{len(failed)} of {count} requests failed, and {stands_for} stands for each: {named}")
