"""Write the committed Omniglot class lists: the sorted names, permuted by numpy.random.default_rng(0), 980/220/423.

python tools/omniglot_split.py FOLDER_WITH_THE_ZIPS
"""

import sys
import zipfile
from pathlib import Path

import numpy as np

from metaheed.data.sets.omniglot import _MEMBER, ARCHIVES

names = set()
for archive in ARCHIVES:
    with zipfile.ZipFile(Path(sys.argv[1]) / archive) as file:
        names |= {m[1] for m in map(_MEMBER.fullmatch, file.namelist()) if m}
ordered = [sorted(names)[i] for i in np.random.default_rng(0).permutation(len(names))]
folder = Path(__file__).parents[1] / "src/metaheed/data/splits"
for split, part in zip(("train", "val", "test"), np.split(np.array(ordered), [980, 1200]), strict=True):
    (folder / f"omniglot_{split}.txt").write_text("\n".join(part) + "\n")
    print(split, len(part))
