"""Verification of an installation: ``python -m lanenorm check``.

Every usable ISA, both norms, forward and backward, every dtype, and where CUDA works layer norm on the GPU, against
arithmetic that shares nothing with the kernels: NumPy in extended precision, two passes, on values shifted by the first
element of their slice (a difference that is exact where offsets are large). Errors are in units of u, half the distance
from 1 to the next number of the dtype (2^-24 for float32), and measured as the promise states them:

    y        |y - exact| / max(1, |exact|), without weight and bias
    dx       |dx - exact| / (rstd max(1, max |dy weight| of the slice))
    dweight  |dweight - exact| / sum |terms|, and likewise dbias

16-bit types are promised float32 arithmetic and one rounding at the end, which is what their bound of one u says.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import lanenorm

EPS = 1e-5
OFFSETS = (0.0, 1e3, 1e6)
# Slices of 1 to 4097 elements: within a vector, of several blocks, of several superblocks; rows and columns.
LAYER_CASES = (((64, 5), -1), ((16, 771), -1), ((3, 4097), -1), ((200, 24), 0), ((6, 5, 70), (0, 2)))
BATCH_CASES = (((16, 5, 7, 7), 1), ((4, 3, 18, 18), 1), ((300, 24), 1), ((4, 9, 9, 19), -1))


class Quantities(NamedTuple):
    """Something of each thing that is checked."""

    y: Any
    dx: Any
    dweight: Any
    dbias: Any


def unit(dtype: np.dtype[Any]) -> float:
    """Half the distance from 1 to the next number."""
    mantissa = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[dtype.name]
    return 2.0 ** -(mantissa + 1)


def bounds(dtype: np.dtype[Any]) -> Quantities:
    """The promised errors in u."""
    if dtype.itemsize == 2:
        # 1u for the rounding at the end; what float32 left before it is 4 or 8 times 2^-24, below a hundredth of u.
        # The weights are float32 here, and so are dweight and dbias.
        return Quantities(1.01, 1.01, 8.0, 8.0)
    return Quantities(8.0 if dtype.itemsize == 8 else 4.0, 8.0, 8.0, 8.0)


def dtypes() -> tuple[list[np.dtype[Any]], list[str]]:
    """Element types that can be checked here, and a line for each that cannot."""
    found: list[np.dtype[Any]] = [np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]
    if importlib.util.find_spec("ml_dtypes") is None:
        return found, ["bfloat16: not checked: ml_dtypes is not installed"]
    import ml_dtypes

    return [found[0], np.dtype(ml_dtypes.bfloat16), *found[1:]], []


# --- The reference ----------------------------------------------------------------------------------------------------


def reference(x: Any, dy: Any, weight: Any, axes: tuple[int, ...], sums: tuple[int, ...]) -> tuple[Quantities, ...]:
    """Exact values and the scales that errors are measured against.

    `axes` are those normalized over, `sums` those that dweight is summed over; `weight` broadcasts against x.
    """
    wide = np.longdouble
    first = x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))].astype(wide)
    shifted = x.astype(wide) - first
    centred = shifted - shifted.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(np.square(centred).mean(axes, keepdims=True) + wide(EPS))
    normalized = centred * rstd
    dy = dy.astype(wide)
    terms = dy * normalized
    g = dy * weight.astype(wide)
    dx = rstd * (g - g.mean(axes, keepdims=True) - normalized * (g * normalized).mean(axes, keepdims=True))
    largest = np.maximum(1, np.abs(g).max(axes, keepdims=True))
    scale_dx = rstd * largest
    if x.dtype.itemsize == 2:  # rounding at the end: of the result
        scale_dx = np.maximum(scale_dx, np.abs(dx))
    exact = Quantities(normalized, dx, terms.sum(sums), dy.sum(sums))
    scale_y = np.maximum(1, np.abs(normalized))
    return exact, Quantities(scale_y, scale_dx, np.abs(terms).sum(sums), np.abs(dy).sum(sums))


# --- The cases --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One input and what is exact for it."""

    norm: str
    axis: Any  # `axis` of layer_norm, `channel_axis` of batch_norm
    x: Any
    dy: Any
    weight: Any
    exact: Quantities
    scale: Quantities


def cases(dtype: np.dtype[Any], offset: float) -> Iterator[Case]:
    """Inputs of one dtype around one offset, log-normal, with their exact results."""
    rng = np.random.default_rng(0)
    # the deviation is at least 8u of the offset: 16-bit numbers would all be equal otherwise
    deviation = max(1.0, 8 * unit(dtype) * offset)
    statistics = np.float64 if dtype.itemsize == 8 else np.float32
    for norm, shapes in (("layer_norm", LAYER_CASES), ("batch_norm", BATCH_CASES)):
        for shape, axis in shapes:
            x = (offset + deviation * rng.lognormal(0, 0.5, shape)).astype(dtype)
            dy = rng.standard_normal(shape).astype(dtype)
            every = tuple(range(len(shape)))
            named = tuple(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,)))
            other = tuple(a for a in every if a not in named)
            axes, sums = (named, other) if norm == "layer_norm" else (other, other)
            kept = [shape[a] for a in every if a not in sums]
            weight = rng.uniform(0.5, 2, kept).astype(statistics)
            broadcast = weight.reshape([1 if a in sums else shape[a] for a in every])
            yield Case(norm, axis, x, dy, weight, *reference(x, dy, broadcast, axes, sums))


def run(case: Case, cupy: Any = None) -> Quantities:
    """What the kernels make of it; those of CUDA where `cupy` is given."""
    if cupy is not None:
        x, dy, weight = map(cupy.asarray, (case.x, case.dy, case.weight))
        return Quantities(*map(cupy.asnumpy, run(case._replace(x=x, dy=dy, weight=weight))))
    if case.norm == "layer_norm":
        y, mean, rstd = lanenorm.layer_norm_forward(case.x, axis=case.axis, eps=EPS)
        return Quantities(y, *lanenorm.layer_norm_backward(case.dy, case.x, mean, rstd, case.weight, axis=case.axis))
    y, mean, rstd = lanenorm.batch_norm_forward(case.x, channel_axis=case.axis, eps=EPS)
    return Quantities(
        y, *lanenorm.batch_norm_backward(case.dy, case.x, mean, rstd, case.weight, channel_axis=case.axis)
    )


def error(result: Any, exact: Any, scale: Any) -> float:
    """Worst error of one array in u of its dtype."""
    with np.errstate(invalid="ignore"):
        worst = np.max(np.abs(result.astype(np.longdouble) - exact) / scale) / unit(result.dtype)
    return float(worst) if np.isfinite(worst) else np.inf


# --- Command line -----------------------------------------------------------------------------------------------------


def check_isa(isa: str, cases: list[Case], digest: Any, cupy: Any = None) -> bool:
    """Run all cases of one dtype on one ISA, or on "cuda" with `cupy`.

    Prints a line for each norm and direction, and adds the results to `digest`.
    """
    worst: dict[str, list[float]] = {}
    for case in cases:
        results = run(case, cupy)
        errors = [error(*each) for each in zip(results, case.exact, case.scale, strict=True)]
        worst[case.norm] = [max(pair) for pair in zip(worst.get(case.norm, errors), errors, strict=True)]
        for array in results:
            digest.update(array.tobytes())
    dtype = cases[0].x.dtype
    limits = bounds(dtype)
    fine = True
    for norm, errors in worst.items():
        for direction, part in (("forward", slice(0, 1)), ("backward", slice(1, None))):
            verdict = all(e <= limit for e, limit in zip(errors[part], limits[part], strict=True))
            columns = [
                f"{name} {e:.2f} of {limit:g}"
                for name, e, limit in zip(Quantities._fields[part], errors[part], limits[part], strict=True)
            ]
            print(
                f"{isa:9}{norm:11}{direction:9}{dtype.name:9} {'FAILED' if not verdict else 'ok':7}{', '.join(columns)}"
            )
            fine = fine and verdict
    return fine


def main() -> int:
    """Check everything and print a line for each part.

    Returns
    -------
    int
        0 where every error is within its bound and every ISA gave the same bits, else 1.
    """
    began = time.perf_counter()
    print(f"lanenorm {lanenorm.__version__}: worst errors in u, over offsets {', '.join(f'{o:g}' for o in OFFSETS)}")
    known, remarks = dtypes()
    cupy: Any = None
    if reason := lanenorm.cuda_unavailable_reason():
        remarks.append(f"cuda: not checked: {reason}")
    else:
        cupy = importlib.import_module("cupy")
    isas = lanenorm.available_isas()
    digests = {isa: hashlib.sha256() for isa in isas}
    fine = True
    before = lanenorm.use_isa(isas[0])
    try:
        for dtype in known:
            offsets = [o for o in OFFSETS if dtype.name != "float16" or o < 65504]  # the largest float16
            same = [case for offset in offsets for case in cases(dtype, offset)]
            for isa in isas:
                lanenorm.use_isa(isa)
                fine = check_isa(isa, same, digests[isa]) and fine
            if cupy is not None:
                layer = [case for case in same if case.norm == "layer_norm"]
                fine = check_isa("cuda", layer, hashlib.sha256(), cupy) and fine
    finally:
        lanenorm.use_isa(before)
    for remark in remarks:
        print(remark)
    same_bits = len({digest.digest() for digest in digests.values()}) == 1
    print(f"same bits on {', '.join(isas)}: {'ok' if same_bits else 'FAILED'}")
    fine = fine and same_bits
    print(f"{'all ok' if fine else 'FAILED'}, {time.perf_counter() - began:.1f} s")
    return 0 if fine else 1
