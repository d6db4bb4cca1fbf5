// The words of cuda/device.cuh on the CPU, and the checks of their preconditions. The contracts are stated there.
//
// Everything that touches a kernel's memory is here, not in emulator.cpp, so that the sanitizers a kernel is built
// with see it; emulator.cpp is always built without.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/dtype.hpp"
#include "core/halves.hpp"
#include "cuda_on_host/emulator.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using lanenorm::on_host::blockDim;
using lanenorm::on_host::blockIdx;
using lanenorm::on_host::gridDim;
using lanenorm::on_host::threadIdx;

namespace lanenorm::device {

using on_host::Site;

// ---- Shared memory -----------------------------------------------------------------------------------------------

template <class T>
T* shared(std::size_t byte_offset, Site site = Site::here()) {
  return static_cast<T*>(on_host::shared(byte_offset, sizeof(T), alignof(T), site));
}

template <class Layout>
Layout& shared(Site site = Site::here()) {
  return *shared<Layout>(0, site);
}

// ---- Block and warp ----------------------------------------------------------------------------------------------

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline void sync_block(Site site = Site::here()) { on_host::sync_block(site); }
inline void sync_warp(unsigned mask, Site site = Site::here()) { on_host::sync_warp(mask, site); }
inline bool any(unsigned mask, bool condition, Site site = Site::here()) { return on_host::any(mask, condition, site); }

inline void check_width(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    on_host::fail(site, "shuffle with width " + std::to_string(width) + ", expected a power of two up to 32");
  }
}

template <class T>
T shuffle_from(unsigned mask, const T& value, int source_lane, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  std::uint32_t in[sizeof(T) / 4], out[sizeof(T) / 4];
  std::memcpy(in, &value, sizeof value);
  on_host::shuffle(mask, source_lane, in, out, sizeof(T) / 4, site);
  T result;
  std::memcpy(&result, out, sizeof result);
  return result;
}

template <class T>
T shuffle(unsigned mask, const T& value, int source_lane, int width = 32, Site site = Site::here()) {
  check_width(width, site);
  return shuffle_from(mask, value, (on_host::lane() & -width) + (source_lane & (width - 1)), site);
}

template <class T>
T shuffle_xor(unsigned mask, const T& value, int lane_offset, int width = 32, Site site = Site::here()) {
  check_width(width, site);
  if (lane_offset < 0 || lane_offset >= width) {
    on_host::fail(site,
                  "shuffle_xor by " + std::to_string(lane_offset) + " within " + std::to_string(width) + " lanes");
  }
  return shuffle_from(mask, value, on_host::lane() ^ lane_offset, site);
}

template <class T>
T shuffle_down(unsigned mask, const T& value, unsigned lane_offset, int width = 32, Site site = Site::here()) {
  check_width(width, site);
  const int lane = on_host::lane();
  const bool inside = (lane & (width - 1)) + static_cast<std::int64_t>(lane_offset) < width;
  return shuffle_from(mask, value, inside ? lane + static_cast<int>(lane_offset) : lane, site);
}

// ---- Clusters ----------------------------------------------------------------------------------------------------

inline unsigned cluster_rank() { return on_host::cluster_rank(); }
inline unsigned cluster_size() { return on_host::cluster_size(); }
inline void sync_cluster(Site site = Site::here()) { on_host::sync_cluster(site); }

template <class T>
T* of_block(T* mine, unsigned rank, Site site = Site::here()) {
  return static_cast<T*>(on_host::of_block(mine, rank, site));
}

// ---- Asynchronous copies -----------------------------------------------------------------------------------------

// Until its wait the destination holds NaN: hardware may have written it or not.
inline void copy_async_16(void* shared_dst, const void* global_src, int valid_bytes, Site site = Site::here()) {
  on_host::check_aligned(shared_dst, 16, "copy_async_16 to", site);
  if (valid_bytes != 0) on_host::check_aligned(global_src, 16, "copy_async_16 from", site);
  if (valid_bytes < 0 || valid_bytes > 16) {
    on_host::fail(site, "copy_async_16 of " + std::to_string(valid_bytes) + " bytes");
  }
  on_host::begin_copy({shared_dst, global_src, valid_bytes, site});
  std::memset(shared_dst, 0xff, 16);
}

inline void copy_commit() { on_host::commit_copies(); }

template <int kPending>
void copy_wait() {
  for (const on_host::Copy& copy : on_host::finish_copies(kPending)) {
    std::memset(copy.to, 0, 16);
    if (copy.valid_bytes != 0) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.valid_bytes));
  }
}

// ---- Global memory -----------------------------------------------------------------------------------------------

struct alignas(16) Words {
  std::uint32_t w[4];
};

// memcpy: what lies there may have been written as another type.
template <class T>
T load_aligned(const T* p, const char* what, Site site) {
  on_host::check_aligned(p, alignof(T), what, site);
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
void store_aligned(T* p, const T& v, const char* what, Site site) {
  on_host::check_aligned(p, alignof(T), what, site);
  std::memcpy(p, &v, sizeof v);
}

inline Words load_words(const Words* p, Site site = Site::here()) { return load_aligned(p, "load_words", site); }
inline Words load_words_streaming(const Words* p, Site site = Site::here()) {
  return load_aligned(p, "load_words_streaming", site);
}
inline void store_words(Words* p, const Words& v, Site site = Site::here()) {
  store_aligned(p, v, "store_words", site);
}
inline void store_words_streaming(Words* p, const Words& v, Site site = Site::here()) {
  store_aligned(p, v, "store_words_streaming", site);
}
template <class T>
T load_global(const T* p, Site site = Site::here()) {
  return load_aligned(p, "load_global", site);
}
template <class T>
void store_global(T* p, const T& v, Site site = Site::here()) {
  store_aligned(p, v, "store_global", site);
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------

inline float sqrt_rn(float a) { return std::sqrt(a); }
inline double sqrt_rn(double a) { return std::sqrt(a); }
inline float divide_rn(float a, float b) { return a / b; }
inline double divide_rn(double a, double b) { return a / b; }

inline float to_float(Float16 v) { return widen(v); }
inline float to_float(BFloat16 v) { return widen(v); }
template <class T>
void to_float_pair(std::uint32_t pair, float* low, float* high) {
  *low = widen(T{static_cast<std::uint16_t>(pair)});
  *high = widen(T{static_cast<std::uint16_t>(pair >> 16)});
}
template <class T>
T to_half(float v) {
  return narrow<T>(v);
}
template <class T>
std::uint32_t to_half_pair(float low, float high) {
  return std::uint32_t{narrow<T>(high).bits} << 16 | narrow<T>(low).bits;
}

}  // namespace lanenorm::device
