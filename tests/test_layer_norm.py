"""Layer normalization: values, over every length, dtype, layout, set of axes and instruction set."""

import itertools

import numpy as np
import pytest
import reference
from cases import (
    BORDER_COUNTS,
    DTYPES,
    EPS,
    FLOAT_DTYPES,
    LAYOUTS,
    LONG_COUNTS,
    SMALL_COUNTS,
    around,
    at_byte,
    by_dtype,
    check_forward,
    check_layer_norm,
    check_y,
    constant,
    hard_makers,
    innermost,
    log_normal,
    matrix,
    normal,
    ordinary_makers,
    outlier,
    packed,
    parameter_dtypes,
    parameters,
    ramp,
    scaled_makers,
    step,
    sweep_groups,
)
from reference import check

import lanenorm

# ---- By hand --------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("count", [2, 8, 34, 1026])
def test_layer_norm_of_alternating_ones(isa, dtype, count):
    """Mean 0, variance 1: with eps = 0 the input itself, and with eps = 3 half of it."""
    x = np.tile([1, -1], (3, count // 2)).astype(dtype)
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    assert np.array_equal(y, x)
    assert np.all(mean == 0)
    assert np.all(rstd == 1)
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=3.0)
    assert np.array_equal(y, x / np.array(2, dtype))
    assert np.all(mean == 0)
    assert np.all(rstd == 0.5)


def test_layer_norm_affine_by_hand(isa):
    x = np.array([[3, 5, 3, 5], [7, 7, 9, 9]], np.float32)
    weight, bias = np.array([1, 2, 3, 4], np.float32), np.array([10, 20, 30, 40], np.float32)
    normalized = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1]], np.float32)
    assert np.array_equal(lanenorm.layer_norm(x, eps=0.0), normalized)
    assert np.array_equal(lanenorm.layer_norm(x, weight, eps=0.0), normalized * weight)
    assert np.array_equal(lanenorm.layer_norm(x, None, bias, eps=0.0), normalized + bias)
    assert np.array_equal(lanenorm.layer_norm(x, weight, bias, eps=0.0), normalized * weight + bias)


def test_layer_norm_result_names():
    x = np.array([[1, -1]], np.float32)
    forward = lanenorm.layer_norm_forward(x)
    assert isinstance(forward, lanenorm.NormForward)
    assert forward._fields == ("y", "mean", "rstd")
    assert forward.mean.shape == forward.rstd.shape == (1, 1)
    backward = lanenorm.layer_norm_backward(x, x, forward.mean, forward.rstd)
    assert isinstance(backward, lanenorm.NormBackward)
    assert backward._fields == ("dx", "dweight", "dbias")


# ---- Accuracy -------------------------------------------------------------------------------------------------------


def check_sweep(rng, dtype, count):
    for makers, eps in sweep_groups(dtype, count):
        x = matrix(rng, makers, count, dtype)
        dy = normal(rng, x.shape, dtype)
        weight, bias = parameters(rng, count, parameter_dtypes(dtype)[-1])
        check_layer_norm(x, dy, eps=eps)
        check_layer_norm(x, dy, weight, bias, eps=eps)


@by_dtype
def test_layer_norm_accuracy_small_counts(rng, dtype):
    """Every row length that fits into two vectors, and one more."""
    for count in SMALL_COUNTS:
        check_sweep(rng, dtype, count)


@pytest.mark.parametrize("count", BORDER_COUNTS)
@by_dtype
def test_layer_norm_accuracy_border_counts(rng, dtype, count):
    check_sweep(rng, dtype, count)


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("maker", [step, ramp, log_normal, around(1e6)], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
def test_layer_norm_accuracy_over_many_slices(rng, dtype, maker, axis):
    """A thousand draws of the data that is hardest on a pivot: the worst case is rare."""
    for count in (3, 8, 16, 24, 32, 63, 64, 100, 128):
        x = maker(rng, 1000, count, dtype).astype(dtype)
        x = np.ascontiguousarray(x if axis == 1 else x.T)
        check_layer_norm(x, normal(rng, x.shape, dtype), axis=axis, context=f"{maker.__name__} count={count}")


@pytest.mark.parametrize("kind", ["steps", "vectors", "cycles", "outliers first", "ramp"])
@pytest.mark.parametrize("count", [128, 200, 384, 768, 1000, 1024, 1040, 2048, 4096])
def test_layer_norm_accuracy_of_few_repeated_values(rng, kind, count):
    """Rounding errors of equal values go the same way in every lane; a pivot taken from some of them may be far off."""
    rows, position = 256, np.arange(count)
    values = rng.standard_normal((rows, count // 16 + 1))
    if kind == "steps":  # four values, each a quarter of the row
        x = np.take_along_axis(values, np.broadcast_to(position * 4 // count, (rows, count)), 1)
    elif kind == "vectors":  # one value a vector
        x = np.take_along_axis(values, np.broadcast_to(position // 16, (rows, count)), 1)
    elif kind == "cycles":  # vectors of seven values in turn
        x = np.take_along_axis(values, np.broadcast_to(position // 16 % 7, (rows, count)), 1)
    elif kind == "outliers first":  # in one vector, of which a pivot is made
        x = np.where(position < 16, values[:, :1], values[:, 1:2])
    else:
        x = values[:, :1] * position
    x = x.astype(np.float32)
    check_layer_norm(x, normal(rng, x.shape, x.dtype))


@pytest.mark.parametrize("count", LONG_COUNTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
def test_layer_norm_accuracy_long_rows(rng, dtype, count):
    """One row at a time: few long rows go through other code than many short ones."""
    for makers, eps in hard_makers(dtype):
        for maker in makers:
            x = matrix(rng, [maker], count, dtype, rows=1)
            check_layer_norm(x, normal(rng, x.shape, dtype), eps=eps, context=maker.__name__)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=lambda d: d.name)
def test_layer_norm_accuracy_long_rows_of_16_bits(rng, dtype):
    for makers, eps in hard_makers(dtype):
        x = matrix(rng, makers, 65537, dtype, rows=1)
        check_layer_norm(x, normal(rng, x.shape, dtype), eps=eps)


def test_layer_norm_accuracy_few_very_long_rows(rng):
    x = normal(rng, (1, 3 * 10**6), np.float32, offset=1e6)
    check_layer_norm(x, normal(rng, x.shape, np.float32))


@pytest.mark.parametrize("count", [1, 3, 7, 24])
def test_layer_norm_accuracy_many_small_rows(rng, count):
    """A batch above 65536."""
    x = normal(rng, (65537, count), np.float32, offset=1e3)
    dy = normal(rng, x.shape, np.float32)
    weight, bias = parameters(rng, count, np.float32)
    check_layer_norm(x, dy, weight, bias)


def test_layer_norm_accuracy_row_of_a_million(rng):
    x = normal(rng, (2, 2**20 + 1), np.float32, offset=100.0)
    weight, bias = parameters(rng, x.shape[1], np.float32)
    check_layer_norm(x, normal(rng, x.shape, np.float32), weight, bias)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("count", [2, 5, 17, 64, 130])
def test_layer_norm_statistics_against_exact_rationals(rng, isa, dtype, count):
    """Where the reference itself is not to be trusted: offsets, outliers and scales, in rational arithmetic."""
    makers = ordinary_makers(dtype) + scaled_makers(dtype)
    x = matrix(rng, makers, count, dtype, rows=1)
    _, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    statistics = [reference.exact_statistics(row) for row in x]
    exact_mean = np.array([[reference.fraction_to_wide(m)] for m, _ in statistics])
    exact_var = np.array([[reference.fraction_to_wide(v)] for _, v in statistics])
    with np.errstate(divide="ignore"):
        check("mean", mean, exact_mean, np.sqrt(exact_var))
        check("rstd", rstd, 1 / np.sqrt(exact_var))


# ---- Exact where it can be ------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("count", [1, 2, 7, 16, 100, 1024, 5000])
def test_layer_norm_of_constant_slices_is_bias(rng, isa, dtype, count):
    """The variance is exactly 0, so rstd is that of eps, and y is the bias to the last bit."""
    x = constant(rng, 9, count, dtype).astype(dtype)
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, count, parameter_dtype)
        y, mean, rstd = lanenorm.layer_norm_forward(x, weight, bias)
        assert np.array_equal(y, np.broadcast_to(bias.astype(dtype), x.shape))
        assert np.array_equal(mean[:, 0], x[:, 0].astype(mean.dtype))
        assert np.all(rstd == rstd.dtype.type(1 / np.sqrt(EPS)))
        assert np.all(lanenorm.layer_norm(x, weight) == 0)
        assert np.all(lanenorm.layer_norm(x) == 0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("count", [3, 16, 33, 1000, 1024, 4097, 100003])
def test_layer_norm_mean_of_integers_is_exact(rng, isa, dtype, count):
    """Sums of small integers are exact in any order, so the mean is the exact one, rounded once."""
    x = rng.integers(-100, 101, (7, count)).astype(dtype)
    mean = lanenorm.layer_norm_forward(x).mean
    sums = x.astype(np.int64).sum(axis=1)
    assert np.array_equal(mean[:, 0], (sums.astype(np.longdouble) / count).astype(mean.dtype))


def test_layer_norm_eps_is_inside_the_square_root(isa):
    x = np.array([[2, -2]], np.float64)
    assert np.array_equal(lanenorm.layer_norm(x, eps=12.0), [[0.5, -0.5]])


def test_layer_norm_eps_zero_on_constant_slice_is_nan(isa):
    x = np.array([[1, 1, 1], [1, 2, 3]], np.float32)
    y = lanenorm.layer_norm(x, eps=0.0)
    assert np.all(np.isnan(y[0]))
    assert np.all(np.isfinite(y[1]))


@by_dtype
def test_layer_norm_keeps_the_capacity_of_the_network(rng, isa, dtype):
    """weight = deviation and bias = mean give the input back: nothing a network could express is lost."""
    x = normal(rng, (1, 300), dtype, offset=3.0)
    exact = reference.layer_norm(x, eps=0.0)
    weight = np.full(300, 1 / exact.rstd[0, 0]).astype(dtype)
    bias = np.full(300, exact.mean[0, 0]).astype(dtype)
    result = lanenorm.layer_norm_forward(x, weight, bias, eps=0.0)
    back = reference.layer_norm(x, weight, bias, eps=0.0)
    check_forward(result, back, x, weight, bias)
    # weight and bias are rounded too: 3 deviations from the mean that is 3 of them makes three more roundings of x
    error = np.abs(result.y.astype(np.float64) - x.astype(np.float64))
    assert np.all(error <= 4 * reference.rounding(dtype, np.abs(x).max().astype(np.float64)))


# ---- Bad values -----------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [5, 40, 1100])
def test_layer_norm_bad_value_spoils_its_own_row_only(rng, isa, dtype, bad, count):
    x = normal(rng, (40, count), dtype)
    clean = lanenorm.layer_norm_forward(x)
    dy = normal(rng, x.shape, dtype)
    clean_dx = lanenorm.layer_norm_backward(dy, x, clean.mean, clean.rstd).dx
    spoiled = rng.choice(40, 5, replace=False)
    x[spoiled, rng.integers(count, size=5)] = bad
    others = np.setdiff1d(np.arange(40), spoiled)
    result = lanenorm.layer_norm_forward(x)
    dx = lanenorm.layer_norm_backward(dy, x, result.mean, result.rstd).dx
    for got, before in ((result.y, clean.y), (result.mean, clean.mean), (result.rstd, clean.rstd), (dx, clean_dx)):
        assert np.all(np.isnan(got[spoiled][:, 0]) | np.isinf(got[spoiled][:, 0]))
        assert np.array_equal(got[others], before[others])
    assert np.all(np.isnan(result.y[spoiled]))
    assert np.all(np.isnan(dx[spoiled]))


# ---- Shapes, axes, layouts ------------------------------------------------------------------------------------------

AXES = [
    ((7,), 0),
    ((6, 5), 0),
    ((6, 5), (0, 1)),
    ((6, 5, 70), 1),
    ((6, 5, 70), 0),
    ((6, 5, 70), (0, 1)),
    ((6, 5, 70), (1, 2)),
    ((6, 5, 70), (-1, 0)),
    ((6, 5, 70), (2, 0)),
    ((6, 5, 70), (0, 1, 2)),
    ((300, 3), 0),
    ((2000, 40), 0),
    ((3, 150, 20), 1),
    ((3, 4, 5, 6), (1, 3)),
    ((3, 4, 5, 6), (0, 2)),
    ((3, 4, 5, 6), (0, 3)),
    ((3, 4, 5, 6), (0, 2, 3)),
    ((3, 4, 5, 6), (1, 2)),
    ((1, 9, 1, 8), (1, 2)),
    ((1, 9, 1, 8), 0),
    ((2, 3, 2, 3, 2, 3), (1, 3, 5)),
    ((2, 3, 2, 3, 2, 3), (0, 2, 4)),
    ((2, 1, 2, 1, 3, 1, 2, 5), (0, 4, 7)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), AXES, ids=lambda v: str(v).replace(" ", ""))
def test_layer_norm_over_any_axes_in_any_layout(rng, shape, axis, layout):
    axes = reference.normalize_axes(axis, len(shape))
    for dtype in DTYPES:
        arrange = LAYOUTS[layout]
        values, gradient = normal(rng, shape, dtype, offset=10.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, [shape[a] for a in axes], parameter_dtypes(dtype)[0])
        context = f"{dtype} {shape} axis={axis} {layout}"
        check_layer_norm(arrange(values), arrange(gradient), axis=axis, context=context)
        # parameters in the same strange layout, and dy in another one than x
        check_layer_norm(
            arrange(values), gradient, arrange(weight), arrange(bias), axis=axis, context=f"{context} affine"
        )


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("inner", [0, 1, 2])
@by_dtype
def test_layer_norm_whatever_axis_lies_innermost(rng, dtype, inner, axis):
    x = innermost(normal(rng, (12, 70, 19), dtype, offset=5.0), inner)
    dy = normal(rng, x.shape, dtype)
    axes = reference.normalize_axes(axis, 3)
    weight, bias = parameters(rng, [x.shape[a] for a in axes], dtype)
    check_layer_norm(x, innermost(dy, inner), weight, bias, axis=axis)
    check_layer_norm(x, dy, weight, bias, axis=axis)


@pytest.mark.parametrize("repeated", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2)], ids=str)
def test_layer_norm_of_broadcast_input(rng, repeated, axis):
    """Stride 0 along some axes."""
    lengths = [1 if a in repeated else n for a, n in enumerate((6, 40, 17))]
    x = np.broadcast_to(normal(rng, lengths, np.float32, offset=3.0), (6, 40, 17))
    dy = np.broadcast_to(normal(rng, lengths, np.float32), (6, 40, 17))
    weight, bias = parameters(rng, [(6, 40, 17)[a] for a in reference.normalize_axes(axis, 3)], np.float32)
    check_layer_norm(x, dy, weight, bias, axis=axis)
    check_layer_norm(x, normal(rng, x.shape, np.float32), axis=axis)
    check_layer_norm(x, dy, np.broadcast_to(weight.ravel()[:1].reshape([1] * weight.ndim), weight.shape), axis=axis)


@by_dtype
def test_layer_norm_parameters_of_every_lawful_dtype(rng, dtype):
    """A 16-bit x takes weight and bias of its own dtype or float32; their gradients come in it."""
    x, dy = normal(rng, (9, 70), dtype), normal(rng, (9, 70), dtype)
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, 70, parameter_dtype)
        check_layer_norm(x, dy, weight, bias)
        check_layer_norm(x, dy, weight, None)
        check_layer_norm(x, dy, None, bias)


@by_dtype
@pytest.mark.parametrize("shape", [(5, 7), (64, 100), (1, 5000), (2, 300000)], ids=str)
def test_layer_norm_without_statistics_gives_the_same_y(rng, isa, dtype, shape):
    x = normal(rng, shape, dtype, offset=2.0)
    weight, bias = parameters(rng, shape[1], dtype)
    assert np.array_equal(lanenorm.layer_norm(x, weight, bias), lanenorm.layer_norm_forward(x, weight, bias).y)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_writes_into_out(rng, isa, dtype, layout):
    """`out` gets the result and is the result, also where it is x (in a backward dy) itself."""
    x, dy = (LAYOUTS[layout](normal(rng, (10, 30), dtype)) for _ in range(2))
    for axis in (0, 1):
        weight, bias = parameters(rng, x.shape[axis], dtype)
        y, mean, rstd = lanenorm.layer_norm_forward(x, weight, bias, axis=axis)
        dx = lanenorm.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis).dx
        out = np.empty_like(x)
        assert lanenorm.layer_norm(x, weight, bias, axis=axis, out=out) is out
        assert np.array_equal(out, y)
        out = np.empty_like(x)
        assert lanenorm.layer_norm_forward(x, weight, bias, axis=axis, out=out).y is out
        assert np.array_equal(out, y)
        out = np.empty_like(x)
        assert lanenorm.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis, out=out).dx is out
        assert np.array_equal(out, dx)
        if packed(x).strides != x.strides:
            continue  # x itself does not have the layout of a new array
        own = x.copy(order="K")
        assert lanenorm.layer_norm(own, weight, bias, axis=axis, out=own) is own
        assert np.array_equal(own, y)
        own = dy.copy(order="K")
        if own.strides == x.strides:
            assert lanenorm.layer_norm_backward(own, x, mean, rstd, weight, axis=axis, out=own).dx is own
            assert np.array_equal(own, dx)


@pytest.mark.parametrize("axis", [0, 1])
def test_layer_norm_writes_into_unaligned_out(rng, isa, axis):
    x = normal(rng, (40, 333), np.float32)
    out = at_byte(np.zeros_like(x), 1)
    lanenorm.layer_norm(x, axis=axis, out=out)
    assert np.array_equal(out, lanenorm.layer_norm(x, axis=axis))


def test_layer_norm_in_place_on_large_array(rng):
    """Above any cache, and over several threads."""
    lanenorm.set_num_threads(3)
    x = normal(rng, (3000, 1024), np.float32, offset=4.0)
    expected = lanenorm.layer_norm(x)
    assert lanenorm.layer_norm(x, out=x) is x
    assert np.array_equal(x, expected)


def test_layer_norm_leaves_inputs_alone(rng, isa):
    """Read-only inputs are fine, and nothing that can be written is."""
    x, dy = normal(rng, (20, 50), np.float32), normal(rng, (20, 50), np.float32)
    weight, bias = parameters(rng, 50, np.float32)
    for array in (x, dy, weight, bias):
        array.flags.writeable = False
    forward = lanenorm.layer_norm_forward(x, weight, bias)
    kept = [array.tobytes() for array in (x, dy, weight, bias, *forward)]
    for array in forward:
        array.flags.writeable = False
    lanenorm.layer_norm_backward(dy, x, forward.mean, forward.rstd, weight)
    assert [array.tobytes() for array in (x, dy, weight, bias, *forward)] == kept


def test_layer_norm_does_not_write_around_out(rng, isa):
    """The bytes before and after an output of any length stay."""
    for count, dtype in itertools.product((1, 7, 16, 17, 31, 100, 1025), DTYPES):
        memory = np.full(3 * count * dtype.itemsize + 256, 0xA5, np.uint8)
        start = 128 + dtype.itemsize
        out = memory[start : start + 3 * count * dtype.itemsize].view(dtype).reshape(3, count)
        lanenorm.layer_norm(normal(rng, (3, count), dtype), out=out)
        assert np.all(memory[:start] == 0xA5)
        assert np.all(memory[start + out.nbytes :] == 0xA5)


def test_layer_norm_of_memmap(rng, tmp_path):
    """The one subclass that is nothing but memory."""
    values = normal(rng, (30, 100), np.float32)
    np.save(tmp_path / "x.npy", values)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert type(x) is np.memmap
    y = lanenorm.layer_norm(x)
    assert type(y) is np.ndarray
    assert np.array_equal(y, lanenorm.layer_norm(values))
    out = np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=x.shape)
    assert lanenorm.layer_norm(x, out=out) is out
    assert np.array_equal(out, y)


# ---- Nothing to do --------------------------------------------------------------------------------------------------


@by_dtype
def test_layer_norm_of_empty_batch(isa, dtype):
    x = np.empty((0, 5), dtype)
    weight = np.ones(5, dtype)
    y, mean, rstd = lanenorm.layer_norm_forward(x, weight)
    assert y.shape == (0, 5)
    assert mean.shape == rstd.shape == (0, 1)
    dx, dweight, dbias = lanenorm.layer_norm_backward(x, x, mean, rstd, weight)
    assert dx.shape == (0, 5)
    assert np.array_equal(dweight, np.zeros(5))
    assert np.array_equal(dbias, np.zeros(5))


@by_dtype
def test_layer_norm_of_slices_without_elements(isa, dtype):
    x = np.empty((4, 0), dtype)
    y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.25)
    assert y.shape == (4, 0)
    assert np.array_equal(mean, np.zeros((4, 1)))
    assert np.array_equal(rstd, np.full((4, 1), 2))
    dx, dweight, dbias = lanenorm.layer_norm_backward(x, x, mean, rstd)
    assert dx.shape == (4, 0)
    assert dweight.shape == dbias.shape == (0,)
    y, mean, rstd = lanenorm.layer_norm_forward(np.empty((3, 0, 2), dtype), axis=(1, 2), eps=0.25)
    assert y.shape == (3, 0, 2)
    assert np.array_equal(mean, np.zeros((3, 1, 1)))
    assert np.array_equal(rstd, np.full((3, 1, 1), 2))


def test_layer_norm_without_param_grads(rng, isa):
    x, dy = normal(rng, (20, 50), np.float32), normal(rng, (20, 50), np.float32)
    weight, _ = parameters(rng, 50, np.float32)
    _, mean, rstd = lanenorm.layer_norm_forward(x)
    for axis in (0, 1):
        _, mean, rstd = lanenorm.layer_norm_forward(x, axis=axis)
        weight, _ = parameters(rng, x.shape[axis], np.float32)
        dx, dweight, dbias = lanenorm.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis, param_grads=False)
        assert dweight is None
        assert dbias is None
        exact = reference.layer_norm_backward(dy, x, weight, axis=axis)
        check("dx", dx, exact.dx, exact.dx_scale)


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 1, 1), (1, 40)], ids=str)
def test_layer_norm_of_single_rows_and_values(rng, shape):
    for dtype in DTYPES:
        check_layer_norm(normal(rng, shape, dtype, offset=2.0), normal(rng, shape, dtype))


@pytest.mark.parametrize("count", [1, 2, 20, 100, 127, 128, 300, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layer_norm_of_the_largest_values(rng, isa, dtype, count):
    """Values whose distance from the mean is beyond the dtype's range, along rows and along columns."""
    x = (np.finfo(dtype).max * rng.choice([-1.0, 0.5, 1.0], (12, count))).astype(dtype)
    x[0] = np.finfo(dtype).max * np.where(np.arange(count) == 0, -1.0, 1.0)
    exact = reference.layer_norm(x, axis=1, eps=EPS)
    check_y(lanenorm.layer_norm(x, eps=EPS), exact, context=f"{count} in a row, {isa}")
    columns = np.ascontiguousarray(x.T)
    exact = reference.layer_norm(columns, axis=0, eps=EPS)
    check_y(lanenorm.layer_norm(columns, axis=0, eps=EPS), exact, context=f"{count} in a column, {isa}")


def test_layer_norm_survives_large_offset_with_outlier_first(rng):
    """Deviation 1 around 1e6 after an element 1e3 away."""
    x = outlier(0, 1e3, 1e6)(rng, 20, 5000, np.dtype(np.float32)).astype(np.float32)
    check_layer_norm(x, normal(rng, x.shape, np.float32))
