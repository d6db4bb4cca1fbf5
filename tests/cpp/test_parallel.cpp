// The thread pool (how many threads: test_thread_count.cpp). To be run under -fsanitize=thread as well. No time is
// asserted except "it did not hang" (alarm). Longer than a file should be: one promise of parallel.hpp after the other.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/parallel.hpp"

// TSAN refuses by default to start threads in a forked child, which is what the pool has to do.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }

namespace {

using namespace lanenorm;
using std::chrono::milliseconds;

constexpr std::int64_t kLarge = std::int64_t{1} << 30;  // bytes that are worth every thread

// A job whose bodies write plain memory, so that TSAN sees a missing order on the way in or out.
struct Sums {
  explicit Sums(std::int64_t pieces) : values(static_cast<std::size_t>(pieces), 0) {}
  void run(std::int64_t bytes = kLarge) {
    for (auto& value : values) value = 1;
    parallel_for(static_cast<std::int64_t>(values.size()), bytes,
                 [this](std::int64_t i) { values[static_cast<std::size_t>(i)] += i; });
  }
  bool right() const {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (values[i] != static_cast<std::int64_t>(i) + 1) return false;
    }
    return true;
  }
  std::vector<std::int64_t> values;
};

bool job_is_right(std::int64_t pieces, std::int64_t bytes = kLarge) {
  Sums sums(pieces);
  sums.run(bytes);
  return sums.right();
}

// Runs a job in which `threads` bodies wait for each other: it ends only if as many threads take part.
bool threads_take_part(int threads) {
  std::atomic<int> arrived{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  parallel_for(threads, kLarge, [&](std::int64_t) {
    arrived.fetch_add(1);
    while (arrived.load() < threads && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  return static_cast<int>(ids.size()) == threads;
}

// True if the child, which runs f and exits, reports that f returned true.
template <class F>
bool child_succeeds(F f) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(f() ? 0 : 1);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// ---- every piece once -----------------------------------------------------------------------------------------------

void test_parallel_runs_three_pieces() {
  int runs[3] = {0, 0, 0};
  parallel_for(3, kLarge, [&](std::int64_t piece) { ++runs[piece]; });
  CHECK(runs[0] == 1 && runs[1] == 1 && runs[2] == 1);
}

void test_parallel_runs_every_piece_once() {
  for (int threads : {1, 2, 3, 5, 8}) {
    set_num_threads(threads);
    CHECK_EQ(get_num_threads(), threads);
    for (std::int64_t pieces : {0, 1, 2, 3, 7, 8, 9, 1000}) {
      for (int repetition = 0; repetition < 50; ++repetition) {
        // Serial; by workers that happen to be awake; by all.
        for (std::int64_t bytes : {std::int64_t{0}, 4 * kSerialBytes, kLarge}) CHECK(job_is_right(pieces, bytes));
      }
    }
    CHECK(threads_take_part(threads));
  }
  parallel_for(-1, kLarge, [](std::int64_t) { CHECK(false); });
}

void test_parallel_wakes_parked_threads() {
  for (int threads : {2, 8}) {
    set_num_threads(threads);
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(milliseconds(3));
      CHECK(threads_take_part(threads));
    }
  }
}

// A thread begins with the same stretch of pieces in every job, so that its cache holds what it left there.
void test_parallel_threads_keep_their_stretches() {
  constexpr int kThreads = 4;
  constexpr std::int64_t kPieces = 4 * 25 + 2;
  set_num_threads(kThreads);
  std::set<std::pair<std::thread::id, std::int64_t>> begun;  // by all jobs together
  for (int job = 0; job < 20; ++job) {
    std::mutex mutex;
    std::set<std::thread::id> here;
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    parallel_for(kPieces, kLarge, [&](std::int64_t piece) {
      std::unique_lock<std::mutex> lock(mutex);
      if (!here.insert(std::this_thread::get_id()).second) return;
      begun.insert({std::this_thread::get_id(), piece});
      while (here.size() < kThreads && std::chrono::steady_clock::now() < limit) {  // else one does all the pieces
        lock.unlock();
        std::this_thread::yield();
        lock.lock();
      }
    });
    CHECK_EQ(here.size(), static_cast<std::size_t>(kThreads));
  }
  CHECK_EQ(begun.size(), static_cast<std::size_t>(kThreads));
  std::set<std::int64_t> pieces;
  for (const auto& [thread, piece] : begun) {
    pieces.insert(piece);
    if (thread == std::this_thread::get_id()) CHECK_EQ(piece, 0);
  }
  CHECK(pieces == (std::set<std::int64_t>{0, 26, 52, 77}));
}

void test_parallel_small_job_stays_on_caller_in_order() {
  set_num_threads(4);
  std::vector<std::int64_t> order;
  const auto caller = std::this_thread::get_id();
  parallel_for(100, kSerialBytes - 1, [&](std::int64_t piece) {
    CHECK(std::this_thread::get_id() == caller);
    order.push_back(piece);
  });
  CHECK_EQ(order.size(), 100u);
  for (std::size_t i = 0; i < order.size(); ++i) CHECK_EQ(order[i], static_cast<std::int64_t>(i));
}

void test_parallel_takes_any_callable() {
  struct Counter {
    std::atomic<int> count{0};
    void operator()(std::int64_t) { ++count; }
  } counter;
  parallel_for(10, kLarge, counter);  // by reference: not copyable
  CHECK_EQ(counter.count.load(), 10);
  static std::atomic<int> calls;
  parallel_for(10, kLarge, [](std::int64_t) { ++calls; });
  CHECK_EQ(calls.load(), 10);
}

// ---- who runs what --------------------------------------------------------------------------------------------------

void test_parallel_nested_is_serial() {
  set_num_threads(4);
  std::atomic<int> inner{0};
  for (int repetition = 0; repetition < 50; ++repetition) {
    parallel_for(8, kLarge, [&](std::int64_t) {
      const auto self = std::this_thread::get_id();
      parallel_for(8, kLarge, [&](std::int64_t) {
        CHECK(std::this_thread::get_id() == self);
        ++inner;
      });
    });
  }
  CHECK_EQ(inner.load(), 50 * 64);
}

void test_parallel_eight_callers_at_once() {
  set_num_threads(4);
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([] {
      for (int repetition = 0; repetition < 300; ++repetition) CHECK(job_is_right(1 + repetition % 23));
    });
  }
  for (auto& caller : callers) caller.join();
}

void test_parallel_busy_pool_does_not_wait() {
  set_num_threads(2);
  std::atomic<bool> held{false};
  std::atomic<bool> release{false};
  std::thread holder([&] {
    parallel_for(2, kLarge, [&](std::int64_t) {
      held = true;
      while (!release) std::this_thread::yield();
    });
  });
  while (!held) std::this_thread::yield();
  const auto self = std::this_thread::get_id();
  parallel_for(5, kLarge, [&](std::int64_t) { CHECK(std::this_thread::get_id() == self); });
  release = true;  // only now can the holder end
  holder.join();
}

void test_parallel_set_num_threads_while_running() {
  std::atomic<bool> done{false};
  std::vector<std::thread> setters;
  for (int i = 0; i < 3; ++i) {
    setters.emplace_back([&, i] {
      for (int n = 1; !done; n = n % 8 + 1) {
        CHECK(set_num_threads(n) >= 1);
        CHECK(get_num_threads() >= 1);
        if (i == 0) CHECK(job_is_right(5));
        std::this_thread::yield();
      }
    });
  }
  for (int repetition = 0; repetition < 1000; ++repetition) CHECK(job_is_right(1 + repetition % 17));
  done = true;
  for (auto& setter : setters) setter.join();
  set_num_threads(3);
  CHECK_EQ(set_num_threads(2), 3);
  CHECK_THROWS(std::invalid_argument, "n is 0", set_num_threads(0));
  CHECK_THROWS(std::invalid_argument, "n is -3", set_num_threads(-3));
  CHECK_EQ(get_num_threads(), 2);
}

// ---- errors and interrupts ------------------------------------------------------------------------------------------

void test_parallel_exception_reaches_caller() {
  for (int threads : {1, 2, 8}) {
    set_num_threads(threads);
    for (std::int64_t culprit : {0, 1, 37, 99}) {
      std::atomic<int> inside{0};
      CHECK_THROWS(std::runtime_error, "piece " + std::to_string(culprit),
                   parallel_for(100, kLarge, [&](std::int64_t i) {
                     ++inside;
                     if (i == culprit) {
                       --inside;
                       throw std::runtime_error("piece " + std::to_string(i));
                     }
                     --inside;
                   }));
      CHECK_EQ(inside.load(), 0);  // everybody had left
      CHECK(job_is_right(10));
    }
    for (int repetition = 0; repetition < 100; ++repetition) {  // all of them throw
      CHECK_THROWS(std::runtime_error, "all",
                   parallel_for(8, kLarge, [](std::int64_t) { throw std::runtime_error("all"); }));
    }
    std::int64_t runs = 0;  // what follows an exception is dropped
    CHECK_THROWS(int, "", parallel_for(100, 0, [&](std::int64_t i) {
                   ++runs;
                   if (i == 4) throw 1;
                 }));
    CHECK_EQ(runs, 5);
  }
}

std::atomic<int> asked{0};
std::atomic<bool> hook_answer{false};
std::atomic<bool> asked_elsewhere{false};
std::thread::id hook_thread;

bool hook() {
  ++asked;
  if (std::this_thread::get_id() != hook_thread) asked_elsewhere = true;
  return hook_answer;
}

void test_parallel_interrupt() {
  hook_thread = std::this_thread::get_id();
  set_interrupt_hook(hook);
  for (int threads : {1, 2, 4}) {
    set_num_threads(threads);
    hook_answer = true;
    asked = 0;
    // Pieces of 5 ms for 10 s, polled between pieces.
    std::atomic<int> inside{0};
    CHECK_THROWS(Interrupted, "", parallel_for(2000, kLarge, [&](std::int64_t) {
                   ++inside;
                   std::this_thread::sleep_for(milliseconds(5));
                   --inside;
                 }));
    CHECK_EQ(inside.load(), 0);
    CHECK_EQ(asked.load(), 1);
    // Many short calls are one long one.
    CHECK_THROWS(
        Interrupted, "", for (int i = 0; i < 2000; ++i) {
          parallel_for(2, 0, [](std::int64_t) { std::this_thread::sleep_for(milliseconds(2)); });
        });
    // Nothing is asked in a short call after a pause.
    std::this_thread::sleep_for(milliseconds(80));
    asked = 0;
    CHECK(job_is_right(20));
    CHECK_EQ(asked.load(), 0);
    // Nor does it stop without a reason.
    hook_answer = false;
    parallel_for(30, kLarge, [](std::int64_t) { std::this_thread::sleep_for(milliseconds(20)); });
    CHECK(asked.load() > 0);
  }
  // While the caller waits for a worker: the caller's piece is short, the worker's is long.
  set_num_threads(2);
  hook_answer = true;
  asked = 0;
  std::atomic<bool> worker_began{false};
  std::atomic<bool> worker_ended{false};
  CHECK_THROWS(Interrupted, "", parallel_for(2, kLarge, [&](std::int64_t) {
                 if (std::this_thread::get_id() == hook_thread) {
                   while (!worker_began) std::this_thread::yield();
                 } else {
                   worker_began = true;
                   std::this_thread::sleep_for(milliseconds(300));
                   worker_ended = true;
                 }
               }));
  CHECK(worker_ended.load());  // it had left the job
  CHECK_EQ(asked.load(), 1);
  CHECK(!asked_elsewhere.load());
  hook_answer = false;
  set_interrupt_hook(nullptr);
}

// Python before 3.14 ends a daemon thread that asks for the GIL during finalization by pthread_exit.
void test_parallel_hook_may_end_its_thread() {
  set_num_threads(4);
  static std::atomic<int> inside;
  static std::atomic<bool> unwound;
  std::thread daemon([] {
    set_interrupt_hook([]() -> bool { pthread_exit(nullptr); });
    struct Guard {
      ~Guard() { unwound = inside == 0; }
    } guard;
    parallel_for(1000, kLarge, [](std::int64_t) {
      ++inside;
      std::this_thread::sleep_for(milliseconds(10));
      --inside;
    });
    CHECK(false);
  });
  daemon.join();
  set_interrupt_hook(nullptr);
  CHECK(unwound.load());
  CHECK(threads_take_part(4));
}

// ---- fork and exit --------------------------------------------------------------------------------------------------

void test_parallel_after_fork() {
  set_num_threads(3);
  CHECK(job_is_right(10));
  for (int i = 0; i < 10; ++i) {
    CHECK(child_succeeds([] { return get_num_threads() == 3 && job_is_right(100) && threads_take_part(3); }));
  }
  CHECK(child_succeeds([] { return child_succeeds([] { return job_is_right(100); }) && job_is_right(100); }));
  CHECK(job_is_right(100));
}

void test_parallel_fork_while_another_thread_is_in_a_job() {
  set_num_threads(3);
  std::atomic<bool> done{false};
  Sums sums(20);
  std::thread busy([&] {
    while (!done) {  // allocates nothing: the allocator of ASAN, unlike glibc's, may stay locked in the child
      sums.run();
      CHECK(sums.right());
    }
  });
  for (int i = 0; i < 20; ++i) {
    CHECK(child_succeeds([] { return job_is_right(100) && threads_take_part(3); }));
  }
  done = true;
  busy.join();
}

void test_parallel_fork_in_the_hook() {  // a Python signal handler may do that
  set_num_threads(3);
  static pid_t child;
  child = -1;
  set_interrupt_hook([] {
    if (child < 0) child = fork();
    return false;
  });
  bool thrown = false;
  try {
    parallel_for(100, kLarge, [](std::int64_t) { std::this_thread::sleep_for(milliseconds(5)); });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  set_interrupt_hook(nullptr);
  if (child == 0) _exit(thrown && job_is_right(100) ? 0 : 1);
  CHECK(!thrown);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// exit() runs static destructors while another thread is at work, as a daemon thread of Python is. A program of its own
// (main with an argument), as TSAN gets confused by what remains of the parent's threads after fork().
const char* const kExitArgument = "exit-while-busy";

void exit_while_another_thread_is_in_a_job() {
  std::thread([] {
    for (;;) job_is_right(50);
  }).detach();
  std::this_thread::sleep_for(milliseconds(20));
  std::exit(0);
}

void test_parallel_exit_while_another_thread_is_in_a_job() {
  for (int i = 0; i < 3; ++i) {
    CHECK(child_succeeds([] { return execl("/proc/self/exe", "test_parallel", kExitArgument, nullptr) == 0; }));
  }
}

// Destroyed after the pool's workers were ended: constructed first, since it is a static of the first file.
struct UsedAtExit {
  ~UsedAtExit() {
    if (!job_is_right(100)) _exit(1);
  }
};

// ---- floating-point environment -------------------------------------------------------------------------------------

__attribute__((noinline)) float half(volatile float value) { return value * 0.5f; }

void test_parallel_keeps_subnormals_when_caller_flushes() {
#if defined(__SSE__)
  set_num_threads(4);
  CHECK(job_is_right(10));
  const std::uint32_t before = __builtin_ia32_stmxcsr();
  const std::uint32_t flushing = 0x1F80 | 0x8040 | 0x6000;  // FTZ, DAZ, round toward zero
  const float smallest_normal = 1.17549435e-38f;
  __builtin_ia32_ldmxcsr(flushing);
  const float flushed = half(smallest_normal);
  std::vector<float> results(64, 0);
  for (std::int64_t bytes : {std::int64_t{0}, kLarge}) {
    parallel_for(64, bytes, [&](std::int64_t i) {
      results[static_cast<std::size_t>(i)] = half(smallest_normal);
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    });
  }
  const std::uint32_t after = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before);
  CHECK_EQ(flushed, 0.0f);
  for (float result : results) CHECK_EQ(result, 5.87747175e-39f);
  CHECK_EQ(after & 0xFFC0u, flushing);

  __builtin_ia32_ldmxcsr(0x1F80);  // flags raised inside are not seen outside
  {
    const FloatEnvironment environment;
    half(1e-45f);
  }
  CHECK_EQ(__builtin_ia32_stmxcsr(), 0x1F80u);
  __builtin_ia32_ldmxcsr(before);
#endif
}

}  // namespace

int main(int count, char** arguments) {
  alarm(300);  // a hang fails
  static const UsedAtExit used_at_exit;
  if (count > 1 && std::strcmp(arguments[1], kExitArgument) == 0) exit_while_another_thread_is_in_a_job();
  test_parallel_threads_keep_their_stretches();  // first: of more workers than are asked for, any may come
  test_parallel_runs_three_pieces();
  test_parallel_runs_every_piece_once();
  test_parallel_wakes_parked_threads();
  test_parallel_small_job_stays_on_caller_in_order();
  test_parallel_takes_any_callable();
  test_parallel_nested_is_serial();
  test_parallel_eight_callers_at_once();
  test_parallel_busy_pool_does_not_wait();
  test_parallel_set_num_threads_while_running();
  test_parallel_exception_reaches_caller();
  test_parallel_interrupt();
  test_parallel_hook_may_end_its_thread();
  test_parallel_after_fork();
  test_parallel_fork_while_another_thread_is_in_a_job();
  test_parallel_fork_in_the_hook();
  test_parallel_exit_while_another_thread_is_in_a_job();
  test_parallel_keeps_subnormals_when_caller_flushes();
  return finish();
}
