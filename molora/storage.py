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
from functools import partial
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
# What a process is writing, in a folder of such a name with a lock that goes with the process.
_DRAFT = re.compile(r"\.molora-[0-9a-f]{16}\.tmp")
_FORMER = ".former"  # in a draft, what it replaces
_HOLDER = re.compile(r"process \d{1,10} on [\w.-]{1,80}")
_ABOUT_MADE = "What molora converted once, to open it faster. It can be deleted.\n"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, then makes the result appear at `path` in one step. The temporary file is new, in
    a folder beside `path` that no one else writes in. A link at `path` is replaced, not followed. The mode follows the
    umask, whatever `write` does. On an OSError, `path` is as it was."""
    with _draft(path.parent) as draft:
        temporary, mode = draft / "new", (draft / ".lock").stat().st_mode
        temporary.touch()
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which then becomes the folder at `path`, in place of one that is there. After an
    error what was at `path` is as it was; after a kill between the two renames `hold` puts it back. Raises ConfigError
    where no folder can be."""
    _remove_dead(path.parent.glob(".molora-*.tmp"))
    with contextlib.ExitStack() as opened:
        try:
            draft = opened.enter_context(_draft(path.parent))
        except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
            raise ConfigError(f"{path}: no folder can be made there ({error.strerror}); give another place") from error
        yield draft
        settle(draft)
        with _draft(path.parent) as aside:
            (aside / _FORMER).mkdir()
            if os.path.lexists(path):
                os.replace(path, aside / _FORMER / path.name)
            os.replace(draft, path)
            (path / ".lock").unlink()
    sync(path.parent)


@contextlib.contextmanager
def _draft(parent: Path) -> Iterator[Path]:
    """A folder in `parent` with a name that no one can know before, for what this process is writing."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        draft = parent / f".molora-{secrets.token_hex(8)}.tmp"
        draft.mkdir()
        if (descriptor := _locked(draft)) is not None:
            break  # else who removes what killed processes left came between the two calls
    try:
        yield draft
    finally:
        _discard(draft)
        os.close(descriptor)


def _locked(draft: Path) -> int | None:
    """The open lock of a draft, if no other process has it or removed it."""
    lock = draft / ".lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if os.path.samestat(lock.stat(follow_symlinks=False), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _discard(draft: Path) -> None:
    """Moves what was set aside back to its place, if nothing is there, and removes the draft."""
    former = draft / _FORMER
    if former.is_dir() and not former.is_symlink():
        for path in former.iterdir():
            if not os.path.lexists(draft.parent / path.name):
                os.replace(path, draft.parent / path.name)
        shutil.rmtree(former, ignore_errors=True)  # before the lock
    shutil.rmtree(draft, ignore_errors=True)


def _remove_dead(paths: Iterable[Path]) -> None:
    """Discards those drafts whose process was killed."""
    for draft in paths:
        if _DRAFT.fullmatch(draft.name) and draft.is_dir() and not draft.is_symlink():
            with contextlib.suppress(OSError):  # such as another user's
                if (descriptor := _locked(draft)) is not None:
                    _discard(draft)
                    os.close(descriptor)


def settle(folder: Path) -> None:
    """Syncs a folder's files that a library wrote, with the umask's mode: safetensors lets only the owner read them."""
    with _draft(folder) as draft:
        mode = stat.S_IMODE((draft / ".lock").stat().st_mode)
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
        raise OSError(f"{temporary.parent}: tensors cannot be written there ({error}); free some space") from error


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
    descriptor = _take(lock, folder, wait=True)
    try:
        _sweep(Path(os.path.realpath(folder.parent)))
        if not is_whole(folder):
            if folder.exists():
                shutil.rmtree(folder)
            make(folder)
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
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
    descriptor = _take(lock, path)
    in_parent = True

    def let_go_in_child() -> None:  # a data worker must not keep the lock of a parent that was killed
        if in_parent:
            os.close(descriptor)

    os.register_at_fork(after_in_child=let_go_in_child)
    try:
        if path.is_dir():
            _sweep(path)
        yield
    finally:
        in_parent = False
        lock.unlink(missing_ok=True)
        os.close(descriptor)


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
            with contextlib.suppress(FileNotFoundError):  # its holder ended and removed it between the two calls
                if os.path.samestat(os.stat(lock, follow_symlinks=False), found):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left, and puts back what they had set aside. Raises ConfigError for a link out of
    the folder: it would be written through, and what it leads to removed with old states."""
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder):
                told = f"{path}: leads out of the run, to {os.path.realpath(path)}, and is not written through"
                raise ConfigError(f"{told}; put what it leads to in its place, or make the whole of {folder} a link")
        _remove_dead(Path(root, name) for name in folders)
