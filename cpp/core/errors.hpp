// Every text that refuses a call, one function each: operation, argument, what it was, what was expected.
// (Which kind of array an argument is, is Python's matter: python/lanenorm/_arrays.py.)
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/view.hpp"

namespace lanenorm {

// TypeError, ValueError and numpy.exceptions.AxisError in Python.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct AxisError : std::out_of_range {
  AxisError(const std::string& text, std::int64_t axis, int axes) : std::out_of_range(text), axis(axis), axes(axes) {}
  std::int64_t axis;
  int axes;
};
// A call of the CUDA runtime failed. Thrown where the call is made, without the operation: who runs one puts its name
// in front (cuda/runtime.hpp).
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace errors {

inline std::string tuple(const std::int64_t* values, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text + (count == 1 ? ",)" : ")");
}

inline std::string shape(const View& view) { return tuple(view.shape, view.axes); }

// "axis -1 of x (2, 8)": the axes as the caller wrote them
inline std::string axis_of(const std::int64_t* axes, int count, const View& x) {
  return "axis " + (count == 1 ? std::to_string(axes[0]) : tuple(axes, count)) + " of x " + shape(x);
}

inline std::string start(const char* operation, const char* argument) {
  return std::string(operation) + ": " + argument + " ";
}

inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// ---- dtype

[[noreturn]] inline void unsupported_dtype(const char* operation, const char* argument, const std::string& got) {
  throw TypeError(start(operation, argument) + "has dtype " + got +
                  ", expected float16, bfloat16, float32 or float64 in native byte order");
}

// `expected` may name two dtypes; the hint names the first.
[[noreturn]] inline void wrong_dtype(const char* operation, const char* argument, DType got, DType expected,
                                     const char* why, bool or_float32 = false) {
  std::string names = name(expected);
  if (or_float32) names += " or float32";
  const std::string module = expected == DType::bfloat16 ? "ml_dtypes." : "numpy.";
  throw TypeError(start(operation, argument) + "has dtype " + name(got) + ", expected " + names + ", " + why +
                  "; use " + argument + ".astype(" + module + name(expected) + ")");
}

// ---- shape and axis

// why: "axis -1 of x (2, 8)"
[[noreturn]] inline void wrong_shape(const char* operation, const char* argument, const View& got,
                                     const std::int64_t* expected, int axes, const std::string& why) {
  throw ValueError(start(operation, argument) + "has shape " + shape(got) + ", expected " + tuple(expected, axes) +
                   ", " + why);
}

[[noreturn]] inline void axis_out_of_range(const char* operation, const char* argument, std::int64_t axis,
                                           const View& x) {
  throw AxisError(start(operation, argument) + std::to_string(axis) + " is out of bounds for x of " +
                      std::to_string(x.axes) + " axes, shape " + shape(x),
                  axis, x.axes);
}

[[noreturn]] inline void repeated_axis(const char* operation, const std::int64_t* axes, int count, std::int64_t axis) {
  throw ValueError(start(operation, "axis") + tuple(axes, count) + " names axis " + std::to_string(axis) +
                   " twice, expected different axes");
}

[[noreturn]] inline void no_axis(const char* operation) {
  throw ValueError(start(operation, "axis") + "is an empty tuple, expected at least one axis");
}

[[noreturn]] inline void wrong_kind(const char* operation, const char* argument, const std::string& got,
                                    const char* expected) {
  throw TypeError(start(operation, argument) + "has type " + got + ", expected " + expected);
}

// ---- numbers

[[noreturn]] inline void bad_eps(const char* operation, double eps) {
  throw ValueError(start(operation, "eps") + "is " + number(eps) + ", expected a finite number >= 0");
}

[[noreturn]] inline void bad_momentum(const char* operation, double momentum) {
  throw ValueError(start(operation, "momentum") + "is " + number(momentum) + ", expected a number in [0, 1]");
}

[[noreturn]] inline void no_momentum(const char* operation) {
  throw TypeError(start(operation, "momentum") +
                  "is None, expected a number in [0, 1]; the cumulative average (momentum=None) belongs to the "
                  "BatchNorm layer, which counts batches");
}

// ---- arrays that are written

[[noreturn]] inline void read_only(const char* operation, const char* argument) {
  throw ValueError(start(operation, argument) + "is read-only, expected an array that can be written");
}

[[noreturn]] inline void wrong_layout(const char* operation, const View& out, const std::int64_t* expected) {
  throw ValueError(start(operation, "out") + "has strides " + tuple(out.strides, out.axes) + ", expected " +
                   tuple(expected, out.axes) + ", the layout of numpy.empty_like(x)");
}

[[noreturn]] inline void not_contiguous(const char* operation, const char* argument, const View& got) {
  throw ValueError(start(operation, argument) + "has strides " + tuple(got.strides, got.axes) +
                   ", expected a contiguous, aligned array, since it is updated in place");
}

[[noreturn]] inline void overlap(const char* operation, const char* argument, const char* other) {
  throw ValueError(start(operation, argument) + "shares memory with " + other + ", expected memory of its own");
}

// ---- running statistics

[[noreturn]] inline void one_running_statistic(const char* operation, const char* given, const char* missing) {
  throw ValueError(start(operation, given) + "is given without " + missing + ", expected both or neither");
}

[[noreturn]] inline void one_value_per_channel(const char* operation, const View& x, int channel_axis) {
  throw ValueError(start(operation, "x") + "has shape " + shape(x) + ", one value per channel (axis " +
                   std::to_string(channel_axis) + "), expected more: the statistics of one value say nothing");
}

// ---- CUDA: std::runtime_error, RuntimeError in Python

// call: the function of the CUDA runtime; error: the name of what it returned, text: what CUDA says about it
inline CudaError cuda_error(const char* call, const std::string& error, const char* text) {
  std::string hint;
  if (error == "cudaErrorNoKernelImageForDevice") {
    hint = "; build lanenorm for this GPU: LANENORM_CUDA_ARCHITECTURES, see README";
  } else if (error == "cudaErrorMemoryAllocation") {
    hint = "; free memory, also that of pools (CuPy's: cupy.get_default_memory_pool().free_all_blocks())";
  }
  return CudaError(std::string(call) + " failed: " + error + " (" + text + ")" + hint);
}
[[noreturn]] inline void cuda_failed(const char* operation, const CudaError& error) {
  throw std::runtime_error(std::string(operation) + ": " + error.what());
}

// text: what the allocator said
[[noreturn]] inline void out_of_device_memory(const char* operation, std::int64_t bytes, int device,
                                              const std::string& text) {
  throw std::runtime_error(std::string(operation) + ": cupy.cuda.alloc failed for " + std::to_string(bytes) +
                           " bytes on CUDA device " + std::to_string(device) + ": " + text +
                           "; free memory, also that of CuPy's pool: cupy.get_default_memory_pool().free_all_blocks()");
}

// Why there is no CUDA here. CUDA writes its version 13.0 as 13000; r580 is the driver of CUDA 13.
inline std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
inline std::string no_driver() {
  return "there is no NVIDIA driver (cudaDriverGetVersion gives 0); install one for CUDA 13, r580 or newer";
}
inline std::string old_driver(int version, int needed) {
  return "the NVIDIA driver is too old: it supports CUDA up to " + cuda_version(version) +
         " (cudaDriverGetVersion), lanenorm needs " + cuda_version(needed) + "; upgrade to driver r580 or newer";
}
inline std::string no_device(const char* error, const char* text) {
  return std::string("cudaGetDeviceCount failed: ") + error + " (" + text +
         "); check nvidia-smi and CUDA_VISIBLE_DEVICES";
}

}  // namespace errors
}  // namespace lanenorm
