"""The trackers of accelerate that a recipe names, each with a run of its own that goes on when training resumes."""

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.checkpoint.format import FORMAT_VERSION
from molora.config import plain
from molora.received import read_json
from molora.storage import write_json
from molora.terminal import warn
from molora.train.recipe import Recipe

# A row's place in the log: its step, and which of the rows of that step it is, from 1. No row is (0, 0).
Place = tuple[int, int]


def check_trackers(names: Sequence[str]) -> None:
    """Raises ImportError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"trackers: {name} is not installed: pip install 'molora[{name}]'")


class Trackers:
    """wandb and trackio. `trackers.json` in the run has the name of each one's run, and the last row that each was
    given before training resumed, as it cannot be taken back: rows up to there come again, and are left out. So no row
    is given twice; rows that a tracker still held in memory when the process was killed are missing there."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = Path(recipe.run) / "trackers.json"
        self.names = [name for name in recipe.trackers if name != "tensorboard"]
        self.runs: dict[str, Any] = {}
        self.given: dict[str, Place] = {}

    def open(self, resumes: bool, logged: Place) -> None:
        """Begins each tracker's run, or goes on with it if training does; `logged` is the last row that was written
        before it stopped. Raises RuntimeError for a tracker that cannot begin."""
        known = read_json(self.path)["trackers"] if self.names and resumes and self.path.is_file() else {}
        now: dict[str, Any] = {}
        for name in self.names:
            then = known.get(name)
            id = then["id"] if then else secrets.token_hex(4)
            self.given[name] = max(logged, (then["step"], then["rows"])) if then else (0, 0)
            now[name] = {"id": id, "step": self.given[name][0], "rows": self.given[name][1]}
        if now:
            write_json(self.path, {"format_version": FORMAT_VERSION, "trackers": now})
        for name in self.names:
            try:
                self.runs[name] = self._begin(name, now[name]["id"])
            except Exception as error:  # whatever a tracker raises: no network, no account
                how = "; WANDB_MODE=offline needs neither network nor account" if name == "wandb" else ""
                told = f"trackers: {name} cannot begin ({type(error).__name__}: {error})"
                raise RuntimeError(f"{told}{how}; or leave it out") from error

    def _begin(self, name: str, id: str) -> Any:
        from accelerate.tracking import TrackioTracker, WandBTracker

        run = Path(self.recipe.run)
        if name == "wandb":
            # Its own files go where it puts them, as it makes links to its cache, and a run folder has no links out.
            tracker = WandBTracker(self.recipe.tracker_project, id=id, name=run.name, resume="allow")
        else:  # which tells runs apart by their names
            tracker = TrackioTracker(self.recipe.tracker_project, name=f"{run.name}-{id}", resume="allow")
        tracker.start()
        tracker.store_init_configuration(plain(self.recipe))
        return tracker

    def write(self, place: Place, numbers: Mapping[str, float]) -> None:
        """Gives each tracker the numbers of a row that it does not have. One that fails is told and left out from then
        on, as training goes on without it."""
        for name, tracker in list(self.runs.items()):
            if place > self.given[name]:
                try:
                    tracker.log(dict(numbers), step=place[0])
                except Exception as error:
                    del self.runs[name]
                    told = f"{name} failed at step {place[0]} ({type(error).__name__}: {error})"
                    warn(f"{told} and gets no more rows; metrics.jsonl has all")

    def close(self) -> None:
        for tracker in self.runs.values():
            tracker.finish()
        self.runs = {}
