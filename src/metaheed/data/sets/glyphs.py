"""Glyphs: the built-in data set, drawn from the DejaVu fonts that come with matplotlib.

A class is a character. Its 20 images show it in the font faces that contain it, one after another, each with a small
affine and elastic distortion of its own. The splits share no script: train has Latin, Greek, Cyrillic, Coptic and the
mathematical forms of Latin letters; val has Georgian, Armenian, Hebrew and Lao; test has Canadian syllabics. Many
characters look alike in several scripts or in both cases, so the class lists (made by tools/glyph_classes.py) hold only
characters that differ clearly from each other in every face.

All arithmetic is on integers, so that the pixels are the same on every processor.
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

from metaheed.data.images import SPLITS
from metaheed.data.locate import class_list
from metaheed.data.sources import UNSCALED, Source, SourceSplit, array_stream, stamp
from metaheed.files.opening import put_in_place
from metaheed.files.places import cache_folder

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
"""Side of a master, the bitmap of an undistorted glyph, in pixels."""
GLYPH = 34
"""The longer side of the glyph in its master, in pixels."""
_VERSION = 1  # changed whenever the arithmetic below changes; part of the cache's name
_ONE = 1 << 12  # the number 1 in fixed-point arithmetic
_GRID = 4  # nodes along each side of the grid of elastic displacements


def find() -> Source:
    """Return the data set. Its images are read from a cache or, the first time, built, which takes seconds.

    The cache lies in the folder that `cache_folder` returns. If that cannot be written, they are built anew each time.
    """
    classes = {split: tuple(class_list(f"glyphs_{split}")) for split in SPLITS}
    names = [name for split in SPLITS for name in classes[split]]

    @cache
    def images() -> np.ndarray:
        folder = cache_folder()
        path = None if folder is None else folder / f"glyphs-{_cache_key(names)}.npy"
        found = None if path is None else _read_cache(path, (len(names), INSTANCES, 1, SIDE, SIDE))
        if found is None:
            print(
                "glyphs: drawing the characters, which takes some seconds the first time", file=sys.stderr, flush=True
            )
            found = build(names)
            if path is not None:
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
    """Draw the images of all classes.

    Args:
        names: names of the form "U+0041 LATIN CAPITAL LETTER A".

    Returns:
        (classes, 20, 1, 28, 28) uint8; ink is 255 and paper 0.
    """
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
    """Return the character that a class name stands for."""
    return chr(int(name.split()[0].removeprefix("U+"), 16))


def font_file(face: str) -> Path:
    """Return the path of matplotlib's file of a font face."""
    return _fonts() / f"{face}.ttf"


@cache
def _fonts() -> Path:
    # matplotlib is not imported to find it: that takes a while, and fails if MPLBACKEND names an unknown backend.
    spec = importlib.util.find_spec("matplotlib")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        fonts = Path(place) / "mpl-data" / "fonts" / "ttf"
        if fonts.is_dir():
            return fonts
    from metaheed.headless import matplotlib  # in some Linux distributions only matplotlib itself knows where they are

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


class Font:
    """A font face: which characters it contains, and their masters."""

    def __init__(self, face: str) -> None:
        from metaheed.headless import ft2font  # imported only when glyphs are drawn, because it takes a while

        self._characters = {chr(code) for code in ft2font.FT2Font(str(font_file(face))).get_charmap()}
        # Basic layout, because the alternative needs a library that is not installed everywhere.
        self._font = ImageFont.truetype(str(font_file(face)), 96, layout_engine=ImageFont.Layout.BASIC)

    def __contains__(self, character: str) -> bool:
        return character in self._characters

    def draw(self, character: str) -> np.ndarray:
        """Draw the master of a character, (48, 48) uint8: the ink, scaled to 34 pixels on its longer side, centred."""
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
    """Turn the masters of one class, (20, 48, 48), into its images, (20, 28, 28), each with its own distortion."""
    count = len(masters)
    draws = _uniform(code, count * (6 + 2 * _GRID * _GRID)).reshape(count, -1)
    # The affine part maps a pixel of the image to a point of the master. Its matrix is the ratio of their sides times
    # the identity, plus up to 1/6 of that ratio, at random, in each entry. The shift is up to 1.5 pixels.
    scale = MASTER * _ONE // SIDE
    matrix = (draws[:, :4] * scale // (6 * _ONE)).reshape(count, 2, 2) + scale * np.eye(2, dtype=np.int64)
    shift = draws[:, 4:6] * 3 // 2
    # The elastic part displaces points by up to 2 pixels at 4×4 nodes, and bilinearly between them.
    nodes = (draws[:, 6:] * 2).reshape(count, 2, _GRID, _GRID)

    pixel = np.arange(SIDE, dtype=np.int64)
    centred = 2 * pixel - (SIDE - 1)  # counted in half pixels, so that the centre of the image is a whole number
    y, x = np.meshgrid(centred, centred, indexing="ij")
    at = np.stack([y, x]).reshape(2, -1)
    point = (matrix @ at) // 2 + (MASTER - 1) * _ONE // 2 + shift[:, :, None]
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    point += np.stack([_bilinear(nodes[:, axis], *_on_grid(row, column)) for axis in (0, 1)], axis=1)

    sampled = _bilinear(masters.astype(np.int64), *(np.clip(point[:, a], 0, (MASTER - 1) * _ONE - 1) for a in (0, 1)))
    # Points outside the master are paper.
    inside = ((point >= 0) & (point < (MASTER - 1) * _ONE)).all(1)
    return np.where(inside, sampled, 0).astype(np.uint8).reshape(count, SIDE, SIDE)


def _on_grid(row: np.ndarray, column: np.ndarray) -> Iterator[np.ndarray]:
    for position in (row, column):
        yield (position * (_GRID - 1) * _ONE // SIDE)[None]


def _bilinear(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Interpolate `values` (n, h, w) bilinearly at the fixed-point points (y, x), each (n or 1, m).

    Returns:
        (n, m) integers, rounded down.
    """
    which = np.arange(len(values))[:, None]
    (y0, fy), (x0, fx) = np.divmod(y, _ONE), np.divmod(x, _ONE)
    top = values[which, y0, x0] * (_ONE - fx) + values[which, y0, x0 + 1] * fx
    bottom = values[which, y0 + 1, x0] * (_ONE - fx) + values[which, y0 + 1, x0 + 1] * fx
    rounded: np.ndarray = (top * (_ONE - fy) + bottom * fy) // (_ONE * _ONE)
    return rounded


def _uniform(code: int, count: int) -> np.ndarray:
    """Draw `count` whole numbers in [−_ONE, _ONE] that depend on the character alone."""
    raw = np.random.Philox(key=np.array([code, _VERSION], np.uint64)).random_raw(count)
    return (raw >> np.uint64(1)).astype(np.int64) % (2 * _ONE + 1) - _ONE


def _cache_key(names: list[str]) -> str:
    # A hash of everything that the pixels depend on: the lists, this arithmetic, the font files and Pillow's version.
    digest = hashlib.sha256(repr((_VERSION, names, PIL.__version__)).encode())
    for face in FACES:
        digest.update(font_file(face).read_bytes())
    return digest.hexdigest()[:16]


def _read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the cached images; None if there are none, or if the file is damaged."""
    try:
        images: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        print(f"glyphs: the cache {path} cannot be read ({error}); building it anew", file=sys.stderr)
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(path: Path, images: np.ndarray) -> None:
    """Write the images to the cache; if that fails, only print a notice."""
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
        print(f"glyphs: the cache cannot be written ({error}); it will be built anew next time", file=sys.stderr)
