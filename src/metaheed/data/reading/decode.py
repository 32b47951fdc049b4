"""Decode images to uint8 arrays, many at a time.

`decode_rgb` makes the same kind of image of any picture: it takes the first frame, converts 16 bits to 8, puts
transparent pictures on white, resizes to a square with a Lanczos filter without keeping the aspect ratio (as the 84×84
images of miniImageNet are customarily made), and then turns the image as the EXIF tag says.
"""

import collections
import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaheed.data.reading.trees import Content, Unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""The formats that are read, as Pillow names them."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""The endings of file names that are taken for pictures."""
MOST_PIXELS = 89_478_485
"""A picture that claims more pixels is refused. This is Pillow's own bound against decompression bombs."""
_AT_ONCE = 64_000_000  # pixels that all threads together decode at a time, to bound the memory
_GROUP, _GROUP_BYTES = 32, 1 << 22  # a thread decodes up to so many images, or encoded bytes, as one group
_IN_FLIGHT = 1 << 27  # encoded bytes that may be waiting to be decoded
_SMALL = 1 << 16  # encoded bytes up to which an image counts as small

Decoder = Callable[[bytes], np.ndarray]


class Encoded(NamedTuple):
    """An image to be decoded."""

    name: str
    """Its name in messages."""
    rows: tuple[int, ...]
    """The rows to which its decoded forms go, in the order in which the decoder gives them."""
    data: Content
    """The encoded image, or the reason why it could not be read."""


class Decoded(NamedTuple):
    """A group of decoded images."""

    items: int
    """The number of encoded images in the group, including those that could not be decoded."""
    rows: np.ndarray
    """(m,) int64: the rows to which the images go."""
    images: np.ndarray
    """(m, C, H, W) uint8."""
    problems: tuple[str, ...]
    """A line of text for each image that could not be decoded, with the reason."""


def decode_rgb(data: bytes, side: int) -> np.ndarray:
    """Decode a picture of any of FORMATS to (3, side, side) uint8.

    Raises:
        Exception: many kinds, for a damaged picture or one with too many pixels.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"it claims {image.width}×{image.height} pixels, more than {MOST_PIXELS} in all")
        with _budget(pixels):
            small = _eight_bits(image).resize((side, side), Image.Resampling.LANCZOS)
            if small.mode == "RGBA":
                white = Image.new("RGBA", small.size, "white")
                small = Image.alpha_composite(white, small).convert("RGB")
            orientation = image.getexif().get(0x0112)
    if orientation in _TURNS:
        small = small.transpose(_TURNS[orientation])
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that undoes it."""


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, or to RGBA if any of it is transparent."""
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image), image.info.get("transparency"))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(values: np.ndarray, transparent: object) -> Image.Image:
    """Scale 16-bit grey values (H, W) to 8 bits, which Pillow would cut off at 255; one value may be transparent."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its grey values need more than 16 bits")
    scaled = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), _STRIP):  # in strips, because the int64 values take eight times the memory
        strip = slice(first, first + _STRIP)
        scaled[strip] = (values[strip].astype(np.int64) * 255 + 32767) // 65535
    grey = Image.fromarray(scaled)
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray((values != transparent) * np.uint8(255))
    return Image.merge("LA", (grey, alpha)).convert("RGBA")


_STRIP = 64  # rows of pixels


class _Budget:
    """Bounds the number of pixels that all threads together decode at a time; a single picture is never refused."""

    def __init__(self, most: int) -> None:
        self._free = self._most = most
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = _Budget(_AT_ONCE)


def decode_all(encoded: Iterator[Encoded], decode: Decoder, shape: tuple[int, int, int]) -> Iterator[Decoded]:
    """Decode images in several threads and yield them in order. Pillow decodes and resizes without Python's lock.

    Photographs use as many threads as there are cores (16 at most). Small images use four at most, because Python code,
    which holds the lock, is too large a share of their work.

    Args:
        encoded: the images; they are read ahead up to a bound on their bytes.
        decode: decodes an image to (C, H, W), or to (forms, C, H, W) if it goes to several rows.
        shape: (C, H, W).
    """
    groups = _groups(encoded)
    head = next(groups, None)
    if head is None:
        return
    Image.init()  # load Pillow's formats here, because threads would do so at the same time
    small = head[1] < _SMALL * len(head[0])
    workers = min(4 if small else 16, os.cpu_count() or 1)
    waiting: collections.deque[tuple[int, Future[Decoded]]] = collections.deque()
    in_flight = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for group, size in itertools.chain([head], groups):
            waiting.append((size, pool.submit(_decode_group, group, decode, shape)))
            in_flight += size
            while len(waiting) > 4 * workers or in_flight > _IN_FLIGHT:
                size, future = waiting.popleft()
                in_flight -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(encoded: Iterator[Encoded]) -> Iterator[tuple[list[Encoded], int]]:
    """Collect encoded images into groups, and yield each group with its size in bytes."""
    group: list[Encoded] = []
    size = 0
    for one in encoded:
        group.append(one)
        size += len(one.data)
        if len(group) == _GROUP or size >= _GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _decode_group(group: list[Encoded], decode: Decoder, shape: tuple[int, int, int]) -> Decoded:
    """Decode a group of images; those that cannot be decoded become problems."""
    rows: list[int] = []
    images: list[np.ndarray] = []
    problems = []
    for one in group:
        if isinstance(one.data, Unreadable):
            problems.append(f"{one.name}: {one.data.reason}")
            continue
        try:
            image = decode(one.data).reshape(len(one.rows), *shape)
        except MemoryError:
            raise
        except Exception as error:  # image readers raise many kinds of errors for damaged files
            problems.append(f"{one.name}: {_reason(error)}")
            continue
        rows += one.rows
        images.append(image)
    stacked = np.concatenate(images) if images else np.empty((0, *shape), np.uint8)
    return Decoded(len(group), np.array(rows, np.int64), stacked, tuple(problems))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of the formats {', '.join(FORMATS)}"
    return str(error) or type(error).__name__
