// Launchers of the row kernels: which template goes with which choice. Included by row_norm_<dtype>.cu, one unit per
// storage type, so that they compile side by side.
#pragma once

#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"
#include "cuda/row_gradient.cuh"
#include "cuda/row_norm.cuh"
#include "cuda/row_norm_long.cuh"

namespace lanenorm::cuda {

// f(Shape) for the lanes and words of a shape, from a list that says how many whole rows are taken at a time.
template <int L, int V, int R = 1>
struct Shape {
  static constexpr int kLanes = L, kWords = V, kRows = R;
};
template <class First, class... Rest, class F>
void with_shape(GroupShape shape, F&& f) {
  if (shape.lanes == First::kLanes && shape.words == First::kWords) {
    f(First{});
  } else if constexpr (sizeof...(Rest) > 0) {
    with_shape<Rest...>(shape, f);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

template <class T>
void row_forward_streamed(RowForward args, const RowForwardChoice& choice, const Context& context) {
  const std::size_t pieces = static_cast<std::size_t>(args.rows * args.pieces);
  const std::size_t moments = kMomentSets<T> * pieces * sizeof(Counted);
  const std::size_t statistics = static_cast<std::size_t>(args.rows) * sizeof(Statistic<Compute<T>>);
  args.piece_moments = context.allocate(context.state, moments);
  args.statistics = context.allocate(context.state, statistics);
  const DeviceLimits device = device_limits(context.device);
  // A resident choice that does not fit after all has a grid of its own.
  const std::int64_t blocks = grid_of(args.rows * args.pieces, 8, device);
  launch(row_moments_streamed<T>, {blocks, choice.threads, 1, sizeof(WarpMoments<1>)}, context.stream, args);
  launch(row_statistics_streamed<T>, {grid_of((args.rows + 3) / 4, 8, device), 128}, context.stream, args);
  launch(row_apply_streamed<T>, {blocks, choice.threads}, context.stream, args);
}

template <class T>
void row_forward(RowForward args, const RowForwardChoice& choice, const Context& context) {
  args.warp_words = choice.warp_words;
  args.pieces = choice.pieces;
  args.pieces_per_block = choice.pieces_per_block;
  switch (choice.kind) {
    case RowKind::group:
      with_shape<Shape<8, 1, 8>, Shape<16, 1, 8>, Shape<16, 2, 4>, Shape<32, 2, 4>, Shape<32, 4, 2>, Shape<32, 8>>(
          choice.shape, [&](auto s) {
            const auto kernel = choice.whole ? row_forward_group<T, s.kLanes, s.kWords, s.kRows, true>
                                             : row_forward_group<T, s.kLanes, s.kWords, 1, false>;
            launch(kernel, {choice.blocks, choice.threads}, context.stream, args);
          });
      return;
    case RowKind::block:
      with_shape<Shape<32, 4, 2>, Shape<32, 8>>(choice.shape, [&](auto s) {
        const auto kernel =
            choice.whole ? row_forward_block<T, s.kWords, s.kRows, true> : row_forward_block<T, s.kWords, 1, false>;
        const std::size_t shared = choice.whole ? sizeof(WarpMoments<s.kRows>) : sizeof(WarpMoments<1>);
        launch(kernel, {choice.blocks, choice.threads, 1, shared}, context.stream, args);
      });
      return;
    case RowKind::resident: {
      const Config config{choice.blocks, choice.threads, choice.cluster, resident_bytes(choice.pieces_per_block)};
      if (fits(row_forward_resident<T>, config, context.device)) {
        launch(row_forward_resident<T>, config, context.stream, args);
        return;
      }
      break;
    }
    case RowKind::streamed: break;
  }
  row_forward_streamed<T>(args, choice, context);
}

// ---- backward ----------------------------------------------------------------------------------------------------

template <class T>
void row_backward(RowBackward args, const RowBackwardChoice& choice, const Context& context) {
  args.chunk_rows = choice.chunk_rows;
  args.chunks = choice.chunks;
  args.slabs = choice.slabs;
  args.slab_words = choice.slab_words;
  if (choice.group) {
    // Rows that are not whole words one by one, and their sums as if they came together.
    const auto group = [&](auto s) {
      const auto kernel = choice.whole ? row_backward_group<T, s.kLanes, s.kWords, s.kRows, s.kRows, true>
                                       : row_backward_group<T, s.kLanes, s.kWords, 1, s.kRows, false>;
      launch(kernel, {choice.blocks, choice.threads, 1, kGroupSumsBytes<T, s.kLanes, s.kWords>}, context.stream, args);
    };
    with_shape<Shape<8, 1, 4>, Shape<16, 1, 4>, Shape<16, 2, 2>, Shape<32, 2, 2>>(choice.shape, group);
    if constexpr (sizeof(T) > 2) with_shape<Shape<32, 4>>(choice.shape, group);
    return;
  }
  constexpr int V = sizeof(T) == 2 ? 2 : 4, R = sizeof(T) == 2 ? 2 : 1;  // 16 columns of 4 bytes, or 8 of 8
  const std::size_t shared = choice.whole ? sizeof(SlabSums<R>) : sizeof(SlabSums<1>);
  Config config{choice.blocks, choice.threads, choice.cluster, shared};
  const auto kernel = choice.whole ? row_backward_block<T, V, R, true> : row_backward_block<T, V, 1, false>;
  if (choice.cluster > 1 && !fits(kernel, config, context.device)) config.cluster = 1;
  if (args.slabs > 1 && config.cluster == 1) {
    args.slab_sums =
        context.allocate(context.state, static_cast<std::size_t>(args.rows * args.slabs) * sizeof(GradientSums));
    Config sums = config;
    sums.shared_bytes = sizeof(SlabSums<1>);
    sums.blocks = grid_of(args.rows * args.slabs, 4, device_limits(context.device));
    launch(row_sums_slab<T, V>, sums, context.stream, args);
  }
  launch(kernel, config, context.stream, args);
}

template <class T>
void fold_partials(const FoldPartials& args, const DeviceLimits& device, const Context& context) {
  const std::int64_t blocks = grid_of(2 * ((args.length + 31) / 32), 4, device);
  launch(fold_row_partials<T>, {blocks, 32 * kFoldRows, 1, sizeof(FoldLayout)}, context.stream, args);
}

}  // namespace lanenorm::cuda
