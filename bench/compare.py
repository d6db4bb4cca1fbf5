"""The problems of problems.txt through lanenorm and the libraries installed beside it: `python bench/compare.py`.

Every library runs in its own process on the same processors with the same number of threads; one at a time, in turn,
round by round, so that whatever slows the machine down for a while slows all of them down. Each checks its result
against float64 before it is timed. `numpy.copyto` of the same array, one thread, is timed in lanenorm's process in the
same rounds: the unit "copy".

A sample is the mean of as many calls as fit the time of a round; a row gives median, p10 and p90 of the samples. A
ratio is the median of the ratios round by round: to a peer its time / lanenorm's (above 1: lanenorm is faster; "never
slower" is 0.97 or more), "copies" lanenorm's time / that of a copy.

Written to --output: compare.json (google-benchmark's schema), compare.jsonl (a line per row as it is measured, what
--resume goes on from), compare.txt (the tables), a picture per family.

    python bench/compare.py --quick                      # one or two problems per family, under two minutes
    python bench/compare.py --threads 1 2                # everything, 1 to 2 hours; --resume after an interruption
    python bench/compare.py --filter 'bert/.*backward'   # names as in the first column of --list
    python bench/compare.py --device cuda                # the layer norms on a GPU: compare_cuda.py, which says how
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare_cuda
import numpy as np
import report
from common import PROBLEMS, RESULTS, Case, Problem, context, median_ratio, parse_problems, progress, summarize
from data import exact, make_inputs
from peers import PEERS, installed
from worker import Worker, WorkerDiedError

import lanenorm

Row = dict[str, Any]
OURS, COPY = "lanenorm", "copy"
SAME = ("cpu_model", "versions", "settings", "isa")  # what --resume wants unchanged


@dataclass(frozen=True)
class Settings:
    """How long a row takes."""

    rounds: int = 15
    seconds: float = 0.015  # of calls per library and round
    budget: float = 2.5  # of a row per library: a slow one takes part in the first rounds only, at least in 3


QUICK = Settings(rounds=5, seconds=0.004, budget=0.15)
QUICK_BYTES = 1 << 25  # of an array: above it making the inputs and what is exact takes longer than measuring


# ---- What is measured ------------------------------------------------------------------------------------------------


def quick_problems(problems: Sequence[Problem]) -> list[Problem]:
    """The first of every family and norm that is not too large; where layouts differ, the first of each."""
    chosen: dict[tuple[str, str, str], Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.nbytes > QUICK_BYTES):  # stable: else as in the file
        chosen.setdefault((problem.family, problem.norm, problem.layout), problem)
    return list(chosen.values())


def cases(problems: Sequence[Problem], threads: int, outputs: Sequence[str], pattern: str) -> list[Case]:
    """In the order of the file, so that a problem's inputs are made once."""
    every = (Case(p, operation, output, threads) for p in problems for operation in p.operations for output in outputs)
    return [case for case in every if re.search(pattern, case.name)]


# ---- One row ---------------------------------------------------------------------------------------------------------


def calls_per_round(seconds: float, settings: Settings) -> int:
    return max(1, min(100_000, math.ceil(settings.seconds / max(seconds, 1e-9))))


def measure(case: Case, workers: dict[str, Worker], values: Path, settings: Settings) -> Row:
    """Prepare all, then rounds in turn. The order rotates: no library always follows the same other one."""
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for library, worker in workers.items():
        answer = worker.prepare(case.problem, case.operation, case.output == "out", values)
        if "seconds" in answer:
            seconds[library] = answer["seconds"]
        else:
            left_out[library] = answer.get("left_out") or f"WRONG RESULT: {answer['wrong']}"
    if OURS not in seconds:
        raise SystemExit(f"{case.name}: lanenorm: {left_out[OURS]}")
    workers[OURS].ask("run", calls=1, copy=True)
    seconds[COPY] = min(workers[OURS].ask("run", calls=1, copy=True)["real"] for _ in range(3))
    calls = {name: calls_per_round(each, settings) for name, each in seconds.items()}
    samples: dict[str, list[Row]] = {name: [] for name in seconds}
    spent = dict.fromkeys(seconds, 0.0)
    order = list(seconds)
    for number in range(settings.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            if spent[name] > settings.budget and number >= 3:
                continue
            library = OURS if name == COPY else name
            answer = workers[library].ask("run", calls=calls[name], copy=name == COPY)
            samples[name].append(answer)
            spent[name] += answer["real"] * (calls[name] + 1)
    return row_of(case, calls, samples, left_out)


def row_of(case: Case, calls: dict[str, int], samples: dict[str, list[Row]], left_out: dict[str, str]) -> Row:
    real = {name: [answer["real"] for answer in answers] for name, answers in samples.items()}
    p = case.problem
    return {
        "name": case.name,
        "family": p.family,
        "operation": case.operation,
        "shape": p.shape_text,
        "layout": p.layout if len(p.shape) > 2 else "",
        "dtype": p.dtype,
        "output": case.output,
        "threads": case.threads,
        "bytes": case.moved_bytes,
        "copies": median_ratio(real[OURS], real[COPY]),
        "ratios": {name: median_ratio(real[name], real[OURS]) for name in real if name not in (OURS, COPY)},
        "libraries": {
            name: summarize(real[name])
            | {
                "cpu": summarize([answer["cpu"] for answer in samples[name]])["median"],
                "calls": calls[name],
                "rounds": len(real[name]),
            }
            for name in real
        },
        "left_out": left_out,
    }


# ---- All rows --------------------------------------------------------------------------------------------------------


class Pool:
    """The workers for one number of threads; one that died is started again for the next case."""

    def __init__(self, libraries: Sequence[str], threads: int, isa: str | None):
        self.libraries, self.threads, self.isa = libraries, threads, isa
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def ready(self) -> dict[str, Worker]:
        for library in self.libraries:
            if library not in self.workers or self.workers[library].process.poll() is not None:
                self.workers[library] = Worker(library, self.threads, self.isa)
        return {library: self.workers[library] for library in self.libraries}

    def measure(self, case: Case, values: Path, settings: Settings) -> Row:
        """Measure; a peer that dies of the case (out of memory, a crash) is left out of it."""
        dead: dict[str, str] = {}
        while True:
            alive = {name: worker for name, worker in self.ready().items() if name not in dead}
            try:
                row = measure(case, alive, values, settings)
            except WorkerDiedError as error:
                name = next(name for name, worker in alive.items() if worker.process.poll() is not None)
                if name == OURS:
                    raise
                dead[name] = str(error)
                continue
            row["left_out"] |= dead
            return row


def missing_dtype(problem: Problem) -> bool:
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return problem.dtype == "bfloat16"
    return False


def run(todo: Sequence[Case], libraries: Sequence[str], settings: Settings, isa: str | None) -> Iterator[Row]:
    """Measure the cases, threads by threads; shows one progress bar."""
    with tempfile.TemporaryDirectory() as folder, progress(len(todo), "rows") as bar:
        values = Path(folder) / "exact.npz"
        for threads in sorted({case.threads for case in todo}):
            known: Problem | None = None
            with Pool(libraries, threads, isa) as pool:
                pool.ready()
                for case in (case for case in todo if case.threads == threads):
                    bar.set_description(case.name, refresh=True)
                    if case.problem != known:
                        np.savez(values, **exact(case.problem, make_inputs(case.problem)))
                        known = case.problem
                    row = pool.measure(case, values, settings)
                    for name, reason in row["left_out"].items():
                        if reason.startswith("WRONG"):
                            bar.write(f"{case.name}: {name}: {reason}", file=sys.stderr)
                    yield row
                    bar.update()


def isa_in_use(isa: str | None) -> str:
    """What lanenorm's process says. An unknown LANENORM_ISA is refused here, before anything is measured."""
    worker = Worker(OURS, 1, isa)
    worker.close()
    return worker.details["isa"]


def resumed(path: Path, now: dict[str, Any]) -> list[Row]:
    """Rows measured before, if under the same conditions; nothing where there is no such file."""
    if not path.is_file():
        return []
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    before = json.loads(first)["context"]
    changed = [name for name in SAME if before[name] != now[name]]
    if changed:
        raise SystemExit(f"--resume: {', '.join(changed)} differ from those of {path.name}: start anew without it")
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short when the run was
            break
    return rows


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    processors = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one or two problems per family, few rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the arrays lie")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (1 and all processors; quick: 1)")
    rivals = [name for name in PEERS | compare_cuda.peers_cuda.PEERS if name not in (OURS, COPY)]
    parser.add_argument("--peers", nargs="*", choices=rivals, help="only these")
    parser.add_argument("--outputs", nargs="+", choices=["fresh", "out"], help="allocated by a call, or reused (both)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose name matches, see --list")
    parser.add_argument("--isa", help="LANENORM_ISA for lanenorm's process: avx512, avx2, portable")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="bench/results by default")
    parser.add_argument("--resume", action="store_true", help="go on after the rows of compare.jsonl in DIR")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--problems", type=Path, default=PROBLEMS, metavar="FILE", help="bench/problems.txt by default")
    arguments = parser.parse_args(argv)
    arguments.threads = arguments.threads or ([1] if arguments.quick else sorted({1, processors}))
    arguments.outputs = arguments.outputs or (["fresh"] if arguments.quick else ["fresh", "out"])
    if not all(1 <= threads <= processors for threads in arguments.threads):
        parser.error(f"--threads: this process may use {processors} processors")
    return arguments


def on_cuda(arguments: argparse.Namespace, problems: Sequence[Problem], argv: Sequence[str]) -> int:
    """--device cuda."""
    if arguments.quick:
        problems = quick_problems(problems)
    todo = [case for case in compare_cuda.cases(problems) if re.search(arguments.filter, case.name)]
    if arguments.list:
        print("\n".join(case.name for case in todo))
        return 0
    if not todo:
        print(f"no row matches {arguments.filter!r}", file=sys.stderr)
        return 1
    if reason := lanenorm.cuda_unavailable_reason():
        print(f"--device cuda: {reason}", file=sys.stderr)
        return 1
    wanted = None if arguments.peers is None else {OURS, COPY, *arguments.peers}
    names = [name for name in compare_cuda.peers_cuda.installed() if wanted is None or name in wanted]
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = compare_cuda.QUICK if arguments.quick else compare_cuda.Settings()
    print(compare_cuda.compare(todo, names, settings, arguments.output, argv))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    settings = QUICK if arguments.quick else Settings()
    problems = [p for p in parse_problems(arguments.problems.read_text(encoding="utf-8")) if not missing_dtype(p)]
    if arguments.device == "cuda":
        return on_cuda(arguments, problems, sys.argv[1:] if argv is None else argv)
    if arguments.quick:
        wanted = {case.problem for case in cases(problems, arguments.threads[0], ("fresh", "out"), arguments.filter)}
        problems = quick_problems([problem for problem in problems if problem in wanted])
    todo = [c for n in arguments.threads for c in cases(problems, n, arguments.outputs, arguments.filter)]
    if arguments.list:
        print("\n".join(case.name for case in todo))
        return 0
    if not todo:
        print(f"no row matches {arguments.filter!r}", file=sys.stderr)
        return 1
    libraries = [name for name in installed() if name == OURS or arguments.peers is None or name in arguments.peers]
    now = context("compare.py", sys.argv[1:] if argv is None else argv)
    now["isa"] = isa_in_use(arguments.isa)
    now["settings"] = vars(settings) | {"peers": libraries[1:]}
    stem = arguments.output / (f"compare-{arguments.isa}" if arguments.isa else "compare")
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = stem.with_suffix(".jsonl")
    rows = resumed(log, now) if arguments.resume else []
    log.write_text("".join(json.dumps(line) + "\n" for line in [{"context": now}, *rows]), encoding="utf-8")
    done = {row["name"] for row in rows}
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        for row in run([case for case in todo if case.name not in done], libraries, settings, arguments.isa):
            print(json.dumps(row), file=file, flush=True)
            rows.append(row)
    now["seconds"] = round(time.perf_counter() - began, 1)
    place = {name: index for index, name in enumerate(case.name for case in todo)}
    rows.sort(key=lambda row: place.get(row["name"], len(place)))
    print(report.write(stem, now, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
