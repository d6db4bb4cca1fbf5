"""A process that holds one library and calls it when it is told to; both ends of the pipe.

Every library has a process of its own, so that no thread pool, allocator or environment variable of one reaches
another. Orders and answers are JSON, one a line:

    {"do": "hello"}                                     -> {"details": {...}}
    {"do": "prepare", problem, operation, reuse, exact} -> {"seconds": of a call} | {"left_out": why} | {"wrong": what}
    {"do": "run", "calls": n, "copy": bool}             -> {"real": seconds a call, "cpu": seconds a call}
    {"do": "sample", "calls": n}                        -> {"times": [seconds, ...]}

Between orders the process is stopped (SIGSTOP): the threads of OpenMP and others spin for a while after a call, and
would do so on the processors that the next library is timed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Problem, plain, problem_from

Answer = dict[str, Any]


# ---- The end that orders ---------------------------------------------------------------------------------------------


class WorkerDiedError(Exception):
    """The process has ended; the text is the end of what it wrote to its standard error stream."""


class Worker:
    """A library in its own process, on `threads` of the processors this process may use."""

    def __init__(self, library: str, threads: int, isa: str | None = None):
        usable = sorted(os.sched_getaffinity(0))
        self.library, self.messages = library, tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LANENORM_")}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        if isa and library == "lanenorm":
            environment["LANENORM_ISA"] = isa
        os.sched_setaffinity(0, usable[-threads:])  # inherited, so that pools sized by it at load see it
        try:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), library, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.messages,
                env=environment,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, usable)
        try:
            self.details = self.ask("hello")["details"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **order: Any) -> Answer:
        """Wake the process, have one order carried out, stop it again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.send_signal(signal.SIGCONT)
            print(json.dumps({"do": do, **order}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ProcessLookupError):
            answer = ""
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)  # its pipe is closed: it is about to end by itself
            self.process.kill()
            self.process.wait()
            self.messages.seek(0)
            written = self.messages.read()[-2000:].decode(errors="replace").strip()
            self.close()
            raise WorkerDiedError(f"{self.library}: its process ended with {self.process.returncode}: {written}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def prepare(self, problem: Problem, operation: str, reuse: bool, exact: Path) -> Answer:
        return self.ask("prepare", problem=plain(problem), operation=operation, reuse=reuse, exact=str(exact))

    def close(self) -> None:
        self.process.kill()  # also where it is stopped
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.messages):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


# ---- The end that obeys ----------------------------------------------------------------------------------------------


class Holder:
    """The library and what it is to call next."""

    def __init__(self, library: str, threads: int):
        import numpy as np
        from peers import PEERS

        self.peer = PEERS[library](threads)
        self.copyto, self.empty_like = np.copyto, np.zeros_like
        self.problem: Problem | None = None
        self.inputs: Any = None
        self.call: Callable[[], Any] = lambda: None
        self.copied: Any = None

    def hello(self) -> Answer:
        return {"details": self.peer.details}

    def prepare(self, problem: dict[str, Any], operation: str, reuse: bool, exact: str) -> Answer:
        """Call once, hold the result against `exact`, and say how long a call takes (the shortest of up to three)."""
        import numpy as np
        from data import check, make_inputs
        from peers import UnsupportedError

        self.call = lambda: None  # lets go of the arrays of the case before
        wanted = problem_from(problem)
        try:
            if wanted != self.problem:
                self.inputs, self.problem, self.copied = None, None, None
                self.inputs, self.problem = make_inputs(wanted), wanted
            self.call = self.peer.call(operation, self.inputs, wanted, reuse)
            with np.load(exact) as values:
                complaint = check(operation, wanted.dtype, self.peer.arrays(self.call()), dict(values))
        except UnsupportedError as reason:
            return {"left_out": str(reason)}
        except Exception as error:  # whatever a library raises where it does not know a dtype or shape
            return {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        if complaint:
            return {"wrong": complaint}
        seconds, _ = timed(self.call, 1)
        repeats = 2 if seconds < 0.05 else 0  # a short call may have been the unlucky one
        return {"seconds": min([seconds, *(timed(self.call, 1)[0] for _ in range(repeats))])}

    def run(self, calls: int, copy: bool = False) -> Answer:
        call = self.call
        if copy:
            if self.copied is None:
                self.copied = self.empty_like(self.inputs.x)
            call = self.copy
        call()  # caches and sleeping threads: not what a call in a row of calls pays
        real, cpu = timed(call, calls)
        return {"real": real, "cpu": cpu}

    def copy(self) -> None:
        self.copyto(self.copied, self.inputs.x)

    def sample(self, calls: int) -> Answer:
        call, clock, times = self.call, time.perf_counter, []
        for _ in range(calls):
            began = clock()
            call()
            times.append(clock() - began)
        return {"times": times}


def timed(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """Seconds a call, elapsed and of processors. Every result is dropped before the next call."""
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


def main() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # a stopped process would outlive the one that orders
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    holder = Holder(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(holder, order.pop("do"))(**order)), file=channel, flush=True)


if __name__ == "__main__":
    main()
