// Arrays that kernels cannot read or write where they lie: copied, in the order of the Plan, to dense workspace and
// back. How much at a time: for_batches in operands.hpp.
#pragma once

#include <cstdint>

#include "core/plan.hpp"
#include "cuda/kernels.hpp"

namespace lanenorm::cuda {

// Where the elements of a tensor are: element j of line i at offset(lines, i) + offset(inner, j).
struct Nest {
  char* data;
  Loop lines, inner;
};

// Elements [column, column + columns) of lines [first, first + count).
struct Lines {
  std::int64_t first, count, column, columns;
};

// Those of `from` to the same of `to`; counts and extents of both are the same.
void copy_lines(const Nest& to, const Nest& from, const Lines& lines, std::int64_t element_bytes,
                const Context& context);

// mean 0 and rstd 1 / sqrt(eps) of rows without elements.
void fill_empty_statistics(DType dtype, std::int64_t count, double eps, void* mean, void* rstd, const Context& context);

// `bytes` zero bytes.
void fill_zero(void* to, std::int64_t bytes, const Context& context);

}  // namespace lanenorm::cuda
