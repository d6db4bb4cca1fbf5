"""What only a GPU can show: streams, graphs, devices, memory pools, and the bytes of the emulated kernels.

Values over sizes, dtypes, tails and offsets are tested in test_cuda_layer_norm.py and test_cuda_batch_norm.py, emulated
and on the device.
"""

import gc
import threading

import numpy as np
import pytest
import reference
from cases import DTYPES, by_dtype, check_backward, check_forward, normal, parameters

import lanenorm

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
REASON = lanenorm.cuda_unavailable_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"no CUDA: {REASON}")]

# A shape of every size class of the forward, and of the backward with and without partial sums; in float32 rows of
# 128 B to 4 MB.
SHAPES = [(300, 32), (1000, 100), (257, 768), (300, 4096), (70, 20000), (9, 70001), (3, 300000), (2, 1048577)]


# Batch norm: 2-D, channels-last, small planes as columns; planes of a warp, a block, a cluster, and beyond.
BATCH_SHAPES = [
    (64, 300),
    (5000, 64),
    (1568, 2048),
    (40000, 64),
    (32, 64, 7, 7),
    (4, 70, 20, 20),
    (32, 64, 28, 28),
    (32, 64, 112, 112),
]
BATCH_SHAPES += [(64, 3, 224, 224)]


def on_device(*arrays):
    return [cupy.asarray(array) for array in arrays]


def host(result):
    """A result on the host, named as it was; None stays None."""
    return type(result)(*(None if part is None else part.get() for part in result))


def everything(x, dy, weight, bias, **keywords):
    """y, mean, rstd, dx, dweight, dbias of CuPy arrays."""
    forward = lanenorm.layer_norm_forward(x, weight, bias, **keywords)
    return [*forward, *lanenorm.layer_norm_backward(dy, x, forward.mean, forward.rstd, weight, **keywords)]


def everything_of_batch(x, dy, weight, bias, **keywords):
    """y, mean, rstd, running statistics, inference, dx, dweight, dbias of CuPy arrays."""
    running = cupy.zeros(x.shape[1], np.float32), cupy.ones(x.shape[1], np.float32)
    statistics = dict(zip(("running_mean", "running_var"), running, strict=True))
    forward = lanenorm.batch_norm_forward(x, weight, bias, **statistics, **keywords)
    backward = lanenorm.batch_norm_backward(dy, x, forward.mean, forward.rstd, weight, **keywords)
    return [*forward, *running, lanenorm.batch_norm(x, *running, weight, bias, **keywords), *backward]


def same_bytes(results, expected):
    return all(a.get().tobytes() == b.get().tobytes() for a, b in zip(results, expected, strict=True))


@pytest.fixture
def arrays(rng):
    """x, dy, weight and bias of a shape on the device; one backward of them needs a workspace."""

    def make(shape=(3000, 768), dtype=np.float32):
        return on_device(*(normal(rng, shape, dtype, 3.0 - 3 * i) for i in range(2)), *parameters(rng, shape[1], dtype))

    return make


SPIN = r"""
extern "C" __global__ void spin(long long cycles, const float* from, float* to, int count) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
"""


@pytest.fixture(scope="module")
def copy_slowly():
    """copy_slowly(from, to): on the current stream, about a second late."""
    kernel = cupy.RawKernel(SPIN, "spin")
    cycles = cupy.cuda.Device().attributes["ClockRate"] * 1000

    def launch(source, target):
        kernel((1,), (256,), (np.int64(cycles), source, target, np.int32(source.size)))

    return launch


# ---- By hand, and against the reference -----------------------------------------------------------------------------


def test_layer_norm_by_hand():
    x = cupy.asarray(np.array([[1, -1, 1, -1], [5, 5, 5, 5]], np.float32))
    bias = cupy.asarray(np.array([1, 2, 3, 4], np.float32))
    assert lanenorm.layer_norm(x[:1], eps=0.0).get().tolist() == [[1, -1, 1, -1]]
    assert lanenorm.layer_norm(x, None, bias)[1].get().tolist() == [1, 2, 3, 4]
    _, mean, rstd = lanenorm.layer_norm_forward(x[:1], eps=0.0)
    assert (mean.get().item(), rstd.get().item()) == (0, 1)
    dy = cupy.asarray(np.array([[1, 0, 0, 0]], np.float32))
    assert lanenorm.layer_norm_backward(dy, x[:1], mean, rstd).dx.get().tolist() == [[0.5, 0, -0.5, 0]]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_against_the_reference(rng, shape, dtype):
    x, dy = normal(rng, shape, dtype, 3.0), normal(rng, shape, dtype)
    weight, bias = parameters(rng, shape[1], dtype)
    forward = lanenorm.layer_norm_forward(*on_device(x, weight, bias))
    exact = reference.layer_norm(x, weight, bias)
    check_forward(host(forward), exact, x, weight, bias)
    backward = lanenorm.layer_norm_backward(*on_device(dy, x), forward.mean, forward.rstd, cupy.asarray(weight))
    check_backward(host(backward), reference.layer_norm_backward(dy, x, weight), x, weight)


@by_dtype
@pytest.mark.parametrize("shape", [(40, 32), (40, 100), (37, 768), (20, 4096), (5, 20000), (3, 70001)], ids=str)
def test_bytes_are_those_of_the_emulation(rng, shape, dtype):
    """So what the emulated kernels are tested for holds here."""
    emulated = pytest.importorskip("cuda_on_host", reason="the emulated kernels cannot be built here")
    attributes = cupy.cuda.Device().attributes
    emulated.set_device(
        multiprocessors=attributes["MultiProcessorCount"],
        shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_per_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
        architecture=int(cupy.cuda.Device().compute_capability),
        max_cluster=16 if int(cupy.cuda.Device().compute_capability) >= 90 else 1,
    )
    x, dy = normal(rng, shape, dtype, 3.0), normal(rng, shape, dtype)
    weight, bias = parameters(rng, shape[1], dtype)
    forward = emulated.layer_norm_forward(x, weight, bias)
    expected = [*forward, *emulated.layer_norm_backward(dy, x, forward[1], forward[2], weight)]
    found = everything(*on_device(x, dy, weight, bias))
    names = ("y", "mean", "rstd", "dx", "dweight", "dbias")
    different = [n for n, a, b in zip(names, found, expected, strict=True) if a.get().tobytes() != b.tobytes()]
    assert not different


@by_dtype
@pytest.mark.parametrize("shape", BATCH_SHAPES, ids=str)
def test_batch_norm_against_the_reference(rng, shape, dtype):
    x, dy = normal(rng, shape, dtype, 3.0), normal(rng, shape, dtype)
    weight, bias = parameters(rng, shape[1], dtype)
    gamma, beta = (reference.spread(p, (1,), x.ndim) for p in (weight, bias))
    forward = lanenorm.batch_norm_forward(*on_device(x, weight, bias))
    check_forward(host(forward), reference.batch_norm_forward(x, weight, bias), x, gamma, beta)
    backward = lanenorm.batch_norm_backward(*on_device(dy, x), forward.mean, forward.rstd, cupy.asarray(weight))
    check_backward(host(backward), reference.batch_norm_backward(dy, x, weight), x, weight)


def test_batch_norm_layer_trains_as_on_numpy(rng):
    """BatchNorm with xp=cupy, its running statistics and its inference."""
    x, dy = (normal(rng, (16, 24, 20, 20), np.float32, 2.0 - 2 * i) for i in range(2))
    ours, theirs = lanenorm.BatchNorm(24, xp=cupy), lanenorm.BatchNorm(24)
    for layer, array in ((ours, cupy.asarray), (theirs, np.asarray)):
        for _ in range(3):
            layer(array(x))
            layer.backward(array(dy))
            layer.weight -= 0.01 * layer.dweight
    for name, value in ours.state_dict().items():
        np.testing.assert_allclose(cupy.asnumpy(value), theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.eval()(cupy.asarray(x)).get(), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_layer_trains_as_on_numpy(rng):
    """The layer with xp=cupy: parameters, gradients and state stay on the device."""
    x, dy = normal(rng, (64, 96), np.float32), normal(rng, (64, 96), np.float32)
    ours, theirs = lanenorm.LayerNorm(96, xp=cupy), lanenorm.LayerNorm(96)
    for layer, array in ((ours, cupy.asarray), (theirs, np.asarray)):
        for _ in range(3):
            layer(array(x))
            layer.backward(array(dy))
            layer.weight -= 0.01 * layer.dweight
            layer.bias -= 0.01 * layer.dbias
    for name, value in ours.state_dict().items():
        assert type(value) is cupy.ndarray
        np.testing.assert_allclose(value.get(), theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
    ours.load_state_dict({name: cupy.ones_like(value) for name, value in ours.state_dict().items()})
    assert (ours.weight == 1).all()


# ---- Streams --------------------------------------------------------------------------------------------------------


def test_work_is_queued_on_the_current_stream(arrays, copy_slowly):
    """Behind what is on that stream: x gets its values a second late. Nothing waits for it."""
    x, dy, weight, bias = arrays()
    expected = everything(x, dy, weight, bias)
    late = cupy.zeros_like(x)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        everything(late, dy, weight, bias)  # kernels are loaded, and the pool has memory for this stream
        stream.synchronize()
        copy_slowly(x, late)
        results = everything(late, dy, weight, bias)
        waited = stream.done
    assert not waited, "a call has waited for the stream"
    stream.synchronize()
    assert same_bytes(results, expected)


def test_streams_at_once(arrays):
    """Eight streams with data of their own, many calls deep: workspaces are not mixed up, and bits do not change."""
    problems = [arrays((1000 + 37 * i, 768)) for i in range(8)]
    expected = [everything(*problem) for problem in problems]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        results = []
        for stream, problem in zip(streams, problems, strict=True):
            with stream:
                results.append(everything(*problem))
        for stream in streams:
            stream.synchronize()
        assert all(same_bytes(a, b) for a, b in zip(results, expected, strict=True))


def test_threads_at_once(arrays):
    """The current stream and the current device belong to a Python thread."""
    problems = [arrays((500 + 37 * i, 1000)) for i in range(4)]
    expected = [everything(*problem) for problem in problems]
    cupy.cuda.Device().synchronize()
    wrong = []

    def work(number):
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                for _ in range(50):
                    results = everything(*problems[number])
                    stream.synchronize()
                    if not same_bytes(results, expected[number]):
                        wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_repetition_gives_the_same_bits(arrays):
    for shape in SHAPES:
        problem = arrays(shape)
        expected = everything(*problem)
        assert all(same_bytes(everything(*problem), expected) for _ in range(5)), shape


def test_batch_norm_on_streams_at_once_and_again(rng):
    """Every layout on a stream of its own, many times: the same bits, workspaces and running statistics apart."""
    problems = [
        on_device(
            *(normal(rng, shape, np.float32, 3.0 - 3 * i) for i in range(2)), *parameters(rng, shape[1], np.float32)
        )
        for shape in BATCH_SHAPES
    ]
    expected = [everything_of_batch(*problem) for problem in problems]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    cupy.cuda.Device().synchronize()
    for _ in range(5):
        results = []
        for stream, problem in zip(streams, problems, strict=True):
            with stream:
                results.append(everything_of_batch(*problem))
        cupy.cuda.Device().synchronize()
        assert all(same_bytes(a, b) for a, b in zip(results, expected, strict=True))


# ---- Graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3000, 768), (64, 20000), (3, 300000)], ids=str)
def test_graph_capture(arrays, shape):
    """A captured call is replayed on new values, while others use the memory that a workspace would have had."""
    x, dy, weight, bias = arrays(shape)
    changed = cupy.asarray(x.get()[::-1].copy())
    expected = everything(changed, dy, weight, bias)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        everything(x, dy, weight, bias)  # modules are loaded before
        stream.synchronize()
        stream.begin_capture()
        results = everything(x, dy, weight, bias)
        graph = stream.end_capture()
        x[...] = changed
        others = [cupy.full(n, np.nan, np.float32) for n in (1 << k for k in range(8, 22))]
        for _ in range(3):
            graph.launch()
        stream.synchronize()
    assert same_bytes(results, expected)
    assert all(cupy.isnan(other).all() for other in others), "the graph wrote to memory that is not its own"


@pytest.mark.parametrize("shape", [(5000, 64), (32, 64, 7, 7), (32, 64, 28, 28), (64, 3, 224, 224)], ids=str)
def test_graph_capture_of_running_statistics(rng, shape):
    """Every replay moves the running statistics on."""
    x = cupy.asarray(normal(rng, shape, np.float32, 3.0))
    mean, var = cupy.zeros(shape[1], np.float32), cupy.ones(shape[1], np.float32)
    expected = mean.copy(), var.copy()
    for _ in range(3):
        y = lanenorm.batch_norm_forward(x, running_mean=expected[0], running_var=expected[1]).y
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        result = lanenorm.batch_norm_forward(x, running_mean=mean, running_var=var)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
        stream.synchronize()
    assert same_bytes([mean, var, result.y], [*expected, y])


# ---- Devices --------------------------------------------------------------------------------------------------------


def test_device_of_the_arrays_is_used(arrays):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    expected = everything(*arrays())
    with cupy.cuda.Device(1):
        problem = [cupy.asarray(a.get()) for a in arrays()]
    assert cupy.cuda.runtime.getDevice() == 0
    results = everything(*problem)
    assert cupy.cuda.runtime.getDevice() == 0
    assert all(a.device.id == 1 for a in results)
    cupy.cuda.Device(1).synchronize()
    assert same_bytes(results, expected)
    with pytest.raises(TypeError, match="x lies on CUDA device 0 and weight on CUDA device 1"):
        lanenorm.layer_norm(arrays()[0], problem[2])


def test_current_device_is_left_alone(arrays):
    before = cupy.cuda.runtime.getDevice()
    everything(*arrays())
    assert cupy.cuda.runtime.getDevice() == before


# ---- Memory ---------------------------------------------------------------------------------------------------------


def allocators():
    yield "a pool of its own", lambda: cupy.cuda.MemoryPool().malloc
    yield "no pool", lambda: None
    yield "cudaMallocAsync", lambda: cupy.cuda.MemoryAsyncPool().malloc


@pytest.mark.parametrize(("name", "make"), list(allocators()), ids=[name for name, _ in allocators()])
def test_memory_comes_from_the_current_allocator(arrays, name, make):
    """Outputs and workspace; every byte goes back."""
    problem = arrays()
    expected = everything(*problem)
    default = cupy.get_default_memory_pool()
    cupy.cuda.Device().synchronize()
    gc.collect()
    before = default.used_bytes(), default.total_bytes()
    allocator = cupy.cuda.get_allocator()
    try:
        cupy.cuda.set_allocator(make())
        results = everything(*problem)
        cupy.cuda.Device().synchronize()
    finally:
        cupy.cuda.set_allocator(allocator)
    assert (default.used_bytes(), default.total_bytes()) == before
    assert same_bytes(results, expected)


def test_out_of_memory(arrays):
    """Says which call failed for how much; afterwards all is as before."""
    x, dy, weight, bias = arrays((4000, 4096))
    expected = everything(x, dy, weight, bias)
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=x.nbytes // 2)
    with (
        cupy.cuda.using_allocator(pool.malloc),
        pytest.raises(
            RuntimeError, match=rf"^layer_norm: cupy.cuda.alloc failed for {x.nbytes} bytes on CUDA device 0"
        ),
    ):
        lanenorm.layer_norm(x)
    out = cupy.empty_like(x)
    pool.set_limit(size=4096 * 4 * 2 + 2048)  # dweight and dbias, but no workspace
    with (
        cupy.cuda.using_allocator(pool.malloc),
        pytest.raises(RuntimeError, match=r"^layer_norm_backward: cupy.cuda.alloc failed for .*free_all_blocks"),
    ):
        lanenorm.layer_norm_backward(dy, x, *expected[1:3], weight, out=out)
    assert pool.used_bytes() == 0
    assert same_bytes(everything(x, dy, weight, bias), expected)


def test_large_more_than_2_31_elements(rng):
    """Offsets beyond 32 bits: every row of the batch is the same one, so is every row of the result."""
    rows, length = 2**31 // 1000 + 70, 1000
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * rows * length * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    row = normal(rng, (1, length), np.float16, 3.0)
    x = cupy.empty((rows, length), np.float16)
    x[...] = cupy.asarray(row)
    alone = lanenorm.layer_norm_forward(x[:1])
    exact = reference.layer_norm(row)
    reference.check("normalized", alone.y.get(), exact.normalized, exact.largest)
    y, mean, rstd = lanenorm.layer_norm_forward(x)
    assert (y.view(np.uint16) == alone.y.view(np.uint16)).all()
    assert (mean == alone.mean).all()
    assert (rstd == alone.rstd).all()
    dx, _, dbias = lanenorm.layer_norm_backward(x, x, mean, rstd, out=y)
    lone = lanenorm.layer_norm_backward(x[:1], x[:1], alone.mean, alone.rstd, param_grads=False)
    assert (dx.view(np.uint16) == lone.dx.view(np.uint16)).all()
    reference.check("dbias", dbias.get(), reference.widen(row)[0] * rows, np.abs(reference.widen(row)[0]) * rows)


def test_large_one_row_of_more_than_2_31_elements():
    """One statistic of more than 2^31 values, ±1 by turns: mean 0, variance 1."""
    count = 2**31 + 1000
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * count * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    x = cupy.ones((1, count), np.float16)
    x[:, 1::2] = -1
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    assert mean.get().item() == 0
    assert rstd.get().item() == 1
    assert (y == x).all()


@pytest.mark.parametrize("shape", [(2**16, 33, 1000), (2**31 // 64 + 1000, 64)], ids=["planes", "columns"])
def test_large_batch_norm_of_more_than_2_31_elements(shape):
    """Channels of ±1 by turns: mean 0, variance 1."""
    count = int(np.prod(shape))
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * count * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    x = cupy.ones(shape, np.float16)
    x[1::2] = -1
    y, mean, rstd = lanenorm.batch_norm_forward(x, eps=0.0)
    assert (mean == 0).all()
    assert (rstd == 1).all()
    assert (y == x).all()
    dx, dweight, dbias = lanenorm.batch_norm_backward(x, x, mean, rstd, out=y)
    assert (dx == 0).all()
    assert (dweight == count // shape[1]).all()
    assert (dbias == 0).all()


def test_dtypes_are_all_there():
    """bfloat16 is among those tested, or this file tests less than it says."""
    assert len(DTYPES) == 4
