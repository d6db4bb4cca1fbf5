// Planes: BN of channels-first data, planes of neighbouring channels side by side in memory. A line holds one plane of
// every channel of a tile; training is done so where planes are small (kSmallPlane), inference for planes of any size.
//
//   y  = (x - mean) * factor + bias,  factor = weight / sqrt(var + eps)
//   dx = factor * (dy - mean(dy) - xhat * mean(dy * xhat))
//
// Two sweeps of a tile that stays in cache meanwhile: forward reads x once and writes y (2s), backward reads x and dy
// once and writes dx (3s). Inference is the second sweep alone.
//
// The sweep that sums takes 8 lines (backward: 4) side by side, plane after plane; sums of a plane stay in lanes until
// the end, when 8 planes are folded together. A plane ends with a part of a vector (7x7: 49 of 64 lanes are used). The
// sweep that writes runs through from one cache line of the result to the next; where a vector covers the end of a
// plane its constants are joined from both planes. So planes of any size are written as whole lines, and there are no
// constants per element: those of 7x7 planes of 8 images were 37 % more traffic to L1.
//
// The order of operations, where it differs from blocks.hpp:
//   float32  (and 16-bit) A statistic's pivot q comes from four of its planes, the first vectors of two and the last
//            of two. Lanes add d = x - q and d^2 by trees of 8 lines (then 4, 2, 1), even and odd vectors apart, and go
//            to double after 8 vectors of trees. A statistic of less than kShortRun vectors, or whose squares about q
//            exceed m2 by more than kSpread allows, is swept in double.
//   float64  moments are those of columns, folded (column_norm.hpp).
//   sums of a backward: trees of 4 lines (kRowBlock), then one by one; double after 8 vectors of trees.
//
// Longer than 300 lines because forward, backward and inference share how planes lie in lines.
#pragma once

#include <cstdint>

#include "core/formulas.hpp"
#include "cpu/blocks.hpp"
#include "cpu/kernels.hpp"
#include "cpu/streams.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

inline constexpr std::int64_t kPlaneFlush = 8;  // vectors of trees that lanes add before they go to double

// f(element, Full or Part, Count of 0 or 1) over the vectors of a plane, in turns.
template <class V, class F>
LANENORM_INLINE void for_plane(std::int64_t length, const F& f) {
  constexpr std::int64_t kLanes = V::kLanes;
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    f(i, Full{}, Count<0>{});
    f(i + kLanes, Full{}, Count<1>{});
  }
  if (i + kLanes <= length) {
    f(i, Full{}, Count<0>{});
    i += kLanes;
    if (i < length) f(i, Part{static_cast<int>(length - i)}, Count<1>{});
  } else if (i < length) {
    f(i, Part{static_cast<int>(length - i)}, Count<0>{});
  }
}

// K sums of every plane over some lines in lanes of V, and over all of them in lanes of double.
template <class V, class D, int K>
class LanesOfPlanes {
 public:
  using S = typename V::Scalar;
  static constexpr std::int64_t kBytes = K * (V::kLanes * static_cast<std::int64_t>(sizeof(S)) + 64);  // a plane
  LANENORM_INLINE LanesOfPlanes(void* scratch, std::int64_t planes, std::int64_t length)
      : planes_(planes),
        vectors_((length + V::kLanes - 1) / V::kLanes),
        totals_(static_cast<double*>(scratch)),
        lanes_(reinterpret_cast<S*>(totals_ + planes * K * 8)) {}

  // Those of the next lines, plane by plane.
  LANENORM_INLINE void add(std::int64_t plane, const V (&sums)[K]) {
    S* to = lanes_ + plane * K * V::kLanes;
    LANENORM_UNROLL
    for (int k = 0; k < K; ++k, to += V::kLanes) store_lanes(added_ > 0 ? load_lanes<V>(to) + sums[k] : sums[k], to);
  }
  // After all planes of these lines; last: there are no more.
  LANENORM_INLINE void end_of_lines(bool last) {
    added_ += vectors_;
    if (added_ < kPlaneFlush && !last) return;
    for (std::int64_t i = 0; i < planes_ * K; ++i) {
      const V sum = load_lanes<V>(lanes_ + i * V::kLanes);
      D wide = sum.wide(0);
      if constexpr (V::kWide == 2) wide = wide + sum.wide(1);
      store_lanes(flushed_ ? load_lanes<D>(totals_ + i * 8) + wide : wide, totals_ + i * 8);
    }
    flushed_ = true;
    added_ = 0;
  }
  // Sum k of the planes first .. first + 7, of which there are `planes`, one a lane.
  LANENORM_INLINE D total(std::int64_t first, int planes, int k) const {
    D sum[8];
    for (int p = 0; p < 8; ++p) sum[p] = p < planes ? load_lanes<D>(totals_ + ((first + p) * K + k) * 8) : D::zero();
    return D::fold8(sum);
  }

 private:
  std::int64_t planes_, vectors_, added_ = 0;  // vectors
  bool flushed_ = false;
  double* totals_;  // (planes, K, 8)
  S* lanes_;        // (planes, K, lanes)
};

// The plane of N lines after these, `at` bytes into each.
template <int N>
LANENORM_INLINE void fetch_plane(const void* const* lines, std::int64_t at, std::int64_t bytes) {
  for (int r = 0; r < N; ++r) {
    for (std::int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(static_cast<const char*>(lines[N + r]) + at + i, 0, 2);
    }
  }
}

// ---- moments -------------------------------------------------------------------------------------------------------

// float32 or 16-bit data: a value near the mean of the plane that begins `at` bytes into each line.
template <class T, class V>
LANENORM_INLINE typename V::Scalar pivot_of_plane(const PlaneMoments& a, std::int64_t at) {
  using S = typename V::Scalar;
  const int lanes = static_cast<int>(a.length < V::kLanes ? a.length : V::kLanes);
  const S x0 = first_value<T, S>(static_cast<const char*>(a.x[0]) + at);
  const std::int64_t last = at + (a.length - lanes) * static_cast<std::int64_t>(sizeof(T));
  V d[4], magnitude[4];
  LANENORM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const char* x = static_cast<const char*>(a.x[i * a.rows / 4]) + (i % 2 == 0 ? at : last);
    d[i] = keep(V::template load<T>(x, lanes) - V::broadcast(x0), lanes);
    magnitude[i] = abs(d[i]);
  }
  const S inverse = inverse_power_of_two<S>(4 * lanes);
  return coarse_pivot(x0, tree<4>(d).fold() * inverse, tree<4>(magnitude).fold() * inverse * kPivotGrain<S>);
}

// Sums of d and d^2 of N lines, all planes.
template <int N, class T, class V, class D>
LANENORM_INLINE void add_lines(const PlaneMoments& a, std::int64_t row, const typename V::Scalar* pivots,
                               LanesOfPlanes<V, D, 2>* sums) {
  constexpr std::int64_t kBytes = sizeof(T);
  const bool ahead = a.ahead && row + 2 * N <= a.rows;
  const std::int64_t length = a.length;
  const char* x[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) x[r] = static_cast<const char*>(a.x[row + r]);
  for (std::int64_t plane = 0; plane < a.planes; ++plane) {
    const V pivot = V::broadcast(pivots[plane]);
    const std::int64_t at = plane * length * kBytes;
    V sum[2] = {V::zero(), V::zero()}, square[2] = {V::zero(), V::zero()};
    for_plane<V>(length, [&](std::int64_t i, auto part, auto turn) LANENORM_LAMBDA_INLINE {
      constexpr int kTurn = decltype(turn)::value;
      V d[N];
      LANENORM_UNROLL
      for (int r = 0; r < N; ++r) d[r] = keep_part(load<T, V>(x[r] + at + i * kBytes, part) - pivot, part);
      sum[kTurn] = sum[kTurn] + tree<N>(d);
      square[kTurn] = square[kTurn] + sum_of_squares<N>(d);
    });
    sums->add(plane, {sum[0] + sum[1], square[0] + square[1]});
    if (ahead) fetch_plane<N>(a.x + row, at, length * kBytes);
  }
  sums->end_of_lines(row + N == a.rows);
}

// The moments of a plane in double, about the first value.
template <class T, class V, class D>
LANENORM_INLINE void moments_in_double(const PlaneMoments& a, std::int64_t plane) {
  const std::int64_t at = plane * a.length * static_cast<std::int64_t>(sizeof(T));
  const double pivot = first_value<T, double>(static_cast<const char*>(a.x[0]) + at);
  PivotSums<D> sums = no_sums<D>();
  for (std::int64_t row = 0; row < a.rows; ++row) {
    add_in_double<T, V>(static_cast<const char*>(a.x[row]) + at, a.length, D::broadcast(pivot), &sums);
  }
  const Moments<double> m =
      moments_about(pivot, sums.sum.fold(), sums.square.fold(), static_cast<double>(a.rows * a.length), 0.0);
  const double values[4] = {m.pivot, m.sum, m.low, m.m2};
  for (int i = 0; i < 4; ++i) a.moments[i * padded(a.planes) + plane] = values[i];
}

template <class T, class V, class D>
LANENORM_INLINE void plane_moments_float32(const PlaneMoments& a) {
  using S = typename V::Scalar;
  using Sums = LanesOfPlanes<V, D, 2>;
  Sums sums(a.scratch, a.planes, a.length);
  S* pivots = reinterpret_cast<S*>(static_cast<char*>(a.scratch) + a.planes * Sums::kBytes);
  for (std::int64_t plane = 0; plane < a.planes; ++plane) {
    pivots[plane] = pivot_of_plane<T, V>(a, plane * a.length * static_cast<std::int64_t>(sizeof(T)));
  }
  std::int64_t row = 0;
  for (; row + kBlock <= a.rows; row += kBlock) add_lines<kBlock, T, V, D>(a, row, pivots, &sums);
  if (a.rows & 4) add_lines<4, T, V, D>(a, row, pivots, &sums), row += 4;
  if (a.rows & 2) add_lines<2, T, V, D>(a, row, pivots, &sums), row += 2;
  if (a.rows & 1) add_lines<1, T, V, D>(a, row, pivots, &sums);

  const D count = D::broadcast(static_cast<double>(a.rows * a.length));
  for (std::int64_t first = 0; first < a.planes; first += D::kLanes) {
    const int planes = static_cast<int>(a.planes - first < D::kLanes ? a.planes - first : D::kLanes);
    const D squares = sums.total(first, planes, 1);
    const Moments<D> m = moments_about(D::template load<S>(pivots + first, planes), sums.total(first, planes, 0),
                                       squares, count, D::zero());
    store_moments(m, a.moments, padded(a.planes), first);
    const unsigned beyond = beyond_spread(squares, m.m2);
    for (int p = 0; p < planes; ++p) {
      if (beyond >> p & 1) moments_in_double<T, V, D>(a, first + p);
    }
  }
}

// Of float32 or 16-bit data. kWide: in double throughout, for statistics out of range.
template <class T, class V, class D, bool kWide>
void plane_moments(const PlaneMoments& a) {
  if (!kWide && a.rows * a.length >= kShortRun * V::kLanes) return plane_moments_float32<T, V, D>(a);
  for (std::int64_t plane = 0; plane < a.planes; ++plane) moments_in_double<T, V, D>(a, plane);
}

// ---- inference: constants ------------------------------------------------------------------------------------------

// rstd and factor = rstd * weight of every channel, both rounded once; eight at a time. Whether all factors may stand
// for both.
template <class S, class D>
bool inference_constants(const InferenceConstants& a) {
  const D one = D::broadcast(1.0), eps = D::broadcast(a.eps);
  bool all = true;
  for (std::int64_t c = 0; c < a.channels; c += D::kLanes) {
    const int lanes = static_cast<int>(a.channels - c < D::kLanes ? a.channels - c : D::kLanes);
    const auto of = [&](const void* p) { return D::template load<S>(static_cast<const S*>(p) + c, lanes); };
    const D rstd = one / sqrt(of(a.variance) + eps);
    rstd.template store<S>(static_cast<S*>(a.rstd) + c, lanes);
    const D weight = a.weight == nullptr ? one : of(a.weight), factor = rstd * weight;
    factor.template store<S>(static_cast<S*>(a.factor) + c, lanes);
    all &= all_lanes<D>(foldable_lanes<S>(factor, weight), lanes);
  }
  return all;
}

// ---- writing -------------------------------------------------------------------------------------------------------

// Constants of a plane in every lane, or of several planes: arrays of K per plane.
template <class V, int K>
struct PlaneConstants {
  V values[K];
  LANENORM_INLINE static PlaneConstants of(const typename V::Scalar* const (&arrays)[K], std::int64_t plane) {
    PlaneConstants c;
    LANENORM_UNROLL
    for (int i = 0; i < K; ++i) c.values[i] = V::broadcast(arrays[i][plane]);
    return c;
  }
  // From lane `count` on those of `next`.
  LANENORM_INLINE void join_with(int count, const PlaneConstants& next) {
    LANENORM_UNROLL
    for (int i = 0; i < K; ++i) values[i] = join(values[i], count, next.values[i]);
  }
};

// f(element, Full or Part, PlaneConstants) over `planes` adjacent planes, after `head` elements in whole vectors.
template <class V, int K, class F>
LANENORM_INLINE void for_planes(std::int64_t planes, std::int64_t length, std::int64_t head,
                                const typename V::Scalar* const (&arrays)[K], const F& f) {
  using Constants = PlaneConstants<V, K>;
  const std::int64_t elements = planes * length;
  std::int64_t i = 0, plane = 0, end = length;  // of the plane
  Constants current = Constants::of(arrays, 0);
  // `lanes` elements from i on, the last of which may lie in another plane.
  const auto across = [&](int lanes, auto part) LANENORM_LAMBDA_INLINE {
    Constants joined = current;
    while (end - i < lanes) {
      const int filled = static_cast<int>(end - i);
      current = Constants::of(arrays, ++plane);
      joined.join_with(filled, current);
      end += length;
    }
    f(i, part, joined);
    i += lanes;
  };
  while (i < elements) {
    const std::int64_t left = (i < head ? head : elements) - i;
    if (i < head || left < V::kLanes) {
      const int lanes = static_cast<int>(left < V::kLanes ? left : V::kLanes);
      across(lanes, Part{lanes});
      continue;
    }
    for (; i + 2 * V::kLanes <= end; i += 2 * V::kLanes) {
      f(i, Full{}, current);
      f(i + V::kLanes, Full{}, current);
    }
    if (i + V::kLanes <= elements) across(V::kLanes, Full{});
  }
}

inline constexpr int kPlaneLines = 4;  // lines that share constants, where they are not streamed

// f(Count<lines>, Count<stream>, line, elements before the first cache line) for lines that are written together, at
// most kLines. Streamed ones go one by one, as a processor combines few streams of stores at a time: backward of
// 8x1024x14x14, 16x1024x14x14, 64x256x14x14, 32x2048x7x7, 16x2048x7x7 0.92, 0.92, 0.97, 0.95, 0.98 of the time of four
// side by side (on two threads 0.89, 0.90, 0.98, 1.03, 1.03), forward 0.97..1.01. Not streamed 32x512x7x7 takes 1.1.
template <class T, int kLines, class F>
LANENORM_INLINE void for_lines(void* const* lines, std::int64_t rows, std::int64_t elements, bool stream, const F& f) {
  char* const* y = reinterpret_cast<char* const*>(lines);
  std::int64_t row = 0;
  for (; kLines > 1 && !stream && row + kLines <= rows; row += kLines) {
    f(Count<kLines>{}, Count<false>{}, row, std::int64_t{0});
  }
  for (; row < rows; ++row) {
    const std::int64_t head = stream ? common_head<T>(y + row, 1, elements) : -1;
    if (head >= 0) {
      f(Count<1>{}, Count<true>{}, row, head);
    } else {
      f(Count<1>{}, Count<false>{}, row, std::int64_t{0});
    }
  }
}

// formula(x, PlaneConstants) -> y, for every element of N lines.
template <int N, bool kStream, class T, class V, int K, class F>
LANENORM_INLINE void apply_lines(const PlaneApply& a, std::int64_t row, std::int64_t head,
                                 const typename V::Scalar* const (&arrays)[K], const F& formula) {
  constexpr std::int64_t kBytes = sizeof(T);
  const std::int64_t next = a.next;
  const char* x[N];
  char* y[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) {
    x[r] = static_cast<const char*>(a.x[row + r]);
    y[r] = static_cast<char*>(a.y[row + r]);
  }
  const auto one = [&](std::int64_t i, auto part, const PlaneConstants<V, K>& c) LANENORM_LAMBDA_INLINE {
    V v[N];
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && next > 0) __builtin_prefetch(x[r] + i * kBytes + next, 0, 2);
      v[r] = load<T, V>(x[r] + i * kBytes, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) write<T>(formula(v[r], c), y[r] + i * kBytes, part, kStream);
  };
  for_planes<V, K>(a.planes, a.length, head, arrays, one);
}

template <class T, class V, int kLines, int K, class F>
LANENORM_INLINE void apply_planes(const PlaneApply& a, const typename V::Scalar* const (&arrays)[K], const F& formula) {
  for_lines<T, kLines>(a.y, a.rows, a.planes * a.length, a.stream,
                       [&](auto n, auto stream, std::int64_t row, std::int64_t head) LANENORM_LAMBDA_INLINE {
                         apply_lines<decltype(n)::value, decltype(stream)::value, T, V>(a, row, head, arrays, formula);
                       });
}

// Lines one by one in an inference, which has one at a time, and where weights stay apart, which is rare.
template <class T, class V>
void plane_apply(const PlaneApply& a) {
  using S = typename V::Scalar;
  const auto of = [](const void* p) { return static_cast<const S*>(p); };
  const S *means = of(a.mean), *factors = of(a.factor), *biases = of(a.bias);
  if (a.shift == nullptr && a.weight == nullptr) {
    const S* const arrays[] = {means, factors, biases};
    apply_planes<T, V, 1>(a, arrays, [](V x, const PlaneConstants<V, 3>& c) LANENORM_LAMBDA_INLINE {
      const auto& [mean, factor, bias] = c.values;
      return fma(x - mean, factor, bias);
    });
  } else if (a.shift == nullptr) {
    const S* const arrays[] = {means, factors, biases, of(a.weight)};
    apply_planes<T, V, 1>(a, arrays, [](V x, const PlaneConstants<V, 4>& c) LANENORM_LAMBDA_INLINE {
      const auto& [mean, factor, bias, weight] = c.values;
      return fma((x - mean) * factor, weight, bias);
    });
  } else if (a.scale == nullptr) {
    const S* const arrays[] = {means, factors, biases, of(a.shift)};
    apply_planes<T, V, kPlaneLines>(a, arrays, [](V x, const PlaneConstants<V, 4>& c) LANENORM_LAMBDA_INLINE {
      const auto& [mean, factor, bias, shift] = c.values;
      return fma(x - mean, factor, shift) + bias;
    });
  } else {
    const S* const arrays[] = {means, factors, biases, of(a.shift), of(a.weight), of(a.scale)};
    apply_planes<T, V, 1>(a, arrays, [](V x, const PlaneConstants<V, 6>& c) LANENORM_LAMBDA_INLINE {
      const auto& [mean, rstd, bias, shift, weight, scale] = c.values;
      return normalize_affine(x, scale, mean, rstd, shift, weight, bias);
    });
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Sums of g, g t and t of N lines, all planes.
template <int N, class T, class V, class D>
LANENORM_INLINE void add_lines(const PlaneSums& a, std::int64_t row, LanesOfPlanes<V, D, 3>* sums) {
  using S = typename V::Scalar;
  constexpr std::int64_t kBytes = sizeof(T);
  const bool ahead = a.ahead && row + 2 * N <= a.rows;
  const std::int64_t length = a.length;
  const S *means = static_cast<const S*>(a.mean), *rstds = static_cast<const S*>(a.rstd);
  const char *x[N], *dy[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) {
    x[r] = static_cast<const char*>(a.x[row + r]);
    dy[r] = static_cast<const char*>(a.dy[row + r]);
  }
  for (std::int64_t plane = 0; plane < a.planes; ++plane) {
    const V mean = V::broadcast(means[plane]), rstd = V::broadcast(rstds[plane]);
    const std::int64_t at = plane * length * kBytes;
    V sum_g = V::zero(), sum_gt = V::zero(), sum_t = V::zero();
    for_vectors<V>(length, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
      V g[N], t[N];
      LANENORM_UNROLL
      for (int r = 0; r < N; ++r) t[r] = keep_part((load<T, V>(x[r] + at + i * kBytes, part) - mean) * rstd, part);
      LANENORM_UNROLL
      for (int r = 0; r < N; ++r) g[r] = load<T, V>(dy[r] + at + i * kBytes, part);
      sum_g = sum_g + tree<N>(g);
      sum_gt = sum_gt + tree_of_products<N>(g, t);
      sum_t = sum_t + tree<N>(t);
    });
    sums->add(plane, {sum_g, sum_gt, sum_t});
    if (ahead) {
      fetch_plane<N>(a.x + row, at, length * kBytes);
      fetch_plane<N>(a.dy + row, at, length * kBytes);
    }
  }
  sums->end_of_lines(row + N == a.rows);
}

template <class T, class V, class D>
void plane_sums(const PlaneSums& a) {
  LanesOfPlanes<V, D, 3> sums(a.scratch, a.planes, a.length);
  std::int64_t row = 0;
  for (; row + kRowBlock <= a.rows; row += kRowBlock) add_lines<kRowBlock, T, V, D>(a, row, &sums);
  for (; row < a.rows; ++row) add_lines<1, T, V, D>(a, row, &sums);
  for (std::int64_t first = 0; first < a.planes; first += D::kLanes) {
    const int planes = static_cast<int>(a.planes - first < D::kLanes ? a.planes - first : D::kLanes);
    for (int k = 0; k < 3; ++k) store_lanes(sums.total(first, planes, k), a.sums + k * padded(a.planes) + first);
  }
}

// dx of N lines.
template <int N, bool kStream, class T, class V, int K>
LANENORM_INLINE void gradient_lines(const PlaneGradient& a, std::int64_t row, std::int64_t head,
                                    const typename V::Scalar* const (&arrays)[K]) {
  constexpr std::int64_t kBytes = sizeof(T);
  const std::int64_t next = a.next;
  const V one = V::broadcast(1);
  const char *x[N], *dy[N];
  char* dx[N];
  LANENORM_UNROLL
  for (int r = 0; r < N; ++r) {
    x[r] = static_cast<const char*>(a.x[row + r]);
    dy[r] = static_cast<const char*>(a.dy[row + r]);
    dx[r] = static_cast<char*>(a.dx[row + r]);
  }
  const auto vector = [&](std::int64_t i, auto part, const PlaneConstants<V, K>& c) LANENORM_LAMBDA_INLINE {
    const auto& [mean, rstd, shift, minus_mean_g, minus_mean_gx, factor] = c.values;
    V g[N], xs[N];
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && next > 0) __builtin_prefetch(x[r] + i * kBytes + next, 0, 2);
      xs[r] = load<T, V>(x[r] + i * kBytes, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      if (kStream && next > 0) __builtin_prefetch(dy[r] + i * kBytes + next, 0, 2);
      g[r] = load<T, V>(dy[r] + i * kBytes, part);
    }
    LANENORM_UNROLL
    for (int r = 0; r < N; ++r) {
      const V xhat = normalize(xs[r], mean, rstd, shift);
      write<T>(input_gradient(g[r], one, xhat, minus_mean_g, minus_mean_gx, factor), dx[r] + i * kBytes, part, kStream);
    }
  };
  for_planes<V, K>(a.planes, a.length, head, arrays, vector);
}

template <class T, class V>
void plane_gradient(const PlaneGradient& a) {
  const auto of = [](const void* p) { return static_cast<const typename V::Scalar*>(p); };
  const typename V::Scalar* const arrays[] = {of(a.mean),         of(a.rstd),          of(a.shift),
                                              of(a.minus_mean_g), of(a.minus_mean_gx), of(a.factor)};
  for_lines<T, kPlaneLines>(a.dx, a.rows, a.planes * a.length, a.stream,
                            [&](auto n, auto stream, std::int64_t row, std::int64_t head) LANENORM_LAMBDA_INLINE {
                              gradient_lines<decltype(n)::value, decltype(stream)::value, T, V>(a, row, head, arrays);
                            });
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
