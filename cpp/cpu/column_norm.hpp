// Columns: statistics down the columns of a matrix; a lane is a column, so nothing is folded across lanes.
//
// BN of (N, C) and of channels-last data, LN over a leading or middle axis, BN of the smallest planes (every position
// of a plane is a column). Formulas as in row_norm.hpp.
//
// Passes over memory: moments read x, apply reads x and writes y: 3s, 2s where the driver finds a tile of columns that
// stays in cache between the two. Backward 5s and 3s. Within a pass 8 or 4 lines are read side by side, one vector of
// columns at a time; what is known of each column (pivot, sums) lives in L1 meanwhile. Lines of a few whole vectors
// that stay in cache are written one after another (apply_narrow, gradient_narrow).
//
// The order of operations, where it differs from blocks.hpp:
//   float32  (and 16-bit) A column of kLongColumn rows or more adds d = x - q and d^2 in float32, by trees of 8 rows,
//            over a superblock of 64 rows, whose pivot q is the mean of the superblock before it (the first: of
//            kPivotRows rows), rounded to 2^-8 of the deviation. Superblocks join sums about the first pivot in double.
//            Where the squares about the pivots exceed m2 by more than kSpread allows, the column is swept again in
//            double. 784 x 512: moments 49 -> 37 us against double throughout, in which the conversions take half
//            the time. Worst 2.8 u of rstd (short columns 2.3).
//            A shorter column adds d = x - x0 and d^2 row by row in double: it has one lane where a row has sixteen
//            that average, and blocks in float32 left up to 4.1 u of columns of 8 rows.
//   float64  a block is 8 rows, a superblock 64 rows with a pivot per column from its first block.
// Superblocks of a piece are merged in index order, pieces as a binary tree of neighbours (column_driver.cpp).
//   sums of a backward: trees of 4 rows (kRowBlock), float32 sums of kFlushRows rows, and double.
//
// Longer than 300 lines because forward and backward read as one method, as in row_norm.hpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cpu/blocks.hpp"
#include "cpu/kernels.hpp"
#include "cpu/streams.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr std::int64_t kFetchBytes = 4096;
inline constexpr std::int64_t kLongColumn = 128;  // rows, float32: shorter columns are swept in double
inline constexpr std::int64_t kPivotRows = 16;    // whose mean is the first pivot of a long column

// Several rows are read side by side, which the processor does not take for streams: the rows after them are fetched by
// hand. Moments of 100352 x 256 float32: 6.6 -> 2.6 ns a vector, gradient 12.6 -> 6.8; copy 5.4.
LANENORM_INLINE void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// How many rows ahead: the next ones, at least 4 KB further.
template <int N, class T>
LANENORM_INLINE std::int64_t rows_ahead(std::int64_t columns) {
  const std::int64_t bytes = columns * static_cast<std::int64_t>(sizeof(T));
  return N * ((kFetchBytes + N * bytes - 1) / (N * bytes));
}

// What is fetched while N rows of y or dx are streamed: that many rows, or bytes, from those that are read.
struct Ahead {
  bool fetch;
  std::int64_t rows, bytes;
};

// a: ColumnApply or ColumnGradient.
template <int N, class T, class A>
LANENORM_INLINE Ahead ahead_of(const A& a, std::int64_t row, bool stream) {
  if (a.next > 0) return {stream, 0, a.next};
  const std::int64_t rows = rows_ahead<N, T>(a.columns);
  return {stream && row + N + rows <= a.rows, rows, 0};
}

// N lines of a table, whose pointers a compiler reads again after each store. Where nothing is fetched beside them they
// are copied to registers: inference of 784 x 512 45 -> 42 us, sums of a backward 0.89..0.98 of the time. With what is
// fetched there are too many: 65536 x 100, streamed, 1.22 ms, with copies 1.46.
template <int N, bool kCopy, class P>
struct LinesOf {
  P const* table;
  P own[N];
  LANENORM_INLINE explicit LinesOf(P const* lines) : table(lines) {
    LANENORM_UNROLL
    for (int r = 0; r < N && kCopy; ++r) own[r] = lines[r];
  }
  LANENORM_INLINE P operator[](std::int64_t r) const { return kCopy ? own[r] : table[r]; }
  LANENORM_INLINE P ahead(std::int64_t r) const { return table[r]; }
};

// ---- moments -----------------------------------------------------------------------------------------------------

// f(Count<N>, whether to fetch, row, rows ahead) for the rows begin..end, N at a time.
template <class T, class F>
LANENORM_INLINE void for_row_blocks(const ColumnMoments& a, std::int64_t begin, std::int64_t end, std::int64_t columns,
                                    const F& f) {
  const std::int64_t distance = rows_ahead<kBlock, T>(columns);
  std::int64_t row = begin;
  for (; row + kBlock <= end; row += kBlock) {
    if (a.ahead && row + kBlock + distance <= a.rows) {
      f(Count<kBlock>{}, std::true_type{}, row, distance);
    } else {
      f(Count<kBlock>{}, std::false_type{}, row, std::int64_t{0});
    }
  }
  for (; row < end; ++row) f(Count<1>{}, std::false_type{}, row, std::int64_t{0});
}

// In double, for short columns and for those that float32 would lose digits of: N rows of `columns` columns join their
// sums of d and d^2. at: bytes before the first of them. first: these are the first rows.
template <int N, bool kAhead, class T, class V, class D>
LANENORM_INLINE void add_rows_in_double(const char* const* lines, const char* pivots, std::int64_t at,
                                        std::int64_t columns, bool first, std::int64_t ahead, double* sums,
                                        double* squares) {
  for_vectors<V>(columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const std::int64_t here = at + j * static_cast<std::int64_t>(sizeof(T));
    D pivot[2], sum[2], square[2];
    load_wide<T, V>(pivots + here, part, pivot);
    LANENORM_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] = first ? D::zero() : load_lanes<D>(sums + j + 8 * half);
      square[half] = first ? D::zero() : load_lanes<D>(squares + j + 8 * half);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      D d[2];
      if constexpr (kAhead) fetch(lines[r + ahead] + here);
      load_wide<T, V>(lines[r] + here, part, d);
      LANENORM_UNROLL
      for (int half = 0; half < 2; ++half) {
        d[half] = d[half] - pivot[half];
        sum[half] = sum[half] + d[half];
        square[half] = fma(d[half], d[half], square[half]);
      }
    }
    LANENORM_UNROLL
    for (int half = 0; half < 2; ++half) {
      store_lanes(sum[half], sums + j + 8 * half);
      store_lanes(square[half], squares + j + 8 * half);
    }
  });
}

// The columns begin .. begin + columns of a; begin is a multiple of a vector.
template <class T, class V, class D>
LANENORM_INLINE void column_moments_in_double(const ColumnMoments& a, std::int64_t begin, std::int64_t columns,
                                              double* moments, std::int64_t pitch) {
  const char* const* lines = reinterpret_cast<const char* const*>(a.x);
  const std::int64_t at = begin * static_cast<std::int64_t>(sizeof(T));
  double* sums = moments + pitch;
  double* squares = moments + 3 * pitch;
  const auto add = [&](auto n, auto fetching, std::int64_t row, std::int64_t ahead) LANENORM_LAMBDA_INLINE {
    add_rows_in_double<decltype(n)::value, decltype(fetching)::value, T, V, D>(lines + row, lines[0], at, columns,
                                                                               row == 0, ahead, sums, squares);
  };
  for_row_blocks<T>(a, 0, a.rows, columns, add);
  const D count = D::broadcast(static_cast<double>(a.rows));
  for_vectors<V>(columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    D pivot[2];
    load_wide<T, V>(lines[0] + at + j * static_cast<std::int64_t>(sizeof(T)), part, pivot);
    LANENORM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const std::int64_t k = j + 8 * half;
      store_moments(moments_about(pivot[half], load_lanes<D>(sums + k), load_lanes<D>(squares + k), count, D::zero()),
                    moments, pitch, k);
    }
  });
}

// In float32: N rows join the sums over a superblock of d = x - pivot, and of d^2 or |d|. Pointers of narrow rows are
// not copied: moments of 784 x 512, 200 x 512, 3136 x 128, 12544 x 64 0.94, 0.90, 0.99, 1.10 of the time with copies.
template <int N, bool kAhead, class T, class V, bool kSquares>
LANENORM_INLINE void add_rows_float32(const char* const* lines, std::int64_t columns, const char* pivots, bool first,
                                      std::int64_t ahead, typename V::Scalar* sums, typename V::Scalar* seconds) {
  using Pivot = std::conditional_t<kSquares, typename V::Scalar, T>;  // of a superblock, or its first row
  const auto add = [&](auto copy) LANENORM_LAMBDA_INLINE {
    const LinesOf<N, decltype(copy)::value, const char*> x(lines);
    for_vectors<V>(columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
      const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
      const V pivot = load<Pivot, V>(pivots + j * static_cast<std::int64_t>(sizeof(Pivot)), part);
      V d[N];
      LANENORM_UNROLL
      for (int r = 0; r < N; ++r) {
        if constexpr (kAhead) fetch(x.ahead(r + ahead) + at);
        d[r] = load<T, V>(x[r] + at, part) - pivot;
      }
      V sum = tree<N>(d), second;
      if constexpr (kSquares) {
        second = sum_of_squares<N>(d);
      } else {
        LANENORM_UNROLL
        for (int r = 0; r < N; ++r) d[r] = abs(d[r]);
        second = tree<N>(d);
      }
      if (!first) {
        sum = sum + load_lanes<V>(sums + j);
        second = second + load_lanes<V>(seconds + j);
      }
      store_lanes(sum, sums + j);
      store_lanes(second, seconds + j);
    });
  };
  if constexpr (!kAhead) {
    if (columns > kNarrowVectors * V::kLanes) return add(std::true_type{});
  }
  add(std::false_type{});
}

template <class T, class V, class D>
LANENORM_INLINE void column_moments_float32(const ColumnMoments& a) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  double *pivots = a.moments, *sums = pivots + pitch, *spreads = sums + pitch, *squares = spreads + pitch;
  S* own = static_cast<S*>(a.scratch);
  S* own_sums = own + pitch;
  S* own_squares = own_sums + pitch;

  const char* const* lines = reinterpret_cast<const char* const*>(a.x);
  const std::int64_t columns = a.columns;
  const auto add_magnitudes = [&](auto n, auto fetching, std::int64_t row, std::int64_t ahead) LANENORM_LAMBDA_INLINE {
    add_rows_float32<decltype(n)::value, decltype(fetching)::value, T, V, false>(
        lines + row, columns, lines[0], row == 0, ahead, own_sums, own_squares);
  };
  for_row_blocks<T>(a, 0, kPivotRows, columns, add_magnitudes);
  for_vectors<V>(a.columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const V inverse = V::broadcast(S(1) / S(kPivotRows));
    const V pivot = pivot_from(load<T, V>(lines[0] + j * static_cast<std::int64_t>(sizeof(T)), part),
                               load_lanes<V>(own_sums + j) * inverse, load_lanes<V>(own_squares + j) * inverse);
    store_lanes(pivot, own + j);
    LANENORM_UNROLL
    for (int half = 0; half < 2; ++half) store_lanes(pivot.wide(half), pivots + j + 8 * half);
  });

  for (std::int64_t begin = 0; begin < a.rows; begin += kSuperblock) {
    const std::int64_t end = begin + kSuperblock < a.rows ? begin + kSuperblock : a.rows;
    const auto add_squares = [&](auto n, auto fetching, std::int64_t row, std::int64_t ahead) LANENORM_LAMBDA_INLINE {
      add_rows_float32<decltype(n)::value, decltype(fetching)::value, T, V, true>(
          lines + row, columns, reinterpret_cast<const char*>(own), row == begin, ahead, own_sums, own_squares);
    };
    for_row_blocks<T>(a, begin, end, columns, add_squares);
    const D count = D::broadcast(static_cast<double>(end - begin));
    for_vectors<V>(a.columns, [&](std::int64_t j, auto) LANENORM_LAMBDA_INLINE {
      const V pivot = load_lanes<V>(own + j), sum = load_lanes<V>(own_sums + j),
              square = load_lanes<V>(own_squares + j);
      LANENORM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const std::int64_t k = j + 8 * half;
        const D shift = pivot.wide(half) - load_lanes<D>(pivots + k), part = sum.wide(half);
        D total = fma(count, shift, part), spread = square.wide(half);
        D squared = fma(shift, part + total, spread);  // d^2 + 2 shift d + shift^2, summed
        if (begin > 0) {
          total = total + load_lanes<D>(sums + k);
          spread = spread + load_lanes<D>(spreads + k);
          squared = squared + load_lanes<D>(squares + k);
        }
        store_lanes(total, sums + k);
        store_lanes(spread, spreads + k);
        store_lanes(squared, squares + k);
      }
      const V inverse = V::broadcast(S(1) / S(kSuperblock));  // the next pivot is the mean of this superblock
      store_lanes(pivot_from(pivot, sum * inverse, sqrt(square * inverse)), own + j);
    });
  }

  const D count = D::broadcast(static_cast<double>(a.rows));
  for (std::int64_t j = 0; j < a.columns; j += V::kLanes) {
    unsigned beyond = 0;
    for (int half = 0; half < 2; ++half) {
      const std::int64_t k = j + 8 * half;
      const Moments<D> m = moments_about(load_lanes<D>(pivots + k), load_lanes<D>(sums + k), load_lanes<D>(squares + k),
                                         count, D::zero());
      beyond |= beyond_spread(load_lanes<D>(spreads + k), m.m2) << 8 * half;
      store_moments(m, a.moments, pitch, k);
    }
    const int lanes = static_cast<int>(a.columns - j < V::kLanes ? a.columns - j : V::kLanes);
    if ((beyond & first_lanes<V>(lanes)) == 0) continue;
    alignas(64) double again[4 * 16];
    column_moments_in_double<T, V, D>(a, j, lanes, again, 16);
    for (int i = 0; i < lanes; ++i) {
      if ((beyond >> i & 1) == 0) continue;
      for (int array = 0; array < 4; ++array) a.moments[array * pitch + j + i] = again[16 * array + i];
    }
  }
}

// float64: 8 rows of one vector of columns.
template <class D, bool kScaled, class P>
struct RowsOfColumn {
  const char* const* line;
  std::int64_t offset;  // bytes
  D scale;
  P part;  // of the columns; the last vector of a line may be a part
  LANENORM_INLINE D operator()(std::int64_t row, Full) const {
    const D x = load<double, D>(line[row] + offset, part);
    if constexpr (kScaled) return x * scale;
    return x;
  }
};

// The pivot of each lane from N rows; divided by 8 also where there are fewer, which keeps it a multiple of 1/8.
template <int N, class D, class X>
LANENORM_INLINE D column_pivot(const X& x) {
  const D x0 = x(0, Full{});
  D d[N], magnitude[N];
  LANENORM_UNROLL
  for (int i = 0; i < N; ++i) {
    d[i] = x(i, Full{}) - x0;
    magnitude[i] = abs(d[i]);
  }
  const D eighth = D::broadcast(1.0 / kBlock);
  return pivot_from(x0, tree<N>(d) * eighth, tree<N>(magnitude) * eighth);
}

// State of a superblock, one value per column.
struct ColumnState {
  double *pivot, *sum, *m2;
};

// Block k of a superblock: N rows of all columns.
template <int N, class D, bool kScaled>
LANENORM_INLINE void column_block(const char* const* lines, std::int64_t columns, int k, D scale,
                                  const ColumnState& state) {
  for_vectors<D>(columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const RowsOfColumn<D, kScaled, decltype(part)> x{lines, j * 8, scale, part};
    D pivot, mean;
    if (k == 0) {
      pivot = column_pivot<N, D>(x);
      store_lanes(pivot, state.pivot + j);
    } else {
      pivot = load_lanes<D>(state.pivot + j);
    }
    Lanes<D> lanes = block<N, D>(x, pivot, Full{}, &mean);
    if (k > 0) {
      Lanes<D> before{load_lanes<D>(state.sum + j), load_lanes<D>(state.m2 + j)};
      add_block(&before, k, lanes, mean, D::broadcast(N));
      lanes = before;
    }
    store_lanes(lanes.sum, state.sum + j);
    store_lanes(lanes.m2, state.m2 + j);
  });
}

template <class D, bool kScaled>
LANENORM_INLINE void column_moments_float64(const ColumnMoments& a) {
  const std::int64_t pitch = padded(a.columns);
  double* scratch = static_cast<double*>(a.scratch);
  const ColumnState state{scratch, scratch + pitch, scratch + 2 * pitch};
  const D scale = D::broadcast(a.scale);
  const char* const* lines = reinterpret_cast<const char* const*>(a.x);
  for (std::int64_t first = 0; first < a.rows; first += kSuperblock) {
    const std::int64_t rows = a.rows - first < kSuperblock ? a.rows - first : kSuperblock;
    std::int64_t row = 0;
    int k = 0;
    for (; row + kBlock <= rows; row += kBlock, ++k) {
      column_block<kBlock, D, kScaled>(lines + first + row, a.columns, k, scale, state);
    }
    if (row < rows) {
      with_vectors(static_cast<int>(rows - row), [&](auto n) LANENORM_LAMBDA_INLINE {
        column_block<decltype(n)::value, D, kScaled>(lines + first + row, a.columns, k, scale, state);
      });
    }
    for (std::int64_t j = 0; j < pitch; j += D::kLanes) {
      Moments<D> next{load_lanes<D>(state.pivot + j), load_lanes<D>(state.sum + j), D::zero(),
                      load_lanes<D>(state.m2 + j)};
      if (first > 0) {
        next = merge(load_moments<D>(a.moments, pitch, j), D::broadcast(static_cast<double>(first)), next,
                     D::broadcast(static_cast<double>(rows)));
      }
      store_moments(next, a.moments, pitch, j);
    }
  }
}

// kScaled: for statistics out of range. float32 data never leave the range of double.
template <class T, class V, class D, bool kScaled>
void column_moments(const ColumnMoments& a) {
  if constexpr (sizeof(T) == 8) {
    column_moments_float64<D, kScaled>(a);
  } else if (kScaled || a.rows < kLongColumn) {
    column_moments_in_double<T, V, D>(a, 0, a.columns, a.moments, padded(a.columns));
  } else {
    column_moments_float32<T, V, D>(a);
  }
}

template <class D>
void column_merge(const ColumnMerge& a) {
  const std::int64_t pitch = padded(a.columns);
  for (std::int64_t j = 0; j < pitch; j += D::kLanes) {
    store_moments(merge(load_moments<D>(a.a, pitch, j), D::broadcast(a.count_a), load_moments<D>(a.b, pitch, j),
                        D::broadcast(a.count_b)),
                  a.a, pitch, j);
  }
}

// Two passes over the columns of a statistic: their mean about the first one's pivot, which an outlier may have moved
// far, and then the sums about a value near that mean.
template <class D>
void column_fold(const ColumnFold& a) {
  const std::int64_t pitch = padded(a.columns), folded_pitch = padded(a.columns / a.fold);
  const D count = D::broadcast(a.count), inverse = D::broadcast(1.0 / a.count);
  const double all = a.count * static_cast<double>(a.fold);
  for (std::int64_t s = 0; s < a.columns / a.fold; ++s) {
    const double* m = a.moments + s * a.fold;
    // f(sum about the origin, m2) of the columns j..j+7; those beyond the statistic are 0.
    const auto visit = [&](double origin, auto f) LANENORM_LAMBDA_INLINE {
      for (std::int64_t j = 0; j < a.fold; j += D::kLanes) {
        const int lanes = static_cast<int>(a.fold - j < D::kLanes ? a.fold - j : D::kLanes);
        const auto column = [&](int part) { return D::template load<double>(m + part * pitch + j, lanes); };
        f(keep(fma(column(0) - D::broadcast(origin), count, column(1) + column(2)), lanes), column(3));
      }
    };
    D total = D::zero();
    visit(m[0], [&](D sum, D) LANENORM_LAMBDA_INLINE { total = total + sum; });
    const double mean = total.fold() / all;
    const double origin = coarse_pivot(m[0], mean, (mean < 0 ? -mean : mean) * kPivotGrain<double>);
    D squares = total = D::zero();
    visit(origin, [&](D sum, D m2) LANENORM_LAMBDA_INLINE {
      total = total + sum;
      squares = squares + fma(sum * inverse, sum, m2);  // divisions took a seventh of a forward
    });
    const Moments<double> folded = moments_about(origin, total.fold(), squares.fold(), all, 0.0);
    a.folded[s] = folded.pivot;
    a.folded[folded_pitch + s] = folded.sum;
    a.folded[2 * folded_pitch + s] = folded.low;
    a.folded[3 * folded_pitch + s] = folded.m2;
  }
}

// In place, from the front of the array; the last statistic first.
template <class V>
void column_spread(const ColumnSpread& a) {
  using S = typename V::Scalar;
  S* values = static_cast<S*>(a.values);
  for (std::int64_t s = a.statistics - 1; s >= 0; --s) {
    const V value = V::broadcast(values[s]);
    for_vectors<V>(a.fold, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
      store<S>(value, reinterpret_cast<char*>(values + s * a.fold + j), part);
    });
  }
}

// finish() of formulas.hpp, eight statistics at a time. Whether all of them are in range.
template <class S, class D>
bool column_finish(const ColumnFinish& a) {
  const std::int64_t pitch = padded(a.columns);
  bool all = true;
  for (std::int64_t j = 0; j < a.columns; j += D::kLanes) {
    const Finished<D> f =
        finish<S>(load_moments<D>(a.moments, pitch, j), D::broadcast(a.count), D::broadcast(a.eps), D::broadcast(1.0));
    f.mean.template store<S>(static_cast<S*>(a.mean) + j);
    f.rstd.template store<S>(static_cast<S*>(a.rstd) + j);
    f.rstd_low.template store<S>(static_cast<S*>(a.rstd_low) + j);
    f.shift.template store<S>(static_cast<S*>(a.shift) + j);
    all &= all_lanes<D>(in_range_lanes<S>(f.variance, D::broadcast(a.eps)), a.columns - j);
  }
  return all;
}

// fold_weight() of formulas.hpp, eight statistics at a time. Whether all of them may be folded.
template <class S, class D>
bool column_weight(const ColumnWeight& a) {
  bool all = true;
  for (std::int64_t j = 0; j < a.statistics; j += D::kLanes) {
    const int lanes = static_cast<int>(a.statistics - j < D::kLanes ? a.statistics - j : D::kLanes);
    const auto of = [&](const void* p) { return D::template load<S>(static_cast<const S*>(p) + j, lanes); };
    const D weight = a.weight == nullptr ? D::broadcast(1.0) : of(a.weight);
    const FoldedWeight<D> f = fold_weight(of(a.rstd), of(a.rstd_low), of(a.shift), weight);
    f.factor.template store<S>(static_cast<S*>(a.factor) + j);
    f.shift.template store<S>(static_cast<S*>(a.folded_shift) + j);
    all &= all_lanes<D>(foldable_lanes<S>(f.factor, weight), lanes);
  }
  return all;
}

// ---- apply -------------------------------------------------------------------------------------------------------

// Rows that start beside a cache line (as an out= of NumPy's does) are streamed between their ends from this size on,
// bytes: two rows share a line there. Inference of 64 channels, not streamed and so: 2.4 and 3.5 ms; of 128 8.5
// and 5.9; of 256 19.0 and 9.8.
inline constexpr std::int64_t kStreamedRow = 512;

// The element from which on rows are streamed, or -1.
template <class T>
LANENORM_INLINE std::int64_t streamed_from(char* const* rows, std::int64_t count, std::int64_t columns) {
  const std::int64_t head = common_head<T>(rows, count, columns);
  return head > 0 && columns * static_cast<std::int64_t>(sizeof(T)) < kStreamedRow ? -1 : head;
}

// Rows that share one load of the constants: 4 rows of BN take 8 loads and 4 stores instead of 20 and 4. A call on
// (32, 25088) in cache went from 4.8 to 3.1 copies.
inline constexpr int kApplyRows = 4;

// Whether rows lie a multiple of 4 KB apart. Those and the rows of y meet in one set of L1, which holds 8 lines, two
// for each vector that lies in two, so that an apply takes two rows side by side: inference of 196 x 1024 29 -> 23 us,
// 1568 x 1024 255 -> 214.
template <class A>
LANENORM_INLINE bool pages_apart(const A& a) {
  return a.rows > 1 && (static_cast<const char*>(a.x[1]) - static_cast<const char*>(a.x[0])) % 4096 == 0;
}
// Whether they are as long, too. Only then does it pay where y (dx) is streamed: forward of 8192 x 1024 0.84 of the
// time, 6272 x 1024 0.89, backward 0.97; of 16384 x 2048, in two tiles, 1.15.
template <class T, class A>
LANENORM_INLINE bool pages_follow(const A& a) {
  const std::int64_t row = a.columns * static_cast<std::int64_t>(sizeof(T));
  return pages_apart(a) && static_cast<const char*>(a.x[1]) - static_cast<const char*>(a.x[0]) == row;
}

enum class ApplyOf { layer_norm, batch_norm, inference };

// The constants of a vector of columns, and of a row where weight and bias are its own (layer_norm).
template <class V, ApplyOf kApply, bool kGeneral>
struct ColumnConstants {
  using S = typename V::Scalar;
  V mean, rstd, rstd_low, shift, scale, weight, bias;
  LANENORM_INLINE V operator()(V x, S row_weight, S row_bias) const {
    if constexpr (kApply == ApplyOf::layer_norm) {
      if constexpr (kGeneral) x = x * scale;
      return fma(normalize(x, mean, rstd, rstd_low, shift), V::broadcast(row_weight), V::broadcast(row_bias));
    } else if constexpr (kApply == ApplyOf::inference) {
      const V d = x - mean;
      return kGeneral ? fma(d * rstd, weight, bias) : fma(d, rstd, bias);
    } else if constexpr (kGeneral) {
      return normalize_affine(x, scale, mean, rstd, shift, weight, bias);
    } else {
      return fma(x - mean, rstd, shift) + bias;
    }
  }
};

// Those of a.columns columns. Pointers are read once: y might point to them, as far as a compiler knows.
template <class V, ApplyOf kApply, bool kGeneral>
struct ConstantsOfColumns {
  using S = typename V::Scalar;
  const S *mean, *rstd, *rstd_low, *shift, *scale, *weight, *bias;
  LANENORM_INLINE explicit ConstantsOfColumns(const ColumnApply& a)
      : mean(static_cast<const S*>(a.mean)),
        rstd(static_cast<const S*>(a.rstd)),
        rstd_low(static_cast<const S*>(a.rstd_low)),
        shift(static_cast<const S*>(a.shift)),
        scale(static_cast<const S*>(a.scale)),
        weight(static_cast<const S*>(a.weight)),
        bias(static_cast<const S*>(a.bias)) {}
  template <class P>
  LANENORM_INLINE ColumnConstants<V, kApply, kGeneral> at(std::int64_t j, P part) const {
    const auto of = [&](const S* p, bool wanted) LANENORM_LAMBDA_INLINE {
      return wanted ? load<S, V>(reinterpret_cast<const char*>(p + j), part) : V::zero();
    };
    constexpr bool kLayer = kApply == ApplyOf::layer_norm, kInference = kApply == ApplyOf::inference;
    return {of(mean, true),
            of(rstd, true),
            of(rstd_low, kLayer),
            of(shift, !kInference),
            of(scale, kGeneral && !kInference),
            of(weight, kGeneral && !kLayer),
            of(bias, !kLayer)};
  }
};

template <int N, bool kStream, class T, class V, ApplyOf kApply, bool kGeneral>
LANENORM_INLINE void apply_rows(const ColumnApply& a, std::int64_t row) {
  using S = typename V::Scalar;
  const ConstantsOfColumns<V, kApply, kGeneral> columns(a);
  const LinesOf<N, !kStream, const char*> x(reinterpret_cast<const char* const*>(a.x) + row);
  const LinesOf<N, !kStream, char*> y(reinterpret_cast<char* const*>(a.y) + row);
  const std::int64_t head = kStream ? streamed_from<T>(y.table, N, a.columns) : -1;
  const Ahead ahead = kStream ? ahead_of<N, T>(a, row, head >= 0) : Ahead{};
  const S* weight = kApply == ApplyOf::layer_norm ? columns.weight + row : nullptr;
  const S* bias = kApply == ApplyOf::layer_norm ? columns.bias + row : nullptr;
  for_vectors_streamed<V>(head, a.columns, [&](std::int64_t j, auto part, bool stream) LANENORM_LAMBDA_INLINE {
    const auto constants = columns.at(j, part);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    // All loads before the stores: rows a multiple of 4 KB apart would make each load wait for the store before it.
    V v[N];
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && ahead.fetch) fetch(x.ahead(r + ahead.rows) + at + ahead.bytes);
      v[r] = load<T, V>(x[r] + at, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      const bool layer = kApply == ApplyOf::layer_norm;
      write<T>(constants(v[r], layer ? weight[r] : S(0), layer ? bias[r] : S(0)), y[r] + at, part, stream);
    }
  });
}

// A line of rows of K vectors, one behind the other. The processor takes a walk through memory for the stream that it
// is, and needs no fetching: from one array to another in L3 it takes 4.9 cycles a vector, as a copy does, with 4 rows
// side by side 5.4, and a table of rows costs 0.5 more. Constants that do not fit the registers (of AVX2) are read from
// the stack. Inference of 12544 x 64 99 -> 78 us (AVX2 93 -> 75), of 4096 x 16 13 -> 7 us.
template <int K, class T, class V, ApplyOf kApply>
LANENORM_INLINE void apply_narrow(const ColumnApply& a) {
  constexpr std::int64_t kVectorBytes = V::kLanes * static_cast<std::int64_t>(sizeof(T));
  const ConstantsOfColumns<V, kApply, false> columns(a);
  ColumnConstants<V, kApply, false> constants[K];
  LANENORM_UNROLL
  for (int k = 0; k < K; ++k) constants[k] = columns.at(k * V::kLanes, Full{});
  const char* x = static_cast<const char*>(a.x[0]);
  char* y = static_cast<char*>(a.y[0]);
  for (const char* end = x + a.columns * static_cast<std::int64_t>(sizeof(T)); x < end; x += K * kVectorBytes) {
    LANENORM_UNROLL
    for (int k = 0; k < K; ++k) {
      store<T>(constants[k](load<T, V>(x + k * kVectorBytes, Full{}), 0, 0), y + k * kVectorBytes, Full{});
    }
    y += K * kVectorBytes;
  }
}

template <class T, class V, ApplyOf kApply, bool kGeneral>
LANENORM_INLINE void apply_lines(const ColumnApply& a) {
  if constexpr (kApply != ApplyOf::layer_norm && !kGeneral) {
    if (a.period < a.columns) {
      return with_vectors(static_cast<int>(a.period / V::kLanes), [&](auto vectors) LANENORM_LAMBDA_INLINE {
        apply_narrow<decltype(vectors)::value, T, V, kApply>(a);
      });
    }
  }
  const auto rows = [&](auto side_by_side, auto stream) LANENORM_LAMBDA_INLINE {
    constexpr int N = decltype(side_by_side)::value;
    constexpr bool kStream = decltype(stream)::value;
    std::int64_t row = 0;
    for (; row + N <= a.rows; row += N) apply_rows<N, kStream, T, V, kApply, kGeneral>(a, row);
    for (; row < a.rows; ++row) apply_rows<1, kStream, T, V, kApply, kGeneral>(a, row);
  };
  const bool two = a.stream ? pages_follow<T>(a) : pages_apart(a);
  const auto written = [&](auto stream) LANENORM_LAMBDA_INLINE {
    two ? rows(Count<2>{}, stream) : rows(Count<kApplyRows>{}, stream);
  };
  a.stream ? written(std::true_type{}) : written(std::false_type{});
}

template <class T, class V>
void column_apply(const ColumnApply& a) {
  if (a.per_row) {
    a.scale != nullptr ? apply_lines<T, V, ApplyOf::layer_norm, true>(a)
                       : apply_lines<T, V, ApplyOf::layer_norm, false>(a);
  } else if (a.shift != nullptr) {
    a.scale != nullptr ? apply_lines<T, V, ApplyOf::batch_norm, true>(a)
                       : apply_lines<T, V, ApplyOf::batch_norm, false>(a);
  } else {
    a.weight != nullptr ? apply_lines<T, V, ApplyOf::inference, true>(a)
                        : apply_lines<T, V, ApplyOf::inference, false>(a);
  }
}

// ---- backward: sums ----------------------------------------------------------------------------------------------

// kFirst: these rows begin the sums. kAhead: those `ahead` rows further on are fetched.
template <int N, class T, class V, bool kWeight, bool kFirst, bool kAhead>
LANENORM_INLINE void sums_block(const ColumnSums& a, std::int64_t row, std::int64_t ahead, typename V::Scalar* sums) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns), columns = a.columns;
  const LinesOf<N, !kAhead, const char*> x(reinterpret_cast<const char* const*>(a.x) + row);
  const LinesOf<N, !kAhead, const char*> dy(reinterpret_cast<const char* const*>(a.dy) + row);
  const S* weight = kWeight ? static_cast<const S*>(a.weight) + row : nullptr;
  const S* mean = static_cast<const S*>(a.mean);
  const S* rstd = static_cast<const S*>(a.rstd);
  for_vectors<V>(columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const V m = load<S, V>(reinterpret_cast<const char*>(mean + j), part);
    const V s = load<S, V>(reinterpret_cast<const char*>(rstd + j), part);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    V g[N], t[N];
    // First x, then dy: so their lines, often at the same place within a page, evict each other less.
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if constexpr (kAhead) fetch(x.ahead(r + ahead) + at);
      t[r] = (load<T, V>(x[r] + at, part) - m) * s;
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if constexpr (kAhead) fetch(dy.ahead(r + ahead) + at);
      g[r] = load<T, V>(dy[r] + at, part);
      if constexpr (kWeight) g[r] = g[r] * V::broadcast(weight[r]);
    }
    const auto add = [&](V sum, S* to)
                         LANENORM_LAMBDA_INLINE { store_lanes(kFirst ? sum : load_lanes<V>(to) + sum, to); };
    add(tree<N>(g), sums + j);
    add(tree_of_products<N>(g, t), sums + pitch + j);
    add(tree<N>(t), sums + 2 * pitch + j);
  });
}

template <class T, class V, bool kWeight>
LANENORM_INLINE void sums_rows(const ColumnSums& a, std::int64_t row, std::int64_t rows, typename V::Scalar* sums) {
  const bool first = row % kFlushRows == 0;
  if (rows == kRowBlock) {
    const std::int64_t distance = rows_ahead<kRowBlock, T>(a.columns);
    const auto block = [&](auto begins, auto ahead) LANENORM_LAMBDA_INLINE {
      sums_block<kRowBlock, T, V, kWeight, decltype(begins)::value, decltype(ahead)::value>(a, row, distance, sums);
    };
    if (a.ahead && row + kRowBlock + distance <= a.rows) {
      first ? block(std::true_type{}, std::true_type{}) : block(std::false_type{}, std::true_type{});
    } else {
      first ? block(std::true_type{}, std::false_type{}) : block(std::false_type{}, std::false_type{});
    }
  } else {
    if (first) sums_block<1, T, V, kWeight, true, false>(a, row, 0, sums);
    for (std::int64_t r = first ? 1 : 0; r < rows; ++r) sums_block<1, T, V, kWeight, false, false>(a, row + r, 0, sums);
  }
}

template <class T, class V, class D>
void column_sums(const ColumnSums& a) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  S* sums = static_cast<S*>(a.scratch);
  for (std::int64_t row = 0; row < a.rows; row += kRowBlock) {
    const std::int64_t rows = a.rows - row < kRowBlock ? a.rows - row : kRowBlock;
    if (a.weight != nullptr) {
      sums_rows<T, V, true>(a, row, rows, sums);
    } else {
      sums_rows<T, V, false>(a, row, rows, sums);
    }
    if ((row + kRowBlock) % kFlushRows != 0 && row + rows != a.rows) continue;
    for (std::int64_t array = 0; array < 3 * pitch; array += pitch) {
      for (std::int64_t j = array; j < array + a.columns; j += D::kLanes) {
        const D sum = load_lanes<D>(sums + j);
        store_lanes(row < kFlushRows ? sum : load_lanes<D>(a.sums + j) + sum, a.sums + j);
      }
    }
  }
}

// finish_gradient() of formulas.hpp, eight statistics at a time; of the columns of a statistic lane i adds every
// eighth, then lanes by halving. (One by one they took a fifth of a backward of 32 x 1024.)
template <class S, class D>
void column_gradient_finish(const ColumnGradientFinish& a) {
  const std::int64_t pitch = padded(a.columns), statistics = a.columns / a.fold;
  const D count = D::broadcast(a.count);
  for (std::int64_t s = 0; s < statistics; s += D::kLanes) {
    const int lanes = static_cast<int>(statistics - s < D::kLanes ? statistics - s : D::kLanes);
    const auto of = [&](const void* p)
                        LANENORM_LAMBDA_INLINE { return D::template load<S>(static_cast<const S*>(p) + s, lanes); };
    const auto sum = [&](std::int64_t array) LANENORM_LAMBDA_INLINE {
      const double* sums = a.sums + array * pitch + s * a.fold;
      if (a.fold == 1) return load_lanes<D>(sums);
      D total[8];
      for (int i = 0; i < 8; ++i) {
        total[i] = D::zero();
        if (i >= lanes) continue;
        for_vectors<D>(a.fold, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
          total[i] = total[i] + load<double, D>(reinterpret_cast<const char*>(sums + i * a.fold + j), part);
        });
      }
      return D::fold8(total);
    };
    const D g = sum(0), gt = sum(1), factor = of(a.rstd) * (a.weight == nullptr ? D::broadcast(1.0) : of(a.weight));
    const GradientTerms<D> terms = a.training ? gradient_terms(g, gt, sum(2), count) : frozen_terms(gt, D::zero());
    if (a.dweight != nullptr) {
      terms.gx.template store<double>(a.dweight + s, lanes);
      g.template store<double>(a.dbias + s, lanes);
    }
    terms.minus_low.template store<S>(static_cast<S*>(a.shift) + s);
    terms.minus_mean_g.template store<S>(static_cast<S*>(a.minus_mean_g) + s);
    terms.minus_mean_gx.template store<S>(static_cast<S*>(a.minus_mean_gx) + s);
    factor.template store<S>(static_cast<S*>(a.factor) + s);
  }
}

// ---- backward: gradients -----------------------------------------------------------------------------------------

// The constants of a vector of columns.
template <class V>
struct ColumnGradients {
  V mean, rstd, shift, minus_mean_g, minus_mean_gx, factor;
  LANENORM_INLINE V xhat(V x) const { return normalize(x, mean, rstd, shift); }
  LANENORM_INLINE V dx(V dy, V weight, V xhat) const {
    return input_gradient(dy, weight, xhat, minus_mean_g, minus_mean_gx, factor);
  }
};

// Those of a.columns columns.
template <class V>
struct GradientsOfColumns {
  using S = typename V::Scalar;
  const S *mean, *rstd, *shift, *minus_mean_g, *minus_mean_gx, *factor;
  LANENORM_INLINE explicit GradientsOfColumns(const ColumnGradient& a)
      : mean(static_cast<const S*>(a.mean)),
        rstd(static_cast<const S*>(a.rstd)),
        shift(static_cast<const S*>(a.shift)),
        minus_mean_g(static_cast<const S*>(a.minus_mean_g)),
        minus_mean_gx(static_cast<const S*>(a.minus_mean_gx)),
        factor(static_cast<const S*>(a.factor)) {}
  template <class P>
  LANENORM_INLINE ColumnGradients<V> at(std::int64_t j, P part) const {
    const auto of = [&](const S* p)
                        LANENORM_LAMBDA_INLINE { return load<S, V>(reinterpret_cast<const char*>(p + j), part); };
    return {of(mean), of(rstd), of(shift), of(minus_mean_g), of(minus_mean_gx), of(factor)};
  }
};

template <int N, bool kStream, class T, class V, class D, bool kWeight, bool kParameters>
LANENORM_INLINE void gradient_rows(const ColumnGradient& a, std::int64_t row) {
  using S = typename V::Scalar;
  const GradientsOfColumns<V> columns(a);
  const LinesOf<N, !kStream, const char*> x(reinterpret_cast<const char* const*>(a.x) + row);
  const LinesOf<N, !kStream, const char*> dy(reinterpret_cast<const char* const*>(a.dy) + row);
  const LinesOf<N, !kStream, char*> dx(reinterpret_cast<char* const*>(a.dx) + row);
  const S* weight = kWeight ? static_cast<const S*>(a.weight) + row : nullptr;
  std::int64_t head = kStream ? streamed_from<T>(dx.table, N, a.columns) : -1;
  if (kParameters && head > 0) head = -1;  // the order of the sums follows the vectors
  const Ahead ahead = kStream ? ahead_of<N, T>(a, row, head >= 0) : Ahead{};
  D dweight[N], dbias[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) dweight[r] = dbias[r] = D::zero();
  for_vectors_streamed<V>(head, a.columns, [&](std::int64_t j, auto part, bool stream) LANENORM_LAMBDA_INLINE {
    const ColumnGradients<V> k = columns.at(j, part);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    V gs[N], xs[N];
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && ahead.fetch) fetch(x.ahead(r + ahead.rows) + at + ahead.bytes);
      xs[r] = load<T, V>(x[r] + at, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && ahead.fetch) fetch(dy.ahead(r + ahead.rows) + at + ahead.bytes);
      gs[r] = load<T, V>(dy[r] + at, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      const V g = gs[r], xhat = k.xhat(xs[r]);
      write<T>(k.dx(g, V::broadcast(kWeight ? weight[r] : S(1)), xhat), dx[r] + at, part, stream);
      if constexpr (kParameters) {
        // LN over leading axes only: every product goes to double; masked lanes are 0 in dy.
        const V product = g * xhat;
        LANENORM_UNROLL
        for (int half = 0; half < V::kWide; ++half) {
          dweight[r] = dweight[r] + product.wide(half);
          dbias[r] = dbias[r] + g.wide(half);
        }
      }
    }
  });
  if constexpr (kParameters) {
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      a.dweight[row + r] += dweight[r].fold();
      a.dbias[row + r] += dbias[r].fold();
    }
  }
}

// As apply_narrow(). Backward of 12544 x 64 300 -> 243 us (AVX2 347 -> 287), of 3136 x 128 153 -> 125.
template <int K, class T, class V>
LANENORM_INLINE void gradient_narrow(const ColumnGradient& a) {
  using S = typename V::Scalar;
  constexpr std::int64_t kVectorBytes = V::kLanes * static_cast<std::int64_t>(sizeof(T));
  const GradientsOfColumns<V> columns(a);
  const V one = V::broadcast(S(1));
  ColumnGradients<V> k[K];
  LANENORM_UNROLL
  for (int i = 0; i < K; ++i) k[i] = columns.at(i * V::kLanes, Full{});
  const char *x = static_cast<const char*>(a.x[0]), *dy = static_cast<const char*>(a.dy[0]);
  char* dx = static_cast<char*>(a.dx[0]);
  for (const char* end = x + a.columns * static_cast<std::int64_t>(sizeof(T)); x < end; x += K * kVectorBytes) {
    LANENORM_UNROLL
    for (int i = 0; i < K; ++i) {
      const V xhat = k[i].xhat(load<T, V>(x + i * kVectorBytes, Full{}));
      store<T>(k[i].dx(load<T, V>(dy + i * kVectorBytes, Full{}), one, xhat), dx + i * kVectorBytes, Full{});
    }
    dy += K * kVectorBytes;
    dx += K * kVectorBytes;
  }
}

template <class T, class V, class D, bool kWeight, bool kParameters>
LANENORM_INLINE void gradient_lines(const ColumnGradient& a) {
  if constexpr (!kWeight && !kParameters) {
    if (a.period < a.columns) {
      return with_vectors(static_cast<int>(a.period / V::kLanes), [&](auto vectors) LANENORM_LAMBDA_INLINE {
        gradient_narrow<decltype(vectors)::value, T, V>(a);
      });
    }
  }
  const auto rows = [&](auto side_by_side, auto stream) LANENORM_LAMBDA_INLINE {
    constexpr int N = decltype(side_by_side)::value;
    constexpr bool kStream = decltype(stream)::value;
    std::int64_t row = 0;
    for (; row + N <= a.rows; row += N) gradient_rows<N, kStream, T, V, D, kWeight, kParameters>(a, row);
    for (; row < a.rows; ++row) gradient_rows<1, kStream, T, V, D, kWeight, kParameters>(a, row);
  };
  if (!a.stream) {
    rows(Count<kApplyRows>{}, std::false_type{});
  } else if (pages_follow<T>(a)) {
    rows(Count<2>{}, std::true_type{});
  } else {
    rows(Count<kApplyRows>{}, std::true_type{});
  }
}

template <class T, class V, class D>
void column_gradient(const ColumnGradient& a) {
  if (a.dweight != nullptr) {
    a.weight != nullptr ? gradient_lines<T, V, D, true, true>(a) : gradient_lines<T, V, D, false, true>(a);
  } else {
    a.weight != nullptr ? gradient_lines<T, V, D, true, false>(a) : gradient_lines<T, V, D, false, false>(a);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
