// The Python face of the operations: one template for every array library and device. Objects become Views,
// core/check.hpp checks them, outputs are allocated, the GIL is released, the operation runs. No arithmetic, no branch
// on shape.
//
// Device is what a module supplies:
//
//   Array                                a py::object, with whatever a View of it borrows
//   static bool takes(object)                            whether it is an array of this library, where others may come
//   static Array cast(object, operation, argument)       of an object that it takes, or errors::wrong_kind
//   static py::dtype dtype(array)
//   static View view(array, dtype)
//   Device(operation, x, args)           made once a call, after its checks and before anything is allocated; on a GPU
//                                        it makes the device of x current until it is destroyed
//   Array empty(dtype, shape, axes, strides) const       strides null: C order
//   void layer_norm_forward(args) const, ...             the operations that the module binds
//   static constexpr std::int64_t kKeepGil               see run
//
// What layer_norm(x, weight, bias) of 1 x 768 float32 costs from Python, 0.85 us on a Zen 4 (perf, 4 million calls):
//
//   270 ns  interpreter: the loop around the call, the frame of functional.py with its keyword defaults, the vectorcall
//   190 ns  kernel: two sweeps over 48 vectors, 30 ns; one division and one root, in a row with everything else
//   130 ns  driver: line tables, parallel_for, the floating-point environment
//    75 ns  checks and Plan
//    75 ns  memory of y: malloc and free of 3 KB, NumPy's array object
//    65 ns  this file: arguments into Views
//    40 ns  libc, thread-local storage, the clock
//
// Longer than 300 lines because a call is followed here from its arguments to its results, for both modules.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cxxabi.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/errors.hpp"

namespace py = pybind11;

// ---- dtypes ------------------------------------------------------------------------------------------------------

// bfloat16 is registered with NumPy at run time (by ml_dtypes), under a number that no two processes need share.
inline bool is_bfloat16(const py::dtype& dtype) {
  static std::atomic<int> known{-1};
  const int number = dtype.num();
  if (number == known.load(std::memory_order_relaxed)) return true;
  if (number < 256 || dtype.itemsize() != 2) return false;
  if (py::cast<std::string>(dtype.attr("name")) != "bfloat16") return false;
  known.store(number, std::memory_order_relaxed);
  return true;
}

inline std::optional<lanenorm::DType> dtype_of(const py::dtype& dtype) {
  const char order = dtype.byteorder();
  if (order == '>' || order == '!') return std::nullopt;  // this library runs on little-endian machines only
  switch (dtype.num()) {
    case 23: return lanenorm::DType::float16;  // NPY_HALF
    case py::detail::npy_api::NPY_FLOAT_: return lanenorm::DType::float32;
    case py::detail::npy_api::NPY_DOUBLE_: return lanenorm::DType::float64;
    default: break;
  }
  if (is_bfloat16(dtype)) return lanenorm::DType::bfloat16;
  return std::nullopt;
}

inline py::dtype numpy_statistics_dtype(lanenorm::DType dtype) {
  return py::dtype(dtype == lanenorm::DType::float64 ? int{py::detail::npy_api::NPY_DOUBLE_}
                                                     : int{py::detail::npy_api::NPY_FLOAT_});
}

// ---- arguments ---------------------------------------------------------------------------------------------------

// An argument that was given: the array stays alive, the View borrows from it.
template <class Device>
struct Argument {
  typename Device::Array array;
  lanenorm::View view;
};

template <class Device>
Argument<Device> argument(const char* operation, const char* name, const py::handle& object) {
  auto array = Device::cast(object, operation, name);
  const py::dtype dtype = Device::dtype(array);
  const std::optional<lanenorm::DType> known = dtype_of(dtype);
  if (!known) lanenorm::errors::unsupported_dtype(operation, name, py::cast<std::string>(py::str(dtype)));
  const lanenorm::View view = Device::view(array, *known);
  return {std::move(array), view};
}

template <class Device>
struct OptionalArgument {
  std::optional<Argument<Device>> given;
  const lanenorm::View* view() const { return given ? &given->view : nullptr; }
};

template <class Device>
OptionalArgument<Device> optional_argument(const char* operation, const char* name, const py::handle& object) {
  if (object.is_none()) return {};
  return {argument<Device>(operation, name, object)};
}

// One axis: anything with __index__ but bool.
inline std::int64_t axis_of(const char* operation, const char* name, const py::handle& object, const char* expected) {
  if (PyBool_Check(object.ptr()) || !PyIndex_Check(object.ptr())) {
    lanenorm::errors::wrong_kind(operation, name, Py_TYPE(object.ptr())->tp_name, expected);
  }
  const Py_ssize_t axis = PyNumber_AsSsize_t(object.ptr(), nullptr);  // clips: any such axis is out of range
  if (axis == -1 && PyErr_Occurred()) throw py::error_already_set();
  return axis;
}

// The axes of a call, as the caller wrote them. Usually one, so no memory is asked for.
class Axes {
 public:
  void push_back(std::int64_t axis) {
    if (many_.empty() && count_ == kFew) many_.assign(few_, few_ + kFew);
    many_.empty() ? void(few_[count_] = axis) : many_.push_back(axis);
    ++count_;
  }
  lanenorm::AxisList list() const { return {many_.empty() ? few_ : many_.data(), count_}; }

 private:
  static constexpr int kFew = 4;
  std::int64_t few_[kFew];
  std::vector<std::int64_t> many_;
  int count_ = 0;
};

inline Axes axes_of(const char* operation, const py::handle& object) {
  const char* expected = "int or tuple of ints";
  Axes axes;
  if (PyTuple_Check(object.ptr())) {
    for (const py::handle axis : py::reinterpret_borrow<py::tuple>(object)) {
      axes.push_back(axis_of(operation, "axis", axis, expected));
    }
  } else {
    axes.push_back(axis_of(operation, "axis", object, expected));
  }
  return axes;
}

// What pybind11 takes for a bool.
inline bool flag_of(const char* operation, const char* name, const py::handle& object) {
  if (object.ptr() == Py_True) return true;
  if (object.ptr() == Py_False || object.is_none()) return false;
  const PyNumberMethods* number = Py_TYPE(object.ptr())->tp_as_number;
  if (number == nullptr || number->nb_bool == nullptr) {
    lanenorm::errors::wrong_kind(operation, name, Py_TYPE(object.ptr())->tp_name, "bool");
  }
  const int value = number->nb_bool(object.ptr());
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

inline double number_of(const char* operation, const char* name, const py::handle& object) {
  if (PyFloat_CheckExact(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
  const double value = PyNumber_Check(object.ptr()) && !PyBool_Check(object.ptr()) && !PyComplex_Check(object.ptr())
                           ? PyFloat_AsDouble(object.ptr())
                           : -1.0;
  const bool refused = PyBool_Check(object.ptr()) || PyComplex_Check(object.ptr()) || !PyNumber_Check(object.ptr());
  if (refused || (value == -1.0 && PyErr_Occurred())) {
    PyErr_Clear();
    lanenorm::errors::wrong_kind(operation, name, Py_TYPE(object.ptr())->tp_name, "a real number");
  }
  return value;
}

// ---- running -----------------------------------------------------------------------------------------------------

// The thread state of an operation that has released the GIL; null where this thread has it.
inline thread_local PyThreadState* without_gil = nullptr;

// Takes back what release_gil() gave. Not with PyGILState_Ensure: it looks for a thread state of its own, in an
// interpreter that may be gone, while PyEval_RestoreThread looks first whether the interpreter ends. If it does, Python
// before 3.14 unwinds the (daemon) thread where it stands, through C++ that other threads may still work for. The
// thread sleeps here instead until the process is gone, as Python 3.14 makes it do. (Nothing else is ever caught here:
// that unwinding stops for catch (...), but for good only if the handler never ends.)
inline void take_gil() {
  try {
    PyEval_RestoreThread(std::exchange(without_gil, nullptr));
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

inline void release_gil() { without_gil = PyEval_SaveThread(); }

// The GIL inside of an operation, whether it was released or kept.
class WithGil {
 public:
  WithGil() : taken_(without_gil != nullptr) {
    if (taken_) take_gil();
  }
  ~WithGil() {
    if (taken_) release_gil();
  }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  const bool taken_;
};

// Below Device::kKeepGil elements the GIL is kept. Not pybind11's gil_scoped_release: its destructor ends the process
// where that unwinding passes.
template <class Device>
void run(const Device& device, const lanenorm::Args& args, void (Device::*operation)(const lanenorm::Args&) const) {
  if (args.plan.elements < Device::kKeepGil) {
    (device.*operation)(args);
    return;
  }
  release_gil();
  std::exception_ptr error;
  try {
    (device.*operation)(args);
  } catch (...) {
    error = std::current_exception();
  }
  take_gil();
  if (error) std::rethrow_exception(error);
}

// y, or dx: `out` where it was given.
template <class Device>
py::object output(const Device& device, const Argument<Device>& x, const OptionalArgument<Device>& out,
                  lanenorm::Args* args) {
  if (out.given) return out.given->array;
  auto y = device.empty(Device::dtype(x.array), x.view.shape, x.view.axes, args->y_strides);
  args->y = Device::view(y, x.view.dtype).data;
  return std::move(y);
}

template <class Device>
std::pair<py::object, py::object> statistics(const Device& device, const Argument<Device>& x, lanenorm::Args* args) {
  std::int64_t shape[lanenorm::kMaxAxes];
  int axes = 0;
  const bool keep = args->plan.affine == lanenorm::Affine::per_element;
  for (int axis = 0; axis < x.view.axes; ++axis) {
    if (!args->reduced[axis]) {
      shape[axes++] = x.view.shape[axis];
    } else if (keep) {
      shape[axes++] = 1;
    }
  }
  const py::dtype dtype = numpy_statistics_dtype(x.view.dtype);
  auto mean = device.empty(dtype, shape, axes, nullptr);
  auto rstd = device.empty(dtype, shape, axes, nullptr);
  const lanenorm::DType kind = lanenorm::statistics_dtype(x.view.dtype);
  lanenorm::attach_statistics(x.view, Device::view(mean, kind), Device::view(rstd, kind), args);
  return {std::move(mean), std::move(rstd)};
}

// dweight and dbias in the dtype of weight; in the statistics dtype where there is none.
template <class Device>
std::pair<py::object, py::object> parameter_gradients(const Device& device, const Argument<Device>& x,
                                                      const OptionalArgument<Device>& weight, lanenorm::Args* args) {
  std::int64_t shape[lanenorm::kMaxAxes];
  int axes = 0;
  const bool of_reduced = args->plan.affine == lanenorm::Affine::per_element;
  for (int axis = 0; axis < x.view.axes; ++axis) {
    if (args->reduced[axis] == of_reduced) shape[axes++] = x.view.shape[axis];
  }
  const py::dtype dtype = weight.given ? Device::dtype(weight.given->array) : numpy_statistics_dtype(x.view.dtype);
  auto dweight = device.empty(dtype, shape, axes, nullptr);
  auto dbias = device.empty(dtype, shape, axes, nullptr);
  lanenorm::attach_parameters(x.view, Device::view(dweight, args->parameter_dtype),
                              Device::view(dbias, args->parameter_dtype), args);
  return {std::move(dweight), std::move(dbias)};
}

// An instance of `type`, a named tuple of three; 100 ns less than naming a tuple in Python.
inline py::object named(const char* operation, const py::handle& type, py::object a, py::object b, py::object c) {
  PyTypeObject* of = reinterpret_cast<PyTypeObject*>(type.ptr());
  if (!PyType_Check(type.ptr()) || !PyType_IsSubtype(of, &PyTuple_Type)) {
    lanenorm::errors::wrong_kind(operation, "result", Py_TYPE(type.ptr())->tp_name, "a named tuple");
  }
  PyObject* tuple = of->tp_alloc(of, 3);
  if (tuple == nullptr) throw py::error_already_set();
  PyTuple_SET_ITEM(tuple, 0, a.release().ptr());
  PyTuple_SET_ITEM(tuple, 1, b.release().ptr());
  PyTuple_SET_ITEM(tuple, 2, c.release().ptr());
  return py::reinterpret_steal<py::object>(tuple);
}

template <class Device>
py::object gradients(const char* name, const Argument<Device>& x, const OptionalArgument<Device>& weight,
                     const OptionalArgument<Device>& out, bool param_grads, const py::handle& result,
                     lanenorm::Args* args, void (Device::*operation)(const lanenorm::Args&) const) {
  const Device device(name, x.array, *args);
  auto dx = output(device, x, out, args);
  if (!param_grads) {
    run(device, *args, operation);
    return named(name, result, std::move(dx), py::none(), py::none());
  }
  auto [dweight, dbias] = parameter_gradients(device, x, weight, args);
  run(device, *args, operation);
  return named(name, result, std::move(dx), std::move(dweight), std::move(dbias));
}

// ---- operations --------------------------------------------------------------------------------------------------

// Every operation takes its arguments by position and returns NotImplemented where an array is none of this library.
template <class Device>
struct Operations {
  using Object = const py::handle&;
  static constexpr const char* kInt = "int";

  static py::object layer_norm(Object x_, Object weight_, Object bias_, Object axis, Object eps, Object out_) {
    if (!given(x_) || !optional(weight_, bias_, out_)) return not_implemented();
    const char* name = "layer_norm";
    lanenorm::Args args;
    const auto x = layer_norm_args(name, x_, weight_, bias_, axis, eps, out_, &args);
    const Device device(name, x.first.array, args);
    auto y = output(device, x.first, x.second, &args);
    run(device, args, &Device::layer_norm_forward);
    return y;
  }

  static py::object layer_norm_forward(Object x_, Object weight_, Object bias_, Object axis, Object eps, Object out_,
                                       Object result) {
    if (!given(x_) || !optional(weight_, bias_, out_)) return not_implemented();
    const char* name = "layer_norm_forward";
    lanenorm::Args args;
    const auto x = layer_norm_args(name, x_, weight_, bias_, axis, eps, out_, &args);
    const Device device(name, x.first.array, args);
    auto y = output(device, x.first, x.second, &args);
    auto [mean, rstd] = statistics(device, x.first, &args);
    run(device, args, &Device::layer_norm_forward);
    return named(name, result, std::move(y), std::move(mean), std::move(rstd));
  }

  static py::object layer_norm_backward(Object dy_, Object x_, Object mean_, Object rstd_, Object weight_, Object axis,
                                        Object param_grads, Object out_, Object result) {
    if (!given(dy_, x_, mean_, rstd_) || !optional(weight_, out_)) return not_implemented();
    const char* name = "layer_norm_backward";
    const auto dy = argument<Device>(name, "dy", dy_);
    const auto x = argument<Device>(name, "x", x_);
    const auto mean = argument<Device>(name, "mean", mean_);
    const auto rstd = argument<Device>(name, "rstd", rstd_);
    const auto weight = optional_argument<Device>(name, "weight", weight_);
    const auto axes = axes_of(name, axis);
    const auto out = optional_argument<Device>(name, "out", out_);
    lanenorm::Args args;
    lanenorm::check_layer_norm_backward(name, dy.view, x.view, mean.view, rstd.view, weight.view(), axes.list(),
                                        out.view(), &args);
    return gradients(name, x, weight, out, flag_of(name, "param_grads", param_grads), result, &args,
                     &Device::layer_norm_backward);
  }

  static py::object batch_norm(Object x_, Object running_mean_, Object running_var_, Object weight_, Object bias_,
                               Object channel_axis, Object eps, Object out_) {
    if (!given(x_, running_mean_, running_var_) || !optional(weight_, bias_, out_)) return not_implemented();
    const char* name = "batch_norm";
    const auto x = argument<Device>(name, "x", x_);
    const auto running_mean = argument<Device>(name, "running_mean", running_mean_);
    const auto running_var = argument<Device>(name, "running_var", running_var_);
    const auto weight = optional_argument<Device>(name, "weight", weight_);
    const auto bias = optional_argument<Device>(name, "bias", bias_);
    const auto out = optional_argument<Device>(name, "out", out_);
    lanenorm::Args args;
    lanenorm::check_batch_norm_inference(name, x.view, running_mean.view, running_var.view, weight.view(), bias.view(),
                                         axis_of(name, "channel_axis", channel_axis, kInt), number_of(name, "eps", eps),
                                         out.view(), &args);
    const Device device(name, x.array, args);
    auto y = output(device, x, out, &args);
    run(device, args, &Device::batch_norm_inference);
    return y;
  }

  static py::object batch_norm_forward(Object x_, Object weight_, Object bias_, Object running_mean_,
                                       Object running_var_, Object momentum, Object channel_axis, Object eps,
                                       Object out_, Object result) {
    if (!given(x_) || !optional(weight_, bias_, running_mean_, running_var_, out_)) return not_implemented();
    const char* name = "batch_norm_forward";
    const auto x = argument<Device>(name, "x", x_);
    const auto weight = optional_argument<Device>(name, "weight", weight_);
    const auto bias = optional_argument<Device>(name, "bias", bias_);
    const auto running_mean = optional_argument<Device>(name, "running_mean", running_mean_);
    const auto running_var = optional_argument<Device>(name, "running_var", running_var_);
    const auto out = optional_argument<Device>(name, "out", out_);
    if (momentum.is_none()) lanenorm::errors::no_momentum(name);
    lanenorm::Args args;
    lanenorm::check_batch_norm_forward(name, x.view, weight.view(), bias.view(), running_mean.view(),
                                       running_var.view(), number_of(name, "momentum", momentum),
                                       axis_of(name, "channel_axis", channel_axis, kInt), number_of(name, "eps", eps),
                                       out.view(), &args);
    const Device device(name, x.array, args);
    auto y = output(device, x, out, &args);
    auto [mean, rstd] = statistics(device, x, &args);
    run(device, args, &Device::batch_norm_forward);
    return named(name, result, std::move(y), std::move(mean), std::move(rstd));
  }

  static py::object batch_norm_backward(Object dy_, Object x_, Object mean_, Object rstd_, Object weight_,
                                        Object channel_axis, Object training, Object param_grads, Object out_,
                                        Object result) {
    if (!given(dy_, x_, mean_, rstd_) || !optional(weight_, out_)) return not_implemented();
    const char* name = "batch_norm_backward";
    const auto dy = argument<Device>(name, "dy", dy_);
    const auto x = argument<Device>(name, "x", x_);
    const auto mean = argument<Device>(name, "mean", mean_);
    const auto rstd = argument<Device>(name, "rstd", rstd_);
    const auto weight = optional_argument<Device>(name, "weight", weight_);
    const auto out = optional_argument<Device>(name, "out", out_);
    lanenorm::Args args;
    lanenorm::check_batch_norm_backward(name, dy.view, x.view, mean.view, rstd.view, weight.view(),
                                        axis_of(name, "channel_axis", channel_axis, kInt),
                                        flag_of(name, "training", training), out.view(), &args);
    return gradients(name, x, weight, out, flag_of(name, "param_grads", param_grads), result, &args,
                     &Device::batch_norm_backward);
  }

 private:
  template <class... Objects>
  static bool given(const Objects&... objects) {
    return (Device::takes(objects) && ...);
  }
  template <class... Objects>
  static bool optional(const Objects&... objects) {
    return ((objects.is_none() || Device::takes(objects)) && ...);
  }
  static py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

  static std::pair<Argument<Device>, OptionalArgument<Device>> layer_norm_args(const char* name, Object x_,
                                                                               Object weight_, Object bias_,
                                                                               Object axis, Object eps, Object out_,
                                                                               lanenorm::Args* args) {
    auto x = argument<Device>(name, "x", x_);
    const auto weight = optional_argument<Device>(name, "weight", weight_);
    const auto bias = optional_argument<Device>(name, "bias", bias_);
    const auto axes = axes_of(name, axis);
    auto out = optional_argument<Device>(name, "out", out_);
    lanenorm::check_layer_norm_forward(name, x.view, weight.view(), bias.view(), axes.list(),
                                       number_of(name, "eps", eps), out.view(), args);
    return {std::move(x), std::move(out)};
  }
};

// An operation as a function that the interpreter calls with its arguments where they lie: pybind11's dispatch, made
// for overloads and conversions, is 70 ns of what a small call takes.
template <auto kOperation>
struct Entry;
template <class... Objects, py::object (*kOperation)(Objects...)>
struct Entry<kOperation> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    constexpr Py_ssize_t kCount = sizeof...(Objects);
    if (count != kCount) {
      PyErr_Format(PyExc_TypeError, "%zd arguments, expected %zd", count, kCount);
      return nullptr;
    }
    try {
      return with(arguments, std::index_sequence_for<Objects...>{});
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (abi::__forced_unwind&) {
      throw;
    } catch (...) {
      py::detail::try_translate_exceptions();
    }
    return nullptr;
  }
  static PyMethodDef method(const char* name, const char* doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, doc};
  }

 private:
  template <std::size_t... I>
  static PyObject* with(PyObject* const* arguments, std::index_sequence<I...>) {
    return kOperation(py::handle(arguments[I])...).release().ptr();
  }
};

template <class Device>
void bind_operations(py::module_& m) {
  using O = Operations<Device>;
  static PyMethodDef methods[] = {
      Entry<O::layer_norm>::method("layer_norm", "layer_norm(x, weight, bias, axis, eps, out, /)"),
      Entry<O::layer_norm_forward>::method("layer_norm_forward",
                                           "layer_norm_forward(x, weight, bias, axis, eps, out, result, /)"),
      Entry<O::layer_norm_backward>::method(
          "layer_norm_backward", "layer_norm_backward(dy, x, mean, rstd, weight, axis, param_grads, out, result, /)"),
      Entry<O::batch_norm>::method("batch_norm",
                                   "batch_norm(x, running_mean, running_var, weight, bias, channel_axis, eps, out, /)"),
      Entry<O::batch_norm_forward>::method("batch_norm_forward",
                                           "batch_norm_forward(x, weight, bias, running_mean, running_var, momentum, "
                                           "channel_axis, eps, out, result, /)"),
      Entry<O::batch_norm_backward>::method("batch_norm_backward",
                                            "batch_norm_backward(dy, x, mean, rstd, weight, channel_axis, training, "
                                            "param_grads, out, result, /)"),
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) < 0) throw py::error_already_set();
}

// C++ exceptions as the Python ones that NumPy users expect.
inline void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const lanenorm::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const lanenorm::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const lanenorm::AxisError& e) {
      const py::object type = py::module_::import("numpy.exceptions").attr("AxisError");
      PyErr_SetObject(type.ptr(), py::str(e.what()).ptr());
    }
  });
}
