// Rows: pieces of work for the kernels of row_norm.hpp.
//
//   whole rows   LN with one run of at most kPieceVectors per statistic: a piece is a group of rows, moments and
//                apply in one kernel call
//   segments     everything else: a statistic is a list of segments; by statistic where there are enough of them to
//                keep the threads busy, else segment by segment in two phases. Same bits either way.
//
// Longer than 300 lines because forward, inference and backward share how a statistic is cut.
#include <cstring>
#include <type_traits>

#include "cpu/driver.hpp"

namespace lanenorm {
namespace {

// A part of one statistic that a kernel call covers: whole runs, or a part of one run.
struct Segment {
  std::int64_t first_run, runs, first_element, length;
};

// The cut of a statistic into segments of at most kPieceVectors vectors: a function of shape and dtype.
class Segments {
 public:
  explicit Segments(const Problem& p) : runs_(p.plan.lines_per_statistic), length_(p.plan.inner) {
    const std::int64_t vectors = ceil_div(length_, vector_elements(p.args.dtype));
    runs_each_ = larger(1, kPieceVectors / vectors);
    elements_each_ = vectors > kPieceVectors ? kPieceVectors * vector_elements(p.args.dtype) : length_;
    per_run_ = ceil_div(length_, elements_each_);
    count_ = per_run_ > 1 ? runs_ * per_run_ : ceil_div(runs_, runs_each_);
  }
  std::int64_t count() const { return count_; }
  std::int64_t per_run() const { return per_run_; }
  Segment operator[](std::int64_t i) const {
    if (per_run_ > 1) {
      const std::int64_t first = i % per_run_ * elements_each_;
      return {i / per_run_, 1, first, smaller(elements_each_, length_ - first)};
    }
    const std::int64_t first = i * runs_each_;
    return {first, smaller(runs_each_, runs_ - first), 0, length_};
  }
  // Position of a segment among the elements of its statistic.
  std::int64_t element(const Segment& s) const { return s.first_run * length_ + s.first_element; }

 private:
  std::int64_t runs_, length_, runs_each_, elements_each_, per_run_, count_;
};

using SegmentTree = MomentsTree<40>;

Moments<double> moments_of(const PieceMoments& m) { return {m.pivot, m.sum, m.low, m.m2}; }

template <class C>
class RowDriver {
 public:
  explicit RowDriver(const Problem& p) : p_(p), plan_(p.plan), segments_(p), stream_(p.stream()) {}

  void forward() const {
    if (whole_rows()) {
      forward_whole_rows();
    } else if (by_statistic()) {
      for_statistics(2, [&](std::int64_t s) {
        SegmentTree tree;
        const std::int64_t next = following(s);
        const std::int64_t early = 2 * statistic_bytes() <= kL2Bytes ? next : kNone;
        for (std::int64_t i = 0; i < segments_.count(); ++i) push(&tree, moments(s, i, early));
        const Normalizer<C> normalizer = finish_statistic(s, tree);
        for (std::int64_t i = 0; i < segments_.count(); ++i) apply(s, i, normalizer, next);
      });
    } else {
      forward_in_phases();
    }
  }

  // Planes of neighbouring channels, in the order of memory. A line is a plane, or (Work::columns) all planes of an
  // image.
  void inference() const {
    const bool joined = plan_.work == Work::columns;
    const std::int64_t images = plan_.lines_per_statistic, channels = plan_.statistics;
    const std::int64_t length = joined ? plan_.fold : plan_.inner;
    const std::int64_t group = larger(1, smaller(channels, row_piece() / length)), groups = ceil_div(channels, group);
    const std::int64_t part = smaller(length, row_piece()), parts = ceil_div(length, part);  // of a long plane
    parallel_for(images * groups * parts, p_.bytes(2), [&](std::int64_t piece) {
      const std::int64_t image = piece / parts / groups, first = piece / parts % groups * group;
      const std::int64_t stop = smaller(channels, first + group);
      const std::int64_t start = piece % parts * part, size = smaller(part, length - start);
      constexpr std::int64_t kStep = 64;
      for (std::int64_t c = first; c < stop;) {
        const std::int64_t count = joined ? stop - c : smaller(kStep, stop - c);
        InputLines x_lines_of = x_lines();
        OutputLines y_lines_of = y_lines();
        if (joined) {
          const void* const* x = x_lines_of.get(image, 1, 1, c * length, count * length);
          apply_planes(x[0], y_lines_of.get(image, 1, 1, c * length, count * length)[0], c, count, length);
        } else {
          const std::int64_t line = c * images + image;
          const void* const* x = x_lines_of.get(line, images, count, start, size);
          void* const* y = y_lines_of.get(line, images, count, start, size);
          for (std::int64_t i = 0, next; i < count; i = next) {  // as many as are adjacent in both
            for (next = i + 1; next < count && follows(x, next, size) && follows(y, next, size);) ++next;
            apply_planes(x[i], y[i], c + i, next - i, size);
          }
        }
        y_lines_of.finish();
        c += count;
      }
    });
  }

  void backward() const {
    if (plan_.affine == Affine::per_statistic) {
      whole_rows() && p_.args.training ? backward_single_lines() : backward_per_statistic();
    } else if (whole_rows() && by_chunk()) {
      backward_whole_rows();
    } else {
      backward_in_phases();
    }
  }

 private:
  // ---- pieces

  // A statistic is one line of one segment: LN, and BN of a single image.
  bool whole_rows() const { return segments_.count() == 1 && plan_.lines_per_statistic == 1; }

  bool by_statistic() const {
    // Up to 64 segments (4 M elements) a thread keeps going over a statistic that its cache may still hold.
    return segments_.count() == 1 || (plan_.statistics >= 2 * get_num_threads() && segments_.count() <= 64);
  }

  template <class F>
  void for_statistics(int passes, F&& f) const {
    const std::int64_t group = larger(1, kPieceElements / plan_.reduced);
    parallel_for(ceil_div(plan_.statistics, group), p_.bytes(passes), [&](std::int64_t piece) {
      for (std::int64_t s = piece * group; s < smaller(plan_.statistics, (piece + 1) * group); ++s) f(s);
    });
  }

  InputLines x_lines() const { return {plan_.x, p_.args.x, p_.args.dtype, Slot::x_table, Slot::x_lines}; }
  InputLines dy_lines() const { return {plan_.dy, p_.args.dy, p_.args.dtype, Slot::dy_table, Slot::dy_lines}; }
  OutputLines y_lines() const { return {plan_.y, p_.args.y, p_.args.dtype}; }

  std::int64_t line(std::int64_t s, const Segment& segment) const {
    return s * plan_.lines_per_statistic + segment.first_run;
  }

  // ---- what is fetched ahead of streaming stores
  //
  // A statistic is read twice, the second time from L2 while y is written: memory would do nothing but write then, and
  // nothing but read in between. So x of the next one is fetched meanwhile, and while the moments of this one are
  // computed. In copies, forward 32 x 256 x 56 x 56: 1.9 where a quarter of it is fetched while y is written, 1.4 where
  // all, 1.3 with both; 32 x 512 x 28 x 28 3.0 and 1.8. Backward with nothing fetched, and with x and dy:
  // 8 x 256 x 56 x 56 1.8 and 1.3, 32 x 512 x 28 x 28 1.7 and 1.5. Where two statistics do not fit L2 a quarter of
  // it, fetched during the moments, gained nothing (32 x 64 x 112 x 112, 1.6 MB each).

  static constexpr std::int64_t kNone = -1;
  static constexpr std::int64_t kL2Bytes = 1 << 20;  // of Zen 4
  std::int64_t statistic_bytes() const { return plan_.reduced * size(p_.args.dtype); }

  // The statistic after s, if it is to be fetched.
  std::int64_t following(std::int64_t s) const {
    return stream_ && plan_.x.direct && s + 1 < plan_.statistics ? s + 1 : kNone;
  }
  InputLines x_lines_ahead() const {
    return {plan_.x, p_.args.x, p_.args.dtype, Slot::ahead_x_table, Slot::ahead_x_table};
  }
  InputLines dy_lines_ahead() const {
    return {plan_.dy, p_.args.dy, p_.args.dtype, Slot::ahead_dy_table, Slot::ahead_dy_table};
  }
  const void* const* lines_ahead(InputLines* lines, std::int64_t next, const Segment& segment) const {
    if (next == kNone) return nullptr;
    return lines->get(line(next, segment), 1, segment.runs, segment.first_element, segment.length);
  }

  // Rows up to 128 KB: 2048 x 4097 5.2 -> 4.2 ms, 2048 x 8192 8.3 -> 7.9, 512 x 65536 alike. (A backward, with two
  // arrays to read, never gained: 65536 x 64 9.7 ns a vector without, 11.1 with; 4096 x 4096 12.9 and 14.3 ms.)
  bool prefetch() const { return stream_ && plan_.inner * size(p_.args.dtype) <= 131072; }

  // Streams gain from longer pieces, at whose ends nothing is fetched ahead.
  std::int64_t row_piece() const { return stream_ ? 4 * kPieceElements : kPieceElements; }

  // ---- forward

  // Rows of a piece, at most as many as given and at least half of them, so that threads get the same of few pieces:
  // no bit depends on it. 32 x 768 on two threads: 24 and 8 rows, and so 16 each.
  std::int64_t even_rows(std::int64_t most) const {
    const std::int64_t threads = get_num_threads();
    if (threads == 1 || p_.bytes(2) < kSerialBytes || plan_.outer >= 8 * threads * most) return most;
    std::int64_t best = most, least = plan_.outer;
    for (std::int64_t rows = most; 2 * rows >= most; rows -= larger(8, most / 64 * 8)) {
      const std::int64_t of_a_thread = ceil_div(ceil_div(plan_.outer, rows), threads) * rows;
      if (of_a_thread < least) {
        least = of_a_thread;
        best = rows;
      }
    }
    return best;
  }

  void forward_whole_rows() const {
    const std::int64_t rows = even_rows(ceil_div(larger(8, row_piece() / plan_.inner), 8) * 8);
    parallel_for(ceil_div(plan_.outer, rows), p_.bytes(2), [&](std::int64_t piece) {
      const std::int64_t first = piece * rows, count = smaller(rows, plan_.outer - first);
      InputLines x = x_lines();
      OutputLines y = y_lines();
      // Packed lines in groups of 8, so that the buffer stays small.
      const std::int64_t step = plan_.x.direct && plan_.y.direct ? count : 8;
      for (std::int64_t i = 0; i < count; i += step) {
        const std::int64_t group = smaller(step, count - i), row = first + i;
        RowForward a;
        a.x = x.get(row, 1, group, 0, plan_.inner);
        a.y = y.get(row, 1, group, 0, plan_.inner);
        a.rows = group;
        a.length = plan_.inner;
        a.per_row = plan_.affine == Affine::per_statistic;
        a.weight = at(p_.weight, a.per_row ? row : 0);
        a.bias = at(p_.bias, a.per_row ? row : 0);
        a.eps = p_.args.eps;
        a.exact = p_.exact == nullptr ? nullptr : reinterpret_cast<double*>(p_.exact + row);
        a.mean = static_cast<C*>(p_.mean) + row;
        a.rstd = static_cast<C*>(p_.rstd) + row;
        a.stream = stream_;
        a.prefetch = prefetch();
        p_.kernels.row_forward(a);
        y.finish();
      }
    });
  }

  void forward_in_phases() const {
    const std::int64_t count = segments_.count();
    Buffer partials(count * static_cast<std::int64_t>(sizeof(PieceMoments)));
    PieceMoments* parts = partials.as<PieceMoments>();
    for (std::int64_t s = 0; s < plan_.statistics; ++s) {
      const std::int64_t bytes = plan_.reduced * size(p_.args.dtype);
      parallel_for(count, bytes, [&](std::int64_t i) { parts[i] = moments(s, i, kNone); });
      SegmentTree tree;
      for (std::int64_t i = 0; i < count; ++i) push(&tree, parts[i]);
      const Normalizer<C> normalizer = finish_statistic(s, tree);
      parallel_for(count, 2 * bytes, [&](std::int64_t i) { apply(s, i, normalizer, kNone); });
    }
  }

  PieceMoments moments(std::int64_t s, std::int64_t i, std::int64_t next, bool wide = false, double scale = 1.0) const {
    const Segment segment = segments_[i];
    InputLines x = x_lines(), x_ahead = x_lines_ahead();
    const RowMoments a{x.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length), segment.runs,
                       segment.length, scale, lines_ahead(&x_ahead, next, segment)};
    return wide ? p_.kernels.row_moments_wide(a) : p_.kernels.row_moments(a);
  }

  static void push(SegmentTree* tree, const PieceMoments& m) { tree->push(moments_of(m), m.count); }

  // mean and rstd of statistic s; redone in double where they left the range of C.
  Normalizer<C> finish_statistic(std::int64_t s, const SegmentTree& tree) const {
    double count;
    const Moments<double> m = tree.total(&count);
    Statistic<C> result;
    if (out_of_range<C>(m.m2 / count, p_.args.eps)) {
      const double scale = redo_scale<C>(m.m2 / count);
      SegmentTree wide;
      for (std::int64_t i = 0; i < segments_.count(); ++i) push(&wide, moments(s, i, kNone, true, scale));
      result = finish_scaled<C>(wide.total(&count), count, p_.args.eps, scale);
    } else {
      result = finish<C>(m, count, p_.args.eps);
    }
    static_cast<C*>(p_.mean)[s] = result.mean;
    static_cast<C*>(p_.rstd)[s] = result.rstd;
    if (p_.exact != nullptr) p_.exact[s] = {result.exact_mean, result.variance};
    return result.normalizer;
  }

  static const C* at(const void* parameters, std::int64_t index) {
    return parameters == nullptr ? nullptr : static_cast<const C*>(parameters) + index;
  }

  // Whether line i begins where the one before it ends.
  template <class P>
  bool follows(P* const* lines, std::int64_t i, std::int64_t length) const {
    return static_cast<const char*>(lines[i]) - static_cast<const char*>(lines[i - 1]) == length * size(p_.args.dtype);
  }

  void apply_planes(const void* x, void* y, std::int64_t channel, std::int64_t planes, std::int64_t length) const {
    PlaneApply a{};
    a.x = &x;
    a.y = &y;
    a.rows = 1;
    a.planes = planes;
    a.length = length;
    a.mean = at(p_.mean, channel);
    a.factor = at(p_.rstd, channel);
    a.bias = at(p_.bias, channel);
    a.weight = at(p_.weight, channel);
    a.stream = stream_;
    p_.kernels.plane_apply(a);
  }

  // next: the statistic that comes after this one, or kNone: its x is fetched while y is written.
  void apply(std::int64_t s, std::int64_t i, const Normalizer<C>& normalizer, std::int64_t next) const {
    const Segment segment = segments_[i];
    const bool per_element = plan_.affine == Affine::per_element;
    const std::int64_t parameter = per_element ? segments_.element(segment) : s;
    InputLines x = x_lines(), x_ahead = x_lines_ahead();
    OutputLines y = y_lines();
    RowApply a;
    a.x = x.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.y = y.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.runs = segment.runs;
    a.length = segment.length;
    a.normalizer = &normalizer;
    a.weight = at(p_.weight, parameter);
    a.bias = at(p_.bias, parameter);
    a.per_element = per_element;
    a.stream = stream_;
    a.ahead = lines_ahead(&x_ahead, next, segment);
    p_.kernels.row_apply(a);
    y.finish();
  }

  // ---- backward, shared

  PieceSums sums(std::int64_t s, std::int64_t i) const {
    const Segment segment = segments_[i];
    InputLines x = x_lines(), dy = dy_lines();
    RowSums a;
    a.x = x.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.dy = dy.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.runs = segment.runs;
    a.length = segment.length;
    a.weight = plan_.affine == Affine::per_element ? at(p_.weight, segments_.element(segment)) : nullptr;
    a.mean = static_cast<double>(static_cast<const C*>(p_.mean)[s]);
    a.rstd = static_cast<double>(static_cast<const C*>(p_.rstd)[s]);
    a.fetch = stream_;
    return p_.kernels.row_sums(a);
  }

  static void add(GradientSums* total, const PieceSums& part) {
    total->g += part.g;
    total->gt += part.gt;
    total->t += part.t;
  }

  // Constants of statistic s; for BN also its dweight and dbias.
  GradientConstants<C> finish_sums(std::int64_t s, const GradientSums& total) const {
    const C* weight = plan_.affine == Affine::per_statistic ? at(p_.weight, s) : nullptr;
    double dweight;
    const GradientConstants<C> constants = finish_gradient<C>(
        total, static_cast<double>(plan_.reduced), static_cast<const C*>(p_.mean)[s], static_cast<const C*>(p_.rstd)[s],
        weight == nullptr ? 1.0 : static_cast<double>(*weight), p_.args.training, &dweight);
    if (plan_.affine == Affine::per_statistic && p_.dweight != nullptr) {
      p_.dweight[s] = dweight;
      p_.dbias[s] = total.g;
    }
    return constants;
  }

  // ---- backward, BN

  void backward_per_statistic() const {
    const bool need_sums = p_.args.training || p_.dweight != nullptr;
    if (by_statistic()) {
      for_statistics(need_sums ? 5 : 3, [&](std::int64_t s) {
        GradientSums total{0.0, 0.0, 0.0};
        for (std::int64_t i = 0; need_sums && i < segments_.count(); ++i) add(&total, sums(s, i));
        const GradientConstants<C> constants = finish_sums(s, total);
        for (std::int64_t i = 0; i < segments_.count(); ++i) gradient(s, i, constants, following(s));
      });
      return;
    }
    const std::int64_t count = segments_.count(), bytes = plan_.reduced * size(p_.args.dtype);
    Buffer partials(count * static_cast<std::int64_t>(sizeof(PieceSums)));
    PieceSums* parts = partials.as<PieceSums>();
    for (std::int64_t s = 0; s < plan_.statistics; ++s) {
      GradientSums total{0.0, 0.0, 0.0};
      if (need_sums) {
        parallel_for(count, 2 * bytes, [&](std::int64_t i) { parts[i] = sums(s, i); });
        for (std::int64_t i = 0; i < count; ++i) add(&total, parts[i]);
      }
      const GradientConstants<C> constants = finish_sums(s, total);
      parallel_for(count, 3 * bytes, [&](std::int64_t i) { gradient(s, i, constants, kNone); });
    }
  }

  // One line a statistic: a row of its own, 8 of them finished together.
  void backward_single_lines() const {
    const std::int64_t rows = ceil_div(larger(8, row_piece() / plan_.inner), 8) * 8;
    parallel_for(ceil_div(plan_.outer, rows), p_.bytes(3), [&](std::int64_t piece) {
      const std::int64_t stop = smaller(plan_.outer, (piece + 1) * rows);
      const bool direct = plan_.x.direct && plan_.dy.direct && plan_.y.direct;
      const std::int64_t step = direct ? rows : 8;
      for (std::int64_t row = piece * rows; row < stop; row += step) {
        InputLines x = x_lines(), dy = dy_lines();
        OutputLines dx = y_lines();
        RowBackward a{};
        a.rows = smaller(step, stop - row);
        a.length = plan_.inner;
        a.x = x.get(row, 1, a.rows, 0, plan_.inner);
        a.dy = dy.get(row, 1, a.rows, 0, plan_.inner);
        a.dx = dx.get(row, 1, a.rows, 0, plan_.inner);
        a.weight = at(p_.weight, row);
        a.mean = at(p_.mean, row);
        a.rstd = at(p_.rstd, row);
        a.per_row = true;
        a.dweight = p_.dweight == nullptr ? nullptr : p_.dweight + row;
        a.dbias = p_.dbias == nullptr ? nullptr : p_.dbias + row;
        a.stream = stream_;
        p_.kernels.row_backward(a);
        dx.finish();
      }
    });
  }

  // next: as in apply; of x and dy.
  void gradient(std::int64_t s, std::int64_t i, const GradientConstants<C>& constants, std::int64_t next) const {
    const Segment segment = segments_[i];
    InputLines x = x_lines(), dy = dy_lines(), x_ahead = x_lines_ahead(), dy_ahead = dy_lines_ahead();
    OutputLines dx = y_lines();
    RowGradient a{};
    a.x = x.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.dy = dy.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.dx = dx.get(line(s, segment), 1, segment.runs, segment.first_element, segment.length);
    a.rows = segment.runs;
    a.length = segment.length;
    a.constants = &constants;
    a.shared = true;
    a.ahead_x = plan_.dy.direct ? lines_ahead(&x_ahead, next, segment) : nullptr;
    a.ahead_dy = a.ahead_x == nullptr ? nullptr : lines_ahead(&dy_ahead, next, segment);
    a.stream = stream_;
    p_.kernels.row_gradient(a);
    dx.finish();
  }

  // ---- backward, LN

  // dweight and dbias are summed over fixed chunks of rows, then over chunks in index order. 128 rows make 8 chunks;
  // from 512 rows a chunk on, the partial sums (16 bytes a column) are below 1 % of x.
  std::int64_t chunk_rows() const {
    return larger(kChunkRows, smaller(512, ceil_div(ceil_div(plan_.outer, 32), kChunkRows) * kChunkRows));
  }
  std::int64_t chunks() const { return ceil_div(plan_.outer, chunk_rows()); }

  // Whether a chunk is the work of one thread, and not cut into phases: 32 x 768 on two threads 11.8 -> 8.6 us. So it
  // is a lone chunk up to this size: 8 x 768 2.4 -> 1.85 us, 16 x 3072 on two threads 19.3 -> 17.6, 16 x 6144 32 -> 36.
  bool by_chunk() const {
    constexpr std::int64_t kLoneChunkBytes = 640 << 10;
    const std::int64_t threads = get_num_threads();
    return chunks() > 1 ? chunks() >= smaller(8, threads) : threads == 1 || p_.bytes(3) <= kLoneChunkBytes;
  }

  // f(chunk, part, dweight, dbias) in parallel pieces of `per_chunk`; partial sums, S, are added to the totals. S is
  // double, where one chunk goes to the totals themselves, or C.
  template <class S, class F>
  void with_partials(std::int64_t per_chunk, std::int64_t bytes, F&& f) const {
    const std::int64_t n = plan_.reduced, pitch = padded(n);
    const bool parameters = p_.dweight != nullptr;
    const bool direct = std::is_same_v<S, double> && chunks() == 1;
    Buffer buffer(parameters && !direct ? chunks() * 2 * pitch * static_cast<std::int64_t>(sizeof(S)) : 64);
    S* partials[2] = {buffer.as<S>(), buffer.as<S>() + chunks() * pitch};
    double* totals[2] = {p_.dweight, p_.dbias};
    parallel_for(chunks() * per_chunk, bytes, [&](std::int64_t piece) {
      const std::int64_t chunk = piece / per_chunk;
      S* sums[2] = {nullptr, nullptr};
      for (int i = 0; parameters && i < 2; ++i) {
        sums[i] = partials[i] + chunk * pitch;
        if constexpr (std::is_same_v<S, double>) sums[i] = direct ? totals[i] : sums[i];
      }
      f(chunk, piece % per_chunk, sums[0], sums[1]);
    });
    if (!parameters || direct) return;
    const KernelTable& summing = std::is_same_v<S, double> ? kernels(DType::float64) : p_.kernels;
    const std::int64_t tile = 1024, tiles = ceil_div(n, tile);
    parallel_for(2 * tiles, chunks() * 2 * n * static_cast<std::int64_t>(sizeof(S)), [&](std::int64_t piece) {
      const std::int64_t i = piece / tiles, first = piece % tiles * tile;
      summing.add_partial_sums({partials[i] + first, chunks(), pitch, smaller(tile, n - first), totals[i] + first});
    });
  }

  // Where sums begin, beyond the place of x within a page: rows of whole pages all begin at one place, and a load waits
  // for a store before it to the same place of another page. 16384 x 1024 at 0 and 128 bytes 39.5 cycles a vector, at
  // 512 to 3200 35.
  static constexpr std::int64_t kSums = 3072;

  // Room for sums of kFlushRows rows of `columns` columns of dweight and of dbias; null where they are not wanted.
  struct Sums {
    void *dweight, *dbias;
  };
  Sums room_for_sums(std::int64_t columns) const {
    if (p_.dweight == nullptr) return {nullptr, nullptr};
    Buffer& buffer = thread_buffer(Slot::sums);
    const std::int64_t pitch = padded(columns);
    buffer.reserve(2 * pitch * static_cast<std::int64_t>(sizeof(C)) + kBesidePage);
    C* sums = reinterpret_cast<C*>(beside(buffer.data(), p_.args.x, kSums));
    return {sums, sums + pitch};
  }

  static void zero(double* totals, std::int64_t count) {
    if (totals != nullptr) std::memset(totals, 0, static_cast<std::size_t>(count) * sizeof(double));
  }

  void backward_whole_rows() const {
    const auto chunk_of_rows = [&](std::int64_t chunk, void* sum_dweight, void* sum_dbias, double* dweight,
                                   double* dbias) {
      const std::int64_t first = chunk * chunk_rows(), rows = smaller(chunk_rows(), plan_.outer - first);
      InputLines x = x_lines(), dy = dy_lines();
      OutputLines dx = y_lines();
      const bool direct = plan_.x.direct && plan_.dy.direct && plan_.y.direct;
      const std::int64_t step = direct ? rows : kRowBlock;
      RowBackward a{};
      a.length = plan_.inner;
      a.weight = p_.weight;
      a.dweight = dweight;
      a.dbias = dbias;
      a.sum_dweight = sum_dweight;
      a.sum_dbias = sum_dbias;
      a.stream = stream_;
      for (std::int64_t i = 0; i < rows; i += step) {
        a.rows = smaller(step, rows - i);
        a.x = x.get(first + i, 1, a.rows, 0, plan_.inner);
        a.dy = dy.get(first + i, 1, a.rows, 0, plan_.inner);
        a.dx = dx.get(first + i, 1, a.rows, 0, plan_.inner);
        a.mean = at(p_.mean, first + i);
        a.rstd = at(p_.rstd, first + i);
        a.done = i;
        a.last = i + a.rows == rows;
        p_.kernels.row_backward(a);
        dx.finish();
      }
    };
    if (p_.sum_dweight != nullptr) {  // one chunk, whose sums are the result
      parallel_for(1, p_.bytes(3),
                   [&](std::int64_t chunk) { chunk_of_rows(chunk, p_.sum_dweight, p_.sum_dbias, nullptr, nullptr); });
    } else if (p_.dweight != nullptr && chunks() > 1 && chunk_rows() <= kFlushRows) {  // the sums never leave C
      with_partials<C>(1, p_.bytes(3), [&](std::int64_t chunk, std::int64_t, C* dweight, C* dbias) {
        chunk_of_rows(chunk, dweight, dbias, nullptr, nullptr);
      });
    } else {
      with_partials<double>(1, p_.bytes(3), [&](std::int64_t chunk, std::int64_t, double* dweight, double* dbias) {
        zero(dweight, plan_.reduced);
        zero(dbias, plan_.reduced);
        const Sums sums = room_for_sums(plan_.inner);
        chunk_of_rows(chunk, sums.dweight, sums.dbias, dweight, dbias);
      });
    }
  }

  // Long or interrupted rows: sums of every segment, then gradients by chunk of rows and tile of columns.
  void backward_in_phases() const {
    const std::int64_t segments = segments_.count(), units = plan_.statistics * segments;
    Buffer partials(units * static_cast<std::int64_t>(sizeof(PieceSums)));
    PieceSums* parts = partials.as<PieceSums>();
    const std::int64_t each = larger(1, kPieceElements / larger(1, plan_.reduced / segments));
    parallel_for(ceil_div(units, each), p_.bytes(2), [&](std::int64_t piece) {
      for (std::int64_t u = piece * each; u < smaller(units, (piece + 1) * each); ++u) {
        parts[u] = sums(u / segments, u % segments);
      }
    });
    Buffer constants_buffer(plan_.statistics * static_cast<std::int64_t>(sizeof(GradientConstants<C>)));
    GradientConstants<C>* constants = constants_buffer.as<GradientConstants<C>>();
    for (std::int64_t s = 0; s < plan_.statistics; ++s) {
      GradientSums total{0.0, 0.0, 0.0};
      for (std::int64_t i = 0; i < segments; ++i) add(&total, parts[s * segments + i]);
      constants[s] = finish_sums(s, total);
    }

    const std::int64_t tile = smaller(plan_.inner, 8192);  // x, dy, dx of 8 rows of a tile: 768 KB
    const std::int64_t tiles = ceil_div(plan_.inner, tile), runs = plan_.lines_per_statistic;
    const auto piece = [&](std::int64_t chunk, std::int64_t part, double* dweight, double* dbias) {
      const std::int64_t run = part / tiles, column = part % tiles * tile;
      const std::int64_t length = smaller(tile, plan_.inner - column), element = run * plan_.inner + column;
      const std::int64_t first = chunk * chunk_rows(), rows = smaller(chunk_rows(), plan_.outer - first);
      InputLines x = x_lines(), dy = dy_lines();
      OutputLines dx = y_lines();
      RowGradient a{};
      a.length = length;
      a.weight = at(p_.weight, element);
      a.dweight = dweight == nullptr ? nullptr : dweight + element;
      a.dbias = dbias == nullptr ? nullptr : dbias + element;
      zero(a.dweight, length);
      zero(a.dbias, length);
      if (p_.sum_dweight != nullptr) {
        a.sum_dweight = static_cast<C*>(p_.sum_dweight) + element;
        a.sum_dbias = static_cast<C*>(p_.sum_dbias) + element;
      } else {
        const Sums sums = room_for_sums(length);
        a.sum_dweight = sums.dweight;
        a.sum_dbias = sums.dbias;
      }
      a.stream = stream_;
      for (std::int64_t i = 0; i < rows; i += kRowBlock) {
        a.rows = smaller(kRowBlock, rows - i);
        const std::int64_t line = (first + i) * runs + run;
        a.x = x.get(line, runs, a.rows, column, length);
        a.dy = dy.get(line, runs, a.rows, column, length);
        a.dx = dx.get(line, runs, a.rows, column, length);
        a.constants = constants + first + i;
        a.done = i;
        a.last = i + a.rows == rows;
        p_.kernels.row_gradient(a);
        dx.finish();
      }
    };
    if (p_.sum_dweight != nullptr) {  // one chunk, whose sums are the result
      parallel_for(runs * tiles, p_.bytes(3), [&](std::int64_t part) { piece(0, part, nullptr, nullptr); });
    } else {
      with_partials<double>(runs * tiles, p_.bytes(3), piece);
    }
  }

  const Problem& p_;
  const Plan& plan_;
  Segments segments_;
  bool stream_;
};

}  // namespace

template <class C>
void rows_forward(const Problem& problem) {
  RowDriver<C>(problem).forward();
}
template <class C>
void planes_inference(const Problem& problem) {
  RowDriver<C>(problem).inference();
}
template <class C>
void rows_backward(const Problem& problem) {
  RowDriver<C>(problem).backward();
}

template void rows_forward<float>(const Problem&);
template void rows_forward<double>(const Problem&);
template void planes_inference<float>(const Problem&);
template void planes_inference<double>(const Problem&);
template void rows_backward<float>(const Problem&);
template void rows_backward<double>(const Problem&);

}  // namespace lanenorm
