"""The problems of problems.txt on the GPU, through lanenorm and the libraries installed beside it.

`python bench/compare.py --device cuda` comes here. All libraries run in this process on the same arrays, by turns,
round by round; each checks its result against float64 before it is timed. Two times, in columns of their own:

    kernels  of one call in a CUDA graph of many, between two events: what the GPU does
    latency  of one call in a row of calls from Python, the wait for the last one included: what a program waits for

cold: the calls of a graph work by turns on as many copies of the arrays as make three times the L2 cache; warm: on the
same ones. Latency is measured warm. "copy" is the device's own copy of x; "bandwidth" is lanenorm's bytes a second, by
the byte model, over those of the copy: the share of the limit where x is read once (2s forward, 3s backward);
"streaming" is the share of the limit where x is read twice (3s, 5s; 2s of an inference). A ratio is the median of the
ratios round by round, to a peer its time / lanenorm's (above 1: lanenorm is faster), of kernels and of latency.

Written to --output: compare-cuda.json (google-benchmark's schema), .jsonl (a line a row as it is measured), .txt.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers_cuda
from common import (
    NEVER_SLOWER,
    PASSES,
    Problem,
    context,
    duration,
    geometric_mean,
    median_ratio,
    progress,
    summarize,
    text_table,
    write_json,
)
from data import Inputs, check, exact, make_inputs
from peers_cuda import COPY, OURS, UnsupportedError

Row = dict[str, Any]
Call = Callable[[], Any]
STATES = ("cold", "warm")
WAYS = ("kernels", "latency")
# Passes over memory of who reads x, and dy, a second time.
STREAMING = {operation: 2 * passes - 1 for operation, passes in PASSES.items()} | {"batch_norm": 2}


@dataclass(frozen=True)
class Settings:
    """How long a row takes."""

    rounds: int = 11
    seconds: float = 0.002  # of a graph, and of a row of calls
    most: int = 200  # calls of either


QUICK = Settings(rounds=7, seconds=0.001)
COLD_BYTES = 1 << 20  # of an array: below it a call takes as long cold, and hundreds of copies would be needed


@dataclass(frozen=True)
class Case:
    """What one row of the tables measures."""

    problem: Problem
    operation: str
    state: str  # of the L2 cache

    @property
    def name(self) -> str:
        return f"{self.problem.family}/{self.operation}/{self.problem.name}/{self.state}"

    @property
    def moved_bytes(self) -> int:
        return PASSES[self.operation] * self.problem.nbytes


# ---- The clock -------------------------------------------------------------------------------------------------------


class Clock:
    """Times on the GPU. The tests put one without a GPU in its place."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        device = cupy.cuda.Device()
        self.cache_bytes = device.attributes["L2CacheSize"]
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
        self.details = {
            "gpu": properties["name"].decode(),
            "architecture": f"sm_{device.compute_capability}",
            "multiprocessors": properties["multiProcessorCount"],
            "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
            "runtime": f"CUDA {runtime // 1000}.{runtime % 1000 // 10}",
        }

    def to_device(self, inputs: Inputs) -> Inputs:
        """Each array in its own memory layout."""

        def copy(array: Any) -> Any:
            if array.ndim > 2 and not array.flags.c_contiguous:  # channels-last
                return self.cupy.moveaxis(self.cupy.asarray(np.moveaxis(array, 1, -1)), -1, 1)
            return self.cupy.asarray(array)

        return Inputs(*map(copy, inputs))

    def wait(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def kernels(self, peer: Any, replay: Call) -> float:
        """Seconds that a graph takes, between two events."""
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        begin.record(peer.stream)
        replay()
        end.record(peer.stream)
        end.synchronize()
        return 1e-3 * float(self.cupy.cuda.get_elapsed_time(begin, end))

    def latency(self, call: Call, count: int) -> float:
        """Seconds that `count` calls in a row take."""
        self.wait()
        began = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return time.perf_counter() - began


# ---- One row ---------------------------------------------------------------------------------------------------------


class Contestant:
    """A library with what it is to call: eagerly, and recorded."""

    def __init__(self, peer: Any, clock: Clock, case: Case, sets: Sequence[Inputs], settings: Settings):
        self.peer, self.clock = peer, clock
        calls = [peer.call(case.operation, inputs) for inputs in sets]
        self.call = calls[0]
        for call in calls:
            call()
        clock.latency(self.call, 1)
        once = min(clock.latency(self.call, 1) for _ in range(3))
        self.count = max(3, min(settings.most, math.ceil(settings.seconds / max(once, 1e-9))))
        self.recorded = max(len(sets), self.count)
        self.replay = peer.record(lambda: [calls[i % len(calls)]() for i in range(self.recorded)] and None)
        clock.kernels(peer, self.replay)  # the first launch of a graph uploads it

    def kernels(self) -> float:
        return self.clock.kernels(self.peer, self.replay) / self.recorded

    def latency(self) -> float:
        return self.clock.latency(self.call, self.count) / self.count


def contestants(
    case: Case, peers: dict[str, Any], clock: Clock, inputs: Inputs, known: dict[str, Any], settings: Settings
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those whose results are right, and why the others are left out."""
    sets_needed = 1 + 3 * clock.cache_bytes // case.moved_bytes if case.state == "cold" else 1
    sets = [clock.to_device(inputs) for _ in range(sets_needed)]
    ready: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            if name != COPY:
                result = peer.arrays(peer.call(case.operation, sets[0])())
                complaint = check(case.operation, case.problem.dtype, result, known)
                if complaint:
                    left_out[name] = f"WRONG RESULT: {complaint}"
                    continue
            ready[name] = Contestant(peer, clock, case, sets, settings)
        except UnsupportedError as reason:
            left_out[name] = str(reason)
        except Exception as error:  # whatever a library raises where it does not know a dtype or shape
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if OURS not in ready or COPY not in ready:
        raise SystemExit(f"{case.name}: {left_out}")
    return ready, left_out


def measure(
    case: Case, peers: dict[str, Any], clock: Clock, inputs: Inputs, known: dict[str, Any], settings: Settings
) -> Row:
    """Rounds in turn. The order rotates: no library always follows the same other one."""
    ready, left_out = contestants(case, peers, clock, inputs, known, settings)
    samples = {way: {name: [] for name in ready} for way in WAYS}
    order = list(ready)
    for number in range(settings.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            samples["kernels"][name].append(ready[name].kernels())
            samples["latency"][name].append(ready[name].latency())
    p = case.problem
    rivals = [name for name in ready if name not in (OURS, COPY)]
    copy_ratio = median_ratio(samples["kernels"][COPY], samples["kernels"][OURS])
    return {
        "name": case.name,
        "family": p.family,
        "operation": case.operation,
        "shape": p.shape_text,
        "dtype": p.dtype,
        "state": case.state,
        "bytes": case.moved_bytes,
        "bandwidth": copy_ratio * PASSES[case.operation] / 2,
        "streaming": copy_ratio * STREAMING[case.operation] / 2,
        "copies": median_ratio(samples["kernels"][OURS], samples["kernels"][COPY]),
        "ratios": {
            way: {name: median_ratio(samples[way][name], samples[way][OURS]) for name in rivals} for way in WAYS
        },
        "libraries": {
            name: {way: summarize(samples[way][name]) for way in WAYS}
            | {"rounds": settings.rounds, "calls": ready[name].recorded}
            for name in ready
        },
        "left_out": left_out,
    }


def run(todo: Sequence[Case], peers: dict[str, Any], clock: Clock, settings: Settings) -> Iterator[Row]:
    """Measure the cases in the order of the file, so that a problem's inputs are made once."""
    problem, inputs, known = None, None, None
    with progress(len(todo), "rows") as bar:
        for case in todo:
            bar.set_description(case.name, refresh=True)
            if case.problem != problem:
                problem, inputs = case.problem, make_inputs(case.problem)
                known = exact(problem, inputs)
            row = measure(case, peers, clock, inputs, known, settings)
            for name, reason in row["left_out"].items():
                if reason.startswith("WRONG"):
                    bar.write(f"{case.name}: {name}: {reason}", file=sys.stderr)
            yield row
            bar.update()


# ---- What is said about the rows -------------------------------------------------------------------------------------


def benchmarks(rows: Sequence[Row]) -> list[Row]:
    """One entry per row and library; real_time is that of the kernels, the rest are user counters."""
    entries = []
    for row in rows:
        for library, times in row["libraries"].items():
            kernels, latency = times["kernels"], times["latency"]
            moved = row["bytes"] if library != COPY else 2 * row["bytes"] // PASSES[row["operation"]]
            entry = {
                "name": f"{row['name']}/{library}",
                "run_name": f"{row['name']}/{library}",
                "run_type": "iteration",
                "repetitions": times["rounds"],
                "threads": 1,
                "iterations": times["rounds"] * times["calls"],
                "real_time": kernels["median"] * 1e6,
                "cpu_time": latency["median"] * 1e6,
                "time_unit": "us",
                "bytes_per_second": moved / kernels["median"],
                "p10": kernels["p10"] * 1e6,
                "p90": kernels["p90"] * 1e6,
                "latency": latency["median"] * 1e6,
                "library": library,
            }
            if library == OURS:
                entry |= {name: row[name] for name in ("bandwidth", "streaming", "copies")}
                for way in WAYS:
                    entry |= {f"{way}_ratio_to_{peer}": ratio for peer, ratio in row["ratios"][way].items()}
            entries.append(entry)
    return entries


def as_text(now: dict[str, Any], rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
    gpu = now["gpu"]
    machine = f"{gpu['gpu']} ({gpu['architecture']}, {gpu['multiprocessors']} multiprocessors), driver {gpu['driver']}"
    columns = (
        "kernels, p10, p90, GB/s, bandwidth (share of a copy's), streaming (the same, were x read twice) and latency "
        "are lanenorm's; the others are their kernels / lanenorm's, then their latency / lanenorm's"
    )
    head = [f"{machine}; {now['cpu_model']}; {now['date']}", versions, f"{columns}. {now['command']}"]
    peers = [name for name in peers_cuda.PEERS if any(name in row["ratios"]["kernels"] for row in rows)]
    lines = []
    for row in rows:
        ours = row["libraries"][OURS]
        lines.append(
            [
                row["name"],
                *(duration(ours["kernels"][field]) for field in ("median", "p10", "p90")),
                f"{row['bytes'] / ours['kernels']['median'] / 1e9:.0f}",
                f"{100 * row['bandwidth']:.0f} %",
                f"{100 * row['streaming']:.0f} %",
                duration(ours["latency"]["median"]),
                *(
                    "{:.2f} {:.2f}".format(*(row["ratios"][way][peer] for way in WAYS))
                    if peer in row["ratios"]["kernels"]
                    else "-"
                    for peer in peers
                ),
            ]
        )
    header = ["row", "kernels", "p10", "p90", "GB/s", "bandwidth", "streaming", "latency", *peers]
    return "\n".join([*head, "", text_table(header, lines), "", summary(rows, peers), "", *notes(rows, peers)])


def summary(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Per family, of kernels: the least share of the bandwidth, and per peer the worst ratio and the geometric mean."""
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        chosen = [row for row in rows if row["family"] == family]
        line = [family, str(len(chosen)), f"{100 * min(row['bandwidth'] for row in chosen):.0f} %"]
        for peer in peers:
            ratios = [row["ratios"]["kernels"][peer] for row in chosen if peer in row["ratios"]["kernels"]]
            line.append(f"{min(ratios):.2f} / {geometric_mean(ratios):.2f}" if ratios else "-")
        lines.append(line)
    return text_table(["family: worst / geometric mean", "rows", "least bandwidth", *peers], lines)


def notes(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Where lanenorm's kernels are slower, and who was left out of what."""
    slower = [
        f"  {row['name']}: {peer} {row['ratios']['kernels'][peer]:.2f}"
        for peer in peers
        for row in sorted(rows, key=lambda row: row["ratios"]["kernels"].get(peer, 2))
        if row["ratios"]["kernels"].get(peer, 1) < NEVER_SLOWER
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
        lines.append(f"  {library}: {reason} ({names[0]}{rest})")
    return lines


# ---- From compare.py -------------------------------------------------------------------------------------------------


def cases(problems: Sequence[Problem], cold_bytes: int = COLD_BYTES) -> list[Case]:
    """All operations, cold and warm where that is a difference."""
    every = (Case(p, operation, state) for p in problems for operation in p.operations for state in STATES)
    return [case for case in every if case.state == "warm" or case.problem.nbytes >= cold_bytes]


def compare(
    todo: Sequence[Case],
    names: Sequence[str],
    settings: Settings,
    output: Path,
    argv: Sequence[str],
    clock: Clock | None = None,
    peers: dict[str, Any] | None = None,
) -> str:
    """Measure, write the files, and return the text; `clock` and `peers` are for the tests."""
    clock = Clock() if clock is None else clock
    peers = {name: peers_cuda.PEERS[name]() for name in names} if peers is None else peers
    now = context("compare.py", argv) | {"gpu": clock.details, "settings": vars(settings) | {"peers": list(peers)}}
    stem = output / "compare-cuda"
    rows = []
    with stem.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps({"context": now}), file=file, flush=True)
        for row in run(todo, peers, clock, settings):
            print(json.dumps(row), file=file, flush=True)
            rows.append(row)
    write_json(stem.with_suffix(".json"), now, benchmarks(rows), rows=rows)
    text = as_text(now, rows)
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return text
