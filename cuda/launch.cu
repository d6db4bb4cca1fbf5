// See launch.hpp.
#include "cuda/launch.hpp"

#ifdef LANENORM_ON_HOST

namespace lanenorm::cuda {

DeviceLimits device_limits(int /*device*/) {
  const on_host::Device d = on_host::device_limits();
  return {d.multiprocessors, d.shared_per_block, d.shared_per_multiprocessor,
          d.architecture,    d.max_cluster,      d.l2_bytes};
}

}  // namespace lanenorm::cuda

#else

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "core/errors.hpp"

namespace lanenorm::cuda {
namespace {

// Shared memory that a kernel may use without being asked for it, and clusters that every device with clusters takes.
constexpr std::size_t kSharedWithoutAsking = 48 * 1024;
constexpr int kPortableCluster = 8;
constexpr int kLeastL2Bytes = 4 << 20;  // of the smallest devices; a virtual one may say 0

std::mutex mutex;  // guards the three maps

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  LANENORM_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Attributes belong to the kernel on one device; they only ever grow.
void prepare(const void* kernel, const Config& config, int device) {
  if (config.shared_bytes <= kSharedWithoutAsking && config.cluster <= kPortableCluster) return;
  static std::map<std::pair<const void*, int>, std::size_t> prepared;  // bytes
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, first] = prepared.try_emplace({kernel, device}, 0);
  if (first && attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {
    LANENORM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  if (config.shared_bytes <= place->second) return;
  LANENORM_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared_bytes)));
  place->second = config.shared_bytes;
}

cudaLaunchConfig_t launch_config(const Config& config, void* stream, cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.blocks));
  launch.blockDim = dim3(static_cast<unsigned>(config.threads));
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  if (config.cluster > 1) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = static_cast<unsigned>(config.cluster);
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    launch.attrs = cluster;
    launch.numAttrs = 1;
  }
  return launch;
}

}  // namespace

void check_cuda(const char* call, int error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of somebody else reports it again
  const auto code = static_cast<cudaError_t>(error);
  std::string name = call;  // "cudaLaunchKernelExC(&launch, ...)" without the arguments
  name.resize(name.find('('));
  throw errors::cuda_error(name.c_str(), cudaGetErrorName(code), cudaGetErrorString(code));
}

DeviceLimits device_limits(int device) {
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits{};
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.architecture =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  // Clusters of 16 are what the largest parts take; kernel_fits asks before each kind is used.
  limits.max_cluster = attribute(cudaDevAttrClusterLaunch, device) != 0 ? 16 : 1;
  limits.l2_bytes = std::max(attribute(cudaDevAttrL2CacheSize, device), kLeastL2Bytes);
  known[device] = limits;
  return limits;
}

void launch_kernel(const void* kernel, const Config& config, void* stream, void** arguments) {
  int device = 0;
  LANENORM_CUDA_CHECK(cudaGetDevice(&device));
  prepare(kernel, config, device);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t launch = launch_config(config, stream, &cluster);
  LANENORM_CUDA_CHECK(cudaLaunchKernelExC(&launch, kernel, arguments));
}

bool kernel_fits(const void* kernel, const Config& config, int device) {
  if (config.cluster <= 1) return true;
  static std::map<std::tuple<const void*, int, int, std::size_t>, bool> known;
  const std::tuple key(kernel, device, config.cluster, config.shared_bytes);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  // Compiled by the driver from older PTX, a kernel knows nothing of clusters on a device that has them.
  cudaFuncAttributes attributes;
  LANENORM_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  int clusters = 0;
  cudaError_t error = cudaSuccess;
  if (attributes.ptxVersion >= 90) {
    prepare(kernel, config, device);
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t launch = launch_config(config, nullptr, &cluster);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch);
    if (error != cudaSuccess) cudaGetLastError();  // a size that this device does not know
  }
  const std::lock_guard<std::mutex> lock(mutex);
  return known[key] = error == cudaSuccess && clusters > 0;
}

}  // namespace lanenorm::cuda

#endif
