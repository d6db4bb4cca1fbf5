"""What the documentation shows, runs: README's Python blocks, the docstrings' examples; and docstrings are complete."""

import contextlib
import doctest
import importlib
import inspect
import io
import re

import numpy as np
import pytest
from conftest import ROOT

import lanenorm

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
MODULES = ["lanenorm", "lanenorm.functional", "lanenorm.layers", "lanenorm._runtime", "lanenorm._arrays"]
PUBLIC = [name for name in lanenorm.__all__ if name != "__version__"]


def test_readme_has_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs(number):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(BLOCKS[number], f"README.md, Python block {number}", "exec"), {"__name__": "__main__"})


def test_readme_shows_the_two_commands_first():
    shell = re.search(r"^```sh\n(.*?)^```", README, re.M | re.S).group(1)
    assert shell.splitlines() == ['pip install ".[demo]" && python -m lanenorm demo', 'pip install ".[test]" && pytest']


def test_readme_has_nothing_left_to_fill_in():
    assert "FILL IN" not in README


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    """Also those that print arrays: with NumPy's default print options."""
    with np.printoptions():
        result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0


def test_docstring_examples_are_found():
    """All public functions and classes have one."""
    for name in PUBLIC:
        if name in ("NormForward", "NormBackward"):
            continue
        assert ">>> " in inspect.getdoc(getattr(lanenorm, name)), name


# What numpydoc checks, without matters of taste: GL08 no docstring, SS03 summary ends with a period, SS05 summary in
# the infinitive ... are in; the order and presence of optional sections are not.
NUMPYDOC = {
    "GL03",
    "GL06",
    "GL07",
    "GL08",
    "PR01",
    "PR02",
    "PR03",
    "PR04",
    "PR07",
    "PR10",
    "RT01",
    "RT03",
    "SS01",
    "SS03",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name):
    """Every parameter is documented with its type, every result with its meaning, and none that does not exist."""
    validate = pytest.importorskip("numpydoc.validate")
    members = [f"lanenorm.{name}"]
    value = getattr(lanenorm, name)
    if inspect.isclass(value) and not issubclass(value, tuple):
        members += [
            f"lanenorm.{name}.{method}"
            for method, function in inspect.getmembers(value, inspect.isfunction)
            if not method.startswith("_")
        ]
    for member in members:
        errors = validate.validate(member)["errors"]
        assert not [f"{code}: {text}" for code, text in errors if code in NUMPYDOC], member
