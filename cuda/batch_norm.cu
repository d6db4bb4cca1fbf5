// Batch norm: from Args to the kernels of planes and of columns, and empty inputs.
#include "cuda/choose.hpp"
#include "cuda/launch.hpp"
#include "cuda/norms.hpp"
#include "cuda/operands.hpp"

namespace lanenorm::cuda {
namespace {

// ---- channels ----------------------------------------------------------------------------------------------------

Channels channels_of(const Args& args, const Parameters& parameters) {
  Channels c{};
  c.count = args.plan.statistics;
  c.elements = static_cast<double>(args.plan.reduced);
  c.weight = parameters.weight;
  c.bias = parameters.bias;
  c.parameters_as_compute = parameters.as_compute;
  c.eps = args.eps;
  c.momentum = args.momentum;
  c.training = args.training;
  return c;
}

// Whether a backward needs x and sums: not with frozen statistics, where nobody wants dweight and dbias.
bool needs_x(const Channels& c) { return c.training || c.dweight != nullptr || c.dbias != nullptr; }

// `count` of them from `first` on.
Channels part_of(Channels c, std::int64_t first, std::int64_t count, const Args& args) {
  const std::int64_t at = first * size(statistics_dtype(args.dtype)), parameter_at = first * size(args.parameter_dtype);
  c.count = count;
  for (void** statistic : {&c.mean, &c.rstd, &c.running_mean, &c.running_var}) *statistic = advance(*statistic, at);
  for (const void** parameter : {&c.weight, &c.bias}) *parameter = advance(*parameter, parameter_at);
  for (void** gradient : {&c.dweight, &c.dbias}) *gradient = advance(*gradient, parameter_at);
  return c;
}

// A running statistic, read and written.
class Running {
 public:
  Running(const Vector& v, DType dtype, const Context& context)
      : data_(const_cast<void*>(input_vector(v, dtype, size(dtype), context))),
        vector_(v),
        bytes_(size(dtype)),
        context_(context) {}
  void* data() const { return data_; }
  void finish() const {
    if (data_ == vector_.data) return;
    copy_lines(nest_of(vector_), dense(static_cast<char*>(data_), vector_.loop.count, bytes_), whole(vector_), bytes_,
               context_);
  }

 private:
  void* data_;
  const Vector& vector_;
  std::int64_t bytes_;
  const Context& context_;
};

// ---- planes ------------------------------------------------------------------------------------------------------

Runs runs_of(const Plan& plan) {
  Runs runs{};
  runs.runs = plan.lines_per_statistic;
  runs.length = plan.inner;
  return runs;
}

// But for the channels.
PlaneForward planes_of(const Args& args, const Tensor& x, const Tensor& y, const Batch& b) {
  PlaneForward a{};
  a.runs = runs_of(args.plan);
  a.x = x.data(b);
  a.y = y.data(b);
  a.x_channel_stride = x.unit_stride();
  a.x_run_stride = x.line_stride();
  a.y_channel_stride = y.unit_stride();
  a.y_run_stride = y.line_stride();
  return a;
}

void planes_forward(const Args& args, const Channels& channels, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype);
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const PlaneChoice choice = choose_planes(plan, device_limits(context.device), args.dtype, 1);
  for_batches({&x, &y}, Cut{}, context, [&](const Batch& b) {
    x.read(b, context);
    PlaneForward a = planes_of(args, x, y, b);
    a.channels = part_of(channels, b.first, b.count, args);
    visit(args.dtype, [&](auto tag) { plane_forward<typename decltype(tag)::Type>(a, choice, context); });
    y.write(b, context);
  });
}

void planes_backward(const Args& args, const Channels& channels, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  const PlaneChoice choice = choose_planes(plan, device_limits(context.device), args.dtype, 2);
  for_batches({&x, &dy, &dx}, Cut{}, context, [&](const Batch& b) {
    x.read(b, context);
    dy.read(b, context);
    PlaneBackward a{};
    a.channels = part_of(channels, b.first, b.count, args);
    a.runs = runs_of(plan);
    a.dy = dy.data(b);
    a.x = x.data(b);
    a.dx = dx.data(b);
    a.dy_channel_stride = dy.unit_stride();
    a.dy_run_stride = dy.line_stride();
    a.x_channel_stride = x.unit_stride();
    a.x_run_stride = x.line_stride();
    a.dx_channel_stride = dx.unit_stride();
    a.dx_run_stride = dx.line_stride();
    visit(args.dtype, [&](auto tag) { plane_backward<typename decltype(tag)::Type>(a, choice, context); });
    dx.write(b, context);
  });
}

// ---- columns -----------------------------------------------------------------------------------------------------

void columns_forward(const Args& args, const Channels& channels, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype);
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const DeviceLimits device = device_limits(context.device);
  for_batches({&x, &y}, cut_of_columns(args), context, [&](const Batch& b) {
    x.read(b, context);
    const ColumnForward a = columns_of(args, x, y, b);
    const ColumnChannels own{part_of(channels, first_statistic(plan, b), statistics(plan, b), args), plan.fold};
    const ColumnChoice choice = choose_columns(plan, b.columns, device, args.dtype, 1);
    visit(args.dtype,
          [&](auto tag) { column_channels_forward<typename decltype(tag)::Type>(a, own, choice, context); });
    y.write(b, context);
  });
}

void columns_backward(const Args& args, const Channels& channels, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  const DeviceLimits device = device_limits(context.device);
  for_batches({&x, &dy, &dx}, cut_of_columns(args), context, [&](const Batch& b) {
    x.read(b, context);
    dy.read(b, context);
    const Channels own = part_of(channels, first_statistic(plan, b), statistics(plan, b), args);
    ColumnBackward a = columns_of(args, dy, x, dx, b);
    a.mean = own.mean;
    a.rstd = own.rstd;
    const ColumnChoice choice = choose_columns(plan, b.columns, device, args.dtype, 2);
    visit(args.dtype,
          [&](auto tag) { column_channels_backward<typename decltype(tag)::Type>(a, own, choice, context); });
    dx.write(b, context);
  });
}

// ---- pointwise ---------------------------------------------------------------------------------------------------

// layout, data: of x, or of dy
void pointwise(const Args& args, const Channels& channels, Pointwise operation, const Layout& layout, const void* data,
               const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype);
  const DeviceLimits device = device_limits(context.device);
  const Cut cut = plan.work == Work::rows ? Cut{} : cut_of_columns(args);
  Tensor x(plan, layout, data, bytes), y(plan, plan.y, args.y, bytes);
  for_batches({&x, &y}, cut, context, [&](const Batch& b) {
    x.read(b, context);
    visit(args.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      if (plan.work == Work::rows) {
        PlaneForward a = planes_of(args, x, y, b);
        a.channels = part_of(channels, b.first, b.count, args);
        plane_pointwise<T>(a, operation, choose_planes(plan, device, args.dtype, 1), context);
      } else {
        const ColumnChannels own{part_of(channels, first_statistic(plan, b), statistics(plan, b), args), plan.fold};
        column_pointwise<T>(columns_of(args, x, y, b), own, operation,
                            choose_columns(plan, b.columns, device, args.dtype, 1), context);
      }
    });
    y.write(b, context);
  });
}

}  // namespace

// ---- operations --------------------------------------------------------------------------------------------------

void batch_norm_forward(const Args& args, const Context& context) {
  const DType compute = statistics_dtype(args.dtype);
  const OutputVector mean(args.mean, compute, context), rstd(args.rstd, compute, context);
  if (args.plan.elements == 0) {
    fill_empty_statistics(args.dtype, args.plan.statistics, args.eps, mean.data(), rstd.data(), context);
  } else {
    const Running running_mean(args.running_mean, compute, context), running_var(args.running_var, compute, context);
    Channels channels = channels_of(args, Parameters(args, context));
    channels.mean = mean.data();
    channels.rstd = rstd.data();
    channels.running_mean = running_mean.data();
    channels.running_var = running_var.data();
    args.plan.work == Work::rows ? planes_forward(args, channels, context) : columns_forward(args, channels, context);
    running_mean.finish();
    running_var.finish();
  }
  mean.finish();
  rstd.finish();
}

void batch_norm_inference(const Args& args, const Context& context) {
  if (args.plan.elements == 0) return;
  const DType compute = statistics_dtype(args.dtype);
  Channels channels = channels_of(args, Parameters(args, context));
  channels.mean = const_cast<void*>(input_vector(args.running_mean, compute, size(compute), context));
  channels.rstd = const_cast<void*>(input_vector(args.running_var, compute, size(compute), context));
  pointwise(args, channels, Pointwise::inference, args.plan.x, args.x, context);
}

void batch_norm_backward(const Args& args, const Context& context) {
  const DType compute = statistics_dtype(args.dtype);
  const OutputVector dweight(args.dweight, args.parameter_dtype, context);
  const OutputVector dbias(args.dbias, args.parameter_dtype, context);
  if (args.plan.elements == 0) {
    for (const OutputVector* v : {&dweight, &dbias}) {
      if (v->data() != nullptr) fill_zero(v->data(), args.plan.statistics * size(args.parameter_dtype), context);
    }
  } else {
    Channels channels = channels_of(args, Parameters(args, context));
    channels.mean = const_cast<void*>(input_vector(args.mean, compute, size(compute), context));
    channels.rstd = const_cast<void*>(input_vector(args.rstd, compute, size(compute), context));
    channels.dweight = dweight.data();
    channels.dbias = dbias.data();
    if (!needs_x(channels)) {
      pointwise(args, channels, Pointwise::frozen_gradient, args.plan.dy, args.dy, context);
    } else {
      args.plan.work == Work::rows ? planes_backward(args, channels, context)
                                   : columns_backward(args, channels, context);
    }
  }
  dweight.finish();
  dbias.finish();
}

}  // namespace lanenorm::cuda
