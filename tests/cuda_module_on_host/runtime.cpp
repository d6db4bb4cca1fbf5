// A CUDA runtime that only writes down what it is asked, and operations in place of the kernels that move elements
// where the Plan says: what the module lanenorm._cuda and cuda/launch.cu do around them is what is tested. Python
// reaches the extern "C" functions by ctypes.
#include <Python.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda/launch.hpp"
#include "cuda/norms.hpp"
#include "cuda_runtime_api.h"

namespace {

std::string written;
// What the test has set. driver: what cudaDriverGetVersion gives; devices: how many there are; workspace: bytes an
// operation asks for; not 0 where so: capturing, exhausted (cudaMallocAsync finds no memory), lost (cudaFreeAsync
// refuses), fail (no kernel image); shared: bytes of shared memory of a launch
std::map<std::string, std::int64_t> settings;

std::int64_t setting(const char* name) { return settings[name]; }

void note(const std::string& line) { written += line + "\n"; }

std::string text(const void* pointer) { return std::to_string(reinterpret_cast<std::uintptr_t>(pointer)); }

// Element by element along two layouts of the Plan.
template <class F>
void for_each_element(const lanenorm::Layout& from, const lanenorm::Layout& to, F&& f) {
  for (std::int64_t line = 0; line < from.lines.count; ++line) {
    const std::int64_t a = lanenorm::offset(from.lines, line), b = lanenorm::offset(to.lines, line);
    for (std::int64_t i = 0; i < from.inner.count; ++i) {
      f(a + lanenorm::offset(from.inner, i), b + lanenorm::offset(to.inner, i));
    }
  }
}

// mean and rstd, dweight and dbias: their own index in the order of the Plan, plus start.
void number(const lanenorm::Vector& vector, lanenorm::DType dtype, double start) {
  if (vector.data == nullptr) return;
  for (std::int64_t i = 0; i < vector.loop.count; ++i) {
    void* to = static_cast<char*>(vector.data) + lanenorm::offset(vector.loop, i);
    if (dtype == lanenorm::DType::float64) *static_cast<double*>(to) = start + static_cast<double>(i);
    if (dtype == lanenorm::DType::float32)
      *static_cast<float*>(to) = static_cast<float>(start + static_cast<double>(i));
  }
}

void kernel(double /*parameter*/) {}  // never runs

void pretend(const char* name, const lanenorm::Args& args, const lanenorm::cuda::Context& context) {
  if (const std::int64_t bytes = setting("workspace"); bytes > 0) {
    std::memset(context.allocate(context.state, static_cast<std::size_t>(bytes)), 0xff,
                static_cast<std::size_t>(bytes));
  }
  note(std::string("launch ") + name + " device " + std::to_string(context.device) + " stream " + text(context.stream) +
       (PyGILState_Check() != 0 ? " with the GIL" : ""));
  lanenorm::cuda::launch(kernel, {1, 32, 1, static_cast<std::size_t>(setting("shared"))}, context.stream, 1.0);
  const bool backward = args.dy != nullptr;
  const char* from = static_cast<const char*>(backward ? args.dy : args.x);
  const auto bytes = static_cast<std::size_t>(lanenorm::size(args.dtype));
  for_each_element(backward ? args.plan.dy : args.plan.x, args.plan.y, [&](std::int64_t a, std::int64_t b) {
    std::memcpy(static_cast<char*>(args.y) + b, from + a, bytes);
  });
  if (backward) {
    number(args.dweight, args.parameter_dtype, 0.0);
    number(args.dbias, args.parameter_dtype, 0.5);
  } else {
    number(args.mean, lanenorm::statistics_dtype(args.dtype), 0.0);
    number(args.rstd, lanenorm::statistics_dtype(args.dtype), 0.5);
    if (args.mean.data != nullptr) {  // or else they are the inputs of an inference
      number(args.running_mean, lanenorm::statistics_dtype(args.dtype), 100.0);
      number(args.running_var, lanenorm::statistics_dtype(args.dtype), 100.5);
    }
  }
}

}  // namespace

namespace lanenorm::cuda {
void layer_norm_forward(const Args& args, const Context& context) { pretend("layer_norm_forward", args, context); }
void layer_norm_backward(const Args& args, const Context& context) { pretend("layer_norm_backward", args, context); }
void batch_norm_inference(const Args& args, const Context& context) { pretend("batch_norm_inference", args, context); }
void batch_norm_forward(const Args& args, const Context& context) { pretend("batch_norm_forward", args, context); }
void batch_norm_backward(const Args& args, const Context& context) { pretend("batch_norm_backward", args, context); }
}  // namespace lanenorm::cuda

cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(setting("driver"));
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(setting("devices"));
  return *count == 0 ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = static_cast<int>(setting("current"));
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  settings["current"] = device;
  note("cudaSetDevice " + std::to_string(device));
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    default: return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "a text"; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  note("cudaStreamIsCapturing " + text(stream));
  *status = setting("capturing") != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t stream) {
  note("cudaMallocAsync " + std::to_string(bytes) + " stream " + text(stream));
  if (setting("exhausted") != 0) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  note("cudaFreeAsync stream " + text(stream));
  std::free(memory);
  return setting("lost") != 0 ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  note("cudaFuncSetAttribute " + std::to_string(value) + " bytes of shared memory");
  return value > 227 * 1024 ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  if (setting("fail") != 0) return cudaErrorNoKernelImageForDevice;
  const bool as_sent = config->gridDim.x == 1 && config->blockDim.x == 32 && config->numAttrs == 0 &&
                       *static_cast<double*>(arguments[0]) == 1.0;
  return as_sent ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" {
void fake_set(const char* name, std::int64_t value) { settings[name] = value; }
void fake_note(const char* line) { note(line); }
// What has been written down since the last time; valid until the next call.
const char* fake_log() {
  static std::string taken;
  taken = std::move(written);
  written.clear();
  return taken.c_str();
}
}
