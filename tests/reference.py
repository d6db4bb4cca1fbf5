"""Layer and batch normalization in extended precision, from the papers. Shares nothing with the kernels.

Statistics are two-pass in numpy.longdouble (64-bit mantissa on x86-64, 113-bit on aarch64): mean, then deviations,
then the mean of the deviations as the correction that makes the first one's rounding harmless (Chan, Golub, LeVeque
1983, section 3). The gradients are the chain of Ioffe & Szegedy 2015, section 3, through variance and mean, and not
the closed form they can be simplified to. `exact_statistics` is exact, in rational numbers, for small cases.

Everything here takes any array and returns longdouble arrays. `tolerance` states what the library promises.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

wide = np.longdouble
silent = {"divide": "ignore", "invalid": "ignore", "over": "ignore", "under": "ignore"}


class Forward(NamedTuple):
    """What a forward gives, and what its errors are measured against."""

    y: Any  # shape of x
    normalized: Any  # shape of x: y before weight and bias
    mean: Any
    rstd: Any
    var: Any  # biased, shape of mean
    largest: Any  # max |normalized| of every slice, broadcasts against x


class Backward(NamedTuple):
    """What a backward gives, and the scales its errors are measured against (each broadcasts against its result)."""

    dx: Any
    dweight: Any
    dbias: Any
    dx_scale: Any  # rstd max(1, max |dy weight| of the slice)
    dweight_scale: Any  # sum |dy| max(1, |normalized|): the promise for normalized carried over to each term
    dbias_scale: Any


# ---- Rows: every norm is one statistic per row of a matrix ----------------------------------------------------------


def widen(array):
    """Any array in longdouble. Through float64, which holds every value of the other dtypes."""
    return array.astype(wide) if array.dtype in (np.float64, wide) else array.astype(np.float64).astype(wide)


def to_rows(array, axes):
    """(..., axes, ...) -> (rows, count), the axes in ascending order innermost, in longdouble."""
    kept = [axis for axis in range(array.ndim) if axis not in axes]
    moved = array.transpose([*kept, *axes])
    count = math.prod(array.shape[axis] for axis in axes)
    return np.ascontiguousarray(widen(moved)).reshape(math.prod(array.shape[axis] for axis in kept), count)


def from_rows(rows, shape, axes):
    """The inverse of `to_rows` for a result of `shape`; rows of one value give length 1 along `axes`."""
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    lengths = [shape[axis] for axis in kept] + [1 if rows.shape[1] == 1 else shape[axis] for axis in axes]
    return rows.reshape(lengths).transpose(np.argsort([*kept, *axes]))


def normalize_axes(axis, ndim):
    """Ascending tuple of axes from an int or a tuple, negative ones counted from the end."""
    return tuple(sorted(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))))


def other_axes(axis, ndim):
    """Every axis but `axis`."""
    return tuple(a for a in range(ndim) if a != axis % ndim)


def row_moments(rows):
    """Mean (rows, 1), biased variance (rows, 1) and deviations (rows, count); 0 for rows without elements."""
    if rows.shape[1] == 0:
        zero = np.zeros((rows.shape[0], 1), wide)
        return zero, zero, rows
    first = rows.mean(axis=1, keepdims=True)
    deviations = rows - first
    second = deviations.mean(axis=1, keepdims=True)
    deviations = deviations - second
    return first + second, np.square(deviations).mean(axis=1, keepdims=True), deviations


# ---- Forward --------------------------------------------------------------------------------------------------------


def _forward(x, weight, bias, axes, eps):
    """Statistics over `axes`; weight and bias broadcast against x. mean, rstd, var with length 1 along `axes`."""
    with np.errstate(**silent):
        mean, var, deviations = row_moments(to_rows(x, axes))
        rstd = 1 / np.sqrt(var + wide(eps))
        normalized = deviations * rstd
        largest = np.max(np.abs(normalized), axis=1, keepdims=True, initial=0)
        back = [from_rows(part, x.shape, axes) for part in (mean, rstd, var, largest)]
        normalized = from_rows(normalized, x.shape, axes).reshape(x.shape)
        y = normalized if weight is None else normalized * widen(weight)
        y = y if bias is None else y + widen(bias)
    return Forward(y, normalized, *back)


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5):
    """Ba, Kiros, Hinton 2016, equations 3 and 4."""
    axes = normalize_axes(axis, x.ndim)
    return _forward(x, spread(weight, axes, x.ndim), spread(bias, axes, x.ndim), axes, eps)


def batch_norm_forward(x, weight=None, bias=None, *, channel_axis=1, eps=1e-5):
    """Ioffe & Szegedy 2015, algorithm 1. mean, rstd, var have shape (C,)."""
    channel = (channel_axis % x.ndim,)
    result = _forward(
        x, spread(weight, channel, x.ndim), spread(bias, channel, x.ndim), other_axes(channel_axis, x.ndim), eps
    )
    return result._replace(mean=result.mean.reshape(-1), rstd=result.rstd.reshape(-1), var=result.var.reshape(-1))


def batch_norm(x, running_mean, running_var, weight=None, bias=None, *, channel_axis=1, eps=1e-5):
    """Ioffe & Szegedy 2015, algorithm 2, line 11, in the form that does not cancel."""
    channel = (channel_axis % x.ndim,)
    mean, var, gamma, beta = (
        None if a is None else widen(spread(a, channel, x.ndim)) for a in (running_mean, running_var, weight, bias)
    )
    with np.errstate(**silent):
        rstd = 1 / np.sqrt(var + wide(eps))
        normalized = (widen(x) - mean) * rstd
        largest = np.max(np.abs(normalized), axis=other_axes(channel_axis, x.ndim), keepdims=True, initial=0)
        y = normalized if gamma is None else normalized * gamma
        y = y if beta is None else y + beta
    return Forward(y, normalized, widen(running_mean), rstd.reshape(-1), widen(running_var), largest)


def running_statistics(x, running_mean, running_var, momentum, *, channel_axis=1):
    """The running mean and variance after a batch: momentum is the share of the batch, whose variance is unbiased."""
    batch = batch_norm_forward(x, channel_axis=channel_axis)
    count = x.size // x.shape[channel_axis]
    share = wide(momentum)
    unbiased = batch.var * (wide(count) / wide(count - 1))
    return (
        (1 - share) * widen(running_mean) + share * batch.mean,
        (1 - share) * widen(running_var) + share * unbiased,
    )


def spread(parameter, axes, ndim):
    """A parameter over `axes` with axes of length 1 elsewhere, so that it broadcasts against x."""
    if parameter is None:
        return None
    lengths = iter(parameter.shape)
    return parameter.reshape([next(lengths) if axis in axes else 1 for axis in range(ndim)])


# ---- Backward -------------------------------------------------------------------------------------------------------


def _input_gradient(g, deviations, var, eps):
    """Ioffe & Szegedy 2015, section 3: the gradient through the deviations, the variance and the mean, in turn.

    g: gradient with respect to the normalized value; rows, as everything here.
    """
    count = wide(max(g.shape[1], 1))
    deviation = np.sqrt(var + wide(eps))
    dvar = (g * deviations).sum(axis=1, keepdims=True) * (-1 / (2 * deviation**3))
    dmean = -(g.sum(axis=1, keepdims=True) / deviation) - 2 * dvar * deviations.sum(axis=1, keepdims=True) / count
    return g / deviation + dvar * 2 * deviations / count + dmean / count


def _scaled(dx, dy, g, normalized, rstd, axes, summed):
    """Results with their scales, from arrays that broadcast against x; dweight and dbias are sums over `summed`."""
    dx_scale = rstd * np.maximum(1, np.max(np.abs(g), axis=axes, keepdims=True, initial=0))
    terms, size = dy * normalized, np.abs(dy)
    # A term is as good as its normalized value, which is promised to 4u max(1, |normalized|): half of 8u. That is
    # more than 8u of the term where there are few terms and they happen to be near zero.
    inherited = (size * np.maximum(1, np.abs(normalized)) / 2).sum(axis=summed)
    dweight_scale = np.maximum(np.abs(terms).sum(axis=summed), inherited)
    return Backward(dx, terms.sum(axis=summed), dy.sum(axis=summed), dx_scale, dweight_scale, size.sum(axis=summed))


def _backward(dy, x, weight, axes, summed, eps):
    """Gradients with statistics over `axes`; weight broadcasts against x."""
    with np.errstate(**silent):
        dy = widen(dy)
        g = dy if weight is None else dy * widen(weight)
        _, var, deviations = row_moments(to_rows(x, axes))
        dx = _input_gradient(to_rows(g, axes), deviations, var, eps)
        rstd = 1 / np.sqrt(var + wide(eps))
        dx, normalized = (from_rows(rows, x.shape, axes).reshape(x.shape) for rows in (dx, deviations * rstd))
        return _scaled(dx, dy, g, normalized, from_rows(rstd, x.shape, axes), axes, summed)


def layer_norm_backward(dy, x, weight=None, *, axis=-1, eps=1e-5):
    """Gradients of `layer_norm`; dweight and dbias have the shape of the axes in ascending order."""
    axes = normalize_axes(axis, x.ndim)
    return _backward(dy, x, spread(weight, axes, x.ndim), axes, tuple(a for a in range(x.ndim) if a not in axes), eps)


def batch_norm_backward(dy, x, weight=None, *, channel_axis=1, eps=1e-5):
    """Gradients of `batch_norm_forward`."""
    axes = other_axes(channel_axis, x.ndim)
    return _backward(dy, x, spread(weight, (channel_axis % x.ndim,), x.ndim), axes, axes, eps)


def batch_norm_frozen_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1):
    """Gradients where the statistics are constants: those of y = (x - mean) rstd weight + bias."""
    axes, channel = other_axes(channel_axis, x.ndim), (channel_axis % x.ndim,)
    mean, rstd, gamma = (None if a is None else widen(spread(a, channel, x.ndim)) for a in (mean, rstd, weight))
    with np.errstate(**silent):
        dy = widen(dy)
        g = dy if gamma is None else dy * gamma
        return _scaled(g * rstd, dy, g, (widen(x) - mean) * rstd, rstd, axes, axes)


# ---- Exact rationals ------------------------------------------------------------------------------------------------


def exact_statistics(values):
    """Mean and biased variance of a sequence of finite floats, exactly."""
    fractions = [Fraction(float(value)) for value in values]
    mean = sum(fractions) / len(fractions)
    return mean, sum((value - mean) ** 2 for value in fractions) / len(fractions)


def fraction_to_wide(fraction):
    """The nearest longdouble or its neighbour: two floats carry the first 106 bits."""
    high = float(fraction)
    return wide(high) + wide(float(fraction - Fraction(high)))


# ---- The promise ----------------------------------------------------------------------------------------------------


def unit_roundoff(dtype):
    """Half the distance from 1 to the next number: 2^-24 for float32."""
    mantissa_bits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
    return wide(2) ** -(mantissa_bits[np.dtype(dtype).name] + 1)


def rounding(dtype, magnitude):
    """Largest error of one rounding of a number of this magnitude, subnormal results included."""
    smallest = {"float16": -24, "bfloat16": -133, "float32": -149, "float64": -1074}[np.dtype(dtype).name]
    return np.maximum(unit_roundoff(dtype) * magnitude, wide(2) ** (smallest - 1))


def statistics_dtype(dtype):
    """Of mean, rstd and running statistics."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def tolerance(quantity, dtype, exact, scale=1.0, *, weight=1.0, normalized=None):
    """Largest |result - exact| that the library promises, element by element.

    u is that of the arithmetic: 2^-24, for float64 2^-53. A 16-bit result is the float32 one rounded once more.
    No bound depends on the number of elements.

    Parameters
    ----------
    quantity : str
        "normalized" : 4u max(1, |exact|) where max |exact| of the slice is at most 8, else 8u; float64 8u.
        "y" : the same times |weight|, and one rounding of the affine step.
        "mean" : what the bound of "normalized" needs, 4u deviations, and one rounding.
        "rstd" : what the bound of "normalized" needs at its largest value, 4u relative.
        "dx", "dweight", "dbias" : 8u of their scale.
        "running_mean", "running_var" : the error of the statistic of the batch (a variance has twice the relative error
        of rstd) times momentum, and one rounding; float64 those of the update.
    dtype : dtype
        In which the result is stored.
    exact : array
        Exact values.
    scale : array
        "normalized", "y": max |normalized| of the slice. "mean": its standard deviation. "dx", "dweight", "dbias":
        those of `Backward`. "running_mean": momentum times the deviation; "running_var": momentum times the variance.
    weight, normalized : array
        "y" only: the gain of the affine step, broadcasting against y, and the exact value before it.
    """
    dtype = np.dtype(dtype)
    arithmetic = statistics_dtype(dtype)
    u = unit_roundoff(arithmetic)
    doubled = 2 if arithmetic == np.float64 else 1
    size = np.abs(exact)
    if quantity == "normalized":
        allowed = np.where(np.asarray(scale) <= 8, 4 * doubled, 8) * u * np.maximum(1, size)
    elif quantity == "y":
        factor = np.where(np.asarray(scale) <= 8, 4 * doubled, 8) * u
        allowed = np.abs(weight) * factor * np.maximum(1, np.abs(normalized))
        allowed = allowed + rounding(arithmetic, size + allowed)
    elif quantity == "mean":
        allowed = 4 * doubled * u * np.asarray(scale) + rounding(arithmetic, size)
    elif quantity == "rstd":
        allowed = 4 * doubled * u * size
    elif quantity in ("dx", "dweight", "dbias"):
        allowed = 8 * u * scale
    elif quantity in ("running_mean", "running_var"):
        error_of_batch = {"running_mean": 4, "running_var": 8}[quantity] * doubled * u * scale
        roundings = 1 if arithmetic == np.float32 else 4  # the update is in double: two products and a sum
        allowed = error_of_batch + roundings * rounding(arithmetic, size)
    else:
        raise ValueError(f"tolerance: quantity is {quantity!r}")
    return allowed if dtype == arithmetic else allowed + rounding(dtype, size + allowed)


def check(quantity, result, exact, scale=1.0, *, weight=1.0, normalized=None, context=""):
    """Assert that a result keeps the promise; NaN and infinities must be where the exact ones are.

    Returns the worst error as a fraction of what is allowed.
    """
    assert result.shape == np.shape(exact), f"{context}: {quantity} has shape {result.shape}, not {np.shape(exact)}"
    if result.size == 0:
        return 0.0
    with np.errstate(**silent):
        allowed = tolerance(quantity, result.dtype, exact, scale, weight=weight, normalized=normalized)
        allowed = np.broadcast_to(allowed, result.shape)
        got = widen(result)
        error = np.abs(got - exact)
        finite = np.isfinite(exact)
        ratio = np.where(finite, error / allowed, np.where(np.isnan(exact), ~np.isnan(got), got != exact))
        ratio = np.where(finite & (error == 0), 0, ratio)  # 0/0 where nothing is allowed and nothing is wrong
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    if not ratio[worst] <= 1:
        u = unit_roundoff(statistics_dtype(result.dtype))
        raise AssertionError(
            f"{context}: {quantity}{[int(i) for i in worst]} is {got[worst]!r}, exactly {exact[worst]!r}: error "
            f"{float(error[worst] / u):.3g}u, allowed {float(allowed[worst] / u):.3g}u; "
            f"{int(np.sum(~(ratio <= 1)))} of {ratio.size} elements are wrong"
        )
    return float(ratio[worst])
