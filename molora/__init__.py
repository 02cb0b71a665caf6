"""Mixture-of-LoRAs multimodal models: a frozen language model gains senses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.checkpoint.assembly import RouterConfig
    from molora.config import ConfigError
    from molora.inference.generate import GenerationConfig
    from molora.inference.load import Answer, LoadedModel, load
    from molora.modality import MediaError

__version__ = "0.1.0"
__all__ = ["Answer", "ConfigError", "GenerationConfig", "LoadedModel", "MediaError", "RouterConfig", "load"]

_HOMES = {
    **{"Answer": "inference.load", "LoadedModel": "inference.load", "load": "inference.load"},
    **{"ConfigError": "config", "MediaError": "modality"},
    **{"GenerationConfig": "inference.generate", "RouterConfig": "checkpoint.assembly"},
}


def __getattr__(name: str) -> Any:
    # Importing the names only when asked for keeps `molora --help` from waiting for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'molora' has no attribute {name!r}")
    return getattr(import_module(f"molora.{_HOMES[name]}"), name)
