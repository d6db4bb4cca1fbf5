// The state of a launch that runs: threads, warps, blocks, and who waits for whom. For the emulator's own files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_host/emulator.hpp"
#include "cuda_on_host/fibers.hpp"

namespace lanenorm::on_host {

inline constexpr int kLanes = 32;
inline constexpr int kPoison = 0xff;  // NaN in all four dtypes, -1 as an integer

enum class State : unsigned char { runs, waits, exited };
enum class Kind : unsigned char { block, cluster, warp, shuffle, vote };

inline const char* name(Kind kind) {
  constexpr const char* kNames[] = {"sync_block", "sync_cluster", "sync_warp", "shuffle", "any"};
  return kNames[static_cast<int>(kind)];
}

// What the threads of a rendezvous have to agree on.
struct Call {
  Kind kind;
  unsigned mask;  // lanes, where the rendezvous is one of lanes
  Site site;
  int words;  // shuffle: size of the value
};

inline bool same(const Call& a, const Call& b) {
  return a.kind == b.kind && a.mask == b.mask && a.site.line == b.site.line && a.words == b.words &&
         (a.site.file == b.site.file || std::strcmp(a.site.file, b.site.file) == 0);
}

struct Block;

struct Thread {
  Fiber* fiber;
  Block* block;
  unsigned index;
  State state;
  Call call;  // while it waits
  // shuffle, any
  int source_lane;
  const std::uint32_t* in;
  std::uint32_t* out;
  bool condition;
  // copies under way, oldest first, and how many of them each committed group has
  std::vector<Copy> copies;
  std::vector<std::size_t> copy_groups;
  std::size_t uncommitted;
  // TSAN: the flags of a rendezvous of lanes
  char *arrives, *wakes;

  unsigned lane() const { return index % kLanes; }
};

// Lanes of a warp that wait for each other.
struct Group {
  Call call;
  unsigned arrived;
};

struct Warp {
  unsigned lanes = 0;  // that exist
  unsigned exited = 0;
  unsigned at_barrier = 0;  // that wait at that of the block or cluster
  int groups = 0;
  Group group[kLanes];

  Group* begin() { return group; }
  Group* end() { return group + groups; }
};

// Threads of a block or cluster that wait at its barrier.
struct Barrier {
  Call call;
  unsigned arrived = 0;
  unsigned passed = 0;
  // TSAN: its flags. A thread that has not seen the one it waits for keeps the barrier from being passed twice more.
  char* arrives = nullptr;
  char* wakes[2] = {};
};

struct Block {
  std::int64_t index;
  unsigned rank;
  unsigned char* memory = nullptr;     // shared
  std::unique_ptr<Fiber> free_memory;  // TSAN
  std::unique_ptr<char[]> flags;       // TSAN: new ones for every block, so that nothing orders it behind another
  char* exits = nullptr;
  std::unique_ptr<Thread[]> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned exited = 0;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Machine {
  LaunchShape shape;
  void (*body)(const void*);
  const void* data;
  bool reversed;
  Fiber scheduler;
  Block* to_free = nullptr;
  Thread* current = nullptr;
  std::vector<Block> blocks;                               // of the cluster that runs
  std::vector<std::unique_ptr<unsigned char, Free>> left;  // shared memory of those that have exited
  Barrier cluster_barrier;
  std::unique_ptr<char[]> flags;  // of it
  bool cluster_met = false;       // a cluster barrier was passed, so all its blocks have started
  unsigned exited = 0;
  std::exception_ptr error;
  char started, finished;  // TSAN: order a launch after what its caller did, and before what it does next
};

extern Machine* machine;  // null while none runs; launches of several OS threads wait for each other

inline Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.index / kLanes]; }

// f(thread) for the threads of the block, or of the cluster.
template <class F>
void for_each(bool cluster, Block& block, F&& f) {
  const auto in_block = [&](Block& b) {
    for (int i = 0; i < machine->shape.block; ++i) f(b.threads[static_cast<std::size_t>(i)]);
  };
  if (!cluster) return in_block(block);
  for (Block& b : machine->blocks) in_block(b);
}

// For messages.
std::string text(const Site& site);
std::string text(const Call& call);
std::string text(const Thread& thread);

// What the exit of the current thread leaves undone is an error.
void check_exit();

}  // namespace lanenorm::on_host
