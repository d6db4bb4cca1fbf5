"""Error of the normalized value against the offset of the data and the row length: `python bench/accuracy.py`.

Rows of float32 normal deviates with a constant added, normalized without weight and bias by lanenorm and the libraries
installed beside it, against two passes in longdouble. The error is in units of u max(1, |y|), u = 2^-24, the worst of
all elements: the unit that lanenorm's promise is stated in. Written to --output: accuracy.json, accuracy.png.

The deviation is 1, or 8u of the offset where that is more (beyond 2e6): the numbers would all be equal otherwise.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Problem, context, progress, text_table, write_json
from data import EPS, Inputs
from peers import NAMES, PEERS, installed
from report import caption, figure_of

U = 2.0**-24
OFFSETS = (0.0, *(10.0**power for power in range(9)))
LENGTHS = (8, 64, 768, 4096, 65536, 1_000_000)
AT_LENGTHS = (0.0, 1e3, 1e6)  # the offsets that every length is measured at
USUAL = 768  # the length that every offset is measured at
ROWS = 16
# Okabe & Ito 2008
COLOURS = {"lanenorm": "#0072b2", "torch": "#d55e00", "onnxruntime": "#cc79a7", "jax": "#009e73", "numpy": "#5f5f5f"}


def rows_of(length: int, offset: float) -> Any:
    rng = np.random.default_rng((length, int(offset)))
    return (offset + max(1.0, 8 * U * offset) * rng.standard_normal((ROWS, length))).astype(np.float32)


def normalized(library: str, x: Any) -> Any:
    """What `library` gives for x (rows, length) with weight 1 and bias 0."""
    ones, zeros = np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    problem = Problem("accuracy", "layer_norm", x.shape, "channels-first", "float32")
    peer = instance(library)
    call = peer.call("layer_norm_forward", Inputs(x, x, ones, zeros, zeros, ones), problem, False)
    return peer.arrays(call())[0]


@functools.cache
def instance(library: str) -> Any:
    return PEERS[library](1)


def worst_error(x: Any, y: Any) -> float:
    """Row by row, for the sake of memory: longdouble takes 16 bytes."""
    worst = 0.0
    for row, got in zip(x, y, strict=True):
        shifted = row.astype(np.longdouble) - np.longdouble(row[0])
        centred = shifted - shifted.mean()
        exact = centred / np.sqrt(np.square(centred).mean() + np.longdouble(EPS))
        worst = max(worst, float(np.max(np.abs(got - exact) / np.maximum(1, np.abs(exact)))))
    return worst / U


def measure(libraries: Sequence[str], lengths: Sequence[int], show: Callable[[str], Any]) -> list[dict[str, Any]]:
    entries = []
    for length in lengths:
        for offset in OFFSETS if length == USUAL else AT_LENGTHS:
            show(f"rows of {length}, offset {offset:g}")
            x = rows_of(length, offset)
            for library in libraries:
                error = worst_error(x, normalized(library, x))
                entry = {"name": f"error/{length}/{offset:g}/{library}", "run_type": "aggregate"}
                entries.append(entry | {"library": library, "length": length, "offset": offset, "error_in_u": error})
    return entries


def lookup(entries: Sequence[dict[str, Any]], library: str, length: int, offset: float) -> float | None:
    key = (library, length, offset)
    return next((e["error_in_u"] for e in entries if (e["library"], e["length"], e["offset"]) == key), None)


def number(error: float | None) -> str:
    """Two digits: 1.9, 1100, 880000."""
    return "-" if error is None else f"{error:.1f}" if error < 10 else str(int(float(f"{error:.2g}")))


def table(entries: Sequence[dict[str, Any]], libraries: Sequence[str]) -> str:
    pairs = dict.fromkeys((entry["length"], entry["offset"]) for entry in entries)
    lines = [
        [str(length), f"{offset:g}", *(number(lookup(entries, library, length, offset)) for library in libraries)]
        for length, offset in pairs
    ]
    return text_table(["row length", "offset", *(NAMES[library] for library in libraries)], lines, left=0)


def draw(path: Path, entries: Sequence[dict[str, Any]], libraries: Sequence[str], about: dict[str, Any]) -> None:
    figure, (left, right) = figure_of(11, 4.6, nrows=1, ncols=2, sharey=True)
    panels = (
        (left, f"by offset, rows of {USUAL}", "offset", "offset", [e for e in entries if e["length"] == USUAL]),
        (right, "by row length, offset 1000", "row length", "length", [e for e in entries if e["offset"] == 1e3]),
    )
    for axes, title, name, field, chosen in panels:
        for library in libraries:
            points = sorted((entry[field], entry["error_in_u"]) for entry in chosen if entry["library"] == library)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[library], label=NAMES[library], markersize=4)
        if field == "offset":
            axes.set_xscale("symlog", linthresh=1)
            axes.set_ylabel("worst error / (u max(1, |y|))")
        else:
            axes.set_xscale("log")
        axes.set(yscale="log", xlabel=name)
        axes.set_title(title)
        axes.axhline(4, color="#999999", linestyle=":", linewidth=1.5)
    right.text(1, 4.4, "promised: 4", transform=right.get_yaxis_transform(), color="#777777", size=8, ha="right")
    right.legend(frameon=False)
    figure.supxlabel(caption(about), x=0.99, ha="right", size=8, color="#777777")
    figure.savefig(path, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="bench/results by default")
    parser.add_argument("--quick", action="store_true", help="rows of up to 4096 only")
    arguments = parser.parse_args(argv)
    libraries, lengths = installed(), [n for n in LENGTHS if n <= 4096 or not arguments.quick]
    about = context("accuracy.py", sys.argv[1:] if argv is None else argv)
    about["isa"] = instance("lanenorm").details["isa"]
    with progress(sum(len(OFFSETS if n == USUAL else AT_LENGTHS) for n in lengths), "inputs") as bar:

        def show(text: str) -> None:
            bar.set_description(text)
            bar.update()

        entries = measure(libraries, lengths, show)
    write_json(arguments.output / "accuracy.json", about, entries)
    print(f"worst error in u max(1, |y|), u = 2^-24, {ROWS} rows each\n")
    print(table(entries, libraries))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(arguments.output / "accuracy.png", entries, libraries, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
