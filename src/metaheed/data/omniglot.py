"""Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015), read straight from its two published zip files.

1623 characters of 50 alphabets, 20 drawings each, 105×105, ink black. Here: 28×28 by Lanczos, ink 1 and paper 0, and
each class also turned by 90, 180 and 270 degrees as a class of its own, in every split.

Split: 980/220/423 characters. The paper's own is random and unpublished; ours are the 1623 sorted names permuted by
numpy.random.default_rng(0), committed as lists.
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from metaheed.data.images import SPLITS, Dataset, make_split, with_rotations
from metaheed.data.locate import class_list, find
from metaheed.errors import DataError

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
PUBLISHED = "https://github.com/brendenlake/omniglot/tree/master/python"
SIDE = 28
_MEMBER = re.compile(r"images_(?:background|evaluation)/([^/]+/character\d\d)/\d{4}_\d\d\.png")
_LARGEST = 1 << 20  # bytes of one drawing; the published ones have a few hundred


def load(root: Path | None) -> Dataset:
    """The data set from the folder that holds its zip files, or the folder above.

    Raises:
        DataError: a file is missing or damaged; says which, and where it is published.
    """
    found = find(root, "omniglot", ("omniglot",), ARCHIVES, PUBLISHED)
    drawings: dict[str, list[tuple[str, np.ndarray]]] = {}
    for path in found:
        for character, name, image in _read(path):
            drawings.setdefault(character, []).append((name, image))
    names_of = {split: class_list(f"omniglot_{split}") for split in SPLITS}
    missing = sorted({name for names in names_of.values() for name in names} - set(drawings))
    if missing:
        raise DataError(
            f"{len(missing)} characters are in neither of {', '.join(map(str, found))} "
            f"(first: {missing[0]}): fetch both anew from {PUBLISHED}"
        )
    most = max(map(len, drawings.values()))
    short = sorted(name for name, drawn in drawings.items() if len(drawn) < most)
    if short:
        raise DataError(
            f"character {short[0]} has {len(drawings[short[0]])} drawings in {' and '.join(map(str, found))}, "
            f"others have {most}: fetch both anew from {PUBLISHED}"
        )
    splits = {}
    for split, names in names_of.items():
        arrays = [np.stack([image for _, image in sorted(drawings[n], key=lambda d: d[0])])[:, None] for n in names]
        splits[split] = with_rotations(make_split(split, names, arrays))
    return Dataset("omniglot", splits, mean=(0.0,), std=(1.0,))


def _read(path: Path) -> list[tuple[str, str, np.ndarray]]:
    result = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                matched = _MEMBER.fullmatch(member.filename)
                if matched is None:
                    continue
                if member.file_size > _LARGEST:
                    raise ValueError(f"{member.filename} claims {member.file_size} bytes")
                result.append((matched[1], member.filename, _draw(archive.read(member))))
    except Exception as error:  # zip and image readers raise many kinds on damaged files; all mean the same here
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): fetch it anew from {PUBLISHED}"
        ) from error
    if not result:
        raise DataError(
            f"{path} holds no drawing of the form images_*/ALPHABET/characterNN/NNNN_NN.png: see {PUBLISHED}"
        )
    return result


def _draw(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.size != (105, 105):
            raise ValueError(f"a drawing of {image.size} pixels, not 105×105")
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return 255 - np.asarray(small)
