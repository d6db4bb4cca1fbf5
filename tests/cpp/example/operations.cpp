// Every operation on numbers that test_cpp_package.py makes too; prints the bytes of each result, `name hex`, and what
// refused calls say, `error text`.
#include <cstdint>
#include <cstdio>
#include <lanenorm/lanenorm.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using lanenorm::ArrayView;
using lanenorm::Dims;
using lanenorm::DType;

// Memory for one array, of a dtype known at run time.
struct Memory {
  Memory(DType dtype, Dims shape) : dtype(dtype), shape(shape) {
    std::size_t count = 1;
    for (const std::int64_t length : shape) count *= static_cast<std::size_t>(length);
    bytes.resize(count * static_cast<std::size_t>(lanenorm::size(dtype)));
  }
  ArrayView view() { return ArrayView(bytes.data(), dtype, shape); }
  void print(const std::string& name) const {
    std::printf("%s ", name.c_str());
    for (const unsigned char byte : bytes) std::printf("%02x", byte);
    std::printf("\n");
  }

  DType dtype;
  Dims shape;
  std::vector<unsigned char> bytes;
};

// Multiples of 1/128 in [-1, 1): exact in every dtype.
Memory numbers(DType dtype, Dims shape, std::uint32_t seed) {
  Memory memory(dtype, shape);
  std::uint32_t state = seed;
  lanenorm::visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    T* values = reinterpret_cast<T*>(memory.bytes.data());
    for (std::size_t i = 0; i < memory.bytes.size() / sizeof(T); ++i) {
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

void layer_norms(DType dtype) {
  const std::string name = std::string("layer_norm ") + lanenorm::name(dtype) + " ";
  const DType statistics = lanenorm::statistics_dtype(dtype);
  Memory x = numbers(dtype, {5, 100}, 1), dy = numbers(dtype, {5, 100}, 2);
  Memory weight = numbers(dtype, {100}, 3), bias = numbers(dtype, {100}, 4);
  Memory y(dtype, {5, 100}), dx(dtype, {5, 100}), mean(statistics, {5, 1}), rstd(statistics, {5, 1});
  Memory dweight(dtype, {100}), dbias(dtype, {100});

  lanenorm::layer_norm(x.view(), weight.view(), bias.view(), y.view());
  y.print(name + "inference");
  lanenorm::LayerNormOptions options;
  options.eps = 1e-3;
  lanenorm::layer_norm_forward(x.view(), weight.view(), std::nullopt, y.view(), mean.view(), rstd.view(), options);
  y.print(name + "y"), mean.print(name + "mean"), rstd.print(name + "rstd");
  lanenorm::layer_norm_backward(dy.view(), x.view(), mean.view(), rstd.view(), weight.view(), dx.view(), dweight.view(),
                                dbias.view());
  dx.print(name + "dx"), dweight.print(name + "dweight"), dbias.print(name + "dbias");
}

void batch_norms(DType dtype) {
  const std::string name = std::string("batch_norm ") + lanenorm::name(dtype) + " ";
  const DType statistics = lanenorm::statistics_dtype(dtype);
  // channels-last memory: (4, 5, 5, 7) seen as (4, 7, 5, 5)
  const std::int64_t s = lanenorm::size(dtype);
  const Dims shape{4, 7, 5, 5}, strides{175 * s, s, 35 * s, 7 * s}, channels{7};
  Memory x = numbers(dtype, {700}, 5), dy = numbers(dtype, {700}, 6);
  Memory weight = numbers(dtype, channels, 7), bias = numbers(dtype, channels, 8);
  Memory y(dtype, {700}), dx(dtype, {700}), mean(statistics, channels), rstd(statistics, channels);
  Memory dweight(dtype, channels), dbias(dtype, channels);
  Memory running_mean = numbers(statistics, channels, 9), running_var(statistics, channels);
  const ArrayView x_view(x.bytes.data(), dtype, shape, strides), dy_view(dy.bytes.data(), dtype, shape, strides);
  const ArrayView y_view = lanenorm::like(x_view, y.bytes.data()), dx_view = lanenorm::like(x_view, dx.bytes.data());

  lanenorm::BatchNormOptions options;
  options.momentum = 0.25;
  lanenorm::batch_norm_forward(x_view, weight.view(), bias.view(), running_mean.view(), running_var.view(), y_view,
                               mean.view(), rstd.view(), options);
  y.print(name + "y"), mean.print(name + "mean"), rstd.print(name + "rstd");
  running_mean.print(name + "running_mean"), running_var.print(name + "running_var");
  lanenorm::batch_norm_backward(dy_view, x_view, mean.view(), rstd.view(), weight.view(), dx_view, dweight.view(),
                                dbias.view());
  dx.print(name + "dx"), dweight.print(name + "dweight"), dbias.print(name + "dbias");
  options.training = false;
  lanenorm::batch_norm_backward(dy_view, x_view, mean.view(), rstd.view(), std::nullopt, dx_view, std::nullopt,
                                std::nullopt, options);
  dx.print(name + "frozen");
  lanenorm::batch_norm(x_view, running_mean.view(), running_var.view(), weight.view(), bias.view(), y_view);
  y.print(name + "inference");
}

template <class Error = std::invalid_argument, class Call>
void refused(Call call) {
  try {
    call();
    std::printf("error none\n");
  } catch (const Error& error) {
    std::printf("error %s\n", error.what());
  }
}

void refusals() {
  std::vector<float> x(16, 7.0f), y(16, 1.0f), mean(2, 1.0f), rstd(2, 1.0f), five(5), eight(8);
  const ArrayView x_view(x.data(), {2, 8}), y_view(y.data(), {2, 8});
  const ArrayView mean_view(mean.data(), {2, 1}), rstd_view(rstd.data(), {2, 1}), weight(eight.data(), {8});
  const float* read_only = y.data();
  refused([&] { lanenorm::layer_norm(x_view, ArrayView(five.data(), {5}), {}, y_view); });
  refused([&] { lanenorm::layer_norm(x_view, {}, {}, {read_only, {2, 8}}); });
  refused([&] { lanenorm::layer_norm(x_view, {}, {}, {y.data(), {8, 2}}); });
  refused<std::out_of_range>([&] { lanenorm::layer_norm(x_view, {}, {}, y_view, {{2}}); });
  refused([&] { lanenorm::layer_norm_forward(x_view, {}, {}, y_view, {mean.data(), {2}}, rstd_view); });
  refused([&] { lanenorm::layer_norm_forward(x_view, {}, {}, y_view, mean_view, mean_view); });
  refused([&] { lanenorm::layer_norm_forward(x_view, {}, {}, y_view, mean_view, {x.data(), {2, 1}}); });
  refused(
      [&] { lanenorm::layer_norm_forward(x_view, {}, {}, y_view, {mean.data(), DType::float16, {2, 1}}, rstd_view); });
  refused([&] { lanenorm::layer_norm_backward(x_view, x_view, mean_view, rstd_view, {}, y_view, weight, {}); });
  refused([&] {
    lanenorm::layer_norm_backward(x_view, x_view, mean_view, rstd_view, {}, y_view, weight,
                                  ArrayView(five.data(), {5}));
  });
  refused([&] { ArrayView(static_cast<float*>(nullptr), {3}); });
  refused([&] { ArrayView(x.data(), {2, -8}); });
  refused([&] { ArrayView(x.data(), {2, 8}, {4}); });
  refused([&] { lanenorm::use_isa("mmx"); });
  refused([&] { lanenorm::set_num_threads(0); });
  for (const float value : y) std::printf("%s", value == 1.0f ? "" : "error: a refused call wrote to out\n");
}

}  // namespace

int main() {
  std::printf("version %s %s\n", lanenorm::version(), lanenorm::kVersion);
  std::printf("threads %d\n", (lanenorm::set_num_threads(2), lanenorm::get_num_threads()));
  std::printf("isas %d\n", lanenorm::current_isa() == lanenorm::available_isas().front());
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    layer_norms(dtype);
    batch_norms(dtype);
  }
  refusals();
}
