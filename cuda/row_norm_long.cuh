// Forward over rows of more than 32 KB: pieces of 32 KB, each what a block of 8 warps computes at a time.
//
//   resident   the row lies in the shared memory of a block, or of the blocks of a cluster, which read each other's
//              moments there: x is read once (2s)
//   streamed   where it does not fit: moments of all pieces, statistics of all rows, then the rows once more (3s)
//
// The moments of a piece, and the tree in which pieces merge, are the same in both.
#pragma once

#include "cuda/row_norm.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr int kWarpWords = 32 * cuda::kPieceWords;          // of a piece, a warp
inline constexpr int kPieceSize = kWarpWords * cuda::kPieceWarps;  // words

// ---- a run in shared memory --------------------------------------------------------------------------------------

// The image of a run: the aligned words it lies in, so that its first byte is at misaligned(run, 16). `threads` threads
// copy, this is one of them; the bytes are there after copy_wait and a barrier among them.
__device__ __forceinline__ void copy_image(const char* run, int bytes, Words* image, int thread, int threads) {
  const int shift = misaligned(run, 16);
  char* to = reinterpret_cast<char*>(image);
  for (int w = thread; 16 * w < shift + bytes; w += threads) {
    const int at = 16 * w - shift;  // in the run
    if (at < 0) {                   // the aligned word in which the run begins
      for (int i = 0; i < 16 + at && i < bytes; ++i) to[shift + i] = device::load_global(run + i);
    } else {
      device::copy_async_16(image + w, run + at, bytes - at < 16 ? bytes - at : 16);
    }
  }
  device::copy_commit();
}

// V words of a run from word `first` on, as load_run has them. What is beyond `bytes` is not zero, but nothing.
template <int V>
__device__ __forceinline__ void read_image(const Words* image, int shift, int bytes, int first, int lane,
                                           Words (&data)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int w = first + 32 * v + lane;
    if (16 * w >= bytes) {
      data[v] = Words{};
    } else {
      data[v] = shift == 0 ? image[w] : funnel(image[w], image[w + 1], shift);
    }
  }
}

// ---- resident ----------------------------------------------------------------------------------------------------

// The image follows; unaligned, it has a word more, and its last word is read together with one behind it.
struct ResidentLayout {
  Counted warps[cuda::kResidentPieces][cuda::kPieceWarps];
  Counted pieces[cuda::kResidentPieces];
  alignas(16) Words image[2];
};
static_assert(sizeof(ResidentLayout) <= cuda::kResidentBytes);

// Shared memory of a block.
inline std::size_t resident_bytes(int pieces_per_block) {
  return sizeof(ResidentLayout) + static_cast<std::size_t>(pieces_per_block) * cuda::kPieceBytes;
}

// Block r of a cluster holds the pieces from r * pieces_per_block on. Two barriers of the cluster a row.
template <class T>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, 2) row_forward_resident(cuda::RowForward a) {
  using C = Compute<T>;
  constexpr int V = cuda::kPieceWords;
  ResidentLayout& shared = device::shared<ResidentLayout>();
  Words* image = device::shared<Words>(offsetof(ResidentLayout, image));
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t clusters = gridDim.x / device::cluster_size();
  const Share<T> share(a.length, std::int64_t{device::cluster_rank()} * a.pieces_per_block * kPieceSize,
                       a.pieces_per_block * kPieceSize);
  const int pieces = (share.bytes() + 16 * kPieceSize - 1) / (16 * kPieceSize);
  for (std::int64_t row = blockIdx.x / device::cluster_size(); row < a.rows; row += clusters) {
    const char* x = a.x + row * a.x_stride + share.offset();
    const int shift = misaligned(x, 16);
    copy_image(x, share.bytes(), image, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    device::copy_wait<0>();
    device::sync_block();

    Words data[1][V];
    const auto run_of_piece = [&](int piece) {
      const int first = piece * kPieceSize + warp * kWarpWords;
      read_image(image, shift, share.bytes(), first, lane, data[0]);
      return Share<T>(share.count, first, kWarpWords);
    };
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      for (int piece = 0; piece < pieces; ++piece) {
        const int count = run_of_piece(piece).count;
        const Counted m = run_moments<T, decltype(scaled)::value>(data, count, scale, {a.inverse_length, a.eps}, lane);
        if (lane == 0) shared.warps[piece][warp] = m;
      }
      device::sync_block();
      if (warp < pieces) {
        const Counted m =
            fold_lanes(device::kAllLanes, shared.warps[warp][lane % cuda::kPieceWarps], cuda::kPieceWarps);
        if (lane == 0) shared.pieces[warp] = m;
      }
      device::sync_cluster();
      const Counted total = fold_places(a.pieces, [&](std::int64_t i) {
        const auto block = static_cast<unsigned>(i / a.pieces_per_block);
        return *device::of_block(&shared.pieces[i % a.pieces_per_block], block);
      });
      device::sync_cluster();  // the other blocks have read
      return total;
    });
    if (threadIdx.x == 0 && device::cluster_rank() == 0) store_statistic(a, row, s);
    for (int piece = 0; piece < pieces; ++piece) {
      const Share<T> run = run_of_piece(piece);
      apply_run<T>(a, s.normalizer, share.first + run.first, run.count,
                   a.y + row * a.y_stride + share.offset() + run.offset(), lane, data);
    }
    device::sync_block();  // the image is read
  }
}

// ---- streamed ----------------------------------------------------------------------------------------------------

// Moments of what the warps of a block hold, all sets of them `stride` apart from `to` on. One barrier a set.
template <class T, int V>
__device__ __forceinline__ void store_moments(Words (&data)[1][V], int count, const Range& range,
                                              WarpMoments<1>& shared, int* parity, Counted* to, std::int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto compute = [&](auto scaled, double scale, int set) {
    *parity ^= 1;
    const Counted m = fold_warps<cuda::kPieceWarps, 1>(
        run_moments<T, decltype(scaled)::value>(data, count, scale, range, lane), shared.warps[*parity]);
    if (threadIdx.x == 0) to[set * stride] = m;
  };
  compute(Unscaled{}, 1.0, 0);
  if constexpr (kMomentSets<T> > 1) {
    for (int set = 1; set < kMomentSets<T>; ++set) compute(Scaled{}, set_scale(set), set);
  }
}

// A block a piece of a row.
template <class T>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, 1) row_moments_streamed(cuda::RowForward a) {
  constexpr int V = cuda::kPieceWords;
  WarpMoments<1>& shared = device::shared<WarpMoments<1>>();
  Counted* moments = static_cast<Counted*>(a.piece_moments);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t units = a.rows * a.pieces;
  int parity = 0;
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t row = unit / a.pieces;
    const Share<T> run(a.length, (unit - row * a.pieces) * kPieceSize + warp * kWarpWords, kWarpWords);
    Words data[1][V];
    load_run<T, 32, V>(a.x + row * a.x_stride + run.offset(), run.bytes(), lane, data[0]);
    store_moments<T>(data, run.count, {a.inverse_length, a.eps}, shared, &parity, moments + unit, units);
  }
}

// A warp a row.
template <class T>
__global__ void __launch_bounds__(128, 1) row_statistics_streamed(cuda::RowForward a) {
  using C = Compute<T>;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t row = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; row < a.rows; row += warps) {
    const Statistic<C> s = statistic_of<C>(a.eps, [&](auto scaled, double scale) {
      const int set = decltype(scaled)::value ? set_of(scale) : 0;
      const Counted* moments = static_cast<const Counted*>(a.piece_moments) + (set * a.rows + row) * a.pieces;
      return fold_places(a.pieces, [&](std::int64_t i) { return moments[i]; });
    });
    if (threadIdx.x % 32 != 0) continue;
    static_cast<Statistic<C>*>(a.statistics)[row] = s;
    store_statistic(a, row, s);
  }
}

// A block a piece of a row.
template <class T>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, 1) row_apply_streamed(cuda::RowForward a) {
  using C = Compute<T>;
  constexpr int V = cuda::kPieceWords;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // Backwards: what was read last is still in L2.
  for (std::int64_t left = a.rows * a.pieces - blockIdx.x; left > 0; left -= gridDim.x) {
    const std::int64_t row = (left - 1) / a.pieces;
    const Share<T> run(a.length, (left - 1 - row * a.pieces) * kPieceSize + warp * kWarpWords, kWarpWords);
    Words data[1][V];
    load_run<T, 32, V>(a.x + row * a.x_stride + run.offset(), run.bytes(), lane, data[0]);
    apply_run<T>(a, static_cast<const Statistic<C>*>(a.statistics)[row].normalizer, run.first, run.count,
                 a.y + row * a.y_stride + run.offset(), lane, data);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
