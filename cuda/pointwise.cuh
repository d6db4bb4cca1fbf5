// Channels whose constants do not depend on the data: y of an inference, and dx with frozen statistics where nobody
// wants dweight and dbias (formulas: channel.cuh). One launch, one pass: x is read and y written, or dy and dx (2s).
//
// A block computes the constants of its channels itself, once each, into shared memory; no moments, so any block may
// take any elements, and the loops over them divide nothing.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/column_norm.cuh"
#include "cuda/plane_norm.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- what becomes of an element ----------------------------------------------------------------------------------

template <class T>
struct Inference {
  using Constants = ChannelConstants<Compute<T>>;
  __device__ __forceinline__ static Constants constants(const cuda::Channels& a, std::int64_t channel) {
    return inference_constants<T>(a, channel);
  }
  __device__ __forceinline__ static Compute<T> value(Compute<T> x, const Constants& k) {
    return normalize_affine(x, k.scale, k.mean, k.rstd, k.shift, k.weight, k.bias);
  }
};

// The gradient's formula with sums of nothing: x is not needed.
template <class T>
struct FrozenGradient {
  using Constants = Compute<T>;  // the factor
  __device__ __forceinline__ static Constants constants(const cuda::Channels& a, std::int64_t channel) {
    return gradient_constants<T>(a, channel, GradientSums{}, false).factor;
  }
  __device__ __forceinline__ static Compute<T> value(Compute<T> dy, const Constants& factor) {
    using C = Compute<T>;
    return input_gradient(dy, C(1), C(0), C(0), C(0), factor);
  }
};

// ---- planes ------------------------------------------------------------------------------------------------------

// The segments of this warp, piece after piece and channel after channel from piece `unit` of all channels on.
struct Walk {
  std::int64_t channel, piece, run, segment;
  __device__ __forceinline__ Walk(const cuda::Runs& runs, std::int64_t unit)
      : channel(unit / runs.pieces), piece(unit - channel * runs.pieces) {
    const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
    step_ = {warps / runs.segments, warps % runs.segments};
    start_ = {warp / runs.segments, warp % runs.segments};
    const std::int64_t index = piece * warps + warp;
    run = index / runs.segments;
    segment = index - run * runs.segments;
  }
  __device__ __forceinline__ void advance(const cuda::Runs& runs) {
    if (++piece == runs.pieces) {
      piece = 0;
      ++channel;
      run = start_.run;
      segment = start_.segment;
      return;
    }
    run += step_.run;
    segment += step_.segment;
    if (segment >= runs.segments) {
      segment -= runs.segments;
      ++run;
    }
  }

 private:
  struct Place {
    std::int64_t run, segment;
  };
  Place step_, start_;
};

// A block takes adjacent pieces, so that it has few channels. Shared memory: constants of as many channels as it has
// threads.
template <class T, class Operation>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_pointwise_kernel(cuda::PlaneForward a) {
  using K = typename Operation::Constants;
  K* constants = device::shared<K>(0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t units = a.channels.count * a.runs.pieces;
  const std::int64_t begin = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + std::int64_t{1}) / gridDim.x;
  const std::int64_t last = (end - 1) / a.runs.pieces;  // channel
  Walk walk(a.runs, begin);
  std::int64_t first = walk.channel, ready = first;  // channels [first, ready) have constants
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const Segment<T> s(a.runs, walk.run, walk.segment);
    Words data[kSegmentVectors];
    load_run<T, 32, kSegmentVectors>(a.x + walk.channel * a.x_channel_stride + s.offset(a.x_run_stride), s.bytes(),
                                     lane, data);
    if (walk.channel >= ready) {  // computed while the words are on their way
      device::sync_block();       // the constants before are read
      first = walk.channel;
      ready = first + blockDim.x;
      const std::int64_t channel = first + threadIdx.x;
      if (channel <= last) constants[threadIdx.x] = Operation::constants(a.channels, channel);
      device::sync_block();
    }
    const K k = constants[walk.channel - first];
    map_segment<T>(s.bytes(), a.y + walk.channel * a.y_channel_stride + s.offset(a.y_run_stride), data,
                   [&](Compute<T> x) { return Operation::value(x, k); });
    walk.advance(a.runs);
  }
}

// ---- columns -----------------------------------------------------------------------------------------------------

// A block takes a.warp_rows rows a warp of a strip. Shared memory: constants of the strip's statistics.
template <class T, class Operation>
__global__ void __launch_bounds__(kColumnThreads, 1)
    column_pointwise_kernel(cuda::ColumnForward a, cuda::ColumnChannels channels) {
  using K = typename Operation::Constants;
  constexpr int E = kPerWord<T>;
  static_assert(kStripColumns<T> <= kColumnThreads);
  K* constants = device::shared<K>(0);
  for (std::int64_t unit = blockIdx.x; unit < a.matrices * a.strips * a.pieces; unit += gridDim.x) {
    const Piece<T> p(a, unit, a.warp_rows);
    const std::int64_t column = p.matrix * a.columns + p.first_column;
    const std::int64_t first = statistic_of_column(column, channels.fold);
    const std::int64_t own = first + threadIdx.x;
    if (own <= statistic_of_column(column + p.columns - 1, channels.fold)) {
      constants[threadIdx.x] = Operation::constants(channels.channels, own);
    }
    device::sync_block();
    K k[E] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const std::int64_t mine = column + threadIdx.x % 32 * E + e;
      if (e < p.left) k[e] = constants[statistic_of_column(mine, channels.fold) - first];
    }
    for_words<T, 1>(p, {x_of(a)}, y_of(a), [&](int /*row*/, const Words(&x)[1]) {
      Compute<T> values[E];
      unpack<T>(x[0], values);
#pragma unroll
      for (int e = 0; e < E; ++e) values[e] = Operation::value(values[e], k[e]);
      return pack<T>(values);
    });
    device::sync_block();  // the constants are read
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
