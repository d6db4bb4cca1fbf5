// Backward of channels in planes (formulas: channel.cuh; segments, pieces and order: plane_norm.cuh).
//
//   resident   x and dy of a channel stay in shared memory: each is read once, dx written (3s)
//   streamed   sums of all pieces, constants of all channels, then x and dy once more, the last pieces first (5s)
#pragma once

#include "cuda/plane_norm.cuh"
#include "cuda/row_gradient.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- a segment ---------------------------------------------------------------------------------------------------

// Sums over this warp's segment; mean and rstd of its channel.
template <class T>
__device__ __forceinline__ GradientSums segment_sums(const cuda::Channels& a, std::int64_t channel, int count,
                                                     const Words (&dy)[1][kSegmentVectors],
                                                     const Words (&x)[1][kSegmentVectors]) {
  using C = Compute<T>;
  return run_sums<T, 32, kSegmentVectors, 1, false>(true, dy, x, nullptr, count, static_cast<const C*>(a.mean)[channel],
                                                    static_cast<const C*>(a.rstd)[channel],
                                                    static_cast<int>(threadIdx.x) % 32);
}

// dx into `dy`, and from there to memory.
template <class T>
__device__ __forceinline__ void gradient_segment(const GradientConstants<Compute<T>>& k, int bytes, char* dx,
                                                 const Words (&x)[1][kSegmentVectors],
                                                 Words (&dy)[1][kSegmentVectors]) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int v = 0; v < kSegmentVectors; ++v) {
    if (16 * (32 * v + lane) >= bytes) continue;
    C g[E], xhat[E];
    unpack<T>(dy[0][v], g);
    unpack<T>(x[0][v], xhat);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      xhat[e] = normalize(xhat[e], k.mean, k.rstd, k.shift);
      g[e] = input_gradient(g[e], C(1), xhat[e], k.minus_mean_g, k.minus_mean_gx, k.factor);
    }
    dy[0][v] = pack<T>(g);
  }
  store_run<T, 32, kSegmentVectors>(dx, bytes, device::kAllLanes, lane, dy[0]);
}

// ---- resident ----------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_backward_resident(cuda::PlaneBackward a) {
  using M = GradientSums;
  PlaneLayout<M>& shared = device::shared<PlaneLayout<M>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const OwnPieces own(a.runs);
  const std::int64_t clusters = gridDim.x / device::cluster_size();
  for (std::int64_t c = blockIdx.x / device::cluster_size(); c < a.channels.count; c += clusters) {
    const char* x = a.x + c * a.x_channel_stride;
    const char* dy = a.dy + c * a.dy_channel_stride;
    for (int piece = 0; piece < own.count; ++piece) {
      const Segment<T> s(a.runs, own.first + piece);
      if (s.count() == 0) continue;
      copy_image(x + s.offset(a.x_run_stride), s.bytes(), slot<M>(a.runs, piece), lane, 32);
      copy_image(dy + s.offset(a.dy_run_stride), s.bytes(), slot<M>(a.runs, piece, 1), lane, 32);
    }
    device::copy_wait<0>();
    device::sync_warp(device::kAllLanes);

    Words x_data[1][kSegmentVectors], dy_data[1][kSegmentVectors];
    const auto read = [&](const Segment<T>& s, int piece) {
      const int x_shift = misaligned(x + s.offset(a.x_run_stride), 16);
      const int dy_shift = misaligned(dy + s.offset(a.dy_run_stride), 16);
      read_image(slot<M>(a.runs, piece), x_shift, s.bytes(), 0, lane, x_data[0]);
      read_image(slot<M>(a.runs, piece, 1), dy_shift, s.bytes(), 0, lane, dy_data[0]);
    };
    for (int piece = 0; piece < own.count; ++piece) {
      const Segment<T> s(a.runs, own.first + piece);
      read(s, piece);
      const M sums = segment_sums<T>(a.channels, c, s.count(), dy_data, x_data);
      if (lane == 0) shared.warps[piece][warp] = sums;
    }
    const GradientConstants<Compute<T>> k = gradient_constants<T>(a.channels, c, fold_channel(a.runs, own, shared),
                                                                  threadIdx.x == 0 && device::cluster_rank() == 0);
    for (int piece = 0; piece < own.count; ++piece) {
      const Segment<T> s(a.runs, own.first + piece);
      read(s, piece);
      gradient_segment<T>(k, s.bytes(), a.dx + c * a.dx_channel_stride + s.offset(a.dx_run_stride), x_data, dy_data);
    }
    device::sync_warp(device::kAllLanes);  // the slots are read
  }
}

// ---- streamed ----------------------------------------------------------------------------------------------------

// Sums of the segments of a block: of this piece, and of the one before, which other warps may still read.
struct WarpGradientSums {
  GradientSums warps[2][cuda::kPieceWarps];
};

template <class T>
__device__ __forceinline__ void load_segment(const cuda::PlaneBackward& a, std::int64_t channel, const Segment<T>& s,
                                             Words (&x)[1][kSegmentVectors], Words (&dy)[1][kSegmentVectors]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_run<T, 32, kSegmentVectors>(a.x + channel * a.x_channel_stride + s.offset(a.x_run_stride), s.bytes(), lane,
                                   x[0]);
  load_run<T, 32, kSegmentVectors>(a.dy + channel * a.dy_channel_stride + s.offset(a.dy_run_stride), s.bytes(), lane,
                                   dy[0]);
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_sums_streamed(cuda::PlaneBackward a) {
  WarpGradientSums& shared = device::shared<WarpGradientSums>();
  int parity = 0;
  for_pieces<false>(a.channels.count, a.runs, [&](std::int64_t c, std::int64_t piece, std::int64_t unit) {
    const Segment<T> s(a.runs, piece);
    Words x[1][kSegmentVectors], dy[1][kSegmentVectors];
    load_segment(a, c, s, x, dy);
    parity ^= 1;
    const GradientSums sums =
        fold_warps<cuda::kPieceWarps, 1>(segment_sums<T>(a.channels, c, s.count(), dy, x), &shared.warps[parity]);
    if (threadIdx.x == 0) static_cast<GradientSums*>(a.piece_sums)[unit] = sums;
  });
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_gradient_streamed(cuda::PlaneBackward a) {
  for_pieces<true>(a.channels.count, a.runs, [&](std::int64_t c, std::int64_t piece, std::int64_t /*unit*/) {
    const Segment<T> s(a.runs, piece);
    Words x[1][kSegmentVectors], dy[1][kSegmentVectors];
    load_segment(a, c, s, x, dy);
    gradient_segment<T>(static_cast<const GradientConstants<Compute<T>>*>(a.channels.constants)[c], s.bytes(),
                        a.dx + c * a.dx_channel_stride + s.offset(a.dx_run_stride), x, dy);
  });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
