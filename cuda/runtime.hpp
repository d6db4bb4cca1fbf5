// What callers of the operations need of the CUDA runtime: the Python module and the C++ interface (api.cpp). Errors
// name the operation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "cuda/norms.hpp"

namespace lanenorm::cuda {

// Throws std::runtime_error where `call` of the runtime has failed.
void check(const char* operation, const char* call, cudaError_t error);

// As lanenorm/cuda.hpp has it.
std::optional<std::string> unavailable_reason();

// Launches one of norms.hpp. `operation` is what the user called it.
void run(const char* operation, void (*kernels)(const Args&, const Context&), const Args& args, const Context& context);

// Workspace in the order of a stream. Where that is being captured, nodes of the graph allocate and free it.
class StreamMemory {
 public:
  StreamMemory(const char* operation, cudaStream_t stream) : operation_(operation), stream_(stream) {}
  ~StreamMemory();
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;

  void* allocate(std::size_t bytes);
  // After the last launch.
  void release();

 private:
  const char* operation_;
  cudaStream_t stream_;
  std::vector<void*> blocks_;
};

}  // namespace lanenorm::cuda
