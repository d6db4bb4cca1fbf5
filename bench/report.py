"""What compare.py says about its rows: google-benchmark's JSON, tables, summaries, a picture per family."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import NEVER_SLOWER, duration, geometric_mean, text_table, write_json
from peers import NAMES

Row = dict[str, Any]
OURS = "lanenorm"
COLOURS = {"forward": "#0072b2", "backward": "#d55e00", "inference": "#009e73"}  # Okabe & Ito 2008


def write(stem: Path, context: dict[str, Any], rows: Sequence[Row]) -> str:
    """Write JSON, text and pictures beside each other; returns the text."""
    write_json(stem.with_suffix(".json"), context, benchmarks(rows), rows=list(rows))
    text = as_text(context, rows)
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return f"{text}\n\nno pictures: matplotlib is not installed"
    for family in families(rows):
        draw_family(stem.with_name(f"{stem.name}-{family}.png"), context, [r for r in rows if r["family"] == family])
    draw_overview(stem.with_suffix(".png"), context, rows)
    return text


def families(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows))


def direction(operation: str) -> str:
    return {"batch_norm": "inference"}.get(operation, operation.rsplit("_", 1)[-1])


# ---- JSON ------------------------------------------------------------------------------------------------------------


def benchmarks(rows: Sequence[Row]) -> list[Row]:
    """One entry per row and library, names as google-benchmark makes them; the rest as its user counters."""
    entries = []
    for row in rows:
        for library, times in row["libraries"].items():
            name = f"{row['name']}/{library}"
            moved = row["bytes"] if library != "copy" else 2 * row["bytes"] // passes(row)
            entry = {
                "name": name,
                "run_name": name,
                "run_type": "iteration",
                "repetitions": times["rounds"],
                "threads": row["threads"],
                "iterations": times["rounds"] * times["calls"],
                "real_time": times["median"] * 1e6,
                "cpu_time": times["cpu"] * 1e6,
                "time_unit": "us",
                "bytes_per_second": moved / times["median"],
                "p10": times["p10"] * 1e6,
                "p90": times["p90"] * 1e6,
                "library": library,
            }
            if library == OURS:
                entry["copies"] = row["copies"]
                entry |= {f"ratio_to_{peer}": ratio for peer, ratio in row["ratios"].items()}
            entries.append(entry)
    return entries


def passes(row: Row) -> int:
    return 3 if row["operation"].endswith("backward") else 2


# ---- Tables ----------------------------------------------------------------------------------------------------------


def as_text(context: dict[str, Any], rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    head = [
        f"{context['cpu_model']}, {context['usable_cpus']} processors, {context['isa']}; {context['date']}",
        versions,
        f"time, p10, p90, GB/s and copies are lanenorm's; the others are their time / lanenorm's. {context['command']}",
    ]
    peers = [name for name in NAMES if any(name in row["ratios"] for row in rows)]
    header = ["row", "time", "p10", "p90", "GB/s", "copies", *(NAMES[peer] for peer in peers)]
    lines = []
    for row in rows:
        ours = row["libraries"][OURS]
        lines.append(
            [
                row["name"],
                *(duration(ours[field]) for field in ("median", "p10", "p90")),
                f"{row['bytes'] / ours['median'] / 1e9:.1f}",
                f"{row['copies']:.2f}",
                *(f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "-" for peer in peers),
            ]
        )
    return "\n".join([*head, "", text_table(header, lines), "", summary(rows, peers), "", *notes(rows, peers)])


def summary(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Per family and peer the worst ratio and the geometric mean."""
    lines = []
    for family in families(rows):
        chosen = [row for row in rows if row["family"] == family]
        line = [family, str(len(chosen)), f"{max(row['copies'] for row in chosen):.2f}"]
        for peer in peers:
            ratios = [row["ratios"][peer] for row in chosen if peer in row["ratios"]]
            line.append(f"{min(ratios):.2f} / {geometric_mean(ratios):.2f}" if ratios else "-")
        lines.append(line)
    header = ["family: worst / geometric mean", "rows", "most copies", *(NAMES[peer] for peer in peers)]
    return text_table(header, lines)


def notes(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Where lanenorm is slower, and who was left out of what."""
    slower = [
        f"  {row['name']}: {NAMES[peer]} {row['ratios'][peer]:.2f}"
        for peer in peers
        for row in sorted(rows, key=lambda row: row["ratios"].get(peer, 2))
        if row["ratios"].get(peer, 1) < NEVER_SLOWER
    ]
    lines = [f"slower than {NEVER_SLOWER}: {len(slower) or 'nowhere'}", *slower]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for library, reason in row["left_out"].items():
            reasons.setdefault((library, reason), []).append(row["name"])
    if reasons:
        lines += ["", "left out:"]
    for (library, reason), names in reasons.items():
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  {NAMES[library]}: {reason} ({names[0]}{rest})")
    return lines


# ---- Pictures --------------------------------------------------------------------------------------------------------


def figure_of(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no window, none of the caller's figures

    from lanenorm._demo_report import STYLE

    mpl.rcParams.update(STYLE | {"axes.titlepad": 12, "font.size": 10, "axes.axisbelow": True})
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    return figure, figure.subplots(**grid)


def caption(context: dict[str, Any]) -> str:
    versions = context["versions"]
    torch = f", PyTorch {versions['torch']}" if "torch" in versions else ""
    return f"{context['cpu_model']}, {context['isa']}; lanenorm {versions['lanenorm']}{torch}; {context['date'][:10]}"


def label(row: Row) -> str:
    """What differs within a family: shape, and what is not the usual."""
    layout = "last" if row["layout"] == "channels-last" else ""
    dtype = "" if row["dtype"] == "float32" else row["dtype"]
    return " ".join(word for word in (row["shape"], layout, dtype) if word)


def draw_family(path: Path, context: dict[str, Any], rows: Sequence[Row]) -> None:
    """Speed-up against PyTorch, and copies, by shape; a dot per direction, fresh outputs; panels by threads."""
    rows = [row for row in rows if row["output"] == "fresh"] or list(rows)
    counts = sorted({row["threads"] for row in rows})
    labels = list(dict.fromkeys(map(label, rows)))
    height = 1.2 + len(counts) * (0.7 + 0.3 * len(labels))
    figure, axes = figure_of(11, height, nrows=len(counts), ncols=2, squeeze=False, sharey=True, sharex="col")
    for (speed, copies), threads in zip(axes, counts, strict=True):
        for row in (row for row in rows if row["threads"] == threads):
            place, colour = labels.index(label(row)), COLOURS[direction(row["operation"])]
            if "torch" in row["ratios"]:
                speed.plot(row["ratios"]["torch"], place, "o", color=colour)
            copies.plot(row["copies"], place, "o", color=colour)
        plural = "s" * (threads != 1)
        speed.set_title(f"times the speed of PyTorch, {threads} thread{plural}")
        speed.set_xscale("log", base=2)
        speed.xaxis.set_major_formatter("{x:g}")
        speed.axvline(1, color="#999999", linewidth=1)
        copies.set_title(f"copies of the array it takes, {threads} thread{plural}")
        copies.axvline(1, color=COLOURS["forward"], linestyle=":", linewidth=1.5)
        copies.axvline(1.5, color=COLOURS["backward"], linestyle=":", linewidth=1.5)
        copies.set_xlim(left=0)
    first = axes[0][0]
    first.set_yticks(range(len(labels)), labels)
    first.set_ylim(len(labels) - 0.5, -0.5)
    finish(figure, path, rows[0]["family"], context, {direction(row["operation"]) for row in rows})


def draw_overview(path: Path, context: dict[str, Any], rows: Sequence[Row]) -> None:
    """Every row of fresh float32 outputs as a dot: speed-up against PyTorch by family."""
    chosen = [r for r in rows if "torch" in r["ratios"] and r["output"] == "fresh" and r["dtype"] == "float32"]
    if not chosen:
        return
    counts, names = sorted({row["threads"] for row in chosen}), families(chosen)
    size = {"nrows": 1, "ncols": len(counts), "squeeze": False, "sharey": True, "sharex": True}
    figure, axes = figure_of(6 + 4 * len(counts), 1.8 + 0.36 * len(names), **size)
    for panel, threads in zip(axes[0], counts, strict=True):
        for row in (row for row in chosen if row["threads"] == threads):
            kind = direction(row["operation"])
            place = names.index(row["family"]) + {"forward": -0.18, "inference": 0, "backward": 0.18}[kind]
            panel.plot(row["ratios"]["torch"], place, "o", color=COLOURS[kind], markersize=5, alpha=0.8)
        panel.set_title(f"{threads} thread{'s' * (threads != 1)}")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.axvline(1, color="#999999", linewidth=1)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    title = "times the speed of PyTorch, by family of problems"
    finish(figure, path, title, context, {direction(row["operation"]) for row in chosen})


def finish(figure: Any, path: Path, title: str, context: dict[str, Any], kinds: set[str]) -> None:
    from matplotlib.lines import Line2D

    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    marks = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=kind)
        for kind, colour in COLOURS.items()
        if kind in kinds
    ]
    figure.legend(handles=marks, loc="outside upper right", ncols=3, frameon=False)
    figure.supxlabel(caption(context), x=0.99, ha="right", size=8, color="#777777")
    for panel in figure.axes:
        panel.grid(axis="x", color="#e8e8e8")
    figure.savefig(path, format="png")
