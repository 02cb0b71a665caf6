"""The recipes at full size: each in small on rows of its datasets' columns, and its shapes without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, SiglipConfig, WhisperConfig

from molora.cli.commands import main
from molora.config import ConfigError, read
from molora.data.sources import SourceConfig, open_source
from molora.doctor.dry_run import on_meta
from molora.doctor.needs import weights
from molora.doctor.rehearsal import rehearsed
from molora.inference.load import load
from molora.train.loop import train
from molora.train.optim import set_trainable
from molora.train.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(CONFIGS.glob("stages/*.yaml"))
RECIPES = [*STAGES, CONFIGS / "phi4_mini.yaml"]

# What the repositories on the hub say of their shapes.
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
SHAPES: dict[str, PretrainedConfig] = {
    "microsoft/Phi-4-mini-instruct": Phi3Config(
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={**_LONGROPE, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "google/siglip2-base-patch16-384": SiglipConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
            "image_size": 384,
        }
    ),
    "openai/whisper-base": WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, num_mel_bins=80
    ),
    **{f"google/{name}-so400m-patch14-384": SiglipConfig(vision_config=_SIGLIP) for name in ("siglip", "siglip2")},
    "openai/whisper-large-v3-turbo": WhisperConfig(
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of the hub, with descriptions and no weights."""
    root = tmp_path_factory.mktemp("hub")
    for name, config in SHAPES.items():
        folder = root / f"models--{name.replace('/', '--')}"
        config.save_pretrained(folder / "snapshots" / "1")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1")
        if isinstance(config, WhisperConfig):
            features = {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "feature_size": config.num_mel_bins,
                "sampling_rate": 16000,
            }
            (folder / "snapshots" / "1" / "preprocessor_config.json").write_text(json.dumps(features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield root


def made_by(folder: str) -> Path:
    """The recipe that trains a modality, by the folder that it is in."""
    run = str(Path(folder).parents[1])
    return next(path for path in STAGES if read(Recipe, path).run == run)


def whole(path: Path) -> Recipe:
    """A recipe whose modalities are described, also those that another one trains."""
    recipe = read(Recipe, path)
    modalities = {
        name: read(Recipe, made_by(modality.path)).modalities[name] if modality.path else modality
        for name, modality in recipe.modalities.items()
    }
    return replace(recipe, modalities=modalities)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_full_recipe_trains_in_small(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for modality in read(Recipe, path).modalities.values():
        if modality.path:
            train(rehearsed(read(Recipe, made_by(modality.path))), show=False)
    monkeypatch.setattr("sys.argv", ["molora", "train", str(path), "--tiny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    recipe = read(Recipe, path)
    rows = [json.loads(line) for line in (tmp_path / f"{recipe.run}-tiny" / "metrics.jsonl").read_text().splitlines()]
    trained = [row["stage"] for row in rows if "seconds" in row]
    assert trained == [stage.name for stage in recipe.stages for _ in range(2)]
    parts = load(f"{recipe.run}-tiny").model.parts()
    assert {part.partition(".")[2] for part in parts if part.startswith("adapters.")} == recipe.modalities.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_full_recipe_has_the_shapes_and_parts_that_it_names(path: Path, hub: Path) -> None:
    """On the meta device, at full size: every pattern of every stage trains something."""
    recipe = whole(path)
    model = on_meta(recipe)
    for index, stage in enumerate(recipe.stages):
        optimizers = set_trainable(model, stage.train, stage.steps, f"stages.{index}.train")
        assert {part.partition(".")[0] for part in optimizers} == {name.partition(".")[0] for name in stage.train}
    assert sum(need.num_bytes for need in weights(model)) > 2e8


# In bf16 without sparsity, by NVIDIA's data sheets; and the share of that which the heads of recipes assume.
PEAKS = {"an H100": 989e12, "an A100": 312e12, "an RTX 4090": 165e12}
UTILISATION = 0.4


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_the_head_of_a_stages_recipe_says_what_memory_and_time_it_takes(path: Path, hub: Path) -> None:
    """The hours by the rule of docs/how_to/memory.md. The memory was counted by `molora doctor --fit`, which takes
    minutes; here, that what is always there is less."""
    recipe = whole(path)
    model = on_meta(recipe)
    (name,) = recipe.modalities
    head = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
    said = re.search(
        r"One GPU: ([\d.]+) GiB .*; at ([\d,]+) tokens and ([\d,]+) frames a sample, (.*) \(the rule", head
    )
    assert said, head
    tokens, frames = (int(number.replace(",", "")) for number in said.groups()[1:3])
    sizes = {part: sum(p.numel() for p in of.values()) for part, of in model.parts().items()}
    adapter, encoder = sizes[f"adapters.{name}"], sizes.get(f"encoders.{name}", 0)
    frozen = sum(p.numel() for key, p in model.backbone.model.named_parameters() if ".lora_" not in key)
    operations, trained = 0.0, 0
    for index, stage in enumerate(recipe.stages):
        optimizers = set_trainable(model, stage.train, stage.steps, f"stages.{index}.train")
        trained = max(trained, sum(p.numel() for each in optimizers.values() for p in each.parameters.values()))
        trains = {part: f"{part}.{name}" in stage.train for part in ("adapters", "encoders")}
        of_sample = 6 * (frozen + adapter) * tokens + 2 * adapter * tokens * trains["adapters"]
        if stage.objective == "preferences":  # two answers, each run by the reference and twice by what learns
            of_sample = 2 * (of_sample + 4 * (frozen + adapter) * tokens)
        of_sample += encoder * frames * (6 if trains["encoders"] else 2)
        operations += of_sample * stage.steps * stage.samples_per_step
    hours = dict(re.findall(r"([\d.]+) hours of (an [A-Z\w ]+?\d+)", said[4]))
    assert len(hours) == 2
    for stated, device in hours.items():
        assert float(stated) == pytest.approx(operations / (UTILISATION * PEAKS[device] * 3600), rel=0.05), device
    always = sum(need.num_bytes for need in weights(model)) + 12 * trained
    assert 1 < float(said[1]) * 2**30 / always < 12


def test_a_recipe_that_drifts_from_code_or_data_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / "phi4_mini.yaml"
    with pytest.raises(ConfigError, match=r"no column 'pictures'; .*columns are \['image', 'question', 'answer'\]"):
        train(rehearsed(read(Recipe, path, ["stages.0.data.questions.options.media.image=pictures"])))
    with pytest.raises(ConfigError, match="flaviagiammarino/vqa-rad"):
        rehearsed(read(Recipe, path, ["stages.0.data.questions.options.path=flaviagiammarino/vqa-rat"]))
    with pytest.raises(
        ConfigError, match=r"stages_vision-tiny/.*; train it first, by its own recipe with --tiny run=\S*stages_vision$"
    ):
        rehearsed(read(Recipe, CONFIGS / "stages" / "vision_preferences.yaml"))


@pytest.mark.parametrize("is_table", [True, False])
def test_shards_of_the_hub_are_made_in_small_too(
    is_table: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read(Recipe, CONFIGS / "phi4_mini.yaml")
    columns = {"prompt": "{question}", "answer": "{answer}", "media": {"image": "image;png"}} if is_table else {}
    path = "hf://datasets/flaviagiammarino/vqa-rad/data/train-*.parquet" if is_table else "hf://datasets/some/talks"
    options = {"path": path, "disk_gib": 5, **columns}
    recipe.stages[0].data = {"shards": SourceConfig(kind="shards", options=options)}
    (source,) = (open_source(config, "data") for config in rehearsed(recipe).stages[0].data.values())
    parts = source[3]["messages"][0]["content"]
    assert len(source) == 4 and [part["type"] for part in parts] == ["image", "text"]
