// The operations on a checked Args (core/check.hpp): what python/ext binds. Arrays named in Args are read and
// written on the calling thread and the pool's; Interrupted and std::bad_alloc may leave `y` undefined, running
// statistics are written last and so untouched.
#pragma once

#include "core/args.hpp"

namespace lanenorm {

// y, and mean, rstd where they are attached.
void layer_norm_forward(const Args& args);
// dx, and dweight, dbias where they are attached.
void layer_norm_backward(const Args& args);

// y from running_mean and running_var.
void batch_norm_inference(const Args& args);
// y, mean, rstd; running statistics updated where they are given.
void batch_norm_forward(const Args& args);
void batch_norm_backward(const Args& args);

}  // namespace lanenorm
