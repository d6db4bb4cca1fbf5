// What kernels are given, and the functions that launch them: one per storage type, in row_norm_*.cu and
// column_norm_*.cu. norms.cu has the table. The CUDA twin of cpp/cpu/kernels.hpp.
//
// Rows and lines begin at any address unless it says aligned. Parameters (weight, bias) are contiguous, 16-byte
// aligned, in x's type or, with `parameters_as_compute`, in the compute type. Statistics are contiguous in the compute
// type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/choose.hpp"

namespace lanenorm::cuda {

// What an operation gets from its caller, who has made `device` current.
struct Context {
  int device;
  void* stream;                                       // cudaStream_t
  void* (*allocate)(void* state, std::size_t bytes);  // device memory, 256-byte aligned; throws
  void* state;                                        // the caller frees it after the call, in stream order
};

// ---- rows --------------------------------------------------------------------------------------------------------

struct RowForward {
  const char* x;  // (rows, length), rows x_stride bytes apart
  char* y;        // (rows, length)
  std::int64_t x_stride, y_stride;
  std::int64_t rows, length;
  void* mean;          // (rows), or null
  void* rstd;          // (rows), or null
  const void* weight;  // (length), or null
  const void* bias;    // (length), or null
  bool parameters_as_compute;
  double eps;
  double inverse_length;
  int warp_words;        // block: words of a row that belong to a warp
  std::int64_t pieces;   // resident, streamed: per row
  int pieces_per_block;  // resident
  void* piece_moments;   // streamed: Counted (sets, rows, pieces)
  void* statistics;      // streamed: Statistic (rows)
};

struct RowBackward {
  const char* dy;  // (rows, length)
  const char* x;   // (rows, length)
  char* dx;        // (rows, length)
  std::int64_t dy_stride, x_stride, dx_stride;
  std::int64_t rows, length;
  const void* mean;    // (rows)
  const void* rstd;    // (rows)
  const void* weight;  // (length), or null
  bool parameters_as_compute;
  double inverse_length;
  std::int64_t chunk_rows, chunks;
  std::int64_t slabs;
  int slab_words;               // words of a row that belong to a slab
  std::int64_t partial_length;  // length rounded up to whole words of x
  void* partial;  // dweight and dbias of every chunk: (chunks, 2, partial_length) in the compute type, aligned; or null
  void* slab_sums;  // sums of a first kernel: GradientSums (rows, slabs)
};

// dweight and dbias from partials, in index order.
struct FoldPartials {
  const void* partial;  // (chunks, 2, partial_length)
  std::int64_t chunks, length, partial_length;
  void* dweight;  // (length), or null
  void* dbias;
  bool as_compute;  // dweight and dbias in the compute type, else in x's
};

// ---- columns -----------------------------------------------------------------------------------------------------

// Of the columns that a cluster keeps on chip: so many words of a row, so many stretches of rows to each block.
struct Slab {
  int words, stretches;
};

// A tensor is `matrices` matrices of `rows` rows of `columns` elements; strides in bytes, the elements of a row
// adjacent.
struct ColumnForward {
  const char* x;
  char* y;
  std::int64_t x_matrix_stride, x_row_stride, y_matrix_stride, y_row_stride;
  std::int64_t matrices, rows, columns;
  void* mean;          // (matrices, columns), or null
  void* rstd;          // (matrices, columns), or null
  const void* weight;  // (rows), or null
  const void* bias;    // (rows), or null
  bool parameters_as_compute;
  double eps;
  double inverse_rows;
  std::int64_t strips, pieces;  // of a matrix
  Slab slab;                    // resident
  int warp_rows;                // pointwise: rows of a piece that belong to a warp
  void* piece_moments;          // streamed: Counted (sets, matrices, columns, pieces)
  void* normalizers;            // streamed: Normalizer (matrices, columns)
};

struct ColumnBackward {
  const char* dy;
  const char* x;
  char* dx;
  std::int64_t dy_matrix_stride, dy_row_stride, x_matrix_stride, x_row_stride, dx_matrix_stride, dx_row_stride;
  std::int64_t matrices, rows, columns;
  const void* mean;    // (matrices, columns / fold)
  const void* rstd;    // (matrices, columns / fold)
  std::int64_t fold;   // adjacent columns that share a statistic: 1 for LN
  const void* weight;  // (rows), or null
  bool parameters_as_compute;
  std::int64_t strips, pieces;
  Slab slab;                    // resident
  std::int64_t slabs;           // of kSlabWords words, of a matrix
  std::int64_t partial_length;  // rows rounded up
  void* partial;                // dweight and dbias of all of these: (matrices, slabs, 2, partial_length); or null
  void* piece_sums;             // streamed: GradientSums (matrices, columns, pieces)
  void* constants;              // streamed: GradientConstants (matrices, columns / fold)
};

// ---- channels (BN) -----------------------------------------------------------------------------------------------

// What belongs to a channel.
struct Channels {
  std::int64_t count;
  double elements;     // of a channel
  void* mean;          // (count): written by a forward, read by a backward; inference: running_mean
  void* rstd;          // (count); inference: running_var
  const void* weight;  // (count), or null
  const void* bias;    // (count), or null
  bool parameters_as_compute;
  double eps, momentum;
  void* running_mean;  // (count), or null
  void* running_var;
  bool training;    // backward: mean and rstd belong to this x
  void* dweight;    // (count), or null
  void* dbias;      // (count), or null
  void* constants;  // ChannelConstants (count); backward: GradientConstants (count)
};

// Where the elements of channels are: of each `runs` runs of `length` adjacent elements. A run is cut into segments,
// one for a warp; `warps` segments in a row, in the order of the runs, are a piece.
struct Runs {
  std::int64_t runs, length;
  std::int64_t segments;  // of a run
  int segment_words;
  std::int64_t pieces;   // of a channel
  int pieces_per_block;  // resident
};

struct PlaneForward {
  Channels channels;
  Runs runs;
  const char* x;
  char* y;
  std::int64_t x_channel_stride, x_run_stride, y_channel_stride, y_run_stride;  // bytes
  void* piece_moments;  // streamed: Counted (sets, channels, pieces)
};

struct PlaneBackward {
  Channels channels;
  Runs runs;
  const char* dy;
  const char* x;
  char* dx;
  std::int64_t dy_channel_stride, dy_run_stride, x_channel_stride, x_run_stride, dx_channel_stride, dx_run_stride;
  void* piece_sums;  // streamed: GradientSums (channels, pieces)
};

// Columns whose statistics are channels, each `fold` adjacent columns.
struct ColumnChannels {
  Channels channels;
  std::int64_t fold;
};

// What needs no moments or sums: y of an inference, or dx of dy alone (frozen statistics, no dweight and dbias).
enum class Pointwise { inference, frozen_gradient };

// ---- launchers ---------------------------------------------------------------------------------------------------

template <class T>
void row_forward(RowForward args, const RowForwardChoice& choice, const Context& context);
template <class T>
void row_backward(RowBackward args, const RowBackwardChoice& choice, const Context& context);
template <class T>
void column_forward(ColumnForward args, const ColumnChoice& choice, const Context& context);
template <class T>
void column_backward(ColumnBackward args, const ColumnChoice& choice, const Context& context);
template <class T>
void plane_forward(PlaneForward args, const PlaneChoice& choice, const Context& context);
template <class T>
void plane_backward(PlaneBackward args, const PlaneChoice& choice, const Context& context);
template <class T>
void column_channels_forward(ColumnForward args, ColumnChannels channels, const ColumnChoice& choice,
                             const Context& context);
template <class T>
void column_channels_backward(ColumnBackward args, Channels channels, const ColumnChoice& choice,
                              const Context& context);
// x and y stand for dy and dx of a gradient.
template <class T>
void plane_pointwise(PlaneForward args, Pointwise operation, const PlaneChoice& choice, const Context& context);
template <class T>
void column_pointwise(ColumnForward args, const ColumnChannels& channels, Pointwise operation,
                      const ColumnChoice& choice, const Context& context);
// The constants of all channels, from moments (sets, channels, places) or sums (channels, places).
template <class T>
void channel_statistics(const Channels& channels, const void* moments, std::int64_t places, const Context& context);
template <class T>
void channel_gradient(const Channels& channels, const void* sums, std::int64_t places, const Context& context);
template <class T>
void fold_partials(const FoldPartials& args, const DeviceLimits& device, const Context& context);

}  // namespace lanenorm::cuda
