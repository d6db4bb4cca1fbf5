"""The package as a whole: version, public names and signatures, type stubs, licence, extras."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

import lanenorm
from lanenorm import _cpu

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The public interface, as it is promised.
SIGNATURES = {
    "layer_norm": "(x, weight=None, bias=None, *, axis=-1, eps=1e-05, out=None)",
    "layer_norm_forward": "(x, weight=None, bias=None, *, axis=-1, eps=1e-05, out=None)",
    "layer_norm_backward": "(dy, x, mean, rstd, weight=None, *, axis=-1, param_grads=True, out=None)",
    "batch_norm": "(x, running_mean, running_var, weight=None, bias=None, *, channel_axis=1, eps=1e-05, out=None)",
    "batch_norm_forward": "(x, weight=None, bias=None, *, running_mean=None, running_var=None, momentum=0.1, "
    "channel_axis=1, eps=1e-05, out=None)",
    "batch_norm_backward": "(dy, x, mean, rstd, weight=None, *, channel_axis=1, training=True, param_grads=True, "
    "out=None)",
    "set_num_threads": "(n)",
    "get_num_threads": "()",
    "num_threads": "(n)",
    "available_isas": "()",
    "use_isa": "(name)",
    "show_runtime": "()",
    "cuda_available": "()",
    "cuda_unavailable_reason": "()",
    "get_default_memory_pool": "()",
}
CLASSES = {"LayerNorm", "BatchNorm", "MemoryPool", "NormForward", "NormBackward"}


def test_version_is_that_of_cmake():
    stated = re.search(r"^project\(lanenorm VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text(), re.M).group(1)
    assert lanenorm.__version__ == stated
    assert _cpu.build_info()["version"] == stated


def test_version_is_that_of_the_distribution():
    try:
        assert metadata.version("lanenorm") == lanenorm.__version__
    except metadata.PackageNotFoundError:
        pytest.skip("lanenorm is on the path but not installed")


def test_version_is_in_the_changelog():
    """Under its number, or as what comes next."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?({re.escape(lanenorm.__version__)}|Unreleased)\b", changelog, re.M)


def test_public_names_are_those_promised():
    assert set(lanenorm.__all__) == {*SIGNATURES, *CLASSES, "__version__"}
    assert sorted(lanenorm.__all__) == lanenorm.__all__
    assert all(hasattr(lanenorm, name) for name in lanenorm.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signature(name):
    signature = inspect.signature(getattr(lanenorm, name))
    bare = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == SIGNATURES[name]


def test_layer_arguments_are_those_of_pytorch():
    layer_norm = list(inspect.signature(lanenorm.LayerNorm).parameters)
    assert layer_norm[:4] == ["normalized_shape", "eps", "elementwise_affine", "bias"]
    batch_norm = list(inspect.signature(lanenorm.BatchNorm).parameters)
    assert batch_norm[:5] == ["num_features", "eps", "momentum", "affine", "track_running_stats"]


# ---- Type stubs of the extension module -----------------------------------------------------------------------------

STUB = ast.parse((Path(lanenorm.__file__).parent / "_cpu.pyi").read_text(encoding="utf-8"))
STUB_FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_stub_has_the_names_of_the_module():
    names = {name for name in dir(_cpu) if not name.startswith("_")}
    assert set(STUB_FUNCTIONS) == {name for name in names if callable(getattr(_cpu, name))}


@pytest.mark.parametrize("name", STUB_FUNCTIONS)
def test_stub_signature(name):
    """As many positional arguments as the module's function takes, of the names pybind11 prints where it prints any."""
    node = STUB_FUNCTIONS[name]
    assert not node.args.args, "arguments are positional-only"
    assert not node.args.kwonlyargs
    first = (getattr(_cpu, name).__doc__ or "").partition("\n")[0]
    match = re.match(rf"{name}\((.*)\)(?: -> .*)?$", first)
    assert match, first
    printed = [part for part in re.split(r", (?![^\[(]*[\])])", match.group(1)) if part not in ("", "/")]
    assert len(printed) == len(node.args.posonlyargs), first
    names = [part.partition(":")[0] for part in printed]
    if not all(re.fullmatch(r"arg\d*", n) for n in names):
        assert names == [argument.arg for argument in node.args.posonlyargs]


def test_package_is_typed():
    assert (Path(lanenorm.__file__).parent / "py.typed").exists()


# ---- Metadata -------------------------------------------------------------------------------------------------------


def test_numpy_is_the_only_requirement():
    assert [re.match(r"\w+", requirement).group() for requirement in PROJECT["dependencies"]] == ["numpy"]


def test_extras():
    assert {"bf16", "demo", "bench", "test", "cuda13"} <= set(PROJECT["optional-dependencies"])


def test_licence():
    assert PROJECT["license"] == "BSD-3-Clause"
    assert "Redistribution and use in source and binary forms" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_installed_package_is_what_is_tested():
    """Not the source folder: it has no compiled module."""
    code = "import lanenorm; print(lanenorm.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).resolve() == Path(lanenorm.__file__).resolve()
