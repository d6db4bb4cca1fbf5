// lanenorm._cpu: the operations on NumPy arrays.
#include "bind.hpp"
// after Python.h, which pybind11 includes as it needs it
#include <numpy/arrayobject.h>

#include <cstring>

#include "cpu/dispatch.hpp"
#include "cpu/norms.hpp"
#include "cpu/output_pool.hpp"
#include "cpu/parallel.hpp"

namespace {

// ---- memory of outputs -------------------------------------------------------------------------------------------

thread_local lanenorm::ReadBeside read_beside;  // the output that is being allocated

// The pool as a memory handler of NumPy (NEP 49): arrays made under it own their memory like any other, and give it
// back to the pool when they die.
void* pool_malloc(void*, std::size_t size) { return lanenorm::pool_allocate(size, read_beside); }
void* pool_calloc(void*, std::size_t count, std::size_t size) {
  void* block = lanenorm::pool_allocate(count * size);
  if (block != nullptr) std::memset(block, 0, count * size);
  return block;
}
void* pool_realloc(void*, void* block, std::size_t size) {  // ndarray.resize
  void* larger = lanenorm::pool_allocate(size);
  if (larger == nullptr || block == nullptr) return larger;
  const std::size_t capacity = lanenorm::pool_capacity(block);
  std::memcpy(larger, block, capacity < size ? capacity : size);
  lanenorm::pool_free(block);
  return larger;
}
void pool_release(void*, void* block, std::size_t) { lanenorm::pool_free(block); }

PyDataMem_Handler pool_handler = {"lanenorm_pool", 1, {nullptr, pool_malloc, pool_calloc, pool_realloc, pool_release}};

// NumPy allocates from the pool while one lives. Two context variable writes, 0.2 us.
class FromPool {
 public:
  explicit FromPool(lanenorm::ReadBeside reads) {
    static PyObject* const capsule = PyCapsule_New(&pool_handler, "mem_handler", nullptr);
    before_ = capsule == nullptr ? nullptr : PyDataMem_SetHandler(capsule);
    if (before_ == nullptr) throw py::error_already_set();
    read_beside = reads;
  }
  ~FromPool() {
    read_beside = {};
    Py_XDECREF(PyDataMem_SetHandler(before_)), Py_DECREF(before_);
  }
  FromPool(const FromPool&) = delete;
  FromPool& operator=(const FromPool&) = delete;

 private:
  PyObject* before_;
};

// ---- operations --------------------------------------------------------------------------------------------------

// How bind.hpp reaches NumPy arrays and the CPU operations.
struct Cpu {
  using Array = py::array;
  // Releasing and taking the GIL costs 60 ns; below this many elements (about 5 us of work) it is kept.
  static constexpr std::int64_t kKeepGil = 16384;

  Cpu(const char* /*operation*/, const Array& /*x*/, const lanenorm::Args& args) : reads_{args.x, args.dy} {}

  // The types of NUMPY in _arrays.py.
  static bool takes(const py::handle& object) {
    static PyObject* const memmap = py::object(py::module_::import("numpy").attr("memmap")).release().ptr();
    const PyTypeObject* type = Py_TYPE(object.ptr());
    return type == &PyArray_Type || type == reinterpret_cast<PyTypeObject*>(memmap);
  }

  static Array cast(const py::handle& object, const char* /*operation*/, const char* /*argument*/) {
    return py::reinterpret_borrow<py::array>(object);  // takes() has looked
  }
  static py::dtype dtype(const Array& array) { return array.dtype(); }

  static lanenorm::View view(const Array& array, lanenorm::DType dtype) {
    static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t) && sizeof(npy_intp) == sizeof(std::int64_t));
    const bool writable = array.writeable();
    return {const_cast<void*>(array.data()),
            dtype,
            static_cast<int>(array.ndim()),
            reinterpret_cast<const std::int64_t*>(array.shape()),
            reinterpret_cast<const std::int64_t*>(array.strides()),
            writable};
  }

  Array empty(const py::dtype& dtype, const std::int64_t* shape, int axes, const std::int64_t* strides) const {
    std::size_t bytes = static_cast<std::size_t>(dtype.itemsize());
    for (int axis = 0; axis < axes; ++axis) bytes *= static_cast<std::size_t>(shape[axis]);
    std::optional<FromPool> memory;
    if (bytes >= lanenorm::kPooledBytes) memory.emplace(reads_);
    // Not py::array's constructor: its two vectors and what it works out from them are 60 ns of 1.2 us.
    PyArray_Descr* descriptor = reinterpret_cast<PyArray_Descr*>(py::dtype(dtype).release().ptr());
    PyObject* array = PyArray_NewFromDescr(&PyArray_Type, descriptor, axes, reinterpret_cast<const npy_intp*>(shape),
                                           reinterpret_cast<const npy_intp*>(strides), nullptr, 0, nullptr);
    if (array == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::array>(array);
  }

  void layer_norm_forward(const lanenorm::Args& args) const { lanenorm::layer_norm_forward(args); }
  void layer_norm_backward(const lanenorm::Args& args) const { lanenorm::layer_norm_backward(args); }
  void batch_norm_inference(const lanenorm::Args& args) const { lanenorm::batch_norm_inference(args); }
  void batch_norm_forward(const lanenorm::Args& args) const { lanenorm::batch_norm_forward(args); }
  void batch_norm_backward(const lanenorm::Args& args) const { lanenorm::batch_norm_backward(args); }

  lanenorm::ReadBeside reads_;  // while outputs are written
};

// PyErr_CheckSignals already set KeyboardInterrupt, or whatever the handler raised.
void register_interrupt() {
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const lanenorm::Interrupted&) {
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
}

// Ctrl-C: called about every 50 ms by a thread that waits in a kernel.
bool interrupted() {
  const WithGil gil;
  return PyErr_CheckSignals() != 0;
}

int import_numpy() {
  import_array1(-1);
  return 0;
}

py::dict pool_use() {
  const lanenorm::PoolUse use = lanenorm::pool_use();
  py::dict d;
  d["used"] = use.used;
  d["free"] = use.free;
  d["limit"] = use.limit;
  d["free_blocks"] = use.free_blocks;
  return d;
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
  if (import_numpy() < 0) throw py::error_already_set();
  register_errors();
  register_interrupt();
  bind_operations<Cpu>(m);
  lanenorm::set_interrupt_hook(interrupted);
  m.def("get_num_threads", &lanenorm::get_num_threads);
  m.def("set_num_threads", &lanenorm::set_num_threads, py::pos_only(), py::arg("n"));
  m.def("available_isas", &lanenorm::available_isas);
  m.def("current_isa", &lanenorm::current_isa);
  m.def("use_isa", &lanenorm::use_isa);
  m.def("pool_use", &pool_use);
  m.def("pool_free_all", &lanenorm::pool_free_all);
  m.def("pool_set_limit", &lanenorm::pool_set_limit, py::pos_only(), py::arg("limit"));
  m.def("build_info", &build_info);
}
