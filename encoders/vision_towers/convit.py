"""The small tower that learns from scratch: three convolutions, then a few transformer layers.

A plain ViT does not learn shapes from a few thousand pictures; the convolutions give it edges to start from.

Letters: B crops, C width, H and W rows and columns, N frames of a crop.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.vision_towers.tower import ConvitConfig, Tower


class Convit(Tower):
    """Three times convolution, 2x2 max-pooling, GroupNorm and GELU, then pre-norm transformer layers: 8 pixels a frame.
    Pooling comes before the norm, which quarters the cost of both norm and GELU. Frames see their whole crop, padding
    included."""

    def __init__(self, config: ConvitConfig, crop_pixels: int):
        super().__init__()
        if min(vars(config).values()) < 1 or config.width % 4 or config.width % config.heads:
            raise ValueError(
                f"convit: every size is at least 1, and width a multiple of 4 and of heads; got width {config.width}, "
                f"heads {config.heads}, depth {config.depth}"
            )
        self.width, self.grid = config.width, crop_pixels // 8
        stem: list[nn.Module] = []
        for before, after in pairwise((3, self.width // 4, self.width // 2, self.width)):
            stem += [nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(2), nn.GroupNorm(1, after), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        self.table_NC = nn.Parameter(0.02 * torch.randn(self.grid**2, self.width))
        self.blocks = nn.Sequential(*(Block(self.width, config.heads) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        edges_BCHW = self.stem(crops_BCHW.contiguous(memory_format=torch.channels_last))  # the faster layout on a CPU
        frames_BNC = edges_BCHW.flatten(2).transpose(1, 2) + self.table_NC
        return self.norm(self.blocks(frames_BNC)).unflatten(1, (self.grid, self.grid))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, frames_BNC: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(frames_BNC)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        frames_BNC = frames_BNC + self.out(seen.transpose(1, 2).flatten(2))
        return frames_BNC + self.mlp(self.norm2(frames_BNC))
