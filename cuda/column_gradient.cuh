// Backward down the columns of a matrix (formulas: row_norm.cuh; pieces and order: column_norm.cuh).
//
// Passes over memory: resident (column_resident.cuh) x and dy are read once and dx is written (3s); else three kernels,
// here (5s). dweight and dbias of LN belong to a row: every kSlabWords words of it leave their part of them, 2 numbers
// beside 128 bytes, and fold_partials adds the parts of all matrices in index order.
#pragma once

#include "cuda/column_norm.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

__device__ __forceinline__ Matrices<const char*> dy_of(const cuda::ColumnBackward& a) {
  return {a.dy, a.dy_matrix_stride, a.dy_row_stride};
}
__device__ __forceinline__ Matrices<const char*> x_of(const cuda::ColumnBackward& a) {
  return {a.x, a.x_matrix_stride, a.x_row_stride};
}
__device__ __forceinline__ Matrices<char*> dx_of(const cuda::ColumnBackward& a) {
  return {a.dx, a.dx_matrix_stride, a.dx_row_stride};
}

// ---- sums --------------------------------------------------------------------------------------------------------

// Sums of g, g t and t over the `rows` rows of a stretch, put(e, g, gt, t) of N adjacent columns: blocks of 8 rows as
// trees, then in order in the compute type. load(row, count, dy, x) gives `count` <= 8 rows from `row` on; first_row:
// of the stretch; left: columns that there are
template <class T, int N, class Load, class Put>
__device__ __forceinline__ void stretch_sums(const cuda::ColumnBackward& a, std::int64_t first_row, int rows, int left,
                                             const Compute<T> (&mean)[N], const Compute<T> (&rstd)[N], Load&& load,
                                             Put&& put) {
  using C = Compute<T>;
  if (rows <= 0 || left <= 0) return;
  C sum_g[N] = {}, sum_gt[N] = {}, sum_t[N] = {};
  for (int row = 0; row < rows; row += kBlockRows) {
    const int count = rows - row < kBlockRows ? rows - row : kBlockRows;
    Columns<T, N> dy[kBlockRows] = {}, x[kBlockRows] = {};
    load(row, count, dy, x);
    C weight[kBlockRows];
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) {
      weight[r] = r < count ? weight_of_row<T>(a, first_row + row + r) : C(0);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
      C g[kBlockRows], t[kBlockRows];
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) {
        const C from_mean = (to_compute(x[r].value[e]) - mean[e]) * rstd[e];
        g[r] = to_compute(dy[r].value[e]) * weight[r];
        t[r] = r < count ? from_mean : C(0);
      }
      sum_g[e] += tree<kBlockRows>(g);
      sum_gt[e] += tree_of_products<kBlockRows>(g, t);
      sum_t[e] += tree<kBlockRows>(t);
    }
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    put(e, static_cast<double>(sum_g[e]), static_cast<double>(sum_gt[e]), static_cast<double>(sum_t[e]));
  }
}

// Of the piece, of thread t's column t of the strip. Two barriers.
template <class T>
__device__ __forceinline__ GradientSums piece_sums(const cuda::ColumnBackward& a, const Piece<T>& p,
                                                   const Compute<T> (&mean)[kPerWord<T>],
                                                   const Compute<T> (&rstd)[kPerWord<T>], ColumnLayout<T>* shared) {
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  stretch_sums<T, E>(
      a, p.first_row, p.rows, p.left, mean, rstd,
      [&](int row, int count, Columns<T, E>(&dy)[kBlockRows], Columns<T, E>(&x)[kBlockRows]) {
        load_rows<T>(p, dy_of(a), row, count, dy);
        load_rows<T>(p, x_of(a), row, count, x);
      },
      [&](int e, double g, double gt, double t) {
        shared->parts[0][warp][lane * E + e] = g;
        shared->parts[1][warp][lane * E + e] = gt;
        shared->parts[2][warp][lane * E + e] = t;
      });
  device::sync_block();
  GradientSums total{};
  const int column = static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    total = fold_column<GradientSums>([&](int w) {
      if (rows_of_stretch(a.rows, p.piece * kColumnWarps + w) == 0) return GradientSums{};
      return GradientSums{shared->parts[0][w][column], shared->parts[1][w][column], shared->parts[2][w][column]};
    });
  }
  device::sync_block();
  return total;
}

// mean and rstd of the columns from `first` on, of all matrices' columns; `left` that there are.
template <class C, int N>
__device__ __forceinline__ void load_statistics(const cuda::ColumnBackward& a, std::int64_t first, int left,
                                                C (&mean)[N], C (&rstd)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const std::int64_t i = statistic_of_column(first + e, a.fold);
    mean[e] = e < left ? static_cast<const C*>(a.mean)[i] : C(0);
    rstd[e] = e < left ? static_cast<const C*>(a.rstd)[i] : C(0);
  }
}

template <class C>
__device__ __forceinline__ GradientConstants<C> column_constants(const cuda::ColumnBackward& a,
                                                                 const GradientSums& sums, std::int64_t i) {
  double dweight;  // that of a weight that belongs to the statistic
  return finish_gradient<C>(sums, static_cast<double>(a.rows), static_cast<const C*>(a.mean)[i],
                            static_cast<const C*>(a.rstd)[i], 1.0, true, &dweight);
}

// ---- gradients ---------------------------------------------------------------------------------------------------

// Where the parts of dweight and dbias go that belong to the words from `word` of a matrix on, a multiple of
// kSlabWords: of its row 0. Null where they are not wanted.
template <class C>
__device__ __forceinline__ C* partial_of(const cuda::ColumnBackward& a, std::int64_t matrix, std::int64_t word) {
  if (a.partial == nullptr) return nullptr;
  return static_cast<C*>(a.partial) + (matrix * a.slabs + word / cuda::kSlabWords) * 2 * a.partial_length;
}

// dx of a word of row `row`, and what its kSlabWords words give to `partial` (partial_of; null beyond the columns). k:
// of its E columns, all zero beyond the matrix. The lanes of mask, kSlabWords adjacent ones, arrive here.
template <class T>
__device__ __forceinline__ Words gradient_word(const cuda::ColumnBackward& a, std::int64_t row, const Words& dy,
                                               const Words& x, const GradientConstants<Compute<T>> (&k)[kPerWord<T>],
                                               Compute<T>* partial, unsigned mask) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const C weight = weight_of_row<T>(a, row);
  C g[E], xhat[E];
  unpack<T>(dy, g);
  unpack<T>(x, xhat);
#pragma unroll
  for (int e = 0; e < E; ++e) xhat[e] = normalize(xhat[e], k[e].mean, k[e].rstd, k[e].shift);
  if (a.partial != nullptr) {
    const Sums<double> sums = fold_lanes(
        mask, Sums<double>{static_cast<double>(tree_of_products<E>(g, xhat)), static_cast<double>(tree<E>(g))},
        cuda::kSlabWords);
    if (threadIdx.x % cuda::kSlabWords == 0 && partial != nullptr) {
      partial[row] = static_cast<C>(sums.first);
      partial[a.partial_length + row] = static_cast<C>(sums.second);
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    g[e] = input_gradient(g[e], weight, xhat[e], k[e].minus_mean_g, k[e].minus_mean_gx, k[e].factor);
  }
  return pack<T>(g);
}

// ---- backward, streamed ------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_sums_streamed(cuda::ColumnBackward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  ColumnLayout<T>* shared = &device::shared<ColumnLayout<T>>();
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips * a.pieces; unit += gridDim.x) {
    const Piece<T> p(a, unit);
    C mean[E], rstd[E];
    load_statistics(a, p.matrix * a.columns + p.first_column + threadIdx.x % 32 * E, p.left, mean, rstd);
    const GradientSums sums = piece_sums<T>(a, p, mean, rstd, shared);
    const std::int64_t column = p.matrix * a.columns + p.first_column + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < p.columns) {
      static_cast<GradientSums*>(a.piece_sums)[column * a.pieces + p.piece] = sums;
    }
  }
}

// A warp a column.
template <class T>
__global__ void __launch_bounds__(128) column_constants_streamed(cuda::ColumnBackward a) {
  using C = Compute<T>;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32), statistics = a.matrices * a.columns;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < statistics; i += warps) {
    const GradientSums* sums = static_cast<const GradientSums*>(a.piece_sums) + i * a.pieces;
    const GradientSums total = fold_places(a.pieces, [&](std::int64_t piece) { return sums[piece]; });
    if (threadIdx.x % 32 == 0) static_cast<GradientConstants<C>*>(a.constants)[i] = column_constants<C>(a, total, i);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_gradient_streamed(cuda::ColumnBackward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  for (std::int64_t left = a.matrices * a.strips * a.pieces - blockIdx.x; left > 0; left -= gridDim.x) {
    const Piece<T> p(a, left - 1);
    const std::int64_t first = p.matrix * a.columns + p.first_column + threadIdx.x % 32 * E;
    GradientConstants<C> k[E] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < p.left) {
        k[e] = static_cast<const GradientConstants<C>*>(a.constants)[statistic_of_column(first + e, a.fold)];
      }
    }
    C* partial = p.left > 0 ? partial_of<C>(a, p.matrix, p.strip * 32 + threadIdx.x % 32) : nullptr;
    for_words<T, 2>(p, {dy_of(a), x_of(a)}, dx_of(a), [&](int row, const Words(&words)[2]) {
      return gradient_word<T>(a, p.first_row + row, words[0], words[1], k, partial, device::kAllLanes);
    });
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
