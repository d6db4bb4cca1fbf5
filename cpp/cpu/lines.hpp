// Lines as kernels see them: vector by vector, whole or in part. How they are written is in streams.hpp.
#pragma once

#include <cstdint>

#include "core/halves.hpp"
#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// GCC unrolls no loop at -O2, and arrays of registers that are indexed in a loop live in memory: 21 cycles a vector
// instead of 12.
#ifdef LANENORM_NO_UNROLL
#define LANENORM_UNROLL
#else
#define LANENORM_UNROLL _Pragma("GCC unroll 16")
#endif

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

template <class V, class C>
LANENORM_INLINE V load_lanes(const C* p) {
  return load<C, V>(reinterpret_cast<const char*>(p), Full{});
}
template <class V, class C>
LANENORM_INLINE void store_lanes(V v, C* p) {
  store<C>(v, reinterpret_cast<char*>(p), Full{});
}

// Bits of the first `count` lanes, at most of all.
template <class V>
LANENORM_INLINE unsigned first_lanes(std::int64_t count) {
  return (1u << (count < V::kLanes ? count : V::kLanes)) - 1;
}
template <class V>
LANENORM_INLINE bool all_lanes(unsigned bits, std::int64_t count) {
  return (~bits & first_lanes<V>(count)) == 0;
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

// The first element of a line.
template <class T, class S>
LANENORM_INLINE S first_value(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  if constexpr (sizeof(T) == 2) {
    return static_cast<S>(widen(value));
  } else {
    return static_cast<S>(value);
  }
}

// A vector of 16 elements as two of double; of a Part, 0 where there is none.
template <class T, class V, class D>
LANENORM_INLINE void load_wide(const char* p, Full, D* out) {
  if constexpr (sizeof(T) == 4) {  // converts as it loads
    out[0] = D::template load<T>(p);
    out[1] = D::template load<T>(p + 8 * sizeof(T));
  } else {
    const V x = V::template load<T>(p);
    out[0] = x.wide(0);
    out[1] = x.wide(1);
  }
}

template <class T, class V, class D>
LANENORM_INLINE void load_wide(const char* p, Part part, D* out) {
  const V x = V::template load<T>(p, part.lanes);
  out[0] = x.wide(0);
  out[1] = x.wide(1);
}

// ---- running sums --------------------------------------------------------------------------------------------------

// sums[length] join totals.
template <class V, class D>
LANENORM_INLINE void flush(const typename V::Scalar* sums, std::int64_t length, double* totals) {
  using S = typename V::Scalar;
  for (std::int64_t i = 0; i < length; i += D::kLanes) {
    const int lanes = static_cast<int>(length - i < D::kLanes ? length - i : D::kLanes);
    const D sum = D::template load<double>(totals + i, lanes) + D::template load<S>(sums + i);
    sum.template store<double>(totals + i, lanes);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
