// F32x16 and F64x8 in one AVX-512 register each (F, VL, BW, DQ). The contract is stated in simd_portable.hpp.
#pragma once

// GCC 12 warns about the undefined registers of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "core/dtype.hpp"
#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// The first `count` lanes.
LANENORM_INLINE __mmask8 mask8(int count) { return static_cast<__mmask8>((1u << count) - 1u); }
LANENORM_INLINE __mmask16 mask16(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

// ---- 16-bit storage: 16 halves in 256 bits -----------------------------------------------------------------------

template <class T>
LANENORM_INLINE __m512 widen_halves(__m256i halves);
template <>
LANENORM_INLINE __m512 widen_halves<Float16>(__m256i halves) {
  return _mm512_cvtph_ps(halves);
}
template <>
LANENORM_INLINE __m512 widen_halves<BFloat16>(__m256i halves) {
  // One permutation, where extending and shifting are two: word i to the upper half of lane i, 0 to the lower.
  const __m512i words = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, words, _mm512_castsi256_si512(halves)));
}

template <class T>
LANENORM_INLINE __m256i narrow_halves(__m512 v);
template <>
LANENORM_INLINE __m256i narrow_halves<Float16>(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// In integers: the conversion instruction flushes subnormals. The upper words of bits + 0x7fff, or 0x8000 where that
// word is odd; of a NaN those of v made quiet, by a table that keeps the sum for every other class of v.
template <>
LANENORM_INLINE __m256i narrow_halves<BFloat16>(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  constexpr int kQuietNans = 0x22;  // of the 8 classes the first two are NaN; 2 stands for the quiet value
  const __m512i rounded = _mm512_castps_si512(
      _mm512_fixupimm_ps(_mm512_castsi512_ps(_mm512_add_epi32(bits, half)), v, _mm512_set1_epi32(kQuietNans), 0));
  const __m512i words = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(words, rounded));
}

// ---- F64x8 -------------------------------------------------------------------------------------------------------

struct F64x8 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  static constexpr int kWide = 1;
  static constexpr int kRegisters = 1;
  __m512d v;

  template <class T>
  LANENORM_INLINE static F64x8 load(const void* p) {
    if constexpr (sizeof(T) == 8) {
      return {_mm512_loadu_pd(p)};
    } else if constexpr (sizeof(T) == 4) {
      return {_mm512_cvtps_pd(_mm256_loadu_ps(static_cast<const float*>(p)))};
    } else {
      return load<T>(p, kLanes);
    }
  }
  template <class T>
  LANENORM_INLINE static F64x8 load(const void* p, int count) {
    if constexpr (sizeof(T) == 8) {
      return {_mm512_maskz_loadu_pd(mask8(count), p)};
    } else if constexpr (sizeof(T) == 4) {
      return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask8(count), p))};
    } else {
      const __m512 floats = widen_halves<T>(_mm256_zextsi128_si256(_mm_maskz_loadu_epi16(mask8(count), p)));
      return {_mm512_cvtps_pd(_mm512_castps512_ps256(floats))};
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p) const {
    if constexpr (sizeof(T) == 8) {
      _mm512_storeu_pd(p, v);
    } else if constexpr (sizeof(T) == 4) {
      _mm256_storeu_ps(static_cast<float*>(p), _mm512_cvtpd_ps(v));
    } else {
      store<T>(p, kLanes);
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p, int count) const {
    if constexpr (sizeof(T) == 8) {
      _mm512_mask_storeu_pd(p, mask8(count), v);
    } else if constexpr (sizeof(T) == 4) {
      _mm256_mask_storeu_ps(p, mask8(count), _mm512_cvtpd_ps(v));
    } else {
      const __m256i halves = narrow_halves<T>(_mm512_zextps256_ps512(_mm512_cvtpd_ps(v)));
      _mm_mask_storeu_epi16(p, mask8(count), _mm256_castsi256_si128(halves));
    }
  }
  template <class T>
  LANENORM_INLINE void stream(void* p) const {
    if constexpr (sizeof(T) == 8) {
      _mm512_stream_pd(static_cast<double*>(p), v);
    } else {
      store<T>(p);
    }
  }
  LANENORM_INLINE static F64x8 broadcast(double s) { return {_mm512_set1_pd(s)}; }
  LANENORM_INLINE static F64x8 zero() { return {_mm512_setzero_pd()}; }

  LANENORM_INLINE friend F64x8 operator+(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
  LANENORM_INLINE friend F64x8 operator-(F64x8 a, F64x8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  LANENORM_INLINE friend F64x8 operator*(F64x8 a, F64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  LANENORM_INLINE friend F64x8 operator/(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
  LANENORM_INLINE friend F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  LANENORM_INLINE friend F64x8 negate(F64x8 a) { return {_mm512_xor_pd(a.v, _mm512_set1_pd(-0.0))}; }
  LANENORM_INLINE friend F64x8 abs(F64x8 a) { return {_mm512_abs_pd(a.v)}; }
  LANENORM_INLINE friend F64x8 sqrt(F64x8 a) { return {_mm512_sqrt_pd(a.v)}; }
  LANENORM_INLINE friend unsigned at_most(F64x8 a, F64x8 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ); }
  LANENORM_INLINE friend F64x8 keep(F64x8 a, int count) { return {_mm512_maskz_mov_pd(mask8(count), a.v)}; }
  LANENORM_INLINE friend F64x8 join(F64x8 a, int count, F64x8 b) {
    return {_mm512_mask_mov_pd(b.v, mask8(count), a.v)};
  }

  LANENORM_INLINE double fold() const {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  // The same additions for eight vectors at once: a transposition between each halving. 14 shuffles and 7 additions.
  LANENORM_INLINE static F64x8 fold8(const F64x8* v) {
    const auto four = [](F64x8 a, F64x8 b) {  // lanes 0..3 of a, then of b
      return _mm512_add_pd(_mm512_shuffle_f64x2(a.v, b.v, 0x44), _mm512_shuffle_f64x2(a.v, b.v, 0xee));
    };
    const auto two = [](__m512d ab, __m512d cd) {
      return _mm512_add_pd(_mm512_shuffle_f64x2(ab, cd, 0x88), _mm512_shuffle_f64x2(ab, cd, 0xdd));
    };
    const __m512d abcd = two(four(v[0], v[1]), four(v[2], v[3]));
    const __m512d efgh = two(four(v[4], v[5]), four(v[6], v[7]));
    const __m512d aebfcgdh = _mm512_add_pd(_mm512_unpacklo_pd(abcd, efgh), _mm512_unpackhi_pd(abcd, efgh));
    return {_mm512_permutexvar_pd(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), aebfcgdh)};
  }
  LANENORM_INLINE F64x8 wide(int) const { return *this; }
  LANENORM_INLINE static F64x8 narrow(const F64x8* parts) { return parts[0]; }
};

// ---- F32x16 ------------------------------------------------------------------------------------------------------

struct F32x16 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kWide = 2;
  static constexpr int kRegisters = 1;
  __m512 v;

  template <class T>
  LANENORM_INLINE static F32x16 load(const void* p) {
    if constexpr (sizeof(T) == 4) {
      return {_mm512_loadu_ps(p)};
    } else {
      return {widen_halves<T>(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
    }
  }
  template <class T>
  LANENORM_INLINE static F32x16 load(const void* p, int count) {
    if constexpr (sizeof(T) == 4) {
      return {_mm512_maskz_loadu_ps(mask16(count), p)};
    } else {
      return {widen_halves<T>(_mm256_maskz_loadu_epi16(mask16(count), p))};
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p) const {
    if constexpr (sizeof(T) == 4) {
      _mm512_storeu_ps(p, v);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), narrow_halves<T>(v));
    }
  }
  template <class T>
  LANENORM_INLINE void store(void* p, int count) const {
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, mask16(count), v);
    } else {
      _mm256_mask_storeu_epi16(p, mask16(count), narrow_halves<T>(v));
    }
  }
  template <class T>
  LANENORM_INLINE void stream(void* p) const {
    if constexpr (sizeof(T) == 4) {
      _mm512_stream_ps(static_cast<float*>(p), v);
    } else {
      _mm256_stream_si256(static_cast<__m256i*>(p), narrow_halves<T>(v));
    }
  }
  LANENORM_INLINE static F32x16 broadcast(float s) { return {_mm512_set1_ps(s)}; }
  LANENORM_INLINE static F32x16 zero() { return {_mm512_setzero_ps()}; }

  LANENORM_INLINE friend F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  LANENORM_INLINE friend F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  LANENORM_INLINE friend F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  LANENORM_INLINE friend F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  LANENORM_INLINE friend F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  LANENORM_INLINE friend F32x16 negate(F32x16 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
  LANENORM_INLINE friend F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
  LANENORM_INLINE friend F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
  LANENORM_INLINE friend unsigned at_most(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
  LANENORM_INLINE friend F32x16 keep(F32x16 a, int count) { return {_mm512_maskz_mov_ps(mask16(count), a.v)}; }
  LANENORM_INLINE friend F32x16 join(F32x16 a, int count, F32x16 b) {
    return {_mm512_mask_mov_ps(b.v, mask16(count), a.v)};
  }

  LANENORM_INLINE float fold() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  LANENORM_INLINE static F64x8 fold8(const F32x16* v) {
    const auto eight = [](F32x16 a, F32x16 b) {  // lanes 0..7 of a, then of b
      return _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
    };
    const auto four = [](__m512 ab, __m512 cd) {
      return _mm512_castps_pd(_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd)));
    };
    const __m512d abcd = four(eight(v[0], v[1]), eight(v[2], v[3]));
    const __m512d efgh = four(eight(v[4], v[5]), eight(v[6], v[7]));
    const __m512 two = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abcd, efgh)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(abcd, efgh)));  // of a, e, b, f, c, g, d, h
    const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
    const __m512 folds = _mm512_permutexvar_ps(order, _mm512_add_ps(two, _mm512_movehdup_ps(two)));
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(folds))};
  }
  LANENORM_INLINE F64x8 wide(int part) const {
    return {_mm512_cvtps_pd(part == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1))};
  }
  LANENORM_INLINE static F32x16 narrow(const F64x8* parts) {
    const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(parts[0].v));
    return {_mm512_insertf32x8(low, _mm512_cvtpd_ps(parts[1].v), 1)};
  }
};

}  // namespace LANENORM_ISA
}  // namespace lanenorm
