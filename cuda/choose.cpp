// See choose.hpp.
#include "cuda/choose.hpp"

#include <algorithm>
#include <iterator>

namespace lanenorm::cuda {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---- the table ---------------------------------------------------------------------------------------------------
//
// Rows up to `words` words, forward. A word is 16 bytes. A lane has 8 words in flight, those of several rows where one
// has fewer: 64 KB an SM (48 of 16-bit types) in 4 (3) blocks of 4 warps, which load, compute and store at different
// times.
//
//   words    lanes x words a lane x rows at a time
struct GroupRow {
  std::int64_t words;
  GroupShape shape;
};
constexpr GroupRow kForwardGroups[] = {
    {8, {8, 1, 8}},     //  128 B   128 rows a block
    {16, {16, 1, 8}},   //  256 B    64
    {32, {16, 2, 4}},   //  512 B    32
    {64, {32, 2, 4}},   //    1 KB   16
    {128, {32, 4, 2}},  //    2 KB    8
    {256, {32, 8, 1}},  //    4 KB    4
};
// A row to a block of so many warps, or two whole ones: 64 KB in flight an SM in 4 or 2 blocks, 32 where
// forward_blocks says 1.
struct BlockRow {
  std::int64_t words;
  int warps;
  GroupShape shape;
};
constexpr BlockRow kForwardBlocks[] = {
    {512, 4, {32, 4, 2}},   //  8 KB
    {1024, 8, {32, 4, 2}},  // 16 KB
    {2048, 8, {32, 8, 1}},  // 32 KB
};
// Up to 96 KB a block where a cluster can share the row: two blocks then share an SM, and one loads while the other
// stores.
constexpr int kPreferredPieces = 3;

// Backward. A lane keeps dweight and dbias of its columns, compensated sums and those of the last rows, 6 registers a
// column (12 in float64), and 4 words each of x and dy, 8 registers a word; twice, with the next rows on their way,
// where columns leave room for 8 warps an SM alone: 16 columns are 16 * 6 + 4 * 8 * 2 = 160 registers, 8 of float64
// too.
//
//   words    lanes x words a lane x rows at a time (16-bit types: 2 words at most)
constexpr GroupRow kBackwardGroups[] = {
    {8, {8, 1, 4}}, {16, {16, 1, 4}}, {32, {16, 2, 2}}, {64, {32, 2, 2}}, {128, {32, 4, 1}},
};
constexpr int backward_words(std::int64_t element_bytes) { return element_bytes == 2 ? 2 : 4; }
constexpr int kSlabThreads = 256;
constexpr int kMaxChunkRows = 128;
// Chunks that there should be: two for each SM of the largest devices.
constexpr std::int64_t kWantedChunks = 256;

// Columns, streamed: blocks of 256 threads an SM, each with up to 48 KB of shared memory and 8 rows of 512 bytes a warp
// in flight.
constexpr int kColumnBlocks = 2;
// Columns of which nothing is summed: 2 to 4 blocks of 256 threads share an SM, and as many wait. A warp takes rows by
// fours (column_norm.cuh) and up to 64, so that a block computes its constants once for up to 256 KB.
constexpr int kPointwiseBlocks = 8;
// Columns, resident: widths of a slab, words. 64 rows of 8 words are 8 KB, which hardly outweigh a block's barriers; so
// wide slabs where one block holds all rows of one (32 words: 128 rows) and there are slabs for all SMs.
constexpr int kWideSlabs[] = {32, 16};
// Two blocks share an SM where a cluster can share the slab.
constexpr std::int64_t kPreferredSlabBytes = 100 << 10;
// What a block may keep though less than half of the SMs work: at the 25 GB/s an SM has of 3.3 TB/s it is read in
// 2.5 us, about what the two more launches of three kernels take (estimated, not measured).
constexpr std::int64_t kSmallSlabBytes = 64 << 10;

// Channels that stay on chip: two blocks share an SM where a cluster can share the channel.
constexpr std::int64_t kPreferredPlaneBytes = 100 << 10;

constexpr int kGroupThreads = 128;

constexpr std::int64_t kMostBlocks = 0x7fffffff;  // of a grid

const GroupRow* find(const GroupRow* first, const GroupRow* last, std::int64_t words) {
  return std::find_if(first, last, [=](const GroupRow& row) { return words <= row.words; });
}

// ---- long rows ---------------------------------------------------------------------------------------------------

// Where the row stays on chip: the smallest cluster whose blocks need kPreferredPieces each, else the one that fits.
bool choose_resident(const DeviceLimits& device, RowForwardChoice* choice) {
  const std::int64_t room = (device.shared_per_block - kResidentBytes) / kPieceBytes;
  const std::int64_t most = std::min<std::int64_t>(room, kResidentPieces);
  for (const std::int64_t wanted : {std::min<std::int64_t>(most, kPreferredPieces), most}) {
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const std::int64_t each = ceil_div(choice->pieces, cluster);
      if (each > wanted) continue;
      choice->kind = RowKind::resident;
      choice->cluster = cluster;
      choice->pieces_per_block = static_cast<int>(each);
      return true;
    }
  }
  return false;
}

// Clusters of a kernel that loops over `work` pieces: one each, or as many as the device may hold at once.
std::int64_t clusters_of(std::int64_t work, int per_multiprocessor, int cluster, const DeviceLimits& device) {
  return std::min<std::int64_t>(work, std::max(1, per_multiprocessor * device.multiprocessors / cluster));
}

// ---- columns -----------------------------------------------------------------------------------------------------

// Where a slab of columns stays on chip. Columns that share a statistic (fold) may lie in two slabs: they do not.
void choose_slab(const Plan& plan, std::int64_t row_bytes, const DeviceLimits& device, DType dtype, int tensors,
                 ColumnChoice* choice) {
  if (plan.fold != 1) return;
  const std::int64_t stretches = ceil_div(plan.lines_per_statistic, kStretchRows);
  const auto units_of = [&](int words) { return plan.outer * ceil_div(row_bytes, words * kWord); };
  const auto bytes_of = [&](int words, std::int64_t each) { return slab_bytes(words, each, size(dtype), tensors); };
  int words = kSlabWords;
  for (const int wide : kWideSlabs) {
    if (words == kSlabWords && units_of(wide) >= device.multiprocessors &&
        bytes_of(wide, stretches) <= kPreferredSlabBytes && bytes_of(wide, stretches) <= device.shared_per_block) {
      words = wide;
    }
  }
  const std::int64_t units = units_of(words), stretch_bytes = bytes_of(words, 1) - bytes_of(words, 0);
  const auto room = [&](std::int64_t bytes) { return (bytes - bytes_of(words, 0)) / stretch_bytes; };
  const std::int64_t most = room(device.shared_per_block);
  if (most < 1) return;
  for (const std::int64_t wanted : {std::clamp<std::int64_t>(room(kPreferredSlabBytes), 1, most), most}) {
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const std::int64_t each = ceil_div(stretches, cluster);
      if (each > wanted) continue;
      // Few slabs: more blocks for each while there are stretches and processors.
      if (each > 1 && 2 * cluster <= device.max_cluster && 2 * cluster * units <= device.multiprocessors) continue;
      // 2 passes on less than half of the device take longer than 3 on all of it.
      const std::int64_t bytes = bytes_of(words, each);
      if (2 * cluster * units < device.multiprocessors && bytes > kSmallSlabBytes) return;
      if (units * cluster > kMostBlocks) return;
      choice->slab_words = words;
      choice->stretches = static_cast<int>(each);
      choice->cluster = cluster;
      // A thread sums 4 bytes of a row down a stretch; a row of stretches is not split.
      choice->threads = std::max(kColumnThreads / 4, 4 * words);
      while (choice->threads < kColumnThreads && choice->threads < each * words * 4) choice->threads *= 2;
      return;
    }
  }
}

}  // namespace

std::int64_t grid_of(std::int64_t work, int per_multiprocessor, const DeviceLimits& device) {
  return std::min<std::int64_t>(work, std::int64_t{per_multiprocessor} * device.multiprocessors);
}

RowForwardChoice choose_row_forward(const Plan& plan, const DeviceLimits& device, DType dtype, bool whole) {
  const std::int64_t rows = plan.statistics;
  const std::int64_t words = ceil_div(plan.reduced * size(dtype), kWord);
  RowForwardChoice choice{};
  choice.whole = whole;
  choice.cluster = 1;
  const GroupRow* group = find(std::begin(kForwardGroups), std::end(kForwardGroups), words);
  if (group != std::end(kForwardGroups)) {
    choice.kind = RowKind::group;
    choice.shape = group->shape;
    if (!whole) choice.shape.rows = 1;
    choice.threads = kGroupThreads;
    const std::int64_t block_rows = kGroupThreads / choice.shape.lanes * choice.shape.rows;
    choice.blocks =
        grid_of(ceil_div(rows, block_rows), forward_group_blocks(size(dtype), choice.shape.words, whole), device);
    return choice;
  }
  for (const BlockRow& block : kForwardBlocks) {
    if (words > block.words) continue;
    choice.kind = RowKind::block;
    choice.shape = block.shape;
    if (!whole) choice.shape.rows = 1;
    choice.threads = 32 * block.warps;
    choice.warp_words = static_cast<int>(32 * ceil_div(words, 32 * block.warps));
    const int blocks = forward_blocks(size(dtype), choice.shape.words, whole) * kPieceWarps / block.warps;
    choice.blocks = grid_of(ceil_div(rows, choice.shape.rows), blocks, device);
    return choice;
  }
  choice.shape = {32, kPieceWords, 1};
  choice.threads = 32 * kPieceWarps;
  choice.pieces = ceil_div(words * kWord, kPieceBytes);
  if (choose_resident(device, &choice)) {
    choice.blocks = clusters_of(rows, 2, choice.cluster, device) * choice.cluster;
  } else {
    choice.kind = RowKind::streamed;
    choice.blocks = grid_of(rows * choice.pieces, 8, device);
  }
  return choice;
}

RowBackwardChoice choose_row_backward(const Plan& plan, const DeviceLimits& device, DType dtype, bool whole) {
  const std::int64_t rows = plan.statistics;
  const std::int64_t words = ceil_div(plan.reduced * size(dtype), kWord);
  const int lane_words = backward_words(size(dtype));
  RowBackwardChoice choice{};
  choice.whole = whole;
  choice.cluster = 1;
  choice.slabs = 1;
  const GroupRow* group = find(std::begin(kBackwardGroups), std::end(kBackwardGroups), words);
  int per_multiprocessor = 1;
  if (group != std::end(kBackwardGroups) && group->shape.words <= lane_words) {
    choice.group = true;
    choice.shape = group->shape;
    choice.threads = kGroupThreads;
    choice.slab_words = group->shape.lanes * group->shape.words;
    per_multiprocessor = backward_group_blocks(size(dtype), choice.shape.words);
  } else {
    choice.shape = {32, lane_words, 1};
    choice.threads = words <= lane_words * kSlabThreads / 2 ? kSlabThreads / 2 : kSlabThreads;
    choice.slab_words = choice.threads * lane_words;
    choice.slabs = ceil_div(words, choice.slab_words);
    per_multiprocessor = kSlabThreads / choice.threads;
    if (choice.slabs > 1 && choice.slabs <= device.max_cluster) choice.cluster = static_cast<int>(choice.slabs);
  }
  // As many chunks as keep the device busy, but few partials: theirs are 16 bytes a column and chunk, beside 3 bytes of
  // x, dy and dx a column and row times their size.
  choice.chunk_rows = std::clamp<std::int64_t>(ceil_div(rows * choice.slabs, kWantedChunks), 1, kMaxChunkRows);
  choice.chunks = ceil_div(rows, choice.chunk_rows);
  const std::int64_t work = choice.chunks * (choice.cluster == 1 ? choice.slabs : 1);
  choice.blocks = clusters_of(work, per_multiprocessor, choice.cluster, device) * choice.cluster;
  return choice;
}

ColumnChoice choose_columns(const Plan& plan, std::int64_t columns, const DeviceLimits& device, DType dtype,
                            int tensors) {
  const std::int64_t row_bytes = columns * size(dtype);
  ColumnChoice choice{};
  choice.strips = ceil_div(row_bytes, 32 * kWord);
  choice.pieces = ceil_div(plan.lines_per_statistic, kPieceRows);
  choice.slabs = slabs_of(columns, size(dtype));
  choice.streamed_blocks = grid_of(plan.outer * choice.strips * choice.pieces, kColumnBlocks, device);
  choose_slab(plan, row_bytes, device, dtype, tensors, &choice);
  const std::int64_t strips = plan.outer * choice.strips;
  const std::int64_t wanted = ceil_div(std::int64_t{kPointwiseBlocks} * device.multiprocessors, strips);  // of a strip
  const std::int64_t most = ceil_div(ceil_div(plan.lines_per_statistic, wanted * kPieceWarps), 4) * 4;
  choice.warp_rows = static_cast<int>(std::min<std::int64_t>(most, kStretchRows));
  choice.pointwise_pieces = ceil_div(plan.lines_per_statistic, kPieceWarps * choice.warp_rows);
  choice.pointwise_blocks = grid_of(strips * choice.pointwise_pieces, kPointwiseBlocks, device);
  return choice;
}

PlaneChoice choose_planes(const Plan& plan, const DeviceLimits& device, DType dtype, int tensors) {
  const std::int64_t channels = plan.statistics, words = ceil_div(plan.inner * size(dtype), kWord);
  PlaneChoice choice{};
  // Segments of equal length that start on a cache line where the run does.
  choice.segment_words = static_cast<int>(ceil_div(ceil_div(words, ceil_div(words, kSegmentWords)), 8) * 8);
  choice.segments = ceil_div(words, choice.segment_words);
  const std::int64_t segments = plan.lines_per_statistic * choice.segments;
  choice.warps = 1;
  while (choice.warps < kPieceWarps && choice.warps < segments) choice.warps *= 2;
  choice.pieces = ceil_div(segments, choice.warps);
  choice.streamed_blocks = grid_of(channels * choice.pieces, 8 * kPieceWarps / choice.warps, device);

  const std::int64_t piece_bytes = tensors * choice.warps * (choice.segment_words + kSlotSpare) * kWord;
  const std::int64_t most = std::min<std::int64_t>((device.shared_per_block - kPlaneBytes) / piece_bytes, kPlanePieces);
  if (most < 1) return choice;
  const std::int64_t preferred = std::clamp<std::int64_t>(kPreferredPlaneBytes / piece_bytes, 1, most);
  for (const std::int64_t wanted : {preferred, most}) {
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const std::int64_t each = ceil_div(choice.pieces, cluster);
      if (each > wanted) continue;
      // Few channels: more blocks for each while there are pieces and processors.
      if (each > 1 && 2 * cluster <= device.max_cluster && 2 * cluster * channels <= device.multiprocessors) continue;
      // 2 passes on less than half of the device take longer than 3 on all of it.
      if (2 * cluster * channels < device.multiprocessors && choice.pieces > 2 * cluster) return choice;
      choice.cluster = cluster;
      choice.pieces_per_block = static_cast<int>(each);
      choice.blocks = clusters_of(channels, 2 * kPieceWarps / choice.warps, cluster, device) * cluster;
      return choice;
    }
  }
  return choice;
}

}  // namespace lanenorm::cuda
