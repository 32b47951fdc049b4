"""Pair the arms that may be compared, and give the reason for every pair that may not.

Two arms are paired only if they share the protocol: the tasks of training, validation and test, the network, T, B, the
outer optimiser and the number of iterations.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from metaheed.config import ALGORITHMS, RULES
from metaheed.errors import RunError
from metaheed.running.compare import Difference, compare
from metaheed.studies.paper import COUNTERPART, Setting
from metaheed.studies.report.arms import CONTROLS, RATES, Arm, algorithm_label, replayed_folder
from metaheed.studies.report.reading import Judged, plain


class Comparison(NamedTuple):
    """The comparison of two arms on the same test tasks, over the seeds that both have."""

    arm: Arm
    against: Arm
    difference: Difference
    notes: tuple[str, ...]
    """Tuned settings in which the arms differ, and seeds that only one of them has."""


class NotCompared(NamedTuple):
    """A comparison that could not be made, and the reason."""

    setting: Setting
    label: str
    against: str
    reason: str


class Pairs(NamedTuple):
    """A family of comparisons, shown in one table."""

    compared: tuple[Comparison, ...]
    missing: tuple[NotCompared, ...]


def counterparts(arms: Sequence[Arm], wanted: Callable[[Arm], str | None]) -> Pairs:
    """Compare each arm with the arm of the same learner under another rule.

    Args:
        arms: the arms of all settings.
        wanted: arm -> name of the other rule; None if this arm is not to be compared.
    """
    compared: list[Comparison] = []
    missing: list[NotCompared] = []
    for arm in arms:
        rule = wanted(arm)
        if rule is None:
            continue
        candidates = [
            a for a in arms if (a.setting, a.learner, a.rule) == (arm.setting, arm.learner, rule) and a is not arm
        ]
        found, reasons = _partner(arm, candidates)
        if isinstance(found, Comparison):
            compared.append(found)
        else:
            name = _rule_label(arm, rule)
            missing += [
                NotCompared(arm.setting, arm.label, label, reason) for label, reason in reasons or [(name, found)]
            ]
    return Pairs(tuple(compared), tuple(missing))


def _rule_label(arm: Arm, rule: str) -> str:
    return algorithm_label(replace(arm.config, rule=RULES[rule]()))


Outcome = tuple[Comparison | str, list[tuple[str, str]]]
"""A comparison and []; or, if there is none, a reason and []; or '' and (label, reason) for each candidate."""


def _partner(arm: Arm, candidates: Sequence[Arm]) -> Outcome:
    """Compare an arm with the candidate that differs from it in the fewest tuned settings."""
    if not arm.results:
        return "it is not judged", []
    if not candidates:
        return "there is no such run in this setting", []
    reasons = [(c.label, "; ".join(mismatches(arm, c))) for c in candidates]
    fitting = [c for c, (_, reason) in zip(candidates, reasons, strict=True) if not reason]
    if not fitting:
        return "", reasons
    fewest = min(len(_differing_rates(arm, c)) for c in fitting)
    nearest = [c for c in fitting if len(_differing_rates(arm, c)) == fewest]
    if len(nearest) > 1:
        return "", [(c.label, "there are several that would do: report on one of them at a time") for c in nearest]
    return pair(arm, nearest[0])


def mismatches(arm: Arm, other: Arm) -> list[str]:
    """The reasons not to pair two arms of one setting and learner. The first arm must be evaluated."""
    if not other.results:
        return ["it is not judged"]
    found = protocol_mismatches(arm, other)
    for what, a, b in zip(Judged._fields, arm.judged or (), other.judged or (), strict=True):
        if a != b:
            words = {"tasks": "test tasks", "checkpoint": "checkpoint judged"}
            found.append(plain(f"{words[what]}: {a} against {b}") if what in words else "other test episodes")
    if not {*arm.results} & {*other.results}:
        found.append(f"no seed in common: {_seeds(arm.results)} against {_seeds(other.results)}")
    return found


def protocol_mismatches(arm: Arm, other: Arm) -> list[str]:
    """The settings, other than the rule and tuned ones, in which two arms of one learner differ, in words."""
    found = []
    for name in {**arm.settings, **other.settings}:
        ours, theirs = arm.settings.get(name), other.settings.get(name)
        if ours != theirs and not name.startswith("rule.") and name not in RATES:
            option = name.partition(".")[2].replace("_", "-")
            found.append(plain(f"{option} is {_value(ours)} against {_value(theirs)}"))
    return found


def pair(arm: Arm, other: Arm) -> Outcome:
    """The paired difference of two arms without mismatches, over the seeds that both have."""
    common = sorted({*arm.results} & {*other.results})
    notes = []
    for side, label in ((arm, arm.label), (other, other.label)):
        alone = [seed for seed in side.results if seed not in common]
        if alone:
            notes.append(f"{_seeds(alone)} of {label} left out because the other arm lacks {_it(alone)}")
    for name in _differing_rates(arm, other):
        option = name.partition(".")[2].replace("_", "-")
        notes.append(f"{option} is {_value(arm.settings[name])} against {_value(other.settings[name])}")
    try:
        ours, theirs = ([side.judged_runs[seed].path for seed in common] for side in (arm, other))
        difference = compare(ours, theirs)
    except RunError as error:
        return "", [(other.label, plain(str(error)))]
    return Comparison(arm, other, difference, tuple(notes)), []


def _differing_rates(arm: Arm, other: Arm) -> list[str]:
    """The tuned settings that both arms have, with different values."""
    both = (name for name in RATES if name in arm.settings and name in other.settings)
    return [name for name in both if arm.settings[name] != other.settings[name]]


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(seeds: Iterable[int]) -> str:
    listed = sorted(seeds)
    return f"seed{'s' * (len(listed) != 1)} {', '.join(map(str, listed))}"


def _it(things: Sequence[Any]) -> str:
    return "it" if len(things) == 1 else "them"


def metalstm_pairs(arms: Sequence[Arm]) -> Pairs:
    """The comparison of the paper's Table 1: MetaLSTM++ against MetaLSTM."""
    return counterparts(arms, lambda arm: _paper_rule(arm) if arm.algorithm == "metalstm++" else None)


def attention_pairs(arms: Sequence[Arm]) -> Pairs:
    """The comparisons of the paper's Table 2: any learner with attention or TAML against it under the uniform rule."""
    return counterparts(arms, lambda arm: _paper_rule(arm) or "uniform" if arm.rule in ("attended", "equity") else None)


def _paper_rule(arm: Arm) -> str | None:
    name = COUNTERPART.get(arm.algorithm)
    return None if name is None else ALGORITHMS[name][1]


def control_pairs(arms: Sequence[Arm]) -> Pairs:
    """Compare attention with each control of the same learner, and each control with the uniform rule.

    A control that replays weights is compared only with the arm whose weights it replays.
    """
    compared: list[Comparison] = []
    missing: list[NotCompared] = []
    for arm, control in _with_controls(arms):
        reasons = _replays_others(arm, control, arms)
        reasons += mismatches(arm, control) if arm.results else ["it is not judged"]
        nothing: Outcome = ("", [(control.label, "; ".join(reasons))])
        found, more = nothing if reasons else pair(arm, control)
        if isinstance(found, Comparison):
            compared.append(found)
        else:
            missing += [NotCompared(arm.setting, arm.label, *each) for each in more]
    plain_ones = counterparts(arms, lambda arm: "uniform" if arm.rule in CONTROLS else None)
    return Pairs((*compared, *plain_ones.compared), (*missing, *plain_ones.missing))


def _replays_others(arm: Arm, control: Arm, arms: Sequence[Arm]) -> list[str]:
    """The reason not to pair an arm with a control that replays the weights of another arm in `arms`; [] if none."""
    replayed = {replayed_folder(run) for run in control.runs} - {None}
    sources = [a for a in arms if a.rule == "attended" and replayed & {run.path.name for run in a.runs}]
    if not sources or any(source is arm for source in sources):
        return []
    return [f"it replays the weights of {' and '.join(source.label for source in sources)}"]


def _with_controls(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    for arm in arms:
        for control in arms if arm.rule == "attended" else ():
            if control.rule in CONTROLS and (control.setting, control.learner) == (arm.setting, arm.learner):
                yield arm, control
