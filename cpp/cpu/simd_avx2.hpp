// F32x16 and F64x8 in two AVX2 registers each (AVX2, FMA, F16C). The contract is stated in simd_portable.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtype.hpp"
#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// Masks of lanes first..first+7 (pd: first..first+3) of a vector of which the first `count` of 16 (8) lanes are set: a
// window into ones and zeros.
alignas(64) inline constexpr std::int32_t kOnesThenZeros[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                                -1, -1, -1, -1, -1, -1, -1, -1};
LANENORM_INLINE __m256i mask_ps(int count, int first = 0) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnesThenZeros + 16 - count + first));
}
LANENORM_INLINE __m256i mask_pd(int count, int first = 0) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnesThenZeros + 16 - 2 * count + 2 * first));
}

// Writes the first `words` (below 1: none, from 8 on: all) of 8 of 4 bytes: 4, then 2, then 1, as the bits of words
// say. 4096 x 20 with masked stores 181 us, and so 87. Not forced inline: it is used once per line.
inline void store_words(__m256 v, void* p, int words) {
  char* bytes = static_cast<char*>(p);
  if (words >= 8) return _mm256_storeu_ps(static_cast<float*>(p), v);
  if (words < 1) return;
  __m128 rest = _mm256_castps256_ps128(v);
  if (words & 4) {
    __builtin_memcpy(bytes, &rest, 16);
    rest = _mm256_extractf128_ps(v, 1);
    bytes += 16;
  }
  if (words & 2) {
    __builtin_memcpy(bytes, &rest, 8);
    rest = _mm_movehl_ps(rest, rest);
    bytes += 8;
  }
  if (words & 1) __builtin_memcpy(bytes, &rest, 4);
}

// ---- 16-bit storage: 8 halves in 128 bits ------------------------------------------------------------------------

// There is no masked access to 16-bit elements. The first `count` (below 1: none, from 8 on: all) of 8 are read as two
// overlapping halves of which the second is shifted until only what the first lacks is left: a way through memory
// would wait for its own stores. Not forced inline: it is used once per line.
inline __m128i load_halves(const void* p, int count) {
  const char* bytes = static_cast<const char*>(p);
  if (count >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  if (count >= 4) {
    std::uint64_t low, high;
    __builtin_memcpy(&low, bytes, 8);
    __builtin_memcpy(&high, bytes + 2 * (count - 4), 8);
    const __m128i rest = _mm_srl_epi64(_mm_cvtsi64_si128(static_cast<long long>(high)),
                                       _mm_cvtsi32_si128(16 * (8 - count)));  // a shift by 64 gives 0
    return _mm_unpacklo_epi64(_mm_cvtsi64_si128(static_cast<long long>(low)), rest);
  }
  std::uint64_t halves = 0;
  if (count >= 2) {
    std::uint32_t low, high;
    __builtin_memcpy(&low, bytes, 4);
    __builtin_memcpy(&high, bytes + 2 * (count - 2), 4);
    halves = low | std::uint64_t{high} >> 16 * (4 - count) << 32;
  } else if (count == 1) {
    __builtin_memcpy(&halves, bytes, 2);  // little endian, as everything with AVX2
  }
  return _mm_cvtsi64_si128(static_cast<long long>(halves));
}
// Writes the first `count`: 4, then 2, then 1, as its bits say.
inline void store_halves(__m128i halves, void* p, int count) {
  char* bytes = static_cast<char*>(p);
  if (count >= 8) return _mm_storeu_si128(static_cast<__m128i*>(p), halves);
  if (count < 1) return;
  auto rest = static_cast<std::uint64_t>(_mm_cvtsi128_si64(halves));
  if (count & 4) {
    __builtin_memcpy(bytes, &rest, 8);
    bytes += 8;
    rest = static_cast<std::uint64_t>(_mm_extract_epi64(halves, 1));
  }
  if (count & 2) {
    __builtin_memcpy(bytes, &rest, 4);
    bytes += 4;
    rest >>= 32;
  }
  if (count & 1) __builtin_memcpy(bytes, &rest, 2);
}

template <class T>
LANENORM_INLINE __m256 widen_halves(__m128i halves);
template <>
LANENORM_INLINE __m256 widen_halves<Float16>(__m128i halves) {
  return _mm256_cvtph_ps(halves);
}
template <>
LANENORM_INLINE __m256 widen_halves<BFloat16>(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <class T>
LANENORM_INLINE __m128i narrow_halves(__m256 v);
template <>
LANENORM_INLINE __m128i narrow_halves<Float16>(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <>
LANENORM_INLINE __m128i narrow_halves<BFloat16>(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}

// Address of lane `lane` of an array of T.
template <class T>
LANENORM_INLINE const char* lane_address(const void* p, int lane) {
  return static_cast<const char*>(p) + lane * static_cast<int>(sizeof(T));
}
template <class T>
LANENORM_INLINE char* lane_address(void* p, int lane) {
  return static_cast<char*>(p) + lane * static_cast<int>(sizeof(T));
}

// ---- F64x8 -------------------------------------------------------------------------------------------------------

struct F64x8 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  static constexpr int kWide = 1;
  static constexpr int kRegisters = 2;
  __m256d v[2];

  LANENORM_INLINE static F64x8 of_floats(__m256 f) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(f)), _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1))}};
  }
  LANENORM_INLINE __m256 floats() const {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(v[0])), _mm256_cvtpd_ps(v[1]), 1);
  }

  template <class T>
  LANENORM_INLINE static F64x8 load(const void* p) {
    if constexpr (sizeof(T) == 8) {
      const double* d = static_cast<const double*>(p);
      return {{_mm256_loadu_pd(d), _mm256_loadu_pd(reinterpret_cast<const double*>(lane_address<T>(p, 4)))}};
    } else if constexpr (sizeof(T) == 4) {
      return of_floats(_mm256_loadu_ps(static_cast<const float*>(p)));
    } else {
      return of_floats(widen_halves<T>(_mm_loadu_si128(static_cast<const __m128i*>(p))));
    }
  }
  template <class T>
  LANENORM_INLINE static F64x8 load(const void* p, int count) {
    if constexpr (sizeof(T) == 8) {
      const double* high = reinterpret_cast<const double*>(lane_address<T>(p, 4));
      return {{_mm256_maskload_pd(static_cast<const double*>(p), mask_pd(count)),
               _mm256_maskload_pd(high, mask_pd(count, 4))}};
    } else if constexpr (sizeof(T) == 4) {
      return of_floats(_mm256_maskload_ps(static_cast<const float*>(p), mask_ps(count)));
    } else {
      return of_floats(widen_halves<T>(load_halves(p, count)));
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p) const {
    if constexpr (sizeof(T) == 8) {
      _mm256_storeu_pd(static_cast<double*>(p), v[0]);
      _mm256_storeu_pd(reinterpret_cast<double*>(lane_address<T>(p, 4)), v[1]);
    } else if constexpr (sizeof(T) == 4) {
      _mm256_storeu_ps(static_cast<float*>(p), floats());
    } else {
      _mm_storeu_si128(static_cast<__m128i*>(p), narrow_halves<T>(floats()));
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p, int count) const {
    if constexpr (sizeof(T) == 8) {
      store_words(_mm256_castpd_ps(v[0]), p, 2 * count);
      store_words(_mm256_castpd_ps(v[1]), lane_address<T>(p, 4), 2 * (count - 4));
    } else if constexpr (sizeof(T) == 4) {
      store_words(floats(), p, count);
    } else {
      store_halves(narrow_halves<T>(floats()), p, count);
    }
  }
  template <class T>
  LANENORM_INLINE void stream(void* p) const {
    if constexpr (sizeof(T) == 8) {
      _mm256_stream_pd(static_cast<double*>(p), v[0]);
      _mm256_stream_pd(reinterpret_cast<double*>(lane_address<T>(p, 4)), v[1]);
    } else {
      store<T>(p);
    }
  }
  LANENORM_INLINE static F64x8 broadcast(double s) { return {{_mm256_set1_pd(s), _mm256_set1_pd(s)}}; }
  LANENORM_INLINE static F64x8 zero() { return {{_mm256_setzero_pd(), _mm256_setzero_pd()}}; }

  LANENORM_INLINE friend F64x8 operator+(F64x8 a, F64x8 b) {
    return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F64x8 operator-(F64x8 a, F64x8 b) {
    return {{_mm256_sub_pd(a.v[0], b.v[0]), _mm256_sub_pd(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F64x8 operator*(F64x8 a, F64x8 b) {
    return {{_mm256_mul_pd(a.v[0], b.v[0]), _mm256_mul_pd(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F64x8 operator/(F64x8 a, F64x8 b) {
    return {{_mm256_div_pd(a.v[0], b.v[0]), _mm256_div_pd(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F64x8 fma(F64x8 a, F64x8 b, F64x8 c) {
    return {{_mm256_fmadd_pd(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_pd(a.v[1], b.v[1], c.v[1])}};
  }
  LANENORM_INLINE friend F64x8 negate(F64x8 a) {
    const __m256d sign = _mm256_set1_pd(-0.0);
    return {{_mm256_xor_pd(a.v[0], sign), _mm256_xor_pd(a.v[1], sign)}};
  }
  LANENORM_INLINE friend F64x8 abs(F64x8 a) {
    const __m256d sign = _mm256_set1_pd(-0.0);
    return {{_mm256_andnot_pd(sign, a.v[0]), _mm256_andnot_pd(sign, a.v[1])}};
  }
  LANENORM_INLINE friend F64x8 sqrt(F64x8 a) { return {{_mm256_sqrt_pd(a.v[0]), _mm256_sqrt_pd(a.v[1])}}; }
  LANENORM_INLINE friend F64x8 join(F64x8 a, int count, F64x8 b) {
    return {{_mm256_blendv_pd(b.v[0], a.v[0], _mm256_castsi256_pd(mask_pd(count))),
             _mm256_blendv_pd(b.v[1], a.v[1], _mm256_castsi256_pd(mask_pd(count, 4)))}};
  }
  LANENORM_INLINE friend unsigned at_most(F64x8 a, F64x8 b) {
    const auto four = [&](int i) {
      return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(a.v[i], b.v[i], _CMP_LE_OQ)));
    };
    return four(0) | four(1) << 4;
  }
  LANENORM_INLINE friend F64x8 keep(F64x8 a, int count) {
    return {{_mm256_and_pd(a.v[0], _mm256_castsi256_pd(mask_pd(count))),
             _mm256_and_pd(a.v[1], _mm256_castsi256_pd(mask_pd(count, 4)))}};
  }

  LANENORM_INLINE double fold() const {
    const __m256d four = _mm256_add_pd(v[0], v[1]);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  // The same additions for eight vectors at once: a transposition between each halving.
  LANENORM_INLINE static F64x8 fold8(const F64x8* v) {
    const auto two = [](F64x8 a, F64x8 b) {  // lanes 0..1 of a, then of b
      const __m256d four_a = _mm256_add_pd(a.v[0], a.v[1]), four_b = _mm256_add_pd(b.v[0], b.v[1]);
      return _mm256_add_pd(_mm256_permute2f128_pd(four_a, four_b, 0x20), _mm256_permute2f128_pd(four_a, four_b, 0x31));
    };
    const auto one = [&](const F64x8* w) {
      const __m256d ab = two(w[0], w[1]), cd = two(w[2], w[3]);
      const __m256d acbd = _mm256_add_pd(_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
      return _mm256_permute4x64_pd(acbd, 0xd8);
    };
    return {{one(v), one(v + 4)}};
  }
  LANENORM_INLINE F64x8 wide(int) const { return *this; }
  LANENORM_INLINE static F64x8 narrow(const F64x8* parts) { return parts[0]; }
};

// ---- F32x16 ------------------------------------------------------------------------------------------------------

struct F32x16 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kWide = 2;
  static constexpr int kRegisters = 2;
  __m256 v[2];

  template <class T>
  LANENORM_INLINE static F32x16 load(const void* p) {
    const char* high = lane_address<T>(p, 8);
    if constexpr (sizeof(T) == 4) {
      return {{_mm256_loadu_ps(static_cast<const float*>(p)), _mm256_loadu_ps(reinterpret_cast<const float*>(high))}};
    } else {
      return {{widen_halves<T>(_mm_loadu_si128(static_cast<const __m128i*>(p))),
               widen_halves<T>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)))}};
    }
  }
  template <class T>
  LANENORM_INLINE static F32x16 load(const void* p, int count) {
    const char* high = lane_address<T>(p, 8);
    if constexpr (sizeof(T) == 4) {
      return {{_mm256_maskload_ps(static_cast<const float*>(p), mask_ps(count)),
               _mm256_maskload_ps(reinterpret_cast<const float*>(high), mask_ps(count, 8))}};
    } else {
      return {{widen_halves<T>(load_halves(p, count)), widen_halves<T>(load_halves(high, count - 8))}};
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p) const {
    char* high = lane_address<T>(p, 8);
    if constexpr (sizeof(T) == 4) {
      _mm256_storeu_ps(static_cast<float*>(p), v[0]);
      _mm256_storeu_ps(reinterpret_cast<float*>(high), v[1]);
    } else {
      _mm_storeu_si128(static_cast<__m128i*>(p), narrow_halves<T>(v[0]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high), narrow_halves<T>(v[1]));
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p, int count) const {
    char* high = lane_address<T>(p, 8);
    if constexpr (sizeof(T) == 4) {
      store_words(v[0], p, count);
      store_words(v[1], high, count - 8);
    } else {
      store_halves(narrow_halves<T>(v[0]), p, count);
      store_halves(narrow_halves<T>(v[1]), high, count - 8);
    }
  }
  template <class T>
  LANENORM_INLINE void stream(void* p) const {
    char* high = lane_address<T>(p, 8);
    if constexpr (sizeof(T) == 4) {
      _mm256_stream_ps(static_cast<float*>(p), v[0]);
      _mm256_stream_ps(reinterpret_cast<float*>(high), v[1]);
    } else {
      _mm_stream_si128(static_cast<__m128i*>(p), narrow_halves<T>(v[0]));
      _mm_stream_si128(reinterpret_cast<__m128i*>(high), narrow_halves<T>(v[1]));
    }
  }
  LANENORM_INLINE static F32x16 broadcast(float s) { return {{_mm256_set1_ps(s), _mm256_set1_ps(s)}}; }
  LANENORM_INLINE static F32x16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }

  LANENORM_INLINE friend F32x16 operator+(F32x16 a, F32x16 b) {
    return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F32x16 operator-(F32x16 a, F32x16 b) {
    return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F32x16 operator*(F32x16 a, F32x16 b) {
    return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F32x16 operator/(F32x16 a, F32x16 b) {
    return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
  }
  LANENORM_INLINE friend F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
  }
  LANENORM_INLINE friend F32x16 negate(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {{_mm256_xor_ps(a.v[0], sign), _mm256_xor_ps(a.v[1], sign)}};
  }
  LANENORM_INLINE friend F32x16 abs(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {{_mm256_andnot_ps(sign, a.v[0]), _mm256_andnot_ps(sign, a.v[1])}};
  }
  LANENORM_INLINE friend F32x16 sqrt(F32x16 a) { return {{_mm256_sqrt_ps(a.v[0]), _mm256_sqrt_ps(a.v[1])}}; }
  LANENORM_INLINE friend F32x16 join(F32x16 a, int count, F32x16 b) {
    return {{_mm256_blendv_ps(b.v[0], a.v[0], _mm256_castsi256_ps(mask_ps(count))),
             _mm256_blendv_ps(b.v[1], a.v[1], _mm256_castsi256_ps(mask_ps(count, 8)))}};
  }
  LANENORM_INLINE friend unsigned at_most(F32x16 a, F32x16 b) {
    const auto eight = [&](int i) {
      return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v[i], b.v[i], _CMP_LE_OQ)));
    };
    return eight(0) | eight(1) << 8;
  }
  LANENORM_INLINE friend F32x16 keep(F32x16 a, int count) {
    return {{_mm256_and_ps(a.v[0], _mm256_castsi256_ps(mask_ps(count))),
             _mm256_and_ps(a.v[1], _mm256_castsi256_ps(mask_ps(count, 8)))}};
  }

  LANENORM_INLINE float fold() const {
    const __m256 eight = _mm256_add_ps(v[0], v[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  LANENORM_INLINE static F64x8 fold8(const F32x16* v) {
    const auto four = [](const F32x16& a, const F32x16& b) {  // lanes 0..3 of a, then of b
      const __m256 eight_a = _mm256_add_ps(a.v[0], a.v[1]), eight_b = _mm256_add_ps(b.v[0], b.v[1]);
      return _mm256_castps_pd(_mm256_add_ps(_mm256_permute2f128_ps(eight_a, eight_b, 0x20),
                                            _mm256_permute2f128_ps(eight_a, eight_b, 0x31)));
    };
    const auto two = [&](const F32x16* w) {  // of a, c, b, d
      const __m256d ab = four(w[0], w[1]), cd = four(w[2], w[3]);
      return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    };
    const __m256 acbd = two(v), egfh = two(v + 4);
    const __m256 folds = _mm256_add_ps(_mm256_shuffle_ps(acbd, egfh, 0x88), _mm256_shuffle_ps(acbd, egfh, 0xdd));
    return F64x8::of_floats(_mm256_permutevar8x32_ps(folds, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0)));
  }
  LANENORM_INLINE F64x8 wide(int part) const { return F64x8::of_floats(v[part]); }
  LANENORM_INLINE static F32x16 narrow(const F64x8* parts) { return {{parts[0].floats(), parts[1].floats()}}; }
};

}  // namespace LANENORM_ISA
}  // namespace lanenorm
