// Kernels for avx2, compiled with the flags the table in CMakeLists.txt gives this file alone.
#define LANENORM_ISA avx2

#include "cpu/simd_avx2.hpp"
// after the vector types
#include "cpu/table.hpp"

namespace lanenorm {

const KernelTable* kernels_avx2() { return avx2::kTables; }

}  // namespace lanenorm
