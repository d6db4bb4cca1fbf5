"""README's measured tables from the files in bench/results: `python bench/tables.py [--check]`.

What stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in README.md is replaced, for NAME in accuracy, speed
and plot; with --check nothing is written, and the exit code is 1 where something would change.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accuracy import AT_LENGTHS, ROWS, lookup, number
from common import RESULTS, ROOT
from peers import NAMES

ACCURACY_LENGTHS = (64, 768, 4096, 65536)
ACCURACY_PEERS = ("lanenorm", "numpy", "torch")
# (norm, shape, layout): what a user may recognize, from a call on a sentence to arrays far beyond the caches
SPEED_ROWS = (
    ("layer_norm", "128x768", ""),
    ("layer_norm", "512x1024", ""),
    ("layer_norm", "4096x768", ""),
    ("layer_norm", "8192x1600", ""),
    ("layer_norm", "4096x4096", ""),
    ("layer_norm", "2048x16384", ""),
    ("layer_norm", "65536x64", ""),
    *(
        ("batch_norm", shape, layout)
        for layout in ("channels-first", "channels-last")
        for shape in ("32x64x112x112", "32x256x56x56", "32x512x28x28", "32x1024x14x14", "32x2048x7x7")
    ),
    ("batch_norm", "65536x256", ""),
)
SPEED_THREADS = (1, 2)
Result = dict[str, Any]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    ruler = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ruler, *lines))


def power(offset: float) -> str:
    return "0" if not offset else f"10{''.join('⁰¹²³⁴⁵⁶⁷⁸⁹'[int(digit)] for digit in str(len(f'{offset:.0f}') - 1))}"


def conditions(context: dict[str, Any], peers: Sequence[str]) -> str:
    known = context["versions"]
    versions = ", ".join(f"{NAMES[p]} {known[p].split('+')[0]}" for p in peers if p in known)
    machine = f"{context['cpu_model']}, {context['usable_cpus']} processors, {context['isa']}"
    return f"{machine}; {versions}; {context['date'][:10]}; `{context['command']}`"


# ---- The parts -------------------------------------------------------------------------------------------------------


def accuracy(result: Result) -> str:
    entries = result["benchmarks"]
    peers = [p for p in ACCURACY_PEERS if any(entry["library"] == p for entry in entries)]
    header = ["row length"]
    for offset in AT_LENGTHS:
        header += [f"mean {power(offset)}: {NAMES[peers[0]]}", *(NAMES[peer] for peer in peers[1:])]
    lines = [
        [str(length), *(number(lookup(entries, peer, length, offset)) for offset in AT_LENGTHS for peer in peers)]
        for length in ACCURACY_LENGTHS
        if lookup(entries, "lanenorm", length, 0.0) is not None
    ]
    intro = (
        f"Worst error of the normalized value, in units of u·max(1, |ŷ|), over {ROWS} rows of float32 normal deviates "
        f"with a constant added, against extended precision ({conditions(result['context'], peers)}):"
    )
    return f"{intro}\n\n{markdown(header, lines)}"


def speed(result: Result) -> str:
    """Forward is the training one for batch norm. Fresh outputs: what a call without `out` pays."""
    found: dict[tuple[Any, ...], Result] = {}
    for row in result["rows"]:
        if row["dtype"] == "float32" and row["output"] == "fresh":
            found.setdefault((row["operation"], row["shape"], row["layout"], row["threads"]), row)

    def cells(norm: str, shape: str, layout: str, threads: int, value: Callable[[Result], float | None]) -> list[str]:
        rows = [found.get((f"{norm}_{way}", shape, layout, threads)) for way in ("forward", "backward")]
        values = [None if row is None else value(row) for row in rows]
        return ["–" if each is None else f"{each:.2f}" if each < 10 else f"{each:.0f}" for each in values]

    counts = [n for n in SPEED_THREADS if any(row["threads"] == n for row in result["rows"])]
    header = ["float32", "copies, 1 thread: forward", "backward"]
    for threads in counts:
        header += [f"PyTorch / lanenorm, {threads} thread{'s' * (threads != 1)}: forward", "backward"]
    lines = []
    for norm, shape, layout in SPEED_ROWS:
        name = " ".join(word for word in (norm, shape.replace("x", "×"), layout.removeprefix("channels-first")) if word)
        line = [name, *cells(norm, shape, layout, 1, lambda row: row["copies"])]
        for threads in counts:
            line += cells(norm, shape, layout, threads, lambda row: row["ratios"].get("torch"))
        if any(cell != "–" for cell in line[1:]):
            lines.append(line)
    intro = (
        "Time in copies of the array (`numpy.copyto`, one thread), and PyTorch's time over lanenorm's, forward (batch "
        "norm: training) and backward, outputs allocated by the call; median of the ratios of the rounds "
        f"({conditions(result['context'], ['lanenorm', 'torch'])}):"
    )
    return f"{intro}\n\n{markdown(header, lines)}"


def plot(_: Result) -> str:
    return "![Speed against PyTorch, by family of problems](bench/results/compare.png)"


PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "accuracy": ("accuracy.json", accuracy),
    "speed": ("compare.json", speed),
    "plot": ("compare.json", plot),
}


# ---- README ----------------------------------------------------------------------------------------------------------


def rewritten(readme: str, results: Path) -> str:
    """README with every part replaced whose markers it has and whose file exists."""
    for name, (file, make) in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        if not pattern.search(readme) or not (results / file).is_file():
            continue
        text = make(json.loads((results / file).read_text(encoding="utf-8")))
        readme = pattern.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme)
    return readme


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether README.md is up to date, change nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="bench/results by default")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="README.md by default")
    arguments = parser.parse_args(argv)
    before = arguments.readme.read_text(encoding="utf-8")
    missing = [name for name in PARTS if f"<!-- {name}:begin -->" not in before]
    if missing:
        print(f"{arguments.readme.name} has no markers for {', '.join(missing)}", file=sys.stderr)
    after = rewritten(before, arguments.results)
    if arguments.check:
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), "README.md", "from results", n=0):
            print(line)
        return 1 if missing or before != after else 0
    arguments.readme.write_text(after, encoding="utf-8")
    print("up to date already" if before == after else f"{arguments.readme.name} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
