// Launch configurations: a pure function of the problem and the device, all numbers in choose.cpp.
//
// A problem is cut into pieces by shape and dtype alone. The device decides only which block computes which piece, and
// whether x stays on chip meanwhile: nothing here that depends on DeviceLimits changes a bit of a result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/plan.hpp"

namespace lanenorm::cuda {

struct DeviceLimits {
  int multiprocessors;
  int shared_per_block;           // bytes
  int shared_per_multiprocessor;  // bytes
  int architecture;               // 90: sm_90
  int max_cluster;                // blocks; 1 where there are no clusters
  int l2_bytes;                   // the cache of the whole device
};

inline constexpr int kWord = 16;  // bytes that a thread loads at once

// A piece of a row: what a block of kPieceWarps warps holds in registers, 8 words of 16 bytes a lane.
inline constexpr int kPieceWarps = 8;
inline constexpr int kPieceWords = 8;
inline constexpr std::int64_t kPieceBytes = kWord * 32 * kPieceWords * kPieceWarps;  // 32 KB

// What resident rows keep in shared memory beside the row itself, bytes: row_norm_long.cuh asserts that it is enough.
inline constexpr int kResidentBytes = 3072;
// Pieces that a block holds at most: 7 fill the 227 KB of an H100.
inline constexpr int kResidentPieces = 7;

// Blocks of 128 threads that an SM holds of the group kernels, which are compiled to fit: 65536 registers of an SM by
// those of a thread. Forward: 128 registers, 32 of which hold 8 words of 16 bytes; 168 where these are twice as many
// numbers; 255 for 8 words a lane at any address.
constexpr int forward_group_blocks(std::int64_t element_bytes, int words, bool whole) {
  return !whole && words == 8 ? 2 : element_bytes == 2 ? 3 : 4;
}
// Of the block kernels of 256 threads: 128 or 255 registers.
constexpr int forward_blocks(std::int64_t element_bytes, int words, bool whole) {
  return words == 8 && (!whole || element_bytes == 8) ? 1 : 2;
}
// Backward, of the group kernels, by the bytes of a lane's columns in the compute type: 128, 168 or 255 registers, of
// which dweight and dbias take 6 for each 4 bytes, and 8 words of x and dy 32.
constexpr int backward_group_blocks(std::int64_t element_bytes, int words) {
  const std::int64_t lane_bytes = words * 16 * (element_bytes == 2 ? 2 : 1);
  return lane_bytes <= 16 ? (element_bytes == 8 ? 3 : 4) : lane_bytes <= 32 ? 3 : 2;
}

// How rows lie in registers: a row in `lanes` lanes, at most `words` words of 16 bytes each; `rows` rows at a time.
struct GroupShape {
  int lanes, words, rows;
};

enum class RowKind {
  group,     // a row to 8, 16 or 32 lanes, in registers
  block,     // a row to a block of 4 or 8 warps, in registers
  resident,  // a row to the shared memory of a block or of a cluster
  streamed   // a row is read twice
};

struct RowForwardChoice {
  // By shape and dtype.
  RowKind kind;         // resident or streamed: by the device
  GroupShape shape;     // its rows, on which no bit depends: 1 where `whole` is not
  int warp_words;       // block: words of a row that belong to a warp, a multiple of 32
  std::int64_t pieces;  // resident, streamed: of a row
  // By the addresses.
  bool whole;
  // By the device.
  int threads;
  int cluster;           // blocks of a row
  int pieces_per_block;  // resident
  std::int64_t blocks;   // of the grid, a multiple of cluster
};

struct RowBackwardChoice {
  // By shape and dtype.
  bool group;        // a row to a group of lanes, else a slab of a row to a block
  GroupShape shape;  // of a group: its rows are taken one by one where `whole` is not, and summed together all the same
  int threads;
  int slab_words;           // words of a row that belong to a slab
  std::int64_t slabs;       // of a row
  std::int64_t chunk_rows;  // whose dweight and dbias are summed in registers
  std::int64_t chunks;
  // By the addresses.
  bool whole;
  // By the device.
  int cluster;  // slabs: a cluster exchanges the sums of a row; 1 with several slabs: a first kernel computes them
  std::int64_t blocks;  // of the grid, a multiple of cluster
};

// Rows of a column that are summed in the compute type: of 64 rows in float32 sums keep the promise of 4 u (4096 rows:
// 40 u). 8 stretches are a piece, what a block of the streamed column kernels takes at a time.
inline constexpr int kStretchRows = 64;
inline constexpr int kPieceRows = 8 * kStretchRows;
// The narrowest slab of columns that stays on chip, words: a row of it is a whole cache line of 128 bytes. Also what a
// part of LN's dweight and dbias is summed over.
inline constexpr int kSlabWords = 8;
// Slabs of that width in a matrix of so many columns.
constexpr std::int64_t slabs_of(std::int64_t columns, std::int64_t element_bytes) {
  return (columns * element_bytes + kSlabWords * kWord - 1) / (kSlabWords * kWord);
}
// Threads of a block of columns, of a resident one at most.
inline constexpr int kColumnThreads = 256;
// Numbers of the compute type that a column's constants may be: column_resident.cuh asserts that it is enough.
inline constexpr int kSlabConstants = 6;

// Shared memory of a block that keeps `stretches` of a slab, bytes: constants of its columns, and of every stretch
// three doubles a column (of float64 forward for three scales: statistic.cuh) beside the rows of 1 or 2 tensors.
inline std::int64_t slab_bytes(int words, std::int64_t stretches, std::int64_t element_bytes, int tensors) {
  const std::int64_t columns = words * 16 / element_bytes, compute_bytes = element_bytes == 8 ? 8 : 4;
  const int sets = tensors == 1 && element_bytes == 8 ? 3 : 1;
  return columns * kSlabConstants * compute_bytes +
         stretches * (sets * columns * 24 + std::int64_t{tensors} * kStretchRows * words * 16);
}

struct ColumnChoice {
  // By shape and dtype.
  std::int64_t strips;  // of 32 words of columns, of a matrix
  std::int64_t pieces;  // of a matrix
  std::int64_t slabs;   // of kSlabWords words, of a matrix
  // By the device.
  int slab_words;  // resident; 0: streamed
  int stretches;   // resident: of a block
  int cluster;     // resident: blocks of a slab
  int threads;
  std::int64_t streamed_blocks;
  // Where nothing is summed: warp_rows rows of a strip to each of the 8 warps of a block.
  int warp_rows;
  std::int64_t pointwise_pieces;  // of a matrix
  std::int64_t pointwise_blocks;
};

// What a warp computes of a run: at most 8 words a lane.
inline constexpr int kSegmentWords = 256;
// Pieces that a block keeps in shared memory at most, and what it keeps beside them, bytes: plane_norm.cuh asserts that
// it is enough.
inline constexpr int kPlanePieces = 16;
inline constexpr int kPlaneBytes = 6144;
// Words of shared memory a segment has beside its own: an unaligned one has a word more, which is read together with
// one behind it.
inline constexpr int kSlotSpare = 2;

struct PlaneChoice {
  // By shape and dtype.
  std::int64_t segments;  // of a run
  int segment_words;
  int warps;            // segments of a piece, warps of a block
  std::int64_t pieces;  // of a channel
  // By the device.
  int pieces_per_block;  // resident; 0: streamed
  int cluster;           // resident: blocks of a channel
  std::int64_t blocks;   // resident: of the grid, a multiple of cluster
  std::int64_t streamed_blocks;
};

// plan.elements > 0, plan.work is rows: plan.statistics rows of plan.reduced elements.
// whole: rows are whole words, aligned, in all tensors
RowForwardChoice choose_row_forward(const Plan& plan, const DeviceLimits& device, DType dtype, bool whole);
RowBackwardChoice choose_row_backward(const Plan& plan, const DeviceLimits& device, DType dtype, bool whole);

// plan.elements > 0, plan.work is columns: plan.outer matrices of plan.lines_per_statistic rows, of which `columns`
// columns: plan.inner, or some of a matrix that is cut. tensors: that are read, 1 or 2
ColumnChoice choose_columns(const Plan& plan, std::int64_t columns, const DeviceLimits& device, DType dtype,
                            int tensors);

// plan.elements > 0, plan.work is rows, of BN: plan.statistics channels of plan.lines_per_statistic runs of plan.inner
// elements. tensors: that are read, 1 or 2
PlaneChoice choose_planes(const Plan& plan, const DeviceLimits& device, DType dtype, int tensors);

// Blocks of a kernel that loops over `work` pieces: one each, or as many as the device holds at once.
std::int64_t grid_of(std::int64_t work, int per_multiprocessor, const DeviceLimits& device);

}  // namespace lanenorm::cuda
