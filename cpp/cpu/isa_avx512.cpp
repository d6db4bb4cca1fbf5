// Kernels for avx512, compiled with the flags the table in CMakeLists.txt gives this file alone.
#define LANENORM_ISA avx512

#include "cpu/simd_avx512.hpp"
// after the vector types
#include "cpu/table.hpp"

namespace lanenorm {

const KernelTable* kernels_avx512() { return avx512::kTables; }

}  // namespace lanenorm
