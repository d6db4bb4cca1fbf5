// A borrowed array: what NumPy, CuPy and C++ callers hand in. Nothing is owned, nothing is copied.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"

namespace lanenorm {

// NumPy 2 arrays have at most 64 axes.
inline constexpr int kMaxAxes = 64;

struct View {
  void* data;  // element [0, 0, ...]; may be unaligned; may be null where the array is empty
  DType dtype;
  int axes;
  const std::int64_t* shape;    // (axes)
  const std::int64_t* strides;  // (axes), in bytes; zero and negative strides are lawful for inputs
  bool writable;
};
static_assert(std::is_trivial_v<View> && std::is_standard_layout_v<View>);

}  // namespace lanenorm
