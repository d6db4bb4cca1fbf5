// Layer norm: from Args to the kernels of rows and columns, and empty inputs. Batch norm: batch_norm.cu.
#include "cuda/norms.hpp"

#include "cuda/choose.hpp"
#include "cuda/launch.hpp"
#include "cuda/operands.hpp"
#include "cuda/pack.hpp"

namespace lanenorm::cuda {
namespace {

// Partial sums of dweight and dbias in workspace, if they are wanted, and what folds them.
struct Partials {
  FoldPartials fold{};
  std::int64_t bytes;  // of a chunk
  char* data = nullptr;
  Partials(const Args& args, std::int64_t chunks, const Parameters& parameters, void* dweight, void* dbias,
           const Context& context) {
    fold.chunks = chunks;
    fold.length = args.plan.reduced;
    fold.partial_length = (fold.length + 7) / 8 * 8;  // whole words of any dtype
    fold.dweight = dweight;
    fold.dbias = dbias;
    fold.as_compute = parameters.as_compute;
    bytes = 2 * fold.partial_length * size(statistics_dtype(args.dtype));
    if (dweight != nullptr || dbias != nullptr) data = workspace(context, chunks * bytes);
    fold.partial = data;
  }
  void finish(DType dtype, const DeviceLimits& device, const Context& context) const {
    if (data == nullptr) return;
    visit(dtype, [&](auto tag) { fold_partials<typename decltype(tag)::Type>(fold, device, context); });
  }
};

// ---- rows --------------------------------------------------------------------------------------------------------

// Whether rows are whole words, aligned: all of these addresses and numbers of bytes are multiples of 16.
bool whole_words(std::initializer_list<const void*> addresses, std::initializer_list<std::int64_t> bytes) {
  std::uint64_t bits = 0;
  for (const void* p : addresses) bits |= reinterpret_cast<std::uintptr_t>(p);
  for (const std::int64_t n : bytes) bits |= static_cast<std::uint64_t>(n);
  return bits % kWord == 0;
}

void rows_forward(const Args& args, const Parameters& parameters, void* mean, void* rstd, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const DeviceLimits device = device_limits(context.device);
  for_batches({&x, &y}, Cut{}, context, [&](const Batch& b) {
    x.read(b, context);
    RowForward a{};
    a.x = x.data(b);
    a.y = y.data(b);
    a.x_stride = x.unit_stride();
    a.y_stride = y.unit_stride();
    a.rows = b.count;
    a.length = plan.reduced;
    a.mean = advance(mean, b.first * statistic_bytes);
    a.rstd = advance(rstd, b.first * statistic_bytes);
    a.weight = parameters.weight;
    a.bias = parameters.bias;
    a.parameters_as_compute = parameters.as_compute;
    a.eps = args.eps;
    a.inverse_length = 1.0 / static_cast<double>(plan.reduced);
    const bool whole = whole_words({a.x, a.y}, {a.x_stride, a.y_stride, plan.reduced * bytes});
    const RowForwardChoice choice = choose_row_forward(plan, device, args.dtype, whole);
    visit(args.dtype, [&](auto tag) { row_forward<typename decltype(tag)::Type>(a, choice, context); });
    y.write(b, context);
  });
}

void rows_backward(const Args& args, const Parameters& parameters, const void* mean, const void* rstd, void* dweight,
                   void* dbias, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  const DeviceLimits device = device_limits(context.device);
  const RowBackwardChoice all = choose_row_backward(plan, device, args.dtype, false);
  const Partials partials(args, all.chunks, parameters, dweight, dbias, context);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  for_batches({&x, &dy, &dx}, Cut{all.chunk_rows}, context, [&](const Batch& b) {
    x.read(b, context);
    dy.read(b, context);
    RowBackward a{};
    a.dy = dy.data(b);
    a.x = x.data(b);
    a.dx = dx.data(b);
    a.dy_stride = dy.unit_stride();
    a.x_stride = x.unit_stride();
    a.dx_stride = dx.unit_stride();
    a.rows = b.count;
    a.length = plan.reduced;
    a.mean = advance(mean, b.first * statistic_bytes);
    a.rstd = advance(rstd, b.first * statistic_bytes);
    a.weight = parameters.weight;
    a.parameters_as_compute = parameters.as_compute;
    a.partial_length = partials.fold.partial_length;
    a.inverse_length = 1.0 / static_cast<double>(plan.reduced);
    a.partial = advance(partials.data, b.first / all.chunk_rows * partials.bytes);
    const bool whole = whole_words({a.dy, a.x, a.dx}, {a.dy_stride, a.x_stride, a.dx_stride, plan.reduced * bytes});
    RowBackwardChoice choice = choose_row_backward(plan, device, args.dtype, whole);
    choice.chunks = (b.count + choice.chunk_rows - 1) / choice.chunk_rows;
    visit(args.dtype, [&](auto tag) { row_backward<typename decltype(tag)::Type>(a, choice, context); });
    dx.write(b, context);
  });
  partials.finish(args.dtype, device, context);
}

// ---- columns -----------------------------------------------------------------------------------------------------

void columns_forward(const Args& args, const Parameters& parameters, void* mean, void* rstd, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const DeviceLimits device = device_limits(context.device);
  for_batches({&x, &y}, cut_of_columns(args), context, [&](const Batch& b) {
    x.read(b, context);
    ColumnForward a = columns_of(args, x, y, b);
    a.mean = advance(mean, first_statistic(plan, b) * statistic_bytes);
    a.rstd = advance(rstd, first_statistic(plan, b) * statistic_bytes);
    a.weight = parameters.weight;
    a.bias = parameters.bias;
    a.parameters_as_compute = parameters.as_compute;
    const ColumnChoice choice = choose_columns(plan, b.columns, device, args.dtype, 1);
    visit(args.dtype, [&](auto tag) { column_forward<typename decltype(tag)::Type>(a, choice, context); });
    y.write(b, context);
  });
}

void columns_backward(const Args& args, const Parameters& parameters, const void* mean, const void* rstd, void* dweight,
                      void* dbias, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  const DeviceLimits device = device_limits(context.device);
  const Cut cut = cut_of_columns(args);
  const std::int64_t slabs = slabs_of(plan.inner, bytes);  // of a matrix
  const Partials partials(args, plan.outer * slabs, parameters, dweight, dbias, context);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  for_batches({&x, &dy, &dx}, cut, context, [&](const Batch& b) {
    x.read(b, context);
    dy.read(b, context);
    ColumnBackward a = columns_of(args, dy, x, dx, b);
    a.mean = advance(mean, first_statistic(plan, b) * statistic_bytes);
    a.rstd = advance(rstd, first_statistic(plan, b) * statistic_bytes);
    a.weight = parameters.weight;
    a.parameters_as_compute = parameters.as_compute;
    a.partial_length = partials.fold.partial_length;
    a.partial = advance(partials.data, (b.first * slabs + b.column / cut.columns) * partials.bytes);
    const ColumnChoice choice = choose_columns(plan, b.columns, device, args.dtype, 2);
    visit(args.dtype, [&](auto tag) { column_backward<typename decltype(tag)::Type>(a, choice, context); });
    dx.write(b, context);
  });
  partials.finish(args.dtype, device, context);
}

}  // namespace

// ---- operations --------------------------------------------------------------------------------------------------

void layer_norm_forward(const Args& args, const Context& context) {
  const DType compute = statistics_dtype(args.dtype);
  const OutputVector mean(args.mean, compute, context), rstd(args.rstd, compute, context);
  if (args.plan.elements == 0) {
    fill_empty_statistics(args.dtype, args.plan.statistics, args.eps, mean.data(), rstd.data(), context);
  } else {
    const Parameters parameters(args, context);
    if (args.plan.work == Work::rows) {
      rows_forward(args, parameters, mean.data(), rstd.data(), context);
    } else {
      columns_forward(args, parameters, mean.data(), rstd.data(), context);
    }
  }
  mean.finish();
  rstd.finish();
}

void layer_norm_backward(const Args& args, const Context& context) {
  const DType compute = statistics_dtype(args.dtype);
  const OutputVector dweight(args.dweight, args.parameter_dtype, context);
  const OutputVector dbias(args.dbias, args.parameter_dtype, context);
  if (args.plan.elements == 0) {
    for (const OutputVector* v : {&dweight, &dbias}) {
      if (v->data() != nullptr) fill_zero(v->data(), args.plan.reduced * size(args.parameter_dtype), context);
    }
  } else {
    const Parameters parameters(args, context);
    const void* mean = input_vector(args.mean, compute, size(compute), context);
    const void* rstd = input_vector(args.rstd, compute, size(compute), context);
    if (args.plan.work == Work::rows) {
      rows_backward(args, parameters, mean, rstd, dweight.data(), dbias.data(), context);
    } else {
      columns_backward(args, parameters, mean, rstd, dweight.data(), dbias.data(), context);
    }
  }
  dweight.finish();
  dbias.finish();
}

}  // namespace lanenorm::cuda
