"""<lanenorm/cuda.hpp>: the programs of tests/cpp/example for the GPU, on emulated kernels and a runtime that has one
device in the memory of the host, and linked with the library where it was built with CUDA.
"""

import re
import subprocess
from pathlib import Path

import cpp_operations
import numpy as np
import pytest
from conftest import ROOT, tool
from test_cpp_package import EXAMPLE, built, configure

import lanenorm

PACKAGE = Path(lanenorm.__file__).parent
STAND_IN = ROOT / "tests" / "cuda_module_on_host"


# ---- Emulated -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated_program(tmp_path_factory):
    """Builds a program of tests/cpp/example with what is beneath <lanenorm/cuda.hpp>."""
    tool("g++")
    from cuda_on_host.build import HERE, Builder, execute

    generated = tmp_path_factory.mktemp("include")
    version = dict(zip(("MAJOR", "MINOR", "PATCH"), lanenorm.__version__.split("."), strict=True), FULL="0")
    template = (ROOT / "cpp/include/lanenorm/version.hpp.in").read_text(encoding="utf-8")
    text = re.sub(r"@PROJECT_VERSION_?(\w*)@", lambda match: version[match[1] or "FULL"], template)
    (generated / "lanenorm").mkdir()
    (generated / "lanenorm/version.hpp").write_text(text)
    builder = Builder()
    builder.includes += (ROOT / "cpp/include", generated, STAND_IN)

    def run(name):
        library = [ROOT / file for file in ("cuda/api.cpp", "cuda/runtime.cpp", "cpp/core/interface.cpp")]
        program = builder.program(*builder.kernels(), *library, HERE / "runtime.cpp", EXAMPLE / name)
        done = execute(program)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def results(emulated_program):
    return cpp_operations.printed(emulated_program("cuda_operations.cpp").splitlines())


@pytest.mark.cuda_on_host
def test_cpp_cuda_runs_the_example(emulated_program):
    """Rows of 10⁶ and 10⁶ + 2 by turns: mean 10⁶ + 1, y = ∓1 / sqrt(1 + 1e-5)."""
    assert emulated_program("cuda.cpp") == "mean 1e+06, y -0.999995 0.999995 ...\n"


@pytest.mark.cuda_on_host
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_cpp_cuda_operations_give_the_bits_of_python(results, norm, dtype):
    """Twice: with workspace of the library, and with that of the caller."""
    import cuda_on_host

    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    expected = cpp_operations.expected(cuda_on_host, norm, kind)
    lines = [rest for rest in results[norm] if rest.startswith(f"{dtype} ")]
    half = len(lines) // 2
    assert half == len(expected)
    for part in (lines[:half], lines[half:]):
        assert cpp_operations.of_dtype(part, dtype) == expected


@pytest.mark.cuda_on_host
def test_cpp_cuda_workspace_is_the_callers(results):
    assert results["lent"] == ["1"]


@pytest.mark.cuda_on_host
def test_cpp_cuda_failures_name_the_operation(results):
    assert results["error"] == [
        "layer_norm: weight has shape (5,), expected (8,), axis -1 of x (2, 8)",
        "layer_norm: cudaSetDevice failed: cudaErrorInvalidDevice (a text)",
        "nothing left to lend",
    ]
    assert results["device"] == ["0"]


def test_cpp_cuda_header_needs_no_header_of_cuda(tmp_path):
    """Its users compile without the toolkit, also beside CUDA's own declaration of a stream."""
    text = (ROOT / "cpp/include/lanenorm/cuda.hpp").read_text(encoding="utf-8")
    assert re.findall(r'^#include [<"]([^>"]+)', text, re.M) == [
        *("cstddef", "functional", "optional", "string", "lanenorm/lanenorm.hpp"),
    ]
    assert not re.search(r"^\s*#\s*define", text, re.M)


# ---- Linked ---------------------------------------------------------------------------------------------------------


def test_cpp_cuda_links_with_the_package(tmp_path):
    """Components cpu and cuda of what is installed; the programs say why they cannot run where they cannot."""
    if not (PACKAGE / "lib/cmake/lanenorm/lanenorm-cuda-targets.cmake").exists():
        pytest.skip("lanenorm was built without CUDA, or without its C++ library")
    build = built(tmp_path, f"-Dlanenorm_ROOT={PACKAGE}", "-DEXAMPLE_CUDA=ON")
    for program in ("example_cuda", "cuda_operations"):
        done = subprocess.run([build / program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"^(mean 1e\+06, y -0.999995|layer_norm |(unavailable )?.*(driver|cudaError))", done.stdout)


def test_cpp_cuda_is_a_target_of_the_folder(tmp_path):
    """add_subdirectory with LANENORM_CUDA=ON, which the example asks for by name; nothing is compiled here."""
    nvcc = tool("nvcc")
    if not re.search(
        r"release (1[3-9]|[2-9]\d)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("nvcc is older than 13")
    options = (
        "-DLANENORM_CUDA=ON",
        "-DLANENORM_CUDA_ARCHITECTURES=90",
        "-DLANENORM_ISAS=portable",
        "-DEXAMPLE_CUDA=ON",
    )
    configure(EXAMPLE, tmp_path, f"-DLANENORM_SOURCE={ROOT}", *options)
    rules = (tmp_path / "build.ninja").read_text(encoding="utf-8")
    assert re.search(r"^build example_cuda: CXX_EXECUTABLE_LINKER.*liblanenorm_cuda\.a", rules, re.M)
