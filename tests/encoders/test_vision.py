"""The vision modality: loading good, odd and bad pictures, dynamic-HD crops against the reference, and its encoder."""

from __future__ import annotations

import base64
import io
import pickle
import struct
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import Phi4MultimodalImageProcessor

from molora.checkpoint.format import tensor_hash
from molora.config import ConfigError, build, dump
from molora.encoders.pictures import MAX_FILE_BYTES
from molora.encoders.vision import Vision, VisionConfig, _draw_view, lay_out
from molora.encoders.vision_towers.tower import ConvitConfig, TowerConfig
from molora.modality import MediaError, Modality, Origin
from tests.png import chunk

SCRATCH = TowerConfig(
    kind="transformers",
    pretrained=False,
    arguments={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
)
CONVIT = TowerConfig(kind="convit", pretrained=False, convit=ConvitConfig(width=16, depth=1, heads=2))


def vision(**options: Any) -> Vision:
    return Vision("vision", VisionConfig(**options))


def small(**options: Any) -> Vision:
    """Crops of 4 x 4 patches, 2 x 2 frames after pooling."""
    return vision(**{"crop_pixels": 56, "tower": SCRATCH, **options})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- Dynamic-HD crops


TOKENS = [
    (448, 448, 36, 545), (640, 480, 36, 1065), (500, 900, 36, 1617), (900, 500, 36, 1596), (1344, 1344, 36, 2625),
    (1920, 1080, 36, 3918), (3000, 3000, 36, 9585), (3000, 3000, 16, 4433), (4000, 700, 36, 4043),
    (4000, 700, 16, 1761), (5000, 300, 36, 2589), (28, 448, 36, 305), (448, 28, 36, 290), (100, 50, 36, 409),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height", "limit", "tokens"), TOKENS)
def test_the_references_token_counts(width, height, limit, tokens):
    """Measured with the released processor."""
    prepared = vision(max_crops=limit).prepare(Image.new("RGB", (width, height)))
    assert prepared.num_tokens == tokens


@pytest.mark.parametrize("limit", [1, 2, 5, 16, 36])
def test_crops_and_masks_are_those_of_transformers_port(limit):
    """Over every shape, small enough to be quick: the grid, the resized size, the padding, the mask, the refusals."""
    config = VisionConfig(crop_pixels=56, max_crops=limit, tower=SCRATCH)
    processor = Phi4MultimodalImageProcessor()
    sizes = np.exp(np.random.default_rng(limit).uniform(0, np.log(900), (400, 2))).astype(int)
    refused = 0
    for width, height in [*sizes.tolist(), (56, 56), (112, 112), (448, 448), (1, 1)]:
        picture = torch.zeros(3, height, width, dtype=torch.uint8)
        try:
            theirs, mask = processor.dynamic_preprocess(picture, 56, 14, 4, max_num=limit)
        except ValueError:
            refused += 1
            with pytest.raises(MediaError, match=f"{width} x {height} pixels is too long and thin"):
                lay_out(width, height, config)
            continue
        layout = lay_out(width, height, config)
        assert (layout.rows * 56, layout.columns * 56) == theirs.shape[1:], (width, height)
        assert (layout.height, layout.width) == (int((theirs[0, :, 0] == 0).sum()), int((theirs[0, 0] == 0).sum()))
        assert (layout.valid_rows, layout.valid_columns) == (int(mask[:, 0].sum()), int(mask[0].sum()))
    assert 0 < refused < 300


def reference_picture(image: Image.Image, crop: int, config: VisionConfig) -> Tensor:
    """The padded, normalised picture as torchvision makes it."""
    layout = lay_out(*image.size, config)
    resized: Any = tv.resize(image, [layout.height, layout.width], antialias=True)  # type: ignore[arg-type]
    padding = [0, 0, layout.columns * crop - layout.width, layout.rows * crop - layout.height]
    padded = tv.to_image(tv.pad(resized, padding, fill=255))
    return tv.normalize(tv.to_dtype(padded, torch.float32, scale=True), [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (30, 50), (150, 90), (90, 200), (400, 30)])
def test_crops_tile_the_picture_that_torchvision_makes(width, height):
    modality = small()
    prepared = modality.prepare(noise(width, height))
    crops, (rows, columns, *_) = prepared.tensors["crops_BCHW"], prepared.tensors["layout_4"].tolist()
    assert crops.dtype == torch.uint8 and len(crops) == rows * columns
    picture = (reference_picture(noise(width, height), 56, modality.config) * 0.5 + 0.5) * 255
    for index, crop in enumerate(crops):
        row, column = divmod(index, columns)
        there = picture[:, row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
        torch.testing.assert_close(crop.float(), there, rtol=0, atol=1e-3)


def test_a_crop_keeps_a_valid_patch_where_patches_do_not_fill_it():
    """60 pixels hold 4 patches of 14 and 4 pixels more: a sliver of picture there must not leave a crop all masked."""
    modality = small(crop_pixels=60)
    layout = lay_out(110, 62, modality.config)
    assert (layout.rows, layout.height) == (2, 67)
    layouts = [lay_out(width, height, modality.config) for width in range(40, 200, 7) for height in range(40, 200)]
    assert all(layout.valid_rows > (layout.rows - 1) * 4 for layout in layouts)
    assert all(layout.valid_columns > (layout.columns - 1) * 4 for layout in layouts)


# --- The encoder


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7])
def test_the_global_view_is_torchs_bicubic_interpolation(rows: int, columns: int):
    draw = torch.Generator().manual_seed(rows)
    crops_BCHW = torch.randint(0, 256, (rows * columns, 3, 20, 20), generator=draw, dtype=torch.uint8)
    picture = crops_BCHW.float().unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).reshape(1, 3, rows * 20, -1)
    wanted = torch.nn.functional.interpolate(picture, size=(20, 20), mode="bicubic", align_corners=False)[0]
    drawn = torch.full((3, 20, 20), torch.nan)
    _draw_view(crops_BCHW, rows, columns, drawn)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("width", "height"), [(448, 448), (896, 448), (448, 1344), (896, 1344)])
def test_the_tower_gets_what_transformers_processor_makes(width: int, height: int):
    """Of pictures that fill their crops; others it resizes in another arithmetic, which differs by up to 2 of 255."""
    modality, picture = vision(tower=SCRATCH), noise(width, height)
    collated = modality.collate([modality.prepare(picture)])
    layouts = [tuple(row) for row in collated["layout_I4"].tolist()]
    inputs_BCHW, _, view_ids = modality.build_encoder().inputs(collated["crops_BCHW"], layouts)
    crops_BCHW = inputs_BCHW[: len(collated["crops_BCHW"])]
    theirs = Phi4MultimodalImageProcessor()(picture, return_tensors="pt")["image_pixel_values"][0]
    torch.testing.assert_close(torch.cat([inputs_BCHW[view_ids], crops_BCHW]), theirs, rtol=0, atol=2e-6)


def phi4_image_embedding(crop: int) -> Any:
    """transformers' port of the reference on tiny random weights; eager, as its sdpa path is causal by mistake."""
    from transformers import Phi4MultimodalConfig
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding

    sizes = {**SCRATCH.arguments, "image_size": crop, "patch_size": 14, "crop_size": crop}
    config = Phi4MultimodalConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vision_config=sizes
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Phi4MultimodalImageEmbedding(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    return model


def reference_frames(model: Any, images: list[Image.Image], modality: Vision) -> Tensor:
    """What the reference hands to its projector for these pictures in one call."""
    config = modality.config
    crop, grid = config.crop_pixels, config.grid
    pixels, masks, sizes = [], [], []
    for image in images:
        layout = lay_out(*image.size, config)
        picture = reference_picture(image, crop, config)
        view = torch.nn.functional.interpolate(picture[None], (crop, crop), mode="bicubic", align_corners=False)
        tiles = picture.unfold(1, crop, crop).unfold(2, crop, crop).permute(1, 2, 0, 3, 4).flatten(0, 1)
        pixels.append(torch.cat([view, tiles]))
        mask = torch.zeros(layout.rows * grid, layout.columns * grid)
        mask[: layout.valid_rows, : layout.valid_columns] = 1
        tiles = mask.unfold(0, grid, grid).unfold(1, grid, grid).flatten(0, 1)
        masks.append(torch.cat([torch.ones(1, grid, grid), tiles]))
        sizes.append(picture.shape[1:])
    pixels = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
    masks = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=1.0)
    seen: list[Tensor] = []
    hook = model.img_projection_up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    tokens = sum(modality.prepare(image).num_tokens for image in images)
    ids = torch.full((1, tokens), model.config.vision_config.image_token_id)
    with torch.no_grad():
        model(ids, torch.zeros(1, tokens, 16), pixels, torch.tensor(sizes), masks)
    hook.remove()
    return torch.cat(seen)


PICTURES = {
    "square": (56, 56), "small": (20, 33), "wide": (170, 40), "tall": (40, 170), "padded right": (75, 100),
    "padded below": (101, 75), "many": (280, 250), "over the limit": (700, 350),
}  # fmt: skip


@pytest.mark.parametrize("crop", [56, 70])  # a grid of 4 patches, and one of 5, which pooling pads
def test_frames_are_the_references(crop):
    """Same weights and pixels: masks, position ids, pooling, cuts, separators and order all as in the reference."""
    modality = vision(crop_pixels=crop, max_crops=16, tower=SCRATCH)
    model = phi4_image_embedding(crop)
    encoder = modality.build_encoder().eval()
    tower = model.img_processor
    state = {f"blocks.{key}": value for key, value in tower.encoder.layers[:2].state_dict().items()}
    state |= {f"patch.{key}": value for key, value in tower.embeddings.patch_embedding.state_dict().items()}
    encoder.tower.load_state_dict({**state, "table_NC": tower.embeddings.position_embedding.weight})
    with torch.no_grad():
        encoder.row_separator_C.copy_(model.sub_img_feature_extensor.flatten())
        encoder.view_separator_C.copy_(model.global_img_feature_extensor.flatten())

    images = [noise(*size) for size in PICTURES.values()]
    prepared = [modality.prepare(image) for image in images]
    with torch.no_grad():
        together = encoder(**modality.collate(prepared))
    assert together.lengths == tuple(item.num_tokens for item in prepared)
    for image, item, ours in zip(images, prepared, together.frames_SC.split(together.lengths), strict=True):
        theirs = reference_frames(model, [image], modality)
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
        with torch.no_grad():
            alone = encoder(**modality.collate([item])).frames_SC
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5 * scale)
    theirs = reference_frames(model, images, modality)
    torch.testing.assert_close(together.frames_SC, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


KINDS = {
    "siglip": {"tower": SCRATCH, "crop_pixels": 56},
    "odd grid": {"tower": SCRATCH, "crop_pixels": 70},
    "crop that patches do not fill": {"tower": SCRATCH, "crop_pixels": 60},
    "pool 3": {"tower": SCRATCH, "crop_pixels": 56, "pool": 3},
    "no pool": {"tower": SCRATCH, "crop_pixels": 42, "pool": 1},
    "global view alone": {"tower": SCRATCH, "crop_pixels": 56, "max_crops": 0},
    "convit": {"tower": CONVIT, "crop_pixels": 64},
    "convit, global view alone": {"tower": CONVIT, "crop_pixels": 64, "max_crops": 0},
    "conv net": {
        "tower": TowerConfig(kind="timm", name="test_resnet", pretrained=False, patch_pixels=16),
        "crop_pixels": 64,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_frames_and_neighbours_do_not_matter(kind):
    modality = vision(**KINDS[kind])
    torch.manual_seed(0)
    encoder = modality.build_encoder().train()
    sizes = np.random.default_rng(0).integers(20, 220, (6, 2)).tolist()
    prepared = [modality.prepare(noise(*size, seed=i)) for i, size in enumerate(sizes)]
    assert len({item.num_tokens for item in prepared}) > 1 or modality.config.max_crops == 0
    with torch.no_grad():
        together = encoder(**modality.collate(prepared))
        assert together.frames_SC.shape == (sum(together.lengths), encoder.width)
        assert together.lengths == tuple(item.num_tokens for item in prepared)
        reverse = encoder(**modality.collate(prepared[::-1]))
        for i, frames in enumerate(together.frames_SC.split(together.lengths)):
            alone = encoder(**modality.collate([prepared[i]])).frames_SC
            torch.testing.assert_close(frames, alone, rtol=0, atol=1e-5)
            other = reverse.frames_SC.split(reverse.lengths)[-1 - i]
            torch.testing.assert_close(frames, other, rtol=0, atol=1e-5)


def test_the_global_view_alone_is_the_picture_fitted_into_one_crop():
    modality = small(max_crops=0)
    prepared = modality.prepare(noise(300, 200))
    assert prepared.num_tokens == 2 * 3 and prepared.tensors["crops_BCHW"].shape == (1, 3, 56, 56)
    fitted = np.asarray(noise(300, 200).resize((56, 37), Image.Resampling.BILINEAR))
    assert np.array_equal(prepared.tensors["crops_BCHW"][0, :, :37].permute(1, 2, 0).numpy(), fitted)
    assert (prepared.tensors["crops_BCHW"][0, :, 37:] == 255).all()


def test_no_crop_is_encoded_twice_or_in_vain():
    modality = small()
    encoder, runs = modality.build_encoder(), []
    encoder.tower.register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    encoder(**modality.collate([modality.prepare(noise(*size)) for size in ((56, 56), (112, 112), (56, 30))]))
    assert sum(runs) == 1 + 5 + 2  # the first picture is its own global view, the last is masked and its view is not


def test_every_parameter_gets_a_gradient_and_a_built_encoder_is_reproducible():
    modality = small()
    torch.manual_seed(3)
    encoder = modality.build_encoder()
    torch.manual_seed(3)
    again = modality.build_encoder()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    frames = encoder(**modality.collate([modality.prepare(noise(100, 60))])).frames_SC
    (frames * torch.randn_like(frames)).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in encoder.parameters())


def test_half_precision_stays_in_its_dtype():
    modality = small()
    encoder = modality.build_encoder().to(torch.bfloat16)
    assert encoder(**modality.collate([modality.prepare(noise(100, 60))])).frames_SC.dtype == torch.bfloat16


def test_batch_norm_is_never_trained_on_a_batch():
    modality = vision(**KINDS["conv net"])
    torch.nn.Sequential(encoder := modality.build_encoder()).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    collated = modality.collate([modality.prepare(noise(64, 64)), modality.prepare(noise(90, 40))])
    training = encoder(**collated).frames_SC
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(training, encoder.eval()(**collated).frames_SC)


def test_a_towers_own_colours_are_used():
    modality = vision(
        tower=TowerConfig(kind="timm", name="test_efficientnet", pretrained=False, patch_pixels=16), crop_pixels=64
    )
    encoder = modality.build_encoder().eval()
    seen: list[Tensor] = []
    encoder.tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    image = noise(64, 64)
    encoder(**modality.collate([modality.prepare(image)]))
    pixels = tv.to_dtype(tv.to_image(image), torch.float32, scale=True)
    expected = tv.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
    assert encoder.origin is None


def test_the_saved_config_rebuilds_the_encoder_for_a_saved_state():
    modality = vision(**KINDS["conv net"])
    encoder = modality.build_encoder().eval()
    assert encoder.saved_config(with_weights=False) == modality.config
    again = Vision("vision", encoder.saved_config(with_weights=True)).build_encoder().eval()
    again.load_state_dict(encoder.state_dict())
    collated = modality.collate([modality.prepare(noise(64, 64))])
    assert torch.equal(encoder(**collated).frames_SC, again(**collated).frames_SC)


def test_an_encoder_from_the_hub_knows_its_commit_and_a_saved_one_needs_no_hub(tmp_path, monkeypatch):
    config = SiglipVisionConfig(**SCRATCH.arguments, image_size=56, patch_size=14)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    SiglipVisionModel(config).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    modality = small(tower=TowerConfig(kind="transformers", name="someone/tiny"))
    encoder = modality.build_encoder()
    torch.manual_seed(1)
    assert tensor_hash(modality.build_encoder().state_dict()) == tensor_hash(encoder.state_dict()), "whatever the seed"
    assert encoder.origin == Origin("someone/tiny", commit)
    assert encoder.saved_config(with_weights=False).tower == replace(modality.config.tower, revision=commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    again = Vision("vision", encoder.saved_config(with_weights=True)).build_encoder()
    assert again.origin is None
    again.load_state_dict(encoder.state_dict())


# --- The plugin


def test_it_is_a_modality_and_has_one_projector():
    modality = small()
    assert isinstance(modality, Modality) and modality.part_type == "image"
    assert modality.projectors() == ("default",)
    assert modality.projector(frozenset({"vision"})) == modality.projector(frozenset({"vision", "audio"})) == "default"


def prepare_path(modality: Vision, path: str) -> Any:
    return modality.prepare(modality.load({"type": "image", "path": path}))


def test_it_works_in_a_data_worker(tmp_path):
    modality = pickle.loads(pickle.dumps(small()))
    paths = [str(tmp_path / f"{width}.png") for width in (40, 80, 120, 160)]
    for path in paths:
        noise(int(Path(path).stem), 60).save(path)

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            return prepare_path(modality, paths[index])

    here = modality.collate([prepare_path(modality, path) for path in paths])
    (there,) = DataLoader(Pictures(), batch_size=4, num_workers=1, collate_fn=modality.collate)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    encoder = modality.build_encoder()
    assert encoder(**there).lengths == tuple(prepare_path(modality, path).num_tokens for path in paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 0}, "cannot be pooled by 0"),
        ({"crop_pixels": 20}, "a crop of 20 pixels holds 1 patches of 14 a side, which cannot be pooled by 2"),
        ({"max_crops": -1}, "max_crops is at least 0"),
        ({"max_pixels": 0}, "max_pixels from 1 to 178956970"),
        ({"max_pixels": 178_956_971}, "max_pixels from 1 to 178956970, got 36 and 178956971"),
        ({"tower": CONVIT, "crop_pixels": 60}, "crop_pixels is a multiple of 8 for a convit tower, got 60"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig(**options)


def test_convit_mistakes():
    tower = TowerConfig(kind="convit", pretrained=False, convit=ConvitConfig(width=30, depth=1, heads=4))
    with pytest.raises(ValueError, match="width 30, heads 4, depth 1"):
        vision(tower=tower, crop_pixels=64).build_encoder()


def test_a_recipes_options_make_the_config():
    values = {"crop_pixels": 64, "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 32}}}
    read = build(VisionConfig, values, "options")
    tower = TowerConfig(kind="convit", pretrained=False, convit=ConvitConfig(width=32))
    assert read == VisionConfig(crop_pixels=64, tower=tower)
    assert build(VisionConfig, yaml.safe_load(dump(read)), "options") == read
    with pytest.raises(ConfigError, match="options: tower.convit.widht: no such key; did you mean 'width'"):
        build(VisionConfig, {"tower": {"kind": "convit", "pretrained": False, "convit": {"widht": 32}}}, "options")


# --- Loading: each odd picture with what it must become


RED, WHITE, PINK = (255, 0, 0), (255, 255, 255), (255, 127, 127)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def half_red(mode: str = "RGB") -> Image.Image:
    """20 x 40, its left half red and its right half white."""
    image = Image.new("RGB", (20, 40), "white")
    image.paste("red", (0, 0, 10, 40))
    return image.convert(mode)


def palette_with_hole() -> Image.Image:
    image = half_red().quantize(2)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 40), colour) for colour in ("red", "lime", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bits() -> Image.Image:
    """A ramp over the whole range: clipped to 8 bits it would be white but for its first pixels."""
    return Image.fromarray(np.linspace(0, 65535, 800).reshape(40, 20).astype(np.uint16))


def grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


# name -> (file's bytes, size, pixel of the top left, pixel of the bottom right)
ODD: dict[str, tuple[Callable[[], bytes], tuple[int, int], Any, Any]] = {
    "png": (lambda: saved(half_red(), "PNG"), (20, 40), RED, WHITE),
    "bmp": (lambda: saved(half_red(), "BMP"), (20, 40), RED, WHITE),
    "webp": (lambda: saved(half_red(), "WEBP", lossless=True), (20, 40), RED, WHITE),
    "1 x 1": (lambda: saved(Image.new("RGB", (1, 1), "red"), "PNG"), (1, 1), RED, RED),
    "1 bit": (lambda: saved(half_red("L").convert("1", dither=Image.Dither.NONE), "PNG"), (20, 40), grey(0), WHITE),
    "grey": (lambda: saved(half_red("L"), "PNG"), (20, 40), grey(76), WHITE),
    "grey and alpha": (lambda: saved(Image.new("LA", (20, 40), (0, 127)), "PNG"), (20, 40), grey(128), grey(128)),
    "rgba": (lambda: saved(Image.new("RGBA", (20, 40), (255, 0, 0, 128)), "PNG"), (20, 40), PINK, PINK),
    "cmyk": (lambda: saved(half_red("CMYK"), "TIFF"), (20, 40), RED, WHITE),
    "cmyk jpeg": (lambda: saved(half_red("CMYK"), "JPEG", quality=100), (20, 40), (254, 0, 0), WHITE),
    "palette": (lambda: saved(half_red().quantize(2), "PNG"), (20, 40), RED, WHITE),
    "palette with transparency": (lambda: saved(palette_with_hole(), "PNG"), (20, 40), WHITE, WHITE),
    "colour key": (lambda: saved(half_red(), "PNG", transparency=RED), (20, 40), WHITE, WHITE),
    "16 bits": (lambda: saved(sixteen_bits(), "PNG"), (20, 40), grey(0), WHITE),
    "16 bits tiff": (lambda: saved(sixteen_bits(), "TIFF"), (20, 40), grey(0), WHITE),
    "16 bits ppm": (lambda: b"P5 20 40 65535\n" + b"\x80\x80" * 799 + b"\xff\xff", (20, 40), grey(128), WHITE),
    "float tiff": (lambda: saved(Image.new("F", (20, 40), 0.5), "TIFF"), (20, 40), grey(128), grey(128)),
    "exif upside down": (lambda: saved(half_red(), "PNG", exif=exif(3)), (20, 40), WHITE, RED),
    "exif lying": (lambda: saved(half_red(), "PNG", exif=exif(6)), (40, 20), RED, WHITE),
    "animated": (animation, (20, 40), RED, RED),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_become_upright_rgb(kind, tmp_path):
    data, size, first, last = ODD[kind]
    path = tmp_path / "picture"
    path.write_bytes(data())
    image = small().load({"type": "image", "path": str(path)})
    assert (image.mode, image.size) == ("RGB", size)
    pixels_HWC = np.asarray(image).astype(int)
    assert np.abs(pixels_HWC[0, 0] - first).max() <= 2
    assert np.abs(pixels_HWC[-1, -1] - last).max() <= 2
    assert small().prepare(image).num_tokens > 0


def test_sixteen_bits_are_scaled_and_not_clipped():
    image = small().load({"bytes": saved(sixteen_bits(), "PNG")})
    expected = np.linspace(0, 255, 800).reshape(40, 20)
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 0.51


def header_of_a_bomb() -> bytes:
    """A PNG of 100000 x 100000 pixels, by its header, in 57 bytes."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty, 0 bytes"),
    "truncated jpeg": (lambda: saved(noise(80, 80), "JPEG")[:-300], "damaged or no picture .*truncated"),
    "truncated png": (lambda: saved(noise(80, 80), "PNG")[:-3000], "damaged or no picture"),
    "header alone": (lambda: saved(noise(80, 80), "PNG")[:20], "damaged or no picture"),
    "flipped bytes": (lambda: saved(noise(80, 80), "PNG").replace(b"IDAT", b"IDAT\xff\xff"), "damaged or no picture"),
    "text": (lambda: b"not a picture at all\n" * 50, "damaged or no picture"),
    "sound": (sound, "damaged or no picture"),
    "postscript": (lambda: saved(half_red(), "EPS"), "no picture .none of AVIF, BMP"),  # PIL would run Ghostscript
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "damaged or no picture"),
    "bomb": (header_of_a_bomb, "10000000000 pixels"),
    "over max_pixels": (
        lambda: saved(Image.new("1", (400, 300)), "PNG"), "400 x 300 pixels is more than max_pixels 100000",
    ),
    "long and thin": (lambda: saved(Image.new("RGB", (2000, 2)), "PNG"), "2000 x 2 pixels is too long and thin"),
    "32 bits": (lambda: saved(Image.new("I", (9, 9), 200), "TIFF"), "int32 have no agreed range"),
    "floats out of range": (lambda: saved(Image.new("F", (9, 9), 3.0), "TIFF"), r"these in \[3.0, 3.0\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_one_clear_error(kind, tmp_path):
    data, message = BAD[kind]
    path = tmp_path / "picture"
    path.write_bytes(data())
    modality = small(max_pixels=100_000)
    with pytest.raises(MediaError, match=message) as error:
        modality.load({"type": "image", "path": str(path)})
    assert str(error.value).startswith(f"image part, path {str(path)!r}: ")
    assert str(error.value).count("image part") == 1
    with pytest.raises(MediaError, match=message) as error:
        modality.load({"type": "image", "bytes": data()})
    assert str(error.value).startswith(f"image part, bytes of {len(data())} bytes: ")


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # PIL's own net away, to see ours

    def decoded(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "convert", decoded)
    with pytest.raises(MediaError, match="100000 x 100000 pixels is more than max_pixels 64000000"):
        vision().load({"bytes": header_of_a_bomb()})


def test_paths_that_hold_no_picture(tmp_path):
    for path, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "is a folder")):
        with pytest.raises(MediaError, match=f"image part, path .*: {reason}"):
            small().load({"path": str(path)})
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(MediaError, match=f"has {MAX_FILE_BYTES + 1} bytes, and {MAX_FILE_BYTES} is the most"):
        small().load({"path": tmp_path / "huge.png"})


def test_every_way_to_give_a_picture(tmp_path):
    image = half_red()
    data, pixels = saved(image, "PNG"), np.asarray(image)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    parts: list[dict[str, Any]] = [
        {"path": str(path)}, {"path": path}, {"bytes": data}, {"image": image}, {"image": str(path)}, {"image": data},
        {"base64": text}, {"base64": text[:40] + "\n" + text[40:]}, {"base64": f"data:image/png;base64,{text}"},
        {"url": f"data:image/png;base64,{text}"}, {"image": f"data:image/png;base64,{text}"},
        {"image": image, "path": None}, {"image": image.convert("RGBA")},
        {"array": pixels}, {"image": pixels}, {"array": pixels / 255},
        {"array": (pixels / 255).astype(np.float32)}, {"array": pixels.astype(np.uint16) * 257}, {"array": tensor},
        {"image": tensor}, {"array": tensor / 255}, {"array": (tensor / 255).bfloat16()},
        {"array": np.dstack([pixels, np.full((40, 20), 255, np.uint8)])},
    ]  # fmt: skip
    for part in parts:
        loaded = small().load({"type": "image", **part})
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), pixels), part.keys()
    grey_level = pixels[..., 1]
    for array in (grey_level, grey_level[..., None], torch.from_numpy(grey_level.copy())[None]):
        assert np.array_equal(np.asarray(small().load({"array": array}))[..., 2], grey_level)


ONE_OF = "needs exactly one of path, url, base64, bytes, image, array"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, f"{ONE_OF}; it has .'type'"),
        ({"type": "image", "file": "a.png"}, f"{ONE_OF}; it has .'file', 'type'"),
        ({"path": "a.png", "url": "http://b"}, f"{ONE_OF}; it has .'path', 'url'"),
        ({"base64": "not base64!"}, "base64 of 11 characters: is not base64"),
        ({"base64": ""}, "is empty, 0 bytes"),
        ({"image": 3}, "image int: give a PIL image, an array, bytes, a path or a URL"),
        ({"array": np.zeros((9, 9, 2), np.uint8)}, r"array uint8 of shape \(9, 9, 2\): give H x W"),
        ({"array": np.zeros((0, 9, 3), np.uint8)}, "no empty side"),
        ({"array": torch.zeros(9, 9, 3)}, "channels x H x W in torch"),
        ({"array": np.zeros((9, 9, 3), np.int64)}, "pixels of type int64 have no agreed range"),
        ({"array": np.full((9, 9, 3), 2.0)}, r"lie in \[0, 1\], these in \[2.0, 2.0\]"),
        ({"array": np.full((9, 9, 3), np.nan)}, "these in .nan, nan"),
        ({"array": np.zeros((2, 4000, 3), np.uint8)}, "4000 x 2 pixels is too long and thin"),
    ],
)
def test_parts_that_give_no_picture(part, message):
    with pytest.raises(MediaError, match=message):
        small().load(part)
