"""Inputs of the tests: values, dtypes, shapes, memory layouts, and the comparison of whole results with the reference.

Makers return float64 matrices whose rows are slices; `matrix` stacks the rows of many makers, so that one call of the
library tests them all at one length.
"""

import numpy as np
import pytest
import reference
from reference import check

import lanenorm

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

# ---- Dtypes ---------------------------------------------------------------------------------------------------------

FLOAT_DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
DTYPES = [np.dtype(np.float16), *FLOAT_DTYPES]
if ml_dtypes is not None:
    DTYPES.insert(1, np.dtype(ml_dtypes.bfloat16))

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)


def parameter_dtypes(dtype):
    """What weight and bias may be with this x."""
    return [dtype] if dtype.itemsize > 2 else [dtype, np.dtype(np.float32)]


def spacing_dtype(dtype):
    """Twice u: the spacing of the numbers next to 1."""
    return 2 * float(reference.unit_roundoff(dtype))


# ---- Values ---------------------------------------------------------------------------------------------------------

EPS = 1e-5
OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 1e6)


def around(offset):
    """Normal around an offset, with deviation 1, or what the dtype resolves there."""

    def maker(rng, rows, count, dtype):
        return offset + max(1.0, 4 * spacing_dtype(dtype) * offset) * rng.standard_normal((rows, count))

    maker.__name__ = f"around_{offset:g}"
    return maker


def outlier(place, size, offset=0.0):
    """One element far from the others: a pivot taken from it is far from all the others."""

    def maker(rng, rows, count, dtype):
        values = around(offset)(rng, rows, count, dtype)
        values[:, place] += size
        return values

    maker.__name__ = f"outlier_{size:g}_at_{place}_around_{offset:g}"
    return maker


def log_normal(rng, rows, count, dtype):
    return rng.lognormal(0, 1.5, (rows, count))


def cauchy(rng, rows, count, dtype):
    return np.clip(rng.standard_cauchy((rows, count)), -2e4, 2e4)


def integers(rng, rows, count, dtype):
    return rng.integers(-8, 9, (rows, count)).astype(float)


def constant(rng, rows, count, dtype):
    return np.repeat(rng.standard_normal((rows, 1)) * 100, count, axis=1)


def alternating(rng, rows, count, dtype):
    return np.tile(1.0 - 2.0 * (np.arange(count) % 2), (rows, 1))


def ramp(rng, rows, count, dtype):
    """The mean of every part differs from that of the whole."""
    return np.tile(np.linspace(-1000, 1000, count), (rows, 1)) + rng.standard_normal((rows, count))


def step(rng, rows, count, dtype):
    """Two levels, far apart against the deviation within each."""
    return np.where(np.arange(count) < count // 2, 0.0, 1e4) + rng.standard_normal((rows, count))


def scaled(scale, offset=0.0):
    """Far from 1: squares leave the range of float32. Meant for eps = 0."""

    def maker(rng, rows, count, dtype):
        return scale * around(offset)(rng, rows, count, dtype)

    maker.__name__ = f"scale_{scale:g}_around_{offset:g}"
    return maker


def ordinary_makers(dtype):
    """Those that go with eps = 1e-5; float16 ends at 65504."""
    small = dtype.name == "float16"
    far = 1e4 if small else 1e6
    makers = [around(offset) for offset in OFFSETS if offset <= far]
    makers += [log_normal, cauchy, integers, constant, alternating, ramp, step]
    makers += [outlier(place, far, offset) for place in (0, -1) for offset in (0.0, far)]
    return makers


def scaled_makers(dtype):
    """Those that go with eps = 0."""
    scales = (2.0**-10, 2.0**10) if dtype.name == "float16" else (1e-20, 1e-6, 1e6, 1e30)
    return [scaled(scale, offset) for scale in scales for offset in (0.0, 10.0)]


def matrix(rng, makers, count, dtype, rows=2):
    """Rows of all makers, (rows * makers, count), in `dtype`."""
    return np.concatenate([maker(rng, rows, count, dtype) for maker in makers]).astype(dtype)


def sweep_groups(dtype, count):
    """Makers and the eps they go with. A slice of one value is constant, which needs an eps."""
    yield ordinary_makers(dtype), EPS
    if count > 1:
        yield scaled_makers(dtype), 0.0


def hard_makers(dtype):
    """Those of long slices, where every one costs: (makers, eps)."""
    far = 1e4 if dtype.name == "float16" else 1e6
    small, large = (2.0**-10, 2.0**10) if dtype.name == "float16" else (1e-20, 1e30)
    yield [around(far), outlier(0, far), outlier(-1, far, far), log_normal, cauchy, ramp], EPS
    yield [scaled(small), scaled(large, 10.0)], 0.0


def parameters(rng, shape, dtype):
    """A weight and a bias of every sign and size."""
    return rng.uniform(-2, 2, shape).astype(dtype), rng.uniform(-2, 2, shape).astype(dtype)


def normal(rng, shape, dtype, offset=0.0):
    """Normal values of a shape."""
    return (offset + rng.standard_normal(shape)).astype(dtype)


# ---- Lengths --------------------------------------------------------------------------------------------------------

SMALL_COUNTS = tuple(range(1, 34))
BORDER_COUNTS = (63, 64, 65, 127, 128, 129, 255, 257, 768, 1023, 1024, 1025, 2049, 4097)
LONG_COUNTS = (65536, 10**6 + 3)

# ---- Layouts --------------------------------------------------------------------------------------------------------


def sliced(array):
    """Every other element along every axis of something larger, whose other elements are NaN."""
    whole = np.full([2 * length + 1 for length in array.shape], np.nan, array.dtype)
    view = whole[tuple(slice(1, 2 * length + 1, 2) for length in array.shape)]
    view[...] = array
    return view


def padded(array):
    """The last axis is contiguous, the others are not: rows of a wider matrix."""
    whole = np.full([*array.shape[:-1], array.shape[-1] + 3], np.nan, array.dtype)
    view = whole[..., 1 : 1 + array.shape[-1]]
    view[...] = array
    return view


def reversed_all(array):
    """Every stride is negative."""
    backwards = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[backwards])[backwards]


def reversed_last(array):
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def at_byte(array, offset):
    """A C-contiguous copy that starts `offset` bytes after an address divisible by 64."""
    memory = np.zeros(array.nbytes + offset + 64, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def unaligned(array):
    """Not even aligned to an element."""
    return at_byte(array, 1)


def innermost(array, axis):
    """`axis` lies innermost in memory, the others in order."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, axis, -1)), -1, axis)


def permuted(array):
    """The axes lie in memory in rotated order."""
    order = (*range(1, array.ndim), 0)
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "sliced": sliced,
    "padded": padded,
    "reversed": reversed_all,
    "reversed_last": reversed_last,
    "unaligned": unaligned,
    "permuted": permuted,
}
# Layouts with the memory order of the axes unchanged: they promise the bits of the packed copy.
SAME_ORDER = ("sliced", "padded", "reversed", "reversed_last", "unaligned")


def packed(array):
    """Aligned copy without gaps, the axes in the same memory order."""
    copy = np.empty_like(array)
    copy[...] = array
    return copy


# ---- Whole results against the reference ----------------------------------------------------------------------------


def check_layout(result, x):
    """A new array has the dtype and the memory layout of numpy.empty_like(x)."""
    like = np.empty_like(x)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    if result.size:
        lengths = np.array(result.shape)
        assert [s for s, n in zip(result.strides, lengths, strict=True) if n > 1] == [
            s for s, n in zip(like.strides, lengths, strict=True) if n > 1
        ]


def check_forward(result, exact, x, weight=None, bias=None, context=""):
    """y, mean and rstd; weight and bias broadcast against x (see `reference.spread`)."""
    y, mean, rstd = result
    check_layout(y, x)
    assert mean.dtype == rstd.dtype == reference.statistics_dtype(x.dtype), context
    check_y(y, exact, weight, bias, context)
    with np.errstate(**reference.silent):
        deviation = np.sqrt(exact.var)
    check("mean", mean, exact.mean, deviation, context=context)
    check("rstd", rstd, exact.rstd, context=context)


def check_y(y, exact, weight=None, bias=None, context=""):
    """Y alone."""
    if weight is None and bias is None:
        check("normalized", y, exact.normalized, exact.largest, context=context)
    else:
        gain = 1.0 if weight is None else reference.widen(weight)
        check("y", y, exact.y, exact.largest, weight=gain, normalized=exact.normalized, context=context)


def check_backward(result, exact, x, weight=None, context=""):
    """Dx, dweight and dbias."""
    check_layout(result.dx, x)
    check("dx", result.dx, exact.dx, exact.dx_scale, context=context)
    dtype = reference.statistics_dtype(x.dtype) if weight is None else weight.dtype
    for name in ("dweight", "dbias"):
        gradient = getattr(result, name)
        assert gradient.dtype == dtype, f"{context}: {name}"
        check(name, gradient, getattr(exact, name), getattr(exact, f"{name}_scale"), context=context)


def every_isa():
    """Make each instruction set that can run here the one in use, best first. The fixtures put the old one back."""
    for isa in lanenorm.available_isas():
        lanenorm.use_isa(isa)
        yield isa


def check_layer_norm(x, dy=None, weight=None, bias=None, *, axis=-1, eps=EPS, context=""):
    """Forward and (with dy) backward of one input on every instruction set."""
    axes = reference.normalize_axes(axis, x.ndim)
    gamma, beta = (reference.spread(p, axes, x.ndim) for p in (weight, bias))
    forward = reference.layer_norm(x, weight, bias, axis=axis, eps=eps)
    backward = None if dy is None else reference.layer_norm_backward(dy, x, weight, axis=axis, eps=eps)
    for isa in every_isa():
        where = f"layer_norm {x.dtype} {x.shape} axis={axis} {context} {isa}"
        result = lanenorm.layer_norm_forward(x, weight, bias, axis=axis, eps=eps)
        check_forward(result, forward, x, gamma, beta, where)
        if dy is not None:
            gradients = lanenorm.layer_norm_backward(dy, x, result.mean, result.rstd, weight, axis=axis)
            check_backward(gradients, backward, x, weight, where)


def check_batch_norm(x, dy=None, weight=None, bias=None, *, channel_axis=1, eps=EPS, context=""):
    """Training forward and (with dy) backward of one input on every instruction set."""
    gamma, beta = (reference.spread(p, (channel_axis % x.ndim,), x.ndim) for p in (weight, bias))
    forward = reference.batch_norm_forward(x, weight, bias, channel_axis=channel_axis, eps=eps)
    backward = None
    if dy is not None:
        backward = reference.batch_norm_backward(dy, x, weight, channel_axis=channel_axis, eps=eps)
    for isa in every_isa():
        where = f"batch_norm {x.dtype} {x.shape} channel_axis={channel_axis} {context} {isa}"
        result = lanenorm.batch_norm_forward(x, weight, bias, channel_axis=channel_axis, eps=eps)
        check_forward(result, forward, x, gamma, beta, where)
        if dy is not None:
            gradients = lanenorm.batch_norm_backward(dy, x, result.mean, result.rstd, weight, channel_axis=channel_axis)
            check_backward(gradients, backward, x, weight, where)


def columns_of(rows, plane):
    """(C, n) rows as a channels-first array (n / plane, C, plane): every row is a channel."""
    channels, count = rows.shape
    return np.ascontiguousarray(rows.reshape(channels, count // plane, plane).transpose(1, 0, 2))
