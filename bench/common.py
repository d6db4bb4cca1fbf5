"""What the benchmarks share: the list of problems, the byte model, statistics, result files, text tables.

Chapters: problems -> statistics -> machine and result files -> text.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = ROOT / "bench" / "problems.txt"
RESULTS = ROOT / "bench" / "results"

# Array passes over memory that an operation cannot do without (design: x in and y out; x and dy in and dx out).
PASSES = {
    "layer_norm_forward": 2,
    "layer_norm_backward": 3,
    "batch_norm": 2,
    "batch_norm_forward": 2,
    "batch_norm_backward": 3,
}
ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
NEVER_SLOWER = 0.97  # a median ratio below it counts as slower than the peer


# ---- Problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One line of problems.txt with one of its dtypes."""

    family: str
    norm: str  # layer_norm or batch_norm
    shape: tuple[int, ...]  # (rows, axis), (N, C, H, W) or (N, C)
    layout: str  # channels-first or channels-last
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_SIZE[self.dtype]

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def operations(self) -> list[str]:
        return [operation for operation in PASSES if operation.startswith(self.norm)]

    @property
    def name(self) -> str:
        """shape/[layout/]dtype; a layout only where there are two."""
        layout = [self.layout] if len(self.shape) > 2 else []
        return "/".join([self.shape_text, *layout, self.dtype])


@dataclass(frozen=True)
class Case:
    """What one row of the tables measures."""

    problem: Problem
    operation: str
    output: str  # "fresh": allocated by the call, "out": reused
    threads: int

    @property
    def name(self) -> str:
        p = self.problem
        return f"{p.family}/{self.operation}/{p.name}/{self.output}/threads:{self.threads}"

    @property
    def moved_bytes(self) -> int:
        """By the byte model; parameters and statistics are not counted."""
        return PASSES[self.operation] * self.problem.nbytes


def parse_problems(text: str) -> list[Problem]:
    """Read the format that stands at the top of problems.txt."""
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 3 or words[1] not in ("layer_norm", "batch_norm"):
            raise ValueError(f"problems.txt, line {number}: expected family, norm, shape: {line!r}")
        family, norm, shape, *rest = words
        layout, dtypes = "channels-first", "float32"
        for word in rest:
            if word.startswith("channels-"):
                layout = word
            else:
                dtypes = word
        for dtype in dtypes.split(","):
            if dtype not in ITEM_SIZE or layout not in ("channels-first", "channels-last"):
                raise ValueError(f"problems.txt, line {number}: unknown layout or dtype: {line!r}")
            problems.append(Problem(family, norm, tuple(map(int, shape.split("x"))), layout, dtype))
    return problems


def problem_from(fields: dict[str, Any]) -> Problem:
    """The inverse of `dataclasses.asdict`, through JSON."""
    return Problem(**{**fields, "shape": tuple(fields["shape"])})


# ---- Statistics ------------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: float) -> float:
    """With linear interpolation between the samples, as numpy.percentile does by default."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarize(samples: Sequence[float]) -> dict[str, float]:
    return {f: percentile(samples, p) for f, p in (("median", 50), ("p10", 10), ("p90", 90))}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios round by round, over the rounds that both took part in.

    What slows a whole round down (another process, the clock) is in both and cancels; in a ratio of medians it is not.
    """
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=False))


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


# ---- Machine and result files ----------------------------------------------------------------------------------------


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version_of(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def context(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The context of google-benchmark's JSON, and what was compared on which machine.

    The command goes without --output: it changes nothing that is measured, and names folders of the machine.
    """
    import lanenorm  # its own word: a build beside the installed one has no metadata

    names = ["numpy", "torch", "onnxruntime", "jax", "ml_dtypes"]
    names += ["cupy-cuda13x", "triton", "liger-kernel", "quack-kernels"]  # on a GPU
    installed = {name: version for name in names if (version := version_of(name))}
    kept = [a for previous, a in zip(["", *arguments], arguments, strict=False) if "--output" not in (previous, a)]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "executable": f"bench/{script}",
        "command": shlex.join(["python", f"bench/{script}", *kept]),
        "num_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "cpu_model": cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_avg": list(os.getloadavg()),
        "library_build_type": "release",
        "python": platform.python_version(),
        "versions": {"lanenorm": lanenorm.__version__} | installed,
    }


def write_json(path: Path, context: dict[str, Any], benchmarks: list[dict[str, Any]], **more: Any) -> None:
    """google-benchmark's schema; what it does not know (`more`) stands beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"context": context, "benchmarks": benchmarks, **more}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as what JSON can hold."""
    return asdict(value)


# ---- Text ------------------------------------------------------------------------------------------------------------


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as needed; the first `left` flush left, the others flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join(
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(aligned)


def duration(seconds: float) -> str:
    """Three digits: 1.23 µs, 45.6 ms."""
    rounded = float(f"{seconds:.3g}")  # 999.6 µs is 1.00 ms
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)):
        if rounded * factor >= 0.9999 or unit == "ns":
            break
    return f"{three_digits(rounded * factor)} {unit}"


def three_digits(value: float) -> str:
    """1.23, 12.3, 123, 1230."""
    if value <= 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value) + 1e-9))}f}"


def progress(total: int, unit: str) -> Any:
    """A tqdm bar, or something that is silent where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: int = 1) -> None:
        pass

    def set_description(self, *_: object, **__: object) -> None:
        pass

    def write(self, text: str, **_: object) -> None:
        print(text, file=sys.stderr)
