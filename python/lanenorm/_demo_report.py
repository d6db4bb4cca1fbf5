"""What `python -m lanenorm demo` says about its measurements: verdicts on the known claims, tables, picture.

Every number, title and verdict is computed from the `Results` of the run; nothing here knows how it should come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lanenorm.demo import Results

# Okabe & Ito 2008: colours told apart by colour-blind eyes.
COLOURS = {"none": "#5f5f5f", "BN": "#0072b2", "LN": "#d55e00"}
NAMES = {"none": "without", "BN": "BN", "LN": "LN"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#555555",
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 34,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8e8e8",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 2.4,
    "lines.solid_capstyle": "round",
}


# --- Verdicts ---------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A claim from the papers, whether it held in this run, and the numbers that decided."""

    claim: str
    holds: bool
    measured: str


def verdicts(r: Results) -> list[Verdict]:
    """Hold the known claims against the numbers of a run."""
    return [*gradient_verdicts(r), *learning_verdicts(r), *slope_verdicts(r), *batch_verdicts(r)]


def gradient_verdicts(r: Results) -> list[Verdict]:
    shrinks = {norm: 1 / r.passed(norm) for norm in NAMES}
    claim = "without normalization the gradient shrinks 100 times or more on its way to the first layer"
    found = [Verdict(claim, shrinks["none"] >= 100, f"{times(shrinks['none'])} times")]
    for norm in ("BN", "LN"):
        claim = f"with {norm} at least 10 times more of the gradient arrives"
        measured = f"it shrinks {times(shrinks[norm])} times, {times(shrinks['none'])} times without"
        found.append(Verdict(claim, shrinks["none"] >= 10 * shrinks[norm], measured))
    return found


def learning_verdicts(r: Results) -> list[Verdict]:
    none = r.final("none")
    return [
        Verdict(
            f"the deep network learns with {norm} (90% right or more) and not without (under 50%)",
            r.final(norm) >= 0.9 and none < 0.5,
            f"{r.final(norm):.1%} against {none:.1%}",
        )
        for norm in ("BN", "LN")
    ]


def slope_verdicts(r: Results) -> list[Verdict]:
    found = []
    steps = r.settings.steps  # untrained networks do not depend on it
    for epoch, when, shown in ((0, "before training", steps[:1]), (-1, "after training at each step size", steps)):
        with_bn = [r.flattest("BN", step, epoch) for step in shown]
        without = [r.flattest("none", step, epoch) for step in shown]
        claim = f"BN keeps inputs where the sigmoid is steep, {when} (the flattest layer)"
        measured = f"{percents(with_bn)} of the steepest slope with BN, {percents(without)} without"
        found.append(Verdict(claim, all(bn > none for bn, none in zip(with_bn, without, strict=True)), measured))
    return found


def batch_verdicts(r: Results) -> list[Verdict]:
    found, batches = [], r.settings.sweep_batches
    for norm, hurts, claim in (("BN", True, "small batches hurt BN"), ("LN", False, "small batches do not hurt LN")):
        mean = r.sweep[norm].mean(axis=1)
        measured = f"{mean[0]:.1%} at batch size {batches[0]}; at best {mean.max():.1%}, at {batches[mean.argmax()]}"
        hurt = bool(mean.max() - mean[0] > 0.05)
        found.append(Verdict(f"{claim} (by more than 5 points)", hurt == hurts, measured))
    return found


# --- Tables -----------------------------------------------------------------------------------------------------------


def report(r: Results) -> str:
    """Both tables and the verdicts as text."""
    lines = [*depth_table(r), "", *sweep_table(r)]
    for verdict in verdicts(r):
        outcome = "holds" if verdict.holds else "DOES NOT HOLD HERE"
        lines += ["", f"claim: {verdict.claim}", f"       {outcome} ({verdict.measured})"]
    return "\n".join(lines)


def depth_table(r: Results) -> list[str]:
    s = r.settings
    lines = [
        f"{s.depth} sigmoid layers of 64, batches of {s.batch}, {s.epochs} epochs, momentum 0.9.",
        f"The same initial weights, images and step sizes for all three. Mean of {plural(s.seeds, 'seed')}.",
        "",
        f"{'':36}{'none':>9} {'BN':>9} {'LN':>9}",
    ]

    def row(label: str, cells: Sequence[str]) -> None:  # a cell ends in "*" or a blank
        lines.append((f"{label:36}" + "".join(f"{cell:>10}" for cell in cells)).rstrip())

    star = {(norm, r.best_step(norm)): "*" for norm in NAMES}
    for step in s.steps:
        accuracy = {norm: r.depth[norm, step].accuracy[:, -1].mean() for norm in NAMES}
        row(f"right at step size {step:g}", [f"{accuracy[norm]:.1%}{star.get((norm, step), ' ')}" for norm in NAMES])
    row("* epochs to 90% right", [f"{epochs_to_90(r, norm)} " for norm in NAMES])
    row("* gradient, first layer / last", [f"{r.passed(norm):.1e} " for norm in NAMES])
    row("  the same, mean over training", [f"{r.passed(norm, slice(None)):.1e} " for norm in NAMES])
    row("* slope, flattest layer / steepest", [f"{r.flattest(norm, r.best_step(norm), 0):.0%} " for norm in NAMES])
    row("  the same, after training", [f"{r.flattest(norm, r.best_step(norm), -1):.0%} " for norm in NAMES])
    return [*lines, "* at the step size with the lowest training loss in the last epoch"]


def sweep_table(r: Results) -> list[str]:
    s = r.settings
    lines = [
        f"{s.sweep_depth} sigmoid layers of 64, {s.sweep_epochs} epochs: as many images at every batch size.",
        f"Step size 0.1 sqrt(batch size / 32) for both. Mean and range of {plural(s.sweep_seeds, 'seed')}.",
        "",
        f"{'batch size':>10}{'BN':>12}{'LN':>28}",
    ]
    for batch, *accuracies in zip(s.sweep_batches, r.sweep["BN"], r.sweep["LN"], strict=True):
        cells = [f"{a.mean():12.1%}   {f'{a.min():.1%} to {a.max():.1%}':13}" for a in accuracies]
        lines.append(f"{batch:10}" + "".join(cells))
    return lines


def epochs_to_90(r: Results, norm: str) -> str:
    """Epochs until nine of ten test images were right (mean of the seeds), or "never"."""
    reached = np.flatnonzero(r.best(norm).accuracy.mean(axis=0) >= 0.9)
    return str(reached[0] + 1) if len(reached) else "never"


def times(factor: float) -> str:
    """Two digits: 9823.4 -> 9,800."""
    return f"{float(f'{factor:.2g}'):,g}"


def percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


# --- Picture ----------------------------------------------------------------------------------------------------------


def plot(r: Results, path: Path) -> None:
    """Draw accuracy by epoch, gradient by layer and accuracy by batch size into the PNG file `path`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no window, no backend, none of the caller's figures

    s = r.settings
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(17, 6.7), dpi=140, facecolor="white")
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.045, right=0.94, top=0.685, bottom=0.19, wspace=0.46)
        for panel, draw_panel in zip(panels, (draw_accuracy, draw_gradient, draw_batches), strict=True):
            draw_panel(panel, r)
        right = {norm: f"{r.final(norm):.0%}" for norm in NAMES}
        title = (
            f"A sigmoid network {s.depth} layers deep reads {right['BN']} of handwritten digits with BN, "
            f"{right['LN']} with LN, {right['none']} without normalization"
        )
        figure.text(0.02, 0.935, title, size=18, weight="bold")
        legend = (
            "1280 of scikit-learn's digits to train on, 517 to test. NumPy and lanenorm, float32. "
            "Lines are means, bands reach from the lowest seed to the highest."
        )
        figure.text(0.02, 0.885, legend, size=12, color="#555555")
        chosen = ", ".join(f"{r.best_step(norm):g} {'' if norm == 'none' else 'with '}{NAMES[norm]}" for norm in NAMES)
        conditions = (
            f"Left and middle: batches of {s.batch}, {plural(s.seeds, 'seed')}; of the step sizes "
            f"{', '.join(f'{step:g}' for step in s.steps)} the one with the lowest training loss: {chosen}.\n"
            f"Right: {s.sweep_depth} layers, {plural(s.sweep_seeds, 'seed')}, step size 0.1 sqrt(batch size / 32), "
            f"{s.sweep_epochs} epochs at every batch size."
        )
        figure.text(0.02, 0.03, conditions, size=10, color="#777777", linespacing=1.6)
        figure.savefig(path, format="png")


def draw_accuracy(axes: Any, r: Results) -> None:
    bn, ln, none = (epochs_to_90(r, norm) for norm in ("BN", "LN", "none"))
    axes.set_title(f"Epochs until 90% of the digits are right:\n{bn} with BN, {ln} with LN, {none} without")
    axes.set(xlabel="epoch", xlim=(1, r.settings.epochs), ylim=(0, 1))
    axes.yaxis.set_major_formatter("{x:.0%}")
    runs = {norm: r.best(norm).accuracy for norm in NAMES}
    draw_runs(axes, "test accuracy", range(1, r.settings.epochs + 1), runs, "{:.0%}")


def draw_gradient(axes: Any, r: Results) -> None:
    bn, ln, none = (times(1 / r.passed(norm)) for norm in ("BN", "LN", "none"))
    axes.set_title(f"The gradient shrinks on its way to layer 1:\n{bn} times with BN, {ln} with LN, {none} without")
    layers = range(r.settings.depth + 1, 0, -1)  # left to right as the gradient travels
    runs = {norm: r.best(norm).gradient[:, 0, ::-1] for norm in NAMES}
    lowest, highest = min(run.min() for run in runs.values()), max(run.max() for run in runs.values())
    axes.set(xlabel="layer, from the last to the first", xticks=layers, xlim=(layers[0], layers[-1]))
    axes.set(yscale="log", ylim=(lowest / 2, highest * 2))
    draw_runs(axes, "norm of dloss/dweight before training", layers, runs, "{:.1g}", marker="o")


def draw_batches(axes: Any, r: Results) -> None:
    batches, bn, ln = r.settings.sweep_batches, r.sweep["BN"], r.sweep["LN"]
    small, large = batches[0], batches[-1]
    axes.set_title(
        f"Batch size {small}: BN gets {bn[0].mean():.0%} right, LN {ln[0].mean():.0%};\n"
        f"batch size {large}: BN {bn[-1].mean():.0%}, LN {ln[-1].mean():.0%}"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    floor = np.floor(10 * min(bn.min(), ln.min()) - 0.5) / 10
    axes.set(xlabel="batch size", xlim=(small, large), ylim=(max(0, floor), 1))
    axes.yaxis.set_major_formatter("{x:.0%}")
    draw_runs(axes, "test accuracy", batches, {"BN": bn.T, "LN": ln.T}, "{:.0%}", marker="o")


def draw_runs(
    axes: Any, quantity: str, x: Sequence[float], runs: dict[str, np.ndarray], number: str, **line: Any
) -> None:
    """Mean of runs (seeds, points) as a line, their range as a band, name and last value beside the end."""
    axes.text(0, 1.04, quantity, transform=axes.transAxes, color="#555555")
    for norm, run in runs.items():
        axes.fill_between(x, run.min(axis=0), run.max(axis=0), color=COLOURS[norm], alpha=0.16, linewidth=0)
        axes.plot(x, run.mean(axis=0), color=COLOURS[norm], clip_on=False, zorder=3, **line)
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = sorted((to_fraction.transform((x[-1], run[:, -1].mean()))[1], norm) for norm, run in runs.items())
    heights: list[float] = spread([height for height, _ in ends], gap=0.06)
    for height, (_, norm) in zip(heights, ends, strict=True):
        text = f"{NAMES[norm]} {number.format(runs[norm][:, -1].mean())}"
        axes.annotate(text, (1.03, height), xycoords="axes fraction", va="center", color=COLOURS[norm], weight="bold")


def spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending heights apart until neighbours are `gap` from each other, where they were not."""
    moved = list(heights)
    for _ in range(50):  # converges geometrically; three labels need far fewer
        for low in range(len(moved) - 1):
            short = max(0.0, gap - (moved[low + 1] - moved[low]))
            moved[low] -= short / 2
            moved[low + 1] += short / 2
    return moved
