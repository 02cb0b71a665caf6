"""Files of pictures, opened by PIL within bounds.

PIL decodes, and files are a stranger's. What a picture does not need is taken out before PIL sees it (texts, colour
profiles, tags), since PIL reads them in ways that a small file can make long or large: then no limit of PIL's needs to
be raised for the sake of honest files either. Sizes are looked at before pixels are decoded.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

from PIL import Image
from PIL.Image import Transpose

from molora.modality import MediaError

# Formats that PIL decodes by itself. Its others start programs (EPS), fetch files, or are no pictures people send.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Of memory for each of `max_pixels`: PIL's own pixels, twice, and six bytes for the decoder.
_BYTES_PER_PIXEL = 14
# Chunks, segments and blocks of a file, and reads of it by PIL. Honest files have thousands at most.
_MAX_PIECES = 2**17
_MAX_READS = 2**20
# Passes of a JPEG over its pixels, in pixels; a pass costs time and hardly any bytes. Programs write a dozen.
_MAX_SCANNED = 2**31

_PNG = b"\x89PNG\r\n\x1a\n"
# Text and profiles, which may be long when unpacked; orientation is read from eXIf here.
_PNG_DROPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
_XMP_OF_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")

# By EXIF's orientation.
_UPRIGHT = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}


def open_picture(data: bytes, max_pixels: int) -> tuple[Image.Image, str | None]:
    """The picture of a file, upright and decoded, and the file's format. Raises: MediaError, and whatever PIL does."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[8:64]:
        return _open_heif(data, max_pixels), None
    slim, exif, xmp, scans = data, b"", b"", 1
    if data.startswith(_PNG):
        slim, exif, xmp = _slim_png(data)
    elif data.startswith(b"\xff\xd8"):
        slim, exif, xmp, scans = _slim_jpeg(data)
    elif data.startswith(b"GIF8"):
        slim = _slim_gif(data)
    elif data.startswith(b"\0\0\1\0"):
        _check_icon(data, max_pixels)
    elif data[4:8] == b"ftyp":  # AVIF, by whichever brand
        _check_tags(data)
    Image.init()
    try:  # this reads the header alone: pixels are decoded once the size has been seen
        image = Image.open(_LimitedFile(slim), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        pixels = (re.search("[0-9]+", str(error)) or ["far too many"])[0]
        raise MediaError(f"has {pixels} pixels, and max_pixels {max_pixels} is the most; make it smaller") from error
    check_pixels(image.size, max_pixels)
    _check_work(image, scans, max_pixels)
    image.load()
    if image.format not in ("PNG", "JPEG", "TIFF"):  # TIFF is turned by PIL
        exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    return _turned(image, exif, xmp), image.format


class _LimitedFile(io.BytesIO):
    """A file that is read so often, and so much of it, and no more: tags may name the same bytes ten thousand times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.bytes_left, self.reads_left = 4 * len(data) + 2**20, _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.bytes_left -= len(data)
        self.reads_left -= 1
        if self.bytes_left < 0 or self.reads_left < 0:
            raise MediaError(
                f"makes its reader read over {_MAX_READS} times, or over four times its size; save it again with "
                "another program"
            )
        return data


def _too_many(what: str) -> MediaError:
    return MediaError(f"has more than {_MAX_PIECES} {what}; save it again with another program")


def _slim_png(data: bytes) -> tuple[bytes, bytes, bytes]:
    """A PNG without texts, profile and tags, with its EXIF and XMP beside it."""
    kept, exif, xmp, at = [data[:8]], b"", b"", 8
    for _ in range(_MAX_PIECES):
        if at + 8 > len(data):
            return b"".join(kept), exif, xmp
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        content = slice(at + 8, at + 8 + length)
        if kind not in _PNG_DROPPED:
            kept.append(data[at : at + 12 + length])
        elif kind == b"eXIf":
            exif = data[content]
        elif kind == b"iTXt" and data[content].startswith(b"XML:com.adobe.xmp\0\0"):  # not packed
            xmp = data[content]
        at += 12 + length
    raise _too_many("chunks")


def _slim_jpeg(data: bytes) -> tuple[bytes, bytes, bytes, int]:
    """A JPEG without texts, profiles, tags and other pictures, up to its end marker, with its EXIF, its XMP and the
    number of its scans beside it."""
    kept, exif, xmp, at, scans = [data[:2]], b"", b"", 2, 0
    for _ in range(_MAX_PIECES):
        if data[at : at + 2] == b"\xff\xff":  # padding
            at += 1
            continue
        marker = data[at + 1] if at + 4 <= len(data) and data[at] == 0xFF else 0
        if marker < 0xC0 or marker == 0xD9:  # no marker, or the end: what is there is PIL's to judge
            kept.append(data[at : at + 2] if marker == 0xD9 else data[at:])
            return b"".join(kept), exif, xmp, scans
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : end]
        if marker == 0xDA:
            scans += 1
            found = _NEXT_MARKER.search(data, end)
            end = found.start() if found else len(data)
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        elif marker == 0xE1 and content.startswith(_XMP_OF_JPEG):
            xmp = content
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    raise _too_many("segments")


# In what a scan holds, a byte 0xFF is followed by 0, and restart markers are part of it.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _slim_gif(data: bytes) -> bytes:
    """A GIF without comments and other blocks before its first picture."""
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    kept = [data[:at]]
    for _ in range(_MAX_PIECES):
        if data[at : at + 1] != b"!":
            return b"".join([*kept, data[at:]])
        end = at + 2
        for _ in range(_MAX_PIECES):
            size = data[end] if end < len(data) else 0
            end += 1 + size
            if not size:
                break
        else:
            raise _too_many("blocks of a comment")
        if data[at + 1 : at + 2] == b"\xf9":
            kept.append(data[at:end])
        at = end
    raise _too_many("blocks")


def _check_tags(data: bytes) -> None:
    """Refuses EXIF whose tags name so many bytes that they must name the same ones again and again; PIL copies each."""
    pieces = 0
    for found in re.finditer(rb"II\*\0|MM\0\*", data):
        order: Any = "little" if found[0] == b"II*\0" else "big"
        counts = [count for _, count, _ in _entries(data, order, found.start())]
        named = sum(counts) * 8
        if named > 16 * len(data):
            raise MediaError(f"has {len(counts)} tags of {named} bytes in a file of {len(data)}; save it again")
        pieces += 1 + len(counts)
        if pieces > _MAX_PIECES:
            raise _too_many("tags")


def _entries(tags: bytes, order: Any, begin: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """The entries of the first directory of EXIF, which begins at `begin`: tag, number of values, and the values if
    they are few."""
    start = begin + int.from_bytes(tags[begin + 4 : begin + 8], order)
    for at in range(start + 2, start + 2 + 12 * int.from_bytes(tags[start : start + 2], order), 12):
        if len(entry := tags[at : at + 12]) == 12:
            yield int.from_bytes(entry[:2], order), int.from_bytes(entry[4:8], order), entry[8:]


def _turned(image: Image.Image, exif: bytes, xmp: Any) -> Image.Image:
    """A picture upright, as its tags say; PIL's own way reads all of them."""
    exif = exif.removeprefix(b"Exif\0\0")
    order: Any = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    entries = _entries(exif, order) if order else ()
    named = [int.from_bytes(value[:2], order) for tag, _, value in entries if tag == 0x0112]
    if not named and (found := _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)):
        named = [int(found[1])]
    return image.transpose(_UPRIGHT[named[0]]) if named and named[0] in _UPRIGHT else image


def _open_heif(data: bytes, max_pixels: int) -> Image.Image:
    """The main picture of an HEIC file, which its reader turns upright."""
    try:
        import pillow_heif
    except ImportError as error:
        raise MediaError(
            f"is HEIC ({data[8:12].decode()}), which needs pillow-heif: pip install 'molora[heif]', or save it as JPEG"
        ) from error
    try:
        file = pillow_heif.open_heif(data)
        check_pixels(file.size, max_pixels)
        return file.to_pillow()
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(
            f"cannot be decoded, it is damaged HEIC ({without_addresses(str(error))}); save it as JPEG"
        ) from error


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise MediaError(
            f"{width} x {height} pixels is more than max_pixels {max_pixels}; make it smaller, or raise the limit if "
            "you trust it"
        )


def _check_work(image: Any, scans: int, max_pixels: int) -> None:
    """Refuses a picture whose decoder needs more time or memory than pixels within the limit do."""
    pixels, most = image.width * image.height, _BYTES_PER_PIXEL * max_pixels
    if scans * pixels > _MAX_SCANNED:
        raise MediaError(
            f"has {scans} scans over {pixels} pixels, {scans * pixels} in all, and {_MAX_SCANNED} is the most; save it "
            "as a plain JPEG"
        )
    decoder = 4 * pixels
    if image.format == "TIFF":  # a tile or strip at once, with all its depth
        tags = image.tag_v2
        depths, rows = tags.get(258, (1,)), min(tags.get(278, image.height), image.height)
        bits = max(sum(depths), depths[0] * tags.get(277, 1))
        decoder = max(tags.get(322, 0) * tags.get(323, 0), image.width * rows) * bits // 8
    elif image.format == "JPEG2000":  # 32 bits for a value of any depth
        decoder = 4 * len(image.getbands()) * pixels
    elif image.format == "WEBP":  # two canvases beside the frame
        decoder = 12 * pixels
    if 8 * pixels + decoder > most:
        raise MediaError(
            f"needs {8 * pixels + decoder} bytes to be decoded, and {most} is the most ({_BYTES_PER_PIXEL} x "
            "max_pixels); make it smaller, or save it as PNG"
        )


def _check_icon(data: bytes, max_pixels: int) -> None:
    """The pictures inside an icon may have other sizes than its directory says, and PIL decodes one as it opens."""
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        offset = int.from_bytes(data[entry + 12 : entry + 16], "little")
        check_pixels(_size_inside(data[offset : offset + 24]), max_pixels)


def _size_inside(head: bytes) -> tuple[int, int]:
    """The size of a picture inside an icon, by its first bytes."""
    if head.startswith(_PNG):
        return struct.unpack(">II", head[16:24]) if len(head) == 24 else (0, 0)
    if len(head) < 12:
        return (0, 0)
    if head[:4] == b"\x0c\0\0\0":
        return struct.unpack("<HH", head[4:8])
    width, height = struct.unpack("<ii", head[4:12])
    return abs(width), abs(height) // 2


def without_addresses(text: str) -> str:
    """Text without where objects lie in memory, which differs from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
