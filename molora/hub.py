"""The Hugging Face hub: whether it answers is asked first, so that nobody waits for retries of what cannot work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

_WAIT_SECONDS = 3.0
_MAX_TOLD = 200


class HubError(FileNotFoundError):
    """What neither the hub gives nor was fetched of it before."""


def fault() -> str | None:
    """Why the hub cannot be asked; None if it can. Then it is not tried again in this process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, as HF_HUB_OFFLINE says"
    try:
        _reach(constants.ENDPOINT)
    except Exception as error:  # of the hub's HTTP library, which changes with its versions
        return f"the hub at {constants.ENDPOINT} cannot be reached ({_told(error)})"
    return None


@cache
def _reach(endpoint: str) -> None:
    """Returns for any answer at all."""
    from huggingface_hub.utils import get_session

    get_session().head(endpoint, timeout=_WAIT_SECONDS)


def fetch_snapshot(repository: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """The files of a model's repository whose names match a pattern in `wanted`, as a folder that is named by their
    commit: from the hub, or where it cannot be reached what was fetched before. Raises HubError."""
    from huggingface_hub import snapshot_download

    away = fault()
    with _hub_errors(away):
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(wanted), local_files_only=away is not None
        )
    return Path(found)


def fetch_file(repository: str, name: str) -> Path:
    """A file of a model's repository: from the hub, or where it cannot be reached as it was fetched before. Raises
    HubError."""
    from huggingface_hub import hf_hub_download

    away = fault()
    with _hub_errors(away):
        found = hf_hub_download(repository, name, local_files_only=away is not None)
    return Path(found)


def list_dataset(repository: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit that a revision of a dataset is at, and the bytes of each of its files. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    _check_reached()
    api = HfApi()
    with _hub_errors():
        commit = str(api.dataset_info(repository, revision=revision).sha)
        entries = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    return commit, sizes


def download(repository: str, commit: str, path: str, folder: Path) -> Path:
    """A file of a dataset, written into a folder, with the library's retries. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        """No bar: several processes fetch, beside a bar of their own."""

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **{**more, "disable": True})

    _check_reached()
    with _hub_errors():
        written = HfApi().hf_hub_download(
            repository, path, repo_type="dataset", revision=commit, local_dir=folder, tqdm_class=Quiet
        )
    return Path(written)


def open_remote(repository: str, commit: str, path: str) -> BinaryIO:
    """A file of a dataset, of which only what is asked for is fetched. Raises HubError."""
    from huggingface_hub import HfFileSystem

    _check_reached()
    with _hub_errors():
        return HfFileSystem().open(f"datasets/{repository}@{commit}/{path}", "rb")  # pyright: ignore[reportReturnType]


def _check_reached() -> None:
    away = fault()
    if away is not None:
        raise HubError(away)


@contextmanager
def _hub_errors(away: str | None = None) -> Iterator[None]:
    """Raises HubError for whatever is raised inside: errors of the hub's library, of the operating system, and of the
    HTTP library, which changes with the hub's versions."""
    try:
        yield
    except Exception as error:
        why = _told(error) if away is None else f"{away}, and the files were not fetched before"
        raise HubError(why) from error


def _told(error: Exception) -> str:
    """What an error says, in a line, or what it came from: "an error happened" tells nobody anything."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_TOLD]
