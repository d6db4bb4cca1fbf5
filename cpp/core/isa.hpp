// Code headers (moments, formulas, halves, simd_*, blocks, row_norm, column_norm) are compiled once per instruction
// set, each unit with flags of its own. Their content lies in an inline namespace named after that set: without it
// the linker would see several definitions of one inline function and might keep the AVX-512 copy for every machine.
// For the same reason they use nothing of the C++ standard library.
//
// For CUDA the set is `gpu`: nvcc compiles every function of these headers for the device and for the host, and the
// tests compile the same units for the host alone (LANENORM_ON_HOST).
#pragma once

#ifndef LANENORM_ISA
#if defined(__CUDACC__) || defined(LANENORM_ON_HOST)
#define LANENORM_ISA gpu
#else
#define LANENORM_ISA host  // plain C++ around the kernels: merging, constants
#endif
#endif

// Kernels are written as many small functions that must become one loop. The portable unit leaves that to the
// compiler: forced, its arrays of lanes would take minutes to compile.
#ifndef LANENORM_INLINE
#ifdef __CUDACC__
#define LANENORM_INLINE __host__ __device__ __forceinline__
#else
#define LANENORM_INLINE [[gnu::always_inline]] inline
#endif
#define LANENORM_LAMBDA_INLINE __attribute__((always_inline))
#endif
