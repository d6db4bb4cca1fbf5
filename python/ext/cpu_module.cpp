// lanenorm._cpu: the operations on NumPy arrays.
#include "bind.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/norms.hpp"
#include "cpu/parallel.hpp"

namespace {

// How bind.hpp reaches NumPy arrays and the CPU operations.
struct Cpu {
  using Array = py::array;

  static Array cast(const py::handle& object, const char* operation, const char* argument) {
    if (!py::isinstance<py::array>(object)) {
      lanenorm::errors::wrong_kind(operation, argument, Py_TYPE(object.ptr())->tp_name, "numpy.ndarray");
    }
    return py::reinterpret_borrow<py::array>(object);
  }
  static py::dtype dtype(const Array& array) { return array.dtype(); }

  static lanenorm::View view(const Array& array, lanenorm::DType dtype) {
    static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t));
    const bool writable = array.writeable();
    return {const_cast<void*>(array.data()),
            dtype,
            static_cast<int>(array.ndim()),
            reinterpret_cast<const std::int64_t*>(array.shape()),
            reinterpret_cast<const std::int64_t*>(array.strides()),
            writable};
  }

  static Array empty(const py::dtype& dtype, const std::int64_t* shape, int axes, const std::int64_t* strides) {
    std::vector<py::ssize_t> s(shape, shape + axes);
    if (strides == nullptr) return py::array(dtype, std::move(s));
    return py::array(dtype, std::move(s), std::vector<py::ssize_t>(strides, strides + axes));
  }

  static void layer_norm_forward(const lanenorm::Args& args) { lanenorm::layer_norm_forward(args); }
  static void layer_norm_backward(const lanenorm::Args& args) { lanenorm::layer_norm_backward(args); }
  static void batch_norm_inference(const lanenorm::Args& args) { lanenorm::batch_norm_inference(args); }
  static void batch_norm_forward(const lanenorm::Args& args) { lanenorm::batch_norm_forward(args); }
  static void batch_norm_backward(const lanenorm::Args& args) { lanenorm::batch_norm_backward(args); }
};

// Ctrl-C: called about every 50 ms by a thread that waits in a kernel.
bool interrupted() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool stop = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return stop;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LANENORM_VERSION;
  info["compiler"] = std::string("GCC-compatible ") + __VERSION__;
  info["compiled_isas"] = lanenorm::compiled_isas();
  return info;
}

}  // namespace

// threadpoolctl finds these by name.
extern "C" {
__attribute__((visibility("default"))) int lanenorm_get_num_threads() { return lanenorm::get_num_threads(); }
__attribute__((visibility("default"))) int lanenorm_set_num_threads(int n) {
  return lanenorm::set_num_threads(n < 1 ? 1 : n);  // no exception may leave a C function
}
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Batch and layer normalization of NumPy arrays; use lanenorm's functions instead.";
  register_errors();
  bind_operations<Cpu>(m);
  lanenorm::set_interrupt_hook(interrupted);
  m.def("get_num_threads", &lanenorm::get_num_threads);
  m.def("set_num_threads", &lanenorm::set_num_threads, py::pos_only(), py::arg("n"));
  m.def("available_isas", &lanenorm::available_isas);
  m.def("current_isa", &lanenorm::current_isa);
  m.def("use_isa", &lanenorm::use_isa);
  m.def("build_info", &build_info);
}
