"""Encoded images to uint8 arrays, many at a time.

The result of `decode_rgb` for any picture: the first frame, its 16 bits to 8, transparency on white, resized to a square with
Lanczos without keeping the aspect ratio (as miniImageNet's 84×84 images are customarily made), then turned as its EXIF
tag says.
"""

import collections
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
"""What is read."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MOST_PIXELS = 89_478_485
"""A picture that claims more is refused: Pillow's own bound against decompression bombs."""
_AT_ONCE = 64_000_000  # pixels decoded at one time, in all threads: bounds the memory
_GROUP, _GROUP_BYTES = 32, 1 << 22
_IN_FLIGHT = 1 << 27  # encoded bytes
_SMALL = 1 << 16  # encoded bytes of a small image

Decoder = Callable[[bytes], np.ndarray]


class Encoded(NamedTuple):
    """An image to be decoded."""

    name: str
    """For messages."""
    rows: tuple[int, ...]
    """Where its decoded forms go, in the decoder's order."""
    data: Content


class Decoded(NamedTuple):
    """Some images decoded."""

    items: int
    """Encoded images that these are, undecodable ones included."""
    rows: np.ndarray
    """(m,) int64."""
    images: np.ndarray
    """(m, C, H, W) uint8."""
    problems: tuple[str, ...]
    """What could not be decoded, and why."""


def decode_rgb(data: bytes, side: int) -> np.ndarray:
    """(3, side, side) uint8 of any picture of FORMATS.

    Raises:
        Exception: of many kinds, for a damaged or absurd picture.
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
"""EXIF's orientation -> what undoes it."""


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture as RGB, or RGBA where anything is transparent."""
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image), image.info.get("transparency"))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(values: np.ndarray, transparent: object) -> Image.Image:
    """Grey values (H, W), which Pillow would cut off at 255 instead of scaling; one of them may be transparent."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its grey values need more than 16 bits")
    scaled = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), _STRIP):  # whole numbers of 64 bits, but never of all pixels at once
        strip = slice(first, first + _STRIP)
        scaled[strip] = (values[strip].astype(np.int64) * 255 + 32767) // 65535
    grey = Image.fromarray(scaled)
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray((values != transparent) * np.uint8(255))
    return Image.merge("LA", (grey, alpha)).convert("RGBA")


_STRIP = 64  # rows


class _Budget:
    """Pixels being decoded, in all threads together; one picture is always let in."""

    def __init__(self, most: int) -> None:
        self._free = self._most = most
        self._changed = threading.Condition()

    def __call__(self, pixels: int) -> "_Share":
        return _Share(self, min(pixels, self._most))

    def take(self, pixels: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels

    def give(self, pixels: int) -> None:
        with self._changed:
            self._free += pixels
            self._changed.notify_all()


class _Share:
    def __init__(self, budget: _Budget, pixels: int) -> None:
        self._budget, self._pixels = budget, pixels

    def __enter__(self) -> None:
        self._budget.take(self._pixels)

    def __exit__(self, *_: object) -> None:
        self._budget.give(self._pixels)


_budget = _Budget(_AT_ONCE)


def decode_all(encoded: Iterator[Encoded], decode: Decoder, shape: tuple[int, int, int]) -> Iterator[Decoded]:
    """Decode in several threads (Pillow decodes and resizes without Python's lock), in order.

    As many threads as there are cores for photographs; no more than four for small images, of which Python's part in
    the work is too large a share.

    Args:
        encoded: read as far ahead as a bound on the bytes in flight allows.
        decode: gives (C, H, W), or (forms, C, H, W) for images that go to several rows.
        shape: (C, H, W).
    """
    groups = _groups(encoded)
    head = next(groups, None)
    if head is None:
        return
    Image.init()  # the formats, which threads would load over each other
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
        except Exception as error:  # image readers raise many kinds on damaged files; all mean the same here
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
