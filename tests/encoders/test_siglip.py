"""Towers: the SigLIP backends against each other and their own libraries, masks, loading, other timm models."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs, register_model, vision_transformer
from torch import Tensor
from transformers import SiglipConfig, SiglipVisionConfig, SiglipVisionModel

from molora.encoders.vision_towers.library import build_library_tower
from molora.encoders.vision_towers.tower import PatchTower, Tower, TowerConfig, position_ids
from molora.modality import Origin

CROP, PATCH, GRID = 56, 14, 4
MOBILENET = Path(os.environ.get("MOLORA_TEST_DATA", ".")) / "weights/mobilenetv2_100"
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {
        "tiny_siglip.test": {
            "hf_hub_id": "timm/", "input_size": (3, CROP, CROP), "fixed_input_size": True, "num_classes": 0,
            "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "first_conv": "patch_embed.proj", "classifier": "head",
        }
    }
)  # fmt: skip


def tiny_siglip(pretrained: bool = False, **arguments: Any) -> Any:
    """The tiny SigLIP as a timm architecture, so that timm and open_clip can name it."""
    sizes = {
        "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5, "class_token": False,
        "global_pool": "map", "act_layer": "gelu_tanh",
    }  # fmt: skip
    return vision_transformer._create_vision_transformer("tiny_siglip", pretrained, **{**sizes, **arguments})


# timm files a model under the module it is in, which pytest's importlib mode does not always list.
sys.modules.setdefault(__name__, type(sys)(__name__))
sys.modules[__name__].__dict__.setdefault("default_cfgs", default_cfgs)
register_model(tiny_siglip)


@pytest.fixture(scope="module")
def siglip() -> SiglipVisionModel:
    """A tiny SigLIP of transformers with weights large enough that every part of it shows in the output."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=CROP, patch_size=PATCH)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def folders(siglip: SiglipVisionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as each library saves them: a folder each."""
    root = tmp_path_factory.mktemp("towers")
    siglip.save_pretrained(root / "transformers")
    (root / "timm").mkdir()
    timm_state = to_timm(siglip.state_dict())
    save_file(timm_state, root / "timm" / "model.safetensors")
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0, "fixed_input_size": True}
    (root / "timm" / "config.json").write_text(
        json.dumps({"architecture": "tiny_siglip", "num_classes": 0, "pretrained_cfg": about})
    )
    if "open_clip" in BACKENDS:
        (root / "open_clip").mkdir()
        (root / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
        save_file(open_clip_model(timm_state).state_dict(), root / "open_clip" / "open_clip_model.safetensors")
    return {path.name: path for path in root.iterdir()}


OPEN_CLIP = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {"image_size": CROP, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "pool_type": "last"},
}


def open_clip_model(timm_state: dict[str, Tensor]) -> Any:
    """open_clip's own two-tower model around the tiny SigLIP."""
    import open_clip

    model: Any = open_clip.CustomTextCLIP(**{key: value for key, value in OPEN_CLIP.items() if key != "custom_text"})
    model.visual.trunk.load_state_dict(timm_state)
    return model


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of SigLIP's weights to timm's."""
    renamed: dict[str, Tensor] = {"pos_embed": state["embeddings.position_embedding.weight"][None].clone()}
    for key, value in state.items():
        key = key.replace("embeddings.patch_embedding", "patch_embed.proj").replace("encoder.layers", "blocks")
        key = key.replace("layer_norm", "norm").replace("out_proj", "proj").replace("post_layernorm", "norm")
        key = key.replace("head.attention.", "attn_pool.").replace("head.", "attn_pool.").replace("layernorm", "norm")
        key = key.replace("attn_pool.probe", "attn_pool.latent").replace("self_attn.proj", "attn.proj")
        if key.startswith("attn_pool.in_proj"):
            kind = key.removeprefix("attn_pool.in_proj_")
            renamed[f"attn_pool.q.{kind}"], renamed[f"attn_pool.kv.{kind}"] = value[:32].clone(), value[32:].clone()
        elif ".self_attn." not in key and "position" not in key:
            renamed[key] = value.clone()
    for block in range(SIZES["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def build(kind: str, crop: int = CROP, **options: Any) -> Tower:
    return build_library_tower(TowerConfig(kind=kind, **options), crop).tower.eval()


def crops(count: int = 3, pixels: int = CROP) -> Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def valid_masks(*sizes: tuple[int, int]) -> Tensor:
    masks = torch.zeros(len(sizes), GRID, GRID, dtype=torch.bool)
    for mask, (rows, columns) in zip(masks, sizes, strict=True):
        mask[:rows, :columns] = True
    return masks


MASKS = {"none": None, "full": valid_masks((4, 4), (4, 4), (4, 4)), "partial": valid_masks((4, 4), (3, 4), (1, 2))}
BACKENDS = ["transformers", "timm"] + ["open_clip"] * (find_spec("open_clip") is not None)


@pytest.mark.parametrize("layer", [-1, -2])
def test_every_backend_gives_the_hidden_states_of_transformers(folders, siglip, layer):
    theirs = siglip(crops(), output_hidden_states=True).hidden_states[layer]
    for kind in BACKENDS:
        ours = build(kind, path=str(folders[kind]), layer=layer)(crops())
        assert ours.shape == (3, GRID, GRID, 32)
        torch.testing.assert_close(ours.flatten(1, 2), theirs, rtol=0, atol=1e-5)


def test_open_clips_own_forward_agrees(folders, siglip):
    pytest.importorskip("open_clip")
    model = open_clip_model(to_timm(siglip.state_dict())).eval()
    theirs = model.visual.forward_intermediates(crops(), indices=[1], intermediates_only=True)["image_intermediates"][0]
    ours = build("open_clip", path=str(folders["open_clip"]))(crops())
    torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS)
def test_the_backends_agree_under_masks(folders, masks):
    frames = [build(kind, path=str(folders[kind]))(crops(), MASKS[masks]) for kind in BACKENDS]
    for other in frames[1:]:
        torch.testing.assert_close(other, frames[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BACKENDS)
def test_masks(folders, kind):
    tower = build(kind, path=str(folders[kind]))
    pixels, partial = crops(), MASKS["partial"]
    assert partial is not None
    torch.testing.assert_close(tower(pixels, MASKS["full"]), tower(pixels), rtol=0, atol=1e-5)

    frames = tower(pixels, partial)
    holes = ~partial.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    changed = tower(pixels + 3 * holes, partial)
    torch.testing.assert_close(changed[partial], frames[partial], rtol=0, atol=1e-5)
    assert (changed[~partial] - frames[~partial]).abs().max() > 0.1

    for i in range(len(pixels)):
        alone = tower(pixels[i : i + 1], partial[i : i + 1])
        torch.testing.assert_close(alone, frames[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", BACKENDS)
def test_attention_is_not_causal(folders, kind, masks):
    tower, pixels = build(kind, path=str(folders[kind])), crops(3)
    before = tower(pixels, MASKS[masks])
    pixels[0, :, -PATCH:, -PATCH:] += 3
    moved = (tower(pixels, MASKS[masks]) - before).abs()
    assert moved[0, 0, 0].max() > 1e-3
    assert moved[1:].max() < 1e-5


@pytest.mark.parametrize("side", [4, 32])
def test_positions_are_the_references(side):
    """The closed form against the bucketing of transformers' port of the reference, for every count of valid rows."""
    from transformers import Phi4MultimodalVisionConfig
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalVisionEmbeddings

    config = Phi4MultimodalVisionConfig(hidden_size=1, image_size=side * 2, patch_size=2, num_attention_heads=1)
    theirs: Any = Phi4MultimodalVisionEmbeddings(config)
    with torch.no_grad():
        theirs.patch_embedding.weight.zero_()
        theirs.patch_embedding.bias.zero_()
        theirs.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
    steps = torch.arange(side)
    counts = torch.cartesian_prod(steps + 1, steps + 1) if side == 4 else torch.stack([steps + 1, steps.flip(0) + 1], 1)
    valid = (steps < counts[:, :1])[:, :, None] & (steps < counts[:, 1:])[:, None, :]
    expected = theirs(torch.zeros(len(counts), 3, side * 2, side * 2), valid)[..., 0].long()
    assert torch.equal(position_ids(valid, side), expected)
    if side == 32:
        assert position_ids(valid, side)[4, :160:32].tolist() == [0, 192, 384, 608, 800]  # rows 0 6 12 19 25 of 5


def test_a_full_siglip_folder_loads_like_its_vision_half(folders, siglip, tmp_path):
    """What google publishes: text tower, logit scale and the `vision_model.` prefix in the file, and its colours."""
    from transformers import SiglipModel

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**SIZES, "image_size": CROP, "patch_size": PATCH}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 60000}))
    model.vision_model.load_state_dict(siglip.state_dict())
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    state = {f"vision_model.{key}": value for key, value in siglip.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors")  # the names before transformers 5
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    tower = build("transformers", path=str(tmp_path))
    assert torch.equal(tower(crops()), build("transformers", path=str(folders["transformers"]))(crops()))
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    file = build("transformers", path=str(tmp_path / "old.safetensors"), arguments=SIZES)
    assert torch.equal(tower(crops()), file(crops()))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_file_of_weights_loads(folders, siglip, tmp_path, kind, suffix):
    state = siglip.state_dict() if kind == "transformers" else to_timm(siglip.state_dict())
    options: dict[str, Any] = {"arguments": SIZES} if kind == "transformers" else {"name": "tiny_siglip"}
    if kind == "open_clip":
        state = open_clip_model(state).state_dict()
        config = tmp_path / "Tiny-SigLIP.json"
        config.write_text(json.dumps(OPEN_CLIP))
        import open_clip

        open_clip.add_model_config(config)
        options = {"name": "Tiny-SigLIP"}
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    ours = build(kind, path=str(path), **options)
    assert torch.equal(ours(crops()), build(kind, path=str(folders[kind]))(crops()))


@pytest.mark.parametrize("kind", BACKENDS)
def test_half_precision_weights_are_trained_in_single(folders, tmp_path, kind):
    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(tmp_path.glob("*.safetensors"))
    save_file({key: value.half() for key, value in load_file(weights).items()}, weights)
    assert {weight.dtype for weight in build(kind, path=str(tmp_path)).parameters()} == {torch.float32}


def snapshot(cache: Path, repository: str, files: Path, commit: str) -> None:
    """Lays a folder into a hub cache as a download of `main` would."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    for file in files.iterdir():
        (root / "snapshots" / commit / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("kind", "name", "repository"),
    [
        ("transformers", "someone/tiny", "someone/tiny"),
        ("timm", "someone/tiny", "someone/tiny"),
        ("timm", "tiny_siglip.test", "timm/tiny_siglip.test"),
        ("timm", "tiny_siglip", "timm/tiny_siglip.test"),
        ("open_clip", "someone/tiny", "someone/tiny"),
    ],
)
def test_a_hub_name_loads_from_the_cache_and_knows_its_commit(folders, tmp_path, monkeypatch, kind, name, repository):
    if kind not in BACKENDS:
        pytest.skip("open_clip is not installed")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot(tmp_path, repository, folders[kind], commit)
    for revision in (None, "main", commit):
        built = build_library_tower(TowerConfig(kind=kind, name=name, revision=revision), CROP)
        assert built.origin is not None
        assert (built.origin.source, built.origin.revision) == (repository, commit)
        assert torch.equal(built.tower.eval()(crops()), build(kind, path=str(folders[kind]))(crops()))
    with pytest.raises(ValueError, match=f"{repository} .revision v2. cannot be fetched"):
        build(kind, name=name, revision="v2")


def test_a_missing_open_clip_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'molora\[open_clip\]'"):
        build("open_clip", name="ViT-B-16-SigLIP")


def test_local_weights_have_no_origin(folders):
    for kind in BACKENDS:
        assert build_library_tower(TowerConfig(kind=kind, path=str(folders[kind])), CROP).origin is None


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_scratch_config_takes_the_weights_without_the_files(folders, kind):
    built = build_library_tower(TowerConfig(kind=kind, path=str(folders[kind])), CROP)
    assert not built.scratch.pretrained and built.scratch.path is None
    again = build_library_tower(built.scratch, CROP)
    assert again.scratch == built.scratch
    assert not torch.equal(again.tower.eval()(crops()), built.tower.eval()(crops()))
    again.tower.load_state_dict(built.tower.state_dict())
    assert torch.equal(again.tower(crops()), built.tower(crops()))


@pytest.mark.parametrize("kind", BACKENDS)
def test_layers_behind_the_feature_layer_are_not_kept(folders, kind):
    tower = build(kind, path=str(folders[kind]), layer=-3)
    assert isinstance(tower, PatchTower) and len(tower.blocks) == 1
    names = [name for name, _ in tower.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"patch", "table_NC", "blocks"}


@pytest.mark.parametrize("pixels", [84, 60])
def test_another_crop_size_resamples_the_positions_alike(folders, pixels):
    frames = [build(kind, pixels, path=str(folders[kind]))(crops(2, pixels)) for kind in BACKENDS]
    assert frames[0].shape == (2, pixels // PATCH, pixels // PATCH, 32)
    for other in frames[1:]:
        torch.testing.assert_close(other, frames[0], rtol=0, atol=1e-5)


def test_a_table_that_fits_the_crops_is_not_resampled(siglip, tmp_path):
    """Weights tuned at another size than the architecture's own: a detour through the own size would cost."""
    state = to_timm(siglip.state_dict())
    state["pos_embed"] = torch.randn(1, 36, 32, generator=torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "tuned.safetensors")
    tower: Any = build("timm", 84, name="tiny_siglip", path=str(tmp_path / "tuned.safetensors"))
    assert torch.equal(tower.table_NC, state["pos_embed"][0])


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(folders, siglip, tmp_path, kind, damage):
    def hurt(state: dict[str, Tensor], bias: str) -> dict[str, Tensor]:
        if damage == "missing":
            return {key: value for key, value in state.items() if key != bias}
        return {**state, ("surplus.weight" if damage == "unexpected" else bias): torch.ones(5)}

    if kind == "transformers":
        state = hurt(siglip.state_dict(), "encoder.layers.0.mlp.fc1.bias")
    else:
        state = hurt(to_timm(siglip.state_dict()), "blocks.0.mlp.fc1.bias")
    if kind == "open_clip":
        state = {f"visual.trunk.{key}": value for key, value in state.items()}
    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, next(tmp_path.glob("*.safetensors")))
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        build(kind, path=str(tmp_path))
    assert ("surplus.weight" if damage == "unexpected" else "0.mlp.fc1.bias") in str(error.value)


def test_a_pickle_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "yes"))

    torch.save({"state_dict": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        build("timm", name="tiny_siglip", path=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "siglip"}, "kind: expected one of transformers, timm, open_clip, convit, got 'siglip'"),
        ({"kind": "convit"}, "convit has no pretrained weights"),
        ({"kind": "convit", "pretrained": False, "patch_pixels": 14}, "patch_pixels is 8 for kind convit, got 14"),
        ({"kind": "timm"}, "timm needs a name or a path"),
        ({"kind": "transformers"}, "needs a name or a path, or pretrained: false"),
        ({"kind": "open_clip", "name": "x", "arguments": {"a": 1}}, "arguments are for kind transformers and timm"),
        ({"kind": "timm", "name": "resnet18", "layer": 2}, "layer counts from the end"),
        ({"kind": "open_clip", "name": "RN50", "layer": "final"}, "layer final is for kind timm, not open_clip"),
        ({"kind": "timm", "path": "x", "revision": "main"}, "revision 'main' is for weights named on the hub"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        TowerConfig(**options)


SCRATCH: dict[str, Any] = {"pretrained": False}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("timm", {"name": "tiny_siglop"}, "timm has no model 'tiny_siglop'; did you mean 'tiny_siglip'"),
        ("timm", {"name": "tiny_siglip", "path": "nowhere.pth"}, "nowhere.pth: no such file"),
        ("timm", {"path": __file__}, "test_siglip.py is a file of weights: name says their architecture"),
        (
            "timm",
            {"name": "tiny_siglip", "arguments": {"deptth": 1}, **SCRATCH},
            "takes no 'deptth' here; did you mean 'depth'",
        ),
        ("timm", {"name": "tiny_siglip", "layer": -4, **SCRATCH}, "layer -4 asked for, but the encoder has 3 blocks"),
        ("timm", {"name": "test_resnet", "layer": -9, **SCRATCH}, "layer -9 asked for, but the encoder has 5 blocks"),
        (
            "timm",
            {"name": "test_resnet", "layer": -1, **SCRATCH},
            "grid of 2 frames a side, patch_pixels 14 promises 4",
        ),
        ("timm", {"name": "test_vit", **SCRATCH}, "test_vit cannot take crops of 56 pixels: .*divisible"),
        (
            "transformers",
            {"arguments": {"hiden_size": 1}, **SCRATCH},
            "no 'hiden_size' here; did you mean 'hidden_size'",
        ),
        (
            "transformers",
            {"arguments": {**SIZES, "patch_size": 7}, **SCRATCH},
            "grid of 8 frames a side, .* promises 4",
        ),
        ("open_clip", {"name": "ViT-B-16-SigLip"}, "no model 'ViT-B-16-SigLip'; did you mean 'ViT-B-16-SigLIP'"),
        ("open_clip", {"name": "RN50", **SCRATCH}, "neither a timm model nor a plain vision transformer"),
        ("open_clip", {"name": "ViT-B-32"}, "tags .*laion2b_s34b_b79k.*; name one hub repository in name"),
    ],
)
def test_building_mistakes(kind, options, message):
    if kind not in BACKENDS:
        pytest.skip("open_clip is not installed")
    with pytest.raises(ValueError, match=message):
        build(kind, **options)


def test_folders_of_the_wrong_kind_are_refused(folders, tmp_path):
    from transformers import CLIPVisionConfig

    with pytest.raises(ValueError, match=r"config.json: names no timm 'architecture'"):
        build("timm", path=str(folders["transformers"]))
    with pytest.raises(ValueError, match=r"open_clip_config.json: cannot be read"):
        build("open_clip", path=str(folders["timm"]))
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a clip_vision_model model; kind transformers takes siglip"):
        build("transformers", path=str(tmp_path))
    with pytest.raises(ValueError, match="which says what it holds: leave out name"):
        build("timm", name="tiny_siglip", path=str(folders["timm"]))
    (tmp_path / "config.json").write_bytes((folders["timm"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"no model.safetensors in this folder"):
        build("timm", path=str(tmp_path))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_mambaout"])
def test_any_timm_model_gives_its_own_feature_map(name):
    torch.manual_seed(0)
    config = TowerConfig(kind="timm", name=name, pretrained=False, patch_pixels=16)
    built = build_library_tower(config, 64)
    ours: Any = built.tower.eval()
    size: dict[str, Any] = {"img_size": 64} if "vit" in name else {}
    theirs: Any = timm.create_model(name, **size).eval()
    assert not theirs.load_state_dict(ours.model.state_dict(), strict=False).unexpected_keys
    features = theirs.forward_intermediates(crops(2, 64), intermediates_only=True)[-2]
    assert ours.grid == 4 and ours.mean == theirs.default_cfg["mean"]
    torch.testing.assert_close(ours(crops(2, 64)), features.permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    again = build_library_tower(built.scratch, 64).tower.eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(crops(2, 64)), ours(crops(2, 64)))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit", "swin_tiny", "tiny_siglip"])
def test_final_features_are_what_timm_pools(name):
    """Whatever the family returns: channels first, channels last, or patches behind class tokens."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    arguments = small if "swin" in name else {}
    name, side = ("swin_tiny_patch4_window7_224", 64) if "swin" in name else (name, CROP if "siglip" in name else 64)
    patch = {"tiny_siglip": 14, "test_efficientnet": 32, "test_convnext": 32, "test_vit": 16}.get(name, 8)
    config = TowerConfig(
        kind="timm", name=name, layer="final", pretrained=False, patch_pixels=patch, arguments=arguments
    )
    built = build_library_tower(config, side)
    ours: Any = built.tower.eval()
    size: dict[str, Any] = {"img_size": side} if "vit" in name or "swin" in name else {}
    theirs: Any = timm.create_model(name, **size, **arguments).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    state = theirs.state_dict()
    if isinstance(ours, PatchTower):
        ours.patch.load_state_dict(theirs.patch_embed.proj.state_dict())
        ours.table_NC.data.copy_(theirs.pos_embed[0])
        ours.blocks.load_state_dict(theirs.blocks.state_dict())
        ours.leave.load_state_dict(theirs.norm.state_dict())
    else:
        assert not ours.model.load_state_dict(state, strict=False).missing_keys
    features = theirs.forward_features(crops(2, side))
    if features.ndim == 3:
        features = features[:, theirs.num_prefix_tokens :].unflatten(1, (side // patch, -1))
    elif "swin" not in name:
        features = features.permute(0, 2, 3, 1)
    torch.testing.assert_close(ours(crops(2, side)), features, rtol=0, atol=1e-5)
    again = build_library_tower(built.scratch, side).tower.eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(crops(2, side)), ours(crops(2, side)))


@pytest.mark.skipif(not MOBILENET.is_dir(), reason="set MOLORA_TEST_DATA to a folder with weights/mobilenetv2_100")
def test_the_features_of_a_published_mobilenet_are_its_own(tmp_path):
    """A file of weights with timm's config.json beside it, which says how its pictures are normalised."""
    shutil.copy(MOBILENET / "model.safetensors", tmp_path)
    about = json.loads((MOBILENET / "meta.json").read_text())
    colours = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": about["timm_model"], "model_args": about["timm_kwargs"], "pretrained_cfg": colours}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = build_library_tower(TowerConfig(kind="timm", path=str(tmp_path), layer="final", patch_pixels=32), 224).tower
    assert tower.mean == tower.std == (0.5, 0.5, 0.5) and (tower.width, tower.grid) == (1280, 7)
    parity = np.load(MOBILENET / "parity.npz")
    pixels = torch.from_numpy(parity["image"]).permute(2, 0, 1)[None] / 127.5 - 1
    features = tower.eval()(pixels).mean((0, 1, 2)).detach().numpy()
    np.testing.assert_allclose(features, parity["features_timm"], atol=1e-4)


def test_other_timm_weights_are_checked_too(tmp_path):
    model: Any = timm.create_model("test_resnet")
    save_file(model.state_dict(), tmp_path / "good.safetensors")
    state = {key: value for key, value in model.state_dict().items() if key != "layer1.0.conv1.weight"}
    save_file(state, tmp_path / "bad.safetensors")
    config = TowerConfig(kind="timm", name="test_resnet", path=str(tmp_path / "good.safetensors"), patch_pixels=16)
    model.eval()
    theirs = model.forward_intermediates(crops(1, 64), intermediates_only=True)[-2]
    ours = build_library_tower(config, 64).tower.eval()(crops(1, 64))
    torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs, rtol=0, atol=1e-5)
    for arguments in ({}, {"num_classes": 0}):  # timm alone would load the second without a word
        with pytest.raises(ValueError, match=r"layer1.0.conv1.weight"):
            build_library_tower(replace(config, path=str(tmp_path / "bad.safetensors"), arguments=arguments), 64)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"model_args": {"checkpoint_path": "x.pth"}}, "takes no 'checkpoint_path'"),
        ({"model_args": {"depth": 10**9}}, "depth is 1000000000, allowed 1000"),
        ({"model_args": {"embed_dim": 49152, "depth": 100}}, "asks for .* numbers and its weights hold"),
        ({"architecture": "local-dir:/etc"}, "no architecture 'local-dir:/etc'"),
        ({"architecture": ["x"]}, "no architecture"),
        ({"pretrained_cfg": {"file": "x.pth", "custom_load": "hf"}}, None),
    ],
)
def test_a_repository_shapes_a_model_and_no_more(folders, tmp_path, monkeypatch, about, said):
    folder = tmp_path / ("0" * 40)
    shutil.copytree(folders["timm"], folder)
    config = json.loads((folder / "config.json").read_text())
    about = {**about, "pretrained_cfg": {**config["pretrained_cfg"], **about.get("pretrained_cfg", {})}}
    (folder / "config.json").write_text(json.dumps({**config, **about}))
    monkeypatch.setattr("molora.encoders.pretrained_files.fetch", lambda *_: (folder, Origin("a/b", folder.name)))
    if said is None:
        expected, found = build("timm", path=str(folders["timm"])), build("timm", name="a/b")
        assert torch.equal(found(crops()), expected(crops()))
    else:
        with pytest.raises(ValueError, match=said):
            build("timm", name="a/b")


@pytest.mark.parametrize("weight_map", [7, {"a": "../model.safetensors"}, {"a": 7}])
def test_an_index_of_weights_names_files_of_its_folder(folders, tmp_path, weight_map):
    folder = Path(shutil.copytree(folders["transformers"], tmp_path / "tower"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json.*weight_map"):
        build("transformers", path=str(folder))
