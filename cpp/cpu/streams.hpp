// Lines as kernels write them: in cache, or past the caches by streaming stores, which must fill whole cache lines.
// That other threads see those is parallel_for's business.
#pragma once

#include <cstdint>

#include "cpu/lines.hpp"

namespace lanenorm {
inline namespace LANENORM_ISA {

// A vector of a line that starts on a cache line, if stream.
template <class T, class V>
LANENORM_INLINE void write(V v, char* p, Full, bool stream) {
  if (stream) {
    v.template stream<T>(p);
  } else {
    v.template store<T>(p);
  }
}
template <class T, class V>
LANENORM_INLINE void write(V v, char* p, Part part, bool) {
  v.template store<T>(p, part.lanes);
}

// Streaming stores need every row at the start of a cache line.
LANENORM_INLINE bool on_cache_lines(char* const* lines, int rows) {
  std::uintptr_t bits = 0;
  for (int r = 0; r < rows; ++r) bits |= reinterpret_cast<std::uintptr_t>(lines[r]);
  return bits % 64 == 0;
}

// Elements up to the first cache line of every row, where that is one number; else -1.
template <class T>
LANENORM_INLINE std::int64_t common_head(char* const* rows, std::int64_t count, std::int64_t length) {
  constexpr std::int64_t kBytes = sizeof(T);
  const auto place = [&](std::int64_t r) {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(rows[r])) % 64;
  };
  for (std::int64_t r = 1; r < count; ++r) {
    if (place(r) != place(0)) return -1;
  }
  const std::int64_t head = place(0) % kBytes != 0 ? -1 : (64 - place(0)) % 64 / kBytes;
  return head < length ? head : -1;
}

// f(element index, Full or Part, stream) over the vectors of lines that are written together. head: common_head() of
// them, from where on they are streamed; -1: not at all.
template <class V, class F>
LANENORM_INLINE void for_vectors_streamed(std::int64_t head, std::int64_t length, F&& f) {
  if (head > 0) for_vectors<V>(head, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE { f(i, part, false); });
  const std::int64_t begin = head > 0 ? head : 0;
  for_vectors<V>(length - begin,
                 [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE { f(begin + i, part, head >= 0); });
}

// The cache line in which one line of y ends and the next begins: written by both, and streamed whole. As ordinary
// stores of two parts it is read from memory first: 4096 x 1000 1.00 -> 0.79 ms, 4096 x 1023 1.23 -> 0.88, float16 1.6
// -> 0.8, 40000 x 300 5.9 -> 3.5.
struct Seam {
  alignas(64) char line[64];
  bool open = false;
};

// Elements i..end of f(element index, Full or Part) to `to` and what follows it.
template <class T, class V, class F>
LANENORM_INLINE void write_elements(char* to, std::int64_t i, std::int64_t end, const F& f) {
  for_vectors<V>(end - i, [&](std::int64_t j, auto part) LANENORM_LAMBDA_INLINE {
    store<T>(f(i + j, part), to + j * static_cast<std::int64_t>(sizeof(T)), part);
  });
}

// A line of y, of f(element index, Full or Part), past the caches. Where vectors begin changes no element. continues:
// the next line that is written with this seam follows it in memory; lines are 64 bytes long at least then.
template <class T, class V, class F>
LANENORM_INLINE void stream_line(char* y, std::int64_t length, Seam* seam, bool continues, const F& f) {
  using S = typename V::Scalar;
  constexpr std::int64_t kBytes = sizeof(T), kLine = 64 / kBytes;
  const auto place = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64);
  const std::int64_t head = common_head<T>(&y, 1, length);
  std::int64_t i = head < 0 ? length : head;
  if (i > 0) {
    write_elements<T, V>(seam->open ? seam->line + place : y, 0, i, f);
    if (seam->open) V::template load<S>(seam->line).template stream<S>(y - place);
  }
  const std::int64_t end = i + (length - i) / kLine * kLine;
  for (; i + 2 * V::kLanes <= end; i += 2 * V::kLanes) {  // halves the loop's own instructions; more brought nothing
    f(i, Full{}).template stream<T>(y + i * kBytes);
    f(i + V::kLanes, Full{}).template stream<T>(y + (i + V::kLanes) * kBytes);
  }
  if (i < end) {
    f(i, Full{}).template stream<T>(y + i * kBytes);
    i += V::kLanes;
  }
  seam->open = continues && i < length;
  if (i < length) write_elements<T, V>(seam->open ? seam->line : y + i * kBytes, i, length, f);
}

// A line of y; seam null: to the cache. Ordinary stores may straddle cache lines: a head of their own made them slower.
template <class T, class V, class F>
LANENORM_INLINE void write_line(char* y, std::int64_t length, Seam* seam, bool continues, const F& f) {
  if (seam != nullptr) {
    stream_line<T, V>(y, length, seam, continues, f);
  } else {
    for_vectors<V, 2>(length, [&](std::int64_t i, auto part) LANENORM_LAMBDA_INLINE {
      store<T>(f(i, part), y + i * static_cast<std::int64_t>(sizeof(T)), part);
    });
  }
}

// ---- streaming short rows ----------------------------------------------------------------------------------------

// Rows that do not start on cache lines cannot be streamed side by side. Where they are short and adjacent in y, they
// are written to L1 first and leave it as whole lines: 65537 x 100 float32 100 -> 50 ns a row, copy 30. They leave
// while the sums of the next rows are taken (drain), so that memory reads and writes at once, and where nobody drains,
// when there is no more room. Backward, ms, in bursts of up to 16 KB, after each row and beside each 8 vectors: 40000 x
// 300 8.0, 6.1, 5.6, 16384 x 500 5.5, 4.1, 3.7, 8192 x 1000 5.1, 5.5, 5.0.
//   kBytes: of what waits. kRow: of the longest row that is staged. In a forward longer rows go one by one, and where
// one ends and the next begins by a Seam: 40000 x 300 4.3 ms, staged 4.7, 16384 x 500 3.0 and 4.0. The 4 rows of a
// backward are staged longer. (1 KB of each of the 4 at a time, which takes less of L1: 16384 x 700 6.4 -> 5.6 ms, but
// 16384 x 500 3.7 -> 4.1, 2048 x 4097 5.2 -> 5.7.) Rows of whole lines behind a start beside one (out=) are staged too:
// 25088 x 192 backward 3.8 -> 2.8 ms, 65536 x 64 forward 4.3 -> 2.2.
template <class D, std::int64_t kBytes, std::int64_t kRow>
class Stage {
 public:
  // first: the first row; null where rows that all begin at the same place within a line are streamed one by one.
  LANENORM_INLINE Stage(bool stream, std::int64_t row_bytes, const void* first = nullptr)
      : active_(stream && row_bytes <= kRow &&
                (row_bytes | static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(first))) % 64 != 0),
        row_bytes_(row_bytes) {}
  LANENORM_INLINE ~Stage() { flush(); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  LANENORM_INLINE bool active() const { return active_; }

  // How many rows lines() takes at once, at most 8.
  LANENORM_INLINE std::int64_t group() const { return active_ && 8 * row_bytes_ > kBytes ? kBytes / row_bytes_ : 8; }

  // Where to write the rows y[0..rows), at most 8: there, or here. table: (8)
  LANENORM_INLINE char* const* lines(void* const* y, int rows, char** table) {
    char* const* direct = reinterpret_cast<char* const*>(y);
    if (!active_ || rows * row_bytes_ > kBytes) return direct;
    for (int r = 0; r + 1 < rows; ++r) {
      if (direct[r + 1] - direct[r] != row_bytes_) return direct;
    }
    if (line_ + end_ != direct[0]) {
      flush();
      begin_ = end_ = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(direct[0])) % 64;
      line_ = direct[0] - begin_;
    } else if (begin_ / 64 == end_ / 64 || end_ + rows * row_bytes_ > kBytes + 64) {
      stream(kBytes);
      const std::int64_t whole = end_ / 64 * 64;
      __builtin_memcpy(buffer_, buffer_ + whole, 64);
      line_ += whole;
      begin_ -= whole;
      end_ -= whole;
    }
    for (int r = 0; r < rows; ++r) table[r] = buffer_ + end_ + r * row_bytes_;
    end_ += rows * row_bytes_;
    return table;
  }

  // So many lines leave, or as many as a row has; the last one stays until it is whole.
  LANENORM_INLINE void drain(std::int64_t lines) {
    if (active_) stream(lines);
  }
  LANENORM_INLINE void drain_row() { drain(row_bytes_ / 64 + 1); }

 private:
  LANENORM_INLINE void stream(std::int64_t lines) {
    for (; lines > 0 && begin_ / 64 < end_ / 64; --lines) {
      if (begin_ % 64 == 0) {
        D::template load<double>(buffer_ + begin_).template stream<double>(line_ + begin_);
        begin_ += 64;
      } else {
        write(begin_ / 64 * 64 + 64);
      }
    }
  }
  LANENORM_INLINE void flush() {
    stream(kBytes);
    write(end_);
  }
  LANENORM_INLINE void write(std::int64_t stop) {
    if (begin_ < stop) __builtin_memcpy(line_ + begin_, buffer_ + begin_, static_cast<std::size_t>(stop - begin_));
    begin_ = stop;
  }

  bool active_;
  // buffer_[i] belongs to line_[i], and line_ starts a cache line. What waits: begin_ <= i < end_.
  std::int64_t row_bytes_, begin_ = 0, end_ = 0;
  char* line_ = nullptr;
  alignas(64) char buffer_[kBytes + 128];
};

template <class D>
using ForwardStage = Stage<D, 8192, 512>;
template <class D>
using BackwardStage = Stage<D, 16384, 8192>;

}  // namespace LANENORM_ISA
}  // namespace lanenorm
