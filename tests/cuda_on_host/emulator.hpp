// CUDA's execution model on the CPU: what device.hpp and the host side of a launch ask of the emulator.
//
// Every CUDA thread is a fiber of the calling thread. Clusters run one after another, their blocks together. A thread
// runs until it has to wait for others or exits; a warp runs as far as it can before the next one starts, and a block
// before the next block of its cluster. Shared memory is a heap allocation of exactly the bytes of the launch, filled
// with NaN before the block starts and freed when its last thread exits.
//
// What CUDA leaves undefined is an error here: run() throws std::runtime_error that names block, thread, file and line.
// A rendezvous (barrier, shuffle, vote) must find the same kind, mask and call site in all its threads. Under TSAN
// fibers are threads to it that only barriers order: unordered accesses are reported although nothing runs at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace lanenorm::on_host {

// ---- For the host side -------------------------------------------------------------------------------------------

// The emulated device. Initially an H200.
struct Device {
  int multiprocessors = 132;
  int shared_per_block = 232448;
  int shared_per_multiprocessor = 233472;
  int architecture = 90;  // as in sm_90
  int max_cluster = 16;
  int l2_bytes = 50 << 20;
};
Device device_limits();
void set_device(const Device& device);

enum class Schedule { forward, reversed };
void set_schedule(Schedule schedule);

struct LaunchShape {
  std::int64_t grid;  // blocks
  int block;          // threads
  int cluster;        // blocks
  std::size_t shared_bytes;
};

// Runs body(data) once for every thread. Throws at the first error; memory the kernel wrote is then undefined.
void run(const LaunchShape& shape, void (*body)(const void* data), const void* data);

// Whether an Argument may be given for a Parameter: a launch copies bytes, it converts nothing.
template <class Parameter, class Argument>
inline constexpr bool kPasses = std::is_same_v<Parameter, std::decay_t<Argument>> ||
                                (std::is_pointer_v<Parameter> && std::is_pointer_v<std::decay_t<Argument>>);

// As a launch copies arguments: every thread has its own.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
  static_assert((kPasses<Parameters, Arguments> && ...), "arguments of a launch are not converted");
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  run(
      shape,
      [](const void* data) {
        const Call& c = *static_cast<const Call*>(data);
        std::apply(c.first, c.second);
      },
      &call);
}

// The launches that passed the checks since this was called last; the latest 1000.
std::vector<LaunchShape> take_launches();

// Device memory of one operation: 256-byte aligned, exactly the bytes asked for, filled with NaN.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  void* allocate(std::size_t bytes);

 private:
  std::vector<void*> blocks_;
};

// ---- For kernels -------------------------------------------------------------------------------------------------

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

// Where a kernel calls.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Reports an error of the calling thread.
[[noreturn]] void fail(Site site, const std::string& message);
// what: "load_words", say
void check_aligned(const void* pointer, std::size_t alignment, const char* what, Site site);

void sync_block(Site site);
void sync_warp(unsigned mask, Site site);
void sync_cluster(Site site);
bool any(unsigned mask, bool condition, Site site);

// A shuffle: `out` becomes what source_lane of the warp passes as `in`; `words` words of 4 bytes.
void shuffle(unsigned mask, int source_lane, const std::uint32_t* in, std::uint32_t* out, int words, Site site);
int lane();

// Bytes [byte_offset, byte_offset + bytes) of the block's shared memory.
void* shared(std::size_t byte_offset, std::size_t bytes, std::size_t alignment, Site site);

unsigned cluster_rank();
unsigned cluster_size();
void* of_block(const void* mine, unsigned rank, Site site);

struct Copy {
  void* to;
  const void* from;
  int valid_bytes;
  Site site;
};
void begin_copy(const Copy& copy);
void commit_copies();
// The copies of this thread that are to be there once no more than `pending` groups are under way, oldest first.
std::vector<Copy> finish_copies(int pending);

}  // namespace lanenorm::on_host
