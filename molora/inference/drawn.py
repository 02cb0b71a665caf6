"""What answers depend on beside their prompts, as files of answers note it: rows that do not agree in it do not go
together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.checkpoint.opening import locate, model_hashes
from molora.config import plain
from molora.convert.release import converted
from molora.inference.generate import GenerationConfig

_DECODING = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed")


def drawn_by(
    model: str, modalities: Sequence[str | Path], rules: Sequence[str], config: GenerationConfig
) -> dict[str, Any]:
    """What draws depend on beside their question: the state of the model, as a digest, and the settings. Raises, as
    `load` does, for a model that is not there."""
    settings = {name: value for name, value in plain(config).items() if name in _DECODING}
    return {"model": model_digest(model, modalities, rules), **settings}


def model_digest(model: str, modalities: Sequence[str | Path], rules: Sequence[str]) -> str:
    """The state of a model and of its router, as a digest. Raises, as `load` does, for one that is not there."""
    return digest([model_hashes(locate(converted(model), modalities)), sorted(rules)])


def digest(value: Any) -> str:
    """Some digits that tell what JSON can hold from all else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
