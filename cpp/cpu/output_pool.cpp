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

// Where arrays lie within a page. NumPy's own large arrays begin 16 bytes into one; kernels that read x where they
// write y, or several lines a multiple of 4 KB apart, are slower when y begins there too: a load waits for a store
// before it to the same place of another page, and L1 holds 8 lines of one place. Backward of layer norm, 512 x 1024
// in cache: 178 us with dx at the start of a page, 166 at one of these places; of batch norm, 784 x 512: 143 us with dx
// 1, 2 or 3 KB into a page, 133.
constexpr std::size_t kPage = 4096;
constexpr std::size_t kPlaces[] = {1344, 2432, 3520};  // and no multiple of 512, as rows often are
constexpr std::size_t kHeader = 64;                    // before an array: how much is mapped for it

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
  void* allocate(std::size_t bytes) {
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
      block = {static_cast<char*>(mapped) + kPlaces[next_place_], wanted};
      next_place_ = (next_place_ + 1) % (sizeof kPlaces / sizeof kPlaces[0]);
      std::memcpy(block.array - kHeader, &block.capacity, sizeof block.capacity);
    }
    used_bytes_ += block.capacity;
    if (best != free_.end()) {
      free_bytes_ -= block.capacity;
      free_.erase(best);
    }
    return block.array;
  }

  void release(void* array) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Block block{static_cast<char*>(array), capacity(array)};
    used_bytes_ -= block.capacity;
    free_.push_back(block);
    free_bytes_ += block.capacity;
    drop(limit_);
  }

  static std::size_t capacity(const void* array) {
    std::size_t bytes;
    std::memcpy(&bytes, static_cast<const char*>(array) - kHeader, sizeof bytes);
    return bytes;
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
  struct Block {
    char* array;  // in the first page of what is mapped
    std::size_t capacity;
  };

  // Unmaps the blocks freed first until at most `limit` bytes are free.
  void drop(std::int64_t limit) {
    while (!free_.empty() && static_cast<std::int64_t>(free_bytes_) > limit) {
      char* const array = free_.front().array;
      munmap(array - reinterpret_cast<std::uintptr_t>(array) % kPage, free_.front().capacity + kPage);
      free_bytes_ -= free_.front().capacity;
      free_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> free_;  // in the order in which they were freed
  std::size_t used_bytes_ = 0, free_bytes_ = 0, next_place_ = 0;
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

void* pool_allocate(std::size_t bytes) noexcept {
  try {
    return pool().allocate(bytes);
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

std::size_t pool_capacity(const void* block) noexcept { return Pool::capacity(block); }
PoolUse pool_use() noexcept { return pool().use(); }
void pool_free_all() noexcept { pool().keep(0, false); }
void pool_set_limit(std::int64_t limit) noexcept { pool().keep(limit, true); }

}  // namespace lanenorm
