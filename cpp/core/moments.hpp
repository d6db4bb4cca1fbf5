// Moments: count, mean and m2 = sum of squared deviations of a piece of data, and how two pieces merge.
//
//   m2_ab = m2_a + m2_b + delta^2 * n_a * n_b / (n_a + n_b)    Chan, Golub, LeVeque 1983, eq. 2.1
//   one value: Welford 1962 is the case n_b = 1
//
// The mean is kept as pivot + (sum + low) / count: a value of the data's own size and the sum of the deviations from
// it, as an unevaluated pair of doubles. So the sums are those of small numbers, a sum that is exact in any order
// stays exact here, and no digit is lost when |mean| is much larger than the standard deviation.
//
// D is double, or F64x8 where eight columns are merged at once: the same operations, lane by lane.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

LANENORM_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
LANENORM_INLINE double negate(double a) { return -a; }

template <class D>
struct Pair {
  D high, low;  // high + low exactly; |low| <= ulp(high) / 2
};

// Knuth's TwoSum: a + b without error, whichever is larger. 6 operations.
template <class D>
LANENORM_INLINE Pair<D> two_sum(D a, D b) {
  const D sum = a + b;
  const D b_part = sum - a;
  const D a_part = sum - b_part;
  return {sum, (a - a_part) + (b - b_part)};
}

// A value near the mean from which deviations are taken: x0 + mean, where mean is that of x - x0, rounded to 2^-8 of
// mean |x - x0|. Near enough that deviations carry no large common part, coarse enough that those of integers are
// exact. grain: mean |x - x0| times kPivotGrain; (mean + grain) - grain drops the bits of mean below ulp(grain).
template <class S>
inline constexpr S kPivotGrain = S(sizeof(S) == 4 ? 0x1p+15 : 0x1p+44);

template <class V>
LANENORM_INLINE V coarse_pivot(V x0, V mean, V grain) {
  return x0 + ((mean + grain) - grain);
}

template <class D>
struct Moments {
  D pivot;
  D sum, low;  // sum of (x - pivot)
  D m2;
};

// a, b: pieces of count_a and count_b > 0 values; a comes first in index order.
template <class D>
LANENORM_INLINE Moments<D> merge(const Moments<D>& a, D count_a, const Moments<D>& b, D count_b) {
  // b's sum about a's pivot: sum_b + count_b * shift, with every rounding error kept in `low`.
  const Pair<D> shift = two_sum(b.pivot, negate(a.pivot));
  const D product = count_b * shift.high;
  const D product_low = fma(count_b, shift.high, negate(product));
  const Pair<D> sums = two_sum(a.sum, b.sum);
  const Pair<D> total = two_sum(sums.high, product);
  const D low = (a.low + b.low) + (sums.low + total.low) + fma(count_b, shift.low, product_low);
  const Pair<D> sum = two_sum(total.high, low);

  const D delta = shift.high + (b.sum / count_b - a.sum / count_a);
  const D weight = count_a * count_b / (count_a + count_b);
  return {a.pivot, sum.high, sum.low, fma(delta * delta, weight, a.m2 + b.m2)};
}

// Folds pieces in index order as a binary tree: equal levels meet first, so errors grow with log2 of their number.
// kLevels levels hold 2^kLevels - 1 pieces.
template <int kLevels>
class MomentsTree {
 public:
  LANENORM_INLINE void push(Moments<double> piece, double count) {
    int level = 0;
    for (std::uint64_t full = pieces_; full & 1; full >>= 1, ++level) {
      piece = merge(level_[level], count_[level], piece, count);
      count += count_[level];
    }
    level_[level] = piece;
    count_[level] = count;
    ++pieces_;
  }

  // At least one piece was pushed.
  LANENORM_INLINE Moments<double> total(double* count) const {
    std::uint64_t full = pieces_;
    int level = 0;
    while (!(full & 1)) full >>= 1, ++level;
    Moments<double> sum = level_[level];
    *count = count_[level];
    for (full >>= 1, ++level; full != 0; full >>= 1, ++level) {
      if (!(full & 1)) continue;
      sum = merge(level_[level], count_[level], sum, *count);
      *count += count_[level];
    }
    return sum;
  }

 private:
  Moments<double> level_[kLevels];
  double count_[kLevels];
  std::uint64_t pieces_ = 0;
};

}  // namespace LANENORM_ISA
}  // namespace lanenorm
