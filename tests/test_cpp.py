"""The C++ unit tests: configured, built and run from here, each reported on its own."""

import subprocess

import pytest
from conftest import ROOT, tool

SOURCES = sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("test_*.cpp"))


def test_there_are_cpp_tests():
    assert {"test_moments", "test_plan", "test_simd", "test_halves", "test_parallel"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_cpp(cpp_build, name):
    """test_simd stands for one program per instruction set."""
    pattern = f"^{name}_[a-z0-9]+$" if name == "test_simd" else f"^{name}$"
    command = [tool("ctest"), "--test-dir", str(cpp_build), "--tests-regex", pattern, "--no-tests=error"]
    done = subprocess.run([*command, "--output-on-failure"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
