"""Pictures as people have them: files with more in them than pixels, modes of PIL, arrays and lists."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps

from molora.encoders import pictures
from molora.encoders.pictures import PICTURES, decode_picture
from molora.modality import MediaError
from tests.png import chunk

MAX_PIXELS = 1_000_000


def load(**part: Any) -> np.ndarray:
    key, value = PICTURES.choose(PICTURES.flat(part))
    image = decode_picture(key, value, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours() -> Image.Image:
    """30 x 20, every pixel another colour."""
    rows, columns = np.mgrid[0:20, 0:30]
    return Image.fromarray(np.stack([8 * columns, 12 * rows, 4 * (rows + columns)], axis=2).astype(np.uint8))


PIXELS = np.asarray(colours())
PNG = saved(colours(), "PNG")
JPEG = saved(colours(), "JPEG", quality=95)


def png_with(*chunks: bytes) -> bytes:
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    return (
        JPEG[:2] + b"".join(bytes([0xFF, kind]) + struct.pack(">H", len(d) + 2) + d for kind, d in segments) + JPEG[2:]
    )


def exif(orientation: int, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


LONG = b"a" * 3_000_000


# Each holds PIXELS, or (from a JPEG) very nearly.
WHOLE: dict[str, Callable[[], bytes]] = {
    "png with a long text": lambda: png_with(chunk(b"tEXt", b"prompt\0" + LONG)),
    "png with a long packed text": lambda: png_with(chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG))),
    "png with a long international text": lambda: png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(LONG))),
    "png with a long profile": lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(LONG))),
    "png with a broken profile": lambda: png_with(chunk(b"iCCP", b"a\0\0nothing")),
    "png with many texts": lambda: png_with(*[chunk(b"tEXt", b"a\0" + LONG[:1000])] * 2000),
    "png with a text of a wrong checksum": lambda: png_with(chunk(b"tEXt", b"a\0b")[:-4] + b"????"),
    "png with something after its end": lambda: PNG + b"PK\3\4 a zip that some programs append" * 100,
    "png without its end": lambda: PNG[:-12],
    "jpeg with long texts": lambda: jpeg_with(*[(0xFE, LONG[:60_000])] * 60),
    "jpeg with a profile in parts": lambda: jpeg_with(
        *[(0xE2, b"ICC_PROFILE\0" + bytes([i, 9]) + LONG[:60_000]) for i in range(9)]
    ),
    "jpeg with tags that are none": lambda: jpeg_with((0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "jpeg of a phone that films": lambda: JPEG + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 500,
    "jpegs joined": lambda: JPEG + saved(Image.new("RGB", (9, 9)), "JPEG"),
    "jpegs of one file": lambda: saved(
        colours(), "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))], quality=95
    ),
    "jpeg with padding": lambda: JPEG[:2] + b"\xff" * 50 + JPEG[2:],
    "gif with long comments": lambda: gif_with(b"!\xfe" + (b"\xff" + LONG[:255]) * 20_000 + b"\0"),
    "tiff of two pages": lambda: saved(colours(), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "big tiff": lambda: saved(colours(), "TIFF", big_tiff=True),
    "lzw tiff": lambda: saved(colours(), "TIFF", compression="tiff_lzw"),
    "planar ppm in text": lambda: b"P3 # a comment\n30 20 255 " + " ".join(map(str, PIXELS.flatten())).encode(),
}  # fmt: skip


def gif_with(block: bytes) -> bytes:
    gif = saved(colours().quantize(256), "GIF")
    at = 13 + (3 << ((gif[10] & 7) + 1))
    return gif[:at] + block + gif[at:]


@pytest.mark.parametrize("name", WHOLE)
def test_what_stands_beside_the_pixels_does_not_matter(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nothing is said on the terminal
        loaded = load(bytes=WHOLE[name]())
    assert loaded.shape == PIXELS.shape
    nearly = 0 if name.startswith(("png", "tiff", "big", "lzw", "planar")) else 40 if "gif" in name else 12
    assert np.abs(loaded.astype(int) - PIXELS).max() <= nearly


@pytest.mark.parametrize("orientation", range(9))
def test_orientation_is_read_wherever_it_stands(orientation: int):
    tags = Image.Exif()
    tags[0x0112] = orientation
    plain = colours()
    plain.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(plain))
    in_memory = colours()
    in_memory.getexif()[0x0112] = orientation
    for name, value in {
        "png": saved(colours(), "PNG", exif=tags),
        "png, other order": png_with(chunk(b"eXIf", exif(orientation, ">"))),
        "png, xmp": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation))),
        "jpeg": jpeg_with((0xE1, b"Exif\0\0" + exif(orientation))),
        "jpeg, other order": jpeg_with((0xFE, b"x"), (0xE1, b"Exif\0\0" + exif(orientation, ">"))),
        "jpeg, xmp": jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation))),
        "webp": saved(colours(), "WEBP", lossless=True, exif=tags),
        "tiff": saved(colours(), "TIFF", exif=tags),
        "avif": saved(colours(), "AVIF", exif=tags, quality=100, subsampling="4:4:4"),
        "in memory": in_memory,
    }.items():
        loaded = load(image=value)
        assert loaded.shape == wanted.shape, name
        assert np.abs(loaded.astype(int) - wanted).max() <= (12 if name.startswith(("jpeg", "avif")) else 0), name


def with_alpha(mode: str) -> Image.Image:
    image = colours().convert("RGBA")
    image.putalpha(0)
    return image.convert("LA").convert(mode) if mode in ("LA", "La", "PA") else image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pil_is_taken(mode: str):
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image: Any = ImageCms.profileToProfile(colours(), *profiles, outputMode="LAB")
    else:
        image = colours().convert(mode)
    wanted = np.asarray(colours() if mode == "LAB" else image.convert("RGB")).astype(int)
    assert np.abs(load(image=image) - wanted).mean() <= (2 if mode == "LAB" else 0)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_what_is_transparent_is_white(mode: str):
    assert (load(image=with_alpha(mode)) == 255).all()


def test_sixteen_bits_of_every_order_and_their_hidden_grey():
    ramp = np.linspace(0, 65_535, 600).astype(np.uint16).reshape(20, 30)
    wanted = np.round(ramp / 257).astype(int)
    for image in (
        Image.fromarray(ramp),
        Image.fromarray(ramp.astype(">u2")),
        Image.fromarray((ramp / 65_535).astype(np.float32)),
    ):
        assert np.abs(load(image=image)[..., 0] - wanted).max() <= 1
    loaded = load(bytes=saved(Image.fromarray(ramp), "PNG", transparency=int(ramp[3, 4])))
    assert (loaded[3, 4] == 255).all() and abs(int(loaded[3, 5, 0]) - wanted[3, 5]) <= 1


ARRAYS: dict[str, Callable[[], Any]] = {
    "lists of whole numbers": lambda: PIXELS.tolist(),
    "lists of floats": lambda: (PIXELS / 255).tolist(),
    "tuples": lambda: tuple(map(tuple, PIXELS.tolist())),
    "uint8": lambda: PIXELS,
    "uint16": lambda: PIXELS.astype(np.uint16) * 257,
    "uint16 of the other order": lambda: (PIXELS.astype(np.uint16) * 257).astype(">u2"),
    "float64": lambda: PIXELS / 255,
    "float32 of the other order": lambda: (PIXELS / 255).astype(">f4"),
    "half": lambda: (PIXELS / 255).astype(np.float16),
    "turned in memory": lambda: PIXELS.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "every other": lambda: np.repeat(PIXELS, 2, axis=0)[::2],
    "torch": lambda: torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "torch float": lambda: torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255,
    "torch with a gradient": lambda: (torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255).requires_grad_(),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("key", ["array", "image"])
def test_arrays_of_every_type_are_one_picture(name: str, key: str):
    assert np.array_equal(load(**{key: ARRAYS[name]()}), PIXELS)


def test_a_mask_is_black_and_white_and_a_column_of_a_dataset_is_taken():
    mask = PIXELS[..., 0] > 100
    assert np.array_equal(load(array=mask)[..., 1], np.where(mask, 255, 0))
    for column in ({"bytes": PNG, "path": "it.png"}, {"path": None, "array": PIXELS}, {"image": None, "bytes": PNG}):
        assert np.array_equal(load(image=column), PIXELS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 1], [1, 0]], "lie in 0 to 255, and these in 0 to 1, which may mean anything"),
        ([[0, 256]], "these in 0 to 256"),
        ([[-1, 200]], "these in -1 to 200"),
        ([[0.5, float("nan")]], "these in .nan, nan"),
        ([], "no empty side"),
        ([[]], "no empty side"),
        ([["a"]], "have no agreed range"),
        ([[1, 2], [3]], "damaged or no picture .ValueError"),
        (np.zeros((4, 4), complex), "complex128 have no agreed range"),
        (np.full((4, 4), -1e-3), r"these in \[-0.001"),
        (np.full((4, 4), np.inf), "these in .inf, inf"),
        (torch.zeros(3, 0, 4), "no empty side"),
        (np.zeros((1001, 1000), np.uint8), "1000 x 1001 pixels is more than max_pixels 1000000"),
        (Image.new("L", (1001, 1000)), "1001 x 1000 pixels is more than max_pixels 1000000"),
    ],
)
def test_values_that_may_mean_anything_are_refused(value: Any, message: str):
    with pytest.raises(MediaError, match=message):
        load(image=value)


def test_a_picture_that_is_cut_is_refused_even_where_another_library_made_pil_lenient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for data in (JPEG[:-200], PNG[: len(PNG) * 2 // 3], saved(colours(), "BMP")[:-300]):
        with pytest.raises(MediaError, match="damaged or no picture"):
            load(bytes=data)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_is_no_picture_gives_the_same_message_every_time():
    messages = set()
    for _ in range(3):
        with pytest.raises(MediaError, match="none of AVIF, BMP, GIF") as error:
            load(bytes=b"no picture at all" + bytes(100))
        messages.add(str(error.value))
    assert len(messages) == 1 and "0x" not in messages.pop()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def test_heic_names_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MediaError, match=r"is HEIC .heic., which needs pillow-heif: pip install 'molora\[heif\]'"):
        load(bytes=HEIC)


def test_heic_is_read_upright_and_within_the_limit():
    heif = pytest.importorskip("pillow_heif")
    tags = Image.Exif()
    tags[0x0112] = 6
    for orientation, wanted in ((None, colours()), (tags, colours().transpose(Image.Transpose.ROTATE_270))):
        buffer = io.BytesIO()
        options = {} if orientation is None else {"exif": orientation.tobytes()}
        heif.from_pillow(colours()).save(buffer, quality=100, chroma=444, **options)
        loaded = load(bytes=buffer.getvalue())
        assert loaded.shape == np.asarray(wanted).shape
        assert np.abs(loaded.astype(int) - np.asarray(wanted)).mean() < 4
    heif.from_pillow(Image.new("RGB", (1100, 1000))).save(buffer := io.BytesIO())
    with pytest.raises(MediaError, match="1100 x 1000 pixels is more than max_pixels"):
        load(bytes=buffer.getvalue())
    heif.from_pillow(colours()).save(buffer := io.BytesIO())
    for data in (HEIC, buffer.getvalue()[:-200]):
        with pytest.raises(MediaError, match="damaged HEIC") as error:
            load(bytes=data)
        assert "0x" not in str(error.value)


def test_the_most_that_may_be_allowed_is_what_pil_opens() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and pictures.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_pictures_of_two_threads_leave_pil_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    before = list(warnings.filters)
    began, may_end, threads = [Event(), Event()], [Event(), Event()], list[Thread]()
    for mine, its_end in zip(began, may_end, strict=True):
        image = colours()

        def tags(mine: Event = mine, its_end: Event = its_end) -> Image.Exif:
            mine.set()
            assert its_end.wait(60)
            return Image.Exif()

        monkeypatch.setattr(image, "getexif", tags)
        threads.append(Thread(target=decode_picture, args=("image", image, MAX_PIXELS)))
        threads[-1].start()
        mine.wait(0.5)  # the second waits for the first
    for thread, its_end in zip(threads, may_end, strict=True):
        its_end.set()
        thread.join()
    assert all(event.is_set() for event in began)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and warnings.filters == before


def test_a_picture_beyond_what_pil_opens_is_told_our_limit() -> None:
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 20_000, 20_000, 8, 2, 0, 0, 0))
    with pytest.raises(MediaError, match="has 400000000 pixels, and max_pixels 64000000 is the most"):
        decode_picture("bytes", header + chunk(b"IDAT", b"x") + chunk(b"IEND", b""), 64_000_000)
