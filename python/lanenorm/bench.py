"""Speed on this machine: ``python -m lanenorm bench``.

Where the repository is at hand its bench/compare.py runs, with all arguments. Elsewhere a short table is made here: a
handful of shapes against `numpy.copyto` of the same array, plain NumPy and, if it is installed, PyTorch, all in one
process and in turn, round by round, so that what slows the machine down for a while slows all of them down.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lanenorm

EPS = 1e-5
SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("layer_norm", (1, 768)),
    ("layer_norm", (128, 768)),
    ("layer_norm", (4096, 768)),
    ("layer_norm", (2048, 4096)),
    ("batch_norm", (4096, 64)),
    ("batch_norm", (8, 256, 56, 56)),
    ("batch_norm", (8, 1024, 14, 14)),
)
ROUNDS = 7
SECONDS = 0.01  # of calls a round
Calls = dict[str, Callable[[], Any]]  # by library


# --- Plain NumPy ------------------------------------------------------------------------------------------------------


def plain_forward(x: Any, weight: Any, bias: Any, axes: tuple[int, ...], out: Any = None) -> tuple[Any, Any, Any]:
    """Normalize over `axes` as it is commonly written; weight and bias broadcast against x."""
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    rstd = 1 / np.sqrt(np.square(centred).mean(axes, keepdims=True) + EPS, dtype=x.dtype)
    y = np.multiply(centred, rstd, out=out)
    y *= weight
    y += bias
    return y, mean, rstd


def plain_backward(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, axes: tuple[int, ...], sums: tuple[int, ...], out: Any = None
) -> tuple[Any, Any, Any]:
    """Gradients of `plain_forward`; `sums` are the axes that those of weight and bias are summed over."""
    normalized = (x - mean) * rstd
    g = dy * weight
    dx = np.subtract(g, g.mean(axes, keepdims=True), out=out)
    dx -= normalized * (g * normalized).mean(axes, keepdims=True)
    dx *= rstd
    return dx, (dy * normalized).sum(sums), dy.sum(sums)


# --- The short table --------------------------------------------------------------------------------------------------


def calls(norm: str, shape: tuple[int, ...]) -> tuple[Calls, Calls]:
    """Forward and backward by library, on the same float32 numbers; outputs are allocated by the call."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    weight, bias = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
    copied = np.zeros_like(x)
    axes = (1,) if norm == "layer_norm" else tuple(axis for axis in range(x.ndim) if axis != 1)
    sums = (0,) if norm == "layer_norm" else axes
    spread = (-1,) + (1,) * (x.ndim - 2)  # weight (C,) -> (C, 1, 1)
    w, b = weight.reshape(spread), bias.reshape(spread)
    forward_of, backward_of = getattr(lanenorm, f"{norm}_forward"), getattr(lanenorm, f"{norm}_backward")
    _, mean, rstd = forward_of(x, weight, bias)
    _, plain_mean, plain_rstd = plain_forward(x, w, b, axes)
    copy = functools.partial(np.copyto, copied, x)
    forward: Calls = {
        "lanenorm": lambda: forward_of(x, weight, bias),
        "copy": copy,
        "NumPy": lambda: plain_forward(x, w, b, axes),
    }
    backward: Calls = {
        "lanenorm": lambda: backward_of(dy, x, mean, rstd, weight),
        "copy": copy,
        "NumPy": lambda: plain_backward(dy, x, plain_mean, plain_rstd, w, axes, sums),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)
        tx, tdy, tw, tb = (torch.from_numpy(a) for a in (x, dy, weight, bias))
        aten, mask = torch.ops.aten, [True, True, True]
        if norm == "layer_norm":
            forward["PyTorch"] = lambda: torch.native_layer_norm(tx, [shape[1]], tw, tb, EPS)
            _, tm, tr = forward["PyTorch"]()
            backward["PyTorch"] = lambda: aten.native_layer_norm_backward(tdy, tx, [shape[1]], tm, tr, tw, tb, mask)
        else:
            forward["PyTorch"] = lambda: torch.native_batch_norm(tx, tw, tb, None, None, True, 0.1, EPS)
            _, tm, tr = forward["PyTorch"]()
            backward["PyTorch"] = lambda: aten.native_batch_norm_backward(
                tdy, tx, tw, None, None, tm, tr, True, EPS, mask
            )
    return forward, backward


def measure(functions: Calls) -> dict[str, list[float]]:
    """Seconds a call, one number per round and function. A result is dropped before the next call, as users do."""

    def timed(function: Callable[[], Any], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - began) / count

    count = {}
    for name, function in functions.items():
        function()
        count[name] = max(1, int(SECONDS / timed(function, 1)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()  # the caches hold what the one before has left
            samples[name].append(timed(function, count[name]))
    return samples


def table() -> None:
    """Measure and print, line by line.

    One thread: a copy has one too, and on a busy machine the threads of OpenMP wait for each other for milliseconds.
    """
    print(f"lanenorm {lanenorm.__version__}; float32, one thread for all, outputs allocated by the call")
    print("copies: of numpy.copyto of the same array; 2.0x: takes 2.0 times as long as lanenorm; medians\n")
    print(f"{'operation':21}{'shape':>14}{'time':>12}{'copies':>9}{'NumPy':>9}{'PyTorch':>10}")
    for norm, shape in SHAPES:
        for direction, functions in zip(("forward", "backward"), calls(norm, shape), strict=True):
            samples = measure(functions)
            ours = samples["lanenorm"]
            times = {
                name: statistics.median(theirs / own for theirs, own in zip(seconds, ours, strict=True))
                for name, seconds in samples.items()
            }
            peers = "".join(
                f"{f'{times[name]:.1f}x' if name in times else 'none':>{width}}"
                for name, width in (("NumPy", 9), ("PyTorch", 10))
            )
            median = statistics.median(ours) * 1e6
            line = f"{norm}_{direction:8}{'x'.join(map(str, shape)):>16}{median:9.1f} µs{1 / times['copy']:9.2f}{peers}"
            print(line, flush=True)


# --- Command line -----------------------------------------------------------------------------------------------------


def find_compare(start: Path) -> Path | None:
    """bench/compare.py of the repository that `start` lies in, None outside one."""
    for folder in (start, *start.parents):
        script, project = folder / "bench" / "compare.py", folder / "CMakeLists.txt"
        if script.is_file() and project.is_file() and "project(lanenorm" in project.read_text(encoding="utf-8"):
            return script
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of the repository, or print the short table.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments of bench/compare.py; without any it runs with ``--quick``. The short table takes none.

    Returns
    -------
    int
        Exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    script = find_compare(Path.cwd())
    if script is not None:
        return subprocess.run([sys.executable, str(script), *(given or ["--quick"])], check=False).returncode
    parser = argparse.ArgumentParser(
        prog="python -m lanenorm bench",
        description="A short table. In a checkout of the repository this runs bench/compare.py, which has arguments.",
    )
    parser.parse_args(given)
    with lanenorm.num_threads(1):
        table()
    return 0
