// From moments to a statistic, for rows and columns: the decision on data out of range.
//
// Data of float32 are redone in double where they lie, run by run, before moments are merged. Data of float64 are
// redone as a whole, brought near 1 by a power of two; where x is not on chip the moments of all scales are kept
// beforehand.
#pragma once

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// A modifier of the operand; a comparison would be an instruction and a selection.
__device__ __forceinline__ float magnitude(float v) { return __builtin_fabsf(v); }
__device__ __forceinline__ double magnitude(double v) { return __builtin_fabs(v); }

// A count, 1 / count rounded to nearest, and division by it: the quotient rounded to nearest (Markstein 1990) in 5
// operations where division takes 15 and a branch.
struct Divisor {
  double value, inverse;
  __device__ __forceinline__ explicit operator double() const { return value; }
};
__device__ __forceinline__ double operator/(double a, const Divisor& n) {
  const double quotient = a * n.inverse;
  const double corrected = fma(fma(negate(quotient), n.value, a), n.inverse, quotient);
  return finite(quotient) ? corrected : quotient;
}
__device__ __forceinline__ Divisor divisor(std::int64_t count) {
  const double value = static_cast<double>(count);
  return {value, device::divide_rn(1.0, value)};
}

// Sets of moments that are kept of data read twice: unscaled, and of float64 with either scale. set: 1 or 2
template <class T>
inline constexpr int kMomentSets = sizeof(T) == 8 ? 3 : 1;

__device__ __forceinline__ double set_scale(int set) {
  const double up = redo_scale<double>(0.0);
  return set == 1 ? up : 1.0 / up;
}
__device__ __forceinline__ int set_of(double scale) { return scale > 1.0 ? 1 : 2; }

struct Unscaled {
  static constexpr bool value = false;
};
struct Scaled {
  static constexpr bool value = true;
};

// The statistic of moments(Unscaled or Scaled, scale): the total over a row or column, of scale * x with Scaled. All
// threads that compute the moments arrive here.

template <class C, class F>
__device__ __forceinline__ Statistic<C> statistic_of(double eps, F&& moments) {
  const Counted total = moments(Unscaled{}, 1.0);
  const double variance = total.moments.m2 / total.count;
  if (!out_of_range<C>(variance, eps)) return finish<C>(total.moments, total.count, eps);
  const double scale = redo_scale<C>(variance);
  if constexpr (sizeof(C) == 4) {
    return finish_scaled<C>(total.moments, total.count, eps, scale);
  } else {
    const Counted again = moments(Scaled{}, scale);
    return finish_scaled<C>(again.moments, again.count, eps, scale);
  }
}

// The same of several rows of n values at a time, each lane of the warp with one of its own. moments(...) takes the
// lane's scale. Where a row is out of range the whole warp does it again, and those in range keep what they had.
template <class C, class F>
__device__ __forceinline__ Statistic<C> statistic_of_row(const Divisor& n, double eps, F&& moments) {
  const Counted total = moments(Unscaled{}, 1.0);
  const double variance = total.moments.m2 / n;
  const bool redo = out_of_range<C>(variance, eps);
  if (!device::any(device::kAllLanes, redo)) return finish<C>(total.moments, n, eps);
  const double scale = redo ? redo_scale<C>(variance) : 1.0;
  Moments<double> scaled = total.moments;
  if constexpr (sizeof(C) == 8) scaled = moments(Scaled{}, scale).moments;
  return redo ? finish_scaled<C>(scaled, n.value, eps, scale) : finish<C>(total.moments, n, eps);
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
