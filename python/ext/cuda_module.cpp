// lanenorm._cuda: the operations on CuPy arrays. Loads where there is no driver, no GPU and no CuPy; CuPy is looked up
// at the first call, when one of its arrays is there.
//
// Nothing here waits for the GPU. Outputs and workspace come from CuPy's current allocator; kernels are launched on the
// current stream of the device that the arrays lie on.
#include "bind.hpp"
// after Python.h, which pybind11 includes as it needs it
#include "cuda/runtime.hpp"

namespace {

using lanenorm::cuda::check;

// ---- CuPy --------------------------------------------------------------------------------------------------------

// An attribute, by a name that becomes a Python string only once: 40 ns in place of 90.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  // A null object where there is none.
  py::object find(const py::handle& object) const {
    py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name_));
    if (!value) PyErr_Clear();
    return value;
  }
  py::object of(const py::handle& object) const {
    py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name_));
    if (!value) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* name_;
};

std::int64_t integer(const py::handle& object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void* pointer(const py::handle& object) {
  void* value = PyLong_AsVoidPtr(object.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// What is called of CuPy, looked up once.
struct CuPy {
  py::object ndarray, alloc, get_current_stream, get_device, set_device;

  static const CuPy& get() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<CuPy> once;
    return once
        .call_once_and_store_result([] {
          const py::module_ cupy = py::module_::import("cupy");
          const py::object cuda = cupy.attr("cuda"), runtime = cuda.attr("runtime");
          return CuPy{cupy.attr("ndarray"), cuda.attr("alloc"), cuda.attr("get_current_stream"),
                      runtime.attr("getDevice"), runtime.attr("setDevice")};
        })
        .get_stored();
  }
};

// A cupy.ndarray and what a View borrows from it.
struct CuPyArray : py::object {
  CuPyArray(py::object array, void* data, int device, int axes)
      : py::object(std::move(array)), data(data), device(device), axes(axes), layout(new std::int64_t[2 * axes]) {}
  std::int64_t* shape() const { return layout.get(); }
  std::int64_t* strides() const { return layout.get() + axes; }

  void* data;  // on `device`
  int device, axes;
  std::unique_ptr<std::int64_t[]> layout;  // shape, then strides in bytes
};

// ---- During a call -----------------------------------------------------------------------------------------------

// Makes a device current, for CuPy (allocations) and for this module's own copy of the CUDA runtime (launches).
class CurrentDevice {
 public:
  CurrentDevice(const char* operation, int device)
      : before_(static_cast<int>(integer(CuPy::get().get_device()))), changed_(before_ != device) {
    check(operation, "cudaSetDevice", cudaSetDevice(device));
    if (changed_) CuPy::get().set_device(device);
  }
  ~CurrentDevice() {
    if (!changed_) return;
    try {
      CuPy::get().set_device(before_);
    } catch (py::error_already_set& error) {  // it was current before: this cannot be
      error.discard_as_unraisable("lanenorm");
    }
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const int before_;
  const bool changed_;
};

// cupy.cuda.MemoryPointer to memory on the current device, where the current stream may use it. With the GIL.
py::object allocate(const char* operation, std::int64_t bytes, int device) {
  try {
    return CuPy::get().alloc(bytes);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_MemoryError)) throw;
    lanenorm::errors::out_of_device_memory(operation, bytes, device, py::cast<std::string>(py::str(error.value())));
  }
}

// What kernels need beside the arrays, for the length of one operation. Memory from CuPy goes back to its allocator
// as soon as all is launched: whoever gets it next uses it behind these kernels on the same stream. But a graph runs
// its kernels again later, when that memory belongs to others: while the stream is being captured, memory is
// allocated and freed by nodes of the graph.
class Workspace {
 public:
  Workspace(const char* operation, int device, cudaStream_t stream)
      : operation_(operation), device_(device), stream_(stream), of_graph_(operation, stream) {}
  ~Workspace() {
    if (of_pool_.empty()) return;
    const WithGil gil;
    of_pool_.clear();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* allocate(std::size_t bytes) {
    if (capturing()) return of_graph_.allocate(bytes);
    const WithGil gil;
    of_pool_.push_back(::allocate(operation_, static_cast<std::int64_t>(bytes), device_));
    return pointer(of_pool_.back().attr("ptr"));
  }

  // After the last launch.
  void release() { of_graph_.release(); }

 private:
  bool capturing() const {
    // CUDA does not capture the legacy stream, and asking about it while another thread captures would be an error.
    if (stream_ == nullptr || stream_ == cudaStreamLegacy) return false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(operation_, "cudaStreamIsCapturing", cudaStreamIsCapturing(stream_, &status));
    return status == cudaStreamCaptureStatusActive;
  }

  const char* operation_;
  int device_;
  cudaStream_t stream_;
  std::vector<py::object> of_pool_;
  lanenorm::cuda::StreamMemory of_graph_;
};

// ---- operations --------------------------------------------------------------------------------------------------

// How bind.hpp reaches CuPy arrays and the CUDA operations.
class Cuda {
 public:
  using Array = CuPyArray;
  // Never kept: a launch waits while the queue of its stream is full, and what is queued may be a callback that needs
  // the GIL.
  static constexpr std::int64_t kKeepGil = 0;

  Cuda(const char* operation, const Array& x, const lanenorm::Args& /*args*/)
      : operation_(operation),
        device_(x.device),
        current_(operation, x.device),
        stream_(static_cast<cudaStream_t>(pointer(CuPy::get().get_current_stream(x.device).attr("ptr")))) {}

  static constexpr bool takes(const py::handle&) { return true; }  // _arrays.py has made sure

  static Array cast(const py::handle& object, const char* operation, const char* argument) {
    static const Attribute data("data"), ptr("ptr"), device_id("device_id"), shape("shape"), strides("strides");
    const py::object memory = data.find(object);
    const py::object address = memory ? ptr.find(memory) : py::object();
    if (!address) {
      lanenorm::errors::wrong_kind(operation, argument, Py_TYPE(object.ptr())->tp_name, "cupy.ndarray");
    }
    const py::tuple lengths(shape.of(object)), steps(strides.of(object));
    Array array(py::reinterpret_borrow<py::object>(object), pointer(address),
                static_cast<int>(integer(device_id.of(memory))), static_cast<int>(lengths.size()));
    for (int axis = 0; axis < array.axes; ++axis) {
      array.shape()[axis] = integer(PyTuple_GET_ITEM(lengths.ptr(), axis));
      array.strides()[axis] = integer(PyTuple_GET_ITEM(steps.ptr(), axis));
    }
    return array;
  }

  static py::dtype dtype(const Array& array) {
    static const Attribute name("dtype");
    return py::dtype(name.of(array));
  }

  // CuPy's arrays can always be written to.
  static lanenorm::View view(const Array& array, lanenorm::DType dtype) {
    return {array.data, dtype, array.axes, array.shape(), array.strides(), true};
  }

  Array empty(const py::dtype& dtype, const std::int64_t* shape, int axes, const std::int64_t* strides) const {
    std::int64_t bytes = dtype.itemsize();
    for (int axis = 0; axis < axes; ++axis) bytes *= shape[axis];
    const py::object memory = allocate(operation_, bytes, device_);
    const py::tuple lengths = tuple(shape, axes);
    Array array(strides == nullptr ? CuPy::get().ndarray(lengths, dtype, memory)
                                   : CuPy::get().ndarray(lengths, dtype, memory, tuple(strides, axes)),
                pointer(memory.attr("ptr")), device_, axes);
    std::int64_t stride = dtype.itemsize();
    for (int axis = axes - 1; axis >= 0; --axis) {
      array.shape()[axis] = shape[axis];
      array.strides()[axis] = strides == nullptr ? stride : strides[axis];
      stride *= shape[axis];
    }
    return array;
  }

  void layer_norm_forward(const lanenorm::Args& args) const { run(lanenorm::cuda::layer_norm_forward, args); }
  void layer_norm_backward(const lanenorm::Args& args) const { run(lanenorm::cuda::layer_norm_backward, args); }
  void batch_norm_inference(const lanenorm::Args& args) const { run(lanenorm::cuda::batch_norm_inference, args); }
  void batch_norm_forward(const lanenorm::Args& args) const { run(lanenorm::cuda::batch_norm_forward, args); }
  void batch_norm_backward(const lanenorm::Args& args) const { run(lanenorm::cuda::batch_norm_backward, args); }

 private:
  static py::tuple tuple(const std::int64_t* values, int count) {
    py::tuple result(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(result.ptr(), i, PyLong_FromLongLong(values[i]));
    return result;
  }

  void run(void (*operation)(const lanenorm::Args&, const lanenorm::cuda::Context&), const lanenorm::Args& args) const {
    Workspace workspace(operation_, device_, stream_);
    lanenorm::cuda::run(
        operation_, operation, args,
        {device_, stream_,
         [](void* state, std::size_t bytes) { return static_cast<Workspace*>(state)->allocate(bytes); }, &workspace});
    workspace.release();
  }

  const char* operation_;
  const int device_;
  const CurrentDevice current_;
  const cudaStream_t stream_;
};

py::dict build_info() {
  py::dict info;
  info["version"] = LANENORM_VERSION;
  info["cuda"] = lanenorm::errors::cuda_version(CUDART_VERSION);
  info["architectures"] = LANENORM_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Batch and layer normalization of CuPy arrays; use lanenorm's functions instead.";
  register_errors();
  bind_operations<Cuda>(m);
  m.def("unavailable_reason", &lanenorm::cuda::unavailable_reason);
  m.def("build_info", &build_info);
}
