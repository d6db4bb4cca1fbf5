// The operations of the public C++ interface on a GPU (lanenorm/cuda.hpp).
#include "lanenorm/cuda.hpp"

#include "core/interface.hpp"
#include "cuda/runtime.hpp"

namespace lanenorm::cuda {
namespace {

// Makes a device current for as long as it lives.
class CurrentDevice {
 public:
  CurrentDevice(const char* operation, int wanted) {
    check(operation, "cudaGetDevice", cudaGetDevice(&before_));
    device_ = wanted == kCurrentDevice ? before_ : wanted;
    if (device_ != before_) check(operation, "cudaSetDevice", cudaSetDevice(device_));
  }
  ~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);  // it was current before: this cannot fail
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  int device() const { return device_; }

 private:
  int before_ = 0, device_ = 0;
};

void launch(const char* operation, void (*kernels)(const Args&, const Context&), const Queue& queue, const Args& args) {
  const CurrentDevice current(operation, queue.device);
  if (queue.workspace) {
    const Queue* state = &queue;
    const auto allocate = [](void* given, std::size_t bytes) {
      return (*static_cast<const Queue**>(given))->workspace(bytes);
    };
    run(operation, kernels, args, {current.device(), queue.stream, allocate, &state});
    return;
  }
  StreamMemory memory(operation, queue.stream);
  const auto allocate = [](void* given, std::size_t bytes) {
    return static_cast<StreamMemory*>(given)->allocate(bytes);
  };
  run(operation, kernels, args, {current.device(), queue.stream, allocate, &memory});
  memory.release();
}

}  // namespace

void layer_norm(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                const std::optional<ArrayView>& bias, const ArrayView& out, const LayerNormOptions& options) {
  launch("layer_norm", layer_norm_forward, queue, args_of::layer_norm(x, weight, bias, out, options));
}

void layer_norm_forward(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const LayerNormOptions& options) {
  launch("layer_norm_forward", layer_norm_forward, queue,
         args_of::layer_norm_forward(x, weight, bias, out, mean, rstd, options));
}

void layer_norm_backward(const Queue& queue, const ArrayView& dy, const ArrayView& x, const ArrayView& mean,
                         const ArrayView& rstd, const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const LayerNormOptions& options) {
  launch("layer_norm_backward", layer_norm_backward, queue,
         args_of::layer_norm_backward(dy, x, mean, rstd, weight, out, dweight, dbias, options));
}

void batch_norm(const Queue& queue, const ArrayView& x, const ArrayView& running_mean, const ArrayView& running_var,
                const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias, const ArrayView& out,
                const BatchNormOptions& options) {
  launch("batch_norm", batch_norm_inference, queue,
         args_of::batch_norm(x, running_mean, running_var, weight, bias, out, options));
}

void batch_norm_forward(const Queue& queue, const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const std::optional<ArrayView>& running_mean,
                        const std::optional<ArrayView>& running_var, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const BatchNormOptions& options) {
  launch("batch_norm_forward", batch_norm_forward, queue,
         args_of::batch_norm_forward(x, weight, bias, running_mean, running_var, out, mean, rstd, options));
}

void batch_norm_backward(const Queue& queue, const ArrayView& dy, const ArrayView& x, const ArrayView& mean,
                         const ArrayView& rstd, const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const BatchNormOptions& options) {
  launch("batch_norm_backward", batch_norm_backward, queue,
         args_of::batch_norm_backward(dy, x, mean, rstd, weight, out, dweight, dbias, options));
}

}  // namespace lanenorm::cuda
