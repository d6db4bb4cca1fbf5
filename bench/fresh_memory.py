"""What output memory costs that was never touched before: `python bench/fresh_memory.py`.

First the memory alone: filling 64 MB of new pages of 4 KB, of new huge pages (madvise), and of pages used before. Then
a layer norm whose y is such an array: allocated anew by NumPy (lanenorm's pool off), from the pool, and given as `out`.
Times are medians of rounds in turn. Written to --output: fresh_memory.json.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, context, duration, summarize, text_table, write_json

import lanenorm

SIZE = 64 << 20
HUGE_PAGE = 2 << 20
ROUNDS = 11


def fill_new_pages(advice: int) -> float:
    """Map, fill and unmap; only the filling counts."""
    with mmap.mmap(-1, SIZE + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(advice)
        array = np.frombuffer(pages, np.float32)
        array = array[array.ctypes.data % HUGE_PAGE and (HUGE_PAGE - array.ctypes.data % HUGE_PAGE) // 4 :]
        array = array[: SIZE // 4]
        seconds = timed(functools.partial(array.fill, 1))
        del array  # else the mapping cannot be closed
    return seconds


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ways() -> dict[str, Callable[[], float]]:
    """Name -> what to do once; returns seconds."""
    used = np.ones(SIZE // 4, np.float32)
    x = np.random.default_rng(0).standard_normal((SIZE // 4 // 2048, 2048), dtype=np.float32)
    y = np.ones_like(x)
    pool = lanenorm.get_default_memory_pool()
    limit = pool.get_limit()

    def without_pool() -> float:
        pool.set_limit(0)
        try:
            return timed(lambda: lanenorm.layer_norm(x))
        finally:
            pool.set_limit(limit)

    def with_pool() -> float:
        lanenorm.layer_norm(x)  # the pool was emptied
        return timed(lambda: lanenorm.layer_norm(x))

    found = {"fill, new 4 KB pages": functools.partial(fill_new_pages, mmap.MADV_NOHUGEPAGE)}
    found["fill, new huge pages"] = functools.partial(fill_new_pages, mmap.MADV_HUGEPAGE)
    found["fill, pages used before"] = lambda: timed(lambda: used.fill(1))
    found["layer_norm, y allocated anew"] = without_pool
    found["layer_norm, y from the pool"] = with_pool
    found["layer_norm, out=y"] = lambda: timed(lambda: lanenorm.layer_norm(x, out=y))
    found["numpy.copyto"] = lambda: timed(lambda: np.copyto(y, x))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="bench/results by default")
    parser.add_argument("--threads", type=int, default=1, help="of layer_norm (%(default)s)")
    arguments = parser.parse_args(argv)
    lanenorm.set_num_threads(arguments.threads)
    chosen = ways()
    samples: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(ROUNDS):
        for name, way in chosen.items():
            samples[name].append(way())
    summaries = {name: summarize(seconds) for name, seconds in samples.items()}
    entries = [
        {"name": name, "run_type": "iteration", "iterations": ROUNDS, "time_unit": "us", "threads": arguments.threads}
        | {{"median": "real_time"}.get(field, field): seconds * 1e6 for field, seconds in summary.items()}
        for name, summary in summaries.items()
    ]
    about = context("fresh_memory.py", sys.argv[1:] if argv is None else argv)
    write_json(arguments.output / "fresh_memory.json", about, entries)
    print(f"64 MB of float32, layer_norm with threads: {arguments.threads}\n")
    fields = ("median", "p10", "p90")
    print(text_table(["", *fields], ([name, *(duration(s[f]) for f in fields)] for name, s in summaries.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
