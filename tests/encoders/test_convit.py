"""The tower that learns from scratch: its shape, and that it learns shapes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from molora.encoders.vision_towers.convit import Convit
from molora.encoders.vision_towers.tower import ConvitConfig


def test_crops_become_grids_and_do_not_see_each_other():
    torch.manual_seed(0)
    tower = Convit(ConvitConfig(width=24, depth=2, heads=3), 40).train()
    crops = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        frames = tower(crops)
        assert frames.shape == (3, 5, 5, 24) and (tower.width, tower.grid) == (24, 5)
        for i in range(3):
            torch.testing.assert_close(tower(crops[i : i + 1]), frames[i : i + 1], rtol=0, atol=1e-5)
        crops[0, :, -8:, -8:] += 3
        moved = (tower(crops) - frames).abs()
    assert moved[0, 0, 0].max() > 1e-3 and moved[1:].max() < 1e-5


def test_frames_know_where_they_are():
    tower = Convit(ConvitConfig(width=24, depth=1, heads=3), 64)
    frames = tower(torch.zeros(1, 3, 64, 64)).flatten(1, 2)[0]
    inner = frames.view(8, 8, 24)[2:6, 2:6].flatten(0, 1)  # away from what the convolutions see of the border
    assert torch.pdist(inner).min() > 1e-3


@pytest.mark.parametrize(("width", "depth", "heads"), [(30, 1, 4), (32, 0, 4), (36, 1, 8)])
def test_sizes_that_do_not_fit(width, depth, heads):
    with pytest.raises(ValueError, match=f"got width {width}, heads {heads}, depth {depth}"):
        Convit(ConvitConfig(width=width, depth=depth, heads=heads), 64)


def drawing(shape: int, generator: torch.Generator) -> Image.Image:
    """A circle, rectangle or triangle of any colour, place and size."""
    colour = tuple(torch.randint(0, 200, (3,), generator=generator).tolist())
    x, y, size = (torch.rand(3, generator=generator) * torch.tensor([30, 30, 14]) + torch.tensor([2, 2, 16])).tolist()
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if shape == 0:
        draw.ellipse((x, y, x + size, y + size), fill=colour)
    elif shape == 1:
        draw.rectangle((x, y, x + size, y + size), fill=colour)
    else:
        draw.polygon([(x, y + size), (x + size / 2, y), (x + size, y + size)], fill=colour)
    return image


def test_it_learns_shapes_from_few_pictures():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (700,), generator=generator)
    pictures = torch.stack([tv.to_image(drawing(int(label), generator)) for label in labels]) / 127.5 - 1
    tower = Convit(ConvitConfig(width=32, depth=2, heads=4), 64)
    head = torch.nn.Linear(32, 3)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(100):
        ids = torch.randint(0, 600, (32,), generator=generator)
        loss = F.cross_entropy(head(tower(pictures[ids]).mean((1, 2))), labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        answers = head(tower(pictures[600:]).mean((1, 2))).argmax(1)
    accuracy = (answers == labels[600:]).float().mean()
    assert accuracy > 0.7, f"{accuracy:.2f} of unseen shapes named right, chance is 0.33"
