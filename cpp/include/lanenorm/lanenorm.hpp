// Batch and layer normalization, forward and backward, on the CPU: the C++ interface.
//
//   y = x_hat * weight + bias,  x_hat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  var biased (divided by n)
//
// with mean and var over some axes of x (layer norm: Ba, Kiros, Hinton 2016) or over all axes but one (batch norm:
// Ioffe, Szegedy 2015). The caller brings all memory, inputs and outputs alike, as ArrayViews.
//
// Arrays       x, dy, out: one shape and one dtype, any of DType. Inputs may have any strides and addresses.
//              out receives y (dx in a backward). Its layout is that of like(x): the one of x where x is dense. out may
//              be x itself (in a backward dy: same pointer, shape, strides); otherwise no output may share memory with
//              another array of the call.
// Statistics   mean, rstd, running_mean, running_var are float32; float64 for float64 x.
// Parameters   weight and bias: the dtype of x, or float32 with a 16-bit x, both the same; std::nullopt: none.
//              dweight and dbias have the dtype of weight, that of the statistics where there is none; both or neither.
//
// Errors       std::invalid_argument: dtype, shape, range, layout, read-only, overlap. std::out_of_range: axis. what()
// says
//              operation, argument, what it was, what was expected. Everything is checked before any output is touched.
//              std::bad_alloc: no memory for working space; outputs are undefined, running statistics untouched.
// Accuracy     The README says what is promised, also that results have the same bits with any number of threads and
//              any instruction set.
// Threads      Functions may be called from several threads at once, and after fork().
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "lanenorm/dtype.hpp"
#include "lanenorm/version.hpp"

namespace lanenorm {

// ---- Arrays ------------------------------------------------------------------------------------------------------

// Up to 64 integers, one per axis: a shape, strides, or numbers of axes. `{32, 768}` makes one. Allocates nothing.
class Dims {
 public:
  static constexpr std::size_t kMax = 64;

  Dims() = default;
  Dims(std::initializer_list<std::int64_t> values) : Dims(values.begin(), values.size()) {}
  Dims(const std::vector<std::int64_t>& values) : Dims(values.data(), values.size()) {}
  Dims(const std::int64_t* values, std::size_t count);  // std::invalid_argument beyond kMax
  Dims(const Dims& other) { *this = other; }
  Dims& operator=(const Dims& other) {
    count_ = other.count_;
    for (std::size_t i = 0; i < count_; ++i) values_[i] = other.values_[i];
    return *this;
  }

  std::size_t size() const { return count_; }
  std::int64_t operator[](std::size_t i) const { return values_[i]; }
  const std::int64_t* begin() const { return values_; }
  const std::int64_t* end() const { return values_ + count_; }

 private:
  std::size_t count_ = 0;
  std::int64_t values_[kMax];  // only the first count_ are set
};

// Memory of the caller seen as an array: pointer, dtype, shape, strides in bytes. Borrows the memory, owns the rest.
//
//   ArrayView(x.data(), {32, 768})                         float*, double*, Float16*, BFloat16*: dtype from the pointer
//   ArrayView(pointer, DType::bfloat16, {32, 768})         any pointer, contiguous
//   ArrayView(x.data(), {8, 3, 5, 5}, {300, 4, 60, 12})    channels-last memory: strides in bytes, as in NumPy
//
// A pointer to const makes a view that is refused as an output. std::invalid_argument for a negative length, a stride
// too few or too many, or a null pointer to an array that is not empty.
class ArrayView {
 public:
  template <class T, DType kDType = Storage<std::remove_const_t<T>>::kDType>
  ArrayView(T* data, const Dims& shape) : ArrayView(data, !std::is_const_v<T>, kDType, shape, nullptr) {}
  template <class T, DType kDType = Storage<std::remove_const_t<T>>::kDType>
  ArrayView(T* data, const Dims& shape, const Dims& strides)
      : ArrayView(data, !std::is_const_v<T>, kDType, shape, &strides) {}

  ArrayView(void* data, DType dtype, const Dims& shape) : ArrayView(data, true, dtype, shape, nullptr) {}
  ArrayView(void* data, DType dtype, const Dims& shape, const Dims& strides)
      : ArrayView(data, true, dtype, shape, &strides) {}
  ArrayView(const void* data, DType dtype, const Dims& shape) : ArrayView(data, false, dtype, shape, nullptr) {}
  ArrayView(const void* data, DType dtype, const Dims& shape, const Dims& strides)
      : ArrayView(data, false, dtype, shape, &strides) {}

  const void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  const Dims& shape() const { return shape_; }
  const Dims& strides() const { return strides_; }
  bool writable() const { return writable_; }

 private:
  ArrayView(const void* data, bool writable, DType dtype, const Dims& shape, const Dims* strides);

  const void* data_;
  Dims shape_, strides_;
  DType dtype_;
  bool writable_;
};

// `data` as an array of x's dtype and shape in the layout that `out` must have: dense, axes ordered in memory as those
// of x (numpy.empty_like). x.shape[0] * x.shape[1] * ... elements.
ArrayView like(const ArrayView& x, void* data);

// ---- Layer normalization -----------------------------------------------------------------------------------------

struct LayerNormOptions {
  Dims axes{-1};  // normalized over, in any order; negative ones count from the last
  double eps = 1e-5;
};

// weight, bias: the lengths of the normalized axes, ascending. mean, rstd: the shape of x with length 1 in place of
// each normalized axis. So for x (rows, n) and axes {-1}: (n) and (rows, 1).

// y alone.
void layer_norm(const ArrayView& x, const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias,
                const ArrayView& out, const LayerNormOptions& options = {});

// y, and for the backward mean and rstd.
void layer_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const LayerNormOptions& options = {});

// mean, rstd: what layer_norm_forward gave for this x. With g = dy * weight and averages over the normalized axes:
//   dx = rstd * (g - average(g) - x_hat * average(g * x_hat)),  dweight = sum(dy * x_hat),  dbias = sum(dy)
// options.eps is in rstd already and not used.
void layer_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const LayerNormOptions& options = {});

// ---- Batch normalization -----------------------------------------------------------------------------------------

struct BatchNormOptions {
  std::int64_t channel_axis = 1;  // negative: counts from the last
  double eps = 1e-5;
  double momentum = 0.1;  // forward: the share of the new batch in the running statistics, in [0, 1]
  bool training = true;   // backward: mean and rstd are those of this x; false: they are constants
};

// Everything but x, dy and out has shape (channels).

// Inference: y with running_mean and running_var in place of the statistics of x.
void batch_norm(const ArrayView& x, const ArrayView& running_mean, const ArrayView& running_var,
                const std::optional<ArrayView>& weight, const std::optional<ArrayView>& bias, const ArrayView& out,
                const BatchNormOptions& options = {});

// Training: y, mean, rstd from x. Running statistics, both or neither, are updated in place, the variance unbiased:
//   running = (1 - momentum) * running + momentum * batch
// std::invalid_argument also where there is one value per channel, or running statistics are not contiguous.
void batch_norm_forward(const ArrayView& x, const std::optional<ArrayView>& weight,
                        const std::optional<ArrayView>& bias, const std::optional<ArrayView>& running_mean,
                        const std::optional<ArrayView>& running_var, const ArrayView& out, const ArrayView& mean,
                        const ArrayView& rstd, const BatchNormOptions& options = {});

// As layer_norm_backward, averages over all axes but the channels'. options.training = false: dx = rstd * dy * weight,
// for statistics that were constants (fine-tuning with running statistics).
void batch_norm_backward(const ArrayView& dy, const ArrayView& x, const ArrayView& mean, const ArrayView& rstd,
                         const std::optional<ArrayView>& weight, const ArrayView& out,
                         const std::optional<ArrayView>& dweight, const std::optional<ArrayView>& dbias,
                         const BatchNormOptions& options = {});

// ---- Runtime -----------------------------------------------------------------------------------------------------

// All of these are process-wide and may be called on any thread.

// Threads an operation may use, the caller's included: LANENORM_NUM_THREADS, else OMP_NUM_THREADS, else what affinity
// and cgroup allow. std::invalid_argument while the variable is no count.
int get_num_threads();
// Returns the previous count. std::invalid_argument for n < 1.
int set_num_threads(int n);

// Instruction sets whose kernels are built in and run on this processor, best first, "portable" last.
std::vector<std::string> available_isas();
// The first of them, or what LANENORM_ISA names. std::invalid_argument where that is none of them.
std::string current_isa();
// Returns the previous one. std::invalid_argument where name is none of available_isas().
std::string use_isa(const std::string& name);

// Of the library linked: "0.1.0".
const char* version();

}  // namespace lanenorm
