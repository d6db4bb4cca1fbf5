// Checks a call and builds its Args: every precondition, in argument order, before any output is touched.
// Throws TypeError, ValueError or AxisError with a text from errors.hpp.
//
// Afterwards the caller allocates what `out` did not bring (Args.y_strides, Args.reduced say how), sets Args.y, and
// names the other arrays with attach_statistics / attach_parameters.
#pragma once

#include "core/args.hpp"

namespace lanenorm {

// axes as the caller wrote them, negative ones allowed.
struct AxisList {
  const std::int64_t* axis;
  int count;
};

// Pointers to Views that are null were not given.
void check_layer_norm_forward(const char* operation, const View& x, const View* weight, const View* bias, AxisList axes,
                              double eps, const View* out, Args* args);
void check_layer_norm_backward(const char* operation, const View& dy, const View& x, const View& mean, const View& rstd,
                               const View* weight, AxisList axes, const View* out, Args* args);
void check_batch_norm_inference(const char* operation, const View& x, const View& running_mean, const View& running_var,
                                const View* weight, const View* bias, std::int64_t channel_axis, double eps,
                                const View* out, Args* args);
void check_batch_norm_forward(const char* operation, const View& x, const View* weight, const View* bias,
                              const View* running_mean, const View* running_var, double momentum,
                              std::int64_t channel_axis, double eps, const View* out, Args* args);
void check_batch_norm_backward(const char* operation, const View& dy, const View& x, const View& mean, const View& rstd,
                               const View* weight, std::int64_t channel_axis, bool training, const View* out,
                               Args* args);

// Whether the address ranges that two arrays touch have an address in common.
bool overlap(const View& a, const View& b);

// Statistic arrays: (C,) for BN, the shape of x with the reduced axes 1 for LN.
void attach_statistics(const View& x, const View& mean, const View& rstd, Args* args);
// Parameter gradients: the shape of weight.
void attach_parameters(const View& x, const View& dweight, const View& dbias, Args* args);

}  // namespace lanenorm
