"""More than 2^31 elements, where 32-bit counters and offsets end. Inputs are a few numbers, repeated by stride 0.

Results are large in earnest (4 GB of float16), so these tests skip where memory is short.
"""

import numpy as np
import pytest
import reference
from cases import normal

import lanenorm

NEEDED = 12 * 2**30


def free_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(free_memory() < NEEDED, reason=f"needs {NEEDED >> 30} GB of free memory"),
]


def assert_rows(array, row):
    """Every row of a large array is this one, bit by bit, without a temporary of its size."""
    wanted = row.view(np.uint16)
    for start in range(0, len(array), step := max(1, 2**24 // row.size)):
        assert np.array_equal(
            array[start : start + step].view(np.uint16),
            np.broadcast_to(wanted, (min(step, len(array) - start), *wanted.shape)),
        )


def test_large_layer_norm_of_many_rows(rng):
    """More than 2^31 elements in a batch of rows."""
    row = normal(rng, (1, 1000), np.float16, 3.0)
    x = np.empty((2**31 // 1000 + 70, 1000), np.float16)
    x[...] = row  # not broadcast: a stride of 0 would make the batch the innermost axis
    assert x.size > 2**31
    y, mean, rstd = lanenorm.layer_norm_forward(x)
    exact = reference.layer_norm(row)
    alone = lanenorm.layer_norm_forward(row)
    reference.check("normalized", alone.y, exact.normalized, exact.largest)
    assert_rows(y, alone.y[0])
    assert np.all(mean == alone.mean)
    assert np.all(rstd == alone.rstd)


def test_large_layer_norm_of_one_slice(rng):
    """One statistic of more than 2^31 values: forward, and the sums of a backward."""
    row = normal(rng, (1, 2**20 + 1), np.float16, 3.0)
    x = np.broadcast_to(row, (2**11 + 1, row.size))
    assert x.size > 2**31
    y, mean, rstd = lanenorm.layer_norm_forward(x, axis=(0, 1))
    exact = reference.layer_norm(row)
    reference.check("mean", mean, exact.mean, np.sqrt(exact.var))
    reference.check("rstd", rstd, exact.rstd)
    reference.check("normalized", y[:1], exact.normalized, exact.largest)
    assert_rows(y, y[0].copy())
    dy = np.broadcast_to(normal(rng, row.shape, np.float16), x.shape)
    dx = lanenorm.layer_norm_backward(dy, x, mean, rstd, axis=(0, 1), param_grads=False, out=y).dx
    gradient = reference.layer_norm_backward(dy[:1], row)
    reference.check("dx", dx[:1], gradient.dx, gradient.dx_scale)
    assert_rows(dx, dx[0].copy())


@pytest.mark.parametrize("order", ["channels-first", "channels-last"])
def test_large_batch_norm(rng, order):
    """More than 2^31 elements, fewer in each channel; the batch is one image over and over."""
    shape, axis = ((1, 3, 1000, 1000), 1) if order == "channels-first" else ((1, 1000, 1000, 3), 3)
    image = normal(rng, shape, np.float16, 3.0)
    x = np.broadcast_to(image, (720, *shape[1:]))
    assert x.size > 2**31
    running = np.zeros(3, np.float32), np.zeros(3, np.float32)
    y, mean, rstd = lanenorm.batch_norm_forward(
        x, running_mean=running[0], running_var=running[1], momentum=1.0, channel_axis=axis
    )
    exact = reference.batch_norm_forward(image, channel_axis=axis)
    count = x.size // 3
    reference.check("mean", mean, exact.mean, np.sqrt(exact.var))
    reference.check("rstd", rstd, exact.rstd)
    reference.check("running_var", running[1], exact.var * count / (count - 1), exact.var)
    reference.check("normalized", y[:1], exact.normalized, exact.largest)
    assert_rows(y.reshape(720, -1), y[0].ravel().copy())
