"""Batch normalization by the CUDA kernels: planes and columns, every dtype, tail, offset, layout; values and bits.

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
    at_byte,
    by_dtype,
    check_backward,
    check_forward,
    check_y,
    columns_of,
    constant,
    hard_makers,
    matrix,
    normal,
    packed,
    parameter_dtypes,
    parameters,
    scaled_makers,
    sweep_groups,
)
from cuda_places import results_by_l2


def forward(device, x, weight=None, bias=None, **keywords):
    """NormForward on the host."""
    result = device.library.batch_norm_forward(*map(device.to_device, (x, weight, bias)), **keywords)
    return type(result)(*map(device.to_host, result))


def inference(device, x, mean, var, weight=None, bias=None, **keywords):
    arrays = map(device.to_device, (x, mean, var, weight, bias))
    return device.to_host(device.library.batch_norm(*arrays, **keywords))


def backward(device, dy, x, mean, rstd, weight=None, **keywords):
    """NormBackward on the host."""
    result = device.library.batch_norm_backward(*map(device.to_device, (dy, x, mean, rstd, weight)), **keywords)
    return type(result)(*map(device.to_host, result))


def check(device, x, dy, weight=None, bias=None, *, channel_axis=1, eps=EPS, context=""):
    """Forward and backward of one input against the reference."""
    gamma, beta = (reference.spread(p, (channel_axis % x.ndim,), x.ndim) for p in (weight, bias))
    where = f"batch_norm {x.dtype} {x.shape} channel_axis={channel_axis} {context}"
    result = forward(device, x, weight, bias, channel_axis=channel_axis, eps=eps)
    exact = reference.batch_norm_forward(x, weight, bias, channel_axis=channel_axis, eps=eps)
    check_forward(result, exact, x, gamma, beta, where)
    gradients = backward(device, dy, x, result.mean, result.rstd, weight, channel_axis=channel_axis)
    exact = reference.batch_norm_backward(dy, x, weight, channel_axis=channel_axis, eps=eps)
    check_backward(gradients, exact, x, weight, where)


def running(rng, channels, dtype):
    """A running mean and a running variance."""
    statistics = reference.statistics_dtype(dtype)
    return rng.standard_normal(channels).astype(statistics), rng.uniform(0.5, 2, channels).astype(statistics)


def all_bytes(device, x, dy, weight=None, bias=None, *, channel_axis=1):
    """The bytes of everything that is computed, in the order of the elements and not of memory."""
    result = forward(device, x, weight, bias, channel_axis=channel_axis)
    gradients = backward(device, dy, x, result.mean, result.rstd, weight, channel_axis=channel_axis)
    y = inference(device, x, result.mean, result.rstd, weight, bias, channel_axis=channel_axis)
    keywords = {"channel_axis": channel_axis, "training": False, "param_grads": False}
    frozen = backward(device, dy, x, result.mean, result.rstd, weight, **keywords).dx
    return [np.ascontiguousarray(a).tobytes() for a in (*result, *gradients, y, frozen)]


# ---- By hand --------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [(2, 3), (64, 5), (2, 3, 8, 8), (4, 2, 17, 16), (2, 1, 99, 99)], ids=str)
def test_cuda_batch_norm_of_alternating_ones(device, dtype, shape):
    """Every channel is as many 1 as -1: mean 0, variance 1."""
    signs = 1 - 2 * (np.arange(shape[0]) % 2).reshape([-1] + [1] * (len(shape) - 1))
    x = np.ascontiguousarray(np.broadcast_to(signs, shape)).astype(dtype)
    y, mean, rstd = forward(device, x, eps=0.0)
    assert np.array_equal(y, x)
    assert np.array_equal(mean, np.zeros(shape[1]))
    assert np.array_equal(rstd, np.ones(shape[1]))
    y, _, rstd = forward(device, x, eps=3.0)
    assert np.array_equal(y, x / np.array(2, dtype))
    assert np.array_equal(rstd, np.full(shape[1], 0.5))


@pytest.mark.parametrize("plane", [1, 300], ids=["columns", "planes"])
def test_cuda_batch_norm_affine_and_running_statistics_by_hand(device, plane):
    """Channel 0 is 1, 3 (mean 2, variance 1), channel 1 is 10, 30 (mean 20, variance 100)."""
    x = np.repeat(np.array([[[1], [10]], [[3], [30]]], np.float32), plane, axis=2)
    weight, bias = np.array([2, 3], np.float32), np.array([5, 7], np.float32)
    start = np.array([0, 4], np.float32), np.array([1, 8], np.float32)
    means, variances = (device.to_device(a.copy()) for a in start)
    arrays = map(device.to_device, (x, weight, bias))
    keywords = {"running_mean": means, "running_var": variances}
    y, mean, rstd = device.library.batch_norm_forward(*arrays, **keywords, momentum=0.25, eps=0.0)
    assert np.array_equal(device.to_host(y)[:, :, 0], [[3, 4], [7, 10]])
    assert np.array_equal(device.to_host(mean), [2, 20])
    assert np.array_equal(device.to_host(rstd), np.array([1, 0.1], np.float32))
    n = 2 * plane
    assert np.array_equal(device.to_host(means), [0.5, 8])
    unbiased = np.array([1, 100]) * n / (n - 1)
    assert np.array_equal(device.to_host(variances), (0.75 * start[1] + 0.25 * unbiased).astype(np.float32))


@pytest.mark.parametrize("plane", [1, 7, 300])
def test_cuda_batch_norm_inference_by_hand(device, plane):
    x = np.repeat(np.array([[[3], [10]], [[5], [30]]], np.float32), plane, axis=2)
    mean, var = np.array([1, 20], np.float32), np.array([4, 100], np.float32)
    assert np.array_equal(inference(device, x, mean, var, eps=0.0)[:, :, -1], [[1, -1], [2, 1]])
    weight, bias = np.array([2, 3], np.float32), np.array([5, 7], np.float32)
    assert np.array_equal(inference(device, x, mean, var, weight, bias, eps=0.0)[:, :, -1], [[7, 4], [9, 10]])


# ---- Accuracy -------------------------------------------------------------------------------------------------------


def arrangements(count):
    """How the (C, count) values of a sweep may lie in an array: function, channel axis."""
    yield lambda rows: np.ascontiguousarray(rows.T), 1  # 2-D
    yield lambda rows: rows[None], 1  # one plane each
    for plane in (256, 49):
        if count % plane == 0 and count > plane:
            yield lambda rows, plane=plane: columns_of(rows, plane), 1


def check_sweep(device, rng, dtype, count, groups):
    for makers, eps in groups:
        values = matrix(rng, makers, count, dtype, rows=1)
        gradient = normal(rng, values.shape, dtype)
        weight, bias = parameters(rng, len(values), parameter_dtypes(dtype)[-1])
        for arrange, channel_axis in arrangements(count):
            check(device, arrange(values), arrange(gradient), weight, bias, channel_axis=channel_axis, eps=eps)


@by_dtype
@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 33, 63, 65, 255, 256, 257, 511, 513, 1025, 7 * 49, 5 * 256])
def test_cuda_batch_norm_accuracy(device, rng, dtype, count):
    check_sweep(device, rng, dtype, count, sweep_groups(dtype, count))


@by_dtype
@pytest.mark.parametrize("count", [4097, 36 * 256, 50001])
def test_cuda_batch_norm_accuracy_long_channels(device, rng, dtype, count):
    for makers, eps in hard_makers(dtype):
        check_sweep(device, rng, dtype, count, [(makers[:3], eps)])


def test_cuda_batch_norm_accuracy_of_a_million(device, rng):
    """Beyond every cluster: three kernels."""
    x = normal(rng, (3, 2, 700, 500), np.float32, offset=1e4)
    check(device, x, normal(rng, x.shape, np.float32), *parameters(rng, 2, np.float32))


@by_dtype
def test_cuda_batch_norm_accuracy_streamed(emulated, rng, dtype):
    """A device that keeps no channel on chip."""
    emulated.library.set_device(shared_per_block=49152, shared_per_multiprocessor=65536, architecture=75, max_cluster=1)
    for makers, eps in (*hard_makers(dtype), (scaled_makers(dtype), 0.0)):
        check_sweep(emulated, rng, dtype, 20 * 1024, [(makers, eps)])


@by_dtype
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(40, 70), (6, 5, 7, 7), (3, 4, 30, 20)], ids=str)
def test_cuda_batch_norm_running_statistics(device, rng, dtype, shape, momentum):
    """As the reference has them; also where they are not contiguous on the device."""
    x = normal(rng, shape, dtype, offset=3.0)
    mean, var = running(rng, shape[1], dtype)
    expected = reference.running_statistics(x, mean, var, momentum)
    own = [device.to_device(a.copy()) for a in (mean, var)]
    device.library.batch_norm_forward(device.to_device(x), running_mean=own[0], running_var=own[1], momentum=momentum)
    for got, exact, scale in zip(
        own, expected, (np.abs(x.astype(float)).max(), np.abs(expected[1]).max()), strict=True
    ):
        reference.check("mean", device.to_host(got), exact, scale)


@by_dtype
@pytest.mark.parametrize("shape", [(40, 70), (600, 7), (6, 5, 7, 7), (3, 4, 30, 20), (1, 2, 90, 90)], ids=str)
def test_cuda_batch_norm_inference_and_frozen_backward(device, rng, dtype, shape):
    x, dy = normal(rng, shape, dtype, offset=3.0), normal(rng, shape, dtype)
    mean, var = running(rng, shape[1], dtype)
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, shape[1], parameter_dtype)
        for w, b in ((None, None), (weight, None), (None, bias), (weight, bias)):
            y = inference(device, x, mean, var, w, b)
            gamma, beta = (reference.spread(p, (1,), x.ndim) for p in (w, b))
            check_y(y, reference.batch_norm(x, mean, var, w, b), gamma, beta, f"{dtype} {shape}")
        rstd = (1 / np.sqrt(var + 1e-5)).astype(var.dtype)
        gradients = backward(device, dy, x, mean, rstd, weight, training=False)
        exact = reference.batch_norm_frozen_backward(dy, x, mean, rstd, weight)
        check_backward(gradients, exact, x, weight, f"frozen {dtype} {shape}")
        alone = backward(device, dy, x, mean, rstd, weight, training=False, param_grads=False)
        assert alone.dx.tobytes() == gradients.dx.tobytes()
        assert alone.dweight is None
        assert alone.dbias is None


@pytest.mark.parametrize("shape", [(600, 7), (6, 5, 7, 7), (3, 4, 30, 20)], ids=str)
def test_cuda_batch_norm_frozen_backward_does_not_read_x(device, rng, shape):
    x, dy = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
    mean, rstd = running(rng, shape[1], np.float32)
    expected = backward(device, dy, x, mean, rstd, rstd, training=False, param_grads=False).dx
    alone = backward(device, dy, np.full_like(x, np.nan), mean, rstd, rstd, training=False, param_grads=False).dx
    assert alone.tobytes() == expected.tobytes()
    reference.check("dx", alone, dy * reference.spread((rstd.astype(float) ** 2), (1,), x.ndim), 4.0)


@by_dtype
@pytest.mark.parametrize("shape", [(1, 2100, 16, 16), (2, 700, 17, 16), (9, 3000), (2, 300, 3, 5)], ids=str)
def test_cuda_batch_norm_inference_of_many_channels(emulated, rng, dtype, shape):
    """More channels to a block than it has constants of at a time: one multiprocessor."""
    emulated.library.set_device(multiprocessors=1)
    x = normal(rng, shape, dtype, offset=3.0)
    mean, var = running(rng, shape[1], dtype)
    weight, bias = parameters(rng, shape[1], dtype)
    gamma, beta = (reference.spread(p, (1,), x.ndim) for p in (weight, bias))
    y = inference(emulated, x, mean, var, weight, bias)
    check_y(y, reference.batch_norm(x, mean, var, weight, bias), gamma, beta, f"{dtype} {shape}")


def test_cuda_batch_norm_of_weights_at_the_ends_of_the_range(device, rng):
    """rstd times weight would leave float32, or its normal numbers, before x - mean brings it back."""
    for shape in ((40, 4), (2, 4, 20, 15)):
        unit = normal(rng, shape, np.float32)
        for scale, weight in ((1e-20, 1e25), (1e20, 1e-25), (1e15, 1e-30), (1e-15, 1e30)):
            x = unit * np.float32(scale)
            w = np.full(4, weight, np.float32)
            gamma = reference.spread(w, (1,), x.ndim)
            check_forward(forward(device, x, w, eps=0.0), reference.batch_norm_forward(x, w, eps=0.0), x, gamma)


# ---- Exact where it can be ------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [(30, 3), (700, 3), (5, 3, 7, 7), (3, 3, 20, 20), (2, 3, 100, 90)], ids=str)
def test_cuda_batch_norm_of_constant_channels_is_bias(device, rng, dtype, shape):
    values = constant(rng, 3, 1, dtype).astype(dtype)
    x = np.ascontiguousarray(np.broadcast_to(values.reshape([1, 3] + [1] * (len(shape) - 2)), shape))
    for parameter_dtype in parameter_dtypes(dtype):
        weight, bias = parameters(rng, 3, parameter_dtype)
        y, mean, rstd = forward(device, x, weight, bias)
        assert np.array_equal(y, np.broadcast_to(reference.spread(bias.astype(dtype), (1,), x.ndim), shape))
        assert np.array_equal(mean, values[:, 0].astype(mean.dtype))
        assert np.all(rstd == rstd.dtype.type(1 / np.sqrt(EPS)))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize >= 4], ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(3, 4), (1000, 3), (5, 3, 7, 7), (3, 2, 33, 31), (1, 1, 199, 201)], ids=str)
def test_cuda_batch_norm_mean_of_integers_is_exact(device, rng, dtype, shape):
    x = rng.integers(-100, 101, shape).astype(dtype)
    mean = forward(device, x).mean
    axes = tuple(a for a in range(len(shape)) if a != 1)
    sums = x.astype(np.int64).sum(axis=axes)
    assert np.array_equal(mean, (sums.astype(np.longdouble) / (x.size // shape[1])).astype(mean.dtype))


# ---- Bad values -----------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(30, 9), (700, 9), (4, 9, 7, 7), (4, 9, 20, 20)], ids=str)
def test_cuda_batch_norm_bad_value_spoils_its_own_channel_only(device, rng, dtype, bad, shape):
    x, dy = normal(rng, shape, dtype), normal(rng, shape, dtype)
    clean = forward(device, x)
    clean_dx = backward(device, dy, x, clean.mean, clean.rstd).dx
    x[(1, 4) + (3,) * (len(shape) - 2)] = bad
    result = forward(device, x)
    dx = backward(device, dy, x, result.mean, result.rstd).dx
    others = np.arange(9) != 4
    for got, before in ((result.y, clean.y), (dx, clean_dx)):
        assert np.array_equal(got[:, others], before[:, others])
        assert np.all(np.isnan(got[:, 4]))
    assert np.array_equal(result.mean[others], clean.mean[others])


# ---- Shapes, layouts ------------------------------------------------------------------------------------------------

SHAPES = [
    ((7, 5), 1),
    ((2, 3), 0),
    ((4, 5, 6), 1),
    ((4, 5, 6), -1),
    ((3, 4, 16, 17), 1),
    ((3, 16, 17, 4), 3),
    ((2, 3, 4, 5, 6), 2),
    ((2, 3, 2, 20, 16), 2),
    ((300, 1), 1),
    ((1, 1, 20, 20), 1),
    ((3, 130, 2, 1), 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES, ids=str)
def test_cuda_batch_norm_in_any_layout(device, rng, shape, channel_axis, layout):
    arrange = LAYOUTS[layout]
    for dtype in DTYPES:
        x, dy = normal(rng, shape, dtype, offset=10.0), normal(rng, shape, dtype)
        weight, bias = parameters(rng, shape[channel_axis], parameter_dtypes(dtype)[0])
        check(device, arrange(x), dy, arrange(weight), arrange(bias), channel_axis=channel_axis, context=layout)


@by_dtype
@pytest.mark.parametrize("offset", [0, 4, 7])
@pytest.mark.parametrize("shape", [(30, 61), (3, 5, 7, 7), (3, 2, 33, 31)], ids=str)
def test_cuda_batch_norm_in_place(device, rng, dtype, shape, offset):
    """out is x (backward: dy), aligned and not."""
    x, dy = normal(rng, shape, dtype, offset=2.0), normal(rng, shape, dtype)
    weight, bias = parameters(rng, shape[1], dtype)
    result = forward(device, x, weight, bias)
    dx = backward(device, dy, x, result.mean, result.rstd, weight).dx
    own = device.to_device(at_byte(x, offset))
    device.library.batch_norm_forward(own, *map(device.to_device, (weight, bias)), out=own)
    assert device.to_host(own).tobytes() == result.y.tobytes()
    own = device.to_device(at_byte(dy, offset))
    rest = map(device.to_device, (x, result.mean, result.rstd, weight))
    device.library.batch_norm_backward(own, *rest, out=own)
    assert device.to_host(own).tobytes() == dx.tobytes()


@by_dtype
def test_cuda_batch_norm_of_empty_arrays(device, dtype):
    """No values in a channel: mean 0, rstd of eps, running statistics untouched, zero dweight. No channels: nothing."""
    for shape in ((0, 5), (4, 0), (0, 3, 2, 2), (2, 3, 0, 2)):
        x, channels = np.empty(shape, dtype), shape[1]
        y, mean, rstd = forward(device, x, eps=4.0)
        assert y.shape == shape
        assert np.array_equal(mean, np.zeros(channels))
        assert np.array_equal(rstd, np.full(channels, 0.5))
        gradients = backward(device, x, x, mean, rstd)
        assert gradients.dx.shape == shape
        assert np.array_equal(gradients.dweight, np.zeros(channels))
        assert np.array_equal(gradients.dbias, np.zeros(channels))
        assert inference(device, x, mean, rstd).shape == shape


# ---- The same bits --------------------------------------------------------------------------------------------------

# (shape, channel axis): columns of one piece and of several, folded ones, planes of one warp, of one block, of many.
PROBLEMS = [
    ((300, 5), 1),
    ((1100, 131), 1),
    ((5000, 33), 1),
    ((40, 9, 7, 7), 1),
    ((600, 3, 3, 5), 1),
    ((2, 5, 16, 17), 1),
    ((9, 3, 40, 41), 1),
    ((4, 2, 90, 91), 1),
    ((1, 1, 300, 301), 1),
]


def inputs(shape, channel_axis, dtype):
    """x, dy, weight, bias: the same at every call."""
    rng = np.random.default_rng(sum(shape))
    x, dy = normal(rng, shape, dtype, offset=30.0), normal(rng, shape, dtype)
    return x, dy, *parameters(rng, shape[channel_axis], dtype)


@pytest.mark.parametrize(("shape", "channel_axis"), PROBLEMS, ids=str)
@by_dtype
def test_cuda_batch_norm_bits_do_not_depend_on_the_device(emulated, dtype, shape, channel_axis):
    """Number of SMs, order of execution, clusters, resident or streamed: none of them changes what is computed."""
    arrays = inputs(shape, channel_axis, dtype)
    expected = all_bytes(emulated, *arrays, channel_axis=channel_axis)
    for limits, schedule in (
        ({"multiprocessors": 1}, "reversed"),
        ({"multiprocessors": 7, "max_cluster": 8}, "forward"),
        ({"multiprocessors": 132, "max_cluster": 4}, "forward"),
        ({"multiprocessors": 188, "max_cluster": 2}, "reversed"),
        ({"multiprocessors": 40, "shared_per_block": 65536, "max_cluster": 1, "architecture": 75}, "reversed"),
        ({"multiprocessors": 16, "shared_per_block": 49152, "max_cluster": 1, "architecture": 75}, "forward"),
    ):
        emulated.library.set_device(**limits)
        emulated.library.set_schedule(schedule)
        assert all_bytes(emulated, *arrays, channel_axis=channel_axis) == expected, (limits, schedule)


@pytest.mark.parametrize(("shape", "channel_axis"), PROBLEMS, ids=str)
@by_dtype
def test_cuda_batch_norm_bits_do_not_depend_on_the_address(device, dtype, shape, channel_axis):
    arrays = inputs(shape, channel_axis, dtype)
    expected = all_bytes(device, *arrays, channel_axis=channel_axis)
    for offset in (2, 5, 12):
        moved = [at_byte(a, (offset + i) % 16) for i, a in enumerate(arrays)]
        assert all_bytes(device, *moved, channel_axis=channel_axis) == expected, offset


@pytest.mark.parametrize("layout", SAME_ORDER)
@pytest.mark.parametrize(("shape", "channel_axis"), PROBLEMS[::2], ids=str)
def test_cuda_batch_norm_bits_do_not_depend_on_strides(device, shape, channel_axis, layout):
    arrays = [LAYOUTS[layout](a) for a in inputs(shape, channel_axis, np.float32)]
    expected = all_bytes(device, *map(packed, arrays), channel_axis=channel_axis)
    assert all_bytes(device, *arrays, channel_axis=channel_axis) == expected


@pytest.mark.parametrize(("shape", "channel_axis"), [((600, 131), 1), ((40, 9, 7, 7), 1), ((9, 5, 20, 21), 1)], ids=str)
def test_cuda_batch_norm_bits_do_not_depend_on_how_much_is_packed_at_a_time(emulated, shape, channel_axis):
    """All, some channels, or one."""
    arrays = inputs(shape, channel_axis, np.float32)
    expected = all_bytes(emulated, *arrays, channel_axis=channel_axis)
    arrays = [LAYOUTS["reversed_last"](a) for a in arrays]
    results, launches = results_by_l2(
        emulated, arrays[0].size, lambda: all_bytes(emulated, *arrays, channel_axis=channel_axis)
    )
    assert results == [expected] * 3
    assert launches[0] < launches[1] < launches[2]


# ---- Which kernels run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "limits", "expected"),
    [
        ((1, 64, 20, 20), {}, [(32, 1)]),  # a warp a channel
        ((1, 64, 56, 56), {}, [(128, 1)]),  # 4 warps
        ((32, 64, 28, 28), {}, [(256, 2)]),  # 4 pieces: 2 blocks each, while there are processors
        ((32, 256, 28, 28), {"shared_per_block": 101376, "max_cluster": 1}, [(256, 1), (128, 1), (256, 1)]),
        ((32, 256, 28, 28), {"max_cluster": 1}, [(256, 1)]),
        ((8, 64, 112, 112), {}, [(256, 8)]),  # 13 pieces
        ((32, 64, 56, 56), {"max_cluster": 1, "shared_per_block": 49152}, [(256, 1), (128, 1), (256, 1)]),
        ((300, 64), {}, [(64, 8)]),  # two slabs: a stretch a block
        ((300, 8448), {}, [(256, 1)]),  # 264 slabs
        ((64, 16896), {}, [(128, 1)]),  # 132 wide slabs
        ((1568, 2048), {}, [(256, 4)]),  # 7 x 7 of 32 images: 64 slabs, 256 blocks
        ((1568, 2048), {"max_cluster": 1, "multiprocessors": 108}, [(256, 1)]),
        ((1568, 2048), {"max_cluster": 1, "shared_per_block": 101376}, [(256, 1), (128, 1), (256, 1)]),
        ((600, 64), {"max_cluster": 1}, [(256, 1), (128, 1), (256, 1)]),  # two blocks would work
        ((32, 64, 7, 7), {}, [(256, 1), (128, 1), (256, 1)]),
    ],
    ids=str,
)
def test_cuda_batch_norm_reads_x_once_where_it_fits(emulated, rng, shape, limits, expected):
    """(threads, cluster) of every kernel of a forward."""
    emulated.library.set_device(**limits)
    emulated.library.take_launches()
    forward(emulated, normal(rng, shape, np.float32))
    assert [(threads, cluster) for _, threads, cluster, _ in emulated.library.take_launches()] == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 64, 56, 56), [(64, 128)]),  # a piece of a channel
        ((2, 5, 16, 17), [(5, 64)]),
        ((32, 64, 7, 7), [(25, 256)]),  # 25 strips, 4 rows a warp
        ((6272, 64), [(196, 256)]),  # 4 rows a warp
    ],
    ids=str,
)
def test_cuda_batch_norm_without_sums_is_one_kernel(emulated, rng, shape, expected):
    """(blocks, threads) of an inference, and of a frozen backward of dy alone."""
    x = normal(rng, shape, np.float32)
    mean, var = running(rng, shape[1], np.float32)
    emulated.library.take_launches()
    inference(emulated, x, mean, var)
    launches = emulated.library.take_launches()
    assert [launch[:2] for launch in launches] == expected
    backward(emulated, x, x, mean, var, training=False, param_grads=False)
    assert [launch[:3] for launch in emulated.library.take_launches()] == [launch[:3] for launch in launches]
