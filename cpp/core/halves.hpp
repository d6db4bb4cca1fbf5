// float16 and bfloat16 to and from float32 in integer arithmetic: the portable path, and the reference that the
// hardware conversions of the other ISAs are tested against (all 65536 patterns).
//
// Round to nearest, ties to even; subnormals are kept; what is too large becomes infinite; NaN stays NaN (quiet).
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/isa.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

LANENORM_INLINE std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}
LANENORM_INLINE float float_of(std::uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

LANENORM_INLINE float widen(BFloat16 v) {
  const std::uint32_t quiet = (v.bits & 0x7fffu) > 0x7f80u ? 0x0040u : 0u;
  return float_of((v.bits | quiet) << 16);
}

LANENORM_INLINE float widen(Float16 v) {
  const std::uint32_t sign = (v.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinite or NaN
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x00400000u : 0u));
  }
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal: exact
}

template <class T>
T narrow(float v);

template <>
LANENORM_INLINE BFloat16 narrow<BFloat16>(float v) {
  const std::uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x0040u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
LANENORM_INLINE Float16 narrow<Float16>(float v) {
  const std::uint32_t bits = bits_of(v);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: drop 13 bits of the mantissa
    const std::uint32_t rebased = magnitude - (112u << 23);
    half = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {                    // subnormal: more than half of 2^-24
    const std::uint32_t shift = 126u - (magnitude >> 23);  // 14..24
    const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
    half = kept + (rest > tie || (rest == tie && (kept & 1u)) ? 1u : 0u);
  } else {
    half = 0;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
