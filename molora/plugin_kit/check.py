"""Tries plugins against every clause of their contract: what `molora modality check` and `molora router check` do."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.plugin_kit import encoder_clauses, modality_clauses, model_clauses, router_clauses
from molora.plugin_kit.clauses import try_clauses
from molora.plugin_kit.under_test import ModalityUnderTest, RouterUnderTest
from molora.terminal import Finding

# The files of a modality's clauses, in the order in which they are tried.
MODALITY = (modality_clauses, encoder_clauses, model_clauses)


def check_modality(
    spec: str, options: Mapping[str, Any] | None = None, parts: Sequence[Mapping[str, Any]] | None = None
) -> list[Finding]:
    """Tries a modality plugin on the CPU, on its own examples or on `parts`: content parts that it should take. It is
    tried by itself, in other processes, and in a tiny model with a second modality; no other files are needed."""
    with tempfile.TemporaryDirectory() as folder:
        return try_clauses(MODALITY, ModalityUnderTest(spec, dict(options or {}), parts, Path(folder)))


def check_router(spec: str, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Tries a router plugin in a tiny model, in fp32 on the CPU; needs no files."""
    return try_clauses([router_clauses], RouterUnderTest(spec, dict(options or {})))
