// See interface.hpp. What is checked here, beyond core/check.hpp, are the outputs that Python allocates itself: mean,
// rstd, dweight, dbias.
#include "core/interface.hpp"

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "core/check.hpp"
#include "core/errors.hpp"

namespace lanenorm {
namespace {

static_assert(Dims::kMax == kMaxAxes);

// ---- arguments

View view_of(const ArrayView& array) {
  return {const_cast<void*>(array.data()), array.dtype(),           static_cast<int>(array.shape().size()),
          array.shape().begin(),           array.strides().begin(), array.writable()};
}

class OptionalView {
 public:
  explicit OptionalView(const std::optional<ArrayView>& array) : given_(array.has_value()) {
    if (given_) view_ = view_of(*array);
  }
  const View* get() const { return given_ ? &view_ : nullptr; }

 private:
  bool given_;
  View view_;
};

AxisList axis_list(const Dims& axes) { return {axes.begin(), static_cast<int>(axes.size())}; }

// ---- outputs

struct Argument {
  const char* name;
  const View* view;  // null: not given
};

// What a call wants of its outputs beside `out`; Args is that of the checked call.
class Outputs {
 public:
  Outputs(const char* operation, const View& x, AxisList axes, const Args& args)
      : operation_(operation), x_(x), axes_(axes), args_(args) {}

  void statistic(const Argument& output) const {
    const bool keep = args_.plan.affine == Affine::per_element;
    std::int64_t shape[kMaxAxes];
    int count = 0;
    for (int axis = 0; axis < x_.axes; ++axis) {
      if (!args_.reduced[axis]) {
        shape[count++] = x_.shape[axis];
      } else if (keep) {
        shape[count++] = 1;
      }
    }
    check(output, statistics_dtype(args_.dtype), "the dtype of statistics", shape, count,
          keep ? " reduced to length 1" : "");
  }

  void parameter(const Argument& output, const char* why_dtype) const {
    const bool of_reduced = args_.plan.affine == Affine::per_element;
    std::int64_t shape[kMaxAxes];
    int count = 0;
    for (int axis = 0; axis < x_.axes; ++axis) {
      if (args_.reduced[axis] == of_reduced) shape[count++] = x_.shape[axis];
    }
    check(output, args_.parameter_dtype, why_dtype, shape, count, "");
  }

  void own_memory(const Argument& output, std::initializer_list<Argument> others) const {
    for (const Argument& other : others) {
      if (other.view != nullptr && overlap(*output.view, *other.view)) {
        errors::overlap(operation_, output.name, other.name);
      }
    }
  }

 private:
  void check(const Argument& output, DType dtype, const char* why_dtype, const std::int64_t* shape, int axes,
             const char* of_axis) const {
    const View& got = *output.view;
    if (got.dtype != dtype) errors::wrong_dtype(operation_, output.name, got.dtype, dtype, why_dtype);
    bool same = got.axes == axes;
    for (int axis = 0; axis < axes && same; ++axis) same = got.shape[axis] == shape[axis];
    if (!same) {
      errors::wrong_shape(operation_, output.name, got, shape, axes,
                          errors::axis_of(axes_.axis, axes_.count, x_) + of_axis);
    }
    if (!got.writable) errors::read_only(operation_, output.name);
  }

  const char* operation_;
  const View& x_;
  AxisList axes_;
  const Args& args_;
};

// dweight and dbias, both or neither, of either backward.
struct ParameterGradients {
  const View* dweight;
  const View* dbias;

  void attach(const char* operation, const View& x, AxisList axes, const View* weight,
              std::initializer_list<Argument> others, Args* args) const {
    if (dweight != nullptr && dbias == nullptr) errors::one_running_statistic(operation, "dweight", "dbias");
    if (dweight == nullptr && dbias != nullptr) errors::one_running_statistic(operation, "dbias", "dweight");
    if (dweight == nullptr) return;
    const Outputs outputs(operation, x, axes, *args);
    const char* why = weight != nullptr ? "the dtype of weight" : "the dtype of statistics";
    for (const Argument& output : {Argument{"dweight", dweight}, Argument{"dbias", dbias}}) {
      outputs.parameter(output, why);
      outputs.own_memory(output, others);
    }
    outputs.own_memory({"dbias", dbias}, {{"dweight", dweight}});
    attach_parameters(x, *dweight, *dbias, args);
  }
};

void attach_outputs(const char* operation, const View& x, AxisList axes, const View& mean, const View& rstd,
                    std::initializer_list<Argument> others, Args* args) {
  const Outputs outputs(operation, x, axes, *args);
  for (const Argument& output : {Argument{"mean", &mean}, Argument{"rstd", &rstd}}) {
    outputs.statistic(output);
    outputs.own_memory(output, others);
  }
  outputs.own_memory({"rstd", &rstd}, {{"mean", &mean}});
  attach_statistics(x, mean, rstd, args);
}

}  // namespace

// ---- Arrays ------------------------------------------------------------------------------------------------------

Dims::Dims(const std::int64_t* values, std::size_t count) : count_(count) {
  if (count > kMax) {
    throw std::invalid_argument("Dims: count is " + std::to_string(count) + ", expected at most " +
                                std::to_string(kMax));
  }
  for (std::size_t i = 0; i < count; ++i) values_[i] = values[i];
}

ArrayView::ArrayView(const void* data, bool writable, DType dtype, const Dims& shape, const Dims* strides)
    : data_(data), shape_(shape), dtype_(dtype), writable_(writable) {
  const int axes = static_cast<int>(shape.size());
  bool elements = true;
  for (const std::int64_t length : shape) {
    if (length < 0) {
      throw std::invalid_argument("ArrayView: shape is " + errors::tuple(shape.begin(), axes) +
                                  ", expected lengths >= 0");
    }
    elements = elements && length > 0;
  }
  if (data == nullptr && elements) {
    throw std::invalid_argument("ArrayView: data is null, expected memory for shape " +
                                errors::tuple(shape.begin(), axes));
  }
  if (strides != nullptr) {
    if (strides->size() != shape.size()) {
      throw std::invalid_argument("ArrayView: strides are " +
                                  errors::tuple(strides->begin(), static_cast<int>(strides->size())) +
                                  ", expected one for each axis of shape " + errors::tuple(shape.begin(), axes));
    }
    strides_ = *strides;
    return;
  }
  std::int64_t contiguous[kMaxAxes];
  std::int64_t stride = lanenorm::size(dtype);
  for (int axis = axes - 1; axis >= 0; --axis) {
    contiguous[axis] = stride;
    stride *= shape[static_cast<std::size_t>(axis)];
  }
  strides_ = Dims(contiguous, shape.size());
}

ArrayView like(const ArrayView& x, void* data) {
  std::int64_t strides[kMaxAxes];
  like_strides(view_of(x), strides);
  return ArrayView(data, x.dtype(), x.shape(), Dims(strides, x.shape().size()));
}

// ---- Operations --------------------------------------------------------------------------------------------------

namespace args_of {

Args layer_norm(const ArrayView& x_, const std::optional<ArrayView>& weight_, const std::optional<ArrayView>& bias_,
                const ArrayView& out_, const LayerNormOptions& options) {
  const View x = view_of(x_), out = view_of(out_);
  const OptionalView weight(weight_), bias(bias_);
  Args args;
  check_layer_norm_forward("layer_norm", x, weight.get(), bias.get(), axis_list(options.axes), options.eps, &out,
                           &args);
  return args;
}

Args layer_norm_forward(const ArrayView& x_, const std::optional<ArrayView>& weight_,
                        const std::optional<ArrayView>& bias_, const ArrayView& out_, const ArrayView& mean_,
                        const ArrayView& rstd_, const LayerNormOptions& options) {
  const char* name = "layer_norm_forward";
  const View x = view_of(x_), out = view_of(out_), mean = view_of(mean_), rstd = view_of(rstd_);
  const OptionalView weight(weight_), bias(bias_);
  const AxisList axes = axis_list(options.axes);
  Args args;
  check_layer_norm_forward(name, x, weight.get(), bias.get(), axes, options.eps, &out, &args);
  attach_outputs(name, x, axes, mean, rstd, {{"x", &x}, {"weight", weight.get()}, {"bias", bias.get()}, {"out", &out}},
                 &args);
  return args;
}

Args layer_norm_backward(const ArrayView& dy_, const ArrayView& x_, const ArrayView& mean_, const ArrayView& rstd_,
                         const std::optional<ArrayView>& weight_, const ArrayView& out_,
                         const std::optional<ArrayView>& dweight_, const std::optional<ArrayView>& dbias_,
                         const LayerNormOptions& options) {
  const char* name = "layer_norm_backward";
  const View dy = view_of(dy_), x = view_of(x_), mean = view_of(mean_), rstd = view_of(rstd_), out = view_of(out_);
  const OptionalView weight(weight_), dweight(dweight_), dbias(dbias_);
  const AxisList axes = axis_list(options.axes);
  Args args;
  check_layer_norm_backward(name, dy, x, mean, rstd, weight.get(), axes, &out, &args);
  const ParameterGradients gradients{dweight.get(), dbias.get()};
  gradients.attach(name, x, axes, weight.get(),
                   {{"dy", &dy}, {"x", &x}, {"mean", &mean}, {"rstd", &rstd}, {"weight", weight.get()}, {"out", &out}},
                   &args);
  return args;
}

Args batch_norm(const ArrayView& x_, const ArrayView& running_mean_, const ArrayView& running_var_,
                const std::optional<ArrayView>& weight_, const std::optional<ArrayView>& bias_, const ArrayView& out_,
                const BatchNormOptions& options) {
  const View x = view_of(x_), running_mean = view_of(running_mean_), running_var = view_of(running_var_);
  const View out = view_of(out_);
  const OptionalView weight(weight_), bias(bias_);
  Args args;
  check_batch_norm_inference("batch_norm", x, running_mean, running_var, weight.get(), bias.get(), options.channel_axis,
                             options.eps, &out, &args);
  return args;
}

Args batch_norm_forward(const ArrayView& x_, const std::optional<ArrayView>& weight_,
                        const std::optional<ArrayView>& bias_, const std::optional<ArrayView>& running_mean_,
                        const std::optional<ArrayView>& running_var_, const ArrayView& out_, const ArrayView& mean_,
                        const ArrayView& rstd_, const BatchNormOptions& options) {
  const char* name = "batch_norm_forward";
  const View x = view_of(x_), out = view_of(out_), mean = view_of(mean_), rstd = view_of(rstd_);
  const OptionalView weight(weight_), bias(bias_), running_mean(running_mean_), running_var(running_var_);
  Args args;
  check_batch_norm_forward(name, x, weight.get(), bias.get(), running_mean.get(), running_var.get(), options.momentum,
                           options.channel_axis, options.eps, &out, &args);
  attach_outputs(name, x, {&options.channel_axis, 1}, mean, rstd,
                 {{"x", &x},
                  {"weight", weight.get()},
                  {"bias", bias.get()},
                  {"running_mean", running_mean.get()},
                  {"running_var", running_var.get()},
                  {"out", &out}},
                 &args);
  return args;
}

Args batch_norm_backward(const ArrayView& dy_, const ArrayView& x_, const ArrayView& mean_, const ArrayView& rstd_,
                         const std::optional<ArrayView>& weight_, const ArrayView& out_,
                         const std::optional<ArrayView>& dweight_, const std::optional<ArrayView>& dbias_,
                         const BatchNormOptions& options) {
  const char* name = "batch_norm_backward";
  const View dy = view_of(dy_), x = view_of(x_), mean = view_of(mean_), rstd = view_of(rstd_), out = view_of(out_);
  const OptionalView weight(weight_), dweight(dweight_), dbias(dbias_);
  Args args;
  check_batch_norm_backward(name, dy, x, mean, rstd, weight.get(), options.channel_axis, options.training, &out, &args);
  const ParameterGradients gradients{dweight.get(), dbias.get()};
  gradients.attach(name, x, {&options.channel_axis, 1}, weight.get(),
                   {{"dy", &dy}, {"x", &x}, {"mean", &mean}, {"rstd", &rstd}, {"weight", weight.get()}, {"out", &out}},
                   &args);
  return args;
}

}  // namespace args_of
}  // namespace lanenorm
