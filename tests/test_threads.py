"""The thread pool as Python sees it: threads that call at once, forked children, Ctrl-C, threadpoolctl."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import reference
from cases import normal, parameters

import lanenorm


def work(rng, shape=(2000, 512)):
    """Arrays above what one thread does alone, and a function of them that goes through every operation."""
    x, dy = normal(rng, shape, np.float32, 3.0), normal(rng, shape, np.float32)
    weight, bias = parameters(rng, shape[1], np.float32)

    def call():
        forward = lanenorm.layer_norm_forward(x, weight, bias)
        gradients = lanenorm.layer_norm_backward(dy, x, forward.mean, forward.rstd, weight)
        batch = lanenorm.batch_norm_forward(x, weight, bias)
        batch_gradients = lanenorm.batch_norm_backward(dy, x, batch.mean, batch.rstd, weight)
        return b"".join(a.tobytes() for a in (*forward, *gradients, *batch, *batch_gradients))

    return call


def test_threads_give_the_right_result(rng):
    """By the reference, on more threads than there are processors."""
    lanenorm.set_num_threads(8)
    x = normal(rng, (500, 700), np.float32, 3.0)
    exact = reference.layer_norm(x)
    reference.check("normalized", lanenorm.layer_norm(x), exact.normalized, exact.largest)


@pytest.mark.parametrize("pool", [1, 2, 8])
def test_eight_python_threads_at_once(rng, pool):
    """Only one at a time can have the pool, the others work alone: the same bits for all."""
    lanenorm.set_num_threads(pool)
    calls = [work(rng) for _ in range(8)]
    expected = [call() for call in calls]
    barrier, wrong = threading.Barrier(8), []

    def run(number):
        try:
            barrier.wait()
            wrong.extend(number for _ in range(4) if calls[number]() != expected[number])
        except BaseException:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_python_threads_that_end_leave_the_pool_usable(rng):
    lanenorm.set_num_threads(3)
    call = work(rng)
    expected, results = call(), []
    for _ in range(5):
        thread = threading.Thread(target=lambda: results.append(call()))
        thread.start()
        thread.join()
    assert results == [expected] * 5


def test_changing_the_number_of_threads_between_calls(rng):
    call = work(rng)
    expected = call()
    for n in (1, 8, 2, 5, 1, 3, 8):
        lanenorm.set_num_threads(n)
        assert call() == expected


def test_changing_the_number_of_threads_during_calls(rng):
    call = work(rng)
    expected = call()
    done = threading.Event()

    def change():
        for n in range(10**9):
            if done.is_set():
                return
            lanenorm.set_num_threads(n % 5 + 1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(call() == expected for _ in range(20))
    finally:
        done.set()
        thread.join()


def test_errors_on_threads_are_those_of_the_caller(rng):
    """A refused call among others, at once."""
    lanenorm.set_num_threads(4)
    call = work(rng)
    expected, outcomes = call(), []

    def refused():
        for _ in range(20):
            try:
                lanenorm.layer_norm(np.ones((2, 8), np.float32), np.ones(5, np.float32))
            except ValueError as error:
                outcomes.append(str(error))

    thread = threading.Thread(target=refused)
    thread.start()
    assert all(call() == expected for _ in range(5))
    thread.join()
    assert len(outcomes) == 20


# ---- Fork -----------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading
import numpy as np, lanenorm
lanenorm.set_num_threads(4)
x = np.random.default_rng(0).standard_normal((3000, 512), dtype=np.float32)
expected = lanenorm.layer_norm(x)
busy = int(sys.argv[1])
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        lanenorm.layer_norm(x)
thread = threading.Thread(target=keep_busy)
if busy:
    thread.start()
children = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs ends by itself, and badly
        same = all(np.array_equal(lanenorm.layer_norm(x), expected) for _ in range(2))
        os._exit(0 if same and lanenorm.get_num_threads() == 4 else 1)
    children.append(child)
    assert np.array_equal(lanenorm.layer_norm(x), expected)
statuses = [os.waitpid(child, 0)[1] for child in children]
stop.set()
if busy:
    thread.join()
assert statuses == [0] * 20, statuses
"""


@pytest.mark.parametrize("busy", [0, 1], ids=["idle", "busy"])
def test_twenty_forked_children(run_python, busy):
    """Each with a fresh pool and the same bits; also where another Python thread is in a call while we fork."""
    run_python(FORK, str(busy), PYTHONWARNINGS="ignore::DeprecationWarning")


def test_fork_of_a_fork(run_python):
    code = """
import os, signal
import numpy as np, lanenorm
lanenorm.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((3000, 512), dtype=np.float32)
expected = lanenorm.layer_norm(x)
for generation in range(4):
    child = os.fork()
    if child:
        os._exit(0 if os.waitpid(child, 0)[1] == 0 and np.array_equal(lanenorm.layer_norm(x), expected) else 1)
    signal.alarm(60)
    assert np.array_equal(lanenorm.layer_norm(x), expected)
"""
    run_python(code, PYTHONWARNINGS="ignore::DeprecationWarning")


def test_multiprocessing_with_fork(run_python):
    code = """
import multiprocessing, sys
import numpy as np, lanenorm
x = np.random.default_rng(0).standard_normal((2000, 512), dtype=np.float32)
def run(n):
    lanenorm.set_num_threads(n)
    return lanenorm.layer_norm(x).tobytes()
if __name__ == "__main__":
    expected = run(2)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(got == expected for got in pool.map(run, [1, 2, 3, 4, 5, 6]))
"""
    run_python(code, PYTHONWARNINGS="ignore::DeprecationWarning")


@pytest.mark.parametrize(("rows", "callers"), [(64, 6), (4000, 1), (40000, 2)])
def test_interpreter_ends_while_threads_are_parked_or_working(run_python, rows, callers):
    """No hang and no crash at exit, with daemon threads in the middle of a call, or asking for Ctrl-C in a long one."""
    code = """
import sys, threading
import numpy as np, lanenorm
lanenorm.set_num_threads(4)
x = np.ones((int(sys.argv[1]), 1024), np.float32)
lanenorm.layer_norm(x)
started = threading.Event()
def run():
    while True:
        lanenorm.layer_norm(x)
        started.set()
for _ in range(int(sys.argv[2])):
    threading.Thread(target=run, daemon=True).start()
started.wait()
"""
    run_python(code, str(rows), str(callers))


@pytest.mark.parametrize("after", ["0.1", "0.12"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_call_that_outlives_the_interpreter(run_python, threads, after):
    """Long calls ask for the GIL, to see about Ctrl-C, of an interpreter that is gone while its process is not yet."""
    code = """
import ctypes, sys, threading, time
import numpy as np, lanenorm
libc = ctypes.CDLL(None)
if not hasattr(libc, "on_exit"):
    sys.exit(1)
libc.on_exit(libc.sleep, None)  # sleep(exit code), after Python's end
lanenorm.set_num_threads(int(sys.argv[1]))
lanenorm.use_isa("portable")
x = np.broadcast_to(np.ones((1, 64, 12000), np.float32), (8000, 64, 12000))
for _ in range(10):  # each asks every 50 ms: some before, some during, some after the interpreter's end
    threading.Thread(target=lanenorm.layer_norm_forward, args=(x,), kwargs={"axis": (1, 2)}, daemon=True).start()
    time.sleep(0.005)
time.sleep(float(sys.argv[2]))
sys.exit(1)
"""
    done = run_python(code, threads, after, check=False)
    assert done.returncode == 1, f"exit code {done.returncode}\n{done.stderr}"


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

INTERRUPT = """
import sys, threading, os, signal, time
import numpy as np, lanenorm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
lanenorm.set_num_threads(int(sys.argv[1]))
lanenorm.use_isa("portable")
# one call over 6e9 elements of a 3 MB array: minutes, unless it is stopped
operation = sys.argv[2]
row = np.random.default_rng(0).standard_normal((1, 64, 12000), dtype=np.float32)
x = np.broadcast_to(row, (8000, 64, 12000))
small = np.empty(0, np.float32)
running = np.full(64, 5, np.float32), np.full(64, 7, np.float32)
stats = np.zeros(64, np.float32), np.ones(64, np.float32)
kwargs = dict(running_mean=running[0], running_var=running[1])
print("ready", flush=True)
try:
    if operation == "forward":
        lanenorm.batch_norm_forward(x, **kwargs)
    else:
        lanenorm.layer_norm_forward(x, axis=(1, 2))
except KeyboardInterrupt:
    assert (running[0] == 5).all() and (running[1] == 7).all()
    good = np.array([[1, -1]], np.float32)
    assert (lanenorm.layer_norm(good, eps=0.0) == good).all()
    y = lanenorm.layer_norm(row)  # and the pool still works
    assert np.isfinite(y).all()
    print("interrupted", flush=True)
    sys.exit(3)
print("finished", flush=True)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", ["forward", "layer"])
def test_ctrl_c_stops_a_long_call(threads, operation):
    """KeyboardInterrupt out of the middle of a call; running statistics, written last, are untouched.

    The output has 24 GB of address space of which next to nothing is touched before the signal arrives.
    """
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPT, str(threads), operation],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            time.sleep(0.5)  # into the call
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    if "MemoryError" in error:
        pytest.skip("not enough address space")
    assert process.returncode == 3, out + error
    assert out == "interrupted\n"


def test_signal_handler_that_does_not_raise_lets_the_call_finish(run_python):
    """SIGALRM with a handler of Python's: it runs, and the result is whole."""
    code = """
import signal
import numpy as np, lanenorm
x = np.random.default_rng(0).standard_normal((8000, 1024), dtype=np.float32)
expected = lanenorm.layer_norm(x)
rang = []
signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for _ in range(20):
    assert np.array_equal(lanenorm.layer_norm(x), expected)
signal.setitimer(signal.ITIMER_REAL, 0)
assert rang
"""
    run_python(code)


# ---- threadpoolctl --------------------------------------------------------------------------------------------------


def test_threadpoolctl_knows_the_pool():
    threadpoolctl = pytest.importorskip("threadpoolctl", minversion="3.5")
    lanenorm.set_num_threads(3)
    ours = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "lanenorm"]
    assert len(ours) == 1
    assert ours[0]["num_threads"] == 3
    assert ours[0]["version"] == lanenorm.__version__
    with threadpoolctl.threadpool_limits(1):
        assert lanenorm.get_num_threads() == 1
    assert lanenorm.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(2, user_api="lanenorm"):
        assert lanenorm.get_num_threads() == 2
    assert lanenorm.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        assert lanenorm.get_num_threads() == 3


def test_gil_is_released_during_long_calls(rng):
    """Another Python thread gets on while a call works."""
    lanenorm.set_num_threads(1)
    x = normal(rng, (4000, 1024), np.float32)
    beats, stop = [], threading.Event()

    def beat():
        while not stop.is_set():
            beats.append(os.getpid())
            time.sleep(0)

    thread = threading.Thread(target=beat)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e4)  # nobody is made to hand over the lock: only a call that releases it lets others run
        thread.start()
        before = len(beats)
        for _ in range(5):
            lanenorm.layer_norm(x)
        assert len(beats) > before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
