#include "cpu/pack.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

namespace lanenorm {
namespace {

// f(byte offset) for the flat indices [first, first + count).
template <class F>
void walk(const Loop& loop, std::int64_t first, std::int64_t count, F&& f) {
  if (loop.axes == 0) {
    for (std::int64_t i = 0; i < count; ++i) f(std::int64_t{0});
    return;
  }
  const int last = loop.axes - 1;
  const std::int64_t extent = loop.extent[last], stride = loop.stride[last];
  while (count > 0) {
    const std::int64_t position = first % extent;
    const std::int64_t run = extent - position < count ? extent - position : count;
    const std::int64_t start = offset(loop, first);
    for (std::int64_t i = 0; i < run; ++i) f(start + i * stride);
    first += run;
    count -= run;
  }
}

template <class Element>
void pack_elements(const Loop& loop, const char* strided, std::int64_t first, std::int64_t count, char* out) {
  walk(loop, first, count, [&](std::int64_t bytes) {
    std::memcpy(out, strided + bytes, sizeof(Element));
    out += sizeof(Element);
  });
}

template <class Element>
void unpack_elements(const Loop& loop, char* strided, std::int64_t first, std::int64_t count, const char* in) {
  walk(loop, first, count, [&](std::int64_t bytes) {
    std::memcpy(strided + bytes, in, sizeof(Element));
    in += sizeof(Element);
  });
}

// Packed lines start on cache lines.
std::int64_t pitch(std::int64_t length, std::int64_t size) { return (length * size + 63) / 64 * 64; }

// table[i] = base + offset of line first + i * step.
template <class Pointer>
void fill_table(const Loop& lines, Pointer base, std::int64_t first, std::int64_t step, std::int64_t count,
                Pointer* table) {
  if (lines.axes == 1) {  // of 784 rows of 512 columns the way below took 5 % of a backward
    const std::int64_t stride = lines.stride[0] * step;
    Pointer line = base + first * lines.stride[0];
    for (std::int64_t i = 0; i < count; ++i, line += stride) table[i] = line;
  } else if (step == 1) {
    Buffer& buffer = thread_buffer(Slot::offsets);
    buffer.reserve(count * 8);
    std::int64_t* bytes = buffer.as<std::int64_t>();
    offsets(lines, first, count, bytes);
    for (std::int64_t i = 0; i < count; ++i) table[i] = base + bytes[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) table[i] = base + offset(lines, first + i * step);
  }
}

}  // namespace

void Buffer::Free::operator()(char* p) const { std::free(p); }

void Buffer::reserve(std::int64_t bytes) {
  if (bytes <= bytes_ && data_ != nullptr) return;
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 127) / 64 * 64;
  data_.reset();
  bytes_ = 0;
  data_.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
  if (data_ == nullptr) throw std::bad_alloc();
  bytes_ = static_cast<std::int64_t>(rounded);
}

Buffer& thread_buffer(Slot slot) {
  thread_local Buffer buffers[static_cast<int>(Slot::count)];
  return buffers[static_cast<int>(slot)];
}

void pack(const Loop& loop, const char* strided, std::int64_t first, std::int64_t count, std::int64_t size, char* out) {
  if (adjacent(loop, size)) {
    std::memcpy(out, strided + first * size, static_cast<std::size_t>(count * size));
  } else if (size == 2) {
    pack_elements<std::uint16_t>(loop, strided, first, count, out);
  } else if (size == 4) {
    pack_elements<std::uint32_t>(loop, strided, first, count, out);
  } else {
    pack_elements<std::uint64_t>(loop, strided, first, count, out);
  }
}

void unpack(const Loop& loop, char* strided, std::int64_t first, std::int64_t count, std::int64_t size,
            const char* in) {
  if (size == 2) {
    unpack_elements<std::uint16_t>(loop, strided, first, count, in);
  } else if (size == 4) {
    unpack_elements<std::uint32_t>(loop, strided, first, count, in);
  } else {
    unpack_elements<std::uint64_t>(loop, strided, first, count, in);
  }
}

InputLines::InputLines(const Layout& layout, const void* base, DType dtype, Slot table, Slot lines)
    : layout_(layout), base_(static_cast<const char*>(base)), size_(size(dtype)), table_(table), lines_(lines) {}

const void* const* InputLines::get(std::int64_t first_line, std::int64_t step, std::int64_t count,
                                   std::int64_t first_element, std::int64_t length) {
  Buffer& buffer = thread_buffer(table_);
  buffer.reserve(count * static_cast<std::int64_t>(sizeof(void*)));
  const char** table = buffer.as<const char*>();
  if (layout_.direct) {
    fill_table(layout_.lines, base_ + first_element * size_, first_line, step, count, table);
  } else {
    const std::int64_t bytes = pitch(length, size_);
    Buffer& lines = thread_buffer(lines_);
    lines.reserve(bytes * count);
    fill_table(layout_.lines, base_, first_line, step, count, table);
    for (std::int64_t i = 0; i < count; ++i) {
      char* line = lines.data() + i * bytes;
      pack(layout_.inner, table[i], first_element, length, size_, line);
      table[i] = line;
    }
  }
  return buffer.as<const void*>();
}

OutputLines::OutputLines(const Layout& layout, void* base, DType dtype)
    : layout_(layout), base_(static_cast<char*>(base)), size_(size(dtype)) {}

void* const* OutputLines::get(std::int64_t first_line, std::int64_t step, std::int64_t count,
                              std::int64_t first_element, std::int64_t length) {
  first_line_ = first_line;
  step_ = step;
  count_ = count;
  first_element_ = first_element;
  length_ = length;
  Buffer& buffer = thread_buffer(Slot::y_table);
  buffer.reserve(count * static_cast<std::int64_t>(sizeof(void*)));
  char** table = buffer.as<char*>();
  if (layout_.direct) {
    fill_table(layout_.lines, base_ + first_element * size_, first_line, step, count, table);
  } else {
    const std::int64_t bytes = pitch(length, size_);
    Buffer& lines = thread_buffer(Slot::y_lines);
    lines.reserve(bytes * count);
    for (std::int64_t i = 0; i < count; ++i) table[i] = lines.data() + i * bytes;
  }
  return buffer.as<void*>();
}

void OutputLines::finish() {
  if (layout_.direct) return;
  const std::int64_t bytes = pitch(length_, size_);
  const char* lines = thread_buffer(Slot::y_lines).data();
  for (std::int64_t i = 0; i < count_; ++i) {
    unpack(layout_.inner, base_ + offset(layout_.lines, first_line_ + i * step_), first_element_, length_, size_,
           lines + i * bytes);
  }
}

}  // namespace lanenorm
