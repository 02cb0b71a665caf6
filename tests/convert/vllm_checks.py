"""What vLLM says of folders that were written for it, without a GPU. Run by a Python that has vLLM:

    python vllm_checks.py KIND FOLDER MAX_RANK ADAPTER…

KIND is phi4mm or text. Each check that passes prints its name; the first that fails raises.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm.platforms
from PIL import Image
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # the wheel knows the platform of a machine by its GPU

from safetensors import safe_open  # noqa: E402
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402
from vllm.lora.utils import get_supported_lora_modules  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.utils import get_packed_modules_mapping  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def check_processor(given: ModelConfig) -> None:
    """A picture of 640 x 480 and a second and a half of sound, asked about as a chat."""
    from vllm.renderers.hf import _detect_content_format

    processor = MULTIMODAL_REGISTRY.create_processor(given)
    tokenizer: Any = processor.info.get_tokenizer()
    assert _detect_content_format(tokenizer.chat_template, default="string") == "openai"
    print("chat template: its parts stand where they are sent")
    parts = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What is it?"}]
    asked = [{"role": "user", "content": parts}]
    for media in ({"image": [Image.new("RGB", (640, 480))]}, {"audio": [np.zeros(24_000, np.float32)]}):
        shown = [{"role": "user", "content": [part for part in parts if part["type"] in (*media, "text")]}]
        processor(_prompt(tokenizer, shown), processor.info.parse_mm_data(media))
    both: Any = {"image": [Image.new("RGB", (640, 480))], "audio": [np.zeros(24_000, np.float32)]}
    made: Any = processor(_prompt(tokenizer, asked), processor.info.parse_mm_data(both))
    print(f"Phi4MMMultiModalProcessor {made['prompt_token_ids']}")


def _prompt(tokenizer: Any, messages: list[Any]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def give_tower_its_sizes(folder: Path) -> None:
    """vLLM's code has the released tower's sizes, and a small checkpoint has others."""
    from vllm.model_executor.models import phi4mm

    stem = "model.embed_tokens_extend.image_embed.img_processor"
    shapes = {name: tensor.shape for name, tensor in tensors(folder)}
    fc1 = shapes[f"{stem}.encoder.layers.0.mlp.fc1.weight"]
    depth = sum(name.startswith(f"{stem}.encoder.layers.") and name.endswith("mlp.fc1.weight") for name in shapes)
    own = {"intermediate_size": fc1[0], "hidden_size": fc1[1], "num_hidden_layers": depth}
    siglip: Any = phi4mm.SiglipVisionConfig
    phi4mm.SiglipVisionConfig = lambda **given: siglip(**{**given, **own})


def check_adapter(folder: Path, model: Any, config: VllmConfig) -> None:
    """As vllm.lora.worker_manager loads one."""
    assert config.lora_config is not None
    helper = PEFTHelper.from_local_dir(str(folder), config.model_config.max_model_len)
    helper.validate_legal(config.lora_config)
    print(f"PEFTHelper.validate_legal {folder.name}")
    packed = get_packed_modules_mapping(model)
    supported = get_supported_lora_modules(model)
    expected = {name for module in supported for name in packed.get(module, [module])}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, device="cpu", weights_mapper=mapper and mapper.get_rename_mapper()
    )
    layers = {name for name, _ in model.named_modules()}
    for name, weights in lora.loras.items():
        parent, _, own = name.rpartition(".")
        holder = next((key for key, parts in packed.items() if own in parts), own)
        assert f"{parent}.{holder}" in layers, f"{name}: no layer of the model"
        assert weights.lora_a.shape[0] == weights.lora_b.shape[1] == weights.rank
    stored = {name for name, _ in tensors(folder)}
    assert len(stored) == 2 * len(lora.loras) > 0
    print(f"LoRAModel.from_local_checkpoint {folder.name}: {len(lora.loras)} layers")


def main(kind: str, folder: Path, max_rank: int, adapters: list[str]) -> None:
    given = ModelConfig(model=str(folder), trust_remote_code=kind == "phi4mm", dtype="float32", enforce_eager=True)
    print(f"ModelConfig {given.architecture}")
    lora_config: Any = LoRAConfig(max_lora_rank=max_rank, max_loras=len(adapters))  # pyright: ignore[reportArgumentType]
    config = VllmConfig(model_config=given, device_config=DeviceConfig("cpu"), lora_config=lora_config)
    if kind == "phi4mm":
        check_processor(given)
        give_tower_its_sizes(folder)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder.parent / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta" if kind == "phi4mm" else "cpu"):
            model: Any = initialize_model(config, model_config=given)
        print(f"initialize_model {type(model).__name__}")
        loaded = model.load_weights(tensors(folder))
    wanted = {name for name, _ in model.named_parameters()}
    assert wanted <= loaded, f"not loaded: {sorted(wanted - loaded)[:5]}"
    print(f"load_weights: {len(loaded)} of {len(wanted)} parameters")
    for adapter in adapters:
        check_adapter(folder / adapter, model, config)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
