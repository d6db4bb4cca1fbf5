// 16-byte loads and stores of runs: adjacent elements at any address, shared among the lanes of a group.
//
//   word      16 bytes of a run counted from its first element, wherever that lies. Word w holds the elements
//             [w E, w E + E), E = 16 / sizeof(T). Which lane gets which word follows from w alone, so no bit of a
//             result depends on the address.
//   aligned   16 bytes of memory at an address divisible by 16: what one instruction moves.
//
// Where a run is not aligned, a word is cut out of the two aligned ones it lies in (the second comes out of L1), and an
// aligned one to be stored is put together from a lane's word and its neighbour's. Bytes outside the run are neither
// read nor written: the words at its ends go element by element.
//
// All that is most of a kernel's instructions, so kernels that it matters to exist twice: kWhole is said of runs
// that are aligned and whole words, and leaves it out. The bits are the same.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/isa.hpp"
#include "cuda/device.cuh"

namespace lanenorm {
inline namespace LANENORM_ISA {

using device::Words;

template <class T>
using Compute = typename Storage<T>::Compute;

// Elements in a word.
template <class T>
inline constexpr int kPerWord = 16 / static_cast<int>(sizeof(T));

// ---- words and numbers -------------------------------------------------------------------------------------------

template <class T>
struct Elements {
  T value[kPerWord<T>];
};

template <class T>
__device__ __forceinline__ Elements<T> elements_of(const Words& word) {
  static_assert(sizeof(Elements<T>) == sizeof(Words));
  Elements<T> elements;
  __builtin_memcpy(&elements, &word, sizeof word);
  return elements;
}
template <class T>
__device__ __forceinline__ Words words_of(const Elements<T>& elements) {
  Words word;
  __builtin_memcpy(&word, &elements, sizeof word);
  return word;
}

__device__ __forceinline__ float to_compute(float v) { return v; }
__device__ __forceinline__ double to_compute(double v) { return v; }
__device__ __forceinline__ float to_compute(Float16 v) { return device::to_float(v); }
__device__ __forceinline__ float to_compute(BFloat16 v) { return device::to_float(v); }

// The E numbers of a word in the compute type.
template <class T>
__device__ __forceinline__ void unpack(const Words& word, Compute<T>* out) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) device::to_float_pair<T>(word.w[i], out + 2 * i, out + 2 * i + 1);
  } else {
    const Elements<T> elements = elements_of<T>(word);
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) out[e] = to_compute(elements.value[e]);
  }
}

// Rounded to T.
template <class T>
__device__ __forceinline__ Words pack(const Compute<T>* values) {
  if constexpr (sizeof(T) == 2) {
    Words word;
#pragma unroll
    for (int i = 0; i < 4; ++i) word.w[i] = device::to_half_pair<T>(values[2 * i], values[2 * i + 1]);
    return word;
  } else {
    Elements<T> elements;
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) elements.value[e] = values[e];
    return words_of(elements);
  }
}

// 16 bytes from byte `shift` (0..16) of the 32 of low and high.
__device__ __forceinline__ Words funnel(const Words& low, const Words& high, int shift) {
  std::uint32_t c[9] = {low.w[0], low.w[1], low.w[2], low.w[3], high.w[0], high.w[1], high.w[2], high.w[3], 0};
  if (shift & 16) return high;
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) c[i] = c[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) c[i] = c[i + 1];
  }
  const int bits = (shift & 3) * 8;
  Words word;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word.w[i] = static_cast<std::uint32_t>((std::uint64_t{c[i + 1]} << 32 | c[i]) >> bits);
  }
  return word;
}

// ---- single elements ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int misaligned(const void* p, int alignment) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) & static_cast<std::uintptr_t>(alignment - 1));
}

// One element at any address.
template <class T>
__device__ __forceinline__ T load_element(const char* p) {
  if (misaligned(p, sizeof(T)) == 0) return device::load_global(reinterpret_cast<const T*>(p));
  unsigned char bytes[sizeof(T)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) {
    bytes[i] = device::load_global(reinterpret_cast<const unsigned char*>(p) + i);
  }
  T v;
  __builtin_memcpy(&v, bytes, sizeof v);
  return v;
}
template <class T>
__device__ __forceinline__ void store_element(char* p, const T& v) {
  if (misaligned(p, sizeof(T)) == 0) {
    device::store_global(reinterpret_cast<T*>(p), v);
    return;
  }
  unsigned char bytes[sizeof(T)];
  __builtin_memcpy(bytes, &v, sizeof v);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) {
    device::store_global(reinterpret_cast<unsigned char*>(p) + i, bytes[i]);
  }
}

// The first `bytes` bytes of the word at p, the rest zero.
template <class T>
__device__ __forceinline__ Words load_edge(const char* p, int bytes) {
  Elements<T> elements{};
#pragma unroll
  for (int e = 0; e < kPerWord<T>; ++e) {
    const int at = e * static_cast<int>(sizeof(T));
    if (at < bytes) elements.value[e] = load_element<T>(p + at);
  }
  return words_of(elements);
}

// Bytes [begin, end) of the word at p.
template <class T>
__device__ __forceinline__ void store_edge(char* p, int begin, int end, const Words& word) {
  if (misaligned(p, sizeof(T)) == 0) {
    const Elements<T> elements = elements_of<T>(word);
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) {
      const int at = e * static_cast<int>(sizeof(T));
      if (begin <= at && at < end) device::store_global(reinterpret_cast<T*>(p + at), elements.value[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto byte = static_cast<unsigned char>(word.w[i / 4] >> (8 * (i % 4)));
      if (begin <= i && i < end) device::store_global(reinterpret_cast<unsigned char*>(p) + i, byte);
    }
  }
}

// ---- runs --------------------------------------------------------------------------------------------------------

// Word w of the `bytes` bytes at `run`; what lies beyond them is zero. run: (bytes / sizeof(T)) elements
template <class T>
__device__ __forceinline__ Words load_word(const char* run, int bytes, int w) {
  const int at = 16 * w;
  if (at >= bytes) return Words{};
  const int shift = misaligned(run, 16);
  if (shift == 0) {
    if (at + 16 <= bytes) return device::load_words_streaming(reinterpret_cast<const Words*>(run + at));
  } else if (at >= shift && at - shift + 32 <= bytes) {
    const Words* aligned = reinterpret_cast<const Words*>(run + at - shift);
    return funnel(device::load_global(aligned), device::load_global(aligned + 1), shift);
  }
  return load_edge<T>(run + at, bytes - at);
}

// A group of L lanes reads a run of at most V L words: lane l gets the words l, L + l, 2 L + l, ...
template <class T, int L, int V, bool kWhole = false>
__device__ __forceinline__ void load_run(const char* run, int bytes, int lane, Words (&data)[V]) {
  const char* mine = run + 16 * std::int64_t{lane};  // the others a constant away
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (kWhole) {
      data[v] = Words{};
      if (16 * (v * L + lane) < bytes) {
        data[v] = device::load_words_streaming(reinterpret_cast<const Words*>(mine + 16 * v * L));
      }
    } else {
      data[v] = load_word<T>(run, bytes, v * L + lane);
    }
  }
}

// The inverse. All lanes of `mask`, one group, arrive here with the same run. bytes: may be 0
template <class T, int L, int V, bool kWhole = false>
__device__ __forceinline__ void store_run(char* run, int bytes, unsigned mask, int lane, const Words (&data)[V]) {
  const int shift = kWhole ? 0 : misaligned(run, 16);
  if (shift == 0) {
    char* mine = run + 16 * std::int64_t{lane};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = 16 * (v * L + lane);
      if (at + 16 <= bytes) {
        device::store_words_streaming(reinterpret_cast<Words*>(mine + 16 * v * L), data[v]);
      } else if (!kWhole && at < bytes) {
        store_edge<T>(run + at, 0, bytes - at, data[v]);
      }
    }
    return;
  }
  device::sync_warp(mask);  // in place, a neighbour may still have to read the aligned word this lane is to write
  Words carried{};          // by lane 0: the last lane's word of the step before
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Words other = device::shuffle(mask, data[v], (lane + L - 1) % L, L);
    const Words before = lane == 0 ? carried : other;
    carried = other;
    const int at = 16 * (v * L + lane);
    const int aligned = at - shift;  // where the aligned word begins that this word ends up in, and the next
    const bool whole = aligned >= 0 && aligned + 16 <= bytes;
    const bool next_whole = aligned + 32 <= bytes;
    if (whole) {
      device::store_words(reinterpret_cast<Words*>(run + aligned), funnel(before, data[v], 16 - shift));
    }
    const int begin = whole ? 16 - shift : 0;
    const int end = next_whole ? 16 - shift : bytes - at;
    if (begin < end) store_edge<T>(run + at, begin, end, data[v]);
  }
}

// ---- weight and bias ---------------------------------------------------------------------------------------------

// A parameter array from element `first` on, a multiple of E; null stays null.
template <class T>
__device__ __forceinline__ const char* parameters_from(const void* p, bool as_compute, std::int64_t first) {
  if (p == nullptr) return nullptr;
  return static_cast<const char*>(p) + first * static_cast<std::int64_t>(as_compute ? sizeof(Compute<T>) : sizeof(T));
}

// Word `step` + `lane` of a parameter array for elements of T: E numbers from element (step + lane) E on. What lies
// beyond `count` is zero. step: known to the compiler. as_compute: stored in the compute type, else in T. p: (count),
// 16-byte aligned
template <class T, bool kWhole = false>
__device__ __forceinline__ void load_parameters(const void* p, bool as_compute, int count, int step, int lane,
                                                Compute<T>* out) {
  constexpr int E = kPerWord<T>;
  const int left = count - (step + lane) * E;
  const auto words = [&](auto tag, int i, Compute<T>* to) {
    using S = typename decltype(tag)::Type;
    constexpr int kWords = E / kPerWord<S>;
    const char* at = static_cast<const char*>(p) + 16 * kWords * std::int64_t{lane} + 16 * (kWords * step + i);
    const int valid = left - i * kPerWord<S>;
    const Words word = kWhole || valid >= kPerWord<S> ? device::load_words(reinterpret_cast<const Words*>(at))
                                                      : load_edge<S>(at, valid * static_cast<int>(sizeof(S)));
    unpack<S>(word, to);
  };
  if constexpr (sizeof(T) == 2) {
    if (as_compute) {
      words(TypeTag<float>{}, 0, out);
      words(TypeTag<float>{}, 1, out + 4);
      return;
    }
  }
  words(TypeTag<T>{}, 0, out);
}

// Element i of a parameter array, or `none` where there is no array.
template <class T>
__device__ __forceinline__ Compute<T> parameter(const void* p, bool as_compute, std::int64_t i, Compute<T> none) {
  if (p == nullptr) return none;
  if (as_compute) return static_cast<const Compute<T>*>(p)[i];
  return to_compute(static_cast<const T*>(p)[i]);
}

// The inverse.
template <class T>
__device__ __forceinline__ void store_parameter(void* p, bool as_compute, std::int64_t i, double value) {
  const auto rounded = static_cast<Compute<T>>(value);
  if (as_compute || sizeof(T) > 2) {
    static_cast<Compute<T>*>(p)[i] = rounded;
  } else if constexpr (sizeof(T) == 2) {
    static_cast<T*>(p)[i] = device::to_half<T>(rounded);
  }
}

}  // namespace LANENORM_ISA
}  // namespace lanenorm
