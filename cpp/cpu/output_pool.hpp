// Memory for large outputs, kept and used again. Fresh memory is the hidden cost of large outputs: a new 64 MB array
// costs 45 ms on 4 KB pages and 8.5 ms on huge pages before anything is written to it, touched memory 6 ms for the
// whole fill.
//
// A block is mapped on its own, at a border of 2 MB with huge pages where it is that large, and goes back to the pool
// when its array dies. Where an array begins within the first page depends on what will be read while it is written.
// The pool keeps at most `limit` bytes of free blocks, dropping those that were freed first. Any thread; a forked child
// has a pool of its own with copies of the blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lanenorm {

// Smaller outputs are left to malloc, which keeps them at hand itself and costs 0.2 us less. Layer norm of 768 columns
// in place of malloc: 32 rows 4.3 -> 4.5 us, 40 rows 5.6 -> 5.3, 64 rows 10.2 -> 8.3; backward of batch norm, 32 x
// 1024: 27 -> 14, as rows of 4 KB of malloc's 128 KB lie where those of x lie.
inline constexpr std::size_t kPooledBytes = 112 * 1024;

// What is read while an output is written; null: nothing.
struct ReadBeside {
  const void* x = nullptr;
  const void* dy = nullptr;
};

// 64-byte aligned, uninitialized; null where there is no memory.
void* pool_allocate(std::size_t bytes, ReadBeside reads = {}) noexcept;
void pool_free(void* block) noexcept;                   // null: nothing
std::size_t pool_capacity(const void* block) noexcept;  // of a block in use

struct PoolUse {
  std::int64_t used, free, limit;  // bytes
  std::int64_t free_blocks;
};
PoolUse pool_use() noexcept;
void pool_free_all() noexcept;
// Of free blocks kept, in bytes; at the start a sixteenth of the machine's memory, at most 1 GiB.
void pool_set_limit(std::int64_t limit) noexcept;

}  // namespace lanenorm
