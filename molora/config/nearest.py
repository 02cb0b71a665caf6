"""The hint that an error gives to a name that is nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str], at_most: int = 1) -> str:
    """A question that names the nearest of `names`, with a blank after it; nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=at_most)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
