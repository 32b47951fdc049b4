"""Write the committed glyph class lists: letters of disjoint scripts, no two alike in any face.

    python tools/glyph_classes.py

Candidates are the letters that DejaVu Sans has in its four faces. They are taken in turn (val's and test's scripts
first, train having plenty), each kept if in every face that has it its bitmap lies far enough from those kept already:
squared distance above a fifth of the smaller squared norm, and above a half of it from its own other case, for bitmaps
are scaled to one size, so that most capitals and small letters of one shape differ by stroke width only.
"""

import unicodedata
from pathlib import Path

import numpy as np

from metaheed.data.sets.glyphs import FACES, Font

SCRIPTS = {
    "val": ("GEORGIAN", "ARMENIAN", "HEBREW", "LAO"),
    "test": ("CANADIAN",),
    "train": ("LATIN", "GREEK", "CYRILLIC", "COPTIC", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER"),
}
NEEDED = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
LARGEST = {"train": 640, "val": 160, "test": 240}

fonts = {face: Font(face) for face in FACES}
letters = [
    chr(code)
    for code in range(0x21, 0x20000)
    if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo") and all(chr(code) in fonts[f] for f in NEEDED)
]
kept: dict[str, dict[str, np.ndarray]] = {face: {} for face in FACES}
folder = Path(__file__).parents[1] / "src/metaheed/data/splits"
for split, scripts in SCRIPTS.items():
    chosen: list[str] = []
    for letter in letters:
        if unicodedata.name(letter).split()[0] not in scripts or len(chosen) == LARGEST[split]:
            continue
        drawn = {f: fonts[f].draw(letter).astype(np.int64).ravel() for f in FACES if letter in fonts[f]}
        alike = False
        for face, bitmap in drawn.items():
            if kept[face]:
                others = np.stack(list(kept[face].values()))
                distance = ((others - bitmap) ** 2).sum(1)
                smaller = np.minimum((others**2).sum(1), (bitmap**2).sum())
                cases = np.array([other.lower() == letter.lower() for other in kept[face]])
                alike |= bool((np.where(cases, 2, 5) * distance <= smaller).any())
        if not alike:
            chosen.append(letter)
            for face, bitmap in drawn.items():
                kept[face][letter] = bitmap
    lines = [f"U+{ord(letter):04X} {unicodedata.name(letter)}" for letter in chosen]
    (folder / f"glyphs_{split}.txt").write_text("\n".join(lines) + "\n")
    print(split, len(chosen))
