// Columns that stay on chip (pieces and order of operations: column_norm.cuh).
//
// A slab is 8, 16 or 32 words of columns; its rows are shared out, whole stretches at a time, over the blocks of a
// cluster, which keep them in shared memory: x is read once and y written (2s), backward x and dy once and dx (3s).
//
//   1  the block copies its rows; then a thread takes 4 bytes of a row (float64: 8) down a stretch: moments or sums
//   2  across the cluster every column belongs to some lanes of one block, which fold its stretches and pieces, reading
//      them where they lie, finish it, and write its constants to all blocks
//   3  y or dx of the rows, a row to 8, 16 or 32 threads
//
// Two barriers of the cluster lie between these; behind the second no block touches another one's memory any more. A
// cluster takes one slab: others that share its SMs load while it computes.
//
// Longer than 300 lines because forward and backward share all but their sums.
#pragma once

#include <type_traits>

#include "cuda/column_gradient.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- where a slab lies -------------------------------------------------------------------------------------------

// Columns that a thread computes moments or sums of: as many as are read without two lanes in one bank. (Words would
// need 172 registers of float32, and leave three threads of four without a stretch.)
template <class T>
inline constexpr int kThreadColumns = sizeof(T) == 2 ? 2 : 1;

// What this block has of the slab of its cluster, and this thread: when it copies and applies, word `word` of the
// rows row, row + step, ...; when it sums, kThreadColumns from `column` on of the stretches stretch, stretch +
// stretch_step, ...
template <class T>
struct Tile {
  std::int64_t matrix, first_word;
  int words, columns;   // of the slab
  int first_row, rows;  // of this block
  int word, row, step;
  int column, stretch, stretch_step;
  template <class A>
  __device__ __forceinline__ explicit Tile(const A& a) : words(a.slab.words) {
    const std::int64_t width = words * kPerWord<T>, slabs = (a.columns + width - 1) / width;
    const std::int64_t unit = blockIdx.x / device::cluster_size();
    matrix = unit / slabs;
    first_word = (unit - matrix * slabs) * words;
    const std::int64_t more = a.columns - first_word * kPerWord<T>;
    columns = static_cast<int>(more < words * kPerWord<T> ? more : words * kPerWord<T>);
    const int most = a.slab.stretches * kStretchRows;
    first_row = static_cast<int>(device::cluster_rank()) * most;
    const int rest = static_cast<int>(a.rows) - first_row;  // rows of a slab on chip are few
    rows = rest < 0 ? 0 : rest < most ? rest : most;
    row = static_cast<int>(threadIdx.x) / words;
    word = static_cast<int>(threadIdx.x) - row * words;
    step = static_cast<int>(blockDim.x) / words;
    const int threads = words * kPerWord<T> / kThreadColumns<T>;  // of a row of stretches; divides the block
    stretch = static_cast<int>(threadIdx.x) / threads;
    stretch_step = static_cast<int>(blockDim.x) / threads;
    column = (static_cast<int>(threadIdx.x) - stretch * threads) * kThreadColumns<T>;
  }
  __device__ __forceinline__ int bytes() const { return columns * static_cast<int>(sizeof(T)); }
  // The slab in a row of this block.
  template <class P>
  __device__ __forceinline__ P at(const Matrices<P>& m, int r) const {
    return m.data + matrix * m.matrix_stride + (first_row + r) * m.row_stride + first_word * 16;
  }
  // Of a column of the slab.
  template <class A>
  __device__ __forceinline__ std::int64_t statistic(const A& a, int of_slab) const {
    return matrix * a.columns + first_word * kPerWord<T> + of_slab;
  }
};

// The shared memory of a block: constants of type K by column; 3 numbers a column from every stretch, `sets` times;
// then the rows of one tensor or two, (rows, words) each. slab_bytes() of choose.hpp counts the same.
template <class T, class K>
struct SlabMemory {
  static_assert(sizeof(K) <= cuda::kSlabConstants * sizeof(Compute<T>));
  K* constants;
  double* parts;
  Words* rows;
  int width, stretches;  // columns, of a full slab; stretches of a block
  int tensor_words;
  __device__ __forceinline__ SlabMemory(const cuda::Slab& slab, int sets)
      : width(slab.words * kPerWord<T>),
        stretches(slab.stretches),
        tensor_words(slab.stretches * kStretchRows * slab.words) {
    const std::size_t constant_bytes = width * cuda::kSlabConstants * sizeof(Compute<T>);
    constants = device::shared<K>(0);
    parts = device::shared<double>(constant_bytes);
    rows = device::shared<Words>(constant_bytes + static_cast<std::size_t>(sets) * stretches * 3 * width * 8);
  }
  // Number i of 3 of a column of a stretch of this block.
  __device__ __forceinline__ double* part(int set, int stretch, int i, int column) const {
    return parts + ((set * stretches + stretch) * 3 + i) * width + column;
  }
};

// ---- copying -----------------------------------------------------------------------------------------------------

inline constexpr int kParkRows = 4;  // that a thread reads before it writes the first of them

// The rows of a tile, words counted from the slab's first element wherever that lies; zero beyond its columns. They are
// there after copy_wait and a barrier.
template <class T>
__device__ __forceinline__ void park(const Tile<T>& t, const Matrices<const char*>& m, Words* rows) {
  const int bytes = t.bytes() - 16 * t.word;
  if (((misaligned(t.at(m, 0), 16) | static_cast<int>(m.row_stride % 16)) == 0) & (bytes > 0)) {
    for (int row = t.row; row < t.rows; row += t.step) {
      device::copy_async_16(rows + row * t.words + t.word, t.at(m, row) + 16 * t.word, bytes < 16 ? bytes : 16);
    }
  } else {
    for (int row = t.row; row < t.rows; row += kParkRows * t.step) {
      Words data[kParkRows];
#pragma unroll
      for (int r = 0; r < kParkRows; ++r) {
        if (row + r * t.step < t.rows) data[r] = load_word<T>(t.at(m, row + r * t.step), t.bytes(), t.word);
      }
#pragma unroll
      for (int r = 0; r < kParkRows; ++r) {
        if (row + r * t.step < t.rows) rows[(row + r * t.step) * t.words + t.word] = data[r];
      }
    }
  }
  device::copy_commit();
}

// This thread's columns in `count` <= 8 rows from `row` on.
template <class T, int N>
__device__ __forceinline__ void parked_rows(const Tile<T>& t, const Words* rows, int row, int count,
                                            Columns<T, N> (&data)[kBlockRows]) {
  using Bytes = std::conditional_t<sizeof(Columns<T, N>) == 8, std::uint64_t, std::uint32_t>;
  static_assert(sizeof(Bytes) == sizeof(Columns<T, N>));
  const char* at = reinterpret_cast<const char*>(rows + row * t.words) + t.column * static_cast<int>(sizeof(T));
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r) {
    if (r >= count) continue;
    const Bytes bytes = *reinterpret_cast<const Bytes*>(at + r * t.words * 16);
    __builtin_memcpy(&data[r], &bytes, sizeof bytes);
  }
}

// f(stretch, its rows) for those of this thread.
template <class T, class F>
__device__ __forceinline__ void for_stretches(const Tile<T>& t, const cuda::Slab& slab, F&& f) {
  for (int stretch = t.stretch; stretch < slab.stretches; stretch += t.stretch_step) {
    f(stretch, rows_of_stretch(t.rows, stretch));
  }
}

// out = f(row, row within the block) for the words of this thread.
template <class T, class F>
__device__ __forceinline__ void for_parked(const Tile<T>& t, const Matrices<char*>& out, F&& f) {
  constexpr int L = cuda::kSlabWords;  // lanes that store together
  const int first = t.word / L * L, more = t.bytes() - 16 * first;
  const int bytes = more < 0 ? 0 : more < 16 * L ? more : 16 * L;
  for (int row = t.row; row < t.rows; row += t.step) {
    const Words word[1] = {f(t.first_row + row, row)};
    store_run<T, L, 1>(t.at(out, row) + 16 * first, bytes, group_mask<L>(), t.word % L, word);
  }
}

// ---- columns across the cluster ----------------------------------------------------------------------------------

// Lanes that fold a column: a power of two, at least as many as there are pieces, up to 32.
__device__ __forceinline__ int lanes_of_column(std::int64_t pieces) {
  int width = 1;
  while (width < 32 && width < pieces) width *= 2;
  return width;
}

// f(column, there, lead) for the columns of a slab that belong to this block, each by lanes_of_column adjacent lanes,
// of which one is `lead`. Not there: lanes that only take part in shuffles. Whole warps call f.
template <class T, class F>
__device__ __forceinline__ void for_columns(const Tile<T>& t, std::int64_t pieces, F&& f) {
  const int width = lanes_of_column(pieces);
  const int blocks = static_cast<int>(device::cluster_size()), groups = static_cast<int>(blockDim.x) / width;
  for (int first = 0; first < t.columns; first += groups * blocks) {
    const int group = static_cast<int>(threadIdx.x) / width;
    const int column = first + group * blocks + static_cast<int>(device::cluster_rank());
    f(column, column < t.columns, static_cast<int>(threadIdx.x) % width == 0);
  }
}

// Of a column over all rows of its matrix, make(3 numbers, rows of a stretch) of every stretch. not there: of none
template <class M, class T, class K, class A, class Make>
__device__ __forceinline__ M fold_slab(const A& a, const SlabMemory<T, K>& memory, int column, bool there, int set,
                                       Make&& make) {
  return fold_places(there ? a.pieces : 0, lanes_of_column(a.pieces), [&](std::int64_t piece) {
    return fold_column<M>([&](int w) {
      const int stretch = static_cast<int>(piece) * kColumnWarps + w;
      const int rows = rows_of_stretch(a.rows, stretch);
      if (rows == 0) return M{};
      const int block = stretch / memory.stretches;
      const double* part = device::of_block(memory.part(set, stretch - block * memory.stretches, 0, column),
                                            static_cast<unsigned>(block));
      return make(part[0], part[memory.width], part[2 * memory.width], rows);
    });
  });
}

// To every block of the cluster.
template <class T, class K>
__device__ __forceinline__ void publish(const SlabMemory<T, K>& memory, int column, const K& k) {
  for (unsigned block = 0; block < device::cluster_size(); ++block) {
    *device::of_block(memory.constants + column, block) = k;
  }
}

// Of the columns of this thread; zero beyond the slab's.
template <class T, class K>
__device__ __forceinline__ void load_constants(const Tile<T>& t, const SlabMemory<T, K>& memory, K (&k)[kPerWord<T>]) {
#pragma unroll
  for (int e = 0; e < kPerWord<T>; ++e) {
    const int column = t.word * kPerWord<T> + e;
    k[e] = column < t.columns ? memory.constants[column] : K{};
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

// finish_column(index, statistic): the constants K of a column; apply(row, word, constants of its columns): a word of y
template <class T, class K, class Finish, class Apply>
__device__ __forceinline__ void forward_of_slabs(const cuda::ColumnForward& a, Finish&& finish_column, Apply&& apply) {
  using C = Compute<T>;
  constexpr int kSets = kMomentSets<T>, N = kThreadColumns<T>;
  const SlabMemory<T, K> memory(a.slab, kSets);
  const Tile<T> t(a);
  park(t, x_of(a), memory.rows);
  device::copy_wait<0>();
  device::sync_block();

  const auto collect = [&](auto scaled, double scale, int set) {
    for_stretches(t, a.slab, [&](int stretch, int rows) {
      stretch_moments<T, decltype(scaled)::value, N>(
          a, rows, t.columns - t.column, scale,
          [&](int row, int count, Columns<T, N>(&data)[kBlockRows]) {
            parked_rows(t, memory.rows, stretch * kStretchRows + row, count, data);
          },
          [&](int e, double pivot, double sum, double m2) {
            double* part = memory.part(set, stretch, 0, t.column + e);
            part[0] = pivot;
            part[memory.width] = sum;
            part[2 * memory.width] = m2;
          });
    });
  };
  collect(Unscaled{}, 1.0, 0);
  if constexpr (kSets > 1) {
#pragma unroll 1
    for (int set = 1; set < kSets; ++set) collect(Scaled{}, set_scale(set), set);
  }
  device::sync_cluster();  // the moments are there

  for_columns(t, a.pieces, [&](int column, bool there, bool lead) {
    const auto total_of = [&](int set) {
      return fold_slab<Counted>(a, memory, column, there, set, [](double pivot, double sum, double m2, int rows) {
        return Counted{{pivot, sum, 0.0, m2}, static_cast<double>(rows)};
      });
    };
    Counted total = total_of(0);
    const double variance = total.moments.m2 / total.count;
    const bool redo = there && out_of_range<C>(variance, a.eps);
    const int wanted = redo ? set_of(redo_scale<C>(variance)) : 0;
    if constexpr (kSets > 1) {
#pragma unroll 1
      for (int set = 1; set < kSets; ++set) {
        if (!device::any(device::kAllLanes, wanted == set)) continue;
        const Counted scaled = total_of(set);
        if (wanted == set) total = scaled;
      }
    }
    if (!there || !lead) return;
    const double scale = sizeof(C) == 4 ? 1.0 : set_scale(wanted);
    const Statistic<C> s = redo ? finish_scaled<C>(total.moments, total.count, a.eps, scale)
                                : finish<C>(total.moments, total.count, a.eps);
    publish(memory, column, finish_column(t.statistic(a, column), s));
  });
  device::sync_cluster();  // the constants are there

  K k[kPerWord<T>];
  load_constants(t, memory, k);
  for_parked(t, y_of(a), [&](std::int64_t row, int own) { return apply(row, memory.rows[own * t.words + t.word], k); });
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2) column_forward_resident(cuda::ColumnForward a) {
  using N = Normalizer<Compute<T>>;
  forward_of_slabs<T, N>(
      a,
      [&](std::int64_t i, const Statistic<Compute<T>>& s) {
        store_statistic(a, i, s);
        return s.normalizer;
      },
      [&](std::int64_t row, const Words& x, const N(&n)[kPerWord<T>]) {
        return applied<T>(x, n, weight_of_row<T>(a, row), bias_of_row<T>(a, row));
      });
}

// Every column a channel (BN).
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2)
    column_channels_resident(cuda::ColumnForward a, cuda::Channels channels) {
  using K = ChannelConstants<Compute<T>>;
  forward_of_slabs<T, K>(
      a,
      [&](std::int64_t i, const Statistic<Compute<T>>& s) {
        store_statistic(channels, i, s);
        return channel_constants<T>(channels, i, s);
      },
      [&](std::int64_t /*row*/, const Words& x, const K(&k)[kPerWord<T>]) { return applied<T>(x, k); });
}

// ---- backward ----------------------------------------------------------------------------------------------------

// finish_column(index, sums): the constants of a column
template <class T, class Finish>
__device__ __forceinline__ void backward_of_slabs(const cuda::ColumnBackward& a, Finish&& finish_column) {
  using C = Compute<T>;
  using K = GradientConstants<C>;
  constexpr int N = kThreadColumns<T>;
  const SlabMemory<T, K> memory(a.slab, 1);
  const Words* x_rows = memory.rows;
  const Words* dy_rows = memory.rows + memory.tensor_words;
  const Tile<T> t(a);
  park(t, x_of(a), memory.rows);
  park(t, dy_of(a), memory.rows + memory.tensor_words);
  C mean[N], rstd[N];
  load_statistics(a, t.statistic(a, t.column), t.columns - t.column, mean, rstd);
  device::copy_wait<0>();
  device::sync_block();

  for_stretches(t, a.slab, [&](int stretch, int rows) {
    stretch_sums<T, N>(
        a, t.first_row + stretch * kStretchRows, rows, t.columns - t.column, mean, rstd,
        [&](int row, int count, Columns<T, N>(&dy)[kBlockRows], Columns<T, N>(&x)[kBlockRows]) {
          parked_rows(t, dy_rows, stretch * kStretchRows + row, count, dy);
          parked_rows(t, x_rows, stretch * kStretchRows + row, count, x);
        },
        [&](int e, double g, double gt, double sum_t) {
          double* part = memory.part(0, stretch, 0, t.column + e);
          part[0] = g;
          part[memory.width] = gt;
          part[2 * memory.width] = sum_t;
        });
  });
  device::sync_cluster();  // the sums are there

  for_columns(t, a.pieces, [&](int column, bool there, bool lead) {
    const GradientSums total = fold_slab<GradientSums>(
        a, memory, column, there, 0,
        [](double g, double gt, double sum_t, int /*rows*/) { return GradientSums{g, gt, sum_t}; });
    if (!there || !lead) return;
    publish(memory, column, finish_column(t.statistic(a, column), total));
  });
  device::sync_cluster();  // the constants are there

  K k[kPerWord<T>];
  load_constants(t, memory, k);
  const bool there = t.word * kPerWord<T> < t.columns;
  C* partial = there ? partial_of<C>(a, t.matrix, t.first_word + t.word) : nullptr;
  for_parked(t, dx_of(a), [&](std::int64_t row, int own) {
    const int at = own * t.words + t.word;
    return gradient_word<T>(a, row, dy_rows[at], x_rows[at], k, partial, group_mask<cuda::kSlabWords>());
  });
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2) column_backward_resident(cuda::ColumnBackward a) {
  backward_of_slabs<T>(
      a, [&](std::int64_t i, const GradientSums& sums) { return column_constants<Compute<T>>(a, sums, i); });
}

// Every column a channel (BN).
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2)
    column_backward_channels_resident(cuda::ColumnBackward a, cuda::Channels channels) {
  backward_of_slabs<T>(
      a, [&](std::int64_t i, const GradientSums& sums) { return gradient_constants<T>(channels, i, sums, true); });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
