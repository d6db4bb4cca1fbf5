// Rows on the GPU: statistics along contiguous rows, folded across lanes.
//
//   y  = (x - mean) * rstd * weight + bias            Ba, Kiros, Hinton 2016, eq. 4
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight,  dweight = sum dy * xhat,  dbias = sum dy
//
// Passes over memory: forward reads x once and writes y (2s); backward reads x and dy once and writes dx (3s), in
// row_gradient.cuh. A row stays on chip meanwhile: in the registers of 8, 16 or 32 lanes, of a block of 4 or 8 warps,
// or in the shared memory of a block or a cluster. Rows beyond that are read twice (3s).
//
// What it costs beside that: by its data sheet (4.8 TB/s, 528 schedulers) an H200 moves 5 bytes while a scheduler
// issues an instruction. Followed by hand through `cuobjdump -sass` for sm_90, not measured, a warp issues for 4 KB of
// x and 4 KB of y 800 (float32, rows of 4 KB) to 1600 (bfloat16, 256 bytes) instructions in a forward, and in a
// backward of bfloat16 1100 to 1200 for 4 KB of x and dy and 2 KB of dx. So what every lane does alike for a row
// (adding up over lanes, a statistic in double) is done for several rows at a time, and 16-bit types have no
// instruction to spare.
//
// THE ORDER OF OPERATIONS, by index within the row and so the same at any address and on any device:
//   word    16 bytes of the row (load.cuh), summed as a binary tree
//   lane    words l, l + L, l + 2 L, ... of a run of L lanes, in order
//   run     what the L lanes of a group or warp hold. First a pivot, x0 + mean(x - x0) over every fourth word of every
//           lane, rounded coarsely; then sum(d) and sum(d^2) of d = x - pivot: as exact two-pass, and sums of integers
//           stay exact. Lanes in the compute type, from lane to lane as a tree in double. A run of float32 whose m2 is
//           out of range is redone in double.
//   row     runs of a warp each: up to 32 KB merged at once in double, beyond that, and of float64, as a tree (Chan,
//           Golub, LeVeque 1983), and pieces of 32 KB likewise
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cuda/device.cuh"
#include "cuda/kernels.hpp"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistic.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- moments -----------------------------------------------------------------------------------------------------

// x - origin of the elements of a word in A, 0 beyond the `left` that there are. kScaled: x times scale first.
template <class T, class A, bool kScaled>
__device__ __forceinline__ void deviations(const Words& word, int left, A origin, double scale, A* d) {
  constexpr int E = kPerWord<T>;
  Compute<T> x[E];
  unpack<T>(word, x);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    A v = static_cast<A>(x[e]);
    if constexpr (kScaled) v = v * scale;
    d[e] = v - origin;
  }
  if (left < E) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e >= left) d[e] = A(0);
    }
  }
}

// The pivot is the mean of every kPivotWords-th word of a lane: of a quarter of the run at least. Their variance about
// the run's mean is part of the run's, so a pivot misses the mean by sqrt(3) standard deviations at most, and the sum
// of squares about it is 4 times m2. (Of one word of eight 8 times: 4.1 u, where all the others lie elsewhere.)
inline constexpr int kPivotWords = 4;

// Moments of R rows of n.value = count > 0 elements, a run of each in every group of L lanes, in arithmetic A: lane l
// gets those of row l % R. kScaled: of scale times one row. The whole warp arrives here.
template <class T, class A, bool kScaled, int L, int V, int R, bool kWhole>
__device__ __forceinline__ Counted moments_in(const Words (&data)[R][V], int count, const Divisor& n, double scale,
                                              int lane) {
  constexpr int E = kPerWord<T>;
  static_assert(!kScaled || R == 1);
  A x0[R];
  Sums<A> about_x0[R];
  const int left = count - lane * E;
  int near = 0;  // elements whose mean the pivot is
#pragma unroll
  for (int v = 0; v < V && v * L * E < count; v += kPivotWords) {
    near += count - v * L * E < L * E ? count - v * L * E : L * E;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    A first[E];
    deviations<T, A, kScaled>(data[r][0], E, A(0), scale, first);
    x0[r] = device::shuffle(device::kAllLanes, first[0], 0, L);
    about_x0[r] = {A(0), A(0)};
#pragma unroll
    for (int v = 0; v < V && v * L * E < count; v += kPivotWords) {
      const int left_of_word = left - v * L * E;
      A d[E], absolute[E];
      deviations<T, A, kScaled>(data[r][v], kWhole ? E : left_of_word, x0[r], scale, d);
#pragma unroll
      for (int e = 0; e < E; ++e) absolute[e] = magnitude(d[e]);
      const Sums<A> word{tree<E>(d), tree<E>(absolute)};
      about_x0[r] = merge(about_x0[r], select(kWhole && left_of_word <= 0, Sums<A>{A(0), A(0)}, word));
    }
  }
  const Sums<A> own = fold_rows<L, R>(about_x0);
  const A inverse = A(1) / static_cast<A>(near);
  const A own_x0 = own_row(x0, lane);
  const A own_pivot = coarse_pivot(own_x0, own.first * inverse, own.second * inverse * kPivotGrain<A>);

  Sums<double> sums[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const A pivot = of_row<L, R>(own_pivot, r);
    Sums<A> sum{A(0), A(0)};
#pragma unroll
    for (int v = 0; v < V && v * L * E < count; ++v) {
      const int left_of_word = left - v * L * E;
      A d[E];
      deviations<T, A, kScaled>(data[r][v], kWhole ? E : left_of_word, pivot, scale, d);
      const Sums<A> word{tree<E>(d), tree_of_products<E>(d, d)};
      sum = merge(sum, select(kWhole && left_of_word <= 0, Sums<A>{A(0), A(0)}, word));
    }
    sums[r] = {static_cast<double>(sum.first), static_cast<double>(sum.second)};
  }
  const Sums<double> total = fold_rows<L, R>(sums);
  return {{static_cast<double>(own_pivot), total.first, 0.0, fma(negate(total.first), total.first / n, total.second)},
          n.value};
}

// Of the statistic that a run belongs to: what decides whether the run is out of range.
struct Range {
  double inverse_length, eps;
};

// Moments of a run of R rows each, lane l of row l % R; count 0: none. A run of float32 that is out of range as the row
// would be is redone in double; kScaled (float64): of scale * x. That is rare, and done row by row, from what
// reload(r, words) reads, and so is `data` afterwards: all at once, or beside it, would need twice the registers. The
// whole warp arrives here.
template <class T, bool kScaled, int L, int V, int R, bool kWhole, class F>
__device__ __forceinline__ Counted run_moments(Words (&data)[R][V], int count, const Divisor& n, double scale,
                                               const Range& range, int lane, F&& reload) {
  using C = Compute<T>;
  if (count <= 0) return Counted{};
  const auto one_by_one = [&] {
    Counted own{};
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      Words row[1][V];
      reload(r, row[0]);
      const Counted m = moments_in<T, double, kScaled, L, V, 1, kWhole>(row, count, n, of_row<L, R>(scale, r), lane);
      if (lane % R == r) own = m;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) reload(r, data[r]);
    return own;
  };
  if constexpr (kScaled) return one_by_one();
  Counted m = moments_in<T, C, false, L, V, R, kWhole>(data, count, n, 1.0, lane);
  if constexpr (sizeof(C) == 4) {
    const bool redo = out_of_range<C>(m.moments.m2 * range.inverse_length, range.eps);
    if (device::any(device::kAllLanes, redo)) {
      const Counted exact = one_by_one();
      if (redo) m = exact;
    }
  }
  return m;
}
// Of one row.
template <class T, bool kScaled, int V>
__device__ __forceinline__ Counted run_moments(Words (&data)[1][V], int count, double scale, const Range& range,
                                               int lane) {
  return run_moments<T, kScaled, 32, V, 1, false>(data, count, divisor(count < 1 ? 1 : count), scale, range, lane,
                                                  [&](int, Words(&words)[V]) {
#pragma unroll
                                                    for (int v = 0; v < V; ++v) words[v] = data[0][v];
                                                  });
}

template <class C>
__device__ __forceinline__ void store_statistic(const cuda::RowForward& a, std::int64_t row, const Statistic<C>& s) {
  if (a.mean != nullptr) static_cast<C*>(a.mean)[row] = s.mean;
  if (a.rstd != nullptr) static_cast<C*>(a.rstd)[row] = s.rstd;
}

// ---- apply -------------------------------------------------------------------------------------------------------

// x times the scale of its row, which is a power of two, so that T holds it. own_scale: of row lane % R
template <class T, int L, int V, int R>
__device__ __forceinline__ void scale_rows(Words (&data)[R][V], Compute<T> own_scale) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Compute<T> scale = of_row<L, R>(own_scale, r);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Compute<T> x[kPerWord<T>];
      unpack<T>(data[r][v], x);
#pragma unroll
      for (int e = 0; e < kPerWord<T>; ++e) x[e] = x[e] * scale;
      data[r][v] = pack<T>(x);
    }
  }
}

// y of a run of R rows each, that begins with element `first` of its row, from x in `data`, which it overwrites. own:
// of row lane % R
template <class T, int L, int V, int R, bool kWhole>
__device__ __forceinline__ void apply_runs(const cuda::RowForward& a, const Normalizer<Compute<T>>& own,
                                           std::int64_t first, int count, int lane, Words (&data)[R][V]) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const char* weight = parameters_from<T>(a.weight, a.parameters_as_compute, first);
  const char* bias = parameters_from<T>(a.bias, a.parameters_as_compute, first);
  if (device::any(device::kAllLanes, own.scale != C(1))) scale_rows<T, L>(data, own.scale);
  const auto normalizer_of = [&](int r) {
    return Normalizer<C>{of_row<L, R>(own.mean, r), of_row<L, R>(own.rstd, r), of_row<L, R>(own.rstd_low, r),
                         of_row<L, R>(own.shift, r), C(1)};
  };
  Normalizer<C> of[R];
#pragma unroll
  for (int r = 0; r < R && V > 1; ++r) of[r] = normalizer_of(r);
#pragma unroll
  for (int v = 0; v < V && v * L * E < count; ++v) {
    const int place = (v * L + lane) * E < count ? lane : 0;  // any: what lies beyond the run is not stored
    C gain[E], offset[E];                                     // once for all rows
    if (weight != nullptr) load_parameters<T, kWhole>(weight, a.parameters_as_compute, count, v * L, place, gain);
    if (bias != nullptr) load_parameters<T, kWhole>(bias, a.parameters_as_compute, count, v * L, place, offset);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Normalizer<C> n = V == 1 ? normalizer_of(r) : of[r];  // one at a time where that is possible
      C x[E];
      unpack<T>(data[r][v], x);
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = normalize(x[e], n.mean, n.rstd, n.rstd_low, n.shift);
      if (weight != nullptr && bias != nullptr) {
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = fma(x[e], gain[e], offset[e]);
      } else if (weight != nullptr) {
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = x[e] * gain[e];
      } else if (bias != nullptr) {
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = x[e] + offset[e];
      }
      data[r][v] = pack<T>(x);
    }
  }
}
// Of one row, and to memory.
template <class T, int V>
__device__ __forceinline__ void apply_run(const cuda::RowForward& a, const Normalizer<Compute<T>>& n,
                                          std::int64_t first, int count, char* y, int lane, Words (&data)[1][V]) {
  apply_runs<T, 32, V, 1, false>(a, n, first, count, lane, data);
  store_run<T, 32, V>(y, count * static_cast<int>(sizeof(T)), device::kAllLanes, lane, data[0]);
}

// ---- forward: a row to a group of lanes --------------------------------------------------------------------------

// L = 8 or 16: several groups to a warp; 32: one. A group takes R rows at a time: adding up over lanes, finishing a
// statistic and loading weight and bias cost a warp the same instructions for R rows as for one.
template <class T, int L, int V, int R, bool kWhole>
__global__ void __launch_bounds__(128, cuda::forward_group_blocks(sizeof(T), V, kWhole))
    row_forward_group(cuda::RowForward a) {
  using C = Compute<T>;
  constexpr int G = 32 / L;  // groups of a warp: adjacent rows
  const int lane = static_cast<int>(threadIdx.x) % L;
  const int count = static_cast<int>(a.length), bytes = count * static_cast<int>(sizeof(T));
  const Divisor n{static_cast<double>(count), a.inverse_length};
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  const std::int64_t warp = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  for (std::int64_t base = warp * (G * R); base < a.rows; base += warps * (G * R)) {
    const std::int64_t row = base + threadIdx.x % 32 / L;  // and every G-th after it
    const int rows = static_cast<int>(a.rows - row < G * R ? a.rows - row : G * R);
    const char* const x = a.x + row * a.x_stride;
    const auto load = [&](int r, Words(&words)[V]) {
      load_run<T, L, V, kWhole>(x + r * (G * a.x_stride), r * G < rows ? bytes : 0, lane, words);
    };
    Words data[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) load(r, data[r]);
    const Statistic<C> own = statistic_of_row<C>(n, a.eps, [&](auto scaled, double scale) {
      return run_moments<T, decltype(scaled)::value, L, V, R, kWhole>(data, count, n, scale, {a.inverse_length, a.eps},
                                                                      lane, load);
    });
    if (lane < R && lane * G < rows) store_statistic(a, row + lane * G, own);
    apply_runs<T, L, V, R, kWhole>(a, own.normalizer, 0, count, lane, data);
    char* const y = a.y + row * a.y_stride;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      store_run<T, L, V, kWhole>(y + r * (G * a.y_stride), r * G < rows ? bytes : 0, group_mask<L>(), lane, data[r]);
    }
  }
}

// ---- forward: a row to a block -----------------------------------------------------------------------------------

// Which elements of a row belong to a warp that holds `warp_words` words of it from `first_word` on.
template <class T>
struct Share {
  std::int64_t first;
  int count;
  __device__ __forceinline__ Share(std::int64_t length, std::int64_t first_word, int warp_words)
      : first(first_word * kPerWord<T>) {
    const std::int64_t left = length - first, most = std::int64_t{warp_words} * kPerWord<T>;
    count = static_cast<int>(left < 0 ? 0 : left < most ? left : most);
  }
  __device__ __forceinline__ std::int64_t offset() const { return first * static_cast<std::int64_t>(sizeof(T)); }
  __device__ __forceinline__ int bytes() const { return count * static_cast<int>(sizeof(T)); }
};

// The moments of R rows of n elements that every warp of a block has a run of, lane l of row l % R. scratch, barrier:
// as of exchange_warps.
//
// Of 16 and 32 bits not pair by pair as Counted merges, which divides three times a pair, but all at once:
//
//   mean = sum n_i mean_i / n,  m2 = sum m2_i + n_i (mean_i - mean)^2      about the first pivot, in double
template <class C, int R>
__device__ __forceinline__ Counted fold_row_warps(const Counted& mine, const Divisor& n,
                                                  Counted (*scratch)[cuda::kPieceWarps]) {
  constexpr int kWidth = R * cuda::kPieceWarps;
  const Counted m = exchange_warps<cuda::kPieceWarps, R>(mine, scratch);
  if constexpr (sizeof(C) == 8) return fold_lanes(device::kAllLanes, m, kWidth, R);
  const int first_warp = static_cast<int>(threadIdx.x % R);  // the lane that has the same row of warp 0
  const double origin = device::shuffle(device::kAllLanes, m.moments.pivot, first_warp, kWidth);
  const bool some = m.count > 0.0;
  const double shift = some ? m.moments.pivot - origin : 0.0, mean = some ? m.moments.sum / m.count : 0.0;
  const double sum = fold_lanes(device::kAllLanes, fma(m.count, shift, m.moments.sum), kWidth, R);
  const double from_mean = (shift - sum / n) + mean;
  const double m2 = fold_lanes(device::kAllLanes, fma(m.count * from_mean, from_mean, m.moments.m2), kWidth, R);
  return {{origin, sum, 0.0, m2}, n.value};
}

// The shared memory of a block: of these rows, and of those before, which other warps may still read.
template <int R>
struct WarpMoments {
  Counted warps[2][R][cuda::kPieceWarps];
};

// Every warp holds warp_words <= 32 V words of each of R rows. One barrier for R rows.
template <class T, int V, int R, bool kWhole>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, cuda::forward_blocks(sizeof(T), V, kWhole))
    row_forward_block(cuda::RowForward a) {
  using C = Compute<T>;
  WarpMoments<R>& shared = device::shared<WarpMoments<R>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // A Share in 32 bits: of 64 the registers do not suffice on sm_80.
  const int first = warp * a.warp_words * kPerWord<T>, left = static_cast<int>(a.length) - first;
  const int most = a.warp_words * kPerWord<T>, count = left < 0 ? 0 : left < most ? left : most;
  const int offset = first * static_cast<int>(sizeof(T)), bytes = count * static_cast<int>(sizeof(T));
  const Divisor n{static_cast<double>(a.length), a.inverse_length};
  int parity = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * R; row < a.rows; row += std::int64_t{gridDim.x} * R) {
    const int rows = static_cast<int>(a.rows - row < R ? a.rows - row : R);
    const auto load = [&](int r, Words(&words)[V]) {
      load_run<T, 32, V, kWhole>(a.x + (row + r) * a.x_stride + offset, r < rows ? bytes : 0, lane, words);
    };
    Words data[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) load(r, data[r]);
    const Statistic<C> own = statistic_of_row<C>(n, a.eps, [&](auto scaled, double scale) {
      parity ^= 1;
      const Counted mine = run_moments<T, decltype(scaled)::value, 32, V, R, kWhole>(
          data, count, divisor(count < 1 ? 1 : count), scale, {a.inverse_length, a.eps}, lane, load);
      return fold_row_warps<C, R>(mine, n, shared.warps[parity]);
    });
    if (static_cast<int>(threadIdx.x) < rows) store_statistic(a, row + lane, own);
    apply_runs<T, 32, V, R, kWhole>(a, own.normalizer, first, count, lane, data);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      store_run<T, 32, V, kWhole>(a.y + (row + r) * a.y_stride + offset, r < rows ? bytes : 0, device::kAllLanes, lane,
                                  data[r]);
    }
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
