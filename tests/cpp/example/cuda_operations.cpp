// Every operation on the GPU (operations.hpp), with workspace of the library and of the caller; what the caller is
// asked for; and what refused and failed calls say, `error text`.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <lanenorm/cuda.hpp>
#include <stdexcept>
#include <vector>

#include "operations.hpp"

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("failed %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void* managed(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal));
  return memory;
}

// Memory lent to calls, freed when the device has come past them.
class Lender {
 public:
  void* lend(std::size_t bytes) {
    blocks_.push_back(managed(bytes));
    return blocks_.back();
  }
  std::size_t count() const { return blocks_.size(); }
  void take_back() {
    check(cudaDeviceSynchronize());
    for (void* block : blocks_) check(cudaFree(block));
    blocks_.clear();
  }

 private:
  std::vector<void*> blocks_;
};

Lender lender;
bool lending = false;

struct Gpu {
  static void* allocate(std::size_t bytes) { return managed(bytes); }
  static void free(void* memory) { check(cudaFree(memory)); }
  static void wait() { check(cudaDeviceSynchronize()); }
  static lanenorm::cuda::Queue queue() {
    lanenorm::cuda::Queue queue;
    if (lending) queue.workspace = [](std::size_t bytes) { return lender.lend(bytes); };
    return queue;
  }
  template <class... A>
  static void layer_norm(const A&... arguments) {
    lanenorm::cuda::layer_norm(queue(), arguments...);
  }
  template <class... A>
  static void layer_norm_forward(const A&... arguments) {
    lanenorm::cuda::layer_norm_forward(queue(), arguments...);
  }
  template <class... A>
  static void layer_norm_backward(const A&... arguments) {
    lanenorm::cuda::layer_norm_backward(queue(), arguments...);
  }
  template <class... A>
  static void batch_norm(const A&... arguments) {
    lanenorm::cuda::batch_norm(queue(), arguments...);
  }
  template <class... A>
  static void batch_norm_forward(const A&... arguments) {
    lanenorm::cuda::batch_norm_forward(queue(), arguments...);
  }
  template <class... A>
  static void batch_norm_backward(const A&... arguments) {
    lanenorm::cuda::batch_norm_backward(queue(), arguments...);
  }
};

template <class Call>
void failed(Call call) {
  try {
    call();
    std::printf("error none\n");
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
  }
}

void failures() {
  Memory<Gpu> x(DType::float32, {2, 8}), y(DType::float32, {2, 8}), five(DType::float32, {5});
  failed([&] { Gpu::layer_norm(x.view(), five.view(), std::nullopt, y.view()); });
  failed([&] { lanenorm::cuda::layer_norm({nullptr, 99}, x.view(), {}, {}, y.view()); });
  // a row that no kernel can read where it lies, and no memory for its copy
  const ArrayView reversed(static_cast<char*>(x.data.get()) + 28, DType::float32, {2, 8}, {32, -4});
  lanenorm::cuda::Queue queue;
  queue.workspace = [](std::size_t /*bytes*/) -> void* { throw std::runtime_error("nothing left to lend"); };
  failed([&] { lanenorm::cuda::layer_norm(queue, reversed, {}, {}, y.view()); });
  int device = -1;
  check(cudaGetDevice(&device));
  std::printf("device %d\n", device);
}

}  // namespace

int main() {
  if (const auto reason = lanenorm::cuda::unavailable_reason()) {
    std::printf("unavailable %s\n", reason->c_str());
    return 0;
  }
  for (const bool from_caller : {false, true}) {
    lending = from_caller;
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      layer_norms<Gpu>(dtype);
      batch_norms<Gpu>(dtype);
    }
  }
  std::printf("lent %d\n", lender.count() > 0);
  lender.take_back();
  failures();
}
