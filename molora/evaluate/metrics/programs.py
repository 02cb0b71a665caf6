"""A metric of generated programs: whether they pass their tests, in a sandbox."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from molora.config import ConfigError
from molora.evaluate.metrics import Judged, Mean
from molora.evaluate.sandbox import Limits, NoSandbox, run_program


@dataclass(kw_only=True)
class UnitTestsConfig:
    """What a program may take together with its tests: `seconds` that pass, memory, and bytes that it prints."""

    seconds: float = 10.0
    memory_mib: int = 1024
    output_bytes: int = 2**16

    def __post_init__(self) -> None:
        try:
            self.limits()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def limits(self) -> Limits:
        return Limits(seconds=self.seconds, memory_mib=self.memory_mib, output_bytes=self.output_bytes)


class UnitTests(Mean):
    """The share of answers whose Python passes the tests of its row. The expected answer is the tests: Python that runs
    after that of the answer, such as `assert double(2) == 4`. Of an answer with code in fences the last fenced piece is
    run, of any other the whole. It runs in a process that can compute and print, and nothing else; on a system that
    cannot confine it, nothing is run.

    Source: HumanEval (arXiv 2107.03374), pass@1."""

    config_type = UnitTestsConfig
    rates_each = True
    name = share = "unit_tests"

    def __init__(self, config: UnitTestsConfig) -> None:
        self.limits = config.limits()
        self.parallel = os.cpu_count() or 1
        self.known: dict[tuple[str, str], bool] = {}
        try:
            run_program("", self.limits)
        except NoSandbox as error:
            raise ValueError(f"unit tests cannot be run safely here: {error}") from error

    def values(self, judged: Sequence[Judged]) -> list[float]:
        with ThreadPoolExecutor(self.parallel) as threads:
            return [float(passed) for passed in threads.map(self.passes, judged)]

    def passes(self, item: Judged) -> bool:
        return any(self.passed(code_of(item.answer), tests) for tests in item.answers)

    def passed(self, code: str, tests: str) -> bool:
        """Whether a program passes tests; each is run once."""
        if (code, tests) not in self.known:
            self.known[code, tests] = not run_program(f"{code}\n\n{tests}\n", self.limits).why
        return self.known[code, tests]


def code_of(answer: str) -> str:
    """The last piece of code in fences; an answer without any is code itself."""
    fenced = re.findall(r"^```[^\n`]*\n(.*?)^```", answer + "\n", flags=re.MULTILINE | re.DOTALL)
    return fenced[-1] if fenced else answer
