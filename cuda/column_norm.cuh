// Columns on the GPU: statistics down the columns of a matrix, a lane is a word of columns (formulas: row_norm.cuh).
//
// The rows of a matrix are cut into stretches of 64 and pieces of 8 stretches (kPieceRows).
//
//   resident   a slab of columns lies in the shared memory of a block, or of the blocks of a cluster: x is read once
//              (2s forward, 3s backward), in column_resident.cuh
//   streamed   where it does not fit, or too few blocks would work: three kernels, moments or sums of the pieces,
//              statistics, then the matrix once more, the last pieces first (3s and 5s). A block computes a piece of a
//              strip of 32 words (512 bytes of a row), warp w its stretch w
//
// THE ORDER OF OPERATIONS, by index within the matrix and so the same in both:
//   block    8 rows, an exact two-pass in registers about a pivot, which is taken from the first block of a stretch
//   stretch  its up to 8 blocks merged in order in the compute type (Chan, Golub, LeVeque 1983); of float32 that is
//            out of range, in double
//   piece    its 8 stretches in order, in double; a matrix its pieces as a tree, in double
//
// Longer than 300 lines because moments, apply and the streamed kernels of either norm read as one method.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cuda/channel.cuh"
#include "cuda/device.cuh"
#include "cuda/kernels.hpp"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistic.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr int kBlockRows = 8;
inline constexpr int kStretchRows = cuda::kStretchRows;
inline constexpr int kColumnWarps = cuda::kPieceRows / kStretchRows;
inline constexpr int kColumnThreads = cuda::kColumnThreads;
static_assert(kColumnThreads == 32 * kColumnWarps);

template <class T>
inline constexpr int kStripColumns = 32 * kPerWord<T>;

// ---- where a piece lies ------------------------------------------------------------------------------------------

// Adjacent columns of a row: those of a word, or of what a thread reads of shared memory.
template <class T, int N>
struct Columns {
  T value[N];
};

template <class P>
struct Matrices {
  P data;
  std::int64_t matrix_stride, row_stride;  // bytes
};
__device__ __forceinline__ Matrices<const char*> x_of(const cuda::ColumnForward& a) {
  return {a.x, a.x_matrix_stride, a.x_row_stride};
}
__device__ __forceinline__ Matrices<char*> y_of(const cuda::ColumnForward& a) {
  return {a.y, a.y_matrix_stride, a.y_row_stride};
}

template <class T>
struct Piece {
  std::int64_t matrix, strip, piece;
  std::int64_t first_column;
  int columns;             // of the strip, at most kStripColumns
  std::int64_t first_row;  // of this warp
  int rows;                // of this warp, at most warp_rows
  int left;                // columns from this lane's first one on; may be negative
  template <class A>
  __device__ __forceinline__ Piece(const A& a, std::int64_t unit, int warp_rows = kStretchRows) {
    piece = unit % a.pieces;
    strip = unit / a.pieces % a.strips;
    matrix = unit / a.pieces / a.strips;
    first_column = strip * kStripColumns<T>;
    const std::int64_t more = a.columns - first_column;
    columns = static_cast<int>(more < kStripColumns<T> ? more : kStripColumns<T>);
    first_row = (piece * kColumnWarps + threadIdx.x / 32) * warp_rows;
    const std::int64_t rest = a.rows - first_row;
    rows = static_cast<int>(rest < 0 ? 0 : rest < warp_rows ? rest : warp_rows);
    left = columns - static_cast<int>(threadIdx.x % 32) * kPerWord<T>;
  }
  __device__ __forceinline__ int bytes() const { return columns * static_cast<int>(sizeof(T)); }
  // The strip in a row of this warp.
  template <class P>
  __device__ __forceinline__ P at(const Matrices<P>& m, int row) const {
    return m.data + matrix * m.matrix_stride + (first_row + row) * m.row_stride +
           first_column * static_cast<std::int64_t>(sizeof(T));
  }
};

// Of column `column` where `fold` adjacent ones share a statistic.
__device__ __forceinline__ std::int64_t statistic_of_column(std::int64_t column, std::int64_t fold) {
  return fold == 1 ? column : column / fold;
}

// This lane's words of `count` <= 8 rows from `row` on.
template <class T>
__device__ __forceinline__ void load_rows(const Piece<T>& p, const Matrices<const char*>& m, int row, int count,
                                          Columns<T, kPerWord<T>> (&data)[kBlockRows]) {
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r) {
    if (r >= count) continue;
    const Words word = load_word<T>(p.at(m, row + r), p.bytes(), static_cast<int>(threadIdx.x % 32));
    __builtin_memcpy(&data[r], &word, sizeof word);
  }
}

// ---- moments -----------------------------------------------------------------------------------------------------

// Of one column over the rows of a warp: sum and m2 of x - pivot.
template <class A>
struct ColumnMoments {
  A pivot, sum, m2;
};

// Of column e, 8 values of which `count` are there; d = value - origin, else 0.
template <class T, class A, bool kScaled, int N>
__device__ __forceinline__ void column_deviations(const Columns<T, N> (&data)[kBlockRows], int e, int count, A origin,
                                                  double scale, A* d) {
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r) {
    A v = static_cast<A>(to_compute(data[r].value[e]));
    if constexpr (kScaled) v = v * scale;
    d[r] = r < count ? v - origin : A(0);
  }
}

// The columns [kBegin, kEnd) of N adjacent ones over the `rows` rows of a stretch. load(row, count, data) gives `count`
// <= 8 rows from `row` on.
template <class T, class A, bool kScaled, int N, int kBegin, int kEnd, class Load>
__device__ __forceinline__ void moments_down(int rows, double scale, Load&& load, ColumnMoments<A>* m) {
  for (int row = 0; row < rows; row += kBlockRows) {
    const int count = rows - row < kBlockRows ? rows - row : kBlockRows;
    Columns<T, N> data[kBlockRows] = {};
    load(row, count, data);
    const A inverse = A(1) / static_cast<A>(count);
    const A before = static_cast<A>(row), weight = static_cast<A>(count) * before / (static_cast<A>(count) + before);
    const A inverse_before = row == 0 ? A(0) : A(1) / before;
#pragma unroll
    for (int e = kBegin; e < kEnd; ++e) {
      A d[kBlockRows];
      if (row == 0) {
        A first[kBlockRows], absolute[kBlockRows];
        column_deviations<T, A, kScaled>(data, e, 1, A(0), scale, first);
        column_deviations<T, A, kScaled>(data, e, count, first[0], scale, d);
#pragma unroll
        for (int r = 0; r < kBlockRows; ++r) absolute[r] = magnitude(d[r]);
        m[e] = {coarse_pivot(first[0], tree<kBlockRows>(d) * inverse,
                             tree<kBlockRows>(absolute) * inverse * kPivotGrain<A>),
                A(0), A(0)};
      }
      column_deviations<T, A, kScaled>(data, e, count, m[e].pivot, scale, d);
      const A sum = tree<kBlockRows>(d), mean = sum * inverse;
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) d[r] = r < count ? d[r] - mean : A(0);
      const A delta = mean - m[e].sum * inverse_before;
      m[e].m2 = fma(delta * delta, weight, m[e].m2 + tree_of_products<kBlockRows>(d, d));
      m[e].sum = m[e].sum + sum;
    }
  }
}

// Those that are kept, put(e, pivot, sum, m2). left: columns that there are; may be less than 1. kScaled (float64): of
// scale * x.
template <class T, bool kScaled, int N, class Load, class Put>
__device__ __forceinline__ void stretch_moments(const cuda::ColumnForward& a, int rows, int left, double scale,
                                                Load&& load, Put&& put) {
  using C = Compute<T>;
  if (rows <= 0 || left <= 0) return;
  ColumnMoments<C> m[N];
  moments_down<T, C, kScaled, N, 0, N>(rows, scale, load, m);
  bool redo[N], any = false;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    redo[e] = sizeof(C) == 4 && e < left && out_of_range<C>(static_cast<double>(m[e].m2) * a.inverse_rows, a.eps);
    any |= redo[e];
    put(e, static_cast<double>(m[e].pivot), static_cast<double>(m[e].sum), static_cast<double>(m[e].m2));
  }
  if constexpr (sizeof(C) == 4) {
    if (any) {  // half of the columns at a time: all 8 of 16-bit data need more registers than there are (12.0)
      constexpr int kHalf = (N + 1) / 2;
      ColumnMoments<double> wide[N];
      moments_down<T, double, false, N, 0, kHalf>(rows, 1.0, load, wide);
#pragma unroll
      for (int e = 0; e < kHalf; ++e) {
        if (redo[e]) put(e, wide[e].pivot, wide[e].sum, wide[e].m2);
      }
      if constexpr (N > 1) moments_down<T, double, false, N, kHalf, N>(rows, 1.0, load, wide);
#pragma unroll
      for (int e = kHalf; e < N; ++e) {
        if (redo[e]) put(e, wide[e].pivot, wide[e].sum, wide[e].m2);
      }
    }
  }
}

// Shared memory of a block: moments or sums of a column from every warp.
template <class T>
struct ColumnLayout {
  double parts[3][kColumnWarps][kStripColumns<T>];
};

// Over the stretches of a piece, in order; at(stretch): M{} for those without rows. A loop: as a tree the moments would
// take 40 registers more than a resident block has.
template <class M, class F>
__device__ __forceinline__ M fold_column(F&& at) {
  M total = at(0);
#pragma unroll 1
  for (int stretch = 1; stretch < kColumnWarps; ++stretch) total = merge(total, at(stretch));
  return total;
}

// How many rows a stretch of a matrix has; 0 beyond its last one.
__device__ __forceinline__ int rows_of_stretch(std::int64_t rows, std::int64_t stretch) {
  const std::int64_t rest = rows - stretch * kStretchRows;
  return static_cast<int>(rest < 0 ? 0 : rest < kStretchRows ? rest : kStretchRows);
}

// Moments of the piece, of thread t's column t of the strip (threads beyond the strip: of none). Two barriers; the
// shared memory is free afterwards.
template <class T, bool kScaled>
__device__ __forceinline__ Counted piece_moments(const cuda::ColumnForward& a, const Piece<T>& p, double scale,
                                                 ColumnLayout<T>* shared) {
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  stretch_moments<T, kScaled, E>(
      a, p.rows, p.left, scale,
      [&](int row, int count, Columns<T, E>(&data)[kBlockRows]) { load_rows<T>(p, x_of(a), row, count, data); },
      [&](int e, double pivot, double sum, double m2) {
        shared->parts[0][warp][lane * E + e] = pivot;
        shared->parts[1][warp][lane * E + e] = sum;
        shared->parts[2][warp][lane * E + e] = m2;
      });
  device::sync_block();
  Counted total{};
  const int column = static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    total = fold_column<Counted>([&](int w) {
      const int rows = rows_of_stretch(a.rows, p.piece * kColumnWarps + w);
      if (rows == 0) return Counted{};
      return Counted{{shared->parts[0][w][column], shared->parts[1][w][column], 0.0, shared->parts[2][w][column]},
                     static_cast<double>(rows)};
    });
  }
  device::sync_block();
  return total;
}

template <class C>
__device__ __forceinline__ void store_statistic(const cuda::ColumnForward& a, std::int64_t i, const Statistic<C>& s) {
  if (a.mean != nullptr) static_cast<C*>(a.mean)[i] = s.mean;
  if (a.rstd != nullptr) static_cast<C*>(a.rstd)[i] = s.rstd;
}

// ---- apply -------------------------------------------------------------------------------------------------------

// Of a row (LN): 1 and -0 stand for none and change no bit.
template <class T, class A>
__device__ __forceinline__ Compute<T> weight_of_row(const A& a, std::int64_t row) {
  return parameter<T>(a.weight, a.parameters_as_compute, row, Compute<T>(1));
}
template <class T>
__device__ __forceinline__ Compute<T> bias_of_row(const cuda::ColumnForward& a, std::int64_t row) {
  return parameter<T>(a.bias, a.parameters_as_compute, row, -Compute<T>(0));
}

// y of a word of a row. n: of its E columns; weight, bias: of the row
template <class T>
__device__ __forceinline__ Words applied(const Words& word, const Normalizer<Compute<T>> (&n)[kPerWord<T>],
                                         Compute<T> weight, Compute<T> bias) {
  Compute<T> x[kPerWord<T>];
  unpack<T>(word, x);
#pragma unroll
  for (int e = 0; e < kPerWord<T>; ++e) {
    x[e] = normalize(x[e] * n[e].scale, n[e].mean, n[e].rstd, n[e].rstd_low, n[e].shift);
    x[e] = fma(x[e], weight, bias);
  }
  return pack<T>(x);
}

// With weight and bias of the column.
template <class T>
__device__ __forceinline__ Words applied(const Words& word, const ChannelConstants<Compute<T>> (&k)[kPerWord<T>]) {
  Compute<T> x[kPerWord<T>];
  unpack<T>(word, x);
#pragma unroll
  for (int e = 0; e < kPerWord<T>; ++e) {
    x[e] = normalize_affine(x[e], k[e].scale, k[e].mean, k[e].rstd, k[e].shift, k[e].weight, k[e].bias);
  }
  return pack<T>(x);
}

// Rows that a warp reads before it writes the first of them: 4 of 512 bytes, by 16 warps an SM 32 KB in flight.
inline constexpr int kApplyRows = 4;

// out = f(row, words) for the rows of this warp, words: this lane's of each of the N inputs. All lanes of the warp
// arrive here.
template <class T, int N, class F>
__device__ __forceinline__ void for_words(const Piece<T>& p, const Matrices<const char*> (&in)[N],
                                          const Matrices<char*>& out, F&& f) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < p.rows; row += kApplyRows) {
    Words data[kApplyRows][N] = {};
#pragma unroll
    for (int r = 0; r < kApplyRows; ++r) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (row + r < p.rows) data[r][i] = load_word<T>(p.at(in[i], row + r), p.bytes(), lane);
      }
    }
#pragma unroll
    for (int r = 0; r < kApplyRows; ++r) {
      if (row + r >= p.rows) continue;
      const Words word[1] = {f(row + r, data[r])};
      store_run<T, 32, 1>(p.at(out, row + r), p.bytes(), device::kAllLanes, lane, word);
    }
  }
}

// ---- forward, streamed -------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_moments_streamed(cuda::ColumnForward a) {
  ColumnLayout<T>* shared = &device::shared<ColumnLayout<T>>();
  Counted* moments = static_cast<Counted*>(a.piece_moments);
  const std::int64_t statistics = a.matrices * a.columns;
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips * a.pieces; unit += gridDim.x) {
    const Piece<T> p(a, unit);
    const std::int64_t place = (p.matrix * a.columns + p.first_column + threadIdx.x) * a.pieces + p.piece;
    const bool mine = static_cast<int>(threadIdx.x) < p.columns;
    const Counted m = piece_moments<T, false>(a, p, 1.0, shared);
    if (mine) moments[place] = m;
    for (int set = 1; set < kMomentSets<T>; ++set) {
      const Counted scaled = piece_moments<T, true>(a, p, set_scale(set), shared);
      if (mine) moments[set * statistics * a.pieces + place] = scaled;
    }
  }
}

// A warp a column.
template <class T>
__global__ void __launch_bounds__(128, 1) column_statistics_streamed(cuda::ColumnForward a) {
  using C = Compute<T>;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32), statistics = a.matrices * a.columns;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < statistics; i += warps) {
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      const int set = decltype(scaled)::value ? set_of(scale) : 0;
      const Counted* moments = static_cast<const Counted*>(a.piece_moments) + (set * statistics + i) * a.pieces;
      return fold_places(a.pieces, [&](std::int64_t piece) { return moments[piece]; });
    });
    if (threadIdx.x % 32 != 0) continue;
    static_cast<Normalizer<C>*>(a.normalizers)[i] = s.normalizer;
    store_statistic(a, i, s);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_apply_streamed(cuda::ColumnForward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  for (std::int64_t left = a.matrices * a.strips * a.pieces - blockIdx.x; left > 0; left -= gridDim.x) {
    const Piece<T> p(a, left - 1);
    const std::int64_t first = p.matrix * a.columns + p.first_column + threadIdx.x % 32 * E;
    Normalizer<C> n[E] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < p.left) n[e] = static_cast<const Normalizer<C>*>(a.normalizers)[first + e];
    }
    for_words<T, 1>(p, {x_of(a)}, y_of(a), [&](int row, const Words(&x)[1]) {
      return applied<T>(x[0], n, weight_of_row<T>(a, p.first_row + row), bias_of_row<T>(a, p.first_row + row));
    });
  }
}

// ---- channels (BN) -----------------------------------------------------------------------------------------------

// The last of three kernels; the second is channel_statistics_kernel.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    column_apply_channels(cuda::ColumnForward a, cuda::ColumnChannels channels) {
  using K = ChannelConstants<Compute<T>>;
  const K* constants = static_cast<const K*>(channels.channels.constants);
  for (std::int64_t left = a.matrices * a.strips * a.pieces - blockIdx.x; left > 0; left -= gridDim.x) {
    const Piece<T> p(a, left - 1);
    const std::int64_t first = p.matrix * a.columns + p.first_column + threadIdx.x % 32 * kPerWord<T>;
    K k[kPerWord<T>] = {};
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) {
      if (e < p.left) k[e] = constants[statistic_of_column(first + e, channels.fold)];
    }
    for_words<T, 1>(p, {x_of(a)}, y_of(a), [&](int /*row*/, const Words(&x)[1]) { return applied<T>(x[0], k); });
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
