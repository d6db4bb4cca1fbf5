// Launchers of the column kernels. Included by column_norm_<dtype>.cu, one unit per storage type.
#pragma once

#include "cuda/column_gradient.cuh"
#include "cuda/column_norm.cuh"
#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"

namespace lanenorm::cuda {

// A warp a statistic, 4 warps a block, 8 blocks an SM.
inline Config config_of_statistics(std::int64_t statistics, const Context& context) {
  return {grid_of((statistics + 3) / 4, 8, device_limits(context.device)), 128};
}

template <class T>
void column_forward(ColumnForward args, const ColumnChoice& choice, const Context& context) {
  args.strips = choice.strips;
  args.pieces = choice.pieces;
  const Config pieces{choice.blocks, kColumnThreads, 1, sizeof(ColumnLayout<T>)};
  if (args.pieces == 1) {
    launch(column_forward_resident<T>, pieces, context.stream, args);
    return;
  }
  const auto statistics = static_cast<std::size_t>(args.matrices * args.columns);
  args.piece_moments = context.allocate(
      context.state, kMomentSets<T> * statistics * static_cast<std::size_t>(args.pieces) * sizeof(Counted));
  args.normalizers = context.allocate(context.state, statistics * sizeof(Normalizer<Compute<T>>));
  launch(column_moments_streamed<T>, pieces, context.stream, args);
  launch(column_statistics_streamed<T>, config_of_statistics(args.matrices * args.columns, context), context.stream,
         args);
  launch(column_apply_streamed<T>, {choice.blocks, kColumnThreads}, context.stream, args);
}

template <class T>
void column_backward(ColumnBackward args, const ColumnChoice& choice, const Context& context) {
  args.strips = choice.strips;
  args.pieces = choice.pieces;
  const Config pieces{choice.blocks, kColumnThreads, 1, sizeof(ColumnLayout<T>)};
  if (args.pieces == 1) {
    launch(column_backward_resident<T>, pieces, context.stream, args);
    return;
  }
  const auto statistics = static_cast<std::size_t>(args.matrices * args.columns);
  args.piece_sums =
      context.allocate(context.state, statistics * static_cast<std::size_t>(args.pieces) * sizeof(GradientSums));
  args.constants = context.allocate(context.state, statistics * sizeof(GradientConstants<Compute<T>>));
  launch(column_sums_streamed<T>, pieces, context.stream, args);
  launch(column_constants_streamed<T>, config_of_statistics(args.matrices * args.columns, context), context.stream,
         args);
  launch(column_gradient_streamed<T>, {choice.blocks, kColumnThreads}, context.stream, args);
}

// ---- channels (BN) -----------------------------------------------------------------------------------------------

template <class T>
void column_channels_forward(ColumnForward args, ColumnChannels channels, bool inference, const ColumnChoice& choice,
                             const Context& context) {
  args.strips = choice.strips;
  args.pieces = choice.pieces;
  const Config pieces{choice.blocks, kColumnThreads, 1, sizeof(ColumnLayout<T>)};
  if (!inference && args.pieces == 1 && channels.fold == 1) {
    launch(column_channels_resident<T>, pieces, context.stream, args, channels.channels);
    return;
  }
  channels.channels.constants = allocate_constants<T>(channels.channels, context);
  if (inference) {
    channel_inference<T>(channels.channels, context);
  } else {
    const auto places = static_cast<std::size_t>(args.matrices * args.columns * args.pieces);
    args.piece_moments = context.allocate(context.state, kMomentSets<T> * places * sizeof(Counted));
    launch(column_moments_streamed<T>, pieces, context.stream, args);
    channel_statistics<T>(channels.channels, args.piece_moments, channels.fold * args.pieces, context);
  }
  launch(column_apply_channels<T>, {choice.blocks, kColumnThreads}, context.stream, args, channels);
}

template <class T>
void column_channels_backward(ColumnBackward args, Channels channels, const ColumnChoice& choice,
                              const Context& context) {
  args.strips = choice.strips;
  args.pieces = choice.pieces;
  const Config pieces{choice.blocks, kColumnThreads, 1, sizeof(ColumnLayout<T>)};
  if (args.pieces == 1 && args.fold == 1 && needs_sums(channels)) {
    launch(column_backward_channels_resident<T>, pieces, context.stream, args, channels);
    return;
  }
  const bool sums = needs_sums(channels);
  if (sums) {
    const auto places = static_cast<std::size_t>(args.matrices * args.columns * args.pieces);
    args.piece_sums = context.allocate(context.state, places * sizeof(GradientSums));
    launch(column_sums_streamed<T>, pieces, context.stream, args);
  }
  args.constants = channels.constants = allocate_constants<T>(channels, context);
  channel_gradient<T>(channels, args.piece_sums, sums ? args.fold * args.pieces : 0, context);
  launch(column_gradient_streamed<T>, {choice.blocks, kColumnThreads}, context.stream, args);
}

}  // namespace lanenorm::cuda
