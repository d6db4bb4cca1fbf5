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

// Mean and biased variance before rounding.
struct ExactStatistic {
  Pair<double> mean;
  double variance;
};

// One operation with its small arrays in compute type C and in the order of the Plan.
struct Problem {
  const Args& args;
  const Plan& plan;
  const KernelTable& kernels;
  const void* weight;  // C, or null
  const void* bias;    // C, or null
  void* mean;          // (statistics) C: written by a forward, read by the others
  void* rstd;
  const void* rstd_low;   // C, inference only: what rounding took from rstd
  ExactStatistic* exact;  // (statistics) for running statistics, or null
  double* dweight;        // zeros on entry, or null
  double* dbias;

  std::int64_t bytes(int passes) const { return plan.elements * size(args.dtype) * passes; }
};

// C is float or double.
template <class C>
void rows_forward(const Problem& problem);
template <class C>
void rows_inference(const Problem& problem);
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

// Elements of a piece where its size is free: 64 KB of float32, so that x and y of a piece fit an L2 cache of 256 KB
// and 128 rows of 768 still make 6 pieces.
inline constexpr std::int64_t kPieceElements = 16384;

// The sums of one piece join the totals; callers go through pieces in index order.
inline void add_partials(const double* partials, std::int64_t count, double* totals) {
  for (std::int64_t i = 0; i < count; ++i) totals[i] += partials[i];
}

}  // namespace lanenorm
