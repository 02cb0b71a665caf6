"""Phi's sister models, from tiny checkpoints in their released form: opened, packed, adapted, and trained by recipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from molora.checkpoint.pretrained import load_backbone
from molora.config import read
from molora.model import lora
from molora.model.backbone import Backbone
from molora.model.experts import routers
from molora.model.lora import lora_config
from molora.routing import Flow, Routing
from molora.testing import VOCAB_SIZE, assert_close, byte_tokenizer
from molora.train.loop import train
from molora.train.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"
SWITCH, EXPERTS, LAYERS = 24, 16, 2
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCAB_SIZE + 3,
    "bos_token_id": 256, "eos_token_id": 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    # Large enough for attention to matter, unlike the released 0.02.
    "initializer_range": 0.1,
}  # fmt: skip


def longrope(rotated: int, **more: Any) -> dict[str, Any]:
    factors = {"long_factor": [1.5 + i for i in range(rotated // 2)], "short_factor": [1.0] * (rotated // 2)}
    return {**factors, **more, "type": "longrope"}


PHI3: dict[str, Any] = {
    **SIZES, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False,
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_act": "silu", "pad_token_id": 256,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
}  # fmt: skip
# The keys of the released config.json, which say what makes each family; sizes are tiny, the rope switch comes early.
RELEASED: dict[str, dict[str, Any]] = {
    "phi35_mini": {
        **PHI3, "num_attention_heads": 4, "num_key_value_heads": 4, "original_max_position_embeddings": SWITCH,
        "rope_scaling": longrope(8), "sliding_window": 262144,
    },
    "phi4_mini": {
        **PHI3, "num_attention_heads": 4, "num_key_value_heads": 2, "original_max_position_embeddings": SWITCH,
        "rope_scaling": longrope(6), "partial_rotary_factor": 0.75, "sliding_window": 262144, "full_attn_mod": 1,
        "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    },
    "phi4_14b": {
        **PHI3, "num_attention_heads": 4, "num_key_value_heads": 1, "original_max_position_embeddings": 4096,
        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "auto_map": {},
    },
    "phi35_moe": {
        **SIZES, "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True,
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0, "input_jitter_noise": 0.01,
        "lm_head_bias": True, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2,
        "num_local_experts": EXPERTS, "original_max_position_embeddings": SWITCH, "output_router_logits": False,
        "rope_scaling": longrope(
            8, long_mscale=1.3, original_max_position_embeddings=SWITCH, short_mscale=1.1
        ),
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "auto_map": {
            "AutoConfig": "configuration_phimoe.PhiMoEConfig",
            "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
        },
    },
}  # fmt: skip
CHATML = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
# How each opens and closes a turn, in Jinja, and what follows the last; Phi-4-mini's way is the tiny tokenizer's own.
ROLES = ("'<|' + role + '|>\\n'", "'<|end|>\\n'", "eos_token")
TURNS = {
    "phi35_mini": ROLES,
    "phi35_moe": ROLES,
    "phi4_14b": ("'<|im_start|>' + role + '<|im_sep|>'", "'<|im_end|>'", "''"),
}
HUB = {
    "phi35_mini": "microsoft/Phi-3.5-mini-instruct",
    "phi4_mini": "microsoft/Phi-4-mini-instruct",
    "phi4_14b": "microsoft/phi-4",
    "phi35_moe": "microsoft/Phi-3.5-MoE-instruct",
}


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Phi-3.5-MoE's tensors as they were published: every expert's three matrices by themselves."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, _, last = name.partition(".mlp.")
        moe = f"{block}.block_sparse_moe"
        if last == "router.weight":
            found[f"{moe}.gate.weight"] = tensor
        elif last == "experts.gate_up_proj":
            for expert, matrix in enumerate(tensor):
                found[f"{moe}.experts.{expert}.w1.weight"], found[f"{moe}.experts.{expert}.w3.weight"] = matrix.chunk(2)
        elif last == "experts.down_proj":
            found |= {f"{moe}.experts.{expert}.w2.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """One token per byte and per special token of the family, with a chat template in the family's manner."""
    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(CHATML)})
    if name in TURNS:
        opening, closing, end = TURNS[name]
        found.chat_template = (
            f"{{% for message in messages %}}{{% set role = message['role'] %}}"
            f"{{{{ {opening} + message['content'] + {closing} }}}}{{% endfor %}}{{% set role = 'assistant' %}}"
            f"{{{{ {opening} if add_generation_prompt else {end} }}}}"
        )
    return found


def release(folder: Path, name: str) -> dict[str, Tensor]:
    """Writes a tiny checkpoint as it would be published, and returns its weights under transformers' own names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(RELEASED[name]))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [256, 260]}))
    tokenizer(name).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))  # biases and norms show too
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if RELEASED[name]["tie_word_embeddings"] else set()
    published = {key: value for key, value in state.items() if key not in tied}
    save_file(
        released_names(published) if name == "phi35_moe" else published,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return state


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    return {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, dict[str, Tensor]]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("released")
    for name in RELEASED:
        weights[name] = release(root / name, name)
    return {name: root / name for name in RELEASED}


@pytest.fixture(autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backbone is probed anew."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path_factory.mktemp("memory")))


@pytest.mark.parametrize("name", HUB)
def test_a_released_checkpoint_opens_and_passes_the_probe(
    folders: dict[str, Path], weights: dict[str, dict[str, Tensor]], name: str
) -> None:
    backbone, _ = load_backbone(str(folders[name]), dtype="float32")
    assert type(backbone.model).__name__ == ("PhimoeForCausalLM" if name == "phi35_moe" else "Phi3ForCausalLM")
    loaded = backbone.model.state_dict()
    assert loaded.keys() == weights[name].keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights[name].items())
    assert max(backbone.probe["differences"].values()) < 1e-5
    assert backbone.max_tokens == 4096 and backbone.configured_stop_ids == {256, 260}
    assert backbone.stop_ids == backbone.configured_stop_ids | backbone.turn_ends and backbone.turn_ends
    if name == "phi4_14b":
        assert not backbone.rotary and len(backbone.probe["lengths"]) == 3
    else:
        assert backbone.regime(SWITCH) != backbone.regime(SWITCH + 1)
        assert min(backbone.probe["lengths"]) < SWITCH < max(backbone.probe["lengths"])


def test_two_experts_of_sixteen_run_for_every_token(folders: dict[str, Path]) -> None:
    backbone, _ = load_backbone(str(folders["phi35_moe"]), dtype="float32")
    chosen: list[Tensor] = []
    for router in routers(backbone.model).values():
        router.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
    logits(backbone, samples(), (None,) * len(LENGTHS))
    assert len(chosen) == LAYERS and all(layer.shape == (sum(LENGTHS), 2) for layer in chosen)
    assert EXPERTS // 2 < len(torch.cat(chosen).unique()) <= EXPERTS


LENGTHS = (9, SWITCH, SWITCH + 1, 2 * SWITCH, 5 * SWITCH, 11)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def logits(backbone: Backbone, ids: list[Tensor], adapters: tuple[str | None, ...]) -> tuple[Tensor, ...]:
    """Of a pack of samples, each with the adapter named, or none."""
    lengths = tuple(map(len, ids))
    positions = torch.cat([torch.arange(length) for length in lengths])
    flow = Flow(lengths, Routing.by_sample([() if name is None else (name,) for name in adapters], lengths))
    with torch.no_grad():
        return backbone.head(backbone(backbone.embed(torch.cat(ids)), positions, flow)).split(lengths)


@pytest.mark.parametrize("name", HUB)
def test_a_mixed_pack_with_the_recipes_adapters_equals_stock_and_peft(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    ((_, modality),) = read(Recipe, CONFIGS / f"{name}.yaml").modalities.items()
    options = {**(modality.adapter or {}), "r": 4, "init_lora_weights": False}
    backbone, _ = load_backbone(str(folders[name]), dtype="float32")
    for seed, adapter in enumerate(("one", "two")):
        torch.manual_seed(seed)
        lora.inject(backbone.model, adapter, lora_config(options, adapter), adapter)
        (tmp_path / adapter).mkdir()
        save_file(lora.adapter_tensors(backbone.model, adapter), tmp_path / adapter / "adapter_model.safetensors")
        (tmp_path / adapter / "adapter_config.json").write_text(lora.adapter_json(lora_config(options, adapter), ""))
    lora.set_dropout(backbone.model, False)
    assert len(lora.adapter_parameters(backbone.model, "one")) == 2 * LAYERS * len(options["target_modules"])

    def alone(adapter: str | None, ids: Tensor) -> Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(tmp_path / adapter)).eval()
        with torch.no_grad():
            return model(input_ids=ids[None]).logits[0]

    adapters = (None, "one", "two", "one", None, "two")
    for adapter, ids, ours in zip(adapters, samples(), logits(backbone, samples(), adapters), strict=True):
        assert_close(ours, alone(adapter, ids), what=f"{name}, {len(ids)} tokens, adapter {adapter}")
        if adapter is not None:
            assert (ours - alone(None, ids)).abs().max() > 0.01, f"{name}: adapter {adapter} changes nothing"


def siglip(folder: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.SiglipVisionConfig(**sizes, image_size=384, patch_size=14)
    transformers.SiglipVisionModel(config).save_pretrained(folder)


def clip(folder: Path) -> None:
    import timm
    from timm.models import _hub

    arguments: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2}
    model: Any = timm.create_model("vit_large_patch14_clip_336.openai", **arguments)
    folder.mkdir(parents=True)
    path: Any = folder / "config.json"  # which older versions of timm take, whatever their annotation says
    _hub.save_config_for_hf(model, path, model_args=arguments)
    save_file(model.state_dict(), folder / "model.safetensors")


def whisper(folder: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)


ENCODERS = {
    "google/siglip-so400m-patch14-384": siglip,
    "timm/vit_large_patch14_clip_336.openai": clip,
    "openai/whisper-small": whisper,
}


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache in which the repositories that the recipes name hold tiny checkpoints."""
    root = tmp_path_factory.mktemp("hub")
    made = tmp_path_factory.mktemp("encoders")
    sources = {HUB[name]: folders[name] for name in HUB}
    torch.manual_seed(0)
    for repository, make in ENCODERS.items():
        sources[repository] = made / repository
        make(sources[repository])
    for repository, folder in sources.items():
        kept = root / f"models--{repository.replace('/', '--')}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
        (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
        for file in folder.iterdir():
            (kept / "snapshots" / ("0" * 40) / file.name).write_bytes(file.read_bytes())
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows with the columns of both datasets that the recipes name, media as the hub stores them."""
    pyarrow = pytest.importorskip("pyarrow")
    soundfile = pytest.importorskip("soundfile")
    from PIL import Image
    from pyarrow import parquet

    draw = np.random.default_rng(0)
    rows = []
    for row in range(4):
        picture, sound = io.BytesIO(), io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (100 + row, 120, 3), dtype=np.uint8)).save(picture, "PNG")
        soundfile.write(sound, 0.1 * draw.standard_normal(4000 + 800 * row), 16000, format="FLAC")
        rows.append(
            {
                "image": {"bytes": picture.getvalue(), "path": None},
                "question": "is it noise?",
                "answer": ("yes", "no")[row % 2],
                "audio": {"bytes": sound.getvalue(), "path": f"{row}.flac"},
                "text": ("YES", "NO")[row % 2],
            }
        )
    path = tmp_path_factory.mktemp("table") / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", [*HUB, "phi35_vision_tower"])
def test_the_recipe_trains_and_answers(
    hub: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    plain = read(Recipe, CONFIGS / f"{name}.yaml")
    ((modality, config),) = plain.modalities.items()
    (source,) = plain.stages[0].data
    overrides = [f"run={tmp_path / 'run'}"]
    data = ["evaluations.held_out.data", *(f"stages.{stage}.data.{source}" for stage in range(len(plain.stages)))]
    for where in data:  # one file, where the recipe names a dataset of the hub
        overrides += [f"{where}.options.path={table}", f"{where}.options.split=train"]
        overrides += [f"{where}.options.subset=null", f"{where}.options.revision=null"]
    for stage in range(len(plain.stages)):
        overrides += [f"stages.{stage}.steps=2", f"stages.{stage}.samples_per_step=2"]
    overrides.append("evaluations.held_out.max_new_tokens=2")
    run = train(read(Recipe, CONFIGS / f"{name}.yaml", overrides), show=False)

    assert json.loads((run / "molora.json").read_text())["backbone"]["source"] == plain.backbone.path
    folder = run / "modalities" / modality
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert config.adapter is not None and set(adapter["target_modules"]) == set(config.adapter["target_modules"])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * LAYERS * len(adapter["target_modules"])
    assert all(tensor.abs().max() > 0 for tensor in tensors.values()), "an adapter's lora_B starts at zero"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["held_out/questions"] for row in rows if "held_out/questions" in row][-1] == 4
