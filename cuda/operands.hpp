// From Args to kernels and back: arrays where kernels can read and write them. Parameters and statistics in the order
// of the Plan, tensors as units of equidistant lines; where they lie, or in workspace. Everything goes to the caller's
// stream in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "core/args.hpp"
#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"
#include "cuda/pack.hpp"

namespace lanenorm::cuda {

// Lines that must be packed are packed this many bytes at a time: their copy stays in the L2 (50 MB of an H100) until
// the kernel reads it, and the workspace does not grow with the array.
inline std::int64_t pack_bytes(const Context& context) {
  return std::int64_t{device_limits(context.device).l2_bytes} / 3 * 2;
}

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
inline Lines whole(const Vector& v) { return {0, 1, 0, v.loop.count}; }

// Where it lies, or copied. alignment: of the first element
inline const void* input_vector(const Vector& v, DType dtype, std::int64_t alignment, const Context& context) {
  const std::int64_t bytes = size(dtype);
  if (v.data == nullptr) return nullptr;
  if (adjacent(v.loop, bytes) && aligned_to(v.data, alignment)) return v.data;
  char* copy = workspace(context, v.loop.count * bytes);
  copy_lines(dense(copy, v.loop.count, bytes), nest_of(v), whole(v), bytes, context);
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
    copy_lines(nest_of(vector_), dense(static_cast<char*>(data_), vector_.loop.count, bytes_), whole(vector_), bytes_,
               context_);
  }

 private:
  const Vector& vector_;
  std::int64_t bytes_;
  const Context& context_;
  void* data_;
};

// ---- tensors -----------------------------------------------------------------------------------------------------

// What an operation does at a time: units [first, first + count), and of their lines the elements [column, column +
// columns), which are less than all where a matrix is cut between columns.
struct Batch {
  std::int64_t first, count, column, columns;
};

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
  }

  bool direct() const { return direct_; }
  std::int64_t units() const { return units_; }
  std::int64_t columns() const { return inner_; }
  std::int64_t column_bytes() const { return lines_ * bytes_; }  // of a unit
  std::int64_t unit_stride() const { return unit_stride_; }
  std::int64_t line_stride() const { return line_stride_; }

  // For batches of so many units of so many columns, or less.
  void reserve(std::int64_t units, std::int64_t columns, const Context& context) {
    if (direct_) return;
    packed_ = workspace(context, units * columns * column_bytes());
    line_stride_ = columns * bytes_;
    unit_stride_ = lines_ * line_stride_;
  }
  char* data(const Batch& b) const { return direct_ ? data_ + b.first * unit_stride_ + b.column * bytes_ : packed_; }
  void read(const Batch& b, const Context& context) const {
    if (!direct_) copy_lines(dense(b), where_it_lies(), lines(b), bytes_, context);
  }
  void write(const Batch& b, const Context& context) const {
    if (!direct_) copy_lines(where_it_lies(), dense(b), lines(b), bytes_, context);
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
  // The workspace, as if the whole tensor were there.
  Nest dense(const Batch& b) const {
    return {packed_ - b.first * unit_stride_ - b.column * bytes_, one_axis(layout_.lines.count, line_stride_),
            one_axis(inner_, bytes_)};
  }
  Lines lines(const Batch& b) const { return {b.first * lines_, b.count * lines_, b.column, b.columns}; }

  const Layout& layout_;
  char* data_;
  std::int64_t bytes_, inner_, lines_, units_;
  bool direct_;
  std::int64_t line_stride_ = 0, unit_stride_ = 0;
  char* packed_ = nullptr;
};

// Where tensors may be cut: into multiples of so many units, and a unit into multiples of so many columns; 0: nowhere.
struct Cut {
  std::int64_t units = 1, columns = 0;
};

// f(batch) for all of some tensors, which is one batch unless one of them is packed. At least one unit at a time, a row
// or a channel, unless it may be cut between columns: a matrix of them may be the whole array.
template <class F>
void for_batches(std::initializer_list<Tensor*> tensors, Cut cut, const Context& context, F&& f) {
  const Tensor& any = **tensors.begin();
  const bool packed = std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return !t->direct(); });
  std::int64_t units = any.units(), columns = any.columns();
  if (packed) {
    const std::int64_t room = pack_bytes(context) / any.column_bytes();  // columns
    units = std::min(units, std::max(room / columns / cut.units, std::int64_t{1}) * cut.units);
    if (cut.columns > 0 && room < columns) columns = std::max(room / cut.columns, std::int64_t{1}) * cut.columns;
  }
  columns = std::min(columns, any.columns());
  for (Tensor* tensor : tensors) tensor->reserve(units, columns, context);
  for (std::int64_t first = 0; first < any.units(); first += units) {
    for (std::int64_t column = 0; column < any.columns(); column += columns) {
      f(Batch{first, std::min(units, any.units() - first), column, std::min(columns, any.columns() - column)});
    }
  }
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

// A piece of LN's dweight and dbias, which is summed over a slab of columns, is not cut.
inline Cut cut_of_columns(const Args& args) {
  const bool pieces = args.plan.affine == Affine::per_element;
  return {1, pieces ? kSlabWords * 16 / size(args.dtype) : args.plan.fold};
}

// Statistics of columns before those of a batch, and of the batch.
inline std::int64_t first_statistic(const Plan& plan, const Batch& b) {
  return (b.first * plan.inner + b.column) / plan.fold;
}
inline std::int64_t statistics(const Plan& plan, const Batch& b) { return b.count * b.columns / plan.fold; }

// What does not depend on the norm.
inline ColumnForward columns_of(const Args& args, const Tensor& x, const Tensor& y, const Batch& b) {
  ColumnForward a{};
  a.x = x.data(b);
  a.y = y.data(b);
  a.x_matrix_stride = x.unit_stride();
  a.x_row_stride = x.line_stride();
  a.y_matrix_stride = y.unit_stride();
  a.y_row_stride = y.line_stride();
  a.matrices = b.count;
  a.rows = args.plan.lines_per_statistic;
  a.columns = b.columns;
  a.eps = args.eps;
  a.inverse_rows = 1.0 / static_cast<double>(args.plan.reduced);
  return a;
}

inline ColumnBackward columns_of(const Args& args, const Tensor& dy, const Tensor& x, const Tensor& dx,
                                 const Batch& b) {
  ColumnBackward a{};
  a.dy = dy.data(b);
  a.x = x.data(b);
  a.dx = dx.data(b);
  a.dy_matrix_stride = dy.unit_stride();
  a.dy_row_stride = dy.line_stride();
  a.x_matrix_stride = x.unit_stride();
  a.x_row_stride = x.line_stride();
  a.dx_matrix_stride = dx.unit_stride();
  a.dx_row_stride = dx.line_stride();
  a.matrices = b.count;
  a.rows = args.plan.lines_per_statistic;
  a.columns = b.columns;
  a.fold = args.plan.fold;
  return a;
}

}  // namespace lanenorm::cuda
