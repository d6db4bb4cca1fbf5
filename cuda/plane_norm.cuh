// Channels in planes: each channel is several runs of adjacent elements, a plane of every image (formulas:
// channel.cuh).
//
// A run is cut into segments of at most 4 KB, what a warp holds in registers; `warps` segments in a row, across the
// ends of runs, are a piece, what a block computes at a time. Segments and pieces follow from the shape alone.
//
//   resident   all pieces of a channel lie in the shared memory of a block, or of the blocks of a cluster, which read
//              each other's moments there: x is read once (2s)
//   streamed   where they do not fit: moments of all pieces, statistics of all channels, then x once more, the last
//              pieces first (3s)
//
// THE ORDER OF OPERATIONS: a segment as a run of row_norm.cuh, the segments of a piece and the pieces of a channel as
// trees in double; the same in both.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/row_norm_long.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr int kSegmentVectors = cuda::kSegmentWords / 32;  // words a lane
inline constexpr int kPlaneThreads = 32 * cuda::kPieceWarps;      // at most

// ---- where a segment lies ----------------------------------------------------------------------------------------

// What this warp computes of a piece; nothing where the channel ends before.
template <class T>
struct Segment {
  std::int64_t run;
  Share<T> share;
  __device__ __forceinline__ Segment(const cuda::Runs& runs, std::int64_t piece)
      : Segment(runs, piece * (blockDim.x / 32) + threadIdx.x / 32, Unscaled{}) {}
  // Segment `segment` of a run.
  __device__ __forceinline__ Segment(const cuda::Runs& runs, std::int64_t run_, std::int64_t segment)
      : run(run_), share(run < runs.runs ? runs.length : 0, segment * runs.segment_words, runs.segment_words) {}
  __device__ __forceinline__ std::int64_t offset(std::int64_t run_stride) const {
    return run * run_stride + share.offset();
  }
  __device__ __forceinline__ int count() const { return share.count; }
  __device__ __forceinline__ int bytes() const { return share.bytes(); }

 private:
  __device__ __forceinline__ Segment(const cuda::Runs& runs, std::int64_t index, Unscaled)
      : Segment(runs, index / runs.segments, index % runs.segments) {}
};

// ---- apply -------------------------------------------------------------------------------------------------------

// f(element) of a segment, which lies in `data` and is overwritten.
template <class T, class F>
__device__ __forceinline__ void map_segment(int bytes, char* y, Words (&data)[kSegmentVectors], F&& f) {
  constexpr int E = kPerWord<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int v = 0; v < kSegmentVectors; ++v) {
    if (16 * (32 * v + lane) >= bytes) continue;
    Compute<T> x[E];
    unpack<T>(data[v], x);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = f(x[e]);
    data[v] = pack<T>(x);
  }
  store_run<T, 32, kSegmentVectors>(y, bytes, device::kAllLanes, lane, data);
}

// y of a segment.
template <class T>
__device__ __forceinline__ void apply_segment(const ChannelConstants<Compute<T>>& k, int bytes, char* y,
                                              Words (&data)[kSegmentVectors]) {
  map_segment<T>(bytes, y, data,
                 [&](Compute<T> x) { return normalize_affine(x, k.scale, k.mean, k.rstd, k.shift, k.weight, k.bias); });
}

// ---- resident ----------------------------------------------------------------------------------------------------

// The slots follow: (pieces, warps) of segment_words + kSlotSpare each. A warp reads only what it copied itself.
template <class M>
struct PlaneLayout {
  M warps[cuda::kPlanePieces][cuda::kPieceWarps];
  M pieces[cuda::kPlanePieces];
  alignas(16) Words slots[1];
};
static_assert(sizeof(PlaneLayout<Counted>) <= cuda::kPlaneBytes);

// Shared memory of a block. tensors: that are kept
template <class M>
std::size_t plane_bytes(const cuda::PlaneChoice& choice, int tensors) {
  return sizeof(PlaneLayout<M>) + static_cast<std::size_t>(tensors * choice.pieces_per_block * choice.warps *
                                                           (choice.segment_words + cuda::kSlotSpare)) *
                                      sizeof(Words);
}

// The pieces of a channel that belong to this block of a cluster.
struct OwnPieces {
  std::int64_t first;
  int count;
  __device__ __forceinline__ explicit OwnPieces(const cuda::Runs& runs)
      : first(std::int64_t{device::cluster_rank()} * runs.pieces_per_block) {
    const std::int64_t left = runs.pieces - first;
    count = static_cast<int>(left < 0 ? 0 : left < runs.pieces_per_block ? left : runs.pieces_per_block);
  }
};

// The place of this warp's segment of own piece `piece`; tensor: 0, or 1 for the second of two.
template <class M>
__device__ __forceinline__ Words* slot(const cuda::Runs& runs, int piece, int tensor = 0) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int place = (tensor * runs.pieces_per_block + piece) * warps + static_cast<int>(threadIdx.x) / 32;
  return device::shared<Words>(offsetof(PlaneLayout<M>, slots)) + place * (runs.segment_words + cuda::kSlotSpare);
}

// Of all pieces of a channel, whose segments every block of the cluster has put into shared.warps. Two barriers of the
// cluster, one of the block.
template <class M>
__device__ __forceinline__ M fold_channel(const cuda::Runs& runs, const OwnPieces& own, PlaneLayout<M>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  device::sync_block();
  for (int piece = static_cast<int>(threadIdx.x) / 32; piece < own.count; piece += warps) {
    const int place = lane % cuda::kPieceWarps;
    const M m = fold_lanes(device::kAllLanes, place < warps ? shared.warps[piece][place] : M{}, cuda::kPieceWarps);
    if (lane == 0) shared.pieces[piece] = m;
  }
  device::sync_cluster();
  const M total = fold_places(runs.pieces, [&](std::int64_t i) {
    const auto block = static_cast<unsigned>(i / runs.pieces_per_block);
    return *device::of_block(&shared.pieces[i % runs.pieces_per_block], block);
  });
  device::sync_cluster();  // the other blocks have read
  return total;
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 2) plane_forward_resident(cuda::PlaneForward a) {
  using C = Compute<T>;
  using M = Counted;
  PlaneLayout<M>& shared = device::shared<PlaneLayout<M>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const OwnPieces own(a.runs);
  const std::int64_t clusters = gridDim.x / device::cluster_size();
  const Range range{1.0 / a.channels.elements, a.channels.eps};
  for (std::int64_t c = blockIdx.x / device::cluster_size(); c < a.channels.count; c += clusters) {
    const char* x = a.x + c * a.x_channel_stride;
    for (int piece = 0; piece < own.count; ++piece) {
      const Segment<T> s(a.runs, own.first + piece);
      if (s.count() > 0) copy_image(x + s.offset(a.x_run_stride), s.bytes(), slot<M>(a.runs, piece), lane, 32);
    }
    device::copy_wait<0>();
    device::sync_warp(device::kAllLanes);

    Words data[1][kSegmentVectors];
    const auto read = [&](const Segment<T>& s, int piece) {
      const int shift = misaligned(x + s.offset(a.x_run_stride), 16);
      read_image(slot<M>(a.runs, piece), shift, s.bytes(), 0, lane, data[0]);
    };
    const Statistic<C> s = statistic_of<C>(a.channels.eps, [&](auto scaled, double scale) {
      for (int piece = 0; piece < own.count; ++piece) {
        const Segment<T> segment(a.runs, own.first + piece);
        read(segment, piece);
        const Counted m = run_moments<T, decltype(scaled)::value>(data, segment.count(), scale, range, lane);
        if (lane == 0) shared.warps[piece][warp] = m;
      }
      return fold_channel(a.runs, own, shared);
    });
    if (threadIdx.x == 0 && device::cluster_rank() == 0) store_statistic(a.channels, c, s);
    const ChannelConstants<C> k = channel_constants<T>(a.channels, c, s);
    for (int piece = 0; piece < own.count; ++piece) {
      const Segment<T> segment(a.runs, own.first + piece);
      read(segment, piece);
      apply_segment<T>(k, segment.bytes(), a.y + c * a.y_channel_stride + segment.offset(a.y_run_stride), data[0]);
    }
    device::sync_warp(device::kAllLanes);  // the slots are read
  }
}

// ---- streamed ----------------------------------------------------------------------------------------------------

// f(channel, piece, unit), a piece to a block; kBackwards: what was read last is still in L2.
template <bool kBackwards, class F>
__device__ __forceinline__ void for_pieces(std::int64_t channels, const cuda::Runs& runs, F&& f) {
  const std::int64_t units = channels * runs.pieces;
  for (std::int64_t i = blockIdx.x; i < units; i += gridDim.x) {
    const std::int64_t unit = kBackwards ? units - 1 - i : i, channel = unit / runs.pieces;
    f(channel, unit - channel * runs.pieces, unit);
  }
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_moments_streamed(cuda::PlaneForward a) {
  WarpMoments<1>& shared = device::shared<WarpMoments<1>>();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Range range{1.0 / a.channels.elements, a.channels.eps};
  int parity = 0;
  for_pieces<false>(a.channels.count, a.runs, [&](std::int64_t c, std::int64_t piece, std::int64_t unit) {
    const Segment<T> s(a.runs, piece);
    Words data[1][kSegmentVectors];
    load_run<T, 32, kSegmentVectors>(a.x + c * a.x_channel_stride + s.offset(a.x_run_stride), s.bytes(), lane, data[0]);
    store_moments<T>(data, s.count(), range, shared, &parity, static_cast<Counted*>(a.piece_moments) + unit,
                     a.channels.count * a.runs.pieces);
  });
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 1) plane_apply_streamed(cuda::PlaneForward a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_pieces<true>(a.channels.count, a.runs, [&](std::int64_t c, std::int64_t piece, std::int64_t /*unit*/) {
    const Segment<T> s(a.runs, piece);
    Words data[kSegmentVectors];
    load_run<T, 32, kSegmentVectors>(a.x + c * a.x_channel_stride + s.offset(a.x_run_stride), s.bytes(), lane, data);
    apply_segment<T>(static_cast<const ChannelConstants<Compute<T>>*>(a.channels.constants)[c], s.bytes(),
                     a.y + c * a.y_channel_stride + s.offset(a.y_run_stride), data);
  });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
