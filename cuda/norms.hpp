// The operations on the GPU, as cpp/cpu/norms.hpp has them. Arrays of Args are device pointers. Everything is launched
// on the caller's stream, nothing waits for it.
#pragma once

#include "core/args.hpp"
#include "cuda/kernels.hpp"

namespace lanenorm::cuda {

void layer_norm_forward(const Args& args, const Context& context);
void layer_norm_backward(const Args& args, const Context& context);
void batch_norm_inference(const Args& args, const Context& context);
void batch_norm_forward(const Args& args, const Context& context);
void batch_norm_backward(const Args& args, const Context& context);

}  // namespace lanenorm::cuda
