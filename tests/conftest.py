"""Fixtures shared by all tests: instruction sets, threads, random numbers, subprocesses."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from cuda_places import Emulated, OnGpu

import lanenorm

ROOT = Path(__file__).parent.parent
THREAD_COUNTS = (1, 2, 3, 5, 8)


@pytest.fixture
def rng(request):
    """A generator whose seed is the name of the test: the same numbers whatever else runs, other ones elsewhere."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def _process_settings():
    """Every test starts from, and leaves behind, the settings the process started with."""
    threads, isa = lanenorm.get_num_threads(), lanenorm.use_isa(lanenorm.available_isas()[-1])
    lanenorm.use_isa(isa)
    yield
    lanenorm.set_num_threads(threads)
    lanenorm.use_isa(isa)


@pytest.fixture(params=lanenorm.available_isas())
def isa(request):
    """Every instruction set that can run here, in use during the test."""
    lanenorm.use_isa(request.param)
    return request.param


@pytest.fixture(params=THREAD_COUNTS, ids=lambda n: f"{n}threads")
def threads(request):
    """Several numbers of threads, in use during the test; more than this machine has processors among them."""
    lanenorm.set_num_threads(request.param)
    return request.param


@pytest.fixture
def run_python():
    """Run Python code in a process of its own; returns the completed process."""

    def run(code, *arguments, check=True, timeout=120, **environment):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LANENORM_", "OMP_NUM"))}
        command = [sys.executable, "-c", code] if not code.startswith("-") else [sys.executable, *code.split()]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=timeout, env=env | environment, check=False
        )
        assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture(
    params=[
        pytest.param(Emulated, marks=pytest.mark.cuda_on_host, id="emulated"),
        pytest.param(OnGpu, marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request):
    """Where the kernels run; an emulated one is an H200 again afterwards."""
    place = request.param()
    yield place
    if place.emulated:
        place.library.set_device()
        place.library.set_schedule("forward")


@pytest.fixture
def emulated():
    """The emulated device, for tests that change its limits."""
    place = Emulated()
    yield place
    place.library.set_device()
    place.library.set_schedule("forward")


def tool(name):
    """Path of a program: beside this Python first, then on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"no {name} here")
    return found


@pytest.fixture(scope="session")
def cpp_build(tmp_path_factory):
    """Build folder of the C++ library and its tests, without optimization: the symbol check needs that.

    cmake and ninja come from PyPI (extra "test"), so that `pytest` needs nothing but a compiler. The optimized code is
    what all the Python tests run, and the sanitized stages of .ci/run build these tests optimized.
    """
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitized run builds and runs the C++ tests itself")
    build = tmp_path_factory.mktemp("cpp")
    for command in (
        [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            *("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"),
            *("-DLANENORM_BUILD_TESTS=ON", "-DLANENORM_BUILD_PYTHON=OFF", "-DLANENORM_CUDA=OFF"),
        ],
        [tool("cmake"), "--build", str(build), "--parallel"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    return build
