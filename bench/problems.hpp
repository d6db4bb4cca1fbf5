// What bench_cpu and bench_cuda share: the problems of problems.txt, their arrays on the host, and the comparison of
// results with plain double arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <lanenorm/lanenorm.hpp>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

using lanenorm::ArrayView;
using lanenorm::Dims;
using lanenorm::DType;

inline constexpr double kEps = 1e-5;

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

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

inline bool parse_dtypes(const std::string& text, std::vector<DType>* dtypes) {
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
inline Problem parse_problem(const std::string& line) {
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

inline std::vector<Problem> read_problems(const std::string& path) {
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

inline double load(const void* data, DType dtype, std::int64_t i) {
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
inline void store(double value, void* data, DType dtype, std::int64_t i) {
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

// ---- Checks ------------------------------------------------------------------------------------------------------

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

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

inline void check_y(const Data& d, const std::vector<double>& mean, const std::vector<double>& rstd, Checker* checker) {
  d.for_each([&](auto i, auto s, auto p) {
    const double normalized = (d.x[i] - mean[at(s)]) * rstd[at(s)];
    const double scale = std::max(1.0, std::fabs(normalized)) * std::fabs(d.weight[p]) + std::fabs(d.bias[p]);
    checker->compare("y", d.out, i, normalized * d.weight[p] + d.bias[p], scale);
  });
}

inline void check_forward(const Data& d, Checker* checker) { check_y(d, d.true_mean, d.true_rstd, checker); }

inline void check_statistics(const Data& d, Checker* checker) {
  check_forward(d, checker);
  for (std::int64_t s = 0; s < d.problem.slices; ++s) {
    checker->compare("mean", d.mean, s, d.true_mean[at(s)], 4.0);
    checker->compare("rstd", d.rstd, s, d.true_rstd[at(s)], d.true_rstd[at(s)]);
  }
}

inline void check_inference(const Data& d, Checker* checker) {
  std::vector<double> mean, rstd;
  for (std::int64_t s = 0; s < d.problem.slices; ++s) {
    mean.push_back(d.running_mean[s]);
    rstd.push_back(1 / std::sqrt(d.running_var[s] + kEps));
  }
  check_y(d, mean, rstd, checker);
}

inline void check_backward(const Data& d, Checker* checker) {
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

inline double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

}  // namespace bench
