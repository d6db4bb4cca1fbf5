"""The libraries that are compared on the GPU, one class each; all in one process, on the same arrays.

A peer's `call(operation, inputs)` returns a function without arguments that a user of that library would call, with
fresh outputs: (y, mean, rstd) or (dx, dweight, dbias). `arrays(result)` gives them as NumPy arrays. `record(run)` makes
a CUDA graph of what `run` queues and returns what replays it on `stream`. `UnsupportedError` where a library does not
have the case.

Nothing here is imported before a class is made: CuPy and PyTorch are where there is a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from data import EPS, Inputs
from peers import UnsupportedError

import lanenorm

Call = Callable[..., Any]


# ---- On CuPy arrays --------------------------------------------------------------------------------------------------


class CuPyPeer:
    """What all have in common that take CuPy arrays."""

    needs: tuple[str, ...] = ("cupy",)

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def call(self, operation: str, inputs: Inputs) -> Call:
        x, dy, weight, bias = inputs[:4]
        if operation.endswith("forward"):
            return lambda: self.forward(x, weight, bias)
        _, mean, rstd = self.forward(x, weight, bias)
        return lambda: self.backward(dy, x, mean, rstd, weight)

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def arrays(self, result: Any) -> tuple[Any, ...]:
        return tuple(part.get() for part in result)

    def record(self, run: Call) -> Call:
        """With a pool of its own for what is allocated meanwhile: the graph writes there whenever it is replayed."""
        pool = self.cupy.cuda.MemoryPool()
        with self.stream, self.cupy.cuda.using_allocator(pool.malloc):
            run()
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                run()
            finally:
                graph = self.stream.end_capture()

        def replay(pool: Any = pool) -> None:
            graph.launch(self.stream)

        return replay


class Lanenorm(CuPyPeer):
    """This library."""

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        return lanenorm.layer_norm_forward(x, weight, bias)

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        return lanenorm.layer_norm_backward(dy, x, mean, rstd, weight)


class Composed(CuPyPeer):
    """The formula in CuPy's functions; 16-bit arrays through float32."""

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        z, weight, bias = self.wide(x), self.wide(weight), self.wide(bias)
        mean = z.mean(axis=1, keepdims=True)
        z = z - mean
        rstd = 1 / self.cupy.sqrt((z * z).mean(axis=1, keepdims=True) + EPS)
        return (z * rstd * weight + bias).astype(x.dtype), mean, rstd

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        gradient, normalized = self.wide(dy), (self.wide(x) - mean) * rstd
        g = gradient * self.wide(weight)
        average, along = g.mean(axis=1, keepdims=True), (g * normalized).mean(axis=1, keepdims=True)
        dx = (rstd * (g - average - normalized * along)).astype(x.dtype)
        sums = (gradient * normalized).sum(axis=0), gradient.sum(axis=0)
        return dx, *(part.astype(weight.dtype) for part in sums)

    def wide(self, array: Any) -> Any:
        return array.astype(np.float32) if array.dtype.itemsize == 2 else array


class Fused(Composed):
    """The same, what is done element by element put together by cupy.fuse."""

    def __init__(self) -> None:
        super().__init__()

        def fused(name: str, formula: Call) -> Any:
            return self.cupy.fuse(kernel_name=f"fused_{name}")(formula)

        self.square = fused("square", lambda z, mean: (z - mean) * (z - mean))
        self.apply = fused("apply", lambda z, mean, rstd, weight, bias: (z - mean) * rstd * weight + bias)
        self.normalize = fused("normalize", lambda z, mean, rstd: (z - mean) * rstd)
        self.gradient = fused("gradient", lambda g, average, n, along, rstd: rstd * (g - average - n * along))

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        z, weight, bias = self.wide(x), self.wide(weight), self.wide(bias)
        mean = z.mean(axis=1, keepdims=True)
        rstd = 1 / self.cupy.sqrt(self.square(z, mean).mean(axis=1, keepdims=True) + EPS)
        return self.apply(z, mean, rstd, weight, bias).astype(x.dtype, copy=False), mean, rstd

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        gradient, normalized = self.wide(dy), self.normalize(self.wide(x), mean, rstd)
        g = gradient * self.wide(weight)
        average, along = g.mean(axis=1, keepdims=True), (g * normalized).mean(axis=1, keepdims=True)
        dx = self.gradient(g, average, normalized, along, rstd).astype(x.dtype, copy=False)
        sums = (gradient * normalized).sum(axis=0), gradient.sum(axis=0)
        return dx, *(part.astype(weight.dtype, copy=False) for part in sums)


class Copy(CuPyPeer):
    """The roof: x copied to another array, by the device's own copy."""

    def call(self, operation: str, inputs: Inputs) -> Call:
        x, out = inputs.x, self.cupy.empty_like(inputs.x)
        stream = self.cupy.cuda.get_current_stream
        return lambda: out.data.copy_from_device_async(x.data, x.nbytes, stream())


# ---- On PyTorch tensors ----------------------------------------------------------------------------------------------


class TorchPeer(CuPyPeer):
    """What all have in common that take tensors: those of the same memory."""

    needs: tuple[str, ...] = ("cupy", "torch")

    def __init__(self) -> None:
        super().__init__()
        import torch

        torch.set_grad_enabled(False)
        self.torch = torch
        self.stream = self.cupy.cuda.Stream.null  # what torch.cuda.current_stream() is, and graphs are replayed on

    def tensor(self, array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(array)

    def call(self, operation: str, inputs: Inputs) -> Call:
        return super().call(operation, Inputs(*map(self.tensor, inputs[:4]), None, None))

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        return self.torch.native_layer_norm(x, [x.shape[1]], weight, bias, EPS)

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        aten = self.torch.ops.aten
        # bias: its values are not read
        return aten.native_layer_norm_backward(dy, x, [x.shape[1]], mean, rstd, weight, weight, [True, True, True])

    def arrays(self, result: Any) -> tuple[Any, ...]:
        half = (self.torch.float16, self.torch.bfloat16)
        return tuple((part.float() if part.dtype in half else part).cpu().numpy() for part in result)

    def record(self, run: Call) -> Call:
        torch = self.torch
        graph = torch.cuda.CUDAGraph()
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


class Torch(TorchPeer):
    """The native_ functions: those behind torch.nn.functional and autograd, which return the statistics too."""


class TorchCompiled(TorchPeer):
    """The same through torch.compile, for the shape at hand."""

    needs = ("cupy", "torch", "triton")

    def __init__(self) -> None:
        super().__init__()
        self.compiled: dict[Any, Call] = {}

    def compile(self, operation: str, inputs: Inputs) -> Call:
        """For one case at a time: dynamo gives up on a function after eight shapes."""
        case = operation, inputs.x.shape, inputs.x.dtype.name
        if case not in self.compiled:
            self.torch._dynamo.reset()
            plain = self.forward if operation.endswith("forward") else self.backward
            self.compiled = {case: self.torch.compile(plain, dynamic=False, fullgraph=True)}
        return self.compiled[case]

    def call(self, operation: str, inputs: Inputs) -> Call:
        function = self.compile(operation, inputs)
        x, dy, weight, bias = map(self.tensor, inputs[:4])
        if operation.endswith("forward"):
            return lambda: function(x, weight, bias)
        _, mean, rstd = self.forward(x, weight, bias)
        return lambda: function(dy, x, mean, rstd, weight)


class Triton(TorchPeer):
    """triton_layer_norm.py: what one writes after the tutorial."""

    needs = ("cupy", "torch", "triton")

    def __init__(self) -> None:
        super().__init__()
        import triton_layer_norm

        self.kernels = triton_layer_norm

    def call(self, operation: str, inputs: Inputs) -> Call:
        if inputs.x.dtype == np.float64:
            raise UnsupportedError("its statistics are float32")
        if inputs.x.shape[1] > self.kernels.LONGEST:
            raise UnsupportedError(f"rows of at most {self.kernels.LONGEST} elements")
        return super().call(operation, inputs)

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        return self.kernels.forward(x, weight, bias, EPS)

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        return self.kernels.backward(dy, x, mean, rstd, weight)


class Liger(TorchPeer):
    """liger_kernel.ops.layer_norm."""

    needs = ("cupy", "torch", "triton", "liger_kernel")

    def __init__(self) -> None:
        super().__init__()
        from liger_kernel.ops import layer_norm

        self.ops = layer_norm

    def call(self, operation: str, inputs: Inputs) -> Call:
        if inputs.x.dtype == np.float64:
            raise UnsupportedError("its statistics are float32")
        return super().call(operation, inputs)

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        y, _, mean, rstd, *_ = self.ops.layer_norm_forward(x, weight, bias, EPS)
        return y, mean, rstd

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        return self.ops.layer_norm_backward(dy, x, weight, weight, mean, rstd)


class Quack(TorchPeer):
    """quack.layernorm; weight and bias in float32, as it wants them."""

    needs = ("cupy", "torch", "quack")

    def __init__(self) -> None:
        super().__init__()
        from quack import layernorm

        self.ops = layernorm

    def call(self, operation: str, inputs: Inputs) -> Call:
        if inputs.x.dtype == np.float64:
            raise UnsupportedError("no float64")
        weight, bias = (a.astype(np.float32) for a in (inputs.weight, inputs.bias))
        return super().call(operation, inputs._replace(weight=weight, bias=bias))

    def forward(self, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
        y, rstd, mean = self.ops.layernorm_fwd(x, weight, bias, eps=EPS, return_rstd=True, return_mean=True)
        return y, mean, rstd

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
        if not hasattr(self.ops, "layernorm_bwd"):
            raise UnsupportedError("this version has no backward")
        return self.ops.layernorm_bwd(dy, x, weight, rstd, mean)


OURS, COPY = "lanenorm", "copy"
PEERS: dict[str, Any] = {
    OURS: Lanenorm,
    COPY: Copy,
    "torch": Torch,
    "torch.compile": TorchCompiled,
    "triton": Triton,
    "liger": Liger,
    "quack": Quack,
    "cupy": Composed,
    "cupy.fuse": Fused,
}


def installed() -> list[str]:
    """Names of the peers that can be used here, lanenorm first."""
    return [name for name, peer in PEERS.items() if all(importlib.util.find_spec(module) for module in peer.needs)]
