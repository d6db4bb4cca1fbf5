// Every operation on the CPU (operations.hpp), and what refused calls say, `error text`.
#include "operations.hpp"

#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace {

struct Cpu {
  static void* allocate(std::size_t bytes) { return std::malloc(bytes); }
  static void free(void* memory) { std::free(memory); }
  static void wait() {}
  template <class... A>
  static void layer_norm(const A&... arguments) {
    lanenorm::layer_norm(arguments...);
  }
  template <class... A>
  static void layer_norm_forward(const A&... arguments) {
    lanenorm::layer_norm_forward(arguments...);
  }
  template <class... A>
  static void layer_norm_backward(const A&... arguments) {
    lanenorm::layer_norm_backward(arguments...);
  }
  template <class... A>
  static void batch_norm(const A&... arguments) {
    lanenorm::batch_norm(arguments...);
  }
  template <class... A>
  static void batch_norm_forward(const A&... arguments) {
    lanenorm::batch_norm_forward(arguments...);
  }
  template <class... A>
  static void batch_norm_backward(const A&... arguments) {
    lanenorm::batch_norm_backward(arguments...);
  }
};

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
    layer_norms<Cpu>(dtype);
    batch_norms<Cpu>(dtype);
  }
  refusals();
}
