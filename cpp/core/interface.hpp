// From the arrays of the public C++ interface (lanenorm/lanenorm.hpp) to Args: ArrayViews become Views, core/check.hpp
// checks them. What cpu/api.cpp and cuda/api.cpp share; each function has the name of the operation.
#pragma once

#include "core/args.hpp"
#include "lanenorm/lanenorm.hpp"

namespace lanenorm::args_of {

Args layer_norm(const ArrayView& x, const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias,
                const ArrayView& out, const LayerNormOptions& options);
Args layer_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const LayerNormOptions& options);
Args layer_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const LayerNormOptions& options);
Args batch_norm(const ArrayView& x, const ArrayView& running_mean, const ArrayView& running_var,
                const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias, const ArrayView& out,
                const BatchNormOptions& options);
Args batch_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const std::optional<ArrayView>& running_mean,
                        const std::optional<ArrayView>& running_var, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const BatchNormOptions& options);
Args batch_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const BatchNormOptions& options);

}  // namespace lanenorm::args_of
