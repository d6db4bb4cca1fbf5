// The operations of the public C++ interface (lanenorm/lanenorm.hpp).
#include "core/interface.hpp"
#include "cpu/norms.hpp"

namespace lanenorm {

void layer_norm(const ArrayView& x, const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias,
                const ArrayView& out, const LayerNormOptions& options) {
  layer_norm_forward(args_of::layer_norm(x, weight, bias, out, options));
}

void layer_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const LayerNormOptions& options) {
  layer_norm_forward(args_of::layer_norm_forward(x, weight, bias, out, mean, rstd, options));
}

void layer_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const LayerNormOptions& options) {
  layer_norm_backward(args_of::layer_norm_backward(dy, x, mean, rstd, weight, out, dweight, dbias, options));
}

void batch_norm(const ArrayView& x, const ArrayView& running_mean, const ArrayView& running_var,
                const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias, const ArrayView& out,
                const BatchNormOptions& options) {
  batch_norm_inference(args_of::batch_norm(x, running_mean, running_var, weight, bias, out, options));
}

void batch_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const std::optional<ArrayView>& running_mean,
                        const std::optional<ArrayView>& running_var, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const BatchNormOptions& options) {
  batch_norm_forward(args_of::batch_norm_forward(x, weight, bias, running_mean, running_var, out, mean, rstd, options));
}

void batch_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const BatchNormOptions& options) {
  batch_norm_backward(args_of::batch_norm_backward(dy, x, mean, rstd, weight, out, dweight, dbias, options));
}

const char* version() { return LANENORM_VERSION; }

}  // namespace lanenorm
