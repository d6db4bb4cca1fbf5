// float16 and bfloat16 to float and back: every bit pattern, and every point where rounding changes.
//
// The reference below shares nothing with core/halves.hpp: it reads the value of a pattern from the definition of the
// format, and rounds by searching the ascending list of all values.
#include "core/halves.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.hpp"

namespace {

using lanenorm::BFloat16;
using lanenorm::Float16;

template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kMantissa = 10, kBias = 15, kExponents = 31;
};
template <>
struct Format<BFloat16> {
  static constexpr int kMantissa = 7, kBias = 127, kExponents = 255;
};

template <class T>
constexpr int infinite() {
  return Format<T>::kExponents << Format<T>::kMantissa;
}

// (-1)^sign * 2^(exponent - bias) * (1 + fraction), or 2^(1 - bias) * fraction with exponent 0.
template <class T>
double value_of(int magnitude) {
  using F = Format<T>;
  const int exponent = magnitude >> F::kMantissa;
  const int fraction = magnitude & ((1 << F::kMantissa) - 1);
  if (exponent == F::kExponents) return fraction == 0 ? INFINITY : NAN;
  if (exponent == 0) return std::ldexp(fraction, 1 - F::kBias - F::kMantissa);
  return std::ldexp(fraction + (1 << F::kMantissa), exponent - F::kBias - F::kMantissa);
}

template <class T>
T pattern(int bits) {
  return T{static_cast<std::uint16_t>(bits)};
}

bool same_bits(float a, float b) { return lanenorm::bits_of(a) == lanenorm::bits_of(b); }

template <class T>
void every_pattern_widens_exactly_and_comes_back() {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const int magnitude = bits & 0x7fff;
    const float wide = lanenorm::widen(pattern<T>(bits));
    CHECK_EQ(std::signbit(wide), bits > 0x7fff);
    if (magnitude > infinite<T>()) {
      CHECK(std::isnan(wide));
      const int back = lanenorm::narrow<T>(wide).bits;
      CHECK((back & 0x7fff) > infinite<T>());
      CHECK_EQ(back >> 15, bits >> 15);
      CHECK(back & (1 << (Format<T>::kMantissa - 1)));  // quiet
    } else {
      CHECK_EQ(std::fabs(static_cast<double>(wide)), value_of<T>(magnitude));
      CHECK_EQ(lanenorm::narrow<T>(wide).bits, bits);
    }
  }
}

// `value` >= 0 lies between the patterns below and below + 1.
template <class T>
int nearest(double value, int below) {
  const double low = value_of<T>(below);
  // beyond the largest value the next one would be 2^(kExponents - bias), which becomes infinity
  const double high =
      below + 1 < infinite<T>() ? value_of<T>(below + 1) : std::ldexp(1.0, Format<T>::kExponents - Format<T>::kBias);
  if (value - low < high - value) return below;
  if (value - low > high - value) return below + 1;
  return below % 2 == 0 ? below : below + 1;
}

template <class T>
void rounding_is_to_nearest_even() {
  for (int below = 0; below < infinite<T>(); ++below) {
    const double low = value_of<T>(below);
    const double high =
        below + 1 < infinite<T>() ? value_of<T>(below + 1) : std::ldexp(1.0, Format<T>::kExponents - Format<T>::kBias);
    const auto first = static_cast<float>(low), middle = static_cast<float>((low + high) / 2);
    const float last = std::nextafter(static_cast<float>(high), 0.0f);
    const float probes[] = {first,  std::nextafter(first, INFINITY),  std::nextafter(middle, 0.0f),
                            middle, std::nextafter(middle, INFINITY), last};
    for (const float probe : probes) {
      if (!(probe >= static_cast<float>(low)) || !(static_cast<double>(probe) < high)) continue;
      const int expected = nearest<T>(static_cast<double>(probe), below);
      CHECK_EQ(lanenorm::narrow<T>(probe).bits, expected);
      CHECK_EQ(lanenorm::narrow<T>(-probe).bits, expected | 0x8000);
    }
  }
  const float too_large[] = {0x1p127f, std::numeric_limits<float>::max(), INFINITY};
  for (const float v : too_large) {
    if (v == 0x1p127f && Format<T>::kBias == 127) continue;  // a bfloat16
    CHECK_EQ(lanenorm::narrow<T>(v).bits, infinite<T>());
    CHECK_EQ(lanenorm::narrow<T>(-v).bits, infinite<T>() | 0x8000);
  }
}

// A NaN whose payload lies in the bits that are dropped must not become infinity.
template <class T>
void nan_stays_nan() {
  for (const std::uint32_t payload : {1u, 0x1fffu, 0x2000u, 0xffffu, 0x10000u, 0x400000u, 0x7fffffu}) {
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const int bits = lanenorm::narrow<T>(lanenorm::float_of(sign | 0x7f800000u | payload)).bits;
      CHECK((bits & 0x7fff) > infinite<T>());
      CHECK(bits & (1 << (Format<T>::kMantissa - 1)));
      CHECK_EQ(bits >> 15, sign != 0 ? 1 : 0);
    }
  }
}

}  // namespace

int main() {
  // by hand
  CHECK(same_bits(lanenorm::widen(Float16{0x3c00}), 1.0f));
  CHECK(same_bits(lanenorm::widen(Float16{0xc000}), -2.0f));
  CHECK(same_bits(lanenorm::widen(Float16{0x8001}), -0x1p-24f));
  CHECK(same_bits(lanenorm::widen(BFloat16{0x3f80}), 1.0f));
  CHECK_EQ(lanenorm::narrow<Float16>(65519.996f).bits, 0x7bff);
  CHECK_EQ(lanenorm::narrow<Float16>(65520.0f).bits, 0x7c00);
  CHECK_EQ(lanenorm::narrow<Float16>(0x1p-25f).bits, 0);
  CHECK_EQ(lanenorm::narrow<BFloat16>(1.00390625f).bits, 0x3f80);  // a tie, 1 + 2^-8

  every_pattern_widens_exactly_and_comes_back<Float16>();
  every_pattern_widens_exactly_and_comes_back<BFloat16>();
  rounding_is_to_nearest_even<Float16>();
  rounding_is_to_nearest_even<BFloat16>();
  nan_stays_nan<Float16>();
  nan_stays_nan<BFloat16>();
  return finish();
}
