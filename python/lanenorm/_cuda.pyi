"""The CUDA kernels. Arguments are positional; what kind of arrays they are has been checked in `_arrays.py`."""

from typing import Any, TypedDict, TypeVar

_Array = Any  # cupy.ndarray
_Axis = int | tuple[int, ...]
_Result = TypeVar("_Result")  # a named tuple of three

class _BuildInfo(TypedDict):
    version: str
    cuda: str
    architectures: str

def layer_norm(
    x: _Array, weight: _Array | None, bias: _Array | None, axis: _Axis, eps: float, out: _Array | None, /
) -> _Array: ...
def layer_norm_forward(
    x: _Array,
    weight: _Array | None,
    bias: _Array | None,
    axis: _Axis,
    eps: float,
    out: _Array | None,
    result: type[_Result],
    /,
) -> _Result: ...
def layer_norm_backward(
    dy: _Array,
    x: _Array,
    mean: _Array,
    rstd: _Array,
    weight: _Array | None,
    axis: _Axis,
    param_grads: bool,
    out: _Array | None,
    result: type[_Result],
    /,
) -> _Result: ...
def batch_norm(
    x: _Array,
    running_mean: _Array,
    running_var: _Array,
    weight: _Array | None,
    bias: _Array | None,
    channel_axis: int,
    eps: float,
    out: _Array | None,
    /,
) -> _Array: ...
def batch_norm_forward(
    x: _Array,
    weight: _Array | None,
    bias: _Array | None,
    running_mean: _Array | None,
    running_var: _Array | None,
    momentum: float,
    channel_axis: int,
    eps: float,
    out: _Array | None,
    result: type[_Result],
    /,
) -> _Result: ...
def batch_norm_backward(
    dy: _Array,
    x: _Array,
    mean: _Array,
    rstd: _Array,
    weight: _Array | None,
    channel_axis: int,
    training: bool,
    param_grads: bool,
    out: _Array | None,
    result: type[_Result],
    /,
) -> _Result: ...
def unavailable_reason() -> str | None: ...
def build_info() -> _BuildInfo: ...
