"""Where tests of the CUDA kernels run: emulated on the CPU, or on a GPU with CuPy. The fixtures are in conftest.py."""

import ctypes
import shutil

import numpy as np
import pytest

import lanenorm


def results_by_l2(place, elements, compute):
    """What compute() returns, and how many kernels it launches, with less and less L2: of an H200, for half of one
    float32 array that is packed (`elements` of it), and none, where as little is packed at a time as can be."""
    results, launches = [], []
    for l2_bytes in (50 << 20, 3 * elements, 0):
        place.library.set_device(l2_bytes=l2_bytes)
        place.library.take_launches()
        results.append(compute())
        launches.append(len(place.library.take_launches()))
    return results, launches


class Emulated:
    """The kernels on the CPU: arrays are NumPy's."""

    emulated = True

    def __init__(self):
        if shutil.which("g++") is None:
            pytest.skip("no g++, which builds the emulated kernels")
        import cuda_on_host

        self.library = cuda_on_host

    def to_device(self, array):
        return array

    def to_host(self, array):
        return array


class OnGpu:
    """The kernels on the GPU: arrays are CuPy's, with strides and alignment of the NumPy arrays they come from."""

    emulated = False

    def __init__(self):
        self.cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        reason = lanenorm.cuda_unavailable_reason()
        if reason is not None:
            pytest.skip(f"no CUDA: {reason}")
        self.library = lanenorm

    def to_device(self, array):
        if array is None or array.size == 0:
            return None if array is None else self.cupy.empty(array.shape, array.dtype)
        low, high = np.lib.array_utils.byte_bounds(array)
        place = low % 256
        memory = self.cupy.empty(place + high - low, np.uint8)
        content = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8)
        memory[place:] = self.cupy.asarray(content)
        start = memory.data + (array.ctypes.data - low + place)
        return self.cupy.ndarray(array.shape, array.dtype, memptr=start, strides=array.strides)

    def to_host(self, array):
        if array is None:
            return None
        like = np.empty_like(np.lib.stride_tricks.as_strided(np.empty(1, array.dtype), array.shape, array.strides))
        like[...] = array.get()
        return like
