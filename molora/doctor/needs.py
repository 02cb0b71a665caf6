"""What takes memory, and how much: the records that are counted, and the weights of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from molora.model.molora import MoLoRA
from molora.train.optim import count


@dataclass(frozen=True)
class Need:
    """Something that takes memory, how much, and where the number comes from."""

    what: str
    num_bytes: int
    origin: str


@dataclass(frozen=True)
class Moment:
    """What some work holds beside the weights when it holds the most; `given` is the same with the packs that the data
    of a stage give, where `needs` are those of the largest packs that its recipe allows."""

    name: str
    needs: tuple[Need, ...]
    given: Moment | None = None

    @property
    def num_bytes(self) -> int:
        return sum(need.num_bytes for need in self.needs)


@dataclass(frozen=True)
class MemoryNeeds:
    """What a run needs: its weights all the time, and its moments one after another. `process` is what the interpreter
    and its libraries take on a CPU; `unknown` says why there are no packs of its data."""

    weights: tuple[Need, ...]
    moments: tuple[Moment, ...]
    process: Need | None = None
    unknown: str | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(need.num_bytes for need in self.weights)

    @property
    def constant_bytes(self) -> int:
        """Bytes that are there at any moment."""
        return self.weight_bytes + (self.process.num_bytes if self.process else 0)

    @property
    def num_bytes(self) -> int:
        """Bytes at the fullest moment, with the largest packs that a recipe allows."""
        return self.constant_bytes + max(moment.num_bytes for moment in self.moments)

    @property
    def given_bytes(self) -> int:
        """Bytes at the fullest moment, with packs as the data give them."""
        return self.constant_bytes + max((moment.given or moment).num_bytes for moment in self.moments)


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def weights(model: MoLoRA) -> tuple[Need, ...]:
    """What the parameters and buffers of a model take, part by part."""
    parts = model.parts()
    owners = {id(parameter): part for part, parameters in parts.items() for parameter in parameters.values()}
    for name, encoder in model.encoders.items():
        owners |= {id(buffer): f"encoders.{name}" for buffer in encoder.buffers()}
    owned: dict[str, list[Tensor]] = {part: [] for part in ("backbone", *parts)}
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        owned.setdefault(owners.get(id(tensor), "backbone"), []).append(tensor)
    return tuple(Need(part, size_of(tensors), about(tensors)) for part, tensors in owned.items())


def about(tensors: Iterable[Tensor]) -> str:
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return f"{count(parameters):,} parameters, {', '.join(dtypes)}" if parameters else "buffers"


def logits_of(num_bytes: int, how: str, model: MoLoRA) -> str:
    return f"{model.backbone.vocab_size:,} wide, {how}" if num_bytes else "none at the fullest moment"
