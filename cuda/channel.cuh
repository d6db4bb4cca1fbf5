// Batch norm between the passes over x: from moments or sums of a channel to the constants its elements need.
//
//   y  = ((x * scale - mean) * rstd + shift) * weight + bias      normalize_affine in core/formulas.hpp
//   dx = factor * (dy - mean(dy) - xhat * mean(dy * xhat)),  dweight = sum dy * xhat,  dbias = sum dy
//
// One thread of a warp finishes a channel: two divisions and a root in double beside thousands of elements.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/formulas.hpp"
#include "cuda/device.cuh"
#include "cuda/kernels.hpp"
#include "cuda/load.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistic.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// What normalize_affine takes. Where the weight is folded into rstd and shift it is 1 here.
template <class C>
struct ChannelConstants {
  C scale, mean, rstd, shift, weight, bias;
};

// ---- from a statistic to constants -------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ ChannelConstants<C> channel_constants(const Normalizer<C>& n, C weight, C bias) {
  const FoldedWeight<double> folded = fold_weight<double>(n.rstd, n.rstd_low, n.shift, weight);
  if (n.scale == C(1) && foldable(static_cast<C>(folded.factor), weight)) {
    return {C(1), n.mean, static_cast<C>(folded.factor), static_cast<C>(folded.shift), C(1), bias};
  }
  return {n.scale, n.mean, n.rstd, n.shift, weight, bias};
}

template <class T>
__device__ __forceinline__ Compute<T> channel_weight(const cuda::Channels& a, std::int64_t channel) {
  return parameter<T>(a.weight, a.parameters_as_compute, channel, Compute<T>(1));
}
template <class T>
__device__ __forceinline__ Compute<T> channel_bias(const cuda::Channels& a, std::int64_t channel) {
  return parameter<T>(a.bias, a.parameters_as_compute, channel, -Compute<T>(0));
}

template <class T>
__device__ __forceinline__ ChannelConstants<Compute<T>> channel_constants(const cuda::Channels& a, std::int64_t channel,
                                                                          const Statistic<Compute<T>>& s) {
  return channel_constants(s.normalizer, channel_weight<T>(a, channel), channel_bias<T>(a, channel));
}

// Saved and running statistics. By one thread.
template <class C>
__device__ __forceinline__ void store_statistic(const cuda::Channels& a, std::int64_t channel, const Statistic<C>& s) {
  static_cast<C*>(a.mean)[channel] = s.mean;
  static_cast<C*>(a.rstd)[channel] = s.rstd;
  if (a.running_mean == nullptr) return;
  update_running(s.exact_mean, s.variance, a.elements, a.momentum, static_cast<C*>(a.running_mean) + channel,
                 static_cast<C*>(a.running_var) + channel);
}

// With running statistics. rstd and shift 1 and -0 leave x - mean as it is: y = (x - mean) * factor + bias, rounded
// once after the difference.
template <class T>
__device__ __forceinline__ ChannelConstants<Compute<T>> inference_constants(const cuda::Channels& a,
                                                                            std::int64_t channel) {
  using C = Compute<T>;
  const C weight = channel_weight<T>(a, channel), bias = channel_bias<T>(a, channel);
  const C mean = static_cast<const C*>(a.mean)[channel];
  const double variance = static_cast<double>(static_cast<const C*>(a.rstd)[channel]);
  const double rstd = 1.0 / sqrt(variance + a.eps);
  const C factor = static_cast<C>(rstd * static_cast<double>(weight));
  if (foldable(factor, weight)) return {C(1), mean, C(1), -C(0), factor, bias};
  return {C(1), mean, static_cast<C>(rstd), -C(0), weight, bias};
}

// Constants of dx; dweight and dbias are stored if `first`.
template <class T>
__device__ __forceinline__ GradientConstants<Compute<T>> gradient_constants(const cuda::Channels& a,
                                                                            std::int64_t channel,
                                                                            const GradientSums& sums, bool first) {
  using C = Compute<T>;
  double dweight = 0.0;
  const GradientConstants<C> k = finish_gradient<C>(
      sums, a.elements, static_cast<const C*>(a.mean)[channel], static_cast<const C*>(a.rstd)[channel],
      static_cast<double>(channel_weight<T>(a, channel)), a.training, &dweight);
  if (first && a.dweight != nullptr) store_parameter<T>(a.dweight, a.parameters_as_compute, channel, dweight);
  if (first && a.dbias != nullptr) store_parameter<T>(a.dbias, a.parameters_as_compute, channel, sums.g);
  return k;
}

// Workspace for Channels::constants.
template <class T>
void* allocate_constants(const cuda::Channels& channels, const cuda::Context& context) {
  using C = Compute<T>;
  return context.allocate(context.state, static_cast<std::size_t>(channels.count) *
                                             std::max(sizeof(ChannelConstants<C>), sizeof(GradientConstants<C>)));
}

// ---- all channels ------------------------------------------------------------------------------------------------

// f(channel), a warp each.
template <class F>
__device__ __forceinline__ void for_channels(std::int64_t channels, F&& f) {
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t c = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; c < channels; c += warps) f(c);
}

// all: (sets, channels, places)
template <class T>
__global__ void __launch_bounds__(128)
    channel_statistics_kernel(cuda::Channels a, const void* all, std::int64_t places) {
  using C = Compute<T>;
  for_channels(a.count, [&](std::int64_t c) {
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      const int set = decltype(scaled)::value ? set_of(scale) : 0;
      const Counted* moments = static_cast<const Counted*>(all) + (set * a.count + c) * places;
      return fold_places(places, [&](std::int64_t i) { return moments[i]; });
    });
    if (threadIdx.x % 32 != 0) return;
    store_statistic(a, c, s);
    static_cast<ChannelConstants<C>*>(a.constants)[c] = channel_constants<T>(a, c, s);
  });
}

// all: (channels, places)
template <class T>
__global__ void __launch_bounds__(128) channel_gradient_kernel(cuda::Channels a, const void* all, std::int64_t places) {
  for_channels(a.count, [&](std::int64_t c) {
    const GradientSums* sums = static_cast<const GradientSums*>(all) + c * places;
    const GradientSums total = fold_places(places, [&](std::int64_t i) { return sums[i]; });
    if (threadIdx.x % 32 != 0) return;
    static_cast<GradientConstants<Compute<T>>*>(a.constants)[c] = gradient_constants<T>(a, c, total, true);
  });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
