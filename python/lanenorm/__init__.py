"""Batch and layer normalization for NumPy arrays, layer normalization for CuPy arrays, forward and backward.

The operations are functions of arrays (`layer_norm`, `batch_norm` and their `_forward` and `_backward`); `LayerNorm`
and `BatchNorm` are layers that keep parameters and running statistics. Names are PyTorch's, array behaviour is
NumPy's.
"""

from lanenorm import _cpu
from lanenorm._runtime import (
    MemoryPool,
    available_isas,
    cuda_available,
    cuda_unavailable_reason,
    get_default_memory_pool,
    get_num_threads,
    num_threads,
    register_with_threadpoolctl,
    set_num_threads,
    show_runtime,
    use_isa,
)
from lanenorm.functional import (
    NormBackward,
    NormForward,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
)
from lanenorm.layers import BatchNorm, LayerNorm

__all__ = [
    "BatchNorm",
    "LayerNorm",
    "MemoryPool",
    "NormBackward",
    "NormForward",
    "__version__",
    "available_isas",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "cuda_available",
    "cuda_unavailable_reason",
    "get_default_memory_pool",
    "get_num_threads",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "num_threads",
    "set_num_threads",
    "show_runtime",
    "use_isa",
]

__version__: str = _cpu.build_info()["version"]

register_with_threadpoolctl()
del register_with_threadpoolctl
