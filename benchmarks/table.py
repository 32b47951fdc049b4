"""The table and the picture, from what speed.json holds."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.settings import AUTOGRAD
from metaheed.files.writing import write_whole

LABELS = {
    "ours": "metaheed",
    "learn2learn": "learn2learn",
    "higher": "higher",
    "torchopt": "TorchOpt",
    "metalearn_vmap": "parallel-metalearn, vmap",
    "metalearn_sequential": "parallel-metalearn, sequential",
    "iteryne": "iteryne",
    "torch_func": "torch.func, vmap",
}
ALGORITHM_LABELS = {
    "maml": "MAML",
    AUTOGRAD: "MAML, by autograd",
    "fomaml": "FOMAML",
    "metasgd": "MetaSGD",
    "metalstm++": "MetaLSTM++",
    "ta-maml": "TA-MAML",
    "ta-maml-reuse": "TA-MAML, probe reuse",
}
HEADER = (
    "| algorithm | entry | version | settings | seconds a step | times ours | peak MB | threads | share of limit "
    "| gradient off by |\n|---|---|---|---|---|---|---|---|---|---|\n"
)
_OURS, _OWN, _GIVEN = "#4477aa", "#cc6677", "#aa8800"


def markdown(result: Mapping[str, Any]) -> str:
    """The whole of speed.md."""
    machine, versions = result["machine"], result["versions"]
    parts = [
        "# Speed\n\n"
        f"{result['date']}, commit {result['commit']}, {result['processor']}, {machine['threads']} threads, "
        f"Python {result['python']}, PyTorch {versions['torch']}. Measured peak {machine['flops'] / 1e9:.0f} GFLOP/s "
        f"and {machine['bandwidth'] / 1e9:.1f} GB/s. Median (smallest – largest) over {result['rounds']} rounds.\n"
        "Times ours: against our entry of the same algorithm, paired round by round; our own other algorithms against "
        "our MAML. What each column means stands in benchmarks/README.md.\n"
    ]
    for setting in result["settings"]:
        rows = [row for row in result["rows"] if row["setting"] == setting["name"]]
        parts.append(f"\n## ({setting['name']}) {setting['title']}\n\n{summary(rows)}\n\n{HEADER}")
        parts += [_line(row) for row in ordered(rows)]
    return "".join(parts)


def fastest_peer(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The peer with the smallest median ratio to our MAML, with its own settings; none measured: none."""
    candidates = [
        row
        for row in rows
        if row["entry"] != "ours" and row["algorithm"] == "maml" and not row["speed_settings"] and row["ratios"]
    ]
    return min(candidates, key=lambda row: statistics.median(row["ratios"]), default=None)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fastest peer, and what attention costs."""
    peer = fastest_peer(rows)
    sentences = ["No peer was measured with its own settings."]
    if peer is not None:
        sentences = [
            f"The fastest peer with its own settings is {LABELS[peer['entry']]}: {spread(peer['ratios'])} times."
        ]
    for row in rows:
        if row["entry"] == "ours" and row["algorithm"].startswith("ta-") and row["ratios"]:
            label = ALGORITHM_LABELS[row["algorithm"]]
            sentences.append(f"{label} takes {spread(row['ratios'])} times the time of our MAML.")
    return " ".join(sentences)


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By algorithm, ours first, then peers by their ratio with their own settings; each once with our own settings."""
    algorithms = [*ALGORITHM_LABELS]
    own = {
        (r["entry"], r["algorithm"]): statistics.median(r["ratios"])
        for r in rows
        if r["ratios"] and not r["speed_settings"]
    }
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:  # our MAML runs beside both rows of the peers: the first stands for it
        seen.setdefault((row["entry"], row["algorithm"], row["speed_settings"]), row)
    return sorted(
        seen.values(),
        key=lambda r: (
            algorithms.index(r["algorithm"]),
            r["entry"] != "ours",
            own.get((r["entry"], r["algorithm"]), float("inf")),
            r["entry"],
            r["speed_settings"],
        ),
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (smallest – largest)."""
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} – {high})"


def _line(row: Mapping[str, Any]) -> str:
    cells = [ALGORITHM_LABELS[row["algorithm"]], LABELS[row["entry"]], row["version"] or "—", _whose(row)]
    if row["status"] != "measured":
        reason = f"{row['status']}: {row['reason']}".replace("|", "\\|")
        return f"| {' | '.join([*cells, reason, *['—'] * 5])} |\n"
    off = "—" if row["difference"] is None else f"{row['difference']:.0e}"
    cells += [
        spread(row["seconds"], 3),
        spread(row["ratios"]) if row["ratios"] else "—",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['torch_threads']} ({row['threads']})",
        f"{100 * row['share_of_limit']:.0f}%",
        off,
    ]
    return f"| {' | '.join(cells)} |\n"


def _whose(row: Mapping[str, Any]) -> str:
    return "ours" if row["speed_settings"] else "its own"


def figure(result: Mapping[str, Any], out: Path) -> None:
    """A panel a setting: the paired ratios to our MAML, as bars from the median with smallest and largest."""
    panels = []
    for setting in result["settings"]:
        rows = [row for row in result["rows"] if row["setting"] == setting["name"]]
        panels.append((setting, [r for r in ordered(rows) if r["ratios"] and _in_picture(r)]))
    heights = [1.0 + len(rows) for _, rows in panels]
    picture = Figure(figsize=(8.5, 0.8 + 0.25 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    # One round in which something else took the machine must not flatten the picture: ranges are cut at its edge.
    edge = 1.4 * max((statistics.median(row["ratios"]) for _, rows in panels for row in rows), default=1.0)
    grid = picture.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (setting, rows) in zip(grid, panels, strict=True):
        for place, row in enumerate(rows):
            middle = statistics.median(row["ratios"])
            colour = _OURS if row["entry"] == "ours" else _GIVEN if row["speed_settings"] else _OWN
            axes.barh(place, middle, color=colour, height=0.7)
            axes.plot([min(row["ratios"]), max(row["ratios"])], [place, place], color="black", lw=1)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            right = min(max(row["ratios"]), edge / 1.1)
            axes.text(right, place, f"  {middle:.2f}", va="center", fontsize=8, bbox=behind)
        names = [
            LABELS[r["entry"]] if r["algorithm"] == "maml" else f"metaheed, {ALGORITHM_LABELS[r['algorithm']]}"
            for r in rows
        ]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, edge)
        axes.axvline(1, color="black", lw=0.5)
        axes.set_title(f"({setting['name']}) {setting['title']}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, axis="x")
    grid[-1].set_xlabel("time of an outer iteration over metaheed's MAML (line: range)")
    kinds = {
        _OURS: "metaheed",
        _OWN: "MAML of a peer, its own settings",
        _GIVEN: "the same with our process-wide settings",
    }
    handles = [Patch(color=colour, label=label) for colour, label in kinds.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(picture, out)


def _in_picture(row: Mapping[str, Any]) -> bool:
    return bool(row["entry"] == "ours" or row["algorithm"] == "maml")


def save(picture: Figure, out: Path) -> None:
    """As PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=130, format="png")
    write_whole(out, buffer.getvalue())
