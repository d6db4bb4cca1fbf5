"""Every row of the table "Bad input": the exception, what its message says, and that nothing was touched.

A message reads "operation: argument, what it was, expected what would do". A refused call leaves every byte of every
array alone: `out`, the running statistics, the inputs.
"""

import re
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import DTYPES, at_byte

import lanenorm
from lanenorm import _arrays


class Call(NamedTuple):
    """A lawful call: the arrays by argument name, and the other keywords."""

    function: Callable[..., Any]
    arrays: dict[str, Any]
    keywords: dict[str, Any]

    @property
    def name(self):
        return self.function.__name__

    def __call__(self, **changes):
        return self.function(**(self.arrays | self.keywords | changes))


def lawful(name, dtype=np.float32, shape=(6, 8)):
    """A call with every argument given; the slices of layer normalization lie along the last axis, channels along 1."""
    dtype = np.dtype(dtype)
    statistics = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    rng = np.random.default_rng(1)

    def array(*lengths, dtype=dtype):
        return rng.uniform(0.5, 2, lengths).astype(dtype)

    x, out = array(*shape), array(*shape)
    layer = name.startswith("layer_norm")
    size = shape[-1] if layer else shape[1]
    slices = (*shape[:-1], 1) if layer else (size,)
    arrays = {"x": x, "weight": array(size), "out": out}
    keywords = {"axis": -1} if layer else {"channel_axis": 1}
    if name.endswith("backward"):
        arrays |= {"dy": array(*shape)}
        arrays |= {key: array(*slices, dtype=statistics) for key in ("mean", "rstd")}
        keywords |= {"param_grads": True}
    else:
        arrays |= {"bias": array(size)}
        keywords |= {"eps": 1e-5}
    if name in ("batch_norm", "batch_norm_forward"):
        arrays |= {key: array(size, dtype=statistics) for key in ("running_mean", "running_var")}
    if name == "batch_norm_forward":
        keywords |= {"momentum": 0.1}
    if name == "batch_norm_backward":
        keywords |= {"training": True}
    return Call(getattr(lanenorm, name), arrays, keywords)


OPERATIONS = [
    "layer_norm",
    "layer_norm_forward",
    "layer_norm_backward",
    "batch_norm",
    "batch_norm_forward",
    "batch_norm_backward",
]
operations = pytest.mark.parametrize("name", OPERATIONS)
every_argument = pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in OPERATIONS for argument in lawful(name).arrays]
)


def is_output(name, argument):
    """Whether the operation writes to it."""
    return argument == "out" or (name == "batch_norm_forward" and argument.startswith("running"))


every_input = pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in OPERATIONS for argument in lawful(name).arrays if not is_output(name, argument)],
)


def arguments(*wanted):
    """Parametrize over those of some arguments that an operation has."""
    pairs = [(name, argument) for name in OPERATIONS for argument in lawful(name).arrays if argument in wanted]
    return pytest.mark.parametrize(("name", "argument"), pairs)


def refuse(call, exception, argument, *parts, **changes):
    """Assert that a call with these changes is refused, with all `parts` in its message, and has touched nothing."""
    arrays = [a for a in (call.arrays | changes).values() if isinstance(a, np.ndarray)]
    owners = [a if a.base is None or not isinstance(a.base, np.ndarray) else a.base for a in arrays]
    before = [a.tobytes() for a in owners]
    with pytest.raises(exception) as caught:
        call(**changes)
    assert type(caught.value) is exception
    assert [a.tobytes() for a in owners] == before, "a refused call has changed an array"
    text = str(caught.value)
    assert text.startswith(f"{call.name}: "), text
    assert re.search(rf"\b{argument}\b", text), f"{argument!r} is not in {text!r}"
    for part in ("expected", *parts):
        assert part in text, f"{part!r} is not in {text!r}"
    return text


# ---- The message of the design, to the letter -----------------------------------------------------------------------


def test_bad_shape_message_by_hand():
    text = "layer_norm: weight has shape (5,), expected (8,), axis -1 of x (2, 8)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lanenorm.layer_norm(np.ones((2, 8), np.float32), np.ones(5, np.float32))


@operations
def test_lawful_call_is_accepted(name):
    """What the other tests change one argument of."""
    for dtype in DTYPES:
        call = lawful(name, dtype)
        result = call()
        assert (result if isinstance(result, np.ndarray) else result[0]) is call.arrays["out"]


# ---- Kind of array --------------------------------------------------------------------------------------------------


class Subclass(np.ndarray):
    """An ndarray subclass of somebody's own."""


NO_ARRAYS = {
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(a.ravel().tolist()),
    "float": lambda a: 1.0,
    "int": lambda a: 1,
    "str": lambda a: "x",
    "numpy.float32": lambda a: np.float32(1),
    "numpy.ma.MaskedArray": lambda a: np.ma.masked_array(a),
    "numpy.matrix": lambda a: a.reshape(1, -1).view(np.matrix),
    "Subclass": lambda a: a.view(Subclass),
    "memoryview": lambda a: memoryview(a),
}


@every_argument
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_bad_kind_of_array(name, argument, kind):
    call = lawful(name)
    value = NO_ARRAYS[kind](call.arrays[argument])
    refuse(call, TypeError, argument, kind.rpartition(".")[2], "numpy.ndarray", **{argument: value})


@every_input
def test_bad_none(name, argument):
    if argument in ("weight", "bias"):
        lawful(name)(**{argument: None})  # stands for ones or zeros
    else:
        refuse(lawful(name), TypeError, argument, "NoneType", "numpy.ndarray", **{argument: None})


@every_argument
def test_memmap_is_fine(name, argument, tmp_path):
    call = lawful(name)
    expected = lawful(name)()
    array = call.arrays[argument]
    memmap = np.memmap(tmp_path / "array", dtype=array.dtype, mode="w+", shape=array.shape)
    memmap[...] = array
    got = call(**{argument: memmap})
    expected, got = ((r,) if isinstance(r, np.ndarray) else r for r in (expected, got))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@every_argument
def test_bad_mix_of_libraries(monkeypatch, name, argument):
    """A stand-in for CuPy: only the type of the array counts. Both types are named."""
    fake = types.ModuleType("cupy")
    fake.ndarray = type("ndarray", (), {"__module__": "cupy"})
    monkeypatch.setitem(sys.modules, "cupy", fake)
    call = lawful(name)
    text = refuse(call, TypeError, argument, "cupy.ndarray", "numpy.ndarray", **{argument: fake.ndarray()})
    assert any(re.search(rf"\b{other} has type numpy\.ndarray", text) for other in call.arrays), text


@operations
def test_bad_cupy_without_cuda(monkeypatch, name):
    """Everything is CuPy's, and there is no CUDA part: what is missing, and what to install."""
    monkeypatch.setitem(sys.modules, "lanenorm._cuda", None)
    monkeypatch.setattr(_arrays, "load_cuda", _arrays.load_cuda.__wrapped__)  # as if nobody had asked before
    fake = types.ModuleType("cupy")
    fake.ndarray = type("ndarray", (), {"__module__": "cupy"})
    monkeypatch.setitem(sys.modules, "cupy", fake)
    call = lawful(name)
    with pytest.raises(ImportError, match=rf"^{name}: .*no CUDA part.*pip install"):
        call(**{argument: fake.ndarray() for argument in call.arrays})


# ---- Dtypes ---------------------------------------------------------------------------------------------------------

BAD_DTYPES = ["int32", "int64", "uint8", "bool", "complex64", "complex128", "object", "longdouble", ">f4", ">f8", ">f2"]


@every_argument
@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_bad_dtype(name, argument, dtype):
    call = lawful(name)
    value = np.ones(call.arrays[argument].shape, dtype)
    got = np.dtype(dtype).name if np.dtype(dtype).isnative else np.dtype(dtype).str
    text = refuse(call, TypeError, argument, **{argument: value})
    assert got in text or str(np.dtype(dtype)) in text, text
    if argument == "x":
        assert all(accepted in text for accepted in ("float16", "bfloat16", "float32", "float64")), text


@every_argument
def test_bad_dtype_of_structured_and_text_arrays(name, argument):
    call = lawful(name)
    shape = call.arrays[argument].shape
    for dtype in ("S4", "U1", [("a", "f4")], "M8[s]", "V4"):
        refuse(call, TypeError, argument, **{argument: np.zeros(shape, dtype)})


def lawful_dtypes(argument, dtype):
    """What goes with x of this dtype."""
    statistics = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if argument in ("mean", "rstd", "running_mean", "running_var"):
        return [statistics]
    if argument in ("weight", "bias"):
        return [dtype, statistics] if dtype.itemsize == 2 else [dtype]
    return [dtype]


@arguments("weight", "bias", "dy", "mean", "rstd", "running_mean", "running_var", "out")
@pytest.mark.parametrize("x_dtype", DTYPES, ids=lambda d: d.name)
def test_bad_dtype_beside_x(name, argument, x_dtype):
    """One that is accepted elsewhere, with a hint what to write."""
    call = lawful(name, x_dtype)
    for dtype in DTYPES:
        if dtype in lawful_dtypes(argument, x_dtype):
            continue
        value = np.ones(call.arrays[argument].shape, dtype)
        changes = {argument: value}
        if argument in ("weight", "bias") and "bias" in call.arrays:
            changes["bias" if argument == "weight" else "weight"] = None
        text = refuse(call, TypeError, argument, dtype.name, **changes)
        assert any(d.name in text.partition("expected")[2] for d in lawful_dtypes(argument, x_dtype)), text
        assert ".astype(" in text or argument == "out", text


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.endswith("backward")])
def test_bad_weight_and_bias_of_two_dtypes(name):
    """Each would go with a 16-bit x, but they share one."""
    call = lawful(name, np.float16)
    refuse(call, TypeError, "bias", "float32", "float16", bias=np.ones(8, np.float32))
    refuse(call, TypeError, "bias", "float32", "float16", weight=np.ones(8, np.float32))


# ---- Shapes ---------------------------------------------------------------------------------------------------------

BAD_SHAPES = {"longer": lambda s: (*s[:-1], s[-1] + 1), "more axes": lambda s: (1, *s), "fewer axes": lambda s: s[:-1]}


@arguments("weight", "bias", "dy", "mean", "rstd", "running_mean", "running_var", "out")
@pytest.mark.parametrize("change", BAD_SHAPES)
def test_bad_shape(name, argument, change):
    call = lawful(name)
    array = call.arrays[argument]
    shape = BAD_SHAPES[change](array.shape)
    value = np.ones(shape, array.dtype)
    refuse(call, ValueError, argument, f"shape {shape}", str(array.shape), **{argument: value})


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n.startswith("layer")])
def test_bad_shape_that_would_broadcast(name):
    """Nothing broadcasts: not (1,), not (1, 8), not mean without the axis of length 1."""
    call = lawful(name)
    refuse(call, ValueError, "weight", "(1,)", "(8,)", weight=np.ones(1, np.float32))
    refuse(call, ValueError, "weight", "(1, 8)", "(8,)", weight=np.ones((1, 8), np.float32))
    if "mean" in call.arrays:
        refuse(call, ValueError, "mean", "(6,)", "(6, 1)", mean=np.ones(6, np.float32))
        refuse(call, ValueError, "rstd", "(6,)", "(6, 1)", rstd=np.ones(6, np.float32))


def test_bad_shape_over_several_axes():
    """The shape of the axes in ascending order, whatever order they are named in."""
    x = np.ones((2, 3, 4), np.float32)
    text = "layer_norm: weight has shape (4, 2), expected (2, 4), axis (2, 0) of x (2, 3, 4)"
    with pytest.raises(ValueError, match=re.escape(text)):
        lanenorm.layer_norm(x, np.ones((4, 2), np.float32), axis=(2, 0))


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n.startswith("batch")])
def test_bad_shape_names_the_channel_axis(name):
    call = lawful(name)
    refuse(call, ValueError, "weight", "(6,)", "(8,)", "(6, 8)", weight=np.ones(6, np.float32))


# ---- Axes -----------------------------------------------------------------------------------------------------------


@operations
@pytest.mark.parametrize("axis", [2, -3, 100, -(2**40), 2**40])
def test_bad_axis_out_of_range(name, axis):
    call = lawful(name)
    key = "axis" if name.startswith("layer") else "channel_axis"
    with pytest.raises(np.exceptions.AxisError, match=str(axis)) as caught:
        call(**{key: axis})
    assert "2" in str(caught.value)
    if key == "axis":
        with pytest.raises(np.exceptions.AxisError):
            call(axis=(0, axis))


@operations
def test_bad_axis_of_array_without_axes(name):
    call = lawful(name)
    with pytest.raises(np.exceptions.AxisError):
        call.function(**(call.arrays | call.keywords | {"x": np.ones((), np.float32)}))


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n.startswith("layer")])
def test_bad_axis_repeated_or_missing(name):
    call = lawful(name)
    refuse(call, ValueError, "axis", "(0, 0)", axis=(0, 0))
    refuse(call, ValueError, "axis", "(1, -1)", axis=(1, -1))
    refuse(call, ValueError, "axis", "empty", axis=())


@operations
@pytest.mark.parametrize("axis", [None, 1.0, "1", [1], (0.5,)], ids=str)
def test_bad_axis_type(name, axis):
    call = lawful(name)
    before = call.arrays["out"].tobytes()
    with pytest.raises(TypeError):
        call(**{"axis" if name.startswith("layer") else "channel_axis": axis})
    assert call.arrays["out"].tobytes() == before


# ---- Flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("layer_norm_backward", "param_grads"),
        ("batch_norm_backward", "param_grads"),
        ("batch_norm_backward", "training"),
    ],
)
@pytest.mark.parametrize("value", ["yes", [True], object()], ids=lambda v: type(v).__name__)
def test_bad_flag(name, flag, value):
    refuse(lawful(name), TypeError, flag, type(value).__name__, "bool", **{flag: value})


@pytest.mark.parametrize("value", [np.True_, 1, True])
def test_flag_may_be_any_truth(value):
    for name in ("layer_norm_backward", "batch_norm_backward"):
        assert lawful(name)(param_grads=value).dweight is not None
        assert lawful(name)(param_grads=not value).dweight is None


# ---- eps, momentum, running statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.endswith("backward")])
@pytest.mark.parametrize("eps", [-1e-5, -np.inf, np.inf, np.nan, np.float32(-1)])
def test_bad_eps(name, eps):
    refuse(lawful(name), ValueError, "eps", eps=eps)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.endswith("backward")])
@pytest.mark.parametrize("eps", [None, "1e-5", 1j])
def test_bad_eps_type(name, eps):
    call = lawful(name)
    before = call.arrays["out"].tobytes()
    with pytest.raises(TypeError):
        call(eps=eps)
    assert call.arrays["out"].tobytes() == before


@pytest.mark.parametrize("momentum", [-0.1, 1.1, np.nan, np.inf, -np.inf])
def test_bad_momentum(momentum):
    refuse(lawful("batch_norm_forward"), ValueError, "momentum", momentum=momentum)


def test_bad_momentum_none():
    """The cumulative average belongs to the layer, which counts batches."""
    call = lawful("batch_norm_forward")
    refuse(call, TypeError, "momentum", "None", momentum=None)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_bad_running_statistic_without_the_other(missing):
    refuse(lawful("batch_norm_forward"), ValueError, missing, **{missing: None})


@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
def test_bad_running_statistic_read_only_or_not_contiguous(argument):
    call = lawful("batch_norm_forward")
    frozen = call.arrays[argument].copy()
    frozen.flags.writeable = False
    refuse(call, ValueError, argument, "read-only", **{argument: frozen})
    refuse(call, ValueError, argument, "contiguous", **{argument: np.ones(16, np.float32)[::2]})
    refuse(call, ValueError, argument, "contiguous", **{argument: np.ones(8, np.float32)[::-1]})
    refuse(call, ValueError, argument, **{argument: np.broadcast_to(np.float32(1), 8)})


@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
def test_running_statistic_read_only_or_not_contiguous_is_fine_in_inference(argument):
    call = lawful("batch_norm")
    expected = call().copy()
    strange = np.repeat(call.arrays[argument], 2)[::2]
    strange.flags.writeable = False
    assert np.array_equal(call(**{argument: strange}), expected)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (3,)], ids=str)
def test_bad_one_value_per_channel(shape):
    axis = 0 if len(shape) == 1 else 1
    x = np.ones(shape, np.float32)
    running = np.full(3, 5, np.float32), np.full(3, 7, np.float32)
    call = Call(
        lanenorm.batch_norm_forward,
        {"x": x, "running_mean": running[0], "running_var": running[1], "out": np.ones(shape, np.float32)},
        {"channel_axis": axis},
    )
    refuse(call, ValueError, "x", str(shape))


# ---- out ------------------------------------------------------------------------------------------------------------


@operations
def test_bad_out_read_only(name):
    call = lawful(name)
    call.arrays["out"].flags.writeable = False
    refuse(call, ValueError, "out", "read-only")


@operations
def test_bad_out_layout(name):
    """Another layout than numpy.empty_like(x) would have."""
    call = lawful(name)
    refuse(call, ValueError, "out", "strides", out=np.ones((6, 8), np.float32, order="F"))
    refuse(call, ValueError, "out", "strides", out=np.ones((6, 16), np.float32)[:, ::2])
    refuse(call, ValueError, "out", "strides", out=np.ones((6, 9), np.float32)[:, :8])
    refuse(call, ValueError, "out", "strides", out=np.ones((6, 8), np.float32)[::-1])
    refuse(call, ValueError, "out", "strides", x=np.asfortranarray(call.arrays["x"]))


@every_argument
def test_bad_out_overlapping_an_input(name, argument):
    """Address ranges overlap, by as little as one element at either end."""
    if argument == "out":
        return
    call = lawful(name, shape=(6, 8))
    size = call.arrays["x"].nbytes
    other = call.arrays[argument]
    for distance in (-size + 4, -size + other.nbytes, -4, 0, 4, other.nbytes - 4):
        memory = np.ones(4 * size, np.uint8)
        at, out_at = 2 * size, 2 * size + distance
        value = memory[at : at + other.nbytes].view(other.dtype).reshape(other.shape)
        out = memory[out_at : out_at + size].view(np.float32).reshape(6, 8)
        value[...] = 1.5
        if distance == 0 and argument == ("dy" if name.endswith("backward") else "x"):
            call(**{argument: value, "out": out})  # the same pointer, shape and strides
            continue
        if not np.may_share_memory(value, out):
            continue
        text = refuse(call, ValueError, "out", argument, **{argument: value, "out": out})
        assert "memory" in text or "overlap" in text, text


@operations
def test_out_next_to_an_input_is_fine(name):
    call = lawful(name)
    expected = call()
    expected = expected.copy() if isinstance(expected, np.ndarray) else expected[0].copy()
    memory = np.ones((3, 6, 8), np.float32)
    memory[0] = call.arrays["x"]
    fresh = lawful(name)
    result = fresh(x=memory[0], out=memory[1])
    assert np.array_equal(result if isinstance(result, np.ndarray) else result[0], expected)
    assert np.all(memory[2] == 1)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n.endswith("backward")])
def test_bad_out_is_x_in_a_backward(name):
    call = lawful(name)
    refuse(call, ValueError, "out", "x", out=call.arrays["x"])


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.endswith("backward")])
def test_bad_out_is_x_in_another_order(name):
    """x itself is allowed, x seen otherwise is not: its elements would be overwritten before they are read."""
    call = lawful(name, shape=(8, 8))
    x = call.arrays["x"]
    for view in (x.T, x[::-1], x[:, ::-1]):
        refuse(call, ValueError, "out", out=view)


@operations
def test_bad_out_that_overlaps_itself(name):
    """Elements that share memory cannot all be written; they are not the layout of a new array either."""
    x = lawful(name).arrays["x"]
    out = np.lib.stride_tricks.as_strided(np.ones(16, np.float32), (6, 8), (4, 4))
    refuse(lawful(name), ValueError, "out", x=x, out=out)


# ---- Strange, but right ---------------------------------------------------------------------------------------------


@every_input
def test_strange_strides_are_fine(name, argument):
    """Every argument but the outputs may lie anywhere, in any order, and be read-only."""
    expected = lawful(name)()
    expected = [np.array(a) for a in ((expected,) if isinstance(expected, np.ndarray) else expected)]
    array = lawful(name).arrays[argument]
    flipped = np.ascontiguousarray(array[::-1])[::-1]
    wider = np.repeat(array, 3, axis=0)[::3]
    for strange in (flipped, wider, np.asfortranarray(array), at_byte(array, 1), at_byte(array, 4)):
        strange.flags.writeable = False
        got = lawful(name)(**{argument: strange, "out": None})
        got = (got,) if isinstance(got, np.ndarray) else got
        if argument == "x" and strange.strides[0] < strange.strides[-1]:
            continue  # another axis lies innermost, which may give other bits; values are tested elsewhere
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@operations
def test_first_of_two_faults_is_reported_in_argument_order(name):
    """x before weight before out, whatever else is wrong: a message that does not change with other arguments."""
    call = lawful(name)
    refuse(call, TypeError, "x", x=np.ones((6, 8), np.int32), weight=np.ones(3, np.float32))
    refuse(call, ValueError, "weight", weight=np.ones(3, np.float32), out=np.ones((2, 2), np.float32))


@operations
def test_options_are_keywords_only(name):
    call = lawful(name)
    order = {
        "layer_norm": ("x", "weight", "bias"),
        "layer_norm_forward": ("x", "weight", "bias"),
        "layer_norm_backward": ("dy", "x", "mean", "rstd", "weight"),
        "batch_norm": ("x", "running_mean", "running_var", "weight", "bias"),
        "batch_norm_forward": ("x", "weight", "bias"),
        "batch_norm_backward": ("dy", "x", "mean", "rstd", "weight"),
    }[name]
    positional = [call.arrays[argument] for argument in order]
    call.function(*positional)
    with pytest.raises(TypeError):
        call.function(*positional, -1)
