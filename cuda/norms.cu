// From Args to kernels and back: parameters and statistics into the order of the Plan, layouts that kernels cannot read
// where they lie, empty inputs. Everything goes to the caller's stream in order.
//
// Longer than 300 lines because rows and columns, forward and backward, stand side by side.
#include "cuda/norms.hpp"

#include <algorithm>
#include <initializer_list>

#include "cuda/choose.hpp"
#include "cuda/launch.hpp"
#include "cuda/pack.hpp"

namespace lanenorm::cuda {
namespace {

// Lines that must be packed are packed this many bytes at a time: their copy stays in the L2 of a large device (50 MB)
// until the kernel reads it, and the workspace does not grow with the array. One row at least.
constexpr std::int64_t kPackBytes = 32 << 20;

char* workspace(const Context& context, std::int64_t bytes) {
  return static_cast<char*>(
      context.allocate(context.state, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1))));
}

Loop one_axis(std::int64_t extent, std::int64_t stride) {
  Loop loop;
  loop.axes = 1;
  loop.count = loop.extent[0] = extent;
  loop.stride[0] = stride;
  return loop;
}

bool aligned_to(const void* p, std::int64_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// ---- parameters and statistics -----------------------------------------------------------------------------------

// A vector in the order of the Plan without gaps.
Nest dense(char* data, std::int64_t count, std::int64_t element_bytes) {
  return {data, one_axis(1, 0), one_axis(count, element_bytes)};
}
Nest nest_of(const Vector& v) { return {static_cast<char*>(v.data), one_axis(1, 0), v.loop}; }

// Where it lies, or copied. alignment: of the first element
const void* input_vector(const Vector& v, DType dtype, std::int64_t alignment, const Context& context) {
  const std::int64_t bytes = size(dtype);
  if (v.data == nullptr) return nullptr;
  if (adjacent(v.loop, bytes) && aligned_to(v.data, alignment)) return v.data;
  char* copy = workspace(context, v.loop.count * bytes);
  copy_lines(dense(copy, v.loop.count, bytes), nest_of(v), 0, 1, bytes, context);
  return copy;
}

class OutputVector {
 public:
  OutputVector(const Vector& v, DType dtype, const Context& context)
      : vector_(v), bytes_(size(dtype)), context_(context), data_(v.data) {
    if (v.data == nullptr || (adjacent(v.loop, bytes_) && aligned_to(v.data, bytes_))) return;
    data_ = workspace(context, v.loop.count * bytes_);
  }
  void* data() const { return data_; }
  void finish() const {
    if (data_ == vector_.data) return;
    copy_lines(nest_of(vector_), dense(static_cast<char*>(data_), vector_.loop.count, bytes_), 0, 1, bytes_, context_);
  }

 private:
  const Vector& vector_;
  std::int64_t bytes_;
  const Context& context_;
  void* data_;
};

// ---- tensors -----------------------------------------------------------------------------------------------------

// One tensor as kernels see it: units (rows, or matrices of rows) of adjacent elements; where they lie, or in a
// workspace for some of them at a time.
class Tensor {
 public:
  // layout: of x, dy or y in the Plan
  Tensor(const Plan& plan, const Layout& layout, const void* data, std::int64_t element_bytes)
      : layout_(layout),
        data_(static_cast<char*>(const_cast<void*>(data))),
        bytes_(element_bytes),
        inner_(plan.inner),
        lines_(plan.lines_per_statistic),
        units_(layout.lines.count / lines_) {
    direct_ = layout.direct && find_strides(plan.work);
    if (direct_) return;
    line_stride_ = inner_ * bytes_;
    unit_stride_ = lines_ * line_stride_;
  }

  bool direct() const { return direct_; }
  std::int64_t units() const { return units_; }
  std::int64_t unit_bytes() const { return lines_ * inner_ * bytes_; }
  std::int64_t unit_stride() const { return unit_stride_; }
  std::int64_t line_stride() const { return line_stride_; }

  void reserve(std::int64_t batch, const Context& context) {
    if (!direct_) packed_ = workspace(context, batch * unit_bytes());
  }
  // Of units from `first` on.
  char* data(std::int64_t first) const { return direct_ ? data_ + first * unit_stride_ : packed_; }
  void read(std::int64_t first, std::int64_t units, const Context& context) const {
    if (!direct_) copy_lines(dense(first), where_it_lies(), first * lines_, units * lines_, bytes_, context);
  }
  void write(std::int64_t first, std::int64_t units, const Context& context) const {
    if (!direct_) copy_lines(where_it_lies(), dense(first), first * lines_, units * lines_, bytes_, context);
  }

 private:
  // Whether lines are one stride apart within a unit, and units one stride apart.
  bool find_strides(Work work) {
    const Loop& loop = layout_.lines;
    if (work == Work::rows && lines_ > 1) return false;  // a row in several runs
    line_stride_ = unit_stride_ = 0;
    if (loop.axes == 1) {
      line_stride_ = loop.stride[0];
      unit_stride_ = lines_ * line_stride_;
    } else if (loop.axes == 2 && loop.extent[1] == lines_) {
      line_stride_ = loop.stride[1];
      unit_stride_ = loop.stride[0];
    }
    return loop.axes <= 1 || (loop.axes == 2 && loop.extent[1] == lines_);
  }
  Nest where_it_lies() const { return {data_, layout_.lines, layout_.inner}; }
  Nest dense(std::int64_t first) const {
    return {packed_ - first * unit_bytes(), one_axis(layout_.lines.count, inner_ * bytes_), one_axis(inner_, bytes_)};
  }

  const Layout& layout_;
  char* data_;
  std::int64_t bytes_, inner_, lines_, units_;
  bool direct_;
  std::int64_t line_stride_ = 0, unit_stride_ = 0;
  char* packed_ = nullptr;
};

// f(first, units) for all units of some tensors, a batch at a time where one of them is packed: whole multiples of
// `multiple`.
template <class F>
void for_batches(std::initializer_list<Tensor*> tensors, std::int64_t multiple, const Context& context, F&& f) {
  const std::int64_t units = (*tensors.begin())->units(), unit_bytes = (*tensors.begin())->unit_bytes();
  std::int64_t batch = units;
  for (const Tensor* tensor : tensors) {
    if (!tensor->direct())
      batch = std::min(units, std::max(kPackBytes / unit_bytes / multiple, std::int64_t{1}) * multiple);
  }
  for (Tensor* tensor : tensors) tensor->reserve(batch, context);
  for (std::int64_t first = 0; first < units; first += batch) f(first, std::min(batch, units - first));
}

void* advance(void* p, std::int64_t bytes) { return p == nullptr ? nullptr : static_cast<char*>(p) + bytes; }
const void* advance(const void* p, std::int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const char*>(p) + bytes;
}

// The parameter arrays in the order of the Plan.
struct Parameters {
  const void* weight;
  const void* bias;
  bool as_compute;
  Parameters(const Args& args, const Context& context)
      : weight(input_vector(args.weight, args.parameter_dtype, 16, context)),
        bias(input_vector(args.bias, args.parameter_dtype, 16, context)),
        as_compute(args.parameter_dtype == statistics_dtype(args.dtype)) {}
};

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

void rows_forward(const Args& args, const Parameters& parameters, void* mean, void* rstd, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const RowForwardChoice choice = choose_row_forward(plan, device_limits(context.device), args.dtype);
  for_batches({&x, &y}, 1, context, [&](std::int64_t first, std::int64_t rows) {
    x.read(first, rows, context);
    RowForward a{};
    a.x = x.data(first);
    a.y = y.data(first);
    a.x_stride = x.unit_stride();
    a.y_stride = y.unit_stride();
    a.rows = rows;
    a.length = plan.reduced;
    a.mean = advance(mean, first * statistic_bytes);
    a.rstd = advance(rstd, first * statistic_bytes);
    a.weight = parameters.weight;
    a.bias = parameters.bias;
    a.parameters_as_compute = parameters.as_compute;
    a.eps = args.eps;
    a.inverse_length = 1.0 / static_cast<double>(plan.reduced);
    visit(args.dtype, [&](auto tag) { row_forward<typename decltype(tag)::Type>(a, choice, context); });
    y.write(first, rows, context);
  });
}

void rows_backward(const Args& args, const Parameters& parameters, const void* mean, const void* rstd, void* dweight,
                   void* dbias, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  const DeviceLimits device = device_limits(context.device);
  RowBackwardChoice choice = choose_row_backward(plan, device, args.dtype);
  const Partials partials(args, choice.chunks, parameters, dweight, dbias, context);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  for_batches({&x, &dy, &dx}, choice.chunk_rows, context, [&](std::int64_t first, std::int64_t rows) {
    x.read(first, rows, context);
    dy.read(first, rows, context);
    RowBackward a{};
    a.dy = dy.data(first);
    a.x = x.data(first);
    a.dx = dx.data(first);
    a.dy_stride = dy.unit_stride();
    a.x_stride = x.unit_stride();
    a.dx_stride = dx.unit_stride();
    a.rows = rows;
    a.length = plan.reduced;
    a.mean = advance(mean, first * statistic_bytes);
    a.rstd = advance(rstd, first * statistic_bytes);
    a.weight = parameters.weight;
    a.parameters_as_compute = parameters.as_compute;
    a.partial_length = partials.fold.partial_length;
    a.partial = advance(partials.data, first / choice.chunk_rows * partials.bytes);
    choice.chunks = (rows + choice.chunk_rows - 1) / choice.chunk_rows;
    visit(args.dtype, [&](auto tag) { row_backward<typename decltype(tag)::Type>(a, choice, context); });
    dx.write(first, rows, context);
  });
  partials.finish(args.dtype, device, context);
}

// ---- columns -----------------------------------------------------------------------------------------------------

void columns_forward(const Args& args, const Parameters& parameters, void* mean, void* rstd, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  Tensor x(plan, plan.x, args.x, bytes), y(plan, plan.y, args.y, bytes);
  const ColumnChoice choice = choose_columns(plan, device_limits(context.device), args.dtype);
  for_batches({&x, &y}, 1, context, [&](std::int64_t first, std::int64_t matrices) {
    x.read(first, matrices, context);
    ColumnForward a{};
    a.x = x.data(first);
    a.y = y.data(first);
    a.x_matrix_stride = x.unit_stride();
    a.x_row_stride = x.line_stride();
    a.y_matrix_stride = y.unit_stride();
    a.y_row_stride = y.line_stride();
    a.matrices = matrices;
    a.rows = plan.reduced;
    a.columns = plan.inner;
    a.mean = advance(mean, first * plan.inner * statistic_bytes);
    a.rstd = advance(rstd, first * plan.inner * statistic_bytes);
    a.weight = parameters.weight;
    a.bias = parameters.bias;
    a.parameters_as_compute = parameters.as_compute;
    a.eps = args.eps;
    a.inverse_rows = 1.0 / static_cast<double>(plan.reduced);
    visit(args.dtype, [&](auto tag) { column_forward<typename decltype(tag)::Type>(a, choice, context); });
    y.write(first, matrices, context);
  });
}

void columns_backward(const Args& args, const Parameters& parameters, const void* mean, const void* rstd, void* dweight,
                      void* dbias, const Context& context) {
  const Plan& plan = args.plan;
  const std::int64_t bytes = size(args.dtype), statistic_bytes = size(statistics_dtype(args.dtype));
  const DeviceLimits device = device_limits(context.device);
  const ColumnChoice choice = choose_columns(plan, device, args.dtype);
  const Partials partials(args, plan.outer * choice.strips, parameters, dweight, dbias, context);
  Tensor x(plan, plan.x, args.x, bytes), dy(plan, plan.dy, args.dy, bytes), dx(plan, plan.y, args.y, bytes);
  for_batches({&x, &dy, &dx}, 1, context, [&](std::int64_t first, std::int64_t matrices) {
    x.read(first, matrices, context);
    dy.read(first, matrices, context);
    ColumnBackward a{};
    a.dy = dy.data(first);
    a.x = x.data(first);
    a.dx = dx.data(first);
    a.dy_matrix_stride = dy.unit_stride();
    a.dy_row_stride = dy.line_stride();
    a.x_matrix_stride = x.unit_stride();
    a.x_row_stride = x.line_stride();
    a.dx_matrix_stride = dx.unit_stride();
    a.dx_row_stride = dx.line_stride();
    a.matrices = matrices;
    a.rows = plan.reduced;
    a.columns = plan.inner;
    a.mean = advance(mean, first * plan.inner * statistic_bytes);
    a.rstd = advance(rstd, first * plan.inner * statistic_bytes);
    a.weight = parameters.weight;
    a.parameters_as_compute = parameters.as_compute;
    a.partial_length = partials.fold.partial_length;
    a.partial = advance(partials.data, first * choice.strips * partials.bytes);
    visit(args.dtype, [&](auto tag) { column_backward<typename decltype(tag)::Type>(a, choice, context); });
    dx.write(first, matrices, context);
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
