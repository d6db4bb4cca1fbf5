"""What stands between Python and the CUDA kernels, on a machine without a GPU.

Two halves. What is installed: with or without `lanenorm._cuda`, importing and refusing. Then the module itself,
compiled against a CUDA runtime that writes down what it is asked (tests/cuda_module_on_host) and called with a stand-in
for CuPy whose arrays lie in ordinary memory: which memory, stream and device a kernel gets, what is given back when.
"""

import ast
import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
from cases import LAYOUTS, by_dtype, check_layout
from conftest import ROOT, tool

import lanenorm
from lanenorm import _arrays, _cpu, _runtime

INSTALLED = importlib.util.find_spec("lanenorm._cuda") is not None
needs_module = pytest.mark.skipif(not INSTALLED, reason="lanenorm was built without CUDA")

OPERATIONS = [f"{norm}{part}" for norm in ("layer_norm", "batch_norm") for part in ("", "_forward", "_backward")]


@pytest.fixture(autouse=True)
def _asked_anew():
    """Every test asks for the CUDA part as if nobody had before, and leaves nothing behind."""
    _arrays.load_cuda.cache_clear()
    yield
    _arrays.load_cuda.cache_clear()


# ---- What is installed ----------------------------------------------------------------------------------------------


def test_info_says_whether_cuda_is_in(run_python):
    line = re.search(r"^CUDA +(.*)$", run_python("-m lanenorm info").stdout, re.M).group(1)
    assert ("built with CUDA" in line) is INSTALLED
    assert ("no CUDA part" in line) is not INSTALLED


@needs_module
def test_module_is_of_this_version():
    from lanenorm import _cuda

    info = _cuda.build_info()
    assert info["version"] == _cpu.build_info()["version"]
    assert int(info["cuda"].partition(".")[0]) >= 13
    assert info["architectures"]


@needs_module
def test_module_imports_without_cupy_and_device(run_python):
    """And says why it is of no use; a call that got past Python's checks all the same would be refused by type."""
    code = """
import sys
sys.modules["cupy"] = None
import numpy as np
from lanenorm import _cuda
print(_cuda.unavailable_reason())
try:
    _cuda.layer_norm(np.ones((2, 3), np.float32), None, None, -1, 1e-5, None)
except TypeError as error:
    print(error)
"""
    reason, refusal = run_python(code, CUDA_VISIBLE_DEVICES="").stdout.splitlines()
    assert re.search("driver|cudaErrorNoDevice", reason)
    assert refusal == "layer_norm: x has type numpy.ndarray, expected cupy.ndarray"


def test_module_is_not_loaded_for_numpy(run_python):
    code = "import sys, numpy, lanenorm; lanenorm.LayerNorm(3)(numpy.ones((2, 3), 'f4')); print(*sys.modules)"
    assert "lanenorm._cuda" not in run_python(code).stdout.split()


@needs_module
def test_real_cupy_without_a_device_is_refused():
    """Its arrays can lie in ordinary memory, so one can be made."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from lanenorm import _cuda

    if _cuda.unavailable_reason() is None:
        pytest.skip("there is a device")
    values = np.ones((2, 3), np.float32)
    memory = cupy.cuda.UnownedMemory(values.ctypes.data, values.nbytes, values, 0)
    x = cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(memory, 0))
    for call in (lanenorm.layer_norm, lanenorm.LayerNorm(3, elementwise_affine=False)):
        with pytest.raises(RuntimeError, match=r"^layer_norm(_forward)?: x has type cupy.ndarray, but .*(driver|cuda)"):
            call(x)


# ---- Missing parts --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_module(monkeypatch, tmp_path):
    """A lanenorm that was built without CUDA: no such file in its folder."""
    monkeypatch.delitem(sys.modules, "lanenorm._cuda", raising=False)
    monkeypatch.setattr(lanenorm, "__path__", [str(tmp_path)])


def test_reason_without_the_module(no_module):
    reason = lanenorm.cuda_unavailable_reason()
    assert not lanenorm.cuda_available()
    assert f"lanenorm {lanenorm.__version__} has no CUDA part" in reason
    assert 'pip install --upgrade "lanenorm[cuda13]"' in reason


def test_call_without_the_module(no_module, cupy):
    match = r"^layer_norm: x has type cupy.ndarray, but lanenorm .* has no CUDA part.*cupy.asnumpy.*pip install"
    with pytest.raises(ImportError, match=match):
        lanenorm.layer_norm(cupy.of(np.ones((2, 3), np.float32)))


def test_call_with_a_module_that_does_not_load(monkeypatch, cupy):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "lanenorm._cuda":
                raise ImportError("libsomething.so.1: no such file")

    monkeypatch.delitem(sys.modules, "lanenorm._cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"^layer_norm: .*cannot be: libsomething.so.1: no such file"):
        lanenorm.layer_norm(cupy.of(np.ones((2, 3), np.float32)))


def test_reason_without_cupy(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not lanenorm.cuda_available()
    assert re.search(r'CuPy is not installed: pip install "lanenorm\[cuda13\]"', lanenorm.cuda_unavailable_reason())


# ---- The stand-ins --------------------------------------------------------------------------------------------------


class Runtime:
    """The CUDA runtime of tests/cuda_module_on_host: settings, and the log that the stand-in for CuPy writes to too."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        self.library.fake_note.argtypes = (ctypes.c_char_p,)

    def set(self, **settings):
        for name, value in settings.items():
            self.library.fake_set(name.encode(), value)

    def note(self, line):
        self.library.fake_note(line.encode())

    def log(self):
        """What was done since the last time."""
        return self.library.fake_log().decode().splitlines()


@pytest.fixture(scope="session")
def host_module(tmp_path_factory):
    """python/ext/cuda_module.cpp by g++, on the runtime that writes down; the module and that runtime."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitized run compiles nothing")
    here = ROOT / "tests" / "cuda_module_on_host"
    path = tmp_path_factory.mktemp("cuda_module") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [here, ROOT, ROOT / "cpp", pybind11.get_include(), sysconfig.get_path("include")]
    sources = [ROOT / "python/ext/cuda_module.cpp", here / "runtime.cpp"]
    sources += [ROOT / f"cpp/core/{name}.cpp" for name in ("check", "plan")]
    sources += [ROOT / "cuda/launch.cu", ROOT / "cuda/runtime.cpp"]
    command = [tool("g++"), "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
    command += ['-DLANENORM_VERSION="0"', '-DLANENORM_CUDA_ARCHITECTURES="none"', *(f"-I{f}" for f in folders)]
    done = subprocess.run(
        [*command, "-x", "c++", *map(str, sources), "-o", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Runtime(path)


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""


class Memory:
    """As cupy.cuda.MemoryPointer: owns ordinary memory, and writes down when that goes back."""

    def __init__(self, cupy, size, owner=None):
        self.cupy, self.size, self.device_id, self.given = cupy, size, cupy.current, owner is None
        self.owner = np.full(max(size, 1), 0xFF, np.uint8) if owner is None else owner
        self.ptr = self.owner.ctypes.data if size else 0

    def __del__(self):
        if self.given:
            self.cupy.note(f"free {self.size}")


class CuPy(types.ModuleType):
    """As much of CuPy as lanenorm touches, on ordinary memory."""

    def __init__(self):
        super().__init__("cupy")
        self.note, self.current, self.stream, self.failing = (lambda line: None), 0, 0x100, None
        self.ndarray = ndarray
        runtime = types.SimpleNamespace(getDevice=lambda: self.current, setDevice=self.set_device)
        self.cuda = types.SimpleNamespace(alloc=self.alloc, get_current_stream=self.get_current_stream, runtime=runtime)
        self.ones = functools.partial(self.filled, 1)
        self.zeros = functools.partial(self.filled, 0)

    def set_device(self, device):
        self.note(f"setDevice {device}")
        self.current = device

    def get_current_stream(self, device):
        return types.SimpleNamespace(ptr=self.stream and self.stream + device)

    def alloc(self, size):
        self.note(f"alloc {size} device {self.current}")
        if self.failing is not None:
            raise self.failing
        return Memory(self, size)

    def of(self, array, device=0):
        """A CuPy array over the memory of a NumPy array."""
        before, self.current = self.current, device
        memory = Memory(self, array.nbytes, array)
        self.current = before
        memory.ptr = array.ctypes.data if array.size else 0
        return ndarray(array.shape, array.dtype, memory, array.strides)

    def filled(self, value, shape, dtype):
        return self.of(np.full(shape, value, dtype))


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    """As cupy.ndarray."""

    __module__ = "cupy"

    def __init__(self, shape, dtype, memptr, strides=None):
        assert memptr is not None
        dtype = np.dtype(dtype)
        self.shape, self.dtype, self.data = tuple(shape), dtype, memptr
        self.strides = np.empty(shape, dtype).strides if strides is None else tuple(strides)

    @property
    def size(self):
        return int(np.prod(self.shape))

    def astype(self, dtype):
        return CUPY.of(self.get().astype(dtype))

    def __array_ufunc__(self, function, method, *inputs):
        """Arithmetic, and NumPy's functions: of CuPy arrays a CuPy array."""
        return CUPY.of(getattr(function, method)(*(i.get() if isinstance(i, ndarray) else i for i in inputs)))

    def get(self):
        """The elements as a NumPy array of the same layout."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        low = sum(min(0, (n - 1) * s) for n, s in zip(self.shape, self.strides, strict=True))
        high = sum(max(0, (n - 1) * s) for n, s in zip(self.shape, self.strides, strict=True)) + self.dtype.itemsize
        raw = np.frombuffer((ctypes.c_char * (high - low)).from_address(self.data.ptr + low), np.uint8)
        return np.ndarray(self.shape, self.dtype, raw.data, -low, self.strides)


class Subclass(ndarray):
    """A cupy.ndarray subclass of somebody's own."""


# One for all tests: the module looks CuPy's functions up once.
CUPY = CuPy()


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, imported as `cupy`."""
    CUPY.note, CUPY.current, CUPY.stream, CUPY.failing = (lambda line: None), 0, 0x100, None
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    return CUPY


@pytest.fixture
def cuda(host_module, cupy, monkeypatch):
    """The module on the host in place of lanenorm._cuda; the runtime beneath it, with one device of CUDA 13."""
    module, runtime = host_module
    monkeypatch.setitem(sys.modules, "lanenorm._cuda", module)
    runtime.set(driver=13000, devices=1, workspace=0, capturing=0, exhausted=0, lost=0, fail=0, shared=0)
    cupy.note = runtime.note
    runtime.log()
    yield runtime
    cupy.note = lambda line: None


def numbers(shape, dtype=np.float32):
    """0, 1, 2, ... , whose place in memory is told by their value."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


# ---- What is there --------------------------------------------------------------------------------------------------


def test_show_runtime_says_how_cuda_was_built(cuda):
    assert re.fullmatch(r"available; built with CUDA \d+\.\d+ for architectures none", _runtime._cuda_line())


# ---- No driver, no device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"driver": 0}, ("no NVIDIA driver", "cudaDriverGetVersion", "install", "r580")),
        ({"driver": 12040}, ("too old", "12.4", "13.0", "upgrade", "r580")),
        ({"devices": 0}, ("cudaGetDeviceCount failed: cudaErrorNoDevice (a text)", "CUDA_VISIBLE_DEVICES")),
    ],
    ids=["no driver", "old driver", "no device"],
)
def test_no_driver_or_device(cuda, cupy, settings, parts):
    cuda.set(**settings)
    reason = lanenorm.cuda_unavailable_reason()
    with pytest.raises(RuntimeError) as caught:
        lanenorm.layer_norm(cupy.of(numbers((2, 3))))
    assert str(caught.value) == f"layer_norm: x has type cupy.ndarray, but {reason}"
    assert all(part in reason for part in parts), reason
    assert not lanenorm.cuda_available()
    assert not cuda.log(), "a refused call did something"


@pytest.mark.parametrize("driver", [13000, 13010, 14020])
def test_available(cuda, driver):
    """A driver of the same major version will do, a newer one too."""
    cuda.set(driver=driver)
    assert lanenorm.cuda_available()
    assert lanenorm.cuda_unavailable_reason() is None


# ---- Arrays in, arrays out ------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cuda, cupy, layout, dtype):
    """Elements are found and written where they belong; y has the layout of numpy.empty_like(x)."""
    values = numbers((3, 4, 5), dtype)
    x = LAYOUTS[layout](values)
    y, mean, rstd = lanenorm.layer_norm_forward(cupy.of(x))
    assert type(y) is type(mean) is type(rstd) is ndarray
    check_layout(y.get(), x)
    assert np.array_equal(y.get(), values)
    assert mean.shape == rstd.shape == (3, 4, 1)
    assert mean.dtype == rstd.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert sorted(mean.get().ravel()) == list(range(12))
    assert np.array_equal(rstd.get(), mean.get() + 0.5)


@by_dtype
def test_gradients(cuda, cupy, dtype):
    """dweight and dbias in the dtype of weight, the shape of the normalized axes; None where they are not wanted."""
    dy, x = numbers((2, 3, 4), dtype), np.zeros((2, 3, 4), dtype)
    statistics = np.float64 if dtype == np.float64 else np.float32
    mean, rstd = np.zeros((2, 1, 1), statistics), np.ones((2, 1, 1), statistics)
    arrays = [cupy.of(a) for a in (np.asfortranarray(dy), np.asfortranarray(x), mean, rstd)]
    dx, dweight, dbias = lanenorm.layer_norm_backward(*arrays, axis=(2, 1))
    check_layout(dx.get(), np.asfortranarray(x))
    assert np.array_equal(dx.get(), dy)
    assert dweight.dtype == dbias.dtype == statistics
    assert dweight.shape == dbias.shape == (3, 4)
    assert sorted(dweight.get().ravel()) == list(range(12))
    weight = cupy.of(np.ones((3, 4), dtype))
    assert lanenorm.layer_norm_backward(*arrays, weight, axis=(1, 2)).dweight.dtype == dtype
    assert lanenorm.layer_norm_backward(*arrays, axis=(1, 2), param_grads=False)[1:] == (None, None)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_arrays(cuda, cupy, shape):
    """CuPy gives them the address 0."""
    y, mean, _ = lanenorm.layer_norm_forward(cupy.of(np.empty(shape, np.float32)))
    assert y.shape == shape
    assert mean.shape == (shape[0], 1)


def test_out_is_returned(cuda, cupy):
    x, out = cupy.of(numbers((3, 4))), cupy.of(np.zeros((3, 4), np.float32))
    assert lanenorm.layer_norm(x, out=out) is out
    assert np.array_equal(out.get(), x.get())
    assert lanenorm.layer_norm(x, out=x) is x
    assert not [line for line in cuda.log() if line.startswith("alloc")]


def test_layer(cuda, cupy):
    """LayerNorm with xp=cupy: parameters, forward and backward are CuPy's."""
    layer = lanenorm.LayerNorm(4, xp=cupy)
    assert type(layer.weight) is type(layer.bias) is ndarray
    y = layer(cupy.of(numbers((3, 4))))
    dx = layer.backward(y)
    assert np.array_equal(dx.get(), numbers((3, 4)))
    assert np.array_equal(layer.dweight.get(), range(4))
    assert np.array_equal(layer.dbias.get(), np.arange(4) + 0.5)


@by_dtype
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm(cuda, cupy, dtype, channel_axis):
    """Statistics and gradients of every channel; running statistics change where they lie."""
    values = numbers((2, 3, 4), dtype)
    channels = values.shape[channel_axis]
    statistics = np.float64 if dtype == np.float64 else np.float32
    x, weight = cupy.of(values), cupy.of(np.ones(channels, dtype))
    running_mean, running_var = (cupy.of(np.zeros(channels, statistics)) for _ in range(2))
    y, mean, rstd = lanenorm.batch_norm_forward(
        x, weight, running_mean=running_mean, running_var=running_var, channel_axis=channel_axis
    )
    assert np.array_equal(y.get(), values)
    assert mean.dtype == rstd.dtype == statistics
    assert np.array_equal(mean.get(), np.arange(channels))
    assert np.array_equal(rstd.get(), np.arange(channels) + 0.5)
    assert np.array_equal(running_mean.get(), np.arange(channels) + 100)
    assert np.array_equal(running_var.get(), np.arange(channels) + 100.5)
    y = lanenorm.batch_norm(x, running_mean, running_var, weight, channel_axis=channel_axis)
    assert np.array_equal(y.get(), values)
    assert np.array_equal(running_mean.get(), np.arange(channels) + 100)
    dx, dweight, dbias = lanenorm.batch_norm_backward(x, x, mean, rstd, weight, channel_axis=channel_axis)
    assert np.array_equal(dx.get(), values)
    assert dweight.dtype == dbias.dtype == dtype
    assert dweight.shape == dbias.shape == (channels,)
    launches = [line.split()[1] for line in cuda.log() if line.startswith("launch")]
    assert launches == ["batch_norm_forward", "batch_norm_inference", "batch_norm_backward"]


def test_batch_norm_layer(cuda, cupy):
    """BatchNorm with xp=cupy: everything is CuPy's but the number of batches, which nobody should wait for."""
    layer = lanenorm.BatchNorm(4, xp=cupy, momentum=None)
    assert type(layer.weight) is type(layer.running_mean) is type(layer.running_var) is ndarray
    y = layer(cupy.of(numbers((3, 4))))
    assert type(layer.num_batches_tracked) is np.ndarray
    assert layer.num_batches_tracked == 1
    assert np.array_equal(layer.running_mean.get(), np.arange(4) + 100)
    assert np.array_equal(layer.backward(y).get(), numbers((3, 4)))
    assert np.array_equal(layer.dweight.get(), range(4))
    y = layer.eval()(cupy.of(numbers((3, 4))))
    assert np.array_equal(y.get(), numbers((3, 4)))
    assert np.array_equal(layer.backward(y).get(), numbers((3, 4)))


# ---- Memory, stream, device -----------------------------------------------------------------------------------------


def test_order_of_a_call(cuda, cupy):
    """Device, outputs, launch on the current stream of the device; the GIL is free meanwhile."""
    result = lanenorm.layer_norm_forward(cupy.of(numbers((3, 4))))
    assert cuda.log() == [
        "cudaSetDevice 0",
        "alloc 48 device 0",
        "alloc 12 device 0",
        "alloc 12 device 0",
        f"launch layer_norm_forward device 0 stream {0x100}",
    ]
    del result
    assert sorted(cuda.log()) == ["free 12", "free 12", "free 48"]


def test_workspace_goes_back_after_the_launch(cuda, cupy):
    cuda.set(workspace=1000)
    out = cupy.of(np.zeros((3, 4), np.float32))
    lanenorm.layer_norm(cupy.of(numbers((3, 4))), out=out)
    asked = [f"cudaStreamIsCapturing {0x100}", "alloc 1000 device 0"]
    launched = [f"launch layer_norm_forward device 0 stream {0x100}", "free 1000"]
    assert cuda.log() == ["cudaSetDevice 0", *asked, *launched]


def test_workspace_of_a_captured_stream_is_the_graphs(cuda, cupy):
    """Not the pool's, which would lend it to others while the graph writes to it."""
    cuda.set(workspace=1000, capturing=1)
    out = cupy.of(np.zeros((3, 4), np.float32))
    lanenorm.layer_norm(cupy.of(numbers((3, 4))), out=out)
    assert cuda.log() == [
        "cudaSetDevice 0",
        f"cudaStreamIsCapturing {0x100}",
        f"cudaMallocAsync 1000 stream {0x100}",
        f"launch layer_norm_forward device 0 stream {0x100}",
        f"cudaFreeAsync stream {0x100}",
    ]


@pytest.mark.parametrize("stream", [0, 1], ids=["default", "legacy"])
def test_legacy_stream_is_not_asked(cuda, cupy, stream):
    """It cannot be captured, and the question is an error while another stream is."""
    cuda.set(workspace=1000, capturing=1)
    cupy.stream = stream
    lanenorm.layer_norm(cupy.of(numbers((3, 4))))
    log = cuda.log()
    assert f"launch layer_norm_forward device 0 stream {stream}" in log
    assert "alloc 1000 device 0" in log
    assert not [line for line in log if line.startswith(("cudaStreamIsCapturing", "cudaMalloc"))]


def test_device_of_the_arrays_is_current_during_the_call(cuda, cupy):
    """Outputs and launch belong to it, whichever was current; that one is current again afterwards."""
    cuda.set(workspace=1000)
    y = lanenorm.layer_norm(cupy.of(numbers((3, 4)), device=1))
    assert y.data.device_id == 1
    log = cuda.log()
    assert log[:3] == ["cudaSetDevice 1", "setDevice 1", "alloc 48 device 1"]
    assert f"launch layer_norm_forward device 1 stream {0x101}" in log
    assert "alloc 1000 device 1" in log
    assert log[-1] == "setDevice 0"
    assert cupy.current == 0


def test_device_is_given_back_after_a_failure(cuda, cupy):
    cuda.set(fail=1, workspace=1000)
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        lanenorm.layer_norm(cupy.of(numbers((3, 4)), device=1))
    assert cupy.current == 0
    assert "free 1000" in cuda.log()


# ---- Refusals -------------------------------------------------------------------------------------------------------


def call(operation, cupy):
    """Some call of that operation."""
    x, vector = cupy.of(numbers((3, 4))), cupy.of(np.ones(4, np.float32))
    column = cupy.of(np.ones((3, 1), np.float32))
    positional = {
        "layer_norm": (x,),
        "layer_norm_forward": (x,),
        "layer_norm_backward": (x, x, column, column),
        "batch_norm": (x, vector, vector),
        "batch_norm_forward": (x,),
        "batch_norm_backward": (x, x, vector, vector),
    }
    return getattr(lanenorm, operation)(*positional[operation])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_without_image_names_operation_call_and_what_to_do(cuda, cupy, operation):
    cuda.set(fail=1)
    match = (
        rf"^{operation}: cudaLaunchKernelExC failed: cudaErrorNoKernelImageForDevice \(a text\); "
        r"build .*LANENORM_CUDA_ARCHITECTURES"
    )
    with pytest.raises(RuntimeError, match=match):
        call(operation, cupy)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_failure_before_a_launch_names_operation_and_call(cuda, cupy, operation):
    cuda.set(shared=300 * 1024)
    with pytest.raises(RuntimeError, match=rf"^{operation}: cudaFuncSetAttribute failed: cudaErrorInvalidValue"):
        call(operation, cupy)


def test_shared_memory_is_asked_for_once(cuda, cupy):
    """48 KB are there without; attributes of a kernel only grow."""
    for kilobytes in (40, 100, 60, 100, 101):
        cuda.set(shared=kilobytes * 1024)
        call("layer_norm", cupy)
    asked = [line.split()[1] for line in cuda.log() if line.startswith("cudaFuncSetAttribute")]
    assert asked == [str(100 * 1024), str(101 * 1024)]


@pytest.mark.parametrize("where", ["output", "workspace"])
def test_out_of_memory(cuda, cupy, where):
    cuda.set(workspace=1000)
    x = cupy.of(numbers((3, 4)))
    out = cupy.of(np.zeros((3, 4), np.float32)) if where == "workspace" else None
    cupy.failing = OutOfMemoryError("Out of memory allocating 48 bytes (allocated so far: 0 bytes).")
    match = r"^layer_norm: cupy.cuda.alloc failed for (48|1000) bytes on CUDA device 0: Out of memory.*free_all_blocks"
    with pytest.raises(RuntimeError, match=match):
        lanenorm.layer_norm(x, out=out)
    assert not [line for line in cuda.log() if line.startswith("launch")]


def test_out_of_memory_of_a_graph(cuda, cupy):
    cuda.set(workspace=1000, capturing=1, exhausted=1)
    with pytest.raises(RuntimeError, match=r"^layer_norm: cudaMallocAsync failed: cudaErrorMemoryAllocation .*free"):
        lanenorm.layer_norm(cupy.of(numbers((3, 4))))


def test_memory_of_a_graph_that_cannot_be_given_back(cuda, cupy):
    cuda.set(workspace=1000, capturing=1, lost=1)
    with pytest.raises(RuntimeError, match=r"^layer_norm: cudaFreeAsync failed: cudaErrorMemoryAllocation"):
        lanenorm.layer_norm(cupy.of(numbers((3, 4))))


def test_other_exceptions_of_an_allocator_pass_unchanged(cuda, cupy):
    for failure in (KeyboardInterrupt(), ZeroDivisionError("somebody's own allocator")):
        cupy.failing = failure
        with pytest.raises(type(failure)):
            lanenorm.layer_norm(cupy.of(numbers((3, 4))))


def test_two_devices(cuda, cupy):
    x, weight = cupy.of(numbers((3, 4))), cupy.of(np.ones(4, np.float32), device=1)
    text = "layer_norm: x lies on CUDA device 0 and weight on CUDA device 1, expected arrays on one device"
    with pytest.raises(TypeError, match=f"^{text}$"):
        lanenorm.layer_norm(x, weight)
    with pytest.raises(TypeError, match=r"^layer_norm: x lies on CUDA device 0 and out on CUDA device 1"):
        lanenorm.layer_norm(x, out=cupy.of(numbers((3, 4)), device=1))
    with pytest.raises(
        TypeError, match=r"^batch_norm_forward: x lies on CUDA device 0 and running_mean on CUDA device 1"
    ):
        lanenorm.batch_norm_forward(x, running_mean=weight, running_var=weight)


def test_mixed_libraries(cuda, cupy):
    x, weight = cupy.of(numbers((3, 4))), np.ones(4, np.float32)
    with pytest.raises(TypeError, match=r"x has type cupy.ndarray and weight has type numpy.ndarray"):
        lanenorm.layer_norm(x, weight)
    with pytest.raises(TypeError, match=r"x has type cupy.ndarray and running_mean has type numpy.ndarray"):
        lanenorm.batch_norm(x, weight, weight)
    with pytest.raises(TypeError, match=r"x has type numpy.ndarray and out has type cupy.ndarray"):
        lanenorm.layer_norm(x.get(), out=x)


def test_subclass(cuda, cupy):
    x = cupy.of(numbers((3, 4)))
    x.__class__ = Subclass
    with pytest.raises(TypeError, match=r"^layer_norm: x has type .*Subclass, expected numpy.ndarray or cupy.ndarray$"):
        lanenorm.layer_norm(x)


REFUSED = {
    "shape of weight": (ValueError, r"weight has shape \(5,\), expected \(4,\), axis -1 of x \(3, 4\)"),
    "dtype of x": (TypeError, r"x has dtype int32, expected float16, bfloat16, float32 or float64"),
    "byte order of x": (TypeError, r"x has dtype >f4, expected"),
    "dtype of bias": (TypeError, r"bias has dtype float64, expected float32"),
    "axis": (np.exceptions.AxisError, r"axis 2 is out of bounds"),
    "eps": (ValueError, r"eps is -1, expected"),
    "layout of out": (ValueError, r"out has strides \(4, 12\), expected \(16, 4\)"),
    "overlap": (ValueError, r"out shares memory with weight"),
    "part of x": (ValueError, r"out shares memory with x"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_call_touches_nothing(cuda, cupy, fault):
    """The checks are those of NumPy arrays, and come before anything is asked of CUDA or of the allocator."""
    memory = numbers(64)
    x = memory[:12].reshape(3, 4)
    out = np.zeros((3, 4), np.float32)
    arguments = {
        "shape of weight": {"weight": np.ones(5, np.float32)},
        "dtype of x": {"x": x.astype(np.int32)},
        "byte order of x": {"x": x.astype(">f4")},
        "dtype of bias": {"bias": np.ones(4)},
        "axis": {"axis": 2},
        "eps": {"eps": -1},
        "layout of out": {"out": np.asfortranarray(out)},
        "overlap": {"weight": memory[28:32], "out": memory[20:32].reshape(3, 4)},
        "part of x": {"out": memory[1:13].reshape(3, 4)},
    }[fault]
    before = memory.copy()
    call = {"x": x, "out": out} | arguments
    exception, match = REFUSED[fault]
    with pytest.raises(exception, match=rf"^layer_norm: {match}"):
        lanenorm.layer_norm(**{k: cupy.of(v) if isinstance(v, np.ndarray) else v for k, v in call.items()})
    assert np.array_equal(memory, before)
    assert not out.any()
    assert not [line for line in cuda.log() if not line.startswith("free")]


# ---- Types ----------------------------------------------------------------------------------------------------------

STUB = ast.parse((Path(lanenorm.__file__).parent / "_cuda.pyi").read_text(encoding="utf-8"))
STUB_FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_stub_has_the_names_of_the_module(host_module):
    module, _ = host_module
    assert set(STUB_FUNCTIONS) == {name for name in dir(module) if not name.startswith("_")}
    for name in OPERATIONS:
        arguments = STUB_FUNCTIONS[name].args
        assert not arguments.args, "arguments are positional-only"
        assert getattr(module, name).__doc__ == f"{name}({', '.join(a.arg for a in arguments.posonlyargs)}, /)"
