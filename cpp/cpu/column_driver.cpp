// Columns, and small planes: pieces of work for the kernels of column_norm.hpp and plane_norm.hpp.
//
// A matrix is cut into tiles of columns (of whole planes) and segments of rows, as many as its shape gives. Where a
// matrix is one segment, or a tile with all its rows fits a cache, a piece is a tile: moments, constants and apply in a
// row, 2s. Else moments of all segments first, then apply over whole lines, 3s; so too where threads have narrow tiles
// of one segment to share, whose rows they write. Same bits every way: a tile changes no order of operations (but where
// sums run along the rows, whose tiles depend on the shape alone), and segments are merged in index order.
//
// Longer than 300 lines because forward and backward share the tiles and their constants.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>

#include "cpu/driver.hpp"

namespace lanenorm {
namespace {

// Bytes of a row of a tile: a page. 6 arrays of constants of 1024 float32 are 24 KB of the 32 KB of L1. (BN of
// 32x2048x7x7 float16: 512 columns 2.7, 1024 2.4, 2048 2.2 copies.) Narrower tiles, whose rows stay in L2 until they
// are swept again, lose more by short stretches of memory than they gain: 784 x 512 in tiles of 160 columns forward 98,
// backward 159 us, in one tile 75 and 128; 768 x 16384 6.5 and 11.4 ms, 4.9 and 9.5.
constexpr std::int64_t kTileRowBytes = 4096;
// Bytes of a tile of planes, whose rows are longer than a page where they are few, as planes have one constant for all
// of their elements. 8x2048x7x7 in tiles of 25, 64, 128 and 256 KB: forward 168, 162, 156, 156 us, backward 257, 242,
// 232, 233; backward of 8x1024x14x14 470, 443, 430..490, 480..590.
constexpr std::int64_t kPlaneTileBytes = 131072;
constexpr std::int64_t kAheadInLine = 1024;  // bytes that planes fetch ahead in each line; no other was tried
// Two tiles with all their rows that L2 may hold.
constexpr std::int64_t kTwoTilesBytes = 640 << 10;
// Matrices from this size on are cut for several threads. On two instead of one: 32 x 1024 forward 13.4 -> 11.4 us,
// backward 15.3 -> 12.0; 128 x 256 7.5 -> 7.8 and 11.9 -> 10.7.
constexpr std::int64_t kSharedElements = 32768;
// Bytes of rows that are written as one line: 1000 columns of float32 are 8000, 999 are 63936. 6 arrays of constants as
// long stay in L2. (20000 x 513 inference 5.8 -> 2.9 ms, backward 11.3 -> 7.4; 16384 x 999 6.9 -> 4.7, 15.8 -> 11.9.)
constexpr std::int64_t kJoinedBytes = 65536;
// Rows that are written as one line also where they go to the cache, as vectors would be cut at their ends: inference
// and backward of 4096 x 100 58 -> 49 and 156 -> 138 us, 20000 x 3 50 -> 9 and 136 -> 80; 1000 x 1000 119 -> 127, and
// 64 x 30, where there are more constants than rows, 1.1 -> 1.2.
constexpr std::int64_t kNarrowBytes = 512, kNarrowElements = 8192;
// A tile with all its rows up to this size is swept again while the last-level cache still holds it.
constexpr std::int64_t kSlabBytes = 4 << 20;

template <class C>
class ColumnDriver {
 public:
  explicit ColumnDriver(const Problem& p)
      : p_(p),
        plan_(p.plan),
        rows_(p.plan.lines_per_statistic),
        columns_(p.plan.inner),
        plane_(of_planes(p) ? p.plan.fold : 1),
        fold_(p.plan.fold / plane_),
        stream_(p.stream()) {
    piece_rows_ = piece_rows();
    segments_ = ceil_div(rows_, piece_rows_);
    const std::int64_t row = planes() ? larger(kTileRowBytes, kPlaneTileBytes / rows_) : kTileRowBytes;
    tile_ = tile_columns(row, shared() ? get_num_threads() : 1);
    shared_ = tile_ < tile_columns(kTileRowBytes, 1);
    tiles_ = ceil_div(columns_, tile_);
    joined_ = rows_joined();
    flat_ = rows_flat();
  }

  void forward() const {
    if (shared_) {
      forward_shared();
    } else if (by_tile()) {
      parallel_for(plan_.outer * tiles_, p_.bytes(2), [&](std::int64_t piece) {
        const Tile t = tile(piece);
        const Constants constants = tile_constants(t);
        for (std::int64_t s = 0; s < segments_; ++s) apply(t, segment(s), constants);
      });
    } else {
      forward_in_phases();
    }
  }

  // Of columns, and of planes that are smaller than kLeastPlane; others are the row driver's.
  void inference() const {
    const auto constants_of = [&](const Tile& t, Constants own) {
      const auto of_tile = [&](const void* values, C* expanded) -> C* {
        C* given = values == nullptr ? nullptr : static_cast<C*>(const_cast<void*>(values)) + t.statistic;
        if (expanded == nullptr || given == nullptr) return given;
        expand(given, t.columns, expanded);
        wrap({expanded});
        return expanded;
      };
      own.mean = of_tile(p_.mean, own.mean);
      own.rstd = of_tile(p_.rstd, own.rstd);
      own.weight = of_tile(p_.weight, own.weight);
      own.bias = of_tile(p_.bias, own.bias);
      own.shift = nullptr;
      return own;
    };
    const Buffer buffer(joined_ > 0 ? bytes_of<Constants>(columns_) : 0);
    const Constants repeated =
        joined_ > 0 ? constants_of(tile(0), place<Constants>(tile(0), buffer, 0, columns_)) : Constants();

    std::int64_t rows = larger(16, 2 * kPieceElements / tile_);
    if (joined_ > 0) rows = ceil_div(rows, 4 * joined_) * 4 * joined_ + joined_;  // 4 lines side by side, and the ends
    const std::int64_t parts = ceil_div(rows_, rows);
    parallel_for(plan_.outer * tiles_ * parts, p_.bytes(2), [&](std::int64_t piece) {
      const Tile t = tile(piece / parts);
      const std::int64_t first = piece % parts * rows;
      const Constants c = joined_ > 0 ? repeated : constants_of(t, fold_ > 1 ? of_thread<Constants>(t) : Constants());
      apply(t, {first, smaller(rows, rows_ - first)}, c);
    });
  }

  void backward() const {
    if (along_rows()) {
      backward_with_rows();
    } else if (shared_) {
      backward_shared();
    } else if (by_tile()) {
      parallel_for(plan_.outer * tiles_, p_.bytes(3), [&](std::int64_t piece) {
        const Tile t = tile(piece);
        Gradients g = of_thread<Gradients>(t);
        tile_gradients(t, &g);
        for (std::int64_t s = 0; s < segments_; ++s) gradient(t, segment(s), g, nullptr, nullptr);
      });
    } else {
      backward_in_phases();
    }
  }

 private:
  // ---- pieces

  struct Tile {
    std::int64_t matrix, first, columns;  // columns [first, first + columns) of a matrix
    std::int64_t sums;                    // columns or planes that kernels sum
    std::int64_t statistic;               // index of the first one
    std::int64_t statistics;
  };

  struct Rows {
    std::int64_t first, count;
  };

  // `count` lines, first_line, first_line + step, ..., and of each, `columns` elements from first_element of a tile on,
  // which may run on into the lines behind it. period: as in ColumnApply.
  struct Window {
    std::int64_t first_line, step, count, first_element, columns, period;
  };

  Tile tile(std::int64_t piece) const {
    Tile t;
    t.matrix = piece / tiles_;
    t.first = piece % tiles_ * tile_;
    t.columns = smaller(tile_, columns_ - t.first);
    t.sums = t.columns / plane_;
    t.statistic = (t.matrix * columns_ + t.first) / plan_.fold;
    t.statistics = t.columns / plan_.fold;
    return t;
  }

  // Pieces of like size, an even number of them: two threads share 784 rows by halves. Whole blocks of 8 rows, and
  // where there are as many at least 256 KB of float32 (or 4 * kPieceRows): 4096 x 64 in pieces of 256 rows took 8 %
  // longer.
  std::int64_t piece_rows() const {
    const std::int64_t least = larger(kPieceRows, smaller(4 * kPieceRows, 4 * kPieceElements / columns_));
    const std::int64_t pieces = rows_ < 2 * least ? 1 : rows_ / least / 2 * 2;
    return ceil_div(ceil_div(rows_, pieces), 8) * 8;
  }

  // Of one segment, tiles are all that threads have to share; not where sums run along the rows, whose order of
  // additions a tile is part of, and an inference is cut between rows.
  bool shared() const {
    return segments_ == 1 && plan_.outer == 1 && plan_.elements >= kSharedElements && !along_rows() &&
           p_.operation != Operation::inference;
  }

  // Rows that are no whole cache lines, or begin beside one (in an out= of NumPy's), are not streamed, or not at their
  // ends. Where they are adjacent in memory, kernels get lines that are: of as many rows as fill cache lines (1 of 256
  // float32, 4 of 100), from the first cache line of y on, so that each ends in the row behind its own. Constants are
  // repeated as often, and behind those of the last column come those of the first again (wrap()).
  //   65536 x 100: inference 3.1 -> 1.2 ms, forward 2.0 -> 1.4, backward 7.0 -> 4.1 (65536 x 96: 1.3, 1.4, 4.1).
  //   Inference into an out= of NumPy's takes 1.0..1.15 times what it takes into fresh memory (1.25..1.65 before).
  //
  // The rows of a line, or 0.
  std::int64_t rows_joined() const {
    const std::int64_t bytes = size(p_.args.dtype), row = columns_ * bytes;
    const bool narrow =
        columns_ % vector_elements(p_.args.dtype) != 0 && row <= kNarrowBytes && plan_.elements >= kNarrowElements;
    if ((!stream_ && !narrow) || !rows_follow()) return 0;
    const std::int64_t rows = 64 / std::gcd(row, std::int64_t{64});
    return (rows == 1 && head(0) == 0) || rows * row > kJoinedBytes ? 0 : rows;
  }

  // Whether there is one matrix of BN, each row of which begins where the one before it ends.
  bool rows_follow() const {
    if (plan_.fold > 1 || plan_.outer * tiles_ > 1 || plan_.affine == Affine::per_element) return false;
    const std::int64_t row = columns_ * size(p_.args.dtype);
    const auto follow = [&](const Layout& layout) { return layout.direct && adjacent(layout.lines, row); };
    return follow(plan_.x) && follow(plan_.y) && (p_.args.dy == nullptr || follow(plan_.dy));
  }

  // Whether rows that stay in cache are so narrow that y (dx) of all of them is one line (kNarrowVectors).
  bool rows_flat() const {
    const std::int64_t lanes = vector_elements(p_.args.dtype);
    return joined_ == 0 && !stream_ && columns_ % lanes == 0 && columns_ <= kNarrowVectors * lanes && rows_follow();
  }

  // Elements from the beginning of a row of y to the first cache line.
  std::int64_t head(std::int64_t row) const {
    const std::int64_t bytes = size(p_.args.dtype);
    const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p_.args.y) % 64);
    return (64 - (address + row * columns_ * bytes) % 64) % 64 / bytes;
  }

  // f(Window) for the rows of a tile; flat: all of them are one line.
  template <class F>
  void for_windows(const Tile& t, const Rows& rows, bool flat, F&& f) const {
    const std::int64_t first = line(t, rows);
    if (flat) return f(Window{first, 1, 1, 0, rows.count * t.columns, t.columns});
    if (joined_ == 0) return f(Window{first, 1, rows.count, 0, t.columns, t.columns});
    const std::int64_t elements = rows.count * columns_, length = joined_ * columns_;
    const std::int64_t begin = smaller(head(first), elements);
    const std::int64_t lines = (elements - begin) / length, rest = (elements - begin) % length;
    if (begin > 0) f(Window{first, 1, 1, 0, begin, begin});
    if (lines > 0) f(Window{first, joined_, lines, begin, length, length});
    if (rest > 0) f(Window{first + lines * joined_, 1, 1, begin, rest, rest});
  }

  // How many elements of a tile's arrays lie behind those of its columns.
  std::int64_t wrapped() const { return joined_ == 0 ? 0 : (joined_ - 1) * columns_ + 64 / size(p_.args.dtype); }
  void wrap(std::initializer_list<C*> arrays) const {
    for (C* values : arrays) {
      for (std::int64_t done = 0, left = wrapped(); done < left; done += columns_) {
        copy(values, smaller(columns_, left - done), values + columns_ + done);
      }
    }
  }

  // Whole statistics and whole vectors, so that tiles start on cache lines where lines do: misaligned tiles of 7x7
  // planes took twice the time. Equal parts for the threads.
  std::int64_t tile_columns(std::int64_t row_bytes, std::int64_t threads) const {
    const std::int64_t most = row_bytes / size(p_.args.dtype), unit = std::lcm(plan_.fold, std::int64_t{16});
    const std::int64_t parts = ceil_div(ceil_div(columns_, most), threads) * threads;
    const std::int64_t target = threads == 1 ? most : larger(128, ceil_div(columns_, parts));
    const std::int64_t up = ceil_div(target, unit) * unit;
    return smaller(columns_, up <= most ? up : larger(1, target / unit) * unit);
  }

  // Whether kernels of planes do it, else those of columns: moments of float64 too, whose blocks and pivots 7x7 planes
  // would have of their own (8x2048x7x7: forward 1120 us, 510 as columns).
  static bool of_planes(const Problem& p) {
    return p.plan.fold >= kLeastPlane && (sizeof(C) == 4 || p.operation == Operation::backward);
  }
  bool planes() const { return plane_ > 1; }

  // dweight and dbias of LN over a leading or middle axis.
  bool along_rows() const { return plan_.affine == Affine::per_element && p_.dweight != nullptr; }

  bool by_tile() const {
    return segments_ == 1 ||
           (plan_.outer * tiles_ >= 2 * get_num_threads() && rows_ * tile_ * size(p_.args.dtype) <= kSlabBytes);
  }

  Rows segment(std::int64_t s) const { return {s * piece_rows_, smaller(piece_rows_, rows_ - s * piece_rows_)}; }

  double* segment_buffer(std::int64_t per_segment) const {
    Buffer& buffer = thread_buffer(Slot::columns);
    buffer.reserve((segments_ + 1) * per_segment * 8);
    return buffer.as<double>();
  }

  InputLines x_lines() const { return {plan_.x, p_.args.x, p_.args.dtype, Slot::x_table, Slot::x_lines}; }
  InputLines dy_lines() const { return {plan_.dy, p_.args.dy, p_.args.dtype, Slot::dy_table, Slot::dy_lines}; }
  OutputLines y_lines() const { return {plan_.y, p_.args.y, p_.args.dtype}; }

  // Tile by tile, the next one is fetched while results are written, if L2 holds both: memory is idle neither then nor
  // while moments or sums are made. Backward of 8x1024x14x14 870..990 -> 830 us, 32x1024x14x14 3900..4210 ->
  // 3560..4190.
  bool holds_two_tiles(std::int64_t arrays) const {
    return p_.operation != Operation::inference && segments_ == 1 &&
           2 * arrays * rows_ * tile_ * size(p_.args.dtype) <= kTwoTilesBytes;
  }
  // Whether x (and dy) come from memory row by row.
  bool ahead(const Tile& t, std::int64_t arrays) const { return stream_ && !(t.first > 0 && holds_two_tiles(arrays)); }
  std::int64_t next_tile(const Tile& t, std::int64_t arrays) const {
    const bool last = t.first + t.columns == columns_;
    return holds_two_tiles(arrays) && !last ? t.columns * size(p_.args.dtype) : 0;
  }

  // The same for planes, whose kernels fetch along each line: what follows in it where there is no next tile to fetch.
  std::int64_t next_plane(const Tile& t, std::int64_t arrays) const {
    const std::int64_t next = next_tile(t, arrays);
    return !stream_ ? 0 : next > 0 ? next : kAheadInLine;
  }

  // Where the lines of a tile begin within a page, if they are a multiple of 4 KB apart; and how far from there what
  // kernels keep of each column lies, whose arrays are 576 bytes apart (padded()).
  const void* first_line(const Tile& t) const {
    return static_cast<const char*>(p_.args.x) + t.first * size(p_.args.dtype);
  }
  static constexpr std::int64_t kConstants = 2112, kScratch = 3264;

  // Constants or Gradients of a tile of up to `columns` columns: bytes, and the index-th of them in a buffer.
  template <class Arrays>
  std::int64_t bytes_of(std::int64_t columns) const {
    return Arrays::kArrays * padded(columns + wrapped()) * static_cast<std::int64_t>(sizeof(C)) + kBesidePage;
  }
  template <class Arrays>
  Arrays place(const Tile& t, const Buffer& buffer, std::int64_t index, std::int64_t columns) const {
    return Arrays(beside(buffer.data() + index * bytes_of<Arrays>(columns), first_line(t), kConstants),
                  padded(columns + wrapped()));
  }
  template <class Arrays>
  Arrays of_thread(const Tile& t) const {
    Buffer& buffer = thread_buffer(Slot::constants);
    buffer.reserve(bytes_of<Arrays>(t.sums));
    return place<Arrays>(t, buffer, 0, t.sums);
  }

  std::int64_t line(const Tile& t, const Rows& r) const { return t.matrix * rows_ + r.first; }

  // ---- constants

  // Arrays of C per column in a thread's buffer: the arguments of column_apply.
  struct Constants {
    Constants() = default;
    Constants(char* memory, std::int64_t pitch) {
      C* base = reinterpret_cast<C*>(memory);
      mean = base;
      rstd = base + pitch;
      shift = base + 2 * pitch;
      rstd_low = base + 3 * pitch;
      scale = base + 4 * pitch;
      weight = base + 5 * pitch;
      bias = base + 6 * pitch;
    }
    static constexpr int kArrays = 7;
    C *mean = nullptr, *rstd = nullptr, *shift = nullptr, *rstd_low = nullptr, *scale = nullptr;
    C *weight = nullptr, *bias = nullptr;
    bool scaled = false;   // scale is not 1 everywhere
    bool general = false;  // column_apply is to use scale, and for BN weight
  };

  static void copy(const C* values, std::int64_t count, C* out) {
    std::memcpy(out, values, static_cast<std::size_t>(count) * sizeof(C));
  }

  void spread(std::int64_t columns, C* values) const {
    if (fold_ > 1) p_.kernels.column_spread({values, columns / fold_, fold_});
  }

  // values[statistics] -> out[columns]
  void expand(const C* values, std::int64_t columns, C* out) const {
    copy(values, columns / fold_, out);
    spread(columns, out);
  }

  // From one value a statistic to one a column; BN's weight is folded in where it may be.
  void spread_constants(const Tile& t, Constants* c) const {
    if (plan_.affine == Affine::per_statistic) {
      fold_weights(t, c);
      spread(t.sums, c->bias);
    } else {
      c->general = c->scaled;
      spread(t.sums, c->rstd_low);
    }
    spread(t.sums, c->mean);
    spread(t.sums, c->rstd);
    spread(t.sums, c->shift);
    if (c->general) spread(t.sums, c->scale);
    wrap({c->mean, c->rstd, c->shift, c->bias});
    if (c->general) wrap({c->scale, c->weight});
  }

  void fold_weights(const Tile& t, Constants* c) const {
    const auto of_tile = [&](const void* p) { return p == nullptr ? nullptr : static_cast<const C*>(p) + t.statistic; };
    const C* weight = of_tile(p_.weight);
    const C* bias = of_tile(p_.bias);
    // Into the arrays of weight and bias: rstd and shift are still needed where a weight may not be folded.
    C *factor = c->weight, *shift = c->bias;
    const bool all = p_.kernels.column_weight({t.statistics, c->rstd, c->rstd_low, c->shift, weight, factor, shift});
    if (all && !c->scaled) {
      std::swap(c->rstd, c->weight);
      std::swap(c->shift, c->bias);
    } else {
      c->general = true;
      if (!c->scaled) std::fill_n(c->scale, t.statistics, C(1));
      for (std::int64_t s = 0; s < t.statistics; ++s) {
        const C w = weight == nullptr ? C(1) : weight[s];
        if (c->scale[s] != C(1) || !foldable(factor[s], w)) {
          c->weight[s] = w;
        } else {
          c->rstd[s] = factor[s];
          c->shift[s] = shift[s];
          c->weight[s] = C(1);
        }
      }
      spread(t.sums, c->weight);
    }
    if (bias == nullptr) {
      std::fill_n(c->bias, t.statistics, -C(0));
    } else {
      copy(bias, t.statistics, c->bias);
    }
  }

  // weight or bias of the rows of a segment (LN), or `none`.
  const C* of_rows(const void* parameters, C none, const Rows& rows) const {
    if (parameters != nullptr) return static_cast<const C*>(parameters) + rows.first;
    Buffer& buffer = thread_buffer(none == C(1) ? Slot::ones : Slot::zeros);
    buffer.reserve(rows.count * static_cast<std::int64_t>(sizeof(C)));
    std::fill_n(buffer.as<C>(), rows.count, none);
    return buffer.as<C>();
  }

  const C* weight_of_rows(const Rows& rows) const {
    if (plan_.affine == Affine::per_statistic || p_.weight == nullptr) return nullptr;
    return static_cast<const C*>(p_.weight) + rows.first;
  }

  // ---- moments

  void tile_moments(const Tile& t, std::int64_t s, double* moments, bool wide = false, double scale = 1.0) const {
    if (planes()) return plane_moments(t, s, moments, wide);
    InputLines x = x_lines();
    Buffer& scratch = thread_buffer(Slot::sums);
    scratch.reserve(3 * padded(t.columns) * 8 + kBesidePage);
    ColumnMoments a;
    const Rows rows = segment(s);
    a.rows = rows.count;
    a.x = x.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.columns = t.columns;
    a.scale = scale;
    a.moments = moments;
    a.scratch = beside(scratch.data(), first_line(t), kScratch);
    a.ahead = ahead(t, 1);
    wide ? p_.kernels.column_moments_wide(a) : p_.kernels.column_moments(a);
  }

  void* plane_scratch(const Tile& t) const {
    Buffer& buffer = thread_buffer(Slot::sums);
    buffer.reserve(t.sums * kPlaneScratch * 8);
    return buffer.data();
  }

  void plane_moments(const Tile& t, std::int64_t s, double* moments, bool wide) const {
    InputLines x = x_lines();
    const Rows rows = segment(s);
    PlaneMoments a;
    a.rows = rows.count;
    a.x = x.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.planes = t.sums;
    a.length = plane_;
    a.moments = moments;
    a.scratch = plane_scratch(t);
    a.ahead = ahead(t, 1);
    wide ? p_.kernels.plane_moments_wide(a) : p_.kernels.plane_moments(a);
  }

  // Merges the segments' moments of a tile into the first, neighbours first, as a binary tree over their index.
  void merge_segments(double* moments, std::int64_t stride, std::int64_t count) const {
    for (std::int64_t step = 1; step < segments_; step *= 2) {
      for (std::int64_t s = 0; s + step < segments_; s += 2 * step) {
        const auto values_of = [&](std::int64_t first) {
          return static_cast<double>(smaller(step * piece_rows_, rows_ - first * piece_rows_) * plane_);
        };
        p_.kernels.column_merge(
            {moments + s * stride, moments + (s + step) * stride, count, values_of(s), values_of(s + step)});
      }
    }
  }

  // moments: one block of 4 arrays per segment, `stride` doubles apart. Fills the constants, mean and rstd of a tile.
  void finish_tile(const Tile& t, double* moments, std::int64_t stride, Constants* c) const {
    double* folded = join(t, moments, stride);
    const double count = static_cast<double>(plan_.reduced);
    const bool in_range =
        p_.kernels.column_finish({folded, t.statistics, count, p_.args.eps, c->mean, c->rstd, c->rstd_low, c->shift});
    C* mean = static_cast<C*>(p_.mean) + t.statistic;
    C* rstd = static_cast<C*>(p_.rstd) + t.statistic;
    std::memcpy(mean, c->mean, static_cast<std::size_t>(t.statistics) * sizeof(C));
    std::memcpy(rstd, c->rstd, static_cast<std::size_t>(t.statistics) * sizeof(C));
    const double* m2 = folded + 3 * padded(t.statistics);
    if (p_.exact != nullptr) keep_exact(t, folded);
    if (!in_range) {
      bool tiny = false, huge = false;  // float64 has a scale for each
      for (std::int64_t s = 0; s < t.statistics; ++s) {
        const bool out = out_of_range<C>(m2[s] / count, p_.args.eps), is_finite = finite(m2[s]);
        tiny |= out & is_finite;
        huge |= out & !is_finite;
      }
      if (tiny) redo(t, m2, true, c, mean, rstd);
      if (huge) redo(t, m2, false, c, mean, rstd);
    }
    spread_constants(t, c);
  }

  // Mean and variance before rounding.
  void keep_exact(const Tile& t, const double* folded) const {
    const double count = static_cast<double>(plan_.reduced);
    const std::int64_t pitch = padded(t.statistics);
    for (std::int64_t s = 0; s < t.statistics; ++s) {
      const Moments<double> m{folded[s], folded[pitch + s], folded[2 * pitch + s], folded[3 * pitch + s]};
      p_.exact[t.statistic + s] = {mean_of<C>(m, count), m.m2 / count};
    }
  }

  // Segments merged and columns folded: moments of the statistics of a tile.
  double* join(const Tile& t, double* moments, std::int64_t stride) const {
    merge_segments(moments, stride, t.sums);
    if (fold_ == 1) return moments;
    Buffer& buffer = thread_buffer(Slot::folded);
    buffer.reserve(4 * padded(t.statistics) * 8);
    p_.kernels.column_fold({moments, t.columns, fold_, static_cast<double>(rows_), buffer.as<double>()});
    return buffer.as<double>();
  }

  // Statistics out of range, from x in double. The whole tile is swept, only those are replaced.
  void redo(const Tile& t, const double* m2, bool finite_m2, Constants* c, C* mean, C* rstd) const {
    const std::int64_t stride = 4 * padded(t.sums);
    const double count = static_cast<double>(plan_.reduced);
    Buffer kept(t.statistics * 8), wide((segments_ + 1) * stride * 8);
    double* old_m2 = kept.as<double>();
    std::memcpy(old_m2, m2, static_cast<std::size_t>(t.statistics) * 8);
    const double scale = redo_scale<C>(finite_m2 ? 0.0 : __builtin_inf());
    for (std::int64_t s = 0; s < segments_; ++s) tile_moments(t, s, wide.as<double>() + s * stride, true, scale);
    const double* folded = join(t, wide.as<double>(), stride);
    const std::int64_t pitch = padded(t.statistics);
    if (!c->scaled) std::fill_n(c->scale, t.statistics, C(1));
    c->scaled = true;
    for (std::int64_t s = 0; s < t.statistics; ++s) {
      if (!out_of_range<C>(old_m2[s] / count, p_.args.eps) || finite(old_m2[s]) != finite_m2) continue;
      const Moments<double> m{folded[s], folded[pitch + s], folded[2 * pitch + s], folded[3 * pitch + s]};
      const Statistic<C> result = finish_scaled<C>(m, count, p_.args.eps, scale);
      mean[s] = result.mean;
      rstd[s] = result.rstd;
      if (p_.exact != nullptr) p_.exact[t.statistic + s] = {result.exact_mean, result.variance};
      c->mean[s] = result.normalizer.mean;
      c->rstd[s] = result.normalizer.rstd;
      c->rstd_low[s] = result.normalizer.rstd_low;
      c->shift[s] = result.normalizer.shift;
      c->scale[s] = result.normalizer.scale;
    }
    std::memcpy(const_cast<double*>(m2), old_m2, static_cast<std::size_t>(t.statistics) * 8);
  }

  // ---- forward

  // Moments of all segments of a tile, and its constants.
  Constants tile_constants(const Tile& t) const {
    Constants c = of_thread<Constants>(t);
    const std::int64_t stride = 4 * padded(t.sums);
    double* moments = segment_buffer(stride);
    for (std::int64_t s = 0; s < segments_; ++s) tile_moments(t, s, moments + s * stride);
    finish_tile(t, moments, stride, &c);
    return c;
  }

  void apply(const Tile& t, const Rows& rows, const Constants& c) const {
    if (planes()) return plane_apply(t, rows, c);
    InputLines x = x_lines();
    OutputLines y = y_lines();
    const bool folded = p_.operation == Operation::inference ? c.weight == nullptr : !c.general;
    for_windows(t, rows, flat_ && folded, [&](const Window& w) {
      const auto from = [&](const C* values) { return values == nullptr ? nullptr : values + w.first_element; };
      ColumnApply a;
      a.rows = w.count;
      a.x = x.get(w.first_line, w.step, w.count, t.first + w.first_element, w.columns);
      a.y = y.get(w.first_line, w.step, w.count, t.first + w.first_element, w.columns);
      a.columns = w.columns;
      a.period = w.period;
      a.mean = from(c.mean);
      a.rstd = from(c.rstd);
      a.shift = from(c.shift);
      a.rstd_low = from(c.rstd_low);
      a.scale = c.general ? from(c.scale) : nullptr;
      a.per_row = plan_.affine == Affine::per_element;
      a.weight = a.per_row ? of_rows(p_.weight, C(1), rows) : from(c.weight);
      a.bias = a.per_row ? of_rows(p_.bias, -C(0), rows) : from(c.bias);
      a.stream = stream_;
      a.next = next_tile(t, 1);
      p_.kernels.column_apply(a);
      y.finish();
    });
  }

  void plane_apply(const Tile& t, const Rows& rows, const Constants& c) const {
    InputLines x = x_lines();
    OutputLines y = y_lines();
    PlaneApply a;
    a.rows = rows.count;
    a.x = x.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.y = y.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.planes = t.sums;
    a.length = plane_;
    a.mean = c.mean;
    a.factor = c.rstd;
    a.bias = c.bias;
    a.shift = c.shift;
    a.weight = c.weight;
    a.scale = c.general ? c.scale : nullptr;
    a.stream = stream_;
    a.next = next_plane(t, 1);
    p_.kernels.plane_apply(a);
    y.finish();
  }

  // Constants of all tiles, until apply.
  class Kept {
   public:
    Kept(const ColumnDriver& driver, std::int64_t tiles)
        : driver_(driver), arrays_(tiles * driver.bytes_of<Constants>(driver.tile_)), general_(tiles) {}
    void put(std::int64_t index, const Constants& c) const {
      const std::int64_t count = driver_.tile(index).sums + driver_.wrapped();
      const Constants to = arrays(index);
      copy(c.mean, count, to.mean);
      copy(c.rstd, count, to.rstd);
      copy(c.shift, count, to.shift);
      copy(c.rstd_low, count, to.rstd_low);
      copy(c.bias, count, to.bias);
      if (c.general) {
        copy(c.scale, count, to.scale);
        copy(c.weight, count, to.weight);
      }
      general_.data()[index] = c.general;
    }
    Constants get(std::int64_t index) const {
      Constants c = arrays(index);
      c.general = general_.data()[index];
      return c;
    }

   private:
    Constants arrays(std::int64_t index) const {
      return driver_.place<Constants>(driver_.tile(index), arrays_, index, driver_.tile_);
    }
    const ColumnDriver& driver_;
    Buffer arrays_, general_;
  };

  // f(rows, tile index): threads share rows and not columns. Where one thread writes next to what another does in the
  // same rows, they fetch each other's lines: forward of 200 x 512 on two threads 30..37 us and on one 18.
  template <class F>
  void for_rows_of_tiles(int passes, F&& f) const {
    const std::int64_t rows = ceil_div(ceil_div(rows_, get_num_threads()), kRowBlock) * kRowBlock;
    const std::int64_t parts = ceil_div(rows_, rows);
    parallel_for(parts * tiles_, p_.bytes(passes), [&](std::int64_t piece) {
      const std::int64_t first = piece / tiles_ * rows;
      f(Rows{first, smaller(rows, rows_ - first)}, piece % tiles_);
    });
  }

  void forward_shared() const {
    const Kept kept(*this, tiles_);
    parallel_for(tiles_, p_.bytes(1), [&](std::int64_t index) { kept.put(index, tile_constants(tile(index))); });
    for_rows_of_tiles(2, [&](const Rows& rows, std::int64_t index) { apply(tile(index), rows, kept.get(index)); });
  }

  void forward_in_phases() const {
    const std::int64_t tiles = plan_.outer * tiles_, stride = 4 * padded(tile_);
    Buffer buffer(tiles * segments_ * stride * 8);
    double* moments = buffer.as<double>();
    parallel_for(tiles * segments_, p_.bytes(1), [&](std::int64_t piece) {
      const Tile t = tile(piece / segments_);
      tile_moments(t, piece % segments_, moments + piece * stride);
    });
    const Kept kept(*this, tiles);
    parallel_for(tiles, tiles * segments_ * stride * 8, [&](std::int64_t piece) {
      const Tile t = tile(piece);
      Constants c = of_thread<Constants>(t);
      finish_tile(t, moments + piece * segments_ * stride, stride, &c);
      kept.put(piece, c);
    });
    // Backwards: what was read last may still be in the cache.
    parallel_for(tiles * segments_, p_.bytes(2), [&](std::int64_t backwards) {
      const std::int64_t piece = tiles * segments_ - 1 - backwards, index = piece / segments_;
      apply(tile(index), segment(piece % segments_), kept.get(index));
    });
  }

  // ---- backward

  // Arrays of C per column: the arguments of column_sums and column_gradient.
  struct Gradients {
    static constexpr int kArrays = 6;
    Gradients(char* memory, std::int64_t pitch) {
      C* base = reinterpret_cast<C*>(memory);
      mean = base;
      rstd = base + pitch;
      shift = base + 2 * pitch;
      minus_mean_g = base + 3 * pitch;
      minus_mean_gx = base + 4 * pitch;
      factor = base + 5 * pitch;
    }
    C *mean, *rstd, *shift, *minus_mean_g, *minus_mean_gx, *factor;
  };

  void expand_statistics(const Tile& t, Gradients* g) const {
    expand(static_cast<const C*>(p_.mean) + t.statistic, t.sums, g->mean);
    expand(static_cast<const C*>(p_.rstd) + t.statistic, t.sums, g->rstd);
  }

  // sums: (3, padded(t.sums)), written.
  void tile_sums(const Tile& t, std::int64_t s, const Gradients& g, double* sums) const {
    if (planes()) return plane_sums(t, s, g, sums);
    InputLines x = x_lines(), dy = dy_lines();
    Buffer& scratch = thread_buffer(Slot::sums);
    const std::int64_t pitch = padded(t.columns);
    scratch.reserve(3 * pitch * static_cast<std::int64_t>(sizeof(C)) + kBesidePage);
    ColumnSums a;
    const Rows rows = segment(s);
    a.rows = rows.count;
    a.x = x.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.dy = dy.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.columns = t.columns;
    a.weight = weight_of_rows(rows);
    a.mean = g.mean;
    a.rstd = g.rstd;
    a.sums = sums;
    a.scratch = beside(scratch.data(), first_line(t), kScratch);
    a.ahead = ahead(t, 2);
    p_.kernels.column_sums(a);
  }

  void plane_sums(const Tile& t, std::int64_t s, const Gradients& g, double* sums) const {
    InputLines x = x_lines(), dy = dy_lines();
    const Rows rows = segment(s);
    PlaneSums a;
    a.rows = rows.count;
    a.x = x.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.dy = dy.get(line(t, rows), 1, a.rows, t.first, t.columns);
    a.planes = t.sums;
    a.length = plane_;
    a.mean = g.mean;
    a.rstd = g.rstd;
    a.sums = sums;
    a.scratch = plane_scratch(t);
    a.ahead = ahead(t, 2);
    p_.kernels.plane_sums(a);
  }

  // sums: one block of 3 arrays per segment, `stride` doubles apart. Fills the constants and, for BN, dweight, dbias.
  void finish_gradients(const Tile& t, double* sums, std::int64_t stride, Gradients* g) const {
    const std::int64_t pitch = padded(t.sums);
    for (std::int64_t s = 1; s < segments_; ++s) {
      for (std::int64_t array = 0; array < 3; ++array) {
        add_partials(sums + s * stride + array * pitch, t.sums, sums + array * pitch);
      }
    }
    const bool per_statistic = plan_.affine == Affine::per_statistic;
    const C* weight = per_statistic && p_.weight != nullptr ? static_cast<const C*>(p_.weight) + t.statistic : nullptr;
    ColumnGradientFinish a;
    a.sums = sums;
    a.columns = t.sums;
    a.fold = fold_;
    a.count = static_cast<double>(plan_.reduced);
    a.rstd = static_cast<const C*>(p_.rstd) + t.statistic;
    a.weight = weight;
    a.training = p_.args.training;
    a.shift = g->shift;
    a.minus_mean_g = g->minus_mean_g;
    a.minus_mean_gx = g->minus_mean_gx;
    a.factor = g->factor;
    a.dweight = per_statistic && p_.dweight != nullptr ? p_.dweight + t.statistic : nullptr;
    a.dbias = a.dweight == nullptr ? nullptr : p_.dbias + t.statistic;
    p_.kernels.column_gradient_finish(a);
    for (C* values : {g->shift, g->minus_mean_g, g->minus_mean_gx, g->factor}) spread(t.sums, values);
    wrap({g->mean, g->rstd, g->shift, g->minus_mean_g, g->minus_mean_gx, g->factor});
  }

  // Sums and constants of all segments of a tile.
  void tile_gradients(const Tile& t, Gradients* g) const {
    expand_statistics(t, g);
    const std::int64_t stride = 3 * padded(t.sums);
    double* sums = segment_buffer(stride);
    for (std::int64_t s = 0; s < segments_; ++s) tile_sums(t, s, *g, sums + s * stride);
    finish_gradients(t, sums, stride, g);
  }

  // dweight, dbias: (rows) running totals of LN parameters, or null.
  void gradient(const Tile& t, const Rows& rows, const Gradients& g, double* dweight, double* dbias) const {
    if (planes()) {
      PlaneGradient a;
      a.planes = t.sums;
      a.length = plane_;
      a.next = next_plane(t, 2);
      run_gradient(p_.kernels.plane_gradient, t, Window{line(t, rows), 1, rows.count, 0, t.columns, t.columns}, g, &a);
      return;
    }
    for_windows(t, rows, flat_, [&](const Window& w) {
      ColumnGradient a;
      a.columns = w.columns;
      a.period = w.period;
      a.weight = weight_of_rows(rows);
      a.dweight = dweight == nullptr ? nullptr : dweight + rows.first;
      a.dbias = dbias == nullptr ? nullptr : dbias + rows.first;
      a.next = next_tile(t, 2);
      run_gradient(p_.kernels.column_gradient, t, w, g, &a);
    });
  }

  // What columns and planes have in common; A: ColumnGradient or PlaneGradient.
  template <class A>
  void run_gradient(void (*kernel)(const A&), const Tile& t, const Window& w, const Gradients& g, A* a) const {
    InputLines x = x_lines(), dy = dy_lines();
    OutputLines dx = y_lines();
    const std::int64_t first = t.first + w.first_element;
    a->rows = w.count;
    a->x = x.get(w.first_line, w.step, w.count, first, w.columns);
    a->dy = dy.get(w.first_line, w.step, w.count, first, w.columns);
    a->dx = dx.get(w.first_line, w.step, w.count, first, w.columns);
    a->mean = g.mean + w.first_element;
    a->rstd = g.rstd + w.first_element;
    a->shift = g.shift + w.first_element;
    a->minus_mean_g = g.minus_mean_g + w.first_element;
    a->minus_mean_gx = g.minus_mean_gx + w.first_element;
    a->factor = g.factor + w.first_element;
    a->stream = stream_;
    kernel(*a);
    dx.finish();
  }

  void backward_shared() const {
    Buffer kept(tiles_ * bytes_of<Gradients>(tile_));
    const auto gradients_of = [&](std::int64_t index) { return place<Gradients>(tile(index), kept, index, tile_); };
    parallel_for(tiles_, p_.bytes(2), [&](std::int64_t index) {
      Gradients g = gradients_of(index);
      tile_gradients(tile(index), &g);
    });
    for_rows_of_tiles(3, [&](const Rows& rows, std::int64_t index) {
      gradient(tile(index), rows, gradients_of(index), nullptr, nullptr);
    });
  }

  void backward_in_phases() const {
    const std::int64_t tiles = plan_.outer * tiles_, stride = 3 * padded(tile_);
    Buffer sums_buffer(tiles * segments_ * stride * 8);
    Buffer kept(tiles * bytes_of<Gradients>(tile_));
    double* sums = sums_buffer.as<double>();
    const auto gradients_of = [&](std::int64_t index) { return place<Gradients>(tile(index), kept, index, tile_); };
    for (std::int64_t i = 0; i < tiles; ++i) {
      Gradients g = gradients_of(i);
      expand_statistics(tile(i), &g);
    }
    // A tile's arrays are 3 * padded(its columns) long, at most `stride`.
    parallel_for(tiles * segments_, p_.bytes(2), [&](std::int64_t piece) {
      const std::int64_t index = piece / segments_;
      tile_sums(tile(index), piece % segments_, gradients_of(index), sums + piece * stride);
    });
    parallel_for(tiles, tiles * segments_ * stride * 8, [&](std::int64_t index) {
      Gradients g = gradients_of(index);
      finish_gradients(tile(index), sums + index * segments_ * stride, stride, &g);
    });
    parallel_for(tiles * segments_, p_.bytes(3), [&](std::int64_t backwards) {
      const std::int64_t piece = tiles * segments_ - 1 - backwards, index = piece / segments_;
      gradient(tile(index), segment(piece % segments_), gradients_of(index), nullptr, nullptr);
    });
  }

  // LN over a leading or middle axis with parameter gradients: sums along the rows of all matrices. A piece is a tile
  // of a fixed chunk of matrices; its partial sums are added in index order.
  void backward_with_rows() const {
    const std::int64_t chunk = ceil_div(plan_.outer, 64);
    const std::int64_t pieces = ceil_div(plan_.outer, chunk) * tiles_;
    Buffer buffer(pieces * 2 * rows_ * 8);
    double* partials = buffer.as<double>();
    std::memset(partials, 0, static_cast<std::size_t>(pieces * 2 * rows_) * 8);
    parallel_for(pieces, p_.bytes(segments_ == 1 ? 3 : 5), [&](std::int64_t piece) {
      double* dweight = partials + piece * 2 * rows_;
      const std::int64_t first = piece / tiles_ * chunk;
      for (std::int64_t matrix = first; matrix < smaller(first + chunk, plan_.outer); ++matrix) {
        const Tile t = tile(matrix * tiles_ + piece % tiles_);
        Gradients g = of_thread<Gradients>(t);
        tile_gradients(t, &g);
        for (std::int64_t s = 0; s < segments_; ++s) gradient(t, segment(s), g, dweight, dweight + rows_);
      }
    });
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      add_partials(partials + piece * 2 * rows_, rows_, p_.dweight);
      add_partials(partials + piece * 2 * rows_ + rows_, rows_, p_.dbias);
    }
  }

  const Problem& p_;
  const Plan& plan_;
  std::int64_t rows_, columns_;
  std::int64_t plane_;  // adjacent elements of a line that kernels sum: a plane, or 1, a column
  std::int64_t fold_;   // adjacent columns that share a statistic
  std::int64_t tile_, tiles_, segments_, piece_rows_;
  std::int64_t joined_;  // rows that are written as one line, or 0
  bool flat_;            // y of all rows may be written as one line
  bool stream_;
  bool shared_;  // tiles are narrower, for the threads
};

}  // namespace

template <class C>
void columns_forward(const Problem& problem) {
  ColumnDriver<C>(problem).forward();
}
template <class C>
void columns_inference(const Problem& problem) {
  ColumnDriver<C>(problem).inference();
}
template <class C>
void columns_backward(const Problem& problem) {
  ColumnDriver<C>(problem).backward();
}

template void columns_forward<float>(const Problem&);
template void columns_forward<double>(const Problem&);
template void columns_inference<float>(const Problem&);
template void columns_inference<double>(const Problem&);
template void columns_backward<float>(const Problem&);
template void columns_backward<double>(const Problem&);

}  // namespace lanenorm
