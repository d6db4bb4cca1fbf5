"""The same bits, whatever the instruction set, threads, addresses, repetition, place in the batch and strides.

The one kind of test in which results are compared with results: what they should be is tested elsewhere.
"""

import hashlib
import platform
from pathlib import Path

import numpy as np
import pytest
import reference
from cases import DTYPES, LAYOUTS, SAME_ORDER, at_byte, by_dtype, normal, packed, parameters
from conftest import THREAD_COUNTS

import lanenorm

# (shape, axes): rows and columns, short and long, alone and many, and enough work for several threads.
LAYER_PROBLEMS = [
    ((7, 5), -1),
    ((1000, 24), -1),
    ((37, 771), -1),
    ((5, 4097), -1),
    ((2, 300001), -1),
    ((1, 300001), -1),
    ((5, 30000), -1),
    ((400, 1024), -1),
    ((300, 131), 0),
    ((6, 250, 70), 1),
    ((6, 50, 71), (0, 2)),
    ((6, 50, 71), (0, 1)),
    ((5, 6, 7, 80), (1, 3)),
]
BATCH_PROBLEMS = [
    ((70, 33), 1),
    ((5000, 64), 1),
    ((90, 800), 1),
    ((16, 40, 7, 7), 1),
    ((7, 61, 13, 13), 1),
    ((9, 33, 1, 1), 1),
    ((4, 6, 35, 35), 1),
    ((3, 5, 16, 16), 1),
    ((2, 3, 300, 300), 1),
    ((1, 2, 300001), 1),
    ((5, 9, 9, 19), -1),
    ((3, 50, 4, 30), 2),
]
# Portable code is a correctness path and slow: one thread and several are enough.
REDUCED = {"portable": (1, 3)}


def problems(dtype):
    """Inputs of every problem: function, keyword, value of it, arrays. The same at every call."""
    rng = np.random.default_rng(42)
    for operation, list_of in (("layer_norm", LAYER_PROBLEMS), ("batch_norm", BATCH_PROBLEMS)):
        for shape, axis in list_of:
            if operation == "layer_norm":
                parameter_shape = [shape[a] for a in reference.normalize_axes(axis, len(shape))]
            else:
                parameter_shape = shape[axis]
            x, dy = normal(rng, shape, dtype, offset=30.0), normal(rng, shape, dtype)
            yield operation, axis, x, dy, *parameters(rng, parameter_shape, dtype)


def results(operation, axis, x, dy, weight, bias):
    """Every array that the operations give, with all arguments they take."""
    if operation == "layer_norm":
        y, mean, rstd = lanenorm.layer_norm_forward(x, weight, bias, axis=axis)
        return y, mean, rstd, *lanenorm.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis)
    statistics = reference.statistics_dtype(x.dtype)
    running = np.zeros(weight.shape, statistics), np.ones(weight.shape, statistics)
    y, mean, rstd = lanenorm.batch_norm_forward(
        x, weight, bias, running_mean=running[0], running_var=running[1], channel_axis=axis
    )
    gradients = lanenorm.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis=axis)
    inferred = lanenorm.batch_norm(x, mean, np.abs(mean), weight, bias, channel_axis=axis)
    frozen = lanenorm.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis=axis, training=False)
    return y, mean, rstd, *running, *gradients, inferred, *frozen


def digest(arrays):
    """One hash of all bytes, in the order of the elements and not of memory."""
    h = hashlib.sha256()
    for array in arrays:
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


@pytest.fixture(scope="module")
def expected():
    """Hashes of every problem by dtype: the best instruction set on one thread."""
    before = lanenorm.use_isa(lanenorm.available_isas()[0]), lanenorm.set_num_threads(1)
    hashes = {dtype.name: [digest(results(*p)) for p in problems(dtype)] for dtype in DTYPES}
    lanenorm.use_isa(before[0])
    lanenorm.set_num_threads(before[1])
    return hashes


def assert_bits(dtype, expected, **how):
    got = [(p, digest(results(*p))) for p in problems(dtype)]
    wrong = [f"{p[0]} {p[2].shape} axis={p[1]}" for (p, h), e in zip(got, expected[dtype.name], strict=True) if h != e]
    assert not wrong, f"{dtype} {how}: other bits in {wrong}"


@by_dtype
@pytest.mark.parametrize("threads", THREAD_COUNTS)
def test_bits_do_not_depend_on_isa_and_threads(expected, isa, threads, dtype):
    if threads not in REDUCED.get(isa, THREAD_COUNTS):
        pytest.skip(f"{isa}: reduced sweep")
    lanenorm.set_num_threads(threads)
    assert_bits(dtype, expected, isa=isa, threads=threads)


def test_bits_do_not_depend_on_threads_where_some_weights_stay_apart():
    """Threads share columns, then rows; the weight of column 700 leaves float32 when it is folded into rstd."""
    rng = np.random.default_rng(7)
    x, dy = normal(rng, (90, 800), np.float32), normal(rng, (90, 800), np.float32)
    weight, bias = parameters(rng, 800, np.float32)
    x[:, 700] *= 1e-20
    weight[700] = 1e25
    hashes = set()
    for threads in (1, 2, 3, 5):
        lanenorm.set_num_threads(threads)
        result = lanenorm.batch_norm_forward(x, weight, bias, eps=0.0)
        assert np.all(np.isfinite(result.y))
        gradients = lanenorm.batch_norm_backward(dy, x, result.mean, result.rstd, weight)
        hashes.add(digest([*result, *gradients]))
    assert len(hashes) == 1


@by_dtype
def test_bits_do_not_depend_on_repetition(expected, dtype):
    """On threads, which finish in another order every time."""
    lanenorm.set_num_threads(5)
    for _ in range(3):
        assert_bits(dtype, expected)


@by_dtype
@pytest.mark.parametrize("offset", [1, 2, 4, 8, 20, 36, 63])
def test_bits_do_not_depend_on_address(expected, dtype, offset):
    """Every array at a distance from a cache line, `out` too; 1 and 63 are not even aligned to an element."""
    lanenorm.set_num_threads(2)
    for (operation, axis, *arrays), hash_of in zip(problems(dtype), expected[dtype.name], strict=True):
        moved = [at_byte(array, (offset + 4 * k) % 64 if offset % 2 == 0 else offset) for k, array in enumerate(arrays)]
        assert digest(results(operation, axis, *moved)) == hash_of, f"{operation} {arrays[0].shape} axis={axis}"
        x, _, weight, bias = moved
        out = at_byte(np.zeros_like(x), (offset + 12) % 64)
        if operation == "layer_norm":
            lanenorm.layer_norm(x, weight, bias, axis=axis, out=out)
            fresh = lanenorm.layer_norm(arrays[0], *arrays[2:], axis=axis)
        else:
            lanenorm.batch_norm_forward(x, weight, bias, channel_axis=axis, out=out)
            fresh = lanenorm.batch_norm_forward(arrays[0], *arrays[2:], channel_axis=axis).y
        assert np.array_equal(out, fresh), f"{operation} {arrays[0].shape} axis={axis}"


@by_dtype
@pytest.mark.parametrize("layout", SAME_ORDER)
def test_bits_of_sliced_reversed_and_unaligned_inputs_are_those_of_the_packed_copy(isa, dtype, layout):
    """Whatever axis lies innermost, as long as it stays the same one."""
    rng = np.random.default_rng(7)
    arrange = LAYOUTS[layout]
    layer = [((37, 131), -1), ((300, 31), 0), ((6, 25, 70), 1), ((6, 25, 70), (0, 2)), ((3, 2100), -1)]
    batch = [((70, 33), 1), ((6, 4, 7, 7), 1), ((3, 4, 17, 17), 1), ((2, 9, 9, 19), -1)]
    for operation, axis, shape in [("layer_norm", a, s) for s, a in layer] + [("batch_norm", a, s) for s, a in batch]:
        axes = reference.normalize_axes(axis, len(shape))
        values, gradient = normal(rng, shape, dtype, 5.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, [shape[a] for a in axes], dtype)
        x, dy, strange_weight, strange_bias = (arrange(a) for a in (values, gradient, weight, bias))
        got = results(operation, axis, x, dy, strange_weight, strange_bias)
        wanted = results(operation, axis, packed(x), packed(dy), weight, bias)
        assert digest(got) == digest(wanted), f"{operation} {shape} axis={axis}"
        # dy alone in another layout
        assert digest(results(operation, axis, packed(x), dy, weight, bias)) == digest(wanted), f"{shape} dy"
    for inner in (0, 1):  # transposed in memory, and then sliced, reversed, unaligned
        values = normal(rng, (45, 70), dtype)
        first = values if inner else values.T
        x = arrange(np.ascontiguousarray(first)) if inner else arrange(np.ascontiguousarray(first)).T
        assert np.array_equal(x, values)
        for axis in (0, 1):
            weight, bias = parameters(rng, values.shape[axis], dtype)
            for operation in ("layer_norm", "batch_norm"):
                got = results(operation, axis, x, x, weight, bias)
                assert digest(got) == digest(results(operation, axis, packed(x), packed(x), weight, bias))


@by_dtype
@pytest.mark.parametrize("count", [1, 3, 8, 15, 16, 17, 24, 31, 33, 63, 64, 100, 127, 129, 768, 1025, 5000])
def test_bits_of_a_row_do_not_depend_on_its_place_in_the_batch(isa, dtype, count):
    """Row by row, in batches of several sizes, and shifted within the batch."""
    rng = np.random.default_rng(count)
    rows = 70 if count <= 129 else 19
    x, dy = normal(rng, (rows, count), dtype, 5.0), normal(rng, (rows, count), dtype)
    weight, bias = parameters(rng, count, dtype)
    whole = results("layer_norm", -1, x, dy, weight, bias)[:4]
    for size in (1, 2, 3, 5, rows - 1):
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            alone = results("layer_norm", -1, x[part], dy[part], weight, bias)[:4]
            assert digest(alone) == digest(a[part] for a in whole), f"rows {start} to {start + size}"
            if size == 1 and start > 12:
                break
    rolled = results("layer_norm", -1, np.roll(x, 5, 0), np.roll(dy, 5, 0), weight, bias)[:4]
    assert digest(rolled) == digest(np.roll(a, 5, 0) for a in whole)
    # the batch of many threads
    many = np.tile(x, (-(-20000 // count // rows) + 1, 1))
    lanenorm.set_num_threads(3)
    y = lanenorm.layer_norm(many, weight, bias)
    assert np.array_equal(y, np.tile(whole[0], (len(many) // rows, 1)))


@pytest.mark.parametrize(("dtype", "tiny"), [(np.float32, 1e-33), (np.float64, 1e-140)])
@pytest.mark.parametrize("count", [5, 40, 127, 200])
@pytest.mark.parametrize("channels", [False, True])  # LN, and BN of one image: rows with a weight each
def test_bits_of_rows_out_of_range_do_not_depend_on_their_place_in_the_batch(rng, isa, dtype, tiny, count, channels):
    """Rows that are finished together, of which some are redone: at every place of a group, alone and side by side."""
    x, dy = normal(rng, (45, count), dtype, 1.0), normal(rng, (45, count), dtype)
    redone = [2, 9, 10, 15, 16, 20, 29, 31, 37, 44]
    x[redone] *= dtype(tiny)
    weight, bias = parameters(rng, count, dtype)

    def all_of(x, dy):
        if channels:
            w = np.full(len(x), 1.5, dtype)
            y, mean, rstd = lanenorm.batch_norm_forward(x[None], w, w, eps=0.0)
            return [y[0], mean, rstd, lanenorm.batch_norm_backward(dy[None], x[None], mean, rstd, w).dx[0]]
        y, mean, rstd = lanenorm.layer_norm_forward(x, weight, bias, eps=0.0)
        return [y, mean, rstd, lanenorm.layer_norm_backward(dy, x, mean, rstd, weight).dx]

    whole = all_of(x, dy)
    assert np.all(np.isfinite(whole[0]))
    assert np.all(whole[2].ravel()[redone] > 1e20)
    for row in range(45):
        alone = all_of(x[row : row + 1], dy[row : row + 1])
        assert digest(alone) == digest(a[row : row + 1] for a in whole), f"row {row}"


@by_dtype
def test_bits_of_a_column_do_not_depend_on_its_place_in_the_batch(isa, dtype):
    """Normalized over a leading axis: slices are columns, at least two of them so that they stay columns."""
    rng = np.random.default_rng(3)
    x, dy = normal(rng, (300, 77), dtype, 5.0), normal(rng, (300, 77), dtype)
    weight, bias = parameters(rng, 300, dtype)
    whole = results("layer_norm", 0, x, dy, weight, bias)[:4]
    rolled = results("layer_norm", 0, np.roll(x, 5, 1), np.roll(dy, 5, 1), weight, bias)[:4]
    assert digest(rolled) == digest(np.roll(a, 5, 1) for a in whole)
    for part in (slice(0, 2), slice(3, 20), slice(10, 77)):
        alone = results("layer_norm", 0, *(np.ascontiguousarray(a[:, part]) for a in (x, dy)), weight, bias)[:4]
        assert digest(alone) == digest(a[:, part] for a in whole)


@by_dtype
def test_bits_of_a_channel_do_not_depend_on_the_others(isa, dtype):
    """Channels shifted, in every layout: the kernels of batch normalization know nothing of the channel's number."""
    rng = np.random.default_rng(4)
    for shape in ((70, 33), (6, 40, 7, 7), (3, 6, 20, 20)):
        x, dy = normal(rng, shape, dtype, 5.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, shape[1], dtype)
        whole = results("batch_norm", 1, x, dy, weight, bias)
        rolled = results("batch_norm", 1, *(np.roll(a, 3, 1) for a in (x, dy)), np.roll(weight, 3), np.roll(bias, 3))
        assert digest(rolled) == digest(np.roll(a, 3, 1 if a.ndim > 1 else 0) for a in whole), str(shape)


@by_dtype
def test_bits_of_in_place_results(dtype, expected):
    """out=x and, in a backward, out=dy."""
    lanenorm.set_num_threads(3)
    for operation, axis, x, dy, weight, bias in problems(dtype):
        if operation == "layer_norm":
            forward = lanenorm.layer_norm_forward(x, weight, bias, axis=axis)
            backward = lanenorm.layer_norm_backward(dy, x, *forward[1:], weight, axis=axis)
            in_dy = lanenorm.layer_norm_backward(own := dy.copy(), x, *forward[1:], weight, axis=axis, out=own)
            in_x = lanenorm.layer_norm_forward(own := x.copy(), weight, bias, axis=axis, out=own)
        else:
            forward = lanenorm.batch_norm_forward(x, weight, bias, channel_axis=axis)
            backward = lanenorm.batch_norm_backward(dy, x, *forward[1:], weight, channel_axis=axis)
            in_dy = lanenorm.batch_norm_backward(own := dy.copy(), x, *forward[1:], weight, channel_axis=axis, out=own)
            in_x = lanenorm.batch_norm_forward(own := x.copy(), weight, bias, channel_axis=axis, out=own)
        assert digest(in_x) == digest(forward), f"{operation} {x.shape} axis={axis}"
        assert digest(in_dy) == digest(backward), f"{operation} {x.shape} axis={axis}"


def test_bits_in_another_process(run_python, expected):
    """Nothing of the process (address space, thread start, environment) gets into the results."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_bits as t; from cases import DTYPES\n"
        "print(*[t.digest(t.results(*p)) for p in t.problems(DTYPES[-2])])"
    )
    done = run_python(code, str(Path(__file__).parent), LANENORM_NUM_THREADS="3")
    assert done.stdout.split() == expected[DTYPES[-2].name]


@pytest.mark.parametrize("inner", [0, 1])
def test_bits_with_another_rounding_mode_of_the_caller(run_python, inner):
    """The floating-point environment is set for the call, on every thread, and put back."""
    code = f"""
import ctypes, hashlib, sys
import numpy as np, lanenorm
libm = ctypes.CDLL("libm.so.6")
x = np.random.default_rng(0).normal(0.1, 1, (300, 1000)).astype(np.float32)
x = np.asfortranarray(x) if {inner} == 0 else x
lanenorm.set_num_threads(3)
def run():
    y, mean, rstd = lanenorm.layer_norm_forward(x)
    gradients = lanenorm.layer_norm_backward(x, x, mean, rstd)
    return b"".join(np.ascontiguousarray(a).tobytes() for a in (y, mean, rstd, *gradients))
expected = run()
for mode in map(int, sys.argv[1:]):
    assert libm.fesetround(mode) == 0
    got = run()
    kept = libm.fegetround()
    libm.fesetround(0)
    assert kept == mode, (kept, mode)
    assert got == expected, hex(mode)
"""
    modes = {"x86_64": (0x400, 0x800, 0xC00), "aarch64": (0x400000, 0x800000, 0xC00000)}[platform.machine()]
    run_python(code, *map(str, modes))


def test_bits_when_the_caller_flushes_subnormals(run_python):
    """MXCSR with flush-to-zero and denormals-are-zero, as a library built with -ffast-math leaves it behind."""
    if platform.machine() != "x86_64":
        pytest.skip("sets MXCSR, which only x86-64 has")
    code = """
import ctypes, mmap
import numpy as np, lanenorm
# void set(unsigned* p) { ldmxcsr [rdi]; ret }    void get(unsigned* p) { stmxcsr [rdi]; ret }
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("0fae17c3" "0fae1fc3"))
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
call = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
load, store = call(start), call(start + 4)
x = (np.random.default_rng(0).standard_normal((50, 100)) * 1e-39).astype(np.float32)  # subnormal
def run():
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    return y.tobytes() + mean.tobytes() + rstd.tobytes()
expected = run()
before, flushing, after = (ctypes.c_uint32() for _ in range(3))
store(before)
flushing.value = before.value | 0x8040
load(flushing)
got = run()
store(after)
load(before)
assert after.value & 0x8040 == 0x8040
assert got == expected
"""
    run_python(code)


def test_bits_of_channels_beside_one_that_is_swept_again(rng, isa):
    """Channel 3 is swept again in double: its pivot is the mean of its first rows, far from that of the others."""
    x = rng.standard_normal((300, 20)).astype(np.float32)
    y = lanenorm.batch_norm_forward(x).y
    x[:, 3] = np.where(np.arange(300) < 16, 5, 0) + 1e-3 * x[:, 3]
    assert np.array_equal(np.delete(lanenorm.batch_norm_forward(x).y, 3, 1), np.delete(y, 3, 1))
