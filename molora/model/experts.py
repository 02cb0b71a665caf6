"""Mixtures of experts inside a backbone: where they are, and choices of theirs that are kept and made again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """By path, what chooses experts: transformers puts it beside them, as `router` or `gate`."""
    blocks = [path.rpartition(".")[0] for path, _ in model.named_modules() if path.endswith(".experts")]
    beside = [(block, *found) for block in blocks for found in model.get_submodule(block).named_children()]
    return {f"{block}.{name}": child for block, name, child in beside if name in ("router", "gate")}


def untargetable(model: nn.Module) -> dict[str, str]:
    """By path, what no adapter can be on, with what it is: experts, whose tokens are regrouped and so leave their
    samples, and their router, where an adapter would choose other experts."""
    found = dict.fromkeys(routers(model), "the expert router")
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            found[path] = "the experts"
            inner = (*module.named_modules(), *module.named_parameters(recurse=False))
            found |= {f"{path}.{name}": "a part of the experts" for name, _ in inner if name}
    return found


class Choices:
    """Which experts were chosen for samples that ran one by one, to be chosen again when they run otherwise. Experts
    are chosen by rank: where two are close, another order of summation rounds to the other, and what follows is another
    computation. Two ways of running a model compare only with the choices held."""

    def __init__(self, model: nn.Module) -> None:
        self._routers = list(routers(model).values())
        self._kept: list[list[Any]] = [[] for _ in self._routers]

    def keeping(self) -> AbstractContextManager[None]:
        """Keeps the choices for the samples that run, each in a forward of its own."""
        return self._hooked(lambda kept, output: kept.append(output))

    def again(self, which: Sequence[int], lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Makes the choices kept for samples `which`, of `lengths` tokens, in a forward of them end to end."""
        return self._hooked(lambda kept, output: _join([kept[index] for index in which], lengths))

    @contextmanager
    def _hooked(self, change: Callable[[list[Any], Any], Any]) -> Iterator[None]:
        hooks = [
            router.register_forward_hook(lambda module, args, output, kept=kept: change(kept, output))
            for router, kept in zip(self._routers, self._kept, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _join(outputs: Sequence[Any], lengths: Sequence[int]) -> Any:
    """A router's outputs for samples, tensors or tuples of them, as one output for the samples end to end."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(list(outputs), dim=outputs[0].shape.index(lengths[0]))
    return tuple(_join(parts, lengths) for parts in zip(*outputs, strict=True))
