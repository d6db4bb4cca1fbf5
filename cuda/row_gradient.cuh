// Backward over rows: dx, and dweight and dbias summed in registers over chunks of rows (formulas: row_norm.cuh).
//
// Passes over memory: x and dy are read once and dx written (3s); dweight and dbias of a chunk are written and read
// again, 16 bytes a column and chunk. Rows that neither a block nor a cluster holds: their sums by a kernel of their
// own, then dx (5s).
//
// THE ORDER OF OPERATIONS: the sums of a row as moments are summed (words, lanes, runs of a warp), across lanes in
// double, slabs of a row as a tree. dweight and dbias of a column over the rows of a chunk in index order: 8 rows
// plainly (of a group of lanes 1, 2 or 4, by the length of a row), those sums compensated; where a block holds several
// rows, its groups then in order, in double. Chunks by fold_partials in double.
//
// Longer than 300 lines because groups, slabs and the fold of partials read as one method.
#pragma once

#include "cuda/row_norm.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- sums over rows ----------------------------------------------------------------------------------------------

// A sum with the rounding errors of its additions (Kahan 1965): 128 equal rows would round in the same direction 128
// times. Where a term is larger than the sum its own last digit may be lost, 1 u of sum |terms|.
template <class C>
struct Compensated {
  C sum, low;
  __device__ __forceinline__ void add(C v) {
    const C next = sum + v;
    low += v - (next - sum);
    sum = next;
  }
  // Infinite sums have no error to speak of.
  __device__ __forceinline__ double total() const {
    const double s = static_cast<double>(sum);
    return finite(s) ? s + static_cast<double>(low) : s;
  }
};

// dweight and dbias of the columns of a lane.
template <class C, int N>
struct ColumnSums {
  Compensated<C> dweight[N], dbias[N];
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < N; ++i) dweight[i] = dbias[i] = {C(0), C(0)};
  }
};

// Those of the last rows: 2 operations a term, not 9. Blocks sum kRecentRows rows so, up to 4 u of sum |terms|,
// groups of lanes the kTogether rows of theirs that lie in registers together where rows are whole words.
inline constexpr int kRecentRows = 8;
template <class C, int N>
struct RecentSums {
  C dweight[N], dbias[N];
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < N; ++i) dweight[i] = dbias[i] = C(0);
  }
  __device__ __forceinline__ void move_to(ColumnSums<C, N>* sums) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums->dweight[i].add(dweight[i]);
      sums->dbias[i].add(dbias[i]);
    }
    reset();
  }
};

// ---- a run -------------------------------------------------------------------------------------------------------

// weight of word step + lane, or 1. weight: of the first element of the run; count: elements of the run
template <class T, bool kWhole>
__device__ __forceinline__ void load_weight(const char* weight, bool as_compute, int count, int step, int lane,
                                            Compute<T>* out) {
  if (weight != nullptr) {
    load_parameters<T, kWhole>(weight, as_compute, count, step, lane, out);
  } else {
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) out[e] = Compute<T>(1);
  }
}

// Sums of g, g t and t of R rows, over a run of each in every group of L lanes: lane l gets, and has the mean and rstd
// of, row l % R. The whole warp arrives here.
template <class T, int L, int V, int R, bool kWhole>
__device__ __forceinline__ GradientSums run_sums(bool as_compute, const Words (&dy)[R][V], const Words (&x)[R][V],
                                                 const char* weight, int count, Compute<T> own_mean,
                                                 Compute<T> own_rstd, int lane) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  C sum_g[R], sum_gt[R], sum_t[R], mean[R], rstd[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sum_g[r] = sum_gt[r] = sum_t[r] = C(0);
    mean[r] = of_row<L, R>(own_mean, r);
    rstd[r] = of_row<L, R>(own_rstd, r);
  }
#pragma unroll
  for (int v = 0; v < V && v * L * E < count; ++v) {
    const int left = count - (v * L + lane) * E;
    C gain[E];  // once for all rows; any of a lane without a word
    load_weight<T, kWhole>(weight, as_compute, count, v * L, left > 0 ? lane : 0, gain);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      C g[E], t[E];
      unpack<T>(dy[r][v], g);
      unpack<T>(x[r][v], t);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        g[e] = g[e] * gain[e];
        t[e] = (t[e] - mean[r]) * rstd[r];
      }
      if (!kWhole && left < E) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          if (e >= left) g[e] = t[e] = C(0);
        }
      }
      const bool none = kWhole && left <= 0;
      sum_g[r] += select(none, C(0), tree<E>(g));
      sum_gt[r] += select(none, C(0), tree_of_products<E>(g, t));
      sum_t[r] += select(none, C(0), tree<E>(t));
    }
  }
  GradientSums sums[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sums[r] = {static_cast<double>(sum_g[r]), static_cast<double>(sum_gt[r]), static_cast<double>(sum_t[r])};
  }
  return fold_rows<L, R>(sums);
}

// dx of a run of R rows into `dy`, and the sums of its columns. own: of row lane % R
template <class T, int L, int V, int R, bool kWhole>
__device__ __forceinline__ void gradient_runs(const cuda::RowBackward& a, const GradientConstants<Compute<T>>& own,
                                              const char* weight, int count, int lane, const Words (&x)[R][V],
                                              Words (&dy)[R][V], RecentSums<Compute<T>, V * kPerWord<T>>* sums) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  GradientConstants<C> of[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const C rstd = of_row<L, R>(own.rstd, r);  // its own factor
    of[r] = {of_row<L, R>(own.mean, r),          rstd, of_row<L, R>(own.shift, r), of_row<L, R>(own.minus_mean_g, r),
             of_row<L, R>(own.minus_mean_gx, r), rstd};
  }
#pragma unroll
  for (int v = 0; v < V && v * L * E < count; ++v) {
    const int place = (v * L + lane) * E < count ? lane : 0;
    C gain[E];
    load_weight<T, kWhole>(weight, a.parameters_as_compute, count, v * L, place, gain);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const GradientConstants<C>& k = of[r];
      C g[E], xhat[E];
      unpack<T>(dy[r][v], g);
      unpack<T>(x[r][v], xhat);
#pragma unroll
      for (int e = 0; e < E; ++e) xhat[e] = normalize(xhat[e], k.mean, k.rstd, k.shift);
      if (a.partial != nullptr) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          sums->dweight[v * E + e] = fma(g[e], xhat[e], sums->dweight[v * E + e]);
          sums->dbias[v * E + e] += g[e];
        }
      }
#pragma unroll
      for (int e = 0; e < E; ++e) {
        g[e] = input_gradient(g[e], gain[e], xhat[e], k.minus_mean_g, k.minus_mean_gx, k.factor);
      }
      dy[r][v] = pack<T>(g);
    }
  }
}

// Constants of dx of a row from its sums.
template <class C>
__device__ __forceinline__ GradientConstants<C> row_constants(const cuda::RowBackward& a, const GradientSums& sums,
                                                              C mean, C rstd) {
  double dweight;  // that of a weight that belongs to the statistic
  return finish_gradient<C>(sums, Divisor{static_cast<double>(a.length), a.inverse_length}, mean, rstd, 1.0, true,
                            &dweight);
}

// ---- a row to a group of lanes -----------------------------------------------------------------------------------

// Shared memory: Compute<T> [2][groups][L * V * E], the column sums of every group.
template <class T, int L, int V>
inline constexpr std::size_t kGroupSumsBytes = 2 * (128 / L) * L * V * kPerWord<T> * sizeof(Compute<T>);

// Whether the next rows are on their way in registers: where the sums leave room for 8 warps an SM alone.
template <class T, int V>
inline constexpr bool kRowsAhead = cuda::backward_group_blocks(sizeof(T), V) == 2;

// A chunk to a block: its groups take the rows in turn, R of them at a time.
template <class T, int L, int V, int R, int kTogether, bool kWhole>
__global__ void __launch_bounds__(128, cuda::backward_group_blocks(sizeof(T), V))
    row_backward_group(cuda::RowBackward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>, kColumns = L * V * E, kGroups = 128 / L;
  constexpr bool kAhead = kRowsAhead<T, V>;
  const int lane = static_cast<int>(threadIdx.x) % L, group = static_cast<int>(threadIdx.x) / L;
  const int first_of_warp = static_cast<int>(threadIdx.x) / 32 * (32 / L);
  const int count = static_cast<int>(a.length), bytes = count * static_cast<int>(sizeof(T));
  const char* weight = static_cast<const char*>(a.weight);
  for (std::int64_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    const std::int64_t end = (chunk + 1) * a.chunk_rows < a.rows ? (chunk + 1) * a.chunk_rows : a.rows;
    ColumnSums<C, V * E> sums;
    RecentSums<C, V * E> recent;
    sums.reset();
    recent.reset();
    int turn = 0;
    const auto load = [&](std::int64_t row, Words(&dy)[R][V], Words(&x)[R][V]) {
#pragma unroll
      for (int r = 0; r < R; ++r, row += kGroups) {
        load_run<T, L, V, kWhole>(a.dy + row * a.dy_stride, row < end ? bytes : 0, lane, dy[r]);
        load_run<T, L, V, kWhole>(a.x + row * a.x_stride, row < end ? bytes : 0, lane, x[r]);
      }
    };
    Words dy[R][V], x[R][V];
    if (kAhead) load(chunk * a.chunk_rows + group, dy, x);
    // The whole warp, also where only its first group has a row.
    for (std::int64_t base = chunk * a.chunk_rows; base + first_of_warp < end; base += R * kGroups) {
      const std::int64_t row = base + group;  // and every kGroups-th after it
      Words next_dy[R][V], next_x[R][V];
      if (kAhead) {
        load(row + R * kGroups, next_dy, next_x);
      } else {
        load(row, dy, x);
      }
      const std::int64_t own_row = row + lane % R * kGroups;
      C mean = C(0), rstd = C(0);
      if (own_row < end) {
        mean = static_cast<const C*>(a.mean)[own_row];
        rstd = static_cast<const C*>(a.rstd)[own_row];
      }
      const GradientSums row_sums =
          run_sums<T, L, V, R, kWhole>(a.parameters_as_compute, dy, x, weight, count, mean, rstd, lane);
      gradient_runs<T, L, V, R, kWhole>(a, row_constants(a, row_sums, mean, rstd), weight, count, lane, x, dy, &recent);
      if (R == kTogether || ++turn % kTogether == 0) recent.move_to(&sums);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const std::int64_t at = row + r * kGroups;
        store_run<T, L, V, kWhole>(a.dx + at * a.dx_stride, at < end ? bytes : 0, group_mask<L>(), lane, dy[r]);
#pragma unroll
        for (int v = 0; v < V && kAhead; ++v) {
          dy[r][v] = next_dy[r][v];
          x[r][v] = next_x[r][v];
        }
      }
    }
    if (R != kTogether) recent.move_to(&sums);
    if (a.partial == nullptr) continue;
    // Columns of a lane -> places in the order of columns, group by group.
    C* places = device::shared<C>(0);
#pragma unroll
    for (int i = 0; i < V * E; ++i) {
      const int column = (i / E * L + lane) * E + i % E;
      *device::shared<C>(sizeof(C) * (group * kColumns + column)) = static_cast<C>(sums.dweight[i].total());
      *device::shared<C>(sizeof(C) * ((kGroups + group) * kColumns + column)) = static_cast<C>(sums.dbias[i].total());
    }
    device::sync_block();
    C* partial = static_cast<C*>(a.partial) + chunk * 2 * a.partial_length;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kColumns; i += 128) {
      const int which = i / kColumns, column = i % kColumns;
      if (column >= count) continue;
      double total = 0.0;
      for (int g = 0; g < kGroups; ++g) total += static_cast<double>(places[(which * kGroups + g) * kColumns + column]);
      partial[which * a.partial_length + column] = static_cast<C>(total);
    }
    device::sync_block();
  }
}

// ---- a slab of a row to a block ----------------------------------------------------------------------------------

// Shared memory of a block: of these R rows, and of those before, which others may still read.
template <int R>
struct SlabSums {
  GradientSums warps[2][R][cuda::kPieceWarps];
  GradientSums slab[2][R];
};

template <class T, int V>
struct Slab {
  std::int64_t index;
  Share<T> run;  // of this warp
  __device__ __forceinline__ Slab(const cuda::RowBackward& a, std::int64_t index, int warp)
      : index(index), run(a.length, index * a.slab_words + warp * 32 * V, 32 * V) {}
};

// The sums of every slab of every row, for rows of more slabs than a cluster has blocks. A block a slab.
template <class T, int V>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, 1) row_sums_slab(cuda::RowBackward a) {
  using C = Compute<T>;
  SlabSums<1>& shared = device::shared<SlabSums<1>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int parity = 0;
  for (std::int64_t unit = blockIdx.x; unit < a.rows * a.slabs; unit += gridDim.x) {
    const std::int64_t row = unit / a.slabs;
    const Slab<T, V> slab(a, unit - row * a.slabs, warp);
    Words dy[1][V], x[1][V];
    load_run<T, 32, V>(a.dy + row * a.dy_stride + slab.run.offset(), slab.run.bytes(), lane, dy[0]);
    load_run<T, 32, V>(a.x + row * a.x_stride + slab.run.offset(), slab.run.bytes(), lane, x[0]);
    const C mean = static_cast<const C*>(a.mean)[row], rstd = static_cast<const C*>(a.rstd)[row];
    parity ^= 1;
    const GradientSums sums = fold_warps<cuda::kPieceWarps, 1>(
        run_sums<T, 32, V, 1, false>(a.parameters_as_compute, dy, x,
                                     parameters_from<T>(a.weight, a.parameters_as_compute, slab.run.first),
                                     slab.run.count, mean, rstd, lane),
        shared.warps[parity]);
    if (threadIdx.x == 0) static_cast<GradientSums*>(a.slab_sums)[unit] = sums;
  }
}

// The sums of R rows from those of the warps, lane l of row l % R: of the only slab, or of those of the cluster.
template <int R>
__device__ __forceinline__ GradientSums fold_slabs(const cuda::RowBackward& a, const GradientSums& mine, int parity,
                                                   SlabSums<R>& shared) {
  const GradientSums of_slab = fold_warps<cuda::kPieceWarps, R>(mine, shared.warps[parity]);
  if (a.slabs == 1) return of_slab;
  if (threadIdx.x < R) shared.slab[parity][threadIdx.x] = of_slab;
  device::sync_cluster();
  GradientSums of_row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    of_row[r] = fold_places(
        a.slabs, [&](std::int64_t i) { return *device::of_block(&shared.slab[parity][r], static_cast<unsigned>(i)); });
  }
  return own_row(of_row, static_cast<int>(threadIdx.x));
}

// The sums of R rows as row_sums_slab left them.
template <int R>
__device__ __forceinline__ GradientSums read_slabs(const cuda::RowBackward& a, std::int64_t row, std::int64_t end) {
  GradientSums of_row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const GradientSums* sums = static_cast<const GradientSums*>(a.slab_sums) + (row + r) * a.slabs;
    of_row[r] = fold_places(row + r < end ? a.slabs : 0, [&](std::int64_t i) { return sums[i]; });
  }
  return own_row(of_row, static_cast<int>(threadIdx.x));
}

// A chunk and a slab to a block, R rows at a time, the next ones on their way in registers (where these are not needed
// for addresses); with several slabs and no slab_sums the blocks of a cluster are the slabs of a row. One barrier of
// the block and one of the cluster for R rows.
template <class T, int V, int R, bool kWhole>
__global__ void __launch_bounds__(32 * cuda::kPieceWarps, 1) row_backward_block(cuda::RowBackward a) {
  using C = Compute<T>;
  constexpr int E = kPerWord<T>;
  static_assert(kRecentRows % R == 0);
  SlabSums<R>& shared = device::shared<SlabSums<R>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int parity = 0;
  for (std::int64_t unit = blockIdx.x; unit < a.chunks * a.slabs; unit += gridDim.x) {
    const std::int64_t chunk = unit / a.slabs;
    const Slab<T, V> slab(a, unit - chunk * a.slabs, warp);
    const Share<T>& run = slab.run;
    const char* weight = parameters_from<T>(a.weight, a.parameters_as_compute, run.first);
    const std::int64_t first = chunk * a.chunk_rows;
    const std::int64_t end = first + a.chunk_rows < a.rows ? first + a.chunk_rows : a.rows;
    ColumnSums<C, V * E> sums;
    RecentSums<C, V * E> recent;
    sums.reset();
    recent.reset();
    const auto load = [&](std::int64_t row, Words(&dy)[R][V], Words(&x)[R][V]) {
#pragma unroll
      for (int r = 0; r < R; ++r, ++row) {
        const int bytes = row < end ? run.bytes() : 0;
        load_run<T, 32, V, kWhole>(a.dy + row * a.dy_stride + run.offset(), bytes, lane, dy[r]);
        load_run<T, 32, V, kWhole>(a.x + row * a.x_stride + run.offset(), bytes, lane, x[r]);
      }
    };
    Words dy[R][V], x[R][V];
    if (kWhole) load(first, dy, x);
    for (std::int64_t row = first; row < end; row += R) {
      Words next_dy[R][V], next_x[R][V];
      if (kWhole) {
        load(row + R, next_dy, next_x);
      } else {
        load(row, dy, x);
      }
      C mean = C(0), rstd = C(0);
      if (row + lane % R < end) {
        mean = static_cast<const C*>(a.mean)[row + lane % R];
        rstd = static_cast<const C*>(a.rstd)[row + lane % R];
      }
      GradientSums row_sums;
      if (a.slab_sums != nullptr) {
        row_sums = read_slabs<R>(a, row, end);
      } else {
        parity ^= 1;
        const GradientSums mine =
            run_sums<T, 32, V, R, kWhole>(a.parameters_as_compute, dy, x, weight, run.count, mean, rstd, lane);
        row_sums = fold_slabs<R>(a, mine, parity, shared);
      }
      gradient_runs<T, 32, V, R, kWhole>(a, row_constants(a, row_sums, mean, rstd), weight, run.count, lane, x, dy,
                                         &recent);
      if ((row + R - first) % kRecentRows == 0) recent.move_to(&sums);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        store_run<T, 32, V, kWhole>(a.dx + (row + r) * a.dx_stride + run.offset(), row + r < end ? run.bytes() : 0,
                                    device::kAllLanes, lane, dy[r]);
#pragma unroll
        for (int v = 0; v < V && kWhole; ++v) {
          dy[r][v] = next_dy[r][v];
          x[r][v] = next_x[r][v];
        }
      }
    }
    recent.move_to(&sums);
    if (a.partial == nullptr) continue;
    C* partial = static_cast<C*>(a.partial) + chunk * 2 * a.partial_length + run.first;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int column = (v * 32 + lane) * E;
      if (column >= run.count) continue;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        partial[column + e] = static_cast<C>(sums.dweight[v * E + e].total());
        partial[a.partial_length + column + e] = static_cast<C>(sums.dbias[v * E + e].total());
      }
    }
  }
  device::sync_cluster();  // the other blocks have read this one's sums
}

// ---- partials ----------------------------------------------------------------------------------------------------

// dweight and dbias: 32 columns to a block of 32 x kFoldRows threads, each of which folds its share of the chunks in
// index order, then the shares in index order.
inline constexpr int kFoldRows = 16;

struct FoldLayout {
  double share[kFoldRows][32];
};

template <class T>
__global__ void __launch_bounds__(32 * kFoldRows) fold_row_partials(cuda::FoldPartials a) {
  using C = Compute<T>;
  FoldLayout& shared = device::shared<FoldLayout>();
  const int lane = static_cast<int>(threadIdx.x) % 32, part = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t blocks = (a.length + 31) / 32, each = (a.chunks + kFoldRows - 1) / kFoldRows;
  for (std::int64_t unit = blockIdx.x; unit < 2 * blocks; unit += gridDim.x) {
    const bool bias = unit >= blocks;
    void* const out = bias ? a.dbias : a.dweight;
    const std::int64_t column = (bias ? unit - blocks : unit) * 32 + lane;
    const C* partial = static_cast<const C*>(a.partial) + (bias ? a.partial_length : 0) + column;
    const std::int64_t stop = (part + 1) * each < a.chunks ? (part + 1) * each : a.chunks;
    double sum = 0.0;
    if (column < a.length) {
#pragma unroll 8
      for (std::int64_t chunk = part * each; chunk < stop; ++chunk) {
        sum += static_cast<double>(partial[chunk * 2 * a.partial_length]);
      }
    }
    shared.share[part][lane] = sum;
    device::sync_block();
    if (part == 0 && column < a.length && out != nullptr) {
      double total = 0.0;
      for (int i = 0; i < kFoldRows; ++i) total += shared.share[i][lane];
      store_parameter<T>(out, a.as_compute, column, total);
    }
    device::sync_block();
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
