"""Array libraries: which one a call belongs to, and what serves it.

This is the only place that knows kinds of arrays, and the only one that would import CuPy. It never imports it first:
a CuPy array can only exist where CuPy is already in `sys.modules`. Everything about dtype, shape and memory is
checked in C++.
"""

from __future__ import annotations

import sys
from types import NoneType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from lanenorm import _cpu

# Exact types: a subclass (masked array, matrix) means something by its elements that the kernels would ignore.
# memmap is plain memory and nothing else.
NUMPY = frozenset((np.ndarray, np.memmap))
# What the functions test before they call `backend`.
OPTIONAL_NDARRAY = frozenset((np.ndarray, NoneType))


class Backend(NamedTuple):
    """What serves the arrays of one library."""

    module: Any  # the extension module with the six operations


CPU = Backend(_cpu)


def type_name(value: object) -> str:
    """Name of the type of `value` as error messages give it: `list`, `numpy.matrix`, `torch.Tensor`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_cupy(value: object) -> bool:
    """Whether `value` is exactly a `cupy.ndarray`."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and type(value) is getattr(cupy, "ndarray", None)


def backend(operation: str, required: dict[str, object], optional: dict[str, object]) -> Backend:
    """Choose what serves a call.

    Parameters
    ----------
    operation : str
        Name that error messages begin with.
    required, optional : dict of str to object
        The array arguments by name. Those of `optional` may be None.

    Returns
    -------
    Backend
        That of the library all arrays belong to.

    Raises
    ------
    TypeError
        An argument is no array of a known library, or the libraries are mixed.
    ImportError
        The arrays are CuPy's and this lanenorm has no CUDA part.
    """
    given = required | {name: value for name, value in optional.items() if value is not None}
    for name, value in given.items():
        if type(value) not in NUMPY and not is_cupy(value):
            expected = "numpy.ndarray or cupy.ndarray" if "cupy" in sys.modules else "numpy.ndarray"
            if name in optional:
                expected += " or None"
            raise TypeError(f"{operation}: {name} has type {type_name(value)}, expected {expected}")
    (first_name, first), *others = given.items()
    for name, value in others:
        if is_cupy(value) is not is_cupy(first):
            raise TypeError(
                f"{operation}: {first_name} has type {type_name(first)} and {name} has type {type_name(value)}, "
                "expected arrays of one library"
            )
    if is_cupy(first):
        cuda_missing(f"{operation}: {first_name} has type {type_name(first)}, but ")
    return CPU


def cuda_reason() -> str | None:
    """Why CuPy arrays cannot be used here, None where they can."""
    return f"lanenorm {_cpu.build_info()['version']} has no CUDA part (no module lanenorm._cuda)"


def cuda_missing(start: str) -> NoReturn:
    """Raise ImportError: which part is missing, and what to do about it."""
    raise ImportError(
        f"{start}{cuda_reason()}; pass NumPy arrays (cupy.asnumpy), or install a lanenorm that has one: "
        'pip install --upgrade "lanenorm[cuda13]"'
    )
