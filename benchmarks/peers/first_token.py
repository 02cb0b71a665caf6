"""Time to the first token with a large picture, and memory of a head with a large vocabulary.

Letters: T tokens, K target positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Phi4MultimodalImageProcessor

from benchmarks.peers import work
from benchmarks.peers.generation import Ours, same_answers
from benchmarks.peers.measure import Machine, Result, Row, Setup, in_turns, step_bytes, step_bytes_apart
from benchmarks.peers.models import open_ours, open_theirs
from molora.model.loss import target_losses
from molora.pack import Item, Sample

SIDE_PIXELS, TEXT_TOKENS = 1344, 32
WORDS, NUM_TARGETS, WIDTH = 200_064, 4_096, 768


def compare(setup: Setup) -> list[Result]:
    """From a decoded picture to the first token of the answer, preparation included."""
    ours = Ours(open_ours(setup.folder, setup.dtype, setup.device).model, 1)
    peer = open_theirs(setup.folder, setup.dtype, setup.device).eval().to(setup.dtype)
    peer.set_adapter("vision")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PIXELS, SIDE_PIXELS, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    vocab_size = ours.model.backbone.vocab_size
    text_ids_T = torch.randint(300, vocab_size - 2, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(0))
    vision: Any = ours.model.modalities["vision"]
    image_processor: Any = Phi4MultimodalImageProcessor(dynamic_hd=36)

    def sample() -> Sample:
        item = Item("vision", "default", vision.prepare(vision.load({"type": "image", "image": picture})))
        num_media = item.prepared.num_tokens
        ids_T = torch.cat([torch.zeros(num_media, dtype=torch.long), text_ids_T])
        marks_T = (torch.arange(len(ids_T)) < num_media).long()
        return Sample("picture", ids_T, marks_T, torch.zeros_like(marks_T).bool(), (item,))

    def mine() -> dict[str, list[int]]:
        return ours.answer([sample()])

    @torch.no_grad()
    def theirs() -> dict[str, list[int]]:
        given = dict(image_processor(picture, return_tensors="pt"))
        slots_T = torch.full((int(given.pop("num_img_tokens")[0]),), vocab_size - 1)
        ids_1T = torch.cat([slots_T, text_ids_T])[None]
        inputs = {key: value.to(setup.device) for key, value in (given | {"input_ids": ids_1T}).items()}
        mask_1T = torch.ones_like(inputs["input_ids"])
        rows = peer.generate(**inputs, attention_mask=mask_1T, max_new_tokens=1, do_sample=False)
        return {"picture": rows[0, ids_1T.shape[1] :].tolist()}

    checks = [same_answers("transformers' generate", mine(), theirs(), setup.dtype == torch.float32)]
    machine = Machine(setup.dtype, setup.device)
    sides: dict[str, Callable[[], object]] = {"molora": mine, "transformers": theirs}
    taken = in_turns(work.with_products(sides), setup.rounds, setup.device, machine)
    flop = work.answer_flop(ours.model, [sample()], [1])
    rows = [Row(side, seconds, flop) for side, seconds in taken.items()]
    about = f"a picture of {SIDE_PIXELS} x {SIDE_PIXELS} pixels and {TEXT_TOKENS} tokens of text"
    return [setup.result("time to first token", about, checks, rows, machine)]


def head_memory(setup: Setup, side: str) -> int:
    """By how much memory grows while the losses of 4,096 targets over 200,064 words are taken, forward and backward."""
    head = nn.Linear(WIDTH, WORDS, bias=False).to(setup.dtype).requires_grad_(False)
    hidden_KD = torch.randn(NUM_TARGETS, WIDTH, dtype=setup.dtype, requires_grad=True)
    targets_K = torch.randint(WORDS, (NUM_TARGETS,))
    return step_bytes(lambda: target_losses(head, hidden_KD, targets_K, WORDS).sum().backward(), "cpu")


def head(setup: Setup) -> list[Result]:
    row = Row("molora", [], step_bytes=step_bytes_apart("head", "molora", setup))
    logits = f"{4 * NUM_TARGETS * WORDS / 1e6:,.0f} MB"
    about = f"losses of {NUM_TARGETS:,} targets over {WORDS:,} words, whose logits in fp32 are {logits}"
    return [setup.result("memory of the head", about, [], [row])]
