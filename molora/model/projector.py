"""The projector: encoder frames to media tokens in the backbone's width.

Letters: S frames, C encoder width, D backbone width.
"""

from torch import Tensor, nn


class Projector(nn.Module):
    """Two linear layers with an exact GELU between them; one token per frame. Source: Phi-4-Multimodal (arXiv
    2503.01743, section 2.2), vision and speech projectors alike."""

    def __init__(self, frame_width: int, backbone_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(frame_width, backbone_width)
        self.activation = nn.GELU()
        self.down = nn.Linear(backbone_width, backbone_width)

    def forward(self, frames_SC: Tensor) -> Tensor:
        return self.down(self.activation(self.up(frames_SC)))
