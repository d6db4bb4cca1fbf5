"""The CUDA kernels of lanenorm, emulated on the CPU: its functions on NumPy arrays.

With `tests/` on the path, `from cuda_on_host import layer_norm_forward` gives what `lanenorm.layer_norm_forward` does
to a CuPy array, computed by the same kernel sources. The first call builds them (g++ only, about a minute). What CUDA
leaves undefined is a RuntimeError: see emulator.hpp.
"""

import importlib.util
from functools import cache

from lanenorm import NormBackward, NormForward

from .build import Builder

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "set_device",
    "set_schedule",
    "take_launches",
]


@cache
def _emulated():
    spec = importlib.util.spec_from_file_location("cuda_on_host._emulated", Builder().module())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, out=None):
    """As `lanenorm.layer_norm`."""
    return _emulated().layer_norm(x, weight, bias, axis, eps, out)


def layer_norm_forward(x, weight=None, bias=None, *, axis=-1, eps=1e-5, out=None):
    """As `lanenorm.layer_norm_forward`."""
    return _emulated().layer_norm_forward(x, weight, bias, axis, eps, out, NormForward)


def layer_norm_backward(dy, x, mean, rstd, weight=None, *, axis=-1, param_grads=True, out=None):
    """As `lanenorm.layer_norm_backward`."""
    return _emulated().layer_norm_backward(dy, x, mean, rstd, weight, axis, param_grads, out, NormBackward)


def batch_norm(x, running_mean, running_var, weight=None, bias=None, *, channel_axis=1, eps=1e-5, out=None):
    """As `lanenorm.batch_norm`."""
    return _emulated().batch_norm(x, running_mean, running_var, weight, bias, channel_axis, eps, out)


def batch_norm_forward(
    x,
    weight=None,
    bias=None,
    *,
    running_mean=None,
    running_var=None,
    momentum=0.1,
    channel_axis=1,
    eps=1e-5,
    out=None,
):
    """As `lanenorm.batch_norm_forward`."""
    return _emulated().batch_norm_forward(
        x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, out, NormForward
    )


def batch_norm_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1, training=True, param_grads=True, out=None):
    """As `lanenorm.batch_norm_backward`."""
    return _emulated().batch_norm_backward(
        dy, x, mean, rstd, weight, channel_axis, training, param_grads, out, NormBackward
    )


def set_device(
    *,
    multiprocessors=132,
    shared_per_block=232448,
    shared_per_multiprocessor=233472,
    architecture=90,
    max_cluster=16,
    l2_bytes=50 << 20,
):
    """The GPU to be. The defaults are an H200, which is what the module starts with."""
    _emulated().set_device(
        multiprocessors, shared_per_block, shared_per_multiprocessor, architecture, max_cluster, l2_bytes
    )


def set_schedule(schedule):
    """The order in which blocks, warps and lanes run: "forward", as at the start, or "reversed"."""
    if schedule not in ("forward", "reversed"):
        raise ValueError(f"schedule is {schedule!r}, expected 'forward' or 'reversed'")
    _emulated().set_schedule(schedule == "reversed")


def take_launches():
    """(grid, block, cluster, shared_bytes) of the kernels launched since this was called last."""
    return _emulated().take_launches()
