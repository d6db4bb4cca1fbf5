// Plan: the loops that shapes, strides and axes become, by hand.
#include "core/plan.hpp"

#include <cstdint>
#include <memory>
#include <vector>

#include "check.hpp"

namespace {

using namespace lanenorm;

struct Array {
  std::vector<std::int64_t> shape, strides;
  View view() const {
    return {nullptr, DType::float32, static_cast<int>(shape.size()), shape.data(), strides.data(), true};
  }
};

// C order, float32.
Array packed(std::vector<std::int64_t> shape) {
  Array a{shape, std::vector<std::int64_t>(shape.size())};
  std::int64_t stride = 4;
  for (std::size_t i = shape.size(); i-- > 0;) {
    a.strides[i] = stride;
    stride *= shape[i];
  }
  return a;
}

std::unique_ptr<Plan> plan_of(const Array& x, std::vector<int> reduced_axes, Affine affine) {
  auto plan = std::make_unique<Plan>();
  bool reduced[kMaxAxes] = {};
  for (int axis : reduced_axes) reduced[axis] = true;
  std::int64_t y[kMaxAxes];
  like_strides(x.view(), y);
  make_plan(x.view(), y, nullptr, reduced, affine, plan.get());
  return plan;
}

void layer_norm_of_rows() {
  const auto p = plan_of(packed({2, 3, 5}), {2}, Affine::per_element);
  CHECK(p->work == Work::rows);
  CHECK_EQ(p->statistics, 6);
  CHECK_EQ(p->reduced, 5);
  CHECK_EQ(p->inner, 5);
  CHECK_EQ(p->lines_per_statistic, 1);
  CHECK_EQ(p->x.lines.axes, 1);  // 2 and 3 merged
  CHECK_EQ(p->x.lines.extent[0], 6);
  CHECK_EQ(p->x.lines.stride[0], 20);
  CHECK(p->x.direct);
}

void trailing_axes_merge() {
  const auto p = plan_of(packed({2, 3, 1, 5}), {1, 2, 3}, Affine::per_element);
  CHECK(p->work == Work::rows);
  CHECK_EQ(p->inner, 15);
  CHECK_EQ(p->statistics, 2);
}

void leading_axis_is_columns() {
  const auto p = plan_of(packed({4, 6}), {0}, Affine::per_element);
  CHECK(p->work == Work::columns);
  CHECK_EQ(p->inner, 6);
  CHECK_EQ(p->lines_per_statistic, 4);
  CHECK_EQ(p->outer, 1);
}

void middle_axis_is_a_batch_of_columns() {
  const auto p = plan_of(packed({7, 4, 6}), {1}, Affine::per_element);
  CHECK(p->work == Work::columns);
  CHECK_EQ(p->outer, 7);
  CHECK_EQ(p->lines_per_statistic, 4);
  CHECK_EQ(offset(p->x.lines, 5), 24 * 5);  // matrix 1, row 1
}

void channels_first() {
  const auto large = plan_of(packed({8, 3, 16, 16}), {0, 2, 3}, Affine::per_statistic);
  CHECK(large->work == Work::rows);  // 256 elements a plane
  CHECK_EQ(large->inner, 256);
  CHECK_EQ(large->lines_per_statistic, 8);
  CHECK_EQ(offset(large->x.lines, 8), 4 * 256);      // channel 1, image 0
  CHECK_EQ(offset(large->x.lines, 1), 4 * 3 * 256);  // channel 0, image 1
  const auto small = plan_of(packed({8, 3, 15, 17}), {0, 2, 3}, Affine::per_statistic);
  CHECK(small->work == Work::columns);
  CHECK_EQ(small->fold, 255);
  CHECK_EQ(small->inner, 3 * 255);
  CHECK_EQ(small->lines_per_statistic, 8);
  const auto one_image = plan_of(packed({1, 3, 15, 17}), {0, 2, 3}, Affine::per_statistic);
  CHECK(one_image->work == Work::rows);
  CHECK_EQ(one_image->fold, 1);
}

void channels_last() {
  // (N, C, H, W) whose memory is (N, H, W, C)
  const Array x{{2, 3, 4, 5}, {240, 4, 60, 12}};
  const auto p = plan_of(x, {0, 2, 3}, Affine::per_statistic);
  CHECK(p->work == Work::columns);
  CHECK_EQ(p->inner, 3);
  CHECK_EQ(p->lines_per_statistic, 40);
  CHECK(p->x.direct);
}

// Strides decide how a line is reached, never how the work is cut.
void slices_keep_the_plan() {
  const Array reversed{{4, 6}, {-24, -4}}, sliced{{4, 6}, {96, 8}};
  for (const Array& x : {reversed, sliced}) {
    const auto p = plan_of(x, {1}, Affine::per_element);
    CHECK(p->work == Work::rows);
    CHECK_EQ(p->inner, 6);
    CHECK(!p->x.direct);
    CHECK(p->y.direct);
  }
}

void fortran_order_swaps_the_work() {
  const Array x{{4, 6}, {4, 16}};
  CHECK(plan_of(x, {1}, Affine::per_element)->work == Work::columns);
  CHECK(plan_of(x, {0}, Affine::per_element)->work == Work::rows);
}

void strides_like_numpy() {
  std::int64_t y[kMaxAxes];
  const Array broadcast{{5, 3}, {0, 4}};  // np.empty_like makes the axis of stride 0 innermost
  like_strides(broadcast.view(), y);
  CHECK_EQ(y[0], 4);
  CHECK_EQ(y[1], 20);
  const Array reversed{{5, 3}, {-12, -4}};
  like_strides(reversed.view(), y);
  CHECK_EQ(y[0], 12);
  CHECK_EQ(y[1], 4);
}

void offsets_of_a_range() {
  const Array x{{2, 3, 4}, {1000, 100, 10}};
  const int axes[] = {0, 1, 2};
  Loop loop;
  make_loop(x.shape.data(), x.strides.data(), axes, 3, &loop);
  std::int64_t got[6];
  offsets(loop, 2, 6, got);
  const std::int64_t expected[] = {20, 30, 100, 110, 120, 130};
  for (int i = 0; i < 6; ++i) CHECK_EQ(got[i], expected[i]);
  CHECK_EQ(offset(loop, 23), 1000 + 200 + 30);
}

void nothing_to_normalize() {
  CHECK_EQ(plan_of(packed({0, 5}), {1}, Affine::per_element)->elements, 0);
  CHECK_EQ(plan_of(packed({3, 0}), {1}, Affine::per_element)->statistics, 3);
  const auto ones = plan_of(packed({1, 1}), {1}, Affine::per_element);
  CHECK_EQ(ones->elements, 1);
  CHECK_EQ(ones->inner, 1);
}

}  // namespace

int main() {
  layer_norm_of_rows();
  trailing_axes_merge();
  leading_axis_is_columns();
  middle_axis_is_a_batch_of_columns();
  channels_first();
  channels_last();
  slices_keep_the_plan();
  fortran_order_swaps_the_work();
  strides_like_numpy();
  offsets_of_a_range();
  nothing_to_normalize();
  return finish();
}
