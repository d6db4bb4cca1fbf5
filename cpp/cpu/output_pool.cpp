#include "cpu/output_pool.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>

namespace lanenorm {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kRounding = std::size_t{64} << 10;  // of smaller blocks, so that like sizes share one

// Where an array begins within a page. A load waits for a store before it to the same place of another page, and L1 has
// room for 8 lines of one place; kernels read x a little behind where they write y, in rows that are often a multiple
// of 512 bytes, 1 KB or 4 KB apart. With y 64 to 192 bytes behind x within a page they take, of the time with y
// elsewhere: layer norm of 1024 x 768 and 512 x 1024 in cache 1.2, forward of batch norm of 784 x 512 1.1,
// inference 1.2, backward of 256 x 1024 1.7 (its gradient alone 2.4, and still 1.5 at 240 bytes). NumPy's own large
// arrays begin 16 bytes into a page, others anywhere.
constexpr std::size_t kPage = 4096;
constexpr std::size_t kHeader = 64;  // before an array: its block
// So far behind x: 448 bytes behind it and the rows around it, and half a page more, as loads also meet stores that
// have waited for a while. Forward at 448 and 2496 bytes: 1024 x 768 138 and 133 us, BN of 1 x 512 x 28 x 28 68.6
// and 65.1.
constexpr std::size_t kFar = 2048 + 448;
constexpr std::size_t kTurn = 512;  // blocks differ by it: arrays of two of them may be read side by side

// How much an array that begins so far behind another within a page is in its way.
std::size_t crowding(std::size_t behind) {
  const auto from_before_to = [&](std::size_t last, std::size_t period) { return (behind + 64) % period <= last + 64; };
  return 4U * from_before_to(320, kPage) + 2U * from_before_to(192, 1024) + 1U * from_before_to(192, 512);
}

// 4 ns; 180 where nothing suits both, as x and dy are half of 512 bytes apart.
std::size_t place(ReadBeside reads, std::size_t turn) {
  const auto x = reinterpret_cast<std::uintptr_t>(reads.x), dy = reinterpret_cast<std::uintptr_t>(reads.dy);
  std::size_t best = 0, least = 100;
  for (std::size_t step = 0; step < kPage && least > 0; step += 64) {
    const std::size_t candidate = (x + kFar + turn * kTurn + step) / 64 * 64 % kPage;
    if (candidate < kHeader) continue;
    const std::size_t crowd = crowding(candidate - x) + (reads.dy == nullptr ? 0 : crowding(candidate - dy));
    if (crowd < least) {
      least = crowd;
      best = candidate;
    }
  }
  return best;
}

std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kHugePage : kRounding;
  return (bytes + unit - 1) / unit * unit;
}

// A block may serve a smaller request if no more than a quarter of it is wasted.
bool fits(std::size_t capacity, std::size_t wanted) { return capacity >= wanted && capacity - wanted <= wanted / 4; }

std::int64_t default_limit() {
  const auto pages = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES));
  const auto size = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
  return std::min(pages * size / 16, std::int64_t{1} << 30);
}

// capacity bytes, and a page for the place within it.
void* map(std::size_t capacity) {
  const bool huge = capacity >= kHugePage;
  const std::size_t spare = huge ? kHugePage : 0;
  capacity += kPage;
  void* mapped = mmap(nullptr, capacity + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!huge) return mapped;
  char* first = static_cast<char*>(mapped);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(first) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  if (before < spare) munmap(first + before + capacity, spare - before);
#ifdef MADV_HUGEPAGE
  madvise(first + before, capacity, MADV_HUGEPAGE);
#endif
  return first + before;
}

class Pool {
 public:
  void* allocate(std::size_t bytes, ReadBeside reads) {
    const std::size_t wanted = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that fits, of equals the one freed last: it may still be in the cache.
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (fits(it->capacity, wanted) && (best == free_.end() || it->capacity <= best->capacity)) best = it;
    }
    Block block;
    if (best != free_.end()) {
      block = *best;
    } else {
      void* mapped = map(wanted);
      if (mapped == nullptr) {  // what lies here may be what is missing
        drop(0);
        mapped = map(wanted);
      }
      if (mapped == nullptr) return nullptr;
      block = {static_cast<char*>(mapped), wanted, turn_++};
    }
    used_bytes_ += block.capacity;
    if (best != free_.end()) {
      free_bytes_ -= block.capacity;
      free_.erase(best);
    }
    char* const array = block.first + place(reads, block.turn);
    std::memcpy(array - kHeader, &block, sizeof block);
    return array;
  }

  void release(void* array) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Block block = block_of(array);
    used_bytes_ -= block.capacity;
    free_.push_back(block);
    free_bytes_ += block.capacity;
    drop(limit_);
  }

  struct Block {
    char* first;           // of what is mapped
    std::size_t capacity;  // from the array on, wherever in the first page it begins
    std::size_t turn;
  };
  static_assert(sizeof(Block) <= kHeader);

  static Block block_of(const void* array) {
    Block block;
    std::memcpy(&block, static_cast<const char*>(array) - kHeader, sizeof block);
    return block;
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<std::int64_t>(used_bytes_), static_cast<std::int64_t>(free_bytes_), limit_,
            static_cast<std::int64_t>(free_.size())};
  }

  void keep(std::int64_t limit, bool from_now_on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (from_now_on) limit_ = limit;
    drop(limit);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Unmaps the blocks freed first until at most `limit` bytes are free.
  void drop(std::int64_t limit) {
    while (!free_.empty() && static_cast<std::int64_t>(free_bytes_) > limit) {
      munmap(free_.front().first, free_.front().capacity + kPage);
      free_bytes_ -= free_.front().capacity;
      free_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> free_;  // in the order in which they were freed
  std::size_t used_bytes_ = 0, free_bytes_ = 0, turn_ = 0;
  std::int64_t limit_ = default_limit();
};

// Never destroyed: arrays may die after static objects. A fork waits until no thread is inside, so that the child's
// copy is whole.
Pool& pool() {
  static Pool* const instance = [] {
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    return new Pool;
  }();
  return *instance;
}

}  // namespace

void* pool_allocate(std::size_t bytes, ReadBeside reads) noexcept {
  try {
    return pool().allocate(bytes, reads);
  } catch (...) {  // no memory for the lists
    return nullptr;
  }
}

void pool_free(void* block) noexcept {
  try {
    if (block != nullptr) pool().release(block);
  } catch (...) {  // no memory for the list of free blocks: this one stays mapped
  }
}

std::size_t pool_capacity(const void* block) noexcept { return Pool::block_of(block).capacity; }
PoolUse pool_use() noexcept { return pool().use(); }
void pool_free_all() noexcept { pool().keep(0, false); }
void pool_set_limit(std::int64_t limit) noexcept { pool().keep(limit, true); }

}  // namespace lanenorm
