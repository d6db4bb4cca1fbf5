// Axes -> Plan. See plan.hpp for what the parts mean.
#include "core/plan.hpp"

#include <algorithm>
#include <cstdlib>

namespace lanenorm {
namespace {

// Appends an axis, merging it into the last one where the two walk memory as one.
void append(Loop* loop, std::int64_t extent, std::int64_t stride) {
  loop->count *= extent;
  if (extent == 1) return;
  if (loop->axes > 0) {
    const int last = loop->axes - 1;
    if (loop->stride[last] == stride * extent) {
      loop->extent[last] *= extent;
      loop->stride[last] = stride;
      return;
    }
  }
  loop->extent[loop->axes] = extent;
  loop->stride[loop->axes] = stride;
  ++loop->axes;
}

struct Order {
  int axes;            // axes longer than 1
  int axis[kMaxAxes];  // in loop order, the innermost last
};

// The axes longer than 1, ascending, but the one that lies innermost in memory last.
Order loop_order(const View& x, const std::int64_t* y_strides) {
  Order order;
  order.axes = 0;
  int innermost = -1;
  for (int axis = 0; axis < x.axes; ++axis) {
    if (x.shape[axis] == 1) continue;
    if (innermost < 0 || y_strides[axis] <= y_strides[innermost]) innermost = axis;
  }
  for (int axis = 0; axis < x.axes; ++axis) {
    if (x.shape[axis] != 1 && axis != innermost) order.axis[order.axes++] = axis;
  }
  if (innermost >= 0) order.axis[order.axes++] = innermost;
  return order;
}

void make_layout(const std::int64_t* shape, const std::int64_t* strides, std::int64_t size, const int* line_axes,
                 int lines, const int* inner_axes, int inner, Layout* layout) {
  make_loop(shape, strides, line_axes, lines, &layout->lines);
  make_loop(shape, strides, inner_axes, inner, &layout->inner);
  layout->direct = adjacent(layout->inner, size);
}

}  // namespace

void make_loop(const std::int64_t* shape, const std::int64_t* strides, const int* axes, int count, Loop* loop) {
  loop->axes = 0;
  loop->count = 1;
  for (int i = 0; i < count; ++i) append(loop, shape[axes[i]], strides[axes[i]]);
}

bool adjacent(const Loop& loop, std::int64_t size) {
  return loop.axes == 0 || (loop.axes == 1 && loop.stride[0] == size);
}

std::int64_t offset(const Loop& loop, std::int64_t index) {
  std::int64_t bytes = 0;
  for (int axis = loop.axes - 1; axis >= 0; --axis) {
    bytes += index % loop.extent[axis] * loop.stride[axis];
    index /= loop.extent[axis];
  }
  return bytes;
}

void offsets(const Loop& loop, std::int64_t first, std::int64_t count, std::int64_t* out) {
  if (loop.axes == 0) {
    std::fill_n(out, count, 0);
    return;
  }
  const int last = loop.axes - 1;
  std::int64_t position = first % loop.extent[last];
  std::int64_t bytes = offset(loop, first);
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = bytes;
    bytes += loop.stride[last];
    if (++position == loop.extent[last]) {
      position = 0;
      bytes = i + 1 < count ? offset(loop, first + i + 1) : 0;
    }
  }
}

void like_strides(const View& x, std::int64_t* strides) {
  // NumPy sorts by |stride|, ties by position; by insertion as NumPy does, which matters for strides of 0.
  int order[kMaxAxes];
  for (int axis = 0; axis < x.axes; ++axis) {
    int place = axis;
    for (; place > 0 && std::llabs(x.strides[order[place - 1]]) < std::llabs(x.strides[axis]); --place) {
      order[place] = order[place - 1];
    }
    order[place] = axis;
  }
  std::int64_t stride = size(x.dtype);
  for (int i = x.axes - 1; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= x.shape[order[i]];
  }
}

void make_plan(const View& x, const std::int64_t* y_strides, const View* dy, const bool* reduced, Affine affine,
               Plan* plan) {
  plan->affine = affine;
  plan->elements = plan->statistics = plan->reduced = 1;
  for (int axis = 0; axis < x.axes; ++axis) {
    plan->elements *= x.shape[axis];
    (reduced[axis] ? plan->reduced : plan->statistics) *= x.shape[axis];
  }

  const Order order = loop_order(x, y_strides);
  // The trailing axes of one kind are the inner loop.
  const bool rows = order.axes == 0 || reduced[order.axis[order.axes - 1]];
  int split = order.axes;
  while (split > 0 && reduced[order.axis[split - 1]] == rows) --split;

  // Outer axes: kept ones first, then reduced ones, so that the lines of a statistic (a matrix) are consecutive.
  int line_axes[kMaxAxes];
  int lines = 0;
  for (const bool kind : {false, true}) {
    for (int i = 0; i < split; ++i) {
      if (reduced[order.axis[i]] == kind) line_axes[lines++] = order.axis[i];
    }
  }
  int inner_axes[kMaxAxes];
  int inner = 0;
  for (int i = split; i < order.axes; ++i) inner_axes[inner++] = order.axis[i];

  std::int64_t inner_count = 1;
  for (int i = 0; i < inner; ++i) inner_count *= x.shape[inner_axes[i]];
  plan->work = rows ? Work::rows : Work::columns;
  plan->inner = inner_count;
  plan->fold = 1;
  if (rows) {
    plan->outer = plan->statistics;
    plan->lines_per_statistic = inner_count == 0 ? 0 : plan->reduced / inner_count;
    // Small planes: the kept axis right before the plane joins it, and a plane becomes `fold` columns.
    const bool adjoining = split > 0 && !reduced[order.axis[split - 1]] && plan->lines_per_statistic > 1;
    if (affine == Affine::per_statistic && adjoining && inner_count < kSmallPlane) {
      const int channel = order.axis[split - 1];
      line_axes[0] = 0;
      lines = 0;
      for (int i = 0; i < split - 1; ++i) line_axes[lines++] = order.axis[i];
      std::copy_backward(inner_axes, inner_axes + inner, inner_axes + inner + 1);
      inner_axes[0] = channel;
      ++inner;
      plan->work = Work::columns;
      plan->fold = inner_count;
      plan->inner = inner_count * x.shape[channel];
      plan->outer = 1;
    }
  } else {
    plan->lines_per_statistic = plan->reduced;
    plan->outer = inner_count == 0 ? 0 : plan->statistics / inner_count;
  }

  const std::int64_t bytes = size(x.dtype);
  make_layout(x.shape, x.strides, bytes, line_axes, lines, inner_axes, inner, &plan->x);
  make_layout(x.shape, y_strides, bytes, line_axes, lines, inner_axes, inner, &plan->y);
  if (dy != nullptr) make_layout(x.shape, dy->strides, bytes, line_axes, lines, inner_axes, inner, &plan->dy);

  plan->kept_axes = plan->reduced_axes = 0;
  for (int i = 0; i < order.axes; ++i) {
    const int axis = order.axis[i];
    if (reduced[axis]) {
      plan->reduced_axis[plan->reduced_axes++] = axis;
    } else {
      plan->kept[plan->kept_axes++] = axis;
    }
  }
  for (int axis = 0; axis < x.axes; ++axis) {
    if (x.shape[axis] != 1) continue;
    if (reduced[axis]) {
      plan->reduced_axis[plan->reduced_axes++] = axis;
    } else {
      plan->kept[plan->kept_axes++] = axis;
    }
  }
}

}  // namespace lanenorm
