"""Prepared media as a page shows them: pictures, maps, curves and sounds.

What a tensor looks like is told by its shape alone, so that any plugin's items are shown. Letters: B pictures, H and W
pixels, L samples, S frames, M features of a frame.
"""

import io
import wave
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from molora.report.page import Media

# Of a picture cut into many crops, as many are shown; a map of a long clip is drawn narrower.
_MAX_PICTURES = 12
_MAX_PICTURE_PIXELS = 640
_MAX_MAP_COLUMNS = 900
_CURVE_COLUMNS = 600
# A page holds its sounds, and a minute is 2.5 MB of it.
_MAX_PLAYED_SECONDS = 60

# From dark to bright, evenly for the eye: a few points of matplotlib's viridis, between which colours are mixed.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def drawn(name: str, tensor: Tensor) -> list[Media]:
    """A prepared tensor of bytes, (B, 3, H, W) or (3, H, W), as pictures; none for one of another kind or shape."""
    shape = " x ".join(map(str, tensor.shape))
    if tensor.element_size() == 1 and tensor.ndim in (3, 4) and tensor.shape[-3] == 3:
        pixels_BHWC = tensor.reshape(-1, *tensor.shape[-3:]).movedim(1, -1).numpy()
        caption = f"{name}, {shape}" + (f"; the first {_MAX_PICTURES}" if len(pixels_BHWC) > _MAX_PICTURES else "")
        pictures = [_png(Image.fromarray(np.ascontiguousarray(pixels))) for pixels in pixels_BHWC[:_MAX_PICTURES]]
        return [Media(data, "image/png", caption if index == 0 else "") for index, data in enumerate(pictures)]
    return []


def mapped(name: str, tensor: Tensor) -> list[Media]:
    """A prepared tensor (S, M) of floats as a map; none for one of another kind or shape."""
    if not (tensor.is_floating_point() and tensor.ndim == 2 and min(tensor.shape) > 1):
        return []
    caption = f"{name}, {tensor.shape[0]} x {tensor.shape[1]}; the first axis goes to the right"
    return [Media(_png(_map(tensor)), "image/png", caption)]


def decoded(item: Any, rate_hz: int | None) -> list[Media]:
    """A decoded picture, or a waveform (L,) of `rate_hz` to play; nothing for another item."""
    if isinstance(item, Image.Image):
        shown = item.copy()
        shown.thumbnail((_MAX_PICTURE_PIXELS, _MAX_PICTURE_PIXELS))
        return [Media(_png(shown), "image/png", f"decoded, {item.width} x {item.height} pixels")]
    if rate_hz is not None and isinstance(item, Tensor) and item.ndim == 1:
        played = item[: _MAX_PLAYED_SECONDS * rate_hz]
        caption = f"decoded, {len(item) / rate_hz:.2f} s at {rate_hz:,} Hz"
        if len(played) < len(item):
            caption += f"; the first {_MAX_PLAYED_SECONDS} s to play"
        return [Media(_wav(played, rate_hz), "audio/wav", caption)]
    return []


def curve(item: Any) -> str | None:
    """The points of an SVG polygon, 600 wide and 2 high around 0, that a waveform (L,) fills; None for another item."""
    if not (isinstance(item, Tensor) and item.ndim == 1 and item.is_floating_point() and len(item) > 1):
        return None
    columns = np.array_split(item.numpy(), min(_CURVE_COLUMNS, len(item)))
    step = _CURVE_COLUMNS / len(columns)
    above = [f"{index * step:.0f},{-piece.max():.3f}" for index, piece in enumerate(columns)]
    below = [f"{index * step:.0f},{-piece.min():.3f}" for index, piece in enumerate(columns)]
    return " ".join([*above, *reversed(below)])


def _map(values_SM: Tensor) -> Image.Image:
    """Values as colours, from the lowest to the highest, the first feature at the bottom."""
    values_MS = values_SM.float().numpy().T[::-1]
    low, high = float(values_MS.min()), float(values_MS.max())
    shares = (values_MS - low) / (high - low or 1.0)
    steps = np.linspace(0, 1, len(_COLOURS))
    bands = [np.interp(shares, steps, [colour[channel] for colour in _COLOURS]) for channel in range(3)]
    picture = Image.fromarray(np.stack(bands, axis=-1).round().astype(np.uint8))
    if picture.width > _MAX_MAP_COLUMNS:
        picture = picture.resize((_MAX_MAP_COLUMNS, picture.height), Image.Resampling.BOX)
    return picture


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _wav(wave_L: Tensor, rate_hz: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate_hz)
        writer.writeframes((wave_L.clamp(-1, 1) * 32767).round().short().numpy().astype("<i2").tobytes())
    return file.getvalue()
