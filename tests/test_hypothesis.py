"""Arrays that nobody would think of: random shapes, strides, axes, dtypes and offsets against the reference.

The examples are derived from the test (`derandomize`): the same ones at every run, so that a failure can be repeated.
"""

import numpy as np
import pytest
import reference
from cases import DTYPES, check_batch_norm, check_layer_norm, normal, parameter_dtypes, parameters

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

profile = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@st.composite
def shapes(draw, max_elements=20000):
    """One to five axes, some of length 1 or 0, some across the borders of vectors and blocks."""
    lengths = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 127, 129, 257, 1025]))
    shape = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(lengths)
        if np.prod([max(n, 1) for n in shape], dtype=int) * length <= max_elements:
            shape.append(length)
    return tuple(shape or [3])


@st.composite
def arrange(draw, values):
    """The same values in a memory of some other order, step, direction and alignment."""
    ndim = values.ndim
    order = draw(st.permutations(range(ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in range(ndim)]
    extra = [draw(st.sampled_from([0, 0, 1, 5])) for _ in range(ndim)]
    lengths = [max(n, 1) * abs(s) + e for n, s, e in zip(values.shape, steps, extra, strict=True)]
    memory = np.zeros(int(np.prod(lengths)) * values.itemsize + 64, np.uint8)
    start = draw(st.integers(0, 63))
    flat = memory[start : start + int(np.prod(lengths)) * values.itemsize].view(values.dtype)
    flat[...] = np.nan
    whole = flat.reshape([lengths[a] for a in order]).transpose(np.argsort(order))
    view = whole[tuple(slice(None, n * abs(s), abs(s)) for n, s in zip(values.shape, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    view[...] = values
    assert view.shape == values.shape
    return view


@st.composite
def problems(draw):
    """x, dy, an offset and the generator of everything else."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes())
    offsets = [0.0, 1.0, 30.0] if dtype.itemsize == 2 else [0.0, 1.0, 1e3, 1e6, -1e6]
    x = draw(arrange(normal(rng, shape, dtype, draw(st.sampled_from(offsets)))))
    dy = draw(arrange(normal(rng, shape, dtype)))
    return rng, x, dy


def draw_parameters(data, rng, shape, dtype):
    weight, bias = parameters(rng, shape, data.draw(st.sampled_from(parameter_dtypes(dtype))))
    weight = data.draw(arrange(weight)) if data.draw(st.booleans()) else None
    bias = data.draw(arrange(bias)) if data.draw(st.booleans()) else None
    return weight, bias


@profile
@given(st.data())
def test_layer_norm_of_anything(data):
    rng, x, dy = data.draw(problems())
    axes = data.draw(st.lists(st.integers(-x.ndim, x.ndim - 1), min_size=1, unique_by=lambda a: a % x.ndim))
    axis = axes[0] if len(axes) == 1 and data.draw(st.booleans()) else tuple(axes)
    shape = [x.shape[a] for a in reference.normalize_axes(tuple(axes), x.ndim)]
    check_layer_norm(x, dy, *draw_parameters(data, rng, shape, x.dtype), axis=axis)


@profile
@given(st.data())
def test_batch_norm_of_anything(data):
    rng, x, dy = data.draw(problems())
    channel_axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    channels = x.shape[channel_axis]
    hypothesis.assume(channels == 0 or x.size // channels != 1)
    check_batch_norm(x, dy, *draw_parameters(data, rng, channels, x.dtype), channel_axis=channel_axis)
