"""Inputs of a problem, what is exact for them in float64, and the check of a result before it is timed.

The same function makes the inputs in every process, so nothing large travels between them. What is exact is computed
once per problem and kept at a sample of positions of every slice (the statistics and gradients of parameters in full).
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from common import Problem

EPS = 1e-5
BLOCK = 1048573  # prime: no two slices of a problem start at the same place of the repeated block
SLAB = 1 << 22  # elements handled at once in float64: 32 MB an array


class Inputs(NamedTuple):
    """x and dy: the shape of the problem, in its memory layout. The others: (axis,) or (C,)."""

    x: Any
    dy: Any
    weight: Any
    bias: Any
    running_mean: Any  # batch_norm only
    running_var: Any


def numpy_dtype(name: str) -> np.dtype[Any]:
    """ImportError where bfloat16 is asked for without ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def make_inputs(problem: Problem) -> Inputs:
    """Normal deviates around 0.25, a block of a million of them repeated: made in the time of a few copies."""
    rng = np.random.default_rng(zlib.crc32(problem.name.encode()))
    dtype = numpy_dtype(problem.dtype)
    stored = problem.shape
    if problem.layout == "channels-last" and len(problem.shape) > 2:
        stored = (problem.shape[0], *problem.shape[2:], problem.shape[1])

    def array(offset: float) -> Any:
        block = (rng.standard_normal(min(problem.size, BLOCK), dtype=np.float32) + np.float32(offset)).astype(dtype)
        flat = np.empty(problem.size, dtype)
        for start in range(0, problem.size, BLOCK):
            flat[start : start + BLOCK] = block[: problem.size - start]
        filled = flat.reshape(stored)
        return filled if stored == problem.shape else np.moveaxis(filled, -1, 1)

    x, dy = array(0.25), array(0.0)
    count = problem.shape[1]
    weight, bias = (rng.uniform(0.5, 1.5, count).astype(dtype) for _ in range(2))
    statistics_dtype = np.float64 if problem.dtype == "float64" else np.float32
    running_mean = rng.uniform(-0.5, 0.5, count).astype(statistics_dtype)
    running_var = rng.uniform(0.5, 1.5, count).astype(statistics_dtype)
    return Inputs(x, dy, weight, bias, running_mean, running_var)


def slab_of(array: Any, norm: str, start: int, stop: int) -> Any:
    """Slices start to stop as the rows of a float64 matrix."""
    part = array[start:stop] if norm == "layer_norm" else np.moveaxis(array[:, start:stop], 1, 0)
    return part.astype(np.float64).reshape(part.shape[0], -1)


def flat_index(problem: Problem, slices: Any, position: Any) -> Any:
    """Where element `position` of the slices stands in the array in C order."""
    if problem.norm == "layer_norm":
        return slices * problem.shape[1] + position
    inner = int(np.prod(problem.shape[2:], dtype=np.int64))
    image, pixel = np.divmod(position, inner)
    return (image * problem.shape[1] + slices) * inner + pixel


def exact(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """What the operations give, in float64, with the scales errors are measured against (`..._scale`).

    Ba, Kiros, Hinton 2016, equation 4; Ioffe & Szegedy 2015, section 3. y, dx and inference (`frozen`) at the
    positions `index` of the array in C order.
    """
    rows = problem.norm == "layer_norm"
    slices = problem.shape[0] if rows else problem.shape[1]
    count = problem.size // slices
    rng = np.random.default_rng(1)
    chosen = min(count, max(2, 4096 // slices))
    step = max(1, SLAB // count)
    weight, bias = inputs.weight.astype(np.float64), inputs.bias.astype(np.float64)
    parts: dict[str, list[Any]] = {}
    for start in range(0, slices, step):
        stop = min(slices, start + step)
        x, dy = (slab_of(a, problem.norm, start, stop) for a in (inputs.x, inputs.dy))
        w, b = (a[None, :] if rows else a[start:stop, None] for a in (weight, bias))
        mean = x.mean(axis=1, keepdims=True)
        rstd = 1 / np.sqrt(np.square(x - mean).mean(axis=1, keepdims=True) + EPS)
        normalized, g = (x - mean) * rstd, dy * w
        dx = rstd * (g - g.mean(axis=1, keepdims=True) - normalized * (g * normalized).mean(axis=1, keepdims=True))
        position = rng.integers(count, size=(stop - start, chosen))
        position[:, :2] = (0, count - 1)  # the ends, where a tail may be forgotten
        found = {
            "index": flat_index(problem, np.arange(start, stop)[:, None], position),
            "y": np.take_along_axis(normalized * w + b, position, 1),
            "dx": np.take_along_axis(dx, position, 1),
            "dx_scale": np.broadcast_to(rstd * np.maximum(1, np.abs(g).max(axis=1, keepdims=True)), position.shape),
            "mean": mean[:, 0],
            "rstd": rstd[:, 0],
        }
        along = 0 if rows else 1
        size = np.abs(dy) * np.maximum(1, np.abs(normalized))  # of a term, by the error of the normalized value
        for name, terms, scale in (("dweight", dy * normalized, size), ("dbias", dy, np.abs(dy))):
            found[name], found[f"{name}_scale"] = terms.sum(axis=along), scale.sum(axis=along)
        if not rows:
            frozen = (x - inputs.running_mean[start:stop, None]) / np.sqrt(inputs.running_var[start:stop, None] + EPS)
            found["frozen"] = np.take_along_axis(frozen * w + b, position, 1)
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    result = {}
    for name, values in parts.items():
        summed = rows and name.startswith(("dweight", "dbias"))  # over the rows, so over the slabs too
        result[name] = np.sum(values, axis=0) if summed else np.concatenate([value.ravel() for value in values])
    return result


def allowed(dtype: str) -> float:
    """Largest error, relative to the scale of a quantity, of a result that counts as the same function.

    Accuracy is bench/accuracy.py's business: this is far above the rounding errors of all peers (naive float32 sums of
    a million terms included) and far below what a wrong formula, axis or tail gives.
    """
    return {"float64": 1e-9, "float32": 1e-3}.get(dtype, 2.0**-5)


def check(operation: str, dtype: str, results: Any, exact: Any) -> str | None:
    """Compare results (y, mean, rstd), (y,) or (dx, dweight, dbias) with `exact`; a complaint, or None."""
    names = {
        "batch_norm": ["frozen"],
        "layer_norm_forward": ["y", "mean", "rstd"],
        "batch_norm_forward": ["y", "mean", "rstd"],
    }.get(operation, ["dx", "dweight", "dbias"])
    for name, result in zip(names, results, strict=True):
        at_sample = name in ("y", "dx", "frozen")
        got = np.asarray(result.flat[exact["index"]] if at_sample else result.reshape(-1), dtype=np.float64)
        scale = exact[f"{name}_scale"] if f"{name}_scale" in exact else np.maximum(1, np.abs(exact[name]))
        if got.shape != exact[name].shape:
            return f"{name} has {got.size} values, expected {exact[name].size}"
        error = float(np.max(np.abs(got - exact[name]) / scale))
        if not error <= allowed(dtype):
            return f"{name} errs by {error:.2g} of its scale, allowed {allowed(dtype):.2g}"
    return None
