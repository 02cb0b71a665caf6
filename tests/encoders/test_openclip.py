"""CLIP's tower through timm and through open_clip: both give the frames of open_clip's own network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _hub, vision_transformer
from torch import Tensor

from molora.encoders.vision_towers.library import build_library_tower
from molora.encoders.vision_towers.open_clip_models import as_timm
from molora.encoders.vision_towers.tower import Tower, TowerConfig

open_clip: Any = pytest.importorskip("open_clip")

CROP, GRID, WIDTH = 56, 4, 32
# Released repositories hold the model twice, each library's files beside the other's.
REPOSITORY = "timm/vit_large_patch14_clip_336.openai"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": CROP, "layers": 3, "width": WIDTH, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}


def open_clip_model(**changes: Any) -> Any:
    """A tiny CLIP of open_clip with weights large enough that every part of it shows in the frames."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**CONFIG, **changes}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.3 * torch.randn_like(weight) + (name.endswith("weight") and "ln_" in name))
    return model


def timm_model(**changes: Any) -> Any:
    arguments = {"img_size": CROP, "embed_dim": WIDTH, "depth": 3, "num_heads": 2, "num_classes": 24, **changes}
    return timm.create_model("vit_large_patch14_clip_336.openai", **arguments)


def frames_of(model: Any, pixels: Tensor, layer: int = -2) -> Tensor:
    """open_clip's own forward, up to a block counted from the end, as frames_BHWC."""
    out = model.visual.forward_intermediates(pixels, indices=[3 + layer], intermediates_only=True)
    return out["image_intermediates"][0].permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def clip() -> Any:
    return open_clip_model()


@pytest.fixture(scope="module")
def folder(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP as it would lie in a released repository."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    model = timm_model()
    state = vision_transformer.checkpoint_filter_fn(dict(clip.state_dict()), model)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    arguments = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2}
    path: Any = folder / "config.json"  # which older versions of timm take, whatever their annotation says
    _hub.save_config_for_hf(model, path, model_args=arguments)
    return folder


def build(kind: str, crop: int = CROP, **options: Any) -> Tower:
    return build_library_tower(TowerConfig(kind=kind, **options), crop).tower.eval()


def crops(pixels: int = CROP) -> Tensor:
    return torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_the_frames_are_open_clips_own(clip, folder, kind, layer):
    tower = build(kind, path=str(folder), layer=layer)
    ours = tower(crops())
    assert ours.shape == (3, GRID, GRID, WIDTH), "frames alone: no class token among them"
    torch.testing.assert_close(ours, frames_of(clip, crops(), layer), rtol=0, atol=1e-5)
    assert (tower.mean, tower.std) == (CLIP_MEAN, CLIP_STD)


def test_both_libraries_give_the_same_frames(folder):
    torch.testing.assert_close(
        build("timm", path=str(folder))(crops()), build("open_clip", path=str(folder))(crops()), rtol=0, atol=1e-5
    )


def test_weights_that_want_quick_gelu_get_it(clip, folder, tmp_path):
    frames = frames_of(clip, crops())
    plain = frames_of(open_clip_model(quick_gelu=False), crops())
    assert (plain - frames).abs().max() > 0.1
    # timm's own reading of the same folder, for which QuickGELU is another architecture
    theirs: Any = timm_model().eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    features = theirs.forward_intermediates(crops(), indices=[1], intermediates_only=True)[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(features, plain, rtol=0, atol=1e-5)
    asked = build("timm", path=str(folder), arguments={"act_layer": "gelu"})
    torch.testing.assert_close(asked(crops()), plain, rtol=0, atol=1e-5)

    about = {"model_cfg": {**CONFIG, "quick_gelu": False}, "preprocess_cfg": PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    torch.testing.assert_close(build("open_clip", path=str(tmp_path))(crops()), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("timm", "vit_large_patch14_clip_336.openai"),
        ("timm", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("open_clip", "ViT-L-14-336-quickgelu"),
    ],
)
def test_the_released_tower_has_a_grid_of_24_frames_and_quick_gelu(kind, name):
    with torch.device("meta"):
        built = build_library_tower(TowerConfig(kind=kind, name=name, pretrained=False), 336)
    tower: Any = built.tower
    assert (tower.grid, tower.width, len(tower.model.blocks)) == (24, 1024, 23)
    assert {type(block.mlp.act).__name__ for block in tower.model.blocks} == {"QuickGELU"}
    assert isinstance(tower.model.norm_pre, torch.nn.LayerNorm) and tower.model.norm_pre.eps == 1e-5
    assert built.scratch.kind == "timm" and (tower.mean, tower.std) == (CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("open_clip", "ViT-L-14-336"),
        ("open_clip", REPOSITORY),
        ("timm", "vit_large_patch14_clip_336.openai"),
        ("timm", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("timm", REPOSITORY),
    ],
)
def test_its_names_lead_to_one_repository(clip, folder, tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    for file in folder.iterdir():
        (root / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    built = build_library_tower(TowerConfig(kind=kind, name=name), CROP)
    assert built.origin is not None and (built.origin.source, built.origin.revision) == (REPOSITORY, commit)
    torch.testing.assert_close(built.tower.eval()(crops()), frames_of(clip, crops()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_of_weights_loads_for_a_model_that_open_clip_names(clip, tmp_path, suffix):
    (tmp_path / "Tiny-CLIP.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "Tiny-CLIP.json")
    path = tmp_path / f"weights.{suffix}"
    state = clip.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    tower = build("open_clip", name="Tiny-CLIP", path=str(path))
    torch.testing.assert_close(tower(crops()), frames_of(clip, crops()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_positions_at_another_crop_size_are_open_clips_own(clip, folder, kind):
    larger = open_clip_model(vision_cfg={**CONFIG["vision_cfg"], "image_size": 84})
    state = dict(clip.state_dict())
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    ours = build(kind, 84, path=str(folder))(crops(84))
    torch.testing.assert_close(ours, frames_of(larger, crops(84)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_the_scratch_config_takes_the_weights_without_the_files(folder, kind):
    built = build_library_tower(TowerConfig(kind=kind, path=str(folder)), CROP)
    assert not built.scratch.pretrained and built.scratch.path is None
    again = build_library_tower(built.scratch, CROP)
    assert again.scratch == built.scratch
    again.tower.load_state_dict(built.tower.state_dict())
    assert torch.equal(again.tower.eval()(crops()), built.tower.eval()(crops()))


def hurt_missing(state: dict[str, Tensor]) -> None:
    del state["visual.ln_pre.weight"]


def hurt_unexpected(state: dict[str, Tensor]) -> None:
    state["visual.ln_between.weight"] = torch.ones(5)


def hurt_shape(state: dict[str, Tensor]) -> None:
    state["visual.ln_pre.weight"] = torch.ones(5)


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (hurt_missing, "norm_pre.weight"),
        (hurt_unexpected, "normbetween.weight"),
        (hurt_shape, "norm_pre.weight"),
        (dict.clear, "no weight starts with 'visual.'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    clip: Any, folder: Path, tmp_path: Path, hurt: Callable[[dict[str, Tensor]], None], message: str
):
    state = dict(clip.state_dict())
    hurt(state)
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=message):
        build("open_clip", path=str(tmp_path))


def test_no_pickle_of_a_folder_is_read(clip, folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no open_clip_model.safetensors in this folder"):
        build("open_clip", path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN50", r"neither a timm model nor a plain vision transformer \(layers \[3, 4, 6, 3\]\)"),
        ("coca_ViT-L-14", r"neither .* \(attentional_pool True, attn_pooler_heads 8\)"),
        ("ViT-L-14-CLIPA", r"neither .* \(no_ln_pre True\)"),
    ],
)
def test_a_vision_side_that_is_no_clip_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        as_timm(open_clip.get_model_config(name), name)
