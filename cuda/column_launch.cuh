// Launchers of the column kernels. Included by column_norm_<dtype>.cu, one unit per storage type.
#pragma once

#include "cuda/column_gradient.cuh"
#include "cuda/column_norm.cuh"
#include "cuda/column_resident.cuh"
#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"
#include "cuda/pointwise.cuh"

namespace lanenorm::cuda {

// A warp a statistic, 4 warps a block, 8 blocks an SM.
inline Config config_of_statistics(std::int64_t statistics, const Context& context) {
  return {grid_of((statistics + 3) / 4, 8, device_limits(context.device)), 128};
}

// Fills in what args has of a choice.
template <class A>
A with_choice(A args, const ColumnChoice& choice) {
  args.strips = choice.strips;
  args.pieces = choice.pieces;
  args.slab = {choice.slab_words, choice.stretches};
  return args;
}

template <class T>
Config streamed_config(const ColumnChoice& choice) {
  return {choice.streamed_blocks, kColumnThreads, 1, sizeof(ColumnLayout<T>)};
}

// Runs the resident kernel, a cluster a slab, if there is one for this choice.
template <class T, class A, class... Parameters, class... Arguments>
bool launch_resident(void (*kernel)(Parameters...), int tensors, const ColumnChoice& choice, const Context& context,
                     const A& args, const Arguments&... arguments) {
  if (choice.slab_words == 0) return false;
  const std::int64_t width = choice.slab_words * kPerWord<T>, slabs = (args.columns + width - 1) / width;
  const std::int64_t bytes = slab_bytes(choice.slab_words, choice.stretches, sizeof(T), tensors);
  const Config config{args.matrices * slabs * choice.cluster, choice.threads, choice.cluster,
                      static_cast<std::size_t>(bytes)};
  if (!fits(kernel, config, context.device)) return false;
  launch(kernel, config, context.stream, args, arguments...);
  return true;
}

// Of the moments or sums of all pieces; as many a column as `sets`.
template <class M, class A>
void* allocate_pieces(const A& args, int sets, const Context& context) {
  const auto places = static_cast<std::size_t>(args.matrices * args.columns * args.pieces);
  return context.allocate(context.state, static_cast<std::size_t>(sets) * places * sizeof(M));
}

template <class T>
void column_forward(ColumnForward args, const ColumnChoice& choice, const Context& context) {
  args = with_choice(args, choice);
  if (launch_resident<T>(column_forward_resident<T>, 1, choice, context, args)) return;
  const Config pieces = streamed_config<T>(choice);
  const std::int64_t statistics = args.matrices * args.columns;
  args.piece_moments = allocate_pieces<Counted>(args, kMomentSets<T>, context);
  args.normalizers =
      context.allocate(context.state, static_cast<std::size_t>(statistics) * sizeof(Normalizer<Compute<T>>));
  launch(column_moments_streamed<T>, pieces, context.stream, args);
  launch(column_statistics_streamed<T>, config_of_statistics(statistics, context), context.stream, args);
  launch(column_apply_streamed<T>, {pieces.blocks, pieces.threads}, context.stream, args);
}

template <class T>
void column_backward(ColumnBackward args, const ColumnChoice& choice, const Context& context) {
  args = with_choice(args, choice);
  args.slabs = choice.slabs;
  if (launch_resident<T>(column_backward_resident<T>, 2, choice, context, args)) return;
  const Config pieces = streamed_config<T>(choice);
  const std::int64_t statistics = args.matrices * args.columns;
  args.piece_sums = allocate_pieces<GradientSums>(args, 1, context);
  args.constants =
      context.allocate(context.state, static_cast<std::size_t>(statistics) * sizeof(GradientConstants<Compute<T>>));
  launch(column_sums_streamed<T>, pieces, context.stream, args);
  launch(column_constants_streamed<T>, config_of_statistics(statistics, context), context.stream, args);
  launch(column_gradient_streamed<T>, {pieces.blocks, pieces.threads}, context.stream, args);
}

// ---- channels (BN) -----------------------------------------------------------------------------------------------

template <class T>
void column_channels_forward(ColumnForward args, ColumnChannels channels, const ColumnChoice& choice,
                             const Context& context) {
  args = with_choice(args, choice);
  if (launch_resident<T>(column_channels_resident<T>, 1, choice, context, args, channels.channels)) return;
  const Config pieces = streamed_config<T>(choice);
  channels.channels.constants = allocate_constants<T>(channels.channels, context);
  args.piece_moments = allocate_pieces<Counted>(args, kMomentSets<T>, context);
  launch(column_moments_streamed<T>, pieces, context.stream, args);
  channel_statistics<T>(channels.channels, args.piece_moments, channels.fold * args.pieces, context);
  launch(column_apply_channels<T>, {pieces.blocks, pieces.threads}, context.stream, args, channels);
}

template <class T>
void column_channels_backward(ColumnBackward args, Channels channels, const ColumnChoice& choice,
                              const Context& context) {
  args = with_choice(args, choice);
  if (launch_resident<T>(column_backward_channels_resident<T>, 2, choice, context, args, channels)) return;
  const Config pieces = streamed_config<T>(choice);
  args.piece_sums = allocate_pieces<GradientSums>(args, 1, context);
  args.constants = channels.constants = allocate_constants<T>(channels, context);
  launch(column_sums_streamed<T>, pieces, context.stream, args);
  channel_gradient<T>(channels, args.piece_sums, args.fold * args.pieces, context);
  launch(column_gradient_streamed<T>, {pieces.blocks, pieces.threads}, context.stream, args);
}

template <class T>
void column_pointwise(ColumnForward args, const ColumnChannels& channels, Pointwise operation,
                      const ColumnChoice& choice, const Context& context) {
  args.strips = choice.strips;
  args.pieces = choice.pointwise_pieces;
  args.warp_rows = choice.warp_rows;
  const auto run = [&](auto tag, auto* kernel) {
    using Constants = typename decltype(tag)::Constants;
    launch(kernel, {choice.pointwise_blocks, kColumnThreads, 1, kStripColumns<T> * sizeof(Constants)}, context.stream,
           args, channels);
  };
  if (operation == Pointwise::inference) {
    run(Inference<T>{}, column_pointwise_kernel<T, Inference<T>>);
  } else {
    run(FrozenGradient<T>{}, column_pointwise_kernel<T, FrozenGradient<T>>);
  }
}

}  // namespace lanenorm::cuda
