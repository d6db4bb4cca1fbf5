// Every operation on numbers that cpp_operations.py makes too; prints the bytes of each result, `name hex`. Library
// says whose operations, and where memory for them is.
#pragma once

#include <cstdint>
#include <cstdio>
#include <lanenorm/lanenorm.hpp>
#include <memory>
#include <optional>
#include <string>

using lanenorm::ArrayView;
using lanenorm::Dims;
using lanenorm::DType;

// Memory for one array, of a dtype known at run time.
template <class Library>
struct Memory {
  Memory(DType dtype, Dims shape) : dtype(dtype), shape(shape), bytes(static_cast<std::size_t>(lanenorm::size(dtype))) {
    for (const std::int64_t length : shape) bytes *= static_cast<std::size_t>(length);
    data = {Library::allocate(bytes), Library::free};
    __builtin_memset(data.get(), 0, bytes);
  }
  ArrayView view() { return ArrayView(data.get(), dtype, shape); }
  void print(const std::string& name) const {
    Library::wait();
    std::printf("%s ", name.c_str());
    for (std::size_t i = 0; i < bytes; ++i) std::printf("%02x", static_cast<const unsigned char*>(data.get())[i]);
    std::printf("\n");
  }

  DType dtype;
  Dims shape;
  std::size_t bytes;
  std::unique_ptr<void, void (*)(void*)> data{nullptr, Library::free};
};

// Multiples of 1/128 in [-1, 1): exact in every dtype.
template <class Library>
Memory<Library> numbers(DType dtype, Dims shape, std::uint32_t seed) {
  Memory<Library> memory(dtype, shape);
  std::uint32_t state = seed;
  lanenorm::visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    T* values = static_cast<T*>(memory.data.get());
    for (std::size_t i = 0; i < memory.bytes / sizeof(T); ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int>(state >> 24) - 128) / 128.0f;
      if constexpr (sizeof(T) >= 4) {
        values[i] = static_cast<T>(value);
      } else {  // 16 bits: the upper half of a float32, as all values have at most 8 significant bits
        std::uint32_t bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        static_assert(sizeof(T) == 2);
        values[i] = T{static_cast<std::uint16_t>(bits >> 16)};
      }
    }
  });
  return memory;
}

template <class Library>
void layer_norms(DType dtype) {
  using Memory = Memory<Library>;
  const std::string name = std::string("layer_norm ") + lanenorm::name(dtype) + " ";
  const DType statistics = lanenorm::statistics_dtype(dtype);
  Memory x = numbers<Library>(dtype, {5, 100}, 1), dy = numbers<Library>(dtype, {5, 100}, 2);
  Memory weight = numbers<Library>(dtype, {100}, 3), bias = numbers<Library>(dtype, {100}, 4);
  Memory y(dtype, {5, 100}), dx(dtype, {5, 100}), mean(statistics, {5, 1}), rstd(statistics, {5, 1});
  Memory dweight(dtype, {100}), dbias(dtype, {100});

  Library::layer_norm(x.view(), weight.view(), bias.view(), y.view());
  y.print(name + "inference");
  lanenorm::LayerNormOptions options;
  options.eps = 1e-3;
  Library::layer_norm_forward(x.view(), weight.view(), std::nullopt, y.view(), mean.view(), rstd.view(), options);
  y.print(name + "y"), mean.print(name + "mean"), rstd.print(name + "rstd");
  Library::layer_norm_backward(dy.view(), x.view(), mean.view(), rstd.view(), weight.view(), dx.view(), dweight.view(),
                               dbias.view());
  dx.print(name + "dx"), dweight.print(name + "dweight"), dbias.print(name + "dbias");
}

template <class Library>
void batch_norms(DType dtype) {
  using Memory = Memory<Library>;
  const std::string name = std::string("batch_norm ") + lanenorm::name(dtype) + " ";
  const DType statistics = lanenorm::statistics_dtype(dtype);
  // channels-last memory: (4, 5, 5, 7) seen as (4, 7, 5, 5)
  const std::int64_t s = lanenorm::size(dtype);
  const Dims shape{4, 7, 5, 5}, strides{175 * s, s, 35 * s, 7 * s}, channels{7};
  Memory x = numbers<Library>(dtype, {700}, 5), dy = numbers<Library>(dtype, {700}, 6);
  Memory weight = numbers<Library>(dtype, channels, 7), bias = numbers<Library>(dtype, channels, 8);
  Memory y(dtype, {700}), dx(dtype, {700}), mean(statistics, channels), rstd(statistics, channels);
  Memory dweight(dtype, channels), dbias(dtype, channels);
  Memory running_mean = numbers<Library>(statistics, channels, 9), running_var(statistics, channels);
  const ArrayView x_view(x.data.get(), dtype, shape, strides), dy_view(dy.data.get(), dtype, shape, strides);
  const ArrayView y_view = lanenorm::like(x_view, y.data.get()), dx_view = lanenorm::like(x_view, dx.data.get());

  lanenorm::BatchNormOptions options;
  options.momentum = 0.25;
  Library::batch_norm_forward(x_view, weight.view(), bias.view(), running_mean.view(), running_var.view(), y_view,
                              mean.view(), rstd.view(), options);
  y.print(name + "y"), mean.print(name + "mean"), rstd.print(name + "rstd");
  running_mean.print(name + "running_mean"), running_var.print(name + "running_var");
  Library::batch_norm_backward(dy_view, x_view, mean.view(), rstd.view(), weight.view(), dx_view, dweight.view(),
                               dbias.view());
  dx.print(name + "dx"), dweight.print(name + "dweight"), dbias.print(name + "dbias");
  options.training = false;
  Library::batch_norm_backward(dy_view, x_view, mean.view(), rstd.view(), std::nullopt, dx_view, std::nullopt,
                               std::nullopt, options);
  dx.print(name + "frozen");
  Library::batch_norm(x_view, running_mean.view(), running_var.view(), weight.view(), bias.view(), y_view);
  y.print(name + "inference");
}
