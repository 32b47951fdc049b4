"""Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015), from its two published zip files, packed or unpacked.

Omniglot has 1623 characters of 50 alphabets, with 20 drawings each, 105×105, in black ink. Here they are resized to
28×28 with a Lanczos filter, ink is 1 and paper 0, and each character turned by 90, 180 and 270 degrees makes three more
classes in the same split.

There are two splits:

- `omniglot` has 980/220/423 characters. The split of the TA-MAML paper is random and unpublished; this one permutes the
  1623 sorted names by numpy.random.default_rng(0), and its lists come with metaheed.
- `omniglot-vinyals` has 1028/172/423 characters. All but a few alphabets lie in one split, as in Matching Networks
  (Vinyals et al., NeurIPS 2016) and later papers.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from metaheed.data.images import SPLITS
from metaheed.data.locate import candidate_folders, class_list, first_with, missing_files_error
from metaheed.data.reading.decode import Encoded
from metaheed.data.reading.trees import Tree, open_tree
from metaheed.data.sources import UNSCALED, Request, Source, SourceSplit, encoded_stream, stamp
from metaheed.errors import DataError, MissingDataError

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
PUBLISHED = "https://github.com/brendenlake/omniglot/tree/master/python"
SIDE = 28
TURNS = 4
_MEMBER = re.compile(r"((?:[^/]+/)*images_(?:background|evaluation))/([^/]+/character\d\d)/\d{4}_\d\d\.png")
"""The path of a drawing. Its first group is the folder of the alphabets; some copies have images_background twice."""
_SUBFOLDERS = ("omniglot", "omniglot-py", "python", "omniglot/python", "omniglot/omniglot-py", "omniglot-master/python")
"""The customary folders below a data root: torchvision's, and those of the publisher's repository."""
_LARGEST = 1 << 20  # bytes of a drawing; the published ones have a few hundred


def find_paper(request: Request) -> Source:
    """Find Omniglot, and divide it by the random split.

    Raises:
        DataError: a file is missing or damaged; the message says which, and where it is published.
    """
    return _find(request.root, "omniglot", "omniglot")


def find_vinyals(request: Request) -> Source:
    """Find Omniglot, and divide it by the split of Vinyals et al.

    Raises:
        DataError: as in `find_paper`.
    """
    return _find(request.root, "omniglot-vinyals", "omniglot_vinyals")


def _find(root: Path | None, name: str, lists: str) -> Source:
    """Find Omniglot, packed or unpacked, and divide it by the lists of that name."""
    places = candidate_folders(root, "omniglot", _SUBFOLDERS, " and ".join(ARCHIVES), PUBLISHED)
    folder = first_with(places, ARCHIVES)
    unpacked = [a.removesuffix(".zip") for a in ARCHIVES]
    if folder is not None:
        found = [folder / archive for archive in ARCHIVES]
        parts = [("", _archive(path)) for path in found]
        layout = f"the zip files {' and '.join(ARCHIVES)} in {folder}"
    else:
        folder = next((p for p in places if all((p / u).is_dir() for u in unpacked)), None)
        if folder is None:
            for place in places:
                there = [u for u in unpacked if (place / u).is_dir()]
                if there and not any((place / a).is_file() for a in ARCHIVES):
                    absent = " and ".join(str(place / u) for u in unpacked if u not in there)
                    raise MissingDataError(f"omniglot: {absent} not found; published at {PUBLISHED}")
            raise missing_files_error("omniglot", places, [ARCHIVES], PUBLISHED)
        found = [folder / u for u in unpacked]
        parts = [(f"{path.name}/", open_tree(path, PUBLISHED)) for path in found]
        layout = f"the folders {' and '.join(unpacked)} in {folder}"
    drawings: dict[str, set[str]] = {}
    where = []
    for path, (prefix, tree) in zip(found, parts, strict=True):
        within = _drawings(path, prefix, tree, drawings)
        where.append(str(path if not prefix else folder / within if within else path))
    names_of = {split: class_list(f"{lists}_{split}") for split in SPLITS}
    places_of = " and ".join(where)
    missing = sorted({n for names in names_of.values() for n in names} - set(drawings))
    if missing:
        raise DataError(
            f"{len(missing)} characters are missing from both {places_of} (first: {missing[0]}): "
            f"fetch both anew from {PUBLISHED}"
        )
    most = max(map(len, drawings.values()))
    short = sorted(n for n, drawn in drawings.items() if len(drawn) < most)
    if short:
        raise DataError(
            f"character {short[0]} has {len(drawings[short[0]])} drawings in {places_of}, but others have {most}: "
            f"fetch both anew from {PUBLISHED}"
        )
    splits = {split: _split(parts, names, drawings) for split, names in names_of.items()}
    stamped = stamp(lists, [tree.entries for _, tree in parts], *found)
    return Source(name, layout, splits, stamped, standardize=name not in UNSCALED, published=PUBLISHED)


def _drawings(path: Path, prefix: str, tree: Tree, drawings: dict[str, set[str]]) -> str:
    """Add the drawings in one part of Omniglot to `drawings`, by character.

    Args:
        path: the part: a zip file, or the folder that it unpacks to.
        prefix: put before the paths in `tree`.
        tree: the files of the part.
        drawings: character -> paths of its drawings; changed in place.

    Returns:
        The folder that contains the alphabets; empty if there are no drawings.

    Raises:
        DataError: drawings are in two such folders.
    """
    within: set[str] = set()
    for entry in tree.entries:
        matched = _MEMBER.fullmatch(prefix + entry.path)
        if matched is not None:
            within.add(matched[1])
            drawings.setdefault(matched[2], set()).add(prefix + entry.path)
    if len(within) > 1:
        one, other = sorted(within)[:2]
        raise DataError(f"{path} has drawings both in {one} and in {other}: delete one of them, or move it elsewhere")
    return next(iter(within), "")


def _archive(path: Path) -> Tree:
    tree = open_tree(path, PUBLISHED, _LARGEST)
    if not any(_MEMBER.fullmatch(entry.path) for entry in tree.entries):
        raise DataError(
            f"{path} holds no drawing of the form images_*/ALPHABET/characterNN/NNNN_NN.png: see {PUBLISHED}"
        )
    return tree


def _split(parts: list[tuple[str, Tree]], names: list[str], drawings: dict[str, set[str]]) -> SourceSplit:
    """Make a split: first all characters as they are, then all of them turned by 90 degrees, and so on."""
    each = len(drawings[names[0]])
    row_of = {member: k * each + i for k, name in enumerate(names) for i, member in enumerate(sorted(drawings[name]))}
    chosen = [(prefix, tree, [e for e in tree.entries if prefix + e.path in row_of]) for prefix, tree in parts]

    def encoded(start: int) -> Iterator[Encoded]:
        for prefix, tree, entries in chosen:
            wanted = entries[start:]
            start = max(0, start - len(entries))
            for entry, content in zip(wanted, tree.read(wanted), strict=True):
                row = row_of[prefix + entry.path]
                rows = tuple(row + turn * len(row_of) for turn in range(TURNS))
                yield Encoded(f"{tree.root}:{entry.path}", rows, content)

    classes = tuple(f"{name}@{90 * turn}" if turn else name for turn in range(TURNS) for name in names)
    shape = (1, SIDE, SIDE)
    items = sum(len(entries) for _, _, entries in chosen)
    return SourceSplit(classes, (each,) * len(classes), shape, items, encoded_stream(encoded, draw, shape))


def draw(png: bytes) -> np.ndarray:
    """Decode a drawing, and turn it by 0, 90, 180 and 270 degrees: (4, 28, 28) uint8, where ink is 255."""

    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.size != (105, 105):
            raise ValueError(f"a drawing of {image.size} pixels, not 105×105")
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    drawn = 255 - np.asarray(small)
    return np.stack([np.rot90(drawn, turn) for turn in range(TURNS)])
