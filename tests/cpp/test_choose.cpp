// choose: what the table says for hand-worked problems, and that nothing that bits depend on depends on the device.
#include "cuda/choose.hpp"

#include <cstdint>
#include <memory>

#include "check.hpp"

namespace {

using namespace lanenorm;
using namespace lanenorm::cuda;

constexpr DeviceLimits kH200{132, 232448, 233472, 90, 16, 50 << 20};
constexpr DeviceLimits kTuring{40, 65536, 65536, 75, 1, 4 << 20};

// rows x length, float32 C order, normalized over the last axis or the first.
std::unique_ptr<Plan> plan_of(std::int64_t rows, std::int64_t length, int axis, DType dtype) {
  const std::int64_t shape[] = {rows, length}, strides[] = {length * size(dtype), size(dtype)};
  const View x{nullptr, dtype, 2, shape, strides, true};
  bool reduced[kMaxAxes] = {};
  reduced[axis] = true;
  auto plan = std::make_unique<Plan>();
  make_plan(x, strides, nullptr, reduced, Affine::per_element, plan.get());
  return plan;
}

RowForwardChoice row_forward_of(std::int64_t rows, std::int64_t length, const DeviceLimits& device = kH200,
                                DType dtype = DType::float32, bool whole = true) {
  return choose_row_forward(*plan_of(rows, length, 1, dtype), device, dtype, whole);
}
RowBackwardChoice row_backward_of(std::int64_t rows, std::int64_t length, const DeviceLimits& device = kH200,
                                  DType dtype = DType::float32, bool whole = true) {
  return choose_row_backward(*plan_of(rows, length, 1, dtype), device, dtype, whole);
}

void check_group(std::int64_t length, int lanes, int words) {
  const RowForwardChoice c = row_forward_of(1000, length);
  CHECK(c.kind == RowKind::group);
  CHECK_EQ(c.shape.lanes, lanes);
  CHECK_EQ(c.shape.words, words);
  CHECK(c.shape.lanes * c.shape.words * 4 >= length);
}

void short_rows_belong_to_groups_of_lanes() {
  check_group(2, 8, 1);
  check_group(32, 8, 1);
  check_group(33, 16, 1);
  check_group(64, 16, 1);
  check_group(65, 16, 2);
  check_group(128, 16, 2);
  check_group(129, 32, 2);
  check_group(256, 32, 2);
  check_group(257, 32, 4);
  check_group(768, 32, 8);
  check_group(1024, 32, 8);
}

// 8 words a lane, of several rows where one has fewer; rows that are not whole words one by one, in the same lanes.
void whole_rows_are_taken_several_at_a_time() {
  for (const std::int64_t length : {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}) {
    const RowForwardChoice whole = row_forward_of(1 << 20, length);
    const RowForwardChoice other = row_forward_of(1 << 20, length, kH200, DType::float32, false);
    CHECK(whole.whole && !other.whole);
    CHECK_EQ(whole.shape.words * whole.shape.rows, 8);
    CHECK_EQ(other.shape.rows, 1);
    CHECK_EQ(other.shape.lanes, whole.shape.lanes);
    CHECK_EQ(other.shape.words, whole.shape.words);
    CHECK_EQ(other.warp_words, whole.warp_words);
  }
  CHECK_EQ(row_forward_of(100, 32).blocks, 1);  // 128 rows a block
  CHECK_EQ(row_forward_of(300, 32).blocks, 3);
  CHECK_EQ(row_forward_of(9, 2048).blocks, 5);  // 2
  CHECK_EQ(row_forward_of(1 << 20, 32).blocks, 4 * 132);
  CHECK_EQ(row_forward_of(1 << 20, 32, kH200, DType::bfloat16).blocks, 3 * 132);
}

void backward_takes_whole_rows_several_at_a_time_too() {
  for (const std::int64_t length : {32, 64, 128, 256, 512}) {
    const RowBackwardChoice whole = row_backward_of(1 << 20, length);
    const RowBackwardChoice other = row_backward_of(1 << 20, length, kH200, DType::float32, false);
    CHECK(whole.group && whole.whole && other.group && !other.whole);
    CHECK_EQ(whole.shape.words * whole.shape.rows, 4);  // of x, and 4 of dy
    CHECK_EQ(other.shape.rows, whole.shape.rows);       // whose terms are summed together
    CHECK_EQ(other.shape.lanes, whole.shape.lanes);
    CHECK_EQ(other.shape.words, whole.shape.words);
    CHECK_EQ(other.chunk_rows, whole.chunk_rows);
    CHECK_EQ(other.chunks, whole.chunks);
  }
}

void longer_rows_belong_to_blocks() {
  for (const std::int64_t length : {1025, 2048, 2049, 4096, 4097, 8192}) {
    const RowForwardChoice c = row_forward_of(1000, length);
    CHECK(c.kind == RowKind::block);
    CHECK_EQ(c.threads, length <= 2048 ? 128 : 256);
    CHECK_EQ(c.shape.words, length <= 4096 ? 4 : 8);
    CHECK(c.warp_words <= 32 * c.shape.words);
    CHECK(c.warp_words * (c.threads / 32) * 4 >= length);
  }
}

// Pieces of 8192 floats.
void long_rows_stay_on_chip() {
  struct Expected {
    std::int64_t pieces;
    int cluster, pieces_per_block;
  };
  for (const Expected e : {Expected{2, 1, 2},
                           {3, 1, 3},
                           {4, 2, 2},
                           {6, 2, 3},
                           {7, 4, 2},
                           {13, 8, 2},
                           {48, 16, 3},
                           {49, 8, 7},
                           {112, 16, 7}}) {
    const RowForwardChoice c = row_forward_of(10, e.pieces * 8192);
    CHECK(c.kind == RowKind::resident);
    CHECK_EQ(c.pieces, e.pieces);
    CHECK_EQ(c.cluster, e.cluster);
    CHECK_EQ(c.pieces_per_block, e.pieces_per_block);
    CHECK_EQ(c.blocks % c.cluster, 0);
  }
  CHECK(row_forward_of(10, 112 * 8192 + 1).kind == RowKind::streamed);
  CHECK(row_forward_of(10, 8193, kTuring).kind == RowKind::streamed);
  CHECK_EQ(row_forward_of(10, 3 * 8192, {108, 166912, 167936, 80, 1}).pieces_per_block, 3);
  CHECK(row_forward_of(10, 6 * 8192, {108, 166912, 167936, 80, 1}).kind == RowKind::streamed);
}

void chunks_of_rows() {
  CHECK_EQ(row_backward_of(1, 768).chunk_rows, 1);
  CHECK_EQ(row_backward_of(256, 768).chunk_rows, 1);
  CHECK_EQ(row_backward_of(257, 768).chunk_rows, 2);
  CHECK_EQ(row_backward_of(4096, 768).chunk_rows, 16);
  CHECK_EQ(row_backward_of(4096, 768).chunks, 256);
  CHECK_EQ(row_backward_of(1 << 20, 768).chunk_rows, 128);
  CHECK_EQ(row_backward_of(1 << 20, 768).chunks, 8192);
  const RowBackwardChoice c = row_backward_of(4096, 8192);  // two slabs: twice the blocks
  CHECK_EQ(c.slabs, 2);
  CHECK_EQ(c.cluster, 2);
  CHECK_EQ(c.chunk_rows, 32);
  CHECK_EQ(row_backward_of(10, 16 * 4096).cluster, 16);
  CHECK_EQ(row_backward_of(10, 16 * 4096 + 1).cluster, 1);
  CHECK_EQ(row_backward_of(10, 8192, kTuring).cluster, 1);
}

// Columns of (rows, columns), of float32.
ColumnChoice columns_of(std::int64_t rows, std::int64_t columns, const DeviceLimits& device = kH200, int tensors = 1,
                        DType dtype = DType::float32) {
  return choose_columns(*plan_of(rows, columns, 0, dtype), columns, device, dtype, tensors);
}

void columns_are_cut_into_strips_and_pieces() {
  const ColumnChoice c = columns_of(513, 129);
  CHECK_EQ(c.strips, 2);
  CHECK_EQ(c.pieces, 2);
  CHECK_EQ(c.slabs, 5);
  CHECK_EQ(c.streamed_blocks, 4);
}

// A stretch of a slab of 8 words of float32: 8 KB of x, and 3 doubles of 32 columns.
void columns_stay_on_chip() {
  CHECK_EQ(slab_bytes(8, 1, 4, 1) - slab_bytes(8, 0, 4, 1), 8192 + 768);
  CHECK_EQ(slab_bytes(8, 1, 4, 2) - slab_bytes(8, 0, 4, 2), 16384 + 768);
  struct Expected {
    std::int64_t rows, columns;
    int tensors, words, cluster, stretches, threads;
  };
  for (const Expected& e : {Expected{49, 2048, 1, 8, 1, 1, 64},  // ResNet-50 at batch 1: 7 x 7
                            {1568, 2048, 1, 8, 4, 7, 256},       // at batch 32: 7 x 7
                            {1568, 2048, 2, 8, 8, 4, 128},       //
                            {6272, 1024, 1, 8, 16, 7, 256},      // 14 x 14: 784 KB a slab
                            {6272, 1024, 2, 8, 8, 13, 256},      // 218 KB a block
                            {25088, 512, 1, 8, 16, 25, 256},     // 28 x 28: 3 MB, 219 KB a block
                            {25088, 512, 2, 0, 0, 0, 0},         // 6 MB
                            {100352, 256, 1, 0, 0, 0, 0},        // 56 x 56: 12 MB
                            {65536, 256, 1, 0, 0, 0, 0},         //
                            {64, 132 * 128, 1, 32, 1, 1, 128},   // a wide slab for every SM
                            {64, 131 * 128, 1, 16, 1, 1, 64},    // one less: half as wide
                            {256, 132 * 128, 1, 16, 1, 4, 256},  // 64 KB; 32 words would be 131 KB
                            {300, 64, 1, 8, 8, 1, 64},           // as many blocks as there are stretches
                            {20000, 64, 1, 0, 0, 0, 0}}) {       // 32 blocks of 170 KB: too few
    const ColumnChoice c = columns_of(e.rows, e.columns, kH200, e.tensors);
    CHECK_EQ(c.slab_words, e.words);
    CHECK_EQ(c.cluster, e.cluster);
    CHECK_EQ(c.stretches, e.stretches);
    CHECK_EQ(c.threads, e.threads);
  }
}

void resident_columns_fit() {
  constexpr DeviceLimits kAda{142, 101376, 102400, 89, 1, 72 << 20};
  for (const DeviceLimits& device : {kH200, kTuring, kAda, DeviceLimits{1, 232448, 233472, 90, 2}}) {
    for (const DType dtype : {DType::float16, DType::float32, DType::float64}) {
      for (const int tensors : {1, 2}) {
        for (const std::int64_t rows : {2, 49, 300, 512, 1568, 6272, 25088, 100352}) {
          for (const std::int64_t columns : {2, 64, 2048, 100000}) {
            const ColumnChoice c = columns_of(rows, columns, device, tensors, dtype);
            const ColumnChoice on_h200 = columns_of(rows, columns, kH200, tensors, dtype);
            CHECK_EQ(c.pieces, on_h200.pieces);  // what bits depend on
            CHECK_EQ(c.slabs, on_h200.slabs);
            CHECK(c.streamed_blocks >= 1);
            CHECK(c.streamed_blocks < 100000);
            if (c.slab_words == 0) continue;
            CHECK_EQ(c.slab_words % kSlabWords, 0);
            CHECK(slab_bytes(c.slab_words, c.stretches, size(dtype), tensors) <= device.shared_per_block);
            CHECK(std::int64_t{c.cluster} * c.stretches * kStretchRows >= rows);
            CHECK(c.cluster <= device.max_cluster);
            CHECK(c.threads <= kColumnThreads);
            CHECK_EQ(c.threads % (4 * c.slab_words), 0);  // a row of stretches is not split
          }
        }
      }
    }
  }
  CHECK_EQ(columns_of(2, std::int64_t{1} << 40).slab_words, 0);  // more slabs than a grid may have blocks
}

void bits_do_not_depend_on_the_device() {
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
    for (std::int64_t length = 2; length < 3000000; length += 1 + length / 7) {
      const RowForwardChoice f = row_forward_of(777, length, kH200, dtype);
      const RowBackwardChoice b = row_backward_of(777, length, kH200, dtype);
      for (const DeviceLimits& device :
           {kTuring, DeviceLimits{1, 101376, 102400, 86, 1}, DeviceLimits{188, 101376, 102400, 120, 8}}) {
        const RowForwardChoice g = row_forward_of(777, length, device, dtype);
        CHECK_EQ(f.pieces, g.pieces);
        CHECK(f.kind == g.kind || (f.kind >= RowKind::resident && g.kind >= RowKind::resident));
        CHECK_EQ(f.shape.lanes, g.shape.lanes);
        CHECK_EQ(f.shape.words, g.shape.words);
        CHECK_EQ(f.warp_words, g.warp_words);
        const RowBackwardChoice c = row_backward_of(777, length, device, dtype);
        CHECK_EQ(b.group, c.group);
        CHECK_EQ(b.shape.lanes, c.shape.lanes);
        CHECK_EQ(b.shape.words, c.shape.words);
        CHECK_EQ(b.slab_words, c.slab_words);
        CHECK_EQ(b.slabs, c.slabs);
        CHECK_EQ(b.chunk_rows, c.chunk_rows);
        CHECK(c.cluster == 1 || c.cluster == c.slabs);
      }
    }
  }
}

// A launch takes at most 2^31 - 1 blocks; kernels loop over the rest.
void grids_stay_small() {
  for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{65537}, std::int64_t{1} << 33}) {
    for (const std::int64_t length : {2, 100, 3000, 30000}) {
      CHECK(row_forward_of(rows, length).blocks >= 1);
      CHECK(row_forward_of(rows, length).blocks < 100000);
      CHECK(row_backward_of(rows, length).blocks >= 1);
      CHECK(row_backward_of(rows, length).blocks < 100000);
    }
  }
}

// Channels of (images, channels, length), of float32.
PlaneChoice planes_of(std::int64_t images, std::int64_t channels, std::int64_t length,
                      const DeviceLimits& device = kH200, int tensors = 1) {
  const std::int64_t shape[] = {images, channels, length}, strides[] = {4 * channels * length, 4 * length, 4};
  const View x{nullptr, DType::float32, 3, shape, strides, true};
  const bool reduced[kMaxAxes] = {true, false, true};
  auto plan = std::make_unique<Plan>();
  make_plan(x, strides, nullptr, reduced, Affine::per_statistic, plan.get());
  return choose_planes(*plan, device, DType::float32, tensors);
}

void planes_are_cut_into_segments_and_pieces() {
  struct Expected {
    std::int64_t images, length, segments;
    int segment_words, warps;
    std::int64_t pieces;
  };
  for (const Expected& e : {Expected{1, 400, 1, 104, 1, 1},   // 20 x 20: a warp
                            Expected{1, 3136, 4, 200, 4, 1},  // 56 x 56: 784 words
                            Expected{32, 784, 1, 200, 8, 4},  // 28 x 28 of 32 images
                            Expected{9, 1303, 2, 168, 8, 3},  // 18 segments, the last piece has 2
                            Expected{32, 12544, 13, 248, 8, 52}}) {
    const PlaneChoice c = planes_of(e.images, 7, e.length);
    CHECK_EQ(c.segments, e.segments);
    CHECK_EQ(c.segment_words, e.segment_words);
    CHECK_EQ(c.warps, e.warps);
    CHECK_EQ(c.pieces, e.pieces);
    CHECK(c.segment_words <= kSegmentWords);
    CHECK(c.segments * c.segment_words * 4 >= e.length);
    CHECK((c.segments - 1) * c.segment_words * 4 < e.length);
  }
}

void resident_channels_fit() {
  for (const DeviceLimits& device : {kH200, kTuring}) {
    for (const int tensors : {1, 2}) {
      for (const std::int64_t images : {1, 8, 32, 256}) {
        for (const std::int64_t length : {256, 784, 3136, 12544, 50176}) {
          for (const std::int64_t channels : {1, 3, 64, 2048}) {
            const PlaneChoice c = planes_of(images, channels, length, device, tensors);
            CHECK(c.streamed_blocks >= 1);
            CHECK(c.streamed_blocks < 100000);
            if (c.pieces_per_block == 0) continue;
            const std::int64_t slots = c.pieces_per_block * c.warps * (c.segment_words + kSlotSpare) * 16;
            CHECK(kPlaneBytes + tensors * slots <= device.shared_per_block);
            CHECK(c.pieces_per_block <= kPlanePieces);
            CHECK(c.cluster <= device.max_cluster);
            CHECK(std::int64_t{c.cluster} * c.pieces_per_block >= c.pieces);
            CHECK(c.blocks >= c.cluster);
            CHECK_EQ(c.blocks % c.cluster, 0);
          }
        }
      }
    }
  }
  // ResNet-50 at batch 32 is read once, but for the largest planes of a backward.
  CHECK_EQ(planes_of(32, 64, 112 * 112).cluster, 8);
  CHECK_EQ(planes_of(32, 64, 112 * 112).pieces_per_block, 7);
  CHECK_EQ(planes_of(32, 64, 112 * 112, kH200, 2).pieces_per_block, 0);
  CHECK_EQ(planes_of(32, 256, 56 * 56).cluster, 8);
  CHECK(planes_of(32, 256, 56 * 56, kH200, 2).pieces_per_block > 0);
  // Few channels: all processors, three passes.
  CHECK_EQ(planes_of(32, 3, 224 * 224).pieces_per_block, 0);
}

void bits_of_planes_do_not_depend_on_the_device() {
  for (const std::int64_t length : {256, 1303, 50176}) {
    for (const std::int64_t images : {1, 3, 32}) {
      const PlaneChoice a = planes_of(images, 5, length);
      for (const int tensors : {1, 2}) {
        const PlaneChoice b = planes_of(images, 5, length, kTuring, tensors);
        CHECK_EQ(a.segments, b.segments);
        CHECK_EQ(a.segment_words, b.segment_words);
        CHECK_EQ(a.warps, b.warps);
        CHECK_EQ(a.pieces, b.pieces);
      }
    }
  }
}

}  // namespace

int main() {
  short_rows_belong_to_groups_of_lanes();
  whole_rows_are_taken_several_at_a_time();
  backward_takes_whole_rows_several_at_a_time_too();
  longer_rows_belong_to_blocks();
  long_rows_stay_on_chip();
  chunks_of_rows();
  columns_are_cut_into_strips_and_pieces();
  columns_stay_on_chip();
  resident_columns_fit();
  bits_do_not_depend_on_the_device();
  grids_stay_small();
  planes_are_cut_into_segments_and_pieces();
  resident_channels_fit();
  bits_of_planes_do_not_depend_on_the_device();
  return finish();
}
