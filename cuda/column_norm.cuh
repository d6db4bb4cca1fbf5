// Columns on the GPU: statistics down the columns of a matrix, a lane is a word of columns (formulas: row_norm.cuh).
//
// A block computes a piece: kPieceRows rows of a strip of 32 words (512 bytes of a row), warp w the rows [64 w, 64 w +
// 64).
//
// Passes over memory: where a piece holds all rows of a matrix one kernel reads it twice, the second time out of L2
// (512 rows of a strip are 256 KB): 2s forward, 3s backward. Else three kernels: moments or sums of the pieces,
// statistics, then the matrix once more (3s and 5s).
//
// THE ORDER OF OPERATIONS, by index within the matrix:
//   block   8 rows, an exact two-pass in registers about a pivot, which is taken from the first block of a warp
//   warp    its up to 8 blocks merged in order in the compute type (Chan, Golub, LeVeque 1983); of float32 that is
//           out of range, in double
//   piece   its 8 warps, and a matrix its pieces, as trees in double
//
// Longer than 300 lines because moments, apply and the kernels of either kind read as one method.
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
inline constexpr int kWarpRows = 64;
inline constexpr int kColumnWarps = cuda::kPieceRows / kWarpRows;
inline constexpr int kColumnThreads = 32 * kColumnWarps;

template <class T>
inline constexpr int kStripColumns = 32 * kPerWord<T>;

// ---- where a piece lies ------------------------------------------------------------------------------------------

template <class T>
struct Piece {
  std::int64_t matrix, strip, piece;
  std::int64_t first_column;
  int columns;             // of the strip, at most kStripColumns
  std::int64_t first_row;  // of this warp
  int rows;                // of this warp, at most kWarpRows
  int left;                // columns from this lane's first one on; may be negative
  template <class A>
  __device__ __forceinline__ Piece(const A& a, std::int64_t unit) {
    piece = unit % a.pieces;
    strip = unit / a.pieces % a.strips;
    matrix = unit / a.pieces / a.strips;
    first_column = strip * kStripColumns<T>;
    const std::int64_t more = a.columns - first_column;
    columns = static_cast<int>(more < kStripColumns<T> ? more : kStripColumns<T>);
    first_row = piece * cuda::kPieceRows + threadIdx.x / 32 * kWarpRows;
    const std::int64_t rest = a.rows - first_row;
    rows = static_cast<int>(rest < 0 ? 0 : rest < kWarpRows ? rest : kWarpRows);
    left = columns - static_cast<int>(threadIdx.x % 32) * kPerWord<T>;
  }
  __device__ __forceinline__ int bytes() const { return columns * static_cast<int>(sizeof(T)); }
  // The strip in a row of this warp.
  template <class P>
  __device__ __forceinline__ P at(P base, std::int64_t matrix_stride, std::int64_t row_stride, int row) const {
    return base + matrix * matrix_stride + (first_row + row) * row_stride +
           first_column * static_cast<std::int64_t>(sizeof(T));
  }
};

// Of column `column` where `fold` adjacent ones share a statistic.
__device__ __forceinline__ std::int64_t statistic_of_column(std::int64_t column, std::int64_t fold) {
  return fold == 1 ? column : column / fold;
}

// This lane's words of `count` <= 8 rows from `row` on.
template <class T>
__device__ __forceinline__ void load_rows(const Piece<T>& p, const char* base, std::int64_t matrix_stride,
                                          std::int64_t row_stride, int row, int count, Words (&data)[kBlockRows]) {
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r) {
    if (r < count) {
      data[r] =
          load_word<T>(p.at(base, matrix_stride, row_stride, row + r), p.bytes(), static_cast<int>(threadIdx.x % 32));
    }
  }
}

// ---- moments -----------------------------------------------------------------------------------------------------

// Of one column over the rows of a warp: sum and m2 of x - pivot.
template <class A>
struct ColumnMoments {
  A pivot, sum, m2;
};

// N = 8 values of which `count` are there; d = value - origin, else 0.
template <class T, class A, bool kScaled>
__device__ __forceinline__ void column_deviations(const Words (&data)[kBlockRows], int e, int count, A origin,
                                                  double scale, A* d) {
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r) {
    A v = static_cast<A>(to_compute(elements_of<T>(data[r]).value[e]));
    if constexpr (kScaled) v = v * scale;
    d[r] = r < count ? v - origin : A(0);
  }
}

// The E columns of a lane.
template <class T, class A, bool kScaled>
__device__ __forceinline__ void warp_moments(const cuda::ColumnForward& a, const Piece<T>& p, double scale,
                                             ColumnMoments<A>* m) {
  constexpr int E = kPerWord<T>;
  for (int row = 0; row < p.rows; row += kBlockRows) {
    const int count = p.rows - row < kBlockRows ? p.rows - row : kBlockRows;
    Words data[kBlockRows] = {};
    load_rows<T>(p, a.x, a.x_matrix_stride, a.x_row_stride, row, count, data);
    const A inverse = A(1) / static_cast<A>(count);
    const A before = static_cast<A>(row), weight = static_cast<A>(count) * before / (static_cast<A>(count) + before);
    const A inverse_before = row == 0 ? A(0) : A(1) / before;
#pragma unroll
    for (int e = 0; e < E; ++e) {
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

// Shared memory of a block: moments or sums of a column from every warp, then what its statistic gives.
template <class T>
struct ColumnLayout {
  double parts[3][kColumnWarps][kStripColumns<T>];
};

// Whether the condition holds for any thread of the block. votes: kColumnWarps free places in shared memory. Two
// barriers.
__device__ __forceinline__ bool block_any(bool condition, int* votes) {
  const bool in_warp = device::any(device::kAllLanes, condition);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = in_warp ? 1 : 0;
  device::sync_block();
  int sum = 0;
  for (int w = 0; w < kColumnWarps; ++w) sum += votes[w];
  device::sync_block();
  return sum != 0;
}

// Over the warps of a piece: at(warp) for warps that have rows. As fold_lanes would do it.
template <class M, class F>
__device__ __forceinline__ M fold_column(F&& at) {
  M m[kColumnWarps];
#pragma unroll
  for (int w = 0; w < kColumnWarps; ++w) m[w] = at(w);
#pragma unroll
  for (int step = 1; step < kColumnWarps; step *= 2) {
#pragma unroll
    for (int w = 0; w < kColumnWarps; w += 2 * step) m[w] = merge(m[w], m[w + step]);
  }
  return m[0];
}

// Rows of warp `warp` of a piece.
template <class T, class A>
__device__ __forceinline__ int rows_of_warp(const A& a, const Piece<T>& p, int warp) {
  const std::int64_t rest = a.rows - p.piece * cuda::kPieceRows - warp * kWarpRows;
  return static_cast<int>(rest < 0 ? 0 : rest < kWarpRows ? rest : kWarpRows);
}

// Moments of the piece, of thread t's column t of the strip (threads beyond the strip: of none). Two barriers; the
// shared memory is free afterwards.
template <class T, bool kScaled>
__device__ __forceinline__ Counted piece_moments(const cuda::ColumnForward& a, const Piece<T>& p, double scale,
                                                 ColumnLayout<T>* shared) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto put = [&](int e, double pivot, double sum, double m2) {
    shared->parts[0][warp][lane * E + e] = pivot;
    shared->parts[1][warp][lane * E + e] = sum;
    shared->parts[2][warp][lane * E + e] = m2;
  };
  if (p.rows > 0 && p.left > 0) {
    ColumnMoments<C> m[E];
    warp_moments<T, C, kScaled>(a, p, scale, m);
    bool redo[E], any = false;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      redo[e] = sizeof(C) == 4 && e < p.left && out_of_range<C>(static_cast<double>(m[e].m2) * a.inverse_rows, a.eps);
      any |= redo[e];
      put(e, static_cast<double>(m[e].pivot), static_cast<double>(m[e].sum), static_cast<double>(m[e].m2));
    }
    if constexpr (sizeof(C) == 4) {
      if (any) {
        ColumnMoments<double> wide[E];
        warp_moments<T, double, false>(a, p, 1.0, wide);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          if (redo[e]) put(e, wide[e].pivot, wide[e].sum, wide[e].m2);
        }
      }
    }
  }
  device::sync_block();
  Counted total{};
  const int column = static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    total = fold_column<Counted>([&](int w) {
      const int rows = rows_of_warp<T>(a, p, w);
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

// y of the rows of this warp. n: of the E columns of this lane. All lanes of the warp arrive here.
template <class T>
__device__ __forceinline__ void apply_rows(const cuda::ColumnForward& a, const Piece<T>& p,
                                           const Normalizer<Compute<T>> (&n)[kPerWord<T>]) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < p.rows; ++row) {
    const C weight = parameter<T>(a.weight, a.parameters_as_compute, p.first_row + row, C(1));
    const C bias = parameter<T>(a.bias, a.parameters_as_compute, p.first_row + row, -C(0));
    Words data[1] = {load_word<T>(p.at(a.x, a.x_matrix_stride, a.x_row_stride, row), p.bytes(), lane)};
    C x[E];
    unpack<T>(data[0], x);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      x[e] = normalize(x[e] * n[e].scale, n[e].mean, n[e].rstd, n[e].rstd_low, n[e].shift);
      x[e] = fma(x[e], weight, bias);  // 1 and -0 stand for none and change no bit
    }
    data[0] = pack<T>(x);
    store_run<T, 32, 1>(p.at(a.y, a.y_matrix_stride, a.y_row_stride, row), p.bytes(), device::kAllLanes, lane, data);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// Matrices of one piece: f(index, statistic) gives the constants K of a column, apply(piece, constants) gets those of
// the columns of a lane. They go through shared memory from the thread of a column to the lanes.
template <class T, class K, class Finish, class Apply>
__device__ __forceinline__ void for_whole_matrices(const cuda::ColumnForward& a, Finish&& finish_column,
                                                   Apply&& apply) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  ColumnLayout<T>* shared = &device::shared<ColumnLayout<T>>();
  K* constants = reinterpret_cast<K*>(shared);
  static_assert(kStripColumns<T> * sizeof(K) <= sizeof(ColumnLayout<T>));
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips; unit += gridDim.x) {
    const Piece<T> p(a, unit);
    const int column = static_cast<int>(threadIdx.x);
    const Counted total = piece_moments<T, false>(a, p, 1.0, shared);
    const double variance = total.moments.m2 / total.count;
    const bool redo = column < p.columns && out_of_range<C>(variance, a.eps);
    const double scale = redo_scale<C>(variance);
    Counted again = total;
    if constexpr (sizeof(C) == 8) {  // all threads take part for the columns that need it
      if (block_any(redo, reinterpret_cast<int*>(shared))) {
        for (int set = 1; set < kMomentSets<T>; ++set) {
          const Counted m = piece_moments<T, true>(a, p, set_scale(set), shared);
          if (scale == set_scale(set)) again = m;
        }
      }
    }
    if (column < p.columns) {
      const Statistic<C> s = redo ? finish_scaled<C>(again.moments, again.count, a.eps, scale)
                                  : finish<C>(total.moments, total.count, a.eps);
      constants[column] = finish_column(p.matrix * a.columns + p.first_column + column, s);
    }
    device::sync_block();
    K k[E] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < p.left) k[e] = constants[threadIdx.x % 32 * E + e];
    }
    device::sync_block();  // the next piece overwrites them
    apply(p, k);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_forward_resident(cuda::ColumnForward a) {
  using N = Normalizer<Compute<T>>;
  for_whole_matrices<T, N>(
      a,
      [&](std::int64_t i, const Statistic<Compute<T>>& s) {
        store_statistic(a, i, s);
        return s.normalizer;
      },
      [&](const Piece<T>& p, const N(&n)[kPerWord<T>]) { apply_rows<T>(a, p, n); });
}

// Matrices of several pieces: first the moments of each.
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
__global__ void __launch_bounds__(128) column_statistics_streamed(cuda::ColumnForward a) {
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
    apply_rows<T>(a, p, n);
  }
}

// ---- channels (BN) -----------------------------------------------------------------------------------------------

// As apply_rows, with weight and bias of the column.
template <class T>
__device__ __forceinline__ void apply_channels(const cuda::ColumnForward& a, const Piece<T>& p,
                                               const ChannelConstants<Compute<T>> (&k)[kPerWord<T>]) {
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < p.rows; ++row) {
    Words data[1] = {load_word<T>(p.at(a.x, a.x_matrix_stride, a.x_row_stride, row), p.bytes(), lane)};
    Compute<T> x[E];
    unpack<T>(data[0], x);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      x[e] = normalize_affine(x[e], k[e].scale, k[e].mean, k[e].rstd, k[e].shift, k[e].weight, k[e].bias);
    }
    data[0] = pack<T>(x);
    store_run<T, 32, 1>(p.at(a.y, a.y_matrix_stride, a.y_row_stride, row), p.bytes(), device::kAllLanes, lane, data);
  }
}

// Every column a channel, matrices of one piece.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    column_channels_resident(cuda::ColumnForward a, cuda::Channels channels) {
  using K = ChannelConstants<Compute<T>>;
  for_whole_matrices<T, K>(
      a,
      [&](std::int64_t i, const Statistic<Compute<T>>& s) {
        store_statistic(channels, i, s);
        return channel_constants<T>(channels, i, s);
      },
      [&](const Piece<T>& p, const K(&k)[kPerWord<T>]) { apply_channels<T>(a, p, k); });
}

// The last of three kernels, where `fold` adjacent columns are a channel or there are several pieces; the second is
// channel_statistics_kernel. Also of an inference, which has no first.
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
    apply_channels<T>(a, p, k);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
