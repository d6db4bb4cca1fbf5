// The one header kernels include. It gives them the words below and nothing else of CUDA, so that the same source is
// device code under nvcc and, with LANENORM_ON_HOST, C++ that runs on the CPU (tests/cuda_on_host/device.hpp, where
// every precondition stated here is checked).
//
//   __global__ __device__ __launch_bounds__, threadIdx.x blockIdx.x blockDim.x gridDim.x    blocks and grids are 1-D
//   shared<Layout>(), shared<T>(byte_offset)     the block's shared memory, as many bytes as the launch gave, 16-byte
//                                                aligned, not initialized
//   sync_block()                                 every thread of the block arrives at it; orders their memory accesses
//   sync_warp(mask)                              every lane of mask arrives at it; orders their memory accesses
//   shuffle, shuffle_xor, shuffle_down, any      every lane of mask arrives at it; these order no memory accesses
//   cluster_rank(), cluster_size(), sync_cluster(), of_block(mine, rank)     blocks that share their shared memory
//   copy_async_16, copy_commit, copy_wait<N>     global to shared memory in the background
//   load_words, store_words, load_global, store_global and their streaming forms     aligned global memory
//   to_float, to_half, and of pairs              float16 and bfloat16, as in core/halves.hpp
//   sqrt_rn, divide_rn                           IEEE, rounded to nearest
//
// Masks name lanes of the caller's warp, the caller's among them; no named lane has exited.
#pragma once

#ifdef LANENORM_ON_HOST
#include "cuda_on_host/device.hpp"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/halves.hpp"

namespace lanenorm::device {

// ---- Shared memory -----------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T* shared(std::size_t byte_offset) {
  extern __shared__ __align__(16) unsigned char lanenorm_shared_memory[];
  return reinterpret_cast<T*>(lanenorm_shared_memory + byte_offset);
}

template <class Layout>
__device__ __forceinline__ Layout& shared() {
  return *shared<Layout>(0);
}

// ---- Block and warp ----------------------------------------------------------------------------------------------

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp(unsigned mask) { __syncwarp(mask); }
__device__ __forceinline__ bool any(unsigned mask, bool condition) { return __any_sync(mask, condition) != 0; }

// T word by word: shuffle_word(word) is what the source lane passes for that word.
template <class T, class F>
__device__ __forceinline__ T shuffle_words(const T& value, F&& shuffle_word) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  std::uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &value, sizeof value);
#pragma unroll
  for (std::size_t i = 0; i < sizeof(T) / 4; ++i) words[i] = shuffle_word(words[i]);
  T result;
  __builtin_memcpy(&result, words, sizeof result);
  return result;
}

// What the lane source_lane % width of the caller's `width` lanes passes. width: a power of two up to 32.
template <class T>
__device__ __forceinline__ T shuffle(unsigned mask, const T& value, int source_lane, int width = 32) {
  return shuffle_words(value, [=](std::uint32_t word) { return __shfl_sync(mask, word, source_lane, width); });
}

// What the lane (lane ^ lane_offset) passes; lane_offset < width.
template <class T>
__device__ __forceinline__ T shuffle_xor(unsigned mask, const T& value, int lane_offset, int width = 32) {
  return shuffle_words(value, [=](std::uint32_t word) { return __shfl_xor_sync(mask, word, lane_offset, width); });
}

// What the lane (lane + lane_offset) passes; the caller's own value where that is beyond its `width` lanes.
template <class T>
__device__ __forceinline__ T shuffle_down(unsigned mask, const T& value, unsigned lane_offset, int width = 32) {
  return shuffle_words(value, [=](std::uint32_t word) { return __shfl_down_sync(mask, word, lane_offset, width); });
}

// ---- Clusters (sm_90 and up; before, every block is a cluster of its own) -----------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// Every thread of the cluster arrives at it; orders their memory accesses. One stands before the first access to
// another block's shared memory (that block may not have started) and one after the last (it may have exited).
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  // not .aligned: nothing promises that the lanes of a warp are together here
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The object in the shared memory of block `rank` of the cluster that `mine` is in this block's.
template <class T>
__device__ __forceinline__ T* of_block(T* mine, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(mine), "r"(rank));
  return other;
#else
  return mine;
#endif
}

// ---- Asynchronous copies -----------------------------------------------------------------------------------------

// valid_bytes (0..16) from global_src, the rest of the 16 bytes zero. Both 16-byte aligned; global_src is not read
// where valid_bytes is 0. The bytes are there for the copying thread after its copy_wait, for others after a
// barrier behind that. Before sm_80 the copy is done on the spot.
__device__ __forceinline__ void copy_async_16(void* shared_dst, const void* global_src, int valid_bytes) {
#if __CUDA_ARCH__ >= 800
  const auto dst = static_cast<unsigned>(__cvta_generic_to_shared(shared_dst));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(global_src), "r"(valid_bytes)
               : "memory");
#else
  uint4 words = make_uint4(0, 0, 0, 0);
  if (valid_bytes == 16) {
    words = *static_cast<const uint4*>(global_src);
  } else {
    unsigned char bytes[16] = {};
#pragma unroll
    for (int i = 0; i < 15; ++i) {
      if (i < valid_bytes) bytes[i] = static_cast<const unsigned char*>(global_src)[i];
    }
    __builtin_memcpy(&words, bytes, sizeof words);
  }
  *static_cast<uint4*>(shared_dst) = words;
#endif
}

// Ends the group of copies that this thread began since the last commit. A group may be empty.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns once all groups of this thread but the latest kPending are there.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- Global memory -----------------------------------------------------------------------------------------------

struct alignas(16) Words {
  std::uint32_t w[4];
};

// Through the read-only path: for what no thread writes during this kernel.
__device__ __forceinline__ Words load_words(const Words* p) {
  Words v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}

// For what is read once: it takes no place in L1. The kernel may write it afterwards (out is x).
__device__ __forceinline__ Words load_words_streaming(const Words* p) {
  Words v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}

__device__ __forceinline__ void store_words(Words* p, const Words& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// For what is not read again soon: the first to leave L2.
__device__ __forceinline__ void store_words_streaming(Words* p, const Words& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}

// One value, aligned to its size.
template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, const T& v) {
  *p = v;
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sqrt_rn(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double sqrt_rn(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide_rn(double a, double b) { return __ddiv_rn(a, b); }

// The conversions of core/halves.hpp in hardware; NaN stays NaN, its sign and payload may differ.
__device__ __forceinline__ float to_float(Float16 v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}
__device__ __forceinline__ float to_float(BFloat16 v) { return __uint_as_float(std::uint32_t{v.bits} << 16); }

// The two values in a word, that of its lower half first. One instruction each: of two single halves it would be up to
// three for the upper one.
template <class T>
__device__ __forceinline__ void to_float_pair(std::uint32_t pair, float* low, float* high) {
  if constexpr (std::is_same_v<T, Float16>) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
  } else {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xffff0000u);
  }
}

template <class T>
__device__ __forceinline__ T to_half(float v);

template <>
__device__ __forceinline__ Float16 to_half<Float16>(float v) {
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

template <>
__device__ __forceinline__ BFloat16 to_half<BFloat16>(float v) {
#if __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
#else
  return lanenorm::narrow<BFloat16>(v);
#endif
}

// Two values rounded as to_half<T> does, `low` in the lower half of the word.
template <class T>
__device__ __forceinline__ std::uint32_t to_half_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t pair;
  if constexpr (std::is_same_v<T, Float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return std::uint32_t{to_half<T>(high).bits} << 16 | to_half<T>(low).bits;
#endif
}

}  // namespace lanenorm::device

#endif
