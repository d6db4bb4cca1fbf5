// Times every operation through the public C++ interface, on the problems of problems.txt.
//
//   bench_cpu [--isa=best|all|NAME,...] [--threads=1,all] [--problems=FILE] [--benchmark_filter=REGEX] ...
//
// A case is operation x problem x dtype x ISA x threads; --benchmark_* are Google Benchmark's. Before a case is timed
// its result is compared with plain double arithmetic: a wrong one is an error, and the exit code is 1. Outputs are
// allocated once: what fresh memory costs is not in these numbers. With a 16-bit x, parameters are float32.
//
// Columns: Time per call; GB/s by the byte model (bytes a call has to move at least); share_of_copy: the median time
// over that of a memcpy of the same array, the two taken by turns; median_us, p10_us, p90_us over those turns.
//
// Longer than other files, so that it builds against an installed lanenorm with nothing but problems.hpp beside it.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <lanenorm/lanenorm.hpp>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "problems.hpp"

namespace {

using namespace bench;

// ---- Operations --------------------------------------------------------------------------------------------------

struct Operation {
  const char* name;
  Norm norm;
  int passes;  // over an array, read or written, at least: bytes = passes * elements * size
  void (*prepare)(Data&);
  std::function<void()> (*call)(Data&);  // with all Views made beforehand
  void (*check)(const Data&, Checker*);
};

// Views and call of one operation; what is captured by value lives as long as the function.
std::function<void()> layer_norm_call(Data& d) {
  return [x = d.tensor(d.x), w = std::optional(d.vector(d.weight)), b = std::optional(d.vector(d.bias)),
          y = d.tensor(d.out)] { lanenorm::layer_norm(x, w, b, y); };
}
std::function<void()> layer_norm_forward_call(Data& d) {
  return [x = d.tensor(d.x), w = std::optional(d.vector(d.weight)), b = std::optional(d.vector(d.bias)),
          y = d.tensor(d.out), mean = d.statistic(d.mean),
          rstd = d.statistic(d.rstd)] { lanenorm::layer_norm_forward(x, w, b, y, mean, rstd); };
}
std::function<void()> layer_norm_backward_call(Data& d) {
  return [dy = d.tensor(d.dy), x = d.tensor(d.x), mean = d.statistic(d.mean), rstd = d.statistic(d.rstd),
          w = std::optional(d.vector(d.weight)), dx = d.tensor(d.out), dweight = std::optional(d.vector(d.dweight)),
          dbias = std::optional(d.vector(d.dbias))] {
    lanenorm::layer_norm_backward(dy, x, mean, rstd, w, dx, dweight, dbias);
  };
}
std::function<void()> batch_norm_call(Data& d) {
  return [x = d.tensor(d.x), m = d.statistic(d.running_mean), v = d.statistic(d.running_var),
          w = std::optional(d.vector(d.weight)), b = std::optional(d.vector(d.bias)),
          y = d.tensor(d.out)] { lanenorm::batch_norm(x, m, v, w, b, y); };
}
std::function<void()> batch_norm_forward_call(Data& d) {
  return [x = d.tensor(d.x), w = std::optional(d.vector(d.weight)), b = std::optional(d.vector(d.bias)),
          y = d.tensor(d.out), mean = d.statistic(d.mean), rstd = d.statistic(d.rstd)] {
    lanenorm::batch_norm_forward(x, w, b, std::nullopt, std::nullopt, y, mean, rstd);
  };
}
std::function<void()> batch_norm_backward_call(Data& d) {
  return [dy = d.tensor(d.dy), x = d.tensor(d.x), mean = d.statistic(d.mean), rstd = d.statistic(d.rstd),
          w = std::optional(d.vector(d.weight)), dx = d.tensor(d.out), dweight = std::optional(d.vector(d.dweight)),
          dbias = std::optional(d.vector(d.dbias))] {
    lanenorm::batch_norm_backward(dy, x, mean, rstd, w, dx, dweight, dbias);
  };
}

void nothing(Data&) {}

// Passes: read x, write y; read x and dy, write dx. Batch norm's forward has to read x a second time where a channel
// does not fit the cache; that is counted as its own cost, not as bytes it has to move.
const Operation kOperations[] = {
    {"layer_norm", Norm::layer, 2, nothing, layer_norm_call, check_forward},
    {"layer_norm_forward", Norm::layer, 2, nothing, layer_norm_forward_call, check_statistics},
    {"layer_norm_backward", Norm::layer, 3, [](Data& d) { layer_norm_forward_call(d)(); }, layer_norm_backward_call,
     check_backward},
    {"batch_norm", Norm::batch, 2, nothing, batch_norm_call, check_inference},
    {"batch_norm_forward", Norm::batch, 2, nothing, batch_norm_forward_call, check_statistics},
    {"batch_norm_backward", Norm::batch, 3, [](Data& d) { batch_norm_forward_call(d)(); }, batch_norm_backward_call,
     check_backward},
};

// ---- The copy beside it ------------------------------------------------------------------------------------------

// memcpy of an array in equal shares by several threads, which sleep in between.
class CopyTeam {
 public:
  explicit CopyTeam(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~CopyTeam() {
    start(nullptr, nullptr, 0);
    for (std::thread& worker : workers_) worker.join();
  }
  CopyTeam(const CopyTeam&) = delete;
  CopyTeam& operator=(const CopyTeam&) = delete;

  void copy(void* to, const void* from, std::size_t bytes) {
    left_.store(threads_ - 1, std::memory_order_relaxed);
    if (threads_ > 1) start(to, from, bytes);
    share(to, from, bytes, 0);
    while (left_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

 private:
  void start(void* to, const void* from, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    to_ = to, from_ = from, bytes_ = bytes;
    ++round_;
    wake_.notify_all();
  }
  void share(void* to, const void* from, std::size_t bytes, int i) const {
    const std::size_t lines = (bytes + 63) / 64, n = static_cast<std::size_t>(threads_),
                      k = static_cast<std::size_t>(i);
    const std::size_t begin = lines * k / n * 64, end = std::min(bytes, lines * (k + 1) / n * 64);
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
  }
  void work(int i) {
    for (std::uint64_t seen = 0;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      void* to = to_;
      const void* from = from_;
      const std::size_t bytes = bytes_;
      lock.unlock();
      if (to == nullptr) return;
      share(to, from, bytes, i);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::uint64_t round_ = 0;
  void* to_ = nullptr;
  const void* from_ = nullptr;
  std::size_t bytes_ = 0;
  std::atomic<int> left_{0};
  std::vector<std::thread> workers_;
};

// ---- Timing ------------------------------------------------------------------------------------------------------

double seconds_of(const std::function<void()>& f, std::int64_t times) {
  const auto start = std::chrono::steady_clock::now();
  for (std::int64_t i = 0; i < times; ++i) f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The data of the case that runs: cases come problem by problem, and the large ones do not fit memory all at once.
Data& data_of(const Problem& problem, DType dtype) {
  static std::unique_ptr<Data> data;
  if (data == nullptr || data->problem.name != problem.name || data->dtype != dtype) {
    data.reset();
    data = std::make_unique<Data>(problem, dtype);
  }
  return *data;
}

bool failed = false;

// One case. Google Benchmark calls it several times, with more iterations each time.
struct Case {
  const Operation* operation;
  const Problem* problem;
  DType dtype;
  std::string isa;
  int threads;
  bool checked = false;

  void operator()(benchmark::State& state) {
    try {
      lanenorm::use_isa(isa);
      lanenorm::set_num_threads(threads);
      run(data_of(*problem, dtype), state);
    } catch (const std::exception& error) {
      failed = true;
      state.SkipWithError(error.what());
    }
  }

  void run(Data& data, benchmark::State& state) {
    operation->prepare(data);
    const std::function<void()> call = operation->call(data);
    call();
    if (!checked) {
      Checker checker;
      operation->check(data, &checker);
      if (!checker.error().empty()) throw std::runtime_error(checker.error());
      checked = true;
    }

    // By turns of about a millisecond: calls, and copies of x over the output. The copy has as many threads as the
    // call, or one where that is faster (waking threads costs more than a small array).
    std::memset(data.out.data(), 0, data.out.bytes());
    CopyTeam team(threads), alone(1);
    const auto copy_by = [&](CopyTeam& who) {
      return [&] { who.copy(data.out.data(), data.x.data(), data.x.bytes()); };
    };
    const std::function<void()> copy_team = copy_by(team), copy_alone = copy_by(alone);
    const auto turn_of = [](const std::function<void()>& f) {
      f();
      return std::max<std::int64_t>(1, static_cast<std::int64_t>(1e-3 / std::max(1e-9, seconds_of(f, 1))));
    };
    const std::int64_t calls = turn_of(call), copies = turn_of(copy_alone);
    std::vector<double> call_times, team_times, alone_times;
    const auto per_run = [](std::vector<double>* times, const std::function<void()>& f, std::int64_t count) {
      times->push_back(seconds_of(f, count) / static_cast<double>(count));
    };
    while (state.KeepRunningBatch(calls)) {
      per_run(&call_times, call, calls);
      state.PauseTiming();
      per_run(&alone_times, copy_alone, copies);
      if (threads > 1) per_run(&team_times, copy_team, copies);
      state.ResumeTiming();
    }

    const double median = quantile(call_times, 0.5), bytes = operation->passes * static_cast<double>(data.x.bytes());
    double copy = quantile(alone_times, 0.5);
    if (threads > 1) copy = std::min(copy, quantile(team_times, 0.5));
    state.counters["GB/s"] = bytes / median * 1e-9;
    state.counters["share_of_copy"] = median / copy;
    state.counters["median_us"] = median * 1e6;
    state.counters["p10_us"] = quantile(call_times, 0.1) * 1e6;
    state.counters["p90_us"] = quantile(call_times, 0.9) * 1e6;
    state.counters["copy_us"] = copy * 1e6;
  }
};

// ---- Command line ------------------------------------------------------------------------------------------------

constexpr char kUsage[] =
    "bench_cpu: the operations of lanenorm\n"
    "          [--isa=best|all|NAME,...]    instruction sets; default best\n"
    "          [--threads=N|all,...]        default 1,all\n"
    "          [--problems=FILE]            default " LANENORM_PROBLEMS
    "\n"
    "and Google Benchmark's own:\n\n";

struct Flags {
  std::string isa = "best", threads = "1,all", problems = LANENORM_PROBLEMS;

  // Takes its own flags out of the arguments.
  void take(int* argc, char** argv) {
    const struct {
      const char* name;
      std::string* value;
    } own[] = {{"--isa=", &isa}, {"--threads=", &threads}, {"--problems=", &problems}};
    int kept = 1;
    for (int i = 1; i < *argc; ++i) {
      bool taken = false;
      for (const auto& flag : own) {
        if (std::strncmp(argv[i], flag.name, std::strlen(flag.name)) != 0) continue;
        *flag.value = argv[i] + std::strlen(flag.name);
        taken = true;
      }
      if (std::strcmp(argv[i], "--help") == 0) std::fputs(kUsage, stdout);
      if (!taken) argv[kept++] = argv[i];
    }
    argv[kept] = nullptr;
    *argc = kept;
  }

  std::vector<std::string> isas() const {
    const std::vector<std::string> available = lanenorm::available_isas();
    if (isa == "all") return available;
    if (isa == "best") return {available.front()};
    for (const std::string& name : split(isa, ',')) lanenorm::use_isa(name);  // refuses what is unknown
    return split(isa, ',');
  }
  std::vector<int> thread_counts() const {
    std::vector<int> counts;
    for (const std::string& word : split(threads, ',')) {
      char* end = nullptr;
      const long n = word == "all" ? lanenorm::get_num_threads() : std::strtol(word.c_str(), &end, 10);
      if (n < 1 || (end != nullptr && *end != '\0')) {
        throw std::invalid_argument("--threads: '" + word + "' is neither a number >= 1 nor all");
      }
      if (std::find(counts.begin(), counts.end(), n) == counts.end()) counts.push_back(static_cast<int>(n));
    }
    return counts;
  }
};

void register_cases(const std::vector<Problem>& problems, const Flags& flags) {
  const std::vector<std::string> isas = flags.isas();
  const std::vector<int> threads = flags.thread_counts();
  for (const Problem& problem : problems) {
    for (const DType dtype : problem.dtypes) {
      for (const Operation& operation : kOperations) {
        if (operation.norm != problem.norm) continue;
        for (const std::string& isa : isas) {
          for (const int n : threads) {
            const std::string name = std::string(operation.name) + "/" + problem.name + "/" + lanenorm::name(dtype) +
                                     "/" + isa + "/" + std::to_string(n) + "threads";
            // The benchmark object is copied; what the case has learned must outlive its calls.
            auto one = std::make_shared<Case>(Case{&operation, &problem, dtype, isa, n});
            benchmark::RegisterBenchmark(name.c_str(), [one](benchmark::State& state) { (*one)(state); })
                ->UseRealTime()
                ->Unit(benchmark::kMicrosecond);
          }
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) try {
  Flags flags;
  flags.take(&argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  const std::vector<Problem> problems = read_problems(flags.problems);
  register_cases(problems, flags);
  benchmark::AddCustomContext("lanenorm", lanenorm::version());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return failed ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "bench_cpu: %s\n", error.what());
  return 2;
}
