"""The C++ library as other projects use it: from the wheel, installed by CMake, and as a folder of their source tree.

tests/cpp/example is such a project. `example` is what the README shows; `operations` runs every operation through the
public header and prints the bytes of the results, which have to be those of Python.
"""

import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import cpp_operations
import numpy as np
import pytest
from conftest import ROOT, tool

import lanenorm

EXAMPLE = ROOT / "tests" / "cpp" / "example"
PACKAGE = Path(lanenorm.__file__).parent
HEADERS = {"dtype.hpp", "lanenorm.hpp", "version.hpp"}
# Without optimization and with one instruction set: a tenth of the time of a whole build, and the bits are the same.
QUICK = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", "-DLANENORM_ISAS=portable")


def run(*command, check=True):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    return done


def configure(source, build, *options, check=True):
    """The environment and the machine's registry of packages stay out of it: only what `options` say is found."""
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    only = ("-DCMAKE_FIND_USE_CMAKE_ENVIRONMENT_PATH=OFF", "-DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF")
    return run(tool("cmake"), "-S", source, "-B", build, *generator, *only, *options, check=check)


def built(build, *options):
    """Folder with the programs of the example."""
    configure(EXAMPLE, build, *options)
    run(tool("cmake"), "--build", build)
    return build


@pytest.fixture(scope="session")
def subdirectory(tmp_path_factory):
    """The example with lanenorm as a folder of it; also what `cmake --install` installs."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("programs without the sanitizer cannot run in a sanitized process")
    return built(tmp_path_factory.mktemp("subdirectory"), f"-DLANENORM_SOURCE={ROOT}", "-DLANENORM_INSTALL=ON", *QUICK)


@pytest.fixture(scope="session")
def prefix(subdirectory, tmp_path_factory):
    """Where `cmake --install` has put the library."""
    target = tmp_path_factory.mktemp("prefix")
    run(tool("cmake"), "--install", subdirectory / "lanenorm", "--prefix", target)
    return target


@pytest.fixture(scope="session")
def installed(prefix, tmp_path_factory):
    return built(tmp_path_factory.mktemp("installed"), f"-DCMAKE_PREFIX_PATH={prefix}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    if not (PACKAGE / "lib" / "cmake" / "lanenorm" / "lanenormConfig.cmake").exists():
        pytest.skip("lanenorm was not installed from a wheel with the C++ library")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("programs without the sanitizer cannot run in a sanitized process")
    return built(tmp_path_factory.mktemp("wheel"), f"-Dlanenorm_ROOT={PACKAGE}")


@pytest.fixture(params=["wheel", "installed", "subdirectory"])
def build(request):
    return request.getfixturevalue(request.param)


# ---- The package ----------------------------------------------------------------------------------------------------


def test_cpp_package_runs_the_example(build):
    """Rows of 10⁶ and 10⁶ + 2 by turns: mean 10⁶ + 1, y = ∓1 / sqrt(1 + 1e-5)."""
    out = run(build / "example").stdout
    pattern = rf"lanenorm {re.escape(lanenorm.__version__)} on (\w+): mean 1e\+06, y -0.999995 0.999995 ...\n"
    assert re.fullmatch(pattern, out), out


def test_cpp_package_example_is_that_of_the_readme():
    blocks = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks == [(EXAMPLE / name).read_text(encoding="utf-8") for name in ("main.cpp", "cuda.cpp")]


def test_cpp_package_in_the_wheel_has_every_instruction_set(wheel):
    assert f" on {lanenorm.available_isas()[0]}:" in run(wheel / "example").stdout


def test_cpp_package_installs_only_public_headers(prefix):
    files = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()}
    assert {Path(f).name for f in files if f.startswith("include/")} == HEADERS
    assert {re.sub(r"^lib\w*/([\w-]+-linux-gnu/)?", "lib/", f) for f in files if not f.startswith("include/")} == {
        "lib/liblanenorm_cpu.a",
        *(f"lib/cmake/lanenorm/lanenorm{name}.cmake" for name in ("Config", "ConfigVersion", "-cpu-targets")),
        "lib/cmake/lanenorm/lanenorm-cpu-targets-debug.cmake",
    }


def test_cpp_package_names_no_folder_of_the_build(prefix):
    for path in prefix.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path


def test_cpp_package_is_announced_to_scikit_build(wheel):
    (entry,) = (e for e in metadata.entry_points(group="cmake.root") if e.name == "lanenorm")
    assert entry.load() is lanenorm


def test_cpp_header_defines_no_macros(prefix):
    for path in (prefix / "include" / "lanenorm").iterdir():
        assert not re.search(r"^\s*#\s*define", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("REQUIRED COMPONENTS cpu cuda", "component cuda: this lanenorm [0-9.]+ was built without CUDA"),
        ("REQUIRED COMPONENTS gpu", "there is no component 'gpu', only cpu and cuda"),
        ("99.0 REQUIRED", 'requested version "99.0"'),
        ("REQUIRED", None),
        ("OPTIONAL_COMPONENTS cuda", None),
    ],
)
def test_cpp_package_find(prefix, tmp_path, request_, expected):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21...4.0)\nproject(find LANGUAGES CXX)\n"
        f"find_package(lanenorm {request_})\nmessage(STATUS found=${{lanenorm_FOUND}} cuda=${{lanenorm_cuda_FOUND}}.)\n"
    )
    done = configure(tmp_path, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", check=False)
    text = re.sub(r"\s+", " ", done.stdout + done.stderr)
    if expected is None:
        assert done.returncode == 0, text
        assert re.search("found=(1|TRUE)cuda=(FALSE)?\\.", text), text
    else:
        assert done.returncode != 0
        assert re.search(expected, text), text


def test_cpp_package_as_a_folder_leaves_its_parent_alone(tmp_path):
    """No build type, no tests, no Python module, and nothing to install forced on a project that adds lanenorm."""
    configure(EXAMPLE, tmp_path, f"-DLANENORM_SOURCE={ROOT}", "-DLANENORM_ISAS=portable")
    cache = (tmp_path / "CMakeCache.txt").read_text(encoding="utf-8")
    assert re.search(r"^CMAKE_BUILD_TYPE:\w+=$", cache, re.M)
    for option in ("BUILD_PYTHON", "BUILD_TESTS", "BUILD_BENCH", "INSTALL"):
        assert f"LANENORM_{option}:BOOL=OFF" in cache
    # but lanenorm is optimized even so
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    assert all("-O3" in entry["command"] for entry in commands if "/cpp/cpu/" in entry["file"])


@pytest.mark.parametrize(("isas", "message"), [("avx2", "lacks portable"), ("portable;avx521", "avx521 is none of")])
def test_cpp_package_says_which_isas_there_are(tmp_path, isas, message):
    done = configure(EXAMPLE, tmp_path, f"-DLANENORM_SOURCE={ROOT}", f"-DLANENORM_ISAS={isas}", check=False)
    assert done.returncode != 0
    assert f"LANENORM_ISAS: {isas.split(';')[-1]}" in done.stdout + done.stderr
    assert message in " ".join((done.stdout + done.stderr).split())


# ---- The interface --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(installed):
    """Lines of `operations` by their first word."""
    return cpp_operations.printed(run(installed / "operations").stdout.splitlines())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_cpp_operations_give_the_bits_of_python(results, norm, dtype):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert cpp_operations.of_dtype(results[norm], dtype) == cpp_operations.expected(lanenorm, norm, kind)


def test_cpp_runtime(results):
    assert results["version"] == [f"{lanenorm.__version__} {lanenorm.__version__}"]
    assert results["threads"] == ["2"]
    assert results["isas"] == ["1"]


def test_cpp_refusals_say_what_was_expected(results):
    hint = "use mean.astype(numpy.float32)"
    assert results["error"] == [
        "layer_norm: weight has shape (5,), expected (8,), axis -1 of x (2, 8)",
        "layer_norm: out is read-only, expected an array that can be written",
        "layer_norm: out has shape (8, 2), expected (2, 8), the shape of x",
        "layer_norm: axis 2 is out of bounds for x of 2 axes, shape (2, 8)",
        "layer_norm_forward: mean has shape (2,), expected (2, 1), axis -1 of x (2, 8) reduced to length 1",
        "layer_norm_forward: rstd shares memory with mean, expected memory of its own",
        "layer_norm_forward: rstd shares memory with x, expected memory of its own",
        f"layer_norm_forward: mean has dtype float16, expected float32, the dtype of statistics; {hint}",
        "layer_norm_backward: dweight is given without dbias, expected both or neither",
        "layer_norm_backward: dbias has shape (5,), expected (8,), axis -1 of x (2, 8)",
        "ArrayView: data is null, expected memory for shape (3,)",
        "ArrayView: shape is (2, -8), expected lengths >= 0",
        "ArrayView: strides are (4,), expected one for each axis of shape (2, 8)",
        "use_isa: 'mmx' is not one of the instruction sets usable here: portable",
        "set_num_threads: n is 0, expected an integer >= 1",
    ]
