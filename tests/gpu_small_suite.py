"""A call of every kind on the GPU, small enough for compute-sanitizer: `python tests/gpu_small_suite.py`.

Every size class, dtype and work (rows, columns, planes), forward and backward, tails, odd addresses, strided inputs, in
a graph too. Values are compared with the reference, so that what is sanitized is also right. Memory comes from
cudaMalloc for every array: in CuPy's pool an overrun would end in the next array and be none.
"""

import sys

import cupy
import numpy as np
import reference
from cases import DTYPES, check_backward, check_forward, check_y, normal, parameters, reversed_all, sliced

import lanenorm

# rows x length, in float32: 8 to 32 lanes a row, a warp, a block, shared memory, clusters; each with a tail
SHAPES = [(5, 1), (9, 7), (33, 33), (17, 129), (6, 1025), (3, 4099), (3, 17001), (2, 60007), (2, 250007)]
# columns in a block, in a cluster
COLUMNS = [(9, 5, 3), (40, 3, 33), (130, 2, 7), (900, 2, 33)]
# batch norm: columns in a block, a cluster, wide slabs, beyond, folded; planes of a warp, a block, a cluster, beyond
CHANNELS = [
    (9, 5),
    (1100, 37),
    (33, 17001),
    (30001, 9),
    (9, 5, 7, 7),
    (3, 5, 17, 17),
    (9, 3, 33, 37),
    (9, 2, 99, 101),
    (16, 1, 333, 331),
]


def odd_address(array):
    """One element after an aligned address: no 16-byte access fits."""
    wider = np.zeros(array.size + 1, array.dtype)
    view = wider[1:].reshape(array.shape)
    view[...] = array
    return view


def on_device(array):
    """With the strides of the array, and as far from an address divisible by 16."""
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(0, r) for r in reach), sum(max(0, r) for r in reach) + array.itemsize
    odd = (array.ctypes.data + low) % 16
    memory = cupy.zeros(odd + high - low, np.uint8)
    copy = cupy.ndarray(array.shape, array.dtype, memory.data + (odd - low), array.strides)
    copy[...] = cupy.asarray(np.ascontiguousarray(array))
    return copy


def call(x, dy, weight, bias, axis):
    """Forward and backward on the device; both results on the host."""
    x, dy, weight, bias = map(on_device, (x, dy, weight, bias))
    forward = lanenorm.layer_norm_forward(x, weight, bias, axis=axis)
    backward = lanenorm.layer_norm_backward(dy, x, forward.mean, forward.rstd, weight, axis=axis)
    return (type(result)(*map(cupy.asnumpy, result)) for result in (forward, backward))


def check(rng, shape, dtype, axis=-1, layout=np.ascontiguousarray):
    x, dy = layout(normal(rng, shape, dtype, 3.0)), layout(normal(rng, shape, dtype))
    axes = reference.normalize_axes(axis, len(shape))
    weight, bias = parameters(rng, [shape[a] for a in axes], dtype)
    forward, backward = call(x, dy, weight, bias, axis)
    gamma, beta = (reference.spread(p, axes, x.ndim) for p in (weight, bias))
    where = f"{dtype} {shape} {axis} {layout.__name__}"
    check_forward(forward, reference.layer_norm(x, weight, bias, axis=axis), x, gamma, beta, where)
    check_backward(backward, reference.layer_norm_backward(dy, x, weight, axis=axis), x, weight, where)


def check_channels(rng, shape, dtype, layout=np.ascontiguousarray):
    """Training forward with running statistics, inference, backward, dx with frozen statistics."""
    x, dy = layout(normal(rng, shape, dtype, 3.0)), layout(normal(rng, shape, dtype))
    weight, bias = parameters(rng, shape[1], dtype)
    gamma, beta = (reference.spread(p, (1,), x.ndim) for p in (weight, bias))
    statistics = reference.statistics_dtype(dtype)
    mean, var = np.zeros(shape[1], statistics), np.ones(shape[1], statistics)
    device_x, device_dy, *affine, device_mean, device_var = map(on_device, (x, dy, weight, bias, mean, var))
    keywords = {"running_mean": device_mean, "running_var": device_var}
    forward = lanenorm.batch_norm_forward(device_x, *affine, **keywords)
    y = lanenorm.batch_norm(device_x, device_mean, device_var, *affine)
    given = device_dy, device_x, forward.mean, forward.rstd, affine[0]
    backward = lanenorm.batch_norm_backward(*given)
    frozen = lanenorm.batch_norm_backward(*given, training=False, param_grads=False).dx
    where = f"batch_norm {dtype} {shape} {layout.__name__}"
    forward, backward = (type(result)(*map(cupy.asnumpy, result)) for result in (forward, backward))
    check_forward(forward, reference.batch_norm_forward(x, weight, bias), x, gamma, beta, where)
    check_backward(backward, reference.batch_norm_backward(dy, x, weight), x, weight, where)
    exact = reference.batch_norm_frozen_backward(dy, x, forward.mean, forward.rstd, weight)
    reference.check("dx", frozen.get(), exact.dx, exact.dx_scale, context=f"frozen {where}")
    moved = device_mean.get(), device_var.get()
    check_y(y.get(), reference.batch_norm(x, *moved, weight, bias), gamma, beta, where)
    for found, exact in zip(moved, reference.running_statistics(x, mean, var, 0.1), strict=True):
        np.testing.assert_allclose(found, exact.astype(float), rtol=1e-5)


def check_graph(rng):
    x = cupy.asarray(normal(rng, (300, 768), np.float32))
    expected = lanenorm.layer_norm_backward(x, x, *lanenorm.layer_norm_forward(x)[1:])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        found = lanenorm.layer_norm_backward(x, x, *lanenorm.layer_norm_forward(x)[1:])
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
    assert all((a == b).all() for a, b in zip(found, expected, strict=True)), "graph"


def main(arguments):
    """All parts of the sweep, or those named: rows, columns, channels, layouts, graph."""
    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(1)
    parts = {
        "rows": lambda dtype: [check(rng, shape, dtype) for shape in SHAPES],
        "columns": lambda dtype: [check(rng, shape, dtype, axis) for shape in COLUMNS for axis in (0, 1, (0, 1))],
        "channels": lambda dtype: [check_channels(rng, shape, dtype) for shape in CHANNELS],
        "layouts": lambda dtype: [
            part(rng, shape, dtype, layout=layout)
            for part, shape in (
                (check, (6, 33)),
                (check, (4, 1025)),
                (check_channels, (9, 5)),
                (check_channels, CHANNELS[6]),
            )
            for layout in (sliced, reversed_all, odd_address)
        ],
        "graph": lambda dtype: check_graph(rng) if dtype == np.float32 else None,
    }
    for name in arguments or parts:
        for dtype in DTYPES:
            parts[name](dtype)
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
