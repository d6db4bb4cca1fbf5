// Rows: statistics along contiguous runs, folded across lanes.
//
//   y  = (x - mean) * rstd * weight + bias            Ba, Kiros, Hinton 2016, eq. 4; Ioffe & Szegedy 2015, alg. 1
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight,  dweight = sum dy * xhat,  dbias = sum dy
//
// Passes over memory: forward reads x once and writes y (2s), the apply sweep finds the row in L1 or L2; backward
// reads x and dy once and writes dx (3s), for the same reason. Rows longer than a piece (kPieceVectors) are swept
// twice by the driver. The order of operations is stated in blocks.hpp.
//
// Cost on a Zen 4, AVX-512, which does an addition, a fma and a load of 16 float32 a cycle and stores them in two.
// Forward in L1: moments 2.25 cycles a vector (their additions), apply 3.5 (3 fma), 90 a row (pivot, folds, division
// and root): 370 for 768. Backward in L1: sums 3.8 (3.5 additions and 3 fma), gradient 4.8 (5 fma), 37 a row: 450 for
// 768. Out of L3 (1024 x 768) a forward takes 400 a row where x starts on a cache line and 440 where it does not
// (kNear), a backward 740 and 840, a copy 230.
//
// T storage, V compute vector, D = F64x8. Longer than 300 lines because forward and backward read as one method.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cpu/kernels.hpp"
#include "cpu/run_moments.hpp"
#include "cpu/streams.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- moments -----------------------------------------------------------------------------------------------------

template <class T, class V, class D, bool kWide>
PieceMoments row_moments(const RowMoments& a) {
  double count;
  const Moments<double> m = piece_moments<T, V, D, kWide>(a.x, a.runs, a.length, a.scale, &count, a.ahead);
  return {m.pivot, m.sum, m.low, m.m2, count};
}

// ---- apply -------------------------------------------------------------------------------------------------------

// weight and bias of a position within the row.
template <class V, bool kWeight, bool kBias>
struct ElementAffine {
  using S = typename V::Scalar;
  const S* weight;
  const S* bias;
  // Those of a vector of positions.
  struct At {
    V weight, bias;
    LANENORM_INLINE V operator()(V xhat) const {
      if constexpr (kWeight && kBias) return fma(xhat, weight, bias);
      if constexpr (kWeight) return xhat * weight;
      if constexpr (kBias) return xhat + bias;
      return xhat;
    }
  };
  template <class P>
  LANENORM_INLINE At at(std::int64_t i, P part) const {
    At at{V::zero(), V::zero()};
    if constexpr (kWeight) at.weight = load<S, V>(reinterpret_cast<const char*>(weight + i), part);
    if constexpr (kBias) at.bias = load<S, V>(reinterpret_cast<const char*>(bias + i), part);
    return at;
  }
  template <class P>
  LANENORM_INLINE V operator()(V xhat, std::int64_t i, P part) const {
    return at(i, part)(xhat);
  }
};

// weight and bias of the statistic; 1 and -0 stand for none.
template <class S>
struct StatisticAffine {
  S weight, bias;
};

template <class S>
LANENORM_INLINE StatisticAffine<S> statistic_affine(const void* weight, const void* bias, std::int64_t i) {
  return {weight == nullptr ? S(1) : static_cast<const S*>(weight)[i],
          bias == nullptr ? -S(0) : static_cast<const S*>(bias)[i]};
}

// How the result is written, and what is read meanwhile.
struct Traffic {
  Seam* seam;         // y goes past the caches, as it will not be read from them; or null
  bool continues;     // the next line of y follows this one
  const char* ahead;  // the line of x that is needed next, fetched into L2 while this one is written; or null
};

// y = f(x, element index, Full or Part)
template <class T, class V, class F>
LANENORM_INLINE void apply_line(const char* x, char* y, std::int64_t length, Traffic traffic, const F& f) {
  constexpr std::int64_t kBytes = sizeof(T);
  const auto reading = [&](std::int64_t i, auto part)
                           LANENORM_LAMBDA_INLINE { return f(load<T, V>(x + i * kBytes, part), i, part); };
  const auto fetching = [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    __builtin_prefetch(traffic.ahead + i * kBytes, 0, 2);
    return reading(i, part);
  };
  if (traffic.ahead == nullptr) {
    write_line<T, V>(y, length, traffic.seam, traffic.continues, reading);
  } else {
    write_line<T, V>(y, length, traffic.seam, traffic.continues, fetching);
  }
}

template <class T, class V, bool kWeight, bool kBias>
LANENORM_INLINE void apply_any(const char* x, char* y, std::int64_t length, const Normalizer<typename V::Scalar>& n,
                               const ElementAffine<V, kWeight, kBias>& affine, Traffic traffic) {
  const V mean = V::broadcast(n.mean), rstd = V::broadcast(n.rstd), rstd_low = V::broadcast(n.rstd_low);
  const V shift = V::broadcast(n.shift), scale = V::broadcast(n.scale);
  if (n.scale == 1) {
    apply_line<T, V>(x, y, length, traffic, [&](V v, std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
      return affine(normalize(v, mean, rstd, rstd_low, shift), i, part);
    });
  } else {
    apply_line<T, V>(x, y, length, traffic, [&](V v, std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
      return affine(normalize(v * scale, mean, rstd, rstd_low, shift), i, part);
    });
  }
}

// Two rows side by side share the loads of weight and bias. ahead: the rows that are needed next.
template <class T, class V, bool kStream, bool kAhead, class A>
LANENORM_INLINE void apply_side_by_side(const char* const* x, char* const* y, std::int64_t length,
                                        const Normalizer<typename V::Scalar>& n0,
                                        const Normalizer<typename V::Scalar>& n1, const A& affine_,
                                        const char* const* ahead) {
  constexpr std::int64_t kBytes = sizeof(T);
  const A affine = affine_;  // what y might point to is not read again and again
  const char *x0 = x[0], *x1 = x[1], *ahead0 = kAhead ? ahead[0] : nullptr, *ahead1 = kAhead ? ahead[1] : nullptr;
  char *y0 = y[0], *y1 = y[1];
  const V mean0 = V::broadcast(n0.mean), rstd0 = V::broadcast(n0.rstd), low0 = V::broadcast(n0.rstd_low);
  const V mean1 = V::broadcast(n1.mean), rstd1 = V::broadcast(n1.rstd), low1 = V::broadcast(n1.rstd_low);
  const V shift0 = V::broadcast(n0.shift), shift1 = V::broadcast(n1.shift);
  for_vectors<V>(length, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    if constexpr (kAhead) {
      __builtin_prefetch(ahead0 + i * kBytes, 0, 2);
      __builtin_prefetch(ahead1 + i * kBytes, 0, 2);
    }
    // Both are loaded before one is stored: rows often lie a multiple of 4 KB apart, and a load waits for a store
    // before it whose address has the same last 12 bits.
    const V v0 = load<T, V>(x0 + i * kBytes, part), v1 = load<T, V>(x1 + i * kBytes, part);
    const auto at = affine.at(i, part);
    write<T>(at(normalize(v0, mean0, rstd0, low0, shift0)), y0 + i * kBytes, part, kStream);
    write<T>(at(normalize(v1, mean1, rstd1, low1, shift1)), y1 + i * kBytes, part, kStream);
  });
}

// The branches on how y is written stay outside of the loop. 64 x 768 in L2: 9.1 -> 8.2 cycles a vector.
template <class T, class V, class A>
LANENORM_INLINE void apply_two(const char* const* x, char* const* y, std::int64_t length,
                               const Normalizer<typename V::Scalar>& n0, const Normalizer<typename V::Scalar>& n1,
                               const A& affine, bool stream, const char* const* ahead) {
  if (stream && ahead != nullptr) {
    apply_side_by_side<T, V, true, true>(x, y, length, n0, n1, affine, ahead);
  } else if (stream) {
    apply_side_by_side<T, V, true, false>(x, y, length, n0, n1, affine, ahead);
  } else if (ahead != nullptr) {  // y is staged
    apply_side_by_side<T, V, false, true>(x, y, length, n0, n1, affine, ahead);
  } else {
    apply_side_by_side<T, V, false, false>(x, y, length, n0, n1, affine, ahead);
  }
}

template <class T, class V, class S>
LANENORM_INLINE void apply_any(const char* x, char* y, std::int64_t length, const Normalizer<S>& n,
                               const StatisticAffine<S>& affine, Traffic traffic) {
  const FoldedWeight<double> folded = fold_weight<double>(n.rstd, n.rstd_low, n.shift, affine.weight);
  const V mean = V::broadcast(n.mean), bias = V::broadcast(affine.bias);
  if (n.scale == 1 && foldable(static_cast<S>(folded.factor), affine.weight)) {
    const V factor = V::broadcast(static_cast<S>(folded.factor)), shift = V::broadcast(static_cast<S>(folded.shift));
    apply_line<T, V>(x, y, length, traffic, [&](V v, std::int64_t, auto) LANENORM_LAMBDA_INLINE {
      return fma(v - mean, factor, shift) + bias;
    });
  } else {
    const V scale = V::broadcast(n.scale), rstd = V::broadcast(n.rstd), shift = V::broadcast(n.shift);
    const V weight = V::broadcast(affine.weight);
    apply_line<T, V>(x, y, length, traffic, [&](V v, std::int64_t, auto) LANENORM_LAMBDA_INLINE {
      return normalize_affine(v, scale, mean, rstd, shift, weight, bias);
    });
  }
}

// f(ElementAffine) for the parameters that are there.
template <class V, class F>
LANENORM_INLINE void with_affine(const void* weight, const void* bias, F&& f) {
  using S = typename V::Scalar;
  const S* w = static_cast<const S*>(weight);
  const S* b = static_cast<const S*>(bias);
  if (w != nullptr && b != nullptr) {
    f(ElementAffine<V, true, true>{w, b});
  } else if (w != nullptr) {
    f(ElementAffine<V, true, false>{w, b});
  } else if (b != nullptr) {
    f(ElementAffine<V, false, true>{w, b});
  } else {
    f(ElementAffine<V, false, false>{w, b});
  }
}

template <class T, class V, class D>
void row_apply(const RowApply& a) {
  using S = typename V::Scalar;
  const Normalizer<S>& normalizer = *static_cast<const Normalizer<S>*>(a.normalizer);
  const auto runs = [&](auto affine_of_run) LANENORM_LAMBDA_INLINE {
    Seam seam;
    ForwardStage<D> stage(a.stream, a.length * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t group = stage.group();
    for (std::int64_t first = 0; first < a.runs; first += group) {
      const int rows = static_cast<int>(a.runs - first < group ? a.runs - first : group);
      char* table[8];
      char* const* y = stage.lines(a.y + first, rows, table);
      for (int r = 0; r < rows; ++r) {
        const std::int64_t run = first + r;
        const Traffic traffic{a.stream && y != table ? &seam : nullptr, false,
                              a.ahead == nullptr ? nullptr : static_cast<const char*>(a.ahead[run])};
        apply_any<T, V>(static_cast<const char*>(a.x[run]), y[r], a.length, normalizer, affine_of_run(run), traffic);
      }
    }
  };
  if (!a.per_element) {
    runs([&](std::int64_t) { return statistic_affine<S>(a.weight, a.bias, 0); });
  } else {
    with_affine<V>(a.weight, a.bias, [&](auto affine) LANENORM_LAMBDA_INLINE {
      runs([&](std::int64_t run) {
        auto shifted = affine;
        if (shifted.weight != nullptr) shifted.weight += run * a.length;
        if (shifted.bias != nullptr) shifted.bias += run * a.length;
        return shifted;
      });
    });
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// A statistic out of range, from moments in double.
template <class T, class V, class D>
[[gnu::noinline]] Statistic<typename V::Scalar> redo_row(const void* x, std::int64_t length, double variance,
                                                         double eps) {
  using S = typename V::Scalar;
  double count;
  const double scale = redo_scale<S>(variance);
  const Moments<double> m = piece_moments<T, V, D, true>(&x, 1, length, scale, &count);
  return finish_scaled<S>(m, count, eps, scale);
}

// Constants of up to 8 rows.
template <class S>
struct Normalizers {
  alignas(64) S mean[8], rstd[8], rstd_low[8], shift[8], scale[8];
  LANENORM_INLINE Normalizer<S> operator[](int r) const { return {mean[r], rstd[r], rstd_low[r], shift[r], scale[r]}; }
  LANENORM_INLINE void set(int r, const Normalizer<S>& n) {
    mean[r] = n.mean;
    rstd[r] = n.rstd;
    rstd_low[r] = n.rstd_low;
    shift[r] = n.shift;
    scale[r] = n.scale;
  }
};

// Rows beside which no others are fetched are fetched themselves, so many bytes ahead. NumPy's arrays start 16 bytes
// behind a cache line, and a vector that lies in two lines waits for both: 1024 x 768 144 -> 136 us (127 where x starts
// on a cache line), 2048 x 512 205 -> 181, 4096 x 192 192 -> 184. 1 KB and 4 KB gain less, 16-bit rows nothing.
inline constexpr std::int64_t kNear = 2048;

// Moments of `rows` <= 8 rows of float32 or 16-bit data, one in each lane; beyond: bit r, by double, as piece_moments.
// ahead: as many rows to fetch, or null. y of the rows before leaves the stage meanwhile.
template <class T, class V, class D>
LANENORM_INLINE Moments<D> moments_of_rows(const void* const* x, std::int64_t length, int rows, D count,
                                           const void* const* ahead, ForwardStage<D>* stage, unsigned* beyond) {
  const bool moves = length > kSuperblock * V::kLanes;  // sums to the pivot of the row, from those of its superblocks
  alignas(64) double pivot[8] = {}, moved[8] = {}, moved_square[8] = {};
  typename V::Scalar first[8] = {};
  D sum[8], square[8], spread[8];
  for (int r = 0; r < rows; ++r) {  // before any of the sums: their chains of dependent operations overlap
    first[r] = sampled_pivot<T, V>(static_cast<const char*>(x[r]), first_vectors<V>(length));
    pivot[r] = static_cast<double>(first[r]);
  }
  for (int r = 0; r < 8; ++r) {
    PivotSums<D> sums = no_sums<D>();
    if (r < rows) {
      const char* p = static_cast<const char*>(x[r]);
      Fetching fetching =
          ahead == nullptr ? Fetching{p + kNear, true} : Fetching{static_cast<const char*>(ahead[r]), false};
      // What add_run comes to for one superblock, without what it adds 0 to: 512 x 196 150 -> 140 cycles a row, 2304 x
      // 256 183 -> 171, 768 x 768 478 -> 465. The 16 registers of AVX2 do not hold both: 1000 x 300 270 -> 300.
      if (V::kRegisters > 1 || moves) {
        add_run<T, V>(p, length, pivot[r], first[r], &sums, fetching);
      } else {
        const LaneSums<V> lanes = superblock_sums<T, V>(p, length, V::broadcast(first[r]), &fetching);
        sums.sum = lanes.sum.wide(0) + lanes.sum.wide(1);
        sums.square = lanes.square.wide(0) + lanes.square.wide(1);
      }
    }
    sum[r] = sums.sum;
    square[r] = sums.square;
    spread[r] = sums.spread;
    moved[r] = sums.moved;
    moved_square[r] = sums.moved_square;
    stage->drain_row();
  }
  D total = D::fold8(sum), squares = D::fold8(square);
  if (moves) {
    total = total + D::template load<double>(moved);
    squares = squares + D::template load<double>(moved_square);
  }
  const Moments<D> m = moments_about(D::template load<double>(pivot), total, squares, count, D::zero());
  *beyond = beyond_spread(moves ? D::fold8(spread) : squares, m.m2);
  return m;
}

// Short rows are finished by two sets of 8: folds, divisions and root, a chain of 150 cycles, run beside those of the
// other set. Forward of 32, 64, 100 columns 46, 67, 100 -> 42, 62, 97 cycles a row, backward 69, 94, 123 -> 63, 88,
// 115; four sets gain nothing more.
inline constexpr int kShortSets = 2;

// f(set, its first row, its rows) for the sets of 8 of `rows` rows, at most kSets of them.
template <int kSets, class F>
LANENORM_INLINE void for_sets(int rows, const F& f) {
  if constexpr (kSets == 1) {
    f(0, 0, rows);
  } else {
    for (int set = 0; 8 * set < rows; ++set) f(set, 8 * set, rows - 8 * set < 8 ? rows - 8 * set : 8);
  }
}

// Moments of `rows` <= 8 kShortSets rows of less than kShortRun vectors, all in double: 8 in each of m.
template <class T, class V, class D>
LANENORM_INLINE void moments_of_short_rows(const void* const* x, std::int64_t length, int rows, D count,
                                           ForwardStage<D>* stage, Moments<D>* m) {
  alignas(64) double pivot[8 * kShortSets];
  D sum[8 * kShortSets], square[8 * kShortSets];
  const int sets = (rows + 7) / 8;
  for (int r = 0; r < rows; ++r) {
    const char* p = static_cast<const char*>(x[r]);
    pivot[r] = first_value<T, double>(p);
    const LaneSums<D> sums = sums_in_double<T, V>(p, length, D::broadcast(pivot[r]));
    sum[r] = sums.sum;
    square[r] = sums.square;
    stage->drain_row();
  }
  for (int r = rows; r < 8 * sets; ++r) {
    pivot[r] = 0;
    sum[r] = square[r] = D::zero();
  }
  for (int set = 0; set < sets; ++set) {
    m[set] = moments_about(D::template load<double>(pivot + 8 * set), D::fold8(sum + 8 * set),
                           D::fold8(square + 8 * set), count, D::zero());
  }
}

// Saved statistics and normalizers of rows.
template <class S>
struct RowResults {
  S *mean, *rstd;
  double* exact;  // or null
  Normalizers<S>* normalizers;
  LANENORM_INLINE void save(int r, const Pair<double>& exact_mean, double variance) const {
    if (exact == nullptr) return;
    exact[3 * r] = exact_mean.high;
    exact[3 * r + 1] = exact_mean.low;
    exact[3 * r + 2] = variance;
  }
  LANENORM_INLINE void set(int r, const Statistic<S>& s) const {
    normalizers->set(r, s.normalizer);
    mean[r] = s.mean;
    rstd[r] = s.rstd;
    save(r, s.exact_mean, s.variance);
  }
};
template <class S>
LANENORM_INLINE RowResults<S> results_of(const RowForward& a, std::int64_t first_row, Normalizers<S>* normalizers) {
  return {static_cast<S*>(a.mean) + first_row, static_cast<S*>(a.rstd) + first_row,
          a.exact == nullptr ? nullptr : a.exact + 3 * first_row, normalizers};
}

// Normalizers of `rows` <= 8 rows of float32 or 16-bit data from their moments; beyond: as above.
template <class T, class V, class D>
LANENORM_INLINE void finish_rows(const RowForward& a, std::int64_t first_row, int rows, const Moments<D>& m, D count,
                                 unsigned beyond, Normalizers<typename V::Scalar>* normalizers) {
  using S = typename V::Scalar;
  const RowResults<S> to = results_of<S>(a, first_row, normalizers);
  const D eps = D::broadcast(a.eps);
  const Finished<D> f = finish<S>(m, count, eps, D::broadcast(1.0));  // divisions and a root for all
  f.mean.template store<S>(to.mean, rows);
  f.rstd.template store<S>(to.rstd, rows);
  f.mean.template store<S>(normalizers->mean);
  f.rstd.template store<S>(normalizers->rstd);
  f.rstd_low.template store<S>(normalizers->rstd_low);
  f.shift.template store<S>(normalizers->shift);
  D::broadcast(1.0).template store<S>(normalizers->scale);
  const unsigned redo = (~in_range_lanes<S>(f.variance, eps) | beyond) & first_lanes<D>(rows);
  if (__builtin_expect(redo == 0 && to.exact == nullptr, 1)) return;
  alignas(64) double high[8], low[8], variance[8];
  f.variance.template store<double>(variance);
  f.exact_mean.high.template store<double>(high);
  f.exact_mean.low.template store<double>(low);
  for (int r = 0; r < rows; ++r) {
    if (redo >> r & 1) {
      to.set(r, redo_row<T, V, D>(a.x[first_row + r], a.length, variance[r], a.eps));
    } else {
      to.save(r, {high[r], low[r]}, variance[r]);
    }
  }
}

// The same of float64 data, from x.
template <class T, class V, class D>
LANENORM_INLINE void finish_double_rows(const RowForward& a, std::int64_t first_row, int rows, const void* const* ahead,
                                        ForwardStage<D>* stage, Normalizers<double>* normalizers) {
  const RowResults<double> to = results_of<double>(a, first_row, normalizers);
  const double count = static_cast<double>(a.length);
  for (int r = 0; r < rows; ++r) {
    const void* const* x = a.x + first_row + r;
    double elements;
    const Moments<double> m =
        piece_moments<T, V, D, false>(x, 1, a.length, 1.0, &elements, ahead == nullptr ? nullptr : ahead + r);
    const double variance = m.m2 / count;
    to.set(r, out_of_range<double>(variance, a.eps) ? redo_row<T, V, D>(*x, a.length, variance, a.eps)
                                                    : finish<double>(m, count, a.eps));
    stage->drain_row();
  }
}

// Rows that are finished together: 8 (short ones 16), fewer where x of them would not stay in half of L1 until it is
// applied.
inline constexpr std::int64_t kGroupBytes = 16384;
// The rows that are fetched while a group is streamed begin at least so many bytes after it: memory answers no sooner.
// The group next to it (512 bytes to 6 KB) came too late: 65537 x 100 3.9 -> 2.8 ms, 100352 x 96 5.8 -> 3.8,
// 1048576 x 64 32.6 -> 27.2; 4, 12 and 20 KB took 1.01, 0.99 and 1.04 of that time, medians of six shapes.
//   They are fetched while the moments of this group are computed and again while it is written. 8192 x 1024,
// 8192 x 1600 and 2048 x 4096 took, with the first alone, 0.96, 0.94 and 0.89 of the time with the second alone; with
// both 0.66, 0.66 and 0.83; 4096 x 768 float64 0.68. (Rows below kShortRun gain nothing.)
inline constexpr std::int64_t kRowsAhead = 8192;

// weight and bias of a row: its own (BN), or those of the elements (LN).
template <class S>
struct RowAffine {
  static constexpr bool kShared = false;
  const void *weight, *bias;
  LANENORM_INLINE StatisticAffine<S> operator()(std::int64_t row) const {
    return statistic_affine<S>(weight, bias, row);
  }
};
template <class A>
struct SharedAffine {
  static constexpr bool kShared = true;
  A affine;
  LANENORM_INLINE const A& operator()(std::int64_t) const { return affine; }
};

// y of `rows` <= 8 finished rows; those `ahead_rows` further on are fetched meanwhile.
template <class T, class V, class D, class A>
LANENORM_INLINE void apply_rows(const RowForward& a, std::int64_t first, int rows, std::int64_t ahead_rows,
                                const Normalizers<typename V::Scalar>& normalizers, const A& affine_of_row,
                                ForwardStage<D>* stage, Seam* seam) {
  const char* const* x = reinterpret_cast<const char* const*>(a.x);
  const std::int64_t row_bytes = a.length * static_cast<std::int64_t>(sizeof(T));
  char* table[8];
  char* const* y = stage->lines(a.y + first, rows, table);
  const bool stream = a.stream && y != table;
  const auto ahead = [&](int r) LANENORM_LAMBDA_INLINE {  // the rows of that group, if row r of it is there
    return a.prefetch && first + ahead_rows + r < a.rows ? x + first + ahead_rows : nullptr;
  };
  int r = 0;
  if constexpr (A::kShared) {
    for (; r + 2 <= rows && normalizers.scale[r] == 1 && normalizers.scale[r + 1] == 1; r += 2) {
      if (stream && !on_cache_lines(y + r, 2)) break;
      apply_two<T, V>(x + first + r, y + r, a.length, normalizers[r], normalizers[r + 1], affine_of_row(0), stream,
                      ahead(r + 1) == nullptr ? nullptr : ahead(r + 1) + r);
    }
  }
  for (; r < rows; ++r) {
    const bool continues =
        first + r + 1 < a.rows && static_cast<char*>(a.y[first + r]) + row_bytes == a.y[first + r + 1];
    const Traffic traffic{stream ? seam : nullptr, continues, ahead(r) == nullptr ? nullptr : ahead(r)[r]};
    apply_any<T, V>(x[first + r], y[r], a.length, normalizers[r], affine_of_row(first + r), traffic);
  }
}

// kShort: rows of less than kShortRun vectors.
// Not inlined: all kinds in one function leave each loop fewer registers than it needs (196 columns 1.13 of the time).
// affine_of_row by value: what y may point to is read again after every store. (`a` by value: float64 1.03..1.13.)
template <bool kShort, class T, class V, class D, class A>
[[gnu::noinline]] void forward_groups(const RowForward& a, A affine_of_row) {
  constexpr int kSets = kShort ? kShortSets : 1;
  const std::int64_t row_bytes = a.length * static_cast<std::int64_t>(sizeof(T)), fitting = kGroupBytes / row_bytes;
  const std::int64_t group = kShort ? 8 * kSets : fitting < 1 ? 1 : fitting < 8 ? fitting : 8;
  const std::int64_t ahead_rows = group * ((kRowsAhead + group * row_bytes - 1) / (group * row_bytes));
  ForwardStage<D> stage(a.stream, row_bytes, a.y[0]);
  Seam seam;
  const D count = D::broadcast(static_cast<double>(a.length));
  for (std::int64_t first = 0; first < a.rows; first += group) {
    const int rows = static_cast<int>(a.rows - first < group ? a.rows - first : group);
    const bool whole_group = a.prefetch && first + ahead_rows + rows <= a.rows;
    const void* const* ahead = whole_group ? a.x + first + ahead_rows : nullptr;
    Normalizers<typename V::Scalar> normalizers[kSets];
    if constexpr (sizeof(T) == 8) {
      finish_double_rows<T, V, D>(a, first, rows, ahead, &stage, normalizers);
    } else {
      Moments<D> m[kSets];
      unsigned beyond = 0;
      if constexpr (kShort) {
        moments_of_short_rows<T, V>(a.x + first, a.length, rows, count, &stage, m);
      } else {
        m[0] = moments_of_rows<T, V>(a.x + first, a.length, rows, count, ahead, &stage, &beyond);
      }
      for_sets<kSets>(rows, [&](int set, int row, int of_set) LANENORM_LAMBDA_INLINE {
        finish_rows<T, V>(a, first + row, of_set, m[set], count, beyond, normalizers + set);
      });
    }
    for_sets<kSets>(rows, [&](int set, int row, int of_set) LANENORM_LAMBDA_INLINE {
      apply_rows<T, V>(a, first + row, of_set, ahead_rows, normalizers[set], affine_of_row, &stage, &seam);
    });
  }
}

template <class T, class V, class D>
void row_forward(const RowForward& a) {
  using S = typename V::Scalar;
  const auto groups = [&](auto affine_of_row) LANENORM_LAMBDA_INLINE {
    if constexpr (sizeof(T) < 8) {
      if (a.length < kShortRun * V::kLanes) return forward_groups<true, T, V, D>(a, affine_of_row);
    }
    forward_groups<false, T, V, D>(a, affine_of_row);
  };
  if (a.per_row) {
    groups(RowAffine<S>{a.weight, a.bias});
  } else {
    with_affine<V>(a.weight, a.bias,
                   [&](auto affine) LANENORM_LAMBDA_INLINE { groups(SharedAffine<decltype(affine)>{affine}); });
  }
}

// ---- backward: sums ----------------------------------------------------------------------------------------------

// What is fetched where dx is streamed. Writing dx interrupts both streams, and the processor takes a while to follow
// them again: 25088 x 192 1.65 -> 1.15 times 1.5 copies, 4096 x 4096 1.25 -> 1.15; 4 to 12 KB ahead are alike. Of rows
// of 512 bytes to 64 KB (kLargestGroup) only x is fetched by the sums, and dy while dx is written or staged, so that
// memory is never idle; beyond the group of rows that is being written, of large ones two groups ahead (one group took
// 0.93..1.15 of the time).
// 25088 x 192 7.3 -> 6.1 ns a vector, 4096 x 768 6.2 -> 5.4, 16384 x 500 8.3 -> 7.3, 10485 x 1600 9.2 -> 7.9, 8192 x
// 2000 9.0 -> 8.2, 1024 x 16384 10.5 -> 9.3; rows of 4, 8 and 16 KB, which lie alike within their pages, gain 3..5 %.
enum class Fetch { none, x, both };
inline constexpr std::int64_t kAhead = 6144;
inline constexpr std::int64_t kFarAhead = 12288, kLargestGroup = 262144;

// Sums of g = dy * weight, g t and t, t = (x - mean) * rstd, in lanes of L.
template <class L>
struct GradientLanes {
  L g, gt, t;
};

struct Nothing {  // is done beside the sums
  LANENORM_INLINE void operator()() const {}
};

// The elements start..stop of a line, at most kSuperblock vectors: trees of 8, then what is left one by one.
// far: how many bytes ahead Fetch::x fetches. meanwhile(): what else is done beside each 8.
template <class T, class V, bool kWeight, Fetch kFetch, class M>
LANENORM_INLINE GradientLanes<V> superblock_gradient_sums(const char* x, const char* dy,
                                                          const typename V::Scalar* weight, std::int64_t start,
                                                          std::int64_t stop, V mean, V rstd, std::int64_t far,
                                                          const M& meanwhile) {
  using S = typename V::Scalar;
  constexpr std::int64_t kLanes = V::kLanes;
  constexpr std::int64_t kBytes = sizeof(T);
  GradientLanes<V> sums{V::zero(), V::zero(), V::zero()};
  const auto one = [&](std::int64_t at, auto part, V* g, V* t) LANENORM_LAMBDA_INLINE {
    if constexpr (kFetch == Fetch::x) __builtin_prefetch(x + at * kBytes + far, 0, 2);
    if constexpr (kFetch == Fetch::both) {
      __builtin_prefetch(x + at * kBytes + kAhead, 0, 2);
      __builtin_prefetch(dy + at * kBytes + kAhead, 0, 2);
    }
    *g = load<T, V>(dy + at * kBytes, part);
    if constexpr (kWeight) *g = *g * load<S, V>(reinterpret_cast<const char*>(weight + at), part);
    *t = keep_part((load<T, V>(x + at * kBytes, part) - mean) * rstd, part);
  };
  std::int64_t i = start;
  for (; i + kBlock * kLanes <= stop; i += kBlock * kLanes) {
    V g[kBlock], t[kBlock];
    LANENORM_UNROLL
    for (int j = 0; j < kBlock; ++j) one(i + j * kLanes, Full{}, g + j, t + j);
    sums.g = sums.g + tree<kBlock>(g);
    sums.gt = sums.gt + tree_of_products<kBlock>(g, t);
    sums.t = sums.t + tree<kBlock>(t);
    meanwhile();
  }
  const auto add = [&](std::int64_t at, auto part) LANENORM_LAMBDA_INLINE {
    V g, t;
    one(at, part, &g, &t);
    sums.g = sums.g + g;
    sums.gt = fma(g, t, sums.gt);
    sums.t = sums.t + t;
  };
  for (; i + kLanes <= stop; i += kLanes) add(i, Full{});
  if (i < stop) add(i, Part{static_cast<int>(stop - i)});
  return sums;
}

// Whether the lanes of a line that is alone (LN, BN of one image) are folded in V, by halving, and not in double: a
// third of the operations. Rows of 32, 64, 96, 192 in L1 62 -> 55, 78 -> 70, 100 -> 86, 153 -> 136 cycles a row, and dx
// up to 5.2 u of 8 (4.2); rows of 500 gain nothing.
template <class V>
LANENORM_INLINE bool folds_unwidened(std::int64_t length) {
  return length <= 16 * V::kLanes;
}

// A line joins the sums: lanes of its superblocks go to double.
template <class T, class V, class D, bool kWeight, Fetch kFetch, class M>
LANENORM_INLINE void add_line_sums(const char* x, const char* dy, const typename V::Scalar* weight, std::int64_t length,
                                   V mean, V rstd, std::int64_t far, const M& meanwhile, GradientLanes<D>* total) {
  constexpr std::int64_t kElements = kSuperblock * V::kLanes;
  for (std::int64_t start = 0; start < length; start += kElements) {
    const std::int64_t stop = length < start + kElements ? length : start + kElements;
    const GradientLanes<V> sums =
        superblock_gradient_sums<T, V, kWeight, kFetch>(x, dy, weight, start, stop, mean, rstd, far, meanwhile);
    LANENORM_UNROLL
    for (int part = 0; part < V::kWide; ++part) {
      total->g = total->g + sums.g.wide(part);
      total->gt = total->gt + sums.gt.wide(part);
      total->t = total->t + sums.t.wide(part);
    }
  }
}

template <class T, class V, class D, bool kWeight, Fetch kFetch>
LANENORM_INLINE PieceSums sums_of_runs(const RowSums& a) {
  using S = typename V::Scalar;
  const S* weight = static_cast<const S*>(a.weight);
  const V mean = V::broadcast(static_cast<S>(a.mean)), rstd = V::broadcast(static_cast<S>(a.rstd));
  const char* const* x = reinterpret_cast<const char* const*>(a.x);
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy);
  if (a.runs == 1 && folds_unwidened<V>(a.length)) {
    const GradientLanes<V> sums =
        superblock_gradient_sums<T, V, kWeight, kFetch>(x[0], dy[0], weight, 0, a.length, mean, rstd, 0, Nothing{});
    return {sums.g.fold(), sums.gt.fold(), sums.t.fold()};
  }
  GradientLanes<D> total{D::zero(), D::zero(), D::zero()};
  for (std::int64_t run = 0; run < a.runs; ++run) {
    add_line_sums<T, V, D, kWeight, kFetch>(x[run], dy[run], kWeight ? weight + run * a.length : nullptr, a.length,
                                            mean, rstd, 0, Nothing{}, &total);
  }
  return {total.g.fold(), total.gt.fold(), total.t.fold()};
}

template <class T, class V, class D>
PieceSums row_sums(const RowSums& a) {
  if (a.weight != nullptr) {
    return a.fetch ? sums_of_runs<T, V, D, true, Fetch::both>(a) : sums_of_runs<T, V, D, true, Fetch::none>(a);
  }
  return a.fetch ? sums_of_runs<T, V, D, false, Fetch::both>(a) : sums_of_runs<T, V, D, false, Fetch::none>(a);
}

// ---- backward: gradients -----------------------------------------------------------------------------------------

// Constants of a backward for every lane.
template <class V>
struct Gradients {
  V mean, rstd, shift, minus_mean_g, minus_mean_gx, factor;
  LANENORM_INLINE explicit Gradients(const GradientConstants<typename V::Scalar>& c)
      : mean(V::broadcast(c.mean)),
        rstd(V::broadcast(c.rstd)),
        shift(V::broadcast(c.shift)),
        minus_mean_g(V::broadcast(c.minus_mean_g)),
        minus_mean_gx(V::broadcast(c.minus_mean_gx)),
        factor(V::broadcast(c.factor)) {}
};

// Whether dx goes past the caches, and how many bytes ahead dy is fetched while it is written; 0: it is not.
struct Writing {
  bool stream;
  std::int64_t far;
};

// Elements begin..end of dx of N rows: kRowBlock or one; with kParameters the sums over the rows of dy * xhat and dy
// are added to sum_dweight and sum_dbias, or with `fresh` begin there. Pointers are copied to where no store can change
// them.
template <int N, class T, class V, bool kWeight, bool kParameters, bool kStream, bool kFetchDy>
LANENORM_INLINE void gradient_rows(const char* const* x_, const char* const* dy_, char* const* dx_, std::int64_t begin,
                                   std::int64_t end, const typename V::Scalar* weight,
                                   const GradientConstants<typename V::Scalar>* c, typename V::Scalar* sum_dweight,
                                   typename V::Scalar* sum_dbias, bool fresh, std::int64_t far) {
  using S = typename V::Scalar;
  constexpr std::int64_t kBytes = sizeof(T);
  static_assert(N == 1 || N == 4);
  if constexpr (kWeight) weight += begin;
  if constexpr (kParameters) {
    sum_dweight += begin;
    sum_dbias += begin;
  }
  const Gradients<V> k[4] = {Gradients<V>(c[0]), Gradients<V>(c[N > 1 ? 1 : 0]), Gradients<V>(c[N > 1 ? 2 : 0]),
                             Gradients<V>(c[N > 1 ? 3 : 0])};
  const char *x[N], *dy[N];
  char* dx[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) {
    x[r] = x_[r] + begin * kBytes;
    dy[r] = dy_[r] + begin * kBytes;
    dx[r] = dx_[r] + begin * kBytes;
  }
  for_vectors<V>(end - begin, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    V w = V::broadcast(S(1));
    if constexpr (kWeight) w = load<S, V>(reinterpret_cast<const char*>(weight + i), part);
    V g[N], xhat[N];
    // All loads before the stores: rows a multiple of 4 KB apart would make each load wait for the store before it.
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if constexpr (kFetchDy) __builtin_prefetch(dy[r] + i * kBytes + far, 0, 2);
      g[r] = load<T, V>(dy[r] + i * kBytes, part);
      xhat[r] = normalize(load<T, V>(x[r] + i * kBytes, part), k[r].mean, k[r].rstd, k[r].shift);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      write<T>(input_gradient(g[r], w, xhat[r], k[r].minus_mean_g, k[r].minus_mean_gx, k[r].factor), dx[r] + i * kBytes,
               part, kStream);
    }
    if constexpr (kParameters) {
      char* pw = reinterpret_cast<char*>(sum_dweight + i);
      char* pb = reinterpret_cast<char*>(sum_dbias + i);
      V dweight = V::zero(), dbias = V::zero();
      if (!fresh) {
        dweight = load<S, V>(pw, part);
        dbias = load<S, V>(pb, part);
      }
      store<S>(dweight + tree_of_products<N>(g, xhat), pw, part);
      store<S>(dbias + tree<N>(g), pb, part);
    }
  });
}

// At most kRowBlock rows, constants[r] for row r, dx to dx[r]; streamed where all of them start on cache lines, or
// reach one after as many elements. At the end of a chunk, and every kFlushRows rows, the float32 sums go to the
// totals.
template <class T, class V, class D, bool kWeight, bool kParameters>
[[gnu::noinline]] void gradient_block(const RowGradient& a, std::int64_t first, std::int64_t rows,
                                      const GradientConstants<typename V::Scalar>* constants, char* const* dx,
                                      Writing writing) {
  using S = typename V::Scalar;
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + first;
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy) + first;
  const S* w = static_cast<const S*>(a.weight);
  S* sum_dweight = static_cast<S*>(a.sum_dweight);
  S* sum_dbias = static_cast<S*>(a.sum_dbias);
  const bool fresh = (a.done + first) % kFlushRows == 0;
  const auto elements = [&](auto stream, std::int64_t begin, std::int64_t end) LANENORM_LAMBDA_INLINE {
    const auto fetched = [&](auto fetch) LANENORM_LAMBDA_INLINE {
      constexpr bool kStream = decltype(stream)::value, kFetchDy = decltype(fetch)::value;
      // Rows that are not summed gain nothing by each other, and the constants of 4 do not fit the registers of AVX2:
      // BN of 1 x 1024 x 14 x 14 77 -> 63 us. (AVX-512, which holds them: 1 x 512 x 28 x 28 loses 6 % one by one.)
      if ((kParameters || V::kRegisters == 1) && rows == kRowBlock) {
        gradient_rows<kRowBlock, T, V, kWeight, kParameters, kStream, kFetchDy>(
            x, dy, dx, begin, end, w, constants, sum_dweight, sum_dbias, fresh, writing.far);
      } else {
        for (std::int64_t r = 0; r < rows; ++r) {
          gradient_rows<1, T, V, kWeight, kParameters, kStream, kFetchDy>(x + r, dy + r, dx + r, begin, end, w,
                                                                          constants + r, sum_dweight, sum_dbias,
                                                                          fresh && r == 0, writing.far);
        }
      }
    };
    writing.far > 0 ? fetched(std::true_type{}) : fetched(std::false_type{});
  };
  const std::int64_t head = writing.stream ? common_head<T>(dx, rows, a.length) : -1;
  if (head != 0) elements(std::false_type{}, 0, head < 0 ? a.length : head);
  if (head >= 0) elements(std::true_type{}, head, a.length);
  if constexpr (kParameters) {
    const bool end = a.last && first + rows == a.rows;
    if (a.dweight != nullptr && (end || (a.done + first + kRowBlock) % kFlushRows == 0)) {
      flush<V, D>(sum_dweight, a.length, a.dweight);
      flush<V, D>(sum_dbias, a.length, a.dbias);
    }
  }
}

// f(gradient_block) for what there is to read and to sum.
template <class T, class V, class D, class F>
LANENORM_INLINE void with_gradient_block(const RowGradient& a, F&& f) {
  const bool weight = a.weight != nullptr, parameters = a.sum_dweight != nullptr;
  if (weight && parameters) {
    f(gradient_block<T, V, D, true, true>);
  } else if (parameters) {
    f(gradient_block<T, V, D, false, true>);
  } else if (weight) {
    f(gradient_block<T, V, D, true, false>);
  } else {
    f(gradient_block<T, V, D, false, false>);
  }
}

template <class T, class V, class D>
void row_gradient(const RowGradient& a) {
  using S = typename V::Scalar;
  const GradientConstants<S>* constants = static_cast<const GradientConstants<S>*>(a.constants);
  if (a.shared) {
    const Gradients<V> k(*constants);
    constexpr std::int64_t kBytes = sizeof(T);
    const V one = V::broadcast(S(1));
    Seam seam;
    BackwardStage<D> stage(a.stream, a.length * kBytes);
    const std::int64_t group = stage.group();
    for (std::int64_t first = 0; first < a.rows; first += group) {
      const int rows = static_cast<int>(a.rows - first < group ? a.rows - first : group);
      char* table[8];
      char* const* dx = stage.lines(a.dx + first, rows, table);
      for (int r = 0; r < rows; ++r) {
        const char* x = static_cast<const char*>(a.x[first + r]);
        const char* dy = static_cast<const char*>(a.dy[first + r]);
        const bool fetch = a.ahead_x != nullptr;
        const char* ahead_x = fetch ? static_cast<const char*>(a.ahead_x[first + r]) : nullptr;
        const char* ahead_dy = fetch ? static_cast<const char*>(a.ahead_dy[first + r]) : nullptr;
        write_line<T, V>(dx[r], a.length, a.stream && dx != table ? &seam : nullptr, false,
                         [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
                           if (fetch) {
                             __builtin_prefetch(ahead_x + i * kBytes, 0, 2);
                             __builtin_prefetch(ahead_dy + i * kBytes, 0, 2);
                           }
                           const V xhat = normalize(load<T, V>(x + i * kBytes, part), k.mean, k.rstd, k.shift);
                           return input_gradient(load<T, V>(dy + i * kBytes, part), one, xhat, k.minus_mean_g,
                                                 k.minus_mean_gx, k.factor);
                         });
      }
    }
    return;
  }
  with_gradient_block<T, V, D>(a, [&](auto gradient) {
    for (std::int64_t first = 0; first < a.rows; first += kRowBlock) {
      const std::int64_t rows = a.rows - first < kRowBlock ? a.rows - first : kRowBlock;
      gradient(a, first, rows, constants + first, reinterpret_cast<char* const*>(a.dx) + first, {a.stream, 0});
    }
  });
}

// Sums of `rows` <= 8 rows, one in each lane; the others are 0. dx of the rows before leaves the stage meanwhile.
// kUnwidened: folds_unwidened().
template <class T, class V, class D, bool kWeight, Fetch kFetch, bool kUnwidened>
[[gnu::noinline]] GradientLanes<D> sums_of_rows(const RowBackward& a, std::int64_t first, int rows, std::int64_t far,
                                                BackwardStage<D>* stage) {
  using L = std::conditional_t<kUnwidened, V, D>;
  using S = typename V::Scalar;
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + first;
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy) + first;
  const S* mean = static_cast<const S*>(a.mean) + first;
  const S* rstd = static_cast<const S*>(a.rstd) + first;
  const S* weight = static_cast<const S*>(a.weight);
  const auto drain = [&]() LANENORM_LAMBDA_INLINE {
    if constexpr (kFetch != Fetch::none) stage->drain(kBlock);  // else nothing is streamed
  };
  L g[8], gt[8], t[8];
  for (int r = 0; r < 8; ++r) {
    GradientLanes<L> sums{L::zero(), L::zero(), L::zero()};
    if (r < rows) {
      const V m = V::broadcast(mean[r]), s = V::broadcast(rstd[r]);
      if constexpr (kUnwidened) {
        sums = superblock_gradient_sums<T, V, kWeight, kFetch>(x[r], dy[r], weight, 0, a.length, m, s, far, Nothing{});
      } else {
        add_line_sums<T, V, D, kWeight, kFetch>(x[r], dy[r], weight, a.length, m, s, far, drain, &sums);
      }
    }
    g[r] = sums.g;
    gt[r] = sums.gt;
    t[r] = sums.t;
    if constexpr (kFetch != Fetch::none) stage->drain_row();
  }
  return {L::fold8(g), L::fold8(gt), L::fold8(t)};
}

template <class D>
using SumRows = GradientLanes<D> (*)(const RowBackward& a, std::int64_t first, int rows, std::int64_t far,
                                     BackwardStage<D>* stage);

// sums_of_rows for what there is to read.
template <class T, class V, class D, bool kWeight, bool kUnwidened>
SumRows<D> sums_of_rows_for(Fetch fetch) {
  switch (fetch) {
    case Fetch::x: return sums_of_rows<T, V, D, kWeight, Fetch::x, kUnwidened>;
    case Fetch::both: return sums_of_rows<T, V, D, kWeight, Fetch::both, kUnwidened>;
    default: return sums_of_rows<T, V, D, kWeight, Fetch::none, kUnwidened>;
  }
}
template <class T, class V, class D>
SumRows<D> sums_of_rows_for(bool weight, std::int64_t length, Fetch fetch) {
  if (folds_unwidened<V>(length)) {
    return weight ? sums_of_rows_for<T, V, D, true, true>(fetch) : sums_of_rows_for<T, V, D, false, true>(fetch);
  }
  return weight ? sums_of_rows_for<T, V, D, true, false>(fetch) : sums_of_rows_for<T, V, D, false, false>(fetch);
}

// Constants of `rows` <= 8 rows from their sums; with per_row their dweight and dbias too.
template <class T, class V, class D>
LANENORM_INLINE void finish_gradients(const RowBackward& a, std::int64_t first, int rows, const GradientLanes<D>& sums,
                                      GradientConstants<typename V::Scalar>* constants) {
  using S = typename V::Scalar;
  const S* mean = static_cast<const S*>(a.mean) + first;
  const S* rstd = static_cast<const S*>(a.rstd) + first;
  const S* weight = static_cast<const S*>(a.weight);
  const GradientTerms<D> terms = gradient_terms(sums.g, sums.gt, sums.t, D::broadcast(static_cast<double>(a.length)));
  alignas(64) S low[8], minus_mean_g[8], minus_mean_gx[8];
  terms.minus_low.template store<S>(low);
  terms.minus_mean_g.template store<S>(minus_mean_g);
  terms.minus_mean_gx.template store<S>(minus_mean_gx);
  for (int r = 0; r < rows; ++r) constants[r] = {mean[r], rstd[r], low[r], minus_mean_g[r], minus_mean_gx[r], rstd[r]};
  if (!a.per_row) return;
  for (int r = 0; weight != nullptr && r < rows; ++r) {
    constants[r].factor = static_cast<S>(static_cast<double>(rstd[r]) * static_cast<double>(weight[first + r]));
  }
  if (a.dweight != nullptr) {
    terms.gx.template store<double>(a.dweight + first, rows);
    sums.g.template store<double>(a.dbias + first, rows);
  }
}

template <class T, class V, class D>
void row_backward(const RowBackward& a) {
  using S = typename V::Scalar;
  constexpr std::int64_t kMost = 8 * kShortSets;
  GradientConstants<S> constants[kMost];
  const std::int64_t row_bytes = a.length * static_cast<std::int64_t>(sizeof(T)), fitting = kGroupBytes / 2 / row_bytes;
  const std::int64_t group = fitting >= kMost ? kMost : fitting >= 8 ? 8 : kRowBlock;
  BackwardStage<D> stage(a.stream, row_bytes, a.dx[0]);
  const std::int64_t group_bytes = group * row_bytes;
  const bool split = a.stream && row_bytes >= 512 && group_bytes <= kLargestGroup;
  const std::int64_t far = !split ? 0 : group_bytes < kFarAhead ? kFarAhead : 2 * group_bytes;
  const auto sum = sums_of_rows_for<T, V, D>(a.weight != nullptr && !a.per_row, a.length,
                                             !a.stream ? Fetch::none
                                             : split   ? Fetch::x
                                                       : Fetch::both);
  RowGradient block{};
  block.x = a.x;
  block.dy = a.dy;
  block.dx = a.dx;
  block.rows = a.rows;
  block.length = a.length;
  block.stream = a.stream;
  if (!a.per_row) {  // else weight is in the constants, and the sums over rows are not wanted
    block.weight = a.weight;
    block.sum_dweight = a.sum_dweight;
    block.sum_dbias = a.sum_dbias;
    block.dweight = a.dweight;
    block.dbias = a.dbias;
    block.done = a.done;
    block.last = a.last;
  }
  with_gradient_block<T, V, D>(block, [&](auto gradient) {
    for (std::int64_t first = 0; first < a.rows; first += group) {
      const int rows = static_cast<int>(a.rows - first < group ? a.rows - first : group);
      GradientLanes<D> sums[kShortSets];
      for_sets<kShortSets>(rows, [&](int set, int row, int of_set)
                                     LANENORM_LAMBDA_INLINE { sums[set] = sum(a, first + row, of_set, far, &stage); });
      for_sets<kShortSets>(rows, [&](int set, int row, int of_set) LANENORM_LAMBDA_INLINE {
        finish_gradients<T, V, D>(a, first + row, of_set, sums[set], constants + row);
      });
      for_sets<kShortSets>(rows, [&](int, int row, int of_set) LANENORM_LAMBDA_INLINE {
        char* table[8];
        char* const* dx = stage.lines(a.dx + first + row, of_set, table);
        const Writing writing{a.stream && dx != table, far};
        for (int r = 0; r < of_set; r += kRowBlock) {
          const int of_block = of_set - r < kRowBlock ? of_set - r : kRowBlock;
          gradient(block, first + row + r, of_block, constants + row + r, dx + r, writing);
        }
      });
    }
  });
}

template <class S, class D>
void add_partial_sums(const PartialSums& a) {
  for_vectors<D>(a.count, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    char* total = reinterpret_cast<char*>(a.totals + i);
    D sum = load<double, D>(total, part);
    const char* partial = reinterpret_cast<const char*>(static_cast<const S*>(a.partials) + i);
    for (std::int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      sum = sum + load<S, D>(partial, part);
      partial += a.pitch * static_cast<std::int64_t>(sizeof(S));
    }
    store<double>(sum, total, part);
  });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
