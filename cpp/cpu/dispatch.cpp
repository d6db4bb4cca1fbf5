#include "cpu/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.hpp"

namespace lanenorm {

// Defined by isa_<name>.cpp: one table per dtype.
const KernelTable* kernels_portable();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_neon();

namespace {

struct Isa {
  const char* name;
  bool (*usable)();  // the CPU has it and the operating system saves its registers
  const KernelTable* (*kernels)();
};

// In order of preference. GCC's and clang's __builtin_cpu_supports ask CPUID and XGETBV.
const Isa kIsas[] = {
#ifdef LANENORM_HAVE_AVX512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
     },
     kernels_avx512},
#endif
#ifdef LANENORM_HAVE_AVX2
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     kernels_avx2},
#endif
#ifdef LANENORM_HAVE_NEON
    {"neon", [] { return true; }, kernels_neon},  // every aarch64 has it
#endif
    {"portable", [] { return true; }, kernels_portable},
};

std::atomic<const Isa*> current{nullptr};

// who: the argument or variable that named it
const Isa& find(const char* who, const std::string& wanted) {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.usable()) continue;
    if (isa.name == wanted) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument(std::string(who) + ": '" + wanted +
                              "' is not one of the instruction sets usable here: " + names);
}

const Isa& first_choice() {
  const char* wanted = std::getenv("LANENORM_ISA");
  if (wanted != nullptr && *wanted != '\0') return find("LANENORM_ISA", wanted);
  for (const Isa& isa : kIsas) {
    if (isa.usable()) return isa;
  }
  return kIsas[sizeof kIsas / sizeof kIsas[0] - 1];
}

const Isa& chosen() {
  const Isa* isa = current.load(std::memory_order_acquire);
  if (isa != nullptr) return *isa;
  const Isa* none = nullptr;  // two threads at once choose the same
  current.compare_exchange_strong(none, &first_choice(), std::memory_order_acq_rel);
  return *current.load(std::memory_order_acquire);
}

}  // namespace

const KernelTable& kernels(DType dtype) { return chosen().kernels()[static_cast<int>(dtype)]; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.emplace_back(isa.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.usable()) names.emplace_back(isa.name);
  }
  return names;
}

std::string current_isa() { return chosen().name; }

std::string use_isa(const std::string& name) {
  const Isa& wanted = find("use_isa", name);
  const std::string previous = chosen().name;
  current.store(&wanted, std::memory_order_release);
  return previous;
}

}  // namespace lanenorm
