// Reductions over lanes, warps and blocks, of anything with merge(a, b), a before b in index order.
//
// Every order of merging is a binary tree over fixed places, neighbours first: it follows from the number of places
// alone, and all threads end with the same bits. M{} is what merge() leaves the other side as it is with.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/isa.hpp"
#include "core/moments.hpp"
#include "cuda/device.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- what is merged ----------------------------------------------------------------------------------------------

// Moments of `count` values; count 0: of none.
struct Counted {
  Moments<double> moments;
  double count;
};

__device__ __forceinline__ Counted merge(const Counted& a, const Counted& b) {
  if (b.count == 0.0) return a;
  if (a.count == 0.0) return b;
  return {merge(a.moments, a.count, b.moments, b.count), a.count + b.count};
}

__device__ __forceinline__ double merge(double a, double b) { return a + b; }

// Two sums at a time.
template <class S>
struct Sums {
  S first, second;
};

template <class S>
__device__ __forceinline__ Sums<S> merge(const Sums<S>& a, const Sums<S>& b) {
  return {a.first + b.first, a.second + b.second};
}

__device__ __forceinline__ GradientSums merge(const GradientSums& a, const GradientSums& b) {
  return {a.g + b.g, a.gt + b.gt, a.t + b.t};
}

// condition ? a : b, number by number: of whole structs the compiler would select their addresses in local memory.
template <class S>
__device__ __forceinline__ S select(bool condition, S a, S b) {
  return condition ? a : b;
}
template <class S>
__device__ __forceinline__ Sums<S> select(bool condition, const Sums<S>& a, const Sums<S>& b) {
  return {select(condition, a.first, b.first), select(condition, a.second, b.second)};
}

__device__ __forceinline__ GradientSums select(bool condition, const GradientSums& a, const GradientSums& b) {
  return {select(condition, a.g, b.g), select(condition, a.gt, b.gt), select(condition, a.t, b.t)};
}

// ---- lanes -------------------------------------------------------------------------------------------------------

// The lanes of `mask` that are a group of L adjacent ones.
template <int L>
__device__ __forceinline__ unsigned group_mask() {
  return (device::kAllLanes >> (32 - L)) << (threadIdx.x % 32u / L * L);
}

// Over groups of `width` adjacent lanes, a power of two, or over every first-th of them. All lanes of mask arrive here.
// log2(width / first) shuffles.
template <class M>
__device__ __forceinline__ M fold_lanes(unsigned mask, const M& value, int width, int first = 1) {
  M mine = value;  // not a parameter: TSAN does not see arguments being read
  const int lane = static_cast<int>(threadIdx.x) % width;
#pragma unroll
  for (int offset = first; offset < width; offset *= 2) {
    const M other = device::shuffle_xor(mask, mine, offset, width);
    mine = lane & offset ? merge(other, mine) : merge(mine, other);
  }
  return mine;
}

// Of R rows at a time, each over the groups of L lanes: lane l ends with row l % R, merged as fold_lanes merges. Two
// lanes exchange the halves of what they hold: R - 1 + log2(L / R) shuffles, not R log2(L). The whole warp arrives
// here.
template <int L, int R, class M>
__device__ __forceinline__ M fold_rows(const M (&rows)[R]) {
  static_assert(R <= L && (R & (R - 1)) == 0);
  const int lane = static_cast<int>(threadIdx.x) % L;
  M held[R];
#pragma unroll
  for (int r = 0; r < R; ++r) held[r] = rows[r];
#pragma unroll
  for (int offset = 1; offset < R; offset *= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < R / offset / 2; ++i) {
      const M mine = select(upper, held[2 * i + 1], held[2 * i]), given = select(upper, held[2 * i], held[2 * i + 1]);
      const M other = device::shuffle_xor(device::kAllLanes, given, offset, L);
      held[i] = select(upper, merge(other, mine), merge(mine, other));
    }
  }
  return fold_lanes(device::kAllLanes, held[0], L, R);
}

// Of row r, what the lane that holds it after fold_rows has. The whole warp arrives here.
template <int L, int R, class M>
__device__ __forceinline__ M of_row(const M& own, int r) {
  if constexpr (R == 1) return own;
  return device::shuffle(device::kAllLanes, own, r, L);
}

// rows[lane % R], with no index that the compiler does not know.
template <int R, class M>
__device__ __forceinline__ M own_row(const M (&rows)[R], int lane) {
  M held[R];
#pragma unroll
  for (int r = 0; r < R; ++r) held[r] = rows[r];
#pragma unroll
  for (int offset = 1; offset < R; offset *= 2) {
#pragma unroll
    for (int i = 0; i < R / offset / 2; ++i) held[i] = select(lane & offset, held[2 * i + 1], held[2 * i]);
  }
  return held[0];
}

// ---- places in memory --------------------------------------------------------------------------------------------

// Over `count` places, at(i) reads one. A whole warp arrives here. Lane l folds the places [l c, l c + c) in order,
// c = ceil(count / 32), then the lanes are folded.
//
// width: a group of so many lanes for each of several things to be folded, a power of two and 32 or at least count. The
// bits are the same, since merging with nothing changes none.
template <class F>
__device__ __forceinline__ auto fold_places(std::int64_t count, int width, F&& at) {
  using M = decltype(at(std::int64_t{0}));
  const std::int64_t each = (count + 31) / 32;
  const std::int64_t begin = static_cast<std::int64_t>(threadIdx.x % static_cast<unsigned>(width)) * each;
  const std::int64_t end = begin + each < count ? begin + each : count;
  M mine{};
  for (std::int64_t i = begin; i < end; ++i) mine = i == begin ? at(i) : merge(mine, at(i));
  return fold_lanes(device::kAllLanes, mine, width);
}
template <class F>
__device__ __forceinline__ auto fold_places(std::int64_t count, F&& at) {
  return fold_places(count, 32, at);
}

// Between the warps of a block, at most kWarps, each with a value for each of R rows, lane l that of row l % R: of that
// row, what warp l / R % kWarps has, M{} where there is none. scratch: R kWarps <= 32 places of shared memory that
// nobody reads any more. Puts one barrier: every thread arrives here; before scratch is written again there has to be
// another.
template <int kWarps, int R, class M>
__device__ __forceinline__ M exchange_warps(const M& mine, M (*scratch)[kWarps]) {
  static_assert(R * kWarps <= 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, place = lane / R % kWarps;
  if (lane < R) scratch[lane][threadIdx.x / 32] = mine;
  device::sync_block();
  return place < static_cast<int>(blockDim.x) / 32 ? scratch[lane % R][place] : M{};
}

// Over these warps, all lanes of a row with the same bits, whatever R.
template <int kWarps, int R, class M>
__device__ __forceinline__ M fold_warps(const M& mine, M (*scratch)[kWarps]) {
  return fold_lanes(device::kAllLanes, exchange_warps<kWarps, R>(mine, scratch), R * kWarps, R);
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
