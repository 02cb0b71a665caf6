"""A step that speaks texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molora.data.speech import HELD_OUT_VOICES, TRAINING_VOICES, check_extra, clip, draw_utterance
from molora.synthetic.rows import Dropped, Row, RowByRow, Text, Work


@dataclass(kw_only=True)
class SpeakConfig:
    """`text` is the template of what is said, and `folder` where the clips are kept, such as "${output}/clips"; the
    path of a row's clip becomes the column `into`. Voice, speed and pitch are drawn by the workflow's seed and the row,
    among the `training` voices or those that are `held_out`, and with `acoustics` a noise and a room too."""

    text: str
    folder: str
    voices: Literal["training", "held_out"] = "training"
    acoustics: bool = False
    into: str = "clip"


class Speak(RowByRow):
    """A clip of a text that espeak-ng says; its `voice` is a column too. Needs the `demo` extra. A step of yours can
    speak by any other program: it writes a file, and its absolute path into a column."""

    config_type = SpeakConfig

    def __init__(self, config: SpeakConfig) -> None:
        check_extra()
        self.config = config
        self.text = Text(config.text, "text")
        self.folder = Path(config.folder).absolute()
        self.voices = TRAINING_VOICES if config.voices == "training" else HELD_OUT_VOICES

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        text = self.text.of(row).strip()
        if not text:
            yield Dropped(row, "nothing to say")
            return
        said = draw_utterance(text, self.voices, self.config.acoustics, work.seed_of("speak", row.id))
        yield row.having(**{self.config.into: str(clip(said, self.folder)), "voice": said.voice})
