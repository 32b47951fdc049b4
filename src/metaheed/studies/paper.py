"""The paper's Tables 1 and 2, and the further cells (same algorithms, other data sets) that this package can run.

Aimen, Sidheekh, Krishnan, *Task Attended Meta-Learning for Few-Shot Learning*, arXiv 2106.10642. A cell is an algorithm
in a setting: one number in a table, one recipe, one run for each seed. The numbers are accuracies in % with Conv4-32.
Most of the intervals printed beside them cannot be 95% intervals of a mean over 300 tasks, so they are left out here.
"""

import itertools
from typing import NamedTuple

from metaheed.errors import unknown

ITERATIONS = 55_000
"""Number of outer steps of every run in the paper."""


class Setting(NamedTuple):
    """A data set and a task shape: a column of a table."""

    data: str
    """Data set."""
    ways: int
    """N."""
    shots: int
    """K."""


class Cell(NamedTuple):
    """An algorithm in a setting."""

    data: str
    """Data set."""
    ways: int
    """N."""
    shots: int
    """K."""
    algorithm: str
    """A key of metaheed.config.ALGORITHMS."""

    @property
    def setting(self) -> Setting:
        """The cell's setting, without the algorithm."""
        return Setting(*self[:3])


class Table(NamedTuple):
    """A table of the paper."""

    columns: tuple[Setting, ...]
    """Its settings, in the printed order."""
    rows: dict[str, tuple[float, ...]]
    """Algorithm -> accuracies in %, one for each column."""

    def values(self) -> dict[Cell, float]:
        """Cell -> accuracy in %."""
        return {
            Cell(*column, algorithm): value
            for algorithm, row in self.rows.items()
            for column, value in zip(self.columns, row, strict=True)
        }


LABELS = {
    **{"maml": "MAML", "taml": "TAML", "ta-maml": "TA-MAML", "metasgd": "MetaSGD", "ta-metasgd": "TA-MetaSGD"},
    **{"metalstm": "MetaLSTM", "metalstm++": "MetaLSTM++", "ta-metalstm++": "TA-MetaLSTM++"},
}
"""Algorithm -> its name in the paper, in the order in which results are listed."""

COUNTERPART = {
    **{"ta-maml": "maml", "taml": "maml", "ta-metasgd": "metasgd"},
    **{"metalstm++": "metalstm", "ta-metalstm++": "metalstm++"},
}
"""Algorithm of the tables -> the algorithm that it is compared with: the same learner without what is new in it."""

NATURAL = ("miniimagenet", "tieredimagenet")
ANALOGOUS = ("cifar-fs", "fc100")
"""Data sets that the tables lack: smaller images of as many classes, in the same settings."""
IMAGE_SHAPES = {
    **dict.fromkeys(NATURAL, (3, 84, 84)),
    **dict.fromkeys(ANALOGOUS, (3, 32, 32)),
    "omniglot": (1, 28, 28),
}
"""Data set -> (channels, height, width) of its images."""
_NATURAL_SETTINGS = ((5, 1), (5, 5), (10, 1), (10, 5))
_COLUMNS = tuple(Setting(data, *setting) for data in NATURAL for setting in _NATURAL_SETTINGS)
_OMNIGLOT = (Setting("omniglot", 20, 1), Setting("omniglot", 20, 5))
_METALSTM_PLUS_PLUS = (48.00, 62.73, 31.16, 45.46, 47.60, 63.24, 30.70, 47.97)

TABLES = {
    "table1": Table(
        (*_COLUMNS, *_OMNIGLOT),
        {
            "metalstm": (41.48, 58.87, 28.62, 44.03, 37.00, 59.83, 29.80, 39.28, 90.63, 97.11),
            "metalstm++": (*_METALSTM_PLUS_PLUS, 96.50, 98.41),
        },
    ),
    "table2": Table(
        _COLUMNS,
        {
            "maml": (46.10, 60.16, 29.42, 41.98, 44.40, 57.07, 27.40, 34.30),
            "taml": (46.26, 53.40, 29.76, 36.88, 46.40, 56.80, 26.40, 34.40),
            "ta-maml": (48.36, 62.48, 31.15, 43.70, 48.40, 60.40, 31.00, 37.60),
            "metasgd": (47.65, 61.60, 30.09, 42.22, 52.80, 62.35, 31.90, 44.16),
            "ta-metasgd": (49.28, 63.37, 31.50, 44.06, 56.20, 64.56, 33.20, 47.12),
            "metalstm++": _METALSTM_PLUS_PLUS,
            "ta-metalstm++": (49.18, 64.89, 32.07, 46.66, 49.00, 66.15, 32.10, 51.35),
        },
    ),
}
"""Tables 1 and 2."""

_ATTENTION_PAIRS = ("maml", "ta-maml", "metasgd", "ta-metasgd", "metalstm++", "ta-metalstm++")
_FIGURES_SETTING = (5, 1)
"""(ways, shots) of the runs behind Figs. 3 to 5; Fig. 1 is drawn by the toy."""

EXPERIMENTS = (*TABLES, "figures")
"""The experiments that `metaheed reproduce` knows."""


def experiment_algorithms(experiment: str) -> tuple[str, ...]:
    """The algorithms of an experiment: the rows of a table; for the figures, each learner without and with attention.

    Raises:
        ConfigError: there is no such experiment.
    """
    if experiment not in EXPERIMENTS:
        raise unknown("experiment", experiment, EXPERIMENTS)
    return tuple(TABLES[experiment].rows) if experiment in TABLES else _ATTENTION_PAIRS


def experiment_cells(experiment: str) -> tuple[Cell, ...]:
    """The cells of an experiment, setting by setting: on the paper's data sets, then the same on the analogous ones.

    Those of the figures are 5-way 1-shot.

    Raises:
        ConfigError: there is no such experiment.
    """
    algorithms = experiment_algorithms(experiment)
    natural = _NATURAL_SETTINGS if experiment in TABLES else (_FIGURES_SETTING,)
    own = TABLES[experiment].columns if experiment in TABLES else (Setting(NATURAL[0], *_FIGURES_SETTING),)
    settings = (*own, *(Setting(data, *setting) for data in ANALOGOUS for setting in natural))
    return tuple(Cell(*setting, algorithm) for setting, algorithm in itertools.product(settings, algorithms))


def all_cells() -> tuple[Cell, ...]:
    """Every cell of every experiment once, ordered by data set, setting and algorithm."""
    found = {cell for experiment in EXPERIMENTS for cell in experiment_cells(experiment)}
    data, algorithms = (*NATURAL, *ANALOGOUS, "omniglot"), tuple(LABELS)
    return tuple(sorted(found, key=lambda c: (data.index(c.data), c.ways, c.shots, algorithms.index(c.algorithm))))


def accuracy(cell: Cell) -> float | None:
    """The paper's accuracy in %; None if its tables lack the cell."""
    return next((values[cell] for values in map(Table.values, TABLES.values()) if cell in values), None)
