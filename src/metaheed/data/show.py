"""Draw pictures of a data set: the images of an episode, or a sheet of its classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metaheed.data.episodes import Episodes
from metaheed.data.images import Dataset
from metaheed.data.output import write_output
from metaheed.data.sets.glyphs import font_file
from metaheed.errors import ConfigError, option, shown

_TILE = 64  # smallest side of a drawn image in pixels; images are enlarged by whole factors
_GAP, _LINE, _NAME = 4, 18, 190  # pixels between images, height of a line of text, width of the column of names
_TASKS = 2**63  # tasks that can be drawn with one seed
_MOST_PIXELS = 100_000_000  # pixels of a sheet, which takes 300 MB while it is drawn
_PAPER, _INK, _FRAME = (255, 255, 255), (30, 30, 30), (204, 102, 119)


def draw_episode(episodes: Episodes, index: int) -> tuple[Image.Image, list[str]]:
    """Draw task `index`, one row for each class: first its support images, framed, and then its queries.

    Returns:
        The picture, and the names of the classes.

    Raises:
        ConfigError: no task has that index, or the picture would be too large.
    """
    if not 0 <= index < _TASKS:
        raise ConfigError(f"{option('index')} is {shown(index)}, but it must be at least 0 and below 2**63")
    rows = episodes.rows(index)
    starts = episodes.split.starts
    names = [episodes.split.classes[int(np.searchsorted(starts, row[0], side="right")) - 1] for row in rows]
    images = episodes.split.images.cpu().numpy()
    title = (
        f"{episodes.dataset.name} {episodes.split.name}, task {index}: {episodes.ways} ways; "
        f"{episodes.shots} support images (framed) and {episodes.queries} queries a class"
    )
    return _sheet(title, names, [images[row] for row in rows], episodes.shots), names


def draw_classes(dataset: Dataset, split: str, classes: int, images: int) -> tuple[Image.Image, list[str]]:
    """Draw the first images of some classes, which are spread evenly over the split, one row for each class.

    Args:
        dataset: the data set.
        split: train, val or test.
        classes: the number of classes.
        images: the number of images of each class.

    Returns:
        The picture, and the names of the classes.

    Raises:
        ConfigError: a number is below 1, there is no such split, or the picture would be too large.
    """
    if classes < 1 or images < 1:
        raise ConfigError(
            f"{option('classes')} is {shown(classes)} with {shown(images)} images each, but both must be at least 1"
        )
    part = dataset.split(split)
    chosen = np.unique(np.linspace(0, len(part.classes) - 1, min(classes, len(part.classes))).round().astype(int))
    pixels = part.images.cpu().numpy()
    rows = [pixels[part.starts[c] : part.starts[c] + min(images, part.counts[c])] for c in chosen]
    names = [part.classes[c] for c in chosen]
    return _sheet(f"{dataset.name} {split}: {len(chosen)} of {len(part.classes)} classes", names, rows, 0), names


def write_png(image: Image.Image, path: str | Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        ConfigError: the path does not name a file, or something other than a file is there.
        DataError: it cannot be written.
    """
    write_output(Path(path), lambda file: image.save(file, "PNG"))


def _sheet(title: str, names: Sequence[str], rows: Sequence[np.ndarray], framed: int) -> Image.Image:
    """Draw a sheet.

    Args:
        title: the line above.
        names: the name of each row.
        rows: the images of each row, (k, C, H, W) uint8.
        framed: how many images of each row get a frame.
    """
    height, width = rows[0].shape[2:]
    scale = max(1, -(-_TILE // height))
    step_x, step_y = width * scale + _GAP, max(height * scale + _GAP, _LINE)
    font = ImageFont.truetype(str(font_file("DejaVuSans")), 12, layout_engine=ImageFont.Layout.BASIC)
    wide = max(max(map(len, rows)) * step_x + _NAME, int(font.getlength(title)) + 2 * _GAP)
    size = (wide + _GAP, len(rows) * step_y + _LINE + 2 * _GAP)
    if size[0] * size[1] > _MOST_PIXELS:
        raise ConfigError(
            f"a sheet of {len(rows)} classes with up to {max(map(len, rows))} images each would have "
            f"{size[0]}×{size[1]} pixels, more than can be looked at: choose fewer {option('ways')}, "
            f"{option('shots')}, {option('queries')} or {option('classes')}"
        )
    page = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, 2), title, fill=_INK, font=font)
    for k, (name, images) in enumerate(zip(names, rows, strict=True)):
        top = _LINE + _GAP + k * step_y
        pen.text((_GAP, top + step_y // 2 - _LINE // 2), _cut(name, font), fill=_INK, font=font)
        for i, pixels in enumerate(images):
            picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
            left = _NAME + i * step_x
            if i < framed:
                frame = (left - 2, top - 2, left + width * scale + 1, top + height * scale + 1)
                pen.rectangle(frame, outline=_FRAME, width=2)
            page.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top))
    return page


def _cut(name: str, font: ImageFont.FreeTypeFont) -> str:
    while font.getlength(name) > _NAME - 2 * _GAP:
        name = name.rstrip("…")[:-1] + "…"
    return name
