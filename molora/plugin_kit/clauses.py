"""Clauses of a contract: declared beside the code that tries them, tried on one plugin, shown and counted.

Each is isolated: what a plugin raises is what the clause found, and clauses that build on it are not reached.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from molora.config import ConfigError
from molora.modality import Encoder
from molora.plugin_kit.under_test import UnderTest
from molora.terminal import Finding, print_findings
from molora.testing.side_effects import fingerprint, put_back, shared_state

TOLERANCE = 1e-5
ALL = "all before it"


class Fault(Exception):
    """What the plugin does wrong, and how to mend it."""


class Undecided(Exception):
    """Why a clause cannot tell."""


@dataclass(frozen=True)
class Clause:
    """A clause of a contract. `check` says what it found, or raises what is wrong; `needs` names what it builds on."""

    name: str
    needs: tuple[str, ...]
    check: Callable[[Any], str]


def clause(name: str, *needs: str) -> Callable[[Callable[[Any], str]], Clause]:
    """Declares a function to be a clause, which is reached if those in `needs` (or ALL before it) are kept."""
    return lambda check: Clause(name, needs, check)


def clauses_of(files: Sequence[ModuleType]) -> list[Clause]:
    """The clauses in these files, in the order in which they stand there."""
    return [value for file in files for value in vars(file).values() if isinstance(value, Clause)]


def try_clauses(files: Sequence[ModuleType], tested: UnderTest) -> list[Finding]:
    """Tries every clause in these files on a plugin. One finding each, also of a clause that is not reached."""
    findings: list[Finding] = []
    causes: dict[str, str] = {}  # a clause that is broken or was not reached, to the one that is broken
    for clause in clauses_of(files):
        needs = causes if ALL in clause.needs else clause.needs
        if cause := next((causes[need] for need in needs if need in causes), ""):
            finding = Finding(clause.name, f"not reached because of what {cause!r} found", None, cause=cause)
        else:
            finding = _tried(clause, tested)
        if finding.ok is False or cause:
            causes[clause.name] = cause or clause.name
        findings.append(finding)
    return findings


def _tried(clause: Clause, tested: UnderTest) -> Finding:
    before = shared_state()
    try:
        return Finding(clause.name, clause.check(tested))
    except (Fault, ConfigError) as fault:
        return Finding(clause.name, str(fault), False)
    except Undecided as doubt:
        return Finding(clause.name, str(doubt), None)
    except Exception as error:  # a plugin can fail in any way, and its own error is the finding
        return Finding(clause.name, f"{_raiser(error, tested.plugin)} raised {words_of(error)}", False)
    finally:
        put_back(before)


def _raiser(error: Exception, plugin: type | None) -> str:
    """The method of the plugin, or of its encoder, inside which an error arose."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, method = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(owner, (plugin or Encoder, Encoder)) and (method == "__init__" or not method.startswith("_")):
            return f"{type(owner).__name__}.{method}"
    return "the plugin"


@contextmanager
def kept(value: Any, fault: str) -> Iterator[None]:
    """Raises the fault if the content of a value changes meanwhile."""
    before = fingerprint(value)
    yield
    if fingerprint(value) != before:
        raise Fault(fault)


def words_of(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def show(findings: Sequence[Finding]) -> int:
    """Prints what clauses found, faults last, within 80 columns; returns the exit code."""
    unreached = Counter(finding.found for finding in findings if finding.cause)
    shown = [finding for finding in findings if not finding.cause]
    shown += [Finding(f"{count} more", found, None) for found, count in unreached.items()]
    kept = print_findings("check", sorted(shown, key=lambda finding: (finding.ok is False, finding.ok is None)))
    words = {False: "failed", True: "passed", None: "undecided"}
    counts = Counter("not reached" if finding.cause else words[finding.ok] for finding in findings)
    told = ", ".join(f"{counts[word]} {word}" for word in (*words.values(), "not reached") if counts[word])
    print("it keeps the contract" if kept else told)
    return int(not kept)
