"""Batch normalization: values, running statistics, inference, over layouts, planes, lengths and dtypes."""

import functools
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
    at_byte,
    by_dtype,
    check_batch_norm,
    check_layout,
    check_y,
    columns_of,
    constant,
    hard_makers,
    innermost,
    matrix,
    normal,
    packed,
    parameter_dtypes,
    parameters,
    sweep_groups,
)
from reference import check

import lanenorm

# ---- By hand --------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [(2, 3), (64, 5), (2, 3, 8, 8), (4, 2, 17, 16)], ids=str)
def test_batch_norm_of_alternating_ones(isa, dtype, shape):
    """Every channel is as many 1 as -1: mean 0, variance 1."""
    signs = 1 - 2 * (np.arange(shape[0]) % 2).reshape([-1] + [1] * (len(shape) - 1))
    x = (np.broadcast_to(signs, shape)).astype(dtype)
    y, mean, rstd = lanenorm.batch_norm_forward(x, eps=0.0)
    assert np.array_equal(y, x)
    assert np.array_equal(mean, np.zeros(shape[1]))
    assert np.array_equal(rstd, np.ones(shape[1]))
    y, mean, rstd = lanenorm.batch_norm_forward(x, eps=3.0)
    assert np.array_equal(y, x / np.array(2, dtype))
    assert np.array_equal(rstd, np.full(shape[1], 0.5))


def test_batch_norm_affine_and_running_statistics_by_hand(isa):
    """Channel 0 is 1, 3 (mean 2, variance 1, unbiased 2), channel 1 is 10, 30 (mean 20, variance 100, unbiased 200)."""
    x = np.array([[1, 10], [3, 30]], np.float32)
    weight, bias = np.array([2, 3], np.float32), np.array([5, 7], np.float32)
    running_mean, running_var = np.array([0, 4], np.float32), np.array([1, 8], np.float32)
    y, mean, rstd = lanenorm.batch_norm_forward(
        x, weight, bias, running_mean=running_mean, running_var=running_var, momentum=0.25, eps=0.0
    )
    assert np.array_equal(y, [[3, 4], [7, 10]])
    assert np.array_equal(mean, [2, 20])
    assert np.array_equal(rstd, np.array([1, 0.1], np.float32))
    assert np.array_equal(running_mean, [0.5, 8])
    assert np.array_equal(running_var, [1.25, 56])


def test_batch_norm_inference_by_hand(isa):
    x = np.array([[3, 10], [5, 30]], np.float32)
    mean, var = np.array([1, 20], np.float32), np.array([4, 100], np.float32)
    assert np.array_equal(lanenorm.batch_norm(x, mean, var, eps=0.0), [[1, -1], [2, 1]])
    weight, bias = np.array([2, 3], np.float32), np.array([5, 7], np.float32)
    assert np.array_equal(lanenorm.batch_norm(x, mean, var, weight, bias, eps=0.0), [[7, 4], [9, 10]])


# ---- Accuracy -------------------------------------------------------------------------------------------------------


def arrangements(count):
    """How the (C, count) values of a sweep may lie in an array: function, channel axis."""
    yield lambda rows: np.ascontiguousarray(rows.T), 1  # 2-D
    yield lambda rows: np.ascontiguousarray(rows.T)[None, :, None], -1  # channels-last
    yield lambda rows: rows[None], 1  # one long plane each
    plane = next((p for p in (256, 49, 7, 5, 3, 2) if count % p == 0 and count > p), None)
    if plane:
        yield lambda rows: columns_of(rows, plane), 1


def check_sweep(rng, dtype, count):
    for makers, eps in sweep_groups(dtype, count):
        values = matrix(rng, makers, count, dtype)
        gradient = normal(rng, values.shape, dtype)
        weight, bias = parameters(rng, len(values), parameter_dtypes(dtype)[-1])
        for arrange, channel_axis in arrangements(count):
            x, dy = arrange(values), arrange(gradient)
            check_batch_norm(x, dy, channel_axis=channel_axis, eps=eps)
            check_batch_norm(x, dy, weight, bias, channel_axis=channel_axis, eps=eps)


@by_dtype
def test_batch_norm_accuracy_small_counts(rng, dtype):
    for count in SMALL_COUNTS[1:]:
        check_sweep(rng, dtype, count)


@pytest.mark.parametrize("count", [*BORDER_COUNTS, 7 * 49, 36 * 256])
@by_dtype
def test_batch_norm_accuracy_border_counts(rng, dtype, count):
    check_sweep(rng, dtype, count)


@pytest.mark.parametrize(("images", "plane"), [(7, 15), (2, 16), (40, 16), (8, 49), (15, 49), (2, 196), (9, 196)])
@by_dtype
def test_batch_norm_accuracy_of_small_planes(rng, dtype, images, plane):
    """9 channels of each kind: more than a vector of statistics; with outliers, steps and drifts among them."""
    for makers, eps in sweep_groups(dtype, plane * images):
        values = matrix(rng, makers, plane * images, dtype, rows=9)
        gradient = normal(rng, values.shape, dtype)
        weight, bias = parameters(rng, len(values), parameter_dtypes(dtype)[-1])
        check_batch_norm(columns_of(values, plane), columns_of(gradient, plane), weight, bias, eps=eps)


@pytest.mark.parametrize(("images", "plane"), [(32, 31), (17, 33), (7, 48)])
def test_batch_norm_accuracy_of_constant_planes(rng, images, plane):
    """The values that a pivot is made of say little about the others, and all roundings go the same way."""
    values = np.repeat(normal(rng, (400, images), np.float32), plane, axis=1)
    check_batch_norm(columns_of(values, plane), columns_of(normal(rng, values.shape, np.float32), plane), eps=0.0)


@pytest.mark.parametrize("count", LONG_COUNTS)
@pytest.mark.parametrize("order", ["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
def test_batch_norm_accuracy_long_channels(rng, dtype, order, count):
    """All makers as channels of one array: as planes, or as the columns of a matrix."""
    for makers, eps in hard_makers(dtype):
        values = matrix(rng, makers, count, dtype, rows=1)
        gradient = normal(rng, values.shape, dtype)
        if order == "channels-first":
            check_batch_norm(values[None], gradient[None], eps=eps)
        else:
            check_batch_norm(np.ascontiguousarray(values.T), np.ascontiguousarray(gradient.T), eps=eps)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=lambda d: d.name)
def test_batch_norm_accuracy_long_channels_of_16_bits(rng, dtype):
    for makers, eps in hard_makers(dtype):
        values = matrix(rng, makers, 65537, dtype, rows=1)
        gradient = normal(rng, values.shape, dtype)
        check_batch_norm(values[None], gradient[None], eps=eps)
        check_batch_norm(np.ascontiguousarray(values.T), np.ascontiguousarray(gradient.T), eps=eps)


PLANES = [(1, 1), (1, 2), (3, 5), (7, 7), (15, 17), (16, 16), (35, 35), (1, 300)]


@pytest.mark.parametrize("plane", PLANES, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("batch_and_channels", [(2, 3), (5, 17), (33, 24), (1, 40)], ids=str)
def test_batch_norm_accuracy_of_planes(rng, plane, batch_and_channels):
    """Small planes go through other code than large ones."""
    shape = (*batch_and_channels, *plane)
    if shape[0] * plane[0] * plane[1] < 2:
        pytest.skip("one value per channel")
    for dtype, offset in ((np.dtype(np.float32), 1e4), (DTYPES[0], 0.0), (np.dtype(np.float64), 1e6)):
        x, dy = normal(rng, shape, dtype, offset), normal(rng, shape, dtype)
        weight, bias = parameters(rng, shape[1], dtype)
        check_batch_norm(x, dy)
        check_batch_norm(x, dy, weight, bias)
        last = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy)]
        check_batch_norm(*last, weight, bias, channel_axis=-1)


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 63, 64, 65, 100, 513])
def test_batch_norm_accuracy_for_any_number_of_channels(rng, channels):
    for dtype in FLOAT_DTYPES:
        x, dy = normal(rng, (70, channels), dtype, 1e3), normal(rng, (70, channels), dtype)
        weight, bias = parameters(rng, channels, dtype)
        check_batch_norm(x, dy, weight, bias)
        images = normal(rng, (3, channels, 5, 6), dtype, 1e3)
        check_batch_norm(images, normal(rng, images.shape, dtype), weight, bias)


def test_batch_norm_accuracy_of_a_batch_above_65536(rng):
    x = normal(rng, (65537, 3, 2), np.float32, 1e3)
    check_batch_norm(x, normal(rng, x.shape, np.float32))


def test_batch_norm_accuracy_of_few_very_long_rows(rng):
    x = normal(rng, (1, 1, 3 * 10**6), np.float32, 1e5)
    check_batch_norm(x, normal(rng, x.shape, np.float32))


# ---- Exact where it can be ------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [(2, 5), (70, 33), (4, 6, 7, 7), (3, 4, 20, 20)], ids=str)
def test_batch_norm_of_constant_channels_is_bias(rng, isa, dtype, shape):
    values = constant(rng, shape[1], 1, dtype).astype(dtype)
    x = np.ascontiguousarray(np.broadcast_to(values.reshape(-1, *[1] * (len(shape) - 2)), shape))
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, shape[1], parameter_dtype)
        expected = np.broadcast_to(bias.astype(dtype).reshape(-1, *[1] * (len(shape) - 2)), shape)
        y, mean, rstd = lanenorm.batch_norm_forward(x, weight, bias)
        assert np.array_equal(y, expected)
        assert np.array_equal(mean, values[:, 0].astype(mean.dtype))
        assert np.all(rstd == rstd.dtype.type(1 / np.sqrt(EPS)))
        assert np.all(lanenorm.batch_norm_forward(x, weight).y == 0)
        var = np.full(shape[1], 1e-12, mean.dtype)
        assert np.array_equal(lanenorm.batch_norm(x, mean, var, weight, bias), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(3, 5), (1000, 33), (6, 5, 7, 7), (3, 4, 33, 35)], ids=str)
def test_batch_norm_mean_of_integers_is_exact(rng, isa, dtype, shape):
    x = rng.integers(-100, 101, shape).astype(dtype)
    axes = reference.other_axes(1, x.ndim)
    exact = x.astype(np.int64).sum(axis=axes).astype(np.longdouble) / (x.size // shape[1])
    assert np.array_equal(lanenorm.batch_norm_forward(x).mean, exact.astype(dtype))


@pytest.mark.parametrize("shape", [(20, 12), (300, 12), (3, 12, 5, 5), (3, 12, 20, 20), (2, 12, 200, 200)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_norm_of_the_largest_values(rng, isa, dtype, shape):
    """Values whose distance from the mean is beyond the dtype's range."""
    x = (np.finfo(dtype).max * rng.choice([-1.0, 0.5, 1.0], shape)).astype(dtype)
    check_y(lanenorm.batch_norm_forward(x).y, reference.batch_norm_forward(x), context=f"{shape} {isa}")


def test_batch_norm_eps_zero_on_constant_channel_is_nan(isa):
    x = np.array([[1, 1], [1, 2]], np.float32)
    y = lanenorm.batch_norm_forward(x, eps=0.0).y
    assert np.all(np.isnan(y[:, 0]))
    assert np.array_equal(y[:, 1], [-1, 1])


@by_dtype
def test_batch_norm_keeps_the_capacity_of_the_network(rng, isa, dtype):
    """weight = deviation and bias = mean give the input back (Ioffe & Szegedy 2015, section 3)."""
    x = normal(rng, (50, 9), dtype, offset=3.0)
    exact = reference.batch_norm_forward(x, eps=0.0)
    weight, bias = (1 / exact.rstd).astype(dtype), exact.mean.astype(dtype)
    y = lanenorm.batch_norm_forward(x, weight, bias, eps=0.0).y
    check_y(y, reference.batch_norm_forward(x, weight, bias, eps=0.0), weight, bias)
    error = np.abs(y.astype(np.float64) - x.astype(np.float64))
    # as for layer normalization: the parameters are rounded too
    assert np.all(error <= 4 * reference.rounding(dtype, np.abs(x).max().astype(np.float64)))


# ---- Running statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
@by_dtype
def test_batch_norm_running_statistics(rng, isa, dtype, momentum):
    """The share of the new batch is `momentum`, and its variance is divided by n - 1."""
    statistics = reference.statistics_dtype(dtype)
    for shape, channel_axis in (((2, 7), 1), ((40, 19), 1), ((3, 5, 7, 7), 1), ((2, 5, 20, 20), 1), ((3, 9, 6), -1)):
        x = normal(rng, shape, dtype, offset=20.0)
        channels = shape[channel_axis]
        running_mean, running_var = normal(rng, channels, statistics), rng.uniform(0, 3, channels).astype(statistics)
        expected = reference.running_statistics(x, running_mean, running_var, momentum, channel_axis=channel_axis)
        batch = reference.batch_norm_forward(x, channel_axis=channel_axis)
        result = lanenorm.batch_norm_forward(
            x, running_mean=running_mean, running_var=running_var, momentum=momentum, channel_axis=channel_axis
        )
        plain = lanenorm.batch_norm_forward(x, channel_axis=channel_axis)
        assert all(np.array_equal(*pair) for pair in zip(result, plain, strict=True))
        check("running_mean", running_mean, expected[0], momentum * np.sqrt(batch.var), context=str(shape))
        unbiased = batch.var * (x.size // channels) / (x.size // channels - 1)
        check("running_var", running_var, expected[1], momentum * unbiased, context=str(shape))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
def test_batch_norm_momentum_at_its_ends(rng, isa, dtype):
    """0 keeps the old statistics to the last bit, 1 takes the batch's."""
    x = normal(rng, (30, 5), dtype)
    before = normal(rng, 5, dtype), rng.uniform(0, 3, 5).astype(dtype)
    mean, var = (a.copy() for a in before)
    result = lanenorm.batch_norm_forward(x, running_mean=mean, running_var=var, momentum=0.0)
    assert np.array_equal(mean, before[0])
    assert np.array_equal(var, before[1])
    lanenorm.batch_norm_forward(x, running_mean=mean, running_var=var, momentum=1)
    assert np.array_equal(mean, result.mean)


def test_batch_norm_running_statistics_far_from_zero(rng, isa):
    """An unbiased variance of 1 around 1e6 is not lost in the running one."""
    x = normal(rng, (1000, 3), np.float32, 1e6)
    running = np.zeros(3, np.float32), np.zeros(3, np.float32)
    expected = reference.running_statistics(x, *running, 1.0)
    batch = reference.batch_norm_forward(x)
    lanenorm.batch_norm_forward(x, running_mean=running[0], running_var=running[1], momentum=1.0)
    check("running_mean", running[0], expected[0], np.sqrt(batch.var))
    check("running_var", running[1], expected[1], batch.var * 1000 / 999)


def test_batch_norm_nan_reaches_running_statistics_of_its_channel_only(rng, isa):
    for bad in (np.nan, np.inf):
        x = normal(rng, (20, 4, 3), np.float32)
        clean = np.zeros(4, np.float32), np.ones(4, np.float32)
        clean_y = lanenorm.batch_norm_forward(x, running_mean=clean[0], running_var=clean[1]).y
        x[7, 2, 1] = bad
        mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
        y = lanenorm.batch_norm_forward(x, running_mean=mean, running_var=var).y
        others = [0, 1, 3]
        assert np.all(np.isnan(y[:, 2]))
        assert np.array_equal(y[:, others], clean_y[:, others])
        assert not np.isfinite(mean[2])
        assert np.isnan(var[2])
        assert np.array_equal(mean[others], clean[0][others])
        assert np.array_equal(var[others], clean[1][others])


@by_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((30, 20), 1), ((4, 20, 7, 7), 1), ((2, 20, 20, 20), 1), ((3, 40, 20), 2)]
)
def test_batch_norm_bad_value_spoils_its_own_channel_only(rng, isa, dtype, bad, shape, channel_axis):
    x, dy = np.moveaxis(normal(rng, shape, dtype), channel_axis, 0), normal(rng, shape, dtype)
    channels = rng.choice(20, 3, replace=False)
    others = np.setdiff1d(np.arange(20), channels)
    call = functools.partial(lanenorm.batch_norm_forward, channel_axis=channel_axis)
    back = functools.partial(lanenorm.batch_norm_backward, dy, channel_axis=channel_axis)
    whole = np.moveaxis(x, 0, channel_axis)
    clean = call(whole)
    clean_dx = np.moveaxis(back(whole, clean.mean, clean.rstd).dx, channel_axis, 0)
    x[channels, ..., 1] = bad
    result = call(whole)
    dx = np.moveaxis(back(whole, result.mean, result.rstd).dx, channel_axis, 0)
    y, clean_y = (np.moveaxis(r.y, channel_axis, 0) for r in (result, clean))
    assert np.all(np.isnan(y[channels]))
    assert np.all(np.isnan(dx[channels]))
    assert np.array_equal(y[others], clean_y[others])
    assert np.array_equal(dx[others], clean_dx[others])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(30, 20), (4, 20, 3, 3), (4, 20, 7, 7), (3, 20, 20, 20)], ids=str)
def test_batch_norm_of_weights_near_the_ends_of_the_range(rng, isa, dtype, shape):
    """rstd * weight would over- or underflow; the other channels must not change by one bit for it."""
    large, small = (1e37, 1e-36) if dtype == np.float32 else (1e305, 1e-303)
    x = normal(rng, shape, dtype, offset=3.0)
    weight, bias = parameters(rng, 20, dtype)
    mean, var = normal(rng, 20, dtype), rng.uniform(0.5, 2, 20).astype(dtype)
    extreme = weight.copy()
    extreme[[3, 7, 11, 19]] = large, small, 0, -large
    for y, ordinary, exact in (
        (
            lanenorm.batch_norm_forward(x, extreme, bias).y,
            lanenorm.batch_norm_forward(x, weight, bias).y,
            reference.batch_norm_forward(x, extreme, bias),
        ),
        (
            lanenorm.batch_norm(x, mean, var, extreme, bias),
            lanenorm.batch_norm(x, mean, var, weight, bias),
            reference.batch_norm(x, mean, var, extreme, bias),
        ),
    ):
        check_y(y, exact, *(reference.spread(p, (1,), x.ndim) for p in (extreme, bias)))
        others = np.setdiff1d(np.arange(20), [3, 7, 11, 19])
        assert np.array_equal(y[:, others], ordinary[:, others])


# ---- Inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        ((9,), 0),
        ((6, 40), 1),
        ((40, 6), 0),
        ((3, 17, 7, 7), 1),
        ((3, 5, 16, 17), 1),
        ((2, 5, 6, 33), -1),
        ((1, 3, 1), 1),
    ],
    ids=str,
)
def test_batch_norm_inference(rng, isa, shape, channel_axis, layout):
    channels = shape[channel_axis]
    for dtype in DTYPES:
        statistics = reference.statistics_dtype(dtype)
        x = LAYOUTS[layout](normal(rng, shape, dtype, offset=10.0))
        mean = LAYOUTS[layout](normal(rng, channels, statistics, offset=10.0))
        var = LAYOUTS[layout](rng.uniform(0.5, 2, channels).astype(statistics))
        for array in (mean, var):
            array.flags.writeable = False
        context = f"{dtype} {shape} {layout}"
        y = lanenorm.batch_norm(x, mean, var, channel_axis=channel_axis)
        check_layout(y, x)
        check_y(y, reference.batch_norm(x, mean, var, channel_axis=channel_axis), context=context)
        weight, bias = parameters(rng, channels, parameter_dtypes(dtype)[-1])
        gamma, beta = (reference.spread(p, (channel_axis % x.ndim,), x.ndim) for p in (weight, bias))
        for kwargs, spread_out in (
            ({"weight": weight, "bias": bias}, (gamma, beta)),
            ({"weight": weight}, (gamma, None)),
            ({"bias": bias}, (None, beta)),
        ):
            y = lanenorm.batch_norm(x, mean, var, channel_axis=channel_axis, **kwargs)
            exact = reference.batch_norm(x, mean, var, channel_axis=channel_axis, **kwargs)
            check_y(y, exact, *spread_out, context=context)


def test_batch_norm_inference_survives_large_offset(rng, isa):
    """Deviation 1 around 1e6: folded into a·x + b, nothing would be left of it."""
    for shape in ((300, 20), (4, 5, 7, 7), (3, 4, 20, 20)):
        x = normal(rng, shape, np.float32, 1e6)
        mean = np.full(shape[1], 1e6, np.float32)
        var = rng.uniform(0.5, 2, shape[1]).astype(np.float32)
        weight, bias = parameters(rng, shape[1], np.float32)
        spread_out = [reference.spread(p, (1,), x.ndim) for p in (weight, bias)]
        check_y(lanenorm.batch_norm(x, mean, var), reference.batch_norm(x, mean, var))
        exact = reference.batch_norm(x, mean, var, weight, bias)
        check_y(lanenorm.batch_norm(x, mean, var, weight, bias), exact, *spread_out)


def test_batch_norm_inference_of_bad_statistics(isa):
    """NaN in the statistics of one channel, zero variance with eps = 0 in another."""
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    mean, var = np.array([np.nan, 2, 3], np.float32), np.array([1, 0, 4], np.float32)
    y = lanenorm.batch_norm(x, mean, var, eps=0.0)
    assert np.all(np.isnan(y[:, 0]))
    assert np.isnan(y[0, 1])
    assert np.isinf(y[1, 1]) or np.isnan(y[1, 1])
    assert np.array_equal(y[:, 2], [0, 1.5])


# ---- Shapes, layouts, out -------------------------------------------------------------------------------------------

SHAPES = [
    ((6, 40), 1),
    ((6, 40), 0),
    ((6, 40, 5), 0),
    ((6, 40, 5), 1),
    ((6, 40, 5), 2),
    ((6, 40, 5), -3),
    ((3, 4, 7, 7), 1),
    ((3, 4, 17, 16), 1),
    ((3, 4, 17, 16), 2),
    ((3, 7, 7, 40), -1),
    ((2, 3, 4, 5, 6), 1),
    ((2, 3, 4, 5, 6), 3),
    ((1, 4, 1, 9), 1),
    ((9, 1), 1),
    ((2, 1, 3, 1, 2, 5, 1, 2), 5),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES, ids=lambda v: str(v).replace(" ", ""))
def test_batch_norm_over_any_channel_axis_in_any_layout(rng, shape, channel_axis, layout):
    for dtype in DTYPES:
        arrange = LAYOUTS[layout]
        values, gradient = normal(rng, shape, dtype, offset=10.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, shape[channel_axis], parameter_dtypes(dtype)[0])
        context = f"{dtype} {shape} channel_axis={channel_axis} {layout}"
        check_batch_norm(arrange(values), arrange(gradient), channel_axis=channel_axis, context=context)
        check_batch_norm(
            arrange(values), gradient, arrange(weight), arrange(bias), channel_axis=channel_axis, context=context
        )


@pytest.mark.parametrize("channel_axis", [0, 1, 2])
@pytest.mark.parametrize("inner", [0, 1, 2])
@by_dtype
def test_batch_norm_whatever_axis_lies_innermost(rng, dtype, inner, channel_axis):
    x = innermost(normal(rng, (12, 70, 19), dtype, offset=5.0), inner)
    dy = normal(rng, x.shape, dtype)
    weight, bias = parameters(rng, x.shape[channel_axis], dtype)
    check_batch_norm(x, innermost(dy, inner), weight, bias, channel_axis=channel_axis)
    check_batch_norm(x, dy, weight, bias, channel_axis=channel_axis)


@pytest.mark.parametrize("repeated", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("channel_axis", [0, 1, 2])
def test_batch_norm_of_broadcast_input(rng, repeated, channel_axis):
    lengths = [1 if a in repeated else n for a, n in enumerate((6, 40, 17))]
    x = np.broadcast_to(normal(rng, lengths, np.float32, offset=3.0), (6, 40, 17))
    weight, bias = parameters(rng, x.shape[channel_axis], np.float32)
    dy = np.broadcast_to(normal(rng, lengths, np.float32), x.shape)
    check_batch_norm(x, dy, weight, bias, channel_axis=channel_axis)
    check_batch_norm(x, normal(rng, x.shape, np.float32), channel_axis=channel_axis)


@by_dtype
def test_batch_norm_parameters_of_every_lawful_dtype(rng, dtype):
    for shape in ((30, 21), (3, 21, 6, 6), (2, 21, 17, 17)):
        x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
        for parameter_dtype in parameter_dtypes(dtype):
            weight, bias = parameters(rng, 21, parameter_dtype)
            check_batch_norm(x, dy, weight, bias)
            check_batch_norm(x, dy, weight, None)
            check_batch_norm(x, dy, None, bias)


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_writes_into_out(rng, isa, dtype, layout):
    statistics = reference.statistics_dtype(dtype)
    for shape in ((10, 30), (3, 4, 5, 6), (2, 3, 17, 17)):
        x, dy = (LAYOUTS[layout](normal(rng, shape, dtype)) for _ in range(2))
        weight, bias = parameters(rng, shape[1], dtype)
        running = np.zeros(shape[1], statistics), np.ones(shape[1], statistics)
        y, mean, rstd = lanenorm.batch_norm_forward(x, weight, bias)
        inferred = lanenorm.batch_norm(x, *running, weight, bias)
        dx = lanenorm.batch_norm_backward(dy, x, mean, rstd, weight).dx
        out = np.empty_like(x)
        assert lanenorm.batch_norm_forward(x, weight, bias, out=out).y is out
        assert np.array_equal(out, y)
        out = np.empty_like(x)
        assert lanenorm.batch_norm(x, *running, weight, bias, out=out) is out
        assert np.array_equal(out, inferred)
        out = np.empty_like(x)
        assert lanenorm.batch_norm_backward(dy, x, mean, rstd, weight, out=out).dx is out
        assert np.array_equal(out, dx)
        if packed(x).strides != x.strides:
            continue
        own = x.copy(order="K")
        assert lanenorm.batch_norm_forward(own, weight, bias, out=own).y is own
        assert np.array_equal(own, y)
        own = x.copy(order="K")
        assert lanenorm.batch_norm(own, *running, weight, bias, out=own) is own
        assert np.array_equal(own, inferred)
        own = dy.copy(order="K")
        assert lanenorm.batch_norm_backward(own, x, mean, rstd, weight, out=own).dx is own
        assert np.array_equal(own, dx)


def test_batch_norm_writes_into_unaligned_out(rng, isa):
    for shape in ((70, 33), (3, 4, 5, 6), (2, 3, 17, 17)):
        x = normal(rng, shape, np.float32)
        out = at_byte(np.zeros_like(x), 1)
        lanenorm.batch_norm_forward(x, out=out)
        assert np.array_equal(out, lanenorm.batch_norm_forward(x).y)


def test_batch_norm_in_place_on_large_array(rng):
    lanenorm.set_num_threads(3)
    for shape in ((8, 64, 56, 56), (50000, 64), (64, 512, 7, 7)):
        x = normal(rng, shape, np.float32, offset=4.0)
        expected = lanenorm.batch_norm_forward(x).y
        assert lanenorm.batch_norm_forward(x, out=x).y is x
        assert np.array_equal(x, expected)


def test_batch_norm_leaves_inputs_alone(rng, isa):
    for shape in ((20, 50), (3, 50, 6, 6), (2, 50, 17, 17)):
        x, dy = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
        weight, bias = parameters(rng, 50, np.float32)
        for array in (x, dy, weight, bias):
            array.flags.writeable = False
        forward = lanenorm.batch_norm_forward(x, weight, bias)
        kept = [array.tobytes() for array in (x, dy, weight, bias, *forward)]
        for array in forward:
            array.flags.writeable = False
        lanenorm.batch_norm_backward(dy, x, forward.mean, forward.rstd, weight)
        lanenorm.batch_norm_backward(dy, x, forward.mean, forward.rstd, weight, training=False)
        lanenorm.batch_norm(x, forward.mean, forward.rstd, weight, bias)
        assert [array.tobytes() for array in (x, dy, weight, bias, *forward)] == kept


def test_batch_norm_does_not_write_around_out(rng, isa):
    for (batch, channels, plane), dtype in itertools.product(((3, 5, 1), (3, 5, 7), (2, 3, 257), (9, 33, 1)), DTYPES):
        x = normal(rng, (batch, channels, plane), dtype)
        memory = np.full(x.nbytes + 256, 0xA5, np.uint8)
        start = 128 + dtype.itemsize
        out = memory[start : start + x.nbytes].view(dtype).reshape(x.shape)
        lanenorm.batch_norm_forward(x, out=out)
        assert np.all(memory[:start] == 0xA5)
        assert np.all(memory[start + out.nbytes :] == 0xA5)


def test_batch_norm_of_memmap(rng, tmp_path):
    values = normal(rng, (30, 10), np.float32)
    np.save(tmp_path / "x.npy", values)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(lanenorm.batch_norm_forward(x).y, lanenorm.batch_norm_forward(values).y)


# ---- Nothing to do --------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_batch_norm_of_empty_batch(isa, dtype, shape):
    """Running statistics stay; the statistics of nothing are 0 and 1/sqrt(eps)."""
    x = np.empty(shape, dtype)
    statistics = reference.statistics_dtype(dtype)
    running = np.full(3, 5, statistics), np.full(3, 7, statistics)
    weight = np.ones(3, dtype)
    y, mean, rstd = lanenorm.batch_norm_forward(
        x, weight, running_mean=running[0], running_var=running[1], momentum=0.5, eps=0.25
    )
    assert y.shape == shape
    assert np.array_equal(mean, [0, 0, 0])
    assert np.array_equal(rstd, [2, 2, 2])
    assert np.array_equal(running, [[5, 5, 5], [7, 7, 7]])
    assert lanenorm.batch_norm(x, *running, weight).shape == shape
    for training in (True, False):
        dx, dweight, dbias = lanenorm.batch_norm_backward(x, x, mean, rstd, weight, training=training)
        assert dx.shape == shape
        assert dweight.dtype == dbias.dtype == dtype
        assert np.array_equal(dweight, [0, 0, 0])
        assert np.array_equal(dbias, [0, 0, 0])


def test_batch_norm_without_channels(isa):
    x = np.empty((4, 0, 3), np.float32)
    y, mean, rstd = lanenorm.batch_norm_forward(x)
    assert y.shape == (4, 0, 3)
    assert mean.shape == rstd.shape == (0,)
    assert lanenorm.batch_norm_backward(x, x, mean, rstd).dweight.shape == (0,)


# ---- Gradient with frozen statistics, and without parameters' gradients ----------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [((9,), 0), ((6, 40), 1), ((3, 17, 7, 7), 1), ((3, 5, 16, 17), 1), ((2, 5, 6, 33), -1), ((1, 4), 1)],
    ids=str,
)
def test_batch_norm_frozen_gradient(rng, isa, shape, channel_axis, layout):
    """Statistics that are not those of x, as in fine-tuning; one value per channel is lawful here."""
    channels = shape[channel_axis]
    for dtype in DTYPES:
        statistics = reference.statistics_dtype(dtype)
        x, dy = (LAYOUTS[layout](normal(rng, shape, dtype)) for _ in range(2))
        mean, rstd = normal(rng, channels, statistics), rng.uniform(0.5, 2, channels).astype(statistics)
        weight, _ = parameters(rng, channels, dtype)
        for gamma in (None, weight):
            result = lanenorm.batch_norm_backward(dy, x, mean, rstd, gamma, channel_axis=channel_axis, training=False)
            exact = reference.batch_norm_frozen_backward(dy, x, mean, rstd, gamma, channel_axis=channel_axis)
            check_layout(result.dx, x)
            for name in ("dx", "dweight", "dbias"):
                check(name, getattr(result, name), getattr(exact, name), getattr(exact, f"{name}_scale"))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_param_grads(rng, isa, training):
    for shape in ((20, 50), (3, 50, 6, 6), (2, 50, 17, 17)):
        x, dy = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
        weight, _ = parameters(rng, 50, np.float32)
        _, mean, rstd = lanenorm.batch_norm_forward(x)
        both = [
            lanenorm.batch_norm_backward(dy, x, mean, rstd, weight, training=training, param_grads=wanted)
            for wanted in (True, False)
        ]
        assert both[1].dweight is None
        assert both[1].dbias is None
        if training:
            exact = reference.batch_norm_backward(dy, x, weight)
        else:
            exact = reference.batch_norm_frozen_backward(dy, x, mean, rstd, weight)
        for result in both:
            check("dx", result.dx, exact.dx, exact.dx_scale)
