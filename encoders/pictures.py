"""Pictures of content parts as upright 8-bit RGB."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor

from molora.encoders.picture_files import FORMATS, check_pixels, open_picture, without_addresses
from molora.media import Sources
from molora.modality import MediaError

MAX_FILE_BYTES = 100 * 2**20
# PIL opens no larger picture.
MAX_PIXELS = 178_956_970

_SOURCES = ("path", "url", "base64", "bytes", "image", "array")
PICTURES = Sources(part_type="image", keys=_SOURCES, max_file_bytes=MAX_FILE_BYTES)

_ROWS_AT_ONCE = 256
_ONE_AT_A_TIME = threading.Lock()


def decode_picture(key: str, value: Any, max_pixels: int) -> Image.Image:
    """The picture that a source of `PICTURES` and its value give, as upright 8-bit RGB on white.

    Arrays are H x W or H x W x channels in numpy, channels x H x W in torch, of 1, 3 or 4 channels: bool, uint8,
    uint16, floats in [0, 1], or lists of such floats or of whole numbers from 0 to 255. A picture is turned by its EXIF
    tag, 16-bit grey is scaled to 8, transparency is put on white, and of an animation, of several pages or of pictures
    joined end to end the first is taken. Colour profiles are ignored, except that LAB pixels are converted.

    Raises: MediaError that says what is wrong and what to do.
    """
    try:
        data = PICTURES.read(key, value) if key not in ("array", "image") else b""
        with _refusing_cut_files():
            if key not in ("array", "image"):
                return _rgb(*open_picture(data, max_pixels))
            image = _from_array(value) if key == "array" else value
            if not isinstance(image, Image.Image):
                raise MediaError("give a PIL image, an array, bytes, a path or a URL")
            check_pixels(image.size, max_pixels)
            return _rgb(ImageOps.exif_transpose(image) if key == "image" else image, image.format)
    except MediaError:
        raise
    except Exception as error:  # PIL's decoders raise anything on damaged data
        is_unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if is_unknown else f"{type(error).__name__}: {error}"
        raise MediaError(
            f"cannot be decoded, it is damaged or no picture ({without_addresses(reason)}); check that it opens in an "
            "image viewer"
        ) from error


@contextmanager
def _refusing_cut_files() -> Iterator[None]:
    """PIL has one switch for the whole process, and with it on it fills what is missing of a picture with grey. What it
    warns of, a picture that is refused says in its error, and one file could make it warn ten thousand times. Both are
    set back as they were, so pictures of several threads are decoded one after the other."""
    with _ONE_AT_A_TIME:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")
                yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _from_array(value: Any) -> Image.Image:
    if isinstance(value, Tensor):
        value = value.detach().cpu().float() if value.is_floating_point() else value.cpu()  # numpy has no bfloat16
        value = value.movedim(0, -1) if value.ndim == 3 else value
    pixels = np.asarray(value)
    if isinstance(value, (list, tuple)) and pixels.dtype.kind == "i" and pixels.size:
        low, high = int(pixels.min()), int(pixels.max())
        if not (low >= 0 and high <= 255) or high == 1:
            raise MediaError(
                f"whole numbers of a list lie in 0 to 255, and these in {low} to {high}, which may mean anything; give "
                "an array of uint8 or uint16, or floats in [0, 1]"
            )
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise MediaError(
            "give H x W or H x W x channels in numpy, channels x H x W in torch; 1, 3 or 4 channels, no empty side"
        )
    pixels = _eight_bits(pixels)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Any PIL image as 8-bit RGB on white; of an animation, the frame it stands at."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if image.mode == "I" and file_format in ("PNG", "PPM"):  # 16 bits in the file, 32 in PIL
            pixels = pixels.astype(np.uint16)
        eight = _eight_bits(pixels)
        if isinstance(hidden := image.info.get("transparency"), int):
            eight[pixels == hidden] = 255
        image = Image.fromarray(eight)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")  # pyright: ignore[reportReturnType]
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8, over the whole range of their kind; some rows at a time, since floats take much memory."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        scale = 1 / 257.0
    elif pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise MediaError(f"floating-point pixels lie in [0, 1], these in [{low}, {high}]; rescale them")
        scale = 255.0
    else:
        raise MediaError(f"pixels of type {pixels.dtype} have no agreed range; give uint8, uint16, or floats in [0, 1]")
    eight = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = slice(row, row + _ROWS_AT_ONCE)
        eight[rows] = np.round(pixels[rows] * scale)
    return eight
