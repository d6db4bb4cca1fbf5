// The element formulas, each written once, for scalars, SIMD vectors and CUDA threads alike.
//
//   y  = (x - mean) * rstd * weight + bias                    Ioffe & Szegedy 2015, alg. 1; Ba, Kiros, Hinton 2016, eq.
//   4 dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight
//
// The mean of the data is `mean` (rounded) plus a low part that `shift` = -low * rstd carries, so x - mean is exact
// for data near the mean and no digit is lost at any offset. The affine step acts on the normalized value: folding
// weight * rstd into a factor of x would lose those digits and make a constant slice differ from bias.
#pragma once

#include "core/isa.hpp"
#include "core/moments.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

LANENORM_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

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

// Constants of one statistic in the compute type C.
template <class C>
struct Normalizer {
  C mean;
  C rstd;
  C rstd_low;  // what rounding took from rstd (float64: 0, there is nothing wider)
  C shift;     // -(mean's low part) * rstd
  C scale;     // a power of two, almost always 1: x is multiplied by it first where x - mean or rstd leaves C's range
};

// What the lanes of V hold: a SIMD vector says so itself, a CUDA thread computes with plain numbers.
template <class V>
struct Lane {
  using Scalar = typename V::Scalar;
};
template <>
struct Lane<float> {
  using Scalar = float;
};
template <>
struct Lane<double> {
  using Scalar = double;
};

// xhat of a forward. The rounding of rstd alone is 1 u of the 4 u promised; its low part costs one fma.
template <class V>
LANENORM_INLINE V normalize(V x, V mean, V rstd, V rstd_low, V shift) {
  const V d = x - mean;
  if constexpr (sizeof(typename Lane<V>::Scalar) == 4) return fma(d, rstd, fma(d, rstd_low, shift));
  return fma(d, rstd, shift);
}

// The weight of a statistic folded into its constants, in double before they are rounded:
//
//   y = ((x - mean) * factor + shift) + bias,  factor = rstd * weight,  shift = shift * weight
//
// x - mean keeps its digits, a constant slice gives bias, and bias costs one rounding as it always does. (With shift in
// bias it would cost two: 0.9 u where weight is small beside bias and 0.8 u are promised.)
template <class D>
struct FoldedWeight {
  D factor, shift;
};

template <class D>
LANENORM_INLINE FoldedWeight<D> fold_weight(D rstd, D rstd_low, D shift, D weight) {
  return {(rstd + rstd_low) * weight, shift * weight};
}

// Whether the factor may stand for rstd and weight: it must not come near the ends of C's range. (NaN may not.)
template <class C>
inline constexpr C kLargestFactor = sizeof(C) == 4 ? C(0x1p+100) : static_cast<C>(0x1p+1000);
template <class C>
LANENORM_INLINE bool foldable(C factor, C weight) {
  constexpr C kLargest = kLargestFactor<C>;
  const C magnitude = factor < C(0) ? -factor : factor;
  return ((magnitude >= 1 / kLargest) & (magnitude <= kLargest)) | (weight == C(0));
}
// Bit i: lane i may, also when rounded to C.
template <class C, class D>
LANENORM_INLINE unsigned foldable_lanes(D factor, D weight) {
  const D largest = D::broadcast(kLargestFactor<C>), smallest = D::broadcast(1 / kLargestFactor<C>);
  return (at_most(smallest, abs(factor)) & at_most(abs(factor), largest)) | at_most(abs(weight), D::zero());
}

// Where it may not, with x scaled first. Weight 1 gives the bits of the folded formula.
template <class V>
LANENORM_INLINE V normalize_affine(V x, V scale, V mean, V rstd, V shift, V weight, V bias) {
  return fma(fma(x * scale - mean, rstd, shift), weight, bias);
}

// xhat of a backward, which has rstd as it was saved.
template <class V>
LANENORM_INLINE V normalize(V x, V mean, V rstd, V shift) {
  return fma(x - mean, rstd, shift);
}

// factor * (dy * weight - mean_g - xhat * mean_gx); factor is rstd (LN) or rstd * weight (BN, with weight 1 here)
template <class V>
LANENORM_INLINE V input_gradient(V dy, V weight, V xhat, V minus_mean_g, V minus_mean_gx, V factor) {
  return fma(xhat, minus_mean_gx, fma(dy, weight, minus_mean_g)) * factor;
}

// What a finished statistic yields.
template <class C>
struct Statistic {
  C mean, rstd;  // as saved and returned
  Pair<double> exact_mean;
  double variance;
  Normalizer<C> normalizer;
};

// Limits of the fast path, by value and so the same everywhere: the variance must not be so large that x - mean may
// overflow, though moments in double are finite (float32: |x - mean| > 2^128 takes 2^56 elements where the standard
// deviation is below 2^100), and var + eps not so small that the squares it is made of were subnormal (float32:
// 2^-126 < 2^-100; float64 likewise).
template <class C>
inline constexpr double kLargestVariance = 0x1p+200;
template <>
inline constexpr double kLargestVariance<double> = 0x1.fffffffffffffp+1023;
template <class C>
inline constexpr double kSmallestVariance = 0x1p-100;
template <>
inline constexpr double kSmallestVariance<double> = 0x1p-900;

LANENORM_INLINE bool finite(double v) { return v - v == 0.0; }

template <class C>
LANENORM_INLINE bool out_of_range(double variance, double eps) {
  return !(variance <= kLargestVariance<C>) | !(variance + eps >= kSmallestVariance<C>);
}
// Bit i: lane i is in range.
template <class C, class D>
LANENORM_INLINE unsigned in_range_lanes(D variance, D eps) {
  return at_most(variance, D::broadcast(kLargestVariance<C>)) &
         at_most(D::broadcast(kSmallestVariance<C>), variance + eps);
}

// The scale to redo an out-of-range statistic with. float32 data are redone in double, which needs none; float64 data
// are brought near 1 by a power of two.
template <class C>
LANENORM_INLINE double redo_scale(double) {
  return 1.0;
}
template <>
LANENORM_INLINE double redo_scale<double>(double variance) {
  return finite(variance) ? 0x1p+600 : 0x1p-600;
}

LANENORM_INLINE double sqrt(double a) { return __builtin_sqrt(a); }
template <class C>
LANENORM_INLINE double rounded(double a) {  // to C
  return static_cast<double>(static_cast<C>(a));
}

// pivot + (sum + low) / count as high + low. For float64 the quotient gets its remainder too: where the pivot is far
// from the mean (an outlier first) its rounding alone would cost 2 u, and exact means would not stay exact.
// N: D, or what D is divided by with the same result
template <class C, class D, class N>
LANENORM_INLINE Pair<D> mean_of(const Moments<D>& m, N count) {
  const Pair<D> sum = two_sum(m.sum, m.low);
  const D quotient = sum.high / count;
  const Pair<D> mean = two_sum(m.pivot, quotient);
  if constexpr (sizeof(C) == 4) return mean;
  const D rest = (fma(negate(quotient), static_cast<D>(count), sum.high) + sum.low) / count;
  return two_sum(mean.high, mean.low + rest);
}

// Mean, rstd = 1/sqrt(var + eps) with var = m2 / count, and what rounding them to C took, all in D.
template <class D>
struct Finished {
  Pair<D> exact_mean;
  D variance;
  D mean, rstd, rstd_low, shift;  // as in Normalizer
};

template <class C, class D, class N>
LANENORM_INLINE Finished<D> finish(const Moments<D>& m, N count, D eps, D one) {
  Finished<D> f;
  f.variance = m.m2 / count;
  const D rstd = one / sqrt(f.variance + eps);
  f.exact_mean = mean_of<C>(m, count);
  f.mean = rounded<C>(f.exact_mean.high);
  f.rstd = rounded<C>(rstd);
  f.rstd_low = rstd - f.rstd;
  f.shift = negate((f.exact_mean.high - f.mean) + f.exact_mean.low) * rstd;
  return f;
}

template <class C, class N>
LANENORM_INLINE Statistic<C> finish(const Moments<double>& m, N count, double eps) {
  const Finished<double> f = finish<C, double>(m, count, eps, 1.0);
  Statistic<C> s;
  s.exact_mean = f.exact_mean;
  s.variance = f.variance;
  s.mean = static_cast<C>(f.mean);
  s.rstd = static_cast<C>(f.rstd);
  s.normalizer = {s.mean, s.rstd, static_cast<C>(f.rstd_low), static_cast<C>(f.shift), C(1)};
  return s;
}

// As finish(), for moments of scale * x (out of range otherwise). The constants get a scale of their own so that
// x - mean and rstd stay inside C for any finite x.
template <class C>
LANENORM_INLINE Statistic<C> finish_scaled(const Moments<double>& m, double count, double eps, double scale) {
  constexpr double kBig = sizeof(C) == 4 ? 0x1p+64 : 0x1p+600;
  constexpr double kLargest = sizeof(C) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  // var + eps in units of scale^2. rstd_scaled = rstd / scale; scale^2 over- or underflows only where eps is nothing
  // beside the variance, or everything.
  const double variance = m.m2 / count + (eps > 0.0 ? eps * scale * scale : 0.0);
  const double rstd_scaled = 1.0 / __builtin_sqrt(variance);
  const Pair<double> mean = mean_of<C>(m, count);
  Statistic<C> s;
  s.exact_mean = {mean.high / scale, mean.low / scale};
  s.variance = m.m2 / count / scale / scale;
  s.mean = static_cast<C>(mean.high / scale);
  s.rstd = static_cast<C>(rstd_scaled * scale);
  const double rstd = rstd_scaled * scale;
  double apply = scale;
  if (sizeof(C) == 4) apply = rstd > 0x1p+100 ? kBig : rstd < 0x1p-100 ? 1.0 / kBig : 1.0;
  const double ratio = apply / scale;
  const double mean_high = mean.high * ratio;
  double rstd_apply = rstd_scaled / ratio;
  if (variance > 0.0 && rstd_apply > kLargest) rstd_apply = kLargest;  // constant slice, tiny eps: 0 * rstd is 0
  s.normalizer.mean = static_cast<C>(mean_high);
  s.normalizer.rstd = static_cast<C>(rstd_apply);
  s.normalizer.rstd_low = static_cast<C>(rstd_apply - static_cast<double>(s.normalizer.rstd));
  s.normalizer.shift =
      static_cast<C>(-((mean_high - static_cast<double>(s.normalizer.mean)) + mean.low * ratio) * rstd_apply);
  s.normalizer.scale = static_cast<C>(apply);
  return s;
}

// (1 - momentum) * running + momentum * (batch + low), as if in one rounding: products and sum keep their errors.
LANENORM_INLINE double moved_average(double running, double batch, double low, double momentum) {
  const double keep = 1.0 - momentum, keep_low = (1.0 - keep) - momentum;
  const double a = keep * running, b = momentum * batch;
  const double rest = fma(keep, running, -a) + fma(momentum, batch, -b) + (keep_low * running + momentum * low);
  const Pair<double> sum = two_sum(a, b);
  return sum.high + (sum.low + rest);
}

// Running statistics after a batch of `count` values a channel, whose variance counts unbiased.
template <class C>
LANENORM_INLINE void update_running(const Pair<double>& mean, double variance, double count, double momentum,
                                    C* running_mean, C* running_var) {
  const double unbiased = variance * count / (count - 1.0);
  *running_mean = static_cast<C>(moved_average(static_cast<double>(*running_mean), mean.high, mean.low, momentum));
  *running_var = static_cast<C>(moved_average(static_cast<double>(*running_var), unbiased, 0.0, momentum));
}

// Sums of a backward over one statistic: g = dy * weight, t = (x - mean) * rstd with the saved, rounded mean.
struct GradientSums {
  double g, gt, t;
};

// Constants of a backward. The saved mean lost its low part; sum(t) / n is that part times rstd, so
//   xhat = t - low,  mean(g * xhat) = (sum(g t) - low * sum(g)) / n.
template <class C>
struct GradientConstants {
  C mean, rstd;
  C shift;  // -low
  C minus_mean_g, minus_mean_gx;
  C factor;  // rstd, or rstd * weight where weight belongs to the statistic
};

template <class D>
struct GradientTerms {
  D gx;  // sum(g * xhat): dweight of BN
  D minus_low, minus_mean_g, minus_mean_gx;
};

template <class D, class N>
LANENORM_INLINE GradientTerms<D> gradient_terms(D g, D gt, D t, N count) {
  GradientTerms<D> terms;
  terms.minus_low = negate(t / count);
  terms.gx = fma(terms.minus_low, g, gt);
  terms.minus_mean_g = negate(g / count);
  terms.minus_mean_gx = negate(terms.gx / count);
  return terms;
}

// Frozen statistics: dx = dy * factor.
template <class D>
LANENORM_INLINE GradientTerms<D> frozen_terms(D gt, D zero) {
  return {gt, zero, zero, zero};
}

template <class C, class N>
LANENORM_INLINE GradientConstants<C> finish_gradient(const GradientSums& sums, N count, C mean, C rstd, double weight,
                                                     bool training, double* dweight) {
  const C factor = static_cast<C>(static_cast<double>(rstd) * weight);
  const GradientTerms<double> terms =
      training ? gradient_terms(sums.g, sums.gt, sums.t, count) : frozen_terms(sums.gt, 0.0);
  *dweight = terms.gx;
  return {mean,
          rstd,
          static_cast<C>(terms.minus_low),
          static_cast<C>(terms.minus_mean_g),
          static_cast<C>(terms.minus_mean_gx),
          factor};
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
