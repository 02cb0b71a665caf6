"""Files of a dataset of the hub: fetched when they are read, and kept on disk within a budget."""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from molora import hub
from molora.config import ConfigError
from molora.data.index import parquet
from molora.data.index.build import SCANS, expanded
from molora.data.index.stored import Index, State, read_index, write_index
from molora.storage import cache_folder, read_cached_json, write_cached

SCHEME = "hf://"
_DEFAULT_DISK_GIB = 20.0
# One that is read, the one before it, which a slower process may still read, and the one behind it.
_ON_DISK = 3
# Where a file is written until it is whole.
_COMING = ".coming"
# The time stamp of every file: what is in it is told by the commit that its folder is named by.
_STAMP_NS = 0
_MAX_NAMED = 5


class Fetched:
    """Some files of a dataset at one commit, in a folder of the cache.

    A file is there once `fetch` has returned, until room is needed for others: then those that were needed longest ago
    are removed. Processes that read the same dataset share the folder, and one of them fetches at a time.
    """

    def __init__(self, repository: str, commit: str, sizes: Mapping[str, int], disk_gib: float | None) -> None:
        self.repository, self.commit = repository, commit
        self.folder = cache_folder() / "shards" / f"{repository.replace('/', '--')}@{commit[:12]}"
        self.files = {self.folder.joinpath(*path.split("/")): path for path in sizes}
        self.sizes = dict(zip(self.files, sizes.values(), strict=True))
        self.max_bytes = int((_DEFAULT_DISK_GIB if disk_gib is None else disk_gib) * 2**30)
        self.ahead: threading.Thread | None = None
        needed = sum(sorted(sizes.values())[-_ON_DISK:])
        if needed > self.max_bytes:
            raise ConfigError(
                f"data source {self}: disk_gib is {self.max_bytes / 2**30:.3g}, but {_ON_DISK} files are on disk at a "
                f"time, the one that is read and those before and behind it, and the largest {_ON_DISK} have "
                f"{needed / 2**30:.3g} GiB; raise disk_gib"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data source {self}: nothing can be kept in {self.folder} ({error.strerror}); let MOLORA_CACHE name "
                "a folder that can be written"
            ) from error

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.repository}@{self.commit[:12]}"

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: the thread stays here."""
        return {**vars(self), "ahead": None}

    def fetch(self, place: Path) -> None:
        """Has a file at its place, and notes that it is needed now. Raises ConfigError if it cannot be fetched."""
        if not self._note(place):
            with self._alone("fetching"):
                if not self._note(place):  # another process may have fetched it meanwhile
                    self._download(place)

    def note(self, places: Iterable[Path]) -> None:
        """Notes that files are needed now; those that are not there are fetched when they are read."""
        for place in places:
            self._note(place)

    def fetch_ahead(self, place: Path) -> None:
        """Begins to fetch a file that will be needed, unless another one is under way in this process."""
        if not place.exists() and not (self.ahead and self.ahead.is_alive()):
            self.ahead = threading.Thread(target=self._try_fetch, args=(place,), daemon=True)
            self.ahead.start()

    def indexed(self, told: Callable[[int, int], object] = lambda done, missing: None) -> list[Index]:
        """The index of each file. For those that are missing, files are read once, the next being fetched meanwhile; of
        Parquet only their ends. `told` is called as by `build.indexed`. Raises ConfigError for what cannot be fetched
        or indexed."""
        with self._alone("indexing"):
            missing = [place for place in self.sizes if self._index(place) is None]
            for done, place in enumerate(missing):
                told(done, len(missing))
                self._keep_index(place, missing[done + 1] if done + 1 < len(missing) else None)
            if missing:
                told(len(missing), len(missing))
        found = [index for place in self.sizes if (index := self._index(place))]
        assert len(found) == len(self.sizes), "an index that was written holds"
        return found

    def _index(self, place: Path) -> Index | None:
        found = read_index(place, State(self.sizes[place], _STAMP_NS))
        return found and replace(found, fetch=partial(self.fetch, place))

    def _keep_index(self, place: Path, after: Path | None) -> None:
        if place.suffix.lower() == ".parquet":
            with self._remote(place) as file:
                scan = parquet.scan_opened(file, place)
        else:
            self.fetch(place)
            if after is not None:
                self.fetch_ahead(after)
            scan = SCANS[place.suffix.lower()](place)
        write_index(place, scan, State(self.sizes[place], _STAMP_NS))

    def _remote(self, place: Path) -> BinaryIO:
        try:
            return hub.open_remote(self.repository, self.commit, self.files[place])
        except hub.HubError as error:
            raise self._lost(place, error) from error

    def _note(self, place: Path) -> bool:
        """Sets the time when a file was needed last; False if it is not there."""
        try:
            os.utime(place, ns=(time.time_ns(), _STAMP_NS))
        except FileNotFoundError:
            return False
        return True

    def _try_fetch(self, place: Path) -> None:
        with contextlib.suppress(ConfigError):  # who reads the file fetches it again, and tells
            self.fetch(place)

    def _download(self, place: Path) -> None:
        coming = self.folder / _COMING
        shutil.rmtree(coming, ignore_errors=True)  # what a kill left
        self._make_room(self.sizes[place])
        try:
            written = hub.download(self.repository, self.commit, self.files[place], coming)
            os.utime(written, ns=(time.time_ns(), _STAMP_NS))
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, place)
        except OSError as error:
            raise self._lost(place, error) from error
        finally:
            shutil.rmtree(coming, ignore_errors=True)

    def _lost(self, place: Path, error: OSError) -> ConfigError:
        return ConfigError(
            f"data source {self}, {self.files[place]}: cannot be fetched ({error}); start again when the network and "
            "the disk are as they should be"
        )

    def _make_room(self, num_bytes: int) -> None:
        """Removes the files that were needed longest ago, until there is room for some bytes."""
        there = {place: place.stat() for place in self.sizes if place.exists()}
        room = self.max_bytes - sum(status.st_size for status in there.values())
        for place, status in sorted(there.items(), key=lambda each: each[1].st_atime_ns):
            if room >= num_bytes:
                return
            place.unlink()
            room += status.st_size

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Waits until no other process does the same here."""
        with open(self.folder / f".{what}.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def fetched(patterns: Sequence[str], disk_gib: float | None) -> Fetched | None:
    """The files of a dataset of the hub that patterns such as hf://datasets/OWNER/NAME@REV/train-*.tar name; None if
    they name files that are here. Without a path, all files that can be indexed are meant.

    Raises ConfigError for a dataset that cannot be listed, a pattern that no file answers to, patterns that are not of
    one dataset, and a budget that is too small or for files that are here.
    """
    of_hub = [each for pattern in patterns if pattern.startswith(SCHEME) for each in expanded(pattern)]
    where = f"data source {', '.join(patterns)}"
    if not of_hub:
        if disk_gib is not None:
            raise ConfigError(f"{where}: disk_gib is for datasets of the hub, {SCHEME}…; leave it out")
        return None
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        named = [parse_hf_uri(pattern) for pattern in of_hub]
    except HfUriError as error:
        raise ConfigError(f"{where}: {error}; write {SCHEME}datasets/OWNER/NAME@REVISION/train-*.tar") from error
    if any(each.type != "dataset" for each in named):
        raise ConfigError(f"{where}: names no dataset; write {SCHEME}datasets/OWNER/NAME@REVISION/train-*.tar")
    if (
        not all(pattern.startswith(SCHEME) for pattern in patterns)
        or len({(each.id, each.revision) for each in named}) > 1
    ):
        raise ConfigError(f"{where}: is of more than one place; make a source of each")
    repository, revision = named[0].id, named[0].revision
    try:
        commit, sizes = _listed(repository, revision)
    except hub.HubError as error:
        raise ConfigError(f"{where}: cannot be listed ({error}); check the name, the network and the login") from error
    chosen: dict[str, int] = {}
    for pattern, each in zip(of_hub, named, strict=True):
        found = [each.path_in_repo] if each.path_in_repo in sizes else _answering(sizes, each.path_in_repo)
        if not found:
            there = ", ".join(sorted(sizes)[:_MAX_NAMED])
            raise ConfigError(f"data source {pattern}: no such file in the dataset, which has {there or 'none'}")
        chosen |= {path: sizes[path] for path in found}
    for path in chosen:
        if Path(path).suffix.lower() not in SCANS:
            raise ConfigError(
                f"{where}: {path} does not end in one of {', '.join(SCANS)}, whose rows can be indexed; name others"
            )
        if any(name.startswith(".") or not name for name in path.split("/")):  # a hub may be anybody's
            raise ConfigError(f"{where}: {path!r:.120} is no path of a dataset's file; name other files")
    return Fetched(repository, commit, chosen, disk_gib)


def _listed(repository: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit of a dataset and the bytes of each file; where the hub cannot be reached, as it was listed before, so
    that a run goes on with the files that are there. Raises HubError."""
    name = f"{repository.replace('/', '--')}@{quote(revision or 'main', safe='')}.json"
    kept = cache_folder() / "shards" / name
    if hub.fault() is not None and (listed := read_cached_json(kept)):
        return listed["commit"], listed["files"]
    commit, sizes = hub.list_dataset(repository, revision)
    text = json.dumps({"format_version": "1", "commit": commit, "files": sizes})
    write_cached(kept, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return commit, sizes


def _answering(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that a pattern means; without one, those of files that can be indexed."""
    if not pattern:
        return sorted(path for path in paths if Path(path).suffix.lower() in SCANS)
    return sorted(path for path in paths if _matches(path.split("/"), pattern.split("/")))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path in folders answers to a pattern in folders, of which ** is any number."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
