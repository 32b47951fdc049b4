"""Glyphs: the embedded data set, drawn from the DejaVu fonts that come with matplotlib.

A class is a character; its 20 instances go through the faces that have it, each under its own small affine and elastic
distortion. Scripts are disjoint between the splits: train is Latin, Greek, Cyrillic, Coptic and the mathematical forms
of Latin letters; val Georgian, Armenian, Hebrew and Lao; test Canadian syllabics. Many characters look the same in
several scripts or in both cases, so the committed lists (made by tools/glyph_classes.py) hold only characters that
differ clearly from each other in every face.

The distortion is integer arithmetic throughout, so its bits are the same on every processor.
"""

import hashlib
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from metaheed.data.cache import cache_folder
from metaheed.data.images import SPLITS
from metaheed.data.locate import class_list
from metaheed.data.sources import UNSCALED, Source, SourceSplit, array_stream, stamp
from metaheed.files.opening import put_in_place

FACES = tuple(
    f"DejaVu{family}"
    for family in (
        *("Sans", "Serif", "SansMono", "Sans-Bold", "Serif-Bold", "SansMono-Bold"),
        *("Sans-Oblique", "Serif-Italic", "SansMono-Oblique"),
        *("Sans-BoldOblique", "Serif-BoldItalic", "SansMono-BoldOblique"),
    )
)
INSTANCES = 20
SIDE = 28
MASTER = 48
"""Side of an undistorted glyph's bitmap; the glyph fills GLYPH pixels of it."""
GLYPH = 34
_VERSION = 1  # of the arithmetic below; part of the cache's name
_ONE = 1 << 12  # fixed-point 1
_GRID = 4  # nodes a side of the elastic displacement


def find() -> Source:
    """The data set, from the cache where it has been built before.

    Built in seconds. The cache is $METAHEED_CACHE, else $XDG_CACHE_HOME/metaheed, else ~/.cache/metaheed; where that
    cannot be written the data set is built anew each time.
    """
    classes = {split: tuple(class_list(f"glyphs_{split}")) for split in SPLITS}
    names = [name for split in SPLITS for name in classes[split]]

    @cache
    def images() -> np.ndarray:
        path = cache_folder() / f"glyphs-{_cache_key(names)}.npy"
        found = _read_cache(path, (len(names), INSTANCES, 1, SIDE, SIDE))
        if found is None:
            print(
                "glyphs: drawing the characters, which takes some seconds the first time", file=sys.stderr, flush=True
            )
            found = build(names)
            _write_cache(path, found)
        return found.reshape(-1, 1, SIDE, SIDE)

    def chunks(first: int, behind: int, start: int) -> Iterator[np.ndarray]:
        yield images()[first + start : behind]

    splits, first = {}, 0
    for split, chosen in classes.items():
        count = len(chosen) * INSTANCES
        stream = array_stream(np.arange(count), partial(chunks, first, first + count))
        splits[split] = SourceSplit(chosen, (INSTANCES,) * len(chosen), (1, SIDE, SIDE), count, stream)
        first += count
    stamped = stamp(_cache_key(names))
    scaled = "glyphs" not in UNSCALED
    return Source("glyphs", "built in", splits, stamped, standardize=scaled, keeps_itself=True)


def build(names: list[str]) -> np.ndarray:
    """(classes, 20, 1, 28, 28) uint8, ink 255, for class names of the form "U+0041 LATIN CAPITAL LETTER A"."""
    fonts = {face: Font(face) for face in FACES}
    masters = np.zeros((len(names), INSTANCES, MASTER, MASTER), np.uint8)
    for row, name in enumerate(names):
        character = character_of(name)
        drawn = [fonts[face].draw(character) for face in FACES if character in fonts[face]]
        for instance in range(INSTANCES):
            masters[row, instance] = drawn[instance % len(drawn)]
    codes = np.array([ord(character_of(name)) for name in names], np.int64)
    return np.stack([_distort(m, code) for m, code in zip(masters, codes, strict=True)])[:, :, None]


def character_of(name: str) -> str:
    """The character of a class name."""
    return chr(int(name.split()[0].removeprefix("U+"), 16))


def font_file(face: str) -> Path:
    """Where matplotlib keeps a face."""
    return _fonts() / f"{face}.ttf"


@cache
def _fonts() -> Path:
    # Looked for without importing matplotlib, which takes a while, and fails where MPLBACKEND names no backend of its.
    spec = importlib.util.find_spec("matplotlib")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        fonts = Path(place) / "mpl-data" / "fonts" / "ttf"
        if fonts.is_dir():
            return fonts
    from metaheed.headless import matplotlib  # some distributions keep its data elsewhere, and only it knows where

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


class Font:
    """One face: which characters it has, and their master bitmaps."""

    def __init__(self, face: str) -> None:
        from metaheed.headless import ft2font  # only where glyphs are drawn, for its import takes a while

        self._characters = {chr(code) for code in ft2font.FT2Font(str(font_file(face))).get_charmap()}
        # Basic layout: the alternative depends on a library that is not everywhere.
        self._font = ImageFont.truetype(str(font_file(face)), 96, layout_engine=ImageFont.Layout.BASIC)

    def __contains__(self, character: str) -> bool:
        return character in self._characters

    def draw(self, character: str) -> np.ndarray:
        """(48, 48) uint8: the ink cut out, scaled to 34 pixels on its longer side, centred."""
        page = Image.new("L", (320, 320))
        ImageDraw.Draw(page).text((80, 80), character, fill=255, font=self._font)
        ink = page.crop(page.getbbox())
        longer = max(ink.size)
        width, height = (max(1, (side * GLYPH + longer // 2) // longer) for side in ink.size)
        master = Image.new("L", (MASTER, MASTER))
        scaled = ink.resize((width, height), Image.Resampling.BOX)
        master.paste(scaled, ((MASTER - width) // 2, (MASTER - height) // 2))
        return np.asarray(master)


def _distort(masters: np.ndarray, code: int) -> np.ndarray:
    """(20, 48, 48) masters of one class to (20, 28, 28) instances, each distorted by its own draw."""
    count = len(masters)
    draws = _uniform(code, count * (6 + 2 * _GRID * _GRID)).reshape(count, -1)
    # The inverse map, pixel of the instance -> point of the master: the scale between their sides, up to 1/6 of it as
    # independent shear and scale in each entry of the matrix, and a shift of up to 1.5 pixels.
    scale = MASTER * _ONE // SIDE
    matrix = (draws[:, :4] * scale // (6 * _ONE)).reshape(count, 2, 2) + scale * np.eye(2, dtype=np.int64)
    shift = draws[:, 4:6] * 3 // 2
    # Elastic: displacements of up to 2 pixels at 4×4 nodes, bilinear between them.
    nodes = (draws[:, 6:] * 2).reshape(count, 2, _GRID, _GRID)

    pixel = np.arange(SIDE, dtype=np.int64)
    centred = 2 * pixel - (SIDE - 1)  # in half pixels, so that the centre is a whole number
    y, x = np.meshgrid(centred, centred, indexing="ij")
    at = np.stack([y, x]).reshape(2, -1)
    point = (matrix @ at) // 2 + (MASTER - 1) * _ONE // 2 + shift[:, :, None]
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    point += np.stack([_bilinear(nodes[:, axis], *_on_grid(row, column)) for axis in (0, 1)], axis=1)

    sampled = _bilinear(masters.astype(np.int64), *(np.clip(point[:, a], 0, (MASTER - 1) * _ONE - 1) for a in (0, 1)))
    # Points beyond the master's edge are paper.
    inside = ((point >= 0) & (point < (MASTER - 1) * _ONE)).all(1)
    return np.where(inside, sampled, 0).astype(np.uint8).reshape(count, SIDE, SIDE)


def _on_grid(row: np.ndarray, column: np.ndarray) -> Iterator[np.ndarray]:
    for position in (row, column):
        yield (position * (_GRID - 1) * _ONE // SIDE)[None]


def _bilinear(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values (n, h, w) at fixed-point points (n or 1, m), rounded down, as (n, m) integers."""
    which = np.arange(len(values))[:, None]
    (y0, fy), (x0, fx) = np.divmod(y, _ONE), np.divmod(x, _ONE)
    top = values[which, y0, x0] * (_ONE - fx) + values[which, y0, x0 + 1] * fx
    bottom = values[which, y0 + 1, x0] * (_ONE - fx) + values[which, y0 + 1, x0 + 1] * fx
    rounded: np.ndarray = (top * (_ONE - fy) + bottom * fy) // (_ONE * _ONE)
    return rounded


def _uniform(code: int, count: int) -> np.ndarray:
    """Whole numbers in [−_ONE, _ONE], decided by the character alone."""
    raw = np.random.Philox(key=np.array([code, _VERSION], np.uint64)).random_raw(count)
    return (raw >> np.uint64(1)).astype(np.int64) % (2 * _ONE + 1) - _ONE


def _cache_key(names: list[str]) -> str:
    # Whatever decides a pixel: the lists, this arithmetic, the font files and the library that draws them.
    digest = hashlib.sha256(repr((_VERSION, names, PIL.__version__)).encode())
    for face in FACES:
        digest.update(font_file(face).read_bytes())
    return digest.hexdigest()[:16]


def _read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        images: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        print(f"glyphs: the cache {path} is not readable ({error}); building anew", file=sys.stderr)
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(path: Path, images: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.save(file, images, allow_pickle=False)
                file.close()
                put_in_place(Path(file.name), path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        print(f"glyphs: not cached ({error}); it will be built anew next time", file=sys.stderr)
