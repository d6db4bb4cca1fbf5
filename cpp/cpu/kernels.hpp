// The table of kernels: what every ISA provides for every dtype, and the arguments of each kernel.
//
// T is the storage type of x, y, dy, dx; C its compute type (core/dtype.hpp). Everything else a kernel touches is C or
// double. Kernels work on *lines*: tables of pointers to adjacent elements (core/plan.hpp). No kernel allocates,
// checks, starts threads or knows axes; sizes are at least 1.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace lanenorm {

// Moments in plain doubles, as they cross from an ISA's code to the driver: (x - pivot) sums to sum + low.
struct PieceMoments {
  double pivot, sum, low, m2, count;
};

// Sums over a piece in a backward: g = dy * weight, t = (x - mean) * rstd.
struct PieceSums {
  double g, gt, t;
};

// ---- rows: a line is a run, or a piece of one --------------------------------------------------------------------

// Statistics and normalization of whole rows, one line each.
struct RowForward {
  const void* const* x;  // (rows) lines of `length` T
  void* const* y;        // (rows) lines of `length` T; y[i] == x[i] is fine
  std::int64_t rows, length;
  const void* weight;  // (length) C, with per_row (rows) C, or null
  const void* bias;    // likewise
  bool per_row;
  double eps;
  void* mean;     // (rows) C
  void* rstd;     // (rows) C
  double* exact;  // (rows, 3): mean as high + low and variance before rounding; or null
  bool stream;    // write y past the caches
  bool prefetch;  // fetch the rows after these while writing
};

// Moments of one piece: `runs` lines of `length` elements, together at most kPieceVectors vectors or one run.
struct RowMoments {
  const void* const* x;
  std::int64_t runs, length;
  double scale;              // x is multiplied by it (redo only)
  const void* const* ahead;  // (runs) lines to fetch into L2 meanwhile, or null
};

// Normalization of one piece of one statistic.
struct RowApply {
  const void* const* x;
  void* const* y;
  std::int64_t runs, length;
  const void* normalizer;  // Normalizer<C>
  const void* weight;      // per element: (runs, length) C; per statistic: one C; or null
  const void* bias;        // likewise
  bool per_element;
  bool stream;               // write y past the caches
  const void* const* ahead;  // (runs) lines of x to fetch meanwhile, or null
};

struct RowSums {
  const void* const* x;
  const void* const* dy;
  std::int64_t runs, length;
  const void* weight;  // (runs, length) C, or null
  double mean, rstd;
  bool fetch;  // what follows the lines in memory, ahead of reading it
};

// dx of `rows` lines, each with constants of its own, and optionally the sums over the rows of dy * xhat and dy.
struct RowGradient {
  const void* const* x;
  const void* const* dy;
  void* const* dx;
  std::int64_t rows, length;
  const void* weight;     // (length) C, or null
  const void* constants;  // (rows) GradientConstants<C>; with `shared`, one for all rows, and no weight
  bool shared;
  const void* const* ahead_x;  // (rows) with `shared`: lines to fetch into L2 meanwhile, or null
  const void* const* ahead_dy;
  bool stream;        // write dx past the caches, where lines allow it
  void* sum_dweight;  // (length) C: sums of up to kFlushRows rows, written by the first; null: no parameter gradients;
                      // (padded(length)) where they go to totals
  void* sum_dbias;
  double* dweight;  // (length) running totals, which the sums join; null: they stay
  double* dbias;
  std::int64_t done;  // rows of this chunk before these, a multiple of kRowBlock
  bool last;          // these end the chunk
};

// Whole rows of a backward: sums and gradients, kRowBlock rows at a time.
struct RowBackward {
  const void* const* x;
  const void* const* dy;
  void* const* dx;
  std::int64_t rows, length;
  const void* weight;  // (length) C, with per_row (rows) C, or null
  const void* mean;    // (rows) C
  const void* rstd;    // (rows) C
  bool per_row;        // BN: weight, dweight, dbias belong to the row
  double* dweight;     // with per_row (rows), else this and the rest as in RowGradient
  double* dbias;
  void* sum_dweight;
  void* sum_dbias;
  std::int64_t done;
  bool last;
  bool stream;  // write dx past the caches, where rows start on cache lines
};

// Partial sums of dweight or dbias join their totals, in index order.
struct PartialSums {
  const void* partials;  // (chunks, pitch) C
  std::int64_t chunks, pitch, count;
  double* totals;  // (count)
};

// ---- columns: a line is a row of a matrix, or a piece of one -----------------------------------------------------

// Moments of every column of `rows` lines, as four arrays (pivot, sum, low, m2) of padded(columns) doubles.
struct ColumnMoments {
  const void* const* x;
  std::int64_t rows, columns;
  double scale;     // x is multiplied by it (redo only)
  double* moments;  // (4, padded(columns))
  void* scratch;    // 3 * padded(columns) doubles
  bool ahead;       // fetch the rows that follow: x comes from memory
};

// Moments of pieces of count_a and count_b rows joined into `a`; a comes first.
struct ColumnMerge {
  double* a;        // (4, padded(columns))
  const double* b;  // (4, padded(columns))
  std::int64_t columns;
  double count_a, count_b;
};

// Every `fold` adjacent columns of `count` values each joined into one statistic.
struct ColumnFold {
  const double* moments;  // (4, padded(columns))
  std::int64_t columns, fold;
  double count;
  double* folded;  // (4, padded(columns / fold))
};

// One value a statistic becomes one a column.
struct ColumnSpread {
  void* values;  // (padded(statistics * fold)) C
  std::int64_t statistics, fold;
};

// mean, rstd and the low part of the mean, as Statistic<C> has them, for statistics in range.
struct ColumnFinish {
  const double* moments;  // (4, padded(columns))
  std::int64_t columns;
  double count, eps;
  void *mean, *rstd, *rstd_low, *shift;  // (padded(columns)) C
};

// fold_weight() of formulas.hpp for the statistics of a tile.
struct ColumnWeight {
  std::int64_t statistics;
  const void *rstd, *rstd_low, *shift;  // (padded(statistics)) C
  const void* weight;                   // (statistics) C, or null
  void *factor, *folded_shift;          // (padded(statistics)) C; may be rstd and shift
};

// The only line may be many rows of at most so many whole vectors, one behind the other: a kernel keeps the constants
// of a row in registers. Nothing is streamed then, and factors are folded (no scale; inference: no weight).
inline constexpr int kNarrowVectors = 8;

// BN: y = ((x - mean) * rstd + shift) + bias, rstd and shift with the weight folded in; with scale normalize_affine()
//     of formulas.hpp. Inference, without shift: y = (x - mean) * rstd + bias; with weight as PlaneApply says.
// LN (per_row): y = normalize(x, mean, rstd, rstd_low, shift) * weight + bias; with scale of x * scale.
struct ColumnApply {
  const void* const* x;
  void* const* y;
  std::int64_t rows, columns;
  std::int64_t period;      // the columns of such a row, after which the constants repeat; or `columns`
  const void *mean, *rstd;  // (columns, or period) C
  const void* shift;        // (columns) C; BN: or null, 0
  const void* rstd_low;     // (columns) C: LN
  const void* scale;        // (columns) C, or null: all 1
  const void* weight;       // LN: (rows) C; BN: (columns) C, with scale; inference: or null
  const void* bias;         // LN: (rows) C; BN: (columns) C
  bool per_row;
  bool stream;        // write y past the caches, where rows start on cache lines
  std::int64_t next;  // with stream: bytes to the columns that are needed next and fetched; 0: the rows that follow
};

// rstd = 1 / sqrt(variance + eps) and factor = rstd * weight.
struct InferenceConstants {
  std::int64_t channels;
  double eps;
  const void* variance;  // (channels) C
  const void* weight;    // (channels) C, or null
  void *rstd, *factor;   // (channels) C
};

struct ColumnSums {
  const void* const* x;
  const void* const* dy;
  std::int64_t rows, columns;
  const void* weight;       // (rows) C, or null
  const void *mean, *rstd;  // (columns) C
  double* sums;             // (3, padded(columns)): g, g t, t; written
  void* scratch;            // 3 * padded(columns) C
  bool ahead;               // fetch the rows that follow: x and dy come from memory
};

// Constants of a backward from the sums of its columns, every `fold` of which belong to one statistic.
struct ColumnGradientFinish {
  const double* sums;  // (3, padded(columns)): g, g t, t
  std::int64_t columns, fold;
  double count;                                         // elements of a statistic
  const void* rstd;                                     // (columns / fold) C
  const void* weight;                                   // (columns / fold) C, or null
  bool training;                                        // else the statistics are constants: dx = dy * factor
  void *shift, *minus_mean_g, *minus_mean_gx, *factor;  // (padded(columns / fold)) C
  double *dweight, *dbias;                              // (columns / fold), or null
};

struct ColumnGradient {
  const void* const* x;
  const void* const* dy;
  void* const* dx;
  std::int64_t rows, columns;
  std::int64_t period;                                                      // as in ColumnApply
  const void* weight;                                                       // (rows) C, or null
  const void *mean, *rstd, *shift, *minus_mean_g, *minus_mean_gx, *factor;  // (columns) C
  double *dweight, *dbias;  // (rows) running totals over the columns, or null
  bool stream;              // as in ColumnApply
  std::int64_t next;        // as in ColumnApply
};

// ---- planes: a line is `planes` adjacent planes of `length` elements -----------------------------------------------

// The i-th planes of all lines are one statistic.

// Three sums in 16 float32 or 8 float64 lanes and in 8 of double; or two, and a pivot.
inline constexpr std::int64_t kPlaneScratch = 3 * (8 + 8);

// Of float32 or 16-bit data.
struct PlaneMoments {
  const void* const* x;
  std::int64_t rows, planes, length;
  double* moments;  // (4, padded(planes)), as of columns
  void* scratch;    // kPlaneScratch doubles a plane
  bool ahead;       // fetch the lines that follow: x comes from memory
};

// y = ((x - mean) * factor + shift) + bias, factor and shift with the weight folded in; with scale normalize_affine()
// of formulas.hpp. Inference, without shift: y = (x - mean) * factor + bias; with weight y = (x - mean) * factor *
// weight + bias, where factor 1 changes no bit.
struct PlaneApply {
  const void* const* x;
  void* const* y;
  std::int64_t rows, planes, length;
  const void *mean, *factor, *bias;  // (planes) C
  const void* shift;                 // (planes) C, or null
  const void* weight;                // (planes) C, with scale; inference: or null
  const void* scale;                 // (planes) C, or null: all 1
  bool stream;                       // write y past the caches
  std::int64_t next;                 // bytes to what is needed next and fetched meanwhile; 0: nothing
};

struct PlaneSums {
  const void* const* x;
  const void* const* dy;
  std::int64_t rows, planes, length;
  const void *mean, *rstd;  // (planes) C
  double* sums;             // (3, padded(planes)): g, g t, t; written
  void* scratch;            // as in PlaneMoments
  bool ahead;               // likewise
};

struct PlaneGradient {
  const void* const* x;
  const void* const* dy;
  void* const* dx;
  std::int64_t rows, planes, length;
  const void *mean, *rstd, *shift, *minus_mean_g, *minus_mean_gx, *factor;  // (planes) C
  bool stream;                                                              // as in PlaneApply
  std::int64_t next;
};

// ---- the table ---------------------------------------------------------------------------------------------------

struct KernelTable {
  void (*row_forward)(const RowForward&);
  PieceMoments (*row_moments)(const RowMoments&);
  PieceMoments (*row_moments_wide)(const RowMoments&);  // in double, x scaled: for statistics out of range
  void (*row_apply)(const RowApply&);
  PieceSums (*row_sums)(const RowSums&);
  void (*row_gradient)(const RowGradient&);
  void (*row_backward)(const RowBackward&);
  void (*add_partial_sums)(const PartialSums&);
  void (*column_moments)(const ColumnMoments&);
  void (*column_moments_wide)(const ColumnMoments&);
  void (*column_merge)(const ColumnMerge&);
  void (*column_fold)(const ColumnFold&);
  void (*column_spread)(const ColumnSpread&);
  bool (*column_finish)(const ColumnFinish&);
  bool (*column_weight)(const ColumnWeight&);
  void (*column_apply)(const ColumnApply&);
  bool (*inference_constants)(const InferenceConstants&);
  void (*column_sums)(const ColumnSums&);
  void (*column_gradient_finish)(const ColumnGradientFinish&);
  void (*column_gradient)(const ColumnGradient&);
  void (*plane_moments)(const PlaneMoments&);  // not of float64
  void (*plane_moments_wide)(const PlaneMoments&);
  void (*plane_apply)(const PlaneApply&);
  void (*plane_sums)(const PlaneSums&);
  void (*plane_gradient)(const PlaneGradient&);
  void (*widen)(const void* values, std::int64_t count, void* out);   // T -> C
  void (*narrow)(const void* values, std::int64_t count, void* out);  // C -> T
};

// Elements of a vector: 16 float or 8 double virtual lanes on every ISA.
constexpr std::int64_t vector_elements(DType dtype) { return dtype == DType::float64 ? 8 : 16; }

// Vectors in a piece of a row: 64 superblocks of 64 vectors, 65536 float32 elements = 256 KB, a quarter of an L2 cache.
inline constexpr std::int64_t kPieceVectors = 4096;

// Least rows of a matrix in a piece, where there are as many: 4 superblocks of 64 rows; the partial moments of a piece
// are 3 % of its data.
inline constexpr std::int64_t kPieceRows = 256;

// Rows of a backward that are swept together: dweight and dbias are loaded and stored once per 4 rows, and the 6
// constants of 4 rows fit the 32 registers of AVX-512 (of 8 rows they were loaded again for every vector). The tree
// over 4 rows and 8 additions keep float32 sums of 32 rows within 6 u (2 levels, and additions that see half the sum).
inline constexpr std::int64_t kRowBlock = 4;
inline constexpr std::int64_t kFlushRows = 32;  // then the float32 sums go to double

// Column arrays are padded to whole vectors, so that kernels may write all lanes; and longer ones by eight cache
// lines more: those of one tile would otherwise lie 4 KB apart and evict each other from L1, which has room for 8 lines
// at one place within a page. Always inlined, since ISA units call it: no copy of it may be left for the linker to
// choose (core/isa.hpp).
[[gnu::always_inline]] constexpr std::int64_t padded(std::int64_t columns) {
  return ((columns + 15) / 16 | 1) * 16 + (columns < 256 ? 0 : 128);
}

}  // namespace lanenorm
