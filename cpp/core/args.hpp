// Args: one checked operation, ready for a driver. check.cpp builds it from Views; drivers trust it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/plan.hpp"

namespace lanenorm {

// A parameter or statistic array in the order in which the Plan counts it, with its own strides.
struct Vector {
  void* data;  // null: not given
  Loop loop;
};

struct Args {
  Plan plan;
  DType dtype;            // of x, y, dy, dx
  DType parameter_dtype;  // of weight, bias, dweight, dbias
  const void* x;
  const void* dy;  // backward
  void* y;         // y, or dx in a backward
  Vector weight, bias;
  Vector mean, rstd;      // written by a forward, read by a backward
  Vector dweight, dbias;  // backward; null: not wanted
  Vector running_mean, running_var;
  double eps, momentum;
  bool training;  // BN backward: mean and rstd belong to this x
  // What a caller needs to allocate the outputs.
  bool reduced[kMaxAxes];
  std::int64_t y_strides[kMaxAxes];  // of np.empty_like(x)
};
static_assert(std::is_trivial_v<Args> && std::is_standard_layout_v<Args>);

}  // namespace lanenorm
