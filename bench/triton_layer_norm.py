"""Layer normalization as one writes it in Triton: a program a row, the row in registers. For comparison only.

Imported where Triton is installed. Rows are contiguous; statistics are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LONGEST = 65536  # elements of a row: more does not fit the registers of a program


@triton.jit
def forward_kernel(x, weight, bias, y, mean, rstd, count, eps, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < count
    value = tl.load(x + row * count + column, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(value, axis=0) / count
    deviation = tl.where(inside, value - average, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(deviation * deviation, axis=0) / count + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * count + column, deviation * scale * gain + shift, mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, scale)


@triton.jit
def backward_kernel(dy, x, mean, rstd, weight, dx, partial_dweight, partial_dbias, rows, count, BLOCK: tl.constexpr):  # noqa: N803
    """Program p does the rows p, p + programs, ... and leaves its sums of dy·x̂ and dy as row p of the partials."""
    column = tl.arange(0, BLOCK)
    inside = column < count
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_dweight = tl.zeros((BLOCK,), tl.float32)
    sum_dbias = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * count
        gradient = tl.load(dy + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normalized = tl.where(inside, (value - tl.load(mean + row)) * scale, 0.0)
        g = gradient * gain
        along = tl.sum(g * normalized, axis=0) / count
        average = tl.sum(g, axis=0) / count
        tl.store(dx + start + column, (g - average - normalized * along) * scale, mask=inside)
        sum_dweight += gradient * normalized
        sum_dbias += gradient
    place = tl.program_id(0) * count + column
    tl.store(partial_dweight + place, sum_dweight, mask=inside)
    tl.store(partial_dbias + place, sum_dbias, mask=inside)


def launch_options(count: int) -> dict[str, int]:
    block = triton.next_power_of_2(count)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def forward(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    rows, count = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((rows, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    forward_kernel[(rows,)](x, weight, bias, y, mean, rstd, count, eps, **launch_options(count))
    return y, mean, rstd


def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
    rows, count = x.shape
    programs = min(rows, torch.cuda.get_device_properties(x.device).multi_processor_count)
    dx = torch.empty_like(x)
    partials = torch.empty((2, programs, count), dtype=torch.float32, device=x.device)
    arguments = (dy, x, mean, rstd, weight, dx, partials[0], partials[1], rows, count)
    backward_kernel[(programs,)](*arguments, **launch_options(count))
    dweight, dbias = partials.sum(1).to(weight.dtype)
    return dx, dweight, dbias
