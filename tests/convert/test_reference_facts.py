"""What the released Phi-4-multimodal does with prompts, positions, pictures and clips, in figures, and ours beside it.

The figures of the log-mel features are in test_logmel.py, the token counts of pictures in test_vision.py, position ids
of patches in test_siglip.py; encoders with weights are compared in the tests of their files.

Source: config.json, processing_phi4mm.py and the model card of microsoft/Phi-4-multimodal-instruct; the figures were
measured with its processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import Phi4MultimodalImageProcessor

from molora.data.processor import Processor
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.audio_towers.conformer import num_encoded
from molora.encoders.logmel import num_frames
from molora.encoders.vision import Vision, VisionConfig, lay_out
from molora.model.rotary import SampleRotary, wrap_rotary
from molora.pack import Sample
from molora.routers.table import TableConfig, TableRouter
from molora.routing import Flow, flowing
from tests.convert.reference_tokenizer import SPECIAL_TOKENS, save_reference_tokenizer

# LongRoPE: 96 of a head's 128 channels turn, in pairs (i, i + 48)

LONG_FACTOR = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
ATTENTION_FACTOR = 1.1902380714
SWITCH = 4096


@pytest.fixture(scope="module")
def rotary() -> SampleRotary:
    """The stock module under our wrapper, from the language model's settings as its config.json writes them."""
    written = {
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": SWITCH,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": LONG_FACTOR},
    }
    config = Phi3Config.from_dict(written)
    (wrapper,) = wrap_rotary(nn.ModuleDict({"rotary_emb": Phi3RotaryEmbedding(config)}))
    return wrapper


def turned(rotary: SampleRotary, *spans: tuple[int, int]) -> list[Tensor]:
    """What pairs of channels turn by, as complex numbers (positions, pairs), for each span of positions in a pack."""
    lengths = [stop - start for start, stop in spans]
    positions_1T = torch.cat([torch.arange(start, stop) for start, stop in spans])[None]
    with flowing(Flow(tuple(lengths), ends=tuple(stop for _, stop in spans))):
        cos_1TR, sin_1TR = rotary(torch.zeros(1), positions_1T)
    turns_TR = torch.complex(cos_1TR[0], sin_1TR[0])
    assert turns_TR.shape[1] == 96 and torch.equal(turns_TR[:, :48], turns_TR[:, 48:])
    return list(turns_TR[:, :48].split(lengths))


def inverse_frequencies(factors: list[float]) -> Tensor:
    return 1 / (torch.tensor(factors, dtype=torch.float64) * 10_000 ** (torch.arange(48, dtype=torch.float64) / 48))


def test_the_listed_inverse_frequencies_and_the_attention_factor(rotary: SampleRotary) -> None:
    assert rotary.attention_scaling == pytest.approx(ATTENTION_FACTOR, abs=1e-10)
    for turns_TR, factors, first, last in zip(
        turned(rotary, (0, SWITCH), (0, SWITCH + 1)),
        ([1.0] * 48, LONG_FACTOR),
        ([1, 0.825404, 0.681292], [1, 0.738075, 0.544754]),
        (1.2115e-4, 2.5362e-6),
        strict=True,
    ):
        by_one_position = turns_TR[1].angle()
        assert by_one_position[:3].tolist() == pytest.approx(first, abs=1e-6)
        assert float(by_one_position[-1]) == pytest.approx(last, rel=1e-4)
        assert by_one_position.tolist() == pytest.approx(inverse_frequencies(factors).tolist(), rel=1e-5)
        assert float((turns_TR.abs() - ATTENTION_FACTOR).abs().max()) < 1e-6


def test_a_sample_of_4096_tokens_turns_by_the_short_list_and_one_of_4097_by_the_long_one(rotary: SampleRotary) -> None:
    """Whatever else is in the pack, prompts and single steps of decoding alike; all of a sample turns by one list."""
    assert rotary.regime(SWITCH) != rotary.regime(SWITCH + 1)
    short, long = inverse_frequencies([1.0] * 48), inverse_frequencies(LONG_FACTOR)
    spans = {(0, 9): short, (0, 4097): long, (0, 4096): short, (4096, 4097): long, (4095, 4096): short, (0, 5000): long}
    for (start, stop), turns_TR in zip(spans, turned(rotary, *spans), strict=True):
        angles_TR = torch.arange(start, stop, dtype=torch.float64)[:, None] * spans[start, stop]
        expected_TR = torch.polar(torch.full_like(angles_TR, ATTENTION_FACTOR), angles_TR)
        # The reference computes in fp32 as well: 5,000 radians are known to 2.4e-4.
        assert float((turns_TR - expected_TR).abs().max()) < 1e-3, (start, stop)


# Prompts: <|role|>content<|end|> back to back

ENDOFTEXT, ASSISTANT, END, USER, SYSTEM = 199_999, 200_019, 200_020, 200_021, 200_022
PICTURE = {"type": "image", "image": Image.new("RGB", (448, 448))}
CLIP = {"type": "audio", "array": np.zeros(16_000, dtype=np.float32), "sampling_rate": 16_000}
PICTURE_TOKENS, CLIP_TOKENS = 545, 13


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """The reference's tokens and template, its sizes of pictures and clips, its rule for both together."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_reference_tokenizer(folder)
    modalities = {
        "audio": Audio("audio", AudioConfig(beside={"vision": "vision"})),
        "vision": Vision("vision", VisionConfig()),
    }
    router = TableRouter(list(modalities), TableConfig(rules={"audio+vision": "vision"}))
    return Processor(AutoTokenizer.from_pretrained(folder), modalities, router.order, max_tokens=131_072)


def ids(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def positions(processor: Processor, sample: Sample) -> list[Any]:
    """The token id at every position of text, and the modality's name at every reserved one."""
    names = list(processor.modalities)
    pairs = zip(sample.token_ids_T.tolist(), sample.modality_ids_T.tolist(), strict=True)
    return [names[modality - 1] if modality else token for token, modality in pairs]


def learned(sample: Sample) -> list[int]:
    return sample.token_ids_T[sample.targets_T].tolist()


def test_the_special_tokens_have_the_references_ids(processor: Processor) -> None:
    for token, (id, absorbs) in SPECIAL_TOKENS.items():
        assert processor.tokenizer.convert_tokens_to_ids(token) == id
        assert processor.tokenizer.added_tokens_decoder[id].rstrip == absorbs
    assert processor.tokenizer.eos_token_id == processor.tokenizer.pad_token_id == ENDOFTEXT


SHAPES = {
    "text": (["What is it?"], [], ""),
    "a picture": ([PICTURE, "What is it?"], ["default"], "vision"),
    "two pictures": ([PICTURE, PICTURE, "Which?"], ["default", "default"], "vision"),
    "speech": ([CLIP, "Transcribe the audio clip into text."], ["default"], "audio"),
    "a spoken question": ([CLIP], ["default"], "audio"),
    "a spoken question about a picture": ([PICTURE, CLIP], ["default", "vision"], "vision"),
    "media between words": (["see ", PICTURE, "\nand hear", CLIP], ["default", "vision"], "vision"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_reserves_the_references_positions_in_its_shape(shape: str, processor: Processor) -> None:
    content, projectors, adapter = SHAPES[shape]
    expected: list[Any] = [USER]
    for part in content:
        if isinstance(part, str):
            expected += ids(processor, part)
        else:
            expected += ["vision"] * PICTURE_TOKENS if part is PICTURE else ["audio"] * CLIP_TOKENS
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    user = {"role": "user", "content": parts}
    asked = processor.encode([user], shape, generate=True)
    assert positions(processor, asked) == [*expected, END, ASSISTANT]
    assert [item.projector for item in asked.items] == projectors and processor.order(asked.modalities) == adapter
    assert not asked.targets_T.any()

    answer = ids(processor, "A red triangle.")
    shown = processor.encode([user, {"role": "assistant", "content": "A red triangle."}], shape)
    assert positions(processor, shown) == [*expected, END, ASSISTANT, *answer, END, ENDOFTEXT]
    assert learned(shown) == [*answer, END, ENDOFTEXT]


def test_roles_stand_back_to_back_and_the_text_is_closed_once(processor: Processor) -> None:
    turns = [("system", "Be brief."), ("user", "hello"), ("assistant", "Hi"), ("user", "and?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    sample = processor.encode(messages, "talk")
    opening = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    expected = [token for role, content in turns for token in (opening[role], *ids(processor, content), END)]
    assert sample.token_ids_T.tolist() == [*expected, ENDOFTEXT]
    assert learned(sample) == [*ids(processor, "Hi"), END, *ids(processor, "no"), END, ENDOFTEXT]
    asked = processor.encode(messages[:-1], "talk", generate=True)
    assert asked.token_ids_T.tolist() == [*expected[: -len(ids(processor, "no")) - 1]]


def test_roles_absorb_whitespace_but_media_do_not(processor: Processor) -> None:
    """`<|user|>` and the like are rstrip tokens; a picture or clip between them and the text keeps its line break."""
    spaced = [{"role": "user", "content": " \n What?\n"}, {"role": "assistant", "content": "\n\n yes "}]
    assert processor.encode(spaced, "spaced").token_ids_T.tolist() == [
        *(USER, *ids(processor, "What?\n"), END),
        *(ASSISTANT, *ids(processor, "yes "), END, ENDOFTEXT),
    ]
    content = [CLIP, {"type": "text", "text": "\nTranslate the audio to Slovenian."}]
    heard = processor.encode([{"role": "user", "content": content}], "heard", generate=True)
    text = ids(processor, "\nTranslate the audio to Slovenian.")
    assert positions(processor, heard) == [USER, *["audio"] * CLIP_TOKENS, *text, END, ASSISTANT]


@pytest.mark.parametrize("spelled", [*SPECIAL_TOKENS, "<|image_1|>", "<|audio_1|>"])
def test_text_that_spells_a_token_or_a_slot_stays_text(spelled: str, processor: Processor) -> None:
    """In the reference it would open a turn or ask for a medium that is not there."""
    said, answered = f"write {spelled} please", f"so: {spelled}"
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    sample = processor.encode(messages, "spelled")
    ours = [token for token in sample.token_ids_T.tolist() if token >= ENDOFTEXT]
    assert ours == [USER, END, ASSISTANT, END, ENDOFTEXT]
    assert not sample.modality_ids_T.any() and not sample.items
    text = f"<|user|>{said}<|end|><|assistant|>{answered}<|end|><|endoftext|>"
    assert processor.tokenizer.decode(sample.token_ids_T) == text


# Pictures: the grid of crops of 448 pixels, 32 patches a side

SIZES = [
    (448, 448), (449, 448), (640, 480), (500, 900), (900, 500), (1344, 1344), (1920, 1080), (2688, 2688), (2689, 2688),
    (3000, 3000), (4000, 700), (700, 4000), (5000, 300), (300, 5000), (28, 448), (448, 28), (100, 50), (7, 7), (600, 9),
]  # fmt: skip


@pytest.mark.parametrize("limit", [16, 36])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_crop_grids_and_patch_masks_of_the_released_size(width: int, height: int, limit: int) -> None:
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    theirs, mask = Phi4MultimodalImageProcessor().dynamic_preprocess(picture, 448, 14, 32, max_num=limit)
    layout = lay_out(width, height, VisionConfig(max_crops=limit))
    assert (448 * layout.rows, 448 * layout.columns) == theirs.shape[1:]
    assert (32 * layout.rows, 32 * layout.columns) == mask.shape
    assert (layout.valid_rows, layout.valid_columns) == (int(mask[:, 0].sum()), int(mask[0].sum()))
    assert layout.rows * layout.columns <= limit


# Clips: a frame every 10 ms, a token every 80 ms

CLIPS = [
    (399, 0, 0), (400, 1, 1), (559, 1, 1), (560, 2, 1), (16_000, 98, 13), (480_000, 2998, 375), (640_000, 3998, 500),
    (960_000, 5998, 750),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "frames", "tokens"), CLIPS)
def test_the_references_frames_and_tokens_of_clips(samples: int, frames: int, tokens: int) -> None:
    assert num_frames(samples) == frames and num_encoded(frames) == tokens
    if frames:
        prepared = Audio("audio", AudioConfig()).prepare(torch.zeros(samples))
        assert prepared.num_tokens == tokens and len(prepared.tensors["features_SM"]) == frames
