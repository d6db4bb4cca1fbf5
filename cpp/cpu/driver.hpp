// What norms.cpp hands to the drivers of rows and columns, and what the two share. Drivers cut the work into fixed
// pieces, run kernels over them in parallel, and merge what pieces leave in index order.
#pragma once

#include <cstdint>

#include "core/args.hpp"
#include "core/formulas.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"

namespace lanenorm {

// Mean and biased variance before rounding; three doubles, as kernels write them.
struct ExactStatistic {
  Pair<double> mean;
  double variance;
};
static_assert(sizeof(ExactStatistic) == 3 * sizeof(double));

enum class Operation { forward, inference, backward };

// One operation with its small arrays in compute type C and in the order of the Plan.
struct Problem {
  Operation operation;
  const Args& args;
  const Plan& plan;
  const KernelTable& kernels;
  const void* weight;     // C, or null
  const void* bias;       // C, or null (not in an inference)
  void* mean;             // (statistics) C: written by a forward, read by the others
  void* rstd;             // likewise; inference: PlaneApply's factor
  ExactStatistic* exact;  // (statistics) for running statistics, or null
  double* dweight;        // zeros on entry, or null
  double* dbias;
  void* sum_dweight;  // C, written whole: in place of dweight and dbias where LN has one chunk of rows; or null
  void* sum_dbias;

  std::int64_t bytes(int passes) const { return plan.elements * size(args.dtype) * passes; }
  bool stream() const;  // y (dx) is written past the caches
};

// Outputs from this size on are written past the caches, and what is read next is fetched meanwhile. Two layer norms in
// a row, the second reading what the first wrote, rows of 768 on one core of a Zen 4 with 32 MB of L3, in copies
// (memcpy): 3.1 MB 2.0 with ordinary and 2.7 with streaming stores, 6.3 MB 2.5 and 2.1, 12.6 MB 2.3 and 1.5, 50 MB 1.8
// and 1.1.
//
// With one array less to keep an inference gains from the caches longer, and so do several threads, whose streaming
// stores may share a link to memory: two threads of a virtual machine at times streamed no more than one (9.4 MB of
// inference 343 us, 162 in cache; forward of 6.2 MB 232 and 146), at times twice as much (200 us, 145; 150 and 168),
// and these are the sizes that lose little in either state (forward of 8.0 MB 273 and 361). Inference of 12.8 MB on two
// threads, streamed and in cache: planes, walked through, 520 and 420 us, rows of columns, four side by side, 516 and
// 770. A backward, with one array more, gains sooner: 1568 x 768 (4.8 MB) on one thread 490 us, 400 streamed. A forward
// of small planes gains later: streamed and in cache 8 x 1024 x 14 x 14 (6.4 MB) 324 and 295 us, two in a row 859 and
// 850..900; 10 x 1024 x 14 x 14 408 and 395, 1093 and 1296.
constexpr std::int64_t stream_bytes(Operation operation, bool several_threads, const Plan& plan) {
  constexpr std::int64_t kMega = std::int64_t{1} << 20;
  const bool planes = plan.fold > 1, side_by_side = plan.work == Work::columns && !planes;
  if (operation == Operation::inference) return (!several_threads ? 8 : side_by_side ? 11 : 14) * kMega;
  if (operation == Operation::forward) return (several_threads || planes ? 7 : 6) * kMega;
  return several_threads ? 6 * kMega : 9 * kMega / 2;
}

inline bool Problem::stream() const {
  const auto address = reinterpret_cast<std::uintptr_t>(args.y);
  return bytes(1) >= stream_bytes(operation, get_num_threads() > 1, plan) && plan.y.direct && args.y != args.x &&
         args.y != args.dy && address % static_cast<std::uintptr_t>(size(args.dtype)) == 0;
}

// C is float or double.
template <class C>
void rows_forward(const Problem& problem);
template <class C>
void planes_inference(const Problem& problem);
template <class C>
void rows_backward(const Problem& problem);
template <class C>
void columns_forward(const Problem& problem);
template <class C>
void columns_inference(const Problem& problem);
template <class C>
void columns_backward(const Problem& problem);

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Small planes (kSmallPlane) of less elements are columns whose moments and sums are folded afterwards: a vector is
// longer than they are. (64, 1024, 2, 2) as planes: forward 386, backward 549 us; as columns 83 and 110.
inline constexpr std::int64_t kLeastPlane = 16;

// The least rows of a chunk of LN's dweight and dbias; so many are summed in C (kFlushRows) and need no totals in
// double, which for few long rows are larger than the data: 1 x 1048576 took 17 copies.
inline constexpr std::int64_t kChunkRows = 16;
static_assert(kChunkRows <= kFlushRows && kChunkRows % kRowBlock == 0);

// Elements of a piece where its size is free: 64 KB of float32, so that x and y of a piece fit an L2 cache of 256 KB
// and 128 rows of 768 still make 6 pieces.
inline constexpr std::int64_t kPieceElements = 16384;

// The sums of one piece join the totals; callers go through pieces in index order.
inline void add_partials(const double* partials, std::int64_t count, double* totals) {
  for (std::int64_t i = 0; i < count; ++i) totals[i] += partials[i];
}

}  // namespace lanenorm
