"""What is written is whole, readable by those whom the umask allows, and written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from molora import received, storage
from molora.checkpoint.run_folder import latest_state, save_state
from molora.config import ConfigError
from molora.storage import hold, settle, write_atomically, write_cached, write_folder, write_tensors, write_text

HOLDER = """
import os, sys, time
from pathlib import Path
from molora.storage import hold
with hold(Path(sys.argv[1])):
    if "fork" not in sys.argv or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
"""


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def small_files() -> Iterator[None]:
    """The disk is full after 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    write_text(tmp_path / "b.json", "{}")
    assert modes(tmp_path) == {0o666 & ~umask}


def test_what_a_library_wrote_gets_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("")
    settle(tmp_path)
    assert modes(tmp_path) == {0o666 & ~umask}


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "a.json").symlink_to("secret")
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "secret").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_folder_that_cannot_be_replaced_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = tmp_path / "folder"
    with write_folder(folder) as draft:
        (draft / "a").write_text("old")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if (source / "a").read_text() == "new":
            raise OSError("full")
        replace(source, target)

    if when == "renaming":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"), write_folder(folder) as draft:
        (draft / "a").write_text("new")
        if when == "writing":
            raise OSError("full")
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    monkeypatch.undo()
    with write_folder(folder) as draft:
        (draft / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)})
    with pytest.raises(OSError, match=f"^{tmp_path}: tensors cannot be written there.*free some space"):
        write_tensors(path, {"x": torch.ones(2**16)})
    assert received.read_tensors(path)["x"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_names_as_long_as_the_file_system_allows_are_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 255), "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]


def held(path: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *more], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_second_process_is_told_who_holds_it(tmp_path: Path, kind: str) -> None:
    path = other = tmp_path / "x"
    if kind != "file":
        path.mkdir()
    if kind == "link":
        other = tmp_path / "link"
        other.symlink_to("x")
    process, _ = held(path)
    try:
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on [\w.-]+"), hold(other):
            pass
    finally:
        process.kill()
        process.wait()
    with hold(other):  # a kill lets go
        pass
    assert [path.name for path in tmp_path.rglob("*lock")] == []


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    process, worker = held(tmp_path, "fork")
    try:
        process.kill()
        process.wait()
        os.kill(int(worker), 0)
        with hold(tmp_path):
            pass
    finally:
        os.kill(int(worker), 9)


def test_only_the_first_rank_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with hold(tmp_path):
            pass


def test_holding_removes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    for name in (".mine.tmp", "a.json"):
        (tmp_path / "state" / name).write_text("")

    def die(temporary: Path) -> None:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    if os.fork() == 0:
        write_atomically(tmp_path / "state" / "a.json", die)
    os.wait()
    assert len(list((tmp_path / "state").iterdir())) == 4
    with hold(tmp_path):
        pass
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [".mine.tmp", "a.json"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    """Such as an evaluation of a run that someone starts to train."""
    (tmp_path / "run").mkdir()
    with write_folder(tmp_path / "run" / "a") as draft:
        (draft / "old").write_text("")

    def take(temporary: Path) -> None:
        temporary.write_text("new")
        with hold(tmp_path / "run"), write_folder(tmp_path / "run" / "b"):
            pass

    write_atomically(tmp_path / "run" / "file", take)
    with write_folder(tmp_path / "run" / "a") as draft:
        write_atomically(draft / "new", take)
    assert sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")) == [
        "a",
        "a/new",
        "b",
        "file",
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from molora.storage import write_folder
replace, left = os.replace, int(sys.argv[2])
def dying(*names):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(*names)
os.replace = dying
with write_folder(Path(sys.argv[1])) as draft:
    (draft / "a").write_text("new")
"""


@pytest.mark.parametrize(("renames", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_folder_is_there_again_after_a_kill_between_its_renames(tmp_path: Path, renames: int, found: str) -> None:
    folder = tmp_path / "state" / ("f" * 255)
    with write_folder(folder) as draft:
        (draft / "a").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)])
    assert killed.returncode == (0 if renames == 2 else -signal.SIGKILL)
    assert folder.exists() == (renames != 1)
    with hold(tmp_path):
        pass
    assert (folder / "a").read_text() == found
    assert list((tmp_path / "state").iterdir()) == [folder]


@pytest.fixture
def killed_draft(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and the folder of what a process that was killed would have put something in place of."""
    draft = tmp_path / "run" / ".molora-0123456789abcdef"
    for ending in ("tmp", "former"):
        draft.with_suffix(f".{ending}").mkdir(parents=True)
    draft.with_suffix(".lock").touch()
    return tmp_path / "run", draft.with_suffix(".former")


def test_what_was_set_aside_does_not_replace_what_is_there(killed_draft: tuple[Path, Path]) -> None:
    run, former = killed_draft
    (former / "a").write_text("old")
    (run / "a").write_text("new")
    with hold(run):
        pass
    assert [path.read_text() for path in run.iterdir()] == ["new"]


def test_what_was_replaced_does_not_come_back(killed_draft: tuple[Path, Path]) -> None:
    """Such as half of a folder, by a kill while it was removed, after someone moved the new one away."""
    run, former = killed_draft
    (former / "a").write_text("half")
    former.with_suffix(".tmp").rmdir()
    with write_folder(run / "b"):
        pass
    assert [path.name for path in run.iterdir()] == ["b"]


@pytest.mark.parametrize("inside", [False, True])
def test_links_of_a_received_run_lead_nowhere(killed_draft: tuple[Path, Path], inside: bool) -> None:
    run, former = killed_draft
    elsewhere = run.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "b").write_text("theirs")
    if not inside:
        former.rmdir()
    (former / "state" if inside else former).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="leads out of the run"), hold(run):
        pass
    assert (elsewhere / "b").read_text() == "theirs"
    assert not (run / "b").exists()


def test_without_locks_what_another_process_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with write_folder(tmp_path / "a") as draft:
        with write_folder(tmp_path / "b"), hold(tmp_path):
            pass
        (draft / "x").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_process_that_is_forked_meanwhile_neither_removes_nor_keeps_a_draft(tmp_path: Path) -> None:
    with suppress(InterruptedError):
        with hold(tmp_path), write_folder(tmp_path / "a") as draft:
            if (child := os.fork()) == 0:
                raise InterruptedError
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert (tmp_path / ".lock").exists()
            (draft / "x").write_text("")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        return
    os._exit(1 if storage._held() else 0)


def test_a_rank_writes_in_a_run_that_the_first_rank_takes_meanwhile(tmp_path: Path) -> None:
    def write_clips() -> None:
        for clip in range(3):
            write_tensors(tmp_path / "clips" / str(clip), {"x": torch.ones(3)})

    with ThreadPoolExecutor(1) as other:
        for _ in range(200):
            written = other.submit(write_clips)
            with hold(tmp_path):
                written.result()
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["0", "1", "2"]


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for name in "ab":
        assert not write_cached(tmp_path / "file" / name, lambda path: path.write_text(""))
    assert capsys.readouterr().err.count("warning") == 1
    assert write_cached(tmp_path / "c", lambda path: path.write_text(""))


def test_a_user_without_a_home_has_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", "~no-such-user-here/cache")
    assert not (storage.cache_folder() / "x").is_file()
    assert not write_cached(storage.cache_folder() / "x", lambda path: path.write_text(""))


def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path, small_files: None) -> None:
    save_state(tmp_path, "step-1", {"weights": {"x": torch.ones(3)}}, {"step": 1})
    with pytest.raises(OSError, match="free some space"):
        save_state(tmp_path, "step-2", {"small": {"x": torch.ones(3)}, "large": {"x": torch.ones(2**16)}}, {"step": 2})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-1"]
    state = latest_state(tmp_path)
    assert state is not None
    assert received.read_json(state / "state.json")["step"] == 1
    assert received.read_tensors(state / "weights.safetensors")["x"].tolist() == [1, 1, 1]


def test_a_state_follows_the_umask_and_replaces_older_ones_alone(tmp_path: Path, umask: int) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes").write_text("mine")
    for step in (1, 2, 2):
        save_state(tmp_path, f"step-{step}", {"weights": {"x": torch.ones(3)}}, {})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["notes", "step-2"]
    assert modes(tmp_path / "state" / "step-2") == {0o666 & ~umask}
