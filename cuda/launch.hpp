// Launching a kernel, and what is asked of the device beforehand. With LANENORM_ON_HOST the tests' emulator is the
// device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "cuda/choose.hpp"

#ifdef LANENORM_ON_HOST
#include "cuda_on_host/emulator.hpp"
#endif

namespace lanenorm::cuda {

struct Config {
  std::int64_t blocks;
  int threads;
  int cluster = 1;               // blocks
  std::size_t shared_bytes = 0;  // a block
};

// Of the current device, asked once.
DeviceLimits device_limits(int device);

#ifdef LANENORM_ON_HOST

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Config& config, void* /*stream*/, Arguments&&... arguments) {
  on_host::launch(kernel, {config.blocks, config.threads, config.cluster, config.shared_bytes},
                  std::forward<Arguments>(arguments)...);
}

// Whether one cluster of this kernel can run on the device at all.
template <class Kernel>
bool fits(Kernel /*kernel*/, const Config& config, int device) {
  const DeviceLimits limits = device_limits(device);
  return config.cluster <= limits.max_cluster &&
         config.shared_bytes <= static_cast<std::size_t>(limits.shared_per_block);
}

#else

// Throws CudaError that names the call and CUDA's error.
#define LANENORM_CUDA_CHECK(call) ::lanenorm::cuda::check_cuda(#call, static_cast<int>(call))
void check_cuda(const char* call, int error);

void launch_kernel(const void* kernel, const Config& config, void* stream, void** arguments);
bool kernel_fits(const void* kernel, const Config& config, int device);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Config& config, void* stream, Arguments&&... arguments) {
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... parameter) {
        void* pointers[] = {&parameter...};
        launch_kernel(reinterpret_cast<const void*>(kernel), config, stream, pointers);
      },
      parameters);
}

// Whether one cluster of this kernel can run on the device at all. Asked of the driver once per configuration.
template <class Kernel>
bool fits(Kernel kernel, const Config& config, int device) {
  return kernel_fits(reinterpret_cast<const void*>(kernel), config, device);
}

#endif

}  // namespace lanenorm::cuda
