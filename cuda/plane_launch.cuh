// Launchers of the plane kernels and of those between the passes of batch norm. Included by plane_norm_<dtype>.cu, one
// unit per storage type.
#pragma once

#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"
#include "cuda/plane_gradient.cuh"
#include "cuda/plane_norm.cuh"
#include "cuda/pointwise.cuh"

namespace lanenorm::cuda {

// ---- channels ----------------------------------------------------------------------------------------------------

// 4 warps a block, 8 blocks an SM.
template <class T>
void channel_statistics(const Channels& channels, const void* moments, std::int64_t places, const Context& context) {
  const Config config{grid_of((channels.count + 3) / 4, 8, device_limits(context.device)), 128};
  launch(channel_statistics_kernel<T>, config, context.stream, channels, moments, places);
}

template <class T>
void channel_gradient(const Channels& channels, const void* sums, std::int64_t places, const Context& context) {
  const Config config{grid_of((channels.count + 3) / 4, 8, device_limits(context.device)), 128};
  launch(channel_gradient_kernel<T>, config, context.stream, channels, sums, places);
}

// ---- planes ------------------------------------------------------------------------------------------------------

inline Runs with_choice(Runs runs, const PlaneChoice& choice) {
  runs.segments = choice.segments;
  runs.segment_words = choice.segment_words;
  runs.pieces = choice.pieces;
  runs.pieces_per_block = choice.pieces_per_block;
  return runs;
}

// Runs the resident kernel if there is one for this choice.
template <class M, class Kernel, class A>
bool launch_resident(Kernel kernel, const A& args, int tensors, const PlaneChoice& choice, const Context& context) {
  if (choice.pieces_per_block == 0) return false;
  const Config config{choice.blocks, 32 * choice.warps, choice.cluster, plane_bytes<M>(choice, tensors)};
  if (!fits(kernel, config, context.device)) return false;
  launch(kernel, config, context.stream, args);
  return true;
}

template <class T>
void plane_forward(PlaneForward args, const PlaneChoice& choice, const Context& context) {
  args.runs = with_choice(args.runs, choice);
  if (launch_resident<Counted>(plane_forward_resident<T>, args, 1, choice, context)) return;
  const std::int64_t pieces = args.channels.count * args.runs.pieces;
  const Config blocks{choice.streamed_blocks, 32 * choice.warps, 1, sizeof(WarpMoments<1>)};
  args.channels.constants = allocate_constants<T>(args.channels, context);
  args.piece_moments =
      context.allocate(context.state, kMomentSets<T> * static_cast<std::size_t>(pieces) * sizeof(Counted));
  launch(plane_moments_streamed<T>, blocks, context.stream, args);
  channel_statistics<T>(args.channels, args.piece_moments, args.runs.pieces, context);
  launch(plane_apply_streamed<T>, {blocks.blocks, blocks.threads}, context.stream, args);
}

template <class T>
void plane_backward(PlaneBackward args, const PlaneChoice& choice, const Context& context) {
  args.runs = with_choice(args.runs, choice);
  if (launch_resident<GradientSums>(plane_backward_resident<T>, args, 2, choice, context)) return;
  const std::int64_t pieces = args.channels.count * args.runs.pieces;
  const Config blocks{choice.streamed_blocks, 32 * choice.warps, 1, sizeof(WarpGradientSums)};
  args.channels.constants = allocate_constants<T>(args.channels, context);
  args.piece_sums = context.allocate(context.state, static_cast<std::size_t>(pieces) * sizeof(GradientSums));
  launch(plane_sums_streamed<T>, blocks, context.stream, args);
  channel_gradient<T>(args.channels, args.piece_sums, args.runs.pieces, context);
  launch(plane_gradient_streamed<T>, {blocks.blocks, blocks.threads}, context.stream, args);
}

template <class T>
void plane_pointwise(PlaneForward args, Pointwise operation, const PlaneChoice& choice, const Context& context) {
  args.runs = with_choice(args.runs, choice);
  const auto run = [&](auto tag, auto* kernel) {
    using Constants = typename decltype(tag)::Constants;
    const int threads = 32 * choice.warps;
    launch(kernel, {choice.streamed_blocks, threads, 1, static_cast<std::size_t>(threads) * sizeof(Constants)},
           context.stream, args);
  };
  if (operation == Pointwise::inference) {
    run(Inference<T>{}, plane_pointwise_kernel<T, Inference<T>>);
  } else {
    run(FrozenGradient<T>{}, plane_pointwise_kernel<T, FrozenGradient<T>>);
  }
}

}  // namespace lanenorm::cuda
