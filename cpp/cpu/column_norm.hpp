// Columns: statistics down the columns of a matrix; a lane is a column, so nothing is folded across lanes.
//
// BN of (N, C) and of channels-last data, LN over a leading or middle axis, BN of small planes (every position of a
// plane is a column). Formulas as in row_norm.hpp.
//
// Passes over memory: moments read x, apply reads x and writes y: 3s, 2s where the driver finds a slab of columns that
// stays in cache between the two. Backward 5s and 3s. Within a pass 8 lines are read side by side, one block at a
// time; the state of a superblock (pivot, sum, m2 per column) lives in L1 meanwhile.
//
// The order of operations, where it differs from blocks.hpp: a block is 8 rows, a superblock 64 rows with a pivot per
// column from its first block. Blocks join in double (join_block), superblocks of a piece are merged in index order,
// pieces as a binary tree of neighbours (column_driver.cpp).
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cpu/blocks.hpp"
#include "cpu/kernels.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// 8 rows of one vector of columns.
template <class T, class V, bool kScaled, class P>
struct RowsOfColumn {
  const char* const* line;
  std::int64_t offset;  // bytes
  V scale;
  P part;  // of the columns; the last vector of a line may be a part
  LANENORM_INLINE V operator()(std::int64_t row, Full) const {
    const V x = load<T, V>(line[row] + offset, part);
    if constexpr (kScaled) return x * scale;
    return x;
  }
};

template <class V, class C>
LANENORM_INLINE V load_lanes(const C* p) {
  return load<C, V>(reinterpret_cast<const char*>(p), Full{});
}
template <class V, class C>
LANENORM_INLINE void store_lanes(V v, C* p) {
  store<C>(v, reinterpret_cast<char*>(p), Full{});
}

// ---- moments -----------------------------------------------------------------------------------------------------

// The pivot of each lane from N rows; divided by 8 also where there are fewer, which keeps it a multiple of 1/8.
template <int N, class V, class X>
LANENORM_INLINE V column_pivot(const X& x) {
  using S = typename V::Scalar;
  const V x0 = x(0, Full{});
  V d[N], magnitude[N];
  for (int i = 0; i < N; ++i) {
    d[i] = x(i, Full{}) - x0;
    magnitude[i] = abs(d[i]);
  }
  const V eighth = V::broadcast(S(1) / S(kBlock));
  return pivot_from(x0, tree<N>(d) * eighth, tree<N>(magnitude) * eighth);
}

// State of a superblock, one value per column.
template <class C>
struct ColumnState {
  C* pivot;
  double *sum, *m2;
};

// Block k (N rows) joins the k full blocks above it, in double, with the rounding of its mean mended: a column has one
// lane where a row has sixteen whose rounding errors average out. In float32 alone, columns with a step between blocks
// reached 5.8 u of the normalized value.
template <int N, class V, class D>
LANENORM_INLINE void join_block(V mean, V rest, V m2_about_mean, int k, double* sum, double* m2) {
  for (int part = 0; part < V::kWide; ++part, sum += D::kLanes, m2 += D::kLanes) {
    const D r = rest.wide(part);
    D s = fma(mean.wide(part), D::broadcast(N), r);
    D q = fma(negate(r * r), D::broadcast(1.0 / N), m2_about_mean.wide(part));
    if (k > 0) {
      const D before = load_lanes<D>(sum);
      const D delta = s * D::broadcast(1.0 / N) - before * D::broadcast(1.0 / (kBlock * k));
      q = fma(delta * delta, D::broadcast(double(N) * (kBlock * k) / (N + kBlock * k)), load_lanes<D>(m2) + q);
      s = before + s;
    }
    store_lanes(s, sum);
    store_lanes(q, m2);
  }
}

// Block k of a superblock: N rows of all columns.
template <int N, class T, class V, class D, bool kScaled>
LANENORM_INLINE void column_block(const char* const* lines, std::int64_t columns, int k, V scale,
                                  const ColumnState<typename V::Scalar>& state) {
  const auto one = [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const RowsOfColumn<T, V, kScaled, decltype(part)> x{lines, j * static_cast<std::int64_t>(sizeof(T)), scale, part};
    V pivot, mean, rest;
    if (k == 0) {
      pivot = column_pivot<N, V>(x);
      store_lanes(pivot, state.pivot + j);
    } else {
      pivot = load_lanes<V>(state.pivot + j);
    }
    const Lanes<V> lanes = block<N, V>(x, pivot, Full{}, &mean, &rest);
    join_block<N, V, D>(mean, rest, lanes.m2, k, state.sum + j, state.m2 + j);
  };
  std::int64_t j = 0;
  for (; j + V::kLanes <= columns; j += V::kLanes) one(j, Full{});
  if (j < columns) one(j, Part{static_cast<int>(columns - j)});
}

template <class D>
LANENORM_INLINE Moments<D> load_moments(const double* moments, std::int64_t pitch, std::int64_t j) {
  return {load_lanes<D>(moments + j), load_lanes<D>(moments + pitch + j), load_lanes<D>(moments + 2 * pitch + j),
          load_lanes<D>(moments + 3 * pitch + j)};
}
template <class D>
LANENORM_INLINE void store_moments(const Moments<D>& m, double* moments, std::int64_t pitch, std::int64_t j) {
  store_lanes(m.pivot, moments + j);
  store_lanes(m.sum, moments + pitch + j);
  store_lanes(m.low, moments + 2 * pitch + j);
  store_lanes(m.m2, moments + 3 * pitch + j);
}

// Each lane's superblock of `rows` values joins the column's moments of the `before` rows above it.
template <class V, class D>
LANENORM_INLINE void merge_superblock(const ColumnMoments& a, const ColumnState<typename V::Scalar>& state,
                                      double before, double rows) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  for (std::int64_t j = 0; j < pitch; j += D::kLanes) {
    Moments<D> next{D::template load<S>(state.pivot + j), load_lanes<D>(state.sum + j), D::zero(),
                    load_lanes<D>(state.m2 + j)};
    if (before > 0) next = merge(load_moments<D>(a.moments, pitch, j), D::broadcast(before), next, D::broadcast(rows));
    store_moments(next, a.moments, pitch, j);
  }
}

template <class T, class V, class D, bool kScaled>
void column_moments(const ColumnMoments& a) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  S* scratch = static_cast<S*>(a.scratch);
  double* sums = reinterpret_cast<double*>(scratch + pitch);  // pitch is a multiple of 16: aligned
  const ColumnState<S> state{scratch, sums, sums + pitch};
  const V scale = V::broadcast(static_cast<S>(a.scale));
  const char* const* lines = reinterpret_cast<const char* const*>(a.x);
  for (std::int64_t first = 0; first < a.rows; first += kSuperblock) {
    const std::int64_t rows = a.rows - first < kSuperblock ? a.rows - first : kSuperblock;
    std::int64_t row = 0;
    int k = 0;
    for (; row + kBlock <= rows; row += kBlock, ++k) {
      column_block<kBlock, T, V, D, kScaled>(lines + first + row, a.columns, k, scale, state);
    }
    if (row < rows) {
      with_vectors(static_cast<int>(rows - row), [&](auto n) LANENORM_LAMBDA_INLINE {
        column_block<decltype(n)::value, T, V, D, kScaled>(lines + first + row, a.columns, k, scale, state);
      });
    }
    merge_superblock<V, D>(a, state, static_cast<double>(first), static_cast<double>(rows));
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

// Two passes over the columns of a statistic: their mean about the first one's pivot, then m2 about that mean.
template <class D>
void column_fold(const ColumnFold& a) {
  const std::int64_t pitch = padded(a.columns), folded_pitch = padded(a.columns / a.fold);
  const D count = D::broadcast(a.count);
  for (std::int64_t s = 0; s < a.columns / a.fold; ++s) {
    const double* m = a.moments + s * a.fold;
    const double origin = m[0];
    // Sum about the origin, and m2, of the columns j..j+7; columns beyond the statistic count 0.
    const auto visit = [&](auto f) LANENORM_LAMBDA_INLINE {
      for (std::int64_t j = 0; j < a.fold; j += D::kLanes) {
        const int lanes = static_cast<int>(a.fold - j < D::kLanes ? a.fold - j : D::kLanes);
        const auto column = [&](int part) { return D::template load<double>(m + part * pitch + j, lanes); };
        const D sum = fma(column(0) - D::broadcast(origin), count, column(1) + column(2));
        f(keep(sum, lanes), column(3), lanes);
      }
    };
    D total = D::zero();
    visit([&](D sum, D, int) LANENORM_LAMBDA_INLINE { total = total + sum; });
    const double sum = total.fold();
    const D mean = D::broadcast(sum / (a.count * static_cast<double>(a.fold)));
    D m2 = D::zero();
    visit([&](D column_sum, D column_m2, int lanes) LANENORM_LAMBDA_INLINE {
      const D delta = keep(column_sum / count - mean, lanes);
      m2 = m2 + fma(delta * delta, count, column_m2);
    });
    a.folded[s] = origin;
    a.folded[folded_pitch + s] = sum;
    a.folded[2 * folded_pitch + s] = 0.0;
    a.folded[3 * folded_pitch + s] = m2.fold();
  }
}

// finish() of formulas.hpp, eight statistics at a time.
template <class V, class D>
void column_finish(const ColumnFinish& a) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  const D count = D::broadcast(a.count);
  for (std::int64_t j = 0; j < a.columns; j += V::kLanes) {
    D rstd[V::kWide], high[V::kWide], low[V::kWide];
    for (int part = 0; part < V::kWide; ++part) {
      const Moments<D> m = load_moments<D>(a.moments, pitch, j + part * D::kLanes);
      rstd[part] = D::broadcast(1.0) / sqrt(m.m2 / count + D::broadcast(a.eps));
      const Pair<D> mean = mean_of<S>(m, count);
      high[part] = mean.high;
      low[part] = mean.low;
    }
    const V mean = V::narrow(high);
    for (int part = 0; part < V::kWide; ++part) {
      low[part] = negate((high[part] - mean.wide(part)) + low[part]) * rstd[part];
    }
    store_lanes(mean, static_cast<S*>(a.mean) + j);
    const V rounded = V::narrow(rstd);
    for (int part = 0; part < V::kWide; ++part) rstd[part] = rstd[part] - rounded.wide(part);
    store_lanes(rounded, static_cast<S*>(a.rstd) + j);
    store_lanes(V::narrow(rstd), static_cast<S*>(a.rstd_low) + j);
    store_lanes(V::narrow(low), static_cast<S*>(a.shift) + j);
  }
}

// ---- apply -------------------------------------------------------------------------------------------------------

// Rows that share one load of the constants: 4 rows take 10 loads and 4 stores instead of 28 and 4. A call on
// (32, 25088) in cache went from 4.8 to 3.1 copies.
inline constexpr int kApplyRows = 4;

template <int N, class T, class V, bool kScaled, bool kPerRow>
LANENORM_INLINE void apply_rows(const ColumnApply& a, std::int64_t row) {
  using S = typename V::Scalar;
  const S* weight = static_cast<const S*>(a.weight);
  const S* bias = static_cast<const S*>(a.bias);
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + row;
  char* const* y = reinterpret_cast<char* const*>(a.y) + row;
  for_vectors<V>(a.columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const auto of_column = [&](const void* p) LANENORM_LAMBDA_INLINE {
      return load<S, V>(reinterpret_cast<const char*>(static_cast<const S*>(p) + j), part);
    };
    const V mean = of_column(a.mean), rstd = of_column(a.rstd), rstd_low = of_column(a.rstd_low);
    const V shift = of_column(a.shift);
    V scale = V::zero(), w = V::zero(), b = V::zero();
    if constexpr (kScaled) scale = of_column(a.scale);
    if constexpr (!kPerRow) w = of_column(weight), b = of_column(bias);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    // All loads before the stores: rows a multiple of 4 KB apart would make each load wait for the store before it.
    V v[N];
    for (int r = 0; r < N; ++r) v[r] = load<T, V>(x[r] + at, part);
    for (int r = 0; r < N; ++r) {
      if constexpr (kPerRow) w = V::broadcast(weight[row + r]), b = V::broadcast(bias[row + r]);
      if constexpr (kScaled) v[r] = v[r] * scale;
      store<T>(fma(normalize(v[r], mean, rstd, rstd_low, shift), w, b), y[r] + at, part);
    }
  });
}

template <class T, class V, bool kScaled, bool kPerRow>
LANENORM_INLINE void apply_lines(const ColumnApply& a) {
  std::int64_t row = 0;
  for (; row + kApplyRows <= a.rows; row += kApplyRows) apply_rows<kApplyRows, T, V, kScaled, kPerRow>(a, row);
  for (; row < a.rows; ++row) apply_rows<1, T, V, kScaled, kPerRow>(a, row);
}

template <class T, class V>
void column_apply(const ColumnApply& a) {
  if (a.scale != nullptr) {
    a.per_row ? apply_lines<T, V, true, true>(a) : apply_lines<T, V, true, false>(a);
  } else {
    a.per_row ? apply_lines<T, V, false, true>(a) : apply_lines<T, V, false, false>(a);
  }
}

// ---- backward: sums ----------------------------------------------------------------------------------------------

template <int N, class T, class V>
LANENORM_INLINE void sums_block(const ColumnSums& a, std::int64_t row, typename V::Scalar* sums) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + row;
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy) + row;
  const S* weight = static_cast<const S*>(a.weight) + row;
  const S* mean = static_cast<const S*>(a.mean);
  const S* rstd = static_cast<const S*>(a.rstd);
  const auto one = [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const V m = load<S, V>(reinterpret_cast<const char*>(mean + j), part);
    const V s = load<S, V>(reinterpret_cast<const char*>(rstd + j), part);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    V g[N], t[N];
    for (int r = 0; r < N; ++r) {
      g[r] = load<T, V>(dy[r] + at, part) * V::broadcast(weight[r]);
      t[r] = (load<T, V>(x[r] + at, part) - m) * s;
    }
    store_lanes(load_lanes<V>(sums + j) + tree<N>(g), sums + j);
    store_lanes(load_lanes<V>(sums + pitch + j) + tree_of_products<N>(g, t), sums + pitch + j);
    store_lanes(load_lanes<V>(sums + 2 * pitch + j) + tree<N>(t), sums + 2 * pitch + j);
  };
  std::int64_t j = 0;
  for (; j + V::kLanes <= a.columns; j += V::kLanes) one(j, Full{});
  if (j < a.columns) one(j, Part{static_cast<int>(a.columns - j)});
}

template <class T, class V, class D>
void column_sums(const ColumnSums& a) {
  using S = typename V::Scalar;
  const std::int64_t pitch = padded(a.columns);
  S* sums = static_cast<S*>(a.scratch);
  for (std::int64_t j = 0; j < 3 * pitch; j += V::kLanes) store_lanes(V::zero(), sums + j);
  for (std::int64_t row = 0; row < a.rows; row += kBlock) {
    const std::int64_t rows = a.rows - row < kBlock ? a.rows - row : kBlock;
    with_vectors(static_cast<int>(rows),
                 [&](auto n) LANENORM_LAMBDA_INLINE { sums_block<decltype(n)::value, T, V>(a, row, sums); });
    if ((row + kBlock) % kSuperblock == 0 || row + rows == a.rows) {
      flush<V, D>(sums, 3 * pitch, a.sums);
    }
  }
}

// ---- backward: gradients -----------------------------------------------------------------------------------------

template <int N, class T, class V, class D, bool kParameters>
LANENORM_INLINE void gradient_lines_of(const ColumnGradient& a, std::int64_t row) {
  using S = typename V::Scalar;
  const S* weight = static_cast<const S*>(a.weight) + row;
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + row;
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy) + row;
  char* const* dx = reinterpret_cast<char* const*>(a.dx) + row;
  D dweight[N], dbias[N];
  for (int r = 0; r < N; ++r) dweight[r] = dbias[r] = D::zero();
  for_vectors<V>(a.columns, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    const auto of_column = [&](const void* p) LANENORM_LAMBDA_INLINE {
      return load<S, V>(reinterpret_cast<const char*>(static_cast<const S*>(p) + j), part);
    };
    const V mean = of_column(a.mean), rstd = of_column(a.rstd), shift = of_column(a.shift);
    const V minus_mean_g = of_column(a.minus_mean_g), minus_mean_gx = of_column(a.minus_mean_gx);
    const V factor = of_column(a.factor);
    const std::int64_t at = j * static_cast<std::int64_t>(sizeof(T));
    V gs[N], xs[N];
    for (int r = 0; r < N; ++r) gs[r] = load<T, V>(dy[r] + at, part), xs[r] = load<T, V>(x[r] + at, part);
    for (int r = 0; r < N; ++r) {
      const V g = gs[r];
      const V xhat = normalize(xs[r], mean, rstd, shift);
      store<T>(input_gradient(g, V::broadcast(weight[r]), xhat, minus_mean_g, minus_mean_gx, factor), dx[r] + at, part);
      if constexpr (kParameters) {
        // LN over leading axes only: every product goes to double; masked lanes are 0 in dy.
        const V product = g * xhat;
        for (int half = 0; half < V::kWide; ++half) {
          dweight[r] = dweight[r] + product.wide(half);
          dbias[r] = dbias[r] + g.wide(half);
        }
      }
    }
  });
  if constexpr (kParameters) {
    for (int r = 0; r < N; ++r) {
      a.dweight[row + r] += dweight[r].fold();
      a.dbias[row + r] += dbias[r].fold();
    }
  }
}

template <class T, class V, class D, bool kParameters>
LANENORM_INLINE void gradient_lines(const ColumnGradient& a) {
  std::int64_t row = 0;
  for (; row + kApplyRows <= a.rows; row += kApplyRows) gradient_lines_of<kApplyRows, T, V, D, kParameters>(a, row);
  for (; row < a.rows; ++row) gradient_lines_of<1, T, V, D, kParameters>(a, row);
}

template <class T, class V, class D>
void column_gradient(const ColumnGradient& a) {
  if (a.dweight != nullptr) {
    gradient_lines<T, V, D, true>(a);
  } else {
    gradient_lines<T, V, D, false>(a);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
