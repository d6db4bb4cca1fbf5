// Code headers (moments, formulas, halves, simd_*, blocks, row_norm, column_norm) are compiled once per instruction
// set, each unit with flags of its own. Their content lies in an inline namespace named after that set: without it
// the linker would see several definitions of one inline function and might keep the AVX-512 copy for every machine.
// For the same reason they use nothing of the C++ standard library.
#pragma once

#ifndef LANENORM_ISA
#define LANENORM_ISA host  // plain C++ around the kernels: merging, constants
#endif

// Kernels are written as many small functions that must become one loop. The portable unit leaves that to the
// compiler: forced, its arrays of lanes would take minutes to compile.
#ifndef LANENORM_INLINE
#define LANENORM_INLINE [[gnu::always_inline]] inline
#define LANENORM_LAMBDA_INLINE __attribute__((always_inline))
#endif
