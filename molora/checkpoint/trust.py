"""Whose code may run: a received folder names plugins, and naming one must not be enough to run it.

What comes with molora, and what an installed package declares as an entry point, is found by name. A file or another
module is run only on the user's word (`--trust-plugin SPEC`, `load(…, trust=[SPEC])`, a recipe that the user trains).
The word is remembered by the code's SHA-256 in the cache folder, so that it holds anywhere, and for that very code.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

from molora.plugins import Found, Kind, Untrusted, comes_by_name, file_of, find, find_in_file
from molora.received import read_bytes
from molora.storage import cache_folder, read_cached_json, write_cached
from molora.terminal import warn

_MAX_CODE_BYTES = 2**24
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_HASH = re.compile("[0-9a-f]{64}")
_MOST_PLACES = 8
_told: set[Found] = set()


class _Known(NamedTuple):
    """Code that the user trusts, by its hash: where it lay, the last place first, and the module that it is if it is no
    file of its own."""

    places: tuple[Path, ...]
    module: str | None


def find_received(kind: Kind, spec: str, sha256: str | None, trusted: Sequence[str | Found] = ()) -> Found:
    """The class that a received folder means by `spec`, whose code has `sha256` if the folder records one. `trusted`
    are specs that the user gives, or plugins that the user's word has run before. Raises Untrusted, before anything
    runs, for code that the user has not allowed, and ConfigError as `find` does."""
    if not isinstance(spec, str) or (sha256 is not None and not _HASH.fullmatch(str(sha256))):
        raise Untrusted(f"{kind} {spec!r:.200}, SHA-256 {sha256!r:.80}: no plugin's; copy the folder again")
    if comes_by_name(kind, spec):
        return find(kind, spec)
    for word in trusted:
        if isinstance(word, Found):
            if (word.spec, word.sha256) == (spec, sha256):
                return word
        elif _same_plugin(word, spec):
            return _on_word(kind, word, sha256)
    try:
        return _remembered_file(kind, spec, sha256) if file_of(spec) else _remembered_module(kind, spec, sha256)
    except Untrusted as error:
        if words := [word for word in trusted if isinstance(word, str)]:
            raise Untrusted(f"{error} (the word that was given is for another plugin: {', '.join(words)})") from error
        raise


def remember(found: Found) -> None:
    """Trusts a plugin's code from now on, wherever a folder names it. Without a cache folder, only for this call."""
    if found.sha256 is None or found.file is None:
        return
    module = None if file_of(found.spec) else found.spec.rpartition(":")[0]
    known = _memory_of(found.sha256)
    places = dict.fromkeys(map(str, [found.file, *(known.places if known else ())]))
    text = json.dumps({"places": list(places)[:_MOST_PLACES], "module": module})
    write_cached(_memory(found.sha256), lambda path: path.write_text(text, encoding="utf-8"))


def _same_plugin(word: str, spec: str) -> bool:
    """Whether the user's word is for what a folder names, wherever the folder says that a file lies."""
    given, named = file_of(word), file_of(spec)
    if given is None or named is None:
        return word == spec
    return (PurePath(given[0]).name, given[1]) == (PurePath(named[0]).name, named[1])


def _on_word(kind: Kind, word: str, sha256: str | None) -> Found:
    found = find(kind, word)
    if found not in _told:
        _told.add(found)
        code = f"{found.file}, SHA-256 {found.sha256}" if found.file else f"module {word}, which has no file"
        other = f"; the folder was made with another version, SHA-256 {sha256}" if sha256 != found.sha256 else ""
        warn(f"{kind} {found.spec} is trusted and runs the code of {code}{other if sha256 else ''}")
    remember(found)
    return found


def _remembered_file(kind: Kind, spec: str, sha256: str | None) -> Found:
    path, class_name = file_of(spec) or ("", "")
    if sha256 is None:  # an older molora wrote it: the folder says where the file lies
        places: tuple[Path, ...] = (Path(os.path.expanduser(path)).absolute(),)
    elif known := _memory_of(sha256):
        places = known.places
    else:
        raise _refused(kind, spec, sha256)
    faults: list[str] = []
    for place in places:
        try:
            source = read_bytes(place, _MAX_CODE_BYTES)
        except (OSError, ValueError):
            faults.append(f"the file is no longer in {place}")
            continue
        now = hashlib.sha256(source).hexdigest()
        if sha256 in (None, now) and _memory_of(now):
            return find_in_file(kind, f"{place}:{class_name}", place.resolve(), partial(bytes, source))
        faults.append(f"{place} was changed since and has SHA-256 {now}")
    raise _refused(kind, spec, sha256, ", ".join(faults) if sha256 else "")


def _remembered_module(kind: Kind, spec: str, sha256: str | None) -> Found:
    module = spec.rpartition(":")[0]
    if not _MODULE.fullmatch(module) or (sha256 is not None and not _memory_of(sha256)):
        raise _refused(kind, spec, sha256)
    file = _module_file(module)
    now = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
    known = None if now is None else _memory_of(now)
    if sha256 is not None and sha256 != now:
        raise _refused(kind, spec, sha256, f"the module that is installed has SHA-256 {now}, in {file}")
    if file is None or known is None or known.module != module:
        raise _refused(kind, spec, sha256)
    if not any(place.exists() and place.samefile(file) for place in known.places):
        told = f"it was trusted in {known.places[0]}, and is now in {file}, beside other files"
        raise _refused(kind, spec, sha256, told)
    return find(kind, spec)


def _module_file(name: str) -> Path | None:
    """Where a module's code lies, found without running it or the packages above it."""
    words = name.split(".")
    places, file = None, None
    for depth in range(1, len(words) + 1):
        above = ".".join(words[:depth])
        found = next(filter(None, (finder.find_spec(above, places) for finder in sys.meta_path)), None)
        if found is None:
            return None
        places, file = found.submodule_search_locations, found.origin if found.has_location else None
    return Path(file) if file else None


def _memory(sha256: str) -> Path:
    return cache_folder() / "trusted" / f"{sha256}.json"


def _memory_of(sha256: str) -> _Known | None:
    """What is remembered of code with this hash, in a file of the user's own."""
    file = _memory(sha256)
    about = read_cached_json(file)
    if about is None or file.stat().st_uid != os.getuid():
        return None
    places, module = about.get("places"), about.get("module")
    if not (isinstance(places, list) and places and all(isinstance(place, str) for place in places)):
        return None
    return _Known(tuple(map(Path, places)), module) if isinstance(module, str | None) else None


def _refused(kind: Kind, spec: str, sha256: str | None, why: str = "") -> Untrusted:
    recorded = f" (SHA-256 {sha256})" if sha256 else ""
    told = f"{kind} {spec!r:.300}{recorded}: this code comes neither with molora nor with an installed package's "
    told += "entry points, so it runs only on your word"
    told += f"; {why}" if why else ""
    if file := file_of(spec):
        name = f"{PurePath(file[0]).name}:{file[1] or 'Class'}"
        get = f"get the file and give --trust-plugin path/to/{name}, or in Python trust=['path/to/{name}']"
    else:
        get = f"install its package and give --trust-plugin {spec:.300}, or in Python trust=[{spec!r:.300}]"
    return Untrusted(f"{told}. If you trust who wrote it, {get}")
