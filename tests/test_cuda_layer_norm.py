"""Layer normalization by the CUDA kernels: every size class, dtype, tail, offset, layout; values and bits.

Every test runs twice: emulated on the CPU (marker cuda_on_host), and with CuPy on a GPU (marker gpu). Tests that change
the limits of the device run emulated only.
"""

import numpy as np
import pytest
import reference
from cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    SAME_ORDER,
    SMALL_COUNTS,
    around,
    at_byte,
    by_dtype,
    check_backward,
    check_forward,
    constant,
    hard_makers,
    matrix,
    normal,
    ordinary_makers,
    outlier,
    packed,
    parameter_dtypes,
    parameters,
    scaled_makers,
    sweep_groups,
)
from cuda_places import results_by_l2


def forward(device, x, weight=None, bias=None, **keywords):
    """NormForward on the host."""
    result = device.library.layer_norm_forward(*map(device.to_device, (x, weight, bias)), **keywords)
    return type(result)(*map(device.to_host, result))


def backward(device, dy, x, mean, rstd, weight=None, **keywords):
    """NormBackward on the host."""
    result = device.library.layer_norm_backward(*map(device.to_device, (dy, x, mean, rstd, weight)), **keywords)
    return type(result)(*map(device.to_host, result))


def check(device, x, dy, weight=None, bias=None, *, axis=-1, eps=EPS, context=""):
    """Forward and backward of one input against the reference."""
    axes = reference.normalize_axes(axis, x.ndim)
    gamma, beta = (reference.spread(p, axes, x.ndim) for p in (weight, bias))
    where = f"layer_norm {x.dtype} {x.shape} axis={axis} {context}"
    result = forward(device, x, weight, bias, axis=axis, eps=eps)
    check_forward(result, reference.layer_norm(x, weight, bias, axis=axis, eps=eps), x, gamma, beta, where)
    gradients = backward(device, dy, x, result.mean, result.rstd, weight, axis=axis)
    check_backward(gradients, reference.layer_norm_backward(dy, x, weight, axis=axis, eps=eps), x, weight, where)


def all_bytes(device, x, dy, weight=None, bias=None, *, axis=-1):
    """The bytes of everything that is computed, in the order of the elements and not of memory."""
    result = forward(device, x, weight, bias, axis=axis)
    gradients = backward(device, dy, x, result.mean, result.rstd, weight, axis=axis)
    return [np.ascontiguousarray(a).tobytes() for a in (*result, *gradients)]


# ---- By hand --------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("count", [2, 8, 34, 600, 1026, 5000])
def test_cuda_layer_norm_of_alternating_ones(device, dtype, count):
    """Mean 0, variance 1: with eps = 0 the input itself, and with eps = 3 half of it."""
    x = np.tile([1, -1], (3, count // 2)).astype(dtype)
    y, mean, rstd = forward(device, x, eps=0.0)
    assert np.array_equal(y, x)
    assert np.all(mean == 0)
    assert np.all(rstd == 1)
    y, _, rstd = forward(device, x, eps=3.0)
    assert np.array_equal(y, x / np.array(2, dtype))
    assert np.all(rstd == 0.5)


def test_cuda_layer_norm_affine_by_hand(device):
    x = np.array([[3, 5, 3, 5], [7, 7, 9, 9]], np.float32)
    weight, bias = np.array([1, 2, 3, 4], np.float32), np.array([10, 20, 30, 40], np.float32)
    normalized = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1]], np.float32)
    for w, b, expected in (
        (None, None, normalized),
        (weight, None, normalized * weight),
        (None, bias, normalized + bias),
        (weight, bias, normalized * weight + bias),
    ):
        assert np.array_equal(forward(device, x, w, b, eps=0.0).y, expected)


# ---- Accuracy over the size classes ---------------------------------------------------------------------------------

# Bytes of a row where the forward or the backward changes its kernel (cuda/choose.cpp).
BORDERS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# One row of every kind in bytes: groups of 8, 16 and 32 lanes, blocks, a block's shared memory, a cluster's.
KINDS = (100, 200, 400, 900, 1800, 3600, 7000, 15000, 30000, 70000, 150000)


def few_makers(dtype):
    far = 1e4 if dtype.name == "float16" else 1e6
    return [around(far), constant, outlier(0, far), outlier(-1, far, far)]


def check_counts(device, rng, dtype, count, groups):
    for makers, eps in groups:
        x = matrix(rng, makers, count, dtype, rows=1)
        weight, bias = parameters(rng, count, parameter_dtypes(dtype)[-1])
        check(device, x, normal(rng, x.shape, dtype), weight, bias, eps=eps)


@by_dtype
def test_cuda_layer_norm_accuracy_small_counts(device, rng, dtype):
    for count in SMALL_COUNTS:
        check_counts(device, rng, dtype, count, sweep_groups(dtype, count))


@pytest.mark.parametrize("border", BORDERS)
@by_dtype
def test_cuda_layer_norm_accuracy_border_counts(device, rng, dtype, border):
    """One element below, at and above the longest row of a kernel."""
    for count in (border // dtype.itemsize + i for i in (-1, 0, 1)):
        if border <= 2048:
            check_counts(device, rng, dtype, count, sweep_groups(dtype, count))
        else:
            check_counts(device, rng, dtype, count, [(few_makers(dtype), EPS), (scaled_makers(dtype)[::3], 0.0)])


@pytest.mark.parametrize("words", [1, 2, 4, 8])
@pytest.mark.parametrize("level", [3, 1e3, -1e5])
def test_cuda_layer_norm_accuracy_far_from_the_pivot(device, rng, words, level):
    """The words whose mean the pivot is lie in one place, and all the others in another."""
    for lanes in (8, 16, 32):
        for count in (4 * lanes * words, 4 * lanes * words - 4 * lanes + 24, 4 * lanes * words - 1):
            noise = normal(rng, (40, count), np.float32)
            near = np.arange(count) // (4 * lanes) % 4 == 0
            for x in (noise + np.where(near, 0, level), noise + np.where(near, level, 0)):
                x = x.astype(np.float32)
                check(device, x, noise, context=f"{lanes} lanes, {words} words")


@pytest.mark.parametrize("count", [16385, 50001])
@by_dtype
def test_cuda_layer_norm_accuracy_long_rows(device, rng, dtype, count):
    """Rows in shared memory, of a block and of a cluster."""
    for makers, eps in hard_makers(dtype):
        check_counts(device, rng, dtype, count, [(makers[:4], eps)])


def test_cuda_layer_norm_accuracy_of_a_row_of_a_million(device, rng):
    """Beyond every cluster: read twice forward, by two kernels backward."""
    x = normal(rng, (1, 2**20 + 3), np.float32, offset=1e4)
    weight, bias = parameters(rng, x.shape[1], np.float32)
    check(device, x, normal(rng, x.shape, np.float32), weight, bias)


@by_dtype
def test_cuda_layer_norm_accuracy_streamed(emulated, rng, dtype):
    """A device that keeps no long row on chip."""
    emulated.library.set_device(shared_per_block=49152, shared_per_multiprocessor=65536, architecture=75, max_cluster=1)
    for makers, eps in (*hard_makers(dtype), (scaled_makers(dtype), 0.0)):
        check_counts(emulated, rng, dtype, 40000 // dtype.itemsize, [(makers, eps)])


@pytest.mark.parametrize("count", [1, 3, 24])
def test_cuda_layer_norm_accuracy_many_small_rows(device, rng, count):
    """A batch above 65536."""
    x = normal(rng, (65537, count), np.float32, offset=1e3)
    weight, bias = parameters(rng, count, np.float32)
    check(device, x, normal(rng, x.shape, np.float32), weight, bias)


@by_dtype
@pytest.mark.parametrize("rows", [1, 7, 64, 300, 1025])
def test_cuda_layer_norm_gradients_over_chunks(device, rng, dtype, rows):
    """Chunks of one row and of several, whole and not, for groups and blocks. dy of one sign: errors add up."""
    for count in (40, 600) if rows > 64 else (40, 2100):
        x = normal(rng, (rows, count), dtype, offset=3.0)
        weight, bias = parameters(rng, count, dtype)
        check(device, x, normal(rng, x.shape, dtype), weight, bias)
        check(device, x, np.full(x.shape, 1.1, dtype), weight, bias)


# ---- Exact where it can be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3:2], ids=lambda d: d.name)
@pytest.mark.parametrize("count", [1040, 1041])
def test_cuda_layer_norm_gradients_of_many_rows_a_chunk(device, rng, dtype, count):
    """Chunks of 17 rows, of which 8 are summed before they go to the compensated sums: equal rows round alike."""
    count //= dtype.itemsize // 2
    x, dy = (np.tile(normal(rng, (1, count), dtype), (4100, 1)) for _ in range(2))
    check(device, x, dy, normal(rng, (count,), dtype))


def test_cuda_layer_norm_gradients_of_slabs_two_rows_at_a_time(emulated, rng):
    """Rows of two slabs, chunks of three: two rows, then one. In a cluster, by a kernel of their own, one by one."""
    x, dy = (normal(rng, (300, 4104), np.float16) for _ in range(2))
    weight = normal(rng, (4104,), np.float16)
    check(emulated, x, dy, weight)
    expected = all_bytes(emulated, x, dy, weight)
    assert all_bytes(emulated, at_byte(x, 2), at_byte(dy, 6), weight) == expected
    emulated.library.set_device(max_cluster=1)
    assert all_bytes(emulated, x, dy, weight) == expected


@by_dtype
@pytest.mark.parametrize("size", KINDS[::2])
def test_cuda_layer_norm_of_constant_slices_is_bias(device, rng, dtype, size):
    count = size // dtype.itemsize
    x = constant(rng, 3, count, dtype).astype(dtype)
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, count, parameter_dtype)
        y, mean, rstd = forward(device, x, weight, bias)
        assert np.array_equal(y, np.broadcast_to(bias.astype(dtype), x.shape))
        assert np.array_equal(mean[:, 0], x[:, 0].astype(mean.dtype))
        assert np.all(rstd == rstd.dtype.type(1 / np.sqrt(EPS)))
        assert np.all(forward(device, x, weight).y == 0)


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize >= 4], ids=lambda d: d.name)
@pytest.mark.parametrize("count", [3, 33, 1000, 1025, 4097, 40003])
def test_cuda_layer_norm_mean_of_integers_is_exact(device, rng, dtype, count, axis):
    x = rng.integers(-100, 101, (3, count)).astype(dtype)
    mean = forward(device, x if axis == 1 else np.ascontiguousarray(x.T), axis=axis).mean
    sums = x.astype(np.int64).sum(axis=1)
    assert np.array_equal(mean.ravel(), (sums.astype(np.longdouble) / count).astype(mean.dtype))


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize >= 4], ids=lambda d: d.name)
@pytest.mark.parametrize("count", [2, 17, 130, 1500])
def test_cuda_layer_norm_statistics_against_exact_rationals(device, rng, dtype, count, axis):
    x = matrix(rng, ordinary_makers(dtype) + scaled_makers(dtype), count, dtype, rows=1)
    _, mean, rstd = forward(device, x if axis == 1 else np.ascontiguousarray(x.T), eps=0.0, axis=axis)
    statistics = [reference.exact_statistics(row) for row in x]
    exact_mean = np.array([reference.fraction_to_wide(m) for m, _ in statistics])
    exact_var = np.array([reference.fraction_to_wide(v) for _, v in statistics])
    with np.errstate(divide="ignore"):
        reference.check("mean", mean.ravel(), exact_mean, np.sqrt(exact_var))
        reference.check("rstd", rstd.ravel(), 1 / np.sqrt(exact_var))


# ---- Bad values -----------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("rows", "size"), [(40, 60), (40, 300), (9, 3000), (5, 9000), (4, 70000)])
def test_cuda_layer_norm_bad_value_spoils_its_own_row_only(device, rng, dtype, bad, rows, size):
    x = normal(rng, (rows, size // dtype.itemsize), dtype)
    dy = normal(rng, x.shape, dtype)
    clean = forward(device, x)
    clean_dx = backward(device, dy, x, clean.mean, clean.rstd).dx
    spoiled = rng.choice(rows, 2, replace=False)
    x[spoiled, rng.integers(x.shape[1], size=2)] = bad
    others = np.setdiff1d(np.arange(rows), spoiled)
    result = forward(device, x)
    dx = backward(device, dy, x, result.mean, result.rstd).dx
    for got, before in ((result.y, clean.y), (result.mean, clean.mean), (result.rstd, clean.rstd), (dx, clean_dx)):
        assert np.all(np.isnan(got[spoiled][:, 0]) | np.isinf(got[spoiled][:, 0]))
        assert np.array_equal(got[others], before[others])
    assert np.all(np.isnan(result.y[spoiled]))
    assert np.all(np.isnan(dx[spoiled]))


@by_dtype
def test_cuda_layer_norm_bad_value_spoils_its_own_column_only(device, rng, dtype):
    for rows in (30, 700):
        x = normal(rng, (rows, 37), dtype)
        clean = forward(device, x, axis=0)
        x[rows // 2, 5] = np.nan
        result = forward(device, x, axis=0)
        others = np.arange(37) != 5
        assert np.array_equal(result.y[:, others], clean.y[:, others])
        assert np.all(np.isnan(result.y[:, 5]))


# ---- Shapes, axes, layouts ------------------------------------------------------------------------------------------

AXES = [
    ((7,), 0),
    ((6, 5), (0, 1)),
    ((6, 5, 70), 1),
    ((6, 5, 70), (0, 1)),
    ((6, 5, 70), (1, 2)),
    ((6, 5, 70), (2, 0)),
    ((300, 3), 0),
    ((600, 40), 0),
    ((3, 150, 20), 1),
    ((3, 4, 5, 6), (1, 3)),
    ((3, 4, 5, 6), (0, 2)),
    ((3, 4, 5, 6), (0, 2, 3)),
    ((1, 9, 1, 8), 0),
    ((2, 1, 2, 1, 3, 1, 2, 5), (0, 4, 7)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), AXES, ids=lambda v: str(v).replace(" ", ""))
def test_cuda_layer_norm_over_any_axes_in_any_layout(device, rng, shape, axis, layout):
    arrange = LAYOUTS[layout]
    for dtype in DTYPES:
        x, dy = normal(rng, shape, dtype, offset=10.0), normal(rng, shape, dtype)
        axes = reference.normalize_axes(axis, len(shape))
        weight, bias = parameters(rng, [shape[a] for a in axes], parameter_dtypes(dtype)[0])
        check(device, arrange(x), arrange(dy), axis=axis, context=layout)
        check(device, arrange(x), dy, arrange(weight), arrange(bias), axis=axis, context=f"{layout} affine")


@pytest.mark.parametrize("axis", [0, 1, (0, 2)], ids=str)
@pytest.mark.parametrize("repeated", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_cuda_layer_norm_of_broadcast_input(device, rng, repeated, axis):
    """Stride 0 along some axes."""
    lengths = [1 if a in repeated else n for a, n in enumerate((6, 40, 17))]
    x = np.broadcast_to(normal(rng, lengths, np.float32, offset=3.0), (6, 40, 17))
    dy = np.broadcast_to(normal(rng, lengths, np.float32), (6, 40, 17))
    weight, bias = parameters(rng, [(6, 40, 17)[a] for a in reference.normalize_axes(axis, 3)], np.float32)
    check(device, x, dy, weight, bias, axis=axis)


@by_dtype
@pytest.mark.parametrize(("shape", "axis"), [((9, 70), -1), ((5, 3000), -1), ((70, 9), 0)], ids=str)
def test_cuda_layer_norm_parameters_of_every_lawful_dtype(device, rng, dtype, shape, axis):
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, shape[axis], parameter_dtype)
        check(device, x, dy, weight, bias, axis=axis)
        check(device, x, dy, weight, None, axis=axis)
        check(device, x, dy, None, bias, axis=axis)


@by_dtype
@pytest.mark.parametrize("axis", [0, 1])
def test_cuda_layer_norm_without_what_is_not_asked_for(device, rng, dtype, axis):
    """y without statistics, dx without dweight and dbias: the same bits."""
    for shape in ((40, 60), (700, 9), (3, 5000)):
        x, dy = normal(rng, shape, dtype, offset=2.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, shape[axis], dtype)
        result = forward(device, x, weight, bias, axis=axis)
        arguments = [device.to_device(a) for a in (x, weight, bias)]
        y = device.to_host(device.library.layer_norm(*arguments, axis=axis))
        assert y.tobytes() == result.y.tobytes()
        gradients = [
            backward(device, dy, x, result.mean, result.rstd, weight, axis=axis, param_grads=wanted)
            for wanted in (True, False)
        ]
        assert gradients[0].dx.tobytes() == gradients[1].dx.tobytes()
        assert gradients[1].dweight is None
        assert gradients[1].dbias is None


@pytest.mark.parametrize("offset", [0, 4, 7])
@pytest.mark.parametrize(("shape", "axis"), [((30, 61), 1), ((9, 3001), 1), ((3, 20001), 1), ((600, 41), 0)], ids=str)
def test_cuda_layer_norm_in_place(device, rng, shape, axis, offset):
    """out is x (backward: dy), aligned and not."""
    x, dy = normal(rng, shape, np.float32, offset=2.0), normal(rng, shape, np.float32)
    weight, bias = parameters(rng, shape[axis], np.float32)
    result = forward(device, x, weight, bias, axis=axis)
    dx = backward(device, dy, x, result.mean, result.rstd, weight, axis=axis).dx
    own = device.to_device(at_byte(x, offset))
    device.library.layer_norm(own, *map(device.to_device, (weight, bias)), axis=axis, out=own)
    assert device.to_host(own).tobytes() == result.y.tobytes()
    own = device.to_device(at_byte(dy, offset))
    rest = map(device.to_device, (x, result.mean, result.rstd, weight))
    device.library.layer_norm_backward(own, *rest, axis=axis, out=own)
    assert device.to_host(own).tobytes() == dx.tobytes()


@by_dtype
@pytest.mark.parametrize("axis", [0, 1])
def test_cuda_layer_norm_of_empty_arrays(device, dtype, axis):
    """No rows: empty y and zero dweight. Rows without elements: mean 0, rstd of eps."""
    for shape in ((0, 5), (5, 0), (0, 0)):
        x = np.empty(shape, dtype)
        y, mean, rstd = forward(device, x, axis=axis, eps=4.0)
        assert y.shape == shape
        assert mean.shape == rstd.shape == tuple(1 if a == axis else n for a, n in enumerate(shape))
        assert np.all(mean == 0)
        assert np.all(rstd == 0.5)
        gradients = backward(device, x, x, mean, rstd, axis=axis)
        assert gradients.dx.shape == shape
        assert gradients.dweight.shape == gradients.dbias.shape == (shape[axis],)
        assert np.all(gradients.dweight == 0)
        assert np.all(gradients.dbias == 0)


# ---- The same bits --------------------------------------------------------------------------------------------------

# (shape, axes): every kind of row and of columns, one and several chunks, strips and pieces.
PROBLEMS = [
    ((300, 5), -1),
    ((300, 50), -1),
    ((50, 131), -1),
    ((130, 600), -1),
    ((20, 2000), -1),
    ((5, 7001), -1),
    ((2, 20001), -1),
    ((1, 60001), -1),
    # whole words: kernels of their own, several rows at a time
    ((300, 32), -1),
    ((70, 48), -1),
    ((37, 96), -1),
    ((21, 256), -1),
    ((11, 768), -1),
    ((5, 1600), -1),
    ((3, 5120), -1),
    ((40, 70), 0),
    ((700, 131), 0),
    ((2600, 40), 0),
    ((3, 50, 37), 1),
    ((2, 600, 67), 1),
    ((6, 50, 71), (0, 2)),
]


def inputs(shape, axis, dtype):
    """x, dy, weight, bias: the same at every call."""
    rng = np.random.default_rng(sum(shape))
    x, dy = normal(rng, shape, dtype, offset=30.0), normal(rng, shape, dtype)
    return x, dy, *parameters(rng, [shape[a] for a in reference.normalize_axes(axis, len(shape))], dtype)


@pytest.mark.parametrize(("shape", "axis"), PROBLEMS, ids=str)
@by_dtype
def test_cuda_bits_do_not_depend_on_the_device(emulated, dtype, shape, axis):
    """Number of SMs, order of execution, clusters, shared memory: none of them changes what is computed."""
    arrays = inputs(shape, axis, dtype)
    expected = all_bytes(emulated, *arrays, axis=axis)
    for limits, schedule in (
        ({"multiprocessors": 1}, "reversed"),
        ({"multiprocessors": 7, "max_cluster": 8}, "forward"),
        ({"multiprocessors": 188, "max_cluster": 2}, "reversed"),
        ({"multiprocessors": 82, "shared_per_block": 101376, "max_cluster": 1, "architecture": 86}, "forward"),
        ({"multiprocessors": 40, "shared_per_block": 65536, "max_cluster": 1, "architecture": 75}, "reversed"),
    ):
        emulated.library.set_device(**limits)
        emulated.library.set_schedule(schedule)
        assert all_bytes(emulated, *arrays, axis=axis) == expected, (limits, schedule)


@pytest.mark.parametrize(("shape", "axis"), PROBLEMS, ids=str)
@by_dtype
def test_cuda_bits_do_not_depend_on_the_address(device, dtype, shape, axis):
    arrays = inputs(shape, axis, dtype)
    expected = all_bytes(device, *arrays, axis=axis)
    for offset in (1, 2, 4, 8, 12, 15) if np.prod(shape) < 50000 else (2, 5, 12):
        moved = [at_byte(a, (offset + i) % 16) for i, a in enumerate(arrays)]
        assert all_bytes(device, *moved, axis=axis) == expected, offset


@pytest.mark.parametrize("layout", SAME_ORDER)
@pytest.mark.parametrize(("shape", "axis"), PROBLEMS, ids=str)
def test_cuda_bits_do_not_depend_on_strides(device, shape, axis, layout):
    arrays = [LAYOUTS[layout](a) for a in inputs(shape, axis, np.float32)]
    assert all_bytes(device, *arrays, axis=axis) == all_bytes(device, *map(packed, arrays), axis=axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((300, 50), -1), ((20, 2000), -1), ((700, 131), 0), ((3, 50, 75), 1), ((6, 50, 71), (0, 2))],
    ids=str,
)
def test_cuda_bits_do_not_depend_on_how_much_is_packed_at_a_time(emulated, shape, axis):
    """All, some, or as little as can be: a row, or columns whose dweight is summed together."""
    arrays = inputs(shape, axis, np.float32)
    expected = all_bytes(emulated, *arrays, axis=axis)
    arrays = [LAYOUTS["reversed_last"](a) for a in arrays]
    results, launches = results_by_l2(emulated, arrays[0].size, lambda: all_bytes(emulated, *arrays, axis=axis))
    assert results == [expected] * 3
    assert launches[0] < launches[1] < launches[2]


@pytest.mark.parametrize("size", KINDS)
@by_dtype
def test_cuda_bits_do_not_depend_on_the_place_in_the_batch(device, rng, dtype, size):
    count = size // dtype.itemsize
    batch = 9 if size < 20000 else 3
    x, dy = normal(rng, (batch, count), dtype, offset=5.0), normal(rng, (batch, count), dtype)
    result = forward(device, x)
    dx = backward(device, dy, x, result.mean, result.rstd).dx
    for rows in (slice(batch // 2, batch // 2 + 1), slice(1, batch)):
        part = forward(device, x[rows])
        assert part.y.tobytes() == result.y[rows].tobytes()
        assert part.mean.tobytes() == result.mean[rows].tobytes()
        assert part.rstd.tobytes() == result.rstd[rows].tobytes()
        assert backward(device, dy[rows], x[rows], part.mean, part.rstd).dx.tobytes() == dx[rows].tobytes()


@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in_place"])
@pytest.mark.parametrize("size", [96, 256, 512, 1024, 2048, 4096, 8192, 32768])
@by_dtype
def test_cuda_rows_that_are_done_again_leave_the_others_alone(device, rng, dtype, size, in_place):
    """Rows out of range, redone in double or scaled, between rows that are not, in every kernel of several rows."""
    count = size // dtype.itemsize
    x = normal(rng, (21, count), dtype)
    large, small = (1e4, 1e-7) if dtype.name == "float16" else (1e30, 1e-30) if dtype.itemsize < 8 else (1e200, 1e-200)
    x[1::5] *= dtype.type(large)
    x[2::5] *= dtype.type(small)
    x[3::5] = x[3::5, :1]
    x[8, count // 2] = np.nan
    for one, many in zip(
        map(list, zip(*[forward(device, x[i : i + 1], eps=0.0) for i in range(len(x))], strict=True)),
        forward(device, x, eps=0.0, out=x if in_place and device.emulated else None),
        strict=True,
    ):
        assert np.concatenate(one).tobytes() == many.tobytes()


# ---- Which kernels run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limits", "expected"),
    [
        (32, {}, [(128, 1)]),  # 8 lanes a row
        (1000, {}, [(128, 1)]),  # a warp a row
        (2000, {}, [(128, 1)]),  # 4 warps a row
        (8000, {}, [(256, 1)]),  # 8 warps
        (20000, {}, [(256, 1)]),  # 3 pieces in a block's shared memory
        (50000, {}, [(256, 4)]),  # 7 pieces in a cluster of 4
        (380000, {}, [(256, 16)]),  # 47 pieces in a cluster of 16
        (50000, {"max_cluster": 1}, [(256, 1)]),  # 7 pieces in one block
        (60000, {"max_cluster": 1}, [(256, 1), (128, 1), (256, 1)]),  # moments, statistics, apply
    ],
    ids=str,
)
def test_cuda_layer_norm_reads_x_once_where_it_fits(emulated, rng, count, limits, expected):
    """(threads, cluster) of every kernel of a forward."""
    emulated.library.set_device(**limits)
    emulated.library.take_launches()
    forward(emulated, normal(rng, (1, count), np.float32))
    assert [(threads, cluster) for _, threads, cluster, _ in emulated.library.take_launches()] == expected
