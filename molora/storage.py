"""Files that survive a kill, other people's folders and full disks; and locks, so that two runs do not write one."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from molora.config import ConfigError
from molora.received import read_json
from molora.shard import is_first_process

_MAX_NAMED = 8
# The lock of a draft: of what a process is writing in a folder beside it (.tmp), and what that replaces (.former).
_DRAFT = re.compile(r"\.molora-[0-9a-f]{16}\.lock")
_HOLDER = re.compile(r"process \d{1,10} on [\w.-]{1,80}")
_ABOUT_MADE = "What molora converted once, to open it faster. It can be deleted.\n"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, then makes the result appear at `path` in one step. The temporary file is new, in
    a folder beside `path` that no one else writes in. A link at `path` is replaced, not followed. The mode follows the
    umask, whatever `write` does. On an OSError, `path` is as it was."""
    with _draft(path.parent) as new:
        temporary, mode = new / "file", _mode(new)
        temporary.touch()
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which then becomes the folder at `path`, in place of one that is there. After an
    error what was at `path` is as it was; after a kill between the two renames `hold` puts it back, or whoever writes a
    folder beside it. Raises ConfigError where no folder can be."""
    _remove_dead(path.parent.glob(".molora-*.lock"))
    with contextlib.ExitStack() as opened:
        try:
            new = opened.enter_context(_draft(path.parent))
        except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
            raise ConfigError(f"{path}: no folder can be made there ({error.strerror}); give another place") from error
        yield new
        settle(new)
        if os.path.lexists(path):
            former = new.with_suffix(".former")
            former.mkdir()
            os.replace(path, former / path.name)
        os.replace(new, path)
    sync(path.parent)


@contextlib.contextmanager
def _draft(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for what this process is writing, with a name that no one can know before. It is locked for
    as long as the process writes, where there are locks."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = parent / f".molora-{secrets.token_hex(8)}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _held().add(descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(lock, descriptor):
            break
        _let_go(descriptor)  # who removes what killed processes left came between the two calls
    new = lock.with_suffix(".tmp")
    try:
        new.mkdir()
        yield new
    finally:
        if descriptor in _held():  # not in a process that was forked meanwhile
            try:
                _discard(lock)
            finally:
                _let_go(descriptor)


def _mode(new: Path) -> int:
    """The mode that the umask gives to a file of a draft."""
    return stat.S_IMODE(new.with_suffix(".lock").stat().st_mode)


def _discard(lock: Path) -> None:
    """Removes a draft, and moves what it should have replaced back to its place, if nothing is there."""
    new, former = lock.with_suffix(".tmp"), lock.with_suffix(".former")
    if new.exists() and former.is_dir() and not former.is_symlink():
        for path in former.iterdir():
            if not os.path.lexists(lock.with_name(path.name)):
                os.replace(path, lock.with_name(path.name))
    for folder in (former, new):
        shutil.rmtree(folder, ignore_errors=True)
    if not former.exists() and not new.exists():
        lock.unlink(missing_ok=True)


def _remove_dead(locks: Iterable[Path]) -> None:
    """Discards those drafts whose process was killed. What cannot be locked, or not be removed, stays."""
    for lock in locks:
        if _DRAFT.fullmatch(lock.name):
            with contextlib.suppress(OSError):
                descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(lock, descriptor):
                        _discard(lock)
                finally:
                    os.close(descriptor)


@cache
def _held() -> set[int]:
    """Locks that this process has. One that is forked from it has none: else those of a parent that was killed stay."""
    held: set[int] = set()

    def let_go() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=let_go)
    return held


def _let_go(descriptor: int) -> None:
    _held().discard(descriptor)
    os.close(descriptor)


def _is_at(lock: Path, descriptor: int) -> bool:
    """Whether an open file is the one that lies at `lock` now."""
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def settle(folder: Path) -> None:
    """Syncs a folder's files that a library wrote, with the umask's mode: safetensors lets only the owner read them."""
    with _draft(folder) as new:
        mode = _mode(new)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, partial(save_tensors, contiguous))


def save_tensors(tensors: Mapping[str, Tensor], temporary: Path, metadata: dict[str, str] | None = None) -> None:
    """What `write_atomically` calls for safetensors. Raises OSError for a full disk, as other writers do."""
    try:
        save_file(dict(tensors), temporary, metadata)
    except SafetensorError as error:
        beside = temporary.parent.parent  # as `write_atomically` has it
        raise OSError(f"{beside}: tensors cannot be written there ({error}); free some space") from error


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """Compares shapes by tensor name. Raises ValueError listing what is unknown, missing or of another shape."""
    problems = [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [
        f"{key} is {tuple(found[key])}, expected {tuple(expected[key])}"
        for key in sorted(found.keys() & expected.keys())
        if tuple(found[key]) != tuple(expected[key])
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ValueError(f"{where}: the tensors do not fit: {'; '.join(problems[:_MAX_NAMED])}{more}")


def cache_folder() -> Path:
    """Where what can be made again is kept between runs."""
    try:
        return Path(os.environ.get("MOLORA_CACHE", "~/.cache/molora")).expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(os.devnull) / "molora"  # where nothing is and nothing can be written


def write_cached(path: Path, write: Callable[[Path], object]) -> bool:
    """Writes a file that only saves time, atomically. If it cannot be written, says so once and returns False."""
    try:
        write_atomically(path, write)
    except OSError as error:
        _warn_once(
            f"{path.parent}: nothing can be kept there ({error.strerror or error}); going on without, so that what "
            "would be kept is made anew every time; name a folder that can be written (MOLORA_CACHE; feature_cache "
            "in a recipe)"
        )
        return False
    return True


def made_once(kind: str, key: str, is_whole: Callable[[Path], bool], make: Callable[[Path], object]) -> Path:
    """The folder `key` of a `kind` in the cache, which `make` writes unless it is there and whole. Of several processes
    one makes it, and the others wait; what a killed one left is removed. Where the cache cannot be written, the folder
    lies elsewhere and goes with the process."""
    folder = cache_folder() / kind / key
    if is_whole(folder):
        return folder
    if not write_cached(folder.with_name("about.txt"), lambda path: path.write_text(_ABOUT_MADE)):
        if kind not in _temporary:
            _temporary[kind] = TemporaryDirectory(prefix="molora-")
        folder = Path(_temporary[kind].name) / key
    lock = folder.with_name(".lock")
    with _locked(lock, folder, wait=True):
        _sweep(Path(os.path.realpath(folder.parent)))
        if not is_whole(folder):
            if folder.exists():
                shutil.rmtree(folder)
            make(folder)
    return folder


def read_cached_json(path: Path) -> dict[str, Any] | None:
    """A file that `write_cached` wrote; None if it is not there, cannot be read or is damaged: then make it anew."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


_said: set[str] = set()
# By kind, what `made_once` makes where the cache cannot be written.
_temporary: dict[str, TemporaryDirectory[str]] = {}


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keeps other processes from a run folder, which must be there, or from an output file, there or not.

    The lock goes with the process, however it ends. Of a run's several ranks only the first takes it. Temporary
    files that a killed process left in the folder are removed, and what it had set aside is put back.

    Raises ConfigError if another process holds the lock, for what cannot be locked, and for a link that leads out of
    the folder.
    """
    if not is_first_process():
        yield
        return
    path = Path(os.path.realpath(path))
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    with _locked(lock, path):
        if path.is_dir():
            _sweep(path)
        yield


@contextlib.contextmanager
def _locked(lock: Path, path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from `path` by a file `lock`, which is gone afterwards; else as `_take`."""
    descriptor = _take(lock, path, wait=wait)
    try:
        yield
    finally:
        if descriptor in _held():  # not in a process that was forked meanwhile
            lock.unlink(missing_ok=True)
            _let_go(descriptor)


def _take(lock: Path, path: Path, *, wait: bool = False) -> int:
    """An open file that is locked, and still the one at `lock`; with `wait`, as soon as no one else has it."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            hint = "remove the link" if error.errno == errno.ELOOP else "give a place that can be written"
            raise ConfigError(f"{path}: cannot be locked ({lock}: {error.strerror}); {hint}") from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise ConfigError(f"{path}: cannot be locked, since {lock} is no file of its own; remove it")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _HOLDER.search(os.pread(descriptor, 200, 0).decode(errors="replace"))
                who = holder[0] if holder else "another process"
                raise ConfigError(f"{path}: in use by {who}; wait until it ends, or give another place") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _warn_once(f"{path}: its file system has no locks ({error.strerror}); let nothing else write there")
            if _is_at(lock, descriptor):  # else its holder ended and removed it between the two calls
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                _held().add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left, and puts back what they should have replaced. Raises ConfigError for a link
    out of the folder: it would be written through, and what it leads to removed with old states."""
    for root, _, files in os.walk(folder):
        _remove_dead(Path(root, name) for name in files)
    for root, folders, files in os.walk(folder):  # once all is in its place
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder):
                told = f"{path}: leads out of the run, to {os.path.realpath(path)}, and is not written through"
                raise ConfigError(f"{told}; put what it leads to in its place, or make the whole of {folder} a link")
