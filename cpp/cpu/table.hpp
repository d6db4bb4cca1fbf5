// Fills an ISA's table of kernels from the dtype list. Included by isa_*.cpp after their simd header.
#pragma once

#include "core/dtype.hpp"
#include "cpu/column_norm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/plane_norm.hpp"
#include "cpu/row_norm.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

template <class C>
struct VectorOf {
  using Type = F32x16;
};
template <>
struct VectorOf<double> {
  using Type = F64x8;
};

template <class From, class To>
void convert(const void* values, std::int64_t count, void* out) {
  using V = typename VectorOf<typename Storage<From>::Compute>::Type;
  const char* p = static_cast<const char*>(values);
  char* q = static_cast<char*>(out);
  for_vectors<V>(count, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    store<To>(load<From, V>(p + i * static_cast<std::int64_t>(sizeof(From)), part),
              q + i * static_cast<std::int64_t>(sizeof(To)), part);
  });
}

template <class T>
constexpr KernelTable make_table() {
  using C = typename Storage<T>::Compute;
  using V = typename VectorOf<C>::Type;
  using D = F64x8;
  KernelTable t{};
  t.row_forward = &row_forward<T, V, D>;
  t.row_moments = &row_moments<T, V, D, false>;
  t.row_moments_wide = &row_moments<T, V, D, true>;
  t.row_apply = &row_apply<T, V, D>;
  t.row_sums = &row_sums<T, V, D>;
  t.row_gradient = &row_gradient<T, V, D>;
  t.row_backward = &row_backward<T, V, D>;
  t.add_partial_sums = &add_partial_sums<C, D>;
  t.column_moments = &column_moments<T, V, D, false>;
  t.column_moments_wide = &column_moments<T, V, D, true>;
  t.column_merge = &column_merge<D>;
  t.column_fold = &column_fold<D>;
  t.column_spread = &column_spread<V>;
  t.column_finish = &column_finish<C, D>;
  t.column_weight = &column_weight<C, D>;
  t.column_apply = &column_apply<T, V>;
  t.inference_constants = &inference_constants<C, D>;
  t.column_sums = &column_sums<T, V, D>;
  t.column_gradient_finish = &column_gradient_finish<C, D>;
  t.column_gradient = &column_gradient<T, V, D>;
  if constexpr (sizeof(T) < 8) {
    t.plane_moments = &plane_moments<T, V, D, false>;
    t.plane_moments_wide = &plane_moments<T, V, D, true>;
  }
  t.plane_apply = &plane_apply<T, V>;
  t.plane_sums = &plane_sums<T, V, D>;
  t.plane_gradient = &plane_gradient<T, V>;
  t.widen = &convert<T, C>;
  t.narrow = &convert<C, T>;
  return t;
}

// In the order of DType.
inline constexpr KernelTable kTables[kDTypes] = {make_table<Float16>(), make_table<BFloat16>(), make_table<float>(),
                                                 make_table<double>()};

}  // namespace LANENORM_ISA
}  // namespace lanenorm
