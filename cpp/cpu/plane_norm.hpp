// Planes: BN inference of channels-first data, planes of neighbouring channels side by side in memory.
//
//   y = (x - mean) * factor + bias,  factor = weight / sqrt(var + eps)
//
// One pass: reads x, writes y (2s). Vectors run through from one cache line of y to the next; where one covers the end
// of a plane its constants are joined from both planes. So planes of any size are written as whole lines, and there are
// no constants per element: 7x7 planes of 8 images took 37 % more traffic to L1 for those.
//
// 2 operations a vector; with 16-bit data the conversions cost as much again.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "cpu/kernels.hpp"
#include "cpu/lines.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- constants -----------------------------------------------------------------------------------------------------

// rstd and factor = rstd * weight of every channel, both rounded once; eight at a time.
template <class S, class D>
void inference_constants(const InferenceConstants& a) {
  const D one = D::broadcast(1.0), eps = D::broadcast(a.eps);
  for (std::int64_t c = 0; c < a.channels; c += D::kLanes) {
    const int lanes = static_cast<int>(a.channels - c < D::kLanes ? a.channels - c : D::kLanes);
    const auto of = [&](const void* p) { return D::template load<S>(static_cast<const S*>(p) + c, lanes); };
    const D rstd = one / sqrt(of(a.variance) + eps);
    rstd.template store<S>(static_cast<S*>(a.rstd) + c, lanes);
    (a.weight == nullptr ? rstd : rstd * of(a.weight)).template store<S>(static_cast<S*>(a.factor) + c, lanes);
  }
}

// Of a plane in every lane, or of several planes. kGeneral: factor is rstd, and weight is apart.
template <class V, bool kGeneral>
struct PlaneConstants {
  V mean, factor, bias, weight;

  LANENORM_INLINE PlaneConstants(const PlanesApply& a, std::int64_t plane) {
    using S = typename V::Scalar;
    mean = V::broadcast(static_cast<const S*>(a.mean)[plane]);
    factor = V::broadcast(static_cast<const S*>(a.factor)[plane]);
    bias = V::broadcast(static_cast<const S*>(a.bias)[plane]);
    if constexpr (kGeneral) weight = V::broadcast(static_cast<const S*>(a.weight)[plane]);
  }
  // From lane `count` on those of `next`.
  LANENORM_INLINE void join_with(int count, const PlaneConstants& next) {
    mean = join(mean, count, next.mean);
    factor = join(factor, count, next.factor);
    bias = join(bias, count, next.bias);
    if constexpr (kGeneral) weight = join(weight, count, next.weight);
  }
  LANENORM_INLINE V operator()(V x) const {
    const V d = x - mean;
    if constexpr (kGeneral) return fma(d * factor, weight, bias);
    return fma(d, factor, bias);
  }
};

// ---- apply ---------------------------------------------------------------------------------------------------------

template <class T, class V, bool kGeneral>
LANENORM_INLINE void apply_planes(const PlanesApply& a) {
  constexpr std::int64_t kBytes = sizeof(T);
  const char* x = static_cast<const char*>(a.x);
  char* y = static_cast<char*>(a.y);
  const std::int64_t elements = a.planes * a.length;
  std::int64_t i = 0, plane = 0, end = a.length;  // of the plane
  PlaneConstants<V, kGeneral> current(a, 0);

  // `lanes` elements from i on, the last of which may lie in another plane.
  const auto across = [&](int lanes, auto part) LANENORM_LAMBDA_INLINE {
    PlaneConstants<V, kGeneral> joined = current;
    while (end - i < lanes) {
      const int filled = static_cast<int>(end - i);
      current = PlaneConstants<V, kGeneral>(a, ++plane);
      joined.join_with(filled, current);
      end += a.length;
    }
    write<T>(joined(load<T, V>(x + i * kBytes, part)), y + i * kBytes, part, a.stream);
    i += lanes;
  };

  const auto address = reinterpret_cast<std::uintptr_t>(y);
  if (a.stream && address % 64 != 0) {  // up to the first cache line
    std::int64_t head = static_cast<std::int64_t>(64 - address % 64) / kBytes;
    if (head > elements) head = elements;
    while (i < head) {
      const int lanes = static_cast<int>(head - i < V::kLanes ? head - i : V::kLanes);
      across(lanes, Part{lanes});
    }
  }
  while (i + V::kLanes <= elements) {
    for (; i + 2 * V::kLanes <= end; i += 2 * V::kLanes) {
      write<T>(current(load<T, V>(x + i * kBytes, Full{})), y + i * kBytes, Full{}, a.stream);
      const std::int64_t next = (i + V::kLanes) * kBytes;
      write<T>(current(load<T, V>(x + next, Full{})), y + next, Full{}, a.stream);
    }
    if (i + V::kLanes <= elements) across(V::kLanes, Full{});
  }
  if (i < elements) {
    const int lanes = static_cast<int>(elements - i);
    across(lanes, Part{lanes});
  }
}

template <class T, class V>
void planes_apply(const PlanesApply& a) {
  a.weight == nullptr ? apply_planes<T, V, false>(a) : apply_planes<T, V, true>(a);
  if (a.stream) fence();
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
