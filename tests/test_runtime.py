"""Threads, instruction sets, environment, command line, and what an import brings in."""

import hashlib
import os
import re

import numpy as np
import pytest
import reference
from cases import by_dtype, normal

import lanenorm

# ---- Threads --------------------------------------------------------------------------------------------------------


def test_set_num_threads_returns_the_number_before():
    before = lanenorm.get_num_threads()
    assert lanenorm.set_num_threads(3) == before
    assert lanenorm.get_num_threads() == 3
    assert lanenorm.set_num_threads(np.int64(1)) == 3
    assert lanenorm.get_num_threads() == 1


@pytest.mark.parametrize("n", [0, -1, -(2**31)])
def test_set_num_threads_refuses_numbers_below_one(n):
    before = lanenorm.get_num_threads()
    with pytest.raises(ValueError, match=rf"set_num_threads: n is {n}, expected at least 1"):
        lanenorm.set_num_threads(n)
    assert lanenorm.get_num_threads() == before


@pytest.mark.parametrize("n", [1.0, "2", None, True, [1]], ids=repr)
def test_set_num_threads_refuses_what_is_no_integer(n):
    with pytest.raises(TypeError, match=rf"set_num_threads: n has type {type(n).__name__}, expected int"):
        lanenorm.set_num_threads(n)


def test_num_threads_goes_back_also_after_an_exception():
    before = lanenorm.get_num_threads()
    with lanenorm.num_threads(4):
        assert lanenorm.get_num_threads() == 4
        with lanenorm.num_threads(2):
            assert lanenorm.get_num_threads() == 2
        assert lanenorm.get_num_threads() == 4
    with pytest.raises(KeyError), lanenorm.num_threads(5):
        raise KeyError
    assert lanenorm.get_num_threads() == before
    with pytest.raises(ValueError, match="num_threads"), lanenorm.num_threads(0):
        pass


def test_many_threads_are_allowed(rng):
    """More than processors, and more than pieces of work."""
    lanenorm.set_num_threads(64)
    x = normal(rng, (300, 1024), np.float32)
    exact = reference.layer_norm(x)
    reference.check("normalized", lanenorm.layer_norm(x), exact.normalized, exact.largest)


PRINT_THREADS = "import lanenorm; print(lanenorm.get_num_threads())"


def test_threads_from_the_environment(run_python):
    assert run_python(PRINT_THREADS, LANENORM_NUM_THREADS="3", OMP_NUM_THREADS="2").stdout == "3\n"
    assert run_python(PRINT_THREADS, OMP_NUM_THREADS="2").stdout == "2\n"


def test_threads_by_affinity(run_python):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + PRINT_THREADS
    assert run_python(code).stdout == "1\n"
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= int(run_python(PRINT_THREADS).stdout) <= allowed


# ---- Instruction sets -----------------------------------------------------------------------------------------------


def test_available_isas_end_with_portable():
    isas = lanenorm.available_isas()
    assert isas[-1] == "portable"
    assert len(set(isas)) == len(isas)
    assert set(isas) <= {"avx512", "avx2", "neon", "portable"}


def test_available_isas_are_those_of_the_processor():
    with open("/proc/cpuinfo") as file:
        flags = set(re.findall(r"\w+", "".join(line for line in file if line.startswith("flags"))))
    isas = lanenorm.available_isas()
    if "avx2" in isas:
        assert {"avx2", "fma", "f16c"} <= flags
    if "avx512" in isas:
        assert {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags


def test_use_isa_returns_the_one_before():
    isas = lanenorm.available_isas()
    lanenorm.use_isa(isas[0])
    for before, isa in zip(isas, isas[1:] + isas[:1], strict=True):
        assert lanenorm.use_isa(isa) == before


def test_use_isa_refuses_unknown_names():
    before = lanenorm.use_isa("portable")
    with pytest.raises(ValueError, match=r"sse9.*portable"):
        lanenorm.use_isa("sse9")
    with pytest.raises(ValueError, match="portable"):
        lanenorm.use_isa("")
    with pytest.raises(TypeError, match="use_isa: name has type int, expected str"):
        lanenorm.use_isa(2)
    assert lanenorm.use_isa(before) == "portable"


def test_isa_from_the_environment(run_python):
    code = "import lanenorm; print(lanenorm.use_isa('portable'))"
    for isa in lanenorm.available_isas():
        assert run_python(code, LANENORM_ISA=isa).stdout == f"{isa}\n"
    assert run_python(code).stdout == f"{lanenorm.available_isas()[0]}\n"


def test_unknown_isa_in_the_environment_is_an_error_at_first_use(run_python):
    """The import works, so that show_runtime can say what is wrong; the first call does not."""
    code = """
import numpy as np, lanenorm
for call in (lambda: lanenorm.layer_norm(np.ones((2, 3), np.float32)), lambda: lanenorm.use_isa("portable")):
    try:
        call()
    except ValueError as error:
        print(error)
        break
lanenorm.show_runtime()
"""
    done = run_python(code, LANENORM_ISA="sse9")
    first, *rest = done.stdout.splitlines()
    assert "sse9" in first
    assert "portable" in first
    assert any("sse9" in line for line in rest)


# ---- What there is --------------------------------------------------------------------------------------------------


def test_show_runtime_prints_what_a_bug_report_needs(capsys):
    lanenorm.set_num_threads(3)
    isa = lanenorm.use_isa("portable")
    lanenorm.use_isa(isa)
    lanenorm.show_runtime()
    out = capsys.readouterr().out
    for part in (lanenorm.__version__, isa, *lanenorm.available_isas(), "3", np.__version__, "CUDA", "ompiler"):
        assert part in out


def test_cuda_reason_is_given_exactly_where_cuda_is_not_available():
    reason = lanenorm.cuda_unavailable_reason()
    assert lanenorm.cuda_available() == (reason is None)
    assert reason is None or "CUDA" in reason


# ---- Command line ---------------------------------------------------------------------------------------------------


def test_command_info(run_python):
    out = run_python("-m lanenorm info", LANENORM_NUM_THREADS="3").stdout
    assert lanenorm.__version__ in out
    assert "portable" in out
    assert "LANENORM_NUM_THREADS=3" in out


def test_command_version(run_python):
    assert run_python("-m lanenorm --version").stdout == f"lanenorm {lanenorm.__version__}\n"


def test_command_check(run_python):
    """Every usable instruction set, both norms, both directions, every dtype; a verdict a line."""
    out = run_python("-m lanenorm check", timeout=300).stdout
    for isa in lanenorm.available_isas():
        for norm in ("layer_norm", "batch_norm"):
            for direction in ("forward", "backward"):
                for dtype in ("float16", "float32", "float64"):
                    assert re.search(rf"^{isa} +{norm} +{direction} +{dtype} +ok\b", out, re.M), out
    assert "FAILED" not in out


def test_command_check_takes_arrays_to_the_gpu_and_back(capsys):
    """With a stand-in for CuPy that says what it is asked."""
    from lanenorm import check

    class CuPy:
        taken, returned = 0, 0

        def asarray(self, array):
            self.taken += 1
            return array

        def asnumpy(self, array):
            self.returned += 1
            return array

    cupy = CuPy()
    layer = [case for case in check.cases(np.dtype(np.float32), 0.0) if case.norm == "layer_norm"]
    assert check.check_isa("cuda", layer, hashlib.sha256(), cupy)
    assert (cupy.taken, cupy.returned) == (3 * len(layer), 4 * len(layer))
    assert re.search(r"^cuda +layer_norm +backward +float32 +ok\b", capsys.readouterr().out, re.M)


def test_command_check_fails_where_a_kernel_is_wrong(run_python):
    """It has teeth: a result that is off by a millionth is an error, and the exit code says so."""
    code = """
import sys
import numpy as np, lanenorm
from lanenorm import __main__
right = lanenorm.layer_norm_forward
def wrong(x, *args, **kwargs):
    y, mean, rstd = right(x, *args, **kwargs)
    return lanenorm.NormForward((y.astype(np.float64) * 1.000001).astype(y.dtype), mean, rstd)
lanenorm.layer_norm_forward = wrong
sys.exit(__main__.main(["check"]))
"""
    done = run_python(code, check=False, timeout=300)
    assert done.returncode == 1
    assert re.search(r"layer_norm +forward +float32 +FAILED", done.stdout)
    assert re.search(r"batch_norm +forward +float32 +ok", done.stdout)


def test_command_line_refuses_unknown_commands(run_python):
    for arguments in ("", "frobnicate", "info --frobnicate"):
        done = run_python(f"-m lanenorm {arguments}", check=False)
        assert done.returncode == 2
        assert "info" in done.stderr
        assert not done.stdout


# ---- Import ---------------------------------------------------------------------------------------------------------


def test_import_needs_numpy_only(run_python):
    """Nothing optional is imported, also by a first call, though it may be installed."""
    code = """
import sys
import numpy as np
before = set(sys.modules)
import lanenorm
lanenorm.LayerNorm(3)(np.ones((2, 3), np.float32))
lanenorm.batch_norm_forward(np.ones((2, 3), np.float64))
new = {name.partition(".")[0] for name in set(sys.modules) - before}
optional = {"cupy", "matplotlib", "torch", "sklearn", "ml_dtypes", "scipy", "pandas", "tqdm", "jax", "tensorflow"}
assert not new & optional, new & optional
print(*sorted(new - set(sys.stdlib_module_names)))
"""
    assert set(run_python(code).stdout.split()) <= {"lanenorm", "threadpoolctl", "numpy"}


def test_import_works_where_nothing_optional_is_installed(run_python):
    code = """
import sys
for name in ("cupy", "matplotlib", "torch", "sklearn", "ml_dtypes", "threadpoolctl", "tqdm", "scipy"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, lanenorm
print(lanenorm.layer_norm(np.array([[1, -1]], np.float32), eps=0.0))
"""
    assert run_python(code).stdout == "[[ 1. -1.]]\n"


def test_import_starts_no_threads(run_python):
    code = "import os, lanenorm; print(len(os.listdir('/proc/self/task')))"
    assert run_python(code, OPENBLAS_NUM_THREADS="1", LANENORM_NUM_THREADS="4").stdout == "1\n"


def test_float_environment_of_the_caller_is_left_alone(run_python):
    """No floating-point exception flags turned into errors, and no warnings, whatever NumPy is told to report."""
    code = """
import warnings
import numpy as np, lanenorm
warnings.simplefilter("error")
np.seterr(all="raise")
x = np.array([[1, 1, 1], [np.nan, 1, 2], [np.inf, 1, 2], [1e38, -1e38, 0], [1e-45, 0, 0]], np.float32)
y = lanenorm.layer_norm(x, eps=0.0)
assert np.isnan(y[:3]).all()
assert np.isfinite(y[3:]).all()
lanenorm.batch_norm_forward(x)
np.multiply(np.float32(3), np.float32(2))
"""
    run_python(code)


@by_dtype
def test_results_own_their_memory(rng, dtype):
    """Nothing is kept by the library that a later call could write to."""
    x = normal(rng, (20, 30), dtype)
    first = lanenorm.layer_norm_forward(x)
    kept = [a.tobytes() for a in first]
    for other in range(5):
        lanenorm.layer_norm_forward(normal(rng, (20, 30), dtype, other))
    assert [a.tobytes() for a in first] == kept
    assert all(a.flags.owndata and a.flags.writeable for a in first)
