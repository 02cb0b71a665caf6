"""Examples: the questions in a run's examples.jsonl, and the parts that plugins give as examples of themselves."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.messages import conversation, parts
from molora.data.processor import Processor
from molora.received import parse_json, read_bytes

FILE = "examples.jsonl"
_MAX_ROWS = 24
_MAX_FILE_BYTES = 2**20
_MAX_MEDIUM_BYTES = 2**21


def read_examples(run: Path | None) -> list[list[dict[str, Any]]]:
    """The content of each question in a run's examples.jsonl, as clients send it: a row has `messages`, which is one
    message of a user, and the `path` of a medium is that of a file in the run. None where there is no such file.
    Raises ConfigError for a row that is anything else."""
    if run is None or not (run / FILE).exists():
        return []
    how = "mend it, or take the file away to serve without examples"
    try:
        lines = read_bytes(run / FILE, _MAX_FILE_BYTES, run).splitlines()
        rows = {f"{run / FILE}, line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
        if len(rows) > _MAX_ROWS:
            raise ValueError(f"{run / FILE}: has {len(rows)} rows, and {_MAX_ROWS} is the most")
        return [_question(parse_json(line, where), run, where) for where, line in rows.items()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; {how}") from error


def _question(row: Mapping[str, Any], run: Path, where: str) -> list[dict[str, Any]]:
    messages = conversation(row, where)
    if [message["role"] for message in messages] != ["user"]:
        raise ValueError(f"{where}: an example is one message, of a user")
    return [_as_sent(part, run, where) for part in parts(messages[0])]


def _as_sent(part: Mapping[str, Any], run: Path, where: str) -> dict[str, Any]:
    if "path" not in part:
        return dict(part)
    name = part["path"]
    if not isinstance(name, str) or part["type"] not in ("image", "audio"):
        raise ValueError(f"{where}: the path of a picture or a sound is the name of a file, not {name!r:.80}")
    data = base64.b64encode(read_bytes(run / name, _MAX_MEDIUM_BYTES, run)).decode()
    if part["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": data}}
    return {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}}


def own_parts(processor: Processor) -> dict[str, dict[str, Any]]:
    """By type, the first of the examples that a modality gives of itself that is plain JSON: how its parts look."""
    found = {}
    for modality in processor.modalities.values():
        for part in modality.examples():
            try:
                found.setdefault(modality.part_type, json.loads(json.dumps(part, allow_nan=False)))
            except (TypeError, ValueError):  # it holds a medium, as a picture does
                continue
    return found
