// Times batch and layer normalization on the GPU, on the problems of problems.txt.
//
//   bench_cuda [--device=N] [--cache=cold,warm] [--problems=FILE] [--benchmark_filter=REGEX] ...
//
// A case is operation x problem x dtype x state of the L2 cache; --benchmark_* are Google Benchmark's. Before a case is
// timed its result is compared with plain double arithmetic: a wrong one is an error, and the exit code is 1.
//
// Calls are captured into a graph, so that Time is that of the kernels and not of launching them; CUDA events stand
// around a graph of many calls. warm: all calls work on the same arrays, which stay in the L2 cache where they fit.
// cold: by turns on as many copies of the arrays as make three times that cache; arrays of 1 MB and more.
//
// Columns: Time per call; GB/s by the byte model (bytes a call has to move at least); share_of_copy: the median time
// over that of copying x, by the faster of a kernel and cudaMemcpyAsync, in a graph and a state of the cache as the
// call, the three by turns; share_of_bandwidth: GB/s over those of that copy, which reads and writes; median_us,
// p10_us, p90_us over those turns; host_us: what a call costs without a graph, in a row of calls. share_of_streaming:
// as share_of_bandwidth, were x (and dy) read twice: 3 and 5 passes in place of 2 and 3.
//
// Longer than 300 lines because a case is followed here from its arrays to its columns.
#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "cuda/norms.hpp"
#include "problems.hpp"

namespace {

using namespace bench;

// ---- The GPU -----------------------------------------------------------------------------------------------------

void check(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// Device memory of its own.
class Block {
 public:
  explicit Block(std::size_t bytes) : bytes_(bytes) {
    check("cudaMalloc", cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)));
  }
  ~Block() { cudaFree(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// The device side of an array of the host.
class Mirror {
 public:
  explicit Mirror(const Memory& host) : host_(host), block_(host.bytes()) { upload(); }
  void upload() { check("cudaMemcpy", cudaMemcpy(block_.data(), host_.data(), host_.bytes(), cudaMemcpyHostToDevice)); }
  void download() const {
    check("cudaMemcpy", cudaMemcpy(host_.data(), block_.data(), host_.bytes(), cudaMemcpyDeviceToHost));
  }
  void* data() const { return block_.data(); }

 private:
  const Memory& host_;
  Block block_;
};

// Workspace: the n-th request of a call gets the same memory in every call, so nothing is allocated while capturing.
class Workspace {
 public:
  static void* allocate(void* state, std::size_t bytes) { return static_cast<Workspace*>(state)->next(bytes); }
  void rewind() { used_ = 0; }

 private:
  void* next(std::size_t bytes) {
    if (used_ == blocks_.size()) blocks_.push_back(std::make_unique<Block>(bytes));
    if (blocks_[used_]->bytes() < bytes) throw std::logic_error("a call asks for more workspace than the one before");
    return blocks_[used_++]->data();
  }

  std::vector<std::unique_ptr<Block>> blocks_;
  std::size_t used_ = 0;
};

// As much as 16-byte accesses can do: every thread has four in flight.
__global__ void copy_kernel(uint4* __restrict__ to, const uint4* __restrict__ from, std::size_t words, char* to_rest,
                            const char* from_rest, int rest) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * step < words; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    to[i] = a, to[i + step] = b, to[i + 2 * step] = c, to[i + 3 * step] = d;
  }
  for (; i < words; i += step) to[i] = from[i];
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < rest) to_rest[threadIdx.x] = from_rest[threadIdx.x];
}

// A stream, what is known of its device, and timing on it.
class Gpu {
 public:
  explicit Gpu(int device) : device_(device) {
    check("cudaSetDevice", cudaSetDevice(device));
    check("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties_, device));
    check("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check("cudaEventCreate", cudaEventCreate(&begin_));
    check("cudaEventCreate", cudaEventCreate(&end_));
  }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  std::size_t l2_bytes() const { return static_cast<std::size_t>(properties_.l2CacheSize); }
  void wait() const { check("cudaStreamSynchronize", cudaStreamSynchronize(stream_)); }

  void copy(void* to, const void* from, std::size_t bytes) const {
    const std::size_t words = bytes / 16, done = words * 16;
    const auto blocks =
        std::clamp<std::size_t>(words / (256 * 4), 1, 8 * static_cast<std::size_t>(properties_.multiProcessorCount));
    copy_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream_>>>(
        static_cast<uint4*>(to), static_cast<const uint4*>(from), words, static_cast<char*>(to) + done,
        static_cast<const char*>(from) + done, static_cast<int>(bytes - done));
    check("copy_kernel", cudaGetLastError());
  }

  // Seconds between two events around f, which queues work on the stream.
  double seconds_of(const std::function<void()>& f) const {
    check("cudaEventRecord", cudaEventRecord(begin_, stream_));
    f();
    check("cudaEventRecord", cudaEventRecord(end_, stream_));
    check("cudaEventSynchronize", cudaEventSynchronize(end_));
    float milliseconds = 0;
    check("cudaEventElapsedTime", cudaEventElapsedTime(&milliseconds, begin_, end_));
    return 1e-3 * static_cast<double>(milliseconds);
  }

 private:
  const int device_;
  cudaDeviceProp properties_;
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

// What f queues, to be run again and again.
class Graph {
 public:
  Graph(const Gpu& gpu, const std::function<void()>& f) : gpu_(gpu) {
    cudaGraph_t graph;
    check("cudaStreamBeginCapture", cudaStreamBeginCapture(gpu.stream(), cudaStreamCaptureModeThreadLocal));
    f();
    check("cudaStreamEndCapture", cudaStreamEndCapture(gpu.stream(), &graph));
    check("cudaGraphInstantiate", cudaGraphInstantiate(&executable_, graph, 0));
    check("cudaGraphDestroy", cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void operator()() const { check("cudaGraphLaunch", cudaGraphLaunch(executable_, gpu_.stream())); }

 private:
  const Gpu& gpu_;
  cudaGraphExec_t executable_;
};

// ---- Operations --------------------------------------------------------------------------------------------------

// The large arrays of one call.
struct Tensors {
  explicit Tensors(const Data& d) : x(d.x), dy(d.dy), out(d.out) {}
  Mirror x, dy, out;
};

// A problem on the device: the small arrays, and as many sets of the large ones as are worked on by turns.
struct DeviceData {
  DeviceData(const Data& d, std::size_t sets)
      : host(d),
        weight(d.weight),
        bias(d.bias),
        mean(d.mean),
        rstd(d.rstd),
        running_mean(d.running_mean),
        running_var(d.running_var),
        dweight(d.dweight),
        dbias(d.dbias) {
    for (std::size_t i = 0; i < sets; ++i) tensors.push_back(std::make_unique<Tensors>(d));
  }
  void download() const {
    const Mirror* results[] = {&tensors[0]->out, &mean, &rstd, &dweight, &dbias};
    for (const Mirror* result : results) result->download();
  }

  const Data& host;
  Mirror weight, bias, mean, rstd, running_mean, running_var, dweight, dbias;
  std::vector<std::unique_ptr<Tensors>> tensors;
};

// A dense array, from which Views borrow.
struct Shape {
  Shape(std::initializer_list<std::int64_t> lengths, DType dtype)
      : dtype(dtype), axes(static_cast<int>(lengths.size())) {
    std::copy(lengths.begin(), lengths.end(), shape);
    std::int64_t stride = lanenorm::size(dtype);
    for (int axis = axes - 1; axis >= 0; --axis) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
  }
  lanenorm::View of(const Mirror& array) const { return {array.data(), dtype, axes, shape, strides, true}; }

  DType dtype;
  int axes;
  std::int64_t shape[3], strides[3];
};

// The arrays of a problem. Layer norm: x (rows, length), statistics (rows, 1), parameters (length). Batch norm: x
// (outer, channels, inner), whatever the layout; statistics and parameters (channels).
struct Shapes {
  explicit Shapes(const Data& d)
      : tensor(d.problem.norm == Norm::layer ? Shape({d.problem.slices, d.problem.inner}, d.dtype)
                                             : Shape({d.problem.outer, d.problem.slices, d.problem.inner}, d.dtype)),
        statistic(d.problem.norm == Norm::layer ? Shape({d.problem.slices, 1}, d.statistics)
                                                : Shape({d.problem.slices}, d.statistics)),
        vector({d.problem.parameters()}, d.parameter) {}
  Shape tensor, statistic, vector;
};

constexpr std::int64_t kAxis = 1;  // what layer norm reduces, where the channels of batch norm are
constexpr double kMomentum = 0.1;

lanenorm::Args forward_args(const DeviceData& d, const Tensors& t, bool statistics) {
  const Shapes shapes(d.host);
  const lanenorm::View x = shapes.tensor.of(t.x), y = shapes.tensor.of(t.out);
  const lanenorm::View weight = shapes.vector.of(d.weight), bias = shapes.vector.of(d.bias);
  lanenorm::Args args;
  if (d.host.problem.norm == Norm::layer) {
    lanenorm::check_layer_norm_forward("layer_norm_forward", x, &weight, &bias, {&kAxis, 1}, kEps, &y, &args);
  } else {
    lanenorm::check_batch_norm_forward("batch_norm_forward", x, &weight, &bias, nullptr, nullptr, kMomentum, kAxis,
                                       kEps, &y, &args);
  }
  if (statistics) {
    lanenorm::attach_statistics(x, shapes.statistic.of(d.mean), shapes.statistic.of(d.rstd), &args);
  }
  return args;
}
lanenorm::Args alone_args(const DeviceData& d, const Tensors& t) { return forward_args(d, t, false); }
lanenorm::Args training_args(const DeviceData& d, const Tensors& t) { return forward_args(d, t, true); }

lanenorm::Args inference_args(const DeviceData& d, const Tensors& t) {
  const Shapes shapes(d.host);
  const lanenorm::View x = shapes.tensor.of(t.x), y = shapes.tensor.of(t.out);
  const lanenorm::View weight = shapes.vector.of(d.weight), bias = shapes.vector.of(d.bias);
  lanenorm::Args args;
  lanenorm::check_batch_norm_inference("batch_norm", x, shapes.statistic.of(d.running_mean),
                                       shapes.statistic.of(d.running_var), &weight, &bias, kAxis, kEps, &y, &args);
  return args;
}

lanenorm::Args backward_args(const DeviceData& d, const Tensors& t) {
  const Shapes shapes(d.host);
  const lanenorm::View x = shapes.tensor.of(t.x), dy = shapes.tensor.of(t.dy), dx = shapes.tensor.of(t.out);
  const lanenorm::View mean = shapes.statistic.of(d.mean), rstd = shapes.statistic.of(d.rstd);
  const lanenorm::View weight = shapes.vector.of(d.weight);
  lanenorm::Args args;
  if (d.host.problem.norm == Norm::layer) {
    lanenorm::check_layer_norm_backward("layer_norm_backward", dy, x, mean, rstd, &weight, {&kAxis, 1}, &dx, &args);
  } else {
    lanenorm::check_batch_norm_backward("batch_norm_backward", dy, x, mean, rstd, &weight, kAxis, true, &dx, &args);
  }
  lanenorm::attach_parameters(x, shapes.vector.of(d.dweight), shapes.vector.of(d.dbias), &args);
  return args;
}

struct Operation {
  const char* name;
  Norm norm;
  int passes;     // over an array, read or written, at least: bytes = passes * elements * size
  int streaming;  // the same where x is read twice
  lanenorm::Args (*args)(const DeviceData&, const Tensors&);
  void (*run)(const lanenorm::Args&, const lanenorm::cuda::Context&);
  void (*check)(const Data&, Checker*);
};

namespace cuda = lanenorm::cuda;

const Operation kOperations[] = {
    {"layer_norm", Norm::layer, 2, 3, alone_args, cuda::layer_norm_forward, check_forward},
    {"layer_norm_forward", Norm::layer, 2, 3, training_args, cuda::layer_norm_forward, check_statistics},
    {"layer_norm_backward", Norm::layer, 3, 5, backward_args, cuda::layer_norm_backward, check_backward},
    {"batch_norm", Norm::batch, 2, 2, inference_args, cuda::batch_norm_inference, check_inference},
    {"batch_norm_forward", Norm::batch, 2, 3, training_args, cuda::batch_norm_forward, check_statistics},
    {"batch_norm_backward", Norm::batch, 3, 5, backward_args, cuda::batch_norm_backward, check_backward},
};

// ---- Timing ------------------------------------------------------------------------------------------------------

int device_number = 0;

Gpu& gpu() {  // made by the first case, so that names can be listed without a GPU
  static Gpu one(device_number);
  return one;
}

// The data of the case that runs: cases come problem by problem, and all together do not fit memory.
const Data& data_of(const Problem& problem, DType dtype) {
  static std::unique_ptr<Data> data;
  if (data == nullptr || data->problem.name != problem.name || data->dtype != dtype) {
    data.reset();
    data = std::make_unique<Data>(problem, dtype);
  }
  return *data;
}

// Smaller arrays take as long cold, and hundreds of copies would be needed to fill the cache.
constexpr std::int64_t kColdBytes = 1 << 20;

bool failed = false;

// One case. Google Benchmark calls it several times, with more iterations each time.
struct Case {
  const Operation* operation;
  const Problem* problem;
  DType dtype;
  bool cold;
  bool checked = false;

  void operator()(benchmark::State& state) {
    try {
      run(data_of(*problem, dtype), gpu(), state);
    } catch (const std::exception& error) {
      failed = true;
      state.SkipWithError(error.what());
    }
  }

  void run(const Data& data, Gpu& gpu, benchmark::State& state) {
    const std::size_t bytes = data.x.bytes(), of_a_call = static_cast<std::size_t>(operation->passes) * bytes;
    const std::size_t sets = cold ? 1 + 3 * gpu.l2_bytes() / of_a_call : 1;
    DeviceData d(data, sets);
    Workspace workspace;
    const lanenorm::cuda::Context context{gpu.device(), gpu.stream(), Workspace::allocate, &workspace};
    std::vector<lanenorm::Args> args;
    for (const auto& tensors : d.tensors) args.push_back(operation->args(d, *tensors));
    const auto call = [&](std::size_t i) {
      workspace.rewind();
      operation->run(args[i % sets], context);
    };

    // mean and rstd, which a backward reads
    const auto forward = problem->norm == Norm::layer ? cuda::layer_norm_forward : cuda::batch_norm_forward;
    Workspace other;
    forward(training_args(d, *d.tensors[0]), {gpu.device(), gpu.stream(), Workspace::allocate, &other});
    for (std::size_t i = 0; i < sets; ++i) call(i);
    gpu.wait();
    if (!checked) {
      d.download();
      Checker checker;
      operation->check(data, &checker);
      if (!checker.error().empty()) throw std::runtime_error(checker.error());
      checked = true;
    }

    // Graphs of half a millisecond and more: events are good to half a microsecond.
    const double alone = gpu.seconds_of([&] { call(0); });
    const auto calls =
        std::clamp<std::size_t>(static_cast<std::size_t>(5e-4 / alone), std::max<std::size_t>(sets, 3), 500);
    const auto repeated = [&](const std::function<void(std::size_t)>& f) {
      return [&, f] {
        for (std::size_t i = 0; i < calls; ++i) f(i);
      };
    };
    const Graph graph(gpu, repeated(call));
    const Graph copies(gpu, repeated([&](std::size_t i) {
                         const Tensors& t = *d.tensors[i % sets];
                         gpu.copy(t.out.data(), t.x.data(), bytes);
                       }));
    const Graph transfers(gpu, repeated([&](std::size_t i) {
                            const Tensors& t = *d.tensors[i % sets];
                            check("cudaMemcpyAsync", cudaMemcpyAsync(t.out.data(), t.x.data(), bytes,
                                                                     cudaMemcpyDeviceToDevice, gpu.stream()));
                          }));
    std::vector<double> call_times, copy_times, transfer_times;
    const auto timed = [&](std::vector<double>* times, const Graph& what) {
      times->push_back(gpu.seconds_of([&] { what(); }) / static_cast<double>(calls));
      return times->back() * static_cast<double>(calls);
    };
    graph(), copies(), transfers();  // the first launch of a graph uploads it
    while (state.KeepRunningBatch(static_cast<benchmark::IterationCount>(calls))) {
      state.SetIterationTime(timed(&call_times, graph));
      timed(&copy_times, copies);
      timed(&transfer_times, transfers);
    }

    const auto begin = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < calls; ++i) call(i);
    gpu.wait();
    const double host = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

    const double median = quantile(call_times, 0.5);
    const double copy = std::min(quantile(copy_times, 0.5), quantile(transfer_times, 0.5));
    state.counters["GB/s"] = static_cast<double>(of_a_call) / median * 1e-9;
    state.counters["share_of_copy"] = median / copy;
    state.counters["share_of_bandwidth"] = operation->passes / 2.0 * copy / median;
    state.counters["share_of_streaming"] = operation->streaming / 2.0 * copy / median;
    state.counters["median_us"] = median * 1e6;
    state.counters["p10_us"] = quantile(call_times, 0.1) * 1e6;
    state.counters["p90_us"] = quantile(call_times, 0.9) * 1e6;
    state.counters["copy_us"] = copy * 1e6;
    state.counters["host_us"] = host / static_cast<double>(calls) * 1e6;
  }
};

// ---- Command line ------------------------------------------------------------------------------------------------

constexpr char kUsage[] =
    "bench_cuda: batch and layer normalization on the GPU\n"
    "          [--device=N]                 default 0\n"
    "          [--cache=cold,warm]          state of the L2 cache; default both\n"
    "          [--problems=FILE]            default " LANENORM_PROBLEMS
    "\n"
    "and Google Benchmark's own:\n\n";

struct Flags {
  std::string device = "0", cache = "cold,warm", problems = LANENORM_PROBLEMS;

  // Takes its own flags out of the arguments.
  void take(int* argc, char** argv) {
    const struct {
      const char* name;
      std::string* value;
    } own[] = {{"--device=", &device}, {"--cache=", &cache}, {"--problems=", &problems}};
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
};

void register_cases(const std::vector<Problem>& problems, const Flags& flags) {
  for (const std::string& cache : split(flags.cache, ',')) {
    if (cache != "cold" && cache != "warm") {
      throw std::invalid_argument("--cache: '" + cache + "' is neither cold nor warm");
    }
  }
  for (const Problem& problem : problems) {
    for (const DType dtype : problem.dtypes) {
      for (const Operation& operation : kOperations) {
        if (operation.norm != problem.norm) continue;
        for (const std::string& cache : split(flags.cache, ',')) {
          if (cache == "cold" && problem.count() * lanenorm::size(dtype) < kColdBytes) continue;
          const std::string name =
              std::string(operation.name) + "/" + problem.name + "/" + lanenorm::name(dtype) + "/" + cache;
          // The benchmark object is copied; what the case has learned must outlive its calls.
          auto one = std::make_shared<Case>(Case{&operation, &problem, dtype, cache == "cold"});
          benchmark::RegisterBenchmark(name.c_str(), [one](benchmark::State& state) { (*one)(state); })
              ->UseManualTime()
              ->Unit(benchmark::kMicrosecond);
        }
      }
    }
  }
}

void add_context() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || device_number >= devices) return;  // the first case says so
  cudaDeviceProp properties;
  check("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, device_number));
  benchmark::AddCustomContext("gpu", properties.name);
  benchmark::AddCustomContext("l2_bytes", std::to_string(properties.l2CacheSize));
}

}  // namespace

int main(int argc, char** argv) try {
  Flags flags;
  flags.take(&argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  device_number = std::stoi(flags.device);
  const std::vector<Problem> problems = read_problems(flags.problems);
  register_cases(problems, flags);
  add_context();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return failed ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "bench_cuda: %s\n", error.what());
  return 2;
}
