// From Args to kernels and back: arrays where kernels can read and write them. Parameters and statistics in the order
// of the Plan, tensors as units of equidistant lines; where they lie, or in workspace. Everything goes to the caller's
// stream in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "core/args.hpp"
#include "cuda/kernels.hpp"
#include "cuda/pack.hpp"

namespace lanenorm::cuda {

// Lines that must be packed are packed this many bytes at a time: their copy stays in the L2 of a large device (50 MB)
// until the kernel reads it, and the workspace does not grow with the array. One unit at least: a row, a channel, or a
// matrix of columns, which may be the whole array (batch norm, channels-last). Cutting such a matrix between columns
// would leave every bit as it is but for LN's dweight and dbias, whose parts are strips of columns.
inline constexpr std::int64_t kPackBytes = 32 << 20;

inline char* workspace(const Context& context, std::int64_t bytes) {
  return static_cast<char*>(
      context.allocate(context.state, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1))));
}

inline Loop one_axis(std::int64_t extent, std::int64_t stride) {
  Loop loop;
  loop.axes = 1;
  loop.count = loop.extent[0] = extent;
  loop.stride[0] = stride;
  return loop;
}

inline bool aligned_to(const void* p, std::int64_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// ---- parameters and statistics -----------------------------------------------------------------------------------

// A vector in the order of the Plan without gaps.
inline Nest dense(char* data, std::int64_t count, std::int64_t element_bytes) {
  return {data, one_axis(1, 0), one_axis(count, element_bytes)};
}
inline Nest nest_of(const Vector& v) { return {static_cast<char*>(v.data), one_axis(1, 0), v.loop}; }

// Where it lies, or copied. alignment: of the first element
inline const void* input_vector(const Vector& v, DType dtype, std::int64_t alignment, const Context& context) {
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

// One tensor as kernels see it: units (rows, matrices of rows, or channels of runs) of adjacent elements; where they
// lie, or in a workspace for some of them at a time.
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
    // The kernels of long rows take a row in one run.
    const bool runs_apart = plan.work == Work::columns || plan.affine == Affine::per_statistic || lines_ == 1;
    direct_ = layout.direct && runs_apart && find_strides();
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
  bool find_strides() {
    const Loop& loop = layout_.lines;
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

inline void* advance(void* p, std::int64_t bytes) { return p == nullptr ? nullptr : static_cast<char*>(p) + bytes; }
inline const void* advance(const void* p, std::int64_t bytes) {
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

// ---- columns -----------------------------------------------------------------------------------------------------

// What does not depend on the norm: `matrices` matrices from `first` on.
inline ColumnForward columns_of(const Args& args, const Tensor& x, const Tensor& y, std::int64_t first,
                                std::int64_t matrices) {
  ColumnForward a{};
  a.x = x.data(first);
  a.y = y.data(first);
  a.x_matrix_stride = x.unit_stride();
  a.x_row_stride = x.line_stride();
  a.y_matrix_stride = y.unit_stride();
  a.y_row_stride = y.line_stride();
  a.matrices = matrices;
  a.rows = args.plan.lines_per_statistic;
  a.columns = args.plan.inner;
  a.eps = args.eps;
  a.inverse_rows = 1.0 / static_cast<double>(args.plan.reduced);
  return a;
}

inline ColumnBackward columns_of(const Args& args, const Tensor& dy, const Tensor& x, const Tensor& dx,
                                 std::int64_t first, std::int64_t matrices) {
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
  a.rows = args.plan.lines_per_statistic;
  a.columns = args.plan.inner;
  a.fold = args.plan.fold;
  return a;
}

}  // namespace lanenorm::cuda
