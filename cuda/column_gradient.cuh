// Backward down the columns of a matrix (formulas: row_norm.cuh; pieces and order: column_norm.cuh).
//
// Passes over memory: where a piece holds all rows of a matrix one kernel reads x and dy twice, the second time out of
// L2, and writes dx (3s); else three kernels (5s). dweight and dbias belong to a row: every strip leaves its part of
// them, 2 numbers a row beside its 512 bytes, and fold_partials adds the strips of all matrices in index order.
#pragma once

#include "cuda/column_norm.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- sums --------------------------------------------------------------------------------------------------------

// Sums of g, g t and t of the piece, of thread t's column t: blocks of 8 rows as trees, a warp's in order in the
// compute type, warps in double. mean, rstd: of the E columns of this lane. Two barriers.
template <class T>
__device__ __forceinline__ GradientSums piece_sums(const cuda::ColumnBackward& a, const Piece<T>& p,
                                                   const Compute<T> (&mean)[kPerWord<T>],
                                                   const Compute<T> (&rstd)[kPerWord<T>], ColumnLayout<T>* shared) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (p.rows > 0 && p.left > 0) {
    C sum_g[E] = {}, sum_gt[E] = {}, sum_t[E] = {};
    for (int row = 0; row < p.rows; row += kBlockRows) {
      const int count = p.rows - row < kBlockRows ? p.rows - row : kBlockRows;
      Words dy[kBlockRows] = {}, x[kBlockRows] = {};
      load_rows<T>(p, a.dy, a.dy_matrix_stride, a.dy_row_stride, row, count, dy);
      load_rows<T>(p, a.x, a.x_matrix_stride, a.x_row_stride, row, count, x);
      C weight[kBlockRows];
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) {
        weight[r] = r < count ? parameter<T>(a.weight, a.parameters_as_compute, p.first_row + row + r, C(1)) : C(0);
      }
#pragma unroll
      for (int e = 0; e < E; ++e) {
        C g[kBlockRows], t[kBlockRows];
#pragma unroll
        for (int r = 0; r < kBlockRows; ++r) {
          const C from_mean = (to_compute(elements_of<T>(x[r]).value[e]) - mean[e]) * rstd[e];
          g[r] = to_compute(elements_of<T>(dy[r]).value[e]) * weight[r];
          t[r] = r < count ? from_mean : C(0);
        }
        sum_g[e] += tree<kBlockRows>(g);
        sum_gt[e] += tree_of_products<kBlockRows>(g, t);
        sum_t[e] += tree<kBlockRows>(t);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      shared->parts[0][warp][lane * E + e] = static_cast<double>(sum_g[e]);
      shared->parts[1][warp][lane * E + e] = static_cast<double>(sum_gt[e]);
      shared->parts[2][warp][lane * E + e] = static_cast<double>(sum_t[e]);
    }
  }
  device::sync_block();
  GradientSums total{};
  const int column = static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    total = fold_column<GradientSums>([&](int w) {
      if (rows_of_warp<T>(a, p, w) == 0) return GradientSums{};
      return GradientSums{shared->parts[0][w][column], shared->parts[1][w][column], shared->parts[2][w][column]};
    });
  }
  device::sync_block();
  return total;
}

// mean and rstd of the columns of this lane.
template <class T>
__device__ __forceinline__ void load_statistics(const cuda::ColumnBackward& a, const Piece<T>& p,
                                                Compute<T> (&mean)[kPerWord<T>], Compute<T> (&rstd)[kPerWord<T>]) {
  using C = Compute<T>;
  const std::int64_t first = p.matrix * a.columns + p.first_column + threadIdx.x % 32 * kPerWord<T>;
#pragma unroll
  for (int e = 0; e < kPerWord<T>; ++e) {
    const std::int64_t i = statistic_of_column(first + e, a.fold);
    mean[e] = e < p.left ? static_cast<const C*>(a.mean)[i] : C(0);
    rstd[e] = e < p.left ? static_cast<const C*>(a.rstd)[i] : C(0);
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

// dx of the rows of this warp, and the strip's part of their dweight and dbias. k: of the E columns of this lane; all
// zero beyond the matrix. All lanes of the warp arrive here.
template <class T>
__device__ __forceinline__ void gradient_rows(const cuda::ColumnBackward& a, const Piece<T>& p,
                                              const GradientConstants<Compute<T>> (&k)[kPerWord<T>]) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  C* partial = nullptr;
  if (a.partial != nullptr) {
    partial = static_cast<C*>(a.partial) + (p.matrix * a.strips + p.strip) * 2 * a.partial_length + p.first_row;
  }
  for (int row = 0; row < p.rows; ++row) {
    const C weight = parameter<T>(a.weight, a.parameters_as_compute, p.first_row + row, C(1));
    const Words x = load_word<T>(p.at(a.x, a.x_matrix_stride, a.x_row_stride, row), p.bytes(), lane);
    Words data[1] = {load_word<T>(p.at(a.dy, a.dy_matrix_stride, a.dy_row_stride, row), p.bytes(), lane)};
    C g[E], xhat[E];
    unpack<T>(data[0], g);
    unpack<T>(x, xhat);
#pragma unroll
    for (int e = 0; e < E; ++e) xhat[e] = normalize(xhat[e], k[e].mean, k[e].rstd, k[e].shift);
    if (partial != nullptr) {
      const Sums<double> sums = fold_lanes(
          device::kAllLanes,
          Sums<double>{static_cast<double>(tree_of_products<E>(g, xhat)), static_cast<double>(tree<E>(g))}, 32);
      if (lane == 0) {
        partial[row] = static_cast<C>(sums.first);
        partial[a.partial_length + row] = static_cast<C>(sums.second);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      g[e] = input_gradient(g[e], weight, xhat[e], k[e].minus_mean_g, k[e].minus_mean_gx, k[e].factor);
    }
    data[0] = pack<T>(g);
    store_run<T, 32, 1>(p.at(a.dx, a.dx_matrix_stride, a.dx_row_stride, row), p.bytes(), device::kAllLanes, lane, data);
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------

// Matrices of one piece. finish_column(index, sums): the constants of a column
template <class T, class Finish>
__device__ __forceinline__ void backward_of_whole_matrices(const cuda::ColumnBackward& a, Finish&& finish_column) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  ColumnLayout<T>* shared = &device::shared<ColumnLayout<T>>();
  GradientConstants<C>* constants = reinterpret_cast<GradientConstants<C>*>(shared);
  static_assert(kStripColumns<T> * sizeof(GradientConstants<C>) <= sizeof(ColumnLayout<T>));
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips; unit += gridDim.x) {
    const Piece<T> p(a, unit);
    GradientConstants<C> k[E] = {};
    {
      C mean[E], rstd[E];
      load_statistics<T>(a, p, mean, rstd);
      const GradientSums sums = piece_sums<T>(a, p, mean, rstd, shared);
      const int column = static_cast<int>(threadIdx.x);
      if (column < p.columns) {
        constants[column] = finish_column(p.matrix * a.columns + p.first_column + column, sums);
      }
    }
    device::sync_block();
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < p.left) k[e] = constants[threadIdx.x % 32 * E + e];
    }
    device::sync_block();  // the next piece overwrites them
    gradient_rows<T>(a, p, k);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_backward_resident(cuda::ColumnBackward a) {
  backward_of_whole_matrices<T>(
      a, [&](std::int64_t i, const GradientSums& sums) { return column_constants<Compute<T>>(a, sums, i); });
}

// Every column a channel (BN).
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    column_backward_channels_resident(cuda::ColumnBackward a, cuda::Channels channels) {
  backward_of_whole_matrices<T>(
      a, [&](std::int64_t i, const GradientSums& sums) { return gradient_constants<T>(channels, i, sums, true); });
}

// Matrices of several pieces: first the sums of each.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) column_sums_streamed(cuda::ColumnBackward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  ColumnLayout<T>* shared = &device::shared<ColumnLayout<T>>();
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips * a.pieces; unit += gridDim.x) {
    const Piece<T> p(a, unit);
    C mean[E], rstd[E];
    load_statistics<T>(a, p, mean, rstd);
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
    gradient_rows<T>(a, p, k);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
