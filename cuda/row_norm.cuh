// Rows on the GPU: statistics along contiguous rows, folded across lanes.
//
//   y  = (x - mean) * rstd * weight + bias            Ba, Kiros, Hinton 2016, eq. 4
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight,  dweight = sum dy * xhat,  dbias = sum dy
//
// Passes over memory: forward reads x once and writes y (2s); backward reads x and dy once and writes dx (3s), in
// row_gradient.cuh. A row stays on chip meanwhile: in the registers of 8, 16 or 32 lanes, of a block of 4 or 8 warps,
// or in the shared memory of a block or a cluster. Rows beyond that are read twice (3s).
//
// THE ORDER OF OPERATIONS, by index within the row and so the same at any address and on any device:
//   word    16 bytes of the row (load.cuh), summed as a binary tree
//   lane    words l, l + L, l + 2 L, ... of a run of L lanes, in order
//   run     what the L lanes of a group or warp hold. First a pivot, x0 + mean(x - x0) rounded coarsely; then sum(d)
//   and
//           sum(d^2) of d = x - pivot: exact two-pass, and sums of integers stay exact. Lanes in the compute type, from
//           lane to lane in double. A run of float32 whose m2 is out of range is redone in double.
//   row     runs of a warp each merged as a tree (Chan, Golub, LeVeque 1983) in double, and pieces of 32 KB likewise
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

// Moments of the `count` > 0 elements of a run, in arithmetic A. The L lanes of mask arrive here.
template <class T, class A, bool kScaled, int L, int V>
__device__ __forceinline__ Counted moments_in(const Words (&data)[V], int count, double scale, unsigned mask,
                                              int lane) {
  constexpr int E = kPerWord<T>;
  A first[E];
  deviations<T, A, kScaled>(data[0], E, A(0), scale, first);
  const A x0 = device::shuffle(mask, first[0], 0, L);
  Sums<A> about_x0{A(0), A(0)};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int left = count - (v * L + lane) * E;
    if (left <= 0) continue;
    A d[E], absolute[E];
    deviations<T, A, kScaled>(data[v], left, x0, scale, d);
#pragma unroll
    for (int e = 0; e < E; ++e) absolute[e] = magnitude(d[e]);
    about_x0.first += tree<E>(d);
    about_x0.second += tree<E>(absolute);
  }
  about_x0 = fold_lanes(mask, about_x0, L);
  const A inverse = A(1) / static_cast<A>(count);
  const A pivot = coarse_pivot(x0, about_x0.first * inverse, about_x0.second * inverse * kPivotGrain<A>);

  A sum = A(0), square = A(0);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int left = count - (v * L + lane) * E;
    if (left <= 0) continue;
    A d[E];
    deviations<T, A, kScaled>(data[v], left, pivot, scale, d);
    sum += tree<E>(d);
    square += tree_of_products<E>(d, d);
  }
  const Sums<double> total = fold_lanes(mask, Sums<double>{static_cast<double>(sum), static_cast<double>(square)}, L);
  const double n = static_cast<double>(count);
  return {{static_cast<double>(pivot), total.first, 0.0, fma(negate(total.first), total.first / n, total.second)}, n};
}

// Of the statistic that a run belongs to: what decides whether the run is out of range.
struct Range {
  double inverse_length, eps;
};

// Moments of a run of a row; count 0: none. A run of float32 that is out of range as the row would be is redone in
// double; kScaled (float64): of scale * x.
template <class T, bool kScaled, int L, int V>
__device__ __forceinline__ Counted run_moments(const Words (&data)[V], int count, double scale, const Range& range,
                                               unsigned mask, int lane) {
  using C = Compute<T>;
  if (count <= 0) return Counted{};
  Counted m = moments_in<T, C, kScaled, L, V>(data, count, scale, mask, lane);
  if constexpr (sizeof(C) == 4) {
    if (out_of_range<C>(m.moments.m2 * range.inverse_length, range.eps)) {
      m = moments_in<T, double, false, L, V>(data, count, 1.0, mask, lane);
    }
  }
  return m;
}

template <class C>
__device__ __forceinline__ void store_statistic(const cuda::RowForward& a, std::int64_t row, const Statistic<C>& s) {
  if (a.mean != nullptr) static_cast<C*>(a.mean)[row] = s.mean;
  if (a.rstd != nullptr) static_cast<C*>(a.rstd)[row] = s.rstd;
}

// ---- apply -------------------------------------------------------------------------------------------------------

// y of a run that begins with element `first` of its row, from x in `data`, which it overwrites.
template <class T, int L, int V>
__device__ __forceinline__ void apply_run(const cuda::RowForward& a, const Normalizer<Compute<T>>& n,
                                          std::int64_t first, int count, char* y, unsigned mask, int lane,
                                          Words (&data)[V]) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const char* weight = parameters_from<T>(a.weight, a.parameters_as_compute, first);
  const char* bias = parameters_from<T>(a.bias, a.parameters_as_compute, first);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int w = v * L + lane;
    if (w * E >= count) continue;
    C x[E];
    unpack<T>(data[v], x);
    if (n.scale != C(1)) {
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = x[e] * n.scale;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = normalize(x[e], n.mean, n.rstd, n.rstd_low, n.shift);
    if (weight != nullptr) {
      C gain[E];
      load_parameters<T>(weight, a.parameters_as_compute, count, w, gain);
      if (bias != nullptr) {
        C offset[E];
        load_parameters<T>(bias, a.parameters_as_compute, count, w, offset);
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = fma(x[e], gain[e], offset[e]);
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = x[e] * gain[e];
      }
    } else if (bias != nullptr) {
      C offset[E];
      load_parameters<T>(bias, a.parameters_as_compute, count, w, offset);
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = x[e] + offset[e];
    }
    data[v] = pack<T>(x);
  }
  store_run<T, L, V>(y, count * static_cast<int>(sizeof(T)), mask, lane, data);
}

// ---- forward: a row to a group of lanes --------------------------------------------------------------------------

// L = 8 or 16: several rows to a warp; 32: a warp a row. Groups walk over the rows, the next row on its way in
// registers while this one is computed.
template <class T, int L, int V>
__global__ void __launch_bounds__(128, cuda::forward_group_blocks(V)) row_forward_group(cuda::RowForward a) {
  using C = Compute<T>;
  const unsigned mask = group_mask<L>();
  const int lane = static_cast<int>(threadIdx.x) % L;
  const std::int64_t groups = std::int64_t{gridDim.x} * (blockDim.x / L);
  const int count = static_cast<int>(a.length), bytes = count * static_cast<int>(sizeof(T));
  std::int64_t row = std::int64_t{blockIdx.x} * (blockDim.x / L) + threadIdx.x / L;
  if (row >= a.rows) return;
  Words data[V];
  load_run<T, L, V>(a.x + row * a.x_stride, bytes, lane, data);
  while (true) {
    const std::int64_t next_row = row + groups;
    Words next[V];
    if (next_row < a.rows) load_run<T, L, V>(a.x + next_row * a.x_stride, bytes, lane, next);
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      return run_moments<T, decltype(scaled)::value, L, V>(data, count, scale, {a.inverse_length, a.eps}, mask, lane);
    });
    if (lane == 0) store_statistic(a, row, s);
    apply_run<T, L, V>(a, s.normalizer, 0, count, a.y + row * a.y_stride, mask, lane, data);
    if (next_row >= a.rows) return;
    row = next_row;
#pragma unroll
    for (int v = 0; v < V; ++v) data[v] = next[v];
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

// The shared memory of a block: of this row, and of the one before, which other warps may still read.
struct WarpMoments {
  Counted warps[2][cuda::kPieceWarps];
};

// Every warp holds warp_words <= 32 V words of the row. One barrier a row.
template <class T, int V>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, cuda::forward_blocks(V))
    row_forward_block(cuda::RowForward a) {
  using C = Compute<T>;
  WarpMoments& shared = device::shared<WarpMoments>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const Share<T> share(a.length, std::int64_t{warp} * a.warp_words, a.warp_words);
  Words data[V];
  std::int64_t row = blockIdx.x;
  if (row >= a.rows) return;
  load_run<T, 32, V>(a.x + row * a.x_stride + share.offset(), share.bytes(), lane, data);
  int parity = 0;
  while (true) {
    const std::int64_t next_row = row + gridDim.x;
    Words next[V];
    if (next_row < a.rows) {
      load_run<T, 32, V>(a.x + next_row * a.x_stride + share.offset(), share.bytes(), lane, next);
    }
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      parity ^= 1;
      return fold_warps<cuda::kPieceWarps>(
          run_moments<T, decltype(scaled)::value, 32, V>(data, share.count, scale, {a.inverse_length, a.eps},
                                                         device::kAllLanes, lane),
          shared.warps[parity]);
    });
    if (threadIdx.x == 0) store_statistic(a, row, s);
    apply_run<T, 32, V>(a, s.normalizer, share.first, share.count, a.y + row * a.y_stride + share.offset(),
                        device::kAllLanes, lane, data);
    if (next_row >= a.rows) return;
    row = next_row;
#pragma unroll
    for (int v = 0; v < V; ++v) data[v] = next[v];
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
