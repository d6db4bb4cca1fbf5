// The CUDA operations on a few arrays for test_cuda_faults.py, so that a kernel with a fault can be built and run
// without Python, under a sanitizer, in seconds.
//
// cases forward,ROWS,COLUMNS,AXIS,SHIFT,SHARED,CLUSTER ... (or backward,... or dx,...: without dweight and dbias):
// layer norms of (ROWS, COLUMNS) arrays. cases batchforward,IMAGES,LENGTH,CHANNELS,... (or batchbackward,...): batch
// norms of (IMAGES, CHANNELS, LENGTH) arrays; batchinference and batchfrozen: those without sums. Runs these on a
// device with 132 multiprocessors, in both schedules, and on one with a single multiprocessor. SHIFT: elements between
// a 16-byte border and the arrays (but for y and dx of batch norms, so that nothing but the loads is unaligned);
// SHARED: bytes of shared memory a block may have; CLUSTER: blocks a cluster may have. Prints a hash of the results of
// each; on an error, a value that is wrong, or bits that differ between these runs, a line that says so, and the exit
// code is 1. All arrays are exactly as large as they must be. A first argument fault=NUMBER switches on one of the
// faults that the test has written into the kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "cuda/norms.hpp"
#include "cuda_on_host/emulator.hpp"

extern "C" {
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* address, std::size_t size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
}

int seeded_fault = 0;  // 0: none

namespace {

using namespace lanenorm;

// ---- Arrays ------------------------------------------------------------------------------------------------------

// float32, C order, `shift` elements behind a 16-byte border; NaN until it is filled. The words before the array are
// closed to it too, as far as ASAN can: by eight bytes.
class Array {
 public:
  explicit Array(std::initializer_list<std::int64_t> shape, int shift = 0)
      : axes_(static_cast<int>(shape.size())), shape_{1, 1, 1}, strides_{4, 4, 4}, shift_(shift) {
    std::copy(shape.begin(), shape.end(), shape_);
    for (int axis = axes_ - 2; axis >= 0; --axis) strides_[axis] = strides_[axis + 1] * shape_[axis + 1];
    memory_.reset(new float[size() + shift]);
    std::memset(memory_.get(), 0xff, static_cast<std::size_t>(size() + shift) * sizeof(float));
    if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(memory_.get(), closed());
  }
  ~Array() {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory_.get(), closed());
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  std::int64_t size() const { return shape_[0] * shape_[1] * shape_[2]; }
  float* data() const { return memory_.get() + shift_; }
  float& operator[](std::int64_t i) const { return data()[i]; }
  View view() const { return {data(), DType::float32, axes_, shape_, strides_, true}; }

 private:
  std::size_t closed() const { return static_cast<std::size_t>(shift_) * sizeof(float) / 8 * 8; }

  int axes_;
  std::int64_t shape_[3], strides_[3];
  std::unique_ptr<float[]> memory_;
  int shift_;
};

// The same numbers in every run: uniform in [-1, 1), a linear congruential generator (Knuth's MMIX constants).
void fill(const Array& array, std::uint64_t seed, float offset) {
  for (std::int64_t i = 0; i < array.size(); ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    array[i] = offset + static_cast<float>(static_cast<std::int32_t>(seed >> 32)) * 0x1p-31f;
  }
}

std::uint64_t bits(const Array& array, std::uint64_t hash) {  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(array.data());
  for (std::int64_t i = 0; i < 4 * array.size(); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

// ---- The operations, once in float64 and once by the kernels -----------------------------------------------------

struct Case {
  bool batch, backward, param_grads;
  bool inference, frozen;
  long long rows, columns;
  int axis;  // batch: number of channels
  int shift, shared, cluster;
};

Case parse(const char* text) {
  Case c;
  char direction[16];
  if (std::sscanf(text, "%15[a-z],%lld,%lld,%d,%d,%d,%d", direction, &c.rows, &c.columns, &c.axis, &c.shift, &c.shared,
                  &c.cluster) != 7) {
    throw std::runtime_error("not a case");
  }
  c.batch = std::strncmp(direction, "batch", 5) == 0;
  const char* what = direction + (c.batch ? 5 : 0);
  c.backward = std::strcmp(what, "forward") != 0;
  c.param_grads = std::strcmp(what, "backward") == 0;
  c.inference = std::strcmp(what, "inference") == 0;
  c.frozen = std::strcmp(what, "frozen") == 0;
  return c;
}

constexpr double kEps = 1e-5;
constexpr double kMomentum = 0.25;
constexpr float kOffset = 100.0f;

void expect(const char* what, const Array& got, std::int64_t i, double exact, double scale) {
  // 16 u of the scale: twice the promise, since this is to see faults
  if (std::fabs(static_cast<double>(got[i]) - exact) <= 0x1p-20 * scale) return;
  char text[200];
  std::snprintf(text, sizeof text, "wrong: %s[%lld] is %.9g, expected %.9g", what, static_cast<long long>(i),
                static_cast<double>(got[i]), exact);
  throw std::runtime_error(text);
}

// How the slices of a case lie in its array, and which element of weight and bias belongs to which element.
struct Slices {
  std::int64_t count, length;
  explicit Slices(const Case& of)
      : count(of.batch       ? of.axis
              : of.axis == 1 ? of.rows
                             : of.columns),
        length(of.batch       ? of.rows * of.columns
               : of.axis == 1 ? of.columns
                              : of.rows),
        case_(of) {}
  std::int64_t at(std::int64_t slice, std::int64_t i) const {
    if (case_.batch) return (i / case_.columns * count + slice) * case_.columns + i % case_.columns;
    return case_.axis == 1 ? slice * case_.columns + i : i * case_.columns + slice;
  }
  std::int64_t parameters() const { return case_.batch ? count : length; }
  std::size_t parameter(std::int64_t slice, std::int64_t i) const {
    return static_cast<std::size_t>(case_.batch ? slice : i);
  }

 private:
  const Case& case_;
};

// One run of a case; the hash of all results.
std::uint64_t run(const Case& c) {
  const Slices slices(c);
  const std::int64_t axis = c.axis;
  const AxisList axes{&axis, 1};
  const auto tensor = [&](int shift) {
    return c.batch ? Array({c.rows, c.axis, c.columns}, shift) : Array({c.rows, c.columns}, shift);
  };
  const auto statistic = [&] {
    if (c.batch) return Array({slices.count});
    return c.axis == 1 ? Array({slices.count, 1}) : Array({1, slices.count});
  };
  const Array x = tensor(c.shift), y = tensor(c.batch ? 0 : c.shift), dy = tensor(c.shift);
  const Array weight({slices.parameters()}, c.shift), bias({slices.parameters()}, c.shift);
  const Array dweight({slices.parameters()}), dbias({slices.parameters()});
  const Array mean = statistic(), rstd = statistic(), running_mean = statistic(), running_var = statistic();
  fill(x, 1, kOffset);
  fill(dy, 2, 0.0f);
  fill(weight, 3, 0.0f);
  fill(bias, 4, 0.0f);
  fill(running_mean, 5, 0.0f);
  fill(running_var, 6, 2.0f);
  const View weights = weight.view(), biases = bias.view();

  std::vector<double> means(static_cast<std::size_t>(slices.count)), rstds(means), variances(means);
  const auto n = static_cast<double>(slices.length);
  for (std::int64_t s = 0; s < slices.count; ++s) {
    const auto k = static_cast<std::size_t>(s);
    double sum = 0, squares = 0;
    for (std::int64_t i = 0; i < slices.length; ++i) sum += static_cast<double>(x[slices.at(s, i)]);
    for (std::int64_t i = 0; i < slices.length; ++i) {
      const double d = static_cast<double>(x[slices.at(s, i)]) - sum / n;
      squares += d * d;
    }
    means[k] = sum / n;
    variances[k] = squares / n;
    rstds[k] = 1.0 / std::sqrt(variances[k] + kEps);
  }

  on_host::Workspace workspace;
  cuda::Context context{};
  context.state = &workspace;
  context.allocate = [](void* state, std::size_t bytes) {
    return static_cast<on_host::Workspace*>(state)->allocate(bytes);
  };
  Args args;
  const View vx = x.view(), vdy = dy.view(), vmean = mean.view(), vrstd = rstd.view();
  const View vrunning_mean = running_mean.view(), vrunning_var = running_var.view();
  if (c.inference || c.frozen) {
    if (c.inference) {
      check_batch_norm_inference("batch_norm", vx, vrunning_mean, vrunning_var, &weights, &biases, 1, kEps, nullptr,
                                 &args);
    } else {  // any statistics will do
      check_batch_norm_backward("batch_norm_backward", vdy, vx, vrunning_mean, vrunning_var, &weights, 1, false,
                                nullptr, &args);
    }
    args.y = y.data();
    c.inference ? cuda::batch_norm_inference(args, context) : cuda::batch_norm_backward(args, context);
    for (std::int64_t s = 0; s < slices.count; ++s) {
      const double m = static_cast<double>(running_mean[s]), v = static_cast<double>(running_var[s]);
      const double w = static_cast<double>(weight[s]), b = static_cast<double>(bias[s]);
      for (std::int64_t i = 0; i < slices.length; ++i) {
        const std::int64_t at = slices.at(s, i);
        const double normalized = (static_cast<double>(x[at]) - m) / std::sqrt(v + kEps);
        if (c.inference) {
          expect("y", y, at, normalized * w + b, 1.0 + std::fabs(normalized));
        } else {
          expect("dx", y, at, static_cast<double>(dy[at]) * w * v, v);
        }
      }
    }
    return bits(y, 0xcbf29ce484222325u);
  }
  if (!c.backward) {
    if (c.batch) {
      check_batch_norm_forward("batch_norm_forward", vx, &weights, &biases, &vrunning_mean, &vrunning_var, kMomentum, 1,
                               kEps, nullptr, &args);
    } else {
      check_layer_norm_forward("layer_norm_forward", vx, &weights, &biases, axes, kEps, nullptr, &args);
    }
    args.y = y.data();
    attach_statistics(vx, vmean, vrstd, &args);
    const Array old_mean = statistic(), old_var = statistic();
    fill(old_mean, 5, 0.0f);
    fill(old_var, 6, 2.0f);
    c.batch ? cuda::batch_norm_forward(args, context) : cuda::layer_norm_forward(args, context);
    for (std::int64_t s = 0; s < slices.count; ++s) {
      const auto k = static_cast<std::size_t>(s);
      const double m = means[k], r = rstds[k];
      expect("mean", mean, s, m, std::fabs(m));
      expect("rstd", rstd, s, r, r);
      if (c.batch) {
        const auto moved = [](double old, double now) { return (1 - kMomentum) * old + kMomentum * now; };
        expect("running_mean", running_mean, s, moved(static_cast<double>(old_mean[s]), m), std::fabs(m));
        expect("running_var", running_var, s, moved(static_cast<double>(old_var[s]), variances[k] * n / (n - 1)), 2.0);
      }
      for (std::int64_t i = 0; i < slices.length; ++i) {
        const double normalized = (static_cast<double>(x[slices.at(s, i)]) - m) * r;
        const auto p = static_cast<std::int64_t>(slices.parameter(s, i));
        const double w = static_cast<double>(weight[p]), b = static_cast<double>(bias[p]);
        expect("y", y, slices.at(s, i), normalized * w + b, 1.0 + std::fabs(normalized));
      }
    }
    return bits(running_var, bits(running_mean, bits(rstd, bits(mean, bits(y, 0xcbf29ce484222325u)))));
  }

  for (std::int64_t s = 0; s < slices.count; ++s) {
    mean[s] = static_cast<float>(means[static_cast<std::size_t>(s)]);
    rstd[s] = static_cast<float>(rstds[static_cast<std::size_t>(s)]);
  }
  if (c.batch) {
    check_batch_norm_backward("batch_norm_backward", vdy, vx, vmean, vrstd, &weights, 1, true, nullptr, &args);
  } else {
    check_layer_norm_backward("layer_norm_backward", vdy, vx, vmean, vrstd, &weights, axes, nullptr, &args);
  }
  args.y = y.data();
  if (c.param_grads) attach_parameters(vx, dweight.view(), dbias.view(), &args);
  c.batch ? cuda::batch_norm_backward(args, context) : cuda::layer_norm_backward(args, context);
  std::vector<double> weight_sums(static_cast<std::size_t>(slices.parameters())), bias_sums(weight_sums),
      terms(weight_sums);
  for (std::int64_t s = 0; s < slices.count; ++s) {
    const double m = means[static_cast<std::size_t>(s)], r = rstds[static_cast<std::size_t>(s)];
    double g = 0, gx = 0;
    const auto normalized = [&](std::int64_t i) { return (static_cast<double>(x[slices.at(s, i)]) - m) * r; };
    const auto gradient = [&](std::int64_t i) {
      return static_cast<double>(dy[slices.at(s, i)]) *
             static_cast<double>(weight[static_cast<std::int64_t>(slices.parameter(s, i))]);
    };
    for (std::int64_t i = 0; i < slices.length; ++i) {
      const std::size_t k = slices.parameter(s, i);
      const double d = static_cast<double>(dy[slices.at(s, i)]);
      g += gradient(i);
      gx += gradient(i) * normalized(i);
      weight_sums[k] += d * normalized(i);
      bias_sums[k] += d;
      terms[k] += std::fabs(d) * (1.0 + std::fabs(normalized(i)));
    }
    for (std::int64_t i = 0; i < slices.length; ++i) {
      expect("dx", y, slices.at(s, i), r * (gradient(i) - g / n - normalized(i) * gx / n), r);
    }
  }
  for (std::int64_t i = 0; i < slices.parameters() && c.param_grads; ++i) {
    const auto k = static_cast<std::size_t>(i);
    expect("dweight", dweight, i, weight_sums[k], terms[k]);
    expect("dbias", dbias, i, bias_sums[k], terms[k]);
  }
  return bits(dbias, bits(dweight, bits(y, 0xcbf29ce484222325u)));
}

struct Run {
  int multiprocessors;
  on_host::Schedule schedule;
};
constexpr Run kRuns[] = {
    {132, on_host::Schedule::forward}, {132, on_host::Schedule::reversed}, {1, on_host::Schedule::forward}};

// The hash of a case; every run has it.
std::uint64_t run_everywhere(const Case& c) {
  std::uint64_t first = 0;
  for (const Run& r : kRuns) {
    on_host::Device device;
    device.multiprocessors = r.multiprocessors;
    device.shared_per_block = c.shared;
    device.max_cluster = c.cluster;
    on_host::set_device(device);
    on_host::set_schedule(r.schedule);
    const std::uint64_t hash = run(c);
    if (&r == kRuns) first = hash;
    if (hash != first) throw std::runtime_error("other bits with another schedule or number of multiprocessors");
  }
  return first;
}

}  // namespace

int main(int count, char** arguments) {
  const int first = count > 1 && std::sscanf(arguments[1], "fault=%d", &seeded_fault) == 1 ? 2 : 1;
  for (int i = first; i < count; ++i) {
    try {
      const auto hash = static_cast<unsigned long long>(run_everywhere(parse(arguments[i])));
      std::printf("%s %016llx\n", arguments[i], hash);
    } catch (const std::exception& error) {
      std::printf("%s %s\n", arguments[i], error.what());
      return 1;
    }
  }
  return 0;
}
