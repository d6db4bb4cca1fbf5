// Batch and layer normalization, forward and backward, on NVIDIA GPUs: the C++ interface.
//
// The operations of <lanenorm/lanenorm.hpp>, which says what arguments are and what is refused, on arrays whose memory
// the device can reach (cudaMalloc, cudaMallocManaged, ...). They queue their work on a stream and wait for nothing;
// a stream that is being captured into a graph will do. Memory of arrays has to stay until the stream has come past
// the call. Of CUDA's headers none is needed here.
//
// Errors       as there, before anything is queued; and std::runtime_error that names operation, call and CUDA's error
//              where CUDA refuses something. What the operation would have written is undefined then.
// Threads      Functions may be called from several threads at once. After fork(), CUDA works in one process only.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>

#include "lanenorm/lanenorm.hpp"

struct CUstream_st;  // what a cudaStream_t and a CUstream point to

namespace lanenorm::cuda {

inline constexpr int kCurrentDevice = -1;

// Where a call queues its work.
struct Queue {
  CUstream_st* stream = nullptr;  // of `device`; null: its default stream
  int device = kCurrentDevice;    // where the arrays are; current during the call, and again afterwards what was before
  // Memory on that device for the length of a call, aligned to 256 bytes; may throw. It is asked for any number of
  // times; all of it is in use until the stream has come past the call, and whoever gave it frees it. Null:
  // cudaMallocAsync and cudaFreeAsync on the stream.
  std::function<void*(std::size_t bytes)> workspace = nullptr;
};

void layer_norm(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                const std::optional<ArrayView>& bias, const ArrayView& out, const LayerNormOptions& options = {});

void layer_norm_forward(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const LayerNormOptions& options = {});

void layer_norm_backward(const Queue& queue, const ArrayView& dy, const ArrayView& x, const ArrayView& mean,
                         const ArrayView& rstd, const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const LayerNormOptions& options = {});

void batch_norm(const Queue& queue, const ArrayView& x, const ArrayView& running_mean, const ArrayView& running_var,
                const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias, const ArrayView& out,
                const BatchNormOptions& options = {});

void batch_norm_forward(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const std::optional<ArrayView>& running_mean,
                        const std::optional<ArrayView>& running_var, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const BatchNormOptions& options = {});

void batch_norm_backward(const Queue& queue, const ArrayView& dy, const ArrayView& x, const ArrayView& mean,
                         const ArrayView& rstd, const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const BatchNormOptions& options = {});

// Why no kernel can run here (no driver, an old one, no device); nothing where they can. Initializes CUDA, which no
// forked child can use then.
std::optional<std::string> unavailable_reason();

}  // namespace lanenorm::cuda
