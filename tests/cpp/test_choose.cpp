// choose: what the table says for hand-worked problems, and that nothing that bits depend on depends on the device.
#include "cuda/choose.hpp"

#include <cstdint>
#include <memory>

#include "check.hpp"

namespace {

using namespace lanenorm;
using namespace lanenorm::cuda;

constexpr DeviceLimits kH200{132, 232448, 233472, 90, 16};
constexpr DeviceLimits kTuring{40, 65536, 65536, 75, 1};

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
                                DType dtype = DType::float32) {
  return choose_row_forward(*plan_of(rows, length, 1, dtype), device, dtype);
}
RowBackwardChoice row_backward_of(std::int64_t rows, std::int64_t length, const DeviceLimits& device = kH200,
                                  DType dtype = DType::float32) {
  return choose_row_backward(*plan_of(rows, length, 1, dtype), device, dtype);
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

void columns_are_cut_into_strips_and_pieces() {
  const ColumnChoice c = choose_columns(*plan_of(513, 129, 0, DType::float32), kH200, DType::float32);
  CHECK_EQ(c.strips, 2);
  CHECK_EQ(c.pieces, 2);
  CHECK_EQ(c.blocks, 4);
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
  longer_rows_belong_to_blocks();
  long_rows_stay_on_chip();
  chunks_of_rows();
  columns_are_cut_into_strips_and_pieces();
  bits_do_not_depend_on_the_device();
  grids_stay_small();
  planes_are_cut_into_segments_and_pieces();
  resident_channels_fit();
  bits_of_planes_do_not_depend_on_the_device();
  return finish();
}
