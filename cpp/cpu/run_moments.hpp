// Moments of runs: one or several contiguous runs -> count, mean, m2. The order of operations is stated in blocks.hpp.
//
// T storage, V compute vector, D = F64x8.
#pragma once

#include <cstdint>

#include "core/moments.hpp"
#include "cpu/blocks.hpp"
#include "cpu/lines.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- reading a piece ---------------------------------------------------------------------------------------------

// Adjacent elements; x is multiplied by a power of two where kScaled.
template <class T, class V, bool kScaled>
struct Adjacent {
  const char* base;
  typename V::Scalar scale;
  template <class P>
  LANENORM_INLINE V operator()(std::int64_t vector, P part) const {
    const V x = load<T, V>(base + vector * V::kLanes * static_cast<std::int64_t>(sizeof(T)), part);
    if constexpr (kScaled) return x * V::broadcast(scale);
    return x;
  }
  LANENORM_INLINE typename V::Scalar first() const {
    const typename V::Scalar x = first_value<T, typename V::Scalar>(base);
    if constexpr (kScaled) return x * scale;
    return x;
  }
  LANENORM_INLINE Adjacent from(std::int64_t vector) const {
    return {base + vector * V::kLanes * static_cast<std::int64_t>(sizeof(T)), scale};
  }
};

// ---- moments of float32 data -------------------------------------------------------------------------------------

// The pivot of a superblock of `vectors` >= 1 full vectors, from the first of them and the middle one.
template <class T, class V>
LANENORM_INLINE typename V::Scalar sampled_pivot(const char* x, std::int64_t vectors) {
  using S = typename V::Scalar;
  constexpr std::int64_t kVectorBytes = V::kLanes * static_cast<std::int64_t>(sizeof(T));
  const S x0 = first_value<T, S>(x);
  const V origin = V::broadcast(x0);
  const V a = load<T, V>(x, Full{}) - origin, b = load<T, V>(x + vectors / 2 * kVectorBytes, Full{}) - origin;
  constexpr S kInverse = S(1) / S(2 * V::kLanes);
  return coarse_pivot(x0, (a + b).fold() * kInverse, (abs(a) + abs(b)).fold() * kInverse * kPivotGrain<S>);
}

// What is fetched while a run is read: as many bytes from `next` on, which moves on, or nothing where it is null. near:
// into L1, as it is read soon; else into L2.
struct Fetching {
  const char* next = nullptr;
  bool near = false;
  LANENORM_INLINE void fetch(std::int64_t bytes) {
    if (next == nullptr) return;
    if (near) {
      LANENORM_UNROLL
      for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 3);
    } else {
      LANENORM_UNROLL
      for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    next += bytes;
  }
};

// Sums of a superblock about its pivot.
template <class T, class V>
LANENORM_INLINE LaneSums<V> superblock_sums(const char* x, std::int64_t length, V pivot, Fetching* fetching) {
  constexpr std::int64_t kLanes = V::kLanes, kVectorBytes = kLanes * static_cast<std::int64_t>(sizeof(T));
  LaneSums<V> lanes{V::zero(), V::zero()}, odd{V::zero(), V::zero()};
  const auto next = [&](auto n) LANENORM_LAMBDA_INLINE {
    constexpr int N = decltype(n)::value;
    fetching->fetch(N * kVectorBytes);
    V d[N];
    LANENORM_UNROLL
    for (int i = 0; i < N; ++i) d[i] = load<T, V>(x + i * kVectorBytes, Full{}) - pivot;
    x += N * kVectorBytes;
    return LaneSums<V>{tree<N>(d), sum_of_squares<N>(d)};
  };
  const auto add = [&](LaneSums<V>* to, const LaneSums<V>& part) LANENORM_LAMBDA_INLINE {
    to->sum = to->sum + part.sum;
    to->square = to->square + part.square;
  };
  std::int64_t blocks = length / (kBlock * kLanes);
  for (; blocks >= 2; blocks -= 2) {
    add(&lanes, next(Count<kBlock>{}));
    add(&odd, next(Count<kBlock>{}));
  }
  if (blocks > 0) add(&lanes, next(Count<kBlock>{}));
  if (length & 4 * kLanes) add(&odd, next(Count<4>{}));
  if (length & 2 * kLanes) add(&odd, next(Count<2>{}));
  if (length & kLanes) add(&odd, next(Count<1>{}));
  if (length % kLanes != 0) {
    const Part part{static_cast<int>(length % kLanes)};
    fetching->fetch(part.lanes * static_cast<std::int64_t>(sizeof(T)));
    const V d = keep_part(load<T, V>(x, part) - pivot, part);
    odd.sum = odd.sum + d;
    odd.square = fma(d, d, odd.square);
  }
  add(&lanes, odd);
  return lanes;
}

// Full vectors of the first superblock of a run.
template <class V>
LANENORM_INLINE std::int64_t first_vectors(std::int64_t length) {
  return length < kSuperblock * V::kLanes ? length / V::kLanes : kSuperblock;
}

// A run joins the sums about `pivot`. first: sampled_pivot(x) if the run has a full vector. (Short runs fetch nothing.)
template <class T, class V, class D>
LANENORM_INLINE void add_run(const char* x, std::int64_t length, double pivot, typename V::Scalar first,
                             PivotSums<D>* sums, Fetching fetching) {
  constexpr std::int64_t kElements = kSuperblock * V::kLanes, kBytes = sizeof(T);
  for (bool blocks = length >= kShortRun * V::kLanes; blocks && length >= V::kLanes;) {
    const std::int64_t count = length < kElements ? length : kElements;
    length -= count;
    // The next pivot is a long chain of dependent operations: started here, it runs beside this superblock.
    const typename V::Scalar own = first;
    const std::int64_t next = first_vectors<V>(length);
    if (next > 0) first = sampled_pivot<T, V>(x + count * kBytes, next);
    const LaneSums<V> lanes = superblock_sums<T, V>(x, count, V::broadcast(own), &fetching);
    add_lanes<V>(lanes, static_cast<double>(count), static_cast<double>(own) - pivot, sums);
    x += count * kBytes;
  }
  if (length > 0) add_in_double<T, V>(x, length, D::broadcast(pivot), sums);
}

// ---- moments of float64 data -------------------------------------------------------------------------------------

template <class V, class X>
LANENORM_INLINE Lanes<V> full_blocks(const X& x, V pivot, int blocks) {
  V mean;
  Lanes<V> lanes = block<kBlock, V>(x, pivot, Full{}, &mean);
  for (int k = 1; k < blocks; ++k) {
    const Lanes<V> next = block<kBlock, V>(x.from(k * kBlock), pivot, Full{}, &mean);
    add_full_block(&lanes, k, next, mean);
  }
  return lanes;
}

// The shape of a superblock of adjacent elements: full blocks, then N vectors of which the last has `lanes` lanes.
struct Extent {
  std::int64_t elements;
  int full_blocks;
  int tail_vectors;  // 0..8
  int lanes;         // of the last vector
};

template <class V>
LANENORM_INLINE Extent extent_of(std::int64_t elements) {
  constexpr int kLanes = V::kLanes;
  Extent e;
  e.elements = elements;
  e.full_blocks = static_cast<int>(elements / (kBlock * kLanes));
  const int rest = static_cast<int>(elements % (kBlock * kLanes));
  e.tail_vectors = (rest + kLanes - 1) / kLanes;
  e.lanes = rest == 0 ? kLanes : rest - (e.tail_vectors - 1) * kLanes;
  return e;
}

// Not inlined, like superblock_moments: 16 tails each, several callers.
template <class V, class X>
[[gnu::noinline]] typename V::Scalar superblock_pivot(const X& x, const Extent& e) {
  using S = typename V::Scalar;
  const S x0 = x.first();
  if (e.full_blocks > 0) return row_pivot<kBlock, V>(x, Full{}, x0, S(1) / S(kBlock * V::kLanes));
  const S inverse = inverse_power_of_two<S>(e.elements);
  return with_vectors(e.tail_vectors, [&](auto n) LANENORM_LAMBDA_INLINE {
    return with_last<V>(e.lanes, [&](auto last) LANENORM_LAMBDA_INLINE {
      return row_pivot<decltype(n)::value, V>(x, last, x0, inverse);
    });
  });
}

template <class V, class D, class X>
[[gnu::noinline]] Moments<double> superblock_moments(const X& x, const Extent& e, typename V::Scalar pivot) {
  using S = typename V::Scalar;
  const V p = V::broadcast(pivot);
  const double count = static_cast<double>(e.elements);
  if (e.tail_vectors == 0) {
    return fold_lanes<V, D>(full_blocks<V>(x, p, e.full_blocks), pivot, count, kBlock * e.full_blocks);
  }
  Lanes<V> lanes{V::zero(), V::zero()};
  if (e.full_blocks > 0) lanes = full_blocks<V>(x, p, e.full_blocks);
  const X tail = x.from(e.full_blocks * kBlock);
  return with_vectors(e.tail_vectors, [&](auto n) LANENORM_LAMBDA_INLINE {
    constexpr int kVectors = decltype(n)::value;
    return with_last<V>(e.lanes, [&](auto last) LANENORM_LAMBDA_INLINE {
      V mean;
      const Lanes<V> next = block<kVectors, V>(tail, p, last, &mean);
      if constexpr (sizeof(last) == sizeof(Part)) {
        const V counts = V::broadcast(S(kVectors - 1)) + keep_part(V::broadcast(S(1)), last);
        if (e.full_blocks == 0) return fold_ragged<V, D>(next, pivot, count, counts);
        add_block(&lanes, e.full_blocks, next, mean, counts);
        return fold_ragged<V, D>(lanes, pivot, count, counts + V::broadcast(S(kBlock * e.full_blocks)));
      } else {
        if (e.full_blocks == 0) return fold_lanes<V, D>(next, pivot, count, kVectors);
        add_block(&lanes, e.full_blocks, next, mean, V::broadcast(S(kVectors)));
        return fold_lanes<V, D>(lanes, pivot, count, kVectors + kBlock * e.full_blocks);
      }
    });
  });
}

// ---- moments of a piece ------------------------------------------------------------------------------------------

using PieceTree = MomentsTree<16>;

template <class V, bool kScaled>
LANENORM_INLINE void push_run(const char* x, std::int64_t length, double scale, PieceTree* tree, Fetching fetching) {
  constexpr std::int64_t kElements = kSuperblock * V::kLanes;
  using X = Adjacent<double, V, kScaled>;
  const X whole{x, scale};
  Extent e = extent_of<V>(length < kElements ? length : kElements);
  double pivot = superblock_pivot<V>(whole, e);
  for (std::int64_t i = 0; i < length;) {
    const std::int64_t next = i + e.elements;
    const Extent next_e = extent_of<V>(next + kElements <= length ? kElements : length - next);
    double next_pivot = 0.0;  // started before the superblock, as in add_run
    if (next < length) next_pivot = superblock_pivot<V>(whole.from(next / V::kLanes), next_e);
    fetching.fetch(e.elements * 8);
    tree->push(superblock_moments<V, V>(whole.from(i / V::kLanes), e, pivot), static_cast<double>(e.elements));
    i = next;
    e = next_e;
    pivot = next_pivot;
  }
}

// kWide: in double throughout, x scaled (float64): for statistics out of range. ahead: (runs) to fetch meanwhile, or
// null.
template <class T, class V, class D, bool kWide>
[[gnu::noinline]] Moments<double> piece_moments(const void* const* x, std::int64_t runs, std::int64_t length,
                                                double scale, double* count, const void* const* ahead = nullptr) {
  if constexpr (sizeof(T) == 8) {
    PieceTree tree;
    for (std::int64_t run = 0; run < runs; ++run) {
      push_run<D, kWide>(static_cast<const char*>(x[run]), length, scale, &tree,
                         {ahead == nullptr ? nullptr : static_cast<const char*>(ahead[run])});
    }
    return tree.total(count);
  } else {
    *count = static_cast<double>(runs * length);
    if (!kWide && length >= kShortRun * V::kLanes) {
      const auto pivot_of = [&](std::int64_t run) LANENORM_LAMBDA_INLINE {
        return sampled_pivot<T, V>(static_cast<const char*>(x[run]), first_vectors<V>(length));
      };
      auto first = pivot_of(0);
      const double pivot = static_cast<double>(first);
      PivotSums<D> sums = no_sums<D>();
      for (std::int64_t run = 0; run < runs; ++run) {
        if (run > 0) first = pivot_of(run);
        add_run<T, V>(static_cast<const char*>(x[run]), length, pivot, first, &sums,
                      {ahead == nullptr ? nullptr : static_cast<const char*>(ahead[run])});
      }
      const double sum = sums.sum.fold() + sums.moved, square = sums.square.fold() + sums.moved_square;
      const Moments<double> m = moments_about(pivot, sum, square, *count, 0.0);
      if (!(sums.spread.fold() > kSpread * m.m2)) return m;
    }
    const double pivot = first_value<T, double>(static_cast<const char*>(x[0]));
    PivotSums<D> sums = no_sums<D>();
    for (std::int64_t run = 0; run < runs; ++run) {
      add_in_double<T, V>(static_cast<const char*>(x[run]), length, D::broadcast(pivot), &sums);
    }
    return moments_about(pivot, sums.sum.fold(), sums.square.fold(), *count, 0.0);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
