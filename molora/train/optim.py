"""Optimisation part by part: what trains is a list of name patterns, and no part's update depends on another's."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from molora.config import ConfigError, did_you_mean, require
from molora.model.molora import MoLoRA


@dataclass(kw_only=True)
class PartConfig:
    """How the parameters of a pattern train, by AdamW. Warm-up is linear; the schedule then runs to the end of the
    stage. Steps are the part's own: one without a sample in a step does not move, nor does its schedule. A part's
    gradients are clipped together to `max_gradient_norm`."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self, 0, "learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2", "epsilon")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 is {self.beta1} and beta2 {self.beta2}; both are less than 1")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm is {self.max_gradient_norm}; give one above 0 (.inf: no limit)")


def learning_rate(config: PartConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.learning_rate * factor


class PartOptimizer:
    """AdamW for the parameters of one part, with the part's own clipping, schedule and step count."""

    def __init__(self, groups: list[tuple[PartConfig, dict[str, nn.Parameter]]], total_steps: int) -> None:
        self.groups = groups
        self.total_steps = total_steps
        self.steps_taken = 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(parameters.values()), "lr": config.learning_rate, "eps": config.epsilon}
                | {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
                for config, parameters in groups
            ],
            # One kernel for all that an update does; there is none for the meta device, which is asked for sizes only.
            fused=not any(p.is_meta for _, parameters in groups for p in parameters.values()),
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for _, parameters in self.groups for name, p in parameters.items()}

    def gradient_norm(self) -> Tensor:
        """Of all gradients of the part together, on their device."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, norm: Tensor) -> float:
        """Clips gradients that have this norm, updates, clears the gradients; returns the learning rate."""
        highest = min(config.max_gradient_norm for config, _ in self.groups)
        nn.utils.clip_grads_with_norm_(self.parameters.values(), highest, norm)
        for (config, _), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            group["lr"] = learning_rate(config, self.steps_taken, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_taken += 1
        return self.optimizer.param_groups[0]["lr"]

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor], steps_taken: int) -> None:
        self.steps_taken = steps_taken
        for name, parameter in self.parameters.items():
            if keys := [key for key in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{key}" in tensors]:
                state = {key: tensors[f"{name}.{key}"].clone().to(parameter.device) for key in keys}
                self.optimizer.state[parameter] = state


def set_trainable(
    model: MoLoRA, patterns: Mapping[str, PartConfig], total_steps: int, where: str
) -> dict[str, PartOptimizer]:
    """Makes exactly the parameters that a pattern matches trainable, and gives each part its optimiser. A pattern is a
    shell pattern over full parameter names, or the beginning of one up to a dot (`adapters.vision`). The first pattern
    that matches a parameter decides. Raises ConfigError for a pattern that matches nothing."""
    used: set[str] = set()
    optimizers: dict[str, PartOptimizer] = {}
    for part, parameters in model.parts().items():
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for key, parameter in parameters.items():
            name = f"{part}.{key}"
            pattern = next((p for p in patterns if matches(p, name)), None)
            parameter.requires_grad_(pattern is not None)
            if pattern is not None:
                groups.setdefault(pattern, {})[name] = parameter
        used |= groups.keys()
        if groups:
            optimizers[part] = PartOptimizer([(patterns[p], chosen) for p, chosen in groups.items()], total_steps)
    if idle := [pattern for pattern in patterns if pattern not in used]:
        raise ConfigError(f"{where}: {idle} train nothing; the parts of this model are {sorted(model.parts())}")
    return optimizers


def matches(pattern: str, name: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def check_start(model: MoLoRA, start_from: Mapping[str, str], where: str) -> None:
    """Raises ConfigError for parts of `start_from` that are not there, differ or do not train."""
    parts = model.parts()
    for target, source in start_from.items():
        if unknown := sorted({target, source} - parts.keys()):
            near = did_you_mean(unknown[0], parts)
            raise ConfigError(f"{where}: no part {unknown}; {near}the parts of this model are {sorted(parts)}")
        shapes = [{key: tuple(p.shape) for key, p in parts[part].items()} for part in (target, source)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"{where}: {target} cannot start from {source}: {shapes[0]} and {shapes[1]} differ")
        if not all(p.requires_grad for p in parts[target].values()):
            raise ConfigError(f"{where}: {target} does not train in this stage, so nothing may change it")


def copy_parts(model: MoLoRA, start_from: Mapping[str, str]) -> None:
    """Gives parts the weights of others."""
    parts = model.parts()
    with torch.no_grad():
        for target, source in start_from.items():
            for key, parameter in parts[target].items():
                parameter.copy_(parts[source][key])
