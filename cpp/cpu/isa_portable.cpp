// Kernels for portable, compiled with the flags the table in CMakeLists.txt gives this file alone.
#define LANENORM_ISA portable
#define LANENORM_INLINE inline
#define LANENORM_NO_UNROLL
#define LANENORM_LAMBDA_INLINE

#include "cpu/simd_portable.hpp"
// after the vector types
#include "cpu/table.hpp"

namespace lanenorm {

const KernelTable* kernels_portable() { return portable::kTables; }

}  // namespace lanenorm
