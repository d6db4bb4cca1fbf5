// F32x16 and F64x8 in plain C++: the definition of what every other simd_*.hpp must compute, bit by bit. A path for
// correctness (fma is a function call here), outside the promise of speed.
//
// The contract of both types, on every ISA:
//   load<T>(p), store<T>(p)    any address; with `count`, the first `count` lanes only (others +0; memory beyond is not
//                              touched); T is a storage type, widened on load and rounded to nearest even on store
//   + - * / fma sqrt           one rounding per operation and lane
//   at_most(a, b)              bit i: lane i of a <= lane i of b, which a NaN is not
//   keep(a, count)             lanes from `count` on become +0
//   join(a, count, b)          the first `count` lanes of a, the others of b
//   fold()                     sum of lanes by halving: lane i + lane i + half, and so on
//   fold8(v)                   the folds of eight vectors, v[i].fold() in lane i of an F64x8
//   stream<T>(p)               store<T>(p) past the caches; p a multiple of 64 bytes (of 32 for 16-bit T); other
//                              threads see it at the end of a parallel_for
//   wide(part), narrow(parts)  to and from F64x8: part 0 holds lanes 0..7, part 1 lanes 8..15
//   kRegisters                 how many registers a vector takes
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/halves.hpp"
#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

template <class S, class T>
LANENORM_INLINE S load_element(const char* p, int i) {
  T value;
  __builtin_memcpy(&value, p + static_cast<std::int64_t>(i) * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  if constexpr (sizeof(T) == 2) {
    return static_cast<S>(widen(value));
  } else {
    return static_cast<S>(value);
  }
}

template <class S, class T>
LANENORM_INLINE void store_element(S value, char* p, int i) {
  T stored;
  if constexpr (sizeof(T) == 2) {
    stored = narrow<T>(static_cast<float>(value));
  } else {
    stored = static_cast<T>(value);
  }
  __builtin_memcpy(p + static_cast<std::int64_t>(i) * static_cast<std::int64_t>(sizeof(T)), &stored, sizeof(T));
}

LANENORM_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LANENORM_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
LANENORM_INLINE float magnitude(float a) { return __builtin_fabsf(a); }
LANENORM_INLINE double magnitude(double a) { return __builtin_fabs(a); }
LANENORM_INLINE float root(float a) { return __builtin_sqrtf(a); }
LANENORM_INLINE double root(double a) { return __builtin_sqrt(a); }

// What the two types share.
template <class Self, class S, int N>
struct Lanewise {
  using Scalar = S;
  static constexpr int kLanes = N;
  static constexpr int kRegisters = 4;  // of 128 bits
  S lane[N];

  template <class F>
  LANENORM_INLINE static Self each(F&& f) {
    Self r;
    for (int i = 0; i < N; ++i) r.lane[i] = f(i);
    return r;
  }
  template <class T>
  LANENORM_INLINE static Self load(const void* p) {
    return each([&](int i) { return load_element<S, T>(static_cast<const char*>(p), i); });
  }
  template <class T>
  LANENORM_INLINE static Self load(const void* p, int count) {
    return each([&](int i) { return i < count ? load_element<S, T>(static_cast<const char*>(p), i) : S(0); });
  }
  template <class T>
  LANENORM_INLINE void store(void* p) const {
    for (int i = 0; i < N; ++i) store_element<S, T>(lane[i], static_cast<char*>(p), i);
  }
  template <class T>
  LANENORM_INLINE void store(void* p, int count) const {
    for (int i = 0; i < count; ++i) store_element<S, T>(lane[i], static_cast<char*>(p), i);
  }
  template <class T>
  LANENORM_INLINE void stream(void* p) const {
    store<T>(p);
  }
  LANENORM_INLINE static Self broadcast(S v) {
    return each([&](int) { return v; });
  }
  LANENORM_INLINE static Self zero() { return broadcast(S(0)); }

  LANENORM_INLINE friend Self operator+(const Self& a, const Self& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  LANENORM_INLINE friend Self operator-(const Self& a, const Self& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  LANENORM_INLINE friend Self operator*(const Self& a, const Self& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  LANENORM_INLINE friend Self operator/(const Self& a, const Self& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  LANENORM_INLINE friend Self fma(const Self& a, const Self& b, const Self& c) {
    return each([&](int i) { return fused(a.lane[i], b.lane[i], c.lane[i]); });
  }
  LANENORM_INLINE friend Self negate(const Self& a) {
    return each([&](int i) { return -a.lane[i]; });
  }
  LANENORM_INLINE friend Self abs(const Self& a) {
    return each([&](int i) { return magnitude(a.lane[i]); });
  }
  LANENORM_INLINE friend Self sqrt(const Self& a) {
    return each([&](int i) { return root(a.lane[i]); });
  }
  LANENORM_INLINE friend unsigned at_most(const Self& a, const Self& b) {
    unsigned bits = 0;
    for (int i = 0; i < N; ++i) bits |= static_cast<unsigned>(a.lane[i] <= b.lane[i]) << i;
    return bits;
  }
  LANENORM_INLINE friend Self join(const Self& a, int count, const Self& b) {
    return each([&](int i) { return i < count ? a.lane[i] : b.lane[i]; });
  }
  LANENORM_INLINE friend Self keep(const Self& a, int count) {
    return each([&](int i) { return i < count ? a.lane[i] : S(0); });
  }
  LANENORM_INLINE S fold() const {
    S sum[N];
    for (int i = 0; i < N; ++i) sum[i] = lane[i];
    for (int half = N / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
    }
    return sum[0];
  }
};

struct F64x8 : Lanewise<F64x8, double, 8> {
  static constexpr int kWide = 1;
  LANENORM_INLINE static F64x8 fold8(const F64x8* v) {
    return each([&](int i) { return v[i].fold(); });
  }
  LANENORM_INLINE F64x8 wide(int) const { return *this; }
  LANENORM_INLINE static F64x8 narrow(const F64x8* parts) { return parts[0]; }
};

struct F32x16 : Lanewise<F32x16, float, 16> {
  static constexpr int kWide = 2;
  LANENORM_INLINE F64x8 wide(int part) const {
    return F64x8::each([&](int i) { return static_cast<double>(lane[8 * part + i]); });
  }
  LANENORM_INLINE static F64x8 fold8(const F32x16* v) {
    return F64x8::each([&](int i) { return static_cast<double>(v[i].fold()); });
  }
  LANENORM_INLINE static F32x16 narrow(const F64x8* parts) {
    return each([&](int i) { return static_cast<float>(parts[i / 8].lane[i % 8]); });
  }
};

}  // namespace LANENORM_ISA
}  // namespace lanenorm
