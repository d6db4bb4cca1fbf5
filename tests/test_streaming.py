"""Large outputs are written past the caches: same bits as in place and at any address, nothing beside them touched."""

import itertools

import numpy as np
import pytest

import lanenorm

LARGE = 9 << 20  # bytes; streaming starts at 8 MB or less, but for inference on several threads


def large_shape(inner, itemsize):
    """(rows, *inner) with enough rows."""
    return (-(-LARGE // (int(np.prod(inner)) * itemsize)), *inner)


def placed(like, offset):
    """An empty array like `like`, `offset` bytes behind a cache line, in a buffer of marks; and the buffer."""
    buffer = np.full(like.nbytes + 192, 0xA5, np.uint8)
    start = -buffer.ctypes.data % 64 + offset
    array = buffer[start : start + like.nbytes].view(like.dtype)
    return np.lib.stride_tricks.as_strided(array, like.shape, like.strides), buffer, start


def check_places(operation, like, in_place):
    """`operation(out)` gives the same bits in fresh memory, at odd addresses and `in_place`."""
    expected = operation(None)
    for offset in (0, 4 * like.itemsize, 32 + like.itemsize):
        out, buffer, start = placed(like, offset)
        operation(out)
        assert np.array_equal(out, expected)
        assert np.all(buffer[:start] == 0xA5)
        assert np.all(buffer[start + like.nbytes :] == 0xA5)
    assert np.array_equal(in_place(), expected)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    if request.param not in lanenorm.available_isas():
        pytest.skip("not on this processor")
    before = lanenorm.use_isa(request.param)
    yield request.param
    lanenorm.use_isa(before)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("n", [5, 16, 64, 100, 250, 768, 1023, 2041, 4096, 5000])
def test_layer_norm_large_outputs_have_the_same_bits_everywhere(isa, n, dtype):
    if isa == "portable" and n not in (100, 768):
        pytest.skip("slow")
    rng = np.random.default_rng(n)
    shape = large_shape((n,), np.dtype(dtype).itemsize)
    x = (rng.standard_normal(shape) + 3).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    w, b = rng.standard_normal((2, n)).astype(dtype)
    y, mean, rstd = lanenorm.layer_norm_forward(x, w, b)

    def in_place():
        z = x.copy()
        lanenorm.layer_norm(z, w, b, out=z)
        return z

    check_places(lambda out: lanenorm.layer_norm(x, w, b, out=out), x, in_place)
    for i in (0, 1, shape[0] // 2, shape[0] - 1):  # one row of the batch alone
        assert np.array_equal(lanenorm.layer_norm(x[i : i + 1], w, b)[0], y[i])

    def backward_in_place():
        z = dy.copy()
        lanenorm.layer_norm_backward(z, x, mean, rstd, w, out=z)
        return z

    check_places(lambda out: lanenorm.layer_norm_backward(dy, x, mean, rstd, w, out=out).dx, x, backward_in_place)


@pytest.mark.parametrize(
    ("inner", "channels_last", "dtype"),
    [
        *itertools.product(
            [(3, 700, 701), (40, 28, 28), (64, 7, 7), (30, 7, 7), (90, 2, 3), (256,)], [False, True], ["float32"]
        ),
        ((256,), False, "float16"),  # more than a vector before the first cache line
        ((256,), False, "float64"),
        # several rows make whole cache lines: of float32 16 (some before the first one), 4, 2, and 16 of 64 KB
        *itertools.product([(3,), (100,), (1000,), (999,)], [False], ["float32", "float16", "float64"]),
    ],
    ids=str,
)
def test_batch_norm_large_outputs_have_the_same_bits_everywhere(isa, inner, channels_last, dtype):
    if isa == "portable" and inner not in ((30, 7, 7), (100,)):
        pytest.skip("slow")
    rng = np.random.default_rng(len(inner))
    x = (rng.standard_normal(large_shape(inner, np.dtype(dtype).itemsize)) + 3).astype(dtype)
    if channels_last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    dy = (x - x.dtype.type(3)) * x.dtype.type(0.5)
    channels = inner[0]
    w, b = rng.standard_normal((2, channels)).astype(dtype)
    if channels == 100 and dtype != "float16":
        w[7] = 1e-38 if dtype == "float32" else 1e-305  # too small to be folded into rstd
    _, mean, rstd = lanenorm.batch_norm_forward(x, w, b)
    var = 1 / rstd**2

    def copied(array, operation):
        z = array.copy(order="K")
        operation(z)
        return z

    check_places(
        lambda out: lanenorm.batch_norm_forward(x, w, b, out=out).y,
        x,
        lambda: copied(x, lambda z: lanenorm.batch_norm_forward(z, w, b, out=z)),
    )
    with lanenorm.num_threads(1):
        check_places(
            lambda out: lanenorm.batch_norm(x, mean, var, w, b, out=out),
            x,
            lambda: copied(x, lambda z: lanenorm.batch_norm(z, mean, var, w, b, out=z)),
        )
    for training in (True, False):

        def gradient(z, out, training=training):
            return lanenorm.batch_norm_backward(z, x, mean, rstd, w, training=training, out=out).dx

        check_places(
            lambda out: gradient(dy, out),
            x,
            lambda: copied(dy, lambda z: gradient(z, z)),
        )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("tiny_weight", [False, True])  # too small to be folded into rstd
@pytest.mark.parametrize(
    "shape",
    [
        *((4096, 100), (3001, 3), (999, 17), (700, 30), (257, 127)),
        *((3001, 16), (300, 40), (513, 96), (257, 128), (130, 144)),  # whole vectors, up to eight; of float64 40
    ],
    ids=str,
)
def test_narrow_rows_have_the_same_bits_where_they_are_not_adjacent(isa, shape, tiny_weight, dtype, threads):
    rng = np.random.default_rng(shape)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    w, b = rng.standard_normal((2, shape[1])).astype(dtype)
    if tiny_weight:
        w[1] = {"float32": 1e-38, "float16": 6e-8, "float64": 1e-305}[dtype]
    apart = np.full((shape[0], shape[1] + 5), np.nan, dtype)[:, : shape[1]]
    apart[...] = x

    def results(x):
        y, mean, rstd = lanenorm.batch_norm_forward(x, w, b)
        inferred = lanenorm.batch_norm(x, mean, 1 / rstd**2, w, b)
        return y, mean, rstd, inferred, *lanenorm.batch_norm_backward(dy, x, mean, rstd, w)

    with lanenorm.num_threads(threads):
        for adjacent, other in zip(results(x), results(apart), strict=True):
            assert np.array_equal(adjacent, other)
