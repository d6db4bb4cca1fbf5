// See pack.hpp. A thread an element: these are the layouts that nobody calls often, so nothing here is tuned.
#include "cuda/pack.hpp"

#include "cuda/device.cuh"
#include "cuda/launch.hpp"
#include "cuda/load.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// Byte offset of flat index `index`; the device's twin of core/plan.cpp.
__device__ __forceinline__ std::int64_t offset_in(const Loop& loop, std::int64_t index) {
  std::int64_t bytes = 0;
  for (int axis = loop.axes - 1; axis >= 0; --axis) {
    const std::int64_t rest = index / loop.extent[axis];
    bytes += (index - rest * loop.extent[axis]) * loop.stride[axis];
    index = rest;
  }
  return bytes;
}

// S: an unsigned integer of an element's size, which may lie at any address.
template <class S>
__global__ void __launch_bounds__(256) copy_elements(cuda::Nest to, cuda::Nest from, cuda::Lines lines) {
  const std::int64_t elements = lines.count * lines.columns;
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < elements; i += threads) {
    const std::int64_t row = i / lines.columns, line = lines.first + row;
    const std::int64_t position = lines.column + i - row * lines.columns;
    const char* source = from.data + offset_in(from.lines, line) + offset_in(from.inner, position);
    store_element(to.data + offset_in(to.lines, line) + offset_in(to.inner, position), load_element<S>(source));
  }
}

template <class C>
__global__ void __launch_bounds__(256) fill_statistics(C mean, C rstd, std::int64_t count, C* means, C* rstds) {
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += threads) {
    if (means != nullptr) means[i] = mean;
    if (rstds != nullptr) rstds[i] = rstd;
  }
}

__global__ void __launch_bounds__(256) fill_zero_bytes(unsigned char* to, std::int64_t bytes) {
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < bytes; i += threads) {
    device::store_global(to + i, static_cast<unsigned char>(0));
  }
}

}  // namespace LANENORM_ISA

namespace cuda {
namespace {

// 256 threads a block, 8 blocks an SM fill it.
Config config_of(std::int64_t elements, const Context& context) {
  return {grid_of((elements + 255) / 256, 8, device_limits(context.device)), 256};
}

}  // namespace

void copy_lines(const Nest& to, const Nest& from, const Lines& lines, std::int64_t element_bytes,
                const Context& context) {
  const std::int64_t elements = lines.count * lines.columns;
  if (elements == 0) return;
  const Config config = config_of(elements, context);
  switch (element_bytes) {
    case 2: launch(copy_elements<std::uint16_t>, config, context.stream, to, from, lines); break;
    case 4: launch(copy_elements<std::uint32_t>, config, context.stream, to, from, lines); break;
    default: launch(copy_elements<std::uint64_t>, config, context.stream, to, from, lines); break;
  }
}

void fill_empty_statistics(DType dtype, std::int64_t count, double eps, void* mean, void* rstd,
                           const Context& context) {
  if (count == 0) return;
  const Config config = config_of(count, context);
  const double value = 1.0 / __builtin_sqrt(eps);
  if (statistics_dtype(dtype) == DType::float64) {
    launch(fill_statistics<double>, config, context.stream, 0.0, value, count, static_cast<double*>(mean),
           static_cast<double*>(rstd));
  } else {
    launch(fill_statistics<float>, config, context.stream, 0.0f, static_cast<float>(value), count,
           static_cast<float*>(mean), static_cast<float*>(rstd));
  }
}

void fill_zero(void* to, std::int64_t bytes, const Context& context) {
  if (bytes == 0) return;
  launch(fill_zero_bytes, config_of(bytes, context), context.stream, static_cast<unsigned char*>(to), bytes);
}

}  // namespace cuda
}  // namespace lanenorm
