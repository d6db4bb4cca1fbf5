// Rows: statistics along contiguous runs, folded across lanes.
//
//   y  = (x - mean) * rstd * weight + bias            Ba, Kiros, Hinton 2016, eq. 4; Ioffe & Szegedy 2015, alg. 1
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight,  dweight = sum dy * xhat,  dbias = sum dy
//
// Passes over memory: forward reads x once and writes y (2s), the apply sweep finds the row in L1 or L2; backward
// reads x and dy once and writes dx (3s), for the same reason. Rows longer than a piece (kPieceVectors) are swept
// twice by the driver. The order of operations is stated in blocks.hpp.
//
// T storage, V compute vector, D = F64x8. Longer than 300 lines because forward and backward read as one method.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "core/moments.hpp"
#include "cpu/blocks.hpp"
#include "cpu/kernels.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// ---- reading a piece ---------------------------------------------------------------------------------------------

// Adjacent elements; x is multiplied by a power of two where kScaled.
template <class T, class V, bool kScaled>
struct Adjacent {
  const char* base;
  V scale;
  template <class P>
  LANENORM_INLINE V operator()(std::int64_t vector, P part) const {
    const V x = load<T, V>(base + vector * V::kLanes * static_cast<std::int64_t>(sizeof(T)), part);
    if constexpr (kScaled) return x * scale;
    return x;
  }
  LANENORM_INLINE Adjacent from(std::int64_t vector) const {
    return {base + vector * V::kLanes * static_cast<std::int64_t>(sizeof(T)), scale};
  }
};

// Vectors that lie in several runs.
template <class T, class V, bool kScaled>
struct Scattered {
  const char* const* vector;
  V scale;
  template <class P>
  LANENORM_INLINE V operator()(std::int64_t i, P part) const {
    const V x = load<T, V>(vector[i], part);
    if constexpr (kScaled) return x * scale;
    return x;
  }
  LANENORM_INLINE Scattered from(std::int64_t i) const { return {vector + i, scale}; }
};

template <class V, class X>
LANENORM_INLINE typename V::Scalar first_element(const X& x) {
  return x(0, Part{1}).fold();  // one value and zeros
}

// ---- moments of a superblock -------------------------------------------------------------------------------------

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
  const S x0 = first_element<V>(x);
  if (e.full_blocks > 0) return row_pivot<kBlock, V>(x, Full{}, x0, S(1) / S(kBlock * V::kLanes));
  const S inverse = inverse_power_of_two<S>(e.elements);
  return with_vectors(e.tail_vectors, [&](auto n) LANENORM_LAMBDA_INLINE {
    return with_last<V>(e.lanes, [&](auto last) LANENORM_LAMBDA_INLINE {
      return row_pivot<decltype(n)::value, V>(x, last, x0, inverse);
    });
  });
}

template <class V, class X>
LANENORM_INLINE Lanes<V> full_blocks(const X& x, V pivot, int blocks) {
  V mean;
  Lanes<V> lanes = block<kBlock, V>(x, pivot, Full{}, &mean);
  for (int k = 1; k < blocks; ++k) {
    const Lanes<V> next = block<kBlock, V>(x.from(k * kBlock), pivot, Full{}, &mean);
    add_block(&lanes, k, next, mean, kBlock);
  }
  return lanes;
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
        add_block(&lanes, e.full_blocks, next, mean, kVectors);
        return fold_lanes<V, D>(lanes, pivot, count, kVectors + kBlock * e.full_blocks);
      }
    });
  });
}

// Up to 64 vectors anywhere, each with its own number of lanes: runs whose length is no multiple of a vector.
template <class V, class D, class X>
Moments<double> ragged_moments(const X& x, const int* lane_count, int vectors, double* count) {
  using S = typename V::Scalar;
  const V one = V::broadcast(S(1));
  const int first = vectors < kBlock ? vectors : kBlock;
  std::int64_t first_count = 0, total = 0;
  for (int i = 0; i < vectors; ++i) {
    total += lane_count[i];
    if (i < first) first_count += lane_count[i];
  }
  V d[kBlock], magnitude[kBlock];
  const S x0 = first_element<V>(x);
  for (int i = 0; i < kBlock; ++i) {
    d[i] = i < first ? keep(x(i, Part{lane_count[i]}) - V::broadcast(x0), lane_count[i]) : V::zero();
    magnitude[i] = abs(d[i]);
  }
  const V inverse = V::broadcast(inverse_power_of_two<S>(first_count));
  const V pivot = pivot_from(V::broadcast(x0), V::broadcast(tree<kBlock>(d).fold()) * inverse,
                             V::broadcast(tree<kBlock>(magnitude).fold()) * inverse);

  V sum = V::zero(), m2 = V::zero(), counts = V::zero();
  for (int i = 0; i < vectors; i += kBlock) {
    V block_counts = V::zero();
    for (int j = 0; j < kBlock; ++j) {
      const int lanes = i + j < vectors ? lane_count[i + j] : 0;
      d[j] = lanes > 0 ? keep(x(i + j, Part{lanes}) - pivot, lanes) : V::zero();
      block_counts = block_counts + keep(one, lanes);
    }
    const V block_sum = tree<kBlock>(d);
    const V mean = block_sum / at_least_one(block_counts);
    for (int j = 0; j < kBlock; ++j) {
      d[j] = keep(d[j] - mean, i + j < vectors ? lane_count[i + j] : 0);
    }
    const V delta = mean - sum / at_least_one(counts);
    const V weight = block_counts * counts / at_least_one(block_counts + counts);
    m2 = fma(delta * delta, weight, m2 + sum_of_squares<kBlock>(d));
    sum = sum + block_sum;
    counts = counts + block_counts;
  }
  *count = static_cast<double>(total);
  return fold_ragged<V, D>(Lanes<V>{sum, m2}, keep(pivot, 1).fold(), *count, counts);
}

// ---- moments of a piece ------------------------------------------------------------------------------------------

using PieceTree = MomentsTree<8>;  // 64 superblocks; a piece of short ragged runs may have up to 128

template <class T, class V, class D, bool kScaled>
[[gnu::noinline]] Moments<double> line_moments(const char* x, std::int64_t length, V scale, double* count) {
  constexpr std::int64_t kElements = kSuperblock * V::kLanes;
  using X = Adjacent<T, V, kScaled>;
  const X whole{x, scale};
  if (length <= kElements) {
    const Extent e = extent_of<V>(length);
    *count = static_cast<double>(length);
    return superblock_moments<V, D>(whole, e, superblock_pivot<V>(whole, e));
  }
  PieceTree tree;
  Extent e = extent_of<V>(kElements);
  typename V::Scalar pivot = superblock_pivot<V>(whole, e);
  for (std::int64_t i = 0; i < length;) {
    // The next pivot is a long chain of dependent operations: started here, it runs beside this superblock.
    const std::int64_t next = i + e.elements;
    const Extent next_e = extent_of<V>(next + kElements <= length ? kElements : length - next);
    typename V::Scalar next_pivot{};
    if (next < length) next_pivot = superblock_pivot<V>(whole.from(next / V::kLanes), next_e);
    tree.push(superblock_moments<V, D>(whole.from(i / V::kLanes), e, pivot), static_cast<double>(e.elements));
    i = next;
    e = next_e;
    pivot = next_pivot;
  }
  return tree.total(count);
}

template <class T, class V, class D, bool kScaled>
LANENORM_INLINE Moments<double> runs_moments(const void* const* x, std::int64_t runs, std::int64_t length, V scale,
                                             double* count) {
  if (runs == 1) return line_moments<T, V, D, kScaled>(static_cast<const char*>(x[0]), length, scale, count);
  const char* pointer[kSuperblock];
  int lanes[kSuperblock];
  PieceTree tree;
  std::int64_t run = 0, position = 0;
  while (run < runs) {
    int vectors = 0;
    bool full = true;
    for (; vectors < kSuperblock && run < runs; ++vectors) {
      const std::int64_t rest = length - position;
      pointer[vectors] = static_cast<const char*>(x[run]) + position * static_cast<std::int64_t>(sizeof(T));
      lanes[vectors] = static_cast<int>(rest < V::kLanes ? rest : V::kLanes);
      full = full && rest >= V::kLanes;
      position += V::kLanes;
      if (position >= length) position = 0, ++run;
    }
    const Scattered<T, V, kScaled> piece{pointer, scale};
    if (full && vectors == kSuperblock) {
      using S = typename V::Scalar;
      constexpr int kBlocks = kSuperblock / kBlock;
      const S pivot = row_pivot<kBlock, V>(piece, Full{}, first_element<V>(piece), S(1) / S(kBlock * V::kLanes));
      const Lanes<V> sums = full_blocks<V>(piece, V::broadcast(pivot), kBlocks);
      constexpr double kCount = kSuperblock * V::kLanes;
      tree.push(fold_lanes<V, D>(sums, pivot, kCount, kSuperblock), kCount);
    } else {
      double piece_count;
      const Moments<double> moments = ragged_moments<V, D>(piece, lanes, vectors, &piece_count);
      tree.push(moments, piece_count);
    }
  }
  return tree.total(count);
}

template <class T, class V, class D, bool kScaled>
PieceMoments row_moments(const RowMoments& a) {
  double count;
  const V scale = V::broadcast(static_cast<typename V::Scalar>(a.scale));
  const Moments<double> m = runs_moments<T, V, D, kScaled>(a.x, a.runs, a.length, scale, &count);
  return {m.pivot, m.sum, m.low, m.m2, count};
}

// ---- apply -------------------------------------------------------------------------------------------------------

// weight and bias of a position within the row.
template <class V, bool kWeight, bool kBias>
struct ElementAffine {
  const typename V::Scalar* weight;
  const typename V::Scalar* bias;
  template <class P>
  LANENORM_INLINE V operator()(V xhat, std::int64_t i, P part) const {
    using S = typename V::Scalar;
    if constexpr (kWeight && kBias) {
      return fma(xhat, load<S, V>(reinterpret_cast<const char*>(weight + i), part),
                 load<S, V>(reinterpret_cast<const char*>(bias + i), part));
    } else if constexpr (kWeight) {
      return xhat * load<S, V>(reinterpret_cast<const char*>(weight + i), part);
    } else if constexpr (kBias) {
      return xhat + load<S, V>(reinterpret_cast<const char*>(bias + i), part);
    } else {
      return xhat;
    }
  }
};

// weight and bias of the statistic; 1 and -0 stand for none and change no bit.
template <class V>
struct StatisticAffine {
  V weight, bias;
  template <class P>
  LANENORM_INLINE V operator()(V xhat, std::int64_t, P) const {
    return fma(xhat, weight, bias);
  }
};

template <class T, class V, bool kScaled, class A>
LANENORM_INLINE void apply_line(const char* x, char* y, std::int64_t length, const Normalizer<typename V::Scalar>& n,
                                const A& affine) {
  const V mean = V::broadcast(n.mean), rstd = V::broadcast(n.rstd), rstd_low = V::broadcast(n.rstd_low);
  const V shift = V::broadcast(n.shift), scale = V::broadcast(n.scale);
  for_vectors<V, 2>(length, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    V v = load<T, V>(x + i * static_cast<std::int64_t>(sizeof(T)), part);
    if constexpr (kScaled) v = v * scale;
    store<T>(affine(normalize(v, mean, rstd, rstd_low, shift), i, part), y + i * static_cast<std::int64_t>(sizeof(T)),
             part);
  });
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

template <class T, class V, class A>
LANENORM_INLINE void apply_any(const char* x, char* y, std::int64_t length, const Normalizer<typename V::Scalar>& n,
                               const A& affine) {
  if (n.scale == 1) {
    apply_line<T, V, false>(x, y, length, n, affine);
  } else {
    apply_line<T, V, true>(x, y, length, n, affine);
  }
}

template <class T, class V>
void row_apply(const RowApply& a) {
  using S = typename V::Scalar;
  const Normalizer<S>& n = *static_cast<const Normalizer<S>*>(a.normalizer);
  const auto runs = [&](auto affine_of_run) LANENORM_LAMBDA_INLINE {
    for (std::int64_t run = 0; run < a.runs; ++run) {
      apply_any<T, V>(static_cast<const char*>(a.x[run]), static_cast<char*>(a.y[run]), a.length, n,
                      affine_of_run(run));
    }
  };
  if (!a.per_element) {
    const S weight = a.weight == nullptr ? S(1) : *static_cast<const S*>(a.weight);
    const S bias = a.bias == nullptr ? -S(0) : *static_cast<const S*>(a.bias);
    runs([&](std::int64_t) { return StatisticAffine<V>{V::broadcast(weight), V::broadcast(bias)}; });
    return;
  }
  with_affine<V>(a.weight, a.bias, [&](auto affine) LANENORM_LAMBDA_INLINE {
    runs([&](std::int64_t run) {
      auto shifted = affine;
      if (shifted.weight != nullptr) shifted.weight += run * a.length;
      if (shifted.bias != nullptr) shifted.bias += run * a.length;
      return shifted;
    });
  });
}

// ---- forward -----------------------------------------------------------------------------------------------------

// A statistic out of range, redone in double.
template <class T, class V, class D>
[[gnu::noinline]] Statistic<typename V::Scalar> redo_row(const void* x, std::int64_t length, double m2, double eps) {
  using S = typename V::Scalar;
  double count;
  const double scale = redo_scale<S>(m2);
  const Moments<double> m = runs_moments<T, D, D, true>(&x, 1, length, D::broadcast(scale), &count);
  return finish_scaled<S>(m, count, eps, scale);
}

template <class T, class V, class D>
void row_forward(const RowForward& a) {
  using S = typename V::Scalar;
  constexpr std::int64_t kGroup = 8;  // rows whose chains of scalar operations overlap: pivots, then folds, then apply
  S* mean = static_cast<S*>(a.mean);
  S* rstd = static_cast<S*>(a.rstd);
  const bool single = a.length <= kSuperblock * V::kLanes;
  const Extent e = extent_of<V>(single ? a.length : kSuperblock * V::kLanes);
  for (std::int64_t first = 0; first < a.rows; first += kGroup) {
    const std::int64_t group = a.rows - first < kGroup ? a.rows - first : kGroup;
    // Long rows one at a time: a group of them would leave the cache before it is applied.
    const std::int64_t step = single ? group : 1;
    for (std::int64_t start = first; start < first + group; start += step) {
      S pivot[kGroup];
      Normalizer<S> normalizer[kGroup];
      if (single) {
        for (std::int64_t r = 0; r < step; ++r) {
          pivot[r] = superblock_pivot<V>(Adjacent<T, V, false>{static_cast<const char*>(a.x[start + r]), V::zero()}, e);
        }
      }
      for (std::int64_t r = 0; r < step; ++r) {
        const char* x = static_cast<const char*>(a.x[start + r]);
        double count = static_cast<double>(a.length);
        const Moments<double> m = single ? superblock_moments<V, D>(Adjacent<T, V, false>{x, V::zero()}, e, pivot[r])
                                         : line_moments<T, V, D, false>(x, a.length, V::zero(), &count);
        const Statistic<S> s = out_of_range<S>(m.m2, count, a.eps) ? redo_row<T, V, D>(x, a.length, m.m2, a.eps)
                                                                   : finish<S>(m, count, a.eps);
        normalizer[r] = s.normalizer;
        mean[start + r] = s.mean;
        rstd[start + r] = s.rstd;
      }
      with_affine<V>(a.weight, a.bias, [&](auto affine) LANENORM_LAMBDA_INLINE {
        for (std::int64_t r = 0; r < step; ++r) {
          apply_any<T, V>(static_cast<const char*>(a.x[start + r]), static_cast<char*>(a.y[start + r]), a.length,
                          normalizer[r], affine);
        }
      });
    }
  }
}

// ---- backward: sums ----------------------------------------------------------------------------------------------

template <class V>
struct SumLanes {
  V g, gt, t;
};

// One line of `length` elements: lanes hold the sums of at most 64 vectors (8 trees of 8), then go to double.
// Not inlined: 16 tails, several callers.
template <class T, class V, class D, bool kWeight>
[[gnu::noinline]] void line_sums(const char* x, const char* dy, const typename V::Scalar* weight, std::int64_t length,
                                 V mean, V rstd, D* total) {
  using S = typename V::Scalar;
  constexpr std::int64_t kLanes = V::kLanes;
  constexpr std::int64_t kBytes = sizeof(T);
  for (std::int64_t start = 0; start < length; start += kSuperblock * kLanes) {
    const std::int64_t stop = length < start + kSuperblock * kLanes ? length : start + kSuperblock * kLanes;
    SumLanes<V> lanes{V::zero(), V::zero(), V::zero()};
    const auto add = [&](std::int64_t i, auto n, auto last) LANENORM_LAMBDA_INLINE {
      constexpr int N = decltype(n)::value;
      V g[N], t[N];
      const auto one = [&](int j, auto part) LANENORM_LAMBDA_INLINE {
        const std::int64_t at = i + j * kLanes;
        g[j] = load<T, V>(dy + at * kBytes, part);
        if constexpr (kWeight) g[j] = g[j] * load<S, V>(reinterpret_cast<const char*>(weight + at), part);
        t[j] = keep_part((load<T, V>(x + at * kBytes, part) - mean) * rstd, part);
      };
      for (int j = 0; j < N - 1; ++j) one(j, Full{});
      one(N - 1, last);
      lanes.g = lanes.g + tree<N>(g);
      lanes.gt = lanes.gt + tree_of_products<N>(g, t);
      lanes.t = lanes.t + tree<N>(t);
    };
    std::int64_t i = start;
    for (; i + kBlock * kLanes <= stop; i += kBlock * kLanes) add(i, Count<kBlock>{}, Full{});
    if (i < stop) {
      const Extent e = extent_of<V>(stop - i);
      with_vectors(e.tail_vectors, [&](auto n) LANENORM_LAMBDA_INLINE {
        with_last<V>(e.lanes, [&](auto last) LANENORM_LAMBDA_INLINE { add(i, n, last); });
      });
    }
    for (int part = 0; part < V::kWide; ++part) {
      total[0] = total[0] + lanes.g.wide(part);
      total[1] = total[1] + lanes.gt.wide(part);
      total[2] = total[2] + lanes.t.wide(part);
    }
  }
}

template <class T, class V, class D>
LANENORM_INLINE GradientSums runs_sums(const void* const* x, const void* const* dy, std::int64_t runs,
                                       std::int64_t length, const void* weight, V mean, V rstd) {
  using S = typename V::Scalar;
  D total[3] = {D::zero(), D::zero(), D::zero()};
  const S* w = static_cast<const S*>(weight);
  for (std::int64_t run = 0; run < runs; ++run) {
    const char* px = static_cast<const char*>(x[run]);
    const char* pdy = static_cast<const char*>(dy[run]);
    if (w != nullptr) {
      line_sums<T, V, D, true>(px, pdy, w + run * length, length, mean, rstd, total);
    } else {
      line_sums<T, V, D, false>(px, pdy, w, length, mean, rstd, total);
    }
  }
  return {total[0].fold(), total[1].fold(), total[2].fold()};
}

template <class T, class V, class D>
PieceSums row_sums(const RowSums& a) {
  using S = typename V::Scalar;
  const GradientSums sums =
      runs_sums<T, V, D>(a.x, a.dy, a.runs, a.length, a.weight, V::broadcast(static_cast<S>(a.mean)),
                         V::broadcast(static_cast<S>(a.rstd)));
  return {sums.g, sums.gt, sums.t};
}

// ---- backward: gradients -----------------------------------------------------------------------------------------

// dx of N rows; with kParameters the sums over the rows of dy * xhat and dy are added to sum_dweight, sum_dbias.
template <int N, class T, class V, bool kWeight, bool kParameters>
LANENORM_INLINE void gradient_rows(const char* const* x, const char* const* dy, char* const* dx, std::int64_t length,
                                   const typename V::Scalar* weight, const GradientConstants<typename V::Scalar>* c,
                                   int step, typename V::Scalar* sum_dweight, typename V::Scalar* sum_dbias) {
  using S = typename V::Scalar;
  constexpr std::int64_t kBytes = sizeof(T);
  for_vectors<V>(length, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
    V w = V::broadcast(S(1));
    if constexpr (kWeight) w = load<S, V>(reinterpret_cast<const char*>(weight + i), part);
    V g[N], xhat[N];
    for (int r = 0; r < N; ++r) {
      const GradientConstants<S>& k = c[r * step];
      g[r] = load<T, V>(dy[r] + i * kBytes, part);
      xhat[r] = normalize(load<T, V>(x[r] + i * kBytes, part), V::broadcast(k.mean), V::broadcast(k.rstd),
                          V::broadcast(k.shift));
      store<T>(input_gradient(g[r], w, xhat[r], V::broadcast(k.minus_mean_g), V::broadcast(k.minus_mean_gx),
                              V::broadcast(k.factor)),
               dx[r] + i * kBytes, part);
    }
    if constexpr (kParameters) {
      // Scratch is padded to whole vectors: masked lanes only ever touch padding.
      char* pw = reinterpret_cast<char*>(sum_dweight + i);
      char* pb = reinterpret_cast<char*>(sum_dbias + i);
      store<S>(load<S, V>(pw, Full{}) + tree_of_products<N>(g, xhat), pw, Full{});
      store<S>(load<S, V>(pb, Full{}) + tree<N>(g), pb, Full{});
    }
  });
}

// At most kRowBlock rows; at the end of a chunk, and every kFlushRows rows, the float32 sums go to the totals.
template <class T, class V, class D>
[[gnu::noinline]] void gradient_block(const RowGradient& a, std::int64_t first, std::int64_t rows, bool end) {
  using S = typename V::Scalar;
  const char* const* x = reinterpret_cast<const char* const*>(a.x) + first;
  const char* const* dy = reinterpret_cast<const char* const*>(a.dy) + first;
  char* const* dx = reinterpret_cast<char* const*>(a.dx) + first;
  const S* w = static_cast<const S*>(a.weight);
  const GradientConstants<S>* constants = static_cast<const GradientConstants<S>*>(a.constants);
  const int step = a.shared ? 0 : 1;
  const bool parameters = a.dweight != nullptr;
  S* sum_dweight = static_cast<S*>(a.scratch);
  S* sum_dbias = sum_dweight + (parameters ? padded(a.length) : 0);
  const auto block = [&](auto n, std::int64_t r) LANENORM_LAMBDA_INLINE {
    constexpr int N = decltype(n)::value;
    const GradientConstants<S>* c = constants + (a.shared ? 0 : r);
    if (parameters && w != nullptr) {
      gradient_rows<N, T, V, true, true>(x + r, dy + r, dx + r, a.length, w, c, step, sum_dweight, sum_dbias);
    } else if (parameters) {
      gradient_rows<N, T, V, false, true>(x + r, dy + r, dx + r, a.length, w, c, step, sum_dweight, sum_dbias);
    } else if (w != nullptr) {
      gradient_rows<N, T, V, true, false>(x + r, dy + r, dx + r, a.length, w, c, step, sum_dweight, sum_dbias);
    } else {
      gradient_rows<N, T, V, false, false>(x + r, dy + r, dx + r, a.length, w, c, step, sum_dweight, sum_dbias);
    }
  };
  if (rows == kRowBlock) {
    block(Count<kRowBlock>{}, 0);
  } else {
    for (std::int64_t r = 0; r < rows; ++r) block(Count<1>{}, r);
  }
  if (parameters && ((end && a.last) || (a.done + first + kRowBlock) % kFlushRows == 0)) {
    flush<V, D>(sum_dweight, a.length, a.dweight);
    flush<V, D>(sum_dbias, a.length, a.dbias);
  }
}

template <class T, class V, class D>
void row_gradient(const RowGradient& a) {
  using S = typename V::Scalar;
  RowGradient block = a;
  for (std::int64_t first = 0; first < a.rows; first += kRowBlock) {
    const std::int64_t rows = a.rows - first < kRowBlock ? a.rows - first : kRowBlock;
    if (!a.shared) block.constants = static_cast<const GradientConstants<S>*>(a.constants) + first;
    gradient_block<T, V, D>(block, first, rows, first + rows == a.rows);
  }
}

template <class T, class V, class D>
void row_backward(const RowBackward& a) {
  using S = typename V::Scalar;
  const S* mean = static_cast<const S*>(a.mean);
  const S* rstd = static_cast<const S*>(a.rstd);
  GradientConstants<S> constants[kRowBlock];
  const RowGradient block{a.x,   a.dy,      a.dx,    a.rows,    a.length, a.weight, constants,
                          false, a.dweight, a.dbias, a.scratch, a.done,   a.last};
  for (std::int64_t first = 0; first < a.rows; first += kRowBlock) {
    const std::int64_t rows = a.rows - first < kRowBlock ? a.rows - first : kRowBlock;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t row = first + r;
      const GradientSums sums = runs_sums<T, V, D>(a.x + row, a.dy + row, 1, a.length, a.weight,
                                                   V::broadcast(mean[row]), V::broadcast(rstd[row]));
      double unused;
      constants[r] = finish_gradient<S>(sums, static_cast<double>(a.length), mean[row], rstd[row], 1.0, true, &unused);
    }
    gradient_block<T, V, D>(block, first, rows, first + rows == a.rows);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
