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
// One file, longer than others, so that it builds against an installed lanenorm with nothing beside it.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <lanenorm/lanenorm.hpp>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using lanenorm::ArrayView;
using lanenorm::Dims;
using lanenorm::DType;

constexpr double kEps = 1e-5;

// ---- Problems ----------------------------------------------------------------------------------------------------

enum class Norm { layer, batch };

// Memory order is (outer, slices, inner) for both norms and layouts; a slice has one mean. A parameter belongs to a
// position within the row (layer norm) or to a slice (batch norm).
struct Problem {
  std::string name;  // as it appears in benchmark names: family/shape[/channels-last]
  Norm norm;
  std::vector<std::int64_t> shape;
  bool channels_last;
  std::vector<DType> dtypes;
  std::int64_t outer, slices, inner;

  std::int64_t count() const { return outer * slices * inner; }
  std::int64_t per_slice() const { return outer * inner; }
  std::int64_t parameters() const { return norm == Norm::layer ? inner : slices; }
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool parse_dtypes(const std::string& text, std::vector<DType>* dtypes) {
  for (const std::string& name : split(text, ',')) {
    bool known = false;
    for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
      if (name != lanenorm::name(dtype)) continue;
      dtypes->push_back(dtype);
      known = true;
    }
    if (!known) return false;
  }
  return true;
}

// One line of problems.txt, whose head says what it consists of.
Problem parse_problem(const std::string& line) {
  std::istringstream words(line);
  std::string family, norm, shape;
  words >> family >> norm >> shape;
  Problem problem{family + "/" + shape, norm == "layer_norm" ? Norm::layer : Norm::batch, {}, false, {}, 1, 1, 1};
  if (norm != "layer_norm" && norm != "batch_norm") throw std::invalid_argument("unknown norm in: " + line);
  for (const std::string& length : split(shape, 'x')) problem.shape.push_back(std::stoll(length));
  for (std::string word; words >> word;) {
    if (word == "channels-last") {
      problem.channels_last = true;
    } else if (word != "channels-first" && !parse_dtypes(word, &problem.dtypes)) {
      throw std::invalid_argument("'" + word + "' is neither a layout nor a list of dtypes in: " + line);
    }
  }
  const std::vector<std::int64_t>& n = problem.shape;
  if (n.size() != 2 && !(n.size() == 4 && problem.norm == Norm::batch)) {
    throw std::invalid_argument("bad shape in: " + line);
  }
  if (problem.dtypes.empty()) problem.dtypes = {DType::float32};
  if (problem.channels_last) problem.name += "/channels-last";
  const std::int64_t plane = n.size() == 4 ? n[2] * n[3] : 1;
  if (problem.norm == Norm::layer) {
    problem.slices = n[0], problem.inner = n[1];
  } else {
    problem.outer = n[0], problem.slices = n[1];
    (problem.channels_last ? problem.outer : problem.inner) *= plane;
  }
  return problem;
}

std::vector<Problem> read_problems(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument("--problems: cannot read '" + path + "'");
  std::vector<Problem> problems;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(" \t\r") != std::string::npos) problems.push_back(parse_problem(line));
  }
  return problems;
}

// ---- Data --------------------------------------------------------------------------------------------------------

double load(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::float64: return static_cast<const double*>(data)[i];
    case DType::float32: return static_cast<double>(static_cast<const float*>(data)[i]);
    case DType::bfloat16: {
      const std::uint32_t bits = std::uint32_t{static_cast<const lanenorm::BFloat16*>(data)[i].bits} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return static_cast<double>(value);
    }
    case DType::float16: break;
  }
  const unsigned bits = static_cast<const lanenorm::Float16*>(data)[i].bits;
  const int exponent = static_cast<int>(bits >> 10 & 31u), mantissa = static_cast<int>(bits & 1023u);
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? HUGE_VAL
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// value has at most 8 significant bits and is 0 or between 2^-13 and 4: exact in every dtype.
void store(double value, void* data, DType dtype, std::int64_t i) {
  const auto single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  switch (dtype) {
    case DType::float64: static_cast<double*>(data)[i] = value; return;
    case DType::float32: static_cast<float*>(data)[i] = single; return;
    case DType::bfloat16: static_cast<lanenorm::BFloat16*>(data)[i] = {static_cast<std::uint16_t>(bits >> 16)}; return;
    case DType::float16: break;
  }
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t half = (bits >> 16 & 0x8000u) | (magnitude == 0 ? 0u : (magnitude - (112u << 23)) >> 13);
  static_cast<lanenorm::Float16*>(data)[i] = {static_cast<std::uint16_t>(half)};
}

// 64-byte aligned memory; filled, so that its pages are there before anything is timed.
class Memory {
 public:
  Memory(DType dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count * lanenorm::size(dtype))) {
    data_.reset(std::aligned_alloc(64, (bytes_ + 127) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes_);
  }
  // Multiples of 1/64 in [low, low + 4), uniform.
  Memory& fill(std::uint64_t seed, double low) {
    const std::int64_t count = static_cast<std::int64_t>(bytes_) / lanenorm::size(dtype_);
    for (std::int64_t i = 0; i < count; ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      store(low + static_cast<double>(seed >> 56) / 64.0, data_.get(), dtype_, i);
    }
    return *this;
  }
  double operator[](std::int64_t i) const { return load(data_.get(), dtype_, i); }
  void* data() const { return data_.get(); }
  DType dtype() const { return dtype_; }
  std::size_t bytes() const { return bytes_; }
  ArrayView view(const Dims& shape) const { return ArrayView(data_.get(), dtype_, shape); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  DType dtype_;
  std::size_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// The arrays of a problem in one dtype, and what double arithmetic says about its slices.
struct Data {
  Data(const Problem& problem, DType dtype)
      : problem(problem),
        dtype(dtype),
        statistics(lanenorm::statistics_dtype(dtype)),
        parameter(lanenorm::size(dtype) == 2 ? DType::float32 : dtype),
        x(dtype, problem.count()),
        dy(dtype, problem.count()),
        out(dtype, problem.count()),
        weight(parameter, problem.parameters()),
        bias(parameter, problem.parameters()),
        mean(statistics, problem.slices),
        rstd(statistics, problem.slices),
        running_mean(statistics, problem.slices),
        running_var(statistics, problem.slices),
        dweight(parameter, problem.parameters()),
        dbias(parameter, problem.parameters()) {
    x.fill(1, -1.5);
    dy.fill(2, -2.0);
    weight.fill(3, 0.5);
    bias.fill(4, -2.0);
    running_mean.fill(5, -2.0);
    running_var.fill(6, 0.5);
    reference();
  }

  // f(index of the element, its slice, its parameter) in memory order
  template <class F>
  void for_each(F f) const {
    const bool by_slice = problem.norm == Norm::batch;
    std::int64_t i = 0;
    for (std::int64_t o = 0; o < problem.outer; ++o) {
      for (std::int64_t s = 0; s < problem.slices; ++s) {
        for (std::int64_t k = 0; k < problem.inner; ++k, ++i) f(i, s, by_slice ? s : k);
      }
    }
  }

  ArrayView tensor(const Memory& memory) const {
    if (!problem.channels_last || problem.shape.size() == 2) return memory.view(problem.shape);
    const std::vector<std::int64_t>& n = problem.shape;
    const std::int64_t s = lanenorm::size(dtype);
    return ArrayView(memory.data(), dtype, n, {n[1] * n[2] * n[3] * s, s, n[1] * n[3] * s, n[1] * s});
  }
  ArrayView statistic(const Memory& memory) const {
    return problem.norm == Norm::layer ? memory.view({problem.slices, 1}) : memory.view({problem.slices});
  }
  ArrayView vector(const Memory& memory) const { return memory.view({problem.parameters()}); }

  Problem problem;
  DType dtype, statistics, parameter;
  Memory x, dy, out, weight, bias, mean, rstd, running_mean, running_var, dweight, dbias;
  std::vector<double> true_mean, true_rstd;

 private:
  void reference() {
    const auto slices = static_cast<std::size_t>(problem.slices);
    const auto n = static_cast<long double>(problem.per_slice());
    std::vector<long double> sum(slices), m2(slices);
    for_each([&](auto i, auto s, auto) { sum[static_cast<std::size_t>(s)] += x[i]; });
    for (long double& value : sum) value /= n;
    for_each([&](auto i, auto s, auto) {
      const long double d = x[i] - sum[static_cast<std::size_t>(s)];
      m2[static_cast<std::size_t>(s)] += d * d;
    });
    for (std::size_t s = 0; s < slices; ++s) {
      true_mean.push_back(static_cast<double>(sum[s]));
      true_rstd.push_back(static_cast<double>(1 / std::sqrt(m2[s] / n + static_cast<long double>(kEps))));
    }
  }
};

// ---- Operations and their checks -----------------------------------------------------------------------------------

// Compares results with what was expected; remembers the first that is too far off.
class Checker {
 public:
  // scale: of what is summed and rounded on the way, to which the error is relative.
  void compare(const char* name, const Memory& got, std::int64_t i, double expected, double scale) {
    if (!error_.empty()) return;
    // README: at most 8u, here with room for a weight and a bias; then one rounding to the dtype.
    const double u = got.dtype() == DType::float64 ? 0x1p-53 : 0x1p-24;
    const double rounding = got.dtype() == DType::float16 ? 0x1p-11 : got.dtype() == DType::bfloat16 ? 0x1p-8 : 0.0;
    const double tolerance = 16 * u * scale + rounding * std::fabs(expected) * 1.01 + 0x1p-24 * rounding;
    if (std::fabs(got[i] - expected) <= tolerance) return;
    std::ostringstream text;
    text.precision(10);
    text << name << "[" << i << "] is " << got[i] << ", expected " << expected << " within " << tolerance;
    error_ = text.str();
  }
  const std::string& error() const { return error_; }

 private:
  std::string error_;
};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

void check_y(const Data& d, const std::vector<double>& mean, const std::vector<double>& rstd, Checker* checker) {
  d.for_each([&](auto i, auto s, auto p) {
    const double normalized = (d.x[i] - mean[at(s)]) * rstd[at(s)];
    const double scale = std::max(1.0, std::fabs(normalized)) * std::fabs(d.weight[p]) + std::fabs(d.bias[p]);
    checker->compare("y", d.out, i, normalized * d.weight[p] + d.bias[p], scale);
  });
}

void check_forward(const Data& d, Checker* checker) { check_y(d, d.true_mean, d.true_rstd, checker); }

void check_statistics(const Data& d, Checker* checker) {
  check_forward(d, checker);
  for (std::int64_t s = 0; s < d.problem.slices; ++s) {
    checker->compare("mean", d.mean, s, d.true_mean[at(s)], 4.0);
    checker->compare("rstd", d.rstd, s, d.true_rstd[at(s)], d.true_rstd[at(s)]);
  }
}

void check_inference(const Data& d, Checker* checker) {
  std::vector<double> mean, rstd;
  for (std::int64_t s = 0; s < d.problem.slices; ++s) {
    mean.push_back(d.running_mean[s]);
    rstd.push_back(1 / std::sqrt(d.running_var[s] + kEps));
  }
  check_y(d, mean, rstd, checker);
}

void check_backward(const Data& d, Checker* checker) {
  const std::size_t slices = at(d.problem.slices), parameters = at(d.problem.parameters());
  std::vector<long double> g_sum(slices), gx_sum(slices), dweight(parameters), dbias(parameters);
  std::vector<double> largest(slices, 1.0), dweight_terms(parameters), dbias_terms(parameters);
  d.for_each([&](auto i, auto s, auto p) {
    const double normalized = (d.x[i] - d.true_mean[at(s)]) * d.true_rstd[at(s)], dy = d.dy[i];
    const double g = dy * d.weight[p];
    g_sum[at(s)] += g;
    gx_sum[at(s)] += g * normalized;
    largest[at(s)] = std::max(largest[at(s)], std::fabs(g));
    dweight[at(p)] += dy * normalized;
    dweight_terms[at(p)] += std::fabs(dy) * std::max(1.0, std::fabs(normalized));
    dbias[at(p)] += dy;
    dbias_terms[at(p)] += std::fabs(dy);
  });
  const auto n = static_cast<long double>(d.problem.per_slice());
  d.for_each([&](auto i, auto s, auto p) {
    const double rstd = d.true_rstd[at(s)], normalized = (d.x[i] - d.true_mean[at(s)]) * rstd;
    const double g_average = static_cast<double>(g_sum[at(s)] / n), gx_average = static_cast<double>(gx_sum[at(s)] / n);
    const double dx = rstd * (d.dy[i] * d.weight[p] - g_average - normalized * gx_average);
    checker->compare("dx", d.out, i, dx, rstd * largest[at(s)]);
  });
  for (std::int64_t p = 0; p < d.problem.parameters(); ++p) {
    checker->compare("dweight", d.dweight, p, static_cast<double>(dweight[at(p)]), dweight_terms[at(p)]);
    checker->compare("dbias", d.dbias, p, static_cast<double>(dbias[at(p)]), dbias_terms[at(p)]);
  }
}

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

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
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
