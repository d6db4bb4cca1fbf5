// The one list of element types: name, storage type, compute type. Adding a dtype starts here.
//
// Storage is what lies in the caller's arrays. Compute is what kernels calculate in, and also the dtype of
// mean, rstd and the running statistics. A 16-bit value is widened on load and rounded once on store.
#pragma once

#include <cstdint>

namespace lanenorm {

// IEEE binary16 and bfloat16 as bits; halves.hpp converts them.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

enum class DType : std::uint8_t { float16, bfloat16, float32, float64 };
inline constexpr int kDTypes = 4;

template <class T>
struct Storage;  // not defined for anything but the four below

template <>
struct Storage<Float16> {
  using Compute = float;
  static constexpr DType kDType = DType::float16;
};
template <>
struct Storage<BFloat16> {
  using Compute = float;
  static constexpr DType kDType = DType::bfloat16;
};
template <>
struct Storage<float> {
  using Compute = float;
  static constexpr DType kDType = DType::float32;
};
template <>
struct Storage<double> {
  using Compute = double;
  static constexpr DType kDType = DType::float64;
};

template <class T>
struct TypeTag {
  using Type = T;
};

// f(TypeTag<T>{}) for the storage type T of `dtype`.
template <class F>
constexpr decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float16: return f(TypeTag<Float16>{});
    case DType::bfloat16: return f(TypeTag<BFloat16>{});
    case DType::float32: return f(TypeTag<float>{});
    case DType::float64: break;
  }
  return f(TypeTag<double>{});
}

constexpr const char* name(DType dtype) {
  constexpr const char* kNames[kDTypes] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

constexpr std::int64_t size(DType dtype) {
  return visit(dtype, [](auto tag) { return static_cast<std::int64_t>(sizeof(typename decltype(tag)::Type)); });
}

// The dtype of mean, rstd and running statistics that go with x of `dtype`.
constexpr DType statistics_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

}  // namespace lanenorm
