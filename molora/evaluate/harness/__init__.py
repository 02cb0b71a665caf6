"""molora's models under other projects' evaluation harnesses; each harness imports its own file."""

from typing import Any


def manifest() -> Any:
    """Where lmms-eval finds molora's models: the entry point `molora` of its group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    classes = "molora.evaluate.harness.lmms_eval"
    return ModelManifest("molora", chat_class_path=f"{classes}.ChatModel", simple_class_path=f"{classes}.SimpleModel")
