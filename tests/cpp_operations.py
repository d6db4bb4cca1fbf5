"""What the programs of tests/cpp/example print of every operation, computed by a library with Python's functions."""

import numpy as np


def numbers(dtype, shape, seed):
    """What the programs make: multiples of 1/128 from a linear congruential generator."""
    values = []
    for _ in range(int(np.prod(shape))):
        seed = (seed * 1664525 + 1013904223) % 2**32
        values.append(((seed >> 24) - 128) / 128)
    return np.array(values).reshape(shape).astype(dtype)


def expected_layer_norm(library, dtype):
    x, dy = numbers(dtype, (5, 100), 1), numbers(dtype, (5, 100), 2)
    weight, bias = numbers(dtype, 100, 3), numbers(dtype, 100, 4)
    y, mean, rstd = library.layer_norm_forward(x, weight, eps=1e-3)
    dx, dweight, dbias = library.layer_norm_backward(dy, x, mean, rstd, weight)
    inference = library.layer_norm(x, weight, bias)
    by_row = {"y": y, "mean": mean, "rstd": rstd, "inference": inference}
    return by_row | {"dx": dx, "dweight": dweight, "dbias": dbias}


def expected_batch_norm(library, dtype):
    x, dy = (numbers(dtype, (4, 5, 5, 7), seed).transpose(0, 3, 1, 2) for seed in (5, 6))
    weight, bias = numbers(dtype, 7, 7), numbers(dtype, 7, 8)
    statistics = np.float64 if dtype == np.float64 else np.float32
    running = {"running_mean": numbers(statistics, 7, 9), "running_var": np.zeros(7, statistics)}
    y, mean, rstd = library.batch_norm_forward(x, weight, bias, momentum=0.25, **running)
    dx, dweight, dbias = library.batch_norm_backward(dy, x, mean, rstd, weight)
    frozen = library.batch_norm_backward(dy, x, mean, rstd, training=False, param_grads=False).dx
    inference = library.batch_norm(x, running["running_mean"], running["running_var"], weight, bias)
    by_channel = {"mean": mean, "rstd": rstd, "dweight": dweight, "dbias": dbias} | running
    images = {"y": y, "dx": dx, "frozen": frozen, "inference": inference}
    return by_channel | {name: image.transpose(0, 2, 3, 1) for name, image in images.items()}


def expected(library, norm, dtype):
    """Bytes of each result by its name."""
    arrays = {"layer_norm": expected_layer_norm, "batch_norm": expected_batch_norm}[norm](library, dtype)
    return {name: np.ascontiguousarray(array).tobytes().hex() for name, array in arrays.items()}


def printed(lines):
    """The words of each line by its first one."""
    pairs = [line.split(" ", 1) for line in lines]
    return {first: [rest for word, rest in pairs if word == first] for first, _ in pairs}


def of_dtype(rests, dtype):
    """Bytes of each result by its name, out of what was printed for one norm."""
    return dict(rest.split(" ")[1:] for rest in rests if rest.startswith(f"{dtype} "))
