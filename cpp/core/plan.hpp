// Plan: how the axes of an operation map to loops. One struct for every norm; built in plan.cpp, which is the
// only place that knows axes.
//
// Axes of length 1 are dropped. The axis that lies innermost in memory becomes the inner loop, the other axes keep
// their order, and neighbours of one kind (reduced or kept) are merged. So the order of operations, and with it
// every bit of the result, follows from shape, dtype and the innermost axis alone; strides only decide whether a
// line is read where it lies or packed first.
//
//   rows     inner loop over reduced axes: a line is a run, `lines_per_statistic` runs make one statistic
//   columns  inner loop over kept axes: a line is a row of a matrix of `lines_per_statistic` rows, every column (or
//            every `fold` adjacent columns) is one statistic
//
// A line is addressed by its flat index over the outer loop nest: statistic- or matrix-major, then run or row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/view.hpp"

namespace lanenorm {

// A loop nest over one tensor, last axis fastest. Only the first `axes` entries are set.
struct Loop {
  int axes;
  std::int64_t count;  // product of extents
  std::int64_t extent[kMaxAxes];
  std::int64_t stride[kMaxAxes];  // bytes
};
static_assert(std::is_trivial_v<Loop> && std::is_standard_layout_v<Loop>);

// Where one tensor's elements lie in the order of the Plan.
struct Layout {
  Loop lines;
  Loop inner;
  bool direct;  // the elements of a line are adjacent, so kernels read or write them in place
};
static_assert(std::is_trivial_v<Layout> && std::is_standard_layout_v<Layout>);

enum class Work : std::uint8_t { rows, columns };
enum class Affine : std::uint8_t {
  per_statistic,  // BN: weight and bias belong to a statistic
  per_element     // LN: weight and bias belong to a position within the reduced axes
};

struct Plan {
  Work work;
  Affine affine;
  std::int64_t elements;             // of x; 0: nothing to do but the statistics of empty slices
  std::int64_t statistics;           // how many mean/rstd
  std::int64_t reduced;              // elements per statistic
  std::int64_t inner;                // length of a line
  std::int64_t lines_per_statistic;  // runs of a statistic, or rows of a matrix
  std::int64_t outer;                // rows: statistics; columns: matrices
  std::int64_t fold;                 // columns: adjacent columns that share a statistic (small planes), else 1
  Layout x, y, dy;                   // y stands for dx in a backward
  // Axes of x in the order of the Plan, lengths 1 included at the end: the order in which kernels count statistics
  // (kept axes) and parameters per element (reduced axes).
  int kept_axes, reduced_axes;
  int kept[kMaxAxes], reduced_axis[kMaxAxes];
};
static_assert(std::is_trivial_v<Plan> && std::is_standard_layout_v<Plan>);

// Planes below this many elements are treated as rows of an (N, C*H*W) matrix, in which those of an image are adjacent:
// as runs of channels 7x7 planes took twice the time. At 256 elements a run has two blocks, and a GPU keeps it on chip.
inline constexpr std::int64_t kSmallPlane = 256;

// The strides in bytes that np.empty_like(x) gives: dense, axes ordered by |stride| of x.
void like_strides(const View& x, std::int64_t* strides);

// reduced[axis] says which axes of x are normalized over. dy may be null (forward). y_strides as like_strides gives.
void make_plan(const View& x, const std::int64_t* y_strides, const View* dy, const bool* reduced, Affine affine,
               Plan* plan);

// Byte offset of flat index `index`.
std::int64_t offset(const Loop& loop, std::int64_t index);

// Byte offsets of the flat indices [first, first + count).
void offsets(const Loop& loop, std::int64_t first, std::int64_t count, std::int64_t* out);

// A loop over `axes` of an array in the given order, with that array's own strides. An array that lacks an axis
// (its weight, say) passes strides by position in `axes`. In place: a Loop has room for 64 axes, and the copies of
// eight of them were 100 ns of a call.
void make_loop(const std::int64_t* shape, const std::int64_t* strides, const int* axes, int count, Loop* loop);

// True where the loop walks `count` adjacent elements of `size` bytes.
bool adjacent(const Loop& loop, std::int64_t size);

}  // namespace lanenorm
