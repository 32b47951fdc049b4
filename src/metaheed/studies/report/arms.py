"""Group runs that repeat one config with different seeds, and name the groups.

An *arm* is the runs whose configs differ only in the seed and in options of the machine. Arms are compared within a
*setting*: data set, ways and shots.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaheed.config import (
    ALGORITHMS,
    LEARNERS,
    RULES,
    AttendedConfig,
    ReplayedConfig,
    RunConfig,
    to_dict,
)
from metaheed.studies.paper import ANALOGOUS, LABELS, NATURAL, Setting
from metaheed.studies.recipes import OF_A_RUN
from metaheed.studies.report.reading import Judged, Result, Run, plain

_LONGEST_LABEL = 32
"""Maximum number of characters in an arm's name, because every table and legend repeats it."""
_WITHOUT_EFFECT = ("learner.recompute",)
"""Settings that change the use of memory but no result."""
RATES = (
    *("learner.fast_lr", "learner.forget_bias", "learner.input_bias", "outer.meta_lr", "outer.clip_norm"),
    *("rule.attention_lr", "rule.equity_lambda", "rule.loss_temperature", "rule.ascent_rate"),
)
"""Settings that are tuned for each algorithm separately: the two arms of a pair may differ in them, which is noted."""

CONTROLS = {
    "uniform-2b": "uniform over 2B tasks",
    "loss-softmax": "softmax of the loss",
    "replayed": "replayed and permuted",
}
"""Name of a control rule for attention -> how the page describes it."""


@dataclass(frozen=True)
class Arm:
    """Runs of one config, one for each seed."""

    setting: Setting
    runs: tuple[Run, ...]
    """Ordered by seed; includes runs that are not evaluated yet."""
    settings: Mapping[str, Any]
    """GROUP.FIELD -> value, without the seed and the options of the machine."""
    judged: Judged | None
    """Evaluation protocol of the evaluated runs; None if there are none."""
    label: str
    """Short name on the page."""
    described: str = ""
    """What the label stands for; empty if the label is already complete."""

    @property
    def config(self) -> RunConfig:
        """The config of its first run."""
        return self.runs[0].config

    @property
    def algorithm(self) -> str:
        """The algorithm's name, see `RunConfig.algorithm`."""
        return self.config.algorithm

    @property
    def learner(self) -> str:
        """The learner's name."""
        return self.config.learner.name

    @property
    def rule(self) -> str:
        """The batch rule's name."""
        return self.config.rule.name

    @property
    def judged_runs(self) -> dict[int, Run]:
        """Seed -> run, for the evaluated runs."""
        return {run.seed: run for run in self.runs if run.result is not None}

    @property
    def results(self) -> dict[int, Result]:
        """Seed -> result, for the evaluated runs."""
        return {run.seed: run.result for run in self.runs if run.result is not None}

    @property
    def plain_rule(self) -> bool:
        """Whether learner and rule have their defaults, tuned settings aside, as in the paper's tables."""
        return not _options(self.config)

    @property
    def tasks_per_iteration(self) -> int:
        """Tasks that training sees in an iteration: B, or 2B if the rule draws a second batch."""
        return self.config.rule.batches * self.config.outer.meta_batch_size

    @property
    def updates_per_iteration(self) -> int:
        """Number of outer steps on θ in an iteration."""
        return self.config.rule.updates(self.config.outer.meta_batch_size)


def title(setting: Setting) -> str:
    """A setting in words."""
    return f"{plain(setting.data)} {setting.ways}-way {setting.shots}-shot"


def algorithm_label(config: RunConfig) -> str:
    """The name of an algorithm on the page; the paper's name if the paper has this algorithm."""
    name, learner, rule = config.algorithm, config.learner.name, config.rule.name
    if name in LABELS:
        return LABELS[name]
    base = _stated_name(next(iter(config.learner.algorithms.values()), (learner, learner))[1])
    if name in ALGORITHMS:
        return f"TA-{base}" if isinstance(config.rule, AttendedConfig) else _stated_name(ALGORITHMS[name][2])
    return f"{base}, {CONTROLS.get(rule, rule)}"


def _stated_name(description: str) -> str:
    """The name at the beginning of an algorithm's description, before its source: "MAML (Finn et al. 2017): …"."""
    return description.split(" (")[0]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """GROUP.FIELD -> value, without the options of one run or machine, and with the actual shape of the test tasks."""
    found: dict[str, Any] = {}
    for group, values in to_dict(config).items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in OF_A_RUN.get(group, ()) and f"{group}.{name}" not in _WITHOUT_EFFECT:
                found[f"{group}.{name}"] = value
    for name, count in zip(("ways", "shots", "queries"), config.episodes.test_shape, strict=True):
        found[f"episodes.test_{name}"] = count
    episodes = config.episodes
    if episodes.data == "folder" and episodes.data_root is not None:
        # All folders of images have the same data set name. Only the last part of the path counts: folders are moved.
        found["episodes.images"] = episodes.data_root.name
    if config.learner.init_from is not None:  # the last part of the path, as above
        found["learner.init_from"] = config.learner.init_from.name
    return found


def group(runs: Iterable[Run]) -> tuple[list[Arm], list[tuple[str, str]]]:
    """Group finished runs into arms.

    Returns:
        The arms, ordered by setting and algorithm; and (run, reason) for each run that is not used because its arm
        already has a run with the same seed.
    """
    by_config: dict[str, list[Run]] = defaultdict(list)
    runs = [*runs]
    settings = _settings_with_sources(runs)
    for run in runs:
        if run.finished:
            by_config[repr((run.setting, sorted(settings[run.path].items())))].append(run)
    arms: list[Arm] = []
    doubled: list[tuple[str, str]] = []
    for members in by_config.values():
        by_judged: dict[Judged | None, list[Run]] = defaultdict(list)
        for run in members:
            by_judged[None if run.result is None else run.result.judged].append(run)
        unjudged = by_judged.pop(None, [])
        # The protocol with most runs comes first. Runs that are not evaluated yet are counted with it.
        parts = sorted(by_judged.items(), key=lambda item: (-len(item[1]), item[0])) or [(None, [])]
        for index, (judged, part) in enumerate(parts):
            by_seed: dict[int, Run] = {}
            for run in [*part, *(unjudged if index == 0 else [])]:
                first = by_seed.setdefault(run.seed, run)
                if first is not run:
                    doubled.append(
                        (run.name, f"a second run of that config with seed {run.seed}; {first.name} is used")
                    )
            ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
            config = ordered[0].config
            arms.append(Arm(ordered[0].setting, ordered, settings[ordered[0].path], judged, _label(config)))
    arms.sort(key=_order)
    return _told_apart(arms), doubled


def _settings_with_sources(runs: Sequence[Run]) -> dict[Path, dict[str, Any]]:
    """Path of a run -> its settings.

    If runs of one config are known to replay different algorithms, the replayed algorithm is one of the settings.
    """
    settings = {run.path: settings_of(run.config) for run in runs}
    attended: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        if isinstance(run.config.rule, AttendedConfig):
            attended[run.path.name].add(_label(run.config))
    replaying: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        replayed = replayed_folder(run)
        if replayed is not None:
            names = attended.get(replayed, set())
            source = min(names) if len(names) == 1 else ""
            replaying[repr((run.setting, sorted(settings[run.path].items())))][source].append(run)
    for by_source in replaying.values():
        if len({*by_source} - {""}) > 1:
            for source, members in by_source.items():
                for run in members:
                    settings[run.path]["rule.replay"] = source or "a run that is not here"
    return settings


def replayed_folder(run: Run) -> str | None:
    """The name of the folder whose weights a run replays; None if it replays none.

    Only the name, without its parents, because the runs of a study may be moved together.
    """
    rule = run.config.rule
    return rule.replay.name if isinstance(rule, ReplayedConfig) and rule.replay is not None else None


def _order(arm: Arm) -> tuple[Any, ...]:
    data = (*NATURAL, *ANALOGOUS, "omniglot", "omniglot-vinyals")
    known = data.index(arm.setting.data) if arm.setting.data in data else len(data)
    learner, rules = [*LEARNERS].index(arm.learner), [*RULES]
    if arm.learner == "metalstm":  # MetaLSTM comes before MetaLSTM++
        rules.sort(key=lambda rule: rule != "sequential")
    fields = sorted((name, repr(value)) for name, value in arm.settings.items())
    return (known, arm.setting, learner, rules.index(arm.rule), len(arm.label), arm.label, fields, str(arm.judged))


def _label(config: RunConfig) -> str:
    options = _options(config)
    return algorithm_label(config) + (f" ({', '.join(options)})" if options else "")


def _options(config: RunConfig) -> list[str]:
    """The options of learner and rule that differ from their defaults, named as on the command line; no tuned ones."""
    found, default = [], (LEARNERS[config.learner.name](), RULES[config.rule.name]())
    usual = {"learner": to_dict(default[0]), "rule": to_dict(default[1])}
    neutral = (*RATES, "learner.backbone", "learner.adaptation_steps")
    for name, value in settings_of(config).items():
        part, _, option = name.partition(".")
        if part in usual and name not in neutral and value != usual[part][option]:
            found.append(_said(name, value))
    return found


def _said(name: str, value: Any) -> str:
    option = name.partition(".")[2].replace("_", "-")
    if isinstance(value, bool):
        return option if value else f"no {option}"
    if isinstance(value, float):
        return f"{option} {value:g}"
    return plain(f"{option} {'none' if value is None else value}")


def _told_apart(arms: Sequence[Arm]) -> list[Arm]:
    """Add to the labels of arms that share a setting and a label the settings in which they differ."""
    alike: dict[tuple[Setting, str], list[Arm]] = defaultdict(list)
    for arm in arms:
        alike[arm.setting, arm.label].append(arm)
    labelled = []
    for arm in arms:
        others = alike[arm.setting, arm.label]
        names = [name for name in arm.settings if len({repr(other.settings.get(name)) for other in others}) > 1]
        names.sort(key=lambda name: name != "training.iterations")  # the most important difference comes first
        added = [_said(name, arm.settings[name]) for name in names]
        if arm.judged is not None and len({other.judged for other in others if other.settings == arm.settings}) > 1:
            j = arm.judged
            added.append(f"judged on {j.tasks} tasks {plain(j.episodes_sha256[:8])}, {plain(j.checkpoint)} checkpoint")
        labelled.append(replace(arm, label=f"{arm.label} [{', '.join(added)}]") if added else arm)
    return labelled


def shortened(arms: Sequence[Arm]) -> list[Arm]:
    """Replace labels that are too long by algorithm and number; the full label moves to `described`."""
    numbers: dict[tuple[Setting, str], int] = defaultdict(int)
    found = []
    for arm in arms:
        base = algorithm_label(arm.config)
        if len(arm.label) > _LONGEST_LABEL and arm.label != base:
            numbers[arm.setting, base] += 1
            arm = replace(arm, label=f"{base} #{numbers[arm.setting, base]}", described=arm.label)
        found.append(arm)
    return found
