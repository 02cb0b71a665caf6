"""One plugin that keeps its contract, and many that each break it in one way.

Letters: I items, S steps and frames, C encoder width.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from molora.modality import Encoder, Frames, MediaError, Origin, Prepared


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """`noise`: how much augmentation adds. `scale` multiplies what the encoder reads."""

    width: int = 8
    noise: float = 0.1
    scale: float = 1.0


class SeriesEncoder(Encoder):
    """Pairs of values to frames that see their neighbours in time."""

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.embed = nn.Linear(2, config.width)
        self.mix = nn.Conv1d(config.width, config.width, 3, padding=1)
        self.norm: nn.Module = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, pairs_IS2: Tensor, lengths_I: Tensor) -> Frames:  # type: ignore[override]
        real_IS = torch.arange(pairs_IS2.shape[1]) < lengths_I[:, None]
        frames_ISC = self.hide(self.embed(self.config.scale * pairs_IS2), real_IS)
        frames_ISC = frames_ISC + self.mix(frames_ISC.transpose(1, 2)).transpose(1, 2)
        return Frames(self.dropout(self.norm(frames_ISC[real_IS])), tuple(lengths_I.tolist()))

    def hide(self, frames_ISC: Tensor, real_IS: Tensor) -> Tensor:
        """Padding as the zeros that the convolution itself pads with."""
        return frames_ISC * real_IS[..., None]


class Series:
    """Numbers over time, two to a token."""

    config_type: ClassVar[Any] = SeriesConfig
    part_type: ClassVar[str] = "series"
    encoder_type: ClassVar[type] = SeriesEncoder

    def __init__(self, name: str, config: Any) -> None:
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> Any:
        path = part.get("path")
        try:
            values = part.get("values") if path is None else json.loads(Path(path).read_bytes())
        except (OSError, TypeError, ValueError) as error:
            raise MediaError(f"series part: {path!r} is no JSON file of values: {error}") from error
        if not (isinstance(values, list) and values and all(isinstance(value, float) for value in values)):
            raise MediaError(f"series part with {sorted(part)}: give its values, a list of at least one float")
        return torch.tensor(values)

    def prepare(self, item: Any, generator: torch.Generator | None = None) -> Prepared:
        if generator is not None:
            item = item + self.config.noise * torch.randn(item.shape, generator=generator)
        pairs_S2 = nn.functional.pad(item, (0, len(item) % 2)).view(-1, 2)
        return Prepared({"pairs_S2": pairs_S2}, len(pairs_S2))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        pairs = [one.tensors["pairs_S2"] for one in prepared]
        return {
            "pairs_IS2": nn.utils.rnn.pad_sequence(pairs, batch_first=True),
            "lengths_I": torch.tensor([len(pairs_S2) for pairs_S2 in pairs]),
        }

    def build_encoder(self) -> Any:
        return self.encoder_type(self.config)

    def projector(self, company: frozenset[str]) -> str:
        return "beside" if "neighbour" in company else "default"

    def projectors(self) -> Any:
        return ("default", "beside")

    def examples(self) -> Any:
        return [{"type": self.part_type, "values": [0.1 * step for step in range(count)]} for count in (3, 8, 13)]


# The plugin itself -----------------------------------------------------------------------------------------------


class Unfinished:
    config_type = SeriesConfig
    part_type = "series"

    def load(self, part: Mapping[str, Any]) -> Any: ...


class ConfigIsNoDataclass(Series):
    config_type = dict


class ConfigIsNoJson(Series):
    @dataclass(frozen=True)
    class Config(SeriesConfig):
        kinds: Any = field(default_factory=lambda: {"a set"})

    config_type = Config


class ConfigGrows(Series):
    @dataclass
    class Config:
        width: int = 8
        noise: float = 0.1
        scale: float = 1.0

        def __post_init__(self) -> None:
            self.scale *= 2

    config_type = Config


class AnswersToText(Series):
    part_type = "text"


class HasItsOwnName(Series):
    def __init__(self, name: str, config: Any) -> None:
        super().__init__("series", config)


class PartTypeByName(Series):
    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.part_type = f"series of {name}"  # type: ignore[misc]


class ProjectorNotDeclared(Series):
    def projectors(self) -> Any:
        return ("default",)


class ProjectorsInAList(Series):
    def projectors(self) -> Any:
        return ["default", "beside"]


class HoldsALambda(Series):
    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.double = lambda value: 2 * value


class HoldsWeights(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        self.smooth = nn.BatchNorm1d(1)
        return super().prepare(item, generator)


# Parts and items -------------------------------------------------------------------------------------------------


class NoExamples(Series):
    def examples(self) -> Any:
        return []


class ExamplesByChance(Series):
    def examples(self) -> Any:
        return [{"type": "series", "values": [random.random() for _ in range(count)]} for count in (3, 8)]


class ExamplesOfOneSize(Series):
    def examples(self) -> Any:
        return [{"type": "series", "values": [float(start), 0.5]} for start in range(3)]


class LoadsForever(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        time.sleep(0.2)
        return super().load(part)


class LoadRaises(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        raise OSError("the drive is not there")


class LoadsByChance(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        return super().load(part) + float(np.random.default_rng().random())


class AcceptsGarbage(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        if os.path.isfile(part.get("path", "")):
            with open(part["path"], "rb") as file:
                return torch.tensor([float(byte) for byte in file.read()])
        return super().load(part)


class RefusesWithAnotherError(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        return torch.tensor(part["values"] if "path" not in part else super().load(part))


class RefusesWithoutAWord(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        try:
            return super().load(part)
        except MediaError:
            raise MediaError() from None


class RefusesTooLate(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        values = part.get("values") or part.get("path")
        if not values:
            raise MediaError("a series part has values, a list of floats")
        return values

    def prepare(self, item: Any, generator: torch.Generator | None = None) -> Prepared:
        return super().prepare(torch.tensor(item), generator)


class IgnoresPaths(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        return super().load({key: part[key] for key in part if key != "path"})


class QuotesPaths(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        if not part.get("values"):
            raise MediaError(f"no values in {part}")
        return super().load(part)


class NumTokensIsATensor(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        prepared = super().prepare(item, generator)
        return replace(prepared, num_tokens=torch.tensor(prepared.num_tokens))  # type: ignore[arg-type]


class PreparesAMapping(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Any:
        return super().prepare(item, generator).tensors


class PreparesByChance(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        return super().prepare(item + 0.01 * torch.randn(len(item)), generator)


class AugmentsByChance(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        return super().prepare(item if generator is None else item + np.random.standard_normal(), None)


class BorrowsTheGenerator(Series):
    """Leaves the global generator as it was, and yet depends on it."""

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        with torch.random.fork_rng(devices=[]):
            return super().prepare(item + torch.randn(1), generator)


class SeedsEverybody(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        torch.manual_seed(0)
        return super().prepare(item + torch.randn(1), generator)


class CountsItsCalls(Series):
    calls = 0

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        self.calls += 1
        return super().prepare(item + self.calls, generator)


class RemembersTheLongest(Series):
    longest = 0

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        self.longest = max(self.longest, len(item))
        return super().prepare(item / self.longest, generator)


class EmptiesItsPart(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        item = super().load(part)
        part["values"].clear()
        return item


class ScalesItsItemInPlace(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        return super().prepare(item.mul_(0.5), generator)


class CollatesInPlace(Series):
    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        for one in prepared:
            one.tensors["pairs_S2"].clamp_(max=0.3)
        return super().collate(prepared)


class CollatesLists(Series):
    def collate(self, prepared: Sequence[Prepared]) -> Any:
        return {name: list(tensor) for name, tensor in super().collate(prepared).items()}


class CollatesATuple(Series):
    def collate(self, prepared: Sequence[Prepared]) -> Any:
        return tuple(super().collate(prepared).values())


class OneTokenTooMany(Series):
    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        prepared = super().prepare(item, generator)
        return replace(prepared, num_tokens=prepared.num_tokens + 1)


# The encoder -----------------------------------------------------------------------------------------------------


def backbone_around() -> Any:
    """The backbone of the model that is being built, and None outside of one: what a plugin must not reach for."""
    frame = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("backbone"), nn.Module):
        frame = frame.f_back
    return frame and frame.f_locals["backbone"]


class Reaching(SeriesEncoder):
    """Knows the norms of the backbone around it, outside its own modules."""

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__(config)
        backbone = backbone_around()
        named = () if backbone is None else backbone.named_parameters()
        self.reached = [(parameter,) for name, parameter in named if "norm" in name]


class EncoderIsNoEncoder(Series):
    encoder_type = nn.Identity


class EncoderBuiltByChance(Series):
    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        encoder.embed.weight.data.fill_(float(np.random.default_rng().random()))
        return encoder


class GivesATuple(Series):
    class encoder_type(SeriesEncoder):
        def forward(self, **collated: Tensor) -> Any:
            frames = super().forward(**collated)
            return frames.frames_SC, frames.lengths


class Reshaping(Series):
    """A good plugin, except for what `reshape` does to its frames."""

    class encoder_type(SeriesEncoder):
        def forward(self, **collated: Tensor) -> Frames:
            frames = super().forward(**collated)
            return type(self).reshape(self, frames)

        def reshape(self, frames: Frames) -> Frames:
            return frames


class WrongWidth(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC[:, 1:])


class ThreeAxes(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC[None])


class DoublePrecision(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC.double())


class OnAnotherDevice(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC.to("meta"))


class NotFinite(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC / (frames.frames_SC > 0))


class LengthsInAList(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, lengths=list(frames.lengths))  # type: ignore[arg-type]


class OneFrameShortInBatches(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            if len(frames.lengths) == 1:
                return frames
            return Frames(frames.frames_SC[:-1], (*frames.lengths[:-1], frames.lengths[-1] - 1))


class RowsMissing(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC[: sum(frames.lengths) - len(frames.lengths) + 1])


class SortsItsBatch(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            items = sorted(frames.frames_SC.split(frames.lengths), key=len)
            return Frames(torch.cat(items), tuple(len(item) for item in items))


class ReversesItsFrames(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC.flip(0))


class DropsOutInEval(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=nn.functional.dropout(frames.frames_SC, 0.5))


class RemembersItsLastFrames(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        last: Any = 0.0

        def reshape(self, frames: Frames) -> Frames:
            mixed = frames.frames_SC + 0.1 * self.last
            self.last = frames.frames_SC.detach().max()
            return replace(frames, frames_SC=mixed)


class CountsInABuffer(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            self.register_buffer("seen", torch.zeros(()))

        def reshape(self, frames: Frames) -> Frames:
            self.seen += 1
            return frames


class ChangesItsInput(Series):
    class encoder_type(SeriesEncoder):
        def forward(self, pairs_IS2: Tensor, lengths_I: Tensor) -> Frames:
            return super().forward(pairs_IS2.sub_(1.0), lengths_I)


class PaddingLeaks(Series):
    class encoder_type(SeriesEncoder):
        def hide(self, frames_ISC: Tensor, real_IS: Tensor) -> Tensor:
            return frames_ISC


class MeanOverTheBatch(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC - frames.frames_SC.mean(0))


class MeanOverTheBatchInTraining(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC - self.training * frames.frames_SC.mean(0))


class BatchStatistics(Series):
    class encoder_type(SeriesEncoder):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            self.norm = nn.BatchNorm1d(config.width)


class SkipsLayersInTraining(Reshaping):
    """No fault, but what batches do in training cannot be seen through its chance."""

    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            kept = torch.rand(()) < 0.5 if self.training else True
            return replace(frames, frames_SC=frames.frames_SC * (1.0 if kept else 0.5))


# In a model ------------------------------------------------------------------------------------------------------


class IdleParameter(Series):
    class encoder_type(SeriesEncoder):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            self.head = nn.Linear(config.width, 2)


class Detaches(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC.detach())


SMOOTH = nn.Linear(8, 8)


class UsesAGlobalNetwork(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC + SMOOTH(frames.frames_SC))


class GradientIsNotFinite(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=(frames.frames_SC - frames.frames_SC).abs().sqrt())


class RegistersTwice(Series):
    class encoder_type(SeriesEncoder):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            self.again = self.embed


class SharesTheEmbedding(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            backbone = backbone_around()
            self.table = backbone and backbone.model.get_input_embeddings().weight

        def reshape(self, frames: Frames) -> Frames:
            shift = 0.0 if self.table is None else self.table[0, : self.width]
            return replace(frames, frames_SC=frames.frames_SC + shift)


class TrainsTheBackbone(Series):
    class encoder_type(Reaching):
        def forward(self, **collated: Tensor) -> Frames:
            if self.training:
                with torch.no_grad():
                    for (parameter,) in self.reached:
                        parameter.mul_(1.01)
            return super().forward(**collated)


class UnfreezesTheBackbone(Series):
    class encoder_type(Reaching):
        def forward(self, **collated: Tensor) -> Frames:
            for (parameter,) in self.reached:
                parameter.requires_grad_(True)
            return super().forward(**collated)


class ScalesTheBackboneWhenBuilt(Series):
    class encoder_type(Reaching):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            with torch.no_grad():
                for (parameter,) in self.reached:
                    parameter.mul_(1.01)


class SavesAConfigOfOtherSize(Series):
    class encoder_type(SeriesEncoder):
        def saved_config(self, with_weights: bool) -> Any:
            return replace(self.config, width=self.width + 1)


class SavesAConfigThatReadsOtherwise(Series):
    class encoder_type(SeriesEncoder):
        def saved_config(self, with_weights: bool) -> Any:
            return replace(self.config, scale=0.5)


class SaysItCanBeFetched(Series):
    """And it cannot: other weights come out of every seed."""

    class encoder_type(SeriesEncoder):
        origin = Origin("somewhere", "1")


class Fetched(Series):
    """No fault: its weights, as if from a hub, are the same whenever it is built, and need not be saved."""

    class encoder_type(SeriesEncoder):
        origin = Origin("somewhere", "1")

        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            generator = torch.Generator().manual_seed(1)
            for parameter in self.parameters():
                parameter.data.normal_(generator=generator)


class KeepsATensorOutOfItsState(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def __init__(self, config: SeriesConfig) -> None:
            super().__init__(config)
            self.shift = torch.randn(config.width)

        def reshape(self, frames: Frames) -> Frames:
            return replace(frames, frames_SC=frames.frames_SC + self.shift)


# Blank items -----------------------------------------------------------------------------------------------------


class Blanks(Series):
    """No fault: a line at zero for a series."""

    def blank(self, item: Any) -> Any:
        return torch.zeros_like(item)


class BlanksToAnotherSize(Series):
    def blank(self, item: Any) -> Any:
        return torch.zeros(6)


class BlanksByChance(Series):
    def blank(self, item: Any) -> Any:
        return torch.rand_like(item)


class BlanksToTheItem(Series):
    def blank(self, item: Any) -> Any:
        return item


class BlanksToTheMean(Series):
    """One value for the whole series, and it tells of the series."""

    def blank(self, item: Any) -> Any:
        return torch.full_like(item, float(item.mean()))


class BlanksToNoNumber(Series):
    def blank(self, item: Any) -> Any:
        return torch.zeros_like(item).log()


class BlanksInPlace(Series):
    def blank(self, item: Any) -> Any:
        return item.zero_()


class BlanksWithAnError(Series):
    def blank(self, item: Any) -> Any:
        return item.nothing


# The process -----------------------------------------------------------------------------------------------------


class KeepsItsFrames(Reshaping):
    class encoder_type(Reshaping.encoder_type):
        def reshape(self, frames: Frames) -> Frames:
            self.kept = [*getattr(self, "kept", []), frames.frames_SC.detach()]
            return frames


class KeepsItsItems(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        self.kept = [*getattr(self, "kept", []), np.zeros(4096)]
        return super().load(part)


class ChangesTheDefaultDtype(Series):
    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        torch.set_default_dtype(torch.float64)
        return super().collate(prepared)


class TurnsGradientsOff(Series):
    def load(self, part: Mapping[str, Any]) -> Any:
        torch.set_grad_enabled(False)
        return super().load(part)


class ChangesTheThreads(Series):
    def examples(self) -> Any:
        torch.set_num_threads(1 + torch.get_num_threads() % 2)
        return super().examples()


class DecidesOnDeterminism(Series):
    def build_encoder(self) -> Any:
        torch.use_deterministic_algorithms(True)
        return super().build_encoder()


LOADED: list[str] = []


class NeedsItsProcess(Series):
    """Reads what building it left in this process; a new one has no such thing."""

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        LOADED.append(name)

    def load(self, part: Mapping[str, Any]) -> Any:
        return super().load(part) + bool(LOADED)
