// Moments of runs: the arithmetic that rows and columns share. THE ORDER OF OPERATIONS STATED HERE IS THE PROMISE OF
// EQUAL BITS: the same on every ISA, for any thread count and any layout of the same shape.
//
//   vector      16 float (8 double) virtual lanes. Masked lanes are never loaded and do not count.
//   tree        of 8 vectors: ((0+1)+(2+3))+((4+5)+(6+7)); squares as two chains, of the even and of the odd vectors.
//   superblock  up to 64 vectors with a pivot near their mean, from which their deviations d are taken.
//   pivot       x0 + mean over a few vectors of (x - x0), the mean divided by the power of two not below the number of
//               values and rounded to 2^-8 of mean |x - x0|: near enough to the mean that d carries no large common
//               part, coarse enough that d of integers are exact. (x0 alone: 51 u where x0 is an outlier; no pivot:
//               8e-2 at mean/std = 1e6.)
//
// float32 (and 16-bit) data. A superblock's pivot q comes from its first and its middle vector. Its lanes add d and d^2
// tree by tree, even and odd blocks of 8 vectors apart, then 4, 2, 1 and a part of a vector. They join sums about the
// pivot of the piece, that of its first superblock, in double (PivotSums); then lane i + lane i + 8, and lanes by
// halving. Double forgives a distant pivot: where p lies near one of the data, sum(d^2) <= (n + 1) m2, and
// m2 = sum(d^2) - sum(d)^2 / n keeps a relative error below n * 2^-53 * (length of a chain).
//   float32 forgives less: what it lost of sum (x - q)^2 counts by how much that exceeds m2. Where by more than a
// quarter (kSpread), because q lies half a standard deviation from the mean, the piece is swept again in double: 0.4 %
// of rows of normal deviates, most rows that rise steadily. So few values repeated many times, whose roundings all go
// the same way, cost 3.3 u at worst. (With exact two-passes of blocks of 8 vectors, merged by Chan's formula: 4.6 u,
// and a forward of 768 10.5 cycles a vector instead of 7.6; without the second sweep 7.5 u where a row is a step.)
//   Runs of less than 8 vectors (kShortRun), and a rest of less than one, are swept in double at once: forward of 16,
// 32, 64, 100 elements 33, 42, 62, 97 cycles; about their mean in float32, 8 of them a fold, 48, 55, 70, 90.
//
// float64 data. A block of 8 vectors is an exact two-pass in registers: lane sums, lane mean, lane m2. Up to 8 blocks,
// a superblock, are merged lane by lane in order (Chan, Golub, LeVeque 1983); a lane keeps sum(d) and m2, its mean
// appears only in Chan's delta, so sums that are exact stay exact. The pivot comes from the first block. The last block
// of a run may have fewer vectors, its last vector fewer lanes; lanes are folded by halving, superblocks merged as a
// binary tree (core/moments.hpp).
//
// Cost per 8 vectors: 8 loads; float32 18 additions, 8 multiplications or fma; float64 24 and 8, 6 to merge.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cpu/lines.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr int kBlock = 8;        // vectors
inline constexpr int kSuperblock = 64;  // vectors
inline constexpr int kShortRun = 8;     // vectors, float32: shorter runs are swept in double

// ---- sums over the vectors of a block ----------------------------------------------------------------------------

// Sum and m2 of N values in each lane.
template <class V>
struct Lanes {
  V sum, m2;
};

template <int N, class V>
LANENORM_INLINE V sum_of_squares(const V* v) {
  V even = v[0] * v[0];
  if constexpr (N == 1) return even;
  V odd = v[1] * v[1];
  LANENORM_UNROLL
  for (int i = 2; i < N; ++i) {
    if (i % 2 == 0) {
      even = fma(v[i], v[i], even);
    } else {
      odd = fma(v[i], v[i], odd);
    }
  }
  return even + odd;
}

// One block of N vectors d = x - pivot, the last of them `last` (Full or Part: masked lanes are 0 and do not count).
// x(i, Full or Part) loads vector i. lane_mean receives the means.
template <int N, class V, class X, class Last>
LANENORM_INLINE Lanes<V> block(const X& x, V pivot, Last last, V* lane_mean) {
  using S = typename V::Scalar;
  constexpr bool kMasked = sizeof(Last) == sizeof(Part);
  V d[N];
  LANENORM_UNROLL
  for (int i = 0; i < N - 1; ++i) d[i] = x(i, Full{}) - pivot;
  d[N - 1] = keep_part(x(N - 1, last) - pivot, last);
  Lanes<V> lanes;
  lanes.sum = tree<N>(d);
  V mean = lanes.sum;
  if constexpr (kMasked && N > 1) {
    mean = lanes.sum / (V::broadcast(S(N - 1)) + keep_part(V::broadcast(S(1)), last));
  } else if constexpr (N > 1) {
    mean = lanes.sum * V::broadcast(S(1) / S(N));
  }
  LANENORM_UNROLL
  for (int i = 0; i < N - 1; ++i) d[i] = d[i] - mean;
  d[N - 1] = keep_part(d[N - 1] - mean, last);
  lanes.m2 = sum_of_squares<N>(d);
  *lane_mean = mean;
  return lanes;
}

// Adds a block of `count` values a lane, not the same in every lane, and mean `mean` to `k` full blocks.
template <class V>
LANENORM_INLINE void add_block(Lanes<V>* lanes, int k, const Lanes<V>& next, V mean, V count) {
  using S = typename V::Scalar;
  const V before = V::broadcast(S(kBlock * k));
  const V delta = mean - lanes->sum * V::broadcast(S(1) / S(kBlock * k));
  const V weight = count * before / (count + before);
  lanes->m2 = fma(delta * delta, weight, lanes->m2 + next.m2);
  lanes->sum = lanes->sum + next.sum;
}

// 1 / (8 k) and 8 * 8 k / (8 + 8 k): a full block joins k full blocks.
inline constexpr double kInverseRows[kBlock] = {0, 1. / 8, 1. / 16, 1. / 24, 1. / 32, 1. / 40, 1. / 48, 1. / 56};
inline constexpr double kJoinWeight[kBlock] = {0,         64. / 16,  128. / 24, 192. / 32,
                                               256. / 40, 320. / 48, 384. / 56, 448. / 64};

template <class V>
LANENORM_INLINE void add_full_block(Lanes<V>* lanes, int k, const Lanes<V>& next, V mean) {
  using S = typename V::Scalar;
  const V delta = mean - lanes->sum * V::broadcast(static_cast<S>(kInverseRows[k]));
  lanes->m2 = fma(delta * delta, V::broadcast(static_cast<S>(kJoinWeight[k])), lanes->m2 + next.m2);
  lanes->sum = lanes->sum + next.sum;
}

// ---- pivot -------------------------------------------------------------------------------------------------------

template <class V>
LANENORM_INLINE V pivot_from(V x0, V mean, V mean_absolute) {
  return coarse_pivot(x0, mean, mean_absolute * V::broadcast(kPivotGrain<typename V::Scalar>));
}

// 1 / (the power of two not below count)
template <class S>
LANENORM_INLINE S inverse_power_of_two(std::int64_t count) {
  S inverse = 1;
  for (std::int64_t power = 1; power < count; power *= 2) inverse *= S(0.5);
  return inverse;
}

// The pivot of a superblock with N vectors in its first block. inverse = inverse_power_of_two(values in the block).
template <int N, class V, class X, class Last>
LANENORM_INLINE typename V::Scalar row_pivot(const X& x, Last last, typename V::Scalar x0, typename V::Scalar inverse) {
  using S = typename V::Scalar;
  const V origin = V::broadcast(x0);
  V d[N], magnitude[N];
  LANENORM_UNROLL
  for (int i = 0; i < N - 1; ++i) d[i] = x(i, Full{}) - origin;
  d[N - 1] = keep_part(x(N - 1, last) - origin, last);
  LANENORM_UNROLL
  for (int i = 0; i < N; ++i) magnitude[i] = abs(d[i]);
  const S mean = tree<N>(d).fold() * inverse;
  const S mean_absolute = tree<N>(magnitude).fold() * inverse;
  return coarse_pivot(x0, mean, mean_absolute * kPivotGrain<S>);
}

// max(count, 1) of whole numbers
template <class V>
LANENORM_INLINE V at_least_one(V count) {
  using S = typename V::Scalar;
  const V one = V::broadcast(S(1));
  return (count + one + abs(count - one)) * V::broadcast(S(0.5));
}

// ---- sums about the pivot of a piece (float32) -------------------------------------------------------------------

// Sums of d and d^2 over a piece, d = x - pivot: parts in the 8 lanes of D, and what belongs to no lane.
template <class D>
struct PivotSums {
  D sum, square;
  D spread;                    // of squares about the superblocks' own pivots
  double moved, moved_square;  // n (q - p) and n (q - p)^2 of the superblocks
};

// Whether squares about their own pivots exceed m2 by so much that what float32 lost of them counts.
inline constexpr double kSpread = 1.25;
// Bit i: they do in lane i; a NaN does not. What is above 0 is above 2^-1022, as squares of float32 are multiples of
// 2^-298.
template <class D>
LANENORM_INLINE unsigned beyond_spread(D squares, D m2) {
  return at_most(D::broadcast(0x1p-1022), fma(D::broadcast(-kSpread), m2, squares));
}

template <class D>
LANENORM_INLINE PivotSums<D> no_sums() {
  return {D::zero(), D::zero(), D::zero(), 0.0, 0.0};
}

// Sums of d and d^2 in each lane.
template <class V>
struct LaneSums {
  V sum, square;
};

// Those of the vectors of a line, less than a piece, in double.
template <class T, class V, class D>
LANENORM_INLINE LaneSums<D> sums_in_double(const char* x, std::int64_t length, D pivot) {
  D sum[2] = {D::zero(), D::zero()}, square[2] = {D::zero(), D::zero()};
  std::int64_t i = 0;
  for (; i + V::kLanes <= length; i += V::kLanes) {
    D d[2];
    load_wide<T, V>(x + i * static_cast<std::int64_t>(sizeof(T)), Full{}, d);
    LANENORM_UNROLL
    for (int part = 0; part < 2; ++part) {
      d[part] = d[part] - pivot;
      sum[part] = sum[part] + d[part];
      square[part] = fma(d[part], d[part], square[part]);
    }
  }
  if (i < length) {
    const int lanes = static_cast<int>(length - i);
    const V last = V::template load<T>(x + i * static_cast<std::int64_t>(sizeof(T)), lanes);
    LANENORM_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int left = lanes - 8 * part;
      const D d = keep(last.wide(part) - pivot, left < 0 ? 0 : left > 8 ? 8 : left);
      sum[part] = sum[part] + d;
      square[part] = fma(d, d, square[part]);
    }
  }
  return {sum[0] + sum[1], square[0] + square[1]};
}

// They join the sums of a piece.
template <class T, class V, class D>
LANENORM_INLINE void add_in_double(const char* x, std::int64_t length, D pivot, PivotSums<D>* sums) {
  const LaneSums<D> line = sums_in_double<T, V>(x, length, pivot);
  sums->sum = sums->sum + line.sum;
  sums->square = sums->square + line.square;
}

// A superblock of `count` values about its own pivot joins the sums about the piece's.
//   sum(x - p) = sum(x - q) + n (q - p),  sum(x - p)^2 = sum(x - q)^2 + 2 (q - p) sum(x - q) + n (q - p)^2
template <class V, class D>
LANENORM_INLINE void add_lanes(const LaneSums<V>& lanes, double count, double shift, PivotSums<D>* sums) {
  const D sum = lanes.sum.wide(0) + lanes.sum.wide(1), own = lanes.square.wide(0) + lanes.square.wide(1);
  sums->sum = sums->sum + sum;
  sums->square = sums->square + fma(D::broadcast(2 * shift), sum, own);
  sums->spread = sums->spread + own;
  sums->moved += count * shift;
  sums->moved_square += count * shift * shift;
}

// Moments from folded sums.
template <class D>
LANENORM_INLINE Moments<D> moments_about(D pivot, D sum, D square, D count, D zero) {
  return {pivot, sum, zero, fma(negate(sum), sum / count, square)};
}

// As kernels of columns and planes leave them: four arrays, `pitch` apart.
template <class D>
LANENORM_INLINE Moments<D> load_moments(const double* moments, std::int64_t pitch, std::int64_t j) {
  return {load_lanes<D>(moments + j), load_lanes<D>(moments + pitch + j), load_lanes<D>(moments + 2 * pitch + j),
          load_lanes<D>(moments + 3 * pitch + j)};
}
template <class D>
LANENORM_INLINE void store_moments(const Moments<D>& m, double* moments, std::int64_t pitch, std::int64_t j) {
  store_lanes(m.pivot, moments + j);
  store_lanes(m.sum, moments + pitch + j);
  store_lanes(m.low, moments + 2 * pitch + j);
  store_lanes(m.m2, moments + 3 * pitch + j);
}

// A vector rounded to C.
template <class C>
LANENORM_INLINE F64x8 rounded(F64x8 a) {
  if constexpr (sizeof(C) == 8) return a;
  alignas(64) C values[8];
  a.template store<C>(values);
  return F64x8::template load<C>(values);
}

// ---- fold (float64) ----------------------------------------------------------------------------------------------

// Lanes of `lane_count` values each -> moments of all of them, in double. inverse = 1 / lane_count.
template <class V, class D>
LANENORM_INLINE Moments<double> fold_lanes(const Lanes<V>& lanes, typename V::Scalar pivot, double count,
                                           double lane_count) {
  const D inverse = D::broadcast(1.0 / lane_count);
  const D n = D::broadcast(lane_count);
  D total = D::zero();
  LANENORM_UNROLL
  for (int part = 0; part < V::kWide; ++part) total = total + lanes.sum.wide(part);
  const double sum = total.fold();
  const D mean = D::broadcast(sum / count);
  D m2 = D::zero();
  LANENORM_UNROLL
  for (int part = 0; part < V::kWide; ++part) {
    const D delta = fma(lanes.sum.wide(part), inverse, negate(mean));
    m2 = m2 + fma(delta * delta, n, lanes.m2.wide(part));
  }
  return {static_cast<double>(pivot), sum, 0.0, m2.fold()};
}

// The same where lanes hold different numbers of values, 0 among them.
template <class V, class D>
LANENORM_INLINE Moments<double> fold_ragged(const Lanes<V>& lanes, typename V::Scalar pivot, double count,
                                            V lane_count) {
  D total = D::zero();
  LANENORM_UNROLL
  for (int part = 0; part < V::kWide; ++part) total = total + lanes.sum.wide(part);
  const double sum = total.fold();
  const D mean = D::broadcast(sum / count);
  const V divisor = at_least_one(lane_count);  // a lane without values has sum 0
  D m2 = D::zero();
  LANENORM_UNROLL
  for (int part = 0; part < V::kWide; ++part) {
    const D delta = lanes.sum.wide(part) / divisor.wide(part) - mean;
    m2 = m2 + fma(delta * delta, lane_count.wide(part), lanes.m2.wide(part));
  }
  return {static_cast<double>(pivot), sum, 0.0, m2.fold()};
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
