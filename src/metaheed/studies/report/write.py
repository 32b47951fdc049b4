"""Write a report on runs: one self-contained HTML page, the same as Markdown, and the figures as files.

    reading    run folders: config, validations, result, cost
    arms       which runs are repetitions, and what they are called
    pairs      which arms may be paired, and why others may not
    measures   Holm's adjustment, curves over seeds, what attention did with its inputs
    tables     the paper's tables beside ours, differences, cost, iterations to an accuracy
    figures    the paper's figures 1, 3, 4, 5
    page       HTML and Markdown

Neither data nor checkpoints nor a GPU are needed.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import metaheed
from metaheed.config import ReportConfig, ToyConfig
from metaheed.errors import RunError
from metaheed.files.opening import put_in_place, write_synced
from metaheed.studies.report.arms import Arm, group, shortened
from metaheed.studies.report.cost_tables import cost_table, reach_table
from metaheed.studies.report.figures import Logs, Picture, Toy, all_figures, read_toy
from metaheed.studies.report.measures import AttentionLog, attention_log
from metaheed.studies.report.page import FIGURES, Note, Report, Section, to_html, to_markdown
from metaheed.studies.report.pairs import attention_pairs, control_pairs, metalstm_pairs
from metaheed.studies.report.reading import Found, find, plain
from metaheed.studies.report.record_tables import (
    correlation_table,
    left_out_table,
    legend_table,
    runs_table,
    settings_table,
    weights_table,
)
from metaheed.studies.report.table import Table, count
from metaheed.studies.report.tables import (
    accuracy_table,
    difference_table,
    elsewhere_table,
    not_compared_table,
    paper_table,
)
from metaheed.studies.toy import OPTIMA, RULES, follow

HTML, MARKDOWN = "report.html", "report.md"


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    config: ReportConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a report on runs: report.html, report.md and figures/ (PNG and SVG). The same runs give the same bytes.

    Args:
        runs: run folders, or folders that hold some at any depth; folders of `metaheed toy` too.
        out: the folder, made whole or not at all. One that holds an earlier report, and nothing else, is replaced.
        config: what is shown.
        say: called with a line of text before each step that takes long.

    Returns:
        The HTML file.

    Raises:
        RunError: no run was found or none of them is judged, a folder cannot be read, or `out` holds something else or
            cannot be written.
    """
    config = config or ReportConfig()
    out = Path(out)
    place = out.resolve()
    _check_replaceable(place)
    found = find([*map(Path, [runs] if isinstance(runs, str | Path) else runs)])
    arms, doubled = group(found.runs)
    if not any(arm.results for arm in arms):
        reasons = [*((run.name, run.problem or "") for run in found.runs), *found.unreadable]
        shown = "; ".join(f"{name}: {reason}" for name, reason in reasons[:3])
        raise RunError(f"none of the {count(len(reasons), 'run')} that were found is finished and judged ({shown})")
    arms = shortened(arms)
    with _beside(place) as part:
        logs, notes = _attention_logs(arms, say)
        toy, toy_from, of_toys = _toy(found, config, say)
        pictures = [*all_figures(arms, logs, toy, toy_from)]
        content = _report(found, arms, doubled, logs, [*notes, *of_toys], pictures, config)
        files = {HTML: to_html(content).encode(), MARKDOWN: to_markdown(content).encode()}
        for picture in pictures:
            files[f"{FIGURES}/{picture.name}.png"] = picture.png
            files[f"{FIGURES}/{picture.name}.svg"] = picture.svg
        (part / FIGURES).mkdir()
        for name, data in files.items():
            write_synced(part / name, data)
    return out / HTML


def _report(
    found: Found,
    arms: Sequence[Arm],
    doubled: Sequence[tuple[str, str]],
    logs: Logs,
    notes: Sequence[tuple[str, str]],
    pictures: Sequence[Picture],
    config: ReportConfig,
) -> Report:
    judged = sum(len(arm.results) for arm in arms)
    settings = dict.fromkeys(arm.setting for arm in arms)
    seeds = {seed for arm in arms for seed in arm.results}
    total = len(found.runs) + len(found.unreadable)
    table1, attention, controls = metalstm_pairs(arms), attention_pairs(arms), control_pairs(arms)
    attended = [(arm, logs[id(arm)]) for arm in arms if logs.get(id(arm))]
    unfinished = [run for run in found.runs if not run.finished]
    of_weights = (weights_table(attended), correlation_table(attended)) if attended else ()
    figures: list[Picture | Note] = []
    for number, absent in MISSING_FIGURES.items():
        drawn = [picture for picture in pictures if picture.name.startswith(f"figure{number}")]
        figures += drawn or [Note(f"Figure {number}: {absent}")]
    title_line = "Task attention: results"
    summary = (
        f"{count(judged, 'judged run')} of {count(total, 'run folder')}, {count(len(arms), 'arm')} (runs of one "
        f"config but for the seed) in {count(len(settings), 'setting')}, {count(len(seeds), 'training seed')}. "
        f"Written by metaheed {metaheed.__version__}.",
        "The unit of every comparison is the training seed. An interval over test tasks alone is labelled so: it "
        "does not cover another training run. Nothing is paired that was not trained and tested alike; what could "
        "not be paired is listed with the reason.",
    )
    sections = (
        _section("Your results", accuracy_table(arms), legend_table(arms)),
        _section(
            "Differences",
            difference_table(
                "A step on the meta-batch",
                "MetaLSTM++ against MetaLSTM (Table 1's).",
                table1,
                beside_the_paper=True,
            ),
            difference_table(
                "Attention and TAML",
                "Each against the same learner under the uniform rule (Table 2's comparison, any learner).",
                attention,
                beside_the_paper=True,
            ),
            difference_table(
                "Controls",
                "Attention against its controls, and these against the uniform rule. Attention without probe "
                "reuse sees 2B tasks per iteration: uniform over 2B is its counterpart at equal tasks seen.",
                controls,
            ),
            not_compared_table([*table1.missing, *attention.missing, *controls.missing]),
        ),
        _section(
            "Beside the paper",
            paper_table("table1", arms),
            paper_table("table2", arms),
            elsewhere_table(arms),
        ),
        _section("Figures", *figures, *of_weights),
        _section("Cost of attention", cost_table(arms)),
        _section("Iterations to an accuracy", reach_table(arms, [t / 100 for t in config.thresholds])),
        _section(
            "Runs",
            left_out_table(unfinished, [*found.unreadable, *_unjudged(arms), *doubled, *notes, *found.studies]),
            settings_table(arms),
            runs_table(arms),
        ),
    )
    return Report(title_line, summary, tuple(section for section in sections if section.blocks))


def _section(heading: str, *blocks: Table | Picture | Note | None) -> Section:
    """A section without blocks that are None and without empty tables."""
    shown = (b for b in blocks if b is not None and not (isinstance(b, Table) and not b.rows))
    return Section(heading, tuple(shown))


MISSING_FIGURES = {
    "1": "not drawn; ask for it with --toy, or run 'metaheed toy --out DIR' and name DIR among the runs.",
    "3": "there is no finished run with two validations, and one makes no line.",
    "4": "there is no finished run under attention whose weights can be read.",
    "5": "there is no finished run under attention whose weights can be read.",
}
"""Number of a figure -> why it is missing."""


def _unjudged(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    return [(run.name, run.problem) for arm in arms for run in arm.runs if run.problem is not None]


def _attention_logs(
    arms: Sequence[Arm], say: Callable[[str], None]
) -> tuple[dict[int, list[AttentionLog]], list[tuple[str, str]]]:
    """What the weights of the attended arms did, and what is to be said of logs that cannot be used."""
    logs: dict[int, list[AttentionLog]] = {}
    notes: list[tuple[str, str]] = []
    attended = [arm for arm in arms if arm.rule == "attended"]
    runs = sum(len(arm.runs) for arm in attended)
    if runs:
        say(f"reading the weights that {count(runs, 'run')} gave every task")
    for arm in attended:
        for run in arm.runs:
            try:
                log = attention_log(run.path / "tasks.jsonl")
                if log.batches != run.iterations:
                    raise RunError(f"tasks.jsonl has {log.batches:,} batches of {run.iterations:,} iterations")
            except RunError as error:
                notes.append((run.name, f"in the accuracies, but not in figures 4 and 5: {plain(str(error))}"))
            else:
                logs.setdefault(id(arm), []).append(log)
    return logs, notes


def _toy(
    found: Found, config: ReportConfig, say: Callable[[str], None]
) -> tuple[Toy | None, str, list[tuple[str, str]]]:
    """The data of figure 1, its source, and remarks on toy files that are not drawn."""
    notes: list[tuple[str, str]] = []
    drawn: tuple[Toy, Path] | None = None
    for file in found.toys:
        try:
            toy = read_toy(file)
        except RunError as error:
            notes.append((plain(str(file.parent)), plain(str(error))))
        else:
            if drawn is None:
                drawn = toy, file
            else:
                notes.append((plain(str(file.parent)), f"a second toy; figure 1 is of {plain(str(drawn[1].parent))}"))
    if drawn is not None:
        return drawn[0], f"Read from {plain(str(drawn[1]))}.", notes
    if not config.toy:
        return None, "", notes
    say("computing the toy of figure 1, which takes half a minute")
    followed = {name: follow(rule(), ToyConfig(), factor) for name, (rule, factor) in RULES.items()}
    numbers = {name: (t.path_length, t.displacement) for name, t in followed.items()}
    toy = Toy([*OPTIMA], {name: t.points for name, t in followed.items()}, numbers)
    return toy, "Computed with the defaults of metaheed toy.", notes


def _check_replaceable(out: Path) -> None:
    """Raise RunError if `out` is there and holds anything but an earlier report, or a shell may be standing in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out} is not a folder: choose another --out")
    if out == Path.cwd():  # which would be left in the folder that was there before
        raise RunError(f"{out} is the current folder, which cannot be replaced: name a folder in it (--out report)")
    own = {HTML, MARKDOWN, FIGURES}
    foreign = [path for path in sorted(out.iterdir()) if path.name not in own]
    figures = out / FIGURES
    if figures.is_dir() and not figures.is_symlink():
        drawn = [p for p in figures.iterdir() if p.name.startswith("figure") and p.suffix in (".png", ".svg")]
        foreign += sorted({*figures.iterdir()} - {*drawn})
    if foreign:
        raise RunError(
            f"{out} holds {foreign[0].relative_to(out)}, which is no part of a report: it would be lost, so choose "
            "another --out"
        )


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when all went well, and is removed when not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
            part, old = Path(scratch) / "new", Path(scratch) / "old"
            part.mkdir()
            yield part
            if out.exists():
                put_in_place(out, old)
            try:
                put_in_place(part, out)
            except OSError:
                if old.exists():
                    put_in_place(old, out)
                raise
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or out}: {error.strerror or error}. Choose another --out"
        ) from error
