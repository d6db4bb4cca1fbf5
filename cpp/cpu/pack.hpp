// Lines of a tensor as tables of pointers, read or written in place where their elements are adjacent and through a
// buffer of the calling thread where they are not. No buffer is larger than what one piece of work asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/args.hpp"

namespace lanenorm {

// 64-byte aligned, uninitialized memory.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t bytes) {  // data() is null for 0: asking for memory takes longer than a small call
    if (bytes > 0) reserve(bytes);
  }
  // Contents are lost when it grows.
  void reserve(std::int64_t bytes);
  char* data() const { return data_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char[], Free> data_;
  std::int64_t bytes_ = 0;
};

// Buffers that live as long as their thread. A slot is in use by one object at a time.
enum class Slot {
  x_table,
  x_lines,
  dy_table,
  dy_lines,
  y_table,
  y_lines,
  ahead_x_table,
  ahead_dy_table,
  offsets,
  sums,
  columns,
  folded,
  constants,
  ones,
  zeros,
  count
};
Buffer& thread_buffer(Slot slot);

// Kernels sweep columns of several lines and of several arrays of their own at once. L1 holds 8 lines of one place
// within a page of 4 KB, which 4 rows of x, dy and dx exceed where they are a multiple of 4 KB long or apart; what is
// theirs is put elsewhere. kBesidePage bytes of a buffer are for that. Sums of a backward of 1568 x 1024, alone in a
// program: at the place of x 4.1 ns a vector, away from it 2.6.
inline constexpr std::int64_t kBesidePage = 4096;

// The first address in a buffer that lies `distance` bytes beyond that of `line` within a page.
inline char* beside(char* buffer, const void* line, std::int64_t distance) {
  const std::uintptr_t target = reinterpret_cast<std::uintptr_t>(line) + static_cast<std::uintptr_t>(distance);
  return buffer + (target - reinterpret_cast<std::uintptr_t>(buffer)) % kBesidePage / 64 * 64;
}

class InputLines {
 public:
  InputLines(const Layout& layout, const void* base, DType dtype, Slot table, Slot lines);
  // Pointers to elements [first_element, first_element + length) of `count` lines: first_line, first_line + step, ...
  // Valid until the next call.
  const void* const* get(std::int64_t first_line, std::int64_t step, std::int64_t count, std::int64_t first_element,
                         std::int64_t length);

 private:
  const Layout& layout_;
  const char* base_;
  std::int64_t size_;
  Slot table_, lines_;
};

class OutputLines {
 public:
  OutputLines(const Layout& layout, void* base, DType dtype);
  void* const* get(std::int64_t first_line, std::int64_t step, std::int64_t count, std::int64_t first_element,
                   std::int64_t length);
  // Brings what was written through the last get() to its place.
  void finish();

 private:
  const Layout& layout_;
  char* base_;
  std::int64_t size_;
  std::int64_t first_line_ = 0, step_ = 0, count_ = 0, first_element_ = 0, length_ = 0;
};

// Elements [first, first + count) of a loop over strided memory, of `size` bytes each, to and from adjacent memory.
void pack(const Loop& loop, const char* strided, std::int64_t first, std::int64_t count, std::int64_t size, char* out);
void unpack(const Loop& loop, char* strided, std::int64_t first, std::int64_t count, std::int64_t size, const char* in);

}  // namespace lanenorm
