// cuda_on_host._emulated: the CUDA operations on NumPy arrays, run by the emulator.
//
// Outputs and workspace are exactly as large as they must be and hold NaN before the kernels run.
#include "bind.hpp"
// after Python.h, which pybind11 includes as it needs it
#include <cstring>

#include "cuda/norms.hpp"
#include "cuda_on_host/emulator.hpp"

namespace {

using namespace lanenorm;

struct Emulated {
  using Array = py::array;
  static constexpr std::int64_t kKeepGil = 0;  // launches of several Python threads wait for each other

  Emulated(const char* /*operation*/, const Array& /*x*/, const Args& /*args*/) {}

  static constexpr bool takes(const py::handle&) { return true; }

  static Array cast(const py::handle& object, const char* operation, const char* argument) {
    if (!py::isinstance<py::array>(object)) {
      errors::wrong_kind(operation, argument, Py_TYPE(object.ptr())->tp_name, "numpy.ndarray");
    }
    return py::reinterpret_borrow<py::array>(object);
  }
  static py::dtype dtype(const Array& array) { return array.dtype(); }

  static View view(const Array& array, DType dtype) {
    static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t));
    return {const_cast<void*>(array.data()),
            dtype,
            static_cast<int>(array.ndim()),
            reinterpret_cast<const std::int64_t*>(array.shape()),
            reinterpret_cast<const std::int64_t*>(array.strides()),
            array.writeable()};
  }

  Array empty(const py::dtype& dtype, const std::int64_t* shape, int axes, const std::int64_t* strides) const {
    std::vector<py::ssize_t> lengths(shape, shape + axes), steps;
    if (strides != nullptr) steps.assign(strides, strides + axes);
    Array array(dtype, std::move(lengths), std::move(steps));
    if (array.nbytes() != 0) std::memset(array.mutable_data(), 0xff, static_cast<std::size_t>(array.nbytes()));
    return array;
  }

  void layer_norm_forward(const Args& args) const { with_workspace(args, cuda::layer_norm_forward); }
  void layer_norm_backward(const Args& args) const { with_workspace(args, cuda::layer_norm_backward); }
  void batch_norm_inference(const Args& args) const { with_workspace(args, cuda::batch_norm_inference); }
  void batch_norm_forward(const Args& args) const { with_workspace(args, cuda::batch_norm_forward); }
  void batch_norm_backward(const Args& args) const { with_workspace(args, cuda::batch_norm_backward); }

 private:
  static void with_workspace(const Args& args, void (*operation)(const Args&, const cuda::Context&)) {
    on_host::Workspace workspace;
    cuda::Context context{};
    context.state = &workspace;
    context.allocate = [](void* state, std::size_t bytes) {
      return static_cast<on_host::Workspace*>(state)->allocate(bytes);
    };
    operation(args, context);
  }
};

void set_device(int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int architecture,
                int max_cluster, int l2_bytes) {
  on_host::set_device(
      {multiprocessors, shared_per_block, shared_per_multiprocessor, architecture, max_cluster, l2_bytes});
}

void set_schedule(bool reversed) {
  on_host::set_schedule(reversed ? on_host::Schedule::reversed : on_host::Schedule::forward);
}

py::list take_launches() {
  py::list result;
  for (const on_host::LaunchShape& shape : on_host::take_launches()) {
    result.append(py::make_tuple(shape.grid, shape.block, shape.cluster, shape.shared_bytes));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA operations on NumPy arrays, run by the emulator; use cuda_on_host's functions instead.";
  register_errors();
  bind_operations<Emulated>(m);
  m.def("set_device", &set_device);
  m.def("set_schedule", &set_schedule);
  m.def("take_launches", &take_launches);
}
