"""A plugin from outside: the Keyword Transformer KWT-1 (arXiv 2104.00769), pretrained, as a frozen audio encoder.

Letters: N windows of one second, S frames, C width 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.sound import load_sound
from molora.modality import Encoder, Frames, Prepared

WIDTH, BLOCKS, SAMPLES, FRAMES, POOL = 64, 12, 16_000, 98, 7


@dataclass(frozen=True, kw_only=True)
class KeywordConfig:
    """`weights`: a safetensors file; None leaves the weights to be loaded."""

    weights: str | None = None


class KeywordTransformer:
    """Clips, each cut into seconds of 14 tokens."""

    config_type: ClassVar[type] = KeywordConfig
    part_type: ClassVar[str] = "audio"

    def __init__(self, name: str, config: KeywordConfig) -> None:
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> Tensor:
        return load_sound(part)

    def blank(self, item: Tensor) -> Tensor:
        return torch.zeros_like(item)

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        windows_NL = F.pad(item, (0, -len(item) % SAMPLES)).view(-1, SAMPLES)
        return Prepared({"windows_NL": windows_NL}, len(windows_NL) * FRAMES // POOL)

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        windows = [item.tensors["windows_NL"] for item in prepared]
        return {"windows_NL": torch.cat(windows), "counts_I": torch.tensor([len(clip) for clip in windows])}

    def build_encoder(self) -> Encoder:
        encoder = KeywordEncoder(self.config)
        if self.config.weights is not None:
            encoder.load_state_dict(load_file(self.config.weights))
        return encoder

    def projector(self, company: frozenset[str]) -> str:
        return "default"

    def projectors(self) -> tuple[str, ...]:
        return ("default",)

    def examples(self) -> list[dict[str, Any]]:
        hiss = torch.randn(2 * SAMPLES, generator=torch.Generator().manual_seed(0)).numpy() / 10
        return [
            {"type": "audio", "array": hiss[:count], "sampling_rate": 16_000} for count in (4_000, SAMPLES, 2 * SAMPLES)
        ]


class KeywordBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.proj, self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, frames_NSC: Tensor) -> Tensor:
        seen_NSC = F.scaled_dot_product_attention(self.q(frames_NSC), self.k(frames_NSC), self.v(frames_NSC))
        frames_NSC = self.norm1(frames_NSC + self.proj(seen_NSC))
        return self.norm2(frames_NSC + self.fc2(F.gelu(self.fc1(frames_NSC), approximate="tanh")))


class KeywordEncoder(Encoder):
    width = WIDTH

    def __init__(self, config: KeywordConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = nn.ParameterDict(
            {
                "window": torch.empty(480),
                "dft_a": torch.empty(244, 480),
                "dft_b": torch.empty(244, 480),
                "mel": torch.empty(80, 244),
                "dct": torch.empty(40, 80),
            }
        )
        self.embed = nn.Linear(40, WIDTH)
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, FRAMES + 1, WIDTH))
        self.blocks = nn.Sequential(*(KeywordBlock() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 12)
        # The front end is fixed (and has no gradient in digital silence), and no frame comes from the head.
        self.frontend.requires_grad_(False)
        self.head.requires_grad_(False)

    def encode(self, windows_NL: Tensor) -> Tensor:
        """The class token and 98 frames of every window."""
        table = self.frontend
        framed = windows_NL.unfold(1, 480, 160) * table["window"]
        magnitude = ((framed @ table["dft_a"].T).square() + (framed @ table["dft_b"].T).square()).sqrt()
        cepstrum = (magnitude @ table["mel"].T).clamp(min=1e-12).log() @ table["dct"].T
        first = self.cls_token.expand(len(windows_NL), -1, -1)
        return self.blocks(torch.cat([first, self.embed(cepstrum)], dim=1) + self.pos_embed)

    def forward(self, windows_NL: Tensor, counts_I: Tensor) -> Frames:  # type: ignore[override]
        pooled_NSC = self.encode(windows_NL)[:, 1:].unflatten(1, (-1, POOL)).mean(2)
        lengths = tuple(count * FRAMES // POOL for count in counts_I.tolist())
        return Frames(pooled_NSC.flatten(0, 1), lengths)

    def saved_config(self, with_weights: bool) -> KeywordConfig:
        return replace(self.config, weights=None) if with_weights else self.config
