// One job at a time, owned by the thread that called. The owner writes the job into the pool and opens the *gate*: a
// 32-bit word holding the job's number and a count of tickets. A worker enters by taking a ticket, takes pieces, and
// leaves. The owner works too; when no pieces are left it closes the gate, and waits only for the workers that entered.
// One that wakes late finds no ticket and goes back to sleep: on a busy machine nobody waits for a thread that has not
// been given a CPU.
//
// The pieces are divided into a stretch for each thread, the same one in every job of as many pieces, since arrays are
// used again and lie in the caches of the processor that used them last. A thread that has finished its stretch helps
// the others with theirs. BN forward of 3.2 MB again and again on two threads: 1.5 to 2.9 times as fast as with one
// counter, on a virtual machine whose two processors seem to share an L3 at times and at times not.
//
// All of it is a handful of atomic words and futexes, no mutex: a fork() at any moment can leave nothing locked.
//
// Longer than a file should be: the protocol is one idea, and half of it are the reasons. How many threads to use is
// thread_count.hpp.
#include "cpu/parallel.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <csignal>
#include <ctime>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/float_environment.hpp"
#include "cpu/thread_count.hpp"

namespace lanenorm {
namespace {

using Clock = std::chrono::steady_clock;
using Word = std::atomic<std::uint32_t>;

// Measured on a 2-core x86-64 VM (Zen 4), empty bodies, two threads that both take part, medians:
//   worker still looking   0.4 us from call to return
//   worker asleep          owner's wake-up call 10..15 us (an interrupt to an idle CPU leaves the virtual machine),
//                          worker there after 20..30 us, 56 us after a sleep of 5 ms
//   no worker comes        0.1 us; 0.05 us when nobody was asked (one thread: 0.02 us)

// How long a worker looks for the next job, and an owner for the last worker to leave, before sleeping: about as long
// as waking it then takes, so that the wait costs at most twice what the best choice in hindsight would have cost.
constexpr auto kSpin = std::chrono::microseconds(50);

// Least memory traffic for each thread that takes part, from kSerialBytes: so small a job is shared by two.
constexpr std::int64_t kBytesPerThread = kSerialBytes / 2;

// Below this, sleeping workers are woken only in a burst of jobs, see Pool::worth_waking. With the owner delayed by 10
// us and the worker by 25, two threads end a job of T us at (T + 35)/2: a gain for T > 35 us, 1 MiB at 30 GB/s.
constexpr std::int64_t kWakeBytes = 1024 * 1024;

// Ctrl-C has to be answered within 0.2 s. Asking takes the GIL, for which a thread may have to wait 5 ms.
constexpr std::int64_t kPollMilliseconds = 50;

// ---- Waiting --------------------------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` does nothing on most cores; isb waits about as long as x86's pause
#endif
}

// At its end, what this thread has stored past the caches becomes visible before what it stores afterwards. Once a job,
// not once a piece, as the processor waits until memory has taken it all: 0.5 us. BN forward of 8 x 512 x 28 x 28,
// whose channels are 25 KB, 842 -> 627 us, 32 x 128 x 28 x 28 754 -> 723; backward of 8 x 512 x 28 x 28 1142 -> 1068.
class Streaming {
 public:
  explicit Streaming(bool possible) : possible_(possible) {}
  ~Streaming() {
#if defined(__x86_64__)
    if (possible_) __builtin_ia32_sfence();
#endif
  }
  Streaming(const Streaming&) = delete;
  Streaming& operator=(const Streaming&) = delete;

 private:
  [[maybe_unused]] bool possible_;
};

// Sleeps while word == value, until a wake-up or `nanoseconds` have passed (0: no limit); may return for no reason.
void futex_wait(Word& word, std::uint32_t value, long nanoseconds) {
  static_assert(sizeof(Word) == sizeof(std::uint32_t) && Word::is_always_lock_free);
  const timespec limit{0, nanoseconds};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nanoseconds > 0 ? &limit : nullptr, nullptr, 0);
}

void futex_wake(Word& word, int count) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }

// Looks at done() for kSpin and returns whether it became true. yielding: gives way to other threads now and then, and
// gives up at once when one of them took the CPU. For workers, which have nothing better to do than to make room; an
// owner on a busy machine does better asleep, since the kernel lets a woken thread run before one that yielded.
template <class Done>
bool spin(Done done, bool yielding) {
  if (done()) return true;
  const Clock::time_point start = Clock::now();
  Clock::time_point last = start;
  for (int i = 1;; ++i) {
    pause();
    if (done()) return true;
    if (i % 32 != 0) continue;  // 32 pauses: 0.4 us (Zen 4) to 1.5 us (Skylake); the clock: 0.03 us
    const Clock::time_point now = Clock::now();
    if (now - start >= kSpin) return done();
    if (yielding && now - last >= std::chrono::microseconds(10)) {
      std::this_thread::yield();
      last = Clock::now();
      if (last - now >= std::chrono::microseconds(10)) return done();  // a yield to nobody takes 0.3 us
    }
  }
}

// ---- This thread ----------------------------------------------------------------------------------------------------

struct ThisThread {
  bool worker;             // a pool thread: never asks the hook
  int depth;               // parallel_for calls it is inside of
  std::int64_t last_poll;  // when it last asked the hook, or began an operation
  std::int64_t last_look;  // when it last looked at the clock
};
thread_local ThisThread this_thread;

std::atomic<bool (*)()> interrupt_hook{nullptr};

// The coarse clock: 4 ms steps are fine for 50 ms, and it costs 5 ns where the exact one costs 25.
std::int64_t milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

// Asks the hook if it has not been asked for kPollMilliseconds.
bool stop_requested() {
  ThisThread& self = this_thread;
  bool (*const hook)() = interrupt_hook.load(std::memory_order_acquire);
  if (hook == nullptr || self.worker) return false;
  self.last_look = milliseconds();
  if (self.last_look - self.last_poll < kPollMilliseconds) return false;
  self.last_poll = self.last_look;
  return hook();
}

// Exists while this thread is inside a parallel_for. The time since the last poll runs on from one call to the next, as
// an operation may be thousands of short calls, and starts anew after a time without any.
class Inside {
 public:
  Inside() {
    ThisThread& self = this_thread;
    if (self.depth++ > 0 || interrupt_hook.load(std::memory_order_relaxed) == nullptr) return;
    const std::int64_t now = milliseconds();
    if (now - self.last_look >= kPollMilliseconds) self.last_poll = now;
    self.last_look = now;
  }
  ~Inside() { --this_thread.depth; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  bool nested() const { return this_thread.depth > 1; }
};

// ---- The pool -------------------------------------------------------------------------------------------------------

// The gate: job number << kTicketBits | tickets left. Numbers only keep a worker from entering one job twice, so that
// they wrap around harms nothing: at worst a worker misses a job, which its owner then does without it.
constexpr int kTicketBits = 10;
constexpr std::uint32_t kTickets = (1u << kTicketBits) - 1;
constexpr int kMaxThreads = static_cast<int>(kTickets) + 1;

// Never destroyed: a thread may still be in it at process exit, and a forked child leaves its parent's alone.
// Members shared by threads are on cache lines of their own, in pairs, as the prefetcher of x86 fetches pairs.
class Pool {
 public:
  // The pool of this process, made when first asked for; a forked child has none at first.
  static Pool& current();

  // One thread at a time owns the pool. False: it is taken.
  bool try_own() {
    return !owned_.load(std::memory_order_relaxed) && !owned_.exchange(true, std::memory_order_acquire);
  }

  // By the owner, which by this gives the pool up. threads: how many may take part, 2..kMaxThreads.
  void run(std::int64_t pieces, std::int64_t bytes, PieceFunction function, void* context, int threads);

  // Ends the workers, if there is a pool and it is not taken, and keeps it: calls that come later find it taken.
  static void stop_current();

  // In the child of a fork(): the pool is the parent's. Only pointers move, nothing in it is used any more.
  static void forked();

 private:
  class Turn;
  // Pieces [next, stop).
  struct alignas(128) Stretch {
    std::atomic<std::int64_t> next{0};
    std::int64_t stop = 0;
  };
  static std::uint32_t number(std::uint32_t gate) { return gate >> kTicketBits; }
  void start_workers(int count);
  void stop();
  void worker(int index, std::uint32_t seen);
  std::uint32_t next_job(std::uint32_t seen);
  void divide(std::int64_t pieces, int stretches);
  bool take_pieces(int index);
  void drop_pieces();
  void fail(std::exception_ptr error);
  bool worth_waking(std::int64_t bytes) const;
  void open(int tickets, bool wake);
  void close();
  bool wait_for_workers(bool polling);

  alignas(128) std::atomic<bool> owned_{false};
  std::vector<std::thread> workers_;  // owner only
  bool short_of_threads_ = false;     // owner only: the system refused one
  Clock::time_point last_job_{};      // owner only: when it ended
  int tickets_ = 0;                   // owner only: given out for this job
  Pool* abandoned_ = nullptr;         // the parent's pool, kept in reach so that it does not count as leaked

  alignas(128) Word gate_{0};
  alignas(128) Word sleeping_{0};  // workers that wait for a wake-up at gate_, or are about to
  std::atomic<bool> stopping_{false};

  alignas(128) PieceFunction function_ = nullptr;  // the job: written by the owner while the gate is closed
  void* context_ = nullptr;
  std::unique_ptr<Stretch[]> stretches_{new Stretch[1]};  // for every thread; a job uses the first stretch_count_
  int stretch_count_ = 0;
  std::exception_ptr error_;  // by the thread that set failed_

  alignas(128) std::atomic<bool> failed_{false};

  alignas(128) Word inside_{0};  // workers that entered, added by close(), less those that left; else below 0 or 0
  std::atomic<bool> owner_sleeping_{false};

  static std::atomic<Pool*> current_;
  static Pool* parents_;
};

std::atomic<Pool*> Pool::current_{nullptr};
Pool* Pool::parents_ = nullptr;

Pool& Pool::current() {
  Pool* pool = current_.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  Pool* made = new Pool;
  if (current_.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) return *made;
  delete made;  // another thread was first; this one never had workers
  return *pool;
}

void Pool::forked() {
  Pool* pool = current_.load(std::memory_order_relaxed);
  if (pool == nullptr) return;
  pool->abandoned_ = parents_;
  parents_ = pool;
  current_.store(nullptr, std::memory_order_relaxed);
}

void Pool::start_workers(int count) {
  if (static_cast<int>(workers_.size()) >= count || short_of_threads_) return;
  // Signals are for the program's own threads. Those that a fault raises in the thread itself stay open, since a
  // blocked one ends the process without its handler, and so does the profiler's.
  sigset_t blocked;
  sigset_t before;
  sigfillset(&blocked);
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT, SIGPROF}) sigdelset(&blocked, signal);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  try {
    const std::uint32_t seen = number(gate_.load(std::memory_order_relaxed));
    workers_.reserve(static_cast<std::size_t>(count));
    stretches_.reset(new Stretch[static_cast<std::size_t>(count) + 1]);
    while (static_cast<int>(workers_.size()) < count) {
      const int index = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, index, seen] { worker(index, seen); });
      pthread_setname_np(workers_.back().native_handle(), "lanenorm");
    }
  } catch (const std::exception&) {
    short_of_threads_ = true;  // out of threads or memory: do with those there are, and do not ask again
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// ---- A worker -------------------------------------------------------------------------------------------------------

// index: 1, 2, ...; the owner's is 0. seen: the number of the last job that is none of its business.
void Pool::worker(int index, std::uint32_t seen) {
  this_thread.worker = true;
  this_thread.depth = 1;  // whatever runs here runs inside of a parallel_for
  const FloatEnvironment environment;
  for (;;) {
    std::uint32_t gate = next_job(seen);
    seen = number(gate);
    if (stopping_.load(std::memory_order_acquire)) return;
    while ((gate & kTickets) > 0 && number(gate) == seen) {
      // Taking the ticket makes the job's description visible (release by open, acquire here).
      if (!gate_.compare_exchange_weak(gate, gate - 1, std::memory_order_acq_rel)) continue;
      try {
        take_pieces(index);
      } catch (...) {
        fail(std::current_exception());
      }
      // Only after close() can this reach 0. From here on the pool may be at its next job.
      if (inside_.fetch_sub(1, std::memory_order_seq_cst) == 1 && owner_sleeping_.load(std::memory_order_seq_cst)) {
        futex_wake(inside_, 1);
      }
      break;
    }
  }
}

// Waits for a job with another number than `seen` and returns the gate.
std::uint32_t Pool::next_job(std::uint32_t seen) {
  std::uint32_t gate = seen << kTicketBits;
  const auto arrived = [&] {
    gate = gate_.load(std::memory_order_acquire);
    return number(gate) != seen;
  };
  if (spin(arrived, true)) return gate;
  // Either open() sees this count and wakes us, or we see its gate: both sides write first, then read (seq_cst).
  sleeping_.fetch_add(1, std::memory_order_seq_cst);
  while (!arrived()) futex_wait(gate_, gate, 0);
  sleeping_.fetch_sub(1, std::memory_order_relaxed);
  return gate;
}

// Runs pieces until there are none, those of its own stretch first. True: the hook (asked on the owner's thread only)
// said stop.
bool Pool::take_pieces(int index) {
  const Streaming streaming(true);
  for (int i = 0; i < stretch_count_; ++i) {
    Stretch& stretch = stretches_[(index + i) % stretch_count_];
    for (;;) {
      const std::int64_t piece = stretch.next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= stretch.stop) break;
      function_(context_, piece);
      if (stop_requested()) return true;
    }
  }
  return false;
}

void Pool::drop_pieces() {
  for (int i = 0; i < stretch_count_; ++i) stretches_[i].next.store(stretches_[i].stop, std::memory_order_relaxed);
}

void Pool::fail(std::exception_ptr error) {
  drop_pieces();
  if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::move(error);
}

// ---- The owner ------------------------------------------------------------------------------------------------------

// A lone job of 200 KB (10 us) never gets back what a wake-up costs. But where a job comes less than kSpin after the
// one before, so will the next, and find the workers still looking. (Workers that are awake join a job of any size.)
bool Pool::worth_waking(std::int64_t bytes) const { return bytes >= kWakeBytes || Clock::now() - last_job_ < kSpin; }

void Pool::open(int tickets, bool wake) {
  tickets_ = tickets;
  const std::uint32_t job = number(gate_.load(std::memory_order_relaxed)) + 1;
  gate_.store(job << kTicketBits | static_cast<std::uint32_t>(tickets), std::memory_order_seq_cst);
  if (!wake) return;
  // Workers that are awake are looking at the gate; wake as many of the others as there are tickets left over.
  const int asleep = static_cast<int>(sleeping_.load(std::memory_order_seq_cst));
  const int awake = static_cast<int>(workers_.size()) - asleep;
  if (tickets > awake) futex_wake(gate_, tickets - awake);
}

void Pool::close() {
  const std::uint32_t gate = gate_.fetch_and(~kTickets, std::memory_order_acq_rel);
  inside_.fetch_add(static_cast<std::uint32_t>(tickets_) - (gate & kTickets), std::memory_order_acq_rel);
}

// After close(). True: the hook said stop; then the pieces are dropped, and waited for all the same.
bool Pool::wait_for_workers(bool polling) {
  const auto gone = [&] { return inside_.load(std::memory_order_acquire) == 0; };
  if (spin(gone, false)) return false;
  bool stop = false;
  while (!gone()) {
    owner_sleeping_.store(true, std::memory_order_seq_cst);
    const std::uint32_t inside = inside_.load(std::memory_order_seq_cst);
    if (inside != 0) futex_wait(inside_, inside, kPollMilliseconds * 1000000);
    owner_sleeping_.store(false, std::memory_order_relaxed);
    if (polling && !stop && stop_requested()) {
      stop = true;
      drop_pieces();
    }
    if (current_.load(std::memory_order_relaxed) != this) break;  // the hook called fork(): no workers in this process
  }
  return stop;
}

// An open job. However the owner leaves it, also when the hook ends the thread, the workers leave first: what they work
// on lies on the owner's stack.
class Pool::Turn {
 public:
  Turn(Pool& pool, int tickets, bool wake) : pool_(pool) { pool_.open(tickets, wake); }
  ~Turn() {
    if (!closed_) {
      pool_.drop_pieces();
      pool_.close();
    }
    pool_.wait_for_workers(false);
    pool_.error_ = nullptr;
    pool_.last_job_ = Clock::now();
    pool_.owned_.store(false, std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  void close() {
    pool_.close();
    closed_ = true;
  }

 private:
  Pool& pool_;
  bool closed_ = false;
};

// While the gate is closed. The first stretches are the longer ones.
void Pool::divide(std::int64_t pieces, int stretches) {
  const std::int64_t each = pieces / stretches, longer = pieces % stretches;
  std::int64_t first = 0;
  for (int i = 0; i < stretches; ++i) {
    stretches_[i].next.store(first, std::memory_order_relaxed);
    first += each + (i < longer ? 1 : 0);
    stretches_[i].stop = first;
  }
  stretch_count_ = stretches;
}

void Pool::run(std::int64_t pieces, std::int64_t bytes, PieceFunction function, void* context, int threads) {
  const bool wake = worth_waking(bytes);
  if (wake) start_workers(threads - 1);
  function_ = function;
  context_ = context;
  const int tickets = std::min(threads - 1, static_cast<int>(workers_.size()));
  divide(pieces, tickets + 1);
  failed_.store(false, std::memory_order_relaxed);
  bool stop = false;
  std::exception_ptr error;
  {
    Turn turn(*this, tickets, wake);
    try {
      stop = take_pieces(0);
    } catch (...) {
      std::exception_ptr thrown = std::current_exception();
      if (!thrown) throw;  // not C++: pthread_exit in the hook, and the process ends if that is kept from unwinding
      fail(std::move(thrown));
    }
    if (stop) drop_pieces();
    turn.close();
    stop = wait_for_workers(!stop) || stop;
    error = std::move(error_);
    if (current_.load(std::memory_order_relaxed) != this && !stop && !error) {
      error = std::make_exception_ptr(std::runtime_error(
          "lanenorm: fork() inside a call: pieces that other threads were at are lost in the child"));
    }
  }
  if (stop) throw Interrupted();
  if (error) std::rethrow_exception(error);
}

// ---- Process --------------------------------------------------------------------------------------------------------

void Pool::stop_current() {
  Pool* pool = current_.load(std::memory_order_acquire);
  // If it is taken, somebody is at work (a daemon thread of Python), and process exit does not wait for them.
  if (pool != nullptr && pool->try_own()) pool->stop();
}

void Pool::stop() {
  stopping_.store(true, std::memory_order_release);
  gate_.store((number(gate_.load(std::memory_order_relaxed)) + 1) << kTicketBits, std::memory_order_seq_cst);
  futex_wake(gate_, INT_MAX);
  for (std::thread& worker : workers_) worker.join();
}

// Lives as long as this library is loaded: from the start of the program or dlopen to exit or dlclose. Its destructor
// ends the workers, since after dlclose there is no code for them to run.
struct Loaded {
  Loaded() {
    pthread_atfork(nullptr, nullptr, [] { Pool::forked(); });
  }
  ~Loaded() { Pool::stop_current(); }
} loaded;

std::atomic<int> thread_count_setting{0};  // 0: not decided yet

}  // namespace

// ---- Public ---------------------------------------------------------------------------------------------------------

int get_num_threads() {
  int count = thread_count_setting.load(std::memory_order_relaxed);
  if (count > 0) return count;
  const int decided = thread_count::default_num_threads();
  return thread_count_setting.compare_exchange_strong(count, decided, std::memory_order_relaxed) ? decided : count;
}

int set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("set_num_threads: n is " + std::to_string(n) + ", expected an integer >= 1");
  get_num_threads();  // decides the previous count, or throws before anything has changed
  return thread_count_setting.exchange(n, std::memory_order_relaxed);
}

void set_interrupt_hook(bool (*hook)()) { interrupt_hook.store(hook, std::memory_order_release); }

void run_pieces(std::int64_t pieces, std::int64_t bytes, PieceFunction function, void* context) {
  const int available = std::min(get_num_threads(), kMaxThreads);
  if (pieces <= 0) return;
  const FloatEnvironment environment;
  const Inside inside;
  if (pieces > 1 && bytes >= kSerialBytes && available > 1 && !inside.nested()) {
    const std::int64_t worth = std::min(pieces, bytes / kBytesPerThread);
    Pool& pool = Pool::current();
    if (pool.try_own()) {
      pool.run(pieces, bytes, function, context, static_cast<int>(std::min<std::int64_t>(available, worth)));
      return;
    }
  }
  const Streaming streaming(bytes >= kSerialBytes);
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    function(context, piece);
    if (stop_requested()) throw Interrupted();
  }
}

}  // namespace lanenorm
