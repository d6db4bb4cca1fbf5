#include "core/check.hpp"

#include <cmath>
#include <cstdint>
#include <string>

#include "core/errors.hpp"

namespace lanenorm {
namespace {

bool same_shape(const View& view, const std::int64_t* shape, int axes) {
  if (view.axes != axes) return false;
  for (int axis = 0; axis < axes; ++axis) {
    if (view.shape[axis] != shape[axis]) return false;
  }
  return true;
}

bool empty(const View& view) {
  for (int axis = 0; axis < view.axes; ++axis) {
    if (view.shape[axis] == 0) return true;
  }
  return false;
}

struct Range {
  std::uintptr_t begin, end;
};

// The addresses a view touches.
Range range_of(const View& view) {
  std::uintptr_t low = reinterpret_cast<std::uintptr_t>(view.data);
  std::uintptr_t high = low + static_cast<std::uintptr_t>(size(view.dtype));
  for (int axis = 0; axis < view.axes; ++axis) {
    const std::int64_t reach = (view.shape[axis] - 1) * view.strides[axis];
    (reach < 0 ? low : high) += static_cast<std::uintptr_t>(reach);
  }
  return {low, high};
}

// Same pointer, shape and strides.
bool same_array(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || !same_shape(a, b.shape, b.axes)) return false;
  for (int axis = 0; axis < a.axes; ++axis) {
    if (a.shape[axis] > 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return true;
}

// One call being checked: what the texts need to know.
struct Call {
  const char* operation;
  const View& x;
  Args* args;
  AxisList axes;                           // as the caller wrote them
  std::int64_t parameter_shape[kMaxAxes];  // only the first parameter_axes are set
  int parameter_axes;

  Call(const char* operation, const View& x, Args* args, AxisList axes)
      : operation(operation), x(x), args(args), axes(axes), parameter_axes(0) {}

  // What not every operation has.
  void defaults() const {
    for (Vector* vector : {&args->weight, &args->bias, &args->mean, &args->rstd, &args->dweight, &args->dbias,
                           &args->running_mean, &args->running_var}) {
      vector->data = nullptr;
    }
    args->eps = 0.0;
    args->momentum = 0.0;
    args->training = true;
  }

  std::string of_x() const { return errors::axis_of(axes.axis, axes.count, x); }

  std::int64_t normalized_axis(const char* argument, std::int64_t axis) const {
    if (axis < -x.axes || axis >= x.axes) errors::axis_out_of_range(operation, argument, axis, x);
    return axis < 0 ? axis + x.axes : axis;
  }

  void layer_norm_axes() {
    if (axes.count == 0) errors::no_axis(operation);
    for (int axis = 0; axis < x.axes; ++axis) args->reduced[axis] = false;
    for (int i = 0; i < axes.count; ++i) {
      const std::int64_t axis = normalized_axis("axis", axes.axis[i]);
      if (args->reduced[axis]) errors::repeated_axis(operation, axes.axis, axes.count, axis);
      args->reduced[axis] = true;
    }
    parameter_axes = 0;
    for (int axis = 0; axis < x.axes; ++axis) {
      if (args->reduced[axis]) parameter_shape[parameter_axes++] = x.shape[axis];
    }
  }

  void batch_norm_axis() {
    const std::int64_t channel = normalized_axis("channel_axis", axes.axis[0]);
    for (int axis = 0; axis < x.axes; ++axis) args->reduced[axis] = axis != channel;
    parameter_shape[0] = x.shape[channel];
    parameter_axes = 1;
  }

  std::int64_t values_per_statistic() const {
    std::int64_t values = 1;
    for (int axis = 0; axis < x.axes; ++axis) values *= args->reduced[axis] ? x.shape[axis] : 1;
    return values;
  }

  void parameter_shape_of(const char* argument, const View& view) const {
    if (!same_shape(view, parameter_shape, parameter_axes)) {
      errors::wrong_shape(operation, argument, view, parameter_shape, parameter_axes, of_x());
    }
  }

  // weight, bias: x's dtype, or float32 with a 16-bit x. The second must match the first.
  void parameter(const char* argument, const View* view, bool first) {
    if (view == nullptr) return;
    const bool half = size(x.dtype) == 2;
    if (first) {
      if (view->dtype != x.dtype && !(half && view->dtype == DType::float32)) {
        errors::wrong_dtype(operation, argument, view->dtype, x.dtype, "to go with x", half);
      }
      args->parameter_dtype = view->dtype;
    } else if (view->dtype != args->parameter_dtype) {
      errors::wrong_dtype(operation, argument, view->dtype, args->parameter_dtype, "the dtype of weight");
    }
    parameter_shape_of(argument, *view);
  }

  void parameters(const View* weight, const View* bias) {
    args->parameter_dtype = statistics_dtype(x.dtype);
    parameter("weight", weight, true);
    parameter("bias", bias, weight == nullptr);
  }

  void statistics_dtype_of(const char* argument, const View& view) const {
    const DType expected = statistics_dtype(x.dtype);
    if (view.dtype != expected)
      errors::wrong_dtype(operation, argument, view.dtype, expected, "the dtype of statistics");
  }

  // mean and rstd of a layer norm keep the reduced axes with length 1.
  void layer_statistic(const char* argument, const View& view) const {
    statistics_dtype_of(argument, view);
    std::int64_t expected[kMaxAxes];
    for (int axis = 0; axis < x.axes; ++axis) expected[axis] = args->reduced[axis] ? 1 : x.shape[axis];
    if (!same_shape(view, expected, x.axes)) {
      errors::wrong_shape(operation, argument, view, expected, x.axes, of_x() + " reduced to length 1");
    }
  }

  void channel_statistic(const char* argument, const View& view) const {
    statistics_dtype_of(argument, view);
    parameter_shape_of(argument, view);
  }

  void gradient(const View& dy) const {
    if (dy.dtype != x.dtype) errors::wrong_dtype(operation, "dy", dy.dtype, x.dtype, "the dtype of x");
    if (!same_shape(dy, x.shape, x.axes)) errors::wrong_shape(operation, "dy", dy, x.shape, x.axes, "the shape of x");
  }

  void eps(double value) const {
    if (!(value >= 0.0) || std::isinf(value)) errors::bad_eps(operation, value);
    args->eps = value;
  }

  // The layout of the output, and `out` against it. `in_place` may be the same array as out.
  void output(const View* out, const View* in_place, const char* in_place_name) const {
    like_strides(x, args->y_strides);
    args->y = nullptr;
    if (out == nullptr) return;
    if (out->dtype != x.dtype) errors::wrong_dtype(operation, "out", out->dtype, x.dtype, "the dtype of x");
    if (!same_shape(*out, x.shape, x.axes)) {
      errors::wrong_shape(operation, "out", *out, x.shape, x.axes, "the shape of x");
    }
    if (!out->writable) errors::read_only(operation, "out");
    if (!empty(x)) {
      for (int axis = 0; axis < x.axes; ++axis) {
        if (x.shape[axis] > 1 && out->strides[axis] != args->y_strides[axis]) {
          errors::wrong_layout(operation, *out, args->y_strides);
        }
      }
    }
    if (!same_array(*out, *in_place)) no_overlap("out", out, in_place_name, in_place);
    args->y = out->data;
  }

  void no_overlap(const char* argument, const View* written, const char* other_name, const View* other) const {
    if (written != nullptr && other != nullptr && overlap(*written, *other)) {
      errors::overlap(operation, argument, other_name);
    }
  }

  // An array over the reduced or the kept axes of x, in the order of the Plan. Statistics of a layer norm have all
  // axes of x (reduced ones with length 1), every other array only its own, ascending.
  void vector_over(const View& view, bool reduced, Vector* vector) const {
    const Plan& plan = args->plan;
    const bool all_axes = plan.affine == Affine::per_element && !reduced;
    const int* axes = reduced ? plan.reduced_axis : plan.kept;
    const int count = reduced ? plan.reduced_axes : plan.kept_axes;
    int position[kMaxAxes];
    for (int i = 0; i < count; ++i) {
      position[i] = all_axes ? axes[i] : 0;
      for (int axis = 0; axis < axes[i] && !all_axes; ++axis) position[i] += args->reduced[axis] == reduced ? 1 : 0;
    }
    vector->data = view.data;
    make_loop(view.shape, view.strides, position, count, &vector->loop);
  }

  void parameter_vector(const View* view, Vector* vector) const {
    vector->data = nullptr;
    if (view != nullptr) vector_over(*view, args->plan.affine == Affine::per_element, vector);
  }

  void plan(const View* dy, Affine affine) const {
    make_plan(x, args->y_strides, dy, args->reduced, affine, &args->plan);
    args->dtype = x.dtype;
    args->x = x.data;
    args->dy = dy == nullptr ? nullptr : dy->data;
  }
};

void statistic_vectors(const Call& call, const View& mean, const View& rstd) {
  call.vector_over(mean, false, &call.args->mean);
  call.vector_over(rstd, false, &call.args->rstd);
}

}  // namespace

bool overlap(const View& a, const View& b) {
  if (empty(a) || empty(b)) return false;
  const Range ra = range_of(a), rb = range_of(b);
  return ra.begin < rb.end && rb.begin < ra.end;
}

void check_layer_norm_forward(const char* operation, const View& x, const View* weight, const View* bias, AxisList axes,
                              double eps, const View* out, Args* args) {
  Call call(operation, x, args, axes);
  call.defaults();
  call.layer_norm_axes();
  call.parameters(weight, bias);
  call.eps(eps);
  call.output(out, &x, "x");
  call.no_overlap("out", out, "weight", weight);
  call.no_overlap("out", out, "bias", bias);
  call.plan(nullptr, Affine::per_element);
  call.parameter_vector(weight, &args->weight);
  call.parameter_vector(bias, &args->bias);
}

void check_layer_norm_backward(const char* operation, const View& dy, const View& x, const View& mean, const View& rstd,
                               const View* weight, AxisList axes, const View* out, Args* args) {
  Call call(operation, x, args, axes);
  call.defaults();
  call.layer_norm_axes();
  call.gradient(dy);
  call.layer_statistic("mean", mean);
  call.layer_statistic("rstd", rstd);
  call.parameters(weight, nullptr);
  call.output(out, &dy, "dy");
  call.no_overlap("out", out, "x", &x);
  call.no_overlap("out", out, "mean", &mean);
  call.no_overlap("out", out, "rstd", &rstd);
  call.no_overlap("out", out, "weight", weight);
  call.plan(&dy, Affine::per_element);
  call.parameter_vector(weight, &args->weight);
  statistic_vectors(call, mean, rstd);
}

void check_batch_norm_inference(const char* operation, const View& x, const View& running_mean, const View& running_var,
                                const View* weight, const View* bias, std::int64_t channel_axis, double eps,
                                const View* out, Args* args) {
  Call call(operation, x, args, {&channel_axis, 1});
  call.defaults();
  call.batch_norm_axis();
  call.channel_statistic("running_mean", running_mean);
  call.channel_statistic("running_var", running_var);
  call.parameters(weight, bias);
  call.eps(eps);
  call.output(out, &x, "x");
  call.no_overlap("out", out, "running_mean", &running_mean);
  call.no_overlap("out", out, "running_var", &running_var);
  call.no_overlap("out", out, "weight", weight);
  call.no_overlap("out", out, "bias", bias);
  call.plan(nullptr, Affine::per_statistic);
  call.parameter_vector(weight, &args->weight);
  call.parameter_vector(bias, &args->bias);
  call.vector_over(running_mean, false, &args->running_mean);
  call.vector_over(running_var, false, &args->running_var);
}

void check_batch_norm_forward(const char* operation, const View& x, const View* weight, const View* bias,
                              const View* running_mean, const View* running_var, double momentum,
                              std::int64_t channel_axis, double eps, const View* out, Args* args) {
  Call call(operation, x, args, {&channel_axis, 1});
  call.defaults();
  call.batch_norm_axis();
  call.parameters(weight, bias);
  if (running_mean != nullptr && running_var == nullptr) {
    errors::one_running_statistic(operation, "running_mean", "running_var");
  }
  if (running_mean == nullptr && running_var != nullptr) {
    errors::one_running_statistic(operation, "running_var", "running_mean");
  }
  const struct {
    const char* name;
    const View* view;
  } running[] = {{"running_mean", running_mean}, {"running_var", running_var}};
  for (const auto& r : running) {
    if (r.view == nullptr) continue;
    call.channel_statistic(r.name, *r.view);
    if (!r.view->writable) errors::read_only(operation, r.name);
    const std::int64_t bytes = size(r.view->dtype);
    const bool aligned = reinterpret_cast<std::uintptr_t>(r.view->data) % static_cast<std::uintptr_t>(bytes) == 0;
    if ((r.view->shape[0] > 1 && r.view->strides[0] != bytes) || !aligned) {
      errors::not_contiguous(operation, r.name, *r.view);
    }
    call.no_overlap(r.name, r.view, "x", &x);
    call.no_overlap(r.name, r.view, "weight", weight);
    call.no_overlap(r.name, r.view, "bias", bias);
  }
  call.no_overlap("running_var", running_var, "running_mean", running_mean);
  if (!(momentum >= 0.0 && momentum <= 1.0)) errors::bad_momentum(operation, momentum);
  call.eps(eps);
  call.output(out, &x, "x");
  call.no_overlap("out", out, "weight", weight);
  call.no_overlap("out", out, "bias", bias);
  call.no_overlap("out", out, "running_mean", running_mean);
  call.no_overlap("out", out, "running_var", running_var);
  if (!empty(x) && call.values_per_statistic() == 1) {
    errors::one_value_per_channel(operation, x, static_cast<int>(channel_axis));
  }
  args->momentum = momentum;
  call.plan(nullptr, Affine::per_statistic);
  call.parameter_vector(weight, &args->weight);
  call.parameter_vector(bias, &args->bias);
  if (running_mean != nullptr) {
    call.vector_over(*running_mean, false, &args->running_mean);
    call.vector_over(*running_var, false, &args->running_var);
  }
}

void check_batch_norm_backward(const char* operation, const View& dy, const View& x, const View& mean, const View& rstd,
                               const View* weight, std::int64_t channel_axis, bool training, const View* out,
                               Args* args) {
  Call call(operation, x, args, {&channel_axis, 1});
  call.defaults();
  call.batch_norm_axis();
  call.gradient(dy);
  call.channel_statistic("mean", mean);
  call.channel_statistic("rstd", rstd);
  call.parameters(weight, nullptr);
  call.output(out, &dy, "dy");
  call.no_overlap("out", out, "x", &x);
  call.no_overlap("out", out, "mean", &mean);
  call.no_overlap("out", out, "rstd", &rstd);
  call.no_overlap("out", out, "weight", weight);
  args->training = training;
  call.plan(&dy, Affine::per_statistic);
  call.parameter_vector(weight, &args->weight);
  statistic_vectors(call, mean, rstd);
}

void attach_statistics(const View& x, const View& mean, const View& rstd, Args* args) {
  statistic_vectors(Call("", x, args, {nullptr, 0}), mean, rstd);
}

void attach_parameters(const View& x, const View& dweight, const View& dbias, Args* args) {
  const Call call("", x, args, {nullptr, 0});
  call.parameter_vector(&dweight, &args->dweight);
  call.parameter_vector(&dbias, &args->dbias);
}

}  // namespace lanenorm
