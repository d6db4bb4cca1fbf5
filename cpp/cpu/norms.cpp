// From Args to a driver and back: small arrays into compute type and Plan order, empty inputs, running statistics.
#include "cpu/norms.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/driver.hpp"
#include "cpu/float_environment.hpp"

namespace lanenorm {
namespace {

bool usable_in_place(const Vector& v, DType stored, DType compute) {
  const auto bytes = static_cast<std::uintptr_t>(size(compute));
  return stored == compute && adjacent(v.loop, size(stored)) && reinterpret_cast<std::uintptr_t>(v.data) % bytes == 0;
}

// weight and bias of so many rows are worth a copy that starts on a cache line: a vector that straddles two is read in
// two cycles. 128 x 768, 16 bytes beside a line: 2.7 -> 2.4 ns a vector. But each call writes it anew, and another
// processor has to fetch it: 32 x 768 on two threads 3.4 -> 4.4 us. So not where a small call is shared by threads.
bool read_often(const Plan& plan, DType dtype) {
  if (plan.affine != Affine::per_element || plan.outer < 8) return false;
  const std::int64_t bytes = plan.elements * size(dtype);
  constexpr std::int64_t kLarge = 1 << 20;
  return 2 * bytes < kSerialBytes || bytes >= kLarge || get_num_threads() == 1;
}

// A small array read in compute type and Plan order: where it lies, or from a copy.
class InputVector {
 public:
  InputVector(const Vector& v, DType stored, DType compute, bool on_cache_line = false) {
    if (v.data == nullptr) return;
    const bool aligned = reinterpret_cast<std::uintptr_t>(v.data) % 64 == 0;
    if (usable_in_place(v, stored, compute) && (aligned || !on_cache_line)) {
      data_ = v.data;
      return;
    }
    const std::int64_t count = v.loop.count, bytes = count * size(stored);
    char* packed = few_;
    if (bytes > static_cast<std::int64_t>(sizeof few_)) {
      packed_.reserve(bytes);
      packed = packed_.data();
    }
    pack(v.loop, static_cast<const char*>(v.data), 0, count, size(stored), packed);
    data_ = packed;
    if (stored == compute) return;
    widened_.reserve(count * size(compute));
    kernels(stored).widen(packed, count, widened_.data());
    data_ = widened_.data();
  }
  InputVector(const InputVector&) = delete;
  InputVector& operator=(const InputVector&) = delete;
  const void* data() const { return data_; }

 private:
  alignas(64) char few_[4096];  // asking for memory takes longer than a small call
  Buffer packed_, widened_;
  const void* data_ = nullptr;
};

// A statistic array written by a driver.
class OutputVector {
 public:
  OutputVector(const Vector& v, DType dtype, std::int64_t count) : vector_(v), size_(size(dtype)) {
    if (v.data != nullptr && usable_in_place(v, dtype, dtype)) {
      data_ = v.data;
    } else if (count * size_ <= static_cast<std::int64_t>(sizeof few_)) {
      data_ = few_;
    } else {
      buffer_.reserve(count * size_);
      data_ = buffer_.data();
    }
  }
  void* data() const { return data_; }
  void finish() const {
    if (vector_.data == nullptr || vector_.data == data_) return;
    unpack(vector_.loop, static_cast<char*>(vector_.data), 0, vector_.loop.count, size_,
           static_cast<const char*>(data_));
  }

 private:
  const Vector& vector_;
  std::int64_t size_;
  alignas(64) char few_[256];  // as above
  Buffer buffer_;
  void* data_;
};

template <class C>
void round_to(const double* values, std::int64_t count, C* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<C>(values[i]);
}

// dweight or dbias: totals in double, rounded to the array's dtype at the end; or sums in the array itself.
class ParameterGradient {
 public:
  ParameterGradient(const Vector& v, DType dtype, bool in_place) : vector_(v), dtype_(dtype), in_place_(in_place) {
    if (v.data == nullptr || in_place) return;
    const std::int64_t bytes = v.loop.count * 8;
    totals_.reserve(bytes);
    std::memset(totals_.data(), 0, static_cast<std::size_t>(bytes));
  }
  double* totals() const { return vector_.data == nullptr || in_place_ ? nullptr : totals_.as<double>(); }
  void* sums() const { return in_place_ ? vector_.data : nullptr; }
  void finish() const {
    if (vector_.data == nullptr || in_place_) return;
    const std::int64_t count = vector_.loop.count;
    const bool direct = usable_in_place(vector_, dtype_, dtype_);
    Buffer buffer(direct ? 0 : count * size(dtype_));
    void* rounded = direct ? vector_.data : buffer.data();
    if (dtype_ == DType::float64) {
      round_to(totals(), count, static_cast<double*>(rounded));
    } else if (dtype_ == DType::float32) {
      round_to(totals(), count, static_cast<float*>(rounded));
    } else {
      Buffer single(count * 4);
      round_to(totals(), count, single.as<float>());
      kernels(dtype_).narrow(single.data(), count, rounded);
    }
    if (!direct) unpack(vector_.loop, static_cast<char*>(vector_.data), 0, count, size(dtype_), buffer.data());
  }

 private:
  const Vector& vector_;
  DType dtype_;
  bool in_place_;
  Buffer totals_;
};

// f(C{}) for the compute type of a dtype.
template <class F>
void with_compute(DType dtype, F&& f) {
  if (dtype == DType::float64) {
    f(double{});
  } else {
    f(float{});
  }
}

template <class C>
void forward(const Problem& p) {
  if (p.plan.elements == 0) {  // nothing to average: mean 0, variance 0
    for (std::int64_t s = 0; s < p.plan.statistics; ++s) {
      static_cast<C*>(p.mean)[s] = C(0);
      static_cast<C*>(p.rstd)[s] = static_cast<C>(1.0 / std::sqrt(p.args.eps));
    }
  } else if (p.plan.work == Work::rows) {
    rows_forward<C>(p);
  } else {
    columns_forward<C>(p);
  }
}

template <class C>
void update_running(const Args& a, const ExactStatistic* batch) {
  C* running_mean = static_cast<C*>(a.running_mean.data);
  C* running_var = static_cast<C*>(a.running_var.data);
  for (std::int64_t c = 0; c < a.plan.statistics; ++c) {
    update_running(batch[c].mean, batch[c].variance, static_cast<double>(a.plan.reduced), a.momentum, running_mean + c,
                   running_var + c);
  }
}

void norm_forward(const Args& args) {
  const FloatEnvironment environment;
  const DType compute = statistics_dtype(args.dtype);
  const InputVector weight(args.weight, args.parameter_dtype, compute, read_often(args.plan, args.dtype));
  const InputVector bias(args.bias, args.parameter_dtype, compute, read_often(args.plan, args.dtype));
  const OutputVector mean(args.mean, compute, args.plan.statistics);
  const OutputVector rstd(args.rstd, compute, args.plan.statistics);
  const bool running = args.running_mean.data != nullptr && args.plan.elements > 0;
  const Buffer buffer(running ? args.plan.statistics * static_cast<std::int64_t>(sizeof(ExactStatistic)) : 0);
  ExactStatistic* exact = running ? buffer.as<ExactStatistic>() : nullptr;
  const Problem problem{Operation::forward,
                        args,
                        args.plan,
                        kernels(args.dtype),
                        weight.data(),
                        bias.data(),
                        mean.data(),
                        rstd.data(),
                        exact,
                        nullptr,
                        nullptr,
                        nullptr,
                        nullptr};
  with_compute(args.dtype, [&](auto c) {
    using C = decltype(c);
    forward<C>(problem);
    mean.finish();
    rstd.finish();
    if (running) update_running<C>(args, exact);
  });
}

void norm_backward(const Args& args) {
  const FloatEnvironment environment;
  const DType compute = statistics_dtype(args.dtype);
  const InputVector weight(args.weight, args.parameter_dtype, compute, read_often(args.plan, args.dtype));
  const InputVector mean(args.mean, compute, compute);
  const InputVector rstd(args.rstd, compute, compute);
  const auto summed_in_place = [&](const Vector& v) {
    return v.data != nullptr && usable_in_place(v, args.parameter_dtype, compute);
  };
  const bool in_place = args.plan.elements > 0 && args.plan.work == Work::rows &&
                        args.plan.affine == Affine::per_element && args.plan.outer <= kChunkRows &&
                        summed_in_place(args.dweight) && summed_in_place(args.dbias);
  const ParameterGradient dweight(args.dweight, args.parameter_dtype, in_place);
  const ParameterGradient dbias(args.dbias, args.parameter_dtype, in_place);
  const Problem problem{Operation::backward,
                        args,
                        args.plan,
                        kernels(args.dtype),
                        weight.data(),
                        nullptr,
                        const_cast<void*>(mean.data()),
                        const_cast<void*>(rstd.data()),
                        nullptr,
                        dweight.totals(),
                        dbias.totals(),
                        dweight.sums(),
                        dbias.sums()};
  if (args.plan.elements > 0) {
    with_compute(args.dtype, [&](auto c) {
      using C = decltype(c);
      args.plan.work == Work::rows ? rows_backward<C>(problem) : columns_backward<C>(problem);
    });
  }
  dweight.finish();
  dbias.finish();
}

}  // namespace

void layer_norm_forward(const Args& args) { norm_forward(args); }
void layer_norm_backward(const Args& args) { norm_backward(args); }
void batch_norm_forward(const Args& args) { norm_forward(args); }
void batch_norm_backward(const Args& args) { norm_backward(args); }

void batch_norm_inference(const Args& args) {
  if (args.plan.elements == 0) return;
  const FloatEnvironment environment;
  const DType compute = statistics_dtype(args.dtype);
  const InputVector weight(args.weight, args.parameter_dtype, compute);
  const InputVector bias(args.bias, args.parameter_dtype, compute);
  const InputVector mean(args.running_mean, compute, compute);
  const InputVector variance(args.running_var, compute, compute);
  const std::int64_t channels = args.plan.statistics;
  with_compute(args.dtype, [&](auto c) {
    using C = decltype(c);
    const Buffer buffer(4 * channels * static_cast<std::int64_t>(sizeof(C)));
    C *rstd = buffer.as<C>(), *factor = rstd + channels, *weights = factor + channels, *zeros = weights + channels;
    const bool all =
        kernels(args.dtype).inference_constants({channels, args.eps, variance.data(), weight.data(), rstd, factor});
    if (!all) {
      for (std::int64_t i = 0; i < channels; ++i) {
        const C given = weight.data() == nullptr ? C(1) : static_cast<const C*>(weight.data())[i];
        const bool may_fold = foldable(factor[i], given);
        weights[i] = may_fold ? factor[i] : given;
        factor[i] = may_fold ? C(1) : rstd[i];
      }
    }
    if (bias.data() == nullptr) std::fill_n(zeros, channels, -C(0));
    const Problem problem{Operation::inference,
                          args,
                          args.plan,
                          kernels(args.dtype),
                          all ? nullptr : weights,
                          bias.data() == nullptr ? zeros : bias.data(),
                          const_cast<void*>(mean.data()),
                          factor,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};
    args.plan.work == Work::rows || args.plan.fold >= kLeastPlane ? planes_inference<C>(problem)
                                                                  : columns_inference<C>(problem);
  });
}

}  // namespace lanenorm
