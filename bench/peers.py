"""The libraries that are compared, one class each: what a user of that library would call, on its own kind of arrays.

A peer's `call(operation, inputs, problem, reuse)` makes everything the call needs and returns a function without
arguments; `arrays(result)` gives its result as NumPy arrays in the order and the shapes of lanenorm's. Neither
conversion is ever timed. Outputs are the same for all: (y, mean, rstd), y (inference), (dx, dweight, dbias). With
`reuse` the large output is one array for all calls; `UnsupportedError` where a library has no way to do so, or does not
have the operation at all.

A class is only made where its library is installed, in a process of its own (worker.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Problem
from data import EPS, Inputs

import lanenorm
from lanenorm.bench import plain_backward, plain_forward

Call = Callable[[], Any]


class UnsupportedError(Exception):
    """The library cannot do this case; the text says why."""


# ---- lanenorm --------------------------------------------------------------------------------------------------------


class Lanenorm:
    needs = ()

    def __init__(self, threads: int):
        lanenorm.set_num_threads(threads)
        isa = lanenorm.use_isa(lanenorm.available_isas()[-1])  # the only way to ask: the previous one comes back
        lanenorm.use_isa(isa)
        self.details = {"isa": isa}

    def call(self, operation: str, inputs: Inputs, problem: Problem, reuse: bool) -> Call:
        x, dy, weight, bias, running_mean, running_var = inputs
        out = np.zeros_like(x) if reuse else None
        if operation == "batch_norm":
            return lambda: lanenorm.batch_norm(x, running_mean, running_var, weight, bias, out=out)
        forward = getattr(lanenorm, f"{problem.norm}_forward")
        if operation.endswith("forward"):
            return lambda: forward(x, weight, bias, out=out)
        _, mean, rstd = forward(x, weight, bias)
        backward = getattr(lanenorm, operation)
        return lambda: backward(dy, x, mean, rstd, weight, out=out)

    def arrays(self, result: Any) -> tuple[Any, ...]:
        return tuple(result) if isinstance(result, tuple) else (result,)


# ---- Plain NumPy -----------------------------------------------------------------------------------------------------


class Numpy:
    """The formula as it is commonly written (lanenorm.bench); 16-bit arrays through float32."""

    needs = ()

    def __init__(self, threads: int):
        self.details: dict[str, str] = {}  # element by element: one thread whatever is asked for

    def call(self, operation: str, inputs: Inputs, problem: Problem, reuse: bool) -> Call:
        x, dy = inputs.x, inputs.dy
        rows = problem.norm == "layer_norm"
        axes = (1,) if rows else tuple(axis for axis in range(x.ndim) if axis != 1)
        sums = (0,) if rows else axes
        spread = (-1,) + (1,) * (x.ndim - 2)
        half = x.dtype.itemsize == 2
        wide = np.float32 if half else x.dtype.type
        weight, bias, mean, var = (None if a is None else a.reshape(spread).astype(wide) for a in inputs[2:])
        if half and reuse:
            raise UnsupportedError("goes through float32, the last step allocates")
        out = np.zeros_like(x) if reuse else None

        def rounded(result: tuple[Any, ...]) -> tuple[Any, ...]:
            return (result[0].astype(x.dtype), *result[1:]) if half else result

        if operation == "batch_norm":

            def inference() -> tuple[Any]:
                y = np.multiply(x.astype(wide, copy=False) - mean, weight / np.sqrt(var + wide(EPS)), out=out)
                y += bias
                return rounded((y,))

            return inference
        if operation.endswith("forward"):
            return lambda: rounded(plain_forward(x.astype(wide, copy=False), weight, bias, axes, out))
        _, mean, rstd = plain_forward(x.astype(wide), weight, bias, axes)
        return lambda: rounded(
            plain_backward(dy.astype(wide, copy=False), x.astype(wide, copy=False), mean, rstd, weight, axes, sums, out)
        )

    arrays = Lanenorm.arrays


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class Torch:
    """The native_ functions: those behind torch.nn.functional and autograd, which return the statistics too."""

    needs = ("torch",)

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.details: dict[str, str] = {}

    def tensor(self, array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def call(self, operation: str, inputs: Inputs, problem: Problem, reuse: bool) -> Call:
        torch, aten, mask = self.torch, self.torch.ops.aten, [True, True, True]
        x, dy, weight, bias, running_mean, running_var = map(self.tensor, inputs)
        running_mean, running_var = (a.to(x.dtype) for a in (running_mean, running_var))  # as module.to(dtype) has them
        if problem.norm == "layer_norm":
            if reuse:
                raise UnsupportedError("its out= copies a fresh result")
            length = [problem.shape[1]]
            if operation.endswith("forward"):
                return lambda: torch.native_layer_norm(x, length, weight, bias, EPS)
            _, mean, rstd = torch.native_layer_norm(x, length, weight, bias, EPS)
            return lambda: aten.native_layer_norm_backward(dy, x, length, mean, rstd, weight, bias, mask)
        trained = operation != "batch_norm"
        statistics = (None, None) if trained else (running_mean, running_var)
        if reuse and operation.endswith("backward"):
            raise UnsupportedError("its out= copies a fresh result")
        if reuse:
            out = tuple(map(torch.clone, torch.native_batch_norm(x, weight, bias, *statistics, trained, 0.1, EPS)))
            return lambda: torch.native_batch_norm(x, weight, bias, *statistics, trained, 0.1, EPS, out=out)
        if not operation.endswith("backward"):
            return lambda: torch.native_batch_norm(x, weight, bias, *statistics, trained, 0.1, EPS)
        _, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, EPS)
        return lambda: aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, EPS, mask)

    def arrays(self, result: Any) -> tuple[Any, ...]:
        half = (self.torch.float16, self.torch.bfloat16)
        kept = [part for part in result if part.numel()]  # the statistics of inference are empty
        return tuple((part.float() if part.dtype in half else part).numpy() for part in kept)


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """A model of one node. Forward and inference: there are no gradients in the released package."""

    needs = ("onnxruntime", "onnx")

    def __init__(self, threads: int):
        self.threads = threads
        self.details: dict[str, str] = {}

    def session(self, operation: str, inputs: Inputs) -> tuple[Any, list[str]]:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        kind = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
        if inputs.x.dtype.name not in kind:
            raise UnsupportedError(f"no {inputs.x.dtype.name} from NumPy")
        element = kind[inputs.x.dtype.name]
        constants = {"weight": inputs.weight, "bias": inputs.bias}
        if operation == "layer_norm_forward":
            # float64: the statistics are float32 (the attribute stash_type knows nothing wider)
            outputs, op, attributes = ["y", "mean", "rstd"], "LayerNormalization", {"axis": -1, "epsilon": EPS}
        else:
            outputs, op, attributes = ["y"], "BatchNormalization", {"epsilon": EPS}
            constants |= {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
        shapes = {"y": inputs.x.shape, "mean": (len(inputs.x), 1), "rstd": (len(inputs.x), 1)}
        graph = helper.make_graph(
            [helper.make_node(op, ["x", *constants], outputs, **attributes)],
            op,
            [helper.make_tensor_value_info("x", element, inputs.x.shape)],
            [
                helper.make_tensor_value_info(name, element if name == "y" else TensorProto.FLOAT, shapes[name])
                for name in outputs
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = min(model.ir_version, 8)  # of opset 17, so that an older runtime takes it
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = self.threads, 1, 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session, outputs

    def call(self, operation: str, inputs: Inputs, problem: Problem, reuse: bool) -> Call:
        if operation not in ("layer_norm_forward", "batch_norm"):
            raise UnsupportedError("no gradients" if operation.endswith("backward") else "no training mode on the CPU")
        if problem.layout == "channels-last":
            raise UnsupportedError("channels-first only")
        if problem.dtype == "float64" and operation == "layer_norm_forward":
            raise UnsupportedError("its statistics are float32")
        session, outputs = self.session(operation, inputs)
        if not reuse:
            feed = {"x": inputs.x}
            return lambda: session.run(outputs, feed)
        import onnxruntime

        wrap = onnxruntime.OrtValue.ortvalue_from_numpy
        values = [wrap(np.zeros_like(array)) for array in session.run(outputs, {"x": inputs.x})]
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", wrap(inputs.x))
        for name, value in zip(outputs, values, strict=True):
            binding.bind_ortvalue_output(name, value)

        def bound() -> list[Any]:
            session.run_with_iobinding(binding)
            return values

        return bound

    def arrays(self, result: Any) -> tuple[Any, ...]:
        return tuple(part if isinstance(part, np.ndarray) else part.numpy() for part in result)


# ---- JAX -------------------------------------------------------------------------------------------------------------


class Jax:
    """The formula, compiled; statistics in float32 (float64 for float64), as Flax does."""

    needs = ("jax",)

    def __init__(self, threads: int):
        import jax

        self.jax = jax
        self.details: dict[str, str] = {}

    def call(self, operation: str, inputs: Inputs, problem: Problem, reuse: bool) -> Call:
        if reuse:
            raise UnsupportedError("arrays cannot be written to")
        jax, jnp = self.jax, self.jax.numpy
        last = self.last = problem.layout == "channels-last" and len(problem.shape) > 2
        x, dy = (np.moveaxis(a, 1, -1) if last else a for a in (inputs.x, inputs.dy))
        rows, channel = problem.norm == "layer_norm", len(problem.shape) - 1 if last else 1
        axes = (1,) if rows else tuple(axis for axis in range(x.ndim) if axis != channel)
        sums, spread = ((0,) if rows else axes), tuple(-1 if axis == channel else 1 for axis in range(x.ndim))
        wide = jnp.float64 if problem.dtype == "float64" else jnp.float32

        def forward(x: Any, weight: Any, bias: Any, mean: Any = None, var: Any = None) -> tuple[Any, ...]:
            given = mean is not None
            z = x.astype(wide)
            mean = mean.reshape(spread) if given else z.mean(axes, keepdims=True)
            var = var.reshape(spread) if given else jnp.square(z - mean).mean(axes, keepdims=True)
            rstd = jax.lax.rsqrt(var + EPS)
            y = (z - mean) * rstd * weight.reshape(spread).astype(wide) + bias.reshape(spread).astype(wide)
            return (y.astype(x.dtype),) if given else (y.astype(x.dtype), mean, rstd)

        def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, ...]:
            dz, normalized = dy.astype(wide), (x.astype(wide) - mean) * rstd
            g = dz * weight.reshape(spread).astype(wide)
            inner = g.mean(axes, keepdims=True) + normalized * (g * normalized).mean(axes, keepdims=True)
            dweight, dbias = ((a.sum(sums)).astype(weight.dtype) for a in (dz * normalized, dz))
            return (rstd * (g - inner)).astype(x.dtype), dweight, dbias

        arrays = [jax.device_put(a) for a in (x, inputs.weight, inputs.bias)]
        if operation == "batch_norm":
            arrays += [jax.device_put(a) for a in inputs[4:]]
        function = jax.jit(forward)
        if operation.endswith("backward"):
            _, mean, rstd = function(*arrays)
            arrays = [jax.device_put(dy), arrays[0], mean, rstd, arrays[1]]
            function = jax.jit(backward)
        return lambda: jax.block_until_ready(function(*arrays))

    def arrays(self, result: Any) -> tuple[Any, ...]:
        parts = [np.asarray(part) for part in result]
        if self.last:
            parts[0] = np.moveaxis(parts[0], -1, 1)
        return tuple(parts)


PEERS: dict[str, Any] = {
    "lanenorm": Lanenorm,
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
    "numpy": Numpy,
}
NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "jax": "JAX", "numpy": "NumPy", "lanenorm": "lanenorm"}


def installed() -> list[str]:
    """Names of the peers that can be used here, lanenorm first."""
    return [name for name, peer in PEERS.items() if all(importlib.util.find_spec(module) for module in peer.needs)]
