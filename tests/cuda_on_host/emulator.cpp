// The scheduler of the emulation, and its host side; emulator.hpp says what they do.
#include "cuda_on_host/emulator.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "cpu/float_environment.hpp"
#include "cuda_on_host/machine.hpp"

namespace lanenorm::on_host {

Index threadIdx, blockIdx, blockDim, gridDim;
Machine* machine;

namespace {

constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxGrid = 0x7fffffff;

std::mutex one_launch;
std::mutex settings;
Device device;
Schedule schedule = Schedule::forward;
std::deque<LaunchShape> recorded;

// ---- Threads -----------------------------------------------------------------------------------------------------

void enter() {
  machine->current->fiber->arrived();
  acquire(&machine->started);
  try {
    machine->body(machine->data);
    check_exit();
  } catch (...) {
    if (!machine->error) machine->error = std::current_exception();
  }
  Thread& me = *machine->current;
  me.state = State::exited;
  warp_of(me).exited |= 1u << me.lane();
  ++me.block->exited;
  ++machine->exited;
  release(&machine->finished);
  release(me.block->exits);
  me.fiber->switch_to(&machine->scheduler, true);
  std::abort();  // nothing switches to a fiber that has exited
}

void resume(Thread& thread) {
  machine->current = &thread;
  threadIdx.x = thread.index;
  blockIdx.x = static_cast<unsigned>(thread.block->index);
  machine->scheduler.switch_to(thread.fiber);
}

// ---- Blocks ------------------------------------------------------------------------------------------------------

// A fiber and its stack, kept for later blocks and launches.
struct Runner {
  Stack stack;
  Fiber fiber;
};

// Runner i of the cluster that is started. Under TSAN making one takes half a millisecond, so they are kept there too.
// But then a thread seems ordered behind the one of an earlier block that had its runner. So there are two sets, used
// in turn: neighbouring clusters are unordered, as they are on a GPU. (TSAN has room for 8128 of them.)
std::vector<std::unique_ptr<Runner>> runners;

Runner& runner(std::size_t i, std::int64_t cluster) {
  const std::size_t all = machine->blocks.size() * static_cast<std::size_t>(machine->shape.block);
  const std::size_t at = under_tsan() && all <= 3500 ? 2 * i + static_cast<std::size_t>(cluster % 2) : i;
  if (runners.size() <= at) runners.resize(at + 1);
  if (!runners[at]) runners[at] = std::make_unique<Runner>();
  return *runners[at];
}

// Where they end.
char* set_flags(Barrier* barrier, char* flags) {
  barrier->arrives = flags;
  barrier->wakes[0] = flags + 1;
  barrier->wakes[1] = flags + 2;
  return flags + 3;
}

void start(Block& block, std::int64_t index, unsigned rank) {
  const auto threads = static_cast<std::size_t>(machine->shape.block);
  block.index = index;
  block.rank = rank;
  block.exited = 0;
  block.barrier = {};
  {
    const Unnoticed unnoticed;
    block.flags = std::make_unique<char[]>(2 * threads + 4);
    block.exits = set_flags(&block.barrier, block.flags.get() + 2 * threads);
  }
  block.warps.assign((threads + kLanes - 1) / kLanes, {});
  if (!block.threads) block.threads = std::make_unique<Thread[]>(threads);
  if (machine->shape.shared_bytes != 0) {
    const Unnoticed unnoticed;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, machine->shape.shared_bytes) != 0) throw std::bad_alloc();
    block.memory = static_cast<unsigned char*>(memory);
    std::memset(block.memory, kPoison, machine->shape.shared_bytes);
  }
  for (std::size_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = static_cast<unsigned>(i);
    thread.state = State::runs;
    thread.arrives = block.flags.get() + 2 * i;
    thread.wakes = thread.arrives + 1;
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.uncommitted = 0;
    block.warps[i / kLanes].lanes |= 1u << thread.lane();
    Runner& on = runner(rank * threads + i, index / machine->shape.cluster);
    thread.fiber = &on.fiber;
    on.fiber.start(on.stack, thread.index, enter, under_tsan() ? text(thread) : std::string());
  }
}

// TSAN: a fiber that knows of the accesses of that block's threads and of no others. So those of another block of the
// cluster that no barrier orders before the exit are reported.
void free_exited() {
  acquire(machine->to_free->exits);
  std::free(machine->to_free->memory);
  machine->to_free->free_memory->switch_to(&machine->scheduler, true);
}

// An exited block's shared memory. What another block still reads there is an error to the sanitizers; without them it
// is NaN until the cluster ends.
void release_memory(Block& block) {
  if (block.memory == nullptr) return;
  if (under_tsan()) {
    machine->to_free = &block;
    static const Stack stack;
    block.free_memory = std::make_unique<Fiber>();
    block.free_memory->start(stack, 0, free_exited, "exit of block " + std::to_string(block.index));
    machine->scheduler.switch_to(block.free_memory.get());
  } else if (under_asan()) {
    std::free(block.memory);
  } else {
    std::memset(block.memory, kPoison, machine->shape.shared_bytes);
    machine->left.emplace_back(block.memory);
  }
  block.memory = nullptr;
}

// ---- Scheduling --------------------------------------------------------------------------------------------------

// f(i) for 0 <= i < count in the order of the schedule.
template <class F>
void in_order(std::size_t count, F&& f) {
  for (std::size_t i = 0; i < count; ++i) f(machine->reversed ? count - 1 - i : i);
}

// Each as far as it can go. Whether any thread ran.
bool advance(Block& block, std::size_t warp) {
  const std::size_t first = warp * kLanes;
  const std::size_t lanes = std::min<std::size_t>(kLanes, static_cast<std::size_t>(machine->shape.block) - first);
  bool ran = false;
  for (bool again = true; again && !machine->error;) {
    again = false;
    in_order(lanes, [&](std::size_t lane) {
      Thread& thread = block.threads[first + lane];
      if (thread.state != State::runs || machine->error) return;
      resume(thread);
      again = true;
    });
    ran |= again;
  }
  return ran;
}

bool advance(Block& block) {
  bool ran = false;
  for (bool again = true; again && !machine->error;) {
    again = false;
    in_order(block.warps.size(), [&](std::size_t warp) { again |= advance(block, warp); });
    ran |= again;
  }
  if (ran && block.exited == static_cast<unsigned>(machine->shape.block)) release_memory(block);
  return ran;
}

// Who waits where, the same places once.
[[noreturn]] void deadlock() {
  std::string message = "cuda_on_host: deadlock:";
  std::vector<Call> calls;
  for (Block& block : machine->blocks) {
    for_each(false, block, [&](Thread& thread) {
      if (thread.state != State::waits || calls.size() == 8) return;
      for (const Call& call : calls) {
        if (same(call, thread.call)) return;
      }
      calls.push_back(thread.call);
      message += "\n  " + text(thread) + " waits in " + text(thread.call);
    });
  }
  throw std::runtime_error(message);
}

void run_cluster(std::int64_t first_block) {
  const auto size = machine->blocks.size();
  machine->left.clear();
  machine->exited = 0;
  machine->cluster_met = false;
  machine->cluster_barrier = {};
  {
    const Unnoticed unnoticed;
    machine->flags = std::make_unique<char[]>(3);
    set_flags(&machine->cluster_barrier, machine->flags.get());
  }
  for (std::size_t rank = 0; rank < size; ++rank) {
    start(machine->blocks[rank], first_block + static_cast<std::int64_t>(rank), static_cast<unsigned>(rank));
  }
  const auto all = static_cast<unsigned>(size * static_cast<std::size_t>(machine->shape.block));
  while (machine->exited != all) {
    bool ran = false;
    in_order(size, [&](std::size_t rank) { ran |= advance(machine->blocks[rank]); });
    if (machine->error) std::rethrow_exception(machine->error);
    if (!ran) deadlock();
  }
}

void check(const LaunchShape& shape) {
  const auto refuse = [](const std::string& what, const std::string& expected) {
    throw std::runtime_error("cuda_on_host: launch with " + what + ", expected " + expected);
  };
  if (shape.grid < 1 || shape.grid > kMaxGrid) {
    refuse("a grid of " + std::to_string(shape.grid) + " blocks", "1 to 2^31 - 1");
  }
  if (shape.block < 1 || shape.block > kMaxThreads) {
    refuse("blocks of " + std::to_string(shape.block) + " threads", "1 to 1024");
  }
  const Device limits = device_limits();
  if (shape.shared_bytes > static_cast<std::size_t>(limits.shared_per_block)) {
    refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory a block",
           "at most " + std::to_string(limits.shared_per_block));
  }
  if (shape.cluster < 1) refuse("clusters of " + std::to_string(shape.cluster) + " blocks", "at least 1");
  if (shape.cluster == 1) return;
  if (limits.architecture < 90) refuse("clusters on architecture " + std::to_string(limits.architecture), "90 or more");
  if (shape.cluster > limits.max_cluster) {
    refuse("clusters of " + std::to_string(shape.cluster) + " blocks", "at most " + std::to_string(limits.max_cluster));
  }
  if (shape.grid % shape.cluster != 0) {
    refuse("a grid of " + std::to_string(shape.grid) + " blocks",
           "a multiple of the cluster size " + std::to_string(shape.cluster));
  }
}

}  // namespace

// ---- The host side -----------------------------------------------------------------------------------------------

Device device_limits() {
  const std::lock_guard<std::mutex> lock(settings);
  return device;
}

void set_device(const Device& limits) {
  const std::lock_guard<std::mutex> lock(settings);
  device = limits;
}

void set_schedule(Schedule order) {
  const std::lock_guard<std::mutex> lock(settings);
  schedule = order;
}

std::vector<LaunchShape> take_launches() {
  const std::lock_guard<std::mutex> lock(settings);
  std::vector<LaunchShape> result(recorded.begin(), recorded.end());
  recorded.clear();
  return result;
}

void run(const LaunchShape& shape, void (*body)(const void*), const void* data) {
  check(shape);
  const std::lock_guard<std::mutex> launch_lock(one_launch);
  Machine here{};
  here.shape = shape;
  here.body = body;
  here.data = data;
  {
    const std::lock_guard<std::mutex> lock(settings);
    here.reversed = schedule == Schedule::reversed;
    recorded.push_back(shape);
    if (recorded.size() > 1000) recorded.pop_front();
  }
  const FloatEnvironment environment;
  here.scheduler.adopt();
  here.blocks = std::vector<Block>(static_cast<std::size_t>(shape.cluster));
  blockDim.x = static_cast<unsigned>(shape.block);
  gridDim.x = static_cast<unsigned>(shape.grid);

  machine = &here;
  release(&here.started);
  std::exception_ptr error;
  try {
    const std::int64_t clusters = shape.grid / shape.cluster;
    for (std::int64_t i = 0; i < clusters; ++i) {
      run_cluster((here.reversed ? clusters - 1 - i : i) * shape.cluster);
    }
  } catch (...) {
    error = std::current_exception();
  }
  acquire(&here.finished);
  {
    const Unnoticed unnoticed;  // after an error
    for (Block& block : here.blocks) std::free(block.memory);
  }
  machine = nullptr;
  if (error) runners.clear();  // some stopped in the middle
  if (error) std::rethrow_exception(error);
}

}  // namespace lanenorm::on_host
