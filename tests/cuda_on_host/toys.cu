// Small kernels for test_cuda_on_host.py: some right, most with one mistake that the emulation has to notice.
//
// toys NAME [reversed]: runs that toy; prints what it computed, or "error: " and the message of the emulator.
//
// Long because it is a list: a kernel of a few lines and the line that launches it for every check.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace lanenorm;
using namespace lanenorm::device;
using on_host::launch;

constexpr unsigned kMiddle = 0x0000ffffu;  // the lower half of a warp

// ---- Right: results that can be checked by hand ------------------------------------------------------------------

struct Pair3 {  // three words, one of them across the border of eight bytes
  float a;
  std::int32_t b[2];
};

__global__ void warp_sums(const float* x, float* y) {
  Pair3 v{x[threadIdx.x], {static_cast<int>(threadIdx.x), 1}};
  for (int offset = 16; offset > 0; offset >>= 1) {
    const Pair3 other = shuffle_xor(kAllLanes, v, offset);
    v = {v.a + other.a, {v.b[0] + other.b[0], v.b[1] + other.b[1]}};
  }
  if (threadIdx.x % 32 == 0) y[threadIdx.x / 32] = v.a + static_cast<float>(v.b[0] + 100000 * v.b[1]);
}

__global__ void shuffles(int* y) {
  const int lane = static_cast<int>(threadIdx.x);
  y[lane] = shuffle(kAllLanes, lane, 3);
  y[32 + lane] = shuffle(kAllLanes, lane, 3, 8);
  y[64 + lane] = shuffle_down(kAllLanes, lane, 2, 8);
  y[96 + lane] = shuffle_xor(kAllLanes, lane, 5);
  y[128 + lane] = any(kAllLanes, lane == 7) + 2 * any(kAllLanes, lane == 99);
  // halves of a warp, each on its own way
  int sum = lane;
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset >>= 1) sum += shuffle_xor(kMiddle, sum, offset, 16);
  } else {
    for (int offset = 8; offset > 0; offset >>= 1) sum += shuffle_xor(~kMiddle, sum, offset, 16);
  }
  y[160 + lane] = shuffle(kAllLanes, sum, lane ^ 16);
}

__global__ void block_sums(const float* x, float* y, bool with_barrier, bool with_second) {
  float* sums = shared<float>(0);
  for (int round = 0; round < 2; ++round) {
    sums[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x] + static_cast<float>(round);
    if (with_barrier) sync_block();
    float sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += sums[i];
    y[(blockIdx.x * 2 + round) * blockDim.x + threadIdx.x] = sum;
    if (with_second) sync_block();
  }
}

__global__ void warp_exchange(int* y, bool with_sync) {
  int* values = shared<int>(0);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  any(kAllLanes, true);  // everybody is here, but nothing is said about memory
  if (with_sync) sync_warp(kAllLanes);
  y[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Every block of the cluster hands its sum to the others. `first` and `last`: the barriers around the exchange.
__global__ void cluster_sums(float* y, bool first, bool last) {
  float& mine = shared<float>();
  if (threadIdx.x == 0) mine = static_cast<float>(blockIdx.x + 1);
  if (first) sync_cluster();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *of_block(&mine, rank);
  if (last) sync_cluster();
  if (threadIdx.x == 0) y[blockIdx.x] = sum + 1000.0f * static_cast<float>(cluster_rank());
}

// Two stages of 16 bytes a thread. `waits`: as many as the pipeline needs, or one too few.
__global__ void copies(const Words* x, std::uint32_t* y, bool wait_first, bool wait_last, bool commit) {
  Words* stage = shared<Words>(0) + 2 * threadIdx.x;
  copy_async_16(stage, x + 2 * threadIdx.x, 16);
  copy_commit();
  copy_async_16(stage + 1, x + 2 * threadIdx.x + 1, 6);
  if (commit) copy_commit();
  if (wait_first) copy_wait<1>();
  y[2 * threadIdx.x] = stage[0].w[3];
  if (wait_last) copy_wait<0>();
  y[2 * threadIdx.x + 1] = stage[1].w[1] + stage[1].w[3];
}

// Others may read what a thread has waited for only behind a barrier.
__global__ void copies_of_others(const Words* x, std::uint32_t* y, bool with_barrier) {
  Words* stage = shared<Words>(0);
  copy_async_16(stage + threadIdx.x, x + threadIdx.x, 16);
  copy_commit();
  copy_wait<0>();
  if (with_barrier) sync_block();
  y[threadIdx.x] = stage[threadIdx.x ^ 1].w[0];
}

__global__ void order(int* y, int* count) { y[blockIdx.x * blockDim.x + threadIdx.x] = (*count)++; }

struct Big {
  int value[9];
};
__global__ void by_value(Big big, int* y) {
  big.value[threadIdx.x] += 1;
  sync_block();
  int sum = 0;
  for (const int v : big.value) sum += v;
  y[threadIdx.x] = sum;
}

__global__ void words(const Words* x, Words* y) {
  store_words(y, load_words(x));
  store_words_streaming(y + 1, load_words_streaming(x + 1));
}

// ---- Wrong: one mistake each -------------------------------------------------------------------------------------

__global__ void barrier_in_branch() {
  if (threadIdx.x < 32) sync_block();
}
__global__ void barriers_of_two_branches() {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
__global__ void barrier_against_cluster() {
  if (threadIdx.x == 5) {
    sync_cluster();
  } else {
    sync_block();
  }
}
__global__ void barrier_against_warp() {
  if (threadIdx.x == 5) {
    sync_warp(kAllLanes);
  } else {
    sync_block();
  }
}
__global__ void different_masks() { sync_warp(threadIdx.x < 8 ? kAllLanes : kMiddle | 0xff0000ffu); }
__global__ void not_in_mask() { sync_warp(kMiddle); }
__global__ void lanes_that_are_not_there() { sync_warp(kAllLanes); }
__global__ void exited_lane(float* y) {
  if (threadIdx.x == 31) return;
  y[threadIdx.x] = shuffle_xor(kAllLanes, 1.0f, 1);
}
__global__ void source_not_in_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = shuffle_xor(kMiddle, 1.0f, 16);
}
__global__ void shuffle_against_vote(float* y) {
  if (threadIdx.x % 2) {
    y[threadIdx.x] = shuffle_xor(kAllLanes, 1.0f, 1);
  } else {
    any(kAllLanes, true);
  }
}
template <class T>
T twice(T v) {
  return v + shuffle_xor(kAllLanes, v, 1);
}
__global__ void different_sizes(float* y) {
  if (threadIdx.x % 2) {
    y[threadIdx.x] = twice(1.0f);
  } else {
    y[threadIdx.x] = static_cast<float>(twice(1.0));
  }
}
__global__ void width_not_a_power_of_two(float* y) { y[threadIdx.x] = shuffle(kAllLanes, 1.0f, 0, 24); }
__global__ void xor_beyond_width(float* y) { y[threadIdx.x] = shuffle_xor(kAllLanes, 1.0f, 16, 16); }
__global__ void ring() {  // lane i waits for lane i + 1
  const unsigned next = (threadIdx.x + 1) % 3;
  sync_warp(1u << threadIdx.x | 1u << next);
}

__global__ void beyond_shared(int offset) { shared<float>(static_cast<std::size_t>(offset))[0] = 0; }
__global__ void unaligned_shared() { shared<double>(4)[0] = 0; }
__global__ void shared_overrun() { shared<float>(0)[threadIdx.x] = 0; }
__global__ void shared_not_set(float* y) { y[threadIdx.x] = shared<float>(0)[threadIdx.x]; }

__global__ void copy_unaligned(const float* x) {
  copy_async_16(shared<char>(0), x + 1, 16);
  copy_commit();
  copy_wait<0>();
}
__global__ void copy_to_unaligned(const float* x) {
  copy_async_16(shared<char>(8), x, 16);
  copy_commit();
  copy_wait<0>();
}

__global__ void not_in_shared(float* y) {
  sync_cluster();
  *of_block(y, 0) = 1;
}
__global__ void rank_beyond_cluster() {
  sync_cluster();
  *of_block(shared<float>(0), cluster_size()) = 1;
}
// Block 0 reads from block 1, which exits without waiting for it.
__global__ void other_block_exits(float* y, bool late) {
  float* value = shared<float>(0);
  *value = 1;
  sync_cluster();
  const float* theirs = cluster_rank() == 0 && !late ? of_block(value, 1) : value;
  sync_cluster();
  if (cluster_rank() == 1) return;
  if (late) theirs = of_block(value, 1);
  *y = *theirs;
}
__global__ void same_element(float* y) { *y = 1; }  // every block
__global__ void same_element_and_barrier(float* y) {
  if (threadIdx.x == blockIdx.x) *y = 1;
  sync_block();  // of the threads of a block, not of blocks
}
__global__ void workspace_overrun(float* work) { work[threadIdx.x] = 1; }
__global__ void global_overrun(const Words* x, Words* y) { store_words(y, load_words(x)); }

// ---- The list ----------------------------------------------------------------------------------------------------

std::vector<float> ones(std::size_t count) { return std::vector<float>(count, 1.0f); }

template <class T>
void print(const std::vector<T>& values) {
  for (const T& v : values) std::printf("%.10g ", static_cast<double>(v));
  std::printf("\n");
}

// 16-byte aligned words 0, 1, 2, ...; exactly as many as asked for
std::unique_ptr<Words[]> counted(std::size_t count) {
  std::unique_ptr<Words[]> result(new Words[count]);
  for (std::size_t i = 0; i < 4 * count; ++i) result[i / 4].w[i % 4] = static_cast<std::uint32_t>(i);
  return result;
}

void run_block_sums(bool with_barrier, bool with_second) {
  const std::vector<float> x = ones(3 * 64);
  std::vector<float> y(2 * x.size());
  launch(block_sums, {3, 64, 1, 64 * sizeof(float)}, x.data(), y.data(), with_barrier, with_second);
  print(std::vector<float>{y[0], y[64], y[255], y[383]});
}

void run_cluster_sums(bool first, bool last, int cluster = 2) {
  std::vector<float> y(4);
  launch(cluster_sums, {4, 64, cluster, sizeof(float)}, y.data(), first, last);
  print(y);
}

void run_copies(bool wait_first, bool wait_last, bool commit = true) {
  const auto x = counted(64);
  std::vector<std::uint32_t> y(64);
  launch(copies, {1, 32, 1, 64 * sizeof(Words)}, x.get(), y.data(), wait_first, wait_last, commit);
  print(std::vector<std::uint32_t>(y.begin() + 2, y.begin() + 4));
}

void run_copies_of_others(bool with_barrier) {
  const auto x = counted(64);
  std::vector<std::uint32_t> y(64);
  launch(copies_of_others, {1, 64, 1, 64 * sizeof(Words)}, x.get(), y.data(), with_barrier);
  print(std::vector<std::uint32_t>(y.begin(), y.begin() + 4));
}

void run_warp_exchange(bool with_sync) {
  std::vector<int> y(32);
  launch(warp_exchange, {1, 32, 1, 32 * sizeof(int)}, y.data(), with_sync);
  print(std::vector<int>(y.begin(), y.begin() + 4));
}

template <class... Parameters>
std::function<void()> lanes(void (*kernel)(Parameters...), int block = 32) {  // kernel(y) or kernel()
  return [=] {
    std::vector<float> y(64);
    if constexpr (sizeof...(Parameters) == 1) {
      launch(kernel, {1, block, 1, 0}, y.data());
    } else {
      launch(kernel, {1, block, 1, 0});
    }
    std::printf("no error\n");
  };
}

std::function<void()> shape(std::int64_t grid, int block, int cluster, std::size_t shared_bytes,
                            int architecture = 90) {
  return [=] {
    on_host::Device device;
    device.architecture = architecture;
    device.max_cluster = 8;
    on_host::set_device(device);
    launch(+[] {}, {grid, block, cluster, shared_bytes});
    std::printf("no error\n");
  };
}

const std::map<std::string, std::function<void()>>& toys() {
  static const std::map<std::string, std::function<void()>> list = {
      {"warp_sums",
       [] {
         std::vector<float> x = ones(64), y(2);
         launch(warp_sums, {1, 64, 1, 0}, x.data(), y.data());
         print(y);
       }},
      {"shuffles",
       [] {
         std::vector<int> y(192);
         launch(shuffles, {1, 32, 1, 0}, y.data());
         for (int row = 0; row < 6; ++row) {
           print(std::vector<int>{y[32 * row], y[32 * row + 1], y[32 * row + 7], y[32 * row + 30]});
         }
       }},
      {"block_sums", [] { run_block_sums(true, true); }},
      {"block_sums_without_first_barrier", [] { run_block_sums(false, true); }},
      {"block_sums_without_second_barrier", [] { run_block_sums(true, false); }},
      {"warp_exchange", [] { run_warp_exchange(true); }},
      {"warp_exchange_without_sync", [] { run_warp_exchange(false); }},
      {"cluster_sums", [] { run_cluster_sums(true, true); }},
      {"cluster_of_one", [] { run_cluster_sums(true, true, 1); }},
      {"cluster_sums_without_first_barrier", [] { run_cluster_sums(false, true); }},
      {"cluster_sums_without_last_barrier", [] { run_cluster_sums(true, false); }},
      {"copies", [] { run_copies(true, true); }},
      {"copies_without_first_wait", [] { run_copies(false, true); }},
      {"copies_without_last_wait", [] { run_copies(true, false); }},
      {"copies_without_commit", [] { run_copies(true, true, false); }},
      {"copies_of_others", [] { run_copies_of_others(true); }},
      {"copies_of_others_without_barrier", [] { run_copies_of_others(false); }},
      {"copy_unaligned",
       [] {
         const auto x = counted(2);
         launch(copy_unaligned, {1, 1, 1, 16}, reinterpret_cast<const float*>(x.get()));
       }},
      {"copy_to_unaligned",
       [] {
         const auto x = counted(2);
         launch(copy_to_unaligned, {1, 1, 1, 32}, reinterpret_cast<const float*>(x.get()));
       }},
      {"order",
       [] {
         std::vector<int> y(2 * 64);
         int count = 0;
         launch(order, {2, 64, 1, 0}, y.data(), &count);
         print(std::vector<int>{y[0], y[1], y[63], y[64], y[127]});
       }},
      {"by_value",
       [] {
         std::vector<int> y(9);
         launch(by_value, {1, 9, 1, 0}, Big{}, y.data());
         print(y);
       }},
      {"words",
       [] {
         const auto x = counted(2);
         const auto y = counted(2);
         y[0] = y[1] = Words{};
         launch(words, {1, 1, 1, 0}, x.get(), y.get());
         print(std::vector<std::uint32_t>{y[0].w[0], y[0].w[3], y[1].w[0], y[1].w[3]});
       }},
      {"after_an_error",
       [] {
         try {
           launch(not_in_mask, {4, 64, 1, 64});
         } catch (const std::runtime_error&) {
           run_block_sums(true, true);
         }
       }},
      {"unaligned_words",
       [] {
         const auto x = counted(3);
         launch(words, {1, 1, 1, 0}, reinterpret_cast<const Words*>(&x[0].w[1]), x.get());
       }},
      {"global_overrun",
       [] {
         const auto x = counted(2);
         launch(global_overrun, {1, 1, 1, 0}, x.get() + 2, x.get());
       }},
      {"barrier_in_branch", lanes(barrier_in_branch, 64)},
      {"barriers_of_two_branches", lanes(barriers_of_two_branches, 64)},
      {"barrier_against_cluster", lanes(barrier_against_cluster)},
      {"barrier_against_warp", lanes(barrier_against_warp)},
      {"different_masks", lanes(different_masks)},
      {"not_in_mask", lanes(not_in_mask)},
      {"lanes_that_are_not_there", lanes(lanes_that_are_not_there, 48)},
      {"exited_lane", lanes(exited_lane)},
      {"source_not_in_mask", lanes(source_not_in_mask)},
      {"shuffle_against_vote", lanes(shuffle_against_vote)},
      {"different_sizes", lanes(different_sizes)},
      {"width_not_a_power_of_two", lanes(width_not_a_power_of_two)},
      {"xor_beyond_width", lanes(xor_beyond_width)},
      {"ring", lanes(ring, 3)},
      {"beyond_shared", [] { launch(beyond_shared, {1, 1, 1, 10}, 8); }},
      {"unaligned_shared", [] { launch(unaligned_shared, {1, 1, 1, 16}); }},
      {"shared_overrun", [] { launch(shared_overrun, {1, 5, 1, 16}); }},
      {"shared_not_set",
       [] {
         std::vector<float> y(4);
         launch(shared_not_set, {1, 4, 1, 16}, y.data());
         print(y);
       }},
      {"not_in_shared",
       [] {
         float y = 0;
         launch(not_in_shared, {1, 1, 1, 16}, &y);
       }},
      {"rank_beyond_cluster", [] { launch(rank_beyond_cluster, {2, 1, 2, 16}); }},
      {"other_block_exits",
       [] {
         float y = 0;
         launch(other_block_exits, {2, 1, 2, 16}, &y, true);
         print(std::vector<float>{y});
       }},
      {"pointer_to_exited_block",
       [] {
         float y = 0;
         launch(other_block_exits, {2, 1, 2, 16}, &y, false);
         print(std::vector<float>{y});
       }},
      {"same_element",
       [] {
         float y = 0;
         launch(same_element, {2, 1, 1, 0}, &y);
       }},
      {"same_element_and_barrier",
       [] {
         float y = 0;
         launch(same_element_and_barrier, {2, 32, 1, 0}, &y);
       }},
      {"workspace",
       [] {
         on_host::Workspace workspace;
         auto* work = static_cast<float*>(workspace.allocate(3 * sizeof(float)));
         std::printf("%d ", static_cast<int>(reinterpret_cast<std::uintptr_t>(work) % 256));
         print(std::vector<float>{work[2]});
         launch(workspace_overrun, {1, 3, 1, 0}, work);
       }},
      {"workspace_overrun",
       [] {
         on_host::Workspace workspace;
         launch(workspace_overrun, {1, 4, 1, 0}, static_cast<float*>(workspace.allocate(3 * sizeof(float))));
       }},
      {"empty_grid", shape(0, 32, 1, 0)},
      {"grid_too_large", shape(std::int64_t{1} << 31, 32, 1, 0)},
      {"empty_block", shape(1, 0, 1, 0)},
      {"block_too_large", shape(1, 1025, 1, 0)},
      {"shared_too_large", shape(1, 32, 1, 232449)},
      {"empty_cluster", shape(1, 32, 0, 0)},
      {"cluster_too_large", shape(16, 32, 16, 0)},
      {"cluster_before_sm_90", shape(2, 32, 2, 0, 89)},
      {"part_of_a_cluster", shape(5, 32, 2, 0)},
      {"largest_shape", shape(8, 1024, 8, 232448)},
  };
  return list;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[2], "reversed") == 0) on_host::set_schedule(on_host::Schedule::reversed);
  if (count < 2) {
    for (const auto& toy : toys()) std::printf("%s\n", toy.first.c_str());
    return 0;
  }
  try {
    toys().at(arguments[1])();
    return 0;
  } catch (const std::runtime_error& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
}
