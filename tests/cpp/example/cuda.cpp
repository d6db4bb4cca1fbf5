#include <cuda_runtime_api.h>

#include <cstdio>
#include <lanenorm/cuda.hpp>

float* managed(std::size_t count) {
  void* memory = nullptr;
  cudaMallocManaged(&memory, count * sizeof(float), cudaMemAttachGlobal);
  return static_cast<float*>(memory);
}

int main() {
  if (const auto reason = lanenorm::cuda::unavailable_reason()) {
    std::printf("%s\n", reason->c_str());
    return 0;
  }
  float *x = managed(2 * 8), *y = managed(2 * 8), *mean = managed(2), *rstd = managed(2);
  for (int i = 0; i < 2 * 8; ++i) x[i] = i % 2 == 0 ? 1e6f : 1e6f + 2;
  const lanenorm::cuda::Queue queue;  // the default stream of the current device
  lanenorm::cuda::layer_norm_forward(queue, {x, {2, 8}}, {}, {}, {y, {2, 8}}, {mean, {2, 1}}, {rstd, {2, 1}});
  cudaStreamSynchronize(queue.stream);
  std::printf("mean %g, y %g %g ...\n", mean[0], y[0], y[1]);
}
