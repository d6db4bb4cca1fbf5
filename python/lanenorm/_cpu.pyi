"""The C++ kernels. Arguments are positional. The six operations return NotImplemented where an array is not NumPy's."""

from typing import Any, TypedDict, TypeVar

from numpy import ndarray

_Array = ndarray[Any, Any]
_Axis = int | tuple[int, ...]
_Result = TypeVar("_Result")  # a named tuple of three

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    compiled_isas: list[str]

class _PoolUse(TypedDict):
    used: int
    free: int
    limit: int
    free_blocks: int

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
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> int: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def use_isa(name: str, /) -> str: ...
def pool_use() -> _PoolUse: ...
def pool_free_all() -> None: ...
def pool_set_limit(limit: int, /) -> None: ...
def build_info() -> _BuildInfo: ...
