// Moments of blocks of vectors: the arithmetic that rows and columns share. THE ORDER OF OPERATIONS STATED HERE IS THE
// PROMISE OF EQUAL BITS: the same on every ISA, for any thread count and any layout of the same shape.
//
//   vector      16 float (8 double) virtual lanes. Masked lanes are never loaded and do not count.
//   block       8 vectors, an exact two-pass in registers: lane sums as the tree ((0+1)+(2+3))+((4+5)+(6+7)),
//               lane mean, lane m2 as two chains (even and odd vectors).
//   superblock  8 blocks, merged lane by lane in order (Chan, Golub, LeVeque 1983). A lane keeps sum(d) and m2 of
//               d = x - pivot; its mean appears only in Chan's delta, so sums that are exact stay exact.
//   pivot       of a superblock: x0 + mean over its first block of (x - x0), the mean divided by the power of two not
//               below the number of values and rounded to 2^-8 of mean |x - x0|: near enough to the mean that
//               d carries no large common part, coarse enough that d of integers are exact. (x0 alone: 51 u where x0
//               is an outlier; no pivot: 8e-2 at mean/std = 1e6.)
//   fold        16 lanes in double, halves onto each other, then superblocks as a binary tree (core/moments.hpp).
//
// Cost per block of 8 vectors: 8 loads, 24 additions and subtractions, 8 multiplications or fma, 6 to merge.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr int kBlock = 8;        // vectors
inline constexpr int kSuperblock = 64;  // vectors

// All lanes, or the first `lanes` of them.
struct Full {};
struct Part {
  int lanes;
};

template <class T, class V>
LANENORM_INLINE V load(const char* p, Full) {
  return V::template load<T>(p);
}
template <class T, class V>
LANENORM_INLINE V load(const char* p, Part part) {
  return V::template load<T>(p, part.lanes);
}
template <class T, class V>
LANENORM_INLINE void store(V v, char* p, Full) {
  v.template store<T>(p);
}
template <class T, class V>
LANENORM_INLINE void store(V v, char* p, Part part) {
  v.template store<T>(p, part.lanes);
}
template <class V>
LANENORM_INLINE V keep_part(V v, Full) {
  return v;
}
template <class V>
LANENORM_INLINE V keep_part(V v, Part part) {
  return keep(v, part.lanes);
}

// f(element index, Full or Part) over the vectors of a line, kUnroll at a time.
template <class V, int kUnroll = 1, class F>
LANENORM_INLINE void for_vectors(std::int64_t length, F&& f) {
  constexpr std::int64_t kLanes = V::kLanes;
  std::int64_t i = 0;
  if constexpr (kUnroll == 2) {  // halves the loop's own instructions; more brought nothing
    for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
      f(i, Full{});
      f(i + kLanes, Full{});
    }
  }
  for (; i + kLanes <= length; i += kLanes) f(i, Full{});
  if (i < length) f(i, Part{static_cast<int>(length - i)});
}

// A number of vectors or rows known at compile time.
template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<n>{}) for n = 1..8
template <class F>
LANENORM_INLINE decltype(auto) with_vectors(int n, F&& f) {
  switch (n) {
    case 1: return f(Count<1>{});
    case 2: return f(Count<2>{});
    case 3: return f(Count<3>{});
    case 4: return f(Count<4>{});
    case 5: return f(Count<5>{});
    case 6: return f(Count<6>{});
    case 7: return f(Count<7>{});
    default: return f(Count<8>{});
  }
}

// f(Full) or f(Part{lanes}) for the last vector of `lanes` valid lanes.
template <class V, class F>
LANENORM_INLINE decltype(auto) with_last(int lanes, F&& f) {
  if (lanes == V::kLanes) return f(Full{});
  return f(Part{lanes});
}

// ---- sums over the vectors of a block ----------------------------------------------------------------------------

// Sum of v[0..N): pairs, then pairs of pairs.
template <int N, class V>
LANENORM_INLINE V tree(const V* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    constexpr int kLeft = N > 4 ? 4 : N > 2 ? 2 : 1;
    return tree<kLeft>(v) + tree<N - kLeft>(v + kLeft);
  }
}

// Products of N pairs summed as tree() sums: neighbours by one fma, then pairs of pairs.
template <int N, class V>
LANENORM_INLINE V tree_of_products(const V* a, const V* b) {
  if constexpr (N == 1) {
    return a[0] * b[0];
  } else if constexpr (N == 2) {
    return fma(a[1], b[1], a[0] * b[0]);
  } else {
    constexpr int kLeft = N > 4 ? 4 : 2;
    return tree_of_products<kLeft>(a, b) + tree_of_products<N - kLeft>(a + kLeft, b + kLeft);
  }
}

// sums[length] go to totals and become zero.
template <class V, class D>
LANENORM_INLINE void flush(typename V::Scalar* sums, std::int64_t length, double* totals) {
  using S = typename V::Scalar;
  for (std::int64_t i = 0; i < length; i += D::kLanes) {
    const int lanes = static_cast<int>(length - i < D::kLanes ? length - i : D::kLanes);
    const D sum = D::template load<double>(totals + i, lanes) + D::template load<S>(sums + i);
    sum.template store<double>(totals + i, lanes);
    D::zero().template store<S>(sums + i);
  }
}

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
// x(i, Full or Part) loads vector i. lane_mean receives the means; rest, where it is given, what their rounding left:
// the sum of d - lane_mean.
template <int N, class V, class X, class Last>
LANENORM_INLINE Lanes<V> block(const X& x, V pivot, Last last, V* lane_mean, V* rest = nullptr) {
  using S = typename V::Scalar;
  constexpr bool kMasked = sizeof(Last) == sizeof(Part);
  V d[N];
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
  for (int i = 0; i < N - 1; ++i) d[i] = d[i] - mean;
  d[N - 1] = keep_part(d[N - 1] - mean, last);
  lanes.m2 = sum_of_squares<N>(d);
  if (rest != nullptr) *rest = tree<N>(d);
  *lane_mean = mean;
  return lanes;
}

// Adds a block of `count` values a lane and mean `mean` to `k` full blocks. count is V (ragged) or a plain number.
template <class V>
LANENORM_INLINE void add_block(Lanes<V>* lanes, int k, const Lanes<V>& next, V mean, V count) {
  using S = typename V::Scalar;
  const V before = V::broadcast(S(kBlock * k));
  const V delta = mean - lanes->sum * V::broadcast(S(1) / S(kBlock * k));
  const V weight = count * before / (count + before);
  lanes->m2 = fma(delta * delta, weight, lanes->m2 + next.m2);
  lanes->sum = lanes->sum + next.sum;
}
template <class V>
LANENORM_INLINE void add_block(Lanes<V>* lanes, int k, const Lanes<V>& next, V mean, int count) {
  using S = typename V::Scalar;
  const V delta = mean - lanes->sum * V::broadcast(S(1) / S(kBlock * k));
  const V weight = V::broadcast(S(count * kBlock * k) / S(count + kBlock * k));
  lanes->m2 = fma(delta * delta, weight, lanes->m2 + next.m2);
  lanes->sum = lanes->sum + next.sum;
}

// ---- pivot -------------------------------------------------------------------------------------------------------

// x0 + mean, rounded to 2^-8 of the mean absolute deviation: (q + t) - t drops the bits of q below ulp(t).
template <class V>
LANENORM_INLINE V pivot_from(V x0, V mean, V mean_absolute) {
  using S = typename V::Scalar;
  const V t = mean_absolute * V::broadcast(sizeof(S) == 4 ? S(0x1p+15) : S(0x1p+44));
  return x0 + ((mean + t) - t);
}

// 1 / (the power of two not below count)
template <class S>
LANENORM_INLINE S inverse_power_of_two(std::int64_t count) {
  S inverse = 1;
  for (std::int64_t power = 1; power < count; power *= 2) inverse *= S(0.5);
  return inverse;
}

// The pivot of a run of vectors, N of them in its first block. inverse = inverse_power_of_two(values in the block).
template <int N, class V, class X, class Last>
LANENORM_INLINE typename V::Scalar row_pivot(const X& x, Last last, typename V::Scalar x0, typename V::Scalar inverse) {
  using S = typename V::Scalar;
  const V origin = V::broadcast(x0);
  V d[N], magnitude[N];
  for (int i = 0; i < N - 1; ++i) d[i] = x(i, Full{}) - origin;
  d[N - 1] = keep_part(x(N - 1, last) - origin, last);
  for (int i = 0; i < N; ++i) magnitude[i] = abs(d[i]);
  const S mean = tree<N>(d).fold() * inverse;
  const S mean_absolute = tree<N>(magnitude).fold() * inverse;
  const S t = mean_absolute * (sizeof(S) == 4 ? S(0x1p+15) : S(0x1p+44));
  return x0 + ((mean + t) - t);
}

// max(count, 1) of whole numbers
template <class V>
LANENORM_INLINE V at_least_one(V count) {
  using S = typename V::Scalar;
  const V one = V::broadcast(S(1));
  return (count + one + abs(count - one)) * V::broadcast(S(0.5));
}

// ---- fold --------------------------------------------------------------------------------------------------------

// Lanes of `lane_count` values each -> moments of all of them, in double. inverse = 1 / lane_count.
template <class V, class D>
LANENORM_INLINE Moments<double> fold_lanes(const Lanes<V>& lanes, typename V::Scalar pivot, double count,
                                           double lane_count) {
  const D inverse = D::broadcast(1.0 / lane_count);
  const D n = D::broadcast(lane_count);
  D total = D::zero();
  for (int part = 0; part < V::kWide; ++part) total = total + lanes.sum.wide(part);
  const double sum = total.fold();
  const D mean = D::broadcast(sum / count);
  D m2 = D::zero();
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
  for (int part = 0; part < V::kWide; ++part) total = total + lanes.sum.wide(part);
  const double sum = total.fold();
  const D mean = D::broadcast(sum / count);
  const V divisor = at_least_one(lane_count);  // a lane without values has sum 0
  D m2 = D::zero();
  for (int part = 0; part < V::kWide; ++part) {
    const D delta = lanes.sum.wide(part) / divisor.wide(part) - mean;
    m2 = m2 + fma(delta * delta, lane_count.wide(part), lanes.m2.wide(part));
  }
  return {static_cast<double>(pivot), sum, 0.0, m2.fold()};
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
