"""Small calls beside a busy neighbour: `python bench/neighbour.py`.

The times of single layer_norm_forward calls, median and 99th percentile, on the machine as it is and with a process
that never sleeps on every processor but the first one in use. Threads that wait for each other at the end of a call
wait for the neighbour's time slice there: p99 loaded / p50 idle shows it. Each library in its own process, with as many
threads as there are processors. Written to --output: neighbour.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Problem, context, duration, percentile, text_table, write_json
from data import exact, make_inputs
from peers import NAMES, installed
from worker import Worker

MOST_CALLS = 50_000
SHAPES = ((1, 768), (8, 768), (128, 768))
BUSY = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("busy", flush=True)
while os.getppid() == int(sys.argv[2]):
    pass
"""


@contextlib.contextmanager
def busy_neighbours() -> Iterator[None]:
    """One process on every processor but the first, or on the only one."""
    usable = sorted(os.sched_getaffinity(0))
    started = []
    try:
        for cpu in usable[1:] or usable:
            command = [sys.executable, "-c", BUSY, str(cpu), str(os.getpid())]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # until it has started
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def measure(worker: Worker, shape: tuple[int, ...], seconds: float, folder: Path) -> dict[str, float] | None:
    problem = Problem("neighbour", "layer_norm", shape, "channels-first", "float32")
    values = folder / f"{problem.shape_text}.npz"
    if not values.exists():
        np.savez(values, **exact(problem, make_inputs(problem)))
    answer = worker.prepare(problem, "layer_norm_forward", False, values)
    if "seconds" not in answer:
        return None
    calls = max(200, min(MOST_CALLS, int(seconds / answer["seconds"])))
    found: dict[str, float] = {"calls": calls}
    for state in ("idle", "loaded"):
        with busy_neighbours() if state == "loaded" else contextlib.nullcontext():
            worker.ask("run", calls=calls // 10)
            times = worker.ask("sample", calls=calls)["times"]
        found |= {f"{state}_p50": percentile(times, 50), f"{state}_p99": percentile(times, 99)}
    return found | {"tail": found["loaded_p99"] / found["idle_p50"]}


def main(argv: Sequence[str] | None = None) -> int:
    processors = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="bench/results by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls per shape, idle and loaded (%(default)s)")
    parser.add_argument("--threads", type=int, default=processors, help="all processors by default")
    arguments = parser.parse_args(argv)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for library in installed():
            worker = Worker(library, arguments.threads)
            for shape in SHAPES:
                found = measure(worker, shape, arguments.seconds, Path(folder))
                if found is not None:
                    name = f"layer_norm_forward/{shape[0]}x{shape[1]}/{library}"
                    times = {field: v * 1e6 if field[-4:-2] == "_p" else v for field, v in found.items()}
                    entry = {"name": name, "run_type": "iteration", "iterations": times.pop("calls")}
                    entry |= {"real_time": times["idle_p50"], "time_unit": "us"}
                    entry |= {"threads": arguments.threads, "library": library}
                    entries.append(entry | times)
            worker.close()
    about = context("neighbour.py", sys.argv[1:] if argv is None else argv)
    write_json(arguments.output / "neighbour.json", about, entries)
    fields = ("idle_p50", "idle_p99", "loaded_p50", "loaded_p99")
    lines = []
    for e in entries:
        times = [duration(e[field] / 1e6) for field in fields]
        lines.append([NAMES[e["library"]], e["name"].split("/")[1], *times, f"{e['tail']:.1f}"])
    header = ["library", "shape", "p50 idle", "p99 idle", "p50 loaded", "p99 loaded", "p99 loaded / p50 idle"]
    print(f"layer_norm_forward, float32, threads: {arguments.threads}, processors: {processors}\n")
    print(text_table(header, lines, left=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
