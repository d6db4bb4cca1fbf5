"""Array libraries: which one a call belongs to, and what serves it.

A call is made with `lanenorm._cpu` first, which takes plain NumPy arrays; what it does not take comes here. CuPy is
never imported: a CuPy array can only exist where CuPy is already in `sys.modules`. The CUDA kernels (`lanenorm._cuda`)
are loaded when the first one arrives. Everything about dtype, shape and memory is checked in C++.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

import numpy as np

from lanenorm import _cpu

# What `lanenorm._cpu` takes. Exact types: a subclass (masked array, matrix) means something by its elements that the
# kernels would ignore. memmap is plain memory and nothing else.
NUMPY = frozenset((np.ndarray, np.memmap))

# --- Which library ----------------------------------------------------------------------------------------------------


def type_name(value: object) -> str:
    """Name of the type of `value` as error messages give it: `list`, `numpy.matrix`, `torch.Tensor`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_cupy(value: object) -> bool:
    """Whether `value` is exactly a `cupy.ndarray`."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and type(value) is getattr(cupy, "ndarray", None)


def backend(operation: str, required: dict[str, object], optional: dict[str, object]) -> Any:
    """Choose what serves a call whose arrays are not all NumPy's.

    Parameters
    ----------
    operation : str
        Name that error messages begin with.
    required, optional : dict of str to object
        The array arguments by name. Those of `optional` may be None.

    Returns
    -------
    module
        The extension module for the library all arrays belong to.

    Raises
    ------
    TypeError
        An argument is no array of a known library, the libraries are mixed, or the arrays lie on two devices.
    ImportError
        The arrays are CuPy's and this lanenorm has no CUDA part.
    RuntimeError
        The arrays are CuPy's and CUDA does not work here: no driver, a driver too old, no device.
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
    return cuda_backend(operation, given)


# --- CUDA -------------------------------------------------------------------------------------------------------------


@functools.cache
def load_cuda() -> tuple[Any, str | None]:
    """The CUDA kernels, and what keeps them from running here.

    Returns
    -------
    module : module or None
        None where they are not in this lanenorm, or cannot be loaded.
    reason : str or None
        None where they can be used.

    Notes
    -----
    Asked once, at the first CuPy array: it initializes CUDA, which a process forked later cannot use then.
    """
    try:
        cuda = importlib.import_module("lanenorm._cuda")
    except ModuleNotFoundError:
        return None, f"lanenorm {_cpu.build_info()['version']} has no CUDA part here (no module lanenorm._cuda)"
    except ImportError as error:
        return None, f"the CUDA part of lanenorm, which has to be loaded, cannot be: {error}"
    return cuda, cuda.unavailable_reason()


def cuda_backend(operation: str, given: dict[str, Any]) -> Any:
    """What serves these CuPy arrays; raises as `backend` says."""
    cuda, reason = load_cuda()
    name, first = next(iter(given.items()))
    if reason is not None or cuda is None:
        start = f"{operation}: {name} has type {type_name(first)}, but {reason}"
        if cuda is not None:
            raise RuntimeError(start)
        raise ImportError(f"{start}; pass NumPy arrays (cupy.asnumpy), or {INSTALL_CUDA}")
    device = first.data.device_id
    for other, value in given.items():
        if value.data.device_id != device:
            raise TypeError(
                f"{operation}: {name} lies on CUDA device {device} and {other} on CUDA device "
                f"{value.data.device_id}, expected arrays on one device"
            )
    return cuda


INSTALL_CUDA = (
    'install a lanenorm that has it: a wheel by pip install --upgrade "lanenorm[cuda13]", or built from source where '
    "nvcc 13 is (LANENORM_CUDA=ON)"
)


def cuda_reason() -> str | None:
    """Why CuPy arrays cannot be used here and what to do about it, None where they can."""
    cuda, reason = load_cuda()
    if cuda is None:
        return f"{reason}; {INSTALL_CUDA}"
    if reason is None and sys.modules.get("cupy") is None and importlib.util.find_spec("cupy") is None:
        return 'CUDA works, but CuPy is not installed: pip install "lanenorm[cuda13]"'
    return reason
