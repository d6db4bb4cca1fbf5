"""Threads, instruction sets, and what this installation consists of. All of it is per process.

Longer than 300 lines because its functions are public, with numpydoc docstrings.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from lanenorm import _cpu
from lanenorm._arrays import cuda_reason, load_cuda, type_name

# --- Threads ----------------------------------------------------------------------------------------------------------


def _thread_count(operation: str, value: object) -> int:
    """`value` as the number of threads, or what is wrong with it."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{operation}: n has type {type_name(value)}, expected int")
    if value < 1:
        raise ValueError(f"{operation}: n is {value}, expected at least 1")
    return int(value)


def set_num_threads(n: int) -> int:
    """Set how many threads a call may use, the calling one included.

    Results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1. More than there are processors is allowed.

    Returns
    -------
    int
        The number before.

    Raises
    ------
    TypeError
        `n` is no integer.
    ValueError
        `n` is below 1.

    Notes
    -----
    At the start the number is ``LANENORM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of processors this
    process may use by its affinity and its cgroup. Small arrays are served by the calling thread alone.

    Examples
    --------
    >>> import lanenorm
    >>> before = lanenorm.set_num_threads(1)
    >>> lanenorm.set_num_threads(before)
    1
    """
    return _cpu.set_num_threads(_thread_count("set_num_threads", n))


def get_num_threads() -> int:
    """How many threads a call may use, the calling one included.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import lanenorm
    >>> with lanenorm.num_threads(3):
    ...     lanenorm.get_num_threads()
    3
    """
    return _cpu.get_num_threads()


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads for a block, and set it back after.

    The number belongs to the process: other Python threads see it too.

    Parameters
    ----------
    n : int
        As in `set_num_threads`.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    TypeError, ValueError
        As in `set_num_threads`.

    Examples
    --------
    >>> import lanenorm
    >>> with lanenorm.num_threads(1):
    ...     lanenorm.get_num_threads()
    1
    """
    before = _cpu.set_num_threads(_thread_count("num_threads", n))
    try:
        yield
    finally:
        _cpu.set_num_threads(before)


# --- Instruction sets -------------------------------------------------------------------------------------------------


def available_isas() -> list[str]:
    """Instruction sets that this build has and this processor can run.

    Returns
    -------
    list of str
        Best first, "portable" last. The first one is used unless ``LANENORM_ISA`` or `use_isa` says otherwise.

    Examples
    --------
    >>> import lanenorm
    >>> lanenorm.available_isas()[-1]
    'portable'
    """
    return _cpu.available_isas()


def use_isa(name: str) -> str:
    """Choose the instruction set.

    Results do not depend on it, speed does.

    Parameters
    ----------
    name : str
        One of `available_isas`.

    Returns
    -------
    str
        The one before.

    Raises
    ------
    TypeError
        `name` is no string.
    ValueError
        `name` is none of `available_isas`.

    Examples
    --------
    >>> import lanenorm
    >>> before = lanenorm.use_isa("portable")
    >>> lanenorm.use_isa(before)
    'portable'
    """
    if not isinstance(name, str):
        raise TypeError(f"use_isa: name has type {type_name(name)}, expected str")
    return _cpu.use_isa(name)


# --- Memory -----------------------------------------------------------------------------------------------------------


class MemoryPool:
    """The memory that large outputs are made of, kept when they die and used again.

    Memory fresh from the operating system costs more than normalizing into it. Outputs of 112 KB and more that no `out`
    was given for come from here; they are ordinary arrays that own their data. Methods are those of CuPy's
    `cupy.cuda.MemoryPool`; `get_default_memory_pool` gives the one instance.

    Notes
    -----
    At most `get_limit` bytes lie here unused; what was freed first goes back to the operating system first. A forked
    child has a pool of its own.

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> pool = lanenorm.get_default_memory_pool()
    >>> pool.free_all_blocks()
    >>> y = lanenorm.layer_norm(np.ones((1024, 1024), np.float32))
    >>> pool.used_bytes() >= y.nbytes
    True
    >>> del y
    >>> pool.free_bytes() >= 4 << 20
    True
    """

    def used_bytes(self) -> int:
        """Bytes that living arrays are made of.

        Returns
        -------
        int
            With what rounding block sizes adds.
        """
        return _cpu.pool_use()["used"]

    def free_bytes(self) -> int:
        """Bytes kept for outputs to come.

        Returns
        -------
        int
            At most `get_limit`.
        """
        return _cpu.pool_use()["free"]

    def total_bytes(self) -> int:
        """Bytes in use and kept.

        Returns
        -------
        int
            The sum of `used_bytes` and `free_bytes`.
        """
        use = _cpu.pool_use()
        return use["used"] + use["free"]

    def n_free_blocks(self) -> int:
        """How many blocks are kept.

        Returns
        -------
        int
            Each is one former output.
        """
        return _cpu.pool_use()["free_blocks"]

    def free_all_blocks(self) -> None:
        """Give all that is kept back to the operating system; arrays are not touched."""
        _cpu.pool_free_all()

    def get_limit(self) -> int:
        """How much may be kept.

        Returns
        -------
        int
            Bytes; at the start a sixteenth of the machine's memory, at most 1 GiB.
        """
        return _cpu.pool_use()["limit"]

    def set_limit(self, size: int) -> None:
        """Set how much may be kept, and give back what is above it.

        Parameters
        ----------
        size : int
            Bytes, at least 0; 0 keeps nothing. Unlike CuPy's it does not limit what can be allocated.

        Raises
        ------
        TypeError
            `size` is no integer.
        ValueError
            `size` is negative.
        """
        if isinstance(size, (bool, np.bool_)) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"set_limit: size has type {type_name(size)}, expected int")
        if not 0 <= size < 2**63:
            raise ValueError(f"set_limit: size is {size}, expected bytes from 0 on")
        _cpu.pool_set_limit(int(size))


_POOL = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    """Return the pool that large outputs come from.

    Returns
    -------
    MemoryPool
        Always the same one.

    Examples
    --------
    >>> import lanenorm
    >>> lanenorm.get_default_memory_pool().get_limit() > 0
    True
    """
    return _POOL


# --- What is there ----------------------------------------------------------------------------------------------------


def cuda_available() -> bool:
    """Whether CuPy arrays can be used.

    Returns
    -------
    bool
        False where lanenorm was built without CUDA kernels, where there is no NVIDIA driver of CUDA 13 (r580) or no
        GPU, and where CuPy is not installed. `cuda_unavailable_reason` says which.

    Notes
    -----
    The first call initializes CUDA: a process forked afterwards cannot use it.

    Examples
    --------
    >>> import lanenorm
    >>> lanenorm.cuda_available() == (lanenorm.cuda_unavailable_reason() is None)
    True
    """
    return cuda_reason() is None


def cuda_unavailable_reason() -> str | None:
    """Why CuPy arrays cannot be used.

    Returns
    -------
    str or None
        The reason, None where they can be used.

    Examples
    --------
    >>> import lanenorm
    >>> reason = lanenorm.cuda_unavailable_reason()
    >>> reason is None or isinstance(reason, str)
    True
    """
    return cuda_reason()


def _current_isa() -> str:
    try:
        return _cpu.current_isa()
    except ValueError as error:  # LANENORM_ISA names none: what show_runtime is there to find out
        return str(error)


def _cuda_line() -> str:
    cuda, _ = load_cuda()
    reason = cuda_reason() or "available"
    if cuda is None:
        return reason
    build = cuda.build_info()
    return f"{reason}; built with CUDA {build['cuda']} for architectures {build['architectures']}"


def _optional_version(module: str) -> str:
    """Version of a module without importing it if it was not."""
    from importlib import metadata, util

    if util.find_spec(module) is None:
        return "not installed"
    loaded = sys.modules.get(module)
    if loaded is not None:
        return str(getattr(loaded, "__version__", "?"))
    distributions = metadata.packages_distributions().get(module, [module])
    return metadata.version(distributions[0])


def show_runtime() -> None:
    """Print what this installation consists of, for a bug report.

    Versions, compiler, instruction sets, threads, environment variables, CUDA.

    Examples
    --------
    >>> import lanenorm
    >>> lanenorm.show_runtime()  # doctest: +ELLIPSIS
    lanenorm    ...
    """
    build = _cpu.build_info()
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    lines = {
        "lanenorm": f"{build['version']}, {_cpu.__file__}",
        "compiler": build["compiler"],
        "ISA": _current_isa(),
        "ISAs": f"usable here: {' '.join(available_isas())}; compiled: {' '.join(build['compiled_isas'])}",
        "threads": f"{get_num_threads()} of {os.cpu_count()} processors",
        "memory": "{used} bytes in use, {free} kept of at most {limit}".format(**_cpu.pool_use()),
        "environment": ", ".join(f"{name}={value}" for name, value in environment.items())
        or f"none of {', '.join(_ENVIRONMENT)} is set",
        "CUDA": _cuda_line(),
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "NumPy": np.__version__,
        "ml_dtypes": _optional_version("ml_dtypes"),
        "CuPy": _optional_version("cupy"),
    }
    for name, text in lines.items():
        print(f"{name:<11} {text}")


_ENVIRONMENT = ("LANENORM_NUM_THREADS", "OMP_NUM_THREADS", "LANENORM_ISA")


# --- threadpoolctl ----------------------------------------------------------------------------------------------------


def register_with_threadpoolctl() -> None:
    """Make `threadpoolctl.threadpool_limits` and `threadpool_info` know this pool, if threadpoolctl is installed.

    threadpoolctl goes through the loaded shared libraries by file name, then asks for symbols: many a package has a
    file `_cpu.*.so`, only ours has these.
    """
    try:
        from threadpoolctl import LibController, register
    except ImportError:  # not installed, or older than 3.2 and without controllers of others
        return

    class LanenormController(LibController):  # type: ignore[misc]
        user_api = "lanenorm"
        internal_api = "lanenorm"
        filename_prefixes = ("_cpu",)
        check_symbols = ("lanenorm_get_num_threads", "lanenorm_set_num_threads")

        def get_num_threads(self) -> Any:
            return self.dynlib.lanenorm_get_num_threads()

        def set_num_threads(self, num_threads: int) -> Any:
            return self.dynlib.lanenorm_set_num_threads(max(1, num_threads))  # 0 is the least threadpoolctl may ask

        def get_version(self) -> Any:
            return _cpu.build_info()["version"]

    register(LanenormController)
