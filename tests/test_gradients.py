"""Gradients against finite differences of the reference in extended precision, and against what must hold for any."""

import numpy as np
import pytest
import reference
from cases import DTYPES, by_dtype, every_isa, innermost, normal, parameters
from reference import check, wide

import lanenorm

STEP = wide(2) ** -18


def finite_difference(loss, value):
    """Central differences of a scalar function of a longdouble array.

    The truncation error is STEP^2 = 2^-36 times a third derivative of order 1 to 10, rounding 2^-64 / STEP: `close`
    allows 1e-8, a thousandth of what a wrong term would be.
    """
    gradient = np.zeros(value.shape, wide)
    for index in np.ndindex(value.shape):
        kept, sides = value[index], []
        for h in (STEP, -STEP):
            value[index] = kept + h
            sides.append(loss())
        value[index] = kept
        gradient[index] = (sides[0] - sides[1]) / (2 * STEP)
    return gradient


def normalize_wide(x, axes, eps):
    """y of the definition, in longdouble and without any of the reference's care: it is to be differentiated."""
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(np.square(x - mean).mean(axis=axes, keepdims=True) + wide(eps))


def close(result, numeric):
    """Within what finite differences are good for."""
    return np.all(np.abs(reference.widen(result) - numeric) <= 1e-8 * np.maximum(1, np.abs(numeric)))


# ---- By hand --------------------------------------------------------------------------------------------------------


def test_layer_norm_backward_by_hand(isa):
    """Normalized value 1, -1, 1, -1 and one unit of gradient: dx = (dy - 1/4 - xhat/4) / deviation."""
    x = np.array([[3, -1, 3, -1]], np.float32)
    dy = np.array([[1, 0, 0, 0]], np.float32)
    _, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    dx, dweight, dbias = lanenorm.layer_norm_backward(dy, x, mean, rstd)
    assert np.array_equal(dx, [[0.25, 0, -0.25, 0]])
    assert np.array_equal(dweight, [1, 0, 0, 0])
    assert np.array_equal(dbias, [1, 0, 0, 0])
    dx, dweight, dbias = lanenorm.layer_norm_backward(dy, x, mean, rstd, np.array([8, 1, 1, 1], np.float32))
    assert np.array_equal(dx, [[2, 0, -2, 0]])
    assert np.array_equal(dweight, [1, 0, 0, 0])


def test_batch_norm_backward_by_hand(isa):
    x = np.array([[3, 1], [-1, 1], [3, -1], [-1, -1]], np.float32)
    dy = np.array([[1, 0], [0, 0], [0, 0], [0, 4]], np.float32)
    _, mean, rstd = lanenorm.batch_norm_forward(x, eps=0.0)
    dx, dweight, dbias = lanenorm.batch_norm_backward(dy, x, mean, rstd)
    assert np.array_equal(dx, [[0.25, 0], [0, 0], [-0.25, -2], [0, 2]])
    assert np.array_equal(dweight, [1, -4])
    assert np.array_equal(dbias, [1, 4])
    dx, dweight, dbias = lanenorm.batch_norm_backward(dy, x, mean, rstd, training=False)
    assert np.array_equal(dx, [[0.5, 0], [0, 0], [0, 0], [0, 4]])
    assert np.array_equal(dweight, [1, -4])
    assert np.array_equal(dbias, [1, 4])


# ---- Finite differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 7), -1), ((7, 3), 0), ((2, 3, 4), (0, 2)), ((2, 18), (0, 1))], ids=str
)
def test_layer_norm_gradients_match_finite_differences(rng, shape, axis, eps):
    axes = reference.normalize_axes(axis, len(shape))
    x, dy = normal(rng, shape, np.float64, offset=2.0), normal(rng, shape, np.float64)
    weight, bias = parameters(rng, [shape[a] for a in axes], np.float64)
    values = [a.astype(wide) for a in (x, weight, bias)]

    def loss():
        gamma, beta = (reference.spread(p, axes, len(shape)) for p in values[1:])
        return np.sum(dy * (normalize_wide(values[0], axes, eps) * gamma + beta))

    numeric = [finite_difference(loss, value) for value in values]
    ours = reference.layer_norm_backward(dy, x, weight, axis=axis, eps=eps)
    assert all(np.all(np.abs(a - b) < 1e-8) for a, b in zip(ours, numeric, strict=False))  # the reference itself
    for _ in every_isa():
        _, mean, rstd = lanenorm.layer_norm_forward(x, weight, bias, axis=axis, eps=eps)
        result = lanenorm.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis)
        assert all(close(*pair) for pair in zip(result, numeric, strict=True))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((5, 3), 1), ((2, 3, 2, 2), 1), ((3, 2, 4), -1), ((3, 8), 0)], ids=str
)
def test_batch_norm_gradients_match_finite_differences(rng, shape, channel_axis, eps):
    channel, axes = (channel_axis % len(shape),), reference.other_axes(channel_axis, len(shape))
    x, dy = normal(rng, shape, np.float64, offset=2.0), normal(rng, shape, np.float64)
    weight, bias = parameters(rng, shape[channel_axis], np.float64)
    values = [a.astype(wide) for a in (x, weight, bias)]

    def loss():
        gamma, beta = (reference.spread(p, channel, len(shape)) for p in values[1:])
        return np.sum(dy * (normalize_wide(values[0], axes, eps) * gamma + beta))

    numeric = [finite_difference(loss, value) for value in values]
    ours = reference.batch_norm_backward(dy, x, weight, channel_axis=channel_axis, eps=eps)
    assert all(np.all(np.abs(a - b) < 1e-8) for a, b in zip(ours, numeric, strict=False))
    for _ in every_isa():
        _, mean, rstd = lanenorm.batch_norm_forward(x, weight, bias, channel_axis=channel_axis, eps=eps)
        result = lanenorm.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis=channel_axis)
        assert all(close(*pair) for pair in zip(result, numeric, strict=True))


def test_batch_norm_frozen_gradients_match_finite_differences(rng, isa):
    shape = (3, 4, 5)
    x, dy = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    weight, bias = parameters(rng, 4, np.float64)
    running_mean, running_var = normal(rng, 4, np.float64), rng.uniform(0.5, 2, 4)
    values = [a.astype(wide) for a in (x, weight, bias)]
    rstd = 1 / np.sqrt(running_var + 1e-5)

    def loss():
        m, r, gamma, beta = (reference.spread(p, (1,), 3) for p in (running_mean, rstd, *values[1:]))
        return np.sum(dy * ((values[0] - m) * r * gamma + beta))

    numeric = [finite_difference(loss, value) for value in values]
    result = lanenorm.batch_norm_backward(dy, x, running_mean, rstd, weight, training=False)
    assert all(close(*pair) for pair in zip(result, numeric, strict=True))


# ---- What holds for any gradient ------------------------------------------------------------------------------------


def test_gradient_of_constant_slices(rng, isa):
    """The normalized value is 0: dx is what is left of dy without its mean, divided by the root of eps."""
    x = np.ascontiguousarray(np.broadcast_to(normal(rng, (6, 1), np.float32, 100.0), (6, 40)))
    dy = normal(rng, x.shape, np.float32)
    _, mean, rstd = lanenorm.layer_norm_forward(x)
    dx, dweight, _ = lanenorm.layer_norm_backward(dy, x, mean, rstd)
    exact = reference.layer_norm_backward(dy, x)
    check("dx", dx, exact.dx, exact.dx_scale)
    assert np.all(dweight == 0)


@by_dtype
def test_gradient_of_zero_is_zero(rng, isa, dtype):
    x = normal(rng, (9, 33), dtype)
    zero = np.zeros_like(x)
    forward = lanenorm.layer_norm_forward(x)
    assert all(np.all(g == 0) for g in lanenorm.layer_norm_backward(zero, x, forward.mean, forward.rstd))
    forward = lanenorm.batch_norm_forward(x)
    assert all(np.all(g == 0) for g in lanenorm.batch_norm_backward(zero, x, forward.mean, forward.rstd))


@pytest.mark.parametrize("count", [5, 100, 4097])
def test_gradient_is_what_the_forward_saved(rng, isa, count):
    """rstd is taken as it is given, so that eps need not be given twice: halving it halves dweight."""
    x, dy = normal(rng, (4, count), np.float32), normal(rng, (4, count), np.float32)
    _, mean, rstd = lanenorm.layer_norm_forward(x)
    whole = lanenorm.layer_norm_backward(dy, x, mean, rstd)
    half = lanenorm.layer_norm_backward(dy, x, mean, rstd / np.float32(2))
    assert np.array_equal(half.dweight, whole.dweight / np.float32(2))
    assert np.array_equal(half.dbias, whole.dbias)


@pytest.mark.parametrize("shape", [(1000, 40), (70001, 7), (300, 3000)], ids=str)
@pytest.mark.parametrize("inner", [0, 1])
def test_parameter_gradients_over_many_rows(rng, shape, inner):
    """dweight and dbias are sums over the batch, whose rounding must not grow with its size."""
    for dtype in (d for d in DTYPES if d.itemsize != 4 or shape[1] < 100):
        x = innermost(normal(rng, shape, dtype, offset=3.0), inner)
        dy = innermost(normal(rng, shape, dtype, offset=1.0), inner)
        weight, _ = parameters(rng, shape[1], reference.statistics_dtype(dtype))
        exact = reference.layer_norm_backward(dy, x, weight)
        for _ in every_isa():
            _, mean, rstd = lanenorm.layer_norm_forward(x)
            result = lanenorm.layer_norm_backward(dy, x, mean, rstd, weight)
            for name in ("dx", "dweight", "dbias"):
                check(name, getattr(result, name), getattr(exact, name), getattr(exact, f"{name}_scale"))
