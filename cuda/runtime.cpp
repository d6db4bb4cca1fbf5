#include "cuda/runtime.hpp"

#include "core/errors.hpp"

namespace lanenorm::cuda {

void check(const char* operation, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of somebody else reports it again
  errors::cuda_failed(operation, errors::cuda_error(call, cudaGetErrorName(error), cudaGetErrorString(error)));
}

std::optional<std::string> unavailable_reason() {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return errors::no_driver();
  if (error == cudaSuccess && driver / 1000 < CUDART_VERSION / 1000) {
    return errors::old_driver(driver, CUDART_VERSION / 1000 * 1000);
  }
  int devices = 0;
  if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();
  return errors::no_device(cudaGetErrorName(error), cudaGetErrorString(error));
}

void run(const char* operation, void (*kernels)(const Args&, const Context&), const Args& args,
         const Context& context) {
  try {
    kernels(args, context);
  } catch (const CudaError& failure) {
    errors::cuda_failed(operation, failure);
  }
}

StreamMemory::~StreamMemory() {
  for (void* block : blocks_) cudaFreeAsync(block, stream_);  // only where an exception passes
}

void* StreamMemory::allocate(std::size_t bytes) {
  void* block = nullptr;
  check(operation_, "cudaMallocAsync", cudaMallocAsync(&block, bytes, stream_));
  blocks_.push_back(block);
  return block;
}

void StreamMemory::release() {
  while (!blocks_.empty()) {
    void* block = blocks_.back();
    blocks_.pop_back();
    check(operation_, "cudaFreeAsync", cudaFreeAsync(block, stream_));
  }
}

}  // namespace lanenorm::cuda
